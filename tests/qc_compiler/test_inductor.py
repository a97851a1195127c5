"""Real Inductor on a rewritten graph, most of it without Dynamo and the runtime around it."""

import numpy as np
import pytest
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

import qc_compiler
from capture import capture
from driver import Driver
from head_plans import head_plan, plan_for, run_steps
from qc_compiler.attention import CACHED, FULL
from qc_compiler.backend import quantcache
from qc_compiler.inductor import compile_graph
from qc_compiler.plan import Plan
from small_blocks import Stack, attend
from tiny_models import tiny_dit

X = torch.randn(1, 6, 8, generator=torch.Generator().manual_seed(0))


def block(x):
    return x + attend(x) * torch.tensor([0.5, 2.0]).repeat(4)  # a constant, which the graph holds as an attribute


@pytest.fixture(scope="module")
def graph():
    captured = capture(Stack(block, block), X)
    return captured, captured.rewritten(cache="static", level="block")


@pytest.fixture(scope="module")
def compiled(graph):
    define_kernel = PythonWrapperCodegen.define_kernel
    function = compile_graph(graph[1])
    assert PythonWrapperCodegen.define_kernel is define_kernel
    return function


@pytest.mark.parametrize("compute", [(True, True), (True, False), (False, False)])
def test_the_compiled_graph_is_the_graph(graph, compiled, compute):
    captured, gm = graph
    steering = [torch.tensor(compute), torch.tensor([[2.0], [-1.0]])]
    slots = [torch.full_like(X, 0.25), torch.full_like(X, 3.0)]
    with torch.no_grad():
        expected, found = (f(*captured.inputs, *steering, *slots) for f in (gm, compiled))
    assert len(found) == 1 + 2 + 2  # result, sums, slots
    torch.testing.assert_close(found[0], expected[0])
    for region in range(2):
        if compute[region]:
            torch.testing.assert_close(found[1 + region], expected[1 + region], rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(found[3 + region], expected[3 + region])


class OnImages(torch.nn.Module):
    """Blocks on the pixels of an image of any height and width."""

    def __init__(self):
        super().__init__()
        self.stack = Stack(block, block)

    def forward(self, x):
        return self.stack(x.flatten(2).transpose(1, 2))


def test_the_number_of_tokens_may_be_a_product_of_sizes_that_vary():
    """Its strides hold Max(1, H * W), for which Inductor has no lowering where it is not the shape of an input."""
    model, options = OnImages(), {"cache": "static", "level": "output", "num_steps": 2}
    compiled = torch.compile(model, backend="quantcache", options=options, dynamic=True)
    with torch.no_grad():
        for size in ((2, 3), (4, 2)):
            x = torch.randn(1, 8, *size)
            torch.testing.assert_close(compiled(x), model(x))


# -- heads, under Dynamo and the runtime


def test_heads_do_what_they_do_in_the_graph_and_full_ones_what_inductor_does():
    """One compiled graph for every plan; its attention is a kernel, and the rest Inductor's."""
    model, graphs = tiny_dit(1), []
    mixed = np.full((3, 1, 4), FULL)
    mixed[1, 0], mixed[2] = (CACHED, 0.25, FULL, 1.0), CACHED
    plans = [plan_for(head_plan(windows)) for windows in (mixed, np.full((3, 1, 4), FULL), np.full((3, 1, 4), 0.5))]

    def backend(gm, inputs):
        graphs.append(gm)
        return quantcache(gm, inputs, options=options)

    options = {"cache": "static", "interval": 1, "level": "output", "plan": plans[0]}
    compiled, found, expected = torch.compile(model, backend=backend, fullgraph=True), [], []
    eager = Driver(1, **options)
    for plan in plans:
        if found:
            qc_compiler.configure(compiled, plan=plan)
            eager.runtime.configure(plan=plan)
        found.append(torch.stack(run_steps(compiled, 3)))
        expected.append(torch.stack(run_steps(eager, 3)))
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(found[0], found[1], atol=1e-4)
    assert not torch.allclose(found[2], found[1], atol=1e-4)
    assert len(graphs) == 1
    plain = torch.compile(tiny_dit(1), fullgraph=True)
    assert torch.equal(found[1], torch.stack(run_steps(plain, 3)))


def test_a_neutral_plan_is_inductor():
    """One that computes all blocks at all steps, of whatever level; its guards stand in the graph."""
    model = tiny_dit(1)
    expected = torch.stack(run_steps(torch.compile(model, fullgraph=True), 3))
    for level, regions in {"output": ("output",), "output+block": ("output", "blocks.0")}.items():
        torch._dynamo.reset()
        compute = np.ones((1, 3, len(regions)), dtype=np.bool_)
        plan = Plan("", level, regions, (1000.0, 900.0, 800.0), compute, np.ones((*compute.shape, 1), np.float32))
        compiled = torch.compile(model, backend="quantcache", options={"plan": plan}, fullgraph=True)
        assert torch.equal(torch.stack(run_steps(compiled, 3)), expected)
        assert qc_compiler.summary(compiled).computed_share == 1
