"""Head-wise attention on CUDA, in Triton: full, arrow, int8 and cached heads of a layer in one launch.

    s[i, j] = scale·log₂e·Σ_d q[i, d]·k[j, d]        over the keys j that `qc_compiler.attention` lets i attend
    y[i] = Σ_j 2^(s[i, j] − m[i])·v[j] / Σ_j 2^(s[i, j] − m[i])        m the largest s so far, as in FlashAttention-2
    int8: s[i, j] = a[i]·b[g]·Σ_d q̂[i, d]·k̂[j, d]    q̂ and k̂ codes of scale·log₂e·q and of k − mean k, a and b scales

Text and vision queries lie in tiles of their own, so that only those of text go over all keys. A tile of an arrow's
vision queries goes over the keys of text and those from its first query − w to its last query + w: no mask where all
its queries attend all keys of a tile, an exact one elsewhere. The longest tiles start first: text, then the heads from
full to narrow, then the cached ones, which copy. That order needs no tile size, so any can be tuned for.

Error, with p the exact softmax and u half the spacing of the dtype at 1 (2⁻⁸ for bfloat16, 2⁻¹¹, 2⁻²⁴):

    |Δy[i]| ≤ u·|y[i]| + (u + 2ε)·Σ_j p[i, j]·|v[j]| + t·Σ_j |v[j]|
    ε = 2⁻²³·(D·scale·max_j Σ_d |q[i, d]·k[j, d]| + S + 8)        float32 sums, here and on tensor cores
    t = 2⁻²⁵ for float16, where a small 2^(s − m) has no exponent left; else 0

An int8 head adds (e^(2σ) − 1)·Σ_j p[i, j]·|v[j]|, with α = max|q[i]| / 127 of a query, β = max|k − mean k| / 127 of a
group of keys and σ = scale·max_j (½·α·Σ_d |k[j, d] − mean k| + ½·β·Σ_d |q[i, d]| + ¼·D·α·β).

NaN and Inf reach what attends them, as in the reference: those of a key through the scores, those of a value also
to the other queries of a tile that loads it. In an int8 head such a key makes all of the head NaN.

Source: SageAttention, arXiv 2410.02367, for the int8 scores; there a query's scale is that of its whole tile.

Not run on a GPU yet: its tests run it in Triton's interpreter, and compile it for sm_90.
"""

import math
from functools import lru_cache
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..attention import CACHED, FULL, INT8, empty_output
from .triton_linear import INTERPRETED, bucket
from .triton_quantize import _round

GROUP = 32 if INTERPRETED else 128  # int8 keys that share a scale: whole tiles, whatever BLOCK_N
_GROUP = tl.constexpr(GROUP)
_FULL, _CACHED, _INT8 = tl.constexpr(FULL), tl.constexpr(CACHED), tl.constexpr(INT8)
_LOWEST = tl.constexpr(torch.finfo(torch.float32).min)  # finite: a row that attends nothing yet makes no NaN of −∞ + ∞
_INTERPRETED = tl.constexpr(INTERPRETED)


def _configs() -> list[triton.Config]:
    if INTERPRETED:
        return [triton.Config({"BLOCK_M": 16, "BLOCK_N": 16})]
    tiles = [(128, 128, 8, 2), (128, 128, 8, 3), (128, 64, 8, 3), (128, 64, 4, 3), (64, 64, 4, 3), (32, 32, 4, 2)]
    return [triton.Config({"BLOCK_M": m, "BLOCK_N": n}, num_warps=w, num_stages=s) for m, n, w, s in tiles]


def _fitting(configs: list[triton.Config], args: dict[str, Any], **_: object) -> list[triton.Config]:
    """Returns the configs for a dtype: float32 has no tensor cores, and takes minutes to compile for a large tile."""
    is_wide = args["q_BHSD"].dtype == torch.float32
    return [config for config in configs if (config.kwargs["BLOCK_M"] == 32) == is_wide]


@triton.jit
def _load(x_SD, start, end, stride, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, MASKED: tl.constexpr):
    """Returns rows (ROWS, WIDTH) from the given one; columns from D on are 0, and rows from the end on if MASKED."""
    row, d = tl.arange(0, ROWS)[:, None], tl.arange(0, WIDTH)[None, :]
    at = x_SD + start.to(tl.int64) * stride + row * stride + d
    if MASKED:
        return tl.load(at, (start + row < end) & (d < D), other=0)
    if D < WIDTH:
        return tl.load(at, tl.broadcast_to(d < D, (ROWS, WIDTH)), other=0)
    return tl.load(at)


@triton.jit
def _dot(a, b, sums):
    if _INTERPRETED:  # which multiplies the bits of bfloat16 as if they were integers
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, sums, input_precision="ieee")


@triton.jit
def _count(n):
    """Returns n, a bound of a loop: the interpreter keeps numbers in arrays, and NumPy 2.4 makes no bound of those."""
    if _INTERPRETED:
        return n.handle.data.item()
    return n


@triton.jit
def _encode(x, AXIS: tl.constexpr):
    """Returns int8 codes and their scale, one along an axis or, if that is None, one in all: NaN where x is not finite.

    A scale is never 0, so that −∞ stays −∞ times it.
    """
    scale = tl.maximum(tl.max(tl.abs(x), axis=AXIS, keep_dims=True) / 127, 1e-18)
    return _round(x / scale).to(tl.int8), scale + tl.sum(x * 0.0, axis=AXIS, keep_dims=True)


@triton.jit
def _add_keys(
    acc_MD, top_M, sum_M, q_MD, factor_M, i_M, keys, start, end, reach,
    D: tl.constexpr, BLOCK_N: tl.constexpr, MASKED: tl.constexpr, IN_INT8: tl.constexpr,
):  # fmt: skip
    """Adds a tile of keys to the online softmax; MASKED: those before the end and within reach of a query."""
    k_SD, v_SD, key_scale_G, stride_ks, stride_vs = keys
    WIDTH: tl.constexpr = acc_MD.shape[1]
    k_DN = tl.trans(_load(k_SD, start, end, stride_ks, D, BLOCK_N, WIDTH, MASKED))
    if IN_INT8:
        score_MN = tl.dot(q_MD, k_DN, out_dtype=tl.int32).to(tl.float32)
        factor_M *= tl.load(key_scale_G + start // _GROUP)
    else:
        score_MN = _dot(q_MD, k_DN, None)
    if MASKED:
        j_N = start + tl.arange(0, BLOCK_N)
        attended = (tl.abs(i_M[:, None] - j_N[None, :]) <= reach) & (j_N < end)[None, :]
        score_MN = tl.where(attended, score_MN, float("-inf"))
    old_M, top_M = top_M, tl.maximum(top_M, tl.max(score_MN, axis=1) * factor_M)
    p_MN = tl.exp2(score_MN * factor_M[:, None] - top_M[:, None])
    shrink_M = tl.exp2(old_M - top_M)
    sum_M = sum_M * shrink_M + tl.sum(p_MN, axis=1)
    v_ND = _load(v_SD, start, end, stride_vs, D, BLOCK_N, WIDTH, MASKED)
    return _dot(p_MN.to(v_ND.dtype), v_ND, acc_MD * shrink_M[:, None]), top_M, sum_M


@triton.jit
def _attend(
    q_MD, factor_M, keys, first_query, end_query, window, tokens,
    D: tl.constexpr, BLOCK_N: tl.constexpr, IN_INT8: tl.constexpr,
):  # fmt: skip
    """Returns attention (M, D) of queries; with a window over it and the T keys of text, else over all S keys."""
    S, text, T, vision = tokens
    BLOCK_M: tl.constexpr = q_MD.shape[0]
    i_M = tl.minimum(first_query + tl.arange(0, BLOCK_M), end_query - 1)
    # The keys of the window, or all, in [start, end); its tiles in [whole, edge) need no mask.
    is_arrow = window > 0
    reach = tl.where(is_arrow, min(window, S), S)
    start = max(first_query - reach, tl.where(is_arrow, vision, 0))
    end = min(end_query + reach, tl.where(is_arrow, vision + S - T, S))
    whole = tl.cdiv(max(end_query - 1 - reach - start, 0), BLOCK_N)
    edge = max((min(first_query + reach + 1, end) - start) // BLOCK_N, whole)
    # The keys of text, if not among them: tiles that need no mask, and a rest that does.
    keys_T = tl.where(is_arrow, T, 0)
    tiles_T = keys_T // BLOCK_N

    acc_MD = tl.zeros((BLOCK_M, q_MD.shape[1]), dtype=tl.float32)
    top_M = tl.full((BLOCK_M,), _LOWEST, dtype=tl.float32)
    sum_M = tl.zeros((BLOCK_M,), dtype=tl.float32)
    for t in range(_count(tiles_T + edge - whole)):
        at = tl.where(t < tiles_T, text + t * BLOCK_N, start + (whole + t - tiles_T) * BLOCK_N)
        acc_MD, top_M, sum_M = _add_keys(
            acc_MD, top_M, sum_M, q_MD, factor_M, i_M, keys, at, S, S, D, BLOCK_N, False, IN_INT8
        )
    tiles = tl.cdiv(end - start, BLOCK_N)
    for t in range(_count(tiles - (edge - whole) + tl.cdiv(keys_T % BLOCK_N, BLOCK_N))):
        tile = tl.where(t < whole, t, t + edge - whole)
        in_text = tile >= tiles
        at = tl.where(in_text, text + tiles_T * BLOCK_N, start + tile * BLOCK_N)
        stop, far = tl.where(in_text, text + T, end), tl.where(in_text, S, reach)
        acc_MD, top_M, sum_M = _add_keys(
            acc_MD, top_M, sum_M, q_MD, factor_M, i_M, keys, at, stop, far, D, BLOCK_N, True, IN_INT8
        )
    return acc_MD / sum_M[:, None]


# Tuned at the first call for a shape, which is that of step 0: no head is narrow or cached yet.
@triton.autotune(_configs(), key=["S_BUCKET", "D", "HAS_INT8"], prune_configs_by={"early_config_prune": _fitting})
@triton.jit
def _attention_kernel(
    q_BHSD, k_BHSD, v_BHSD, kept_BNSD, code_BISD, key_scale_BIG, y_BSHD, schedule_H3,
    stride_qb, stride_qh, stride_qs, stride_kb, stride_kh, stride_ks, stride_vb, stride_vh, stride_vs,
    B, H, S, text, T, vision, num_kept, num_int8, scale, S_BUCKET, D: tl.constexpr, WIDTH: tl.constexpr,
    HAS_INT8: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    pid, text_tiles = tl.program_id(0), tl.cdiv(T, BLOCK_M)
    is_text = pid < B * H * text_tiles
    pid -= tl.where(is_text, 0, B * H * text_tiles)
    tiles = tl.where(is_text, text_tiles, tl.cdiv(S - T, BLOCK_M))
    entry, b = schedule_H3 + pid // (tiles * B) * 3, (pid // tiles % B).to(tl.int64)
    head, window, row = tl.load(entry).to(tl.int64), tl.load(entry + 1), tl.load(entry + 2)
    first_query = tl.where(is_text, text, vision) + pid % tiles * BLOCK_M
    end_query = min(first_query + BLOCK_M, tl.where(is_text, text + T, vision + S - T))
    i_MD, d_MD = first_query + tl.arange(0, BLOCK_M)[:, None], tl.arange(0, WIDTH)[None, :]
    y_at = y_BSHD + ((b * S + i_MD) * H + head) * D + d_MD
    inside = (i_MD < end_query) & (d_MD < D)

    if window == _CACHED:
        kept_SD = kept_BNSD + (b * num_kept + row) * S * D
        tl.store(y_at, _load(kept_SD, first_query, end_query, D, D, BLOCK_M, WIDTH, True), inside)
    else:
        tokens = (S, text, T, vision)
        v_SD = v_BHSD + b * stride_vb + head * stride_vh
        q_SD = q_BHSD + b * stride_qb + head * stride_qh
        q_MD = _load(q_SD, first_query, end_query, stride_qs, D, BLOCK_M, WIDTH, True)
        if HAS_INT8 and window == _INT8:
            at = b * num_int8 + row
            codes = (code_BISD + at * S * D, v_SD, key_scale_BIG + at * tl.cdiv(S, _GROUP), D, stride_vs)
            code_MD, scale_M1 = _encode(q_MD.to(tl.float32) * scale, 1)
            factor_M = tl.reshape(scale_M1, (BLOCK_M,))
            y_MD = _attend(code_MD, factor_M, codes, first_query, end_query, window, tokens, D, BLOCK_N, True)
        else:
            keys = (k_BHSD + b * stride_kb + head * stride_kh, v_SD, key_scale_BIG, stride_ks, stride_vs)
            factor_M = tl.zeros((BLOCK_M,), dtype=tl.float32) + scale
            window = tl.where(is_text, _FULL, window)
            y_MD = _attend(q_MD, factor_M, keys, first_query, end_query, window, tokens, D, BLOCK_N, False)
        tl.store(y_at, y_MD.to(y_BSHD.dtype.element_ty), inside)


@triton.jit
def _narrow_keys_kernel(
    k_BHSD, mean_BHD, code_BISD, key_scale_BIG, entry_I3, stride_kb, stride_kh, stride_ks, H, S,
    D: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """Writes the codes of one group of keys less their mean."""
    group, num_int8 = tl.program_id(0), tl.num_programs(1)
    b, head = tl.program_id(2).to(tl.int64), tl.load(entry_I3 + tl.program_id(1) * 3).to(tl.int64)
    at = b * num_int8 + tl.program_id(1)
    start, d_D = group * _GROUP, tl.arange(0, WIDTH)
    j_ND = start + tl.arange(0, _GROUP)[:, None]
    k_ND = _load(k_BHSD + b * stride_kb + head * stride_kh, start, S, stride_ks, D, _GROUP, WIDTH, True)
    mean_D = tl.load(mean_BHD + (b * H + head) * D + d_D, d_D < D, other=0)
    code_ND, scale = _encode(tl.where(j_ND < S, k_ND.to(tl.float32) - mean_D[None, :], 0.0), None)
    tl.store(code_BISD + (at * S + j_ND) * D + d_D[None, :], code_ND, (j_ND < S) & (d_D < D)[None, :])
    tl.store(key_scale_BIG + at * tl.cdiv(S, _GROUP) + group, tl.sum(scale))


def triton_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Tensor,
    rows: Tensor,
    kept: Tensor | None,
    num_text: int,
    scale: float,
) -> Tensor:
    """Attends head by head: a dense, an 8-bit or an arrow head, or one that is copied.

    Args:
        query, key, value: (B, H, S, D), bfloat16, float16 or float32, D ≤ 256; copied if D has a stride other than 1.
        windows: int32 (H,) on the CPU: what each head does, a half-width, `FULL`, `INT8` or `CACHED`.
        rows: int32 (H,) on the CPU: where a cached head is in `kept`; of no account for the others.
        kept: (B, N, S, D), contiguous, in the dtype of the query; None if no head is cached.
        num_text: T if the text comes first, −T if it comes last.
        scale: Of the scores, before the softmax; > 0.

    Returns:
        (B, H, S, D), a view of contiguous (B, S, H, D).
    """
    batch, heads, tokens, size = query.shape
    query, key, value = (x if x.stride(-1) == 1 else x.contiguous() for x in (query, key, value))
    y = empty_output(query)
    if y.numel() == 0:
        return y
    does = tuple(windows.tolist())
    assert scale > 0, scale
    assert len(does) == heads, (does, heads)
    assert kept is not None or CACHED not in does, does
    schedule, num_int8 = _schedule(does, tuple(rows.tolist()), query.device), does.count(INT8)
    width = max(32, triton.next_power_of_2(size))
    codes, key_scales = key, key
    if num_int8 > 0:
        codes = torch.empty(batch, num_int8, tokens, size, dtype=torch.int8, device=key.device)
        groups = triton.cdiv(tokens, GROUP)
        key_scales = torch.empty(batch, num_int8, groups, dtype=torch.float32, device=key.device)
        _narrow_keys_kernel[groups, num_int8, batch](
            key,
            key.mean(2, dtype=torch.float32),
            codes,
            key_scales,
            schedule[does.count(FULL) :],
            *key.stride()[:3],
            heads,
            tokens,
            size,
            width,
        )
    text = abs(num_text)

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (batch * heads * sum(triton.cdiv(part, meta["BLOCK_M"]) for part in (text, tokens - text)),)

    _attention_kernel[grid](
        query,
        key,
        value,
        query if kept is None else kept,
        codes,
        key_scales,
        y,
        schedule,
        *query.stride()[:3],
        *key.stride()[:3],
        *value.stride()[:3],
        batch,
        heads,
        tokens,
        0 if num_text >= 0 else tokens - text,
        text,
        max(num_text, 0),
        0 if kept is None else kept.shape[1],
        num_int8,
        scale * math.log2(math.e),
        S_BUCKET=bucket(tokens),
        D=size,
        WIDTH=width,
        HAS_INT8=num_int8 > 0,
    )
    return y


@lru_cache(maxsize=4096)
def _schedule(windows: tuple[int, ...], rows: tuple[int, ...], device: torch.device) -> Tensor:
    """Returns int32 (H, 3): each head, what it does and its row, of `kept` or of the codes; those that take long first.

    That is the same order for all shapes: FULL, INT8, arrows from wide to narrow, CACHED.
    """
    order = sorted(range(len(windows)), key=lambda head: (windows[head] >= 0, -windows[head]))
    narrow = [head for head in order if windows[head] == INT8]
    found = [(head, windows[head], narrow.index(head) if head in narrow else rows[head]) for head in order]
    return torch.tensor(found, dtype=torch.int32).to(device, non_blocking=True)
