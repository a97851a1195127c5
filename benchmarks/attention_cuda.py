"""Head-wise attention on a GPU against the dense one of PyTorch: 16384 tokens, 512 of them text, 24 heads of 128.

    python benchmarks/attention_cuda.py
    TRITON_INTERPRET=1 python benchmarks/attention_cuda.py --smoke     a tiny shape on the CPU: does it run at all

This has not been run on a GPU yet. The aims: dense heads ≥ 0.9× as fast as FlashAttention-2, which is PyTorch's flash;
mixtures of heads ≥ 0.85× of the TFLOP/s of dense ones.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.functional import scaled_dot_product_attention

from harness import header, table, write
from qc_compiler.attention import CACHED, FULL, INT8, attended_share, reference
from qc_compiler.kernels.triton_attention import triton_attention

SMOKE = "--smoke" in sys.argv
DEVICE = torch.device("cpu" if SMOKE else "cuda")
TOKENS, TEXT, SIZE, REPEATS = (20, 4, 16, 1) if SMOKE else (16384, 512, 128, 30)
HEADS, SCALE = 24, SIZE**-0.5
PEAK_TFLOPS = 989  # of an H100 or H200 with SXM: bfloat16, dense

DENSE = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cuDNN": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
WIDTHS = [FULL, *((TOKENS - TEXT) // (2 * part) for part in (8, 16, 32)), CACHED]  # arrows of 1/8, 1/16 and 1/32
MIXTURES = {"half": (10, 6, 6, 0, 2), "three quarters": (4, 6, 6, 2, 6), "seven eighths": (1, 0, 6, 14, 3)}
"""How many of the heads do what `WIDTHS` names: they save as much of the dense work as the name says, to 1 %."""

Run = Callable[[], Tensor]


def main() -> None:
    if not SMOKE and not torch.cuda.is_available():
        sys.exit("attention_cuda.py needs a CUDA device; --smoke runs a tiny shape on the CPU")
    torch.manual_seed(0)
    query, key, value, kept = (
        torch.randn(1, TOKENS, HEADS, SIZE, dtype=torch.bfloat16, device=DEVICE).transpose(1, 2) for _ in range(4)
    )
    kept = kept.contiguous()
    does = {"dense": [FULL] * HEADS, "int8": [INT8] * HEADS, **{name: heads_of(*MIXTURES[name]) for name in MIXTURES}}
    ways = {f"PyTorch, {name}": dense(backend, query, key, value) for name, backend in DENSE.items()}
    ways = {name: run for name, run in ways.items() if runs(run)}
    num_dense = len(ways)
    ways |= {f"ours, {name}": ours(query, key, value, kept, windows) for name, windows in does.items()}
    times = medians(ways)
    fastest = min(list(times.values())[:num_dense])
    rows = []
    for name, found in times.items():
        windows = does.get(name.removeprefix("ours, "), does["dense"])
        scores = TOKENS**2 * sum(attended_share(window, TOKENS, TEXT) for window in windows)
        tflops = 4 * SIZE * scores / found / 1e9
        saved = 1 - scores / (HEADS * TOKENS**2)
        error = distance(ways[name](), windows, query, key, value, kept)
        speed = (f"{found:.3f}", f"{fastest / found:.2f}×", f"{tflops:.0f}", f"{tflops / PEAK_TFLOPS:.0%}")
        rows.append((name, f"{saved:.1%}", *speed, f"{error:.1e}"))
    text = header("Head-wise attention on a GPU", "python benchmarks/attention_cuda.py")
    text += f"\n{TOKENS} tokens, {TEXT} of them text, {HEADS} heads of {SIZE}, bfloat16.\n\n"
    text += table(("attention", "saved", "ms", "over the fastest", "TFLOP/s", f"of {PEAK_TFLOPS}", "error"), rows)
    text += f"\nMedian of {REPEATS} runs between CUDA events, all ways in turn. Saved are pairs of a query and a key,\n"
    text += "and TFLOP/s count the others alone. Error: ‖y − ŷ‖ / ‖y‖, with y in float32.\n"
    if SMOKE:
        print(text)
    else:
        write("attention_cuda.md", text)


def heads_of(*counts: int) -> list[int]:
    """Returns what the heads of a layer do, wide and narrow ones between each other."""
    heads = [width for width, count in zip(WIDTHS, counts, strict=True) for _ in range(count)]
    return [heads[7 * i % HEADS] for i in range(HEADS)]


def dense(backend: SDPBackend, query: Tensor, key: Tensor, value: Tensor) -> Run:
    def run() -> Tensor:
        with sdpa_kernel(backend):
            return scaled_dot_product_attention(query, key, value, scale=SCALE)

    return run


def ours(query: Tensor, key: Tensor, value: Tensor, kept: Tensor, windows: list[int]) -> Run:
    does, rows = torch.tensor(windows, dtype=torch.int32), torch.arange(HEADS, dtype=torch.int32)
    return lambda: triton_attention(query, key, value, does, rows, kept, TEXT, SCALE)


def runs(run: Run) -> bool:
    """Returns whether this back end takes the shape on this device; PyTorch says so by an error."""
    try:
        run()
    except RuntimeError:
        return False
    return True


def medians(ways: dict[str, Run]) -> dict[str, float]:
    """Returns milliseconds, measured side by side."""
    for run in ways.values():
        run()  # compiles and tunes
    readings: dict[str, list[Callable[[], float]]] = {name: [] for name in ways}
    for _ in range(REPEATS):
        for name, run in ways.items():
            readings[name].append(clocked(run))
    if not SMOKE:
        torch.cuda.synchronize()
    return {name: statistics.median(read() for read in reads) for name, reads in readings.items()}


def clocked(run: Run) -> Callable[[], float]:
    """Runs once, and returns how to read the milliseconds when the device is done."""
    if SMOKE:
        began = time.perf_counter()
        run()
        elapsed_ms = (time.perf_counter() - began) * 1e3
        return lambda: elapsed_ms
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    run()
    end.record()
    return lambda: start.elapsed_time(end)


def distance(found: Tensor, windows: list[int], query: Tensor, key: Tensor, value: Tensor, kept: Tensor) -> float:
    """Returns the relative error, head by head: a head's scores alone take a gigabyte."""
    error, norm = 0.0, 0.0
    for head, window in enumerate(windows):
        q, k, v, cached = (x[:, head : head + 1].float() for x in (query, key, value, kept))
        y = reference(q, k, v, [FULL if window == INT8 else window], [cached[:, 0]], TEXT, SCALE)
        error += (found[:, head : head + 1] - y).square().sum().item()
        norm += y.square().sum().item()
    return (error / norm) ** 0.5


if __name__ == "__main__":
    main()
