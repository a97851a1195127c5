import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc_compiler.formats.per_token import MAX_CODE, dequantize_per_token, quantize_per_token

E4M3 = torch.float8_e4m3fn
DTYPES = [torch.int8, E4M3]
ROUNDING = 1 + 2.0**-20  # float32 arithmetic around the codes


def bound(x, scale, dtype):
    if dtype == torch.int8:
        return (scale / 2).expand_as(x) * ROUNDING + 1e-38
    return torch.maximum(x.abs() / 17, scale * 2.0**-10) * ROUNDING + 1e-38


def round_trip(x, dtype):
    codes, scale = quantize_per_token(x, dtype)
    return dequantize_per_token(codes, scale), scale


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_codes_and_scales_have_the_documented_kinds(dtype, kind):
    codes, scale = quantize_per_token(torch.randn(2, 5, 7).to(kind), dtype)
    assert (codes.dtype, codes.shape) == (dtype, (2, 5, 7))
    assert (scale.dtype, scale.shape) == (torch.float32, (2, 5, 1))
    assert dequantize_per_token(codes, scale).dtype == torch.float32


@given(
    st.sampled_from(DTYPES),
    st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=12),
    st.sampled_from([1e-12, 1e-3, 1.0, 1e12]),
)
def test_the_documented_bound_holds(dtype, values, size):
    x = torch.tensor([values]) * size
    restored, scale = round_trip(x, dtype)
    # below 2⁻¹²⁶ float32 itself has no relative precision left
    tiny = 2.0**-126
    assert ((restored - x).abs() <= bound(x, scale, dtype) + tiny).all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_bound_is_tight(dtype):
    """Some value comes within 2 % of the bound, so it could not be stated any smaller."""
    x = torch.linspace(-1, 1, 400_001)[None]
    restored, scale = round_trip(x, dtype)
    share = (restored - x).abs() / bound(x, scale, dtype)
    assert 0.98 <= share.max() <= 1.0


def test_both_branches_of_the_fp8_bound_are_tight():
    x = torch.linspace(0, 1, 4_000_001)[None]
    restored, scale = round_trip(x, E4M3)
    error, small = (restored - x).abs(), x < 2.0**-6 * scale
    assert (error / (scale * 2.0**-10))[small].max() >= 0.98
    assert (error / (x.abs() / 17))[~small].max() >= 0.98


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_value_of_a_token_is_exact(dtype):
    x = torch.tensor([[127.0 * 448, -3.0], [-127.0 * 448, 5.0]])
    restored, _ = round_trip(x, dtype)
    assert restored[:, 0].tolist() == x[:, 0].tolist()


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_token_has_its_own_scale(dtype):
    x = torch.tensor([[1.0, 0.5], [1000.0, 500.0]])
    _, scale = quantize_per_token(x, dtype)
    assert scale[:, 0].tolist() == pytest.approx([1 / MAX_CODE[dtype], 1000 / MAX_CODE[dtype]])


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_token_of_zeros_has_scale_and_codes_zero(dtype):
    codes, scale = quantize_per_token(torch.tensor([[0.0, 0.0], [1.0, 2.0]]), dtype)
    assert scale[0].item() == 0.0
    assert codes[0].float().tolist() == [0.0, 0.0]
    assert dequantize_per_token(codes, scale)[0].tolist() == [0.0, 0.0]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_inf_are_seen_again_in_their_token_and_nowhere_else(dtype, bad):
    restored, _ = round_trip(torch.tensor([[1.0, bad, 2.0], [1.0, 0.5, 2.0]]), dtype)
    assert not restored[0].isfinite().any()
    assert restored[1].isfinite().all()
