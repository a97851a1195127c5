"""Runs passes: verifies, recompiles, times and dumps after each; knows what belongs into Inductor's cache key."""

import hashlib
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from torch import fx

from .errors import OptionError, PassError, QuantCacheError, nearest
from .graph import GraphPass, Report
from .show import show
from .verify import verify


@dataclass(frozen=True)
class PassRun:
    """What happened to a pass."""

    name: str
    report: Report
    elapsed_ms: float


def run_passes(
    gm: fx.GraphModule,
    passes: Sequence[GraphPass],
    disable: Sequence[str] = (),
    watch: Callable[[str, fx.GraphModule], None] | None = None,
) -> list[PassRun]:
    """Runs the passes over `gm` in order, in place; `watch(name, gm)` is called after each.

    With `QC_DUMP=dir` in the environment the text form of the graph is written there after each pass.

    Raises:
        PassError: a pass failed; the message names it. Errors that quantcache raises on purpose pass through.
        InvariantError: a pass left a broken graph behind.
        OptionError: `disable` names no pass.
    """
    names = [p.name for p in passes]
    for name in disable:
        if name not in names:
            raise OptionError(f"disable={name!r}: {nearest(name, names)}")
    runs = []
    for number, graph_pass in enumerate(passes):
        if graph_pass.name in disable:
            continue
        start = time.perf_counter()
        try:
            report = graph_pass.run(gm)
            verify(gm)
        except QuantCacheError as error:
            error.args = (f"{error.args[0]} (in pass {graph_pass.name})", *error.args[1:])
            raise
        except Exception as error:
            raise PassError(f"pass {graph_pass.name} failed: {type(error).__name__}: {error}") from error
        gm.recompile()
        runs.append(PassRun(graph_pass.name, report, (time.perf_counter() - start) * 1e3))
        _dump(gm, number, graph_pass.name)
        if watch is not None:
            watch(graph_pass.name, gm)
    return runs


def _dump(gm: fx.GraphModule, number: int, name: str) -> None:
    if folder := os.environ.get("QC_DUMP"):
        Path(folder).mkdir(parents=True, exist_ok=True)
        Path(folder, f"{number}-{name}.txt").write_text(show(gm) + "\n")


@cache
def source_key() -> str:
    """Returns a hash of our sources: part of Inductor's cache key, so that a changed pass is never served stale."""
    digest = hashlib.sha256()
    root = Path(__file__).parent
    for folder in (root, root.parent / "passes"):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cpp")]):
            digest.update(path.read_bytes())
    return digest.hexdigest()
