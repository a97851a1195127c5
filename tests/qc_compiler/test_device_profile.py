import json

import pytest
import torch
from pydantic import ValidationError

from qc_compiler import device_profile
from qc_compiler.costs import flop_counter
from qc_compiler.device_profile import DeviceProfile, Rates
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.kernels.timing import cache_path

CPU = DeviceProfile(torch.device("cpu"))


@pytest.fixture
def measured(monkeypatch):
    """What was measured, in order; every rate is 5."""
    calls = []

    def measure(kind, dtype, device):
        calls.append((kind, dtype))
        return Rates(axes=((1.0, 2.0),), values=(5.0, 5.0))

    monkeypatch.setattr(device_profile, "_measure", measure)
    return calls


def test_rates_are_measured_once_a_kind_and_dtype(measured):
    first = CPU.rates("linear")
    assert DeviceProfile(torch.device("cpu")).rates("linear") == first
    CPU.rates("linear", torch.bfloat16)
    CPU.rates("memory")
    assert measured == [("linear", torch.float32), ("linear", torch.bfloat16), ("memory", torch.float32)]


def test_another_device_is_measured_anew(measured, monkeypatch):
    CPU.rates("linear")
    monkeypatch.setattr(device_profile, "device_name", lambda device: "another CPU")
    CPU.rates("linear")
    assert len(measured) == 2
    assert len(json.loads(cache_path("profile.json").read_text())) == 2


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", '{"a": 1}', '{"a": {"axes": [[1, 2]], "values": [1]}}', '{"a": {"axes": [[1]], "values": [-1]}}'],
)
def test_a_damaged_file_is_measured_again(text, measured):
    CPU.rates("linear")
    cache_path("profile.json").write_text(text)
    assert CPU.rates("linear").values == (5.0, 5.0)
    assert len(measured) == 2
    assert len(json.loads(cache_path("profile.json").read_text())) == 1


def test_a_file_that_cannot_be_written_is_no_failure(measured, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    CPU.rates("linear")
    CPU.rates("linear")
    assert len(measured) == 2


def test_rates_are_interpolated_in_logarithms():
    rates = Rates(axes=((1, 100), (10, 1000)), values=(1, 4, 4, 16))
    assert rates.at([1, 10]) == pytest.approx(1)
    assert rates.at([10, 100]) == pytest.approx(4)
    assert rates.at([100, 100]) == pytest.approx(8)


def test_beyond_the_grid_its_nearest_point_counts():
    rates = Rates(axes=((2, 8), (1, 2)), values=(1, 2, 3, 4))
    assert rates.at([0, 0.5]) == pytest.approx(1)
    assert rates.at([100, 100]) == pytest.approx(4)
    assert rates.peak == 4


@pytest.mark.parametrize("axes", [[[1, 2, 3]], [[2, 1]], [[1, 1]], [[0, 1]]])
def test_rates_that_belong_to_no_grid_are_refused(axes):
    with pytest.raises(ValidationError):
        Rates(axes=axes, values=[1, 1])


@pytest.mark.parametrize("kind", ["linear", "convolution", "attention", "memory", "special", "w8a8"])
def test_every_kind_can_be_measured(kind, monkeypatch):
    """The work that a benchmark claims is what its call does: FLOPs by torch's counter."""
    done = []

    def seconds(run, device):
        with flop_counter() as counter:
            run()
        done.append(counter.get_total_flops())
        return 1.0

    monkeypatch.setattr(device_profile, "_seconds", seconds)
    axes = device_profile._AXES.get(kind, device_profile._AXES["linear"])
    monkeypatch.setitem(device_profile._AXES, kind, tuple(axis[1:3] for axis in axes))
    rates = device_profile._measure(kind, torch.float32, torch.device("cpu"))
    if kind not in ("memory", "special"):
        assert list(rates.values) == done


def test_schemes_that_a_cpu_multiplies():
    assert [scheme for scheme in SCHEMES if CPU.multiplies(scheme)] == ["w8a8", "w4a8", "w4a6"]
