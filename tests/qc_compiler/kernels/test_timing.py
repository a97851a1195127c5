import json

import torch

from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.kernels import timing
from qc_compiler.kernels.int8_cpu import Int8CPU

CASE = (Int8CPU.here(), SCHEMES["w8a8"], 16, 64, 32, torch.float32, torch.device("cpu"))


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
    assert timing.seconds(*CASE[:2], 17, *CASE[3:]) == (1.0, 2.0)


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


def test_the_faster_one_wins(monkeypatch):
    monkeypatch.setattr(timing, "_measure", lambda *_: [2.0, 1.0])
    assert timing.why_slower(*CASE) is None
