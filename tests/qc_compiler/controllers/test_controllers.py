"""The choice of a rule, and what all rules have in common."""

import dataclasses
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst

from histories import history
from qc_compiler.controllers import HLC, TDC, FirstBlock, History, MagCache, Static, Step, TeaCache, controller
from qc_compiler.options import Options
from qc_compiler.statistics import Statistic

RULES = [Static(), HLC(), TDC(), FirstBlock(), TeaCache(), MagCache()]


@pytest.mark.parametrize(
    ("options", "rule"),
    [
        (Options(cache="static", interval=3), Static(3)),
        (Options(cache="hlc"), HLC()),
        (Options(cache="hlc", threshold=0.1, max_skip=2), HLC(threshold=0.1, max_skip=2)),
        (Options(cache="tdc", threshold=0.0), TDC(threshold=0.0)),
        (Options(cache="first_block", max_skip=0), FirstBlock(max_skip=0)),
        (Options(cache="teacache", threshold=0.2), TeaCache(threshold=0.2)),
        (Options(cache="magcache", max_skip=1), MagCache(max_skip=1)),
        (Options(cache="off"), Static(1)),
    ],
)
def test_options_choose_the_rule_and_leave_its_defaults(options, rule):
    assert controller(options) == rule


@pytest.mark.parametrize("rule", RULES)
def test_rules_hold_no_state(rule):
    assert dataclasses.is_dataclass(rule)
    with pytest.raises(dataclasses.FrozenInstanceError):
        rule.threshold = 1.0


@st.composite
def histories(draw):
    regions = ("output", "probe", *(f"blocks.{i}" for i in range(draw(st.integers(1, 3)))))
    count = draw(st.integers(1, 6))
    steps = [
        Step(
            i,
            draw(npst.arrays(np.bool_, len(regions))) if i else np.ones(len(regions), bool),
            draw(npst.arrays(np.float32, (len(regions), len(Statistic)), elements=st.floats(0, 4, width=32))),
        )
        for i in range(count)
    ]
    return History(steps, count, draw(st.none() | st.integers(1, 120)), regions)


@given(st.sampled_from(RULES), histories())
def test_the_same_history_gives_the_same_decision_and_is_left_alone(rule, given_history):
    before = [(step.computed.copy(), step.statistics.copy()) for step in given_history.steps]
    first, second = rule.decide(given_history), rule.decide(given_history)
    assert first.dtype == np.bool_
    assert first.shape == (len(given_history.regions),)
    assert (first == second).all()
    for step, (computed, statistics) in zip(given_history.steps, before):
        assert (step.computed == computed).all()
        assert (step.statistics == statistics).all()


@given(histories())
def test_with_threshold_0_the_rules_that_have_one_compute_every_step(given_history):
    """Invariant 1."""
    for cls in (HLC, TDC, FirstBlock, TeaCache, MagCache):
        assert cls(threshold=0.0).decide(given_history).all()


@given(histories())
def test_max_skip_0_computes_every_step(given_history):
    for cls in (HLC, TDC, FirstBlock, TeaCache, MagCache):
        assert cls(max_skip=0).decide(given_history).all()


def test_a_history_knows_ages_and_rates():
    past = history([[1, 1], [0, 1], [0, 1], [1, 0]], change=[[0, 0], [0, 0.1], [0, 0.2], [0.6, 0]])
    assert [past.age(0), past.age(1)] == [1, 2]
    assert past.rate(0, Statistic.CHANGE) == pytest.approx(0.6 / 3)
    assert past.rate(1, Statistic.CHANGE) == pytest.approx(0.2)


def test_the_rate_of_a_magnitude_is_a_root():
    past = history([[1], [0], [1]], magnitude=[[1], [0], [0.81]])
    assert past.rate(0, Statistic.MAGNITUDE) == pytest.approx(0.9)


def test_a_region_never_computed_has_no_rate_and_the_age_of_the_trajectory():
    past = history([[1, 0], [1, 0]])
    assert past.age(1) == 3
    assert past.rate(1, Statistic.CHANGE) is None


def test_near_end_of_a_known_length():
    assert not history([[1]] * 9).near_end(2)
    assert not history([[1]] * 7, num_steps=10).near_end(2)
    assert history([[1]] * 8, num_steps=10).near_end(2)
    assert not replace(history([[1]] * 7, num_steps=10), timesteps=(15.0, 10.0, 5.0)).near_end(2)


def ends_seen(timesteps):
    """For each step whether it is seen as one of the last two."""
    past = history([[1]] * 5)
    return [replace(past, timesteps=timesteps[: i + 1]).near_end(2) for i in range(len(timesteps))]


def even(num_steps, shift=1.0):
    times = np.linspace(1, 0, num_steps + 1)[:-1]
    return shift * times / (1 + (shift - 1) * times)


def karras(num_steps):
    return np.linspace(80 ** (1 / 7), 0.002 ** (1 / 7), num_steps) ** 7


@pytest.mark.parametrize(
    ("timesteps", "most"),
    [
        (1000 * even(30), 2),
        (even(20, shift=3.0), 2),
        (even(50, shift=3.0), 2),
        (even(28, shift=5.0), 2),
        (np.arange(999.0, 0, -20), 2),  # DDIM, trailing
        (np.arange(981.0, 0, -20), 3),  # leading
        (np.linspace(999, 0, 30), 3),
    ],
)
def test_the_end_is_seen_where_timesteps_near_zero(timesteps, most):
    seen = ends_seen(timesteps)
    assert seen[-2:] == [True, True]
    assert not any(seen[:-most])


def test_of_a_strongly_shifted_schedule_the_last_step_is_seen():
    assert [i for i, seen in enumerate(ends_seen(even(20, shift=7.0))) if seen] == [19]


@pytest.mark.parametrize(
    "timesteps", [karras(20), karras(10), [None] * 4, [5.0, 5.0, 5.0], [0.7, 0.8, 0.9], [-4.0, -5.0, -6.0], [10.0, 5.0]]
)
def test_timesteps_that_do_not_fall_evenly_have_no_end(timesteps):
    assert not any(ends_seen(timesteps))
