import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc_compiler.errors import OptionError
from qc_compiler.formats import parse_format

NAMES = [
    "int8", "int8/tensor", "int8/m63", "int6", "int4", "int4/64", "int4/128",
    "uint8", "uint8/tensor", "uint4/64",
    "fp8", "fp8/tensor", "fp8-e5m2", "fp8-e5m2/tensor", "nvfp4",
]  # fmt: skip
TINY = 2.0**-126  # below it float32 itself has no relative precision left

ROWS = st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=40)


def tensors():
    """Rows of ragged sizes, over 24 orders of magnitude, with outliers and zeros."""
    return st.builds(
        lambda row, size, outlier: (
            torch.tensor([row, row[::-1], [0.0] * len(row)]) * size + outlier * torch.eye(3, len(row))
        ),
        ROWS,
        st.sampled_from([0.0, 1e-12, 1e-3, 1.0, 1e12]),
        st.sampled_from([0.0, 0.0, 100.0]),
    )


@pytest.mark.parametrize("name", NAMES)
@given(x=tensors())
def test_the_documented_bound_holds(name, x):
    form = parse_format(name)
    parts = form.quantize(x)
    assert ((form.dequantize(*parts) - x).abs() <= form.bound(x, *parts) + TINY).all()


@pytest.mark.parametrize("name", NAMES)
def test_the_bound_is_tight(name):
    """Some value comes within 5 % of the bound, so it could not be stated any smaller."""
    form = parse_format(name)
    x = torch.linspace(-1, 1, 400_001)[None]
    parts = form.quantize(x)
    error, bound = (form.dequantize(*parts) - x).abs(), form.bound(x, *parts)
    assert (error / bound.clamp(min=TINY)).max() > 0.95


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_strides_and_dtypes_do_not_matter(name, dtype):
    form = parse_format(name)
    x = torch.randn(7, 2, 5, generator=torch.Generator().manual_seed(0)).to(dtype).permute(1, 2, 0)
    plain = form.quantize(x.contiguous().float())
    for part, expected in zip(form.quantize(x), plain):
        assert torch.equal(part.float(), expected.float())
    assert form.dequantize(*plain).dtype == torch.float32
    assert form.round_trip(x).dtype == dtype
    assert len(plain) == form.num_parts


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_nan_and_inf_are_seen_again(name, bad):
    form = parse_format(name)
    x = torch.ones(2, 8)
    x[0, 3] = bad
    assert not form.round_trip(x)[0].isfinite().all()


@pytest.mark.parametrize("name", NAMES)
def test_zeros_stay_zeros(name):
    assert not parse_format(name).round_trip(torch.zeros(3, 20)).any()


@pytest.mark.parametrize("name", NAMES)
@given(x=tensors())
def test_packing_loses_nothing(name, x):
    form = parse_format(name)
    codes, *_ = form.quantize(x)
    packed = form.pack(codes)
    assert packed.shape[-1] == (codes.shape[-1] + 1) // 2 if form.bits <= 4 else codes.shape[-1]
    assert torch.equal(form.unpack(packed, x.shape[-1]).view(torch.uint8), codes.view(torch.uint8))


@pytest.mark.parametrize("name", NAMES)
def test_a_name_is_read_back(name):
    assert parse_format(name).name == name


def test_an_unknown_name_is_an_error_that_lists_the_valid_ones():
    with pytest.raises(OptionError, match=r"'int9' is no format: expected nvfp4"):
        parse_format("int9")


def test_every_nvfp4_code_is_reached_and_scales_are_those_of_the_specification():
    values = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    x = torch.cat((values, -values))[None].repeat(1, 2)
    x[0, 16:] /= 64  # a second block, 64 times smaller
    codes, scales, tensor_scale = parse_format("nvfp4").quantize(x)
    assert float(tensor_scale) == pytest.approx(6 / (448 * 6))
    assert scales.float().tolist() == [[448.0, 7.0]]
    assert codes[0, :16].tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 0, 9, 10, 11, 12, 13, 14, 15]
    assert torch.equal(codes[0, :16], codes[0, 16:])
    assert torch.equal(parse_format("nvfp4").round_trip(x), x)


def test_a_zero_point_halves_the_step_where_all_values_are_positive():
    x = torch.rand(4, 64, generator=torch.Generator().manual_seed(0))
    with_zero, without = (parse_format(name).quantize(x)[1] for name in ("uint8", "int8"))
    assert torch.allclose(with_zero * 255, without * 127)
