"""Head-wise attention on the CPU, side by side with PyTorch's of all pairs: `python benchmarks/attention.py`."""

import statistics
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from harness import header, in_turns, side_by_side, table, write
from qc_compiler.attention import CACHED, FULL, attended_share
from qc_compiler.kernels.cpu_attention import cpu_attention

HEADS, DEPTH, REPEATS = 12, 64, 7
TOKENS = (1024, 2048, 4096, 8192)


class Plan(NamedTuple):
    """What the heads do; windows f as in the paper: |i − j| ≤ V·f/2."""

    name: str
    text_share: float
    heads: tuple[float, ...]


PLANS = (
    Plan("all 1/8", 0, (1 / 8,) * HEADS),
    Plan("all 1/8", 1 / 16, (1 / 8,) * HEADS),
    Plan("all 1/32", 1 / 16, (1 / 32,) * HEADS),
    Plan("2 full, 4 of 1/8, 6 cached", 1 / 16, (CACHED, 1 / 8, FULL, CACHED, 1 / 8, CACHED) * 2),
)


def main() -> None:
    torch.manual_seed(0)
    rows = [row for tokens in TOKENS for row in compare(tokens)]
    text = header("Head-wise attention", "python benchmarks/attention.py")
    text += f"\n{HEADS} heads of {DEPTH}, float32; saved: the share of all pairs of a query and a key.\n\n"
    text += table(("tokens", "text", "heads", "saved", "dense, ms", "ours, ms", "speed-up"), rows)
    text += f"\nMedian (min–max) of {REPEATS} interleaved runs.\n"
    write("attention.md", text)


def compare(tokens: int) -> list[tuple[object, ...]]:
    query, key, value, kept = torch.randn(4, 1, tokens, HEADS, DEPTH).transpose(2, 3)
    scale, order = DEPTH**-0.5, torch.arange(HEADS, dtype=torch.int32)

    def run(plan: Plan) -> Tensor:
        windows = torch.tensor(widths(plan, tokens), dtype=torch.int32)
        return cpu_attention(query, key, value, windows, order, kept, int(tokens * plan.text_share), scale)

    runs: list[Callable[[], Tensor]] = [lambda: scaled_dot_product_attention(query, key, value, scale=scale)]
    runs += [lambda plan=plan: run(plan) for plan in PLANS]  # type: ignore[misc]
    dense, *ours = (taken[1:] for taken in in_turns(runs, REPEATS + 1))  # the first does not count
    return [
        (tokens, int(tokens * plan.text_share), plan.name, f"{saved(plan, tokens):.0%}", *side_by_side(dense, found))
        for plan, found in zip(PLANS, ours)
    ]


def widths(plan: Plan, tokens: int) -> list[int]:
    vision = tokens - int(tokens * plan.text_share)
    return [int(vision * f / 2) if f > 0 else int(f) for f in plan.heads]


def saved(plan: Plan, tokens: int) -> float:
    num_text = int(tokens * plan.text_share)
    return 1 - statistics.mean(attended_share(width, tokens, num_text) for width in widths(plan, tokens))


if __name__ == "__main__":
    main()
