import functools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from capture import apply, capture, submodules
from passes import LowerLinears, Normalize, QuantizeLinears, ShareBodies
from qc_compiler.costs import flops_of
from qc_compiler.formats.schemes import SCHEMES, recipe_of
from qc_compiler.graph import body_calls, body_of, placeholders
from qc_compiler.kernels.int8_cpu import Int8CPU
from qc_compiler.show import show
from small_blocks import Modulated, Stack
from tiny_models import tiny_dit

INT8 = torch.ops.quantcache.int8_matmul.default
X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("kernels_win")


def quantized(captured, scheme, emulate=False):
    return captured.after(Normalize(), ShareBodies(), QuantizeLinears((SCHEMES[scheme],), emulate))


def targets(gm):
    return [n.target for graph in (gm, *(child for _, child in submodules(gm))) for n in graph.graph.nodes]


# 1. golden


def test_golden():
    gm = quantized(capture(Stack(Modulated(32)), X), "w8a8")
    assert INT8 not in targets(gm)
    assert apply(LowerLinears(), gm).changed == 1
    body = show(body_of(gm, body_calls(gm)[0]))
    epilogue = body[body.index("  %int8_matmul") : body.index("  %scaled_dot")]
    assert (
        epilogue
        == """\
  %int8_matmul = quantcache.int8_matmul(%_to_copy, %_to_copy_1, %squeeze) : f32[2, 3, 32]
  %mul_3 = aten.mul(%round_1, %mul_2) : f32[2, 3, 32]
  %sub = aten.sub(%int8_matmul, %mul_3) : f32[2, 3, 32]
  %mul_1 = aten.mul(%sub, %div) : f32[2, 3, 32]
"""
    )


def test_golden_of_a_rotation(triton_everywhere):
    gm = rotated(Modulated(32))
    assert "aten.matmul" in show(gm)
    assert apply(LowerLinears(), gm).changed == 1
    body = show(body_of(gm, body_calls(gm)[0]))
    assert (
        body[body.index("  %layer_norm") : body.index("  %scaled_dot")]
        == """\
  %layer_norm = aten.layer_norm(%l_x_, (32)) : f32[2, 3, 32]
  %mul = aten.mul(%layer_norm, 2) : f32[2, 3, 32]
  %triton_quantize = quantcache.triton_quantize(%mul, uint8, 32) : (u8[2, 3, 32], f32[2, 3, 1], f32[2, 3, 1])
  %getitem_5 = getitem(%triton_quantize, 0) : u8[2, 3, 32]
  %getitem_6 = getitem(%triton_quantize, 1) : f32[2, 3, 1]
  %getitem_7 = getitem(%triton_quantize, 2) : f32[2, 3, 1]
  %triton_linear = quantcache.triton_linear(%getitem_5, %getitem_6, %getitem_7, (%getitem_8, %getitem_9, %sum_1), int8, torch.float32) : f32[2, 3, 32]
"""
    )


# 2. a quantizer that stays plain torch


def rotated(model, scheme="w8a8+rotation", emulate=False):
    captured = capture(Stack(model), X)
    return captured.after(Normalize(), ShareBodies(), QuantizeLinears(recipe_of(scheme).schemes, emulate))


@pytest.mark.parametrize(
    ("scheme", "emulate"),
    [("w8a8", False), ("w8a8+rotation+rank4", False), ("dmpq+rotation", False), ("w8a8+rotation", True)],
    ids=["no rotation", "a branch reads the rotation", "two quantizers read it", "emulated"],
)
def test_a_quantizer_that_stays_plain(triton_everywhere, scheme, emulate):
    gm = rotated(Modulated(32), scheme, emulate)
    apply(LowerLinears(emulate), gm)
    text = show(gm)
    assert "aten.round" in text
    assert "triton_quantize" not in text


def test_a_rotation_without_a_kernel_stays_plain():
    gm = rotated(Modulated(32))
    apply(LowerLinears(), gm)
    assert "aten.matmul" in show(gm)
    assert INT8 in targets(gm)


# 3. edges


def test_nothing_is_left_of_our_own_semantics():
    gm = quantized(capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)), "w8a8")
    apply(LowerLinears(), gm)
    body = body_of(gm, body_calls(gm)[0])
    assert not [
        n for n in body.graph.nodes if str(n.target).startswith(("quantcache.quantize", "quantcache.dequantize"))
    ]
    assert sum(n.target is INT8 for n in body.graph.nodes) == 4


def test_a_graph_without_quantizers_is_left_alone():
    gm = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared()
    before = show(gm)
    assert apply(LowerLinears(), gm).changed == 0
    assert show(gm) == before


# 4. equivalence


@pytest.mark.parametrize("scheme", SCHEMES)
def test_emulated_it_is_the_reference_bit_for_bit(scheme):
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2))
    gm = quantized(captured, scheme, emulate=True)
    with torch.no_grad():
        (expected,) = gm(*captured.inputs)
        apply(LowerLinears(emulate=True), gm)
        (found,) = gm(*captured.inputs)
    assert torch.equal(found, expected)


class Linear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = torch.nn.Linear(32, 32)
        torch.nn.init.normal_(self.linear.weight, generator=torch.Generator().manual_seed(1))

    def forward(self, x):
        return x + self.linear(x) + torch.nn.functional.scaled_dot_product_attention(x, x, x)


class Feeds(torch.nn.Module):
    """y = x + attention(x); y + fc2(fc1(y)): a linear that reads another one."""

    def __init__(self, width):
        super().__init__()
        self.fc1, self.fc2 = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)

    def forward(self, x):
        x = x + torch.nn.functional.scaled_dot_product_attention(x, x, x)
        return x + self.fc2(self.fc1(x))


@functools.cache
def case(scheme, dtype):
    """Returns a model, its quantized graph and its lowered one, and their inputs."""
    torch._dynamo.reset()
    model = Stack(Linear()).to(dtype)
    captured = capture(model, X.to(dtype))
    reference, lowered = quantized(captured, scheme), quantized(captured, scheme)
    assert apply(LowerLinears(), lowered).changed
    assert INT8 in targets(lowered)
    return model.blocks[0].linear, reference, lowered, captured.inputs


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    st.sampled_from(["w8a8", "w4a8", "w4a6"]),
    st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(0, 2**31),
    st.sampled_from([0.0, 1e-6, 1.0, 1e3]),
    st.booleans(),
)
def test_the_kernel_agrees_with_the_reference(scheme, dtype, seed, size, has_outlier):
    """Within what casting ŵ to the kernel's int8 may cost, and rounding."""
    x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed)) * size
    x[0, 1, 5] = 100 * size if has_outlier else x[0, 1, 5]
    linear, reference, lowered, inputs = case(scheme, dtype)
    with torch.no_grad():
        inputs = [x.to(dtype) if value.shape == X.shape else value for value in inputs]
        (expected,), (found,) = (gm(*inputs) for gm in (reference, lowered))
    step = linear.weight.float().abs().amax(dim=1) / Int8CPU.here().max_code
    cast = 0.0 if scheme == "w8a8" else step / 2
    total = x.abs().sum(dim=-1, keepdim=True) * 1.05  # Σ|x̂|: quantizing moves it a little
    rounding = {torch.float32: 2.0**-18, torch.bfloat16: 2.0**-6}[dtype]
    bound = (cast + rounding * linear.weight.float().abs().amax()) * total + rounding * (expected.float().abs() + 1)
    assert ((found - expected).float().abs() <= bound).all()


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "fp8"])
def test_a_fused_rotation_agrees_with_the_reference(triton_everywhere, scheme):
    """Sums of float32 in another order: a code at a tie may be its neighbour."""
    torch.manual_seed(0)
    gm = rotated(Feeds(32), f"{scheme}+rotation")
    inputs = [torch.randn(node.meta["val"].shape) for node in placeholders(gm.graph)]
    (expected,) = gm(*inputs)
    assert apply(LowerLinears(), gm).changed == 2
    (found,) = gm(*inputs)
    assert torch.allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_lowered_body_costs_what_the_plain_one_did():
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2))
    plain, gm = captured.shared(), quantized(captured, "w8a8")
    apply(LowerLinears(), gm)
    costs = [flops_of(body_of(graph, body_calls(graph)[0])) for graph in (plain, gm)]
    assert costs[0] == costs[1] > 0


# 5. idempotence


def test_idempotence():
    gm = quantized(capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)), "w8a8")
    apply(LowerLinears(), gm)
    before = show(gm)
    assert apply(LowerLinears(), gm).changed == 0
    assert show(gm) == before
