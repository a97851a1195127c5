"""Time, side by side with compiled Inductor in one run: compilation, the cost of a reused step, whole trajectories.

1. Cold compile time at depth 4 and 28 (a process each, empty caches): ours and Inductor's.
2. A step that reuses everything against a computed one.
3. A trajectory of 50 steps: its speed-up against the one that the computed share promises.

    python benchmarks/speed.py
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

import qc_compiler
from harness import header, table, write
from sampling import load_model, sample
from stdit import STDiT, STDiTConfig

STEPS, REPEATS, COMPILATIONS = 50, 3, 2
WIDE = STDiTConfig(depth=7, width=384, num_heads=6)  # 14 blocks, where a step costs what it costs in practice


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(compile_seconds(sys.argv[1], int(sys.argv[2]))))
        return
    text = header("Speed: compile time, reused steps, trajectories", "python benchmarks/speed.py")
    text += f"\n## Cold compile time, seconds (STDiT, width 128)\n\n{compile_times()}"
    text += f"\n## Steps and trajectories\n\n{trajectories()}"
    write("speed.md", text)


COMPILED: dict[str, dict[str, object] | None] = {
    "inductor": None,
    "quantcache": {},
    "quantcache, level block": {"cache": "static", "level": "block"},
}


def compile_seconds(method: str, depth: int) -> float:
    """Compiles an STDiT of `depth` blocks in this process; returns the seconds of its first call."""
    model = STDiT(STDiTConfig(depth=depth // 2)).eval().requires_grad_(False)
    options = COMPILED[method]
    compiled = torch.compile(model, backend=method.split(",")[0], options=options)
    start = time.perf_counter()
    sample(compiled, torch.arange(2), steps=1)
    return time.perf_counter() - start


def compile_times() -> str:
    seconds: dict[tuple[str, int], list[float]] = {(method, depth): [] for depth in (28, 4) for method in COMPILED}
    for _ in range(COMPILATIONS):
        for (method, depth), found in seconds.items():
            with tempfile.TemporaryDirectory() as cache:
                output = subprocess.run(
                    [sys.executable, __file__, method, str(depth)],
                    env={**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache},
                    check=True,
                    capture_output=True,
                    text=True,
                    cwd=Path(__file__).parent,
                ).stdout
            found.append(json.loads(output.splitlines()[-1]))
            print(f"compile {method}, depth {depth}: {found[-1]:.1f} s", flush=True)
    rows = []
    for method in COMPILED:
        shallow, deep, base = (statistics.mean(seconds[key]) for key in ((method, 4), (method, 28), ("inductor", 28)))
        rows.append((method, f"{shallow:.1f}", f"{deep:.1f}", f"{deep / shallow:.2f}", f"{deep / base:.2f}"))
    note = f"\nMean of {COMPILATIONS} interleaved runs; a process and an empty cache each.\n"
    return table(("method", "depth 4", "depth 28", "28 / 4", "of Inductor at 28"), rows) + note


class Timed:
    """A model that notes how long each of its calls takes."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model, self.seconds = model, list[float]()

    def __call__(self, *args: Tensor) -> Tensor:
        start = time.perf_counter()
        result = self.model(*args)
        self.seconds.append(time.perf_counter() - start)
        return result


def trajectories() -> str:
    """Times every method over whole trajectories, interleaved, and compares with the share it computes."""
    models = {
        "example (12 blocks, width 128, batch 8)": (load_model().requires_grad_(False), 8),
        "wide (14 blocks, width 384, batch 2, random weights)": (STDiT(WIDE).eval().requires_grad_(False), 2),
    }
    options: dict[str, dict[str, object]] = {
        f"{level}, every 4th": {"cache": "static", "interval": 4, "level": level}
        for level in ("output", "network", "block", "sublayer")
    }
    options["block, order 2, every 4th"] = {"cache": "static", "interval": 4, "level": "block", "cache_order": 2}
    options["block, all computed"] = {"cache": "static", "interval": 1, "level": "block"}
    rows = []
    for title, (model, batch) in models.items():
        compiled = {"inductor": torch.compile(model)}
        compiled |= {name: torch.compile(model, backend="quantcache", options=o) for name, o in options.items()}
        label = torch.arange(batch)
        calls = {name: list[list[float]]() for name in compiled}
        times = {name: list[float]() for name in compiled}
        for function in compiled.values():
            sample(function, label, steps=2)
        for _ in range(REPEATS):
            for name, function in compiled.items():
                timed, start = Timed(function), time.perf_counter()
                sample(timed, label, STEPS)
                times[name].append(time.perf_counter() - start)
                calls[name].append(timed.seconds)
        base = statistics.median(times["inductor"])
        step = statistics.median(seconds for run in calls["inductor"] for seconds in run)
        for name, function in compiled.items():
            share, cells = 1.0, ["100%", ""]
            speed_up = base / statistics.median(times[name])
            if name != "inductor":
                summary = qc_compiler.summary(function)
                share, computed = summary.computed_share, summary.streams[0].computed
                reused = [run[i] for run in calls[name] for i in (~computed.any(axis=1)).nonzero()[0]]
                cells = [f"{speed_up * share:.0%}", f"{statistics.median(reused) / step:.1%}" if reused else ""]
            seconds = f"{statistics.median(times[name]):.2f} ({min(times[name]):.2f}–{max(times[name]):.2f})"
            rows.append((title, name, seconds, f"{share:.2f}", f"{speed_up:.2f}×", *cells))
            print(*rows[-1], flush=True)
        torch._dynamo.reset()
    note = (
        f"\n{STEPS} steps, median (min–max) of {REPEATS} interleaved runs. *of promised*: speed-up × share. "
        "*reused step*: median time of a call that reuses everything, as part of Inductor's.\n"
    )
    headings = ("model", "method", "seconds", "share", "speed-up", "of promised", "reused step")
    return table(headings, rows) + note


if __name__ == "__main__":
    main()
