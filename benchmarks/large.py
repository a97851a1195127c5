"""Models of full size, random weights: time and memory, no quality. Decisions come from the small trained models.

- `open-sora`: shaped like Open-Sora 1.2's STDiT3: 28 spatial and 28 temporal blocks, width 1152, 16 heads, 51 frames of
  512×512 (15×64×64 latents), 30 steps, guidance.
- `flux`: shaped like FLUX at 2048×2048: 19 dual-stream and 38 single-stream blocks, width 3072, 24 heads of 128,
  16384 + 512 tokens, 28 steps, guidance distilled.
- `dit`: DiT-XL/2 at 256×256: 50 steps, guidance; also against 250 steps, which is what Q&C counts from.

Each row is a trajectory in bfloat16 (float32 on a CPU), in turns with eager and compiled Inductor. The schedule is that
of the trained model of the same kind at as many steps; what its heads do is stretched over layers and heads.
An interrupted run goes on; on a GPU one row takes at most some minutes. No GPU has run this yet.

    python benchmarks/large.py [--model open-sora|flux|dit]
    python benchmarks/large.py --smoke                       tiny shapes on the CPU: does it run at all
"""

import argparse
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

import harness  # noqa: F401 (puts the examples on the path)
import qc_compiler
from dit import DiT, DiTConfig
from harness import computed_share, header, in_turns, quantcache, remembered, remembered_plan, table, write
from mmdit import MMDiT, MMDiTConfig
from qc_compiler.plan import HeadPlan, Plan
from sampling import sample
from stdit import STDiT, STDiTConfig
from subjects import SUBJECTS

ROUNDS, SHARE, BUDGET = 3, 0.14, 0.2
HEADINGS = ("what", "a trajectory, s", "× compiled", "× eager", "computed", "peak GiB")


@dataclass(frozen=True)
class Large:
    """A shape and how it is sampled.

    Attributes:
        small: Of `SUBJECTS`: whose decisions are taken.
        smoke: The same kind of model, tiny.
    """

    build: Callable[[], Any]
    smoke: Callable[[], Any]
    small: str
    steps: int
    guidance: float = 2.0


SHAPES = {
    "open-sora": Large(
        lambda: STDiT(STDiTConfig(depth=28, width=1152, num_heads=16, channels=4, size=(15, 64, 64), patch=(1, 2, 2))),
        lambda: STDiT(STDiTConfig(depth=2, width=64, num_heads=2, channels=4, size=(4, 8, 8), patch=(1, 2, 2))),
        "video",
        30,
    ),
    "flux": Large(
        lambda: MMDiT(MMDiTConfig(19, 38, width=3072, num_heads=24, num_tokens=512, channels=16, size=(256, 256))),
        lambda: MMDiT(MMDiTConfig(1, 2, width=64, num_heads=2, channels=16, size=(32, 32))),
        "text",
        28,
        guidance=1.0,
    ),
    "dit": Large(
        lambda: DiT(DiTConfig(depth=28, width=1152, num_heads=16, num_classes=1000, channels=4, size=(32, 32))),
        lambda: DiT(DiTConfig(depth=2, width=64, num_heads=2, channels=4, size=(8, 8))),
        "image",
        50,
    ),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=SHAPES, help="only this one")
    parser.add_argument("--smoke", action="store_true")
    args = parser.parse_args()
    torch._dynamo.config.recompile_limit = 100
    for name in [args.model] if args.model else SHAPES:
        torch._dynamo.reset()
        rows = list(Comparison(name, args.smoke).rows())
        if not args.smoke:
            text = header(f"Full size, random weights: {name}", f"python benchmarks/large.py --model {name}")
            write(
                f"large_{name}.md", f"{text}\nTime and memory only: the weights are random.\n\n{table(HEADINGS, rows)}"
            )


class Comparison:
    """A large model, and what it is timed against."""

    def __init__(self, name: str, smoke: bool) -> None:
        self.name, self.smoke, self.shape = name, smoke, SHAPES[name]
        self.page = f"large_{name}{'_smoke' if smoke else ''}"
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.dtype = torch.bfloat16 if self.device.type == "cuda" else torch.float32
        torch.manual_seed(0)
        with self.device:
            self.model = (self.shape.smoke if smoke else self.shape.build)().to(self.dtype).eval().requires_grad_(False)
        for parameter in self.model.parameters():  # the gates begin at zero
            parameter.normal_(std=0.02)
        self.inductor = torch.compile(self.model)

    def run(self, model: Callable[..., Tensor], steps: int = 0) -> Tensor:
        config = self.model.config
        label = torch.zeros(1, dtype=torch.int64, device=self.device)
        if isinstance(self.model, MMDiT):
            label = label.expand(1, config.num_tokens).contiguous()
        dtype = self.dtype

        def in_dtype(x: Tensor, timestep: Tensor, label: Tensor) -> Tensor:
            return model(x.to(dtype), timestep, label).float()

        size = (config.channels, *config.size)
        return sample(in_dtype, label, steps or self.shape.steps, 0, self.shape.guidance, size)

    def rows(self) -> Iterator[tuple[str, ...]]:
        yield self.row("eager", lambda: self.model)
        yield self.row("compiled Inductor", lambda: self.inductor)
        schedule = self.transferred(self.small_plan("schedule", share=SHARE, level="output"))
        yield self.row(f"schedule, share {SHARE}", lambda: self.compiled(plan=schedule))
        for scheme in ("w8a8", "fp8") if self.device.type == "cuda" else ("w8a8",):
            yield self.row(scheme, lambda scheme=scheme: self.compiled(cache="off", quantize=scheme))  # type: ignore[misc]
            yield self.row(
                f"schedule and {scheme}",
                lambda scheme=scheme: self.compiled(plan=schedule, quantize=scheme),  # type: ignore[misc]
            )
        if self.name == "flux":
            small = self.small_plan("heads", share=None, attention=BUDGET)
            heads = replace(self.empty(), attention=self.stretched(small))
            yield self.row(f"heads, δ = {BUDGET}", lambda: self.compiled(plan=heads, cache="off"))
            both = replace(schedule, attention=heads.attention)
            yield self.row("schedule and heads", lambda: self.compiled(plan=both))
        if self.name == "dit":
            yield self.row("eager, 250 steps", lambda: self.model, 250)

    def row(self, name: str, make: Callable[[], Any], steps: int = 0) -> tuple[str, ...]:
        return tuple(remembered(self.page, name, lambda: self.measure(name, make(), steps)))

    def measure(self, name: str, model: Any, steps: int) -> tuple[str, ...]:
        for each in (model, self.inductor):
            self.run(each, 0 if each is not self.model else 1)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            self.run(model, steps)
            peak = f"{torch.cuda.max_memory_allocated() / 2**30:.2f}"
        else:
            peak = ""
        runs = [lambda: self.timed(model, steps), lambda: self.timed(self.inductor), lambda: self.timed(self.model)]
        ours, compiled, eager = (statistics.median(taken) for taken in in_turns(runs, 1 if self.smoke else ROUNDS))
        share = computed_share(model)
        cells = f"{ours:.2f}", f"{compiled / ours:.2f}", f"{eager / ours:.2f}"
        return name, *cells, "" if share is None else f"{share:.0%}", peak

    def timed(self, model: Any, steps: int = 0) -> None:
        self.run(model, steps)
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def compiled(self, **options: Any) -> Any:
        return quantcache(self.model, **options)

    # -- decisions of the small model

    def small_plan(self, name: str, **kwargs: Any) -> Plan:
        """Returns what was calibrated for the trained model of the same kind, on the CPU."""
        subject = replace(SUBJECTS[self.shape.small], steps=self.shape.steps, guidance=self.shape.guidance)

        def run() -> Plan:
            model = subject.load().requires_grad_(False)
            return qc_compiler.calibrate(model, subject.calibration_samples, progress=False, **kwargs)

        plan = remembered_plan(f"large_{self.name}", f"small_{name}", run)
        torch._dynamo.reset()
        return plan

    def transferred(self, plan: Plan) -> Plan:
        """Returns a schedule for the large model: the same steps, whatever its own timesteps."""
        return replace(plan, fingerprint="", timesteps=self.timesteps())

    def empty(self) -> Plan:
        steps = self.shape.steps
        compute, weights = np.ones((1, steps, 0), np.bool_), np.ones((1, steps, 0, 1), np.float32)
        return Plan("", "output", (), self.timesteps(), compute, weights)

    def timesteps(self) -> tuple[float, ...]:
        return tuple((1000 * torch.linspace(1, 0, self.shape.steps + 1)[:-1]).tolist())

    def stretched(self, plan: Plan) -> HeadPlan:
        """Returns what the small model's heads do, for as many layers and heads as the large one has."""
        known, config = plan.attention, self.model.config
        assert known is not None
        counts = {"dual_blocks": config.num_dual, "single_blocks": config.num_single}
        names, parts = [], []
        for stack, count in counts.items():
            columns = [i for i, layer in enumerate(known.layers) if stack in layer]
            taken = np.array(columns)[spread(count, len(columns))]
            names += [known.layers[column].replace(f".{i}", f".{k}") for k, (column, i) in
                      enumerate(zip(taken, spread(count, len(columns))))]  # fmt: skip
            parts.append(known.windows[:, :, taken])
        windows: NDArray[np.float32] = np.concatenate(parts, axis=2)
        return HeadPlan(tuple(names), windows[..., spread(config.num_heads, windows.shape[3])], known.order)


def spread(count: int, among: int) -> NDArray[np.int_]:
    """Returns which of `among` each of `count` takes, in order.

    >>> spread(5, 2).tolist()
    [0, 0, 0, 1, 1]
    """
    return np.arange(count) * among // count


if __name__ == "__main__":
    main()
