import copy
import types
from itertools import compress

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st
from torch import nn

from capture import apply, capture, skips
from head_plans import head_plan, plan_for
from passes import GuardRegions, Prune
from qc_compiler import Plan, PlanError, explain
from qc_compiler.attention import FULL
from qc_compiler.graph import body_calls, body_of, copy_of, is_parameter, placeholders
from qc_compiler.regions import find_sublayers, is_attention, sublayer_names
from qc_compiler.show import show
from random_models import BATCH, TEXT, TOKENS, RandomModel, Reference, model_specs
from small_blocks import Calls, Feed, Mix, Stack, attend
from tiny_models import compile_eagerly, predictions, tiny_dit

X = torch.arange(24.0).reshape(1, 2, 3, 4) / 24
aten = torch.ops.aten


class Both(nn.Module):
    """h = x + attention(x); y = h + linear(h)."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4, bias=False)

    def forward(self, x):
        x = x + attend(x)
        return x + self.linear(x)


def text_of(gm):
    text = show(gm).replace("L_self_modules_blocks_modules_", "").replace("l_self_modules_blocks_modules_", "")
    return text.replace("_modules_linear_parameters_weight_", "_w").replace("f32[1, 2, 3, 4]", "X")


def plan_of(*names):
    return Plan.without_schedule("", pruned=names)


# 1. golden


def test_golden():
    gm = capture(Stack(Both(), Both(), Both()), X).shared()
    assert text_of(gm).count(", body_0, ") == 3
    report = apply(Prune(("blocks.0", "blocks.1/mlp")), gm)
    assert (report.changed, report.skipped) == (2, ())
    assert (
        text_of(gm)
        == """\
graph(%L_x_: X, %0_w: f32[4, 4], %1_w: f32[4, 4], %2_w: f32[4, 4]):
  %body_1 = get body_0
  %invoke_subgraph_1 = invoke_subgraph(%body_1, body_0, %L_x_) : (X)
  %getitem_1 = getitem(%invoke_subgraph_1, 0) : X
  %body_0_1 = get body_0_1
  %invoke_subgraph = invoke_subgraph(%body_0_1, body_0_1, %getitem_1, %2_w) : (X)
  %getitem = getitem(%invoke_subgraph, 0) : X
  return (%getitem)
body body_0(%l_x_: X):
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%l_x_, %l_x_, %l_x_) : X
  %add = aten.add(%l_x_, %scaled_dot_product_attention) : X
  return (%add)
body body_0_1(%l_x_: X, %0_w: f32[4, 4]):
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%l_x_, %l_x_, %l_x_) : X
  %add = aten.add(%l_x_, %scaled_dot_product_attention) : X
  %linear = aten.linear(%add, %0_w) : X
  %add_1 = aten.add(%add, %linear) : X
  return (%add_1)"""
    )
    assert gm.meta["pruned"] == ("blocks.0", "blocks.1/mlp")


# 2. skips, and names that are refused


class Aside(nn.Module):
    """The first block also returns something that is no stream."""

    def __init__(self, function):
        super().__init__()
        self.blocks = nn.ModuleList([Calls(function), Mix()])

    def forward(self, x):
        x, aside = self.blocks[0](x)
        return self.blocks[1](x), aside


def read_twice(x):
    h = attend(x)
    return x + h, h * 2


def laid_out_otherwise(x):
    return attend(x).transpose(1, 2).contiguous().transpose(1, 2) + x


SKIPS = [
    (
        Aside(lambda x: (x + attend(x), attend(x).mean(-1))),
        "blocks.0",
        "a result of it is no residual of what enters it",
    ),
    (Aside(read_twice), "blocks.0/attention", "something else reads what it adds"),
    (Stack(laid_out_otherwise, Mix()), "blocks.0/attention", "what it adds to is laid out otherwise than the sum"),
]


@pytest.mark.parametrize(("model", "name", "reason"), SKIPS)
def test_what_cannot_leave_stays_with_a_reason(model, name, reason):
    gm = capture(model, X).shared()
    before = show(gm)
    report = apply(Prune((name,)), gm)
    assert (report.changed, skips(report)) == (0, [(name, reason)])
    assert (show(gm), gm.meta["pruned"]) == (before, ())


def test_a_block_whose_results_cannot_all_leave_may_lose_its_sublayers_none_the_less():
    model = Aside(lambda x: (x + attend(x), attend(x).mean(-1)))
    captured = capture(model, X)
    gm = captured.shared()
    assert apply(Prune(("blocks.0/attention",)), gm).changed == 1
    expected = model.blocks[1](X), attend(X).mean(-1)
    torch.testing.assert_close(gm(*captured.inputs), expected)


@pytest.mark.parametrize("name", ["blocks.2", "blocks.0/mpl", "block.0"])
def test_a_name_that_the_model_does_not_have(name):
    with pytest.raises(PlanError, match=f"prunes '{name}', which this model does not have: did you mean 'blocks"):
        apply(Prune((name,)), capture(Stack(Both(), Mix()), X).shared())


@pytest.mark.parametrize(
    "names", [("blocks.0", "blocks.1"), ("blocks.0/attention", "blocks.0/mlp", "blocks.1/attention")]
)
def test_not_every_block_can_leave(names):
    with pytest.raises(PlanError, match="prunes every block that the output depends on: leave at least one"):
        apply(Prune(names), capture(Stack(Both(), Mix()), X).shared())


# 3. edges


@pytest.mark.parametrize("model", [Stack(Feed()), lambda x: x + 1, lambda x: x])
def test_a_graph_without_blocks(model):
    gm = capture(model, X).shared()
    before = show(gm)
    assert apply(Prune(("blocks.0",)), gm).changed == 0
    assert show(gm) == before


def pruned(model, names, *args, dynamic=False):
    captured = capture(model, *args, dynamic=dynamic)
    gm = captured.shared()
    apply(Prune(names), gm)
    apply(GuardRegions("block"), copy_of(gm))  # streams that pruning joins must still suit a guard
    return gm, captured


def test_a_shared_weight_stays_for_the_block_that_is_left():
    model = Stack(Both(), Both())
    model.blocks[1].linear.weight = model.blocks[0].linear.weight
    gm, captured = pruned(model, ("blocks.0",), X)
    torch.testing.assert_close(gm(*captured.inputs)[0], model.blocks[1](X))


def test_the_block_is_the_output():
    model = Stack(Both(), Both())
    gm, captured = pruned(model, ("blocks.1",), X)
    torch.testing.assert_close(gm(*captured.inputs)[0], model.blocks[0](X))


class Skipping(nn.Module):
    """Block 2 reads what left block 0 twice: over block 1, and past it."""

    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Mix(), Mix(), Calls(lambda x, past: x + attend(x * past))])

    def forward(self, x):
        past = self.blocks[0](x)
        return self.blocks[2](self.blocks[1](past), past)


def test_a_stream_that_a_block_would_be_given_twice_is_copied():
    model = Skipping()
    gm, captured = pruned(model, ("blocks.1",), X)
    assert "aten.clone" in show(gm)
    past = model.blocks[0](X)
    torch.testing.assert_close(gm(*captured.inputs)[0], model.blocks[2](past, past))


def test_a_dynamic_size():
    model = Stack(Both(), Both())
    gm, captured = pruned(model, ("blocks.0/mlp",), X, dynamic=True)
    h = X + attend(X)
    torch.testing.assert_close(gm(*captured.inputs)[0], model.blocks[1](h))


def test_the_sublayers_that_stay_keep_their_names():
    def parallel(x):
        return x + attend(x) + attend(2 * x)

    gm = capture(Stack(parallel, parallel), X).shared()
    apply(Prune(("blocks.0/attention1",)), gm)
    apply(GuardRegions("sublayer"), gm)
    assert gm.meta["interface"].names == ("blocks.0/attention2", "blocks.1/attention1", "blocks.1/attention2")


def test_without_blocks_to_lose_nothing_changes():
    options = {"cache": "static", "level": "block"}
    captured = capture(tiny_dit(), torch.zeros(2, 16, 8), torch.ones(2))
    assert show(captured.rewritten(**options)) == show(captured.rewritten(**options, plan=plan_of()))
    for cache in ("off", "static"):
        found = predictions(compile_eagerly(tiny_dit(), {"cache": cache, "plan": plan_of()}), 3)
        assert torch.equal(found, predictions(compile_eagerly(tiny_dit(), {"cache": cache}), 3))


# Invariant 6: all that hung on a region is gone


def test_with_a_block_goes_all_that_hung_on_it():
    captured = capture(tiny_dit(), torch.zeros(2, 16, 8), torch.ones(2))
    options = {"quantize": "w8a8", "emulate": True, "cache": "static", "level": "sublayer"}
    heads = head_plan(np.full((2, 3, 4), FULL))
    whole, gm = (
        captured.rewritten(plan=plan_for(heads, pruned=names), **options)
        for names in ((), ("blocks.1", "blocks.2/mlp"))
    )
    left = {"blocks.0/attention", "blocks.0/mlp", "blocks.2/attention"}
    interfaces = whole.meta["interface"], gm.meta["interface"]
    assert [set(interface.names) for interface in interfaces] == [
        left | {"blocks.1/attention", "blocks.1/mlp", "blocks.2/mlp"},
        left,
    ]
    assert [len(interface.slots) for interface in interfaces] == [6, 3]
    assert [[layer.name for layer in interface.layers] for interface in interfaces] == [
        ["blocks.0.attn", "blocks.1.attn", "blocks.2.attn"],
        ["blocks.0.attn", "blocks.2.attn"],
    ]
    weights = [len(graph.meta["prepare"].meta["sources"]) for graph in (whole, gm)]
    assert weights == [12, 6]
    for graph, gone in ((whole, False), (gm, True)):
        read = [graph.meta["prepare"].meta["sources"], placeholders(graph.graph)]
        names = {n.name for i, n in enumerate(read[1]) if is_parameter(n) and (n.users or i in read[0])}
        assert (not any("blocks_modules_1_" in name for name in names)) == gone
        assert (not any("blocks_modules_2_modules_mlp" in name for name in names)) == gone


def nbytes(*modules):
    return sum(p.nbytes for module in modules for p in module.parameters())


@pytest.mark.parametrize("cache", ["off", "static"])
def test_exactly_the_bytes_of_what_is_pruned_leave(cache):
    model, args = tiny_dit(), (torch.zeros(2, 16, 8), torch.ones(2))
    options = {"cache": cache, "level": "block"}
    graphs = [
        explain(model, *args, options=options | {"plan": plan_of(*names)}).graphs[0]
        for names in ((), ("blocks.1", "blocks.2/mlp"))
    ]
    if cache == "off":
        assert graphs[0].runs == ()
        assert graphs[1].parameter_bytes == nbytes(model) - nbytes(model.blocks[1], model.blocks[2].mlp)
        return
    assert graphs[0].parameter_bytes == nbytes(model)
    assert graphs[0].parameter_bytes - graphs[1].parameter_bytes == nbytes(model.blocks[1], model.blocks[2].mlp)
    assert [graph.slot_bytes for graph in graphs] == [3 * 4096, 2 * 4096]


# 4. equivalence


def bypassed(model, names):
    """Returns the model in float64, whose blocks and MLPs of these names do nothing."""
    model = copy.deepcopy(model).double()
    for name in names:
        block, _, part = name.partition("/")
        number = int(block.removeprefix("blocks."))
        if part == "mlp":
            model.blocks[number].mlp.forward = torch.zeros_like
        elif part:
            model.blocks[number].attn.forward = torch.zeros_like
        else:
            model.blocks[number].forward = types.MethodType(lambda self, x, temb: x, model.blocks[number])
    return model


NAMES = [
    ("blocks.0",),
    ("blocks.2",),
    ("blocks.1/mlp",),
    ("blocks.0/attention", "blocks.1"),
    ("blocks.1/attention", "blocks.1/mlp"),
]


@pytest.mark.parametrize("names", NAMES)
@pytest.mark.parametrize("options", [{"cache": "off"}, {"cache": "static", "interval": 1, "level": "network"}])
def test_it_computes_what_the_model_without_them_does(names, options):
    model = tiny_dit()
    found = predictions(compile_eagerly(model, options | {"plan": plan_of(*names)}), 2)
    x, reference = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), bypassed(model, names)
    with torch.no_grad():
        expected = torch.stack(
            [reference((x * (1 - 0.1 * i)).double(), torch.full((2,), 1000.0 - 100 * i).double()) for i in range(2)]
        )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found, predictions(model, 2), atol=1e-3)


# 5. idempotence


def test_a_second_time_nothing_changes():
    gm = capture(Stack(Both(), Both()), X).shared()
    names = ("blocks.0", "blocks.1/mlp")
    assert apply(Prune(names), gm).changed == 2
    text = show(gm)
    assert apply(Prune(names), gm).changed == 0
    assert show(gm) == text


# 6. properties


def num_of(gm, wanted):
    return sum(map(wanted, (n for call in body_calls(gm) for n in body_of(gm, call).graph.nodes)))


def is_linear(node):
    return node.target is aten.linear.default


def fresh(whole):
    """Returns a copy of a graph whose bodies are copies too."""
    gm = copy_of(whole)
    for name in {call.args[1] for call in body_calls(whole)}:
        setattr(gm, name, copy_of(getattr(whole, name)))
    return gm


def test_random_transformers_without_random_regions():
    """15 models, 8 sets of regions each: the model as the plain reference runs it, and no operator more."""
    seen = []

    @settings(
        max_examples=15,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        phases=[Phase.explicit, Phase.reuse, Phase.generate],
    )
    @given(model_specs(), st.data())
    def check(spec, data):
        torch._dynamo.reset()
        model = RandomModel(spec)
        generator = torch.Generator().manual_seed(spec.seed)
        args = (
            torch.randn(BATCH, TOKENS, 4, generator=generator),
            torch.full((BATCH,), 500.0),
            torch.randn(BATCH, TEXT, spec.width, generator=generator),
        )
        captured = capture(model, *args)
        whole = captured.shared()
        parts = {}
        for call in body_calls(whole):
            found, _ = find_sublayers(body_of(whole, call), body_of(whole, call).meta["bases"])
            parts[call.meta["block"]] = dict(zip(sublayer_names(found), found))
        names = [f"{block}/{name}" for block, subs in parts.items() for name in subs]
        nothing: dict[str, list] = {name: [] for name in names}

        def run_without(compute):
            return Reference(model, "sublayer", compute, nothing, nothing)(*args)

        for number in range(8):
            sublayers = compress(names, data.draw(st.tuples(*[st.booleans()] * len(names))))
            block = data.draw(st.lists(st.sampled_from(list(parts)), max_size=1))
            chosen = {0: [], 1: [*parts, *names]}.get(number, [*block, *sublayers])
            compute = {n: n not in chosen and n.partition("/")[0] not in chosen for n in names}
            seen.append(tuple(compute.values()))
            expected = run_without(compute)
            read = [n for n in names if compute[n] and not torch.equal(run_without(compute | {n: False}), expected)]
            gm = fresh(whole)
            if not read:
                with pytest.raises(PlanError, match="every block"):
                    Prune(tuple(chosen)).run(gm)
                continue
            apply(Prune(tuple(chosen)), gm)
            with torch.no_grad():
                torch.testing.assert_close(gm(*captured.inputs)[0], expected, rtol=1e-5, atol=1e-5)
            kept = [call.meta["block"] for call in body_calls(gm)]
            assert (
                {n.partition("/")[0] for n in read} <= set(kept) <= {n.partition("/")[0] for n in names if compute[n]}
            )
            for wanted in (is_linear, is_attention):
                gone = [sub for block in kept for name, sub in parts[block].items() if not compute[f"{block}/{name}"]]
                calls = [call for call in body_calls(whole) if call.meta["block"] in kept]
                there = sum(map(wanted, (n for call in calls for n in body_of(whole, call).graph.nodes)))
                assert num_of(gm, wanted) == there - sum(map(wanted, (n for sub in gone for n in sub.nodes)))
            if number == 2:
                apply(GuardRegions("sublayer"), gm)
                left = {name for name in names if compute[name] and name.partition("/")[0] in kept}
                assert set(gm.meta["interface"].names) == left

    check()
    assert len(seen) >= 100
    assert sum(len(set(compute)) == 2 for compute in seen) > 15
