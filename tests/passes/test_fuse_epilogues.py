import pytest
import torch
import torch.nn.functional as F
from torch import fx

from capture import apply, capture, skips
from passes import BranchChoices, FuseEpilogues, LowerLinears, Normalize, QuantizeLinears, ShareBodies
from qc_compiler.formats.schemes import recipe_of
from qc_compiler.graph import body_calls, body_of, invoke_subgraph, submodules
from qc_compiler.show import show
from tiny_models import tiny_dit

pytestmark = pytest.mark.usefixtures("triton_everywhere")
B, T, C = 2, 3, 32


class Follows(torch.nn.Module):
    """y = x + attention(x), then f(linear(y), y, gate) for any f."""

    def __init__(self, function):
        super().__init__()
        self.linear, self.function = torch.nn.Linear(C, C), function

    def forward(self, x, gate):
        x = x + F.scaled_dot_product_attention(x, x, x)
        return self.function(self.linear(x), x, gate)


class Two(torch.nn.Module):
    def __init__(self, function, dtype):
        super().__init__()
        self.blocks = torch.nn.ModuleList(Follows(function) for _ in range(2)).to(dtype)

    def forward(self, x, gate):
        for block in self.blocks:
            x = block(x, gate)
        return x


def lowered(function, gate_shape=(B, 1, C), dtype=torch.float32, scheme="w8a8"):
    """Returns a graph with two blocks in Triton kernels, and inputs for it."""
    torch.manual_seed(0)
    model = Two(function, dtype).eval().requires_grad_(False)
    captured = capture(model, torch.randn(B, T, C, dtype=dtype), torch.randn(gate_shape, dtype=dtype))
    passes = (Normalize(), ShareBodies(), QuantizeLinears(recipe_of(scheme).schemes), LowerLinears(), BranchChoices())
    return captured.after(*passes), captured.inputs


def body(gm):
    return show(body_of(gm, body_calls(gm)[0]))


def operands_of_body(gm, inputs):
    """Returns what the first call gives the body."""
    found = []

    class Record(fx.Interpreter):
        def run_node(self, n):
            if n.target is invoke_subgraph:
                found.append(self.fetch_args_kwargs_from_env(n)[0][2:])
            return super().run_node(n)

    Record(gm).run(*inputs)
    return found[0]


def followed(gm):
    """Returns the lines of the body from its linear on."""
    return body(gm)[body(gm).index("  %triton_linear") :]


# 1. golden


def test_golden():
    gm, _ = lowered(lambda y, x, gate: x + gate * F.gelu(y, approximate="tanh"))
    before = followed(gm)
    assert [word in before for word in ("aten.gelu", "aten.mul", "aten.add")] == [True] * 3
    assert apply(FuseEpilogues(), gm).changed == 1
    assert (
        followed(gm)
        == """\
  %triton_linear_default = quantcache.triton_linear(%_to_copy, %div, %round_1, (%getitem_6, %getitem_7, %sum_1), int8, torch.float32, %l_self_modules_blocks_modules_0_modules_linear_parameters_bias_, gelu_tanh, %l_gate_, %add) : f32[2, 3, 32]
  return (%triton_linear_default)"""
    )


# 2. negatives: one a reason


@pytest.mark.parametrize(
    ("function", "gate", "reason"),
    [
        (lambda y, x, g: x + y * y.sigmoid(), (C,), "its result has 2 uses"),
        (lambda y, x, g: y[:, None] * x[:, :, None], (C,), ""),
        (lambda y, x, g: g * y, (B, T, 1), "aten.mul.Tensor with these operands is none of the kernel's"),
        (lambda y, x, g: g * y, (T, C), "aten.mul.Tensor with these operands is none of the kernel's"),
        (lambda y, x, g: y + g, (B, 1, C), "aten.add.Tensor with these operands is none of the kernel's"),
        (lambda y, x, g: (y + g)[0], (4, B, T, C), "aten.add.Tensor with these operands is none of the kernel's"),
        (lambda y, x, g: torch.add(x, y, alpha=2), (C,), "aten.add.Tensor with these operands is none of the kernel's"),
        (lambda y, x, g: y + y, (C,), "aten.add.Tensor with these operands is none of the kernel's"),
        (lambda y, x, g: x - y, (C,), ""),
        (lambda y, x, g: x + y.relu(), (C,), ""),
        (lambda y, x, g: g.permute(1, 0, 2) + y, (T, B, C), "what follows it has other strides than a new tensor"),
    ],
)
def test_skips(function, gate, reason):
    gm, _ = lowered(function, gate)
    before = show(gm)
    report = apply(FuseEpilogues(), gm)
    assert report.changed == 0
    assert skips(report) == ([("blocks.0.linear", reason)] if reason else [])
    assert show(gm) == before


@pytest.mark.parametrize("scheme", ["w8a8", "nvfp4"])
def test_what_has_no_triton_kernel_is_left_alone(scheme):
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2))
    passes = (QuantizeLinears(recipe_of(scheme).schemes, emulate=True), LowerLinears(emulate=True))
    gm = captured.after(Normalize(), ShareBodies(), *passes)
    before = show(gm)
    assert apply(FuseEpilogues(), gm).changed == 0
    assert show(gm) == before


# 3. edges


@pytest.mark.parametrize("shape", [(C,), (1, C), (1, 1, C), (B, 1, C), (B, T, C)])
def test_every_gate_of_whole_rows_fits(shape):
    gm, inputs = lowered(lambda y, x, g: x + g * y, shape)
    expected = gm(*inputs)[0]
    assert apply(FuseEpilogues(), gm).changed == 1
    assert "aten.mul" not in followed(gm)
    assert torch.allclose(gm(*inputs)[0], expected, rtol=1e-6, atol=1e-6)


def test_a_part_of_the_epilogue_is_taken():
    gm, _ = lowered(lambda y, x, g: F.silu(y) * g + x, (B, T, 1))
    assert apply(FuseEpilogues(), gm).changed == 1
    assert "silu, None, None" in followed(gm)
    assert "aten.mul" in followed(gm)
    assert "aten.silu" not in followed(gm)


def test_the_epilogue_of_a_model_with_guards_and_choices():
    """The guards still find the sums: nothing else changes."""
    captured = capture(tiny_dit(2), torch.randn(2, 16, 8), torch.ones(2))
    options = {"cache": "hlc", "level": "sublayer", "quantize": "w8a8"}
    plain = captured.rewritten(**options, disable=["fuse-epilogues"])
    fused = captured.rewritten(**options)
    assert plain.meta["interface"] == fused.meta["interface"]
    graphs = [child for _, child in submodules(fused)]
    linears = [n for g in graphs for n in g.graph.nodes if "triton_linear" in str(n.target)]
    assert {"gelu_tanh" in n.args for n in linears} == {True, False}


# 4. equivalence


FOLLOWING = {
    "gelu": lambda y, x, g: F.gelu(y),
    "silu + residual": lambda y, x, g: F.silu(y) + x,
    "gate": lambda y, x, g: y * g,
    "all": lambda y, x, g: torch.add(g * F.gelu(y, approximate="tanh"), x),
}


@pytest.mark.parametrize("name", FOLLOWING)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_it_computes_the_same(name, dtype):
    """Up to the roundings of y, its activation, the product and the sum, which only the first graph does.

    |y·gelu'(y)| ≤ 1.2·|gelu(y)| + 1, so all four are at most 4·(|residual| + |gate| + |z|) units.
    """
    gm, inputs = lowered(FOLLOWING[name], dtype=dtype)
    block, operands = body_of(gm, body_calls(gm)[0]), operands_of_body(gm, inputs)
    expected = block(*operands)[0]
    assert apply(FuseEpilogues(), gm).changed == 1
    found = block(*operands)[0]
    unit = torch.finfo(dtype).eps / 2 + 2.0**-22  # and what two ways to write an activation differ in float32
    sizes = sum(value.abs().amax() for value in operands if value.shape in ((B, T, C), (B, 1, C)))
    bound = unit * 4 * (sizes + expected.abs())
    assert found.dtype == expected.dtype == dtype
    assert not torch.equal(found, expected) or name == "gate"
    assert ((found - expected).abs() <= bound).all()


# 5. idempotence


def test_idempotence():
    gm, _ = lowered(FOLLOWING["all"])
    apply(FuseEpilogues(), gm)
    before = show(gm)
    assert apply(FuseEpilogues(), gm).changed == 0
    assert show(gm) == before
