import numpy as np
import pytest
import torch

import qc_compiler
from qc_compiler.controllers import DMPQ
from qc_compiler.controllers.base import History, Step
from qc_compiler.errors import OptionError
from qc_compiler.options import parse_options
from qc_compiler.statistics import Statistic
from tiny_models import compile_eagerly, predictions, tiny_dit

KEPT, DROPPED = np.ones(2, dtype=bool), np.zeros(2, dtype=bool)


def history(*steps):
    """steps: for each earlier step the Γ of two regions, None where it was reused."""
    rows = []
    for index, gammas in enumerate(steps):
        statistics = np.zeros((2, len(Statistic)), dtype=np.float32)
        statistics[:, Statistic.GAMMA] = [gamma or 0 for gamma in gammas]
        rows.append(Step(index, np.array([gamma is not None for gamma in gammas]), statistics))
    return History(rows, len(steps), None, ("blocks.0", "blocks.1"))


def test_the_predicted_error_decides():
    rule = DMPQ(threshold=0.5)
    assert rule.decide(history((0.4, 0.6)), [0, 1, 1], KEPT).tolist() == [0, 1, 1]
    fitted = DMPQ(threshold=0.5, alpha=(2.0, 0.1), beta=(0.0, 0.6))
    assert fitted.decide(history((0.2, 0.6)), [0, 1], KEPT).tolist() == [0, 1]


def test_the_first_step_and_a_refresh_are_in_high_precision():
    rule = DMPQ(threshold=0.5)
    assert rule.decide(None, [0, 1], KEPT).tolist() == [1, 1]
    assert rule.decide(history((0.1, 0.1), (None, 0.1)), [0, 1], KEPT).tolist() == [1, 0]


def test_inputs_with_outliers_stay_unquantized_where_the_residual_will_be_reused():
    rule = DMPQ(threshold=0.5, outliers=(True, False))
    assert rule.decide(history((0.1, 0.1)), [0, 1], KEPT).tolist() == [2, 0]
    assert rule.decide(None, [0, 1], KEPT).tolist() == [2, 1]
    assert rule.decide(history((0.1, 0.1)), [0, 1], DROPPED).tolist() == [0, 0]


def test_nan_is_high_precision():
    assert DMPQ().decide(history((float("nan"), 0.0)), [0, 1], KEPT).tolist() == [1, 0]


def test_it_needs_the_statistics_of_blocks():
    assert parse_options({"quantize": "dmpq"}).level == "output+block"
    assert parse_options({"quantize": "dmpq", "cache": "off"}).level == "block"
    with pytest.raises(OptionError, match=r"level='network' must be 'block', 'sublayer' or 'output\+block'"):
        parse_options({"quantize": "dmpq", "level": "network"})


def test_the_threshold_moves_between_the_two_precisions_without_compiling():
    model, graphs = tiny_dit(2), []
    options = {"cache": "off", "quantize": "dmpq", "emulate": True}

    def backend(gm, inputs):
        from qc_compiler.backend import quantcache

        graphs.append(gm)
        return quantcache(gm, inputs, options=options, compile_guarded=lambda g, **_: g)

    compiled = torch.compile(model, backend=backend, fullgraph=True)
    results = {}
    predictions(compiled, 1)
    for threshold in (0.0, 100.0):
        qc_compiler.configure(model, precision_threshold=threshold)
        qc_compiler.reset(model)
        results[threshold] = predictions(compiled, 6)
    assert len(graphs) == 1
    torch._dynamo.reset()
    low = predictions(compile_eagerly(model, options | {"quantize": "nvfp4"}), 6)
    # the first step is in high precision, all others as the threshold says
    assert torch.equal(results[0.0][0], results[100.0][0])
    assert not torch.equal(results[0.0][1:], results[100.0][1:])
    assert torch.equal(results[100.0][1:], low[1:])
