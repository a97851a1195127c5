"""Quality against work on the trained video DiT: PSNR over computed share for every rule, and for fewer steps.

50 Euler steps with guidance 2 (two streams), the same seeds and labels for all, PSNR against the full computation.
Calibration sees other seeds and labels. `fewer steps` is drawn twice: the model's own sampler, and diffusers' UniPC.

    python benchmarks/quality.py
"""

from dataclasses import dataclass

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import Tensor

import qc_compiler
from harness import RESULTS, header, table, write
from sampling import psnr
from subjects import SUBJECTS

STEPS = SUBJECTS["video"].steps
SHARES = (0.16, 0.25, 0.33, 0.5)
OURS = "calibrated schedule"
FEWER = (8, 10, 13, 17, 25)


@dataclass(frozen=True)
class Point:
    method: str
    setting: str
    share: float
    psnr: float


def main() -> None:
    subject = SUBJECTS["video"]
    model = subject.load().requires_grad_(False)
    reference = subject.generate(model)
    points = []

    def add(method: str, setting: str, share: float, videos: Tensor) -> None:
        points.append(Point(method, setting, share, psnr(videos, reference)))
        print(f"{method:34} {setting:16} share {share:.3f}  {points[-1].psnr:.1f} dB", flush=True)

    for steps in FEWER:
        add("fewer steps (Euler)", f"{steps} steps", steps / STEPS, subject.generate(model, steps=steps))
        add(
            "fewer steps (UniPC)", f"{steps} steps", steps / STEPS, subject.generate(model, steps=steps, solver="UniPC")
        )

    for method, options, name, values in sweeps():
        compiled = torch.compile(model, backend="quantcache", options=options)
        subject.generate(compiled, steps=2)
        for value in values:
            qc_compiler.configure(compiled, **{name: value})
            qc_compiler.reset(compiled)
            videos = subject.generate(compiled)
            add(method, f"{name}={value}", qc_compiler.summary(compiled).computed_share, videos)
        torch._dynamo.reset()

    for share in SHARES:
        plan = qc_compiler.calibrate(model, subject.calibration_samples, share, progress=False)
        compiled = torch.compile(model, backend="quantcache", options={"plan": plan})
        videos = subject.generate(compiled)
        setting = f"share={share}, {partial_steps(plan)} partial steps"
        add(OURS, setting, qc_compiler.summary(compiled).computed_share, videos)
        torch._dynamo.reset()

    draw(points)
    rows = [(p.method, p.setting, f"{p.share:.3f}", f"{p.psnr:.1f}") for p in points]
    text = header("Quality against work: video DiT, 50 steps", "python benchmarks/quality.py")
    text += (
        f"\nPSNR in dB at given shares, read off the curves (linear between points, – outside):\n\n{at_shares(points)}"
    )
    text += f"\n![curves](quality.png)\n\nAll points:\n\n{table(('method', 'setting', 'share', 'PSNR dB'), rows)}"
    write("quality.md", text)


def partial_steps(plan: qc_compiler.Plan) -> int:
    """Returns at how many steps of a plan some blocks are computed and others are not."""
    blocks = plan.compute[..., 1:] if len(plan.regions) > 1 else plan.compute
    return int((blocks.any(axis=-1) & ~blocks.all(axis=-1)).any(axis=0).sum())


def sweeps() -> list[tuple[str, dict[str, object], str, tuple[float, ...]]]:
    """Returns method, options, the option that is swept and its values."""
    found: list[tuple[str, dict[str, object], str, tuple[float, ...]]] = []
    for order in (0, 1, 2):
        uniform = {"cache": "static", "level": "network", "cache_order": order, "num_steps": STEPS}
        found.append((f"uniform, order {order}", uniform, "interval", (2, 3, 4, 5, 7)))
    rules: tuple[tuple[str, str, tuple[float, ...]], ...] = (
        ("hlc", "network", (0.002, 0.0025, 0.003, 0.006, 0.01, 0.02)),
        ("hlc", "block", (0.003, 0.006, 0.01, 0.03, 0.1)),
        ("tdc", "block", (0.05, 0.1, 0.15, 0.25, 0.4)),
        ("first_block", "block", (0.05, 0.06, 0.1, 0.15, 0.4)),
        ("teacache", "network", (0.03, 0.04, 0.05, 0.1, 0.15, 0.4)),
        ("magcache", "network", (0.01, 0.03, 0.06, 0.12, 0.2)),
    )
    for rule, level, values in rules:
        options = {"cache": rule, "level": level, "cache_order": 1, "num_steps": STEPS, "max_skip": 6}
        found.append((f"{rule} ({level}), order 1", options, "threshold", values))
    found += [(f"preset {name}", {"preset": name}, "num_steps", (STEPS,)) for name in ("high", "balanced", "fast")]
    return found


def curves(points: list[Point]) -> dict[str, list[Point]]:
    """Returns each method's points in order of share; a point that reuses nothing is no compromise and is left out."""
    methods: dict[str, list[Point]] = {}
    for point in (p for p in points if p.share < 1):
        methods.setdefault(point.method, []).append(point)
    return {method: sorted(found, key=lambda p: p.share) for method, found in methods.items()}


def at_shares(points: list[Point]) -> str:
    rows = []
    for method, found in curves(points).items():
        if len(found) < 2:
            continue
        shares, values = [p.share for p in found], [p.psnr for p in found]
        cells = []
        for share in SHARES:
            inside = shares[0] - 0.005 <= share <= shares[-1] + 0.005
            cells.append(f"{np.interp(share, shares, values):.1f}" if inside else "–")
        rows.append((method, *cells))
    return table(("method", *(f"share {share}" for share in SHARES)), rows)


def draw(points: list[Point]) -> None:
    figure = Figure(figsize=(9, 6), layout="constrained")
    FigureCanvasAgg(figure)
    panel = figure.subplots()
    markers, colors = "osv^<>DPX*hpd8o", colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, (method, found) in enumerate(curves(points).items()):
        ours = method == OURS
        style = {"linewidth": 2.5, "color": "black", "zorder": 3} if ours else {"linewidth": 1, "color": colors[number]}
        shares, values = [p.share for p in found], [p.psnr for p in found]
        panel.plot(shares, values, marker=markers[number % len(markers)], markersize=4, label=method, **style)
    panel.set_xlim(0.1, 0.6)
    panel.set_ylim(20, 70)
    panel.set_xlabel("computed share of the block computations")
    panel.set_ylabel("PSNR against the full computation, dB")
    panel.grid(alpha=0.3)
    panel.legend(fontsize=7, ncols=2)
    RESULTS.mkdir(parents=True, exist_ok=True)
    figure.savefig(RESULTS / "quality.png", dpi=130)


if __name__ == "__main__":
    main()
