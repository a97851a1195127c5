import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import SCHEMES, Scheme
from qc_compiler.kernels import find_kernel
from qc_compiler.kernels.int8_cpu import Int8CPU

KERNEL = Int8CPU.here()
UINT8 = parse_format("uint8")


def product(codes, weight):
    scale = torch.ones(len(weight))
    return torch.ops.quantcache.int8_matmul(codes, weight, scale)


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("inner", [2, 63, 64, 1152])
def test_extreme_codes_do_not_saturate(sign, inner):
    """255 · max_code, added in pairs: where the CPU adds them in 16 bits, larger weights come out wrong by half."""
    codes = torch.full((5, inner), 255, dtype=torch.uint8)
    weight = torch.full((32, inner), sign * KERNEL.max_code, dtype=torch.int8)
    assert torch.equal(product(codes, weight), torch.full((5, 32), float(sign * 255 * KERNEL.max_code * inner)))


@pytest.mark.skipif(KERNEL.max_code == 127, reason="this CPU adds products in 32 bits")
def test_wider_codes_would_saturate():
    codes = torch.full((5, 64), 255, dtype=torch.uint8)
    weight = torch.full((32, 64), 127, dtype=torch.int8)
    assert not torch.equal(product(codes, weight), torch.full((5, 32), 255.0 * 127 * 64))


@given(st.integers(1, 70), st.integers(1, 130), st.integers(1, 70), st.integers(0, 2**31), st.booleans())
def test_products_are_exact_for_any_shape(rows, inner, outer, seed, strided):
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(0, 256, (inner, rows) if strided else (rows, inner), generator=generator, dtype=torch.uint8)
    codes = codes.T if strided else codes
    weight = torch.randint(-KERNEL.max_code, KERNEL.max_code + 1, (outer, inner), generator=generator, dtype=torch.int8)
    expected = codes.long() @ weight.long().T
    assert torch.equal(product(codes, weight).long(), expected)


@given(
    st.integers(1, 9),
    st.integers(1, 80),
    st.integers(1, 40),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from([0.0, 1e-20, 1e-3, 1.0, 100.0]),
    st.integers(0, 2**31),
)
def test_the_documented_bound_holds(rows, inner, outer, dtype, size, seed):
    generator = torch.Generator().manual_seed(seed)
    x = (torch.randn(2, rows, inner, generator=generator) * size).to(dtype)
    x[0, 0, 0] *= 50  # an outlier
    form = KERNEL.weight_format
    held = form.quantize(torch.randn(outer, inner, generator=generator))
    weight, bias = form.dequantize(*held), torch.randn(outer, generator=generator)
    parts, prepared = UINT8.quantize(x), KERNEL.prepare(held, form.name)
    found = KERNEL.linear(parts, prepared, bias, torch.float32).double()
    codes, x_scale, zero = (part.double() for part in parts)
    exact = ((codes - zero) * x_scale) @ weight.double().T + bias.double()
    terms = codes @ weight.double().T.abs() + zero * weight.double().sum(dim=1).abs()
    assert ((found - exact).abs() <= 2.0**-21 * x_scale * terms + 2.0**-22 * exact.abs()).all()
    assert KERNEL.linear(parts, prepared, None, dtype).dtype == dtype


def test_nan_stays_in_its_token():
    x = torch.ones(3, 32)
    x[1, 4] = float("nan")
    y = KERNEL.linear(
        UINT8.quantize(x), KERNEL.prepare(parse_format("int8").quantize(torch.ones(8, 32)), "int8"), None, torch.float32
    )
    assert y.isfinite().all(dim=1).tolist() == [True, False, True]


def test_a_weight_that_changes_in_place_is_packed_anew():
    codes, weight = torch.ones(2, 32, dtype=torch.uint8), torch.ones(8, 32, dtype=torch.int8)
    assert product(codes, weight).unique().tolist() == [32.0]
    weight.fill_(2)
    assert product(codes, weight).unique().tolist() == [64.0]


def test_which_schemes_it_takes():
    assert [name for name, scheme in SCHEMES.items() if KERNEL.takes(scheme)] == ["w8a8", "w4a8", "w4a6"]
    assert find_kernel(SCHEMES["fp8"], torch.device("cpu")) is None
    assert KERNEL.narrowed(Scheme("int4/128", "uint8")).weight == "int4/128"
    assert Int8CPU(63).narrowed(SCHEMES["w8a8"]).weight == "int8/m63"
    assert Int8CPU(127).narrowed(SCHEMES["w8a8"]).weight == "int8"
