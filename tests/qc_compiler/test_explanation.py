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
        "lower-floats",
        "prepare-weights",
        "guard-regions",
        "branch-choices",
        "fuse-epilogues",
    ]
    assert [number for name, number in changed.items() if name != "normalize"] == [3, 0, 0, 0, 6, 0, 0]
    assert graph.regions[1] == ("blocks.1  group body_0, 1 stream", "attention, 4 heads", "mlp")
    assert "timestep" in graph.timestep
    assert graph.plain is None
    assert graph.slot_bytes == 6 * 2 * 16 * 32 * 4
    assert "blocks.2" in str(explanation)


def test_explain_shows_what_is_pruned_and_what_parameters_are_left(inputs):
    model, plan = tiny_dit(), qc_compiler.Plan.without_schedule("", pruned=("blocks.0", "blocks.2/mlp"))
    options = {"cache": "static", "level": "block"}
    explanation = qc_compiler.explain(model, *inputs, options=options | {"plan": plan})
    (graph,) = explanation.graphs
    assert [(run.name, run.report.changed) for run in graph.runs][1:3] == [("share-bodies", 3), ("prune", 2)]
    assert [line[0].split()[0] for line in graph.regions] == ["blocks.1", "blocks.2"]
    assert (graph.regions[1][1:], graph.pruned) == (("attention, 4 heads",), ("blocks.0", "blocks.2/mlp"))
    size = f"{graph.parameter_bytes / 2**20:.2f}"
    assert f"parameters {size} MiB" in str(explanation)
    assert "pruned: blocks.0, blocks.2/mlp" in str(explanation)


def test_explain_shows_what_a_plan_measured_and_why_it_is_so(inputs):
    plan = qc_compiler.Plan.without_schedule("", measured={"psnr": 35.16}, reasons=("14 calls, w8a8", "heads: 1 %"))
    shown = str(qc_compiler.explain(tiny_dit(), *inputs, options={"cache": "off", "plan": plan}))
    assert "plan: psnr 35.2\n    14 calls, w8a8\n    heads: 1 %" in shown
    assert "plan:" not in str(qc_compiler.explain(tiny_dit(), *inputs))


def test_parameters_of_quantized_linears_are_read_too(inputs):
    model, options = tiny_dit(), {"cache": "off", "quantize": "w8a8", "emulate": True}
    (graph,) = qc_compiler.explain(model, *inputs, options=options).graphs
    assert graph.parameter_bytes == sum(p.nbytes for p in model.parameters())


def test_explain_says_why_a_model_is_left_alone():
    explanation = qc_compiler.explain(nn.Sequential(nn.Linear(4, 4), nn.ReLU()), torch.randn(2, 4))
    assert explanation.graphs[0].plain == "no transformer blocks were found"


def test_explain_of_exact_has_no_passes(inputs):
    explanation = qc_compiler.explain(tiny_dit(), *inputs, options={"preset": "exact"})
    assert explanation.graphs[0].runs == ()


def test_explain_refuses_unknown_options(inputs):
    with pytest.raises(qc_compiler.OptionError, match="did you mean 'level'"):
        qc_compiler.explain(tiny_dit(), *inputs, options={"lvel": "block"})
