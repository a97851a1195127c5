from functools import partial

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import SCHEMES, Scheme
from qc_compiler.kernels.triton_linear import INTERPRETED, TritonLinear, triton_linear

KERNEL = TritonLinear()
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["int8", "int4/128", "fp8", "nvfp4"]
ACTIVATIONS = {"none": lambda x: x, "gelu": F.gelu, "gelu_tanh": partial(F.gelu, approximate="tanh"), "silu": F.silu}
ACTIVATION = {"int8": "uint8", "int4/128": "uint6", "fp8": "fp8", "nvfp4": "nvfp4"}


def case(form, rows, inner, outer, dtype, seed, strided=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(inner, rows, generator=generator).T if strided else torch.randn(rows, inner, generator=generator)
    x = x.to(dtype).to(DEVICE)
    x[0, 0] = 30.0  # an outlier
    w = torch.randn(outer, inner, generator=generator).to(DEVICE)
    parts, held = parse_format(ACTIVATION[form]).quantize(x), parse_format(form).quantize(w)
    return parts, held


@settings(deadline=None, max_examples=10)
@pytest.mark.parametrize("form", FORMS)
@given(
    st.integers(1, 20),
    st.integers(1, 200),
    st.integers(1, 70),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.booleans(),
    st.integers(0, 2**31),
)
def test_it_agrees_with_the_formats_for_any_shape(form, rows, inner, outer, dtype, strided, seed):
    parts, held = case(form, rows, inner, outer, dtype, seed, strided)
    bias = torch.randn(outer, generator=torch.Generator().manual_seed(seed)).to(DEVICE)
    found = KERNEL.linear(parts, KERNEL.prepare(held, form), bias, dtype)
    x_hat = parse_format(ACTIVATION[form]).dequantize(*parts)
    if form == "nvfp4":
        x_hat = x_hat.to(dtype)
    x_hat, w_hat = x_hat.double(), parse_format(form).dequantize(*held).double()
    expected, terms = x_hat @ w_hat.T + bias.double(), x_hat.abs() @ w_hat.abs().T
    # Triton's interpreter truncates to bfloat16 where the hardware rounds
    rounding = {torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}[
        dtype
    ]
    # codes are shifted by 128 to be signed, and the shift is taken back with the zero point
    shift = (128 + parts[2].double()) * parts[1].double() * w_hat.abs().sum(dim=1) if form.startswith("int") else 0
    assert found.dtype == dtype
    assert (
        (found.double() - expected).abs() <= 2.0**-19 * (terms + shift) + rounding * expected.abs() + 2.0**-24
    ).all()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("fused", [False, True])
def test_the_epilogue(form, activation, fused):
    parts, held = case(form, 2 * 5, 96, 40, torch.float32, 0)
    gate, residual = torch.randn(2, 1, 40, device=DEVICE), torch.randn(2, 5, 40, device=DEVICE)
    weight, kind = list(KERNEL.prepare(held, form)), form.split("/")[0]
    x, scale, zero = (*(part.unflatten(0, (2, 5)) for part in parts), None)[:3] if form != "nvfp4" else (
        parse_format("nvfp4").dequantize(*parts).unflatten(0, (2, 5)), None, None
    )  # fmt: skip
    plain = triton_linear(x, scale, zero, weight, kind, torch.float32)
    assert plain.shape == (2, 5, 40)
    found = triton_linear(
        x, scale, zero, weight, kind, torch.float32, activation=activation, gate=gate if fused else None, residual=residual if fused else None
    )  # fmt: skip
    expected = ACTIVATIONS[activation](plain)
    expected = residual + gate * expected if fused else expected
    assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_extreme_codes_are_exact():
    codes = torch.full((3, 256), 255, dtype=torch.uint8, device=DEVICE)
    ones, zero = torch.ones(3, 1, device=DEVICE), torch.zeros(3, 1, device=DEVICE)
    weight = torch.full((16, 256), -127, dtype=torch.int8, device=DEVICE)
    scale, sums = torch.ones(16, 1, device=DEVICE), weight.sum(dim=1).float()
    found = triton_linear(codes, ones, zero, [weight, scale, sums], "int8", torch.float32)
    assert found.unique().tolist() == [255.0 * -127 * 256]


def test_no_rows_give_no_rows():
    parts, held = case("int8", 4, 32, 8, torch.float32, 0)
    assert KERNEL.linear([p[:0] for p in parts], KERNEL.prepare(held, "int8"), None, torch.float32).shape == (0, 8)


def test_a_packed_weight_is_taken_as_it_is():
    for form in ("int4/128", "nvfp4"):
        parts, held = case(form, 4, 100, 8, torch.float32, 0)
        packed = (parse_format(form).pack(held[0]), *held[1:])
        expected = KERNEL.linear(parts, KERNEL.prepare(held, form), None, torch.float32)
        assert torch.equal(KERNEL.linear(parts, KERNEL.prepare(packed, form, 100), None, torch.float32), expected)


def test_which_schemes_it_takes():
    assert all(KERNEL.takes(scheme) for scheme in SCHEMES.values())
    assert not KERNEL.takes(Scheme("int8", "nvfp4"))
    assert [name for name, scheme in SCHEMES.items() if not TritonLinear(has_fp8=False).takes(scheme)] == [
        "fp8",
        "nvfp4",
    ]
