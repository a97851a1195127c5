from histories import history
from qc_compiler.controllers import TeaCache


def test_defaults():
    assert (TeaCache().threshold, TeaCache().polynomial, TeaCache().max_skip) == (0.15, (1.0, 0.0), 8)


def decide(changes, computed, names=("probe", "network"), **fields):
    """`changes` of the probe at every step; `computed`: whether the other regions were."""
    rows = [[1 if name == "probe" else other for name in names] for other in computed]
    table = [[change if name == "probe" else 9.0 for name in names] for change in changes]
    return TeaCache(**fields).decide(history(rows, regions=names, change=table)).tolist()


def test_the_change_of_the_probe_adds_up():
    assert decide([9, 0.1, 0.06, 0.08], [1, 1, 0, 0]) == [True, False]  # 0.14 < 0.15
    assert decide([9, 0.1, 0.08, 0.08], [1, 1, 0, 0]) == [True, True]  # 0.16


def test_right_after_a_computed_step_the_last_change_is_the_forecast():
    assert decide([9, 0.1], [1, 1]) == [True, False]
    assert decide([9, 0.2], [1, 1]) == [True, True]


def test_the_polynomial_rescales_each_change():
    # 4 x² + 0.05 at 0.1 and 0.2: 0.09 + 0.21 = 0.3
    computed, changes, polynomial = [1, 1, 0, 0], [9, 9, 0.1, 0.2], (4.0, 0.0, 0.05)
    assert decide(changes, computed, polynomial=polynomial, threshold=0.301) == [True, False]
    assert decide(changes, computed, polynomial=polynomial, threshold=0.299) == [True, True]


def test_a_polynomial_below_zero_takes_nothing_back():
    assert decide([9, 9, 0.2, 0.0], [1, 1, 0, 0], polynomial=(1.0, -0.1), threshold=0.09) == [True, True]


def test_after_one_step_nothing_is_known():
    assert decide([0], [1]) == [True, True]


def test_max_skip():
    changes, computed = [0] * 5, [1, 1, 0, 0, 0]
    assert decide(changes, computed, max_skip=3) == [True, True]
    assert decide(changes, computed, max_skip=4) == [True, False]


def test_the_output_is_always_computed_since_the_probe_is_only_measured_where_the_graph_runs():
    names = ("output", "probe", "blocks.0", "blocks.1")
    assert decide([9, 0.01], [1, 1], names) == [True, True, False, False]
