import copy

import pytest
import torch
from torch import nn

from peers import copy_of
from stacked import stacked
from subjects import SUBJECTS


@pytest.mark.parametrize("name", SUBJECTS)
def test_one_list_of_blocks_computes_what_the_model_does(name):
    subject = SUBJECTS[name]
    model = subject.load()
    label = subject.labels(2)
    x = torch.randn(2, *subject.size, generator=torch.Generator().manual_seed(0))
    timestep = torch.tensor([900.0, 400.0])
    with torch.no_grad():
        torch.testing.assert_close(stacked(copy.deepcopy(model))(x, timestep, label), model(x, timestep, label))


class Breaking(nn.Module):
    def forward(self, x):
        torch._dynamo.graph_break()
        return x + 1


class Looping(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])

    def forward(self, x, *, scale=2.0):
        for block in self.blocks:
            x = block(x) * scale
        return x


def test_a_copy_that_breaks_the_graph_leaves_the_original_compiled():
    model, x, graphs = Looping().requires_grad_(False), torch.ones(1, 2), []
    broken = copy_of(model)
    broken.blocks.insert(1, Breaking())
    torch.compile(broken, backend="eager")(x)
    compiled = torch.compile(model, backend=lambda gm, _: graphs.append(gm) or gm)
    assert torch.equal(compiled(x), model(x))
    assert len(graphs) == 1
    assert isinstance(broken, Looping)
