import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from capture import apply, branches, capture
from passes import BranchChoices, GuardRegions, LowerLinears, PrepareWeights, QuantizeLinears
from qc_compiler.formats.schemes import Scheme, recipe_of
from qc_compiler.graph import cond, submodules
from qc_compiler.ops import choose
from qc_compiler.show import show
from qc_compiler.verify import verify
from small_blocks import Modulated, Stack
from tiny_models import tiny_dit

DMPQ = recipe_of("dmpq").schemes
THREE = (Scheme("int4/128", "uint4"), Scheme("int4/128", "uint6"), Scheme("int4/128", "uint8"))
X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def quantized(captured, schemes=DMPQ):
    gm = captured.shared()
    apply(QuantizeLinears(schemes, emulate=True), gm)
    apply(LowerLinears(emulate=True), gm)
    return gm


def count(gm, target):
    return sum(n.target is target for graph in (gm, *(c for _, c in submodules(gm))) for n in graph.graph.nodes)


# 1. golden


def test_golden():
    gm = quantized(capture(Stack(Modulated(32)), X))
    assert count(gm, choose) == 1
    assert apply(BranchChoices(), gm).changed == 1
    assert count(gm, choose) == 0
    text = show(gm)
    at = text.index("  %cond")
    assert (
        text[at : text.index("  %scaled_dot")]
        == """\
  %cond = cond(%select_int_1, %choice_0_high, %choice_0_low, (%mul, %dequantize_default_4)) : (f32[2, 3, 32])
  %getitem_9 = getitem(%cond, 0) : f32[2, 3, 32]
"""
    )
    high, low = branches(gm)
    assert "aten.amin" in show(high)  # uint8 has a zero point
    assert "aten.amin" not in show(low)


# 3. edges


def test_linears_that_read_the_same_make_one_cond():
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2))
    gm = quantized(captured)
    assert (count(gm, choose), apply(BranchChoices(), gm).changed, count(gm, cond)) == (4, 4, 4)


def test_a_graph_without_choices_is_left_alone():
    gm = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared()
    before = show(gm)
    assert apply(BranchChoices(), gm).changed == 0
    assert show(gm) == before


@pytest.mark.parametrize("level", ["block", "sublayer"])
def test_choices_inside_guards(level):
    gm = quantized(capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)))
    apply(PrepareWeights(), gm)
    apply(GuardRegions(level), gm)
    assert apply(BranchChoices(), gm).changed == 4
    assert count(gm, choose) == 0
    verify(gm)


# 4. equivalence, 6. properties


def case(schemes):
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), torch.ones(2))
    gm, branched = quantized(captured, schemes), quantized(captured, schemes)
    apply(BranchChoices(), branched)
    return captured.inputs, gm, branched


CASES = {name: case(schemes) for name, schemes in (("two", DMPQ), ("three", THREE))}


@settings(deadline=None)
@given(st.sampled_from(["two", "three"]), st.lists(st.integers(0, 2), min_size=8, max_size=8))
def test_what_is_chosen_is_what_runs(name, chosen):
    inputs, gm, branched = CASES[name]
    num_choices = 2 if name == "two" else 3
    precision = torch.tensor(chosen)[:, None] > torch.arange(num_choices - 1)
    with torch.no_grad():
        (expected,), (found,) = gm(*inputs, precision), branched(*inputs, precision)
    assert torch.equal(found, expected)


def test_uniform_choices_are_the_single_schemes():
    for name, schemes in (("two", DMPQ), ("three", THREE)):
        inputs, _, branched = CASES[name]
        for i, scheme in enumerate(schemes):
            alone = quantized(capture(tiny_dit(2), *(torch.randn(2, 16, 8), torch.ones(2))), (scheme,))
            precision = torch.full((8, 1), i) > torch.arange(len(schemes) - 1)
            with torch.no_grad():
                assert torch.equal(branched(*inputs, precision)[0], alone(*inputs)[0])
            torch._dynamo.reset()


# 5. idempotence


def test_idempotence():
    gm = quantized(capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)))
    apply(BranchChoices(), gm)
    before = show(gm)
    assert apply(BranchChoices(), gm).changed == 0
    assert show(gm) == before
