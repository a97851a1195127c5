"""How a linear is quantized: a format for its weight, one for its activations, and what is done to both before."""

import re
from dataclasses import dataclass, replace

from ..errors import OptionError, nearest


@dataclass(frozen=True)
class Scheme:
    """
    Attributes:
        weight: Format of the weight (N, K), quantized once.
        activation: Format of the activations (…, K), quantized at every call.
        rotation: Rotate both by a block-Hadamard matrix first.
        rank: Keep this many singular directions of the weight in full precision, in a branch beside it.
    """

    weight: str
    activation: str
    rotation: bool = False
    rank: int = 0


SCHEMES = {
    "w8a8": Scheme("int8", "uint8"),
    "w4a8": Scheme("int4/128", "uint8"),
    "w4a6": Scheme("int4/128", "uint6"),
    "fp8": Scheme("fp8", "fp8"),
    "nvfp4": Scheme("nvfp4", "nvfp4"),
}

# Low precision first: which one a linear takes is decided at every step.
CHOICES: dict[str, tuple[Scheme, ...]] = {"dmpq": (Scheme("nvfp4", "nvfp4"), Scheme("nvfp4", "uint8"))}


def schemes_of(name: str) -> tuple[Scheme, ...]:
    """Returns the schemes that the option `quantize` chooses among, lowest precision first.

    >>> schemes_of("w4a6+rotation+rank32")
    (Scheme(weight='int4/128', activation='uint6', rotation=True, rank=32),)

    Raises:
        OptionError: the name or what is added to it is unknown.
    """
    base, *additions = str(name).split("+")
    if base not in SCHEMES and base not in CHOICES:
        raise OptionError(f"quantize={name!r}: {nearest(base, (*SCHEMES, *CHOICES))}")
    schemes: tuple[Scheme, ...] = CHOICES[base] if base in CHOICES else (SCHEMES[base],)
    for addition in additions:
        if addition == "rotation":
            schemes = tuple(replace(scheme, rotation=True) for scheme in schemes)
        elif found := re.fullmatch(r"rank(\d+)", addition):
            schemes = tuple(replace(scheme, rank=int(found[1])) for scheme in schemes)
        else:
            raise OptionError(f"quantize={name!r}: {addition!r} cannot be added, expected 'rotation' or 'rank32'")
    return schemes
