import pytest

from histories import history
from qc_compiler.controllers import MagCache


def test_defaults():
    rule = MagCache()
    assert (rule.threshold, rule.max_skip, rule.retention, rule.ratios) == (0.06, 3, 0.2, ())


def decide(magnitude, skipped, num_steps=None, **fields):
    rows = [[1], [1], *[[0]] * skipped]
    table = [[1], [magnitude], *[[0]] * skipped]
    (decision,) = MagCache(**fields).decide(history(rows, num_steps=num_steps, magnitude=table))
    return bool(decision)


def test_the_error_of_each_skipped_step_adds_up():
    # γ = 0.9: |1 − 0.9| = 0.1, |1 − 0.81| = 0.19, |1 − 0.729| = 0.271
    for skipped, total in enumerate((0.1, 0.29, 0.561)):
        assert not decide(0.9, skipped, threshold=total + 1e-3)
        assert decide(0.9, skipped, threshold=total - 1e-3)


def test_growth_counts_like_shrinking():
    assert not decide(1.1, 0, threshold=0.101)
    assert decide(1.1, 0, threshold=0.099)


def test_the_ratio_is_per_step():
    past = history([[1], [0], [1]], magnitude=[[1], [0], [0.81]])  # γ = 0.9
    assert MagCache(threshold=0.101).decide(past).tolist() == [False]
    assert MagCache(threshold=0.099).decide(past).tolist() == [True]


def test_at_most_k_steps_in_a_row():
    assert [decide(1.0, skipped) for skipped in range(5)] == [False, False, False, True, True]


@pytest.mark.parametrize(("num_steps", "expected"), [(10, False), (11, True), (None, False)])
def test_the_first_fifth_is_computed(num_steps, expected):
    assert decide(1.0, 0, num_steps=num_steps) == expected  # step 2 of 10: not among 0, 1


def test_calibrated_ratios_replace_the_estimate():
    ratios = (1.0, 1.0, 1.0, 0.9, 0.8)
    # skipped since step 2: |1 − 1| + |1 − 0.9| + |1 − 0.72| = 0.38 at step 4
    assert not decide(0.5, 2, ratios=ratios, threshold=0.381, num_steps=10)
    assert decide(0.5, 2, ratios=ratios, threshold=0.379, num_steps=10)


def test_a_region_computed_once_is_computed_again():
    assert MagCache().decide(history([[1, 1], [0, 1]], magnitude=[[1, 1], [0, 1]])).tolist() == [True, False]
