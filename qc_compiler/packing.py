"""Models whose linears hold packed weights: less memory, one file, no float weights anywhere.

    qc_compiler.pack_(model, "nvfp4")                     in place; the float weights are freed one after the other
    qc_compiler.pack_(model, plan)                        as calibrated; what the plan removes is freed whole
    qc_compiler.save_packed(model, "dit.safetensors")
    with torch.device("meta"):
        model = DiT(...)
    qc_compiler.load_packed(model, "dit.safetensors")     the float weights never exist

A `PackedLinear` says in plain operators what it means: dequantize, then linear. Eager PyTorch runs that; compiled with
quantcache it becomes this device's kernel.
"""

import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from . import ops, registry
from .checksum import checksum
from .errors import OptionError, PackedFileError, PlanError, QuantCacheError, nearest
from .formats import parse_format
from .formats.schemes import PLAIN, SCHEMES, WEIGHTS, Scheme, recipe_of
from .formats.transforms import shared_scales
from .plan import Plan, Quantization

VERSION = 4


class PackedLinear(nn.Module):
    """A linear that keeps its weight in a narrow format.

    Attributes:
        in_features, out_features: K and N.
        scheme: Formats of weight and activations.
        bias: As of the linear it replaces.
        part_0, part_1, …: The weight (N, K): packed codes, then scales.
        reciprocal: What x is multiplied by first, (K,); of balanced weights only.
        down, up: (r, K) and (N, r), the branch in full precision; of weights with one.
    """

    bias: nn.Parameter | None
    reciprocal: Tensor
    down: Tensor
    up: Tensor

    def __init__(self, linear: nn.Linear, scheme: Scheme, scales: Tensor | None = None) -> None:
        """
        Args:
            linear: Whose weight is packed.
            scheme: How.
            scales: (K,), what balancing divides x by; needed if the scheme balances.
        """
        super().__init__()
        self.in_features, self.out_features, self.scheme = linear.in_features, linear.out_features, scheme
        self.dtype = linear.weight.dtype
        self.register_parameter("bias", linear.bias)
        weight, branch = scheme.prepare_weight(linear.weight.detach(), scales)
        if scheme.balance:
            assert scales is not None
            self.register_buffer("reciprocal", 1 / scales.to(weight.dtype))
        for name, factor in zip(("up", "down"), branch):
            self.register_buffer(name, factor)
        form = parse_format(scheme.weight)
        self._num_parts = form.num_parts
        codes, *others = form.quantize(weight)
        for i, part in enumerate((form.pack(codes), *others)):
            self.register_buffer(f"part_{i}", part)

    @property
    def parts(self) -> list[Tensor]:
        return [getattr(self, f"part_{i}") for i in range(self._num_parts)]

    def dequantize(self) -> Tensor:
        """Returns the packed part of ŵ (N, K), balanced and rotated as it is, in the dtype of the original weight."""
        return ops.dequantize(self.parts, self.scheme.weight, self.dtype, self.in_features)

    def forward(self, x: Tensor) -> Tensor:
        """Returns x̂·ŵᵀ + b, (…, N); an x with one row a sample (a modulation) is not quantized."""
        x_hat = x = self.scheme.prepare_input(x, self._buffers.get("reciprocal"))
        if x.dim() > 2 and x.shape[-2] > 1 and self.scheme.activation != PLAIN:
            x_hat = ops.dequantize(ops.quantize(x, self.scheme.activation), self.scheme.activation, x.dtype)
        weight = ops.dequantize(self.parts, self.scheme.weight, x.dtype, self.in_features)
        y = F.linear(x_hat, weight, self.bias)
        return y + F.linear(F.linear(x, self.down), self.up) if "down" in self._buffers else y

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, weight={self.scheme.weight}, bias={self.bias is not None}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedLinear":
        """Moves the packed weight, but never converts it: `model.to(torch.bfloat16)` must not round scales."""
        kept = {name: self._buffers[name].dtype for name in self._buffers if name.startswith("part_")}  # type: ignore[union-attr]
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


def pack_(model: nn.Module, how: str | Plan) -> nn.Module:
    """Replaces the weights of the linears in a model's blocks by packed ones, in place, and frees them.

    Embeddings and the final layer, outside the blocks, keep their precision. Parameters that only regions own which the
    plan removes are freed: one NaN stands for all of their elements, so that the model without the plan is loudly
    wrong. Moving or casting the model gives them memory again: do it before. Which parameters a sub-layer owns only a
    graph can tell: run the model compiled with the plan once, before.

    Args:
        model: Plain or compiled; a compiled one must be compiled again.
        how: A value of the option `quantize` with one scheme, such as `nvfp4` or `w4a8+rotation`; or a plan that was
            calibrated with `quantize`, whose bits, ranges and formats are taken, or that removes blocks.

    Returns:
        The model.

    Raises:
        OptionError: the name is unknown, chooses at every step, or needs a plan.
        PlanError: the plan says nothing about linears and removes nothing, or is for another model.
        QuantCacheError: the model has no linears in a list of blocks, or is packed already.

    Warns:
        UserWarning: the plan removes sub-layers and has not run with this model: their weights stay.
    """
    known, removed = (how.quantization, how.removed) if isinstance(how, Plan) else (None, ())
    module = getattr(model, "_orig_mod", model)
    if isinstance(how, Plan) and not (known and known.sites):
        if not removed:
            raise PlanError("the plan says nothing about linears: calibrate(model, generate, quantize=...)")
        leaving = _leaving(module, how)
        registry.forget_weights(module)
        _free(module, leaving)
        return model
    name = known.recipe if known else str(how)
    recipe = recipe_of(name)
    scheme = [scheme for scheme in recipe.schemes if scheme.activation != PLAIN][-1]
    if known is None and (recipe.allocated or scheme.balance):
        raise OptionError(f"pack_(model, {name!r}) needs a plan: calibrate(model, generate, quantize={name!r})")
    if len({s.weight for s in recipe.schemes}) > 1 or (recipe.rule and known is None):
        raise OptionError(f"pack_(model, {name!r}): it chooses at every step; {nearest(name, SCHEMES)}")
    if any(isinstance(child, PackedLinear) for child in module.modules()):
        raise QuantCacheError(f"{type(module).__name__} is packed already: pack the original model")
    names = _linears_of_blocks(module)
    if not names:
        raise QuantCacheError(
            f"{type(module).__name__} has no nn.Linear inside an nn.ModuleList, so there is nothing to pack"
        )
    schemes = dict.fromkeys(names, scheme) if known is None else _planned(known, scheme, module)
    leaving = _leaving(module, how) if isinstance(how, Plan) else set()
    schemes = {name: s for name, s in schemes.items() if id(module.get_submodule(name).weight) not in leaving}
    scales = {name: _scales(known, name, module) for name in schemes} if known and scheme.balance else {}
    registry.forget_weights(module)
    _free(module, leaving)
    packed: dict[nn.Module, PackedLinear] = {}  # a linear may stand in several places
    for name, chosen in schemes.items():
        linear = module.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        if linear not in packed:
            packed[linear] = PackedLinear(linear, chosen, scales.get(name))
    _replace(module, names, packed)
    return model


def _leaving(module: nn.Module, plan: Plan) -> set[int]:
    """Returns the ids of the parameters that only removed regions own: of blocks by name, of sub-layers by graph.

    Raises:
        PlanError: the model has no such block.
    """
    blocks = [name for name in plan.removed if "/" not in name and "@" not in name]  # else: a part, or a second call
    for name in blocks:
        if _submodule(module, name) is None:
            raise PlanError(f"the plan prunes {name!r}, which this {type(module).__name__} does not have")
    every = list(module.named_parameters(remove_duplicate=False))
    is_read: dict[int, bool] = {}
    for runtime in registry.runtimes_of(module):
        if runtime.options.plan is not None and runtime.options.plan.digest == plan.digest:
            for _, p in every:
                if p in runtime.is_read:
                    is_read[id(p)] = is_read.get(id(p), False) or runtime.is_read[p]
    sublayers = [name for name in plan.removed if "/" in name]
    if sublayers and not is_read:
        warnings.warn(
            f"quantcache: pack_ keeps the weights of {', '.join(sublayers)}: only a graph tells which they are; run "
            "the model compiled with this plan once, then pack it",
            stacklevel=3,
        )
    inside = tuple(f"{name}." for name in blocks)
    outside = {id(parameter) for name, parameter in every if not name.startswith(inside)}
    return {id(p) for _, p in every if not is_read.get(id(p), id(p) in outside)}


def _free(module: nn.Module, leaving: Collection[int]) -> None:
    """Frees parameters, known by their ids."""
    freed: dict[int, nn.Parameter] = {}
    for name, old in list(module.named_parameters(remove_duplicate=False)):
        if id(old) not in leaving or not old.is_floating_point():
            continue
        if id(old) not in freed:
            freed[id(old)] = nn.Parameter(_nan(old.shape, old.dtype, old.device), old.requires_grad)
        owner, _, leaf = name.rpartition(".")
        module.get_submodule(owner)._parameters[leaf] = freed[id(old)]


def _nan(shape: Sequence[int], dtype: torch.dtype, device: torch.device | str) -> Tensor:
    """Returns NaN of this shape in the memory of one element."""
    return torch.full((), torch.nan, dtype=dtype, device=device).expand(shape)


def _is_freed(tensor: Tensor) -> bool:
    """Whether a parameter says nothing: also one that `model.to(…)` gave memory again."""
    if tensor.numel() < 2 or tensor.is_meta or not tensor[(0,) * tensor.dim()].isnan():
        return False
    return not any(tensor.stride()) or bool(tensor.isnan().all())


def _planned(known: Quantization, scheme: Scheme, module: nn.Module) -> dict[str, Scheme]:
    """Returns the scheme of each linear that the plan quantizes."""
    schemes = {}
    for name, bits in zip(known.sites, known.bits):
        linear = _submodule(module, name)
        if not isinstance(linear, nn.Linear):
            raise PlanError(f"the plan quantizes {name!r}, which is no nn.Linear of this {type(module).__name__}")
        if not recipe_of(known.recipe).allocated:
            schemes[name] = scheme
        elif int(bits) in WEIGHTS:
            schemes[name] = replace(scheme, weight=WEIGHTS[int(bits)])
    return schemes


def _scales(known: Quantization, name: str, module: nn.Module) -> Tensor:
    """Returns what balancing divides the input of a linear by, the same for all of its block that read this input."""
    amax, block = known.amax[known.index(name)], _block_of(module, name)
    readers = [
        site
        for site, other in zip(known.sites, known.amax)
        if np.array_equal(amax, other) and _block_of(module, site) == block
    ]
    width = module.get_submodule(name).in_features
    if len(amax) != width:
        raise PlanError(f"the plan knows {len(amax)} inputs of {name!r}, which has {width}: calibrate this model")
    weights = [module.get_parameter(f"{reader}.weight").detach() for reader in readers]
    return shared_scales(torch.from_numpy(amax).to(weights[0].device), weights)


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
    every = {name: tensor.detach() for name, tensor in _tensors(module).items()}
    freed = {name: _name_of(p.dtype) for name, p in module.named_parameters() if _is_freed(p.detach())}
    if not packed and not freed:
        raise QuantCacheError(f"{type(module).__name__} is not packed: call qc_compiler.pack_(model, 'nvfp4') first")
    linears = {name: _Linear(**asdict(child.scheme), dtype=_name_of(child.dtype)) for name, child in packed.items()}
    tensors = {name: tensor.contiguous() for name, tensor in every.items() if name not in freed}
    header = _Header(version=VERSION, linears=linears, freed=freed)
    header.checksum = _checksum(header, tensors)
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
    linears = {name: module.get_submodule(name) for name in header.linears}
    shells = {linear: _shell(linear, header.linears[name]) for name, linear in linears.items()}
    _replace(module, [*linears, *_linears_of_blocks(module)], shells)
    for name, dtype in header.freed.items():
        tensors[name] = _nan(module.get_parameter(name).shape, _dtype_of(dtype), device)
    tied = _tied(module)
    for name, tensor in tensors.items():
        owner, _, leaf = name.rpartition(".")
        parent = module.get_submodule(owner)
        if leaf in parent._parameters:
            old = parent._parameters[leaf]
            new = nn.Parameter(tensor, requires_grad=bool(old is not None and old.requires_grad))
            for other, key in tied.get(id(old), [(parent, leaf)]):
                other._parameters[key] = new
        else:
            parent._buffers[leaf] = tensor
    return model


class _Linear(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    weight: str
    activation: str
    rotation: bool
    rank: int
    balance: bool
    dtype: str


class _Header(BaseModel):
    """The JSON part of a packed file, validated because files come from outside."""

    model_config = ConfigDict(extra="forbid", strict=True)

    version: int
    linears: dict[str, _Linear]
    freed: dict[str, str] = {}  # parameters of removed blocks and their dtypes
    checksum: str = ""


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
            parse_format(linear.weight), _dtype_of(linear.dtype)
            linear.activation == PLAIN or parse_format(linear.activation)
        for dtype in header.freed.values():
            _dtype_of(dtype)
    except (ValidationError, OptionError, AttributeError) as error:
        raise PackedFileError(f"{path}: its header is invalid: {str(error).splitlines()[0]}") from error
    if header.version != VERSION:
        raise PackedFileError(f"{path}: version {header.version}, this quantcache reads {VERSION}: pack again")
    if header.checksum != _checksum(header, tensors):
        raise PackedFileError(f"{path} was changed since it was written (checksum differs): pack again")
    return header, tensors


def _checksum(header: _Header, tensors: dict[str, Tensor]) -> str:
    """Returns a SHA-256 of all that a file says; tensors on another device come to the CPU one after the other."""
    described = {name: f"{tensor.dtype}{tuple(tensor.shape)}" for name, tensor in tensors.items()}
    codes = ((name, tensor.cpu().reshape(-1).view(torch.uint8).numpy()) for name, tensor in sorted(tensors.items()))
    return checksum(header.model_dump(exclude={"checksum"}) | {"tensors": described}, codes)


def _check(module: nn.Module, header: _Header, tensors: dict[str, Tensor], path: str | Path) -> None:
    expected = {name: tuple(t.shape) for name, t in _tensors(module).items()}
    if unknown := header.freed.keys() - dict(module.named_parameters()).keys():
        raise PackedFileError(f"{path} is for another model: this {type(module).__name__} has no {min(unknown)}")
    for name, linear in header.linears.items():
        shape = expected.pop(f"{name}.weight", None)
        if shape is None or len(shape) != 2:
            raise PackedFileError(f"{path} packs {name!r}, which is no linear of this {type(module).__name__}")
        shell = _shell(module.get_submodule(name), linear)
        expected |= {f"{name}.{part}": tuple(tensor.shape) for part, tensor in shell.named_buffers()}
    expected = {name: shape for name, shape in expected.items() if name not in header.freed}
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
        scheme = Scheme(**saved.model_dump(exclude={"dtype"}))
        shell = PackedLinear(empty, scheme, torch.empty(linear.in_features))
    if linear.bias is not None:
        shell.bias = linear.bias
    return shell


def _block_of(module: nn.Module, name: str) -> str:
    """Returns the entry of the outermost list that a module lies in."""
    parts = name.split(".")
    depths = [i for i in range(len(parts)) if isinstance(module.get_submodule(".".join(parts[:i])), nn.ModuleList)]
    return ".".join(parts[: depths[0] + 1]) if depths else ""


def _linears_of_blocks(module: nn.Module) -> list[str]:
    """Returns the names of plain linears in lists of blocks; a subclass may compute something else."""
    lists = [name for name, child in module.named_modules() if isinstance(child, nn.ModuleList)]
    return [
        name
        for name, child in module.named_modules(remove_duplicate=False)
        if type(child) is nn.Linear and any(name.startswith(f"{prefix}.") for prefix in lists)
    ]


def _replace(module: nn.Module, names: Sequence[str], packed: Mapping[nn.Module, PackedLinear]) -> None:
    """Puts packed linears where plain ones stand under these names; one may have several."""
    for name in names:
        owner, _, leaf = name.rpartition(".")
        if (old := module.get_submodule(name)) in packed:
            setattr(module.get_submodule(owner), leaf, packed[old].train(old.training))


def _submodule(module: nn.Module, name: str) -> nn.Module | None:
    try:
        return module.get_submodule(name)
    except AttributeError:
        return None


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    """Returns parameters and all buffers, those outside the state dict as well: a meta model has none of its own."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _tied(module: nn.Module) -> dict[int, list[tuple[nn.Module, str]]]:
    """Returns for each parameter, by its id, all places where it stands."""
    places: dict[int, list[tuple[nn.Module, str]]] = {}
    for owner in module.modules():
        for leaf, parameter in owner._parameters.items():
            if parameter is not None:
                places.setdefault(id(parameter), []).append((owner, leaf))
    return places


def _name_of(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _dtype_of(name: str) -> torch.dtype:
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise AttributeError(f"{name!r} is no dtype")
    return dtype
