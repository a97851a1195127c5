"""How a linear is quantized: a format for its weight, one for its activations, and what is done to both before."""

import re
from dataclasses import dataclass, replace

from torch import Tensor

from ..errors import OptionError, nearest
from .transforms import hadamard, low_rank, rotate, rotation_size

PLAIN = "plain"  # activations as they are


@dataclass(frozen=True)
class Scheme:
    """
    Attributes:
        weight: Format of the weight (N, K), quantized once.
        activation: Format of the activations (…, K), quantized at every call; `plain` leaves them.
        rotation: Rotate both by a block-Hadamard matrix first.
        rank: Keep this many singular directions of the weight in full precision, in a branch beside it.
        balance: Move the range of outlier channels from the activations into the weight first; needs a plan.
    """

    weight: str
    activation: str
    rotation: bool = False
    rank: int = 0
    balance: bool = False

    def prepare_weight(self, weight: Tensor, scales: Tensor | None = None) -> tuple[Tensor, list[Tensor]]:
        """Returns what is quantized of a weight (N, K), and its branch: up (N, r) and down (r, K), or nothing.

        Args:
            scales: (K,), what balancing divides x by; read only if the scheme balances.
        """
        if self.balance:
            assert scales is not None
            weight = weight * scales.to(weight.dtype)
        if self.rotation and (size := rotation_size(weight.shape[1])) > 1:
            weight = rotate(weight, hadamard(size, weight.device))
        if not self.rank:
            return weight, []
        *branch, weight = low_rank(weight, self.rank)
        return weight, branch

    def prepare_input(self, x: Tensor, reciprocal: Tensor | None = None) -> Tensor:
        """Returns x (…, K) as the prepared weight wants it; `reciprocal` (K,) is of the scales."""
        x = x if reciprocal is None else x * reciprocal
        if self.rotation and (size := rotation_size(x.shape[-1])) > 1:
            x = rotate(x, hadamard(size, x.device))
        return x


@dataclass(frozen=True)
class Recipe:
    """What the option `quantize` names.

    Attributes:
        schemes: Lowest precision first; of several, `rule` takes one at every step.
        rule: `dmpq`, or AIGQ's `online` or `inverse`; None where there is one scheme.
        allocated: Whether each weight has a width of its own; the schemes then say what the others share.
    """

    schemes: tuple[Scheme, ...]
    rule: str | None = None
    allocated: bool = False


SCHEMES = {
    "w8a8": Scheme("int8", "uint8"),
    "w4a8": Scheme("int4/128", "uint8"),
    "w4a6": Scheme("int4/128", "uint6"),
    "fp8": Scheme("fp8", "fp8"),
    "nvfp4": Scheme("nvfp4", "nvfp4"),
}
RECIPES = {name: Recipe((scheme,)) for name, scheme in SCHEMES.items()} | {
    "dmpq": Recipe((Scheme("nvfp4", "nvfp4"), Scheme("nvfp4", "uint8")), rule="dmpq"),
    "importance": Recipe((SCHEMES["w8a8"],), allocated=True),
}
WEIGHTS = {4: "int4/128", 8: "int8"}  # of an allocated width; 16 leaves the linear alone
ONLINE = ("uint4", "uint6", "uint8", PLAIN)  # what AIGQ chooses among for the activations
ADDITIONS = ("rotation", "rank32", "balance", "online", "inverse")


def recipe_of(name: str) -> Recipe:
    """Returns what a value of the option `quantize` stands for: a name and what is added to it.

    >>> recipe_of("w4a6+rotation+rank32").schemes
    (Scheme(weight='int4/128', activation='uint6', rotation=True, rank=32, balance=False),)

    Raises:
        OptionError: the name or what is added to it is unknown.
    """
    base, *additions = str(name).split("+")
    if base not in RECIPES:
        raise OptionError(f"quantize={name!r}: {nearest(base, RECIPES)}")
    recipe = RECIPES[base]
    for addition in additions:
        if addition == "rotation":
            recipe = replace(recipe, schemes=tuple(replace(scheme, rotation=True) for scheme in recipe.schemes))
        elif addition == "balance":
            recipe = replace(recipe, schemes=tuple(replace(scheme, balance=True) for scheme in recipe.schemes))
        elif found := re.fullmatch(r"rank(\d+)", addition):
            recipe = replace(recipe, schemes=tuple(replace(scheme, rank=int(found[1])) for scheme in recipe.schemes))
        elif addition in ("online", "inverse") and recipe.rule is None:
            schemes = tuple(replace(recipe.schemes[0], activation=activation) for activation in ONLINE)
            recipe = replace(recipe, schemes=schemes, rule=addition)
        elif addition in ("online", "inverse"):
            raise OptionError(f"quantize={name!r}: {base!r} has a rule of its own, {addition!r} cannot be added")
        else:
            raise OptionError(f"quantize={name!r}: {addition!r} cannot be added, {nearest(addition, ADDITIONS)}")
    return recipe
