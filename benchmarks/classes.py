"""diffusers' own transformer classes, reduced in size, random weights: time, compilation and bit-identity, no quality.

Times are of a step of a trajectory, as a ratio to compiled Inductor, in turns in one run. Ours and diffusers'
TaylorSeer (its lite mode) compute every fourth step, the latter also the first three; PyramidAttentionBroadcast
computes attention at every fourth step between timesteps 800 and 100; FasterCache (its defaults, its attention only) at
every second below 681. diffusers' caches run compiled too, which breaks the graph at each hook. A peer that fails says
so.

    OMP_NUM_THREADS=1 python benchmarks/classes.py
"""

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from diffusers import hooks
from diffusers.hooks.hooks import CacheContext, _set_cache_context
from torch import Tensor, nn
from torch._inductor.utils import fresh_cache

from harness import header, in_turns, remembered, table, write
from peers import copy_of

sys.path.insert(0, str(Path(__file__).parent.parent / "tests" / "support"))
CLASSES = ("DiT", "PixArt-Sigma", "SD3", "Flux", "CogVideoX-2b", "Latte", "Sana")
STEPS, ROUNDS, INTERVAL = 24, 3, 4
TIMESTEPS = tuple(1000.0 * (1 - i / STEPS) for i in range(STEPS))
ALL = {"cache": "static", "interval": 1, "level": "output", "num_steps": STEPS}
HEADINGS = (
    "class", "M weights", "Inductor, ms a step", "compiled cold, s", "ours cold, s", "exact: bit-identical",
    "ours, all computed", "ours, every 4th", "TaylorSeer, every 4th", "PAB", "FasterCache",
)  # fmt: skip


def main() -> None:
    torch._dynamo.config.recompile_limit = 100
    torch.compile(torch.sin)(torch.ones(8))  # Inductor looks around once in a process
    rows = [remembered("classes", name, lambda name=name: measure(name)) for name in CLASSES]  # type: ignore[misc]
    text = header("diffusers' classes, random weights", "OMP_NUM_THREADS=1 python benchmarks/classes.py")
    text += f"\nOf width 256, 4 heads of 64, 256 tokens a frame, {STEPS} steps; no quality: the weights are random.\n"
    write("classes.md", f"{text}\n{table(HEADINGS, rows)}")


def measure(name: str) -> tuple[str, ...]:
    from diffusers_models import MODELS, Size

    model, inputs = MODELS[name](Size(heads=4, head_width=64, depth=6, side=32))

    def call(way: Any, timestep: float) -> Tensor:
        with torch.no_grad():
            return way(**inputs(timestep), return_dict=False)[0]

    def run(way: Any) -> Tensor:
        return torch.stack([call(way, timestep) for timestep in TIMESTEPS])

    def cold(**how: Any) -> tuple[Any, float]:
        with fresh_cache():
            start = time.perf_counter()
            way = torch.compile(model, **how)
            call(way, TIMESTEPS[0])
            return way, time.perf_counter() - start

    inductor, plain_seconds = cold()
    ours, our_seconds = cold(backend="quantcache", options=ALL | {"interval": INTERVAL, "cache_order": 1})
    exact = torch.compile(model, backend="quantcache", options={"preset": "exact"})
    same = torch.equal(run(exact), run(inductor))
    ways = [inductor, torch.compile(model, backend="quantcache", options=ALL), ours]
    cells = [f"{x:.2f}×" for x in against_first([lambda way=way: run(way) for way in ways])]  # type: ignore[misc]
    (seconds,) = in_turns([lambda: run(inductor)], ROUNDS)
    for apply in (taylorseer, pyramid_attention_broadcast, faster_cache):
        try:
            cached = Cached(model, apply)
            ratios = against_first([lambda: run(inductor), lambda cached=cached: cached.run(call)])  # type: ignore[misc]
            cells.append(f"{ratios[1]:.2f}×")
        except Exception as error:  # a peer's failure is a result
            cells.append(f"failed: {type(error).__name__}")
            print(name, apply.__name__, str(error)[:300], flush=True)
    torch._dynamo.reset()
    weights = sum(parameter.numel() for parameter in model.parameters()) / 1e6
    step = statistics.median(seconds) / STEPS * 1e3
    return (name, f"{weights:.1f}", f"{step:.1f}", f"{plain_seconds:.1f}", f"{our_seconds:.1f}",
            "yes" if same else "NO", *cells[1:])  # fmt: skip


def against_first(runs: list[Callable[[], Any]]) -> list[float]:
    """Returns the first one's median time over that of each; all run once before, and compile."""
    for run in runs:
        run()
    first, *others = (statistics.median(taken) for taken in in_turns(runs, ROUNDS))
    return [first / seconds for seconds in (first, *others)]


class Cached:
    """A copy of a model behind one of diffusers' caches, compiled."""

    def __init__(self, model: nn.Module, apply: Callable[[nn.Module, Callable[[], float]], None]) -> None:
        self.timestep, self.model = 1000.0, copy_of(model)
        apply(self.model, lambda: self.timestep)
        self.compiled = torch.compile(self.model)

    def run(self, call: Callable[[Any, float], Tensor]) -> None:
        hooks.HookRegistry.check_if_exists_or_initialize(self.model).reset_stateful_hooks()
        _set_cache_context(self.model, CacheContext("cond"))
        for self.timestep in TIMESTEPS:
            call(self.compiled, self.timestep)


def taylorseer(model: nn.Module, timestep: Callable[[], float]) -> None:
    config = hooks.TaylorSeerCacheConfig(
        cache_interval=INTERVAL, taylor_factors_dtype=torch.float32, use_lite_mode=True
    )
    hooks.apply_taylorseer_cache(model, config)


def pyramid_attention_broadcast(model: nn.Module, timestep: Callable[[], float]) -> None:
    config = hooks.PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=INTERVAL,
        temporal_attention_block_skip_range=INTERVAL,
        cross_attention_block_skip_range=INTERVAL,
        current_timestep_callback=timestep,  # type: ignore[arg-type]
    )
    hooks.apply_pyramid_attention_broadcast(model, config)


def faster_cache(model: nn.Module, timestep: Callable[[], float]) -> None:
    config = hooks.FasterCacheConfig(
        attention_weight_callback=lambda _: 0.5,
        is_guidance_distilled=True,  # else it looks for both streams in one batch
        current_timestep_callback=timestep,  # type: ignore[arg-type]
    )
    hooks.apply_faster_cache(model, config)


if __name__ == "__main__":
    main()
