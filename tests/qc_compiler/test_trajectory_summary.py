from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qc_compiler
from driver import Driver, noise
from head_plans import attentions
from qc_compiler.graph import RegionSpec, Report
from qc_compiler.pipeline import PassRun
from qc_compiler.plan import Plan, Quantization
from qc_compiler.plot import _maps
from qc_compiler.trajectory_summary import computed_share
from tiny_models import compile_eagerly, eager_backend, sample, tiny_dit


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


@pytest.fixture(scope="module")
def summary():
    model = torch.compile(tiny_dit(), backend=backend, options={"cache": "static", "interval": 4, "level": "block"})
    sample(model)
    return qc_compiler.summary(model)


def test_summary_shows_what_was_computed(summary):
    (stream,) = summary.streams
    assert [region.name for region in summary.regions] == ["blocks.0", "blocks.1", "blocks.2"]
    assert np.array_equal(stream.computed[:, 0], [True, False, False, False] * 2)
    assert summary.computed_share == 0.25
    assert summary.peak_slot_bytes == stream.slot_bytes == 3 * 2 * 16 * 32 * 4  # blocks × (B, N, C) × bytes


def test_summary_prints_a_row_a_region(summary):
    text = str(summary)
    assert "blocks.2" in text
    assert "█···█···" in text
    assert "computed share 0.250 over 1 stream" in text


def test_what_holds_at_every_step_is_said(tmp_path, summary):
    plan = Plan.without_schedule("", pruned=("blocks.0", "blocks.2/mlp"))
    options = {"cache": "static", "level": "block", "quantize": "w8a8", "emulate": True, "plan": plan}
    model = torch.compile(tiny_dit(), backend=backend, options=options)
    sample(model, 2)
    found = qc_compiler.summary(model)
    assert found.always == ("linears w8a8", "without blocks.0, blocks.2/mlp")
    assert "at every step: linears w8a8" in str(found)
    found.plot(tmp_path / "map.png")
    assert summary.always == ()


def test_what_was_pruned_is_told_from_what_was_reused(tmp_path):
    """blocks.0 is pruned at the second step, where blocks.1 is reused."""
    compute = np.array([[True] * 3, [False, False, True]])
    weights = np.array([[[0], [1], [1]]] * 2, np.float32)[None]
    plan = Plan("", "block", ("blocks.0", "blocks.1", "blocks.2"), (1000.0, 500.0), compute[None], weights)
    model = torch.compile(tiny_dit(), backend=backend, options={"plan": plan})
    sample(model, 2)
    summary = qc_compiler.summary(model)
    assert summary.streams[0].pruned.tolist() == [[False] * 3, [True, False, False]]
    assert (summary.pruned_share, summary.computed_share) == (1 / 6, 4 / 6)
    text = str(summary)
    assert all(marks in text for marks in ("█×", "█·", "██", "× pruned", "pruned share 0.167"))
    summary.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_nothing_is_said_of_pruning_where_nothing_is_pruned(summary):
    assert summary.pruned_share == 0
    assert "pruned" not in str(summary)


def test_without_quantization_nothing_is_said_of_it(summary):
    (stream,) = summary.streams
    assert (stream.num_bounded, stream.precision, summary.schemes, summary.precision_shares) == (0, None, (), {})
    assert "precision" not in str(summary)
    assert "noise floor" not in str(summary)


def test_changes_below_the_noise_floor_are_counted():
    driver = Driver(cache="static", interval=2, level="block")
    empty = np.zeros(0, np.float32)
    noises = np.array([[1e3, 1e3, 0]], np.float32)
    known = Quantization(
        "w8a8", (), np.zeros(0, np.int8), empty, empty, empty, noise=noises, regions=driver.graph.names
    )
    none = np.zeros((1, 0, 0), np.bool_), np.zeros((1, 0, 0, 1), np.float32)
    driver.runtime.options = replace(driver.runtime.options, quantize="w8a8")
    driver.runtime.reports = [PassRun("lower-linears", Report(changed=1), 0.0)]
    driver.runtime.configure(plan=Plan(driver.runtime.fingerprint, "output", (), (), *none, quantization=known))
    model = SimpleNamespace()
    for expected, phrase in ((2, "2 changes lay below the noise floor"), (4, "4 changes lay below the noise floor")):
        for _ in range(2 if driver.decisions else 3):
            driver(noise(), 1000 - 100 * len(driver.decisions))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("qc_compiler.trajectory_summary.runtime_of", lambda _: driver.runtime)
            summary = qc_compiler.summary(model)
        assert summary.streams[0].num_bounded == expected
        assert phrase in str(summary)
    one = replace(summary, streams=(replace(summary.streams[0], num_bounded=1),))
    assert "1 change lay below the noise floor" in str(one)


def test_the_precision_of_every_site_and_step_is_told():
    options = {"cache": "static", "interval": 2, "level": "output+block", "quantize": "dmpq", "emulate": True}
    model = torch.compile(tiny_dit(1), backend=backend, options=options)
    sample(model, 6)
    summary = qc_compiler.summary(model)
    (stream,) = summary.streams
    assert stream.precision.shape == (6, 4)
    assert ((stream.precision == -1).all(axis=1) == [False, True] * 3).all()
    assert (stream.precision[::2] == 1).all()  # every computed step comes after a reused one
    assert summary.precision_shares == {"nvfp4/nvfp4": 0.0, "nvfp4/uint8": 1.0}
    assert "precision: nvfp4/nvfp4 0 %, nvfp4/uint8 100 %" in str(summary)
    mixed = replace(stream, precision=np.array([[1, 1, 0, 1], [-1] * 4, [0, 0, 0, 1]]))
    assert "precision: nvfp4/nvfp4 50 %, nvfp4/uint8 50 %" in str(replace(summary, streams=(mixed,)))


def test_the_map_is_a_png(summary, tmp_path):
    summary.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_heads_and_precision_have_maps_of_their_own(tmp_path):
    model = tiny_dit(2)
    plan = qc_compiler.calibrate(model, sample, None, attention=0.5, windows=(0.25,), progress=False, backend=backend)
    options = {"cache": "static", "interval": 3, "quantize": "dmpq", "emulate": True, "plan": plan}
    planned = torch.compile(model, backend=backend, options=options | {"level": "output+block"})
    sample(planned)
    summary = qc_compiler.summary(planned)
    regions, heads, precision = _maps(summary, summary.streams[0])
    assert regions.names == ["output", "blocks.0", "blocks.1"]
    assert heads.names == tuple(attentions(2))
    is_computed = np.arange(len(heads.values)) % 3 == 0
    assert np.isnan(heads.values[~is_computed]).all()
    assert (heads.values[0] == 1).all()
    assert 0 < heads.values[is_computed].mean() < 1
    assert len(precision.names) == precision.values.shape[1] == 8
    assert (precision.values[~is_computed] == 0).all()
    assert (precision.values[is_computed] == 2).all()
    assert precision.labels == ("reused", "nvfp4/nvfp4", "nvfp4/uint8")
    summary.plot(tmp_path / "map.png")


def test_computed_share_is_weighted_by_flops():
    regions = [RegionSpec("a", 0, 1.0), RegionSpec("b", 0, 3.0)]
    assert computed_share(regions, [np.array([[True, True], [False, True]])]) == 7 / 8


def test_a_model_that_did_not_run_has_no_summary():
    with pytest.raises(qc_compiler.QuantCacheError, match="has not run under quantcache yet"):
        qc_compiler.summary(tiny_dit())


def test_a_model_of_which_nothing_is_guarded_has_no_summary():
    model = compile_eagerly(tiny_dit(), {"cache": "off", "quantize": "w8a8", "emulate": True})
    sample(model, 1)
    with pytest.raises(qc_compiler.QuantCacheError, match="its options guard nothing"):
        qc_compiler.summary(model)
