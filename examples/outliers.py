"""Gives the example models activation outliers, as large diffusion transformers have them; the outputs stay the same.

A few channels are multiplied by s where they are made and divided by s in the weight that reads them next:

    modulated norm → qkv, fc1       s·(norm(x)·(1 + scale) + shift): the rows of shift and scale times s, and s − 1
                                    added to the constant of scale, as s·(1 + scale) − 1 = s·scale + (s − 1)
    V → projection of attention     attention mixes tokens, not channels: softmax(…)·(s·V) = s·(softmax(…)·V)
    condition tokens → kv           between two linears, for the STDiT

Elsewhere nothing can be undone: between fc1 and fc2 stands a GELU, and GELU(s·h) ≠ s·GELU(h); the q of
cross-attention reads the residual stream, whose channels every norm mixes in its mean and variance.

Source: few channels, the same for all tokens, up to 100 times the others: LLM.int8(), arXiv 2208.07339; SmoothQuant,
arXiv 2211.10438, whose Eq. 3 this inverts.
"""

import copy
import math
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dit import DiT
from stdit import STDiT

Model = TypeVar("Model", STDiT, DiT)
MODULATED = ((0, "attn.qkv"), (3, "mlp.fc1"))  # the row of shift in a modulation, that of scale behind it; its reader


@torch.no_grad()
def add_outliers(
    model: Model, share: float = 0.01, scales: tuple[float, float] = (20.0, 100.0), seed: int = 0
) -> Model:
    """Returns a copy of a model that computes the same with outlier channels at the inputs of its linears.

    Each block of a DiT has channels of its own. All blocks of an STDiT add their tables to one shared modulation, so
    behind their norms they share channels and factors; behind V each has its own.

    Args:
        model: the model, which stays as it is.
        share: fraction of the channels at each place, at least one.
        scales: bounds of the factors s, log-uniform between them.
        seed: of channels and factors.
    """
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(seed)
    low, high = map(math.log, scales)
    width = model.config.width
    count = max(1, round(share * width))

    def draw() -> Tensor:
        """Returns s (D,): factors in `count` channels, 1 in all others."""
        factors = torch.ones(width)
        channels = torch.randperm(width, generator=generator)[:count]
        factors[channels] = torch.empty(count).uniform_(low, high, generator=generator).exp()
        return factors.to(model.patch_embed.weight)

    if isinstance(model, STDiT):
        _scale_shared(model, draw)
    else:
        _scale_own(model, draw)
    return model


def _scale_shared(model: STDiT, draw: Callable[[], Tensor]) -> None:
    blocks: list[Any] = [*model.spatial_blocks, *model.temporal_blocks]
    shared: Any = model.t_block[1]
    tables = [block.scale_shift_table for block in blocks]
    for shift, reader in MODULATED:
        s = draw()
        _scale_modulation(s, shift, [_parts(shared.weight), _parts(shared.bias), *tables], constants=tables)
        _divide(s, (block.get_submodule(reader) for block in blocks))

    s = draw()
    _multiply_last(s, model.y_embedder.proj.fc2)
    _divide(s, (block.cross_attn.kv for block in blocks))

    for block in blocks:
        for values, reader in ((block.attn.qkv, block.attn.proj), (block.cross_attn.kv, block.cross_attn.proj)):
            s = draw()
            _multiply_last(s, values)
            _divide(s, [reader])


def _scale_own(model: DiT, draw: Callable[[], Tensor]) -> None:
    blocks: list[Any] = [*model.blocks]
    for block in blocks:
        weight, bias = _parts(block.modulation.weight), _parts(block.modulation.bias)
        for shift, reader in MODULATED:
            s = draw()
            _scale_modulation(s, shift, [weight, bias], constants=[bias])
            _divide(s, [block.get_submodule(reader)])
        s = draw()
        _multiply_last(s, block.attn.qkv)
        _divide(s, [block.attn.proj])


def _parts(parameter: Tensor) -> Tensor:
    """Returns a view of a modulation's parameter (6·D, …) by shift, scale, gate, shift, scale, gate: (6, D, …)."""
    return parameter.unflatten(0, (6, -1))


def _scale_modulation(s: Tensor, shift: int, summands: Iterable[Tensor], constants: Iterable[Tensor]) -> None:
    """Turns shift into s·shift, and scale into s·scale + (s − 1).

    Args:
        s: factors (D,).
        shift: index of the shift among the six parts; the scale is the next.
        summands: all whose sum is the modulation, (6, D, …) each.
        constants: those of them that hold a constant which is added once to every sum, (6, D) each.
    """
    for summand in summands:
        summand[shift : shift + 2] *= s.view(-1, *[1] * (summand.dim() - 2))
    for constant in constants:
        constant[shift + 1] += s - 1


def _multiply_last(s: Tensor, linear: nn.Linear) -> None:
    """Multiplies the last D outputs of a linear, where qkv and kv have V, by s (D,)."""
    linear.weight[-len(s) :] *= s[:, None]
    linear.bias[-len(s) :] *= s


def _divide(s: Tensor, linears: Iterable[nn.Linear]) -> None:
    """Divides the inputs of linears by s (D,), in their weights."""
    for linear in linears:
        linear.weight /= s
