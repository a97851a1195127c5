import pytest
import torch

from capture import apply, capture
from passes import LowerLinears, Normalize, PrepareWeights, QuantizeLinears, ShareBodies
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.graph import placeholders
from qc_compiler.show import show
from small_blocks import Modulated, Stack
from tiny_models import tiny_dit

X = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))


def lowered(captured, scheme="w8a8"):
    return captured.after(
        Normalize(), ShareBodies(), QuantizeLinears((SCHEMES[scheme],), emulate=True), LowerLinears(emulate=True)
    )


def test_golden():
    gm = lowered(capture(Stack(Modulated(32)), X))
    assert apply(PrepareWeights(), gm).changed == 1
    weight = "L_self_modules_blocks_modules_0_modules_query_parameters_weight_"
    main, _, _ = show(gm).partition("\nbody")
    assert (
        main
        == f"""\
graph(%L_x_: f32[2, 3, 32], %{weight}: f32[32, 32], %prepared_0: f32[32, 32]):
  %body_0 = get body_0
  %invoke_subgraph = invoke_subgraph(%body_0, body_0, %L_x_, %prepared_0) : (f32[2, 3, 32])
  %getitem = getitem(%invoke_subgraph, 0) : f32[2, 3, 32]
  return (%getitem)"""
    )
    assert (
        show(gm.meta["prepare"])
        == """\
graph(%l_self_modules_blocks_modules_0_modules_query_parameters_weight_: f32[32, 32]):
  %quantize_default = quantcache.quantize(%l_self_modules_blocks_modules_0_modules_query_parameters_weight_, int8) : (i8[32, 32], f32[32, 1])
  %getitem_2 = getitem(%quantize_default, 0) : i8[32, 32]
  %getitem_1 = getitem(%quantize_default, 1) : f32[32, 1]
  %dequantize_default = quantcache.dequantize((%getitem_2, %getitem_1), int8, torch.float32) : f32[32, 32]
  return (%dequantize_default)"""
    )
    assert gm.meta["prepare"].meta["sources"] == [1]


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4"])
def test_values_do_not_change(scheme):
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2))
    gm = lowered(captured, scheme)
    with torch.no_grad():
        (expected,) = gm(*captured.inputs)
        assert apply(PrepareWeights(), gm).changed == 8
        prepare = gm.meta["prepare"]
        values = prepare(*(captured.inputs[i] for i in prepare.meta["sources"]))
        (found,) = gm(*captured.inputs, *values)
    assert torch.equal(found, expected)


def test_without_quantized_weights_nothing_moves():
    gm = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)).shared()
    before = show(gm)
    assert apply(PrepareWeights(), gm).changed == 0
    assert show(gm) == before
    assert "prepare" not in gm.meta


def test_idempotence():
    gm = lowered(capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2)))
    apply(PrepareWeights(), gm)
    before, count = show(gm), len(placeholders(gm.graph))
    assert apply(PrepareWeights(), gm).changed == 0
    assert (show(gm), len(placeholders(gm.graph))) == (before, count)
