"""Understands diffusers' `model.cache_context(name)`: its name becomes the name of our stream.

diffusers keeps the name only inside the state of its own cache hooks. So the function that sets it is wrapped, once,
if diffusers is loaded at all; this module never imports it.
"""

import functools
import sys
from typing import Any

from .runtime import _STREAM


def install() -> None:
    """Makes `cache_context` set our stream too. Does nothing without diffusers, or the second time."""
    hooks = sys.modules.get("diffusers.hooks.hooks")
    if hooks is None:
        return
    if hasattr(hooks, "_set_cache_context"):  # diffusers ≥ 0.40: (module, CacheContext | None)
        _wrap(hooks, "_set_cache_context")
    elif hasattr(hooks, "HookRegistry"):  # before: registry._set_context(name | None)
        _wrap(hooks.HookRegistry, "_set_context")


def _wrap(owner: Any, name: str) -> None:
    original = getattr(owner, name)
    if getattr(original, "_quantcache", False):
        return

    @functools.wraps(original)
    def wrapped(target: Any, context: Any = None) -> Any:
        _STREAM.set(getattr(context, "name", context))
        return original(target, context)

    wrapped._quantcache = True  # type: ignore[attr-defined]
    setattr(owner, name, wrapped)
