"""Finds the runtime of a model: by its parameters, since that is all a backend sees of it."""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils.weak import WeakIdKeyDictionary

from .errors import QuantCacheError
from .options import Options
from .plan import Plan
from .runtime import Runtime

_lock = threading.Lock()
_runtimes: WeakIdKeyDictionary = WeakIdKeyDictionary()  # first parameter → {options: runtime}
_without_parameters: dict[Any, Runtime] = {}


def runtime_for(example_inputs: Sequence[Any], given: Mapping[str, Any], options: Options) -> Runtime:
    """Returns the runtime that all graphs of one model under one set of options share."""
    parameters = [x for x in example_inputs if isinstance(x, torch.nn.Parameter)]
    key = _key(given)
    with _lock:
        if not parameters:
            return _without_parameters.setdefault(key, Runtime(options))
        known = next((_runtimes[p] for p in parameters if p in _runtimes), None)
        if known is None:
            known = {}
        for parameter in parameters:
            _runtimes.setdefault(parameter, known)
        if key not in known or not _same(known[key].options.plan, options.plan):  # a file may be written anew
            known[key] = Runtime(options)
            known[key].key = key
        known[key] = known.pop(key)  # the last one compiled comes last
        return known[key]


def adopt(runtime: Runtime, parameters: Sequence[Any]) -> None:
    """Makes a runtime that of another model too, if that has none: Dynamo gives models of one class one graph."""
    with _lock:
        if parameters and parameters[0] not in _runtimes:
            alone = {runtime.key: runtime}  # the model that it was made for is gone
            known: dict[Any, Runtime] = next((r for r in _runtimes.values() if runtime in r.values()), alone)
            for parameter in parameters:
                _runtimes.setdefault(parameter, known)


def runtime_of(model: Any) -> Runtime:
    """Returns the runtime of a compiled model (or of the plain module that was compiled).

    Raises:
        QuantCacheError: the model has not run under quantcache yet, or was compiled with another backend.
    """
    module = getattr(model, "_orig_mod", model)
    if not isinstance(module, torch.nn.Module):
        raise QuantCacheError(f"expected a model that torch.compile returned, got {type(model).__name__}")
    with _lock:
        known: dict[Any, Runtime] = next((_runtimes[p] for p in module.parameters() if p in _runtimes), {})
        given = _options_of(model)
        if given is not None and _key(given) in known:
            return known[_key(given)]
        if given is None and known:
            return next(reversed(known.values()))
    raise QuantCacheError(
        f"{type(module).__name__} has not run under quantcache yet: call torch.compile(model, backend='quantcache') "
        "and run it once under torch.no_grad()"
    )


def runtimes_of(module: torch.nn.Module) -> list[Runtime]:
    """Returns a module's runtimes under all options that it has run with."""
    with _lock:
        known = [_runtimes[p] for p in module.parameters() if p in _runtimes]
    return list({id(r): r for runtimes in known for r in runtimes.values()}.values())


def forget_weights(module: torch.nn.Module) -> None:
    """Frees what was prepared of a model's weights under any options; it is made again when it is needed."""
    for runtime in runtimes_of(module):
        runtime.forget_weights()


def _key(given: Mapping[str, Any]) -> tuple[tuple[str, Any], ...]:
    simple = (str, int, float, tuple, list, type(None))
    return tuple(sorted((name, repr(v) if isinstance(v, simple) else id(v)) for name, v in given.items()))


def _same(a: Plan | None, b: Plan | None) -> bool:
    return a is b or (a is not None and b is not None and a.digest == b.digest)


def _options_of(model: Any) -> Mapping[str, Any] | None:
    """Returns the options a module was compiled with, or None if they cannot be seen from outside.

    Raises:
        QuantCacheError: it was compiled with PyTorch's own backend.
    """
    callback = getattr(getattr(model, "dynamo_ctx", None), "callback", None)
    while callback is not None and not hasattr(callback, "compiler_name"):
        callback = getattr(callback, "_torchdynamo_orig_backend", None)
    if callback is None:
        return None
    if callback.compiler_name == "inductor":
        raise QuantCacheError("the model was compiled with backend='inductor', not with backend='quantcache'")
    given = callback.kwargs.get("options")
    return {} if given is None and callback.compiler_name == "quantcache" else given
