import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qc_compiler.calibration.selection import SELECTIONS, affinity, normalized, quotas, select, spectral_coordinates
from qc_compiler.errors import OptionError


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def naive_affinity(samples, steps, columns, alpha):
    """Eq. 4 of the paper, one entry after the other in float64; a zero has the cosine 0."""
    rows = []
    for x, t in zip(samples.double(), steps):
        row = []
        for y, u in zip(samples.double()[columns], steps[columns]):
            lengths = float(x.norm() * y.norm())
            cosine = float(x @ y) / lengths if lengths else 0.0
            row.append(max(alpha * cosine + (1 - alpha) * math.exp(-abs(float(t) - float(u))), 0.0))
        rows.append(row)
    return np.array(rows)


SAMPLES = {
    "any": lambda n, seed: randn(n, 5, seed=seed),
    "identical": lambda n, seed: randn(1, 5, seed=seed).repeat(n, 1),
    "zero": lambda n, seed: torch.zeros(n, 5),
    "some zero": lambda n, seed: randn(n, 5, seed=seed) * (torch.arange(n) % 3 > 0)[:, None],
}


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.sampled_from(sorted(SAMPLES)), st.integers(1, 150), st.data(), st.integers(0, 2**31 - 1))
def test_every_method_returns_distinct_ascending_indices_and_repeats(kind, n, data, seed):
    count = data.draw(st.integers(1, n) | st.just(n))
    steps = np.random.default_rng(seed).integers(0, data.draw(st.sampled_from([1, 10, 1000])), n)
    samples = SAMPLES[kind](n, seed)
    for method in SELECTIONS:
        chosen = select(method, samples, steps, count, seed)
        assert chosen.shape == (count,)
        assert chosen.dtype == np.int_
        assert chosen[0] >= 0
        assert chosen[-1] < n
        assert (np.diff(chosen) > 0).all()
        assert np.array_equal(chosen, select(method, samples, steps, count, seed))


@pytest.mark.parametrize("method", ["tap", "random", "kmeans"])
def test_another_seed_chooses_others(method):
    samples, steps = randn(200, 8), np.arange(200) % 20
    assert any(
        not np.array_equal(select(method, samples, steps, 10, s), select(method, samples, steps, 10)) for s in (1, 2)
    )


def test_samples_may_be_half_precision_and_part_of_a_graph():
    samples = randn(40, 8).bfloat16()
    for method in SELECTIONS:
        exact = select(method, samples.double(), np.arange(40), 7)
        assert np.array_equal(select(method, samples.requires_grad_(), np.arange(40), 7), exact)


def test_uniform_is_evenly_spaced_over_the_steps():
    steps = np.random.default_rng(0).permutation(np.repeat(np.arange(10), 6))
    chosen = select("uniform", torch.ones(60, 2), steps, 20)
    assert np.bincount(steps[chosen]).tolist() == [2] * 10
    assert select("uniform", torch.ones(60, 2), np.arange(60), 3).tolist() == [10, 30, 50]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"method": "tab"}, r"method='tab': did you mean 'tap'\? valid: kmeans, random, tap, uniform"),
        ({"count": 0}, "count=0: expected 1 to 6"),
        ({"count": 7}, "count=7: expected 1 to 6"),
        ({"steps": np.arange(5)}, r"samples \(6, 4\) at steps \(5,\): expected shapes \(N, F\) and \(N,\)"),
        ({"steps": np.zeros((6, 1), int)}, r"samples \(6, 4\) at steps \(6, 1\)"),
        ({"samples": torch.ones(6)}, r"samples \(6,\) at steps \(6,\)"),
        ({"samples": torch.ones(6, 0)}, r"samples \(6, 0\) at steps \(6,\)"),
        ({"samples": torch.ones(6, 4).index_fill(0, torch.tensor([3, 5]), math.nan)}, r"samples\[3\] is not finite"),
        ({"samples": torch.full((6, 4), 1e300, dtype=torch.float64)}, r"samples\[0\] is not finite"),
    ],
)
def test_what_cannot_be_is_said(change, message):
    valid = {"method": "uniform", "samples": torch.ones(6, 4), "steps": np.arange(6), "count": 2}
    with pytest.raises(OptionError, match=message):
        select(**{**valid, **change})


@settings(deadline=None, max_examples=50, derandomize=True)
@given(st.integers(1, 20), st.sampled_from([0.0, 0.5, 1.0]), st.integers(0, 2**31 - 1))
def test_the_affinity_is_the_formula(n, alpha, seed):
    rng = np.random.default_rng(seed)
    samples, steps = SAMPLES["some zero"](n, seed), rng.integers(0, 6, n)
    columns = rng.choice(n, rng.integers(1, n + 1), replace=False)
    assert np.allclose(
        affinity(samples, steps, columns, alpha), naive_affinity(samples, steps, columns, alpha), rtol=0, atol=1e-6
    )


def test_steps_without_a_sign_are_subtracted_all_the_same():
    steps = np.array([0, 3], dtype=np.uint8)
    assert np.allclose(affinity(torch.eye(2), steps, np.array([1]), 0.0)[:, 0], [math.exp(-3), 1])


def test_the_coordinates_are_the_singular_vectors_of_the_normalized_affinity():
    samples, steps, k = randn(15, 6), np.arange(15) // 3, 4  # few samples: every subsample is all of them
    a = naive_affinity(samples, steps, np.arange(15), 0.5)
    u = np.linalg.svd(a / np.sqrt(np.outer(a.sum(axis=1), a.sum(axis=0))))[0][:, :k]
    coordinates = spectral_coordinates(samples, steps, k, np.random.default_rng(0))
    assert coordinates.shape == (15, 3 * k)
    for part in np.split(coordinates, 3, axis=1):
        assert np.allclose(part @ part.T, u @ u.T, atol=1e-5)


def test_directions_of_noise_are_no_coordinates():
    samples = randn(1, 6).repeat(40, 1)
    coordinates = spectral_coordinates(samples, np.zeros(40), 5, np.random.default_rng(0))
    assert np.allclose(coordinates, 40**-0.5)
    assert coordinates.shape == (40, 3)


def test_a_sample_like_no_other_is_kept_out_of_the_sums():
    assert np.isfinite(normalized(np.array([[1.0, 2.0], [0.0, 0.0]]))).all()


@given(st.lists(st.integers(0, 30), min_size=1, max_size=20), st.data())
def test_quotas_are_as_equal_as_the_sizes_allow(sizes, data):
    count = data.draw(st.integers(0, sum(sizes)))
    quota = quotas(np.array(sizes), count)
    assert quota.sum() == count
    assert (quota <= sizes).all()
    assert (quota[quota < sizes] >= quota.max() - 1).all()


DIRECTIONS = np.repeat(np.arange(4), (1400, 400, 150, 50))


def four_directions(seed):
    """Samples in four directions, one after the other in time; the last is one in 40."""
    directions = torch.linalg.qr(randn(32, 32, seed=seed)).Q[:4]
    return directions[DIRECTIONS] + 0.02 * randn(len(DIRECTIONS), 32, seed=seed + 1), np.arange(len(DIRECTIONS)) // 40


def test_tap_takes_from_every_direction_where_random_misses_the_rare_one():
    seeds = range(8)
    covered = {
        method: [len(set(DIRECTIONS[select(method, *four_directions(seed), 8, seed)])) == 4 for seed in seeds]
        for method in ("tap", "random")
    }
    assert sum(covered["tap"]) >= 7  # a subsample may hold few columns of the rare one
    assert sum(covered["random"]) <= 2
    assert covered["tap"][0]
    assert not covered["random"][0]


def test_tap_takes_a_repeated_sample_once_for_each_step():
    copies, count = 60, 40
    others = randn(40, 64)
    samples = torch.cat([others, others[:1] + 1e-3 * randn(copies, 64, seed=1)])
    steps = np.concatenate([np.arange(40), 40 + np.arange(copies) // 20])  # three cached steps, 20 copies each
    repeated = {method: int((select(method, samples, steps, count) >= 40).sum()) for method in SELECTIONS}
    assert repeated["tap"] <= 3
    assert repeated["kmeans"] <= 1
    assert min(repeated["random"], repeated["uniform"]) > 15


def test_tap_tells_the_steps_of_identical_samples_apart():
    steps = np.repeat(np.arange(5), 20)
    for seed in range(5):
        assert steps[select("tap", torch.ones(100, 8), steps, 5, seed)].tolist() == [0, 1, 2, 3, 4]


def test_tap_draws_the_same_number_from_each_of_a_hundred_clusters():
    groups = np.repeat(np.arange(100), 4)
    samples = torch.eye(100)[groups]
    chosen = select("tap", samples, groups * 10, 300)
    assert np.bincount(groups[chosen]).tolist() == [3] * 100
