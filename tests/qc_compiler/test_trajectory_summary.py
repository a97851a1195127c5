import numpy as np
import pytest
import torch

import qc_compiler
from qc_compiler.graph import RegionSpec
from qc_compiler.trajectory_summary import computed_share
from tiny_models import eager_backend, sample, tiny_dit


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


def test_the_map_is_a_png(summary, tmp_path):
    summary.plot(tmp_path / "map.png")
    assert (tmp_path / "map.png").read_bytes()[:4] == b"\x89PNG"


def test_computed_share_is_weighted_by_flops():
    regions = [RegionSpec("a", 0, 1.0), RegionSpec("b", 0, 3.0)]
    assert computed_share(regions, [np.array([[True, True], [False, True]])]) == 7 / 8


def test_a_model_that_did_not_run_has_no_summary():
    with pytest.raises(qc_compiler.QuantCacheError, match="has not run under quantcache yet"):
        qc_compiler.summary(tiny_dit())
