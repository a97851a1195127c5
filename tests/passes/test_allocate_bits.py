import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capture import apply, capture, skips
from passes import AllocateBits, QuantizeLinears
from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import recipe_of
from qc_compiler.graph import body_calls, body_of, placeholders
from qc_compiler.ops import dequantize, quantize
from qc_compiler.show import show
from small_blocks import Mix, Modulated, Stack
from tiny_models import tiny_dit

X = torch.arange(192.0).reshape(1, 2, 3, 32) / 192
IMPORTANCE = QuantizeLinears(recipe_of("importance").schemes, emulate=True)
LINEARS = ("attn.qkv", "attn.out", "mlp.0", "mlp.2")


@pytest.fixture
def dit():
    return capture(tiny_dit(3), torch.randn(2, 16, 8), torch.ones(2))


def with_tensors(captured):
    """Returns the graph with the model's own weights, as the backend keeps them for the pass."""
    gm = captured.shared()
    gm.meta["tensors"] = {str(node.target): value for node, value in zip(placeholders(gm.graph), captured.inputs)}
    return gm


def uniform(*widths):
    """Returns bits for `tiny_dit`: one width a block."""
    return {f"blocks.{i}.{name}": width for i, width in enumerate(widths) for name in LINEARS}


def names_of_bodies(gm):
    return [call.args[1] for call in body_calls(gm)]


def bits_of(gm):
    return [body_of(gm, call).meta["bits"] for call in body_calls(gm)]


def weight_formats(gm):
    """Returns for each call the formats of the weights in its body."""
    return [
        [n.args[1] for n in body_of(gm, call).graph.nodes if n.target is dequantize and "uint" not in n.args[1]]
        for call in body_calls(gm)
    ]


# 1. golden


def test_golden():
    gm = capture(Stack(Modulated(32), Modulated(32)), X).shared()
    assert names_of_bodies(gm) == ["body_0", "body_0"]
    report = apply(AllocateBits(6.0, {"blocks.0.query": 4, "blocks.1.query": 8}), gm)
    assert (report.changed, report.skipped) == (2, ())
    weights = [f"L_self_modules_blocks_modules_{i}_modules_query_parameters_weight_" for i in range(2)]
    body = f"""\
(%l_x_: f32[1, 2, 3, 32], %l{weights[0][1:]}: f32[32, 32]):
  %layer_norm = aten.layer_norm(%l_x_, (32)) : f32[1, 2, 3, 32]
  %mul = aten.mul(%layer_norm, 2) : f32[1, 2, 3, 32]
  %linear = aten.linear(%mul, %l{weights[0][1:]}) : f32[1, 2, 3, 32]
  %scaled_dot_product_attention = aten.scaled_dot_product_attention(%linear, %l_x_, %l_x_) : f32[1, 2, 3, 32]
  %add = aten.add(%l_x_, %scaled_dot_product_attention) : f32[1, 2, 3, 32]
  return (%add)"""
    assert (
        show(gm)
        == f"""\
graph(%L_x_: f32[1, 2, 3, 32], %{weights[0]}: f32[32, 32], %{weights[1]}: f32[32, 32]):
  %body_1 = get body_0
  %invoke_subgraph_1 = invoke_subgraph(%body_1, body_0, %L_x_, %{weights[0]}) : (f32[1, 2, 3, 32])
  %getitem_1 = getitem(%invoke_subgraph_1, 0) : f32[1, 2, 3, 32]
  %body_0_1 = get body_0_1
  %invoke_subgraph = invoke_subgraph(%body_0_1, body_0_1, %getitem_1, %{weights[1]}) : (f32[1, 2, 3, 32])
  %getitem = getitem(%invoke_subgraph, 0) : f32[1, 2, 3, 32]
  return (%getitem)
body body_0{body}
body body_0_1{body}"""
    )
    assert bits_of(gm) == [{"blocks.0.query": 4}, {"blocks.0.query": 8}]


# 3. edges


@pytest.mark.parametrize(
    ("widths", "bodies"),
    [
        ((8, 8, 8), ["body_0", "body_0", "body_0"]),
        ((8, 4, 8), ["body_0", "body_0_1", "body_0"]),
        ((4, 8, 16), ["body_0", "body_0_1", "body_0_2"]),
    ],
)
def test_blocks_with_equal_lists_share_one_body(dit, widths, bodies):
    gm = dit.shared()
    assert apply(AllocateBits(8.0, uniform(*widths)), gm).changed == 12
    assert names_of_bodies(gm) == bodies
    assert [set(bits.values()) for bits in bits_of(gm)] == [{width} for width in widths]


def test_blocks_of_different_structure_split_apart():
    class Wide(Modulated):
        def forward(self, x):
            return x + super().forward(x).relu()

    gm = capture(Stack(Modulated(32), Wide(32), Modulated(32), Wide(32)), X).shared()
    assert names_of_bodies(gm) == ["body_0", "body_1", "body_0", "body_1"]
    apply(AllocateBits(8.0, {f"blocks.{i}.query": width for i, width in enumerate((4, 4, 8, 8))}), gm)
    assert names_of_bodies(gm) == ["body_0", "body_1", "body_0_1", "body_1_1"]
    assert [list(bits.values()) for bits in bits_of(gm)] == [[4], [4], [8], [8]]


def test_a_linear_that_was_not_calibrated_keeps_its_precision(dit):
    gm = dit.shared()
    apply(AllocateBits(8.0, {"blocks.1.mlp.0": 8}), gm)
    assert [set(bits.values()) for bits in bits_of(gm)] == [{16}, {8, 16}, {16}]
    assert apply(IMPORTANCE, gm).changed == 1


def test_without_calibration_the_weights_themselves_decide():
    """Only the weights of block 1 need more than four bits; the budget pays for eight in one block of three."""
    model = tiny_dit(3)
    for block in (0, 2):
        for name in LINEARS:
            weight = model.blocks[block].get_submodule(name).weight
            weight.copy_(weight.sign())
    gm = with_tensors(capture(model, torch.randn(2, 16, 8), torch.ones(2)))
    assert apply(AllocateBits(16 / 3), gm).changed == 12
    assert [set(bits.values()) for bits in bits_of(gm)] == [{4}, {8}, {4}]
    assert names_of_bodies(gm) == ["body_0", "body_0_1", "body_0"]


@pytest.mark.parametrize(("mean_bits", "width"), [(4.0, 4), (16.0, 16)])
def test_without_calibration_the_limits_of_the_budget(dit, mean_bits, width):
    gm = with_tensors(dit)
    assert apply(AllocateBits(mean_bits), gm).changed == 12
    assert names_of_bodies(gm) == ["body_0"] * 3
    assert [set(bits.values()) for bits in bits_of(gm)] == [{width}] * 3


@pytest.mark.parametrize("bits", [None, {"blocks.0.mlp.0": 4}])
def test_a_model_without_linears_is_left_alone(bits):
    gm = with_tensors(capture(Stack(Mix(), Mix()), X))
    before = show(gm)
    assert apply(AllocateBits(5.0, bits), gm).changed == 0
    assert show(gm) == before


@pytest.mark.parametrize("bits", [None, {}])
def test_a_model_without_blocks_is_left_alone(bits):
    gm = with_tensors(capture(nn.Linear(32, 32).requires_grad_(False), X))
    assert apply(AllocateBits(5.0, bits), gm).changed == 0


def test_dynamic_sizes():
    captured = capture(Stack(Modulated(32), Modulated(32)), X, dynamic=True)
    gm = captured.shared()
    apply(AllocateBits(6.0, {"blocks.0.query": 4, "blocks.1.query": 8}), gm)
    assert apply(IMPORTANCE, gm).changed == 2


# 4. equivalence


@pytest.mark.parametrize("bits", [None, uniform(4, 8, 16), uniform(8, 4, 8), uniform(4, 4, 4)])
def test_values_do_not_change(dit, bits):
    gm = with_tensors(dit)
    with torch.no_grad():
        (expected,) = gm(*dit.inputs)
        apply(AllocateBits(6.0, bits), gm)
        (found,) = gm(*dit.inputs)
    assert torch.equal(found, expected)


# 5. idempotence


@pytest.mark.parametrize("bits", [None, uniform(4, 8, 4)])
def test_a_second_run_leaves_the_graph_alone(dit, bits):
    gm = with_tensors(dit)
    assert apply(AllocateBits(6.0, bits), gm).changed == 12
    before, allocated = show(gm), bits_of(gm)
    assert apply(AllocateBits(6.0, bits), gm).changed == 0
    assert apply(AllocateBits(6.0, uniform(16, 4, 8)), gm).changed == 0
    assert (show(gm), bits_of(gm)) == (before, allocated)


# with QuantizeLinears: each width its format


def test_each_width_has_its_format_and_sixteen_bits_stay(dit):
    gm = dit.shared()
    apply(AllocateBits(8.0, uniform(4, 8, 16)), gm)
    report = apply(IMPORTANCE, gm)
    assert report.changed == 8
    assert weight_formats(gm) == [["int4/128"] * 4, ["int8"] * 4, []]
    assert sorted(n.args[1] for n in gm.graph.nodes if n.target is quantize) == ["int4/128"] * 4 + ["int8"] * 4
    reason = "its allocation is 16 bits: quantizing it would cost more than its share of the error"
    assert [where for where, why in skips(report) if why == reason] == [f"blocks.2.{name}" for name in LINEARS]


def test_skips_carry_the_name_of_the_first_block_of_each_body(dit):
    gm = dit.shared()
    apply(AllocateBits(8.0, uniform(4, 8, 8) | {"blocks.2.mlp.0": 16}), gm)
    skipped = skips(apply(IMPORTANCE, gm))
    assert [where for where, _ in skipped if where.endswith("modulation")] == [
        f"blocks.{i}.modulation" for i in range(3)
    ]
    assert [where for where, why in skipped if why.startswith("its allocation")] == ["blocks.2.mlp.0"]


def test_the_graph_computes_what_the_formats_say():
    model = Stack(Modulated(32), Modulated(32), Modulated(32))
    captured = capture(model, X)
    gm = captured.shared()
    apply(AllocateBits(8.0, {"blocks.0.query": 4, "blocks.1.query": 16, "blocks.2.query": 8}), gm)
    assert apply(IMPORTANCE, gm).changed == 2
    with torch.no_grad():
        (found,) = gm(*captured.inputs)
        expected = X
        for block, form in zip(model.blocks, ("int4/128", None, "int8")):
            h, w = F.layer_norm(expected, (32,)) * 2, block.query.weight
            if form is not None:
                h, w = parse_format("uint8").round_trip(h), parse_format(form).round_trip(w)
            expected = expected + F.scaled_dot_product_attention(F.linear(h, w), expected, expected)
    assert torch.equal(found, expected)


def test_with_a_choice_of_activations_the_widths_stay_the_weights(dit):
    gm = dit.shared()
    apply(AllocateBits(8.0, uniform(4, 8, 16)), gm)
    assert apply(QuantizeLinears(recipe_of("importance+online").schemes, emulate=True), gm).changed == 8
    assert (gm.meta["num_choices"], len(gm.meta["sites"])) == (4, 8)
    assert [set(formats) for formats in weight_formats(gm)] == [{"int4/128"}, {"int8"}, set()]
