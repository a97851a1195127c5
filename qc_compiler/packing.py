"""Models whose linears hold packed weights: less memory, one file, no float weights anywhere.

    qc_compiler.pack_(model, "nvfp4")                     in place; the float weights are freed one after the other
    qc_compiler.save_packed(model, "dit.safetensors")
    with torch.device("meta"):
        model = DiT(...)
    qc_compiler.load_packed(model, "dit.safetensors")     the float weights never exist

A `PackedLinear` says in plain operators what it means: dequantize, then linear. Eager PyTorch runs that; compiled with
quantcache it becomes this device's kernel.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import ops
from .errors import OptionError, PackedFileError, QuantCacheError, nearest
from .formats import parse_format
from .formats.schemes import SCHEMES, Scheme

VERSION = 1


class PackedLinear(nn.Module):
    """A linear that keeps its weight in a narrow format.

    Attributes:
        in_features, out_features: K and N.
        scheme: Formats of weight and activations.
        bias: As of the linear it replaces.
        part_0, part_1, …: The weight (N, K): packed codes, then scales.
    """

    bias: nn.Parameter | None

    def __init__(self, linear: nn.Linear, scheme: Scheme) -> None:
        super().__init__()
        self.in_features, self.out_features, self.scheme = linear.in_features, linear.out_features, scheme
        self.dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        form = parse_format(scheme.weight)
        self._num_parts = form.num_parts
        codes, *scales = form.quantize(linear.weight.detach())
        for i, part in enumerate((form.pack(codes), *scales)):
            self.register_buffer(f"part_{i}", part)

    @property
    def parts(self) -> list[Tensor]:
        return [getattr(self, f"part_{i}") for i in range(self._num_parts)]

    def dequantize(self) -> Tensor:
        """Returns ŵ (N, K) in the dtype of the original weight."""
        return ops.dequantize(self.parts, self.scheme.weight, self.dtype, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x̂·ŵᵀ + b, (…, N); an x with one row a sample (a modulation) is not quantized."""
        if x.dim() > 2 and x.shape[-2] > 1:
            x = ops.dequantize(ops.quantize(x, self.scheme.activation), self.scheme.activation, x.dtype)
        weight = ops.dequantize(self.parts, self.scheme.weight, x.dtype, self.in_features)
        return F.linear(x, weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self.scheme.weight}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves the weight, but never converts it: `model.to(torch.bfloat16)` must not round scales."""
        kept = {name: part.dtype for name, part in self._buffers.items() if part is not None}
        before = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, dtype in kept.items():
            part = self._buffers[name]
            assert part is not None
            if part.dtype != dtype:
                self._buffers[name] = before[name].to(part.device)  # type: ignore[union-attr]
        probe = fn(torch.empty(0, dtype=self.dtype))
        self.dtype = probe.dtype if probe.is_floating_point() else self.dtype
        return self


def pack_(model: nn.Module, scheme: str) -> nn.Module:
    """Replaces the weights of the linears in a model's blocks by packed ones, in place, and frees them.

    Embeddings and the final layer, outside the blocks, keep their precision.

    Args:
        model: Plain or compiled; a compiled one must be compiled again.
        scheme: `w8a8`, `w4a8`, `w4a6`, `fp8` or `nvfp4`.

    Returns:
        The model.

    Raises:
        OptionError: the scheme is unknown.
        QuantCacheError: the model has no linears in a list of blocks, or is packed already.
    """
    if scheme not in SCHEMES:
        raise OptionError(f"pack_(model, {scheme!r}): {nearest(str(scheme).split('+')[0], SCHEMES)}")
    module = getattr(model, "_orig_mod", model)
    names = _linears_of_blocks(module)
    if not names:
        packed = any(isinstance(child, PackedLinear) for child in module.modules())
        raise QuantCacheError(
            f"{type(module).__name__} is packed already: pack the original model"
            if packed
            else f"{type(module).__name__} has no nn.Linear inside an nn.ModuleList, so there is nothing to pack"
        )
    for name in names:
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        _replace(module, name, PackedLinear(linear, SCHEMES[scheme]))
    return model


def weight_bytes(model: nn.Module) -> int:
    """Returns what a model's parameters and buffers take in memory, shared ones counted once."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage().nbytes() for t in _tensors(model).values()}
    return sum(storages.values())


def save_packed(model: nn.Module, path: str | Path) -> None:
    """Writes a packed model into one safetensors file: codes, scales, and everything that was not packed.

    Raises:
        QuantCacheError: the model is not packed.
    """
    module = getattr(model, "_orig_mod", model)
    packed = {name: child for name, child in module.named_modules() if isinstance(child, PackedLinear)}
    if not packed:
        raise QuantCacheError(f"{type(module).__name__} is not packed: call qc_compiler.pack_(model, 'nvfp4') first")
    linears = {
        name: _Linear(weight=child.scheme.weight, activation=child.scheme.activation, dtype=_name_of(child.dtype))
        for name, child in packed.items()
    }
    header = _Header(version=VERSION, linears=linears)
    tensors = {name: tensor.detach().contiguous() for name, tensor in _tensors(module).items()}
    save_file(tensors, str(path), metadata={"quantcache_packed": header.model_dump_json()})


def load_packed(model: nn.Module, path: str | Path, device: str | torch.device = "cpu") -> nn.Module:
    """Loads a packed model; linears of `model` become packed ones, and no float weight is ever made.

    Args:
        model: Of the class that was saved, e.g. built under `torch.device("meta")`; changed in place.
        path: Written by `save_packed`.
        device: Where the tensors go.

    Raises:
        PackedFileError: the file is missing, damaged, of another version, or of another model. The model is then
            unchanged.
    """
    module = getattr(model, "_orig_mod", model)
    header, tensors = _read(path, str(device))
    _check(module, header, tensors, path)
    for name, linear in header.linears.items():
        _replace(module, name, _shell(module.get_submodule(name), linear))
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        if leaf in parent._parameters:
            old = parent._parameters[leaf]
            parent._parameters[leaf] = nn.Parameter(tensor, requires_grad=bool(old is not None and old.requires_grad))
        else:
            parent._buffers[leaf] = tensor
    return model


class _Linear(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    weight: str
    activation: str
    dtype: str


class _Header(BaseModel):
    """The JSON part of a packed file, validated because files come from outside."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    linears: dict[str, _Linear]


def _read(path: str | Path, device: str) -> tuple[_Header, dict[str, Tensor]]:
    if not Path(path).is_file():
        raise PackedFileError(f"no packed model at {path}: expected a file written by save_packed")
    try:
        with safe_open(str(path), framework="pt", device=device) as file:
            text = (file.metadata() or {}).get("quantcache_packed")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise PackedFileError(f"{path} is damaged or no safetensors file: {error}") from error
    if text is None:
        raise PackedFileError(f"{path} is a safetensors file, but no packed model: expected one of save_packed")
    try:
        header = _Header.model_validate_json(text)
        for linear in header.linears.values():
            parse_format(linear.weight), parse_format(linear.activation), _dtype_of(linear.dtype)
    except (ValidationError, OptionError, AttributeError) as error:
        raise PackedFileError(f"{path}: its header is invalid: {str(error).splitlines()[0]}") from error
    if header.version != VERSION:
        raise PackedFileError(f"{path}: version {header.version}, this quantcache reads {VERSION}: pack again")
    return header, tensors


def _check(module: nn.Module, header: _Header, tensors: dict[str, Tensor], path: str | Path) -> None:
    expected = {name: tuple(t.shape) for name, t in _tensors(module).items()}
    for name, linear in header.linears.items():
        shape = expected.pop(f"{name}.weight", None)
        if shape is None or len(shape) != 2:
            raise PackedFileError(f"{path} packs {name!r}, which is no linear of this {type(module).__name__}")
        with torch.device("meta"):
            form = parse_format(linear.weight)
            codes, *scales = form.quantize(torch.empty(shape))
            parts = (form.pack(codes), *scales)
        expected |= {f"{name}.part_{i}": tuple(part.shape) for i, part in enumerate(parts)}
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        name = wrong[0]
        raise PackedFileError(
            f"{path} is for another model: {name} is {found.get(name, 'missing')} in the file and "
            f"{expected.get(name, 'missing')} in this {type(module).__name__} ({len(wrong)} differences)"
        )


def _shell(linear: Any, saved: _Linear) -> PackedLinear:
    """Returns a packed linear on the meta device, to be filled."""
    with torch.device("meta"):
        empty = nn.Linear(
            linear.in_features, linear.out_features, linear.bias is not None, dtype=_dtype_of(saved.dtype)
        )
        shell = PackedLinear(empty, Scheme(saved.weight, saved.activation))
    if linear.bias is not None:
        shell.bias = linear.bias
    return shell


def _linears_of_blocks(module: nn.Module) -> list[str]:
    lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    return [
        name
        for name, child in module.named_modules()
        if isinstance(child, nn.Linear) and any(name.startswith(f"{prefix}.") for prefix in lists)
    ]


def _replace(module: nn.Module, name: str, new: nn.Module) -> None:
    owner, _, leaf = name.rpartition(".")
    old = module.get_submodule(name)
    new.train(old.training)
    setattr(module.get_submodule(owner), leaf, new)


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and all buffers, those outside the state dict as well: a meta model has none of its own."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise AttributeError(f"{name!r} is no dtype")
    return dtype
