"""One rank of a process group; a module of its own, since a spawned process imports it anew."""

from typing import Any

import torch
import torch.distributed as dist

from qc_compiler.graph import Interface, RegionSpec, SlotSpec
from qc_compiler.options import Options
from qc_compiler.runtime import GuardedGraph, Runtime
from qc_compiler.statistics import Sum

CPU = torch.device("cpu")


def decide_as_rank(rank: int, store: str, results: Any) -> None:
    """Runs three steps without and with agreement. Rank 0 wants to compute every one, rank 1 only the first."""
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    decided = {}
    for agree in (False, True):
        options = Options(cache="static", interval=1 if rank == 0 else 100, level="block", process_group=agree)
        regions, slots = [RegionSpec("blocks.0", 0, 1.0)], [SlotSpec(0, ((2,),), (torch.float32,), CPU)]
        interface = Interface(regions, slots, num_outputs=1)
        graph = GuardedGraph(interface, Runtime(options), clock=1, latent=0, parameters=(), symbols={})
        seen: list[bool] = []

        def compiled(x: Any, t: Any, decisions: Any, weights: Any, slot: Any, seen: list[bool] = seen) -> Any:
            seen.append(bool(decisions.all()))
            return x, torch.zeros(len(Sum)), torch.ones(2)

        graph.compiled = compiled
        for t in (1000.0, 900.0, 800.0):
            graph(torch.ones(2, 2), torch.tensor(t))
        decided[agree] = seen
    results[rank] = decided
    dist.destroy_process_group()
