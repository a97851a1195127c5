"""AIGQ, how many bits each weight gets: an integer program over measured sensitivities.

    minimize  Σ_l error(l, bits_l)     subject to  Σ_l size_l · bits_l ≤ mean_bits · Σ_l size_l

and to at most a few different lists of bits among blocks of one kind, since blocks that differ cannot share a compiled
body. Which lists may be used is found first, without that bound: by the least of error + λ · size · bits over a range
of λ. Source: QuantCache, arXiv 2503.06545, Eq. 7; the bound on bodies is ours.
"""

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import Bounds, LinearConstraint, milp
from torch import Tensor

from .formats import parse_format
from .formats.schemes import WEIGHTS

WIDTHS = (4, 8, 16)
NUM_BODIES = 4  # for blocks of one kind
PRICES = 64  # values of λ
TIME_LIMIT_S = 20.0


@dataclass(frozen=True)
class BlockErrors:
    """The linears of one block.

    Attributes:
        kind: Blocks of one kind have equal linears, in the same order.
        sites: Their names, L of them.
        sizes: int (L,), elements of each weight.
        errors: float64 (L, len(WIDTHS)), what each width costs; 0 where nothing is quantized.
    """

    kind: Hashable
    sites: tuple[str, ...]
    sizes: NDArray[np.int64]
    errors: NDArray[np.float64]


def allocate(blocks: Sequence[BlockErrors], mean_bits: float, num_bodies: int = NUM_BODIES) -> dict[str, int]:
    """Returns the bits of every weight, 4, 8 or 16.

    Args:
        blocks: All that are quantized.
        mean_bits: The budget, in bits a weight, at least 4.
        num_bodies: Most different lists of bits for blocks of one kind.
    """
    if not blocks:
        return {}
    lists = {kind: _candidates([b for b in blocks if b.kind == kind]) for kind in dict.fromkeys(b.kind for b in blocks)}
    options = [(b, kind_list) for b, block in enumerate(blocks) for kind_list in lists[block.kind]]
    used = [(kind, bits) for kind, members in lists.items() for bits in members]
    num_options, num_used = len(options), len(used)
    cost = np.array([_cost(blocks[b], bits) for b, bits in options] + [0.0] * num_used)
    cost /= max(cost.max(), 1e-30)
    bits_of = np.array([_num_bits(blocks[b], bits) for b, bits in options] + [0.0] * num_used)
    budget = mean_bits * sum(int(block.sizes.sum()) for block in blocks)

    once = np.zeros((len(blocks), num_options + num_used))
    within = np.zeros((num_options, num_options + num_used))
    for i, (b, bits) in enumerate(options):
        once[b, i] = 1
        within[i, i], within[i, num_options + used.index((blocks[b].kind, bits))] = 1, -1
    few = np.zeros((len(lists), num_options + num_used))
    for j, (kind, _) in enumerate(used):
        few[list(lists).index(kind), num_options + j] = 1
    found = milp(
        cost,
        integrality=np.ones(len(cost)),
        bounds=Bounds(0, 1),
        constraints=[
            LinearConstraint(once, 1, 1),
            LinearConstraint(within, -np.inf, 0),
            LinearConstraint(few, 0, num_bodies),
            LinearConstraint(bits_of[None] / budget, 0, 1 + 1e-9),
        ],
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": 1e-4},
    )
    assert found.x is not None, found.message  # four bits everywhere are always among the lists
    chosen = {b: bits for (b, bits), x in zip(options, found.x) if x > 0.5}
    return {site: width for b, bits in chosen.items() for site, width in zip(blocks[b].sites, bits)}


def _candidates(blocks: Sequence[BlockErrors]) -> list[tuple[int, ...]]:
    """Returns lists of bits for blocks of one kind: what is best for one, or for all, at some price of a bit."""
    found = {(width,) * len(blocks[0].sites): None for width in WIDTHS}
    sizes, widths = blocks[0].sizes[:, None], np.array(WIDTHS)[None]
    total = sum(block.errors for block in blocks)
    slopes = np.concatenate([(b.errors[:, 0] / (sizes[:, 0] * WIDTHS[-1])).ravel() for b in blocks])
    slopes = slopes[slopes > 0]
    if not slopes.size:
        return list(found)
    for price in np.geomspace(slopes.min() / 100, slopes.max() * 100, PRICES):
        for errors, share in [(total, len(blocks)), *((block.errors, 1) for block in blocks)]:
            best = np.argmin(errors + price * share * sizes * widths, axis=1)
            found[tuple(WIDTHS[i] for i in best)] = None
    return list(found)


def _cost(block: BlockErrors, bits: Sequence[int]) -> float:
    return float(sum(block.errors[i, WIDTHS.index(width)] for i, width in enumerate(bits)))


def _num_bits(block: BlockErrors, bits: Sequence[int]) -> float:
    return float(block.sizes @ np.array(bits))


def weight_errors(weight: Tensor) -> NDArray[np.float64]:
    """Returns ‖ŵ − w‖² / ‖w‖² of a weight (N, K) at each width: all that is known without calibration.

    >>> import torch
    >>> weight_errors(torch.eye(32)).round(6).tolist()
    [0.0, 0.0, 0.0]
    """
    exact = weight.detach().float()
    power = float(exact.square().sum()) or 1.0
    errors = []
    for width in WIDTHS:
        if width not in WEIGHTS:
            errors.append(0.0)
            continue
        form = parse_format(WEIGHTS[width])
        errors.append(float((form.dequantize(*form.quantize(exact)).to(exact.dtype) - exact).square().sum()) / power)
    return np.array(errors)


def mean_bits_of(bits: dict[str, int], sizes: dict[str, int]) -> float:
    """Returns the mean bits of a weight's element."""
    return sum(bits[site] * sizes[site] for site in bits) / sum(sizes[site] for site in bits)
