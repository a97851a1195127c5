import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capture import apply, capture
from mmdit import MMDiT, MMDiTConfig
from passes import Normalize, ShareBodies
from qc_compiler.errors import UnsupportedModelError
from qc_compiler.estimate import own_sizes
from qc_compiler.graph import body_calls, is_symbolic_number, module_path, placeholders
from qc_compiler.show import show
from small_blocks import Modulated, Stack
from tiny_models import tiny_dit

aten = torch.ops.aten
X = torch.arange(24.0).reshape(1, 2, 3, 4)


# 1. golden


def test_golden():
    captured = capture(Stack(Modulated()), X)
    assert [str(node.target) for node in captured.gm.graph.nodes if "imul" in str(node.target)]
    assert (
        show(captured.normalized()).replace("L_self_modules_blocks_modules_0_modules_query_parameters_", "")
        == """\
graph(%L_x_: f32[1, 2, 3, 4], %weight_: f32[4, 4]):
  %layer_norm = aten.layer_norm(%L_x_, (4)) : f32[1, 2, 3, 4]
  %mul = aten.mul(%layer_norm, 2) : f32[1, 2, 3, 4]
  %linear = aten.linear(%mul, %weight_) : f32[1, 2, 3, 4]
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%linear, %L_x_, %L_x_) : f32[1, 2, 3, 4]
  %add = aten.add(%L_x_, %scaled_dot_product_attention) : f32[1, 2, 3, 4]
  return (%add)"""
    )


# 2. what it refuses


class WritesItsBuffer(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(()))

    def forward(self, x):
        self.count += 1
        return x + self.count


def writes_its_input(x):
    x.mul_(2)
    return x + 1


@pytest.mark.parametrize(("model", "name"), [(WritesItsBuffer(), "count"), (writes_its_input, "x")])
def test_a_model_that_writes_into_an_input_or_buffer_is_refused(model, name):
    gm = capture(model, X.clone()).gm
    before = str(gm.graph)
    with pytest.raises(UnsupportedModelError, match=rf"writes into its input or buffer '.*{name}.*'"):
        Normalize().run(gm)
    assert str(gm.graph) == before


# 3. edges


def test_writing_into_a_view_of_what_the_model_made_is_no_mutation():
    def model(x):
        y = x + 1
        y[:, 0] = 0
        return y

    gm = capture(model, X).normalized()
    assert torch.equal(gm(X)[0], model(X))
    names = [str(node.target) for node in gm.graph.nodes if node.op == "call_function"]
    assert not [name for name in names if name.split(".")[1].endswith("_")]


def test_a_graph_that_computes_nothing():
    gm = capture(lambda x: x, X).after()
    assert apply(Normalize(), gm).changed == 0
    assert torch.equal(gm(X)[0], X)


def test_an_input_used_twice_and_an_output_returned_twice():
    gm = capture(lambda x, y: (x + y, x + y), X, X).normalized()
    results = gm(*[X] * len(placeholders(gm.graph)))
    assert all(torch.equal(result, X + X) for result in results)


def test_a_shared_weight_stays_one_input():
    linear = nn.Linear(4, 4)
    gm = capture(nn.Sequential(linear, linear), X).normalized()
    assert sum(bool(node.meta["parameter"]) for node in placeholders(gm.graph)) == 2  # weight and bias, once each


def test_a_dynamic_size_stays_symbolic():
    captured = capture(lambda x: F.pad(x, (0, x.shape[2])) * x.shape[2], X, dynamic=True)
    gm = captured.normalized()
    assert any(isinstance(node.meta["val"], torch.SymInt) for node in placeholders(gm.graph))
    longer = torch.arange(40.0).reshape(1, 2, 5, 4)
    inputs = [longer if isinstance(value, torch.Tensor) else {3: 5}.get(value, value) for value in captured.inputs]
    assert torch.equal(gm(*inputs)[0], F.pad(longer, (0, 5)) * 5)


def test_parameters_names_and_module_stacks_survive():
    gm = capture(tiny_dit(2), torch.ones(1, 4, 8), torch.ones(1)).normalized()
    sources = {str(node.meta["source"]) for node in placeholders(gm.graph) if node.meta["parameter"]}
    assert any("blocks" in source and "qkv" in source for source in sources)
    paths = {module_path(node) for node in gm.graph.nodes if node.op == "call_function"}
    assert {"embed", "blocks.0.attn.qkv", "blocks.1.mlp.2", "head"} <= paths
    inputs = [node for node in placeholders(gm.graph) if not node.meta["parameter"]]
    assert len(inputs) == 2


def test_linear_attention_and_norm_stay_whole():
    gm = capture(tiny_dit(1), torch.ones(1, 4, 8), torch.ones(1)).normalized()
    targets = [node.target for node in gm.graph.nodes]
    assert targets.count(aten.linear.default) == 8
    assert targets.count(aten.scaled_dot_product_attention.default) == 1
    assert targets.count(aten.layer_norm.default) == 2


# 4. equivalence


def test_values_do_not_change():
    """Bit-identical to the model; against float64 the error is that of float32 itself."""
    model, x, t = tiny_dit(2), torch.randn(2, 6, 8), torch.full((2,), 300.0)
    captured = capture(model, x, t)
    with torch.no_grad():
        result = captured.normalized()(*captured.inputs)[0]
        assert torch.equal(result, model(x, t))
        exact = copy.deepcopy(model).double()(x.double(), t)
    assert (result - exact).abs().max() <= 1e-5 * exact.abs().max()


# 5. idempotence


def test_a_second_run_leaves_the_graph_alone():
    gm = capture(tiny_dit(1), torch.ones(1, 4, 8), torch.ones(1)).normalized()
    before = show(gm)
    assert apply(Normalize(), gm).changed == 0
    assert show(gm) == before


def test_sizes_are_computed_from_those_of_the_inputs():
    """Two sizes vary, and the tokens are their product: what is read from one block's tensor would serve all others."""
    model = (
        MMDiT(MMDiTConfig(num_dual=2, num_single=2, width=32, num_heads=2, size=(8, 8))).eval().requires_grad_(False)
    )
    args = tuple(map(own_sizes, (torch.randn(2, 1, 8, 8), torch.ones(2), torch.zeros(2, 8, dtype=torch.int64))))
    captured = capture(model, *args, dynamic=True)
    gm = captured.normalized()
    assert any(is_symbolic_number(node) for node in placeholders(gm.graph))
    assert not gm.graph.find_nodes(op="call_function", target=aten.sym_size.int)
    numbers = [node for node in gm.graph.nodes if node.op == "call_function" and is_symbolic_number(node)]
    assert numbers
    ShareBodies().run(gm)
    assert [str(call.meta["block"]) for call in body_calls(gm)] == [
        "dual_blocks.0", "dual_blocks.1", "single_blocks.0", "single_blocks.1"
    ]  # fmt: skip
