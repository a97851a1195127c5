import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

from capture import apply, capture, skips
from driver import Driver
from head_plans import BLANK, DenseHeads, full_plan, head_plan, plan_for, run_steps
from passes import AllocateBits, RewriteAttention
from passes.rewrite_attention import MAX_BODIES
from qc_compiler import ops
from qc_compiler.attention import CACHED, FULL, WINDOW, arrow_mask
from qc_compiler.errors import PlanError
from qc_compiler.graph import body_calls, body_of, placeholders, submodules
from qc_compiler.options import parse_options
from qc_compiler.plan import HeadPlan, Plan
from qc_compiler.show import show
from small_blocks import Mix, Stack, attend
from tiny_models import compile_eagerly, tiny_dit

SDPA = torch.ops.aten.scaled_dot_product_attention.default
X = torch.randn(1, 2, 6, 4, generator=torch.Generator().manual_seed(0))
TEXT = torch.randn(1, 3, 8, generator=torch.Generator().manual_seed(1))


def rewrite(plan=BLANK, num_frames=1, **options):
    return RewriteAttention(parse_options(options), plan, num_frames)


def count(gm, target):
    return sum(n.target is target for graph in (gm, *(c for _, c in submodules(gm))) for n in graph.graph.nodes)


def cached_in(*rows, layers=None):
    """Returns a plan whose step 1 caches the heads that are set, a row a layer."""
    table = np.array(rows)
    return head_plan(np.stack([np.full(table.shape, FULL), np.where(table, CACHED, FULL)]), layers)


# 1. golden

MAIN = """\
graph(%L_x_: f32[1, 2, 6, 4], %modes: i32[1, 2, 2], %attends: b1[1]{slot}):
  %body_0 = get body_0
  %select_int = aten.select(%modes, 0, 0) : i32[2, 2]
"""


@pytest.mark.parametrize(
    ("heads", "golden"),
    [
        (
            [0, 0],
            MAIN.format(slot="")
            + """\
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_, %select_int) : (f32[1, 2, 6, 4])
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 6, 4]
  return (%getitem)
body body_0(%l_x_: f32[1, 2, 6, 4], %select_int: i32[2, 2]):
  %headwise_attention_default = quantcache.headwise_attention(%l_x_, %l_x_, %l_x_, %select_int, None, 0, 0.5) : f32[1, 2, 6, 4]
  %add = aten.add(%l_x_, %headwise_attention_default) : f32[1, 2, 6, 4]
  return (%add)""",
        ),
        (
            [0, 1],
            MAIN.format(slot=", %kept_0: f32[1, 1, 6, 4]")
            + """\
  %select_int_1 = aten.select(%attends, 0, 0) : b1[]
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_, %select_int, %select_int_1, %kept_0) : (f32[1, 2, 6, 4], f32[1, 1, 6, 4])
  %getitem_1 = getitem(%invoke_subgraph, 1) : f32[1, 1, 6, 4]
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 6, 4]
  return (%getitem, %getitem_1)
body body_0(%l_x_: f32[1, 2, 6, 4], %select_int: i32[2, 2], %select_int_1: b1[], %kept_0: f32[1, 1, 6, 4]):
  %headwise_attention_default = quantcache.headwise_attention(%l_x_, %l_x_, %l_x_, %select_int, %kept_0, 0, 0.5) : f32[1, 2, 6, 4]
  %store_heads_default = quantcache.store_heads(%headwise_attention_default, %select_int, 1) : f32[1, 1, 6, 4]
  %add = aten.add(%l_x_, %headwise_attention_default) : f32[1, 2, 6, 4]
  return (%add, %store_heads_default)""",
        ),
        (
            [1, 1],
            MAIN.format(slot=", %kept_0: f32[1, 2, 6, 4]")
            + """\
  %select_int_1 = aten.select(%attends, 0, 0) : b1[]
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_, %select_int, %select_int_1, %kept_0) : (f32[1, 2, 6, 4], f32[1, 2, 6, 4])
  %getitem_1 = getitem(%invoke_subgraph, 1) : f32[1, 2, 6, 4]
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 6, 4]
  return (%getitem, %getitem_1)
body body_0(%l_x_: f32[1, 2, 6, 4], %select_int: i32[2, 2], %select_int_1: b1[], %kept_0: f32[1, 2, 6, 4]):
  %headwise_attention_default = quantcache.headwise_attention(%l_x_, %l_x_, %l_x_, %select_int, %kept_0, 0, 0.5) : f32[1, 2, 6, 4]
  %store_heads_default = quantcache.store_heads(%headwise_attention_default, %select_int, 2) : f32[1, 2, 6, 4]
  %load_heads_default = quantcache.load_heads(%kept_0, %select_int) : f32[1, 2, 6, 4]
  %clone_default = aten.clone(%kept_0) : f32[1, 2, 6, 4]
  %transpose_int = aten.transpose(%load_heads_default, 1, 2) : f32[1, 6, 2, 4]
  %transpose_int_1 = aten.transpose(%headwise_attention_default, 1, 2) : f32[1, 6, 2, 4]
  %choose_default = quantcache.choose(%transpose_int, %transpose_int_1, %select_int_1) : f32[1, 6, 2, 4]
  %choose_default_1 = quantcache.choose(%clone_default, %store_heads_default, %select_int_1) : f32[1, 2, 6, 4]
  %transpose_int_2 = aten.transpose(%choose_default, 1, 2) : f32[1, 2, 6, 4]
  %add = aten.add(%l_x_, %transpose_int_2) : f32[1, 2, 6, 4]
  return (%add, %choose_default_1)""",
        ),
    ],
    ids=["none kept", "some", "all"],
)
def test_golden(heads, golden):
    gm = capture(Stack(Mix()), X).shared()
    assert count(gm, SDPA) == 1
    report = apply(rewrite(cached_in(heads, layers=["blocks.0"])), gm)
    assert (report.changed, report.skipped) == (1, ())
    assert show(gm) == golden


# 2. skips


def causal(x):
    return x + F.scaled_dot_product_attention(x, x, x, is_causal=True)


def masked(x):
    return x + F.scaled_dot_product_attention(x, x, x, attn_mask=torch.zeros(6, 6))


def dropping(x):
    return x + F.scaled_dot_product_attention(x, x, x, dropout_p=0.1)


def grouped(x):
    return x + F.scaled_dot_product_attention(x, x[:, :1], x[:, :1], enable_gqa=True)


def narrow(x):
    return x + torch.cat([F.scaled_dot_product_attention(x, x, x[..., :2])] * 2, dim=-1)


def crossing(x):
    return x + F.scaled_dot_product_attention(x, x[:, :, :3], x[:, :, :3])


CROSS = "it is cross-attention: its keys are other tokens than its queries"


@pytest.mark.parametrize(
    ("block", "x", "reason"),
    [
        (masked, X, "it has a mask"),
        (causal, X, "it is causal"),
        (dropping, X, "it drops out"),
        (lambda x: x + attend(x), X[0], "its queries have 3 axes, not (batch, heads, tokens, width)"),
        (grouped, X, "its heads share keys (grouped-query attention)"),
        (crossing, X, CROSS),
        (narrow, X, "its values are 2 wide, its queries 4"),
    ],
)
def test_skips(block, x, reason):
    gm = capture(Stack(block), x).shared()
    before = show(gm)
    assert count(gm, SDPA) == 1
    report = apply(rewrite(), gm)
    assert (report.changed, skips(report)) == (0, [("blocks.0", reason)])
    assert show(gm) == before


def test_a_symbolic_number_of_tokens():
    gm = capture(Stack(Mix(), Mix()), X, dynamic=True).shared()
    before, reason = show(gm), "its number of tokens is symbolic: compile with dynamic=False"
    report = apply(rewrite(), gm)
    assert (report.changed, skips(report)) == (0, [("blocks.0", reason), ("blocks.1", reason)])
    assert show(gm) == before


class Reads(nn.Module):
    """Blocks y = f(x, text) of a sample x (B, V, C)."""

    def __init__(self, *functions):
        super().__init__()
        self.blocks = nn.ModuleList(Block(function) for function in functions)

    def forward(self, x, text):
        for block in self.blocks:
            x = block(x, text)
        return x


class Block(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x, text):
        return self.function(x, text)


def mix(q, k=None, **options):
    """Attention with two heads over (B, S, C)."""
    k = q if k is None else k
    q, k = (x.unflatten(-1, (2, -1)).transpose(1, 2) for x in (q, k))
    return F.scaled_dot_product_attention(q, k, k, **options).transpose(1, 2).flatten(2)


def text_first(x, text):
    return x + mix(torch.cat([text, x], dim=1))[:, text.shape[1] :]


def text_last(x, text):
    return x + mix(torch.cat([x, text], dim=1))[:, : x.shape[1]]


def text_between(x, text):
    return x + mix(torch.cat([x[:, :2], text, x[:, 2:]], dim=1))[:, : x.shape[1]]


def of_text(x, text):
    return x + mix(text).mean(dim=1, keepdim=True)


def of_both(x, text):
    text = torch.cat([text, text], dim=1)
    return x + mix(x, text)


SAMPLE = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(2))
NEITHER = "text can only come first or last; the option text_tokens says where it is"
TIME = HeadPlan((), BLANK.windows, "time")


@pytest.mark.parametrize(
    ("block", "graph_pass", "reason"),
    [
        (of_both, rewrite(), CROSS),
        (of_text, rewrite(), f"its tokens are 3 text: {NEITHER}"),
        (text_between, rewrite(), f"its tokens are 2 vision + 3 text + 4 vision: {NEITHER}"),
        (text_last, rewrite(text_tokens=9), "text_tokens=9 leaves none of its 9 tokens to the image"),
        (text_last, rewrite(text_tokens=-10), "text_tokens=-10 leaves none of its 9 tokens to the image"),
        (text_last, rewrite(TIME), "its 6 vision tokens are not those of 1 frames"),
        (text_last, rewrite(TIME, 4), "its 6 vision tokens are not those of 4 frames"),
        (text_last, rewrite(TIME, 2, text_tokens=-2), "its 7 vision tokens are not those of 2 frames"),
    ],
)
def test_skips_by_tokens(block, graph_pass, reason):
    gm = capture(Reads(block), SAMPLE, TEXT).shared()
    before = show(gm)
    assert count(gm, SDPA) == 1
    report = apply(graph_pass, gm)
    assert (report.changed, skips(report)) == (0, [("blocks.0", reason)])
    assert show(gm) == before


def test_a_layer_that_the_plan_does_not_know():
    gm = capture(Stack(Mix(), Mix()), X).shared()
    with pytest.raises(PlanError, match="says nothing about the attention 'blocks.1'"):
        rewrite(cached_in([0, 1], layers=["blocks.0"])).run(gm)


def test_a_layer_that_the_plan_knows_with_another_number_of_heads():
    gm = capture(Stack(Mix()), X).shared()
    with pytest.raises(PlanError, match="blocks.0 has 2 heads, the plan is for another number"):
        rewrite(cached_in([0, 0, 1], layers=["blocks.0"])).run(gm)


# 3. edges


def run(gm, inputs, windows, rows=None, kept=()):
    """Runs a rewritten graph; `windows` and `rows` (A, H)."""
    modes = torch.tensor(np.stack([windows, np.full(np.shape(windows), -1) if rows is None else rows], 1))
    attends = modes[:, WINDOW].ne(CACHED).any(dim=1)
    with torch.no_grad():
        return gm(*inputs, modes.int(), attends, *kept)


@pytest.mark.parametrize(
    ("block", "options", "num_text"),
    [
        (text_first, {}, 3),
        (text_last, {}, -3),
        (text_between, {"text_tokens": 2}, 2),
        (text_last, {"text_tokens": -1}, -1),
        (text_last, {"text_tokens": 0}, 0),
    ],
)
def test_the_text_is_where_the_graph_or_the_user_says(block, options, num_text):
    captured = capture(Reads(block), SAMPLE, TEXT)
    gm = captured.shared()
    assert apply(rewrite(head_plan(np.full((1, 1, 2), FULL), ["blocks.0"]), **options), gm).changed == 1
    assert [site.num_text for site in gm.meta["layers"]] == [num_text]
    (found,) = run(gm, captured.inputs, [[1, 2]])

    masks = torch.stack([arrow_mask(9, num_text, w) for w in (1, 2)])
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        attention = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *qkv: attention(*qkv, attn_mask=masks))
        expected = block(SAMPLE, TEXT)
    torch.testing.assert_close(found, expected)
    assert not torch.allclose(found, block(SAMPLE, TEXT), atol=1e-3)


def test_blocks_alike_whose_text_is_elsewhere_get_bodies_of_their_own():
    """The very same block, given text and image in two orders: only the main graph tells them apart."""

    class Joined(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = nn.ModuleList(Block(lambda x, _: x + mix(x)) for _ in range(3))

        def forward(self, x, text):
            both = self.blocks[0](torch.cat([text, x], dim=1), text)
            both = torch.cat([both[:, 3:], both[:, :3]], dim=1)
            for block in (self.blocks[1], self.blocks[2]):
                both = block(both, text)
            return both[:, :6]

    captured = capture(Joined(), SAMPLE, TEXT)
    gm = captured.shared()
    names = [f"blocks.{i}" for i in range(3)]
    assert apply(rewrite(head_plan(np.full((1, 3, 2), FULL), names)), gm).changed == 3
    assert [site.num_text for site in gm.meta["layers"]] == [3, -3, -3]
    calls = body_calls(gm)
    assert [call.args[1] for call in calls] == ["body_0", "body_0_1", "body_0_1"]
    found = [n.args[5] for call in calls for n in body_of(gm, call).graph.nodes if n.target is ops.headwise_attention]
    assert found == [3, -3, -3]


def test_two_attentions_in_a_block():
    def twice(x):
        return x + attend(x) + attend(2 * x)

    captured = capture(Stack(twice, twice), X)
    gm = captured.shared()
    names = ["blocks.0", "blocks.0#2", "blocks.1", "blocks.1#2"]
    plan = cached_in([0, 1], [1, 1], [1, 0], [1, 1], layers=names)
    assert apply(rewrite(plan), gm).changed == 4
    assert [site.name for site in gm.meta["layers"]] == names
    assert [site.num_kept for site in gm.meta["layers"]] == [1, 2, 1, 2]
    assert len({call.args[1] for call in body_calls(gm)}) == 1
    rows = [[-1, 0], [0, 1], [0, -1], [0, 1]]
    slots = [torch.zeros(1, site.num_kept, 6, 4) for site in gm.meta["layers"]]
    result, *kept = run(gm, captured.inputs, np.full((4, 2), FULL), rows, slots)
    torch.testing.assert_close(result, twice(twice(X)))
    expected = [attend(X)[:, 1:], attend(2 * X), attend(twice(X))[:, :1], attend(2 * twice(X))]
    for ours, theirs in zip(kept, expected, strict=True):
        torch.testing.assert_close(ours, theirs)
    again, *_ = run(
        gm, captured.inputs, [[FULL, CACHED], [CACHED, CACHED], [CACHED, FULL], [CACHED, CACHED]], rows, kept
    )
    torch.testing.assert_close(again, result)


def test_an_attention_that_is_skipped_leaves_the_other_of_its_block():
    def both(x):
        return x + attend(x) + F.scaled_dot_product_attention(x, x, x, is_causal=True)

    gm = capture(Stack(both), X).shared()
    report = apply(rewrite(), gm)
    assert (report.changed, skips(report)) == (1, [("blocks.0#2", "it is causal")])
    assert count(gm, SDPA) == 1


def test_layers_that_keep_other_numbers_of_heads_get_bodies_of_their_own():
    captured = capture(tiny_dit(3), torch.zeros(2, 16, 8), torch.ones(2))
    gm = captured.shared()
    assert len({call.args[1] for call in body_calls(gm)}) == 1
    apply(rewrite(cached_in([0, 0, 0, 0], [0, 1, 0, 1], [1, 0, 1, 0])), gm)
    assert [call.args[1] for call in body_calls(gm)] == ["body_0", "body_0_1", "body_0_1"]
    assert [site.shape for site in gm.meta["layers"]] == [(2, 0, 16, 8), (2, 2, 16, 8), (2, 2, 16, 8)]
    slots = [node for node in placeholders(gm.graph) if node.name.startswith("kept_")]
    assert [(node.name, tuple(node.meta["val"].shape)) for node in slots] == [
        ("kept_1", (2, 2, 16, 8)),
        ("kept_2", (2, 2, 16, 8)),
    ]


def test_a_kind_of_block_gets_few_bodies_and_no_layer_too_small_a_slot():
    num_heads = 8
    wanted = [0, 1, 2, 3, 4, 5, 6, 8, 3]
    heads = [[i < n for i in range(num_heads)] for n in wanted]
    gm = capture(Stack(*(Mix() for _ in wanted)), X.repeat(1, 4, 1, 1)).shared()
    apply(rewrite(cached_in(*heads, layers=[f"blocks.{i}" for i in range(len(wanted))])), gm)
    given = [site.num_kept for site in gm.meta["layers"]]
    assert given == [1, 1, 3, 3, 5, 5, 8, 8, 3]
    assert len({call.args[1] for call in body_calls(gm)}) == MAX_BODIES


def test_bodies_are_separated_again_for_the_bits_of_their_weights():
    gm = capture(tiny_dit(4), torch.zeros(2, 16, 8), torch.ones(2)).shared()
    apply(rewrite(cached_in(*([1, i in (1, 2), 0, 0] for i in range(4)))), gm)
    parts = ("attn.qkv", "attn.out", "mlp.0", "mlp.2")
    apply(AllocateBits(6.0, {f"blocks.{i}.{part}": (4, 8)[i % 2] for i in range(4) for part in parts}), gm)
    bodies = [body_of(gm, call) for call in body_calls(gm)]
    stores = [n.args[2] for body in bodies for n in body.graph.nodes if n.target is ops.store_heads]
    assert stores == [1, 2, 2, 1]
    assert [set(body.meta["bits"].values()) for body in bodies] == [{4}, {8}, {4}, {8}]


class Wide(nn.Module):
    """A block with 4 heads in a model whose others have 2."""

    def forward(self, x):
        q = x.reshape(1, 4, 6, 2)
        return x + F.scaled_dot_product_attention(q, q, q).reshape(1, 2, 6, 4)


def test_layers_with_other_numbers_of_heads():
    captured = capture(Stack(Mix(), Wide()), X)
    gm = captured.shared()
    apply(rewrite(cached_in([1, 0, 0, 0], [0, 1, 1, 0], layers=["blocks.0", "blocks.1"])), gm)
    assert "%modes: i32[2, 2, 4]" in show(gm)
    assert [(site.num_heads, site.num_kept) for site in gm.meta["layers"]] == [(2, 1), (4, 2)]
    rows, windows = [[0, -1, 7, 7], [-1, 0, 1, -1]], [[FULL, 1, 7, 7], [1, FULL, 2, FULL]]
    slots = [torch.zeros(1, 1, 6, 4), torch.zeros(1, 2, 6, 2)]
    _, first, second = run(gm, captured.inputs, windows, rows, slots)
    torch.testing.assert_close(first, attend(X)[:, :1])
    assert second.shape == (1, 2, 6, 2)


def test_a_stream_keeps_its_layout_where_attention_comes_first():
    """Heads in front of tokens in memory, as the body's callers know it; ours has the tokens in front."""
    captured = capture(Stack(*[lambda x: attend(x) + x] * 2), X)
    plan = plan_for(cached_in([1, 1], [1, 1], layers=["blocks.0", "blocks.1"]))
    gm = captured.shared()
    apply(rewrite(plan.attention), gm)
    for call in body_calls(gm):
        results = body_of(gm, call).graph.output_node().args[0]
        assert [n.meta["val"].stride() for n in results] == [val.stride() for val in call.meta["val"]]
    captured.rewritten(plan=plan, cache="static", level="block", num_steps=2)  # verifies the branches of its guards


def test_a_model_without_blocks_is_left_alone():
    gm = capture(nn.Linear(4, 4).requires_grad_(False), X).shared()
    assert apply(rewrite(), gm).changed == 0
    assert "modes" not in show(gm)


# the order of time


@pytest.mark.parametrize(("block", "text"), [(text_first, 3), (text_last, -3)])
def test_in_the_order_of_time_windows_run_along_the_frames_of_a_place(block, text):
    frames, places = 3, 2
    captured = capture(Reads(block), SAMPLE, TEXT)
    gm = captured.shared()
    order = HeadPlan(("blocks.0",), np.full((1, 1, 1, 2), FULL, np.float32), "time")
    assert apply(rewrite(order, frames), gm).changed == 1
    (found,) = run(gm, captured.inputs, [[1, 2]])

    time_of = np.arange(frames * places).reshape(frames, places).T.ravel()  # vision tokens, frame by frame of a place
    place = torch.from_numpy(np.argsort(time_of))
    masks = torch.stack([arrow_mask(9, text, w) for w in (1, 2)])
    at = torch.cat([torch.arange(3), 3 + place] if text > 0 else [place, 6 + torch.arange(3)])
    masks = masks[:, at][:, :, at]
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        attention = F.scaled_dot_product_attention
        patch.setattr(F, "scaled_dot_product_attention", lambda *qkv: attention(*qkv, attn_mask=masks))
        expected = block(SAMPLE, TEXT)
    torch.testing.assert_close(found, expected)


# 4. equivalence


LEVELS = ("output", "network", "block", "sublayer", "output+block")


@pytest.mark.parametrize("level", LEVELS)
def test_full_heads_are_the_model_to_the_last_bit(level):
    options = {"plan": full_plan(3, 1), "cache": "static", "interval": 1, "level": level}
    drivers = [Driver(1, **options, disable=names) for names in ((), ("rewrite-attention",))]
    assert [len(driver.graph.interface.layers) for driver in drivers] == [1, 0]
    found, expected = (run_steps(driver, 3) for driver in drivers)
    assert all(map(torch.equal, found, expected))


def test_full_heads_of_a_quantized_model_are_the_quantized_model_to_the_last_bit():
    options = {"plan": full_plan(2, 1), "cache": "static", "interval": 1, "level": "block", "quantize": "w8a8"}
    model, results = tiny_dit(1), []
    for names in ((), ("rewrite-attention",)):
        torch._dynamo.reset()
        results.append(run_steps(compile_eagerly(model, options | {"emulate": True, "disable": names}), 2))
    assert all(map(torch.equal, *results))


def test_full_heads_that_are_kept_are_the_model_to_the_last_bit():
    table = np.full((3, 1, 4), FULL)
    table[2] = CACHED
    kept = Driver(1, plan=plan_for(head_plan(table)), cache="static", interval=1, level="block")
    plain = Driver(1, cache="static", interval=1, level="block")
    found, expected = run_steps(kept, 3), run_steps(plain, 3)
    assert all(map(torch.equal, found[:2], expected[:2]))
    assert not torch.equal(found[2], expected[2])


MIXTURES = {  # (steps, layers, heads)
    "arrows": np.tile([0.2, 0.5, 1.0, FULL], (3, 2, 1)),
    "some cached": [[[FULL] * 4] * 2, [[0, 0.25, FULL, 1.5], [0.5, 0, 0, 0]], [[0.1, 0.25, 0, FULL], [0.5, 0, 0, 0]]],
    "all cached": [[[0.3] * 4] * 2, [[0] * 4] * 2, [[0] * 4, [0.3] * 4]],
    "cached at the first step": [[[0] * 4, [0, FULL, FULL, 0.5]], [[0] * 4] * 2, [[FULL] * 4] * 2],
}


def assert_close(found, expected):
    torch.testing.assert_close(torch.stack(found).double(), torch.stack(expected), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("name", "level"),
    [
        *((name, "block") for name in MIXTURES),
        ("some cached", "output"),
        ("some cached", "network"),
        ("all cached", "output"),
    ],
)
def test_mixtures_are_the_dense_reference(name, level):
    model, windows = tiny_dit(2), np.array(MIXTURES[name])
    driver = Driver(2, cache="static", interval=1, level=level, plan=plan_for(head_plan(windows)))
    found, full = run_steps(driver, 3), run_steps(model, 3)
    assert_close(found, run_steps(DenseHeads(model, windows), 3))
    assert not torch.allclose(found[1], full[1], atol=1e-3)


@functools.cache
def steerable():
    """A graph that keeps every head of every layer: any plan may steer it."""
    driver = Driver(2, cache="static", interval=1, level="block", plan=Plan.without_schedule("", attention=BLANK))
    return driver, tiny_dit(2)


SHARES = st.sampled_from([FULL, CACHED, CACHED, 0.05, 0.2, 0.5, 1.0, 1.9])


@settings(deadline=None, max_examples=40)
@given(npst.arrays(np.float32, (4, 2, 4), elements=SHARES), npst.arrays(np.bool_, (4, 2)), st.booleans())
def test_any_plan_is_the_dense_reference(windows, compute, has_schedule):
    """A block that is reused computes no heads and keeps those it has."""
    compute[0] = True
    driver, model = steerable()
    driver.runtime.configure(plan=plan_for(head_plan(windows), compute if has_schedule else None))
    driver.runtime.reset()
    reference = DenseHeads(model, windows, compute if has_schedule else None)
    assert_close(run_steps(driver, 4), run_steps(reference, 4))


def test_the_order_of_time_is_the_dense_reference_with_permuted_tokens():
    model, windows = tiny_dit(2), np.array(MIXTURES["some cached"])
    driver = Driver(2, cache="off", plan=plan_for(head_plan(windows, order="time")), num_frames=4)
    found = run_steps(driver, 3)
    order = np.arange(16).reshape(4, 4).T.ravel()
    assert_close(found, run_steps(DenseHeads(model, windows, order=order), 3))
    raster = run_steps(DenseHeads(model, windows), 3)
    assert not torch.allclose(found[1].double(), raster[1], atol=1e-3)


# what all heads of a layer need is not computed where all are cached


def test_a_cached_layer_does_not_read_the_weights_of_its_queries_keys_and_values():
    captured = capture(tiny_dit(1), torch.randn(2, 16, 8), torch.ones(2))
    gm = captured.rewritten(plan=plan_for(cached_in([1, 1, 1, 1])), cache="static", level="block")
    names = [node.name for node in placeholders(gm.graph)]
    modes = torch.tensor([[[FULL] * 4, [0, 1, 2, 3]]], dtype=torch.int32)

    def call(inputs, window, kept):
        modes[:, WINDOW] = window
        steering = torch.ones(1, dtype=torch.bool), torch.ones(1, 1), torch.zeros(2, 16, 32)
        with torch.no_grad():
            return gm(*inputs, modes, torch.tensor([window != CACHED]), kept, *steering)[:2]

    result, kept = call(captured.inputs, FULL, torch.zeros(2, 4, 16, 8))
    spoiled = [x * torch.nan if "qkv" in name else x for name, x in zip(names, captured.inputs)]
    again, same = call(spoiled, CACHED, kept)
    assert torch.equal(again, result)
    assert torch.equal(same, kept)
    assert call(spoiled, FULL, kept)[0].isnan().all()


def test_a_cached_layer_does_not_quantize_for_its_queries_keys_and_values():
    """Their linear, the quantizer of its input and the choice of its precision stand in the branch not taken."""
    gm = capture(tiny_dit(1), torch.randn(2, 16, 8), torch.ones(2)).rewritten(
        plan=plan_for(cached_in([1, 1, 1, 1])), cache="static", level="block", quantize="dmpq", emulate=True
    )
    called = {
        name: {str(node.target).split(".")[1] for node in child.graph.nodes if "." in str(node.target)}
        for name, child in submodules(gm)
    }
    (attends,) = (name for name, targets in called.items() if "headwise_attention" in targets)
    cached = attends.removesuffix("high") + "low"
    assert called[cached] == {"load_heads", "clone", "transpose"}
    inside = set.union(*(targets for name, targets in called.items() if name.startswith(attends)))
    assert {"layer_norm", "linear", "round", "amax", "store_heads"} <= inside


# 5. idempotence


@pytest.mark.parametrize("plan", [BLANK, cached_in([0, 0, 0, 0], [0, 1, 0, 1]), TIME])
def test_idempotence(plan):
    gm = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared()
    assert apply(rewrite(plan, 4), gm).changed == 2
    before = show(gm)
    assert apply(rewrite(plan, 4), gm).changed == 0
    assert show(gm) == before
