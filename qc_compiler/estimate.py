"""Where the time of a model goes: the costs of its regions (`region_costs`) and the rates of a device, in seconds.

seconds of a region  guard (if it has a slot) + scale · Σ over its kernels; a linear is quantized where it is faster
seconds of a step    host + outside + Σ over the blocks, each in its variant
roofline             max(FLOPs / best rate of a linear, bytes / bandwidth of the memory)
"""

import functools
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from sympy import Expr
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from passes import Normalize, ShareBodies

from .costs import Kernel, expression, hint
from .device_profile import DeviceProfile, Rates
from .errors import OptionError, nearest
from .formats.schemes import SCHEMES
from .graph import copy_of, is_tensor, placeholders
from .region_costs import COMPUTED, Cost, Region, Variant, find_regions, input_sizes, size_names, together

Sizes = Mapping[str, int]
_Values = tuple[tuple[str, int], ...]


@dataclass(frozen=True)
class Estimate:
    """What a model costs, region by region; prints as a table.

    Attributes:
        outside: All that belongs to no block.
        blocks: In order.
        sizes: The symbolic sizes, with their values in the call that was traced: `{"x.size(0)": 2}`.
        fixed: Sizes of the inputs that the model does not leave open.
        profile: The rates of the device.
        scale: Measured seconds over predicted ones, as `anchored` finds it.
        host_seconds: What any step takes on the host.
        guard_seconds: What each region that has a slot takes on the host, computed or reused.
    """

    outside: Region
    blocks: tuple[Region, ...]
    sizes: Sizes
    fixed: Sizes
    profile: DeviceProfile
    scale: float = 1.0
    host_seconds: float = 0.0
    guard_seconds: float = 0.0

    def region(self, name: str) -> Region:
        """Returns `outside`, `network` (all blocks), a block or a sub-layer of one (`blocks.3/mlp`).

        Raises:
            OptionError: the model has no such region.
        """
        known = {region.name: region for block in self.blocks for region in (block, *block.parts)}
        known |= {"outside": self.outside} | ({"network": together("network", self.blocks)} if self.blocks else {})
        if name not in known:
            raise OptionError(f"the model has no region {name!r}: {nearest(name, known)}")
        return known[name]

    def cost(self, region: str, variant: Variant = COMPUTED) -> Cost:
        """Returns FLOPs and bytes of a variant of a region, as expressions in the names of `sizes`.

        Raises:
            OptionError: the model has no such region.
        """
        return self.region(region).cost(variant)

    def seconds(self, region: str, variant: Variant = COMPUTED, sizes: Sizes | None = None) -> float:
        """Returns the predicted time of a variant of a region.

        Args:
            region: Its name.
            variant: How it is run.
            sizes: Values of symbolic sizes; those left out are as they were traced.

        Raises:
            OptionError: the model has no such region, or does not leave such a size open.
        """
        return self._seconds(self.region(region), variant, self._values(sizes))

    def step_seconds(
        self,
        decisions: Mapping[str, Variant] | None = None,
        default: Variant = COMPUTED,
        sizes: Sizes | None = None,
        is_output_reused: bool = False,
    ) -> float:
        """Returns the predicted time of one step.

        Args:
            decisions: How blocks are run, or `network`; and sub-layers, in the place of what they are in their block.
            default: How the other blocks are run.
            sizes: As of `seconds`.
            is_output_reused: Whether the output is made of earlier ones and the graph is not called.

        Raises:
            OptionError: the model has no such region, or does not leave such a size open.
        """
        values = self._values(sizes)
        chosen = {name: (self.region(name), variant) for name, variant in (decisions or {}).items()}
        if is_output_reused:
            return self.host_seconds
        total = self.host_seconds + self._seconds(self.outside, COMPUTED, values)
        for block in [chosen["network"][0]] if "network" in chosen else self.blocks:
            variant = chosen[block.name][1] if block.name in chosen else default
            total += self._seconds(block, variant, values)
            for part in block.parts if variant.state == "computed" else ():
                if part.name in chosen:
                    plain = replace(variant, depth=0)
                    total += self._seconds(*chosen[part.name], values) - self._seconds(part, plain, values)
        return total

    def anchored(
        self,
        step_seconds: float,
        reused_seconds: float | None = None,
        host_seconds: float = 0.0,
        sizes: Sizes | None = None,
    ) -> "Estimate":
        """Returns this estimate, fitted to steps of the compiled model that were measured.

        With F and U the predictions for all blocks computed and reused, R of them, and T the measured times:

            scale = (T_F − T_U) / (F − U),   guard = (T_U − host − scale·U) / R

        Args:
            step_seconds: T_F of a step that computes every block.
            reused_seconds: T_U of a step that reuses every block, of a graph with a slot of depth 1 for each; None of a
                model without slots: then scale = (T_F − host) / F.
            host_seconds: Of a step whose output is reused.
            sizes: Of these steps.
        """
        bare = replace(self, scale=1.0, host_seconds=0.0, guard_seconds=0.0)
        if reused_seconds is None:
            scale = (step_seconds - host_seconds) / bare.step_seconds(sizes=sizes)
            return replace(self, scale=scale, host_seconds=host_seconds, guard_seconds=0.0)
        computed = bare.step_seconds(default=Variant(depth=1), sizes=sizes)
        reused = bare.step_seconds(default=Variant("reused", depth=1), sizes=sizes)
        scale = (step_seconds - reused_seconds) / (computed - reused)
        guard = max(0.0, (reused_seconds - host_seconds - scale * reused) / len(self.blocks))
        return replace(self, scale=scale, host_seconds=host_seconds, guard_seconds=guard)

    def _seconds(self, region: Region, variant: Variant, values: _Values) -> float:
        guard = self.guard_seconds if variant.depth and variant.state != "pruned" else 0.0
        return guard + self.scale * sum(
            min(sum(_kernel_seconds(kernel, self.profile, values) for kernel in way) for way in ways)
            for ways in region.run(variant)
        )

    def _values(self, sizes: Sizes | None) -> _Values:
        for name in sizes or {}:
            if name not in self.sizes:
                why = "the model fixes it" if name in self.fixed else nearest(name, self.sizes)
                raise OptionError(f"sizes={dict(sizes or {})!r}: {name!r} is not open, {why}")
        return tuple({**self.sizes, **(sizes or {})}.items())

    def __str__(self) -> str:
        total = self.step_seconds()
        console = Console(width=110)
        table = Table(title=f"one step, everything computed: {total * 1e3:.3g} ms", title_justify="left")
        for heading in ("region", "share", "ms", "GFLOP", "moved MiB", "weights MiB", "slot MiB", "bound", "roof ms"):
            table.add_column(heading, justify="left" if heading in ("region", "bound") else "right")
        network = [together("network", self.blocks)] if self.blocks else []
        for region in (self.outside, *network, *(r for block in self.blocks for r in (block, *block.parts))):
            table.add_row(*self._row(region, total))
        with console.capture() as capture:
            console.print(table)
            for title, known in (("sizes", self.sizes), ("fixed by the model", self.fixed)):
                listed = ", ".join(f"{name} = {size}" for name, size in known.items())
                console.print(f"{title}: {listed or 'none'}", highlight=False)
        return capture.get()

    def _row(self, region: Region, total: float) -> tuple[str, ...]:
        values, cost = self._values(None), region.cost()
        flops, moved, weights = (_value(e, values) for e in (cost.flops, cost.bytes_moved, cost.weight_bytes))
        slots = _value(region.cost(Variant(depth=1)).slot_bytes, values)
        roofs = {
            "compute": flops / _rates(self.profile, "linear", torch.float32).peak,
            "memory": moved / _rates(self.profile, "memory", torch.float32).values[-1],
        }
        bound = max(roofs, key=roofs.__getitem__)
        seconds = self._seconds(region, COMPUTED, values)
        block, _, part = region.name.partition("/")
        return (
            f"  {part}" if part else block,
            f"{seconds / total:.1%}",
            *(f"{x:.3g}" for x in (seconds * 1e3, flops / 1e9, moved / 2**20, weights / 2**20, slots / 2**20)),
            bound,
            f"{roofs[bound] * 1e3:.3g}",
        )


@functools.lru_cache(maxsize=2**16)
def _kernel_seconds(kernel: Kernel, profile: DeviceProfile, values: _Values) -> float:
    num_bytes = _value(kernel.bytes_moved, values)
    moving = num_bytes / _rates(profile, "memory", torch.float32).at([num_bytes]) if num_bytes else 0.0
    if kernel.kind == "pointwise":
        num_special = _value(kernel.num_special, values)
        return moving + (
            num_special / _rates(profile, "special", torch.float32).at([num_special]) if num_special else 0.0
        )
    if kernel.kind in SCHEMES and not profile.multiplies(kernel.kind):
        return math.inf
    if kernel.kind == "bf16 attention" and not profile.lowers_attention(kernel.beside, kernel.dtype):
        return math.inf
    rates = _rates(profile, kernel.kind, kernel.dtype)
    return max(_value(kernel.flops, values) / rates.at([_value(size, values) for size in kernel.shape]), moving)


@functools.lru_cache(maxsize=2**16)
def _value(expr: Expr, values: _Values) -> float:
    return float(expr.subs({symbol: dict(values)[symbol.name] for symbol in expr.free_symbols}))


@functools.cache
def _rates(profile: DeviceProfile, kind: str, dtype: torch.dtype) -> Rates:
    return profile.rates(kind, dtype)


def cost(model: Any, *args: Any, dynamic: bool = True, **kwargs: Any) -> Estimate:
    """Traces `model(*args, **kwargs)` and adds up what its regions cost; see `qc_compiler.cost`."""
    graphs: list[fx.GraphModule] = []

    def keeping_backend(gm: fx.GraphModule, example_inputs: Any) -> Any:
        graphs.append(copy_of(gm))
        return gm.forward

    if dynamic:
        args, kwargs = pytree.tree_map_only(Tensor, own_sizes, (args, kwargs))
    with torch.no_grad():
        module = getattr(model, "_orig_mod", model)
        torch.compile(module, backend=keeping_backend, dynamic=dynamic, fullgraph=True)(*args, **kwargs)
    (gm,) = graphs
    Normalize().run(gm)
    ShareBodies().run(gm)
    names, sizes = size_names(gm), input_sizes(gm)
    outside, blocks = find_regions(gm)
    return Estimate(
        outside,
        blocks,
        {names[expression(size)].name: hint(size) for size in sizes.values() if expression(size) in names},
        {name: int(expression(size)) for name, size in sizes.items() if expression(size).is_Integer},
        DeviceProfile(next(node.meta["val"].device for node in placeholders(gm.graph) if is_tensor(node))),
    )


def own_sizes(x: Tensor) -> Tensor:
    """Returns a view whose sizes Dynamo tells apart even where they are equal; the batch stays one for all inputs."""
    x = x.view_as(x)
    for axis in range(1, x.dim()):
        torch._dynamo.maybe_mark_dynamic(x, axis)
    return x
