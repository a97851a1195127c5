import copy

import pytest
import torch
from torch import nn

from capture import apply, capture, skips
from passes import ShareBodies
from qc_compiler.graph import body_calls, body_of, outputs, placeholders
from qc_compiler.show import show
from small_blocks import Feed, Mix, Modulated, Stack, attend
from tiny_models import tiny_dit

X = torch.arange(24.0).reshape(1, 2, 3, 4) / 24


# 1. golden


def test_golden():
    gm = capture(Stack(Mix(), Mix()), X).normalized()
    assert "invoke_subgraph" not in show(gm)
    report = apply(ShareBodies(), gm)
    assert (report.changed, report.skipped) == (2, ())
    assert (
        show(gm)
        == """\
graph(%L_x_: f32[1, 2, 3, 4]):
  %body_1 = get body_0
  %invoke_subgraph_1 = invoke_subgraph(%body_1, body_0, %L_x_) : (f32[1, 2, 3, 4])
  %getitem_1 = getitem(%invoke_subgraph_1, 0) : f32[1, 2, 3, 4]
  %body_0 = get body_0
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %getitem_1) : (f32[1, 2, 3, 4])
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 3, 4]
  return (%getitem)
body body_0(%l_x_: f32[1, 2, 3, 4]):
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%l_x_, %l_x_, %l_x_) : f32[1, 2, 3, 4]
  %add = aten.add(%l_x_, %scaled_dot_product_attention) : f32[1, 2, 3, 4]
  return (%add)"""
    )


# 2. skips


class TwoLists(nn.Module):
    def __init__(self):
        super().__init__()
        self.feeds = nn.ModuleList([Feed(), Feed()])
        self.blocks = nn.ModuleList([Mix(), Mix()])

    def forward(self, x):
        for module in (*self.feeds, *self.blocks):
            x = module(x)
        return x


def to_numbers(x):
    return (x + attend(x)).argmax(dim=-1, keepdim=True)


SKIPS = [
    (TwoLists(), "feeds", "its entries hold no attention, so they are no transformer blocks", 2),
    (Stack(Mix(), Feed(), Mix()), "blocks.1", "no attention inside", 2),
    (Stack(Mix(), to_numbers), "blocks.1", "it returns something else than floating point tensors", 1),
    (
        Stack(Mix(), lambda x: attend(x).sum(dim=-1)),
        "blocks.1",
        "none of its outputs has the shape of an input, so there is no residual stream",
        1,
    ),
]


@pytest.mark.parametrize(("model", "where", "reason", "changed"), SKIPS)
def test_what_is_no_block_is_skipped_with_a_reason(model, where, reason, changed):
    captured = capture(model, X)
    gm = captured.normalized()
    report = apply(ShareBodies(), gm)
    assert (where, reason) in skips(report)
    assert report.changed == changed
    with torch.no_grad():
        torch.testing.assert_close(gm(*captured.inputs)[0], model(X))


ALONE = [
    (Stack(lambda x: attend(x).sum(dim=-1)), "blocks.0", "none of its outputs has the shape of an input"),
    (Stack(to_numbers), "blocks.0", "it returns something else than floating point tensors"),
    (Stack(Feed(), Feed()), "blocks", "its entries hold no attention, so they are no transformer blocks"),
    (nn.Sequential(nn.Linear(4, 5)), None, None),
]


@pytest.mark.parametrize(("model", "where", "reason"), ALONE)
def test_where_all_is_skipped_the_graph_is_unchanged(model, where, reason):
    gm = capture(model, X).normalized()
    before = show(gm)
    report = apply(ShareBodies(), gm)
    assert report.changed == 0
    assert show(gm) == before
    if where is not None:
        assert any(at == where and why.startswith(reason) for at, why in skips(report))


def test_a_block_whose_result_nothing_reads_is_skipped():
    gm = capture(Stack(Mix()), X).normalized()
    gm.graph.output_node().args = ((placeholders(gm.graph)[0],),)
    before = show(gm)
    report = apply(ShareBodies(), gm)
    assert report.changed == 0
    assert ("blocks.0", "nothing outside reads its result") in skips(report)
    assert show(gm) == before


def test_a_graph_that_adds_to_no_residual_stream_as_a_whole():
    gm = capture(lambda x: attend(x) * 2, X).normalized()
    before = show(gm)
    report = apply(ShareBodies(), gm)
    assert skips(report) == [("graph", "the graph as a whole adds to no residual stream")]
    assert (report.changed, show(gm)) == (0, before)


def test_a_block_that_something_outside_comes_between_is_skipped():
    gm = capture(Stack(Mix(), Mix()), X).normalized()
    # block 0 ends in y + (−(−y)), and the two negations lie outside
    adds = [node for node in gm.graph.nodes if node.target is torch.ops.aten.add.Tensor]
    with gm.graph.inserting_after(adds[0]):
        once = gm.graph.call_function(torch.ops.aten.neg.default, (adds[0],))
    with gm.graph.inserting_after(once):
        twice = gm.graph.call_function(torch.ops.aten.neg.default, (once,))
    with gm.graph.inserting_after(twice):
        late = gm.graph.call_function(torch.ops.aten.add.Tensor, (adds[0], twice))
    once.meta = twice.meta = {"val": adds[0].meta["val"]}
    late.meta = dict(adds[0].meta)
    adds[0].replace_all_uses_with(late, lambda user: user not in (once, late))
    report = apply(ShareBodies(), gm)
    assert ("blocks.0", "its nodes are interleaved with nodes that depend on it") in skips(report)
    assert report.changed == 1


# 3. edges


def test_a_graph_without_anything():
    gm = capture(lambda x: x, X).normalized()
    before = show(gm)
    assert apply(ShareBodies(), gm).changed == 0
    assert show(gm) == before


def test_a_graph_that_is_one_block_is_named_block():
    gm = capture(Modulated().requires_grad_(False), X).shared()
    assert [call.meta["block"] for call in body_calls(gm)] == ["block"]


def test_blocks_of_different_structure_have_different_bodies():
    gm = capture(Stack(Mix(), Modulated(), Mix()), X).shared()
    assert [call.args[1] for call in body_calls(gm)] == ["body_0", "body_1", "body_0"]
    assert [call.meta["block"] for call in body_calls(gm)] == ["blocks.0", "blocks.1", "blocks.2"]


def test_a_shared_weight_is_an_operand_of_both():
    block = Modulated()
    gm = capture(Stack(block, block), X).shared()
    calls = body_calls(gm)
    assert {call.args[1] for call in calls} == {"body_0"}
    weights = [[arg for arg in call.args[2:] if arg.meta.get("parameter")] for call in calls]
    assert weights[0] == weights[1]


def test_a_result_that_two_others_read():
    class Tapped(Stack):
        def forward(self, x):
            first = self.blocks[0](x)
            return self.blocks[1](first), first * 2, first

    model = Tapped(Mix(), Mix())
    captured = capture(model, X)
    gm = captured.shared()
    assert len(body_calls(gm)) == 2
    for found, expected in zip(gm(*captured.inputs), model(X)):
        torch.testing.assert_close(found, expected)


def test_a_dynamic_size_is_handed_to_the_bodies():
    model, x, t = tiny_dit(2), torch.randn(2, 5, 8), torch.full((2,), 300.0)
    captured = capture(model, x, t, dynamic=True)
    gm = captured.shared()
    assert [call.args[1] for call in body_calls(gm)] == ["body_0", "body_0"]
    longer = torch.randn(2, 7, 8)
    inputs = [7 if isinstance(value, int) and value == 5 else value for value in captured.inputs]
    inputs = [longer if value is x else value for value in inputs]
    with torch.no_grad():
        torch.testing.assert_close(gm(*inputs)[0], model(longer, t), rtol=1e-6, atol=1e-6)


def test_the_base_of_a_residual_is_an_operand_of_the_body():
    gm = capture(tiny_dit(2), torch.ones(1, 4, 8), torch.ones(1)).shared()
    for call in body_calls(gm):
        body = body_of(gm, call)
        (base,) = body.meta["bases"]
        stream, (result,) = placeholders(body.graph)[base], outputs(body.graph)
        assert stream.meta["val"].shape == result.meta["val"].shape
        assert body.meta["flops"] > 0
    first, second = body_calls(gm)
    assert second.args[2 + base].args[0] is first  # what leaves block 0 is the stream that enters block 1


# 4. equivalence


@pytest.mark.parametrize("model", [tiny_dit(3), Stack(Mix(), Modulated(), Mix())])
def test_values_do_not_change(model):
    args = (torch.randn(2, 6, 8), torch.full((2,), 300.0)) if hasattr(model, "embed") else (X,)
    captured = capture(model, *args)
    result = captured.shared()(*captured.inputs)[0]
    with torch.no_grad():
        torch.testing.assert_close(result, model(*args), rtol=1e-6, atol=1e-6)
        exact = copy.deepcopy(model).double()(*(arg.double() for arg in args))
    assert (result - exact).abs().max() <= 1e-5 * exact.abs().max()


# 5. idempotence


def test_a_second_run_leaves_the_graph_alone():
    gm = capture(tiny_dit(2), torch.ones(1, 4, 8), torch.ones(1)).shared()
    before = show(gm)
    assert apply(ShareBodies(), gm).changed == 0
    assert show(gm) == before
