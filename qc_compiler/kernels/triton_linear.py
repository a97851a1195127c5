"""Linears over narrow weights for CUDA, in Triton: y = epilogue(x̂ · ŵᵀ).

    acc[m, n] = Σ_k q_x[m, k]·q_w[n, k]                      int8 × int8 and int8 × int4 in int32, fp8 in float32
    y = (acc − z[m]·Σ_k q_w[n, k])·s_x[m]·s_w[n] + b[n]      s and z a token, s_w an output channel
    y = activation(y), y = residual + gate·y                 each only where it is asked for

`int4/128` has a scale for every 128 elements of a row: each tile of 128 is one int32 product, scaled into a float32
sum. `nvfp4` is decoded in the kernel, E2M1·E4M3 (at most 6 significant bits: exact in bfloat16), and multiplies
floating-point activations; the tensor's scale is applied at the end. Blackwell could multiply two nvfp4 operands as
they are (`tl.dot_scaled`): that is not written, since neither Triton's interpreter nor a GPU at hand could check it.

Error: int8 and int4/128 2⁻²²·Σ|terms|, of float32 sums; nvfp4 that of tensor cores summing in float32; fp8 about
2⁻¹³·Σ|terms|: Hopper's tensor cores keep 14 bits of a sum (DeepSeek-V3, arXiv 2412.19437, section 3.3.2), here within a
tile of 128, and the tiles are added in float32.

Not run on a GPU yet: its tests run it in Triton's interpreter, and compile it for sm_90.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton
from torch.utils.flop_counter import register_flop_formula

from ..formats import parse_format
from ..formats.schemes import Scheme
from .base import LinearKernel

INTERPRETED = triton.knobs.runtime.interpret if hasattr(triton, "knobs") else False
GROUP = 128  # of int4
_WIDE = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16 as if they were integers


def _configs() -> list[triton.Config]:
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 16, "BLOCK_N": 32, "GROUP_M": 2})]
    shapes = [(128, 256, 8, 3), (128, 128, 8, 4), (128, 128, 4, 3), (64, 128, 4, 4), (64, 64, 4, 4), (16, 128, 4, 5)]
    return [
        triton.Config({"BLOCK_M": m, "BLOCK_N": n, "GROUP_M": 8}, num_warps=warps, num_stages=stages)
        for m, n, warps, stages in shapes
    ]


@triton.jit
def _decode_e2m1(codes):
    """Returns the values of E2M1 codes: 0 .5 1 1.5 2 3 4 6 and their negatives."""
    code = (codes & 7).to(tl.float32)
    size = tl.where(code < 4, code * 0.5, tl.where(code < 6, code - 2.0, 2.0 * code - 8.0))
    return tl.where(codes >= 8, -size, size)


@triton.jit
def _nibbles(packed, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr):
    """Returns codes (BLOCK_N, BLOCK_K) of bytes (BLOCK_N, BLOCK_K / 2), the low half first."""
    return tl.reshape(tl.join(packed & 0xF, packed >> 4), (BLOCK_N, BLOCK_K))


@triton.jit
def _sigmoid(x):
    return tl.sigmoid(tl.maximum(x, -80.0))  # exp(80) is still finite


@triton.autotune(configs=_configs(), key=["M_BUCKET", "N", "K", "FORM"])
@triton.jit
def _linear_kernel(
    x_MK, x_scale_M, x_zero_M, w_NK, w_scale_N, w_sum_N, w_scale, bias_N, gate_BN, residual_MN, y_MN,
    M, stride_xm, stride_xk, rows_per_sample, N: tl.constexpr, K: tl.constexpr,
    M_BUCKET, FORM: tl.constexpr, HAS_SCALE: tl.constexpr, HAS_ZERO: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_GATE: tl.constexpr, HAS_RESIDUAL: tl.constexpr, ACTIVATION: tl.constexpr,
    BLOCK_K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, GROUP_M: tl.constexpr,
):  # fmt: skip
    # Programs walk over GROUP_M tiles of rows before the next tile of columns, so that weights stay in the L2 cache.
    pid, tiles_m, tiles_n = tl.program_id(0), tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    first = pid // (GROUP_M * tiles_n) * GROUP_M
    height = min(tiles_m - first, GROUP_M)
    rows = (first + pid % (GROUP_M * tiles_n) % height) * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = (pid % (GROUP_M * tiles_n) // height) * BLOCK_N + tl.arange(0, BLOCK_N)
    in_m, in_n = rows < M, cols < N
    rows64, cols64 = rows.to(tl.int64), cols.to(tl.int64)

    IN_INT32: tl.constexpr = FORM == "int8"
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.int32 if IN_INT32 else tl.float32)
    for start in range(0, K, BLOCK_K):
        ks = start + tl.arange(0, BLOCK_K)
        in_k = ks < K
        x_at, inside = rows64[:, None] * stride_xm + ks[None, :] * stride_xk, in_m[:, None] & in_k[None, :]
        if HAS_ZERO:  # uint8 codes: the tensor cores multiply signed ones, so 128 is taken off
            x = (tl.load(x_MK + x_at, inside, other=128) ^ 128).to(tl.int8, bitcast=True)
        else:
            x = tl.load(x_MK + x_at, inside, other=0)
        if FORM == "int8" or FORM == "fp8":
            w = tl.load(w_NK + cols64[None, :] * K + ks[:, None], in_n[None, :] & in_k[:, None], other=0)
            if IN_INT32:
                acc += tl.dot(x, w, out_dtype=tl.int32)
            else:
                acc += tl.dot(x.to(tl.float8e4nv, bitcast=True), w.to(tl.float8e4nv, bitcast=True))
        else:
            half = start // 2 + tl.arange(0, BLOCK_K // 2)
            width = (K + 1) // 2
            packed = tl.load(
                w_NK + cols64[:, None] * width + half[None, :], in_n[:, None] & (half < width)[None, :], other=0
            )
            codes = _nibbles(packed, BLOCK_N, BLOCK_K)
            if FORM == "int4":
                w = ((codes ^ 8).to(tl.int8) - 8).to(tl.int8)
                scale = tl.load(w_scale_N + cols64 * tl.cdiv(K, BLOCK_K) + start // BLOCK_K, in_n, other=0.0)
                acc += tl.dot(x, tl.trans(w), out_dtype=tl.int32).to(tl.float32) * scale[None, :]
            else:
                blocks = start // 16 + tl.arange(0, BLOCK_K // 16)
                scales = tl.load(
                    w_scale_N + cols64[:, None] * tl.cdiv(K, 16) + blocks[None, :],
                    in_n[:, None] & (blocks * 16 < K)[None, :],
                    other=0,
                )
                scales = scales.to(tl.float8e4nv, bitcast=True).to(tl.float32)
                values = tl.reshape(_decode_e2m1(codes), (BLOCK_N, BLOCK_K // 16, 16)) * scales[:, :, None]
                if _WIDE:
                    x = x.to(tl.float32)
                w = tl.reshape(values, (BLOCK_N, BLOCK_K)).to(x.dtype)
                acc += tl.dot(x, tl.trans(w), input_precision="ieee")

    y = acc.to(tl.float32)
    if HAS_ZERO:
        zero = tl.load(x_zero_M + rows, in_m, other=0.0) - 128.0
        y -= zero[:, None] * tl.load(w_sum_N + cols, in_n, other=0.0)[None, :]
    if HAS_SCALE:
        y *= tl.load(x_scale_M + rows, in_m, other=0.0)[:, None]
    if FORM == "int8" or FORM == "fp8":
        y *= tl.load(w_scale_N + cols, in_n, other=0.0)[None, :]
    if FORM == "nvfp4":
        y *= tl.load(w_scale)
    if HAS_BIAS:
        y += tl.load(bias_N + cols, in_n, other=0.0).to(tl.float32)[None, :]
    if ACTIVATION == "gelu":
        y *= 0.5 + 0.5 * tl.erf(0.7071067811865476 * y)
    if ACTIVATION == "gelu_tanh":  # tanh(u) = 2·sigmoid(2u) − 1
        y *= _sigmoid(1.5957691216057308 * (y + 0.044715 * y * y * y))
    if ACTIVATION == "silu":
        y *= _sigmoid(y)
    at, inside = rows64[:, None] * N + cols64[None, :], in_m[:, None] & in_n[None, :]
    if HAS_GATE:
        sample = (rows64 // rows_per_sample)[:, None] * N
        y *= tl.load(gate_BN + sample + cols64[None, :], inside, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        y += tl.load(residual_MN + at, inside, other=0.0).to(tl.float32)
    tl.store(y_MN + at, y.to(y_MN.dtype.element_ty), inside)


@triton_op("quantcache::triton_linear", mutates_args=())
def triton_linear(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: list[Tensor],
    form: str,
    dtype: torch.dtype,
    bias: Tensor | None = None,
    activation: str = "none",
    gate: Tensor | None = None,
    residual: Tensor | None = None,
) -> Tensor:
    """Multiplies activations with a narrow weight.

    Args:
        x: (…, K): uint8 or int8 codes, fp8 codes, or floating point (nvfp4 alone).
        x_scale, x_zero: float32 (…, 1), or None.
        weight: int8: codes (N, K), scales (N, 1), sums of codes (N,). int4: packed (N, ⌈K / 2⌉), scales (N, ⌈K / 128⌉),
            sums of scaled codes (N,). fp8: codes (N, K), scales (N, 1). nvfp4: packed (N, ⌈K / 2⌉), E4M3 scales
            (N, ⌈K / 16⌉), tensor scale ().
        form: `int8`, `int4`, `fp8` or `nvfp4`.
        dtype: Of the result.
        bias: (N,).
        activation: `gelu`, `gelu_tanh` (its approximation), `silu` or `none`.
        gate: (B, N) or (B, 1, N), for x of B samples; or any other number of rows that divides those of x.
        residual: (…, N), added last.

    Returns:
        (…, N) in `dtype`.
    """
    inner, outer = x.shape[-1], weight[0].shape[0]
    rows = _bytes(x).reshape(-1, inner)
    y = torch.empty(*x.shape[:-1], outer, dtype=dtype, device=x.device)
    count = rows.shape[0]
    if count == 0:
        return y
    sums = weight[2] if len(weight) > 2 else weight[0]
    args = (
        rows,
        rows if x_scale is None else x_scale.reshape(-1).contiguous(),
        rows if x_zero is None else x_zero.reshape(-1).contiguous(),
        _bytes(weight[0]),
        _bytes(weight[1]),
        sums,
        sums,
        rows if bias is None else bias.contiguous(),
        rows if gate is None else gate.reshape(-1, outer).contiguous(),
        rows if residual is None else residual.reshape(-1, outer).contiguous(),
        y,
        count,
        rows.stride(0),
        rows.stride(1),
        1 if gate is None else count // (gate.numel() // outer),
    )
    kernel: Any = _linear_kernel if INTERPRETED else wrap_triton(_linear_kernel)
    kernel[lambda meta: (triton.cdiv(count, meta["BLOCK_M"]) * triton.cdiv(outer, meta["BLOCK_N"]),)](
        *args,
        N=outer,
        K=inner,
        M_BUCKET=bucket(count),
        FORM=form,
        HAS_SCALE=x_scale is not None,
        HAS_ZERO=x_zero is not None,
        HAS_BIAS=bias is not None,
        HAS_GATE=gate is not None,
        HAS_RESIDUAL=residual is not None,
        ACTIVATION=activation,
        BLOCK_K=GROUP if form in ("int4", "int8", "fp8") else 64,
    )
    return y


@triton_linear.register_fake
def _(
    x: Tensor,
    x_scale: Tensor | None,
    x_zero: Tensor | None,
    weight: list[Tensor],
    form: str,
    dtype: torch.dtype,
    *_: object,
    **__: object,
) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight[0].shape[0]), dtype=dtype)


@register_flop_formula(torch.ops.quantcache.triton_linear)
def _flops(x: torch.Size, x_scale: object, x_zero: object, weight: list[torch.Size], *_: object, **__: object) -> int:
    return 2 * math.prod(x) * weight[0][0]


def bucket(count: int | torch.SymInt) -> int:
    """Returns the size that kernels are tuned for: the next power of two of the rows, at most 4096."""
    return min(4096, 2 ** math.ceil(math.log2(count))) if isinstance(count, int) else 4096


def _bytes(x: Tensor) -> Tensor:
    """Returns fp8 as bytes, which every version of Triton can load; the kernel reads them as fp8 again."""
    return x.view(torch.uint8) if x.dtype == torch.float8_e4m3fn else x


@dataclass(frozen=True)
class TritonLinear(LinearKernel):
    """The kernel for CUDA devices.

    Attributes:
        has_fp8: Whether the device converts and multiplies E4M3, in which nvfp4 keeps its scales (capability 8.9).
    """

    has_fp8: bool = True

    name = "Triton"
    device = "cuda"

    def takes(self, scheme: Scheme) -> bool:
        pairs = {("int8", "uint8"), ("int8", "uint6"), ("int4/128", "uint8"), ("int4/128", "uint6")}
        if self.has_fp8:
            pairs |= {("fp8", "fp8"), ("nvfp4", "nvfp4")}
        return (scheme.weight, scheme.activation) in pairs

    def prepare(self, parts: Sequence[Tensor], form: str, size: int | None = None) -> tuple[Tensor, ...]:
        codes, *scales = parts
        narrow = parse_format(form)
        packed = codes if size is not None else narrow.pack(codes)
        if form in ("fp8", "nvfp4"):
            return packed, *scales
        if form == "int8":
            return packed, *scales, codes.sum(dim=-1, dtype=torch.float32)
        codes = narrow.unpack(packed, size or codes.shape[-1])
        return packed, *scales, narrow.dequantize(codes, *scales).sum(dim=-1)

    def multiply(self, parts: Sequence[Tensor], weight: Sequence[Tensor]) -> Tensor:
        return self.linear(parts, weight, None, torch.bfloat16)

    def linear(
        self, parts: Sequence[Tensor], weight: Sequence[Tensor], bias: Tensor | None, dtype: torch.dtype
    ) -> Tensor:
        if weight[1].dtype == torch.float8_e4m3fn:
            x = parse_format("nvfp4").dequantize(*parts).to(dtype)
            return triton_linear(x, None, None, list(weight), "nvfp4", dtype, bias)
        codes, scale, *zero = parts
        form = "fp8" if codes.dtype == torch.float8_e4m3fn else "int8" if weight[0].dtype == torch.int8 else "int4"
        return triton_linear(codes, scale, zero[0] if zero else None, list(weight), form, dtype, bias)
