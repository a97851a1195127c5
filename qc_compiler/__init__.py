"""quantcache: a torch.compile backend that caches diffusion transformers inside the compiled graph.

model = torch.compile(dit, backend="quantcache")
"""

from pathlib import Path
from typing import Any

from .errors import (
    InvariantError,
    OptionError,
    PackedFileError,
    PassError,
    PlanError,
    QuantCacheError,
    UnsupportedModelError,
)
from .plan import Plan
from .runtime import stream

__all__ = [
    "InvariantError",
    "OptionError",
    "PackedFileError",
    "PassError",
    "Plan",
    "PlanError",
    "QuantCacheError",
    "UnsupportedModelError",
    "calibrate",
    "configure",
    "cost",
    "explain",
    "fit_rule",
    "load_packed",
    "pack_",
    "reset",
    "save_packed",
    "stream",
    "summary",
]


def reset(model: Any) -> None:
    """Forgets the trajectories and slots of a compiled model; the next call starts a new trajectory."""
    from .registry import runtime_of

    runtime_of(model).reset()


def configure(model: Any, **changes: Any) -> None:
    """Changes a rule or a threshold of a compiled model without compiling again.

    Raises:
        OptionError: the option is unknown, its value wrong, or it would need a new graph.
    """
    from .registry import runtime_of

    runtime_of(model).configure(**changes)


def summary(model: Any) -> Any:
    """Returns what the last trajectory of a compiled model computed and reused; prints as a table."""
    from .trajectory_summary import summarize

    return summarize(model)


def explain(model: Any, *args: Any, options: Any = None, **kwargs: Any) -> Any:
    """Returns what quantcache would do to a model, pass by pass, without compiling it; prints as a table."""
    from .explanation import explain as run

    return run(model, *args, options=options, **kwargs)


def cost(model: Any, *args: Any, dynamic: bool = True, **kwargs: Any) -> Any:
    """Returns what each region of a model costs and how long it takes on this device; prints as a table.

    The model is traced and called once, nothing is compiled. Rates of the device are measured when they are first asked
    for (about half a minute) and kept in the user's cache directory.

    Args:
        model: Plain or compiled.
        args, kwargs: Of its forward.
        dynamic: Whether costs are expressions in the sizes of the inputs (`x.size(0)`), as far as the model leaves them
            open, and so hold for any batch, frames and resolution; without, they are numbers for these inputs.

    Returns:
        A `qc_compiler.estimate.Estimate`: `cost(region, variant)` in FLOPs and bytes; `seconds(region, variant, sizes)`
        and `step_seconds(decisions, …)`, predicted; `anchored(…)` fits both to measured steps of the compiled model.

    Raises:
        UnsupportedModelError: the model writes into an input or buffer, or takes no tensor.
    """
    from .estimate import cost as run

    return run(model, *args, dynamic=dynamic, **kwargs)


def calibrate(model: Any, generate: Any, share: float | None = 0.33, **kwargs: Any) -> Any:
    """Returns a `Plan`: which steps to compute, and how to compute them. For a list of targets, a list of plans."""
    from .calibration import calibrate as run

    return run(model, generate, share=share, **kwargs)


def fit_rule(model: Any, generate: Any, rule: str, **kwargs: Any) -> dict[str, Any]:
    """Returns options for the rule `teacache` or `magcache` with the numbers it needs of this model."""
    from .calibration import fit_rule as run

    return run(model, generate, rule, **kwargs)


def pack_(model: Any, how: str | Plan) -> Any:
    """Replaces the weights of the linears in a model's blocks by packed ones, in place, and frees them."""
    from .packing import pack_ as run

    return run(model, how)


def save_packed(model: Any, path: str | Path) -> None:
    """Writes a packed model into one safetensors file."""
    from .packing import save_packed as run

    run(model, path)


def load_packed(model: Any, path: str | Path, device: Any = "cpu") -> Any:
    """Loads a packed model into one of its class, e.g. on the meta device; no float weight is ever made."""
    from .packing import load_packed as run

    return run(model, path, device)
