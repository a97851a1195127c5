import dataclasses
import re

import numpy as np
import pytest
import torch

from qc_compiler import Plan
from qc_compiler.errors import OptionError, PlanError
from qc_compiler.formats import parse_format
from qc_compiler.options import CACHE_DTYPES, CACHES, PRESETS, Options, changed, parse_options
from qc_compiler.plan import HeadPlan, Quantization


def plan(level="block", depth=2, regions=("blocks.0", "blocks.1")):
    count = len(regions)
    return Plan(
        "f" * 64, level, regions, (1000.0, 500.0), np.ones((1, 2, count), bool), np.ones((1, 2, count, depth), "f4")
    )


def test_nothing_given_is_the_balanced_preset():
    options = parse_options(None)
    assert options == parse_options({})
    assert options == parse_options({"preset": "balanced"})
    assert {name: getattr(options, name) for name in PRESETS["balanced"]} == PRESETS["balanced"]


@pytest.mark.parametrize("preset", PRESETS)
def test_presets_fill_in_what_is_left_open(preset):
    options = parse_options({"preset": preset})
    assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset]
    assert parse_options({"preset": preset, "max_skip": 7}).max_skip == 7
    assert options.exact == (preset == "exact")


def test_an_explicit_rule_takes_its_own_defaults():
    options = parse_options({"cache": "static"})
    assert (options.cache_order, options.max_skip, options.level) == (0, None, "network")


@pytest.mark.parametrize("cache", ["tdc", "first_block", "magcache"])
def test_rules_for_blocks_guard_blocks_if_nothing_else_is_said(cache):
    assert parse_options({"cache": cache}).level == "block"


def test_a_level_that_is_given_stays():
    assert parse_options({"cache": "tdc", "level": "sublayer"}).level == "sublayer"


@pytest.mark.parametrize("cache", CACHES)
@pytest.mark.parametrize("level", ["block", "output+block"])
def test_every_rule_is_accepted(cache, level):
    assert parse_options({"cache": cache, "level": level}).cache == cache


@pytest.mark.parametrize(
    ("level", "graph_level", "guards_output"),
    [
        ("network", "network", False),
        ("group", "block", False),
        ("block", "block", False),
        ("sublayer", "sublayer", False),
        ("output", None, True),
        ("output+network", "network", True),
        ("output+group", "block", True),
        ("output+sublayer", "sublayer", True),
    ],
)
def test_levels(level, graph_level, guards_output):
    options = parse_options({"cache": "static", "level": level})
    assert (options.graph_level, options.guards_output) == (graph_level, guards_output)


@pytest.mark.parametrize(
    ("typo", "name"),
    [("treshold", "threshold"), ("cache_oder", "cache_order"), ("intervall", "interval"), ("num_step", "num_steps")],
)
def test_an_unknown_name_is_answered_with_the_nearest(typo, name):
    with pytest.raises(OptionError, match=rf"unknown option '{typo}': did you mean '{name}'\? valid: bits, cache, "):
        parse_options({typo: 1})


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"preset": "balance"}, "preset='balance': did you mean 'balanced'?"),
        ({"preset": None}, "preset=None: valid: "),
        ({"preset": ["fast"]}, "preset=['fast']: "),
        ({"cache": "hcl"}, "cache='hcl': did you mean 'hlc'?"),
        ({"cache": True}, "cache=True: "),
        ({"cache": {}}, "cache={}: "),
        ({"cache_dtype": "int9"}, "cache_dtype='int9': did you mean 'int8'?"),
        ({"cache_dtype": torch.int8}, "cache_dtype=torch.int8: "),
        ({"cache_dtype": None}, "cache_dtype=None: "),
        ({"level": "blocks"}, "level='blocks': did you mean 'block'?"),
        ({"level": "output+blocks"}, "level='output+blocks': did you mean "),
        ({"level": "output+output"}, "level='output+output': "),
        ({"level": "output+"}, "level='output+': "),
        ({"level": None}, "level=None: "),
        ({"cache_order": 3}, "cache_order=3: expected 0, 1 or 2"),
        ({"cache_order": -1}, "cache_order=-1: expected a whole number of at least 0"),
        ({"cache_order": True}, "cache_order=True: expected a whole number of at least 0"),
        ({"interval": 0}, "interval=0: expected a whole number of at least 1"),
        ({"interval": 2.0}, "interval=2.0: expected a whole number of at least 1"),
        ({"interval": "2"}, "interval='2': expected a whole number of at least 1"),
        ({"max_skip": -1}, "max_skip=-1: expected a whole number of at least 0"),
        ({"num_steps": 0}, "num_steps=0: expected a whole number of at least 1"),
        ({"num_frames": 0}, "num_frames=0: expected a whole number of at least 1"),
        ({"text_tokens": "6"}, "text_tokens='6': expected how many come first, -n for the last n, or 0"),
        ({"text_tokens": 6.0}, "text_tokens=6.0: expected how many come first"),
        ({"text_tokens": True}, "text_tokens=True: expected how many come first"),
        ({"threshold": -0.1}, "threshold=-0.1: expected a number of at least 0"),
        ({"threshold": float("nan")}, "threshold=nan: expected a number of at least 0"),
        ({"threshold": "0.1"}, "threshold='0.1': expected a number of at least 0"),
        ({"threshold": True}, "threshold=True: expected a number of at least 0"),
        ({"polynomial": 1.0}, "polynomial=1.0: expected numbers"),
        ({"ratios": ["a"]}, "ratios=['a']: expected numbers"),
        ({"strict": "yes"}, "strict='yes': expected True or False"),
        ({"timestep": 3}, "timestep=3: expected the name of an input"),
        ({"disable": 3}, "disable=3: expected names of passes"),
        ({"disable": [3]}, "disable=[3]: expected names of passes"),
        ({"plan": 7}, "plan=7: expected a qc_compiler.Plan or the path of one"),
        ({"cache": "first_block", "level": "network"}, "cache='first_block' compares block residuals: level='network'"),
        ({"cache": "first_block", "level": "output"}, "cache='first_block' compares block residuals: level='output'"),
        ({"cache": "teacache", "level": "output"}, "cache='teacache' reads the input of the first block"),
    ],
)
def test_every_bad_value_is_refused_with_its_name_and_what_is_valid(given, message):
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        parse_options(given)


def test_limits_that_are_still_valid():
    assert parse_options({"max_skip": 0, "threshold": 0, "interval": 1, "cache_order": 2}).max_skip == 0
    assert parse_options({"threshold": float("inf")}).threshold == float("inf")


def test_slots_are_stored_as_the_model_s_dtype_or_in_a_format():
    assert all(name == "model" or parse_format(name).name == name for name in CACHE_DTYPES)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"quantize": "w8a9"}, "quantize='w8a9': did you mean 'w8a8'?"),
        ({"quantize": 8}, "quantize=8:"),
        ({"emulate": "yes"}, "emulate='yes': expected True or False"),
    ],
)
def test_wrong_quantization(given, message):
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        parse_options(given)


def test_quantizing_alone_is_something_to_do():
    assert parse_options({"cache": "off"}).exact
    options = parse_options({"cache": "off", "quantize": "w8a8"})
    assert not options.exact
    assert not options.caches


def test_disable_takes_one_name_or_several():
    assert parse_options({"disable": "normalize"}).disable == ("normalize",)
    assert parse_options({"disable": ["normalize", "share-bodies"]}).disable == ("normalize", "share-bodies")


def test_a_plan_brings_its_level_and_depth():
    options = parse_options({"plan": plan("sublayer", depth=3), "level": "network"})
    assert (options.level, options.cache_order, options.depth) == ("sublayer", 2, 3)
    assert not options.exact


def test_a_plan_may_be_a_path(tmp_path):
    path = tmp_path / "a.safetensors"
    plan().save(path)
    for given in (path, str(path)):
        assert parse_options({"plan": given}).plan.regions == ("blocks.0", "blocks.1")


def test_a_path_without_a_plan(tmp_path):
    with pytest.raises(PlanError, match=r"no plan at .*missing"):
        parse_options({"plan": tmp_path / "missing"})


def test_options_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        parse_options({}).cache = "off"


# -- changes without a new graph


def test_steering_values_change():
    options = parse_options({"cache": "hlc"})
    assert changed(options, {"threshold": 0.5, "max_skip": 3}) == dataclasses.replace(
        options, threshold=0.5, max_skip=3
    )


@pytest.mark.parametrize("name", sorted({f.name for f in dataclasses.fields(Options)} - Options.STEERING))
def test_what_shapes_the_graph_does_not_change(name):
    with pytest.raises(OptionError, match=f"option '{name}' cannot change without a new torch.compile"):
        changed(parse_options({}), {name: getattr(Options(), name)})


def test_a_change_is_checked_like_an_option():
    with pytest.raises(OptionError, match="threshold=-1"):
        changed(parse_options({}), {"threshold": -1})
    with pytest.raises(OptionError, match=r"option 'treshold' cannot change .* did you mean 'threshold'"):
        changed(parse_options({}), {"treshold": 1})


def test_a_plan_of_the_same_graph_may_be_changed_to(tmp_path):
    options = parse_options({"cache": "static", "level": "block", "cache_order": 1})
    path = tmp_path / "a.safetensors"
    plan("block", depth=2).save(path)
    assert changed(options, {"plan": path}).plan.num_steps == 2
    assert changed(options, {"plan": plan("block", depth=2)}).plan.num_steps == 2
    assert changed(changed(options, {"plan": path}), {"plan": None}) == options


@pytest.mark.parametrize("other", [plan("network", depth=2), plan("block", depth=1)])
def test_a_plan_for_another_graph_is_refused(other):
    options = parse_options({"cache": "static", "level": "block", "cache_order": 1})
    with pytest.raises(OptionError, match=r"plan=.* needs a new torch\.compile"):
        changed(options, {"plan": other})


# -- quantization


def known(recipe="w8a8+balance", ratio=1.0, amax=True, bits=8):
    sites = ("blocks.0.mlp", "blocks.1.mlp")
    return Quantization(
        recipe,
        sites,
        np.full(2, bits, "i1"),
        np.array([1.0, ratio], "f4"),
        np.ones(2, "f4"),
        np.zeros(2, "f4"),
        amax=(np.ones(32, "f4"),) * 2 if amax else (),
    )


def plan_of_linears(quantization, **changes):
    """A plan without a schedule."""
    return dataclasses.replace(plan("output", depth=1, regions=()), quantization=quantization, **changes)


@pytest.mark.parametrize("bits", [3.9, 17, "8", True, float("nan"), None])
def test_bits_outside_of_the_formats_are_refused(bits):
    with pytest.raises(OptionError, match="^" + re.escape(f"bits={bits!r}: expected a number from 4 to 16")):
        parse_options({"quantize": "importance", "bits": bits})


@pytest.mark.parametrize("bits", [4, 5.5, 16])
def test_bits_that_are_valid(bits):
    assert parse_options({"quantize": "importance", "bits": bits}).bits == bits


@pytest.mark.parametrize("quantize", ["w8a8+balance", "importance+balance+online"])
def test_balancing_needs_a_plan_with_ranges(quantize):
    message = f"quantize={quantize!r} needs the range of each linear's input: pass the plan of"
    for given in (None, plan(), plan_of_linears(known(quantize, amax=False))):
        with pytest.raises(OptionError, match="^" + re.escape(message)):
            parse_options({"quantize": quantize, "plan": given, "level": "block"})
    assert parse_options({"quantize": "w8a8+balance", "plan": plan_of_linears(known())}).schemes[0].balance


@pytest.mark.parametrize(
    ("quantize", "message"),
    [
        ("w8a8+rotate", "quantize='w8a8+rotate': 'rotate' cannot be added, did you mean 'rotation'?"),
        ("w8a8+ballance", "quantize='w8a8+ballance': 'ballance' cannot be added, did you mean 'balance'?"),
        ("dmpq+online", "quantize='dmpq+online': 'dmpq' has a rule of its own, 'online' cannot be added"),
        ("w8a8+online+inverse", "quantize='w8a8+online+inverse': 'w8a8' has a rule of its own, 'inverse' cannot be"),
    ],
)
def test_additions_that_are_refused(quantize, message):
    with pytest.raises(OptionError, match="^" + re.escape(message)):
        parse_options({"quantize": quantize})


def test_what_the_additions_mean():
    online = parse_options({"plan": plan_of_linears(known("importance+online+balance"))})
    assert [scheme.activation for scheme in online.schemes] == ["uint4", "uint6", "uint8", "plain"]
    assert all(scheme.balance and scheme.weight == "int8" for scheme in online.schemes)
    assert (online.recipe.rule, online.recipe.allocated, online.chooses_precision) == ("online", True, True)
    assert parse_options({"quantize": "w8a8+inverse"}).recipe.rule == "inverse"
    assert not parse_options({"quantize": "importance"}).chooses_precision


def test_a_plan_brings_the_recipe_it_was_calibrated_for():
    options = parse_options({"plan": plan_of_linears(known("importance", amax=False))})
    assert (options.quantize, options.recipe.allocated) == ("importance", True)
    with pytest.raises(OptionError, match="^quantize='w4a8': the plan's linears were measured for 'importance'"):
        parse_options({"plan": plan_of_linears(known("importance", amax=False)), "quantize": "w4a8"})
    assert parse_options({"plan": plan_of_linears(known()), "quantize": None}).quantize == "w8a8+balance"
    assert parse_options({"plan": plan()}).quantize is None


def test_a_plan_of_linears_alone_leaves_the_preset_in_charge_of_the_cache():
    given = {"plan": plan_of_linears(known("w8a8", amax=False))}
    for preset in PRESETS:
        options = parse_options(given | {"preset": preset})
        assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset]
        assert (options.scheduled, options.exact) == (False, False)
    assert parse_options(given | {"cache": "tdc"}).level == "block"
    assert parse_options(given | {"preset": "balanced"}).depth == PRESETS["balanced"]["cache_order"] + 1


def test_an_output_is_guarded_for_a_compensation_where_nothing_is_cached():
    corrected = plan_of_linears(None, compensation=np.zeros((1, 2, 4, 2), "f4"))
    options = parse_options({"plan": corrected, "cache": "off"})
    assert (options.level, options.compensates, options.caches, options.exact) == ("output", True, True, False)
    assert parse_options({"plan": corrected, "cache": "off", "level": "block"}).level == "block"


@pytest.mark.parametrize(("ratio", "activations"), [(25.0, 2), (25.1, 3)])
def test_dmpq_leaves_activations_plain_where_there_are_outliers(ratio, activations):
    """PDR: the third scheme is there where max|X| / mean|X| > 25 for some linear."""
    options = parse_options({"plan": plan_of_linears(known("dmpq", ratio, amax=False))})
    assert [s.activation for s in options.schemes] == ["nvfp4", "uint8", "plain"][:activations]
    assert len(parse_options({"quantize": "dmpq"}).schemes) == 2
    other = parse_options({"plan": plan_of_linears(known("w8a8", ratio, amax=False))})
    assert len(other.schemes) == 1


@pytest.mark.parametrize("quantize", ["dmpq", "w8a8+online"])
@pytest.mark.parametrize(
    ("given", "level"),
    [
        ({}, "output+block"),
        ({"cache": "off"}, "block"),
        ({"cache": "hlc"}, "block"),
        ({"cache": "hlc", "level": "sublayer"}, "sublayer"),
        ({"level": "output"}, "output+block"),
        ({"plan": plan("output", regions=("output",))}, "output+block"),
        ({"plan": plan("block")}, "block"),
        ({"plan": plan("output", regions=("output",)), "level": "sublayer"}, "output+block"),
    ],
)
def test_a_rule_for_precisions_has_the_statistics_of_blocks(quantize, given, level):
    assert parse_options({"quantize": quantize} | given).level == level


@pytest.mark.parametrize("given", [{"level": "network"}, {"plan": plan("network")}])
def test_a_level_without_them_is_refused(given):
    with pytest.raises(OptionError, match="^quantize='dmpq' decides by the statistics of blocks: level="):
        parse_options({"quantize": "dmpq"} | given)


def test_without_a_rule_a_plan_of_the_output_stays_there():
    options = parse_options({"quantize": "w8a8", "plan": plan("output", regions=("output",))})
    assert options.level == "output"


# -- heads


def plan_of_heads(order="raster", **changes):
    heads = HeadPlan(("blocks.0.attn",), np.full((1, 2, 1, 4), 0.25, "f4"), order)
    return plan_of_linears(None, attention=heads, **changes)


@pytest.mark.parametrize("num_text", [226, 0, -226])
def test_text_may_come_first_or_last(num_text):
    assert parse_options({"text_tokens": num_text}).text_tokens == num_text


def test_without_a_plan_for_heads_attention_stays_as_it_is():
    assert not parse_options({"text_tokens": 6}).attends
    assert not parse_options({"plan": plan()}).attends
    assert parse_options({"plan": plan_of_heads()}).attends


@pytest.mark.parametrize("given", [{"cache": "off"}, {"preset": "exact"}])
def test_an_output_is_guarded_for_heads_where_nothing_is_cached(given):
    """The runtime must know the step all the same."""
    options = parse_options({"plan": plan_of_heads()} | given)
    assert (options.level, options.caches, options.exact) == ("output", True, False)
    assert parse_options({"plan": plan_of_heads(), "level": "block"} | given).level == "block"


def test_a_plan_of_heads_alone_leaves_the_preset_in_charge_of_the_cache():
    for preset in ("high", "balanced", "fast"):
        options = parse_options({"plan": plan_of_heads(), "preset": preset})
        assert {name: getattr(options, name) for name in PRESETS[preset]} == PRESETS[preset]


def test_the_order_of_tokens_is_built_into_a_graph():
    options = parse_options({"plan": plan_of_heads()})
    assert changed(options, {"plan": plan_of_heads()}).attends
    for other, name in ((plan_of_heads("time"), "time"), (plan_of_linears(None), None), (None, None)):
        with pytest.raises(OptionError, match=f"plan=… whose attention is {name} needs a new torch.compile: .* raster"):
            changed(options, {"plan": other})


def test_srap_reads_the_statistics_of_blocks():
    assert parse_options({"prune": "srap"}).level == "output+block"
    assert parse_options({"prune": "srap", "cache": "off"}).level == "block"
    assert parse_options({"prune": "srap", "cache": "static", "level": "group"}).level == "group"
    scheduled = parse_options({"prune": "srap", "plan": plan("output", regions=("output",))})
    assert scheduled.level == "output+block"
    assert not parse_options({"prune": "srap", "cache": "off"}).exact


@pytest.mark.parametrize("level", ["network", "sublayer", "output+sublayer"])
def test_srap_refuses_levels_without_blocks(level):
    with pytest.raises(OptionError, match=f"level='{re.escape(level)}' must be 'block', 'group' or 'output"):
        parse_options({"prune": "srap", "cache": "static", "level": level})


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("prune", "sarp", "did you mean 'srap'"),
        ("prune", True, "prune=True"),
        ("prune_threshold", 1.1, "expected a number from 0 to 1"),
        ("prune_threshold", "a", "expected a number from 0 to 1"),
        ("prune_seed", -1, "expected a whole number of at least 0"),
        ("prune_seed", 0.5, "expected a whole number of at least 0"),
    ],
)
def test_values_of_pruning_are_checked(name, value, message):
    with pytest.raises(OptionError, match=message):
        parse_options({"prune": "srap", name: value})


def test_a_plan_that_only_prunes_rewrites_the_graph_and_guards_nothing():
    pruning = Plan.without_schedule("", pruned=("blocks.1",))
    options = parse_options({"cache": "off", "plan": pruning})
    assert (options.exact, options.caches, options.pruned) == (False, False, ("blocks.1",))
    assert parse_options({"cache": "off", "plan": Plan.without_schedule("")}).exact


def test_what_steers_srap_may_change_and_what_is_removed_may_not():
    options = parse_options({"prune": "srap"})
    new = changed(options, {"prune_threshold": 0.9, "prune_seed": 3})
    assert (new.prune_threshold, new.prune_seed) == (0.9, 3)
    with pytest.raises(OptionError, match="that removes blocks.1 needs a new torch.compile"):
        changed(options, {"plan": Plan.without_schedule("", pruned=("blocks.1",))})
