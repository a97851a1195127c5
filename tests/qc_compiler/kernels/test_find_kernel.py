"""The choice between kernels, for devices that are not there."""

import pytest
import torch

pytest.importorskip("triton")

from qc_compiler import kernels
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.kernels import LinearShape, find_kernel, find_rotating_quantizer
from qc_compiler.kernels.scaled_mm import ScaledMM
from qc_compiler.kernels.triton_linear import TritonLinear
from qc_compiler.kernels.triton_quantize import triton_quantize

CUDA, SHAPE = torch.device("cuda"), LinearShape(4096, 3072, 3072, torch.bfloat16)


@pytest.fixture(params=[(8, 0), (8, 9), (9, 0)])
def capability(monkeypatch, request):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda _: request.param)
    return request.param


@pytest.mark.parametrize("faster", ["Triton", "_scaled_mm"])
def test_the_faster_fp8_kernel_is_chosen(monkeypatch, capability, faster):
    monkeypatch.setattr("qc_compiler.kernels.timing.seconds", lambda k, *_: (3.0, 1.0 if k.name == faster else 2.0))
    found = find_kernel(SCHEMES["fp8"], CUDA, SHAPE)
    assert (found and found.name) == (faster if capability >= (8, 9) else None)
    ragged = LinearShape(4096, 3072, 3080, torch.bfloat16)
    found = find_kernel(SCHEMES["fp8"], CUDA, ragged)
    assert (found and found.name) == ("Triton" if capability >= (8, 9) else None)


def test_what_has_one_kernel_is_not_measured(monkeypatch, capability):
    monkeypatch.setattr("qc_compiler.kernels.timing.seconds", None)
    assert isinstance(find_kernel(SCHEMES["w8a8"], CUDA, SHAPE), TritonLinear)
    assert isinstance(find_kernel(SCHEMES["w4a8"], CUDA, SHAPE), TritonLinear)
    assert (find_kernel(SCHEMES["nvfp4"], CUDA, SHAPE) is None) == (capability < (8, 9))


def test_without_triton_pytorch_remains(monkeypatch, capability):
    monkeypatch.setattr(kernels, "find_spec", lambda _: None)
    found = [find_kernel(SCHEMES[name], CUDA, SHAPE) for name in ("w8a8", "fp8")]
    assert found == [None, ScaledMM() if capability >= (8, 9) else None]
    assert find_rotating_quantizer("uint8", CUDA) is None


def test_where_a_quantizer_rotates():
    assert find_rotating_quantizer("uint8", CUDA) is triton_quantize
    assert find_rotating_quantizer("nvfp4", CUDA) is None
    assert find_rotating_quantizer("uint8", torch.device("cpu")) is None


def test_other_devices_have_none():
    assert find_kernel(SCHEMES["w8a8"], torch.device("meta"), SHAPE) is None
