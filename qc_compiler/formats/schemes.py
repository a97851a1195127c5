"""How a linear is quantized: a format for its weight, one for its activations."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Scheme:
    """
    Attributes:
        weight: Format of the weight (N, K), quantized once.
        activation: Format of the activations (…, K), quantized at every call.
    """

    weight: str
    activation: str


SCHEMES = {
    "w8a8": Scheme("int8", "uint8"),
    "w4a8": Scheme("int4/128", "uint8"),
    "w4a6": Scheme("int4/128", "uint6"),
    "fp8": Scheme("fp8", "fp8"),
    "nvfp4": Scheme("nvfp4", "nvfp4"),
}

# Low precision first: which one a linear takes is decided at every step.
CHOICES = {"dmpq": (Scheme("nvfp4", "nvfp4"), Scheme("nvfp4", "uint8"))}


def schemes_of(name: str) -> tuple[Scheme, ...]:
    """Returns the schemes that the option `quantize` chooses among, lowest precision first."""
    return CHOICES.get(name) or (SCHEMES[name],)
