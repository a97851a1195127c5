import copy

import pytest
import torch

import qc_compiler
from qc_compiler.registry import runtime_of
from tiny_models import compile_eagerly, eager_backend, tiny_dit

X, T = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 500.0)
OPTIONS = {"cache": "off", "quantize": "w8a8", "emulate": True}


def run(model, x=X, t=T):
    with torch.no_grad():
        return model(x, t)


def prepared_of(model):
    (weights,) = runtime_of(model).prepared.values()
    return weights


def add_to_data(weight):
    weight.data += 0.1


def replace_data(weight):
    weight.data = weight.data + 0.1


def write_in_place(weight):
    weight.mul_(1.1)


@pytest.mark.parametrize("change", [add_to_data, replace_data, write_in_place])
def test_a_changed_weight_is_quantized_anew(change):
    model = tiny_dit(2)
    compiled = compile_eagerly(model, OPTIONS)
    before = run(compiled)
    assert torch.equal(run(compiled), before)
    assert prepared_of(model).count == 1
    with torch.no_grad():
        change(model.blocks[1].mlp[0].weight)
    after = run(compiled)
    assert prepared_of(model).count == 2
    assert not torch.equal(after, before)
    assert torch.equal(after, run(compile_eagerly(copy.deepcopy(model), OPTIONS)))


def test_load_state_dict_is_noticed():
    model, other = tiny_dit(2), tiny_dit(2)
    for parameter in other.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    compiled = compile_eagerly(model, OPTIONS)
    run(compiled)
    model.load_state_dict(other.state_dict())
    assert torch.equal(run(compiled), run(compile_eagerly(other, OPTIONS)))


def test_graphs_of_two_shapes_share_the_prepared_weights():
    model = tiny_dit(2)
    compiled = compile_eagerly(model, OPTIONS, dynamic=False)
    run(compiled), run(compiled, X[:1], T[:1])
    assert prepared_of(model).count == 1


def test_a_graph_of_symbolic_sizes_finds_its_weights():
    """Its sizes are inputs, too, so that the weights stand elsewhere than in the first graph."""
    model = tiny_dit(2)
    compiled = compile_eagerly(model, OPTIONS)
    run(compiled), run(compiled, X[:1], T[:1])
    x, t = torch.randn(3, 20, 8), torch.full((3,), 400.0)
    assert torch.equal(run(compiled, x, t), run(compile_eagerly(model, OPTIONS, dynamic=False), x, t))
    assert prepared_of(model).count == 1


def test_weights_that_stay_are_prepared_once():
    model = tiny_dit(2)
    compiled = compile_eagerly(model, OPTIONS)
    for _ in range(3):
        run(compiled)
    assert prepared_of(model).count == 1


def test_with_a_cache_each_step_is_quantized_like_without():
    model = tiny_dit(2)
    plain = compile_eagerly(model, OPTIONS)
    run(plain)
    cached = compile_eagerly(model, OPTIONS | {"cache": "static", "interval": 1, "level": "block"})
    for step in range(3):
        x, t = X * (1 - 0.1 * step), T - 100 * step
        assert torch.allclose(run(cached, x, t), run(plain, x, t), rtol=0, atol=1e-6)
    assert qc_compiler.summary(cached).computed_share == 1


def test_without_any_site_the_model_is_untouched(monkeypatch):
    monkeypatch.setattr("passes.quantize_linears.why_slower", lambda *_: "slower")
    model = tiny_dit(2)
    compiled = torch.compile(
        model, backend=lambda gm, ex: eager_backend(gm, ex, options={"cache": "off", "quantize": "w8a8"})
    )
    assert torch.equal(run(compiled), run(model))
    assert not runtime_of(model).prepared
