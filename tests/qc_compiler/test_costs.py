import math
from dataclasses import replace

import pytest
import sympy
import torch
import torch.nn.functional as F
from torch import fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from capture import Captured, capture
from dit import DiT, DiTConfig
from mmdit import MMDiT, MMDiTConfig
from qc_compiler import costs
from qc_compiler.clock import plain_name
from qc_compiler.costs import find_kernels, flops_of
from qc_compiler.estimate import own_sizes
from qc_compiler.graph import body_calls, body_of, invoke_subgraph, is_symbolic_number, placeholders
from qc_compiler.region_costs import find_regions, size_names
from stdit import STDiT, STDiTConfig
from tiny_models import tiny_dit


def kernels_of(function, *args):
    """The kernels of a function of tensors, with kind, FLOPs and bytes."""
    gm = capture(function, *args).normalized()
    return [(k.kind, int(k.flops), int(k.bytes_moved)) for k in find_kernels(list(gm.graph.nodes))]


X, ROW, WEIGHT = torch.ones(4, 8), torch.ones(1, 8), torch.ones(16, 8)


def test_pointwise_ops_around_a_norm_are_one_kernel():
    function = lambda x, scale: F.layer_norm(x * 2, (8,)) * (1 + scale)
    assert kernels_of(function, X, ROW) == [("pointwise", 0, X.nbytes + ROW.nbytes + X.nbytes)]


def test_a_linear_is_a_kernel_between_two():
    function = lambda x, w: F.gelu(F.linear(x * 2, w))
    moved = X.nbytes + WEIGHT.nbytes + 4 * 16 * 4
    assert kernels_of(function, X, WEIGHT) == [
        ("pointwise", 0, 2 * X.nbytes),
        ("linear", 2 * 4 * 8 * 16, moved),
        ("pointwise", 0, 2 * 4 * 16 * 4),
    ]


def test_what_is_read_before_and_behind_a_linear_joins_no_loop():
    """x·2 feeds the linear and the sum behind it: one kernel of both would need its own result first."""
    function = lambda x, w: F.linear(y := x * 2, w) + y
    kinds = [kind for kind, *_ in kernels_of(function, X, torch.ones(8, 8))]
    assert kinds == ["pointwise", "linear", "pointwise"]


def test_small_ops_are_computed_where_they_are_read():
    """1 + scale could be computed first; Inductor inlines it into what reads it."""
    function = lambda x, w, scale: F.linear(x, w) * (1 + scale)
    assert len(kernels_of(function, X, torch.ones(8, 8), ROW)) == 2


def test_views_are_free_and_a_tensor_is_read_once():
    function = lambda x, w: F.linear(x.view(4, 8), w).view(64)
    assert [kind for kind, *_ in kernels_of(function, torch.ones(8, 4), WEIGHT)] == ["linear"]
    assert kernels_of(lambda x: (y := x.view(8, 4).T) + y.sin(), X) == [("pointwise", 0, 2 * X.nbytes)]


def test_a_broadcast_is_read_once_and_a_lookup_reads_what_it_returns():
    assert kernels_of(lambda x, row: x + row.expand(4, 8), X, ROW) == [("pointwise", 0, 2 * X.nbytes + ROW.nbytes)]
    table, at = torch.ones(1000, 8), torch.zeros(3, dtype=torch.int64)
    assert kernels_of(lambda t, i: F.embedding(i, t), table, at) == [("pointwise", 0, 2 * 3 * 8 * 4 + at.nbytes)]


def test_attention_is_counted_on_a_cpu():
    q = torch.ones(2, 3, 5, 8)
    attend = lambda q: F.scaled_dot_product_attention(q, q, q)
    ((kind, flops, moved),) = kernels_of(attend, q)
    assert (kind, flops, moved) == ("attention", 4 * 2 * 3 * 5 * 5 * 8, 2 * q.nbytes)
    assert flops_of(capture(attend, q).normalized()) == flops


def test_shapes_that_rates_depend_on():
    gm = capture(lambda x, w: F.conv2d(x, w, stride=2), torch.ones(2, 3, 8, 8), torch.ones(16, 3, 2, 2)).normalized()
    (kernel,) = find_kernels(list(gm.graph.nodes))
    assert (kernel.kind, kernel.shape) == ("convolution", (2 * 4 * 4, 3 * 2 * 2, 16))
    gm = capture(lambda q, k: F.scaled_dot_product_attention(q, k, k), torch.ones(1, 2, 5, 8), torch.ones(1, 2, 7, 8))
    (kernel,) = find_kernels(list(gm.normalized().graph.nodes))
    assert kernel.shape == (5, 7, 8)


def test_transcendental_functions_are_counted_by_element():
    gm = capture(lambda x: F.gelu(x) + x.exp() + x * 3, X).normalized()
    (kernel,) = find_kernels(list(gm.graph.nodes))
    assert kernel.num_special == 2 * X.numel()


class Counter(fx.Interpreter):
    """Runs a graph on real tensors and keeps, in its nodes, each result and the FLOPs that were spent on it."""

    def run_node(self, n):
        if n.target is invoke_subgraph:
            args = self.fetch_args_kwargs_from_env(n)[0]
            n.meta["real"] = args[2:]
            return Counter(args[0]).run(*args[2:])
        value = super().run_node(n)
        if is_symbolic_number(n):
            return value
        n.meta["val"] = value
        if n.op == "call_function":
            with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                super().run_node(n)
            n.meta["flops"] = counter.get_total_flops()
        return value


def count(captured: Captured, monkeypatch):
    """Returns FLOPs and bytes of a model's main graph and of its blocks, of what really ran."""
    gm = captured.shared()
    monkeypatch.setattr(costs, "_flops", lambda node: node.meta["flops"])
    monkeypatch.setattr(costs, "tensor_bytes", real_bytes)
    Counter(gm).run(*captured.inputs)
    found = [total(find_kernels([n for n in gm.graph.nodes if n.target is not invoke_subgraph]))]
    for call in body_calls(gm):
        Counter(body_of(gm, call)).run(*call.meta["real"])
        found.append(total(find_kernels(list(body_of(gm, call).graph.nodes))))
    monkeypatch.undo()
    return found


def real_bytes(x):
    return x.element_size() * math.prod(size for size, stride in zip(x.shape, x.stride()) if stride != 0)


def total(kernels):
    return sum(int(k.flops) for k in kernels), sum(int(k.bytes_moved) for k in kernels)


def video(batch, height, width):
    return torch.randn(batch, 1, 2, height, width), torch.full((batch,), 5.0), torch.arange(batch)


def image(batch, height, width):
    return torch.randn(batch, 1, height, width), torch.full((batch,), 5.0), torch.arange(batch)


def captioned(batch, height, width):
    return torch.randn(batch, 1, height, width), torch.full((batch,), 5.0), torch.arange(8 * batch).view(batch, 8) % 17


def tokens(batch, count, _):
    return torch.randn(batch, count, 8), torch.full((batch,), 5.0)


MODELS = {
    "tiny": (lambda: tiny_dit(depth=2), tokens, [(2, 16, 0), (3, 16, 0), (2, 5, 0), (7, 33, 0), (4, 128, 0)]),
    "image": (
        lambda: DiT(DiTConfig(depth=2, width=32, num_heads=2, size=(8, 8))),
        image,
        [(2, 8, 8), (3, 8, 8), (4, 8, 8), (5, 8, 8), (9, 8, 8)],
    ),
    "video": (
        lambda: STDiT(STDiTConfig(depth=1, width=32, num_heads=2, size=(2, 8, 8))),
        video,
        [(2, 8, 8), (3, 8, 8), (4, 8, 8), (5, 8, 8), (9, 8, 8)],
    ),
    "text": (
        lambda: MMDiT(MMDiTConfig(num_dual=1, num_single=1, width=32, num_heads=2, size=(8, 8))),
        captioned,
        [(2, 8, 8), (3, 8, 8), (4, 8, 8), (5, 8, 8), (9, 8, 8)],
    ),
}


@pytest.mark.parametrize("name", MODELS)
def test_symbolic_costs_equal_what_is_counted(name, monkeypatch):
    """At five shapes: FLOPs of torch's counter, bytes of the tensors of a run (attention counted as its products)."""
    make, inputs, shapes = MODELS[name]
    torch.manual_seed(0)
    model = make().eval().requires_grad_(False)
    captured = capture(model, *map(own_sizes, inputs(*shapes[0])), dynamic=True)
    gm = captured.shared()
    outside, blocks = find_regions(gm)
    found = [(region.cost().flops, region.cost().bytes_moved) for region in (outside, *blocks)]
    for shape in shapes:
        args = inputs(*shape)
        sizes = {sympy.Symbol(f"x.size({i})", integer=True, positive=True): n for i, n in enumerate(args[0].shape)}
        expected = count(replace(captured, inputs=inputs_at(captured, gm, args, sizes)), monkeypatch)
        assert [tuple(int(expr.subs(sizes)) for expr in pair) for pair in found] == expected


def inputs_at(captured, gm, args, sizes):
    """Returns the inputs of a traced graph for other arguments of the model."""
    given = dict(zip(("x", "timestep", "label"), args)) | {"caption": args[-1]}
    symbols = {symbol: sizes[name] for symbol, name in size_names(gm).items()}
    values = [given.get(plain_name(node), old) for node, old in zip(placeholders(gm.graph), captured.inputs)]
    numbers = [node.meta["val"] for node in placeholders(gm.graph)]
    return tuple(
        int(number.node.expr.subs(symbols)) if isinstance(number, torch.SymInt) else value
        for number, value in zip(numbers, values)
    )
