import pytest
import torch
from torch import nn

from capture import apply, capture, skips
from passes import CompensateOutput, GuardRegions
from qc_compiler.compensation import compensate
from qc_compiler.show import show
from small_blocks import Modulated, Stack
from tiny_models import tiny_dit

X = torch.arange(24.0).reshape(1, 2, 3, 4) / 24


def guarded(model, *args, level=None, output=True):
    captured = capture(model, *args)
    gm = captured.shared()
    apply(GuardRegions(level, output=output), gm)
    return gm, captured.inputs


# 1. golden


def test_golden():
    gm, _ = guarded(Stack(Modulated()), X)
    before = show(gm)
    assert "correction" not in before
    report = apply(CompensateOutput(), gm)
    assert (report.changed, report.skipped) == (1, ())
    assert gm.meta["interface"].num_channels == 2
    old, new = (text.split("\nbody")[0].splitlines() for text in (before, show(gm)))
    assert new[0] == old[0].replace("):", ", %correction: f32[2, 2]):")
    assert new[1:-7] == old[1:-1]
    assert (
        "\n".join(new[-7:])
        == """\
  %select = aten.select(%correction, 1, 0) : f32[2]
  %view = aten.view(%select, (1, -1, 1, 1)) : f32[1, 2, 1, 1]
  %select_1 = aten.select(%correction, 1, 1) : f32[2]
  %view_1 = aten.view(%select_1, (1, -1, 1, 1)) : f32[1, 2, 1, 1]
  %mul_4 = aten.mul(%view_1, %getitem) : f32[1, 2, 3, 4]
  %add_1 = aten.add(%view, %mul_4) : f32[1, 2, 3, 4]
  return (%add_1, %stack, %clone)"""
    )


# 2. skips


class Pooled(nn.Module):
    """Returns one row a sample, as a classifier does."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_dit(2)

    def forward(self, x, timestep):
        return self.inner(x, timestep).mean(dim=1)


def test_an_output_without_channels_is_skipped():
    gm, _ = guarded(Pooled(), torch.ones(1, 4, 8), torch.ones(1))
    before = show(gm)
    report = apply(CompensateOutput(), gm)
    assert report.changed == 0
    assert skips(report) == [("output", "it has no channels: VC corrects images, videos and tokens")]
    assert show(gm) == before
    assert gm.meta["interface"].num_channels is None


# 3. edges


@pytest.mark.parametrize("model", [lambda x: x + 1, tiny_dit(1)])
def test_a_graph_without_guards_is_left_alone(model):
    args = (torch.ones(1, 4, 8), torch.ones(1)) if isinstance(model, nn.Module) else (X,)
    gm = capture(model, *args).shared()
    before = show(gm)
    report = apply(CompensateOutput(), gm)
    assert (report.changed, report.skipped, show(gm)) == (0, (), before)


class Pair(nn.Module):
    """Returns two tensors: the second, e.g. a learned variance, is not corrected."""

    def __init__(self):
        super().__init__()
        self.inner = tiny_dit(2)

    def forward(self, x, timestep):
        y = self.inner(x, timestep)
        return y, y * 2


def test_of_several_outputs_the_first_is_corrected():
    gm, inputs = guarded(Pair(), torch.randn(2, 4, 8), torch.ones(2))
    steering = torch.ones(1, dtype=torch.bool), torch.ones(1, 1), torch.zeros(2, 4, 8), torch.zeros(2, 4, 8)
    plain = gm(*inputs, *steering)
    apply(CompensateOutput(), gm)
    correction = torch.tensor([[1.0, 3.0]]).repeat(8, 1)
    found = gm(*inputs, *steering, correction)
    assert torch.equal(found[0], 1 + 3 * plain[0])
    assert torch.equal(found[1], plain[1])


# 4. equivalence


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("level", [None, "block"])
def test_it_corrects_what_leaves_and_not_what_is_kept(level, dtype):
    model, x, t = tiny_dit(2).to(dtype), torch.randn(2, 6, 8).to(dtype), torch.full((2,), 300.0)
    gm, inputs = guarded(model, x, t, level=level)
    count = len(gm.meta["interface"].regions)
    slots = [torch.zeros(2, 6, 8, dtype=dtype)] + [torch.zeros(2, 6, 32, dtype=dtype)] * (count - 1)
    steering = (torch.ones(count, dtype=torch.bool), torch.ones(count, 1), *slots)
    with torch.no_grad():
        expected, *rest = gm(*inputs, *steering)
        apply(CompensateOutput(), gm)
        correction = torch.randn(8, 2, generator=torch.Generator().manual_seed(0))
        found, *now = gm(*inputs, *steering, correction)
        identity = gm(*inputs, *steering, torch.tensor([[0.0, 1.0]]).repeat(8, 1))[0]
    assert torch.equal(identity, expected)
    assert found.dtype == dtype
    assert torch.equal(found, compensate(expected, correction))
    assert not torch.equal(found, expected)
    # statistics and slots are those of the uncorrected output
    assert len(now) == len(rest) == 2 * count
    assert all(torch.equal(a, b) for a, b in zip(now, rest))
    assert torch.equal(now[count], expected)


# 5. idempotence


def test_a_second_run_leaves_the_graph_alone():
    gm, _ = guarded(tiny_dit(2), torch.ones(1, 4, 8), torch.ones(1))
    assert apply(CompensateOutput(), gm).changed == 1
    before = show(gm)
    assert apply(CompensateOutput(), gm).changed == 0
    assert show(gm) == before
