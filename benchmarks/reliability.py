"""Reliability, as numbers: trajectories with faults, memory over a thousand trajectories, damaged files.

1. Trajectories of a small DiT under guidance, every third step computed, in W8A8, each with a fault: the sampler raises
   between two calls, the sample becomes NaN, another batch comes between, weights are replaced, two threads sample at
   once. Every trajectory after a fault, or beside one, must equal bit for bit what a model gives that has seen nothing
   else.
2. Resident memory over many trajectories.
3. Plan files and packed files with bits flipped, bytes zeroed, cut off or added: each must be refused, and nothing in
   them may run (Python's audit events).

    OMP_NUM_THREADS=1 python benchmarks/reliability.py
"""

import contextlib
import gc
import sys
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import qc_compiler
from harness import header, table, write
from memory import resident
from qc_compiler.errors import PackedFileError, PlanError

TRAJECTORIES, SOAK, FILES, STEPS, BATCHES = 200, 1000, 500, 10, (2, 3)
OPTIONS = {
    "cache": "static",
    "interval": 3,
    "cache_order": 1,
    "level": "block",
    "num_steps": STEPS,
    "quantize": "w8a8",
}
SIZE = (1, 8, 8)
RUNS_CODE = ("exec", "compile", "pickle.find_class", "os.system", "subprocess.Popen", "ctypes.dlopen")


def main() -> None:
    torch._dynamo.config.recompile_limit = 100
    text = header("Reliability", "OMP_NUM_THREADS=1 python benchmarks/reliability.py")
    text += f"\n## Faults\n\n{table(('fault', 'trajectories', 'compared', 'wrong'), Faults().rows())}"
    text += f"\n## Memory\n\n{table(('trajectories', 'resident MiB', 'slots MiB'), soak())}"
    text += f"\n## Damaged files\n\n{table(('file', 'damaged', 'refused', 'loaded', 'code run'), damaged_files())}"
    write("reliability.md", text)


def small_dit(seed: int) -> Any:
    from dit import DiT, DiTConfig

    torch.manual_seed(seed)
    model = DiT(DiTConfig(depth=2, width=64, num_heads=2, size=SIZE[1:])).eval().requires_grad_(False)
    for parameter in model.parameters():  # those that begin at zero as well
        parameter.normal_(std=0.1)
    return model


class Stopped(Exception):
    """What a sampler raises in the middle."""


def generate(
    model: Callable[..., Tensor], seed: int, batch: int, after: Callable[[int], Any] = lambda call: None
) -> Tensor:
    """Returns samples; `after` is told the number of each call of the model, and may raise or give another sample."""
    x = torch.randn(batch, *SIZE, generator=torch.Generator().manual_seed(seed))
    label = torch.arange(batch) % 10
    with torch.no_grad():
        for step in range(STEPS):
            timestep = torch.full((batch,), 1000 * (1 - step / STEPS))
            conditional = model(x, timestep, label)
            after(2 * step)
            unconditional = model(x, timestep, torch.full_like(label, 10))
            changed = after(2 * step + 1)
            x = x - (2 * conditional - unconditional) / STEPS if changed is None else changed
    return x


class Faults:
    """A model that meets faults, and one that does not."""

    def __init__(self) -> None:
        self.weights = [small_dit(seed).state_dict() for seed in (0, 1)]
        self.current = 0
        self.module = small_dit(0)
        self.model = torch.compile(self.module, backend="quantcache", options=OPTIONS)
        self.untouched = [self.compiled_apart(number) for number in (0, 1)]
        self.expected: dict[tuple[int, int, int], Tensor] = {}
        self.random = np.random.default_rng(0)

    def compiled_apart(self, number: int) -> Any:
        """Returns another model with some weights; another option, which is not used, gives it a graph of its own."""
        model = small_dit(0)
        model.load_state_dict(self.weights[number])
        return torch.compile(model, backend="quantcache", options=OPTIONS | {"prune_seed": 1 + number})

    def is_right(self, seed: int, batch: int, found: Tensor) -> bool:
        key = self.current, seed, batch
        if key not in self.expected:
            model = self.untouched[self.current]
            with contextlib.suppress(qc_compiler.QuantCacheError):  # nothing to forget before the first run
                qc_compiler.reset(model)
            self.expected[key] = generate(model, seed, batch)
        return torch.equal(found, self.expected[key])

    def rows(self) -> Iterator[tuple[str, ...]]:
        counts: dict[str, Counter[str]] = {}
        faults = (self.exception, self.nan, self.another_batch, self.new_weights, self.two_threads)
        for number in range(TRAJECTORIES):
            fault = faults[number % len(faults)]
            checks = fault(int(self.random.integers(2 * STEPS - 1)), int(self.random.integers(4)))
            checks.append(self.clean())
            name = fault.__name__.replace("_", " ")
            counts.setdefault(name, Counter()).update(runs=1, compared=len(checks), wrong=checks.count(False))
        for name, count in counts.items():
            yield name, f"{count['runs']}", f"{count['compared']}", f"{count['wrong']}"

    def clean(self) -> bool:
        seed, batch = int(self.random.integers(4)), int(self.random.choice(BATCHES))
        return self.is_right(seed, batch, generate(self.model, seed, batch))

    def broken_off(self, seed: int, call: int, act: Callable[[], Any]) -> None:
        """Begins a trajectory; behind a call something is done, and its sampler goes no further."""

        def after(now: int) -> None:
            if now == call:
                act()
                raise Stopped

        with contextlib.suppress(Stopped):
            generate(self.model, seed, BATCHES[0], after)

    def exception(self, call: int, seed: int) -> list[bool]:
        self.broken_off(seed, call, lambda: None)
        return []

    def nan(self, call: int, seed: int) -> list[bool]:
        broken = torch.full((BATCHES[0], *SIZE), torch.nan)
        generate(self.model, seed, BATCHES[0], lambda now: broken if now >= call else None)
        return []

    def another_batch(self, call: int, seed: int) -> list[bool]:
        checks: list[bool] = []

        def come_between() -> None:
            found = generate(self.model, seed + 1, BATCHES[1])
            checks.append(self.is_right(seed + 1, BATCHES[1], found))

        self.broken_off(seed, call, come_between)
        return checks

    def new_weights(self, call: int, seed: int) -> list[bool]:
        def replace() -> None:
            self.current = 1 - self.current
            self.module.load_state_dict(self.weights[self.current])

        self.broken_off(seed, call, replace)
        return []

    def two_threads(self, call: int, seed: int) -> list[bool]:
        seeds = seed, seed + 1
        with ThreadPoolExecutor(2) as pool:
            found = list(pool.map(lambda each: generate(self.model, each, BATCHES[0]), seeds))
        return [self.is_right(each, BATCHES[0], samples) for each, samples in zip(seeds, found)]


def soak() -> Iterator[tuple[str, ...]]:
    model = torch.compile(small_dit(0), backend="quantcache", options=OPTIONS | {"prune_seed": 3})
    for number in range(SOAK + 1):
        generate(model, number, BATCHES[number % 2])
        if number in (SOAK // 10, SOAK // 2, SOAK):
            slots = qc_compiler.summary(model).peak_slot_bytes
            yield f"{number}", f"{resident() / 2**20:.1f}", f"{slots / 2**20:.3f}"


def damaged_files() -> Iterator[tuple[str, ...]]:
    """Yields the rows of plans and packed models; each damaged file is read as a user would."""
    model = small_dit(0)

    def sampled(compiled: Any) -> Tensor:
        return generate(compiled, 0, BATCHES[0])

    plan = qc_compiler.calibrate(model, sampled, share=0.5, quantize="importance", budget=2, progress=False)
    packed = qc_compiler.pack_(small_dit(0), "nvfp4")
    events: Counter[str] = Counter()
    sys.addaudithook(lambda event, args: events.update([event] if event in RUNS_CODE else []))
    random = np.random.default_rng(0)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "file.safetensors")
        for name, save, load, refusal in (
            ("plan", lambda: plan.save(path), lambda: qc_compiler.Plan.load(path), PlanError),
            (
                "packed weights",
                lambda: qc_compiler.save_packed(packed, path),
                lambda: qc_compiler.load_packed(small_dit(0), path),
                PackedFileError,
            ),
        ):
            save()
            load()
            whole, refused = path.read_bytes(), 0
            gc.collect()
            before = events.total()
            for _ in range(FILES // 2):
                path.write_bytes(damaged(whole, random))
                try:
                    load()
                except refusal:
                    refused += 1
            yield name, f"{FILES // 2}", f"{refused}", f"{FILES // 2 - refused}", f"{events.total() - before}"


def damaged(whole: bytes, random: np.random.Generator) -> bytes:
    """Returns other bytes: a bit flipped, a stretch zeroed, the end cut off or something added, half in the header."""
    end = 8 + int.from_bytes(whole[:8], "little") if random.random() < 0.5 else len(whole)
    at, kind = int(random.integers(end)), random.integers(4)
    if kind == 0:
        changed = whole[:at] + bytes([whole[at] ^ 1 << int(random.integers(8))]) + whole[at + 1 :]
    elif kind == 1:
        stretch = whole[at : at + 16]
        changed = whole[:at] + bytes(len(stretch)) + whole[at + 16 :]
    elif kind == 2:
        changed = whole[:at]
    else:
        changed = whole + random.bytes(1 + at % 64)
    return changed if changed != whole else damaged(whole, random)


if __name__ == "__main__":
    main()
