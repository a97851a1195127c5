import pytest
import torch
from torch import nn

from capture import capture
from qc_compiler.graph import call_instance, is_plain, module_path, normalize_path, submodules

aten = torch.ops.aten


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("L['self']", ""),
        ("L['self'].blocks.3.attn", "blocks.3.attn"),
        ("L['self']._modules['blocks']._modules['3'].attn", "blocks.3.attn"),
        ("L['self'].__dict__['_modules']['transformer_blocks'].3.attn1", "transformer_blocks.3.attn1"),
        ("L['model'].blocks[0]", "blocks.0"),
        ("L['self'].heads['left'].1", "heads.left.1"),
        ("blocks.0.mlp", "blocks.0.mlp"),
        ("", ""),
    ],
)
def test_every_spelling_of_a_module_path(text, path):
    assert normalize_path(text) == path


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4)])

    def forward(self, x):
        return self.blocks[0](self.blocks[0](x))


def test_two_calls_of_one_module_are_told_apart():
    gm = capture(Twice(), torch.ones(2, 4)).normalized()
    linears = [node for node in gm.graph.nodes if node.target is aten.linear.default]
    assert [module_path(node) for node in linears] == ["blocks.0", "blocks.0"]
    assert len({call_instance(node, "blocks.0") for node in linears}) == 2


def test_submodules_are_found_each_once_and_outermost_first():
    from tiny_models import tiny_dit

    gm = capture(tiny_dit(3), torch.ones(1, 4, 8), torch.ones(1)).rewritten(cache="static", level="block")
    assert [name for name, _ in submodules(gm)] == ["body_0_guarded", "body_0_guarded.compute", "body_0_guarded.reuse"]


@pytest.mark.parametrize(
    ("tensor", "expected"),
    [
        (torch.empty(2, 3), True),
        (torch.empty(()), True),
        (torch.empty(3, 2).T, False),
        (torch.empty(4, 3)[:, :2], False),
        (torch.empty(1, 9)[:, :3], False),
        (torch.empty(3, 1).expand(3, 4), False),
    ],
)
def test_plain_tensors_have_the_strides_of_new_ones(tensor, expected):
    assert is_plain(tensor) == expected
