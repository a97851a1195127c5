import pytest

from histories import history
from qc_compiler.controllers import HLC


def test_defaults():
    assert (HLC().tau, HLC().threshold, HLC().max_skip) == ((12, 6, 3), 0.03, None)


def wants(rule, change, skipped, motion=1.0, num_steps=100, gap=1):
    """One region: computed at 0 and at `gap` with this change, then skipped so often."""
    rows = [[1], *[[0]] * (gap - 1), [1], *[[0]] * skipped]
    changes = [[change if i == gap else 0] for i in range(len(rows))]
    motions = [[motion] for _ in rows]
    (decision,) = rule.decide(history(rows, num_steps=num_steps, change=changes, motion=motions))
    return bool(decision)


def until(rule, *args, **kwargs):
    """Steps until the next computation."""
    return next(skipped + 1 for skipped in range(80) if wants(rule, *args, skipped, **kwargs))


@pytest.mark.parametrize(("change", "tau"), [(0.0, 12), (0.029, 12), (0.031, 6), (0.089, 6), (0.091, 3), (5.0, 3)])
def test_the_smaller_the_change_the_longer_the_skip(change, tau):
    """δ = (0.03, 0.09), τ = (12, 6, 3)."""
    assert until(HLC(), change) == tau


def test_the_limits_belong_to_the_class_above():
    rule = HLC(threshold=0.25)  # exact in binary: δ = (0.25, 0.75)
    assert [until(rule, change) for change in (0.25, 0.75)] == [6, 3]


def test_the_change_is_per_step():
    assert until(HLC(), 0.08, gap=1) == 6
    assert until(HLC(), 0.08, gap=4) == 12  # 0.02 a step


def test_motion_multiplies_the_change():
    assert until(HLC(), 0.06, motion=0.4) == 12  # D = 0.024
    assert until(HLC(), 0.06, motion=1.0) == 6


@pytest.mark.parametrize(
    ("num_steps", "taus"), [(100, (12, 6, 3)), (50, (6, 3, 2)), (200, (24, 12, 6)), (20, (2, 1, 1))]
)
def test_tau_scales_with_the_number_of_steps(num_steps, taus):
    assert tuple(until(HLC(), change, num_steps=num_steps) for change in (0.01, 0.05, 0.5)) == taus


def test_an_unknown_number_of_steps_counts_as_50():
    assert until(HLC(), 0.05, num_steps=None) == 3


@pytest.mark.parametrize("max_skip", [0, 1, 4])
def test_max_skip_cuts_tau(max_skip):
    assert until(HLC(max_skip=max_skip), 0.0) == max_skip + 1
    assert until(HLC(max_skip=max_skip), 9.0) == min(3, max_skip + 1)


def test_a_region_computed_once_has_no_change_yet():
    assert HLC().decide(history([[1, 1], [0, 1]], num_steps=100)).tolist() == [True, False]


def test_the_last_two_steps_are_computed():
    for length, expected in ((7, False), (8, True), (9, True)):
        past = history([[1], [1], *[[0]] * (length - 2)], num_steps=10)
        assert HLC(tau=(100, 100, 100)).decide(past).tolist() == [expected], length


def test_regions_decide_for_themselves():
    past = history([[1, 1], [1, 1], [0, 0], [0, 0]], num_steps=100, change=[[0, 0], [0.01, 0.5], [0, 0], [0, 0]])
    assert HLC().decide(past).tolist() == [False, True]
