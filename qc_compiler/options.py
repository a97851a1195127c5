"""What a user may set: one flat dict, parsed into a frozen dataclass. Few options, checked by name and by value."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from .errors import OptionError, nearest
from .formats.schemes import PLAIN, Recipe, Scheme, recipe_of
from .plan import Plan

LEVELS = ("output", "network", "group", "block", "sublayer")
CACHES = ("off", "static", "hlc", "tdc", "first_block", "teacache", "magcache")
CACHE_DTYPES = ("model", "int8", "fp8")
PRUNES = ("srap",)

# Presets fill in what the user leaves open. Measured on three trained models (image, video, text to image), 50 steps:
# high 51 to 60 dB at 43 to 47 % of the work, balanced 47 to 55 dB at 34 %, fast 40 to 43 dB at 24 to 26 %; the pages
# joint_* in benchmarks/results have their speed.
PRESETS: dict[str, dict[str, Any]] = {
    "exact": {"cache": "off"},
    "high": {"cache": "hlc", "level": "output", "cache_order": 2, "threshold": 0.003, "max_skip": 3},
    "balanced": {"cache": "hlc", "level": "output", "cache_order": 1, "threshold": 0.01, "max_skip": 3},
    "fast": {"cache": "hlc", "level": "output", "cache_order": 1, "threshold": 0.015, "max_skip": 6},
}


@dataclass(frozen=True)
class Options:
    """All options of the backend.

    Attributes:
        preset: `exact`, `high`, `balanced` (what a bare `backend="quantcache"` uses) or `fast`.
        cache: The rule that decides when to compute: `off`, `static`, `hlc`, `tdc`, `first_block`, `teacache`,
            `magcache`.
        level: What is guarded: `output`, `network`, `group`, `block` or `sublayer`; with `output+` in front
            (`output+block`) a plan may also skip whole steps. `output` is `output+block` where a rule for precisions
            or for pruning reads the statistics of blocks.
        interval: Steps from one computation to the next (`static`).
        cache_order: Order of the extrapolation of a reused residual: 0 repeats it, 1 and 2 extrapolate.
        cache_dtype: How slots are stored: `model`, `int8` or `fp8` (a scale a token).
        threshold: The rule's threshold; None takes the default that the rule documents.
        max_skip: Most steps reused in a row; None takes the rule's default.
        polynomial, ratios: What `fit_rule` found for `teacache` and `magcache`; None takes the rule's default.
        num_steps: Steps of a trajectory, if known. Needed where no timestep input is found.
        plan: A `Plan` or the path of one; decides instead of `cache`.
        prune: `srap` leaves blocks that change their input little out of steps that are computed; None prunes only
            what the plan says.
        prune_threshold: Cosine of a block's input and output above which `srap` leaves it out, .995 by default; from
            1 − 4·(1 − threshold) on it does so at random.
        prune_seed: Of this randomness.
        quantize: How the linears of the blocks are quantized: `w8a8`, `w4a8`, `w4a6`, `fp8`, `nvfp4`; `importance`,
            which gives each weight 4, 8 or 16 bits; or `dmpq`, which chooses at every step. None takes what the plan
            was calibrated for. Behind a name `+rotation` rotates weights and activations by a Hadamard matrix,
            `+rank32` keeps 32 singular directions of a weight in full precision, `+balance` moves outlier channels
            into the weights (needs a plan), and `+online` or `+inverse` chooses 4, 6, 8 or 16 bits for the activations
            at every step. Where this device has no faster kernel linears stay as they are.
        bits: Mean bits of a weight for `importance`.
        precision_threshold: What `dmpq` compares its predicted error with, or the lowest limit of `+online`; None takes
            the plan's or the rule's default.
        emulate: Quantize there as well, in plain torch: slow, for measuring what a format does to quality.
        strict: Raise `UnsupportedModelError` where quantcache would run plain Inductor.
        timestep: Name of the timestep input, if it is not found by itself.
        num_frames: Frames of the video after patching, for HLC's motion factor and for attention along time; None
            finds it, 1 for images.
        text_tokens: Where the text is among the tokens of attention: 226 for the first 226, -226 for the last; None
            finds it. Only a plan with attention reads it.
        disable: Exact names of passes to leave out.
        process_group: With `True` (the default group) or a `ProcessGroup`, its ranks decide alike.
    """

    preset: str = "balanced"
    cache: str = "hlc"
    level: str = "network"
    interval: int = 2
    cache_order: int = 0
    cache_dtype: str = "model"
    threshold: float | None = None
    max_skip: int | None = None
    polynomial: tuple[float, ...] | None = None
    ratios: tuple[float, ...] | None = None
    num_steps: int | None = None
    plan: Plan | None = None
    prune: str | None = None
    prune_threshold: float | None = None
    prune_seed: int = 0
    quantize: str | None = None
    bits: float = 5.0
    precision_threshold: float | None = None
    emulate: bool = False
    strict: bool = False
    timestep: str | None = None
    num_frames: int | None = None
    text_tokens: int | None = None
    disable: tuple[str, ...] = ()
    process_group: Any = None

    # Changing one of these needs no new graph: only the controller reads them.
    STEERING = frozenset(
        {"cache", "interval", "threshold", "max_skip", "polynomial", "ratios", "num_steps", "process_group", "plan"}
        | {"precision_threshold", "prune_threshold", "prune_seed"}
    )

    @property
    def exact(self) -> bool:
        """Whether nothing is to be done to the graph."""
        return not self.caches and self.recipe is None and not self.pruned

    @property
    def caches(self) -> bool:
        """Whether anything is guarded."""
        needed = self.scheduled or self.chooses_precision or self.compensates or self.attends
        return needed or self.cache != "off" or self.prune is not None

    @property
    def scheduled(self) -> bool:
        """Whether a plan decides what is computed, in place of `cache`."""
        return self.plan is not None and self.plan.has_schedule

    @property
    def pruned(self) -> tuple[str, ...]:
        """Names of the blocks and sub-layers that leave the graph."""
        return self.plan.removed if self.plan else ()

    @property
    def compensates(self) -> bool:
        """Whether the model's output is corrected (VC)."""
        return self.plan is not None and self.plan.compensation is not None

    @property
    def attends(self) -> bool:
        """Whether a plan decides what each attention head does."""
        return self.plan is not None and self.plan.attention is not None

    @property
    def chooses_precision(self) -> bool:
        """Whether the linears have several precisions, of which a rule takes one at every step."""
        return self.recipe is not None and self.recipe.rule is not None

    @property
    def recipe(self) -> Recipe | None:
        """What is done to the linears, or None."""
        return recipe_of(self.quantize) if self.quantize else None

    @property
    def schemes(self) -> tuple[Scheme, ...]:
        """The schemes of the linears; for `dmpq` with a third where calibration found outliers (PDR)."""
        if self.recipe is None:
            return ()
        schemes, known = self.recipe.schemes, self.plan.quantization if self.plan else None
        if self.recipe.rule == "dmpq" and known is not None and known.has_outliers.any():
            schemes += (replace(schemes[-1], activation=PLAIN),)
        return schemes

    @property
    def guards_output(self) -> bool:
        return self.level.startswith("output")

    @property
    def graph_level(self) -> str | None:
        """The level that the guard pass builds; groups are blocks that decide together."""
        level = self.level.removeprefix("output").removeprefix("+")
        return {"": None, "group": "block"}.get(level, level)

    @property
    def has_probe(self) -> bool:
        """Whether the graph measures the modulated input of the first block, which only TeaCache reads."""
        return self.cache == "teacache" and not self.scheduled

    @property
    def depth(self) -> int:
        return self.plan.depth if self.plan and self.scheduled else self.cache_order + 1


def parse_options(options: Mapping[str, Any] | None) -> Options:
    """Reads the dict that the user gave to `torch.compile(..., options=...)`.

    Raises:
        OptionError: an unknown name (with the nearest valid one) or a value out of range.
        PlanError: `plan` is a path that holds no plan.
    """
    given = dict(options or {})
    valid = {f.name for f in fields(Options)}
    for name in given:
        if name not in valid:
            raise OptionError(f"unknown option {name!r}: {nearest(name, valid)}")
    preset = given.get("preset", Options.preset)
    _one_of("preset", preset, PRESETS)
    plan = given["plan"] = _read_plan(given.get("plan"))
    explicit = "cache" in given or (plan is not None and plan.has_schedule)
    values = {} if explicit else dict(PRESETS[preset])
    if explicit and given.get("cache") in ("tdc", "first_block", "magcache"):
        values["level"] = "block"
    values |= given
    if plan is not None and plan.quantization is not None:
        values["quantize"] = values.get("quantize") or plan.quantization.recipe
    if _reads_blocks(values):
        values.setdefault("level", "block")
    if plan is not None and (plan.compensation is not None or plan.attention) and values.get("cache") == "off":
        values.setdefault("level", "output")
    if plan is not None and plan.has_schedule:
        values |= {"level": plan.level, "cache_order": plan.depth - 1}
    if values.get("level") == "output" and _reads_blocks(values):
        values["level"] = "output+block"
    disable = values.get("disable", ())
    if not isinstance(disable, (str, list, tuple)) or not all(isinstance(name, str) for name in disable):
        raise OptionError(f"disable={disable!r}: expected names of passes")
    values["disable"] = (disable,) if isinstance(disable, str) else tuple(disable)
    return check(Options(**values))


def _reads_blocks(values: Mapping[str, Any]) -> bool:
    """Whether a rule beside `cache` reads the statistics of blocks: that for precisions, or that for pruning."""
    quantize = values.get("quantize")
    return values.get("prune") is not None or (quantize is not None and recipe_of(quantize).rule is not None)


def _read_plan(plan: Any) -> Plan | None:
    if isinstance(plan, (str, Path)):
        return Plan.load(plan)
    if plan is not None and not isinstance(plan, Plan):
        raise OptionError(f"plan={plan!r}: expected a qc_compiler.Plan or the path of one")
    return plan


def check(options: Options) -> Options:
    """Returns the options if every value is valid.

    Raises:
        OptionError: naming the option, its value and what is valid.
    """
    _one_of("cache", options.cache, CACHES)
    _one_of("cache_dtype", options.cache_dtype, CACHE_DTYPES)
    _one_of("level", options.level, (*LEVELS, *(f"output+{level}" for level in LEVELS if level != "output")))
    if not options.scheduled:
        _at_least("cache_order", options.cache_order, 0)
        if options.cache_order > 2:
            raise OptionError(f"cache_order={options.cache_order}: expected 0, 1 or 2")
    _at_least("interval", options.interval, 1)
    for name in ("max_skip", "num_steps", "num_frames"):
        if (value := getattr(options, name)) is not None:
            _at_least(name, value, 0 if name == "max_skip" else 1)
    for name, most in (("threshold", math.inf), ("precision_threshold", math.inf), ("prune_threshold", 1)):
        value = getattr(options, name)
        if value is not None and not (is_number(value) and 0 <= value <= most):
            limits = "of at least 0" if most == math.inf else f"from 0 to {most}"
            raise OptionError(f"{name}={value!r}: expected a number {limits}")
    _at_least("prune_seed", options.prune_seed, 0)
    if options.text_tokens is not None and type(options.text_tokens) is not int:
        raise OptionError(f"text_tokens={options.text_tokens!r}: expected how many come first, -n for the last n, or 0")
    for name in ("polynomial", "ratios"):
        if (numbers := getattr(options, name)) is not None:
            _numbers(name, numbers)
    for name in ("strict", "emulate"):
        if not isinstance(getattr(options, name), bool):
            raise OptionError(f"{name}={getattr(options, name)!r}: expected True or False")
    if options.quantize is not None:
        _check_quantize(options)
    if options.chooses_precision and options.graph_level not in ("block", "sublayer"):
        raise OptionError(
            f"quantize={options.quantize!r} decides by the statistics of blocks: level={options.level!r} must be "
            "'block', 'sublayer' or 'output+block'"
        )
    if options.prune is not None:
        _one_of("prune", options.prune, PRUNES)
        if options.graph_level != "block":
            raise OptionError(
                f"prune={options.prune!r} compares what enters a block with what leaves it: level={options.level!r} "
                "must be 'block', 'group' or 'output+block'"
            )
    if options.timestep is not None and not isinstance(options.timestep, str):
        raise OptionError(f"timestep={options.timestep!r}: expected the name of an input")
    if options.cache == "first_block" and options.graph_level != "block":
        raise OptionError(f"cache='first_block' compares block residuals: level={options.level!r} must be 'block'")
    if options.cache == "teacache" and not options.scheduled and options.graph_level is None:
        raise OptionError(
            "cache='teacache' reads the input of the first block: level='output' must be 'network' or finer"
        )
    return options


def is_number(value: Any) -> bool:
    """Says whether a value is an int or a float; `True` is none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def check_bits(bits: Any) -> None:
    """
    Raises:
        OptionError: they are no mean of the widths that a weight can have.
    """
    if not is_number(bits) or not 4 <= bits <= 16:
        raise OptionError(f"bits={bits!r}: expected a number from 4 to 16")


def _check_quantize(options: Options) -> None:
    recipe, known = recipe_of(str(options.quantize)), options.plan.quantization if options.plan else None
    check_bits(options.bits)
    if known is not None and known.recipe != options.quantize:
        raise OptionError(
            f"quantize={options.quantize!r}: the plan's linears were measured for {known.recipe!r}; leave the option "
            "out, or calibrate again"
        )
    if recipe.schemes[0].balance and (known is None or not known.amax):
        raise OptionError(
            f"quantize={options.quantize!r} needs the range of each linear's input: pass the plan of "
            f"qc_compiler.calibrate(model, generate, quantize={options.quantize!r})"
        )


def changed(options: Options, changes: Mapping[str, Any]) -> Options:
    """Returns options with some steering values changed; no new graph is needed for them.

    Raises:
        OptionError: the name is unknown, or changing it would need another graph.
    """
    for name in changes:
        if name not in Options.STEERING:
            raise OptionError(
                f"option {name!r} cannot change without a new torch.compile: {nearest(name, Options.STEERING)}"
            )
    new = check(replace(options, **{**changes, "plan": _read_plan(changes.get("plan", options.plan))}))
    if new.plan and new.scheduled and not new.plan.fits(options.level, options.depth):
        raise OptionError(
            f"plan=… for level={new.plan.level!r} and cache_order={new.plan.depth - 1} needs a new torch.compile: this "
            f"model was compiled with level={options.level!r} and cache_order={options.depth - 1}"
        )
    if set(new.pruned) != set(options.pruned):
        raise OptionError(
            f"plan=… that removes {', '.join(new.pruned) or 'nothing'} needs a new torch.compile: this model was "
            f"compiled without {', '.join(options.pruned) or 'removing anything'}"
        )
    _check_linears(options, new)
    if new.compensates and not options.compensates:
        raise OptionError("plan=… with a compensation needs a new torch.compile: this model's graph has no correction")
    orders = [o.plan.attention.order if o.plan and o.plan.attention else None for o in (options, new)]
    if orders[0] != orders[1]:
        raise OptionError(
            f"plan=… whose attention is {orders[1]} needs a new torch.compile: this model was compiled for {orders[0]}"
        )
    return new


def _check_linears(old: Options, new: Options) -> None:
    """Refuses a plan whose linears a graph cannot follow: formats, bits and ranges are built into it."""
    known, before = (o.plan.quantization if o.plan else None for o in (new, old))
    if known is None or known is before:
        return
    recipe = recipe_of(known.recipe)
    if known.recipe != old.quantize:
        why = f"this model was compiled with quantize={old.quantize!r}"
    elif recipe.allocated or recipe.schemes[0].balance:
        why = "the bits and ranges it was compiled with stay"
    else:
        return
    raise OptionError(f"plan=… for linears quantized as {known.recipe!r} needs a new torch.compile: {why}")


def _one_of(name: str, value: Any, valid: Any) -> None:
    if not isinstance(value, str) or value not in valid:
        raise OptionError(f"{name}={value!r}: {nearest(str(value), valid)}")


def _numbers(name: str, value: Any) -> None:
    if not isinstance(value, (list, tuple)) or not all(isinstance(number, (int, float)) for number in value):
        raise OptionError(f"{name}={value!r}: expected numbers, as qc_compiler.fit_rule returns them")


def _at_least(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}={value!r}: expected a whole number of at least {least}")
