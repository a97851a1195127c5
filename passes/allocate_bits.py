"""Gives each weight the bits it needs; blocks whose lists of bits differ get bodies of their own.

    before:  y₀ = body_0(x, w₀);  y₁ = body_0(y₀, w₁)
    after:   y₀ = body_0(x, w₀);  y₁ = body_0_1(y₀, w₁)      body.meta["bits"] = {"blocks.0.mlp.fc1": 4, …}

Values do not change. How many bodies there can be is bounded by the allocation (`qc_compiler.allocation`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from torch import fx

from qc_compiler.allocation import WIDTHS, BlockErrors, allocate, weight_errors
from qc_compiler.graph import GraphPass, Report, body_calls, body_of, placeholders, separate_bodies
from qc_compiler.linears import LinearSite, find_linears, site_name


@dataclass(frozen=True)
class AllocateBits(GraphPass):
    """
    Attributes:
        mean_bits: The budget, in bits a weight.
        bits: By module path, as calibrated; None allocates by the weights alone, the tensors in `gm.meta["tensors"]`.
    """

    mean_bits: float
    bits: Mapping[str, int] | None = None

    def run(self, gm: fx.GraphModule) -> Report:
        calls = body_calls(gm)
        if any("bits" in body_of(gm, call).meta for call in calls):
            return Report(changed=0)
        sites = {call: find_linears(body_of(gm, call))[0] for call in calls}
        bits = self.bits if self.bits is not None else self._by_weights(gm, sites)
        widths = {call: tuple(bits.get(site_name(call, site), 16) for site in found) for call, found in sites.items()}
        separate_bodies(gm, widths)
        for call, found in sites.items():
            body_of(gm, call).meta["bits"] = dict(zip((site.name for site in found), widths[call]))
        return Report(changed=sum(map(len, sites.values())))

    def _by_weights(self, gm: fx.GraphModule, sites: Mapping[fx.Node, list[LinearSite]]) -> dict[str, int]:
        tensors, blocks = gm.meta["tensors"], []
        for call, found in sites.items():
            formals = placeholders(body_of(gm, call).graph)
            weights = [tensors[str(call.args[2 + formals.index(site.weight)].target)] for site in found]  # type: ignore[union-attr]
            names = tuple(site_name(call, site) for site in found)
            sizes = np.array([weight.numel() for weight in weights], dtype=np.int64)
            errors = np.array([weight_errors(weight) for weight in weights]).reshape(-1, len(WIDTHS))
            blocks.append(BlockErrors(str(call.args[1]), names, sizes, errors))
        return allocate([block for block in blocks if block.sites], self.mean_bits)
