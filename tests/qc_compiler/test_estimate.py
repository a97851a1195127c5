from dataclasses import dataclass, replace

import pytest
import torch
from torch import nn

import qc_compiler
from qc_compiler.device_profile import Rates
from qc_compiler.region_costs import Variant
from tiny_models import tiny_dit

SIZES = ("x.size(0)", "x.size(1)")
REUSED = Variant("reused", depth=1)


@dataclass(frozen=True)
class FakeProfile:
    """0.1 TB/s, special functions for free; FLOPs a second of linears quantized and plain, and of attention beside them."""

    quantized: float = 1e13
    plain: float = 1e12
    bf16: float = 1e12

    def multiplies(self, scheme):
        return scheme == "w8a8"

    def lowers_attention(self, scheme, dtype):
        return scheme == "w8a8" and dtype == torch.float32

    def rates(self, kind, dtype=torch.float32):
        rate = {"memory": 1e11, "special": 1e30, "w8a8": self.quantized, "bf16 attention": self.bf16}.get(
            kind, self.plain
        )
        num_axes = 1 if kind in ("memory", "special") else 3
        return Rates(axes=((1.0, 2.0),) * num_axes, values=(rate,) * 2**num_axes)


@pytest.fixture(scope="module")
def estimate():
    found = qc_compiler.cost(tiny_dit(depth=2), torch.randn(2, 16, 8), torch.full((2,), 3.0))
    torch._dynamo.reset()
    return replace(found, profile=FakeProfile())


def test_sizes_have_the_names_of_the_inputs(estimate):
    assert estimate.sizes == {"x.size(0)": 2, "x.size(1)": 16}
    assert estimate.fixed == {"x.size(2)": 8}
    names = {symbol.name for symbol in estimate.cost("blocks.0").flops.free_symbols}
    assert names == set(SIZES)


def test_equal_sizes_stay_apart():
    estimate = qc_compiler.cost(tiny_dit(depth=1), torch.randn(8, 8, 8), torch.full((8,), 3.0))
    assert estimate.sizes == {"x.size(0)": 8, "x.size(1)": 8}
    assert estimate.fixed == {"x.size(2)": 8}


def test_without_dynamic_everything_is_a_number():
    estimate = qc_compiler.cost(tiny_dit(depth=1), torch.randn(2, 16, 8), torch.full((2,), 3.0), dynamic=False)
    assert not estimate.sizes
    assert estimate.cost("blocks.0").flops.is_Integer


def test_a_model_without_blocks_is_all_outside():
    estimate = qc_compiler.cost(nn.Linear(4, 4).requires_grad_(False), torch.randn(3, 4))
    assert not estimate.blocks
    flops = estimate.cost("outside").flops
    assert flops.subs(dict.fromkeys(flops.free_symbols, 3)) == 2 * 3 * 4 * 4
    assert "network" not in str(replace(estimate, profile=FakeProfile()))


def test_seconds_are_those_of_the_slower_bound(estimate):
    cost, values = estimate.cost("blocks.0", REUSED), {"x.size(0)": 2, "x.size(1)": 16}
    moved = float(cost.bytes_moved.subs({s: values[s.name] for s in cost.bytes_moved.free_symbols}))
    assert estimate.seconds("blocks.0", REUSED) == pytest.approx(moved / 1e11)
    wide = {"x.size(0)": 2, "x.size(1)": 10**7}  # attention alone is bound by compute
    flops = 4 * 2 * 10**14 * 32
    assert estimate.seconds("blocks.0/attention", sizes=wide) == pytest.approx(flops / 1e12, rel=1e-3)
    half = estimate.seconds("blocks.0/attention", Variant(attended=0.5), wide)
    assert half == pytest.approx(flops / 2e12, rel=1e-3)


def test_a_step_is_the_sum_of_its_parts(estimate):
    names = ("outside", "blocks.0", "blocks.1")
    assert estimate.step_seconds() == pytest.approx(sum(map(estimate.seconds, names)))
    assert estimate.step_seconds() == pytest.approx(estimate.seconds("outside") + estimate.seconds("network"))
    assert estimate.step_seconds(sizes={"x.size(0)": 20}) > 2 * estimate.step_seconds()


def test_decisions_replace_blocks_and_sublayers(estimate):
    whole, block = estimate.step_seconds(), estimate.seconds("blocks.1")
    pruned = estimate.step_seconds({"blocks.1": Variant("pruned")})
    assert whole - pruned == pytest.approx(block)
    mlp = whole - estimate.step_seconds({"blocks.1/mlp": Variant("pruned")})
    assert mlp == pytest.approx(estimate.seconds("blocks.1/mlp"))
    reused = estimate.step_seconds({"network": REUSED})
    assert reused == pytest.approx(estimate.seconds("outside") + estimate.seconds("blocks.1", REUSED))
    everything = estimate.step_seconds(default=REUSED)
    assert everything == pytest.approx(estimate.seconds("outside") + 2 * estimate.seconds("blocks.1", REUSED))


def test_a_sublayer_of_a_block_that_is_not_computed_does_not_count(estimate):
    alone = estimate.step_seconds({"blocks.0": REUSED})
    assert estimate.step_seconds({"blocks.0": REUSED, "blocks.0/mlp": Variant("pruned")}) == alone


def test_a_linear_is_quantized_where_that_is_faster(estimate):
    wide = {"x.size(1)": 4096}
    plain, w8a8 = (estimate.seconds("blocks.0", variant, wide) for variant in (Variant(), Variant(quantize="w8a8")))
    slower = replace(estimate, profile=FakeProfile(quantized=1.0))
    assert slower.seconds("blocks.0", Variant(quantize="w8a8"), wide) == plain
    faster = replace(estimate, profile=FakeProfile(quantized=1e30))
    assert faster.seconds("blocks.0", Variant(quantize="w8a8"), wide) <= w8a8 <= plain


def test_a_linear_without_a_kernel_stays(estimate):
    assert estimate.seconds("blocks.0", Variant(quantize="fp8")) == estimate.seconds("blocks.0")


@pytest.mark.parametrize(("scheme", "is_faster"), [("w8a8", True), (None, False), ("fp8", False)])
def test_attention_is_faster_beside_int8_linears(estimate, scheme, is_faster):
    wide, variant = {"x.size(1)": 4096}, Variant(quantize=scheme)
    faster = replace(estimate, profile=FakeProfile(bf16=1e30))
    before, after = (e.seconds("blocks.0", variant, wide) for e in (estimate, faster))
    assert (after < before) == is_faster
    windowed = replace(variant, attended=0.5)  # another kernel
    assert faster.seconds("blocks.0", windowed, wide) == estimate.seconds("blocks.0", windowed, wide)


def test_an_anchored_estimate_hits_its_anchors(estimate):
    guarded = Variant(depth=1)
    full, reused = 7 * estimate.step_seconds(default=guarded), 9 * estimate.step_seconds(default=REUSED)
    fitted = estimate.anchored(full, reused, host_seconds=1e-9)
    assert fitted.step_seconds(default=guarded) == pytest.approx(full)
    assert fitted.step_seconds(default=REUSED) == pytest.approx(reused)
    assert fitted.step_seconds(is_output_reused=True) == 1e-9
    assert fitted.guard_seconds > 0
    assert fitted.step_seconds({"blocks.0": Variant("pruned")}, guarded) == pytest.approx(
        full - fitted.guard_seconds - fitted.scale * estimate.seconds("blocks.0", guarded)
    )


def test_an_anchor_without_slots(estimate):
    fitted = estimate.anchored(1.0, host_seconds=0.25, sizes={"x.size(0)": 4})
    assert fitted.step_seconds(sizes={"x.size(0)": 4}) == pytest.approx(1.0)
    assert fitted.scale == pytest.approx(0.75 / estimate.step_seconds(sizes={"x.size(0)": 4}))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda e: e.cost("blocks.9"), "no region 'blocks.9'"),
        (lambda e: e.step_seconds({"block.0": REUSED}), "did you mean 'blocks.0'"),
        (lambda e: e.seconds("outside", sizes={"x.size(7)": 1}), r"'x.size\(7\)' is not open, did you mean"),
        (lambda e: e.step_seconds(sizes={"x.size(2)": 16}), "the model fixes it"),
    ],
)
def test_unknown_names_are_refused(call, message, estimate):
    with pytest.raises(qc_compiler.OptionError, match=message):
        call(estimate)


def test_the_table(estimate):
    table = str(replace(estimate, profile=FakeProfile(plain=4e11)))
    assert [line.rstrip() for line in table.splitlines()] == GOLDEN.strip("\n").splitlines()


GOLDEN = """
one step, everything computed: 0.00475 ms
┏━━━━━━━━━━━━━┳━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━━━┳━━━━━━━━━━━━━┳━━━━━━━━━━┳━━━━━━━━━┳━━━━━━━━━━┓
┃ region      ┃ share ┃       ms ┃    GFLOP ┃ moved MiB ┃ weights MiB ┃ slot MiB ┃ bound   ┃  roof ms ┃
┡━━━━━━━━━━━━━╇━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━━━╇━━━━━━━━━━━━━╇━━━━━━━━━━╇━━━━━━━━━╇━━━━━━━━━━┩
│ outside     │  3.2% │ 0.000151 │ 3.48e-05 │    0.0144 │     0.00418 │        0 │ memory  │ 0.000151 │
│ network     │ 96.8% │   0.0046 │  0.00123 │     0.346 │       0.113 │  0.00391 │ memory  │  0.00363 │
│ blocks.0    │ 48.4% │   0.0023 │ 0.000614 │     0.173 │      0.0563 │  0.00391 │ memory  │  0.00182 │
│   attention │ 20.9% │ 0.000991 │ 0.000328 │    0.0715 │      0.0161 │  0.00391 │ compute │ 0.000819 │
│   mlp       │ 20.9% │ 0.000991 │ 0.000262 │    0.0714 │       0.016 │  0.00391 │ memory  │ 0.000749 │
│ blocks.1    │ 48.4% │   0.0023 │ 0.000614 │     0.173 │      0.0563 │  0.00391 │ memory  │  0.00182 │
│   attention │ 20.9% │ 0.000991 │ 0.000328 │    0.0715 │      0.0161 │  0.00391 │ compute │ 0.000819 │
│   mlp       │ 20.9% │ 0.000991 │ 0.000262 │    0.0714 │       0.016 │  0.00391 │ memory  │ 0.000749 │
└─────────────┴───────┴──────────┴──────────┴───────────┴─────────────┴──────────┴─────────┴──────────┘
sizes: x.size(0) = 2, x.size(1) = 16
fixed by the model: x.size(2) = 8
"""
