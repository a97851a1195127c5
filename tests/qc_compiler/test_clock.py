import math

import pytest
import torch
from torch import nn

from capture import capture
from qc_compiler.clock import find_clock, find_frames, find_latent
from qc_compiler.errors import OptionError
from qc_compiler.graph import outputs, placeholders
from qc_compiler.options import Options


def waves(t):
    angles = t.float()[:, None] * torch.exp(-math.log(1e4) * torch.arange(4) / 4)
    return torch.cat([angles.sin(), angles.cos()], dim=-1)


def clock_of(model, *args, options=None, **kwargs):
    """Returns the name of the input that was found."""
    formals = placeholders(capture(model, *args, **kwargs).normalized().graph)
    found = find_clock(formals, options or Options())
    return None if found is None else str(formals[found].meta["source"]).strip("L_")


def test_the_input_whose_waves_are_taken():
    def model(x, guidance, when):
        return x + waves(when).sum() + guidance.sum()

    assert clock_of(model, torch.ones(2, 3, 4), torch.ones(2), torch.ones(2)) == "when"


def test_of_two_with_waves_the_one_that_speaks_of_time():
    def model(x, guidance, timestep):
        return x + waves(guidance).sum() + waves(timestep).sum()

    assert clock_of(model, torch.ones(2, 3, 4), torch.ones(2), torch.ones(2)) == "timestep"


def test_of_two_with_waves_and_no_name_the_one_used_first():
    def model(x, a, b):
        return x + waves(b).sum() + waves(a).sum()

    assert clock_of(model, torch.ones(2, 3, 4), torch.ones(2), torch.ones(2)) == "b"


@pytest.mark.parametrize(
    ("name", "model"),
    [
        ("timestep", lambda x, y, timestep: x + y.sum() + timestep.sum()),
        ("sigma", lambda x, y, sigma: x + y.sum() + sigma.sum()),
        ("t", lambda x, y, t: x + y.sum() + t.sum()),
    ],
)
def test_without_waves_the_name_decides(name, model):
    assert clock_of(model, torch.ones(2, 3, 4), torch.ones(2), torch.ones(2)) == name


def test_waves_behind_a_linear_are_no_clock():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.lift = nn.Linear(3, 3)

        def forward(self, x, label):
            return x + self.lift(label).sin().sum()

    assert clock_of(Model(), torch.ones(2, 3, 4), torch.ones(2, 3)) is None


def test_no_clock():
    assert clock_of(lambda x, y: x + y.sum(), torch.ones(2, 3, 4), torch.ones(2)) is None


def test_a_mask_and_a_large_tensor_are_no_clock():
    def model(x, time_mask, times):
        return x + time_mask.sum() + times.sum()

    assert clock_of(model, torch.ones(2, 3, 4), torch.ones(2, dtype=torch.bool), torch.ones(2, 3, 4)) is None


def test_the_user_names_it():
    def model(x, a, b):
        return x + waves(a).sum() + b.sum()

    args = (torch.ones(2, 3, 4), torch.ones(2), torch.ones(2))
    assert clock_of(model, *args, options=Options(timestep="b")) == "b"
    with pytest.raises(OptionError, match=r"timestep='c' is no input of the model; small inputs: a, b"):
        clock_of(model, *args, options=Options(timestep="c"))


def latent_of(model, *args, clock=None):
    graph = capture(model, *args).normalized().graph
    formals = placeholders(graph)
    found = find_latent(formals, outputs(graph), clock)
    return None if found is None else str(formals[found].meta["source"]).strip("L_")


def test_the_sample_has_the_shape_of_the_result():
    def model(text, x):
        return x + text.sum()

    assert latent_of(model, torch.ones(2, 3, 4, 5), torch.ones(2, 4, 8)) == "x"


def test_else_the_sample_has_the_highest_rank():
    def model(text, x):
        return x[:, :1] + text.sum()

    assert latent_of(model, torch.ones(2, 3), torch.ones(2, 4, 8)) == "x"


def test_no_sample():
    assert latent_of(lambda t: t + 1, torch.ones(3)) is None


def test_the_clock_is_no_sample():
    assert latent_of(lambda t: t + 1, torch.ones(3, 2), clock=0) is None


@pytest.mark.parametrize(
    ("shape", "frames"), [((1, 4, 16, 8, 8), 16), ((1, 16, 4, 8, 8), 16), ((1, 4, 8, 8), 1), ((1, 4), 1)]
)
def test_frames_are_the_larger_of_the_two_axes(shape, frames):
    gm = capture(lambda x: x * 2, torch.ones(shape)).gm
    assert find_frames(gm) == frames


def test_weights_of_a_convolution_are_no_video():
    gm = capture(nn.Conv3d(2, 3, 4), torch.ones(2, 5, 5, 5)).gm
    assert find_frames(gm) == 1
