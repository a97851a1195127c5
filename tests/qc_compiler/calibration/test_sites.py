import pytest
import torch
import torch.nn.functional as F
from torch import nn

from capture import apply, capture
from passes import QuantizeLinears
from qc_compiler.calibration.sites import RoundedLinear, SiteRunner, exact
from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import PLAIN, Scheme, recipe_of
from qc_compiler.formats.transforms import balancing_scales
from small_blocks import Modulated, Stack
from tiny_models import tiny_dit

X, T = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), torch.full((2,), 500.0)


def captured(model=None):
    model = model or tiny_dit(2)
    with torch.no_grad():
        for block in model.blocks:
            block.mlp[0].weight[:, 3] *= 30  # an outlier, so that each addition makes a difference
    return model, capture(model, X, T)


# -- the runner


@pytest.mark.parametrize("depth", [1, 3])
def test_exact_linears_are_the_model(depth):
    model, kept = captured(tiny_dit(depth))
    found = SiteRunner(kept.shared()).run(kept.inputs, exact)
    with torch.no_grad():
        assert torch.allclose(found.output, model(X, T), rtol=1e-5, atol=1e-6)


def test_streams_and_residuals_of_each_block_are_seen():
    model, kept = captured(tiny_dit(3))
    seen = {}
    for i, block in enumerate(model.blocks):
        block.register_forward_hook(lambda _, args, y, i=i: seen.update({f"blocks.{i}": (args[0], y)}))
    found = SiteRunner(kept.shared()).run(kept.inputs, exact)
    with torch.no_grad():
        model(X, T)
    assert list(found.before) == list(found.residuals) == list(seen)
    for name, (x, y) in seen.items():
        assert torch.allclose(found.before[name], x.flatten(1), atol=1e-5)
        assert torch.allclose(found.residuals[name], (y - x).flatten(1), atol=1e-5)
        assert found.residuals[name].shape == (2, 16 * 32)


def test_the_sites_are_the_linears_that_can_be_quantized():
    _, kept = captured()
    sites = SiteRunner(kept.shared()).sites
    parts = ("attn.qkv", "attn.out", "mlp.0", "mlp.2")  # the modulation sees one row a sample
    assert [site.name for site in sites] == [f"blocks.{i}.{part}" for i in range(2) for part in parts]
    assert [site.block for site in sites] == ["blocks.0"] * 4 + ["blocks.1"] * 4
    assert len({site.body for site in sites}) == 1
    assert all(site.shares == (site.name,) for site in sites)


class Projections(nn.Module):
    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(32, 32) for _ in range(3))

    def forward(self, x):
        h = F.layer_norm(x, x.shape[-1:])
        return x + F.scaled_dot_product_attention(self.q(h), self.k(h), self.v(x))


def test_linears_that_read_the_same_share():
    gm = capture(Stack(Projections(), Projections()), torch.randn(1, 2, 3, 32)).shared()
    shares = {site.name: site.shares for site in SiteRunner(gm).sites}
    for i in range(2):
        together = (f"blocks.{i}.q", f"blocks.{i}.k")
        assert shares[f"blocks.{i}.q"] == shares[f"blocks.{i}.k"] == together
        assert shares[f"blocks.{i}.v"] == (f"blocks.{i}.v",)


def test_a_hook_sees_every_linear_once_and_its_result_is_taken():
    model, kept = captured()
    runner, seen = SiteRunner(kept.shared()), []
    weights = dict(model.named_modules())

    def hook(site, x, weight, bias):
        seen.append(site)
        assert torch.equal(weight, weights[site.name].weight)
        assert torch.equal(bias, weights[site.name].bias)
        return (
            torch.zeros_like(exact(site, x, weight, bias))
            if site.name == "blocks.1.mlp.2"
            else exact(site, x, weight, bias)
        )

    found = runner.run(kept.inputs, hook)
    assert seen == runner.sites
    with torch.no_grad():
        model.blocks[1].mlp[2].weight.zero_()
        model.blocks[1].mlp[2].bias.zero_()
        assert torch.allclose(found.output, model(X, T), rtol=1e-5, atol=1e-6)


def test_a_linear_without_bias():
    gm = capture(Stack(Modulated(32)), torch.randn(1, 2, 3, 32))
    runner, biases = SiteRunner(gm.shared()), []
    runner.run(gm.inputs, lambda site, x, w, b: biases.append(b) or exact(site, x, w, b))
    assert biases == [None]


# -- rounded linears are those of the pass


def run_both(recipe, model=None):
    """Returns what the runner computes with rounded linears, what the graph after the pass computes, and the exact."""
    _, kept = captured(model)
    runner, known, amax, weights = SiteRunner(kept.shared()), {}, {}, {}
    (scheme,) = recipe_of(recipe).schemes if isinstance(recipe, str) else (recipe,)

    def look(site, x, weight, bias):
        amax[site.name], weights[site.name] = x.abs().reshape(-1, x.shape[-1]).amax(dim=0), weight
        return exact(site, x, weight, bias)

    def hook(site, x, weight, bias):
        scales = balancing_scales(amax[site.name], weight.abs().amax(dim=0)) if scheme.balance else None
        known[site.name] = RoundedLinear(weight, scheme, scales)
        return known[site.name](x, bias)

    original = runner.run(kept.inputs, look).output
    found = runner.run(kept.inputs, hook).output
    gm = kept.shared()
    assert apply(QuantizeLinears((scheme,), emulate=True, amax=amax), gm).changed == len(runner.sites)
    with torch.no_grad():
        (expected,) = gm(*kept.inputs)
    return found, expected, original


@pytest.mark.parametrize(
    "recipe",
    ["w8a8", "w4a6", "nvfp4", "w4a6+rotation", "w4a6+rank8", "w4a6+rotation+rank8", Scheme("int4/128", PLAIN)],
    ids=str,
)
def test_a_rounded_linear_is_that_of_the_pass_to_the_last_bit(recipe):
    found, expected, original = run_both(recipe)
    assert torch.equal(found, expected)
    assert not torch.allclose(found, original, atol=1e-4)


@pytest.mark.parametrize("recipe", ["w8a8+balance", "w4a8+rotation+balance"])
def test_balancing_is_that_of_the_pass_up_to_codes_on_the_edge(recipe):
    """The pass multiplies by 1/s where the runner divides by s: an ulp, which can tip a code."""
    found, expected, original = run_both(recipe)
    error, apart = (found - original).norm(), (found - expected).norm()
    assert apart < 0.02 * error
    unbalanced = run_both(recipe.replace("+balance", ""))[0]
    assert (found - unbalanced).norm() > 0.1 * error


def test_each_addition_changes_the_result():
    generator = torch.Generator().manual_seed(0)
    weight, x = torch.randn(64, 128, generator=generator), torch.randn(3, 5, 128, generator=generator)
    exactly = F.linear(x, weight)
    bare = Scheme("int4/128", "uint6")
    additions = {"rotation": True, "rank": 4, "balance": True}
    found = [RoundedLinear(weight, bare, torch.full((128,), 3.0))(x, None)]
    for name, value in additions.items():
        scheme = Scheme("int4/128", "uint6", **{name: value})
        found.append(RoundedLinear(weight, scheme, torch.linspace(0.5, 2, 128))(x, None))
        assert (found[-1] - exactly).norm() < 0.3 * exactly.norm()
    assert all(not torch.equal(a, b) for i, a in enumerate(found) for b in found[:i])


def test_plain_activations_stay_as_they_are():
    weight, bias, x = torch.randn(64, 128), torch.randn(64), torch.randn(3, 5, 128)
    w_hat = parse_format("int8").round_trip(weight)
    assert torch.equal(RoundedLinear(weight, Scheme("int8", PLAIN))(x, bias), F.linear(x, w_hat, bias))


def test_bfloat16_stays_bfloat16():
    weight, x = torch.randn(64, 128).bfloat16(), torch.randn(3, 5, 128).bfloat16()
    scheme = Scheme("int4/128", "uint6", rotation=True, rank=4, balance=True)
    assert RoundedLinear(weight, scheme, torch.ones(128))(x, None).dtype == torch.bfloat16
