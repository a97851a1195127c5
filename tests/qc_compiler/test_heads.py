import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from head_plans import BLANK, head_plan
from qc_compiler.attention import CACHED, FULL, INT8, ROW, WINDOW
from qc_compiler.errors import OptionError, PlanError
from qc_compiler.graph import AttentionSite
from qc_compiler.heads import ASK, Heads, half_width

TOKENS = 66  # two of them text, so that a share of 1/8 is a half-width of 4


def site(name, num_heads=4, num_kept=0, num_text=2):
    shape = (1, num_kept, TOKENS, 8)
    return AttentionSite(name, name.rpartition(".")[0], num_heads, num_text, shape, torch.float32, torch.device("cpu"))


def modes(heads, step=0, filled=(True,), stream=0, tokens=TOKENS, **options):
    return heads.modes(stream, step, filled, [tokens] * len(filled), **options)


# -- half-widths


@pytest.mark.parametrize(
    ("share", "vision", "width"),
    [
        (1 / 8, 64, 4),
        (1 / 8, 79, 4),
        (1 / 8, 80, 5),
        (1e-6, 64, 1),
        (1.0, 64, 32),
        (1.96, 64, 62),
        (1.97, 64, FULL),
        (0.5, 3, 1),
        (0.5, 2, FULL),
        (FULL, 64, FULL),
        (INT8, 64, INT8),
        (CACHED, 64, CACHED),
    ],
)
def test_a_share_of_the_tokens_is_a_width_on_both_sides(share, vision, width):
    assert half_width(share, vision) == width


@given(st.floats(1e-4, 2, exclude_max=True), st.integers(1, 4096))
def test_a_window_has_its_share_of_the_tokens_or_the_nearest(share, vision):
    width = half_width(share, vision)
    if width == FULL:
        assert share * vision / 2 >= vision - 1 or vision <= 2
    else:
        assert 1 <= width < vision - 1
        assert width == 1 or width <= share * vision / 2 < width + 1


# -- modes


def test_modes_hold_widths_codes_and_rows():
    windows = [[[FULL, 1 / 8, FULL, INT8]], [[CACHED, 1 / 16, FULL, CACHED]]]
    heads = Heads(head_plan(windows, ["a.x"]), [site("a.x", num_kept=2)])
    first, attends = modes(heads)
    assert (first.dtype, first.shape, attends.tolist()) == (np.int32, (1, 2, 4), [True])
    assert first[0, WINDOW].tolist() == [FULL, 4, FULL, INT8]
    assert first[0, ROW].tolist() == [0, -1, -1, 1]
    second, _ = modes(heads, step=1)
    assert second[0, WINDOW].tolist() == [CACHED, 2, FULL, CACHED]
    assert second[0, ROW].tolist() == [0, -1, -1, 1]


def test_an_empty_slot_makes_cached_heads_full():
    heads = Heads(head_plan([[[CACHED, 1 / 8]]], ["a.x"]), [site("a.x", 2, num_kept=1)])
    assert modes(heads, filled=[False])[0][0, WINDOW].tolist() == [FULL, 4]
    assert modes(heads, filled=[True])[0][0, WINDOW].tolist() == [CACHED, 4]


def test_a_layer_attends_unless_all_its_heads_are_cached():
    windows = [[[CACHED, CACHED], [CACHED, 1 / 8], [CACHED, FULL], [CACHED, INT8]]]
    names = ["a.x", "b.x", "c.x", "d.x"]
    heads = Heads(head_plan(windows, names), [site(name, 2, num_kept=2) for name in names])
    assert modes(heads, filled=[True] * 4)[1].tolist() == [False, True, True, True]
    assert modes(heads, filled=[False] * 4)[1].tolist() == [True] * 4


def test_a_layer_with_fewer_heads_is_padded_and_can_be_cached():
    """What stands behind its heads is read by nobody, and does not make it attend."""
    heads = Heads(head_plan([[[CACHED, CACHED, FULL, FULL], [1 / 8] * 4]], ["a.x", "b.x"]), LAYERS)
    found, attends = modes(heads, filled=[True, True])
    assert found.shape == (2, 2, 4)
    assert found[0, WINDOW].tolist() == [CACHED, CACHED, FULL, FULL]
    assert found[0, ROW].tolist() == [0, 1, -1, -1]
    assert found[1].tolist() == [[4] * 4, [-1] * 4]
    assert attends.tolist() == [False, True]


LAYERS = [site("a.x", 2, num_kept=2), site("b.x", 4)]


def test_rows_that_no_cached_head_takes_are_given_to_others():
    """A body may keep more heads than this layer needs; each row of its slot has a head."""
    heads = Heads(head_plan([[[FULL, FULL, CACHED, FULL]]], ["a.x"]), [site("a.x", num_kept=3)])
    assert modes(heads)[0][0, ROW].tolist() == [1, 2, 0, -1]


@pytest.mark.parametrize(("num_text", "width"), [(0, 8), (2, 8), (-2, 8), (-34, 4), (34, 4)])
def test_a_share_is_one_of_the_vision_tokens(num_text, width):
    heads = Heads(head_plan([[[0.25]]], ["a.x"]), [site("a.x", 1, num_text=num_text)])
    assert modes(heads)[0][0, WINDOW].tolist() == [width]


def test_layers_are_found_by_name_and_streams_and_steps_by_number():
    windows = np.full((2, 2, 2, 1), FULL, dtype=np.float32)
    windows[1, 0, 1, 0] = 1 / 8
    heads = Heads(head_plan(windows, ["b.x", "a.x"]), [site("a.x", 1), site("b.x", 1)])
    found = {(s, n): modes(heads, n, [True] * 2, s)[0][:, WINDOW, 0].tolist() for s in (0, 1) for n in (0, 1)}
    assert found.pop((1, 0)) == [4, FULL]
    assert set(map(tuple, found.values())) == {(FULL, FULL)}


# -- plans that calibration is still to fill


def test_a_blank_plan_keeps_every_head_and_asks_by_layer():
    heads = Heads(BLANK, [site("a.x", 2, num_kept=2), site("b.x", 4, num_kept=4)])
    asked, attends = modes(heads, filled=[False, True], asks=True)
    assert asked[:, WINDOW].tolist() == [[ASK] * 4, [ASK - 1] * 4]
    assert asked[:, ROW].tolist() == [[0, 1, -1, -1], [0, 1, 2, 3]]
    assert attends.all()
    assert (modes(heads, filled=[True, True])[0][:, WINDOW] == FULL).all()


# -- plans that do not fit


def test_a_layer_that_the_plan_does_not_know():
    with pytest.raises(PlanError, match="the plan says nothing about the attention 'c.x': calibrate this model"):
        Heads(head_plan([[[FULL]]], ["a.x"]), [site("c.x", 1)])


def test_a_plan_that_caches_more_heads_than_the_graph_keeps():
    with pytest.raises(OptionError, match=r"caches 2 heads of a\.x and needs a new torch\.compile: this graph keeps 1"):
        Heads(head_plan([[[CACHED, CACHED]]], ["a.x"]), [site("a.x", 2, num_kept=1)])


@pytest.mark.parametrize(("planned", "has"), [(2, 4), (4, 2)])
def test_a_plan_for_another_number_of_heads(planned, has):
    with pytest.raises(PlanError, match=rf"a\.x has {has} heads, the plan is for another number: calibrate"):
        Heads(head_plan(np.full((1, 1, planned), CACHED), ["a.x"]), [site("a.x", has, num_kept=has)])
