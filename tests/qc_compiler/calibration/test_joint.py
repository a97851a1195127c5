import copy
import itertools
import json
import re
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import qc_compiler
from qc_compiler import OptionError, PlanError, QuantCacheError
from qc_compiler.calibration import joint
from qc_compiler.calibration.joint import Choice, JointPlanner, Levers, Target, parse_target
from qc_compiler.calibration.journal import Journal
from qc_compiler.calibration.recording import COMPUTE_ALL, Recording, by_sample, first_call, run_steered
from qc_compiler.calibration.removal import OneBlockLess
from qc_compiler.calibration.schedule import ScheduleSearch, relative_error
from qc_compiler.formats.schemes import SCHEMES, Scheme
from qc_compiler.plan import Plan
from qc_compiler.registry import runtimes_of
from tiny_models import compile_eagerly, eager_backend, guided, sample, tiny_dit

STEPS = 12


def backend(gm, example_inputs, options=None):
    return eager_backend(gm, example_inputs, options=options)


def counted_seconds(planner, compiled, share=1.0):
    """A clock that counts: a computed call takes 1 s, 0.8 with W8A8 or head-wise attention, a reused one 0.01."""
    planner.generate(compiled)
    try:
        summary = qc_compiler.summary(compiled)
    except QuantCacheError:  # nothing is guarded
        return 2.0 * STEPS
    computed = np.concatenate([stream.computed.any(axis=1) for stream in summary.streams])
    options = qc_compiler.registry.runtime_of(compiled).options
    step = 0.8 if options.quantize or options.attends else 1.0
    return float(computed.sum() * step + (~computed).sum() * 0.01)


def counted_beside_full(planner, compiled, what):
    samples = planner._samples(what, compiled)
    return samples, counted_seconds(planner, compiled) / counted_seconds(planner, planner._full)


beside_full = JointPlanner._beside_full


@pytest.fixture(scope="module", autouse=True)
def small():
    """Counts instead of timing, and looks at fewer schedules and budgets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(JointPlanner, "_lap", counted_seconds)
        patch.setattr(JointPlanner, "_beside_full", counted_beside_full)
        patch.setattr(joint, "SHARES", (0.2, 0.5))
        patch.setattr(joint, "DELTAS", (0.4,))
        patch.setattr(joint, "ROUNDS", 2)
        yield


@pytest.fixture(scope="module")
def model():
    return tiny_dit(2)


def planner_for(model, **known):
    return JointPlanner(model, guided, progress=False, backend=backend, **known)


@pytest.fixture(scope="module")
def planned(model):
    """A planner that has planned, and its plans."""
    planner = planner_for(model)
    targets = ("psnr=50", "speedup=3", "memory=1GiB")
    return planner, dict(zip(targets, planner.plans(list(map(parse_target, targets))), strict=True))


@pytest.mark.parametrize(
    ("text", "target"),
    [
        ("speedup=4", Target("speedup", 4.0)),
        (" psnr = 35.5 ", Target("psnr", 35.5)),
        ("memory=2GiB", Target("memory", 2.0 * 2**30)),
        ("memory=100", Target("memory", 100.0)),
    ],
)
def test_targets(text, target):
    assert parse_target(text) == target


@pytest.mark.parametrize("text", ["speed=4", "psnr=-1", "psnr=0", "psnr", "psnr=3GiB", 35, None, "memory=2GB"])
def test_what_is_no_target(text):
    with pytest.raises(OptionError, match=r"expected 'speedup=4', 'psnr=35' or 'memory=2GiB'"):
        parse_target(text)


@pytest.mark.parametrize("other", [{"quantize": "w8a8"}, {"attention": 0.4}, {"compensate": True}, {"level": "output"}])
def test_a_target_decides_everything(model, other):
    (name,) = other
    with pytest.raises(OptionError, match=f"^target='psnr=35' decides what {name} would: leave {name} out$"):
        qc_compiler.calibrate(model, guided, target="psnr=35", **other)


def test_the_first_call_is_caught_before_the_model_runs(model):
    args, kwargs = first_call(model, lambda m: m(torch.ones(2, 16, 8), timestep=torch.ones(2)))
    assert args[0].shape == (2, 16, 8)
    assert kwargs["timestep"].shape == (2,)
    assert not model._forward_pre_hooks
    with pytest.raises(QuantCacheError, match="never called the model"):
        first_call(model, lambda m: None)


def test_a_block_that_does_nothing_does_no_harm_and_the_path_is_kept():
    model = tiny_dit()
    model.blocks[1].modulation.weight.zero_()
    model.blocks[1].modulation.bias.zero_()  # its gates
    recording, reference = Recording(), guided(model)
    compiled = compile_eagerly(model, COMPUTE_ALL | {"level": "output+block"})
    run_steered(compiled, guided, recording)
    pilot = OneBlockLess(recording)
    found = run_steered(compiled, guided, pilot)
    harms = pilot.harms()
    assert set(harms) == {"blocks.0", "blocks.1", "blocks.2"}
    assert harms["blocks.1"] < 1e-6 < min(harms["blocks.0"], harms["blocks.2"])
    torch.testing.assert_close(found, by_sample(reference))


def test_each_block_is_left_out_in_every_stream():
    recording = SimpleNamespace(outputs={"0": [], "1": []}, num_steps=4)
    graph = SimpleNamespace(
        names=("output", "blocks.0", "blocks.1"), _prunable=(False, True, True), interface=SimpleNamespace(depth=1)
    )
    pilot, left_out = OneBlockLess(recording), set()
    for step, stream in itertools.product(range(4), "01"):
        compute, _, _ = pilot.decide(graph, SimpleNamespace(step=step, stream=stream), None)
        left_out.add((stream, int(np.argmin(compute))))
    assert left_out == {("0", 1), ("0", 2), ("1", 1), ("1", 2)}


def test_more_blocks_than_calls_take_several_runs():
    recording, model = Recording(), tiny_dit(5)
    compiled = compile_eagerly(model, COMPUTE_ALL | {"level": "output+block"})
    run_steered(compiled, four_steps, recording)
    pilot = OneBlockLess(recording)
    runs = 0
    while not runs or not pilot.is_done:
        run_steered(compiled, four_steps, pilot)
        runs += 1
    assert (runs, len(pilot.harms())) == (2, 5)


def four_steps(model):
    return sample(model, num_steps=4)


def unseeded(model):
    return guided(lambda x, t: model(x + 0.5 * torch.randn_like(x), t))


def partly_guided(model):
    """A second stream at steps 3 to 8 only."""

    def call(x, t):
        with qc_compiler.stream("cond"):
            velocity = model(x, t)
        if 300 < float(t[0]) <= 750:
            with qc_compiler.stream("uncond"):
                velocity = 2 * velocity - model(0.9 * x, t)
        return velocity

    return sample(call, STEPS)


@pytest.mark.parametrize(
    ("generate", "message"),
    [
        (unseeded, r"returned other samples when called again \(relative error [\d.e-]+\): fix its seed"),
        (lambda m: guided(m) * torch.nan, r"relative error inf\): fix its seed; if it did, they are not finite"),
        (lambda m: guided(lambda x, t: m(x * torch.nan, t)), "the model predicts NaN or Inf at step 0"),
        (partly_guided, "called stream 'uncond' at 6 of 12 steps"),
        (lambda m: sample(m, 1), "took 1 step of the model: expected 2 or more"),
        (lambda m: guided(m).mean().isnan().float() + 2, "nothing but 2: a PSNR needs data_range"),
    ],
    ids=["unseeded", "NaN samples", "NaN", "guidance at some steps", "one step", "one value"],
)
@pytest.mark.parametrize("target", ["psnr=40", "memory=1GiB"])
def test_what_cannot_be_measured(generate, message, target):
    model = tiny_dit(2)
    with pytest.raises(QuantCacheError, match=message):
        qc_compiler.calibrate(model, generate, target=target, progress=False, backend=backend)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target": 35}, "target=35: expected 'speedup=4'"),
        ({"target": []}, r"target=\[\]: expected at least one such as 'psnr=35'"),
        ({"target": "psnr=35", "data_range": -1.0}, "data_range=-1.0: expected a number above 0"),
        ({"target": "psnr=35", "max_generations": None}, "max_generations=None: expected a number above 0"),
        (
            {"target": "psnr=35", "resume": "/nowhere/calibration"},
            "resume='/nowhere/calibration': expected a file in a",
        ),
        ({"target": "psnr=35", "resume": "/"}, "resume='/': expected a file in a directory that exists"),
        ({"resume": "calibration"}, "resume='calibration' is read with a target only: leave it out, or give one"),
        ({"max_generations": 5}, "max_generations=5 is read with a target only"),
    ],
)
def test_wrong_arguments_are_found_before_anything_runs(model, options, message):
    with pytest.raises(OptionError, match=message):
        qc_compiler.calibrate(model, lambda m: pytest.fail("it ran"), **options)


def test_targets_are_met_as_the_plans_say(model, planned):
    fine, fast, small = planned[1].values()
    assert fine.measured["psnr"] >= 50
    assert fast.measured["speedup"] >= 3
    assert small.measured["error"] == 0
    reference = guided(model)
    for plan in (fine, fast, small):
        found = guided(compile_eagerly(model, {"plan": plan}))
        error = relative_error(by_sample(found), by_sample(reference))
        assert 0.8 * plan.measured["error"] <= error <= 1.001 * plan.measured["error"]
        assert plan.reasons[0].startswith(f"{plan.compute[..., 0].sum()} calls")
        assert plan.measured["speedup"] >= 1


@pytest.mark.parametrize(("own", "of_others"), [(0.2, 0.3), (0.3, 0.2)])
def test_a_plan_has_its_own_error_or_that_of_samples_not_fitted_to(planned, monkeypatch, own, of_others):
    planner, composed = planned[0], replace(planned[1]["speedup=3"], measured={"error": of_others})
    for name, value in {
        "_composed": lambda choice: composed,
        "_running": lambda plan, *, emulate: planner._full,
        "_error": lambda samples: own,
    }.items():
        monkeypatch.setattr(planner, name, value)
    assert planner._build(Choice(6)).measured["error"] == 0.3


def test_memory_is_met_by_the_scheme_with_the_least_error(model, planned):
    planner, plan = planned[0], planned[1]["memory=1GiB"]
    assert (plan.quantization, plan.pruned, plan.compute.all()) == (None, (), True)
    assert plan.fingerprint == planned[1]["psnr=50"].fingerprint
    full = planner._weight_bytes(Choice(planner.num_calls))
    assert full == sum(p.numel() * 4 for p in model.parameters())
    half = planner._choose(Target("memory", 0.5 * full))
    assert planner._weight_bytes(half) <= 0.5 * full
    assert half.quantize == min(
        (s for s in planner.levers.schemes if s and planner._weight_bytes(replace(half, quantize=s)) <= 0.5 * full),
        key=planner.levers.schemes.__getitem__,
    )
    with pytest.raises(OptionError, match=r"target memory=10 bytes: the least is \d+"):
        planner._choose(Target("memory", 10.0))


def test_what_is_left_to_try_bounds_the_memory(model):
    half = sum(p.numel() * 2 for p in model.parameters())
    with pytest.raises(OptionError, match=r"the least of what max_generations=1 left to try is \d+"):
        planner_for(model, max_generations=1.0).plans([Target("psnr", 50.0), Target("memory", half)])


def test_no_prepared_weights_remain(model, planned):
    prepared = [weights for runtime in runtimes_of(model) for weights in runtime.prepared.values()]
    assert prepared
    assert not any(weights.nbytes for weights in prepared)


@pytest.mark.parametrize("scheme", ["w4a8", "importance with 5.0 bits", "dmpq"])
def test_weights_are_as_small_as_was_predicted(scheme, model, planned):
    planner, packed = planned[0], copy.deepcopy(model)
    qc_compiler.pack_(packed, Plan.without_schedule("", quantization=planner.levers.quantizations[scheme]))
    expected = sum(t.nbytes for t in (*packed.parameters(), *packed.buffers()))
    assert planner._weight_bytes(Choice(planner.num_calls, scheme)) == expected


def test_bits_where_they_matter_cost_less_error(planned):
    errors = planned[0].levers.schemes
    assert errors["importance with 6.0 bits"] < errors["importance with 4.5 bits"] <= 1.05 * errors["w4a8"]
    assert errors["dmpq"] < errors["nvfp4"]


def test_what_saves_nothing_here_is_left_out_with_a_reason(planned):
    planner, plans = planned
    assert not planner.levers.fast
    assert plans["psnr=50"].quantization is None
    assert any(reason.startswith("w8a8: it saves") for reason in plans["psnr=50"].reasons)


def test_a_recipe_is_fast_only_where_each_of_its_schemes_has_a_kernel(planned, monkeypatch):
    planner = planned[0]
    monkeypatch.setattr(planner.levers, "fast", {"w8a8", "nvfp4", "w4a8"})
    known = [SCHEMES["nvfp4"], SCHEMES["w4a8"]]
    monkeypatch.setattr(joint, "find_kernel", lambda scheme, device: scheme if scheme in known else None)
    assert [planner._is_fast(recipe) for recipe in ("nvfp4", "dmpq", "importance", "w8a8")] == [
        True,
        False,
        False,
        False,
    ]
    known += [Scheme("nvfp4", "uint8"), SCHEMES["w8a8"]]
    assert all(planner._is_fast(recipe) for recipe in ("nvfp4", "dmpq", "importance", "w8a8"))
    planner.levers.fast.clear()
    assert not planner._is_fast("w8a8")


def test_what_takes_too_long_to_measure_is_left_out_with_a_reason(model, monkeypatch):
    monkeypatch.setattr(JointPlanner, "_heads_alone", lambda self, delta: (0.1, 0.5))
    planner = planner_for(model, max_generations=6.0)
    (plan,) = planner.plans([Target("memory", 2.0**30)])
    assert "dmpq: measuring its linears takes 5 generations" in plan.reasons
    assert "w4a8" in planner.levers.schemes


@pytest.mark.parametrize(("ratio", "kept"), [(0.9, True), (0.99, False)])
def test_a_lever_that_saves_no_time_here_is_dropped(ratio, kept, planned, monkeypatch):
    planner = planned[0]
    for name, value in {
        "levers": Levers(),
        "_journal": Journal(None),
        "_heads_alone": lambda delta: (0.1, ratio),
        "estimate": SimpleNamespace(step_seconds=lambda default=None: 1.0 if default is None else default.attended),
    }.items():
        monkeypatch.setattr(planner, name, value)
    planner._measure_heads()
    assert (0.4 in planner.levers.deltas) == kept
    assert planner.levers.reasons == ([] if kept else ["heads within δ = 0.4: a step takes 99% of its time"])


def test_an_interrupted_calibration_goes_on(model, tmp_path, monkeypatch):
    path, composed = tmp_path / "calibration.json", Plan.without_schedule("", measured={"error": 0.2})
    monkeypatch.setattr(JointPlanner, "_heads_alone", lambda self, delta: (0.1, 0.5))
    monkeypatch.setattr(JointPlanner, "_composed", lambda self, choice: composed)
    first, again, third = planners = [planner_for(model, resume=path) for _ in range(3)]
    spent, spend = dict.fromkeys(planners, 0.0), JointPlanner._spend

    def counted(self, share, what):
        spent[self] += share
        spend(self, share, what)

    monkeypatch.setattr(JointPlanner, "_spend", counted)
    with monkeypatch.context() as patch:
        patch.setattr(JointPlanner, "_measure_blocks", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            first.plans([])
    assert any(name.endswith(" calls") for name in json.loads(path.read_text()))
    again.plans([])
    third.plans([])
    assert spent[third] < spent[again] < spent[first] / 2
    assert third.generations == again.generations > spent[first]
    assert third._schedules == again._schedules
    assert third.levers == again.levers


def test_another_models_file_is_not_believed(tmp_path):
    path, samples = tmp_path / "calibration.json", torch.ones(3)
    journal = Journal(path)
    journal.open("a", samples)
    assert journal.get("x", lambda: 1) == 1
    for fingerprint, reference, expected in (("a", samples, 1), ("b", samples, 2), ("a", 2 * samples, 2)):
        other = Journal(path)
        other.open(fingerprint, reference)
        assert other._known.get("x", 2) == expected
    path.write_text("{")
    with pytest.raises(PlanError, match="is damaged .* delete it to begin anew"):
        Journal(path).open("a", samples)


def test_the_number_of_generations_is_bounded(model, monkeypatch):
    monkeypatch.setattr(joint, "WORTH", 0.0)  # whatever a busy device says of its attention
    monkeypatch.setattr(JointPlanner, "_heads_alone", lambda self, delta: (0.1, 0.5))
    planner = planner_for(model, max_generations=1.0)
    with pytest.warns(UserWarning, match=r"target speedup=1000 was not reached: [\d.]+ is the most"):
        (plan,) = planner.plans([Target("speedup", 1000.0)])
    assert plan.measured["generations"] <= planner.generations
    assert len(planner._built) <= joint.ROUNDS
    assert "target speedup=1000 was not reached" in plan.reasons[-1]
    assert "heads: 1 generations were over" in plan.reasons
    assert list(planner._schedules) == [4]  # the first of `SHARES`


def test_a_target_that_was_missed_is_planned_again_although_generations_are_over(model, monkeypatch):
    planner = planner_for(model, max_generations=1.0)
    build, found = planner._build, []

    def worse_at_first(choice):
        plan = build(choice)
        found.append(choice)
        return plan if len(found) > 1 else replace(plan, measured=plan.measured | {"error": 0.5, "psnr": 20.0})

    monkeypatch.setattr(planner, "_build", worse_at_first)
    (plan,) = planner.plans([Target("psnr", 35.0)])
    assert plan.measured["psnr"] >= 35
    assert 1 < len(found) <= joint.ROUNDS


def test_samples_that_are_no_numbers_have_the_worst_quality(planned):
    planner = planned[0]
    broken = planner._error(torch.full_like(planner.reference, torch.nan))
    assert (broken, planner._psnr(broken), planner._psnr(0.0)) == (np.inf, -np.inf, np.inf)


def test_the_error_of_a_schedule_falls_with_its_calls(planned, monkeypatch):
    planner = planned[0]
    monkeypatch.setattr(planner, "_schedules", {4: (0.4, (), 0.1), 8: (0.1, (), 0.1)})
    monkeypatch.setattr(planner, "num_calls", 24)
    found = [planner._schedule_error(calls) for calls in (2, 4, 8, 16, 24)]
    assert found == pytest.approx([1.6, 0.4, 0.1, 0.05, 0.0])
    assert 0.1 < planner._schedule_error(6) < 0.4


def test_schedules_that_end_in_nothing_finite_are_not_chosen(planned, monkeypatch):
    planner = planned[0]
    schedules = {2: (np.inf, (), 0.1), 4: (np.inf, (), 0.1), 8: (0.1, (), 0.1)}
    for name, value in {"_schedules": schedules, "_built": {}, "levers": Levers()}.items():
        monkeypatch.setattr(planner, name, value)
    assert [np.isfinite(planner._schedule_error(calls)) for calls in (2, 3, 4, 6, 8, 24)] == [False] * 3 + [True] * 3
    assert planner._choose(Target("speedup", 1e6)).calls == planner._choose(Target("psnr", 1.0)).calls == 6
    monkeypatch.setattr(planner, "_schedules", {2: schedules[2]})
    assert planner._choose(Target("speedup", 3.0)).calls == planner.num_calls
    planner._measure_cached()  # there is nothing to measure it on


def test_a_search_that_finds_nothing_finite_says_so(planned, monkeypatch):
    monkeypatch.setattr(ScheduleSearch, "measure", lambda self, schedules, gain: (np.inf, None))
    assert planned[0]._find(4)[0] == np.inf


def test_a_lever_does_more_harm_on_a_cached_trajectory(planned, monkeypatch):
    planner = planned[0]
    monkeypatch.setattr(planner.levers, "cached", {0.4: (4, 0.04, 1.0), "better there": (4, -0.1, 1.0)})
    found = [planner._noise(0.4, 0.01, calls) for calls in (2, 4, 12, planner.num_calls)]
    assert found[:2] == pytest.approx([0.04, 0.04])
    assert 0.01 < found[2] < 0.04
    assert found[3] == planner._noise("better there", 0.01, 4) == planner._noise("only measured alone", 0.01, 4) == 0.01


def test_levers_are_measured_on_a_cached_trajectory(planned, monkeypatch):
    planner = planned[0]
    levers = Levers(fast={"w8a8"})
    levers.schemes["w8a8"] = levers.schemes["w4a8"] = levers.deltas[0.4] = 0.01
    composed = {Choice(4, "w8a8"): 0.5, Choice(4, delta=0.4): 0.3}
    for name, value in {
        "levers": levers,
        "_journal": Journal(None),
        "_schedules": {4: (0.3, (), 0.1), 12: (0.1, (), 0.1)},
        "_scheduled": lambda choice, plan, *, judged: None if judged else "alone",
        "_running": lambda plan: plan,
        "_on_cached": lambda choice, alone: (composed[choice], 0.9 if alone == "alone" else 0.1),
    }.items():
        monkeypatch.setattr(planner, name, value)
    planner._measure_cached()
    assert levers.cached == {"w8a8": (4, pytest.approx(0.16), 0.9), 0.4: (4, 0.0, 0.9)}


def test_a_plan_built_for_a_later_target_serves_an_earlier_one(planned, monkeypatch):
    planner = planned[0]
    slow, fast = (
        Plan.without_schedule("", measured={"psnr": 40.0, "speedup": times, "error": 0.1}) for times in (2.0, 4.0)
    )
    built = {Target("psnr", 35.0): {Choice(6): slow}, Target("speedup", 3.0): {Choice(4): fast}}
    monkeypatch.setattr(planner, "_measure", lambda kinds: None)
    monkeypatch.setattr(planner, "_built", {})
    monkeypatch.setattr(planner, "_build_for", lambda target: planner._built.update(built[target]))
    assert planner.plans(list(built)) == [fast, fast]


def test_what_later_targets_teach_changes_what_is_built_for_earlier_ones(planned, monkeypatch):
    planner, asked = planned[0], []
    targets = [Target("psnr", 30.0), Target("psnr", 35.0), Target("speedup", 3.0)]
    plan = Plan.without_schedule("", measured={"psnr": 40.0, "speedup": 4.0, "error": 0.1})
    monkeypatch.setattr(planner, "_measure", lambda kinds: None)
    monkeypatch.setattr(planner, "_built", {Choice(6): plan})
    monkeypatch.setattr(planner, "_build_for", asked.append)
    assert planner.plans(targets) == [plan] * 3
    assert asked == [*targets, *targets[:2]]


def test_the_time_of_a_lever_on_a_cached_trajectory_is_that_of_its_computed_calls(planned, monkeypatch):
    planner, calls = planned[0], 4
    idle = planner.num_calls - calls
    laps = {"ours": iter([90, idle + 3, idle + 2, idle + 9]), "alone": iter([90, idle + 4, idle + 4, idle + 10])}
    for name, value in {
        "estimate": SimpleNamespace(host_seconds=1.0),
        "_composed": lambda choice: Plan.without_schedule("", measured={"error": 0.5}),
        "_running": lambda plan: "ours",
        "_lap": lambda which, share: next(laps[which]),
    }.items():
        monkeypatch.setattr(planner, name, value)
    monkeypatch.setattr(joint, "runtime_of", lambda which: SimpleNamespace(reset=lambda: None))
    assert planner._on_cached(Choice(calls, "w8a8"), "alone") == (0.5, 0.75)


def test_a_lever_saves_less_time_on_a_cached_trajectory(planned, monkeypatch):
    planner = planned[0]
    monkeypatch.setattr(planner.levers, "cached", {0.4: (4, 0.04, 0.9)})
    monkeypatch.setattr(planner.levers, "ratios", {0.4: 0.5, None: 1.0, "w8a8": 0.7})
    found = [planner._ratio(0.4, calls) for calls in (2, 4, 12, planner.num_calls)]
    assert found[:2] == pytest.approx([0.9, 0.9])
    assert 0.5 < found[2] < 0.9
    assert found[3] == pytest.approx(0.5)
    assert planner._ratio("w8a8", 4) == 0.7
    assert planner._ratio(None, 4) == 1.0
    times = [planner._call_seconds(Choice(calls, delta=0.4)) for calls in (4, planner.num_calls)]
    assert times[0] / times[1] == pytest.approx(0.9 / 0.5)


def test_a_scheme_that_is_worse_in_all_is_no_lever(planned, monkeypatch):
    planner = planned[0]
    levers = Levers(fast={"fp8", "w8a8", "nvfp4", "w4a8"})
    levers.schemes |= {"fp8": 0.1, "w8a8": 0.1, "nvfp4": 0.2, "w4a8": 0.3}
    levers.ratios |= {"fp8": 0.8, "w8a8": 0.8, "nvfp4": 0.9, "w4a8": 0.7}
    monkeypatch.setattr(planner, "levers", levers)
    planner._keep_the_best()
    assert levers.fast == {"w8a8", "w4a8"}
    assert levers.reasons == [f"{name}: it is neither faster nor more precise than w8a8" for name in ("fp8", "nvfp4")]


def test_the_calls_of_a_lever_are_timed_beside_those_of_the_full_model(model, planned, monkeypatch):
    planner, calls, now = planned[0], [], itertools.count()
    full, times = planner._full, [0, 2, 3]  # of the full model 2 s, of the lever 1 s
    monkeypatch.setattr(planner, "_full", lambda *args, **kwargs: calls.append(args) or full(*args, **kwargs))
    monkeypatch.setattr(planner, "_time", lambda: (at := next(now)) // 3 * 10 + times[at % 3] + 7 * (at == 2))
    compiled = compile_eagerly(model, COMPUTE_ALL)
    samples, ratio = beside_full(planner, compiled, "a lever")
    assert torch.equal(samples, planner.reference)
    assert ratio == 0.5  # and not what it took the first time, when it compiled
    assert len(calls) == 2 * STEPS
    guided(compiled)
    assert len(calls) == 2 * STEPS

    def fails(model):
        guided(model)
        raise RuntimeError("out of paper")

    monkeypatch.setattr(planner, "generate", fails)
    with pytest.raises(RuntimeError, match="out of paper"):
        beside_full(planner, compiled, "a lever")
    del calls[:]
    guided(compiled)
    assert not calls


def test_a_speed_up_is_the_median_of_as_long_as_a_full_lap(planned, monkeypatch):
    planner, laps = planned[0], iter([10.0, 2.0, 5.0, 2.0, 2.0])
    monkeypatch.setattr(planner, "_lap", lambda compiled, share=1.0: next(laps))
    assert planner._speedup(None, 0.2) == 5.0
    assert not list(laps)


def test_predictions_are_corrected_by_what_was_built(planned, monkeypatch):
    """Heads alone at twice the error and two thirds of the speed: half and more of it is believed of any heads."""
    planner = planned[0]
    heads, other, bare = Choice(8, delta=0.4), Choice(12, delta=0.4, pruned=("blocks.0",)), Choice(12)
    parts = dict.fromkeys((heads, other, bare), (0.1, 6.0))
    plan = Plan.without_schedule("", measured={"error": 0.2, "speedup": 4.0})
    for name, known in {"_built": {heads: plan}, "_learned": {}, "_by_parts": parts.__getitem__}.items():
        monkeypatch.setattr(planner, name, known)
    planner._learn()
    share = 1 / (1 + joint.DOUBT)
    assert planner._predict(heads) == (0.2, 4.0)
    assert planner._predict(other) == pytest.approx((0.1 * 2**share, 6 / 1.5**share))
    assert planner._predict(bare) == (0.1, 6.0)
    monkeypatch.setattr(planner, "_caution", np.log([2, 1]))
    assert planner._predict(other)[0] == pytest.approx(0.1 * 2 ** (1 + share))
    assert (planner._predict(bare), planner._predict(heads)) == ((0.1, 6.0), (0.2, 4.0))
    planner._built[other] = Plan.without_schedule("", measured={"error": np.inf, "speedup": 4.0})
    parts[emulated := Choice(24, quantize="not fast here", delta=0.4)] = (0.1, 6.0)
    planner._built[emulated] = plan
    planner._learn()
    assert np.isfinite(list(planner._learned.values())).all()
    assert "not fast here" not in planner._learned


def test_a_plan_that_was_built_is_not_built_again(model, tmp_path):
    journal, samples = Journal(tmp_path / "calibration.json"), torch.ones(3)
    journal.open("a", samples)
    built = Plan.without_schedule("a", pruned=("blocks.0",), measured={"psnr": 35.5})
    assert journal.plan("x", lambda: built) is not built
    again = Journal(tmp_path / "calibration.json")
    again.open("a", samples)
    assert again.plan("x", lambda: 1 / 0).digest == built.digest
    assert Journal(None).plan("x", lambda: built) is built


def test_every_decision_has_a_reason(planned):
    planner, plan = planned[0], planned[1]["psnr=50"]
    calls = int(plan.compute[..., 0].sum())
    heads = [r"with (full heads|heads within δ = 0\.4)"] if len(planner.levers.deltas) > 1 else []
    assert plan.reasons[1].startswith("so: ")
    for what in (f"with {calls + 2} calls", *heads, r"with(out)? blocks\.\d"):
        pattern = what + r": \d+\.\d\d× at \d+\.\d dB predicted"
        assert any(re.fullmatch(pattern, reason) for reason in plan.reasons), (what, plan.reasons)
