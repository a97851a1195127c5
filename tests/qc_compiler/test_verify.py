"""Each invariant by a graph that was broken on purpose."""

import pytest
import torch

from capture import branches, capture
from qc_compiler.errors import InvariantError
from qc_compiler.graph import body_calls, body_of, cond, outputs, placeholders
from qc_compiler.verify import verify
from tiny_models import tiny_dit

aten = torch.ops.aten


@pytest.fixture(scope="module")
def captured():
    return capture(tiny_dit(2), torch.zeros(2, 4, 8), torch.ones(2))


@pytest.fixture
def gm(captured):
    gm = captured.rewritten(cache="static", level="block")
    verify(gm)
    return gm


def guarded_body(gm):
    return body_of(gm, body_calls(gm)[0])


def test_a_node_without_metadata(gm):
    node = next(node for node in gm.graph.nodes if node.target is aten.linear.default)
    del node.meta["val"]
    with pytest.raises(InvariantError, match=rf"graph: %{node.name} \(aten.linear.default\) has no meta\['val'\]"):
        verify(gm)


def test_a_node_without_metadata_inside_a_branch(gm):
    branch = branches(gm)[0]
    node = next(node for node in branch.graph.nodes if node.op == "call_function")
    del node.meta["val"]
    with pytest.raises(InvariantError, match=rf"body_0_guarded.compute: %{node.name} "):
        verify(gm)


def test_a_call_with_too_few_operands(gm):
    call = body_calls(gm)[1]
    call.args = call.args[:-1]
    count = len(call.args) - 2
    with pytest.raises(InvariantError, match=f"%{call.name} passes {count} operands to a body that takes {count + 1}"):
        verify(gm)


def test_a_call_with_an_operand_of_another_shape(gm):
    call = body_calls(gm)[0]
    operands = placeholders(gm.graph)
    at = next(i for i, node in enumerate(call.args) if node is operands[-1] or node is operands[-2])
    call.update_arg(at, operands[0])
    with pytest.raises(InvariantError, match=r"passes %\w+ as .*, the body takes f32\[2, 4, 32\]"):
        verify(gm)


def test_a_call_with_an_operand_of_another_layout(gm):
    call = body_calls(gm)[0]
    formal = placeholders(guarded_body(gm).graph)[0]
    val = formal.meta["val"]
    with val.fake_mode:
        formal.meta["val"] = torch.empty(val.shape[::-1], dtype=val.dtype).t()
    with pytest.raises(InvariantError, match=f"%{call.name} passes .* strides"):
        verify(gm)


def test_a_call_with_an_operand_of_another_dtype(gm):
    formal = placeholders(guarded_body(gm).graph)[0]
    with formal.meta["val"].fake_mode:
        formal.meta["val"] = formal.meta["val"].to(torch.bfloat16)
    with pytest.raises(InvariantError, match=r"as f32.*the body takes bf16"):
        verify(gm)


def test_branches_that_return_different_things(gm):
    branch = branches(gm)[1]
    result = outputs(branch.graph)[0]
    with result.meta["val"].fake_mode:
        result.meta["val"] = result.meta["val"].to(torch.float64)
    with pytest.raises(InvariantError, match=r"the branches of %cond return .*f32.*f64"):
        verify(gm)


@pytest.mark.parametrize(("number", "label"), [(0, "true"), (1, "false")])
@pytest.mark.parametrize("view", [False, True])
def test_a_branch_that_returns_its_input(gm, number, label, view):
    branch = branches(gm)[number]
    results = outputs(branch.graph)
    kind = results[0].meta["val"]
    source = next(
        node
        for node in placeholders(branch.graph)
        if isinstance(node.meta["val"], torch.Tensor)
        and (node.meta["val"].shape, node.meta["val"].stride()) == (kind.shape, kind.stride())
    )
    result = source
    if view:
        with branch.graph.inserting_before(branch.graph.output_node()):
            result = branch.graph.call_function(aten.view.default, (source, list(kind.shape)))
        result.meta["val"] = source.meta["val"]
    branch.graph.output_node().args = ((result, *results[1:]),)
    with pytest.raises(InvariantError, match=f"the {label} branch of %cond returns its input %{source.name}"):
        verify(gm)


def test_a_node_that_is_used_before_it_is_made(gm):
    late = next(node for node in reversed(gm.graph.nodes) if node.op == "call_function")
    early = next(node for node in gm.graph.nodes if node.op == "call_function")
    early.append(late)
    with pytest.raises(RuntimeError, match="used before it has been defined"):
        verify(gm)


def test_there_was_a_cond_to_verify(gm):
    assert any(node.target is cond for node in guarded_body(gm).graph.nodes)
