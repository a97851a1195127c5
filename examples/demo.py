"""Samples moving digits with the example model: eager, Inductor, quantcache by default and with a calibrated plan.

Everything runs in this one process, with the same seeds and the same number of steps. Prints a table; writes a strip
of frames side by side and the step × region maps into `out/`.

    python examples/demo.py [--steps 50] [--videos 30] [--share 0.2]
"""

import argparse
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from rich.console import Console
from rich.table import Table
from torch import Tensor

import qc_compiler
from digits import NUM_DIGITS
from sampling import load_classifier, load_model, psnr, sample, ssim

SEED, CALIBRATION_SEED, GUIDANCE = 0, 1000, 2.0


@dataclass(frozen=True)
class Run:
    """One way to sample: its videos (B, C, F, H, W), seconds of a warm trajectory, seconds to compile, share."""

    name: str
    videos: Tensor
    seconds: float
    compile_seconds: float
    share: float


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=50, help="sampler steps (default 50)")
    parser.add_argument("--videos", type=int, default=30, help="videos to generate (default 30)")
    parser.add_argument("--share", type=float, default=0.2, help="share of the work the plan may spend (default 0.2)")
    parser.add_argument("--out", type=Path, default=Path("out"), help="folder for the pictures (default out)")
    args = parser.parse_args()
    console = Console(width=110)

    model = load_model().requires_grad_(False)
    label = torch.arange(args.videos) % NUM_DIGITS

    def generate(model: Callable[..., Tensor]) -> Tensor:
        return sample(model, label, steps=args.steps, seed=SEED, guidance=GUIDANCE)

    def calibration_samples(model: Callable[..., Tensor]) -> Tensor:
        return sample(model, torch.arange(NUM_DIGITS), args.steps, CALIBRATION_SEED, GUIDANCE)

    def timed(name: str, model: Callable[..., Tensor], is_ours: bool = False) -> Run:
        console.print(f"sampling: {name} …")
        start = time.perf_counter()
        sample(model, label, steps=1, seed=SEED, guidance=GUIDANCE)  # the first call compiles
        if is_ours:
            qc_compiler.reset(model)  # the samples begin anew
        compile_seconds = time.perf_counter() - start
        start = time.perf_counter()
        videos = generate(model)
        seconds, share = time.perf_counter() - start, qc_compiler.summary(model).computed_share if is_ours else 1.0
        return Run(name, videos, seconds, compile_seconds, share)

    default = torch.compile(model, backend="quantcache")
    runs = [timed("eager", model), timed("Inductor", torch.compile(model)), timed("quantcache", default, is_ours=True)]
    start = time.perf_counter()
    plan = qc_compiler.calibrate(model, calibration_samples, share=args.share)
    console.print(f"calibrated in {time.perf_counter() - start:.0f} s: relative error {plan.measured['error']:.1e}")
    planned = torch.compile(model, backend="quantcache", options={"plan": plan})
    runs.append(timed("quantcache, plan", planned, is_ours=True))

    console.print(_table(runs, label))
    args.out.mkdir(parents=True, exist_ok=True)
    plan.save(args.out / "plan.safetensors")
    qc_compiler.summary(default).plot(args.out / "map-default.png")
    qc_compiler.summary(planned).plot(args.out / "map-plan.png")
    _draw_strip(runs, args.out / "frames.png")
    console.print(f"wrote {args.out}/frames.png, map-default.png, map-plan.png, plan.safetensors")


def _table(runs: list[Run], label: Tensor) -> Table:
    """Speed-ups are against Inductor; PSNR and SSIM against the full computation with the same seeds (eager)."""
    classifier = load_classifier()
    reference, inductor = runs[0].videos, runs[1].seconds
    table = Table(title="same seeds, same steps; PSNR and SSIM against the full computation", title_justify="left")
    for heading in ("", "seconds", "compile s", "speed-up", "share", "PSNR dB", "SSIM", "recognized"):
        table.add_column(heading, justify="right" if heading else "left")
    for run in runs:
        with torch.no_grad():
            recognized = (classifier(run.videos).argmax(dim=-1) == label).float().mean().item()
        quality = psnr(run.videos, reference)
        table.add_row(
            run.name,
            f"{run.seconds:.2f}",
            f"{run.compile_seconds:.0f}",
            f"{inductor / run.seconds:.2f}×",
            f"{run.share:.2f}",
            "∞" if quality == float("inf") else f"{quality:.1f}",
            f"{ssim(run.videos, reference):.4f}",
            f"{recognized:.0%}",
        )
    return table


def _draw_strip(runs: list[Run], path: Path, num_videos: int = 5) -> None:
    """Draws the frames of a few videos in rows; the runs stand side by side."""
    figure = Figure(figsize=(13, 8.5), layout="constrained")
    FigureCanvasAgg(figure)
    for panel, run in zip(figure.subplots(2, 2).flat, runs, strict=True):
        videos = run.videos[:num_videos, 0]  # (V, F, H, W)
        count, frames, height, width = videos.shape
        grid = videos.permute(0, 2, 1, 3).reshape(count * height, frames * width)
        panel.imshow(grid, cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
        panel.set_xticks([x * width - 0.5 for x in range(1, frames)], [])
        panel.set_yticks([y * height - 0.5 for y in range(1, count)], [])
        panel.grid(color="#3b6ea5", linewidth=0.5)
        panel.set_title(f"{run.name}: {run.seconds:.1f} s, share {run.share:.2f}", fontsize=9, loc="left")
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
