import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from qc_compiler.formats import parse_format
from qc_compiler.formats.transforms import hadamard
from qc_compiler.kernels.triton_quantize import can_quantize, triton_quantize

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FORMS = ["int8", "int8/m63", "uint8", "uint6", "fp8"]
EPS = 2.0**-24


def rotated(x, size):
    """x·H in float64, and what the float32 sums of a kernel may add to it."""
    blocks = x.double().unflatten(-1, (-1, size))
    error = 2 * size * EPS * size**-0.5 * blocks.abs().sum(dim=-1, keepdim=True).expand_as(blocks)
    return (blocks @ hadamard(size, x.device).double()).flatten(-2), error.flatten(-2) if size > 1 else 0 * x


def quantized(x, form, size):
    parts = triton_quantize(x, form, size)
    assert [part.dtype for part in parts] == [part.dtype for part in parse_format(form).quantize(x)]
    assert [part.shape for part in parts] == [x.shape, *[(*x.shape[:-1], 1)] * (len(parts) - 1)]
    return parts


@settings(deadline=None, max_examples=12, derandomize=True, phases=[Phase.explicit, Phase.generate])
@pytest.mark.parametrize("form", FORMS)
@given(
    st.integers(0, 9),
    st.sampled_from([(1, 1), (200, 1), (24, 8), (130, 2), (640, 128), (96, 32)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.sampled_from(["sliced", "transposed", "every second"]),
    st.sampled_from([0.0, 1e-30, 1e-3, 100.0]),
    st.integers(0, 2**31),
)
def test_it_agrees_with_the_format_for_any_shape(form, rows, case, dtype, strides, size, seed):
    """Codes, scales and zero points of x·H, which the kernel knows up to rounding."""
    inner, rotation = case
    x = (torch.randn(rows, 2 * inner, generator=torch.Generator().manual_seed(seed)) * size).to(dtype).to(DEVICE)
    x = {"sliced": x[:, :inner], "transposed": x[:, :inner].T.contiguous().T, "every second": x[:, ::2]}[strides]
    y, error = (part.cpu() for part in rotated(x, rotation))
    codes, scale, *zero = (part.cpu() for part in quantized(x, form, rotation))
    expected = parse_format(form).quantize(y.float())
    close = error.amax(dim=-1, keepdim=True) if rows else error.sum(dim=-1, keepdim=True)
    assert ((scale.double() - expected[1]).abs() <= 4 * EPS * expected[1] + close).all()
    # half a code from the exact values, by the format's own bound
    x_hat = parse_format(form).dequantize(codes, scale, *zero).double()
    assert ((x_hat - y).abs() <= parse_format(form).bound(y, codes, scale, *zero).double() + error + 1e-42).all()
    if rotation == 1:
        assert all(map(torch.equal, (codes.float(), *zero), (expected[0].float(), *expected[2:])))
    elif form != "fp8":
        whole = codes.double() - (zero[0].double() if zero else 0)
        assert ((whole - expected[0].double() + (expected[2].double() if zero else 0)).abs() <= 1).all()


def test_the_rotation_is_the_one_of_the_weights():
    """Unit vectors give rows of H: a kernel with another order or sign of columns would still quantize well."""
    x = torch.eye(128, device=DEVICE)[::9]
    for size in (2, 16, 128):
        form = parse_format("int8")
        found = form.dequantize(*triton_quantize(x, "int8", size))
        blocks = torch.block_diag(*[hadamard(size, torch.device(DEVICE))] * (128 // size))
        assert torch.allclose(found, blocks[::9], atol=1e-6)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
@pytest.mark.parametrize("rotation", [1, 16, 128])
@pytest.mark.parametrize("form", FORMS)
def test_what_is_not_finite_stays_in_its_row(form, rotation):
    x = torch.ones(5, 256, device=DEVICE)
    x[1, 4], x[3, 200] = float("nan"), float("inf")
    found = parse_format(form).dequantize(*triton_quantize(x, form, rotation))
    reference = parse_format(form).dequantize(*parse_format(form).quantize(x))
    assert found[[1, 3]].isnan().all()
    assert reference[[1, 3]].isnan().all()
    assert found[[0, 2, 4]].isfinite().all()


def test_zeros_are_zeros():
    for form in FORMS:
        parts = triton_quantize(torch.zeros(2, 3, 32, device=DEVICE), form, 32)
        assert all((part.float() == 0).all() for part in parts)


def test_every_number_of_e4m3_and_every_tie_between_two():
    codes = torch.arange(127, dtype=torch.uint8)  # 0 … 448
    numbers = codes.view(torch.float8_e4m3fn).double()
    ties = (numbers[1:] + numbers[:-1]) / 2
    x = torch.cat([numbers, ties, ties * (1 + 1e-6), ties * (1 - 1e-6)]).float()
    x = torch.cat([x, -x])[None].to(DEVICE)  # amax is 448: the scale is 1
    found, scale = triton_quantize(x, "fp8")
    assert scale.item() == 1
    assert torch.equal(found.float(), x.to(torch.float8_e4m3fn).float())


def test_which_formats_it_makes():
    assert all(can_quantize(parse_format(form)) for form in FORMS)
    for form in ("nvfp4", "int4/128", "uint8/tensor", "fp8/tensor", "fp8-e5m2"):
        assert not can_quantize(parse_format(form))


def test_an_odd_rotation_is_refused():
    with pytest.raises(AssertionError):
        triton_quantize(torch.ones(2, 96, device=DEVICE), "int8", 64)


@pytest.mark.cuda
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", FORMS)
def test_real_sizes_compiled(form, dtype):
    x = torch.randn(2, 1000, 3072, device="cuda", dtype=dtype)
    found = torch.compile(lambda x: triton_quantize(x, form, 128))(x)
    y, error = rotated(x, 128)
    x_hat, bound = parse_format(form).dequantize(*found).double(), parse_format(form).bound(y, *found).double()
    assert ((x_hat - y).abs() <= bound + error).all()
