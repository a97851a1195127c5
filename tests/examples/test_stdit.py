import pytest
import torch

from stdit import STDiT, STDiTConfig
from tiny_models import compile_eagerly


@pytest.mark.parametrize("level", ["output", "network", "block", "sublayer"])
def test_a_single_video(level):
    """With a batch of one the spatial blocks hand on streams whose strides no view allows."""
    torch.manual_seed(0)
    model = STDiT(STDiTConfig(depth=2, width=32, num_heads=2)).eval().requires_grad_(False)
    x, timestep, label = torch.randn(1, 1, 8, 16, 16), torch.full((1,), 500.0), torch.tensor([3])
    with torch.no_grad():
        compiled = compile_eagerly(model, {"cache": "static", "level": level})
        assert torch.equal(compiled(x, timestep, label), model(x, timestep, label))
