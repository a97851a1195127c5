import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from capture import apply, branches, capture, skips
from head_plans import BLANK, head_plan
from passes import GuardRegions, RewriteAttention
from qc_compiler.attention import FULL
from qc_compiler.formats import parse_format
from qc_compiler.graph import body_calls, cond, placeholders, submodules
from qc_compiler.options import parse_options
from qc_compiler.show import show
from qc_compiler.statistics import Statistic, ratios
from small_blocks import Feed, Mix, Modulated, Stack, attend
from tiny_models import tiny_dit

X = torch.arange(24.0).reshape(1, 2, 3, 4) / 24
LEVELS = ["network", "block", "sublayer"]


@pytest.fixture(scope="module")
def tiny():
    return capture(tiny_dit(3), torch.randn(2, 6, 8), torch.full((2,), 300.0))


def guarded(captured, level, **fields):
    gm = captured.shared()
    assert cond not in [node.target for node in gm.graph.nodes]
    apply(GuardRegions(level, **fields), gm)
    return gm


def call(gm, captured, compute, weights=None, slots=None, inputs=None):
    """Returns the outputs of the model, the statistics and the new slots of each region."""
    interface = gm.meta["interface"]
    if weights is None:
        weights = torch.ones(len(compute), interface.depth)
    if slots is None:
        slots = [
            torch.zeros(tuple(node.meta["val"].shape), dtype=node.meta["val"].dtype)
            for node in placeholders(gm.graph)
            if node.name.startswith("slot_")
        ]
    with torch.no_grad():
        produced = gm(*(inputs or captured.inputs), torch.tensor(compute), weights, *slots)
    outputs, rest = produced[: interface.num_outputs], produced[interface.num_outputs :]
    count = len(interface.regions)
    return outputs, torch.from_numpy(ratios(torch.stack(rest[:count]).numpy())), list(rest[count:])


# 1. golden


def without_sums(text):
    """Leaves the arithmetic of the sums out: it has a test of its own."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if "%abs_1 = " in line)
    end = next(i for i, line in enumerate(lines) if "%stack = " in line)
    return "\n".join([*lines[:start], "  …", *lines[end:]])


def test_golden():
    gm = capture(Stack(Mix()), X).shared()
    assert "cond" not in show(gm)
    report = apply(GuardRegions("block"), gm)
    assert (report.changed, report.skipped) == (1, ())
    text = without_sums(show(gm)).replace("f32[1, 2, 3, 4]", "X").replace("invoke_subgraph", "call")
    assert (
        text.replace("aten.empty.memory_format(", "aten.empty(")
        == """\
graph(%L_x_: X, %decisions: b1[1], %weights: f32[1, 1], %slot_0_0_0: X):
  %select_int = aten.select(%weights, 0, 0) : f32[1]
  %select_int_1 = aten.select(%decisions, 0, 0) : b1[]
  %body_0_guarded = get body_0_guarded
  %call = call(%body_0_guarded, body_0_guarded, %L_x_, %slot_0_0_0, %select_int, %select_int_1) : (X, X, f32[9])
  %getitem_2 = getitem(%call, 1) : X
  %getitem_1 = getitem(%call, 2) : f32[9]
  %getitem = getitem(%call, 0) : X
  return (%getitem, %getitem_1, %getitem_2)
body body_0_guarded(%arg0_1: X, %arg1_1: X, %arg2_1: f32[1], %predicate: b1[]):
  %compute = get compute
  %reuse = get reuse
  %cond = cond(%predicate, %compute, %reuse, (%arg0_1, %arg1_1, %arg2_1)) : (X, X, f32[9])
  %getitem = getitem(%cond, 0) : X
  %getitem_1 = getitem(%cond, 1) : X
  %getitem_2 = getitem(%cond, 2) : f32[9]
  return (%getitem, %getitem_1, %getitem_2)
body body_0_guarded.compute(%arg0_1: X, %arg1_1: X, %arg2_1: f32[1]):
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%arg0_1, %arg0_1, %arg0_1) : X
  %add = aten.add(%arg0_1, %scaled_dot_product_attention) : X
  %sub = aten.sub(%add, %arg0_1) : X
  …
  %stack = aten.stack((%sum_1, %sum_2, %sum_3, %sum_4, %sum_5, %sum_6, %sum_7, %ones, %ones)) : f32[9]
  return (%add, %sub, %stack)
body body_0_guarded.reuse(%arg0_1: X, %arg1_1: X, %arg2_1: f32[1]):
  %select = aten.select(%arg2_1, 0, 0) : f32[]
  %mul = aten.mul(%select, %arg1_1) : X
  %add = aten.add(%arg0_1, %mul) : X
  %empty = aten.empty((1, 2, 3, 4), dtype=torch.float32, device=cpu, pin_memory=False) : X
  %empty_1 = aten.empty((9), dtype=torch.float32, device=cpu, pin_memory=False) : f32[9]
  return (%add, %empty, %empty_1)"""
    )


def test_golden_of_the_network():
    gm = guarded(capture(Stack(Mix(), Mix()), X), "network")
    text = show(gm).split("\nbody")[0].replace("f32[1, 2, 3, 4]", "X").replace("invoke_subgraph", "call")
    assert (
        text
        == """\
graph(%L_x_: X, %decisions: b1[1], %weights: f32[1, 1], %slot_0_0_0: X):
  %select_int = aten.select(%weights, 0, 0) : f32[1]
  %select_int_1 = aten.select(%decisions, 0, 0) : b1[]
  %body_0_guarded = get body_0_guarded
  %call_1 = call(%body_0_guarded, body_0_guarded, %L_x_, %select_int_1) : (X)
  %getitem_1 = getitem(%call_1, 0) : X
  %body_0_guarded_1 = get body_0_guarded
  %call = call(%body_0_guarded_1, body_0_guarded, %getitem_1, %select_int_1) : (X)
  %getitem = getitem(%call, 0) : X
  %network_end = get network_end
  %call_2 = call(%network_end, network_end, %getitem, %L_x_, %slot_0_0_0, %select_int, %select_int_1) : (X, X, f32[9])
  %getitem_4 = getitem(%call_2, 0) : X
  %getitem_3 = getitem(%call_2, 1) : X
  %getitem_2 = getitem(%call_2, 2) : f32[9]
  return (%getitem_4, %getitem_2, %getitem_3)"""
    )


# 2. skips


def test_an_output_of_numbers_is_not_guarded():
    stack = Stack(Mix())
    gm = capture(lambda x: stack(x).argmax(dim=-1), X).shared()
    before = show(gm)
    report = apply(GuardRegions(None, output=True), gm)
    assert report.changed == 0
    assert skips(report) == [("output", "the model returns something else than floating point tensors")]
    assert "interface" not in gm.meta
    assert show(gm) == before


@pytest.mark.parametrize("keeps", [True, False])
def test_a_block_that_keeps_heads_is_guarded_as_a_whole(tiny, keeps):
    """Its slots are results of the block, which no sub-layer returns; without them sub-layers are found as ever."""
    gm = tiny.shared()
    heads = BLANK if keeps else head_plan(np.full((1, 3, 4), FULL))
    assert apply(RewriteAttention(parse_options({}), heads), gm).changed == 3
    report = apply(GuardRegions("sublayer"), gm)
    reason = "it keeps attention heads; the whole block is guarded instead"
    assert skips(report) == ([("blocks.0", reason)] if keeps else [])
    parts = ("",) if keeps else ("/attention", "/mlp")
    names = [region.name for region in gm.meta["interface"].regions]
    assert names == [f"blocks.{i}{part}" for i in range(3) for part in parts]


def test_a_block_without_sublayers_is_guarded_as_a_whole():
    """Its streams are joined and taken apart again, so no addition leads from what enters to what leaves."""

    def block(x):
        return torch.cat([attend(x)[:, :1], x[:, 1:]], dim=1)

    captured = capture(Stack(block), X)
    gm = captured.shared()
    report = apply(GuardRegions("sublayer"), gm)
    assert skips(report) == [("blocks.0", "no sub-layers found; the whole block is guarded instead")]
    assert [region.name for region in gm.meta["interface"].regions] == ["blocks.0"]
    torch.testing.assert_close(call(gm, captured, [True])[0][0], block(X))


def test_a_branch_without_work_is_no_sublayer():
    captured = capture(Stack(lambda x: x + attend(x) + 2 * x.sin()), X)
    gm = captured.shared()
    report = apply(GuardRegions("sublayer"), gm)
    ((where, reason),) = skips(report)
    assert where.startswith("blocks.0/")
    assert reason == "the added branch holds no linear, no convolution and no attention"
    assert [region.name for region in gm.meta["interface"].regions] == ["blocks.0/attention"]


# 3. edges


@pytest.mark.parametrize("level", [*LEVELS, None])
def test_a_graph_without_blocks(level):
    gm = capture(Stack(Feed()), X).shared()
    before = show(gm)
    report = apply(GuardRegions(level), gm)
    assert (report.changed, report.skipped) == (0, ())
    assert "interface" not in gm.meta
    assert show(gm) == before


def test_a_shared_weight():
    block = Modulated()
    stack = Stack(block, block)
    captured = capture(lambda x: stack(2 * x), X)
    gm = guarded(captured, "block")
    with torch.no_grad():
        torch.testing.assert_close(call(gm, captured, [True, True])[0][0], block(block(2 * X)))


@pytest.mark.parametrize("level", LEVELS)
def test_a_result_that_two_others_read_and_that_is_returned(level):
    class Tapped(Stack):
        def forward(self, x):
            first = self.blocks[0](2 * x)
            second = self.blocks[1](first)
            return second, first * 2, second

    model = Tapped(Mix(), Mix())
    captured = capture(model, X)
    gm = guarded(captured, level)
    found, _, _ = call(gm, captured, [True] * len(gm.meta["interface"].regions))
    for a, b in zip(found, model(X)):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("level", LEVELS)
def test_dynamic_sizes(level):
    model, x, t = tiny_dit(2), torch.randn(2, 5, 8), torch.full((2,), 300.0)
    captured = capture(model, x, t, dynamic=True)
    gm = guarded(captured, level, depth=2)
    longer = torch.randn(2, 7, 8)
    inputs = [7 if isinstance(value, int) and value == 5 else value for value in captured.inputs]
    inputs = [longer if value is x else value for value in inputs]
    count = len(gm.meta["interface"].regions)
    slots = [torch.zeros(2, 7, 32)] * (2 * count)
    (result,), _, fresh = call(gm, captured, [True] * count, torch.ones(count, 2), slots, inputs)
    with torch.no_grad():
        torch.testing.assert_close(result, model(longer, t), rtol=1e-5, atol=1e-6)
    repeated = [slot for new in fresh for slot in (new, torch.zeros_like(new))]
    (again,), _, _ = call(gm, captured, [False] * count, torch.ones(count, 2), repeated, inputs)
    torch.testing.assert_close(again, result, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("num_frames", [1, 3])
def test_statistics_are_those_of_their_definitions(num_frames):
    captured = capture(Stack(lambda x: x + attend(x)), torch.randn(2, 6, 8))
    gm = guarded(captured, "block", num_frames=num_frames)
    x = captured.inputs[0]
    old, y = torch.randn(2, 6, 8), x + attend(x)
    delta = y - x
    _, rows, (slot,) = call(gm, captured, [True], slots=[old])
    torch.testing.assert_close(slot, delta)
    video = delta.reshape(2, 3, 2, 8)
    moved, size = (video[:, 1:] - video[:, :-1]).abs().sum(), (video[:, 1:].abs() + video[:, :-1].abs()).sum()
    expected = {
        Statistic.GAMMA: delta.abs().mean() / x.abs().mean(),
        Statistic.CHANGE: (delta - old).abs().mean() / old.abs().mean(),
        Statistic.MAGNITUDE: delta.abs().mean() / old.abs().mean(),
        Statistic.COSINE: F.cosine_similarity(x.flatten(), y.flatten(), dim=0),
        Statistic.MOTION: moved / size if num_frames > 1 else torch.tensor(1.0),
    }
    torch.testing.assert_close(rows[0], torch.stack([expected[column] for column in Statistic]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("depth", [1, 3])
def test_the_interface_describes_the_inputs_and_outputs(tiny, level, depth):
    gm = guarded(tiny, level, output=True, depth=depth)
    interface = gm.meta["interface"]
    names = [region.name for region in interface.regions]
    inner = {
        "network": ["network"],
        "block": [f"blocks.{i}" for i in range(3)],
        "sublayer": [f"blocks.{i}/{kind}" for i in range(3) for kind in ("attention", "mlp")],
    }[level]
    assert names == ["output", *inner]
    added = [node.name for node in placeholders(gm.graph)][len(tiny.inputs) :]
    assert added[:2] == ["decisions", "weights"]
    assert len(added) == 2 + depth * len(interface.slots)
    _, rows, fresh = call(gm, tiny, [True] * len(names))
    assert rows.shape == (len(names), len(Statistic))
    assert [tuple(value.shape) for value in fresh] == [shape for slot in interface.slots for shape in slot.shapes]
    assert [slot.region for slot in interface.slots] == list(range(len(names)))


# 4. equivalence


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("storage", [None, parse_format("int8"), parse_format("fp8")])
def test_computing_equals_the_model(level, storage):
    model, args = tiny_dit(3), (torch.randn(2, 6, 8), torch.full((2,), 300.0))
    captured = capture(model, *args)
    gm = guarded(captured, level, depth=2, storage=storage)
    (result,), _, _ = call(gm, captured, [True] * len(gm.meta["interface"].regions))
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(arg.double() for arg in args))
    assert (result - exact).abs().max() <= 1e-5 * exact.abs().max()


@pytest.mark.parametrize("level", LEVELS)
def test_reusing_what_was_just_computed_equals_the_model(tiny, level):
    gm = guarded(tiny, level)
    count = len(gm.meta["interface"].regions)
    (result,), _, fresh = call(gm, tiny, [True] * count)
    (again,), _, _ = call(gm, tiny, [False] * count, slots=fresh)
    torch.testing.assert_close(again, result, rtol=1e-5, atol=1e-5)
    (other,), _, _ = call(gm, tiny, [False] * count, slots=[slot + 1 for slot in fresh])
    assert not torch.allclose(other, result, atol=1e-2)


# Invariant 3


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("storage", [None, parse_format("int8")])
def test_no_branch_returns_memory_of_its_inputs(tiny, level, storage):
    gm = guarded(tiny, level, depth=2, storage=storage)
    assert len(branches(gm)) >= 2
    for branch in branches(gm):
        kinds = [node.meta["val"] for node in placeholders(branch.graph)]
        operands = [torch.zeros(tuple(val.shape), dtype=val.dtype) for val in kinds]
        taken = {operand.untyped_storage().data_ptr() for operand in operands}
        for result in branch(*operands):
            storage = result.untyped_storage().data_ptr()
            assert storage not in taken
            taken.add(storage)


# 5. idempotence


@pytest.mark.parametrize("level", LEVELS)
def test_a_second_run_leaves_the_graph_alone(tiny, level):
    gm = guarded(tiny, level)
    before = show(gm)
    assert apply(GuardRegions(level), gm).changed == 0
    assert show(gm) == before


@pytest.mark.parametrize("level", LEVELS)
def test_blocks_of_one_structure_still_share_one_body(tiny, level):
    gm = guarded(tiny, level)
    assert len({call.args[1] for call in body_calls(gm) if call.args[1] != "network_end"}) == 1
    used = [name for name, _ in submodules(gm) if "." not in name]
    assert used == [name for name in used if name in ("body_0_guarded", "network_end")]
