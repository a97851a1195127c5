import pytest

from histories import history
from qc_compiler.controllers import Static


def test_default():
    assert Static().interval == 2


@pytest.mark.parametrize(("interval", "expected"), [(1, [1, 1, 1]), (2, [0, 1, 1]), (3, [0, 0, 1]), (4, [0, 0, 0])])
def test_a_region_is_computed_when_its_interval_is_over(interval, expected):
    past = history([[1, 1, 1], [0, 1, 0], [1, 0, 0]])  # ages 1, 2, 3
    assert Static(interval).decide(past).tolist() == [bool(x) for x in expected]
