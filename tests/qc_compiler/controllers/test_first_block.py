from histories import history
from qc_compiler.controllers import FirstBlock


def test_defaults():
    assert (FirstBlock().threshold, FirstBlock().max_skip) == (0.08, 8)


def decide(changes, computed, regions=None, **fields):
    """`changes` of block 0 at every step; `computed`: whether the other two blocks were."""
    rows = [[1, other, other] for other in computed]
    table = [[change, 9.0, 9.0] for change in changes]
    return FirstBlock(**fields).decide(history(rows, change=table)).tolist()


def test_the_others_are_reused_while_the_change_of_the_first_adds_up_to_less():
    assert decide([9, 0.5, 0.03, 0.04], [1, 1, 0, 0]) == [True, False, False]  # 0.07 < 0.08
    assert decide([9, 0.5, 0.03, 0.06], [1, 1, 0, 0]) == [True, True, True]  # 0.09


def test_right_after_a_computed_step_the_last_change_is_the_forecast():
    assert decide([9, 0.05], [1, 1]) == [True, False, False]
    assert decide([9, 0.5], [1, 1]) == [True, True, True]


def test_after_one_step_nothing_is_known():
    assert decide([0], [1]) == [True, True, True]


def test_max_skip():
    changes, computed = [0] * 6, [1, 1, 0, 0, 0, 0]
    assert decide(changes, computed, max_skip=4) == [True, True, True]
    assert decide(changes, computed, max_skip=5) == [True, False, False]


def test_a_model_of_one_block_computes_it():
    assert FirstBlock().decide(history([[1], [1]], change=[[0], [0]])).tolist() == [True]


def test_the_first_block_is_found_behind_rows_that_only_observe():
    """At the level `output+block` row 0 is the model's output: it says nothing about block 0."""
    names = ("output", "blocks.0", "blocks.1")
    rows = [[1, 1, 1], [1, 1, 1], [1, 1, 0]]
    still = history(rows, regions=names, change=[[9, 0, 9], [9, 0, 9], [9, 0.01, 0]])
    moving = history(rows, regions=names, change=[[0, 0, 0], [0, 0, 0], [0, 0.5, 0]])
    assert FirstBlock().decide(still).tolist() == [True, True, False]
    assert FirstBlock().decide(moving).tolist() == [True, True, True]
