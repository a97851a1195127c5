import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.kernels import timing
from qc_compiler.kernels.base import LinearShape
from qc_compiler.kernels.int8_cpu import Int8CPU

CASE = (Int8CPU.here(), SCHEMES["w8a8"], LinearShape(16, 64, 32, torch.float32), torch.device("cpu"))


def test_a_time_is_measured_once_and_kept_on_disk(monkeypatch, tmp_path):
    first = timing.seconds(*CASE)
    assert all(0 < value < 10 for value in first)
    monkeypatch.setattr(timing, "_measure", lambda *_: [1.0, 2.0])
    assert timing.seconds(*CASE) == first
    (known,) = json.loads((tmp_path / "quantcache" / "kernels.json").read_text()).values()
    assert tuple(known) == first


def test_another_shape_is_measured_for_itself(monkeypatch):
    timing.seconds(*CASE)
    monkeypatch.setattr(timing, "_measure", lambda *_: [1.0, 2.0])
    assert timing.seconds(*CASE[:2], replace(CASE[2], rows=17), CASE[3]) == (1.0, 2.0)


def test_a_damaged_file_is_measured_anew(monkeypatch, tmp_path):
    monkeypatch.setattr(timing, "_measure", lambda *_: [1.0, 2.0])
    path = tmp_path / "quantcache" / "kernels.json"
    path.parent.mkdir()
    for text in ("{", "[]", '{"a": 1}', '{"a": [1, "b"]}'):
        path.write_text(text)
        assert timing.seconds(*CASE) == (1.0, 2.0)


def test_a_cache_that_cannot_be_written_is_no_error(monkeypatch, tmp_path):
    (tmp_path / "quantcache").write_text("a file where the folder should be")
    monkeypatch.setattr(timing, "_measure", lambda *_: [1.0, 2.0])
    assert timing.seconds(*CASE) == (1.0, 2.0)


def test_which_formats_are_multiplied_is_part_of_the_key(monkeypatch):
    timing.seconds(*CASE)
    monkeypatch.setattr(timing, "_measure", lambda *_: [1.0, 2.0])
    assert timing.seconds(CASE[0], SCHEMES["w4a8"], *CASE[2:]) == (1.0, 2.0)


def test_the_fastest_of_several_is_measured_one_alone_is_not(monkeypatch):
    measured = []

    def measure(kernel, *_):
        measured.append(kernel)
        return [5.0, float(kernel.max_code)]

    class Named(Int8CPU):
        name = property(lambda self: f"kernel {self.max_code}")

    monkeypatch.setattr(timing, "_measure", measure)
    slow, fast = Named(3), Named(2)
    assert timing.fastest([], *CASE[1:]) is None
    assert timing.fastest([slow], *CASE[1:]) is slow
    assert measured == []
    assert timing.fastest([slow, fast], *CASE[1:]) is fast
    assert timing.fastest([fast, slow], *CASE[1:]) is fast
    assert measured == [slow, fast]


@pytest.fixture
def avx2(monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: False)


def test_the_name_of_the_cpu_is_its_model_and_what_it_can(monkeypatch, avx2):
    monkeypatch.setattr(Path, "read_text", lambda _: "processor\t: 0\nmodel name\t: Some CPU: 3 GHz\n")
    assert timing.cpu_name() == "Some CPU: 3 GHz, AVX2"
    monkeypatch.setattr(torch.cpu, "_is_vnni_supported", lambda: True)
    assert timing.cpu_name() == "Some CPU: 3 GHz, AVX2 VNNI"


@pytest.mark.parametrize("text", ["", "model name\t:\n"])
def test_a_system_that_does_not_name_its_cpu(monkeypatch, avx2, text):
    monkeypatch.setattr(Path, "read_text", lambda _: text)
    monkeypatch.setattr("platform.processor", lambda: "")
    monkeypatch.setattr("platform.machine", lambda: "riscv64")
    assert timing.cpu_name() == "riscv64, AVX2"


def test_a_system_that_says_nothing(monkeypatch, avx2):
    monkeypatch.setattr("qc_compiler.kernels.timing.Path", lambda _: Path("/nowhere"))
    monkeypatch.setattr("platform.processor", lambda: "Some CPU")
    assert timing.cpu_name() == "Some CPU, AVX2"


def test_the_faster_one_wins(monkeypatch):
    monkeypatch.setattr(timing, "_measure", lambda *_: [2.0, 1.0])
    assert timing.why_slower(*CASE) is None
