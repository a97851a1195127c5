"""What a pass is, and the few things every pass does to a graph.

A graph here is functional pre-dispatch ATen, as `trace` makes it: no mutation, linears, attention and norms whole.
The main graph calls *bodies*: submodules that equal blocks share (`invoke_subgraph`). `gm.meta["interface"]` holds
the one record of what was added to the graph's inputs and outputs.
"""

import itertools
import math
import operator
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.fx.traceback
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode, dispatch_functionalize
from torch.fx.experimental.proxy_tensor import make_fx
from torch.multiprocessing.reductions import StorageWeakRef

from .errors import UnsupportedModelError

invoke_subgraph = torch.ops.higher_order.invoke_subgraph
cond = torch.ops.higher_order.cond
aten = torch.ops.aten


@dataclass(frozen=True)
class Skip:
    """A candidate that a pass left alone, and why."""

    where: str
    reason: str


@dataclass(frozen=True)
class Report:
    """What a pass did: how many candidates it rewrote, which it left alone."""

    changed: int
    skipped: tuple[Skip, ...] = ()


class GraphPass(ABC):
    """One rewrite of a graph, in place. Its options are its fields; it keeps no state and reads no environment.

    The name is the class name in kebab case: `ShareBodies` is `share-bodies`.
    """

    name: ClassVar[str]

    def __init_subclass__(cls) -> None:
        cls.name = re.sub(r"(?<=[a-z])(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def run(self, gm: fx.GraphModule) -> Report:
        """Rewrites `gm` in place; the pipeline recompiles and verifies it."""


@dataclass(frozen=True)
class SlotSpec:
    """One cached tensor of a region. Its history of `depth` values, newest first, enters as inputs.

    Attributes:
        region: Row of the region in `decisions`.
        shapes: Shape of each tensor that stores one value (a compressed value takes two: codes and scales).
        dtypes: Their dtypes.
        device: Where they live.
    """

    region: int
    shapes: tuple[tuple[Any, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    device: torch.device


@dataclass(frozen=True)
class RegionSpec:
    """One row of `decisions`: a region that is either computed or reused.

    Attributes:
        name: Module path, e.g. `blocks.3` or `blocks.3/mlp`; `network` for all blocks together.
        group: Number of the group of equal blocks it belongs to.
        flops: Floating point operations of one computation.
        prunable: Whether weights of zero leave what enters it as it is: each result is the residual of an operand, or
            itself what is added to one.
    """

    name: str
    group: int
    flops: float
    prunable: bool = True


@dataclass(frozen=True)
class SiteSpec:
    """One row of `precision`: linears that read the same activations.

    Attributes:
        name: Module path of the first of them.
        block: Name of their block.
    """

    name: str
    block: str


@dataclass(frozen=True)
class AttentionSite:
    """One row of `modes`: the attention of one layer.

    Attributes:
        name: Module path.
        block: Name of its block.
        num_heads: H.
        num_text: T if the text comes first, −T if it comes last.
        shape: (B, N, S, D) of the slot of its N kept heads; N may be 0.
        dtype, device: Of the slot.
    """

    name: str
    block: str
    num_heads: int
    num_text: int
    shape: tuple[Any, ...]
    dtype: torch.dtype
    device: torch.device

    @property
    def num_kept(self) -> int:
        return int(self.shape[1])


@dataclass
class Interface:
    """What the passes added to the inputs and outputs of the graph: all that the runtime must know.

    Inputs: the model's; `modes` (int32, CPU, layer × 2 × head), `attends` (bool, CPU, one element a layer) and the kept
    heads of each layer that keeps some, if attention is head-wise; `precision` (bool, CPU, site × choice) if linears
    have several precisions; prepared weights; `decisions` (bool, CPU, one element a region), `weights` (float32, region
    × depth), for each slot `depth` values; the correction of the output (float32, channel × 2) if there is one.
    Outputs: the model's, the kept heads, the sums of each region, each slot's new value.
    """

    regions: list[RegionSpec] = field(default_factory=list)
    slots: list[SlotSpec] = field(default_factory=list)
    sites: list[SiteSpec] = field(default_factory=list)
    num_choices: int = 1
    layers: list[AttentionSite] = field(default_factory=list)
    num_channels: int | None = None
    depth: int = 1
    num_outputs: int = 0
    glue_flops: float = 0.0

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(region.name for region in self.regions)

    @property
    def fixed(self) -> tuple[str, ...]:
        """Names of the regions that cannot be pruned."""
        return tuple(region.name for region in self.regions if not region.prunable)


def trace(fn: Callable[..., Any], *inputs: Any) -> fx.GraphModule:
    """Traces `fn` to functional pre-dispatch ATen; metadata of an interpreted graph (module stacks) is kept.

    Args:
        fn: A function of tensors and symbolic integers that returns a flat tuple of them.
        inputs: Fake tensors and SymInts; all in one fake mode.
    """
    mode = fake_mode_of(inputs)
    inputs = tuple(_without_repeats(inputs, mode))
    functional = dispatch_functionalize(fn, FunctionalTensorMode(pre_dispatch=True, export=True))
    with torch.fx.traceback.preserve_node_meta(), torch.no_grad(), mode:
        gm = make_fx(functional, pre_dispatch=True, tracing_mode="real")(*inputs)
    eliminate_dead_code(gm.graph)
    gm.recompile()
    return gm


def _without_repeats(values: Sequence[Any], mode: FakeTensorMode) -> list[Any]:
    """Returns the values with a fake tensor of its own for each input: a tracer knows inputs by identity."""
    seen: set[int] = set()
    distinct = []
    for value in values:
        if isinstance(value, torch.Tensor) and id(value) in seen:
            with mode:
                value = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device)
        seen.add(id(value))
        distinct.append(value)
    return distinct


def eliminate_dead_code(graph: fx.Graph) -> None:
    """Removes nodes without users. ATen is functional here, so only placeholders and the output stay regardless."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.op in ("placeholder", "output"))


def fake_mode_of(values: Sequence[Any]) -> FakeTensorMode:
    for value in values:
        if isinstance(value, torch._subclasses.FakeTensor):
            return value.fake_mode
    raise UnsupportedModelError("the graph takes no tensor as input")


def values_of(nodes: Sequence[fx.Node]) -> list[Any]:
    return [node.meta["val"] for node in nodes]


def copy_of(gm: fx.GraphModule) -> fx.GraphModule:
    """Returns a graph module with a graph of its own, for passes to rewrite; `gm` stays as it is."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    copy = fx.GraphModule(gm, graph)
    copy.meta = dict(gm.meta)
    return copy


def placeholders(graph: fx.Graph) -> list[fx.Node]:
    return graph.find_nodes(op="placeholder")


def add_placeholder(graph: fx.Graph, name: str, val: Any = None) -> fx.Node:
    """Returns a new last input."""
    with graph.inserting_after(placeholders(graph)[-1]):
        node = graph.placeholder(name)
    node.meta["val"] = val
    return node


def args_of(node: fx.Node) -> tuple[Any, ...]:
    """Returns a node's arguments, whose places its operator's schema gives."""
    return node.args


def outputs(graph: fx.Graph) -> list[Any]:
    """Returns the flat outputs of a graph: nodes, or constants that it returns."""
    (value,) = graph.output_node().args
    return list(value) if isinstance(value, (tuple, list)) else [value]


def body_calls(gm: fx.GraphModule) -> list[fx.Node]:
    """Returns the calls of shared bodies, in order."""
    return [node for node in gm.graph.nodes if node.op == "call_function" and node.target is invoke_subgraph]


def body_of(gm: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    """Returns the body that an `invoke_subgraph` node calls."""
    return getattr(gm, call.args[0].target)  # type: ignore[union-attr, arg-type]


def set_body(gm: fx.GraphModule, call: fx.Node, name: str, operands: Sequence[fx.Node]) -> None:
    """Points a call at the body `name` of `gm`, with `operands`."""
    with gm.graph.inserting_before(call):
        attr = gm.graph.get_attr(name)
    attr.meta["val"] = None
    old = call.args[0]
    call.args = (attr, name, *operands)
    if isinstance(old, fx.Node) and not old.users:
        gm.graph.erase_node(old)


def separate_bodies(gm: fx.GraphModule, keys: Mapping[fx.Node, Hashable]) -> None:
    """Gives the calls of one body whose keys differ bodies of their own."""
    bodies: dict[tuple[str, Hashable], str] = {}
    for call, key in keys.items():
        old = str(call.args[1])
        if (old, key) not in bodies:
            is_taken = any(name == old for name, _ in bodies)
            bodies[old, key] = _free_name(gm, old) if is_taken else old
            if is_taken:
                gm.add_submodule(bodies[old, key], copy_of(body_of(gm, call)))
        if bodies[old, key] != old:
            set_body(gm, call, bodies[old, key], call.args[2:])  # type: ignore[arg-type]


def _free_name(gm: fx.GraphModule, name: str) -> str:
    """Returns a name that no pass before gave to a body."""
    return next(free for i in itertools.count(1) if not hasattr(gm, free := f"{name}_{i}"))


def add_call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Adds a call at the graph's insertion point; its value is found on fake tensors."""
    node = graph.call_function(target, args)
    node.meta["val"] = _evaluate(node)
    return node


def getitems(call: fx.Node, values: Sequence[Any] | None = None) -> list[fx.Node]:
    """Returns a node for each result of a call, those that are there already and new ones."""
    if values is not None:
        call.meta["val"] = tuple(values)
    known = {user.args[1]: user for user in call.users if user.target is operator.getitem}
    with call.graph.inserting_after(call):
        for i, val in reversed(list(enumerate(call.meta["val"]))):
            if i not in known:
                known[i] = call.graph.call_function(operator.getitem, (call, i))
                known[i].meta["val"] = val
    return [known[i] for i in range(len(call.meta["val"]))]


def inline(
    graph: fx.Graph,
    owner: fx.GraphModule,
    part: fx.GraphModule,
    operands: Sequence[fx.Node],
    before: fx.Node,
    prefix: str = "",
) -> list[fx.Node]:
    """Copies the nodes of `part` into `graph`; graphs it refers to become submodules of `owner`."""
    copies = dict(zip(placeholders(part.graph), operands))
    with graph.inserting_before(before):
        for node in part.graph.nodes:
            if node.op == "get_attr":
                owner.add_submodule(f"{prefix}{node.target}", getattr(part, node.target))
                copies[node] = graph.get_attr(f"{prefix}{node.target}")
            elif node.op == "call_function":
                copies[node] = graph.node_copy(node, lambda old: copies[old])
    return [copies[node] for node in outputs(part.graph)]


def add_operands(
    gm: fx.GraphModule, name: str, make: Callable[[fx.Node], Sequence[fx.Node]], prepared: bool = True
) -> list[fx.Node]:
    """Gives the body `name` more operands, `make(call)` at each of its calls.

    Args:
        gm: The main graph.
        name: Of the body.
        make: Returns nodes of the main graph.
        prepared: Whether they are made of weights alone, and so for `PrepareWeights` to move.

    Returns:
        The operands inside the body.
    """
    calls = [call for call in body_calls(gm) if call.args[1] == name]
    given = [make(call) for call in calls]
    for call, nodes in zip(calls, given):
        call.args = (*call.args, *nodes)
        for node in nodes:
            node.meta["prepared"] = prepared
    graph = body_of(gm, calls[0]).graph
    added = []
    for node in given[0]:
        added.append(add_placeholder(graph, node.name))
        added[-1].target = added[-1].name  # a target that is another node's name would shadow it in the generated code
        added[-1].meta |= {"val": node.meta["val"], "parameter": prepared}
    return added


def add_results(gm: fx.GraphModule, name: str, results: Sequence[fx.Node]) -> None:
    """Makes nodes of the body `name` further results of it; each call has them behind those it had."""
    calls = [call for call in body_calls(gm) if call.args[1] == name]
    body = body_of(gm, calls[0])
    body.graph.output_node().args = ((*outputs(body.graph), *results),)
    body.recompile()
    for call in calls:
        getitems(call, [*call.meta["val"], *values_of(results)])


def drop_unused_parameters(gm: fx.GraphModule) -> None:
    """Removes the parameters that bodies take and do not read any more."""
    for name in dict.fromkeys(str(call.args[1]) for call in body_calls(gm)):
        calls = [call for call in body_calls(gm) if call.args[1] == name]
        body = body_of(gm, calls[0])
        formals = placeholders(body.graph)
        kept = [i for i, node in enumerate(formals) if node.users or not is_parameter(node)]
        body.meta["bases"] = tuple(None if base is None else kept.index(base) for base in body.meta["bases"])
        for call in calls:
            call.args = (*call.args[:2], *(call.args[2 + i] for i in kept))
        for i in set(range(len(formals))) - set(kept):
            body.graph.erase_node(formals[i])
        body.recompile()


def submodules(gm: fx.GraphModule, prefix: str = "") -> Iterator[tuple[str, fx.GraphModule]]:
    """Yields every graph under `gm` that a node refers to, with its dotted name, each once, outermost first."""
    seen = set()
    for node in gm.graph.nodes:
        if node.op == "get_attr" and node.target not in seen:
            seen.add(node.target)
            child = getattr(gm, node.target, None)
            if isinstance(child, fx.GraphModule):
                name = f"{prefix}{node.target}"
                yield name, child
                yield from submodules(child, f"{name}.")


_ROOT = re.compile(r"^(?:[A-Za-z_]\w*)?(?:\[['\"][^'\"]*['\"]\])")
_DICT = re.compile(r"\.?(?:__dict__\[['\"])?_modules(?:['\"]\])?\[['\"]([^'\"]+)['\"]\]")


def module_path(node: fx.Node) -> str:
    """Returns the module path that made a node, such as `blocks.3.attn`; '' at the root.

    All spellings that Dynamo writes are normalized here and nowhere else.

    >>> normalize_path("L['self'].__dict__['_modules']['transformer_blocks'].3.attn1")
    'transformer_blocks.3.attn1'
    """
    stack = node.meta.get("nn_module_stack")
    return normalize_path(next(reversed(stack.values()))[0]) if stack else ""


def normalize_path(text: str) -> str:
    path = _ROOT.sub("", text, count=1)
    path = _DICT.sub(r".\1", path)
    path = re.sub(r"\[['\"]?([^'\"\]]+)['\"]?\]", r".\1", path)
    return path.strip(".")


def call_instance(node: fx.Node, path: str) -> tuple[bool, int]:
    """Returns whether a node was made by a call of the module at `path` (not of a part of it alone), and by which.

    Calls are counted from 0: one graph holds several when the compiled function calls the model twice. What is called
    twice inside the module (a norm for two streams, an activation) does not count.
    """
    stack = node.meta.get("nn_module_stack") or {}
    entries = [(normalize_path(text), key) for key, (text, _) in stack.items()]
    keys = [key for at, key in entries if at == path]
    numbers = [re.search(r"@(\d+)$", key) for key in keys or [key for _, key in entries[:1]]]
    return bool(keys), max((int(found.group(1)) for found in numbers if found), default=0)


def outline(nodes: Sequence[fx.Node], inputs: Sequence[fx.Node], results: Sequence[fx.Node]) -> fx.GraphModule:
    """Copies `nodes` into a graph of their own that takes `inputs` and returns `results`; the originals stay."""
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, lambda old: copies[old])
    graph.output(tuple(copies[node] for node in results))
    attributes = [str(node.target) for node in nodes if node.op == "get_attr"]
    return fx.GraphModule({name: getattr(nodes[0].graph.owning_module, name) for name in attributes}, graph)


def external_inputs(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Returns what `nodes` read from outside, in the order of first use."""
    inside = set(nodes)
    found = dict.fromkeys(arg for node in nodes for arg in node.all_input_nodes if arg not in inside)
    return list(found)


def leaving(nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Returns those of `nodes` that others read."""
    inside = set(nodes)
    return [node for node in nodes if any(user not in inside for user in node.users)]


def separate_operands(nodes: Sequence[fx.Node], streams: Collection[fx.Node]) -> list[fx.Node]:
    """Gives each operand of `nodes` a storage of its own, as `cond` demands; returns the nodes, some more in front.

    Operands that are views of one tensor (chunks of a modulation) are taken as that tensor, and viewed again inside;
    a stream that is a view of an operand is copied.
    """
    nodes = list(nodes)
    sharing = [operand for operand in external_inputs(nodes) if is_tensor(operand) and not is_parameter(operand)]
    by_storage: dict[Any, list[fx.Node]] = {}
    for operand in sharing:
        by_storage.setdefault(_storage(operand), []).append(operand)
    for operands in by_storage.values():
        if len(operands) > 1:
            nodes = _take_apart(nodes, operands, streams)
    return nodes


def separate_arguments(call: fx.Node) -> None:
    """Copies those tensors a call is given that share a storage with one before them, as `separate_operands` does."""
    taken: set[Any] = set()
    for i, operand in enumerate(call.args):
        if not isinstance(operand, fx.Node) or not is_tensor(operand) or is_parameter(operand):
            continue
        if _storage(operand) in taken:
            with call.graph.inserting_before(call):
                call.update_arg(i, contiguous_copy(call.graph, operand))
        taken.add(_storage(operand))


def _take_apart(nodes: list[fx.Node], operands: Sequence[fx.Node], streams: Collection[fx.Node]) -> list[fx.Node]:
    graph, inside = nodes[0].graph, set(nodes)
    copies: dict[fx.Node, fx.Node] = {}
    for operand in operands:
        with graph.inserting_before(nodes[0]):
            if operand in streams:
                copies[operand] = graph.call_function(aten.clone.default, (operand,))
                with operand.meta["val"].fake_mode:
                    copies[operand].meta["val"] = operand.meta["val"].clone()
            else:
                for node in _view_chain(operand):
                    if node not in copies:
                        copies[node] = graph.node_copy(node, lambda old: copies.get(old, old))
        operand.replace_all_uses_with(copies.get(operand, operand), lambda user: user in inside)
    return [copy for node, copy in copies.items() if node not in streams] + nodes


def symbols_of(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[fx.Node]:
    """Returns the inputs of `graph` that carry the symbols in the sizes of `nodes`, without those among `nodes`.

    A subgraph must be given them: Inductor binds no symbol that it only sees inside a larger expression.
    """
    sizes: list[Any] = [n for node in nodes for tensor in _tensors(node.meta.get("val")) for n in tensor.shape]
    wanted = {symbol for n in sizes if isinstance(n, torch.SymInt) for symbol in n.node.expr.free_symbols}
    carriers = [node for node in placeholders(graph) if isinstance(node.meta.get("val"), torch.SymInt)]
    return [node for node in carriers if node.meta["val"].node.expr in wanted and node not in nodes]


def separate_results(nodes: Sequence[fx.Node], results: Sequence[fx.Node]) -> list[fx.Node]:
    """Gives each result of `nodes` a contiguous storage of its own, as `cond` demands; returns the nodes, some added.

    A result that is a view of an operand or of another result, or that has other strides, is copied at its place.
    """
    nodes, graph = list(nodes), nodes[0].graph
    inside = set(nodes)
    taken = {_storage(operand) for operand in external_inputs(nodes) if is_tensor(operand)}
    copies: set[fx.Node] = set()
    for result in results:
        storage = _storage(result)
        if storage in taken or not is_plain(result.meta["val"]):
            with graph.inserting_after(result):
                copy = contiguous_copy(graph, result)
            nodes.insert(nodes.index(result) + 1, copy)
            result.replace_all_uses_with(copy, lambda user: user not in inside and user is not copy)  # noqa: B023
            copies.add(copy)
        taken.add(storage)
    update_values(graph, copies)
    return nodes


def contiguous_copy(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Adds a contiguous copy of a node at the graph's insertion point; it belongs to the same module."""
    copy = graph.call_function(aten.clone.default, (node,), {"memory_format": torch.contiguous_format})
    copy.meta = dict(node.meta)
    with node.meta["val"].fake_mode:
        copy.meta["val"] = node.meta["val"].clone(memory_format=torch.contiguous_format)
    return copy


def replace(node: fx.Node, result: fx.Node) -> None:
    """Puts a node of equal values, in any layout, into the place of another, which leaves the graph.

    The graph's own results are copied where that changed their layout: a body's callers know the plain one.
    """
    graph = node.graph
    node.replace_all_uses_with(result)
    graph.erase_node(node)
    update_values(graph, [result])
    end, results = graph.output_node(), outputs(graph)
    for result in results:
        if not is_plain(result.meta["val"]):
            with graph.inserting_before(end):
                end.replace_input_with(result, contiguous_copy(graph, result))


def scale_of(attention: fx.Node) -> float:
    """Returns what a `scaled_dot_product_attention` multiplies its scores with."""
    scale = attention.kwargs.get("scale")
    return 1 / math.sqrt(args_of(attention)[0].meta["val"].shape[-1]) if scale is None else scale  # type: ignore[return-value]


def why_not_plain(attention: fx.Node) -> str | None:
    """Returns why a `scaled_dot_product_attention` is more than softmax(s·Q·Kᵀ)·V for each head; None if it is not."""
    (q, k, _), given = values_of(args_of(attention)[:3]), args_of(attention)[3:]
    mask, dropout, causal = (given + (None, 0.0, False)[len(given) :])[:3]
    if mask is not None:
        return "it has a mask"
    if causal:
        return "it is causal"
    if dropout:
        return "it drops out"
    if q.dim() != 4:
        return f"its queries have {q.dim()} axes, not (batch, heads, tokens, width)"
    if attention.kwargs.get("enable_gqa") or k.shape[1] != q.shape[1]:
        return "its heads share keys (grouped-query attention)"
    return None


def is_plain(val: torch.Tensor) -> bool:
    """Whether a tensor's strides are those of a new tensor, for axes of size 1 too.

    >>> is_plain(torch.empty(2, 3)), is_plain(torch.empty(1, 9)[:, :3]), is_plain(torch.empty(3, 2).T)
    (True, False, False)
    """
    expected: Any = 1
    for size, stride in zip(reversed(val.shape), reversed(val.stride())):
        if stride != expected:
            return False
        expected = expected * size
    return True


def update_values(graph: fx.Graph, changed: Iterable[fx.Node]) -> None:
    """Computes `meta["val"]` anew for what depends on the `changed` nodes, as far as layouts or storages changed.

    A `view` that the new strides do not allow becomes a `reshape`.
    """
    given = set(changed)
    stale = set(given)
    for node in graph.nodes if stale else ():
        if node.op != "call_function" or node in given or stale.isdisjoint(node.all_input_nodes):
            continue
        old = node.meta["val"]
        new = _evaluate(node)
        is_view = any(
            is_tensor(arg) and storages_of(arg.meta["val"]) & storages_of(new) for arg in node.all_input_nodes
        )
        if is_view or _layouts(old) != _layouts(new):
            node.meta["val"] = new
            stale.add(node)


def _evaluate(node: fx.Node) -> Any:
    owner = node.graph.owning_module

    def value(arg: fx.Node) -> Any:
        return getattr(owner, str(arg.target)) if arg.op == "get_attr" else arg.meta["val"]

    args, kwargs = fx.map_arg((node.args, node.kwargs), value)
    with fake_mode_of([tensor for arg in node.all_input_nodes for tensor in _tensors(arg.meta.get("val"))]):
        try:
            return node.target(*args, **kwargs)  # type: ignore[operator]
        except (RuntimeError, ValueError):  # which of them depends on how far the strides are from a view's
            if node.target is not aten.view.default:
                raise
            node.target = aten.reshape.default
            return node.target(*args, **kwargs)


def _tensors(val: Any) -> list[torch.Tensor]:
    values = val if isinstance(val, (tuple, list)) else [val]
    return [value for value in values if isinstance(value, torch.Tensor)]


def _layouts(val: Any) -> list[Any]:
    return [(tuple(tensor.shape), tuple(tensor.stride())) for tensor in _tensors(val)]


def storages_of(val: Any) -> set[Any]:
    return {StorageWeakRef(tensor.untyped_storage()) for tensor in _tensors(val)}


def _storage(node: fx.Node) -> Any:
    val = node.meta["val"]
    return StorageWeakRef((val[0] if isinstance(val, (tuple, list)) else val).untyped_storage())


def _view_chain(node: fx.Node) -> list[fx.Node]:
    """Returns the views that lead from the tensor which owns the storage to `node`, in order."""
    chain: list[fx.Node] = []
    while node.op == "call_function" and node.all_input_nodes:
        parent = node.all_input_nodes[0]
        if not (is_tensor(parent) or isinstance(parent.meta.get("val"), (tuple, list))):
            break
        if _storage(parent) != _storage(node):
            break
        chain.insert(0, node)
        node = parent
    return chain


def is_tensor(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), torch.Tensor)


def is_symbolic_number(node: fx.Node) -> bool:
    return isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool))


def is_parameter(node: fx.Node) -> bool:
    """Whether a placeholder holds a parameter or buffer of the model."""
    return bool(node.meta.get("parameter"))
