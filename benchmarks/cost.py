"""The cost model: predicted against measured step times of the trained models, compiled.

Every row is a decision setting: how many blocks are computed and reused (level `output+block`, a plan with one row a
setting), blocks pruned, linears in W8A8, another batch, another size of image or video. *alone*: predicted from the
device profile, nothing of the model measured. *anchored*: `Estimate.anchored` with three measured steps of the model,
all else predicted from them.

    OMP_NUM_THREADS=1 python benchmarks/cost.py
"""

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import qc_compiler
from harness import header, table, write
from mmdit import MMDiT
from qc_compiler.device_profile import clock
from qc_compiler.estimate import Estimate
from qc_compiler.plan import Plan
from qc_compiler.region_costs import Variant
from sampling import load_dit, load_mmdit, load_model, resized

REPEATS, FEW = 7, 2  # repeats of a trajectory, and its samples in the smaller batch
ANCHORS = (0, 4, 5)  # everything computed, every block reused, the output reused
COMPUTED, REUSED, PRUNED = Variant(depth=1), Variant("reused", depth=1), Variant("pruned")


@dataclass(frozen=True)
class Subject:
    """A trained model, the names of its stacks of blocks, its size, a larger one for the same weights, its batch."""

    load: Callable[[], Any]
    stacks: tuple[str, ...]
    size: tuple[int, ...]
    large_size: tuple[int, ...]
    batch: int = 8


SUBJECTS = {
    "image DiT": Subject(load_dit, ("blocks",), (1, 16, 16), (1, 32, 32)),
    "video STDiT": Subject(load_model, ("spatial_blocks", "temporal_blocks"), (1, 8, 16, 16), (1, 16, 16, 16)),
    "MMDiT": Subject(load_mmdit, ("dual_blocks", "single_blocks"), (1, 64, 64), (1, 80, 80), 4),
}


def prune_last(model: nn.Module, stacks: Sequence[str], count: int) -> list[str]:
    """Removes the last blocks of each stack, in place; returns their names."""
    names = []
    for stack in stacks:
        blocks = getattr(model, stack)
        names += [f"{stack}.{i}" for i in range(len(blocks) - count, len(blocks))]
        setattr(model, stack, blocks[:-count])
    return names


def inputs(model: nn.Module, batch: int, size: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
    shape = (batch, model.config.num_tokens) if isinstance(model, MMDiT) else (batch,)  # of captions, or labels
    return torch.randn(batch, *size), torch.full((batch,), 500.0), torch.arange(math.prod(shape)).view(shape) % 10


def settings(blocks: Sequence[str]) -> dict[str, dict[str, Variant] | None]:
    """Returns what each step of the plan decides; None reuses the output."""
    found: dict[str, dict[str, Variant] | None] = {}
    for computed in (1.0, 0.75, 0.5, 0.25, 0.0):
        kept = round(computed * len(blocks))
        found[f"{kept} of {len(blocks)} blocks"] = {
            name: COMPUTED if i < kept else REUSED for i, name in enumerate(blocks)
        }
    return found | {"output reused": None}


def plan_of(blocks: Sequence[str], decided: Mapping[str, Mapping[str, Variant] | None]) -> Plan:
    """Returns a plan whose first step fills the slots and whose others are `decided`."""
    rows = [
        [True, *(d[name] is COMPUTED for name in blocks)] if d else [False] * (1 + len(blocks))
        for d in decided.values()
    ]
    compute = np.array([[[True] * (1 + len(blocks)), *rows]])
    timesteps = tuple(1000.0 - 10 * i for i in range(compute.shape[1]))
    weights = np.ones((*compute.shape, 1), dtype=np.float32)
    return Plan("", "output+block", ("output", *blocks), timesteps, compute, weights)


def step_times(model: nn.Module, options: dict[str, Any], args: tuple[Tensor, ...], num_steps: int) -> list[float]:
    """Returns the median time of each step of a trajectory."""
    torch._dynamo.reset()
    compiled, now = torch.compile(model, backend="quantcache", options=options), clock(args[0].device)
    times: list[list[float]] = [[] for _ in range(num_steps)]
    for repeat in range(REPEATS + 1):
        for i, taken in enumerate(times):
            timestep = torch.full_like(args[1], 1000.0 - 10 * i)
            start = now()
            with torch.no_grad():
                compiled(args[0], timestep, args[2])
            if repeat:
                taken.append(now() - start)
    return [statistics.median(taken) for taken in times]


@dataclass(frozen=True)
class Case:
    """A setting: how it is named, its measured seconds and what predicts them."""

    name: str
    measured: float
    predict: Callable[[Estimate], float]


def planned(title: str, model: nn.Module, args: tuple[Tensor, ...], estimate: Estimate) -> list[Case]:
    blocks = [block.name for block in estimate.blocks]
    decided = settings(blocks)
    times = step_times(model, {"plan": plan_of(blocks, decided)}, args, len(decided) + 1)[1:]
    cases = [
        Case(f"{title}, {name}", seconds, predictor(decisions, estimate, args))
        for (name, decisions), seconds in zip(decided.items(), times)
    ]
    for case in cases:
        print(case.name, f"{case.measured * 1e3:.2f} ms, alone {case.predict(estimate) * 1e3:.2f}", flush=True)
    return cases


def predictor(
    decisions: Mapping[str, Variant] | None, costs: Estimate, args: tuple[Tensor, ...], default: Variant = COMPUTED
) -> Callable[[Estimate], float]:
    """Returns a function that predicts from `costs`, fitted like the estimate it is given."""
    sizes = {"x.size(0)": len(args[0])}

    def predict(fitted: Estimate) -> float:
        factors = {name: getattr(fitted, name) for name in ("scale", "host_seconds", "guard_seconds")}
        known = replace(costs, **factors)
        return known.step_seconds(decisions, default, sizes, is_output_reused=decisions is None)

    return predict


def measure(subject: Subject) -> tuple[Estimate, list[Case]]:
    """Returns the estimate of a model and its cases."""
    model = subject.load().requires_grad_(False)
    batch = subject.batch
    args, few = inputs(model, batch, subject.size), inputs(model, FEW, subject.size)
    estimate = qc_compiler.cost(model, *args)
    cases = planned(f"batch {batch}", model, args, estimate) + planned(f"batch {FEW}", model, few, estimate)
    seconds = step_times(model, {"quantize": "w8a8", "cache": "off"}, args, 1)
    w8a8 = Variant(quantize="w8a8")
    cases.append(Case(f"batch {batch}, W8A8, no cache", seconds[0], predictor({}, estimate, args, w8a8)))
    large = resized(model, subject.large_size[1:]).requires_grad_(False)
    large_args = inputs(model, FEW, subject.large_size)
    title = f"batch {FEW}, {'×'.join(map(str, subject.large_size[1:]))}"
    cases += planned(title, large, large_args, qc_compiler.cost(large, *large_args))
    names = prune_last(model, subject.stacks, 1)
    seconds = step_times(model, {"cache": "static", "interval": 1, "level": "block"}, args, 1)
    pruned = dict.fromkeys(names, PRUNED)
    cases.append(Case(f"batch {batch}, {len(names)} blocks pruned", seconds[0], predictor(pruned, estimate, args)))
    return estimate, cases


def main() -> None:
    text = header("Predicted and measured step times", "OMP_NUM_THREADS=1 python benchmarks/cost.py")
    errors: dict[str, list[float]] = {"alone": [], "anchored": []}
    for name, subject in SUBJECTS.items():
        estimate, cases = measure(subject)
        full, reused, host = (cases[i].measured for i in ANCHORS)
        estimates = {"alone": estimate, "anchored": estimate.anchored(full, reused, host)}
        rows = []
        for i, case in enumerate(cases):
            guesses = {how: case.predict(known) for how, known in estimates.items()}
            cells = [f"{guess * 1e3:.2f} ({guess / case.measured - 1:+.0%})" for guess in guesses.values()]
            rows.append((case.name, f"{case.measured * 1e3:.2f}", *cells[:1], "anchor" if i in ANCHORS else cells[1]))
            for how, guess in guesses.items() if i not in ANCHORS else ():
                errors[how].append(abs(guess / case.measured - 1))
        text += f"\n## {name}\n\n" + table(("setting", "measured ms", "alone", "anchored"), rows)
    text += f"\nMedian of {REPEATS} steps, on the thread's own clock. Errors of the settings that are no anchors:\n\n"
    for how, found in errors.items():
        within = sum(error <= 0.15 for error in found)
        text += f"- {how}: median {statistics.median(found):.0%}, largest {max(found):.0%}, "
        text += f"within 15 % {within} of {len(found)}\n"
    write("cost.md", text)


if __name__ == "__main__":
    main()
