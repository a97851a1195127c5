"""Outlier variants of the example models: the same outputs, with outliers at the inputs of the linears."""

import copy

import pytest
import torch
from torch import nn

from dit import DiT, DiTConfig
from outliers import add_outliers
from sampling import load_dit, load_model
from stdit import STDiT, STDiTConfig

FACTORS = (20.0, 100.0)
READERS = ("attn.qkv", "attn.proj", "cross_attn.kv", "cross_attn.proj", "mlp.fc1")  # cross-attention: of STDiT only
NEVER = ("cross_attn.q", "mlp.fc2")


def untrained(model):
    """Returns a model with random weights everywhere: as it is made, gates and heads are zero."""
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.2, generator=generator)
    return model.requires_grad_(False)


MODELS = {
    "untrained STDiT": lambda: untrained(STDiT(STDiTConfig(depth=2, width=32, size=(2, 8, 8)))),
    "untrained DiT": lambda: untrained(DiT(DiTConfig(depth=2, width=32, size=(8, 8)))),
    "trained STDiT": lambda: load_model().requires_grad_(False),
    "trained DiT": lambda: load_dit().requires_grad_(False),
}
every_model = pytest.mark.parametrize("model", [pytest.param(make, id=name) for name, make in MODELS.items()])
trained = pytest.mark.parametrize("model", [MODELS["trained STDiT"], MODELS["trained DiT"]], ids=["STDiT", "DiT"])


def inputs(model, dtype=torch.float64):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(4, model.config.channels, *model.config.size, generator=generator, dtype=dtype)
    return x, torch.tensor([1000.0, 700.0, 300.0, 20.0]), torch.tensor([0, 3, 9, 10])


def relative(error, reference):
    return (error.norm() / reference.norm()).item()


def linears_of_blocks(model):
    named = model.named_modules()
    return {name: m for name, m in named if isinstance(m, nn.Linear) and name.endswith((*READERS, *NEVER))}


def peaks(model):
    """Returns max|X| / mean|X| of the inputs X of every linear in the blocks."""
    found = {}

    def hook(name):
        def measure(_, args):
            found[name] = (args[0].abs().max() / args[0].abs().mean()).item()

        return measure

    model = copy.deepcopy(model)
    for name, linear in linears_of_blocks(model).items():
        linear.register_forward_pre_hook(hook(name))
    model(*inputs(model, torch.float32))
    return found


@every_model
@pytest.mark.parametrize("share", [0.01, 0.2])
def test_outputs_stay_the_same_in_float64(model, share):
    model = model().double()
    reference = model(*inputs(model))
    assert reference.abs().mean() > 1e-3
    assert relative(add_outliers(model, share)(*inputs(model)) - reference, reference) < 1e-10


@trained
def test_float32_is_as_exact_as_it_was(model):
    model = model()
    plain, outliers = (m(*inputs(model, torch.float32)) for m in (model, add_outliers(model)))
    reference = model.double()(*inputs(model))
    assert relative(outliers - reference, reference) < 4 * relative(plain - reference, reference)


@trained
def test_the_inputs_of_linears_have_outliers(model):
    model = model()
    before, after = peaks(model), peaks(add_outliers(model))
    readers = [name for name in before if name.endswith(READERS)]
    assert len(readers) == (60 if isinstance(model, STDiT) else 18)
    assert sum(before[name] > 25 for name in readers) <= 0.05 * len(readers)
    assert all(after[name] > max(25, 3 * before[name]) for name in readers)
    for name in set(before) - set(readers):
        assert after[name] == pytest.approx(before[name], rel=1e-3)


@every_model
@pytest.mark.parametrize(("share", "of_128", "of_32"), [(0.0, 1, 1), (0.01, 1, 1), (0.05, 6, 2)])
def test_a_share_of_the_channels_is_divided_by_the_factors(model, share, of_128, of_32):
    model = model()
    outliers = linears_of_blocks(add_outliers(model, share))
    count = {128: of_128, 32: of_32}[model.config.width]
    for name, linear in linears_of_blocks(model).items():
        rows = linear.weight[: model.config.width]  # of qkv and kv without V, which has factors of its own
        factors = rows.norm(dim=0) / outliers[name].weight[: model.config.width].norm(dim=0)
        touched = factors[(factors - 1).abs() > 1e-3]
        assert len(touched) == (0 if name.endswith(NEVER) else count)
        assert all(FACTORS[0] * 0.999 < factor < FACTORS[1] * 1.001 for factor in touched)


@every_model
def test_the_model_stays_as_it_is_and_the_seed_decides(model):
    model = model()
    before = copy.deepcopy(model.state_dict())
    first, again, other = (add_outliers(model, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(weight, before[name]) for name, weight in model.state_dict().items())
    assert all(torch.equal(weight, again[name]) for name, weight in first.items())
    assert not all(torch.equal(weight, other[name]) for name, weight in first.items())
