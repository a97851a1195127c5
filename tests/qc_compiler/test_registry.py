import gc
import weakref

import pytest
import torch
from torch import nn

from qc_compiler import registry
from qc_compiler.errors import QuantCacheError
from qc_compiler.options import Options, parse_options
from qc_compiler.registry import runtime_for, runtime_of
from tiny_models import compile_eagerly, eager_backend, sample, tiny_dit


def run(model):
    with torch.no_grad():
        return model(torch.zeros(1, 4, 8), torch.ones(1))


def test_a_model_that_has_not_run_yet():
    model = tiny_dit(1)
    for given in (model, compile_eagerly(model, {"cache": "static"})):
        with pytest.raises(QuantCacheError, match=r"TinyDiT has not run under quantcache yet: call torch\.compile\("):
            runtime_of(given)


def test_something_that_is_no_model():
    with pytest.raises(QuantCacheError, match=r"expected a model that torch\.compile returned, got str"):
        runtime_of("model")


def test_a_compiled_model_and_its_module_have_one_runtime():
    model = tiny_dit(1)
    compiled = compile_eagerly(model, {"cache": "static"})
    run(compiled)
    assert runtime_of(compiled) is runtime_of(model)
    assert runtime_of(model).options.cache == "static"


def test_two_models_have_two():
    first, second = tiny_dit(1), tiny_dit(1)
    for model in (first, second):
        run(compile_eagerly(model, {"cache": "static"}))
    assert runtime_of(first) is not runtime_of(second)


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


def test_models_that_dynamo_gives_one_graph_have_one_runtime():
    """As of two experts of one class, compiled with the same options."""
    torch._dynamo.reset()
    first, second = tiny_dit(1), tiny_dit(1)
    with torch.no_grad():
        second.head.weight.mul_(2)
    options = {"cache": "static", "interval": 2}
    compiled = [torch.compile(model, backend=backend, options=options) for model in (first, second)]
    graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    found = [sample(model) for model in compiled]
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == graphs + 1
    assert runtime_of(compiled[1]) is runtime_of(second) is runtime_of(first)
    torch._dynamo.reset()
    alone = torch.compile(second, backend=backend, options=options)
    assert torch.equal(found[1], sample(alone))
    assert not torch.equal(found[0], found[1])


def test_a_model_loaded_anew_is_known_although_dynamo_compiles_nothing():
    options = {"cache": "static", "interval": 2}
    for _ in range(2):
        model = tiny_dit(1)
        run(torch.compile(model, backend=backend, options=options))
        assert runtime_of(model).options.interval == 2
        del model
        gc.collect()


def test_another_graph_of_the_model_shares_its_runtime():
    model = tiny_dit(1)
    compiled = compile_eagerly(model, {"cache": "static"})
    run(compiled)
    runtime = runtime_of(model)
    with torch.no_grad():
        compiled(torch.zeros(3, 6, 8), torch.ones(3))
    assert runtime_of(model) is runtime


def test_the_module_alone_gives_the_runtime_that_was_compiled_last():
    model = tiny_dit(1)
    for cache in ("static", "hlc", "tdc"):
        run(compile_eagerly(model, {"cache": cache}))
    assert runtime_of(model).options.cache == "tdc"


def test_other_options_have_a_runtime_of_their_own():
    model = tiny_dit(1)
    given = {"cache": "static", "interval": 3}
    parameters = list(model.parameters())
    first = runtime_for(parameters, given, parse_options(given))
    second = runtime_for(parameters, {"cache": "hlc"}, parse_options({"cache": "hlc"}))
    assert first is not second
    assert runtime_for(parameters, {"interval": 3, "cache": "static"}, parse_options(given)) is first
    assert runtime_of(torch.compile(model, backend="quantcache", options=given)) is first
    assert runtime_of(torch.compile(model, backend="quantcache", options={"cache": "hlc"})) is second
    with pytest.raises(QuantCacheError, match="has not run"):
        runtime_of(torch.compile(model, backend="quantcache", options={"cache": "tdc"}))


def test_a_model_compiled_by_inductor_is_not_taken_for_ours():
    model = tiny_dit(2)
    runtime_for(list(model.parameters()), {}, Options())
    for kwargs in ({}, {"mode": "reduce-overhead"}):
        with pytest.raises(QuantCacheError, match="backend='inductor'"):
            runtime_of(torch.compile(model, **kwargs))


def test_a_graph_that_sees_one_parameter_finds_the_runtime_of_the_model():
    model = tiny_dit(2)
    parameters = list(model.parameters())
    whole = runtime_for(parameters, {}, Options())
    assert runtime_for(parameters[3:4], {}, Options()) is whole
    assert runtime_of(model.blocks[0]) is whole


def test_models_without_parameters_share_one_runtime_for_each_set_of_options(monkeypatch):
    monkeypatch.setattr(registry, "_without_parameters", {})
    first = runtime_for([torch.ones(1)], {}, Options())
    assert runtime_for([torch.ones(2)], {}, Options()) is first
    assert runtime_for([torch.ones(2)], {"cache": "hlc"}, Options()) is not first


def test_a_model_that_is_gone_takes_its_runtime_along():
    model = nn.Linear(2, 2)
    runtime = weakref.ref(runtime_for(list(model.parameters()), {}, Options()))
    assert runtime() is not None
    del model
    gc.collect()
    assert runtime() is None
