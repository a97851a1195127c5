"""Quantized linears on a GPU against cuBLAS in bfloat16: the quantizer of the activations and the bias included.

1. Many tokens: int8 and fp8, in Triton and by `torch._scaled_mm`, and int8 behind a rotation in the quantizer.
2. Few tokens, where reading the weight is all the work: int4 and nvfp4, and how many bytes the weight takes.

    python benchmarks/linears_cuda.py
    TRITON_INTERPRET=1 python benchmarks/linears_cuda.py --smoke     one tiny shape on the CPU: does it run at all

This has not been run on a GPU yet. The aims: int8 or fp8 ≥ 1.5× at 4096 tokens and more; nvfp4 not slower at 64 and
fewer, its weights ≥ 3.5× smaller.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from harness import header, table, write
from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import SCHEMES, Scheme
from qc_compiler.formats.transforms import hadamard, rotate
from qc_compiler.kernels import LinearKernel
from qc_compiler.kernels.scaled_mm import ScaledMM
from qc_compiler.kernels.triton_linear import TritonLinear
from qc_compiler.kernels.triton_quantize import triton_quantize

SMOKE = "--smoke" in sys.argv
DEVICE = torch.device("cpu" if SMOKE else "cuda")
REPEATS, ROTATION, COLD_BYTES = (2, 16, 1) if SMOKE else (30, 128, 256 << 20)
WEIGHTS = [(48, 32)] if SMOKE else [(3072, 3072), (12288, 3072), (3072, 12288)]  # N, K
MANY, FEW = ([8], [2]) if SMOKE else ([4096, 8192, 16384], [1, 16, 64])

Way = tuple[LinearKernel, Scheme]
LARGE: dict[str, Way] = {
    "int8": (TritonLinear(), SCHEMES["w8a8"]),
    "int8, rotated": (TritonLinear(), Scheme("int8", "uint8", rotation=True)),
    "fp8": (TritonLinear(), SCHEMES["fp8"]),
    "fp8, `_scaled_mm`": (ScaledMM(), SCHEMES["fp8"]),
}
SMALL: dict[str, Way] = {"int4": (TritonLinear(), SCHEMES["w4a8"]), "nvfp4": (TritonLinear(), SCHEMES["nvfp4"])}


def main() -> None:
    torch.manual_seed(0)
    text = header("Quantized linears on a GPU", "python benchmarks/linears_cuda.py")
    text += f"\n## Many tokens, bfloat16, ms\n\n{side_by_side(MANY, LARGE)}"
    text += f"\n## Few tokens, bfloat16, ms\n\n{side_by_side(FEW, SMALL)}"
    text += f"\n## The weight, MB\n\n{sizes()}"
    text += f"\nMedian of {REPEATS} replays of a CUDA graph over weights that the L2 cache does not hold together; in\n"
    text += "brackets the speed-up over cuBLAS. Quantizer, bias and kernel compiled together by Inductor.\n"
    if SMOKE:
        print(text)
    else:
        write("linears_cuda.md", text)


def side_by_side(tokens: Sequence[int], ways: dict[str, Way]) -> str:
    rows = []
    for outer, inner in WEIGHTS:
        w = torch.randn(outer, inner, dtype=torch.bfloat16, device=DEVICE) / inner**0.5
        b = torch.randn(outer, dtype=torch.bfloat16, device=DEVICE)
        for count in tokens:
            x = torch.randn(1, count, inner, dtype=torch.bfloat16, device=DEVICE)
            plain = milliseconds(torch.nn.functional.linear, x, (w,), b)
            tflops = 2 * count * outer * inner / plain / 1e9
            cells = [f"{plain:.3f} ({tflops:.0f} TFLOP/s)"]
            for kernel, scheme in ways.values():
                torch._dynamo.reset()
                found = milliseconds(compiled(kernel, scheme), x, weight_of(kernel, scheme, w), b)
                cells.append(f"{found:.3f} ({plain / found:.2f}×)")
            rows.append((count, outer, inner, *cells))
            print(*rows[-1], sep=" | ", flush=True)  # tuning takes minutes
    return table(("M", "N", "K", "cuBLAS", *ways), rows)


def sizes() -> str:
    rows = []
    for outer, inner in WEIGHTS:
        w = torch.randn(outer, inner, dtype=torch.bfloat16, device=DEVICE)
        cells = []
        for kernel, scheme in SMALL.values():
            found = num_bytes(weight_of(kernel, scheme, w))
            cells.append(f"{found / 1e6:.2f} ({num_bytes((w,)) / found:.2f}× smaller)")
        rows.append((outer, inner, f"{num_bytes((w,)) / 1e6:.2f}", *cells))
    return table(("N", "K", "bfloat16", *SMALL), rows)


def compiled(kernel: LinearKernel, scheme: Scheme) -> Callable[..., Tensor]:
    """Returns the linear of x, the parts of a weight and a bias, as the backend would lower it."""

    def run(x: Tensor, *operands: Tensor) -> Tensor:
        *weight, bias = operands
        name = scheme.activation
        parts = triton_quantize(x, name, ROTATION) if scheme.rotation else parse_format(name).quantize(x)
        return kernel.linear(parts, weight, bias, x.dtype)

    return run if SMOKE else torch.compile(run)


def weight_of(kernel: LinearKernel, scheme: Scheme, w: Tensor) -> tuple[Tensor, ...]:
    if scheme.rotation:
        w = rotate(w, hadamard(ROTATION, DEVICE))
    return kernel.prepare(parse_format(scheme.weight).quantize(w), scheme.weight)


def milliseconds(run: Callable[..., Tensor], x: Tensor, weight: Sequence[Tensor], bias: Tensor) -> float:
    """Returns the time of one linear, taken over as many copies of its weight as no cache holds."""
    copies = [[part.clone() for part in weight] for _ in range(-(-COLD_BYTES // num_bytes(weight)))]

    def once() -> None:
        for copy in copies:
            run(x, *copy, bias)

    replay = recorded(once)
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        replay()
        if not SMOKE:
            torch.cuda.synchronize()
        times.append((time.perf_counter() - start) * 1e3)
    return statistics.median(times) / len(copies)


def recorded(run: Callable[[], None]) -> Callable[[], None]:
    """Returns a run without the host's share in it; compiles and tunes on the way."""
    run()
    if SMOKE:
        return run
    graph, stream = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        run()
    torch.cuda.current_stream().wait_stream(stream)
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    torch.cuda.synchronize()
    return graph.replay


def num_bytes(parts: Sequence[Tensor]) -> int:
    return sum(part.nbytes for part in parts)


if __name__ == "__main__":
    main()
