import pytest
import torch

from tiny_models import compile_eagerly, sample, tiny_dit

LEVELS = ["network", "group", "block", "sublayer", "output", "output+block"]


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("order", [0, 2])
def test_computing_every_step_equals_the_model(level, order):
    model = tiny_dit()
    compiled = compile_eagerly(model, {"cache": "static", "interval": 1, "level": level, "cache_order": order})
    torch.testing.assert_close(sample(compiled), sample(model), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("level", LEVELS)
def test_a_reused_step_repeats_the_residual(level):
    model = tiny_dit()
    compiled = compile_eagerly(model, {"cache": "static", "interval": 2, "level": level})
    predictions, reference = sample(compiled), sample(model)
    torch.testing.assert_close(predictions[0], reference[0], rtol=1e-5, atol=1e-6)
    assert not torch.allclose(predictions[1], reference[1], atol=1e-4)
