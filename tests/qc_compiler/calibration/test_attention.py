from itertools import product

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from torch import nn

import qc_compiler
from head_plans import DenseHeads, attentions
from qc_compiler.attention import CACHED, FULL, INT8, ROW, arrow_mask, attended_share
from qc_compiler.calibration.attention import (
    AGING,
    DROP,
    HeadSearch,
    Probe,
    Tried,
    choose_heads,
    open_heads,
    relative_errors,
    step_weights,
)
from qc_compiler.errors import OptionError, QuantCacheError
from qc_compiler.heads import half_width
from qc_compiler.plan import Plan
from qc_compiler.trajectory import Position, Trajectory
from tiny_models import compile_eagerly, eager_backend, sample, tiny_dit

STEPS = 5
WINDOWS = (0.5, 0.25)


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


def generate(model):
    return sample(model, STEPS)


def guided(model):
    """Two calls a step, of which the second is another stream."""
    x, found = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0)), []
    with torch.no_grad():
        for step in range(STEPS):
            t = torch.full((2,), 1000.0 * (1 - step / STEPS))
            found += [model(x, t), model(0.5 * x.flip(1), t)]
            x = x - (2 * found[-2] - found[-1]) / STEPS
    return torch.stack(found)


def test_another_resolution_before_changes_nothing():
    """Sizes that changed once would be symbolic, and attention is rewritten for known ones."""
    model = tiny_dit(2)
    sample(compile_eagerly(model, {"cache": "off"}), 1, tokens=16)
    sample(compile_eagerly(model, {"cache": "off"}), 1, tokens=32)
    assert calibrated(model, 0.2).attention.layers


def test_what_a_plan_prunes_stays_pruned(model):
    plan = Plan.without_schedule("", pruned=("blocks.1",), reasons=("blocks.1 does little",))
    found = calibrated(model, 0.4, plan=plan)
    assert (found.pruned, found.reasons[0]) == (("blocks.1",), "blocks.1 does little")


def calibrated(model, attention, share=None, generate=generate, **options):
    options = {"windows": WINDOWS, "level": "output", "budget": 2} | options
    return qc_compiler.calibrate(
        model, generate, share, attention=attention, progress=False, backend=backend, **options
    )


@pytest.fixture(scope="module")
def model():
    return tiny_dit(2)


# -- the choice


def brute_force(errors, savings, budget):
    """Returns the most that can be saved."""
    heads, count = errors.shape
    best = 0.0
    for chosen in product(range(-1, count), repeat=heads):
        taken = [(errors[h, m], savings[m]) for h, m in enumerate(chosen) if m >= 0]
        if all(e < DROP * budget / heads for e, _ in taken) and sum(e for e, _ in taken) <= budget:
            best = max(best, sum(s for _, s in taken))
    return best


@st.composite
def choices(draw):
    """Errors are whole numbers and a budget is none, so that no sum of them is nearly the budget."""
    heads, count = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    errors = draw(npst.arrays(np.float64, (heads, count), elements=st.integers(0, 12).map(float) | st.just(np.nan)))
    savings = draw(npst.arrays(np.float64, count, elements=st.integers(1, 16).map(lambda n: n / 16)))
    scale = draw(st.sampled_from([1e-9, 0.05, 1.0, 1e6]))
    return errors * scale, savings, (draw(st.integers(0, 24)) + 0.5) * scale


@settings(deadline=None, max_examples=150)
@given(choices())
def test_the_choice_saves_most_under_the_budget(case):
    errors, savings, budget = case
    chosen = choose_heads(errors, savings, budget)
    taken = [(h, m) for h, m in enumerate(chosen) if m >= 0]
    assert sum(errors[h, m] for h, m in taken) <= budget
    assert all(errors[h, m] < DROP * budget / len(errors) for h, m in taken)
    assert sum(savings[m] for _, m in taken) == pytest.approx(brute_force(errors, savings, budget))


@pytest.mark.parametrize("errors", [[[0.0, 0.0]], [[np.nan, np.inf]]])
@pytest.mark.parametrize("budget", [0.0, 1.0])
def test_without_a_budget_or_a_number_nothing_is_chosen(errors, budget):
    chosen = choose_heads(np.array(errors), np.array([1.0, 0.5]), budget)
    assert chosen.tolist() == ([0] if budget and not errors[0][0] else [-1])


def test_relative_errors_by_hand():
    """Head 0 varies by 1 around 3 and is off by 2; head 1 varies by 4 and is as it should be; head 2 does not vary."""
    full = torch.tensor([[2.0, 4.0], [1.0, 5.0], [7.0, 7.0]])[None, :, :, None].repeat(2, 1, 1, 1)
    candidate = full.clone()
    candidate[:, 0] += 2
    assert relative_errors(candidate, full).tolist() == pytest.approx([2.4, 0.0, 0.0])  # 4 over 5/3
    candidate[1, 2] += 1
    assert relative_errors(candidate, full)[2] == pytest.approx(0.3)
    assert relative_errors(candidate[:, 2:], full[:, 2:])[0] > 1e20
    candidate[0, 1, 0] = torch.nan
    assert np.isnan(relative_errors(candidate, full)).tolist() == [False, True, False]


def tried(errors, ages=(True, False)):
    return Tried(np.array(errors), np.array([1.0, 0.5]), np.array(ages))


def test_a_step_and_the_age_of_a_head_weigh_on_its_error():
    search = HeadSearch(1.0, weights=np.array([1.0, 1.0, 30.0]))
    search._now = "0", 1
    both = tried(np.full((2, 2), 0.01))
    assert search.choose(both, np.array([1, 1])).tolist() == [0, 0]
    assert search.choose(both, np.array([1, 4])).tolist() == [0, 1]  # 4⁴ · 0.01 > 1
    search._now = "0", 2
    assert search.choose(both, np.array([1, 2])).tolist() == [0, 1]  # 30 · 2⁴ · 0.01 > 1
    assert search.choose(tried(np.full((2, 2), 0.1)), np.array([1, 1])).tolist() == [-1, -1]


def test_heads_are_stale_where_most_before_them_are():
    search = HeadSearch(1.0)
    three_of_four = tried([[0.01] * 2] * 3 + [[2.0] * 2])
    assert search.choose(three_of_four, np.ones(4)).tolist() == [0, 0, 0, -1]
    assert search.choose(tried([[0.01, 0.01]] + [[2.0, 0.01]] * 3), np.ones(4)).tolist() == [1, 1, 1, 1]
    search._stale["0"] = [0.75, 0.0]
    assert search.choose(three_of_four, np.ones(4)).tolist() == [1, 1, 1, -1]
    search._stale["0"] = [0.75, 0.25]
    assert search.choose(three_of_four, np.ones(4)).tolist() == [0, 0, 0, -1]


@pytest.mark.parametrize(("was", "second", "may"), [(1.0, 0.01, True), (1.0, 2.0, False), (0.0, 2.0, True)])
def test_heads_stay_stale_where_most_of_all_layers_can(was, second, may):
    """Layer 0 could reuse three of four heads once more; with layer 1 they are three of eight, or seven."""
    search = HeadSearch(1.0)
    search._last = {("0", 0): tried([[0.01] * 2] * 3 + [[2.0] * 2]), ("0", 1): tried([[second] * 2] * 4)}
    search._last["1", 0] = tried([[0.0, 0.0]] * 4)  # another stream's
    search._age = {at: np.ones(4) for at in search._last}
    search._stale["0"] = [was, was]
    search.decide(None, Position(Trajectory(""), False, 1, 0))
    took = search.choose(search._last["0", 0], np.ones(4))
    assert took.tolist() == [0 if may else 1] * 3 + [-1]


def test_steps_weigh_by_what_they_do_in_the_end(model):
    """Predictions that are only summed, once each alike and once with steps 3 and 4 three times as large."""

    def summed(sizes):
        def generate(model):
            x = torch.randn(2, 16, 8, generator=torch.Generator().manual_seed(0))
            with torch.no_grad():
                return sum(c * model(x, torch.full((2,), 1000.0 - 100 * i)) for i, c in enumerate(sizes))

        return generate

    compiled = open_heads(model, Plan.without_schedule(""), backend=backend)
    alike, larger = (step_weights(compiled, summed(sizes)) for sizes in ([1, 1, 1, 1, 1], [1, 1, 1, 3, 3]))
    assert alike[1:].mean() == pytest.approx(1)
    assert len(set(alike)) > 2
    assert (larger / alike / (larger[1] / alike[1])).tolist() == pytest.approx([1, 1, 1, 9, 9], rel=1e-3)


# -- a whole calibration


@pytest.fixture
def recorded(monkeypatch):
    """Keeps every attention of the search: (stream, step, layer) → operands, output, weight of the step."""
    kept, attend = {}, HeadSearch.attend

    def watched(search, *operands):
        known = set(search.chosen)
        output = attend(search, *operands)
        for key in set(search.chosen) - known if not isinstance(search, Probe) else ():
            copies = [x.clone() if isinstance(x, torch.Tensor) else x for x in operands]
            kept[key] = copies, output.clone(), search.weights[key[1]]
        return output

    monkeypatch.setattr(HeadSearch, "attend", watched)
    return kept


def by_hand(head, share, operands):
    """Returns what one head gives, float64 (B, S, D)."""
    query, key, value, modes, kept, num_text, scale = operands
    if share == CACHED:
        return kept[:, int(modes[ROW, head])].double()
    tokens = query.shape[2]
    mask = torch.ones(tokens, tokens, dtype=torch.bool)
    if share > 0:
        mask = arrow_mask(tokens, num_text, half_width(share, tokens - abs(num_text)))
    q, k, v = (x[:, head].double() for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


@pytest.mark.parametrize("streams", [1, 2])
def test_what_is_chosen_holds_the_budget_on_what_was_recorded(model, recorded, streams):
    budget = 0.5
    plan = calibrated(model, budget, generate=guided if streams == 2 else generate)
    heads = plan.attention
    assert (plan.streams, plan.num_steps, heads.layers) == (("0", "1")[:streams], STEPS, attentions(2))
    assert heads.windows.shape == (streams, STEPS, 2, 4)
    assert (heads.windows[:, 0] == FULL).all()
    assert set(np.unique(heads.windows)) >= {FULL, CACHED}
    if streams == 2:
        assert 0.5 in heads.windows
        assert not np.array_equal(*heads.windows)
    saved = 0.0
    assert len(recorded) == streams * STEPS * 2
    age = {}
    for (stream, step, layer), (operands, output, weight) in recorded.items():
        total, fulls = 0.0, [by_hand(head, FULL, operands) for head in range(4)]
        spread = np.mean([float((full - full.mean()).square().mean()) for full in fulls])
        for head, full in enumerate(fulls):
            share = float(heads.windows[int(stream), step, layer, head])
            expected = by_hand(head, share, operands)
            torch.testing.assert_close(output[:, head].double(), expected, rtol=1e-5, atol=1e-6)
            age[stream, layer, head] = age.get((stream, layer, head), 0) + 1 if share != FULL else 0
            aged = max(age[stream, layer, head], 1) ** AGING
            total += weight * aged * float((expected - full).square().mean()) / spread
            saved += 1 - attended_share(half_width(share, 16), 16, 0)
        assert total <= budget * (1 + 1e-4)
    assert plan.measured["attention_saved"] == pytest.approx(saved / (4 * len(recorded)))
    assert plan.measured["attention_minutes"] > 0


def test_a_plan_computes_what_was_seen_when_it_was_made(model, recorded):
    """The compiled model does what the search did; so does a dense reference."""
    plan = calibrated(model, 0.5)
    planned, reference = (
        compile_eagerly(model, {"cache": "off", "plan": plan}),
        DenseHeads(model, plan.attention.windows[0]),
    )
    found, expected = generate(planned), generate(lambda x, t: reference(x, t).float())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, generate(model), atol=1e-4)


def test_a_larger_budget_saves_at_least_as_much():
    model = tiny_dit(1)
    plans = [calibrated(model, budget) for budget in (0.0, 0.2, 0.5, 1e6)]
    saved = [plan.measured["attention_saved"] for plan in plans]
    assert saved == sorted(saved)
    assert saved[0] == 0.0
    assert (plans[0].attention.windows == FULL).all()
    assert saved[-1] == (STEPS - 1) / STEPS  # all is cached behind the first step
    assert 0 < saved[1] < saved[2] < saved[3]


def test_windows_that_are_as_wide_as_the_image_are_not_tried(model):
    plan = calibrated(model, 100.0, windows=(1.99,))
    assert set(np.unique(plan.attention.windows)) == {FULL, CACHED}


def test_windows_may_run_along_time(model):
    with pytest.raises(
        QuantCacheError, match=r"can be head-wise: blocks\.0\.attn: its 16 vision tokens are not those of 1"
    ):
        calibrated(model, 0.1, token_order="time")


def test_a_plan_survives_its_file(model, tmp_path):
    plan = calibrated(model, 0.5)
    plan.save(tmp_path / "plan")
    assert Plan.load(tmp_path / "plan").digest == plan.digest


# -- together with the other parts


def test_heads_are_chosen_on_the_cached_trajectory(model, recorded):
    plan = calibrated(model, 0.5, share=0.5)
    assert plan.has_schedule
    computed = np.flatnonzero(plan.compute[0].any(axis=1))
    assert len(computed) < STEPS
    assert {step for _, step, _ in recorded} == set(computed.tolist())
    skipped = sorted(set(range(STEPS)) - set(computed.tolist()))
    assert (plan.attention.windows[:, skipped] == FULL).all()
    assert {"share", "error", "attention_saved"} <= set(plan.measured)


def test_all_parts_together():
    model = tiny_dit(1)
    plan = calibrated(model, 0.5, share=0.7, quantize="dmpq", compensate=True, emulate=True, samples=2)
    assert plan.has_schedule
    assert (plan.attention.windows == CACHED).any()
    assert plan.quantization.recipe == "dmpq"
    assert plan.compensation.shape == (1, STEPS, 8, 2)
    found, reference = (generate(m) for m in (compile_eagerly(model, {"plan": plan, "emulate": True}), model))
    assert 0 < (found - reference).norm() / reference.norm() < 0.5


def test_heads_are_added_to_a_plan_whose_schedule_and_linears_stay():
    model = tiny_dit(1)
    known = calibrated(model, None, share=0.7, quantize="w8a8", samples=2)
    plan = calibrated(model, 0.5, plan=known)
    assert np.array_equal(plan.compute, known.compute)
    assert plan.quantization is known.quantization
    assert plan.attention.layers == attentions(1)
    again = calibrated(model, 100.0, plan=plan)
    assert not np.array_equal(again.attention.windows, plan.attention.windows)


def test_streams_that_the_schedule_does_not_know_are_an_error(model):
    with pytest.raises(QuantCacheError, match="has a stream '1', the plan only 0: calibrate both with one generate"):
        calibrated(model, 0.5, plan=calibrated(model, None, share=0.7), generate=guided)


# -- mistakes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"attention": -0.1}, "attention=-0.1: expected a number of at least 0"),
        ({"attention": float("nan")}, "attention=nan: expected a number"),
        ({"attention": "0.4"}, "attention='0.4': expected a number"),
        ({"attention": True}, "attention=True: expected a number"),
        (
            {"attention": 0.4, "windows": (0.5, 2)},
            r"windows=\(0.5, 2\): 2 is no part of the vision tokens, in \(0, 2\)",
        ),
        ({"attention": 0.4, "windows": (0,)}, "0 is no part of the vision tokens"),
        ({"attention": 0.4, "windows": (FULL,)}, "-1 is no part of the vision tokens.*and not -2"),
        ({"attention": 0.4, "windows": (float("nan"),)}, "nan is no part of the vision tokens"),
        ({"attention": 0.4, "token_order": "tiem"}, "token_order='tiem': did you mean 'time'"),
    ],
)
def test_wrong_arguments(model, options, message):
    with pytest.raises(OptionError, match=message):
        calibrated(model, **options)


def test_scores_from_codes_are_a_candidate_that_saves_less_than_any_other(model):
    plan = calibrated(model, 1e-3, windows=(INT8,))
    heads = plan.attention.windows
    assert set(np.unique(heads)) >= {FULL, INT8}
    assert (heads[:, 0] == FULL).all()
    assert plan.measured["attention_saved"] == pytest.approx((heads[:, :] == CACHED).mean())
    assert CACHED in np.unique(calibrated(model, 10.0, windows=(INT8,)).attention.windows[:, 1:])


class Causal(nn.Module):
    def __init__(self):
        super().__init__()
        self.qkv = nn.Linear(8, 24)

    def forward(self, x):
        q, k, v = self.qkv(x)[:, None].chunk(3, dim=-1)
        return x + F.scaled_dot_product_attention(q, k, v, is_causal=True)[:, 0]


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Causal() for _ in range(2))

    def forward(self, x, timestep):
        x = x + timestep[:, None, None].sin()
        for block in self.blocks:
            x = block(x)
        return x


def test_a_model_without_attention_to_rewrite_says_why():
    message = r"no attention of this model can be head-wise: blocks\.0: it is causal; blocks\.1: it is causal"
    with pytest.raises(QuantCacheError, match=message):
        calibrated(Model().eval().requires_grad_(False), 0.4)
