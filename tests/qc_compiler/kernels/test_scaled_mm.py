import pytest
import torch

from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.kernels.base import LinearShape
from qc_compiler.kernels.scaled_mm import ScaledMM

KERNEL, FP8 = ScaledMM(), parse_format("fp8")


def has_fp8():
    return not torch.cuda.is_available() or torch.cuda.get_device_capability() >= (8, 9)


@pytest.mark.skipif(not has_fp8(), reason="this GPU does not multiply fp8")
@pytest.mark.parametrize("rows", [(1,), (2, 17), (2, 3, 40)])
def test_it_agrees_with_the_format(rows):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(*size, 64, generator=generator).to(device) for size in (rows, (48,)))
    bias = torch.randn(48, generator=generator).bfloat16().to(device)
    parts, held = FP8.quantize(x.bfloat16()), FP8.quantize(w)
    x_hat, w_hat = FP8.dequantize(*parts).double(), FP8.dequantize(*held).double()
    terms = x_hat.abs() @ w_hat.abs().T
    for b in (None, bias):
        found = KERNEL.linear(parts, KERNEL.prepare(held, "fp8"), b, torch.bfloat16)
        expected = x_hat @ w_hat.T + (0 if b is None else b.double())
        assert found.dtype == torch.bfloat16
        # without its own instructions a CPU rounds the product to bfloat16 before the bias
        assert ((found.double() - expected).abs() <= 2.0**-8 * 2 * (expected.abs() + 4) + 2.0**-13 * terms).all()


def test_which_schemes_and_shapes_it_takes():
    assert [name for name, scheme in SCHEMES.items() if KERNEL.takes(scheme)] == ["fp8"]
    shapes = [(64, 48, torch.bfloat16), (72, 48, torch.bfloat16), (64, 40, torch.bfloat16), (64, 48, torch.float16)]
    assert [KERNEL.fits(LinearShape(5, *shape)) for shape in shapes] == [True, False, False, False]
