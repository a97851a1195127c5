"""Head-wise attention: each head full, an arrow or cached. The algebra, and its reference in plain torch.

S = T + V tokens: T of text, side by side at the beginning or at the end, and V of vision. With the half-width w

    a vision query i attends   every text key, and the vision keys j with |i − j| ≤ w
    a text query attends       every key

so that the keys that are attended look like an arrow, whose tip are the text tokens. A head with w ≥ V − 1 is full.

Source: arrow attention of DiTFastAttnV2, arXiv 2503.22796, section 3.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

FULL, CACHED, INT8 = -1, 0, -2
"""What a head does, where it is not a half-width > 0. INT8: full, with scores from 8-bit codes."""

WINDOW, ROW = 0, 1
"""The rows of `modes`, int32 (2, H): what each head does, and where its last output is kept; −1 where it is not."""


def arrow_mask(num_tokens: int, num_text: int, window: int, device: torch.device | None = None) -> Tensor:
    """Returns bool (S, S): whether query i attends key j.

    Args:
        num_tokens: S.
        num_text: T if the text comes first, −T if it comes last.
        window: The half-width w, in tokens.
        device: Of the mask.

    >>> arrow_mask(4, 1, 1).int().tolist()
    [[1, 1, 1, 1], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 1, 1]]
    """
    at = torch.arange(num_tokens, device=device)
    text = at < num_text if num_text >= 0 else at >= num_tokens + num_text
    near = (at[:, None] - at[None, :]).abs() <= window
    return near | text[:, None] | text[None, :]


def attended_share(window: int, num_tokens: int, num_text: int) -> float:
    """Returns the part of all query–key pairs that a head computes; arguments as of `arrow_mask`.

    >>> attended_share(1, 4, 1), attended_share(FULL, 4, 1), attended_share(CACHED, 4, 1)
    (0.875, 1.0, 0.0)
    """
    if window <= 0:
        return 0.0 if window == CACHED else 1.0
    text, vision = abs(num_text), num_tokens - abs(num_text)
    window = min(window, vision - 1)
    near = vision * (2 * window + 1) - window * (window + 1)
    return (text * num_tokens + vision * text + near) / num_tokens**2


def reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    windows: Sequence[int],
    cached: Sequence[Tensor | None],
    num_text: int,
    scale: float,
) -> Tensor:
    """Returns what attention is with a dense mask for each head: (B, H, S, D), in the dtype of its operands.

    Args:
        query, key, value: (B, H, S, D).
        windows: What each head does: a half-width, `FULL` or `CACHED`.
        cached: For each head (B, S, D), its last output, where it is cached.
        num_text: T if the text comes first, −T if it comes last.
        scale: Of the scores, before the softmax.
    """
    heads = []
    for h, window in enumerate(windows):
        if window == CACHED:
            heads.append(cached[h])
            continue
        scores = query[:, h] @ key[:, h].transpose(-1, -2) * scale
        if window > 0:
            allowed = arrow_mask(query.shape[2], num_text, window, query.device)
            scores = scores.masked_fill(~allowed, -torch.inf)
        heads.append(scores.softmax(-1) @ value[:, h])
    return torch.stack(heads, 1)  # type: ignore[arg-type]


def empty_output(query: Tensor) -> Tensor:
    """Returns an unwritten output for queries (B, H, S, D), in memory (B, S, H, D) as SDPA's mostly is."""
    batch, heads, tokens, width = query.shape
    return query.new_empty(batch, tokens, heads, width).transpose(1, 2)


def like_output(values: Tensor) -> Tensor:
    """Returns `values` (B, H, S, D) in the memory of `empty_output`; a copy where they are not."""
    return values.transpose(1, 2).contiguous().transpose(1, 2)
