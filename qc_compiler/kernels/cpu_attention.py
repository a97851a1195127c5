"""Head-wise attention on the CPU: PyTorch's flash kernel, for arrows on views of tiles.

Of an arrow (see `qc_compiler.attention`) with half-width w, the kernel computes

    tiles of 32 vision queries with the 32 + 2w vision keys around them             o₁, l₁    masked
    the first w and the last w … w + 31 vision queries with those in their reach    o₁, l₁    masked
    all vision queries with the text keys                                           o₂, l₂
    the text queries with all keys

o is an output, l the logarithm of the sum of the exponentials it was divided by. A vision query's two parts make

    o = o₁ + σ(l₂ − l₁)·(o₂ − o₁)

Tiles overlap: they are strided views, nothing is padded. The mask is exact. Rounding is that of the kernel, whose
exponential errs by up to 20 ulp; in float16 and bfloat16 both parts are rounded before they are put together,
|error| ≤ u·max|value| with the dtype's unit roundoff u.

NaN and infinite values: −∞ does not mask a NaN score, nor a probability of 0 an infinite value. In dense attention with
a mask a key or value that is not finite reaches all queries, here those that attend it and others of the same tile or
end, at most 2w + 31 tokens away.

INT8 emulates SageAttention (arXiv 2410.02367) for calibration: softmax(s·Q̂·K̂ᵀ)·V with Q̂ and K̂ from int8 codes, a scale
for each block of tokens. K is smoothed before, less its mean over the tokens: that takes the same from all scores of a
query. Scores are off by ε ≤ s·Σ(|q|·s_k + |k|·s_q + s_q·s_k / 2) / 2, outputs by (e²ᵋ − 1)·max|value|.

Measured (1 thread, AVX2, 4096 tokens, 12 heads of 64, float32, ms):

                                                   T = 256, w = 240    T = 0, w = 256    T = 0, w = 32
    scaled_dot_product_attention, dense                  823                 917               948
    this                                                 257                 141                44
    a loop over tiles, all heads a call                  262                 154                43
      text keys copied next to each window               294                   –                 –
      bmm, softmax, bmm                                    –                 182                52
    flex_attention, compiled in 16 s                     547                 323               239

A mask costs the kernel nothing in tiles and 0.1–0.5 of its time in dense attention. Among tiles of 16 … 256 queries, 32
are the fastest for w = 8 … 1024, or within 0.1 of it: so many rows the kernel multiplies at once. Copying the heads of
equal width together takes 0.03 of the time. Instead of it, a loop over those that are not neighbours takes 0.4 more at
1024 tokens; and with the keys of a head side by side bfloat16 and float16 are faster by 0.1–0.25.
"""

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from ..attention import CACHED, FULL, INT8, arrow_mask, empty_output, like_output
from ..formats.integer import Integer

TILE = 32
"""Queries of a tile."""
SHORT = 256
"""With fewer vision tokens, one call with a dense mask is faster (measured for T = 0 … 64, w = V / 32 … V / 5)."""
INT8_QUERIES, INT8_KEYS = 128, 64
"""Tokens that share a scale."""

flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu


def cpu_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Tensor,
    rows: Tensor,
    kept: Tensor | None,
    num_text: int,
    scale: float,
) -> Tensor:
    """Returns the attention of all heads, each in its own way: (B, H, S, D), a view of a contiguous (B, S, H, D).

    Args:
        query, key, value: (B, H, S, D), in any layout.
        windows: int32 (H,), `FULL`, `CACHED`, `INT8` or the half-width of an arrow.
        rows: int32 (H,), where a cached head lies in `kept`.
        kept: (B, N, S, D), what heads were in an earlier step.
        num_text: T if the text comes first, −T if it comes last.
        scale: Of the scores, before the softmax.
    """
    widest = max(query.shape[2] - abs(num_text) - 1, 1)
    heads_of: dict[int, list[int]] = {}
    for head, window in enumerate(windows.tolist()):
        heads_of.setdefault(FULL if window >= widest else window, []).append(head)
    if len(heads_of) == 1 and CACHED not in heads_of:
        (method,) = heads_of
        return like_output(_attend(query, key, value, method, num_text, scale))
    out = empty_output(query)
    for method, heads in heads_of.items():
        if method == CACHED:
            assert kept is not None, "a head is cached, but nothing was kept"
            for head in heads:
                out[:, head] = kept[:, int(rows[head])]
        else:
            q, k, v = (torch.stack([x[:, head] for head in heads], 1) for x in (query, key, value))
            out[:, heads] = _attend(q, k, v, method, num_text, scale)
    return out


def _attend(query: Tensor, key: Tensor, value: Tensor, method: int, num_text: int, scale: float) -> Tensor:
    """Returns the attention of heads that all do the same."""
    size = query.shape[2]
    if method == FULL:
        return scaled_dot_product_attention(query, key, value, scale=scale)
    if method == INT8:
        return _int8(query, key, value, scale)
    if size - abs(num_text) < max(SHORT, 2 * method + TILE):
        return scaled_dot_product_attention(query, key, value, arrow_mask(size, num_text, method), scale=scale)
    return _arrow(query, key, value, method, num_text, scale)


def _int8(query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
    smooth = key.float() - key.float().mean(2, keepdim=True)
    q, k = _through_codes(query, INT8_QUERIES), _through_codes(smooth, INT8_KEYS)
    return scaled_dot_product_attention(q, k, value.float(), scale=scale).to(query.dtype)


def _through_codes(x: Tensor, num_tokens: int) -> Tensor:
    form = Integer(8, group=num_tokens * x.shape[-1])
    return form.dequantize(*form.quantize(x.flatten(-2))).unflatten(-1, x.shape[-2:])


def _arrow(query: Tensor, key: Tensor, value: Tensor, window: int, num_text: int, scale: float) -> Tensor:
    query, key, value = (x.contiguous() for x in (query, key, value))
    first, last = max(num_text, 0), query.shape[2] + min(num_text, 0)
    text = slice(0, first) if num_text > 0 else slice(last, None)
    out = empty_output(query)
    if num_text:
        out[:, :, text] = flash(query[:, :, text], key, value, scale=scale)[0]
    spans = list(_spans(first, last, window, query.dtype))
    outer = int(query.shape[0] > query.shape[1])  # whichever is shorter
    for q, k, v, o in zip(*(x.unbind(outer) for x in (query, key, value, out))):
        for queries, keys, bias in spans:
            tile, reach = bias.shape
            q_tiles, o_tiles = (_tiles(x[:, queries], tile, tile) for x in (q, o))
            k_tiles, v_tiles = (_tiles(x[:, keys], reach, tile) for x in (k, v))
            o_tiles.copy_(_with_text(q_tiles, k_tiles, v_tiles, bias, k[:, None, text], v[:, None, text], scale))
    return out


def _with_text(q: Tensor, k: Tensor, v: Tensor, bias: Tensor, text_k: Tensor, text_v: Tensor, scale: float) -> Tensor:
    """Returns the attention of tiles (N, tiles, queries, D) to their keys and to those of the text (N, 1, T, D)."""
    near, near_sum = flash(q, k, v, attn_mask=bias, scale=scale)
    if text_k.shape[2] == 0:
        return near
    text_k, text_v = (x.expand(-1, q.shape[1], -1, -1) for x in (text_k, text_v))
    far, far_sum = flash(q, text_k, text_v, scale=scale)
    share = (far_sum - near_sum).sigmoid()[..., None]
    return torch.lerp(near.to(share.dtype), far.to(share.dtype), share)


def _spans(first: int, last: int, window: int, dtype: torch.dtype) -> Iterator[tuple[slice, slice, Tensor]]:
    """Yields vision queries, the keys within their reach, and the mask of each tile of them, whose shape is the tile's.

    Args:
        first, last: Where the vision tokens begin and end.
        window: The half-width.
        dtype: Of the masks.
    """
    start = first + window
    stop = start + (last - first - 2 * window) // TILE * TILE
    yield slice(first, start), slice(first, start + window), _bias(window, 2 * window, 0, window, dtype)
    yield slice(start, stop), slice(first, stop + window), _bias(TILE, TILE + 2 * window, window, window, dtype)
    yield slice(stop, last), slice(stop - window, last), _bias(last - stop, last - stop + window, window, window, dtype)


def _bias(num_queries: int, num_keys: int, before: int, window: int, dtype: torch.dtype) -> Tensor:
    """Returns what is added to scores, 0 or −∞, if there are so many keys before the one at the first query.

    >>> _bias(2, 3, 1, 1, torch.float32).tolist()
    [[0.0, 0.0, 0.0], [-inf, 0.0, 0.0]]
    """
    distance = torch.arange(before, before + num_queries)[:, None] - torch.arange(num_keys)
    return torch.zeros(num_queries, num_keys, dtype=dtype).masked_fill_(distance.abs() > window, -torch.inf)


def _tiles(x: Tensor, length: int, step: int) -> Tensor:
    """Returns a view (N, tiles, length, D) of (N, S, D): a tile begins at every step-th row."""
    return x.unfold(-2, length, step).transpose(-1, -2)
