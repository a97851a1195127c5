"""Quantizer for activations on CUDA, in Triton, with a block-Hadamard rotation in front: one kernel for both.

    y[m, k] = B^−½ · Σ_j x[m, j]·H[j, k]           H block-diagonal, ±1 in blocks of B; y = x without a rotation
    codes, scale (and zero point) of y, a row      exactly the algebra of `qc_compiler.formats`

A row is read twice: for its smallest and largest y, then for its codes. The products x·(±1) are exact, so tensor cores
rotate bfloat16 and float16 with no error but that of float32 sums; float32 takes float32 products.

Error: without a rotation codes, scales and zero points are the format's own. With one they are those of x·H in
float32, which the reference rounds to the dtype of x in between and this kernel does not: |Δy| ≤ B·2⁻²³·B^−½·Σ|x| over
the block, so a code at a tie may be its neighbour. A row that holds NaN or Inf gets the scale NaN: all of it is NaN
again after `dequantize`, as the reference's is.

Not run on a GPU yet: its tests run it in Triton's interpreter, and compile it for sm_90.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor
from torch.library import triton_op, wrap_triton

from ..formats import Float8, Format, Integer, IntegerWithZero, parse_format
from .triton_linear import INTERPRETED, bucket

CHUNK = 128  # elements that are rotated at once, and the largest rotation
_WIDE = tl.constexpr(INTERPRETED)  # the interpreter multiplies the bits of bfloat16 as if they were integers
_CHUNK = tl.constexpr(CHUNK)


def _configs() -> list[triton.Config]:
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 4, "CHUNKS": 4})]
    shapes = [(16, 1, 4), (16, 4, 8), (4, 8, 4), (2, 16, 8), (1, 32, 8)]
    return [triton.Config({"BLOCK_M": m, "CHUNKS": chunks}, num_warps=warps) for m, chunks, warps in shapes]


@triton.jit
def _load(x_MK, row_P, chunk_P, signs_CC, M, stride_xm, stride_xk, K: tl.constexpr, ROTATION: tl.constexpr):
    """Returns parts (P, C) of rows, rotated, in float32; what is outside is 0."""
    k_PC = chunk_P[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]
    at = row_P.to(tl.int64)[:, None] * stride_xm + k_PC * stride_xk
    x_PC = tl.load(x_MK + at, (row_P < M)[:, None] & (k_PC < K), other=0)
    if ROTATION == 1:
        return x_PC.to(tl.float32)
    if _WIDE:
        x_PC = x_PC.to(tl.float32)
    norm: tl.constexpr = ROTATION**-0.5
    return tl.dot(x_PC, signs_CC.to(x_PC.dtype), input_precision="ieee") * norm


@triton.jit
def _signs(ROTATION: tl.constexpr):
    """Returns Sylvester's matrices of ±1 along the diagonal, 0 elsewhere: the parity of the bits j and k share."""
    j, k = tl.arange(0, _CHUNK)[:, None], tl.arange(0, _CHUNK)[None, :]
    common = j & k & (ROTATION - 1)
    common ^= common >> 4
    common ^= common >> 2
    common ^= common >> 1
    return tl.where(j // ROTATION == k // ROTATION, 1 - 2 * (common & 1), 0)


@triton.jit
def _round(x):
    """Rounds to integers, ties to even, below 2²²."""
    return (x + 12582912.0) - 12582912.0  # 1.5·2²³: no fraction fits beside it


@triton.jit
def _encode_e4m3(x):
    """Returns the bytes of E4M3 nearest to x, ties to even, |x| ≤ 448; written out, so that any GPU can."""
    size = tl.abs(x)
    small = _round(size * 512.0).to(tl.int32)  # below 2⁻⁶ the numbers are multiples of 2⁻⁹
    bits = size.to(tl.int32, bitcast=True)
    large = ((bits + 0x7FFFF + ((bits >> 20) & 1)) >> 20) - 960  # 3 bits of the significand; 960 = (127 − 7)·2³
    return tl.where(size < 0.015625, small, large) | tl.where(x < 0, 128, 0)


@triton.jit
def _whole_rows(values_P, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr):
    """Returns values of rows (BLOCK_M,) for each of their parts (P,)."""
    return tl.reshape(tl.broadcast_to(values_P[:, None], (BLOCK_M, CHUNKS)), (BLOCK_M * CHUNKS,))


@triton.autotune(configs=_configs(), key=["M_BUCKET", "K", "KIND", "ROTATION"])
@triton.jit
def _quantize_kernel(
    x_MK, codes_MK, scale_M, zero_M, M, stride_xm, stride_xk, K: tl.constexpr, M_BUCKET,
    KIND: tl.constexpr, TOP: tl.constexpr, ROTATION: tl.constexpr, BLOCK_M: tl.constexpr, CHUNKS: tl.constexpr,
):  # fmt: skip
    # A part is one chunk of one row; a program holds CHUNKS parts of BLOCK_M rows at a time.
    part = tl.arange(0, BLOCK_M * CHUNKS)
    row_P, chunk_P = tl.program_id(0) * BLOCK_M + part // CHUNKS, part % CHUNKS
    row_M = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    signs_CC = _signs(ROTATION)

    low_P = tl.zeros((BLOCK_M * CHUNKS,), dtype=tl.float32)
    high_P, taint_P = low_P, low_P
    for start in range(0, tl.cdiv(K, _CHUNK), CHUNKS):
        y_PC = _load(x_MK, row_P, start + chunk_P, signs_CC, M, stride_xm, stride_xk, K, ROTATION)
        low_P = tl.minimum(low_P, tl.min(y_PC, axis=1))
        high_P = tl.maximum(high_P, tl.max(y_PC, axis=1))
        taint_P += tl.sum(y_PC * 0.0, axis=1)  # minima and maxima pass NaN over; 0·NaN and 0·Inf are NaN
    low_M = tl.min(tl.reshape(low_P, (BLOCK_M, CHUNKS)), axis=1)
    high_M = tl.max(tl.reshape(high_P, (BLOCK_M, CHUNKS)), axis=1)
    taint_M = tl.sum(tl.reshape(taint_P, (BLOCK_M, CHUNKS)), axis=1)
    span_M = high_M - low_M if KIND == "uint" else tl.maximum(high_M, -low_M)
    scale = tl.div_rn(span_M, tl.full((BLOCK_M,), TOP, tl.float32)) + taint_M
    divisor = tl.where(scale == 0, 1.0, scale)
    zero = _round(tl.div_rn(-low_M, divisor))
    tl.store(scale_M + row_M, scale, row_M < M)
    if KIND == "uint":
        tl.store(zero_M + row_M, zero, row_M < M)
    divisor_P, zero_P = _whole_rows(divisor, BLOCK_M, CHUNKS), _whole_rows(zero, BLOCK_M, CHUNKS)

    for start in range(0, tl.cdiv(K, _CHUNK), CHUNKS):
        y_PC = _load(x_MK, row_P, start + chunk_P, signs_CC, M, stride_xm, stride_xk, K, ROTATION)
        q_PC = tl.div_rn(y_PC, tl.broadcast_to(divisor_P[:, None], y_PC.shape))
        if KIND == "fp8":
            q_PC = tl.minimum(tl.maximum(q_PC, -TOP), TOP)
        elif KIND == "int":
            q_PC = tl.minimum(tl.maximum(_round(q_PC), -TOP), TOP)
        else:
            q_PC = tl.minimum(tl.maximum(_round(q_PC) + zero_P[:, None], 0.0), TOP)
        q_PC = tl.where(q_PC == q_PC, q_PC, 0.0)  # an integer cannot hold NaN; the scale does
        codes_PC = _encode_e4m3(q_PC) if KIND == "fp8" else q_PC.to(tl.int32)
        k_PC = (start + chunk_P)[:, None] * _CHUNK + tl.arange(0, _CHUNK)[None, :]
        at, inside = row_P.to(tl.int64)[:, None] * K + k_PC, (row_P < M)[:, None] & (k_PC < K)
        tl.store(codes_MK + at, codes_PC.to(codes_MK.dtype.element_ty), inside)


def can_quantize(form: Format) -> bool:
    """Whether the kernel makes this format: one scale a row, and codes of a byte."""
    if isinstance(form, Float8):
        return form.dtype == torch.float8_e4m3fn and not form.per_tensor
    return isinstance(form, (Integer, IntegerWithZero)) and form.group == 0


@triton_op("quantcache::triton_quantize", mutates_args=())
def triton_quantize(x: Tensor, form: str, rotation: int = 1) -> list[Tensor]:
    """Rotates activations and quantizes them, one scale a row.

    Args:
        x: (…, K), bfloat16, float16 or float32, any strides.
        form: A format that `can_quantize`.
        rotation: B, a power of two up to 128 that divides K; 1 for none.

    Returns:
        Codes (…, K), float32 scales (…, 1) and, where the format has them, zero points (…, 1).
    """
    narrow, inner = parse_format(form), x.shape[-1]
    assert can_quantize(narrow), form
    assert CHUNK % rotation == 0 == inner % rotation, (inner, rotation)
    rows = x.reshape(-1, inner)
    count = rows.shape[0]
    kind, top, dtype = _how(narrow)
    codes = torch.empty(x.shape, dtype=dtype, device=x.device)
    scales = [x.new_empty((*x.shape[:-1], 1), dtype=torch.float32) for _ in range(narrow.num_parts - 1)]
    if count != 0:
        kernel: Any = _quantize_kernel if INTERPRETED else wrap_triton(_quantize_kernel)
        kernel[lambda meta: (triton.cdiv(count, meta["BLOCK_M"]),)](
            rows,
            codes,
            scales[0],
            scales[1] if len(scales) > 1 else rows,
            count,
            rows.stride(0),
            rows.stride(1),
            K=inner,
            M_BUCKET=bucket(count),
            KIND=kind,
            TOP=top,
            ROTATION=rotation,
        )
    return [codes.view(torch.float8_e4m3fn) if kind == "fp8" else codes, *scales]


@triton_quantize.register_fake
def _(x: Tensor, form: str, rotation: int = 1) -> list[Tensor]:
    return list(parse_format(form).quantize(x))


def _how(form: Format) -> tuple[str, float, torch.dtype]:
    """Returns the kind of a format in the kernel, its largest code and the dtype that the kernel writes."""
    if isinstance(form, Integer):
        return "int", float(form.max_code), torch.int8
    if isinstance(form, IntegerWithZero):
        return "uint", float(2**form.bits - 1), torch.uint8
    return "fp8", 448.0, torch.uint8
