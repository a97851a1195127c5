"""Which kernel is faster for a shape: measured once on a device, kept in the user's cache directory."""

import json
import os
import platform
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch

from ..formats import parse_format
from ..formats.schemes import Scheme
from .base import LinearKernel, LinearShape

MAX_ROWS = 4096  # time grows linearly beyond
REPEATS = 5

_lock = threading.Lock()


def fastest(
    kernels: Sequence[LinearKernel], scheme: Scheme, shape: LinearShape, device: torch.device
) -> LinearKernel | None:
    """Returns the fastest of the kernels, None of none; only one of several is measured."""
    if len(kernels) < 2:
        return kernels[0] if kernels else None
    return min(kernels, key=lambda kernel: seconds(kernel, scheme, shape, device)[1])


def why_slower(kernel: LinearKernel, scheme: Scheme, shape: LinearShape, device: torch.device) -> str | None:
    """Returns why a kernel gains nothing over PyTorch's linear of this shape, or None if it does."""
    plain, quantized = seconds(kernel, scheme, shape, device)
    if quantized < plain:
        return None
    return (
        f"{kernel.name} is slower here: {quantized * 1e3:.2f} ms with its quantizer against {plain * 1e3:.2f} ms for "
        f"{shape.rows} × {shape.inner} × {shape.outer} in {str(shape.dtype).removeprefix('torch.')}"
    )


def seconds(kernel: LinearKernel, scheme: Scheme, shape: LinearShape, device: torch.device) -> tuple[float, float]:
    """Returns the time of PyTorch's linear and of the kernel with its quantizer, as far as that is not fused away."""
    shape = replace(shape, rows=min(shape.rows, MAX_ROWS))
    size = f"{shape.rows}x{shape.inner}x{shape.outer}"
    key = "|".join(
        (torch.__version__, device_name(device), kernel.name, scheme.weight, scheme.activation, str(shape.dtype), size)
    )
    with _lock:
        known = _read()
        if key not in known:
            known[key] = _measure(kernel, scheme, shape, device)
            write_measured(cache_path("kernels.json"), json.dumps(known, indent=1))
        plain, quantized = known[key]
        return plain, quantized


def _measure(kernel: LinearKernel, scheme: Scheme, shape: LinearShape, device: torch.device) -> list[float]:
    x = torch.randn(shape.rows, shape.inner, dtype=shape.dtype, device=device)
    w = torch.randn(shape.outer, shape.inner, dtype=shape.dtype, device=device)
    parts = parse_format(scheme.activation).quantize(x)
    weight = kernel.prepare(parse_format(scheme.weight).quantize(w), scheme.weight)
    product = kernel.multiply(parts, weight)
    # Fused, quantizer and epilogue read and write their tensor about once more.
    overhead = _median(lambda: torch.aminmax(x), device) + _median(lambda: x * 2, device)
    overhead += _median(lambda: product * 2, device)
    plain = _median(lambda: torch.nn.functional.linear(x, w), device)
    return [plain, _median(lambda: kernel.multiply(parts, weight), device) + overhead]


def _median(run: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(REPEATS + 1):
        start = time.perf_counter()
        run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


@cache
def device_name(device: torch.device) -> str:
    """Returns what measured times belong to: the GPU's model, or the CPU's and how many threads PyTorch uses."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{cpu_name()} {torch.get_num_threads()} threads"


def cpu_name() -> str:
    """Returns the CPU's model and what its kernels are made for: machines of one name may differ in that.

    `platform.processor` is empty on most Linux systems, or just says x86_64.
    """
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    models = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    model = next(models, "") or platform.processor() or platform.machine()
    return f"{model}, {torch.backends.cpu.get_cpu_capability()}{' VNNI' if torch.cpu._is_vnni_supported() else ''}"


def cache_path(name: str) -> Path:
    """Returns where a file of measurements lies in the user's cache directory."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root, "quantcache", name)


def _read() -> dict[str, list[float]]:
    try:
        known = json.loads(cache_path("kernels.json").read_text())
    except (OSError, ValueError):
        return {}
    valid = isinstance(known, dict) and all(isinstance(v, list) and len(v) == 2 for v in known.values())
    return known if valid else {}


def write_measured(path: Path, text: str) -> None:
    """Writes a file at once; one that cannot be written is measured again the next time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(text)
        part.replace(path)
    except OSError:
        pass
