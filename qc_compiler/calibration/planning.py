"""Everything that is calibrated, in order: each part is measured on what those before it made of the trajectory.

schedule        which steps are computed                                 (schedule.py)
attention       what each head does, on the cached trajectory            (attention.py)
quantization    what each linear needs, on the cached trajectory          (samples.py, selection.py, importance.py)
                then what skipped steps are made of, once more: an extrapolation multiplies what both added
compensation    what both together did to the variance of the output      (variance.py)
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from ..attention import INT8
from ..errors import OptionError, QuantCacheError, nearest
from ..formats.schemes import recipe_of
from ..options import check_bits, is_number
from ..plan import TOKEN_ORDERS, Plan
from ..registry import runtime_of
from .attention import WINDOWS, calibrate_heads
from .importance import Measurement, measure
from .joint import JointPlanner, parse_target
from .recording import COMPUTE_ALL, Recording, compile_static, run_steered
from .samples import Calls
from .schedule import find_schedule, refitted
from .selection import SELECTIONS
from .sites import SiteRunner
from .variance import fit_compensation

OF_TARGET = ("data_range", "max_generations", "resume")
DECIDED_BY_TARGET = (
    "share", "plan", "quantize", "bits", "attention", "windows", "token_order", "compensate", "budget", "level",
    "samples", "selection", "emulate",
)  # fmt: skip


def calibrate(
    model: Any,
    generate: Callable[[Any], Any],
    share: float | None = 0.33,
    *,
    plan: Plan | None = None,
    quantize: str | None = None,
    bits: float = 5.0,
    attention: float | None = None,
    windows: Sequence[float] = WINDOWS,
    token_order: str = "raster",
    compensate: bool = False,
    budget: float = 8.0,
    level: str = "output+block",
    samples: int = 16,
    selection: str = "tap",
    emulate: bool = False,
    target: str | Sequence[str] | None = None,
    data_range: float | None = None,
    max_generations: float = 100.0,
    resume: str | Path | None = None,
    progress: bool = True,
    backend: Any = "quantcache",
) -> Plan | list[Plan]:
    """Measures, for this model and this number of steps, which steps to compute and how to quantize.

    Args:
        model: The model, plain or compiled.
        generate: The user's sampling function: takes a model to call, returns the samples as one tensor (B, …), in
            the order of the model's rows. It must do the same each time (fix the seed). A handful of samples is enough.
        share: Part of the block computations to spend, in (0, 1]; None finds no schedule and leaves it to the option
            `cache`.
        plan: What was calibrated before, to be added to; its schedule is kept and `share` is not read.
        quantize: A value of the option `quantize` to measure the linears for: what `importance` and `+balance` need,
            and what makes `dmpq` precise.
        bits: Mean bits of a weight (`importance`), or of the activations (`dmpq`, from 4 to 8).
        attention: δ, the budget of each layer's attention at a step for the summed relative errors of its heads,
            weighted as `qc_compiler.calibration.attention` says; the paper sweeps 0.2 to 1. None leaves attention as
            it is.
        windows: Widths that a head's window may have, as parts of the vision tokens; -2 is full attention with scores
            from int8 codes.
        token_order: `raster`, as the model has its tokens, or `time`: windows then run along the frames of a video.
        compensate: Also fit a correction of the output's variance for each step and channel (VC).
        budget: Full trajectories' worth of computation to spend on the search of the schedule, 8 by default: at a
            share of 0.2 that is 40 candidates. Two thirds move single steps, one third tries partial computation.
        level: What the plan may steer: `output` (whole steps; compiles faster, needs no slots but the output's) or
            `output+block`.
        samples: How many intermediate samples the linears are measured on, rounded up to whole batches.
        selection: How these are chosen: `tap`, `uniform`, `random` or `kmeans`.
        emulate: As the option: fit the compensation to formats that this device has no kernel for.
        target: `speedup=4` (against everything computed, on this device), `psnr=35` (dB, mean of the samples against
            those of the full model, of the plan and with weights that were fitted to other samples, whichever is
            worse) or `memory=2GiB` (of the weights, for `pack_`): decides schedule, precision, heads and pruning
            together (`qc_compiler.calibration.joint`), so that none of these is an argument. Of a list, all are
            planned, with the same measurements.
        data_range: What the PSNR of `target` is relative to; None takes the range of the samples.
        max_generations: For `target`: after so many full generations nothing new is tried, but for a target that no
            plan meets yet up to four are built.
        resume: For `target`: a file that remembers what was measured, to go on with after an interruption.
        progress: Show progress bars.
        backend: What compiles the model; tests pass one without Inductor.

    Returns:
        A plan with the share it spends and its relative error on the calibration samples, each with weights that were
        fitted to others (where `generate` returns one sample, or they are not rows of the model's batch: to all); of
        level `output` unless partial computation made it better. For a list of targets, a list of plans.

    Raises:
        OptionError: an argument is out of range, or `generate` returns no tensor.
        QuantCacheError: `generate` did not run the model over several steps.
    """
    arguments, defaults = locals(), inspect.signature(calibrate).parameters
    for name, parameter in defaults.items():
        is_given = arguments[name] != parameter.default
        if is_given and target is None and name in OF_TARGET:
            raise OptionError(f"{name}={arguments[name]!r} is read with a target only: leave it out, or give one")
        if is_given and target is not None and name in DECIDED_BY_TARGET:
            raise OptionError(f"target={target!r} decides what {name} would: leave {name} out")
    if target is not None:
        is_list = isinstance(target, (list, tuple))
        targets = [parse_target(text) for text in (target if is_list else [target])]
        if not targets:
            raise OptionError(f"target={target!r}: expected at least one such as 'psnr=35'")
        if data_range is not None:
            _check_positive("data_range", data_range)
        _check_positive("max_generations", max_generations)
        planner = JointPlanner(
            model,
            generate,
            data_range=data_range,
            max_generations=max_generations,
            resume=resume,
            progress=progress,
            backend=backend,
        )
        plans = planner.plans(targets)
        return plans if is_list else plans[0]
    if quantize is not None:
        recipe_of(quantize)
        check_bits(bits)
        if samples < 1:
            raise OptionError(f"samples={samples!r}: expected a whole number of at least 1")
        if selection not in SELECTIONS:
            raise OptionError(f"selection={selection!r}: {nearest(selection, SELECTIONS)}")
    if attention is not None:
        _check_attention(attention, windows, token_order)
    if (share is None or plan is not None) and quantize is None and attention is None and not compensate:
        raise OptionError("no share, quantize=None, attention=None and compensate=False leave nothing to calibrate")
    module = getattr(model, "_orig_mod", model)
    if share is not None and plan is None:
        plan = find_schedule(module, generate, share, budget=budget, level=level, progress=progress, backend=backend)
    if attention is not None:
        plan = plan or Plan.without_schedule("")
        how = {"emulate": emulate, "backend": backend}
        plan = calibrate_heads(module, generate, plan, attention, windows, token_order, **how)
    if quantize is not None:
        known = replace(plan, quantization=None, compensation=None) if plan else None
        compiled = compile_static(module, backend, COMPUTE_ALL | ({"plan": known} if known else {}))
        calls = Calls()
        run_steered(compiled, generate, calls)
        runtime = runtime_of(compiled)
        plan = plan or Plan.without_schedule(runtime.fingerprint)
        runner = SiteRunner(runtime.shared)
        if not runner.sites:
            raise QuantCacheError(f"no linear of this {type(module).__name__} can be quantized: quantize=None")
        pairs = calls.pairs(selection, samples)
        plan = replace(plan, quantization=measure(Measurement(runner, pairs, progress), quantize, bits))
    if plan is not None and plan.has_schedule and (attention is not None or quantize is not None):
        plan = refitted(module, generate, plan, emulate=emulate, backend=backend)
    if compensate:
        recording = Recording()
        run_steered(compile_static(module, backend, COMPUTE_ALL), generate, recording)
        options = {name: value for name, value in COMPUTE_ALL.items() if name != "level"}  # that follows from the plan
        options |= {"emulate": emulate} | ({"plan": replace(plan, compensation=None)} if plan else {"level": "output"})
        plan = fit_compensation(compile_static(module, backend, options), generate, recording, plan)
    assert plan is not None
    return plan


def _check_positive(name: str, number: Any) -> None:
    if not is_number(number) or not number > 0:
        raise OptionError(f"{name}={number!r}: expected a number above 0")


def _check_attention(budget: Any, windows: Sequence[float], order: str) -> None:
    if not is_number(budget) or not budget >= 0:
        raise OptionError(f"attention={budget!r}: expected a number of at least 0")
    for share in windows:
        if share != INT8 and not 0 < share < 2:
            raise OptionError(
                f"windows={windows!r}: {share!r} is no part of the vision tokens, in (0, 2), and not {INT8}"
            )
    if order not in TOKEN_ORDERS:
        raise OptionError(f"token_order={order!r}: {nearest(order, TOKEN_ORDERS)}")
