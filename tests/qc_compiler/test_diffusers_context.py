import sys
import types

import pytest

from qc_compiler import diffusers_context
from qc_compiler.runtime import _STREAM


@pytest.fixture
def hooks(monkeypatch):
    """Stands for the module in which diffusers keeps the name of the context."""
    module = types.ModuleType("diffusers.hooks.hooks")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    token = _STREAM.set(None)
    yield module
    _STREAM.reset(token)


def test_without_diffusers_nothing_happens(monkeypatch):
    monkeypatch.delitem(sys.modules, "diffusers.hooks.hooks", raising=False)
    diffusers_context.install()


def test_the_name_of_a_context_becomes_the_name_of_the_stream(hooks):
    seen = []
    hooks._set_cache_context = lambda module, context=None: seen.append(context)
    diffusers_context.install()
    cond = types.SimpleNamespace(name="cond")
    hooks._set_cache_context(None, cond)
    assert _STREAM.get() == "cond"
    hooks._set_cache_context(None, None)
    assert _STREAM.get() is None
    assert seen == [cond, None]


def test_older_versions_set_it_on_their_registry(hooks):
    class HookRegistry:
        name = None

        def _set_context(self, name=None):
            self.name = name

    hooks.HookRegistry = HookRegistry
    diffusers_context.install()
    registry = HookRegistry()
    registry._set_context("uncond")
    assert (_STREAM.get(), registry.name) == ("uncond", "uncond")


def test_installing_twice_wraps_once(hooks):
    calls = []
    hooks._set_cache_context = lambda module, context=None: calls.append(context)
    diffusers_context.install()
    wrapped = hooks._set_cache_context
    diffusers_context.install()
    assert hooks._set_cache_context is wrapped
    hooks._set_cache_context(None, None)
    assert calls == [None]
