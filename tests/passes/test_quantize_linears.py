import functools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from capture import apply, capture, skips
from passes import LowerLinears, Normalize, PrepareWeights, QuantizeLinears, ShareBodies
from qc_compiler.errors import PlanError
from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import PLAIN, SCHEMES, Scheme, recipe_of
from qc_compiler.graph import body_calls, body_of, is_tensor, placeholders
from qc_compiler.ops import dequantize, quantize
from qc_compiler.show import show
from small_blocks import Mix, Modulated, Stack
from tiny_models import tiny_dit

W8A8 = QuantizeLinears((SCHEMES["w8a8"],), emulate=True)
X = torch.arange(192.0).reshape(1, 2, 3, 32) / 192


def count(gm, target):
    return sum(n.target is target for n in gm.graph.nodes)


# 1. golden


def test_golden():
    gm = capture(Stack(Modulated(32)), X).shared()
    assert "quantize" not in show(gm)
    report = apply(W8A8, gm)
    assert (report.changed, report.skipped) == (1, ())
    weight = "L_self_modules_blocks_modules_0_modules_query_parameters_weight_"
    assert (
        show(gm)
        == f"""\
graph(%L_x_: f32[1, 2, 3, 32], %{weight}: f32[32, 32]):
  %quantize_default = quantcache.quantize(%{weight}, int8) : (i8[32, 32], f32[32, 1])
  %getitem_2 = getitem(%quantize_default, 0) : i8[32, 32]
  %getitem_1 = getitem(%quantize_default, 1) : f32[32, 1]
  %body_0 = get body_0
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_, %getitem_2, %getitem_1) : (f32[1, 2, 3, 32])
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 3, 32]
  return (%getitem)
body body_0(%l_x_: f32[1, 2, 3, 32], %getitem_2: i8[32, 32], %getitem_1: f32[32, 1]):
  %layer_norm = aten.layer_norm(%l_x_, (32)) : f32[1, 2, 3, 32]
  %mul = aten.mul(%layer_norm, 2) : f32[1, 2, 3, 32]
  %quantize_default = quantcache.quantize(%mul, uint8) : (u8[1, 2, 3, 32], f32[1, 2, 3, 1], f32[1, 2, 3, 1])
  %getitem_4 = getitem(%quantize_default, 0) : u8[1, 2, 3, 32]
  %getitem_3 = getitem(%quantize_default, 1) : f32[1, 2, 3, 1]
  %getitem = getitem(%quantize_default, 2) : f32[1, 2, 3, 1]
  %dequantize_default = quantcache.dequantize((%getitem_4, %getitem_3, %getitem), uint8, torch.float32) : f32[1, 2, 3, 32]
  %dequantize_default_1 = quantcache.dequantize((%getitem_2, %getitem_1), int8, torch.float32) : f32[32, 32]
  %linear_default = aten.linear(%dequantize_default, %dequantize_default_1) : f32[1, 2, 3, 32]
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%linear_default, %l_x_, %l_x_) : f32[1, 2, 3, 32]
  %add = aten.add(%l_x_, %scaled_dot_product_attention) : f32[1, 2, 3, 32]
  return (%add)"""
    )


# 2. skips


class Attends(nn.Module):
    """y = x + attention(f(x)), for any f of a weight."""

    def __init__(self, function, *size):
        super().__init__()
        self.weight, self.function = nn.Parameter(torch.ones(*size)), function

    def forward(self, x):
        h = self.function(F.layer_norm(x, x.shape[-1:]), self.weight)
        return x + F.scaled_dot_product_attention(h, x, x)


def pooled(x, w):
    return x + F.linear(x.mean(dim=-2, keepdim=True), w)


@pytest.mark.parametrize(
    ("function", "size", "reason"),
    [
        (lambda x, w: F.linear(x, w * 2), (32, 32), "its weight is computed, not a parameter"),
        (lambda x, w: F.linear(F.linear(x, w), w), (32, 32), "its weight has another use"),
        (pooled, (32, 32), "it sees one row a sample (modulation): there is little to gain and much to lose"),
        (lambda x, w: x + F.linear(F.linear(x, w), w.T.contiguous()), (16, 32), "its weight has another use"),
    ],
)
def test_skips(function, size, reason):
    gm = capture(Stack(Attends(function, *size)), X).shared()
    before = show(gm)
    report = apply(W8A8, gm)
    assert report.changed == 0
    assert ("blocks.0", reason) in skips(report)
    assert show(gm) == before


def test_what_is_narrow_is_left_alone():
    gm = capture(Stack(Modulated(8)), X[..., :8]).shared()
    report = apply(W8A8, gm)
    assert (report.changed, skips(report)) == (0, [("blocks.0.query", "it is only 8 wide")])


def test_a_scheme_without_kernel_is_left_alone_unless_emulated():
    gm = capture(Stack(Modulated(32)), X).shared()
    report = apply(QuantizeLinears((SCHEMES["fp8"],)), gm)
    ((where, reason),) = skips(report)
    assert where == "blocks.0.query"
    assert reason.startswith("no kernel multiplies fp8 with fp8 on cpu: option emulate=True")
    assert apply(QuantizeLinears((SCHEMES["fp8"],), emulate=True), gm).changed == 1


def test_a_slower_kernel_is_left_alone(monkeypatch):
    monkeypatch.setattr("qc_compiler.kernels.timing.seconds", lambda *_: (1e-3, 2e-3))
    gm = capture(Stack(Modulated(32)), X).shared()
    ((_, reason),) = skips(apply(QuantizeLinears((SCHEMES["w8a8"],)), gm))
    assert reason == "oneDNN int8 is slower here: 2.00 ms with its quantizer against 1.00 ms for 6 × 32 × 32 in float32"


def test_what_stands_outside_the_blocks_is_named():
    report = apply(W8A8, capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared())
    assert skips(report)[:3] == [
        ("time", "timestep embedding or modulation, outside the blocks: it stays in the model's precision"),
        ("embed", "embedding, outside the blocks: it stays in the model's precision"),
        ("head", "final layer, outside the blocks: it stays in the model's precision"),
    ]


# 3. edges


class InSequence(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(32, 64), nn.Linear(64, 32)

    def forward(self, x):
        return x + F.scaled_dot_product_attention(self.second(self.first(x)), x, x)


@pytest.mark.parametrize("name", ["w8a8", "w8a8+rotation+rank4", "dmpq"])
def test_a_linear_that_reads_another_one(name):
    gm = capture(Stack(InSequence()), X).shared()
    assert apply(QuantizeLinears(recipe_of(name).schemes, emulate=True), gm).changed == 2


class Projections(nn.Module):
    def __init__(self, same):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))
        self.same = same

    def forward(self, x):
        h = F.layer_norm(x, x.shape[-1:])
        return x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h if self.same else x))


@pytest.mark.parametrize(("same", "quantizers"), [(True, 1), (False, 2)])
def test_linears_that_read_the_same_share_its_quantizer(same, quantizers):
    gm = capture(Stack(Projections(same), Projections(same)), X).shared()
    assert apply(W8A8, gm).changed == 6
    body = body_of(gm, body_calls(gm)[0])
    assert count(body, quantize) == quantizers
    assert count(body, dequantize) == quantizers + 3


def test_a_model_without_blocks_is_left_alone():
    gm = capture(nn.Linear(32, 32).requires_grad_(False), X).shared()
    assert apply(W8A8, gm).changed == 0


def test_dynamic_sizes():
    gm = capture(Stack(Modulated(32), Mix()), X, dynamic=True).shared()
    assert apply(W8A8, gm).changed == 1


# 4. equivalence, 6. properties


SCHEME_CASES = [*SCHEMES.values(), Scheme("int8", "int8"), Scheme("int4/64", "uint4/64")]


@functools.cache
def case(scheme, dtype):
    """Returns a model, the graph after the pass, and its inputs."""
    torch._dynamo.reset()
    model = Stack(Modulated(32)).to(dtype)
    captured = capture(model, X.to(dtype))
    gm = captured.shared()
    apply(QuantizeLinears((scheme,), emulate=True), gm)
    return model, gm, captured.inputs


@settings(deadline=None)
@given(
    st.sampled_from(SCHEME_CASES),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1e-3, 1.0, 100.0]),
)
def test_the_graph_computes_what_the_formats_say(scheme, dtype, seed, outlier):
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
    x[0, 1, 2, 3] = outlier
    x = x.to(dtype)
    model, gm, inputs = case(scheme, dtype)
    with torch.no_grad():
        (found,) = gm(x, *inputs[1:])
        h = parse_format(scheme.activation).round_trip(F.layer_norm(x, (32,)) * 2)
        w = parse_format(scheme.weight).round_trip(model.blocks[0].query.weight)
        expected = x + F.scaled_dot_product_attention(F.linear(h, w), x, x)
    assert torch.equal(found, expected)


ADDITIONS = ["w4a6+rotation", "nvfp4+rank8", "w4a6+rotation+rank8", "dmpq+rotation+rank8"]


def with_outliers():
    model = tiny_dit(2)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp[0].weight[:, 3] *= 30
    return model


@pytest.mark.parametrize("name", ADDITIONS)
def test_without_rounding_additions_change_nothing(name, monkeypatch):
    """Rotation and low-rank branch cancel: with formats that do not round, the model is what it was."""
    monkeypatch.setattr("qc_compiler.formats.base.Format.round_trip", None)
    for kind in ("integer.Integer", "integer.IntegerWithZero", "nvfp4.NVFP4"):
        monkeypatch.setattr(
            f"qc_compiler.formats.{kind}.quantize",
            lambda form, x: tuple(x.float().clone() for _ in range(form.num_parts)),
        )
        monkeypatch.setattr(f"qc_compiler.formats.{kind}.dequantize", lambda form, codes, *_: codes + 0)
    captured = capture(with_outliers(), torch.randn(2, 16, 8), torch.ones(2))
    gm = captured.shared()
    with torch.no_grad():
        (expected,) = gm(*captured.inputs)
        apply(QuantizeLinears(recipe_of(name).schemes, emulate=True), gm)
        flags = [torch.zeros(8, 1, dtype=torch.bool)] * name.startswith("dmpq")
        (found,) = gm(*captured.inputs, *flags)
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.parametrize("name", ["w4a6+rotation", "w4a6+rank8"])
def test_additions_help_where_there_are_outliers(name):
    captured = capture(
        with_outliers(), torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2)
    )
    errors = []
    with torch.no_grad():
        (expected,) = captured.shared()(*captured.inputs)
        for scheme in ("w4a6", name):
            gm = captured.shared()
            apply(QuantizeLinears(recipe_of(scheme).schemes, emulate=True), gm)
            errors.append(float((gm(*captured.inputs)[0] - expected).norm()))
    assert errors[1] < errors[0]


# 5. idempotence


@pytest.mark.parametrize("name", ADDITIONS)
def test_idempotence_of_additions(name):
    gm = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared()
    assert apply(QuantizeLinears(recipe_of(name).schemes, emulate=True), gm).changed == 8
    before = show(gm)
    assert apply(QuantizeLinears(recipe_of(name).schemes, emulate=True), gm).changed == 0
    assert show(gm) == before


def test_idempotence():
    gm = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared()
    assert apply(W8A8, gm).changed == 8
    before = show(gm)
    again = apply(W8A8, gm)
    assert again.changed == 0
    assert show(gm) == before


# balancing: x / s and w·s take the place of x and w


MUL = torch.ops.aten.mul.Tensor
W8A8_BALANCED = recipe_of("w8a8+balance").schemes


def amax_of(*names, blocks=2, width=32):
    """Returns made-up ranges, different for each linear's block; one channel is always zero."""
    generator, found = torch.Generator().manual_seed(1), {}
    for i in range(blocks):
        amax = torch.rand(width, generator=generator) * 20
        amax[3] = 0
        found |= {f"blocks.{i}.{name}": amax for name in names}
    return found


def balanced_by_hand(model, x, amax, scheme):
    """Returns what a stack of `Projections` computes with SmoothQuant's s, written out."""
    activation, weight = parse_format(scheme.activation), parse_format(scheme.weight)
    for i, block in enumerate(model.blocks):
        linears = (block.q, block.k, block.v)
        largest = torch.stack([linear.weight.abs().amax(dim=0) for linear in linears]).amax(dim=0)
        s = torch.where(amax[f"blocks.{i}.q"] > 0, amax[f"blocks.{i}.q"] ** 0.5 / largest**0.5, 1.0)
        h = activation.round_trip(F.layer_norm(x, (32,)) * (1 / s))
        q, k, v = (F.linear(h, weight.round_trip(linear.weight * s), linear.bias) for linear in linears)
        x = x + F.scaled_dot_product_attention(q, k, v)
    return x


@pytest.mark.parametrize("scheme", [*W8A8_BALANCED, Scheme("int4/128", "uint6", balance=True)])
def test_balancing_computes_what_is_written_by_hand(scheme):
    model, amax = Stack(Projections(True), Projections(True)), amax_of("q", "k", "v")
    captured = capture(model, X)
    gm = captured.shared()
    apply(QuantizeLinears((scheme,), True, amax), gm)
    with torch.no_grad():
        (found,) = gm(*captured.inputs)
        assert torch.equal(found, balanced_by_hand(model, X, amax, scheme))
        unbalanced = captured.shared()
        apply(QuantizeLinears((replace(scheme, balance=False),), True), unbalanced)
        assert not torch.equal(found, unbalanced(*captured.inputs)[0])


@pytest.mark.parametrize(("same", "divisions"), [(True, 1), (False, 2)])
def test_linears_that_read_the_same_share_its_division_and_its_quantizer(same, divisions):
    gm = capture(Stack(Projections(same), Projections(same)), X).shared()
    assert count(body_of(gm, body_calls(gm)[0]), MUL) == 0
    assert apply(QuantizeLinears(W8A8_BALANCED, True, amax_of("q", "k", "v")), gm).changed == 6
    body = body_of(gm, body_calls(gm)[0])
    assert (count(body, MUL), count(body, quantize)) == (divisions, divisions)
    assert sum(n.op == "get_attr" and is_tensor(n) for n in gm.graph.nodes) == 2 * divisions


def test_the_ranges_move_out_of_the_graph_with_the_weights():
    captured = capture(Stack(Projections(True), Projections(True)), X)
    balance = QuantizeLinears(W8A8_BALANCED, True, amax_of("q", "k", "v"))
    gm = captured.after(Normalize(), ShareBodies(), balance, LowerLinears(emulate=True))
    assert "amax_blocks_0_q" in show(gm)
    with torch.no_grad():
        (expected,) = gm(*captured.inputs)
        assert apply(PrepareWeights(), gm).changed == 8  # three weights and one 1 / s, in two blocks
        prepare = gm.meta["prepare"]
        (found,) = gm(*captured.inputs, *prepare(*(captured.inputs[i] for i in prepare.meta["sources"])))
    assert torch.equal(found, expected)
    main, _, _ = show(gm).partition("\nbody")
    assert "amax" not in main
    assert not [n for n in gm.graph.nodes if n.op == "get_attr" and is_tensor(n)]
    assert {n.target for n in prepare.graph.nodes if n.op == "get_attr"} == {"amax_blocks_0_q", "amax_blocks_1_q"}


def test_balancing_helps_where_channels_of_the_activations_stand_out():
    class Outliers(Projections):
        def forward(self, x):
            h = F.layer_norm(x, x.shape[-1:]) * torch.where(torch.arange(32) == 5, 100.0, 1.0)
            return x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(h))

    model = Stack(Outliers(True))
    for linear in (model.blocks[0].q, model.blocks[0].k, model.blocks[0].v):
        linear.weight[:, 5] /= 100
    captured = capture(model, X)
    h = (F.layer_norm(X, (32,)) * torch.where(torch.arange(32) == 5, 100.0, 1.0)).abs().amax(dim=(0, 1, 2))
    amax = {f"blocks.0.{name}": h for name in "qkv"}
    errors = []
    with torch.no_grad():
        for balance in (False, True):
            gm = captured.shared()
            apply(QuantizeLinears((Scheme("int8", "uint6", balance=balance),), True, amax), gm)
            errors.append(float((gm(*captured.inputs)[0] - model(X)).norm()))
    assert errors[1] < errors[0] / 4


@pytest.mark.parametrize("amax", [{}, {"blocks.0.query": torch.ones(31)}, {"blocks.1.query": torch.ones(32)}])
def test_a_plan_without_the_range_of_a_linear_is_refused(amax):
    gm = capture(Stack(Modulated(32)), X).shared()
    with pytest.raises(PlanError, match=r"no range for each input channel of blocks\.0\.query: calibrate this model"):
        QuantizeLinears(W8A8_BALANCED, True, amax).run(gm)


# a choice of several schemes, of which the highest may leave the activations plain


def flags_of(gm, choice):
    """Returns the input `precision` that gives every site this choice."""
    return (choice > torch.arange(gm.meta["num_choices"] - 1)).expand(len(gm.meta["sites"]), -1).clone()


@pytest.mark.parametrize(
    ("name", "activations"),
    [
        ("w8a8+online", ("uint4", "uint6", "uint8", None)),
        ("w4a6+inverse", ("uint4", "uint6", "uint8", None)),
        ("w8a8+online+balance", ("uint4", "uint6", "uint8", None)),
    ],
)
def test_of_four_choices_the_highest_leaves_activations_as_they_are(name, activations):
    model, amax = Stack(Projections(True), Projections(True)), amax_of("q", "k", "v")
    captured, schemes = capture(model, X), recipe_of(name).schemes
    gm = captured.shared()
    apply(QuantizeLinears(schemes, True, amax), gm)
    assert (gm.meta["num_choices"], [site.name for site in gm.meta["sites"]]) == (4, ["blocks.0.q", "blocks.1.q"])
    assert tuple(placeholders(gm.graph)[-1].meta["val"].shape) == (2, 3)
    body = body_of(gm, body_calls(gm)[0])
    assert count(body, quantize) == 3
    assert sum(n.target is quantize for n in gm.graph.nodes) == 6  # each weight once, whatever the activations are
    weight = parse_format(schemes[0].weight)
    for choice, form in enumerate(activations):
        with torch.no_grad():
            (found,) = gm(*captured.inputs, flags_of(gm, choice))
            x = X
            for i, block in enumerate(model.blocks):
                linears, h = (block.q, block.k, block.v), F.layer_norm(x, (32,))
                s = torch.ones(32)
                if schemes[0].balance:
                    largest = torch.stack([linear.weight.abs().amax(dim=0) for linear in linears]).amax(dim=0)
                    s = torch.where(amax[f"blocks.{i}.q"] > 0, amax[f"blocks.{i}.q"] ** 0.5 / largest**0.5, 1.0)
                h = h * (1 / s)
                h = h if form is None else parse_format(form).round_trip(h)
                q, k, v = (F.linear(h, weight.round_trip(linear.weight * s), linear.bias) for linear in linears)
                x = x + F.scaled_dot_product_attention(q, k, v)
        assert torch.equal(found, x), choice


def test_plain_activations_meet_the_weight_that_the_kernel_stores(kernels_win, monkeypatch):
    """A CPU without VNNI stores fewer codes: of one weight there is one copy, in the kernel's format."""
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)
    gm = capture(Stack(Modulated(32)), X).shared()
    assert apply(QuantizeLinears((SCHEMES["w8a8"], Scheme("int8", PLAIN))), gm).changed == 1
    assert [n.args[1] for n in gm.graph.nodes if n.target is quantize] == ["int8/m63"]
    body = body_of(gm, body_calls(gm)[0])
    assert [n.args[1] for n in body.graph.nodes if n.target is dequantize] == ["uint8", "int8/m63", "int8/m63"]


@pytest.mark.parametrize("name", ["w8a8+balance", "w4a6+balance+rotation+rank8", "w8a8+online", "dmpq+balance"])
def test_idempotence_of_balancing_and_choices(name):
    gm = capture(Stack(Projections(True), Projections(False)), X).shared()
    quantizer = QuantizeLinears(recipe_of(name).schemes, True, amax_of("q", "k", "v"))
    assert apply(quantizer, gm).changed == 6
    before = show(gm)
    assert apply(quantizer, gm).changed == 0
    assert show(gm) == before


def test_a_linear_of_a_graph_that_is_one_block_is_named_behind_the_block():
    gm = capture(Projections(True).requires_grad_(False), X).shared()
    amax = {f"block.{name}": torch.ones(32) for name in "qkv"}
    assert apply(QuantizeLinears(W8A8_BALANCED, True, amax), gm).changed == 3


def test_a_linear_that_stands_in_the_block_itself_has_the_name_of_the_block():
    gm = capture(Stack(Attends(F.linear, 32, 32)), X).shared()
    assert apply(QuantizeLinears(W8A8_BALANCED, True, {"blocks.0": torch.ones(32)}), gm).changed == 1
