"""Runs a graph node by node, with a hand on every linear and every block: how calibration looks inside a model."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from ..formats import parse_format
from ..formats.schemes import PLAIN, Scheme
from ..graph import body_calls, body_of, invoke_subgraph
from ..linears import LinearSite, find_linears, site_name

Hook = Callable[["Site", Tensor, Tensor, Tensor | None], Tensor]


@dataclass(frozen=True)
class Site:
    """A linear of one block.

    Attributes:
        name: Module path.
        block: Name of its block.
        body: Name of the block's body; blocks of one body have equal linears.
        shares: Names of the linears that read the same input, this one among them.
    """

    name: str
    block: str
    body: str
    shares: tuple[str, ...]


@dataclass(frozen=True)
class Observed:
    """What one run gave.

    Attributes:
        output: First output of the model.
        before, residuals: For each block (B, n): its streams and what it adds to them, side by side.
    """

    output: Tensor
    before: Mapping[str, Tensor]
    residuals: Mapping[str, Tensor]


class SiteRunner:
    """Runs a graph whose blocks are shared bodies (`ShareBodies`), on real tensors.

    Attributes:
        sites: All linears that can be quantized, in order.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self._gm = gm
        self._at: dict[fx.Node, dict[fx.Node, Site]] = {}
        for call in body_calls(gm):
            found, _ = find_linears(body_of(gm, call))
            self._at[call] = {site.node: _site(call, site, found) for site in found}
        self.sites = [site for at in self._at.values() for site in at.values()]

    @torch.no_grad()
    def run(self, inputs: tuple[Any, ...], hook: Hook) -> Observed:
        """Returns what the model makes of `inputs`; each linear's result is what `hook(site, x, w, b)` returns."""
        main = _Main(self._gm, self._at, hook)
        results = main.run(*inputs)
        output = results[0] if isinstance(results, (tuple, list)) else results
        return Observed(output, main.before, main.residuals)


def exact(_: Site, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(x, weight, bias)


class RoundedLinear:
    """A linear as `QuantizeLinears` would write it, run eagerly.

    Args:
        weight: (N, K).
        scheme: Formats, and what is done before them.
        scales: (K,), what balancing divides x by.
    """

    def __init__(self, weight: Tensor, scheme: Scheme, scales: Tensor | None = None) -> None:
        w, self._branch = scheme.prepare_weight(weight.detach(), scales)
        self._reciprocal = 1 / scales.to(w.dtype) if scheme.balance and scales is not None else None
        self._weight, self._scheme = rounded(w, scheme.weight), scheme

    def __call__(self, x: Tensor, bias: Tensor | None) -> Tensor:
        """Returns x̂·ŵᵀ + b, (…, N)."""
        x = self._scheme.prepare_input(x, self._reciprocal)
        y = F.linear(rounded(x, self._scheme.activation), self._weight, bias)
        if not self._branch:
            return y
        up, down = self._branch
        return y + F.linear(F.linear(x, down), up)


def rounded(x: Tensor, form: str) -> Tensor:
    """Returns x as a format holds it, in the dtype of x."""
    if form == PLAIN:
        return x
    values = parse_format(form)
    return values.dequantize(*values.quantize(x)).to(x.dtype)


def _site(call: fx.Node, site: LinearSite, found: list[LinearSite]) -> Site:
    shares = tuple(site_name(call, other) for other in found if other.x is site.x)
    return Site(site_name(call, site), str(call.meta["block"]), str(call.args[1]), shares)


class _Main(fx.Interpreter):
    def __init__(self, gm: fx.GraphModule, at: Mapping[fx.Node, dict[fx.Node, Site]], hook: Hook) -> None:
        super().__init__(gm)
        self.before: dict[str, Tensor] = {}
        self.residuals: dict[str, Tensor] = {}
        self._at, self._hook = at, hook

    def run_node(self, n: fx.Node) -> Any:
        if n.target is not invoke_subgraph:
            return super().run_node(n)
        body = body_of(self._gm_of(n), n)
        operands = [self.env[arg] if isinstance(arg, fx.Node) else arg for arg in n.args[2:]]
        results = _Body(body, self._at[n], self._hook).run(*operands)
        streams = [(operands[base], y) for base, y in zip(body.meta["bases"], results) if base is not None]
        name, size = str(n.meta["block"]), len(streams[0][0])
        self.before[name] = torch.cat([x.reshape(size, -1) for x, _ in streams], dim=1).float()
        self.residuals[name] = torch.cat([(y - x).reshape(size, -1) for x, y in streams], dim=1).float()
        return results

    def _gm_of(self, n: fx.Node) -> fx.GraphModule:
        assert n.graph.owning_module is not None
        return n.graph.owning_module


class _Body(fx.Interpreter):
    def __init__(self, body: fx.GraphModule, at: Mapping[fx.Node, Site], hook: Hook) -> None:
        super().__init__(body)
        self._at, self._hook = at, hook

    def run_node(self, n: fx.Node) -> Any:
        if n not in self._at:
            return super().run_node(n)
        x, weight, bias = (*self.fetch_args_kwargs_from_env(n)[0], None)[:3]
        return self._hook(self._at[n], x, weight, bias)
