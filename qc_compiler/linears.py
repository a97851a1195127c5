"""Finds the linears of a model that can be quantized, and says why others are left alone."""

from dataclasses import dataclass

import torch
from torch import fx

from . import ops
from .graph import Skip, args_of, is_parameter, module_path

aten = torch.ops.aten
NARROW = 32  # linears with fewer inputs or outputs (a LoRA's branch) have nothing to gain


@dataclass(frozen=True)
class LinearSite:
    """One linear of a body.

    Attributes:
        node: The linear.
        weight: The body's operand that holds its weight (N, K).
        name: Module path in the first block that calls the body.
    """

    node: fx.Node
    weight: fx.Node
    name: str

    @property
    def x(self) -> fx.Node:
        """Its activations (…, K); read anew, since they may be a linear that has been rewritten meanwhile."""
        return args_of(self.node)[0]


@dataclass(frozen=True)
class PackedSite:
    """One linear of a packed model, as it quantizes its activations by itself.

    Attributes:
        node: The linear.
        x: Its activations (…, K) in front of the quantizer.
        form: Format of its weight.
        name: Module path in the first block that calls the body.
    """

    node: fx.Node
    x: fx.Node
    form: str
    name: str


def find_packed(body: fx.GraphModule) -> list[PackedSite]:
    """Finds the linears whose weights the model itself keeps packed."""
    found = []
    for node in body.graph.find_nodes(op="call_function", target=aten.linear.default):
        x, weight = args_of(node)[:2]
        if x.target is ops.dequantize and weight.target is ops.dequantize and len(weight.args) > 3:
            (quantizer,) = {part.args[0] for part in args_of(x)[0]}
            found.append(PackedSite(node, quantizer.args[0], args_of(weight)[1], module_path(node)))
    return found


def find_linears(body: fx.GraphModule) -> tuple[list[LinearSite], list[Skip]]:
    """Finds the linears of a body that can be quantized; those that are quantized already are passed over."""
    sites, skips = [], []
    for node in body.graph.find_nodes(op="call_function", target=aten.linear.default):
        weight = args_of(node)[1]
        if weight.target is ops.dequantize or node.meta.get("low_rank"):
            continue
        site = LinearSite(node, weight, module_path(node))
        if reason := _unsuited(site):
            skips.append(Skip(site.name, reason))
        else:
            sites.append(site)
    return sites, skips


def _unsuited(site: LinearSite) -> str | None:
    x, weight = site.x.meta["val"], site.weight.meta["val"]
    if not is_parameter(site.weight):
        return "its weight is computed, not a parameter"
    if "_buffers_" in str(site.weight.meta.get("source", "")):
        return "its weight is a buffer: a part of a packed linear"
    if len(site.weight.users) > 1:
        return "its weight has another use"
    if x.dim() < 3 or x.shape[-2] == 1:
        return "it sees one row a sample (modulation): there is little to gain and much to lose"
    if min(weight.shape) < NARROW:
        return f"it is only {min(weight.shape)} wide"
    return None


def skips_outside(gm: fx.GraphModule, calls: list[fx.Node]) -> list[Skip]:
    """Names the dense layers outside the blocks, with what they are."""
    dense = (aten.linear.default, aten.conv1d.default, aten.conv2d.default, aten.conv3d.default)
    order = {node: i for i, node in enumerate(gm.graph.nodes)}
    skips = []
    for node in gm.graph.nodes:
        if node.target not in dense:
            continue
        x = args_of(node)[0].meta["val"]
        if node.target is not aten.linear.default:
            what = "patch embedding"
        elif x.dim() < 3 or x.shape[-2] == 1:
            what = "timestep embedding or modulation"
        elif order[node] > order[calls[-1]]:
            what = "final layer"
        else:
            what = "embedding"
        skips.append(Skip(module_path(node), f"{what}, outside the blocks: it stays in the model's precision"))
    return skips


def site_name(call: fx.Node, site: LinearSite | PackedSite) -> str:
    """Returns the module path of a site in the block of this call."""
    return name_in(str(call.meta["block"]), site.name)


def name_in(block: str, name: str) -> str:
    """Returns the module path in `block` of what has the path `name` in the first block of its body.

    >>> name_in("blocks.7", "blocks.0.mlp.fc1"), name_in("blocks.7", "blocks.0")
    ('blocks.7.mlp.fc1', 'blocks.7')
    >>> name_in("block", "mlp.fc1")  # the graph is one block, and paths begin inside it
    'block.mlp.fc1'
    """
    parts, depth = name.split("."), block.count(".") + 1
    inside = parts[depth:] if parts[depth - 1 : depth] and parts[depth - 1].isdecimal() else parts
    return ".".join([block, *filter(None, inside)])
