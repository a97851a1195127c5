"""Real Inductor on a rewritten graph, without Dynamo and the runtime around it."""

import pytest
import torch
from torch._inductor.codegen.wrapper import PythonWrapperCodegen

from capture import capture
from qc_compiler.inductor import compile_graph
from small_blocks import Stack, attend

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
