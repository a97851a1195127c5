import numpy as np
import pytest
import torch

import qc_compiler
from histories import history
from qc_compiler.controllers import AIGQ, precision_rule
from qc_compiler.graph import SiteSpec
from qc_compiler.options import parse_options
from tiny_models import compile_eagerly, eager_backend, predictions, tiny_dit

FOUR, SIX, EIGHT, SIXTEEN = range(4)
KEPT = np.ones(1, dtype=bool)


def choice(rule, change, motion=1.0, gap=1):
    """One linear in one region, computed at 0 and at `gap` with this change."""
    rows = [[1], *[[0]] * (gap - 1), [1]]
    (found,) = rule.decide(history(rows, change=[[0]] * gap + [[change]], motion=motion), [0], KEPT)
    return found


def test_defaults():
    assert AIGQ() == AIGQ(threshold=0.03, inverse=False)


LIMITS = [(0.0, 0), (0.029, 0), (0.031, 1), (0.089, 1), (0.091, 2), (5.0, 2)]


@pytest.mark.parametrize(("change", "place"), LIMITS)
def test_the_smaller_the_change_the_more_bits(change, place):
    """θ = (0.03, 0.09); read literally 8, 6 and 4 bits, inverse 4, 6 and 8."""
    assert choice(AIGQ(), change) == (EIGHT, SIX, FOUR)[place]
    assert choice(AIGQ(inverse=True), change) == (FOUR, SIX, EIGHT)[place]


def test_the_limits_belong_to_the_class_above():
    rule = AIGQ(threshold=0.25)  # exact in binary: θ = (0.25, 0.75)
    assert [choice(rule, change) for change in (0.25, 0.75)] == [SIX, FOUR]


def test_the_change_is_per_step():
    assert choice(AIGQ(), 0.08) == SIX
    assert choice(AIGQ(), 0.08, gap=4) == EIGHT  # 0.02 a step


def test_motion_multiplies_the_change():
    assert choice(AIGQ(), 0.06, motion=0.4) == EIGHT  # D = 0.024
    assert choice(AIGQ(), 0.06, motion=1.0) == SIX


@pytest.mark.parametrize("inverse", [False, True])
def test_what_is_not_known_yet_gets_all_bits(inverse):
    rule = AIGQ(inverse=inverse)
    assert rule.decide(None, [0, 0], KEPT).tolist() == [SIXTEEN] * 2
    once = history([[1, 1], [0, 1]], change=[[0, 0], [0, 0]])
    assert rule.decide(once, [0, 1], np.ones(2, dtype=bool)).tolist() == [SIXTEEN, FOUR if inverse else EIGHT]


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("what", ["change", "motion"])
def test_nan_gets_all_bits(inverse, what):
    assert choice(AIGQ(inverse=inverse), **{"change": 0.01, "motion": 1.0} | {what: np.nan}) == SIXTEEN


def test_each_linear_follows_its_own_block():
    past = history([[1, 1, 1], [1, 1, 1]], change=[[0] * 3, [0.01, 0.05, 0.5]])
    assert AIGQ().decide(past, [2, 0, 1, 0], np.ones(3, dtype=bool)).tolist() == [FOUR, EIGHT, SIX, EIGHT]


def test_the_options_name_the_rule():
    sites = [SiteSpec("blocks.0.attn", "blocks.0")]
    assert precision_rule(parse_options({"quantize": "w8a8+online"}), sites) == AIGQ()
    options = parse_options({"quantize": "importance+inverse", "precision_threshold": 0.2})
    assert precision_rule(options, sites) == AIGQ(threshold=0.2, inverse=True)


def test_it_needs_the_statistics_of_blocks():
    assert parse_options({"quantize": "w4a6+online"}).level == "output+block"
    assert parse_options({"quantize": "w4a6+inverse", "cache": "off"}).level == "block"


@pytest.mark.parametrize(("addition", "low"), [("online", 0.0), ("inverse", 100.0)])
def test_the_threshold_moves_between_the_precisions_without_compiling(addition, low):
    """From the third step on, at the limits: four bits for all linears, or eight bits for all."""
    model, graphs, off = tiny_dit(2), [], {"cache": "off", "emulate": True}

    def backend(gm, inputs):
        graphs.append(gm)
        return eager_backend(gm, inputs, options=off | {"quantize": f"w8a8+{addition}"})

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    predictions(compiled, 1)
    results = {}
    for threshold in (0.0, 100.0):
        qc_compiler.configure(model, precision_threshold=threshold)
        qc_compiler.reset(model)
        results[threshold] = predictions(compiled, 5)
    assert len(graphs) == 1
    torch._dynamo.reset()
    eight = predictions(compile_eagerly(model, off | {"quantize": "w8a8"}), 5)
    assert torch.equal(results[0.0][:2], results[100.0][:2])
    assert not torch.equal(results[0.0][:2], eight[:2])  # 16 bits
    assert not torch.equal(results[0.0][2:], results[100.0][2:])
    assert torch.equal(results[100.0 - low][2:], eight[2:])
