import pytest
import torch
from torch import nn

import qc_compiler
from tiny_models import tiny_dit


@pytest.fixture
def inputs():
    return torch.randn(2, 16, 8), torch.tensor([3.0, 3.0])


def test_explain_shows_passes_regions_and_inputs(inputs):
    explanation = qc_compiler.explain(tiny_dit(), *inputs, options={"cache": "hlc", "level": "sublayer"})
    (graph,) = explanation.graphs
    changed = {run.name: run.report.changed for run in graph.runs}
    assert list(changed) == [
        "normalize",
        "share-bodies",
        "lower-linears",
        "prepare-weights",
        "guard-regions",
        "branch-choices",
        "fuse-epilogues",
    ]
    assert [number for name, number in changed.items() if name != "normalize"] == [3, 0, 0, 6, 0, 0]
    assert graph.regions[1] == ("blocks.1  group body_0, 1 stream", "attention, 4 heads", "mlp")
    assert "timestep" in graph.timestep
    assert graph.plain is None
    assert graph.slot_bytes == 6 * 2 * 16 * 32 * 4
    assert "blocks.2" in str(explanation)


def test_explain_says_why_a_model_is_left_alone():
    explanation = qc_compiler.explain(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    assert explanation.graphs[0].plain == "no transformer blocks were found"


def test_explain_of_exact_has_no_passes(inputs):
    explanation = qc_compiler.explain(tiny_dit(), *inputs, options={"preset": "exact"})
    assert explanation.graphs[0].runs == ()


def test_explain_refuses_unknown_options(inputs):
    with pytest.raises(qc_compiler.OptionError, match="did you mean 'level'"):
        qc_compiler.explain(tiny_dit(), *inputs, options={"lvel": "block"})
