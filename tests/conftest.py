import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before any kernel is defined


@pytest.fixture(autouse=True)
def _seeded():
    """A test draws the same numbers in whatever order they run."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _own_kernel_times(tmp_path, monkeypatch):
    """No test reads or writes what was measured on this machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


@pytest.fixture
def kernels_win(monkeypatch):
    """Kernels count as faster, whatever they are: tiny shapes are never worth one."""
    monkeypatch.setattr("passes.quantize_linears.why_slower", lambda *_: None)


@pytest.fixture
def triton_everywhere(monkeypatch, kernels_win):
    """The CPU gets the kernels of CUDA devices, in Triton's interpreter."""
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("where there is a GPU the kernels are compiled for it")
    from qc_compiler.kernels.triton_linear import TritonLinear
    from qc_compiler.kernels.triton_quantize import triton_quantize

    for name in ("passes.quantize_linears", "passes.lower_linears"):
        monkeypatch.setattr(f"{name}.find_kernel", lambda *_: TritonLinear())
    monkeypatch.setattr("passes.lower_linears.find_rotating_quantizer", lambda *_: triton_quantize)


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """Each test compiles for itself; nothing is left of the one before."""
    yield
    torch._dynamo.reset()


def pytest_collection_modifyitems(items):
    for item in items:
        if item.get_closest_marker("cuda") and not torch.cuda.is_available():
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
