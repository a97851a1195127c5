"""What the benchmarks share: where they ran, and how a result is written down."""

import json
import platform
import statistics
import sys
from collections.abc import Callable, Sequence
from datetime import date
from pathlib import Path
from typing import Any, TypeVar

import torch

import qc_compiler
from qc_compiler.device_profile import clock
from qc_compiler.kernels.timing import cpu_name
from qc_compiler.plan import Plan

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))

T = TypeVar("T")
RESULTS = Path(__file__).parent / "results"
PLANS = Path(__file__).parent / "plans"
INTERRUPTED = Path("out", "benchmarks")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    threads = torch.get_num_threads()
    return f"{cpu_name()}, {threads} thread{'s' if threads > 1 else ''}"


def header(title: str, command: str) -> str:
    """Returns the top of a results page: date, device, versions and command."""
    return (
        f"# {title}\n\n"
        f"{date.today()} · {device_name()} · torch {torch.__version__} · Python {platform.python_version()}\n\n"
        f"    {command}\n"
    )


def table(headings: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Returns a Markdown table."""
    lines = ["| " + " | ".join(headings) + " |", "|" + " --- |" * len(headings)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def in_turns(runs: Sequence[Callable[[], object]], rounds: int) -> list[list[float]]:
    """Returns the seconds of each run, all of them once in every round."""
    times: list[list[float]] = [[] for _ in runs]
    for _ in range(rounds):
        for run, taken in zip(runs, times):
            taken.append(timed(run)[0])
    return times


def timed(run: Callable[[], T], now: Callable[[], float] | None = None) -> tuple[float, T]:
    """Returns the seconds that a run took, of one CPU thread by its own clock if no other is given, and its result."""
    now = now or clock(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    start = now()
    result = run()
    return now() - start, result


def quantcache(model: Any, **options: Any) -> Any:
    return torch.compile(model, backend="quantcache", options=options)


def side_by_side(plain: Sequence[float], ours: Sequence[float]) -> tuple[str, str, str]:
    """Returns cells of a table, from seconds: both medians and ranges in milliseconds, and the speed-up."""
    cells = [
        f"{statistics.median(taken) * 1e3:.1f} ({min(taken) * 1e3:.1f}–{max(taken) * 1e3:.1f})"
        for taken in (plain, ours)
    ]
    return cells[0], cells[1], f"{statistics.median(plain) / statistics.median(ours):.2f}×"


def computed_share(model: Any) -> float | None:
    """Returns the part of the block computations that a compiled model made; None where nothing could be reused."""
    if not hasattr(model, "_orig_mod"):  # a plain module has the summary of what was last compiled of it
        return None
    try:
        return qc_compiler.summary(model).computed_share
    except qc_compiler.QuantCacheError:
        return None


def speed_axis(panel: Any) -> None:
    """Makes the horizontal axis of a drawn panel one of speed-ups, in even steps of their logarithm."""
    panel.set_xscale("log")
    low, high = panel.get_xlim()
    ticks = [tick for tick in (0.5, 1, 2, 3, 5, 7, 10, 15, 20, 30) if low <= tick <= high]
    panel.set_xticks(ticks, labels=[f"{tick:g}" for tick in ticks])
    panel.minorticks_off()
    panel.set_xlabel("speed-up of a whole trajectory against compiled Inductor")


def write(name: str, text: str) -> None:
    """Writes a results page and prints it."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    (RESULTS / name).write_text(text)
    print(text)


def remembered(page: str, row: str, measure: Callable[[], Sequence[str]]) -> Sequence[str]:
    """Returns a row that was measured for this page before, or measures it: hours of an interrupted run are not lost.

    Rows lie in `out/benchmarks`; delete the page's file there to measure anew.
    """
    path = INTERRUPTED / f"{page}.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    if row not in known:
        known[row] = list(measure())
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(known))
    print(known[row], flush=True)
    return known[row]


def remembered_plan(page: str, name: str, calibrate: Callable[[], Plan]) -> Plan:
    """Returns a plan that was calibrated for this page before, or calibrates it.

    Plans lie in `benchmarks/plans` and are committed: what a page measured can be run again. Delete one to have it
    calibrated anew, and what a joint calibration has measured beside the rows.
    """
    path = PLANS / f"{page}_{name}.safetensors"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        calibrate().save(path)
    return Plan.load(path)
