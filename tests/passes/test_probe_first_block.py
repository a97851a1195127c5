import pytest
import torch

from capture import apply, capture, skips
from passes import GuardRegions, ProbeFirstBlock
from qc_compiler.graph import body_calls
from qc_compiler.show import show
from small_blocks import Feed, Mix, Modulated, Stack
from tiny_models import tiny_dit

X = torch.arange(24.0).reshape(1, 2, 3, 4) / 24


# 1. golden


def test_golden():
    gm = capture(Stack(Modulated()), X).shared()
    assert "layer_norm" not in show(gm).split("\nbody")[0]
    report = apply(ProbeFirstBlock(), gm)
    assert (report.changed, report.skipped) == (1, ())
    text = show(gm).split("\nbody")[0].replace("L_self_modules_blocks_modules_", "")
    assert (
        text.replace("_modules_query_parameters", "")
        == """\
graph(%L_x_: f32[1, 2, 3, 4], %0_weight_: f32[4, 4]):
  %body_0 = get body_0
  %layer_norm_1 = aten.layer_norm(%L_x_, (4)) : f32[1, 2, 3, 4]
  %mul_1 = aten.mul(%layer_norm_1, 2) : f32[1, 2, 3, 4]
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_, %0_weight_) : (f32[1, 2, 3, 4])
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 3, 4]
  return (%getitem)"""
    )
    assert gm.meta["probe"].name == "mul_1"


# 2. skips


@pytest.mark.parametrize("block", [Mix(), lambda x: x + torch.nn.functional.scaled_dot_product_attention(x, x, x) * 2])
def test_a_block_whose_attention_comes_before_any_linear_is_skipped(block):
    gm = capture(Stack(block), X).shared()
    before = show(gm)
    report = apply(ProbeFirstBlock(), gm)
    assert report.changed == 0
    assert skips(report) == [("blocks.0", "no linear reads a function of its stream before attention")]
    assert show(gm) == before
    assert "probe" not in gm.meta


# 3. edges


@pytest.mark.parametrize("model", [Stack(Feed()), lambda x: x + 1, lambda x: x])
def test_a_graph_without_blocks(model):
    gm = capture(model, X).shared()
    before = show(gm)
    report = apply(ProbeFirstBlock(), gm)
    assert (report.changed, report.skipped, show(gm)) == (0, (), before)


# 4. equivalence


def test_the_probe_is_the_modulated_input_and_the_model_stays_as_it_is():
    model, x, t = tiny_dit(2), torch.randn(2, 6, 8), torch.full((2,), 300.0)
    captured = capture(model, x, t)
    gm = captured.shared()
    apply(ProbeFirstBlock(), gm)
    apply(GuardRegions("block"), gm)
    interface = gm.meta["interface"]
    assert [region.name for region in interface.regions] == ["probe", "blocks.0", "blocks.1"]
    seen = []
    handle = model.blocks[0].attn.qkv.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    with torch.no_grad():
        expected = model(x, t)
        slots = [torch.zeros(2, 6, 32)] * 3
        result, *rest = gm(*captured.inputs, torch.ones(3, dtype=torch.bool), torch.ones(3, 1), *slots)
    handle.remove()
    torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(rest[3], seen[0], rtol=1e-5, atol=1e-6)


# 5. idempotence


def test_a_second_run_leaves_the_graph_alone():
    gm = capture(tiny_dit(2), torch.ones(1, 4, 8), torch.ones(1)).shared()
    assert apply(ProbeFirstBlock(), gm).changed == 1
    before = show(gm)
    assert apply(ProbeFirstBlock(), gm).changed == 0
    assert show(gm) == before
    assert len(body_calls(gm)) == 2
