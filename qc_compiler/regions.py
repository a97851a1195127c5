"""Finds the regions of a normalized graph: network ▸ group ▸ block ▸ sub-layer ▸ heads. Analysis only.

A *block* is one entry of a module list whose nodes mix tokens (attention) and add to a residual stream. The module
stack proposes, the structure of the graph confirms; no class name is known here.

    stream:   y = x + f₁(x) + f₂(x + f₁(x)) …      each added branch fᵢ is a sub-layer
    residual: Δ = y − x                             what a guarded block caches
"""

import itertools
import operator
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .graph import (
    Skip,
    call_instance,
    external_inputs,
    is_parameter,
    is_symbolic_number,
    is_tensor,
    leaving,
    module_path,
    outputs,
    placeholders,
)

aten = torch.ops.aten

ADDITIONS = {aten.add.Tensor, aten.sub.Tensor}
_CARRIES_ON = {  # ops that a residual stream passes through unchanged in meaning
    aten.clone.default,
    aten.contiguous.default,
    aten.to.dtype,
    aten._to_copy.default,
    aten.dropout.default,
    aten.clamp.default,
    aten.clip.default,
    aten.nan_to_num.default,
    aten.view.default,
    aten.reshape.default,
}
_DENSE = {
    aten.linear.default,
    aten.conv1d.default,
    aten.conv2d.default,
    aten.conv3d.default,
}
_KERNELS = {"quantcache.int8_matmul.default", "quantcache.triton_linear.default", "aten._scaled_mm.default"}
_PRODUCTS = {aten.matmul.default, aten.bmm.default, aten.baddbmm.default, aten.einsum.default}


@dataclass(frozen=True)
class Block:
    """A convex set of nodes with one entry and one exit for every residual stream.

    Attributes:
        name: Module path, with `@1` behind it when the graph calls the model a second time.
        nodes: In the order of the graph.
        inputs: What it reads from outside: streams, shared operands, parameters.
        outputs: What others read of it.
        bases: For each output the input whose residual it is, or None (then the output itself is cached).
    """

    name: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    bases: tuple[fx.Node | None, ...]


@dataclass(frozen=True)
class SubLayer:
    """One branch that is added to the residual stream (or to both, for joint attention).

    Attributes:
        kind: `attention`, `cross-attention`, `joint-attention` or `mlp`.
        nodes: What only this branch computes.
        outputs: The added tensors, one a stream.
        num_heads: Of its attention; 0 for an MLP.
    """

    kind: str
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    num_heads: int


def is_attention(node: fx.Node) -> bool:
    """Whether a node mixes tokens: a fused attention, or a product of two activations."""
    if node.op != "call_function":
        return False
    if re.search(r"attention|attn", str(node.target)):
        return True
    return node.target in _PRODUCTS and not any(_from_parameter(arg) for arg in node.all_input_nodes)


def _from_parameter(node: fx.Node) -> bool:
    while node.op == "call_function" and len(node.all_input_nodes) == 1:
        node = node.all_input_nodes[0]
    return is_parameter(node) or node.op == "get_attr"


def find_blocks(gm: fx.GraphModule) -> tuple[list[Block], list[Skip]]:
    """Finds the blocks of a normalized graph, in order, and says which look-alikes are none.

    A graph that is itself one block (diffusers' `compile_repeated_blocks`) yields one block named `block`.
    """
    position = {node: i for i, node in enumerate(gm.graph.nodes)}
    compute = [n for n in gm.graph.nodes if n.op == "call_function" and not is_symbolic_number(n)]
    blocks: list[Block] = []
    skips: list[Skip] = []
    for name, nodes in _module_list_items(compute, skips):
        block = as_block(name, nodes)
        if reason := _why_not(block, position):
            skips.append(Skip(name, reason))
        else:
            blocks.append(block)
    if not blocks and any(is_attention(node) for node in compute):
        whole = as_block("block", compute)
        reason = _why_not(whole, position)
        if reason is None and all(residual_chain(result, set(compute)) for result in whole.outputs):
            return [whole], []
        skips.append(Skip("graph", reason or "the graph as a whole adds to no residual stream"))
    return sorted(blocks, key=lambda block: position[block.nodes[0]]), skips


def _module_list_items(compute: Sequence[fx.Node], skips: list[Skip]) -> list[tuple[str, list[fx.Node]]]:
    """Returns name and nodes of every entry of the outermost module lists that hold attention."""
    lists: dict[tuple[str, int], dict[int, list[fx.Node]]] = defaultdict(lambda: defaultdict(list))
    members = [
        (node, ".".join(parts[:depth]), int(part), *call_instance(node, ".".join(parts[: depth + 1])))
        for node in compute
        for parts in [module_path(node).split(".")]
        for depth, part in enumerate(parts)
        if part.isdecimal()
    ]
    called = {(prefix, index) for _, prefix, index, was_called, _ in members if was_called}
    for node, prefix, index, was_called, instance in members:
        if was_called or (prefix, index) not in called:  # else: a part of an entry that something outside calls
            lists[prefix, instance][index].append(node)
    attentive = {key for key, items in lists.items() if any(map(is_attention, itertools.chain(*items.values())))}
    chosen: list[tuple[str, int]] = []
    for key in sorted(lists, key=lambda key: key[0].count(".")):
        prefix, _ = key
        if any(prefix.startswith(f"{outer}.") for outer, _ in chosen):
            continue
        inner = {k for k in attentive if k[0].startswith(f"{prefix}.")}
        if key in attentive and (len(lists[key]) > 1 or not any(len(lists[k]) > 1 for k in inner)):
            chosen.append(key)
        elif key not in attentive and len(lists[key]) > 1 and any(_adds_residual(v) for v in lists[key].values()):
            skips.append(Skip(prefix, "its entries hold no attention, so they are no transformer blocks"))
    return [
        (f"{prefix}.{index}" + (f"@{instance}" if instance else ""), nodes)
        for prefix, instance in chosen
        for index, nodes in sorted(lists[prefix, instance].items())
    ]


def _unpacks_outside(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether a node takes one element of a tuple made outside: it stays there, operands are tensors."""
    return node.target is operator.getitem and node.args[0] not in inside


def _is_dense(node: fx.Node) -> bool:
    return node.target in _DENSE or str(node.target) in _KERNELS


def _adds_residual(nodes: Sequence[fx.Node]) -> bool:
    block = as_block("", nodes)
    return any(base is not None for base in block.bases)


def as_block(name: str, nodes: Sequence[fx.Node]) -> Block:
    """Describes `nodes` (in the order of the graph) as a block: what it reads and returns, and which is residual."""
    inside = set(nodes)
    nodes = [node for node in nodes if not _unpacks_outside(node, inside)]
    inside = set(nodes)
    inputs = external_inputs(nodes)
    results = leaving(nodes)
    taken: set[fx.Node] = set()
    bases = []
    for result in results:
        chain = residual_chain(result, inside)
        base = chain[0] if chain else None
        taken |= {base} if base is not None else set()
        bases.append(base)
    # No chain of additions (streams joined, or a long skip connection mixed in): match by shape. Of several inputs the
    # one that was computed last: what comes over a long skip connection is older.
    for i, result in enumerate(results):
        if bases[i] is None and is_tensor(result):
            same = [n for n in inputs if n not in taken and is_activation(n) and _same_layout(n, result)]
            if same:
                bases[i] = max(same)
                taken.add(max(same))
    return Block(name, tuple(nodes), tuple(inputs), tuple(results), tuple(bases))


def _why_not(block: Block, position: dict[fx.Node, int]) -> str | None:
    if not any(map(is_attention, block.nodes)):
        return "no attention inside"
    if not block.outputs:
        return "nothing outside reads its result"
    if not all(is_tensor(n) and n.meta["val"].is_floating_point() for n in block.outputs):
        return "it returns something else than floating point tensors"
    if all(base is None for base in block.bases):
        return "none of its outputs has the shape of an input, so there is no residual stream"
    if any(isinstance(n.meta.get("val"), torch.SymFloat) and not n.meta["val"].node.has_hint() for n in block.inputs):
        return "it reads a number that is only known when it runs"
    inside = set(block.nodes)
    users = [position[user] for node in block.outputs for user in node.users if user not in inside]
    if min(users) <= max((position[node] for node in block.inputs), default=-1):
        return "its nodes are interleaved with nodes that depend on it"
    return None


def is_activation(node: fx.Node) -> bool:
    return is_tensor(node) and not is_parameter(node) and node.op != "get_attr"


def _same_layout(a: fx.Node, b: fx.Node) -> bool:
    return a.meta["val"].shape == b.meta["val"].shape and a.meta["val"].dtype == b.meta["val"].dtype


def residual_chain(result: fx.Node, inside: set[fx.Node]) -> list[fx.Node]:
    """Returns the path of additions from a stream's input (outside `inside`) to `result`, or [] if there is none.

    The first element is the input, the others are nodes inside: additions, and what the stream passes through.
    """
    if result not in inside:
        return [result] if is_activation(result) else []
    if result.target in ADDITIONS:
        candidates = [arg for arg in result.args[:2] if isinstance(arg, fx.Node)]
        if result.target is aten.sub.Tensor:
            candidates = candidates[:1]
    elif result.target in _CARRIES_ON:
        candidates = [result.args[0]] if isinstance(result.args[0], fx.Node) else []
    else:
        return []
    chains = (
        residual_chain(arg, inside)
        for arg in candidates
        if is_tensor(arg) and arg.meta["val"].numel() == result.meta["val"].numel()
    )
    best = max(chains, key=len, default=[])
    if not best or not _same_layout(best[0], result):
        return []
    return [*best, result]


def structure(block: Block) -> tuple[Any, ...]:
    """Returns a key that two blocks share exactly if one body can serve both."""
    index = {node: i for i, node in enumerate((*block.inputs, *block.nodes))}

    def describe(value: Any) -> Any:
        if isinstance(value, fx.Node):
            return ("%", index[value])
        if isinstance(value, (list, tuple)):
            return tuple(map(describe, value))
        return str(value)

    return (
        tuple(layout_of(node.meta.get("val")) for node in block.inputs),
        tuple((str(n.target), describe(n.args), describe(tuple(n.kwargs.items()))) for n in block.nodes),
        describe(block.outputs),
        tuple(None if base is None else index[base] for base in block.bases),
    )


def layout_of(val: Any) -> str:
    if isinstance(val, torch.Tensor):
        return f"{val.dtype}{list(val.shape)}{list(val.stride())}{val.device}"
    return str(val)


def find_sublayers(body: fx.GraphModule, bases: Sequence[int | None]) -> tuple[list[SubLayer], list[Skip]]:
    """Finds the sub-layers of a body whose output i continues the stream that enters as operand `bases[i]`."""
    graph = body.graph
    inside = {node for node in graph.nodes if node.op == "call_function"}
    operands = placeholders(graph)
    order = {node: i for i, node in enumerate(graph.nodes)}
    stream: set[fx.Node] = set()
    branches: list[fx.Node] = []
    for result, base in zip(outputs(graph), bases):
        chain = residual_chain(result, inside) if base is not None else []
        if not chain or chain[0] is not operands[base]:  # type: ignore[index]
            continue
        stream |= set(chain)
        for before, node in itertools.pairwise(chain):
            if node.target in ADDITIONS:
                branches += [arg for arg in node.all_input_nodes if arg is not before and arg in inside]
    cones = {branch: _cone(branch, stream) for branch in branches}
    found, skips = [], []
    mixed = {n for n in inside if is_attention(n) or (_is_dense(n) and _reaches(n, stream, inside - stream))}
    for group in _joined(branches, cones, mixed):
        nodes = _exclusive(set().union(*(cones[branch] for branch in group)), set(group), stream)
        ordered = tuple(sorted(nodes, key=order.__getitem__))
        kind, num_heads = _kind(ordered, stream, inside, len(group))
        if not any(_is_dense(n) for n in ordered) and num_heads == 0:
            skips.append(Skip(group[0].name, "the added branch holds no linear, no convolution and no attention"))
            continue
        if any(_reaches(node, group, inside) for node in external_inputs(ordered)):
            skips.append(Skip(group[0].name, "what one part of it reads depends on what another part adds"))
            continue
        found.append(SubLayer(kind, ordered, tuple(sorted(group, key=order.__getitem__)), num_heads))
    return sorted(found, key=lambda sub: order[sub.outputs[0]]), skips


def sublayer_names(sublayers: Sequence[SubLayer], gone: Collection[str] = ()) -> list[str]:
    """Returns what stands behind the slash in the names of sub-layers' regions: `mlp`, or `mlp1` and `mlp2`.

    Args:
        sublayers: Of one body.
        gone: Names of those that left it: the others keep theirs.
    """
    kinds, names = [sub.kind for sub in sublayers], []
    for i, kind in enumerate(kinds):
        total = kinds.count(kind) + sum(name.rstrip("0123456789") == kind for name in gone)
        numbered = [f"{kind}{number + 1}" for number in range(total)] if total > 1 else [kind]
        names.append([name for name in numbered if name not in gone][kinds[:i].count(kind)])
    return names


def _cone(branch: fx.Node, stream: set[fx.Node]) -> set[fx.Node]:
    """Returns what a branch is computed from, up to the residual stream and the operands."""
    cone, todo = set(), [branch]
    while todo:
        node = todo.pop()
        if node in cone or node in stream or node.op != "call_function":
            continue
        cone.add(node)
        todo += node.all_input_nodes
    return cone


def _joined(
    branches: Sequence[fx.Node], cones: dict[fx.Node, set[fx.Node]], mixed: set[fx.Node]
) -> list[list[fx.Node]]:
    """Groups the branches that share one of `mixed`: joint attention (or a joint MLP) adds to two streams at once."""
    groups: list[list[fx.Node]] = []
    for branch in branches:
        shared = [g for g in groups if any(mixed & cones[branch] & cones[other] for other in g)]
        groups = [g for g in groups if g not in shared]
        groups.append([*(node for g in shared for node in g), branch])
    return groups


def _exclusive(cone: set[fx.Node], results: set[fx.Node], stream: set[fx.Node]) -> set[fx.Node]:
    """Returns the nodes of a cone that nothing else reads (modulation is shared by the branches and stays out)."""
    kept = {n for n in cone if not is_symbolic_number(n)}
    while True:
        shared = {n for n in kept - results if any(user not in kept for user in n.users)}
        shared |= {n for n in kept if _unpacks_outside(n, kept)}
        if not shared:
            return kept
        kept -= shared


def _kind(nodes: Sequence[fx.Node], stream: set[fx.Node], inside: set[fx.Node], num_outputs: int) -> tuple[str, int]:
    attention = next((node for node in nodes if is_attention(node)), None)
    if attention is None:
        return "mlp", 0
    num_heads = _num_heads(attention)
    if num_outputs > 1:
        return "joint-attention", num_heads
    key = attention.args[1] if len(attention.args) > 1 else None
    reads_stream = isinstance(key, fx.Node) and _reaches(key, stream, inside)
    return ("attention" if reads_stream else "cross-attention"), num_heads


def _num_heads(attention: fx.Node) -> int:
    query = attention.args[0]
    val = query.meta.get("val") if isinstance(query, fx.Node) else None
    if isinstance(val, torch.Tensor) and val.dim() == 4 and isinstance(val.shape[1], int):
        return val.shape[1]
    return 1


def _reaches(node: fx.Node, targets: Iterable[fx.Node], inside: set[fx.Node]) -> bool:
    wanted, seen, todo = set(targets), set(), [node]
    while todo:
        current = todo.pop()
        if current in wanted:
            return True
        if current in inside and current not in seen:
            seen.add(current)
            todo += current.all_input_nodes
    return False
