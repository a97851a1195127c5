import pytest

from histories import history
from qc_compiler.controllers import TDC


def test_defaults():
    assert (TDC().threshold, TDC().max_skip) == (0.4, 2)


@pytest.mark.parametrize(
    ("change", "skipped", "expected"),
    [
        (0.125, 0, False),  # Σ r = 1 · 0.125 < 0.4
        (0.125, 1, False),  # 0.25
        (0.125, 2, True),  # 0.375 < 0.4, but two steps were skipped already
        (0.25, 0, False),
        (0.25, 1, True),  # 0.5
        (0.5, 0, True),
    ],
)
def test_the_change_adds_up_over_the_skipped_steps(change, skipped, expected):
    past = history([[1], [1], *[[0]] * skipped], change=[[0], [change], *[[0]] * skipped])
    assert TDC().decide(past).tolist() == [expected]


def test_the_threshold_itself_is_too_much():
    past = history([[1], [1], [0]], change=[[0], [0.25], [0]])
    assert TDC(threshold=0.5).decide(past).tolist() == [True]
    assert TDC(threshold=0.5000001).decide(past).tolist() == [False]


def test_the_change_is_per_step():
    past = history([[1], [0], [1], [0]], change=[[0], [0], [0.25], [0]])  # r = 0.125, age 2
    assert TDC(threshold=0.26).decide(past).tolist() == [False]
    assert TDC(threshold=0.24).decide(past).tolist() == [True]


def test_a_region_computed_once_is_computed_again():
    assert TDC().decide(history([[1, 1], [0, 1]])).tolist() == [True, False]
