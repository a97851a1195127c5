"""How fast a device is: rates of its kernels, measured once and kept in the user's cache directory.

    seconds of a dense kernel      max(flops / rate(kind, shape), bytes / bandwidth(bytes))
    seconds of a pointwise kernel  bytes / bandwidth(bytes) + special / special rate(special)

Rates are measured on a grid of shapes as PyTorch runs such a kernel by itself, and interpolated log–log; beyond the
grid the nearest of its points counts. The time that a call takes by itself is part of the rates of small shapes.
"""

import functools
import itertools
import math
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, PositiveFloat, TypeAdapter, ValidationError, model_validator
from scipy.interpolate import interpn
from torch import Tensor

from .formats import parse_format
from .formats.schemes import SCHEMES
from .kernels import find_kernel
from .kernels.bf16_attention import bf16_attention, has_bf16_attention
from .kernels.timing import cache_path, device_name, write_measured

REPEATS, MIN_SECONDS = 5, 1e-3

_lock = threading.Lock()


class Rates(BaseModel):
    """The rate of one kind of kernel, in FLOPs, bytes or elements a second.

    Attributes:
        axes: The sizes along each axis of the grid, ascending.
        values: The rate at each point, the last axis fastest.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    axes: tuple[tuple[PositiveFloat, ...], ...]
    values: tuple[PositiveFloat, ...]

    @model_validator(mode="after")
    def _has_a_value_a_point(self) -> "Rates":
        is_ascending = all(list(axis) == sorted(set(axis)) for axis in self.axes)
        if len(self.values) != math.prod(map(len, self.axes)) or not is_ascending:
            raise ValueError("the values are not those of the grid")
        return self

    def at(self, point: Sequence[float]) -> float:
        """Returns the rate at a point of the grid's space.

        >>> rates = Rates(axes=((1, 100),), values=(2, 8))
        >>> round(rates.at([10]), 3), round(rates.at([10**6]), 3)
        (4.0, 8.0)
        """
        place = [np.clip(x, axis[0], axis[-1]) for x, axis in zip(point, self.axes)]
        values = np.log(self.values).reshape([len(axis) for axis in self.axes])
        return float(np.exp(interpn([np.log(axis) for axis in self.axes], values, np.log(place))[0]))

    @property
    def peak(self) -> float:
        return max(self.values)


_FILE = TypeAdapter(dict[str, Rates])


@dataclass(frozen=True)
class DeviceProfile:
    """The rates of one device, each measured when it is asked for the first time."""

    device: torch.device

    def multiplies(self, scheme: str) -> bool:
        """Whether the device has a kernel for linears in this quantization scheme."""
        return find_kernel(SCHEMES[scheme], self.device) is not None

    def lowers_attention(self, scheme: str, dtype: torch.dtype) -> bool:
        """Whether attention of this dtype has products of bfloat16 beside linears in this scheme."""
        return dtype == torch.float32 and self.multiplies(scheme) and has_bf16_attention(self.device)

    def rates(self, kind: str, dtype: torch.dtype = torch.float32) -> Rates:
        """Returns the rates of one kind of kernel.

        Args:
            kind: `linear`, `convolution`, `attention`, `bf16 attention`, `memory` (bytes a second), `special` (elements
                a second), or the name of a quantization scheme.
            dtype: Of the kernel's result.
        """
        name = str(dtype).removeprefix("torch.")
        key = "|".join((torch.__version__, device_name(self.device), kind, name))
        with _lock:
            path = cache_path("profile.json")
            known = _read(path)
            if key not in known:
                known[key] = _measure(kind, dtype, self.device)
                write_measured(path, _FILE.dump_json(known, indent=1).decode())
            return known[key]


def _read(path: Path) -> dict[str, Rates]:
    try:
        return _FILE.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return {}  # damaged, or not there yet: measured again


_Run = tuple[float, Callable[[], Any]]  # the work of one call, and the call

_WIDTHS = (32, 128, 512, 2048)
_ATTENTION = (8, 64, 256, 1024), (4, 8, 64, 256, 1024), (32, 64, 128)
_AXES: dict[str, tuple[tuple[float, ...], ...]] = {
    "linear": ((1, 16, 128, 1024), _WIDTHS, _WIDTHS),
    "convolution": ((64, 1024, 4096), (4, 64), (128, 512)),
    "attention": _ATTENTION,
    "bf16 attention": _ATTENTION,
    "memory": (tuple(4.0**i for i in range(5, 15)),),
    "special": ((2.0**10, 2.0**16, 2.0**20),),
}


def _measure(kind: str, dtype: torch.dtype, device: torch.device) -> Rates:
    axes = _AXES.get(kind, _AXES["linear"])
    runs: dict[str, Callable[..., _Run]] = {
        "linear": _linear,
        "convolution": _convolution,
        "attention": functools.partial(_attention, F.scaled_dot_product_attention),
        "bf16 attention": functools.partial(_attention, functools.partial(bf16_attention, scale=1.0)),
        "memory": _copy,
        "special": _gelu,
    }
    make = runs.get(kind, functools.partial(_scheme, kind))
    values = []
    with torch.no_grad():
        for point in itertools.product(*axes):
            sizes = tuple(map(int, point))
            work, run = make(dtype, device, *sizes)
            values.append(work / _seconds(run, device))
    return Rates(axes=axes, values=tuple(values))


def clock(device: torch.device) -> Callable[[], float]:
    """Returns the clock to measure a device with: of one CPU thread its own, which stands while others are running."""
    is_alone = device.type == "cpu" and torch.get_num_threads() == 1
    return time.thread_time if is_alone else time.perf_counter


def _seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Returns the time of one call: the shortest of several, each of as many calls as a clock can tell apart."""
    now = clock(device)

    def elapsed(num_calls: int) -> float:
        start = now()
        for _ in range(num_calls):
            run()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return now() - start

    elapsed(1)
    num_calls = max(1, round(MIN_SECONDS / max(elapsed(1), 1e-7)))
    return min(elapsed(num_calls) for _ in range(REPEATS)) / num_calls


def _linear(dtype: torch.dtype, device: torch.device, rows: int, inner: int, outer: int) -> _Run:
    x, w = (torch.randn(n, inner, dtype=dtype, device=device) for n in (rows, outer))
    b = torch.randn(outer, dtype=dtype, device=device)
    return 2 * rows * inner * outer, lambda: F.linear(x, w, b)


def _scheme(name: str, dtype: torch.dtype, device: torch.device, rows: int, inner: int, outer: int) -> _Run:
    scheme = SCHEMES[name]
    kernel = find_kernel(scheme, device)
    assert kernel is not None
    x, w = (torch.randn(n, inner, dtype=dtype, device=device) for n in (rows, outer))
    parts = parse_format(scheme.activation).quantize(x)
    weight = kernel.prepare(parse_format(scheme.weight).quantize(w), scheme.weight, inner)
    return 2 * rows * inner * outer, lambda: kernel.multiply(parts, weight)


def _convolution(dtype: torch.dtype, device: torch.device, rows: int, inner: int, outer: int) -> _Run:
    """Patches of 2 × 2, as patch embeddings take them."""
    side = 2 * math.isqrt(rows)
    x = torch.randn(1, inner // 4, side, side, dtype=dtype, device=device)
    w = torch.randn(outer, inner // 4, 2, 2, dtype=dtype, device=device)
    return 2 * (side // 2) ** 2 * inner * outer, lambda: F.conv2d(x, w, stride=2)


def _attention(
    attend: Callable[..., Tensor], dtype: torch.dtype, device: torch.device, queries: int, keys: int, width: int
) -> _Run:
    """As many heads as make the call long enough for its overhead not to count, in the layout of a fused projection."""
    num_heads = 4
    batch = max(1, min(256, 2**24 // (queries * keys * width * num_heads)))
    q, k, v = (
        torch.randn(batch, n, num_heads, width, dtype=dtype, device=device).transpose(1, 2)
        for n in (queries, keys, keys)
    )
    return 4 * batch * num_heads * queries * keys * width, lambda: attend(q, k, v)


def _copy(dtype: torch.dtype, device: torch.device, num_bytes: int) -> _Run:
    x = torch.ones(num_bytes // 2 // dtype.itemsize, dtype=dtype, device=device)
    y = torch.empty_like(x)
    return num_bytes, lambda: torch.add(x, 1.0, out=y)


def _gelu(dtype: torch.dtype, device: torch.device, num_elements: int) -> _Run:
    x = torch.randn(num_elements, dtype=dtype, device=device)
    return num_elements, lambda: F.gelu(x, approximate="tanh")
