import numpy as np
import pytest
import torch

from driver import Driver, noise
from qc_compiler.statistics import Statistic, Sum, ratios, region_sums


def sums_of(x, y, cached, num_frames=1):
    return region_sums([x], [y], [y - x], [cached], num_frames)


def test_ratios_are_free_of_units():
    x, y, cached = (noise(seed, 2, 6, 8) for seed in range(3))
    rows = [ratios(sums_of(scale * x, scale * y, scale * cached, 3).numpy()) for scale in (1.0, 64.0)]
    np.testing.assert_allclose(rows[0], rows[1], rtol=1e-5)


def test_two_streams_count_as_one_longer_stream():
    x, y, cached = (noise(seed, 2, 6, 8) for seed in range(3))
    parts = [list(t.split([2, 4], dim=1)) for t in (x, y, y - x, cached)]
    torch.testing.assert_close(region_sums(*parts, 1), sums_of(x, y, cached))


def test_half_precision_is_summed_in_float32():
    x = torch.full((1, 300, 300), 1.5, dtype=torch.float16)
    sums = sums_of(x, 2 * x, x)
    assert sums.dtype == torch.float32
    assert sums[Sum.BEFORE] == 1.5 * 300 * 300  # beyond what float16 holds


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_one_bad_element_shows(bad):
    y = noise(0, 2, 6, 8)
    y[1, 3, 5] = bad
    row = ratios(sums_of(torch.ones(2, 6, 8), y, torch.ones(2, 6, 8)).numpy())
    assert not np.isfinite(row[Statistic.CHANGE])


def test_still_frames_do_not_move_and_noise_does():
    still = noise(0, 1, 1, 4, 8).expand(1, 3, 4, 8).reshape(1, 12, 8)
    zeros = torch.zeros(1, 12, 8)
    motion = [float(ratios(sums_of(zeros, y, zeros, 3).numpy())[Statistic.MOTION]) for y in (still, noise(1, 1, 12, 8))]
    assert motion[0] == 0
    assert 0.5 < motion[1] < 1


def test_a_reused_region_has_zeros():
    driver = Driver(cache="static", interval=3, level="block")
    for i, t in enumerate((900, 800, 700, 600)):
        driver(noise() * (1 + i / 10), t)
    statistics = np.array([step.resolve().statistics for step in driver.runtime.trajectories[0].streams[0].steps])
    assert statistics[[0, 3]].any(axis=(1, 2)).all()
    assert not statistics[[1, 2]].any()
