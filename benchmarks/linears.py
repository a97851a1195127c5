"""Quantized linears and a computed step, side by side with compiled Inductor, at the widths of DiT-XL/2.

1. Every linear of a block (1024 tokens): Inductor's against the quantized one, its quantizer and epilogue included.
2. A computed step of diffusers' DiT with 4 of its 28 blocks, 32 × 32 patches (random weights: speed only).

    python benchmarks/linears.py                  on a CPU; on a GPU: linears_cuda.py
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from harness import header, in_turns, side_by_side, table, write
from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.kernels import find_kernel

TOKENS, WIDTH, REPEATS, BLOCKS = 1024, 1152, 9, 4
SHAPES = {"query, key, value": (WIDTH, WIDTH), "MLP up": (WIDTH, 4 * WIDTH), "MLP down": (4 * WIDTH, WIDTH)}


def main() -> None:
    torch.manual_seed(0)
    text = header("Quantized linears at the widths of DiT-XL/2", "python benchmarks/linears.py")
    text += f"\n## Linears, {TOKENS} tokens, float32\n\n{linears()}"
    text += f"\n## A computed step, DiT-XL/2 with {BLOCKS} blocks, float32\n\n{steps()}"
    text += f"\nMedian (min–max) of {REPEATS} interleaved runs; quantizer and epilogue included.\n"
    write("linears.md", text)


def linears() -> str:
    kernel = find_kernel(SCHEMES["w8a8"], torch.device("cpu"))
    assert kernel is not None
    quantize = parse_format(SCHEMES["w8a8"].activation).quantize
    rows = []
    for name, (inner, outer) in SHAPES.items():
        x, w, b = torch.randn(1, TOKENS, inner), torch.randn(outer, inner) / inner**0.5, torch.randn(outer)

        def quantized(x: Tensor, b: Tensor, *prepared: Tensor) -> Tensor:
            return kernel.linear(quantize(x), prepared, b, x.dtype)

        prepared = kernel.prepare(parse_format("int8").quantize(w), "int8")
        plain, ours = torch.compile(torch.nn.functional.linear), torch.compile(quantized)
        runs = {"inductor": lambda: plain(x, w, b), "w8a8": lambda: ours(x, b, *prepared)}  # noqa: B023
        rows.append((f"{name}, {inner} → {outer}", *timed(runs)))
    return table(("linear", "Inductor, ms", "W8A8, ms", "speed-up"), rows)


def steps() -> str:
    from diffusers import DiTTransformer2DModel

    model = DiTTransformer2DModel(num_attention_heads=16, attention_head_dim=72, num_layers=BLOCKS, sample_size=64)
    model = model.eval().requires_grad_(False)
    x, t, label = torch.randn(1, 4, 64, 64), torch.full((1,), 500), torch.tensor([1])
    options: dict[str, Any] = {"cache": "off", "quantize": "w8a8"}
    plain = torch.compile(model, backend="inductor")
    ours = torch.compile(model, backend="quantcache", options=options)
    with torch.no_grad():
        runs = {
            "inductor": lambda: plain(x, t, label).sample,
            "w8a8": lambda: ours(x, t, label).sample,
        }
        row = timed(runs)
        expected, found = runs["inductor"](), runs["w8a8"]()
    error = float((found - expected).norm() / expected.norm())
    return table(("Inductor, ms", "W8A8, ms", "speed-up", "relative error"), [(*row, f"{error:.1e}")])


def timed(runs: dict[str, Callable[[], Tensor]]) -> tuple[str, str, str]:
    for run in runs.values():
        run(), run()
    return side_by_side(*in_turns(list(runs.values()), REPEATS))


if __name__ == "__main__":
    main()
