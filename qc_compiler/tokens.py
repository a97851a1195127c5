"""Where the tokens of a tensor come from: which are the image's, and which are text. Analysis only.

A tensor's tokens are followed back to where they enter the model: through what keeps them in place (norms, linears,
views), through concatenations and slices, and from a block's output to the stream that it continues.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from .costs import hint
from .graph import args_of, body_of, invoke_subgraph, is_parameter, is_tensor, placeholders

aten = torch.ops.aten


@dataclass(frozen=True)
class Segment:
    """Tokens side by side that come from one place.

    Attributes:
        length: How many.
        is_vision: Whether they come from the sample that is denoised; everything else counts as text.
    """

    length: int
    is_vision: bool


Layout = tuple[Segment, ...]


class TokenLayouts:
    """Answers for the main graph and, inside a body, for one of its calls.

    Args:
        gm: After `ShareBodies`.
        latent: Its input that is denoised.
    """

    def __init__(self, gm: fx.GraphModule, latent: fx.Node) -> None:
        self._gm, self._latent = gm, latent
        self._operand: dict[fx.Node, fx.Node] = {}  # of a body's placeholders, at the call that is looked at

    def of(self, call: fx.Node, node: fx.Node, dim: int) -> Layout:
        """Returns what the axis `dim` of a node of the body holds, at this call; neighbours of one kind are one."""
        body = body_of(self._gm, call)
        self._operand = dict(zip(placeholders(body.graph), call.args[2:]))  # type: ignore[arg-type]
        return _joined(self._layout(node, dim))

    def _layout(self, node: fx.Node, dim: int) -> Layout:
        if node in self._operand:
            return self._layout(self._operand[node], dim)
        if node.op != "call_function" or is_parameter(node):
            return (Segment(_size(node, dim), self._from_latent(node)),)
        source = args_of(node)[0] if node.args else None
        if node.target is operator.getitem and isinstance(source, fx.Node):
            return self._item(source, args_of(node)[1], node, dim)
        if node.target is aten.cat.default:
            return self._cat(node, dim)
        if node.target in _AXES and isinstance(source, fx.Node):
            before = _AXES[node.target](node, dim)
            return self._opaque(node, dim) if before is None else self._layout(source, before)
        if node.target is aten.slice.Tensor and isinstance(source, fx.Node):
            along, start = (*args_of(node)[1:], 0, 0)[:2] if len(args_of(node)) > 1 else (0, 0)
            layout = self._layout(source, dim)
            if along % source.meta["val"].dim() != dim or _size(source, dim) == _size(node, dim):
                return layout
            step = (*args_of(node), 1)[4] if len(args_of(node)) > 4 else 1
            return _cut(layout, start or 0, _size(node, dim)) if step == 1 else self._opaque(node, dim)
        return self._of_inputs(node, dim)

    def _item(self, source: fx.Node, index: int, node: fx.Node, dim: int) -> Layout:
        """Of one result of several: of a block, or of a split."""
        if source.target is invoke_subgraph:
            base = body_of(self._gm, source).meta["bases"][index]
            return self._opaque(node, dim) if base is None else self._layout(args_of(source)[2 + base], dim)
        whole = args_of(source)[0]
        if source.target is aten.unbind.int:
            along = (*args_of(source), 0)[1] % whole.meta["val"].dim()
            return self._layout(whole, dim + (dim >= along))
        start = sum(hint(part.shape[dim]) for part in source.meta["val"][:index])
        is_along = hint(whole.meta["val"].shape[dim]) != _size(node, dim)
        return _cut(self._layout(whole, dim), start if is_along else 0, _size(node, dim))

    def _cat(self, node: fx.Node, dim: int) -> Layout:
        parts, along = (*args_of(node), 0)[:2]
        if along % node.meta["val"].dim() != dim:
            return self._layout(parts[0], dim)
        return tuple(segment for part in parts for segment in self._layout(part, dim))

    def _of_inputs(self, node: fx.Node, dim: int) -> Layout:
        """Of what works on each token alone, or returns one for each query: the input whose tokens they are."""
        inputs = node.all_input_nodes
        if node.target is aten.scaled_dot_product_attention.default:
            inputs = [args_of(node)[0]]
        found = []
        for arg in inputs:
            at = dim - (node.meta["val"].dim() - arg.meta["val"].dim()) if is_tensor(arg) else -1
            if at >= 0 and not is_parameter(arg) and _size(arg, at) == _size(node, dim):
                found.append(self._layout(arg, at))
        if not found:
            return self._opaque(node, dim)
        return max(found, key=lambda layout: (len(layout), any(segment.is_vision for segment in layout)))

    def _opaque(self, node: fx.Node, dim: int) -> Layout:
        return (Segment(_size(node, dim), self._from_latent(node)),)

    def _from_latent(self, node: fx.Node) -> bool:
        """Whether a tensor is computed from the sample; a block's result is, if the stream it continues is."""
        seen, todo = set(), [node]
        while todo:
            current = self._operand.get(todo[-1], todo.pop())
            if current is self._latent:
                return True
            if current in seen:
                continue
            seen.add(current)
            source = args_of(current)[0] if current.target is operator.getitem else None
            if isinstance(source, fx.Node) and source.target is invoke_subgraph:
                base = body_of(self._gm, source).meta["bases"][args_of(current)[1]]
                todo += args_of(source)[2:] if base is None else [args_of(source)[2 + base]]
            else:
                todo += current.all_input_nodes
        return False


def num_text_of(layout: Layout) -> int | None:
    """Returns T if text stands before the vision tokens, −T behind them, 0 without text; None for anything else.

    >>> num_text_of((Segment(6, False), Segment(16, True))), num_text_of((Segment(16, True), Segment(6, False)))
    (6, -6)
    """
    kinds = [segment.is_vision for segment in layout]
    if kinds == [False, True]:
        return layout[0].length
    if kinds == [True, False]:
        return -layout[1].length
    return 0 if kinds == [True] else None


def _size(node: fx.Node, dim: int) -> int:
    return int(hint(node.meta["val"].shape[dim]))


def _joined(layout: Layout) -> Layout:
    parts: list[Segment] = []
    for segment in layout:
        if parts and parts[-1].is_vision == segment.is_vision:
            parts[-1] = Segment(parts[-1].length + segment.length, segment.is_vision)
        else:
            parts.append(segment)
    return tuple(parts)


def _cut(layout: Layout, start: int, length: int) -> Layout:
    start = start if start >= 0 else start + sum(segment.length for segment in layout)
    parts, at = [], 0
    for segment in layout:
        kept = min(at + segment.length, start + length) - max(at, start)
        if kept > 0:
            parts.append(Segment(kept, segment.is_vision))
        at += segment.length
    return tuple(parts)


def _transposed(node: fx.Node, dim: int) -> int | None:
    _, a, b = args_of(node)
    rank = node.meta["val"].dim()
    return {a % rank: b % rank, b % rank: a % rank}.get(dim, dim)


def _permuted(node: fx.Node, dim: int) -> int | None:
    return int(args_of(node)[1][dim]) % node.meta["val"].dim()


def _viewed(node: fx.Node, dim: int) -> int | None:
    """Returns the axis of the source with as many elements in front of it and as many tokens; None if there is none."""
    before, after = ([hint(n) for n in x.meta["val"].shape] for x in (args_of(node)[0], node))
    products = [functools.reduce(operator.mul, before[:i], 1) for i in range(len(before))]
    wanted = functools.reduce(operator.mul, after[:dim], 1)
    return next((i for i, n in enumerate(before) if products[i] == wanted and n == after[dim]), None)


def _unsqueezed(node: fx.Node, dim: int) -> int | None:
    at = args_of(node)[1] % node.meta["val"].dim()
    return None if dim == at else dim - (dim > at)


def _selected(node: fx.Node, dim: int) -> int | None:
    at = (*args_of(node), 0)[1] % args_of(node)[0].meta["val"].dim()
    return dim + (dim >= at)


_AXES: dict[Any, Callable[[fx.Node, int], int | None]] = {
    aten.transpose.int: _transposed,
    aten.permute.default: _permuted,
    aten.view.default: _viewed,
    aten.reshape.default: _viewed,
    aten.flatten.using_ints: _viewed,
    aten.unflatten.int: _viewed,
    aten.squeeze.dim: _viewed,
    aten.unsqueeze.default: _unsqueezed,
    aten.select.int: _selected,
}
