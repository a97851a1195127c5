"""Every transformer of diffusers that must run goes through the whole pipeline (without Inductor)."""

import functools
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tiny_models import compile_eagerly, eager_backend

pytest.importorskip("diffusers")

from diffusers_models import MODELS, dit, flux
from qc_compiler import UnsupportedModelError
from qc_compiler.graph import Skip, body_calls, body_of, placeholders
from qc_compiler.runtime import GuardedGraph
from qc_compiler.tokens import TokenLayouts

SDPA = torch.ops.aten.scaled_dot_product_attention.default
TIMESTEPS = (900.0, 600.0, 300.0)
LEVELS = ("block", "sublayer", "network", "output+block")
CASES = [(name, level) for name in ("DiT", "SD3.5", "CogVideoX-5b", "HunyuanDiT") for level in LEVELS]
CASES += [(name, "block") for name in MODELS if (name, "block") not in CASES]
CASES += [("Latte", "network"), ("Sana", "sublayer"), ("Chroma", "sublayer")]


def entries(count: int, name: str = "transformer_blocks") -> list[str]:
    return [f"{name}.{i}" for i in range(count)]


FLUX_BLOCKS = entries(2) + entries(3, "single_transformer_blocks")
LATTE_BLOCKS = [f"{name}.{i}" for i in range(2) for name in ("transformer_blocks", "temporal_transformer_blocks")]
BLOCKS = {  # the regions of a model, and which of them share a body
    "DiT": (entries(3), [0, 0, 0]),
    "PixArt-Sigma": (entries(3), [0, 0, 0]),
    "SD3": (entries(4), [0, 0, 0, 1]),
    "SD3.5": (entries(4), [0, 0, 1, 2]),
    "Flux": (FLUX_BLOCKS, [0, 0, 1, 1, 2]),
    "Chroma": (FLUX_BLOCKS, [0, 0, 1, 1, 1]),
    "CogVideoX-2b": (entries(3), [0, 0, 1]),
    "CogVideoX-5b": (entries(3), [0, 0, 1]),
    "HunyuanDiT": (entries(6, "blocks"), [0, 0, 0, 0, 1, 1]),
    "Latte": (LATTE_BLOCKS, [0, 1, 0, 1]),
    "Allegro": (entries(3), [0, 0, 0]),
    "Sana": (entries(3), [0, 0, 0]),
}
SUBLAYERS = {  # those of the first blocks of a kind
    "DiT": ["transformer_blocks.0/attention", "transformer_blocks.0/mlp"],
    "SD3.5": [
        *(f"transformer_blocks.0/{kind}" for kind in ("joint-attention", "attention", "mlp1", "mlp2")),
        *(f"transformer_blocks.2/{kind}" for kind in ("joint-attention", "mlp1", "mlp2")),
        *(f"transformer_blocks.3/{kind}" for kind in ("attention", "mlp")),
    ],
    "CogVideoX-5b": ["transformer_blocks.0/joint-attention", "transformer_blocks.0/mlp"],
    "HunyuanDiT": [f"blocks.0/{kind}" for kind in ("attention", "cross-attention", "mlp")],
    "Sana": [f"transformer_blocks.0/{kind}" for kind in ("attention", "cross-attention", "mlp")],
    "Chroma": [
        *(f"transformer_blocks.0/{kind}" for kind in ("joint-attention", "mlp1", "mlp2")),
        "single_transformer_blocks.0/attention",
    ],
}


@dataclass
class Run:
    """What became of a model: its graph, its own outputs, those computed at every step and at every other step."""

    graph: GuardedGraph
    reference: list[Tensor]
    computed: list[Tensor]
    alternating: list[Tensor]

    @property
    def skips(self) -> list[Skip]:
        return [skip for run in self.graph.runtime.reports for skip in run.report.skipped]


def compile_and_keep(
    fn: Any, graphs: list[GuardedGraph], level: str = "block", dynamic: bool | None = None, **options: Any
) -> Any:
    """Compiles without Inductor and collects what the backend returns."""

    def backend(gm: Any, example_inputs: Any) -> Any:
        graphs.append(
            eager_backend(gm, example_inputs, options={"cache": "static", "interval": 1, "level": level, **options})
        )
        return graphs[-1]

    return torch.compile(fn, backend=backend, fullgraph=True, dynamic=dynamic)


def outputs_of(model: Any, inputs: Any) -> list[Tensor]:
    with torch.no_grad():
        return [model(**inputs(t), return_dict=False)[0] for t in TIMESTEPS]


@functools.cache
def run(name: str, level: str) -> Run:
    model, inputs = MODELS[name]()
    graphs: list[GuardedGraph] = []
    compiled = compile_and_keep(model, graphs, level)
    computed = outputs_of(compiled, inputs)
    (graph,) = graphs
    graph.runtime.configure(interval=2)
    return Run(graph, outputs_of(model, inputs), computed, outputs_of(compiled, inputs))


def assert_equal(computed: Any, reference: Any, bound: float = 1e-5) -> None:
    for ours, theirs in zip(computed, reference, strict=True):
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
        assert (ours - theirs).abs().max() <= bound * theirs.abs().max()


@pytest.mark.parametrize(("name", "level"), CASES)
def test_computing_every_step_equals_the_model(name, level):
    found = run(name, level)
    assert_equal(found.computed, found.reference)


@pytest.mark.parametrize(("name", "level"), CASES)
def test_a_reused_step_differs_and_the_computed_ones_do_not(name, level):
    found = run(name, level)
    assert_equal(found.alternating[::2], found.reference[::2])
    change = (found.alternating[1] - found.reference[1]).abs().max() / found.reference[1].abs().max()
    assert 1e-4 < change < 10


@pytest.mark.parametrize("name", MODELS)
def test_all_blocks_are_found_and_share_bodies(name):
    graph = run(name, "block").graph
    names, groups = BLOCKS[name]
    assert list(graph.names) == names
    assert [region.group for region in graph.interface.regions] == groups
    assert len({call.args[1] for call in body_calls(graph.compiled)}) == max(groups) + 1


@pytest.mark.parametrize("name", MODELS)
def test_what_is_no_block_is_skipped_with_a_reason(name):
    reason = "its entries hold no attention, so they are no transformer blocks"
    guidance = [Skip(f"distilled_guidance_layer.{part}", reason) for part in ("norms", "layers")]
    assert run(name, "block").skips == (guidance if name == "Chroma" else [])


@pytest.mark.parametrize("name", MODELS)
def test_the_timestep_and_the_sample_are_found(name):
    graph = run(name, "block").graph
    sources = [str(node.meta.get("source")).lower() for node in placeholders(graph.compiled.graph)]
    found = [sources[i].removeprefix("l_").removeprefix("kwargs_") for i in (graph.clock, graph.latent)]
    assert found == ["timestep_", "hidden_states_"]


TOKENS = {  # queries and keys of each attention: v vision, t text
    "DiT": {("16v", "16v")},
    "PixArt-Sigma": {("16v", "16v"), ("16v", "6t")},
    "SD3": {("16v 6t", "16v 6t")},
    "SD3.5": {("16v 6t", "16v 6t"), ("16v", "16v")},
    "Flux": {("6t 16v", "6t 16v")},
    "Chroma": {("6t 16v", "6t 16v")},
    "CogVideoX-2b": {("6t 48v", "6t 48v")},
    "CogVideoX-5b": {("6t 48v", "6t 48v")},
    "HunyuanDiT": {("16v", "16v"), ("16v", "12t")},
    "Latte": {("16v", "16v"), ("16v", "6t"), ("3v", "3v")},
    "Allegro": {("48v", "48v"), ("48v", "6t")},
    "Sana": {("16v", "6t")},
}


@pytest.mark.parametrize("name", MODELS)
def test_the_text_is_found_among_the_tokens_of_every_attention(name):
    graph = run(name, "block").graph
    shared = graph.runtime.shared
    layouts = TokenLayouts(shared, placeholders(shared.graph)[graph.latent])
    found: dict[str, set[tuple[str, ...]]] = {}
    for call in body_calls(shared):
        for node in body_of(shared, call).graph.find_nodes(op="call_function", target=SDPA):
            reads = (layouts.of(call, arg, 2) for arg in node.args[:2])
            kinds = [" ".join(f"{s.length}{'v' if s.is_vision else 't'}" for s in layout) for layout in reads]
            found.setdefault(str(call.meta["block"]), set()).add(tuple(kinds))
    assert list(found) == BLOCKS[name][0]
    assert set.union(*found.values()) == TOKENS[name]


@pytest.mark.parametrize("name", [name for name, level in CASES if level == "sublayer"])
def test_sublayers_are_found(name):
    blocks, groups = BLOCKS[name]
    first_of_a_kind = [blocks[groups.index(group)] for group in dict.fromkeys(groups)]
    found = [region for region in run(name, "sublayer").graph.names if region.split("/")[0] in first_of_a_kind]
    assert [region for region in found if "/" in region] == SUBLAYERS[name]


def test_one_block_a_graph():
    """What diffusers' `compile_repeated_blocks` does: the graph is a block, steps can only be counted."""
    model, inputs = dit()
    reference = outputs_of(model, inputs)
    graphs: list[GuardedGraph] = []
    for i, block in enumerate(model.transformer_blocks):
        model.transformer_blocks[i] = compile_and_keep(block, graphs, num_steps=3)
    assert_equal(outputs_of(model, inputs), reference)
    assert {graph.names for graph in graphs} == {("block",)}
    for graph in graphs:
        graph.runtime.configure(interval=2)
    alternating = outputs_of(model, inputs)
    assert_equal(alternating[::2], reference[::2])
    assert (alternating[1] - reference[1]).abs().max() > 1e-3


def test_guidance_inside_the_graph():
    model, inputs = dit()
    graphs: list[GuardedGraph] = []

    def guided(class_labels: Tensor, **kwargs: Any) -> tuple[Tensor]:
        unconditional = model(**kwargs, class_labels=torch.zeros_like(class_labels))[0]
        return (unconditional + 4 * (model(**kwargs, class_labels=class_labels)[0] - unconditional),)

    compiled = compile_and_keep(guided, graphs)
    assert_equal(outputs_of(compiled, inputs), outputs_of(guided, inputs))
    (graph,) = graphs
    assert list(graph.names) == entries(3) + [f"{name}@1" for name in entries(3)]
    assert {region.group for region in graph.interface.regions} == {0}


class Pipeline:
    def __init__(self, model: nn.Module) -> None:
        self.transformer = model

    def predict(self, **kwargs: Any) -> Any:
        return self.transformer(**kwargs)


@pytest.mark.parametrize("wrap", [lambda model: lambda **kw: model(**kw), lambda model: Pipeline(model).predict])
def test_a_model_inside_a_closure_or_a_bound_method(wrap):
    model, inputs = dit()
    graphs: list[GuardedGraph] = []
    compiled = compile_and_keep(wrap(model), graphs)
    assert_equal(outputs_of(compiled, inputs), outputs_of(model, inputs))
    (graph,) = graphs
    assert [name.removeprefix("transformer.") for name in graph.names] == entries(3)


@pytest.mark.parametrize(("build", "level"), [(dit, "block"), (dit, "sublayer"), (dit, "network"), (flux, "block")])
def test_autocast_around_the_call(build, level):
    model, inputs = build()
    graphs: list[GuardedGraph] = []
    compiled = compile_and_keep(model, graphs, level)
    with torch.autocast("cpu", torch.bfloat16):
        reference = outputs_of(model, inputs)
        assert_equal(outputs_of(compiled, inputs), reference, bound=2**-6)
        rewritten = graphs[0].compiled

        def without_autocast(*args: Any) -> Any:
            with torch._C._DisableAutocast():
                return rewritten(*args)

        graphs[0].compiled = without_autocast  # as Inductor runs it: the casts must stand in the graph
        assert_equal(outputs_of(compiled, inputs), reference, bound=2**-6)


@pytest.mark.parametrize("level", ["block", "network"])
def test_dynamic_shapes_over_two_resolutions(level):
    model, inputs = dit()
    graphs: list[GuardedGraph] = []
    compiled = compile_and_keep(model, graphs, level, dynamic=True)
    for size in (8, 12):
        x = torch.randn(2, 4, size, size)

        def resized(t: float, x: Tensor = x) -> dict[str, Any]:
            return inputs(t) | {"hidden_states": x}

        assert_equal(outputs_of(compiled, resized), outputs_of(model, resized))
    assert len(graphs) <= 2  # plain Dynamo also compiles this model twice or more


def test_inference_mode():
    model, inputs = dit()
    compiled = compile_and_keep(model, [])
    with torch.inference_mode():
        assert_equal(outputs_of(compiled, inputs), outputs_of(model, inputs))


class MLP(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(2))

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        x = x + timestep.sin()[:, None]
        for layer in self.layers:
            x = x + F.silu(layer(x))
        return x


def test_a_model_without_blocks_runs_as_it_is():
    model, x, timestep = MLP().requires_grad_(False), torch.randn(2, 8), torch.ones(2)
    with pytest.warns(UserWarning, match="no transformer blocks were found") as caught:
        result = compile_eagerly(model)(x, timestep)
    assert len(caught) == 1
    torch.testing.assert_close(result, model(x, timestep))


def test_strict_refuses_a_model_without_blocks():
    model, x, timestep = MLP().requires_grad_(False), torch.randn(2, 8), torch.ones(2)
    with pytest.raises(torch._dynamo.exc.BackendCompilerFailed) as caught:
        compile_eagerly(model, {"strict": True})(x, timestep)
    assert isinstance(caught.value.inner_exception, UnsupportedModelError)
