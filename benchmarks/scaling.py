"""How time and memory grow with depth, width, tokens and steps: compiled Inductor, ours and the best peer, in turns.

DiTs with random weights, float32, one axis varied at a time. Ours computes every fourth step and draws a line between
(`cache="static"`); the peer is diffusers' TaylorSeer of the first order, also every fourth step, which leaves out all
blocks between. *grows* is the exponent from the smallest to the largest size: 1 is linear. Slots are what ours keeps
from step to step; MiB the most that the process held beyond weights and code.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py
"""

import math
import statistics
from typing import Any

import torch

import harness  # noqa: F401 (puts the examples on the path)
import peers
import qc_compiler
from compare import reset_peak
from dit import DiT, DiTConfig
from harness import header, in_turns, remembered, table, write
from memory import peak, resident
from sampling import sample

BASE = {"depth": 6, "width": 128, "tokens": 64, "steps": 24}
AXES = {"depth": (6, 12, 24), "width": (128, 256, 512), "tokens": (64, 256, 1024), "steps": (12, 24, 48)}
OURS = {"cache": "static", "interval": 4, "cache_order": 1, "level": "output"}
BATCH, ROUNDS, MIB = 4, 3, 2**20
HEADINGS = (
    "axis",
    "size",
    "Inductor, s",
    "ours, s",
    "peer, s",
    "× ours",
    "× peer",
    "slots MiB",
    "ours MiB",
    "peer MiB",
)


def main() -> None:
    rows = []
    for axis, sizes in AXES.items():
        found = [remembered("scaling", f"{axis} {size}", lambda a=axis, s=size: measure(a, s)) for size in sizes]  # type: ignore[misc]
        ratio = math.log(sizes[-1] / sizes[0])
        grown = [f"{math.log(float(found[-1][i]) / float(found[0][i])) / ratio:.2f}" for i in (2, 3, 4)]
        rows += [*found, (f"**{axis} grows**", "", *grown, *[""] * 5)]
    text = header("How cost grows", "OMP_NUM_THREADS=1 python benchmarks/scaling.py")
    base = ", ".join(f"{name} {size}" for name, size in BASE.items())
    write("scaling.md", f"{text}\nWhat is not varied: {base}; batch {BATCH}.\n\n{table(HEADINGS, rows)}")


def measure(axis: str, size: int) -> tuple[str, ...]:
    torch._dynamo.reset()
    shape = BASE | {axis: size}
    side, steps = 2 * math.isqrt(shape["tokens"]), shape["steps"]
    config = DiTConfig(shape["depth"], shape["width"], num_heads=shape["width"] // 32, size=(side, side))
    torch.manual_seed(0)
    model: Any = DiT(config).eval().requires_grad_(False)
    for parameter in model.parameters():  # the gates begin at zero
        parameter.normal_(std=0.02)
    ours = torch.compile(model, backend="quantcache", options=OURS | {"num_steps": steps})
    ways = [torch.compile(model), ours, peers.taylorseer(model, 4)]

    def run(way: Any) -> None:
        getattr(way, "begin", lambda: None)()
        sample(way, torch.arange(BATCH), steps, 0, 1.0, (1, side, side))

    held = []
    for way in ways:
        run(way)
        reset_peak()
        before = resident()
        run(way)
        held.append((peak() - before) / MIB)
    plain, mine, theirs = (
        statistics.median(taken) for taken in in_turns([lambda way=way: run(way) for way in ways], ROUNDS)
    )
    slots = qc_compiler.summary(ours).peak_slot_bytes / MIB
    return (
        axis, f"{size}", f"{plain:.3f}", f"{mine:.3f}", f"{theirs:.3f}", f"{plain / mine:.2f}", f"{plain / theirs:.2f}",
        f"{slots:.3f}", f"{held[1]:.1f}", f"{held[2]:.1f}",
    )  # fmt: skip


if __name__ == "__main__":
    main()
