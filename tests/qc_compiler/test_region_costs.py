from dataclasses import replace

import pytest
import sympy
import torch

import qc_compiler
from capture import capture
from qc_compiler.formats import parse_format
from qc_compiler.packing import weight_bytes
from qc_compiler.region_costs import Cost, Variant, find_regions, stored_bytes, together
from tiny_models import compile_eagerly, tiny_dit

BATCH, TOKENS, WIDTH = 2, 16, 32
STREAM = BATCH * TOKENS * WIDTH * 4


@pytest.fixture(scope="module")
def regions():
    outside, blocks = find_regions(capture(tiny_dit(), torch.randn(BATCH, TOKENS, 8), torch.ones(BATCH)).shared())
    return {region.name: region for region in (outside, *(r for block in blocks for r in (block, *block.parts)))}


def test_the_regions_of_a_model(regions):
    parts = [name for i in range(3) for name in (f"blocks.{i}", f"blocks.{i}/attention", f"blocks.{i}/mlp")]
    assert list(regions) == ["outside", *parts]


def test_a_block_holds_its_sublayers_and_more(regions):
    block, parts = regions["blocks.1"].cost(), [part.cost() for part in regions["blocks.1"].parts]
    modulation = 2 * BATCH * WIDTH * 6 * WIDTH
    assert block.flops == sum(part.flops for part in parts) + modulation
    assert block.weight_bytes == sum(part.weight_bytes for part in parts) + (WIDTH + 1) * 6 * WIDTH * 4


def test_weights_are_those_of_the_model(regions):
    model, found = tiny_dit(), [regions[name] for name in ("outside", "blocks.0", "blocks.1", "blocks.2")]
    assert sum(region.cost().weight_bytes for region in found) == weight_bytes(model)
    assert together("network", found[1:]).cost().weight_bytes == weight_bytes(model.blocks)


@pytest.mark.parametrize("order", [0, 2])
@pytest.mark.parametrize("cache_dtype", ["model", "int8", "fp8"])
@pytest.mark.parametrize("level", ["block", "sublayer", "network"])
def test_slots_are_those_of_the_runtime(level, cache_dtype, order, regions):
    options = {"cache": "static", "interval": 1, "level": level, "cache_dtype": cache_dtype, "cache_order": order}
    model = compile_eagerly(tiny_dit(), options)
    with torch.no_grad():
        for step in range(order + 1):
            model(torch.randn(BATCH, TOKENS, 8), torch.full((BATCH,), 1000.0 - step))
    summary = qc_compiler.summary(model)
    variant = Variant(depth=order + 1, cache_dtype=cache_dtype)
    blocks = [regions[f"blocks.{i}"] for i in range(3)]
    known = regions | {"network": together("network", blocks)}
    found = sum(known[region.name].cost(variant).slot_bytes for region in summary.regions)
    assert found == summary.peak_slot_bytes > 0


@pytest.mark.parametrize("scheme", ["w8a8", "w4a8", "fp8", "nvfp4"])
def test_quantized_weights_are_those_of_a_packed_model(scheme, regions):
    plain, packed = tiny_dit().blocks[0], tiny_dit()
    qc_compiler.pack_(packed, scheme)
    expected = weight_bytes(plain)
    for name in ("attn.qkv", "attn.out", "mlp.0", "mlp.2"):  # the modulation is packed, too, but not quantized
        expected += weight_bytes(packed.blocks[0].get_submodule(name)) - weight_bytes(plain.get_submodule(name))
    cost = regions["blocks.0"].cost(Variant(quantize=scheme))
    assert cost.weight_bytes == expected
    assert cost.flops == regions["blocks.0"].cost().flops


def test_a_guard_reads_and_writes_four_streams(regions):
    plain, guarded = regions["blocks.0"].cost(), regions["blocks.0"].cost(Variant(depth=2))
    assert guarded == replace(plain, bytes_moved=plain.bytes_moved + 4 * STREAM, slot_bytes=2 * STREAM)


def test_a_reused_region_reads_its_slots(regions):
    reused = regions["blocks.0"].cost(Variant("reused", depth=3))
    assert reused == Cost(0, (1 + 3 + 1) * STREAM, regions["blocks.0"].weight_bytes, 3 * STREAM)
    attention = regions["blocks.0/attention"].cost(Variant("reused", depth=1))  # what it adds is cached itself
    assert attention.bytes_moved == 2 * STREAM


def test_a_pruned_region_is_gone(regions):
    assert regions["blocks.0"].cost(Variant("pruned")) == Cost(0, 0, 0, 0)


def test_attention_counts_the_pairs_that_are_attended(regions):
    whole, part = (regions["blocks.0"].cost(Variant(attended=share)) for share in (1.0, 0.25))
    assert whole.flops - part.flops == 0.75 * 4 * BATCH * TOKENS**2 * WIDTH
    assert part.bytes_moved == whole.bytes_moved


def test_a_quantized_linear_is_three_kernels(regions):
    ways = regions["blocks.0/mlp"].run(Variant(quantize="w8a8"))
    (plain,), quantized = next(way for way in ways if len(way) > 1)
    rows, inner, outer = plain.shape
    assert (rows, inner, outer) == (BATCH * TOKENS, WIDTH, 2 * WIDTH)
    codes, weight, product = rows * (inner + 8), outer * (inner + 4), 4 * rows * outer
    assert [(kernel.kind, kernel.bytes_moved) for kernel in quantized] == [
        ("pointwise", 2 * 4 * rows * inner + codes),
        ("w8a8", codes + weight + product),
        ("pointwise", 2 * product),
    ]


def test_modulation_is_not_quantized(regions):
    kinds = [[kernel.kind for kernel in ways[-1]] for ways in regions["blocks.0"].run(Variant(quantize="w8a8"))]
    assert sum("w8a8" in way for way in kinds) == 4
    assert ["linear"] in kinds


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"state": "resued"}, "did you mean 'reused'"),
        ({"quantize": "w8a9"}, "did you mean 'w8a8'"),
        ({"state": "reused"}, "needs a depth"),
    ],
)
def test_impossible_variants_are_refused(fields, message):
    with pytest.raises(qc_compiler.OptionError, match=message):
        Variant(**fields)


@pytest.mark.parametrize("form", ["int8", "int4/128", "fp8", "fp8/tensor", "nvfp4", "uint6"])
def test_stored_bytes_are_those_of_the_format(form):
    fmt, rows = parse_format(form), sympy.Symbol("rows")
    codes, *scales = fmt.quantize(torch.randn(7, 96))
    for packed, stored in ((False, codes), (True, fmt.pack(codes))):
        found = stored_bytes(form, rows, sympy.Integer(96), packed).subs({rows: 7})
        assert found == sum(part.nbytes for part in (stored, *scales))
