import pytest
import torch
import torch.nn.functional as F

from capture import apply, capture, submodules
from passes import LowerFloats, LowerLinears, Normalize, QuantizeLinears, ShareBodies
from passes.lower_floats import gelu_by_sigmoid
from qc_compiler import ops
from qc_compiler.costs import flops_of
from qc_compiler.formats.schemes import SCHEMES
from qc_compiler.graph import body_calls, body_of
from qc_compiler.kernels import bf16_attention
from qc_compiler.show import show
from small_blocks import Stack

aten = torch.ops.aten
SDPA, BF16 = aten.scaled_dot_product_attention.default, torch.ops.quantcache.bf16_attention.default
X = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
pytestmark = pytest.mark.usefixtures("kernels_win")
needs_kernel = pytest.mark.skipif(
    not bf16_attention.has_bf16_attention(torch.device("cpu")), reason="this CPU has no AVX-512 BF16"
)


@pytest.fixture
def has_kernel(monkeypatch):
    """The CPU has the kernel, for graphs that do not run."""
    monkeypatch.setattr(bf16_attention, "has_bf16_attention", lambda device: device.type == "cpu")


@pytest.fixture
def has_none(monkeypatch):
    monkeypatch.setattr(bf16_attention, "has_bf16_attention", lambda device: False)


def attend(q, k, v):
    return F.scaled_dot_product_attention(q, k, v)


class Block(torch.nn.Module):
    """y = x + attention(x); y + fc2(gelu(fc1(y)))."""

    def __init__(self, attend=attend, approximate="tanh", width=32, num_heads=2):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.fc1, self.fc2 = torch.nn.Linear(width, 2 * width), torch.nn.Linear(2 * width, width)
        self.gelu, self.attend, self.num_heads = torch.nn.GELU(approximate=approximate), attend, num_heads

    def forward(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        x = x + self.attend(q, k, v).transpose(1, 2).flatten(2)
        return x + self.fc2(self.gelu(self.fc1(x)))


def lowered(captured, scheme="w8a8", emulate=False):
    quantize = QuantizeLinears((SCHEMES[scheme],), emulate)
    return captured.after(Normalize(), ShareBodies(), quantize, LowerLinears(emulate))


def targets(gm):
    return [n.target for graph in (gm, *(child for _, child in submodules(gm))) for n in graph.graph.nodes]


def reasons(gm):
    return {skip.where: skip.reason for skip in apply(LowerFloats(), gm).skipped}


# 1. golden


def test_golden(has_kernel):
    torch.manual_seed(0)
    gm = lowered(capture(Stack(Block()), X))
    assert apply(LowerFloats(), gm).changed == 2
    body = show(body_of(gm, body_calls(gm)[0]))
    line = next(line for line in body.splitlines() if "bf16_attention" in line)
    assert (
        line
        == "  %bf16_attention_default = quantcache.bf16_attention(%getitem, %getitem_1, %getitem_2, 0.25) : f32[2, 2, 40, 16]"
    )
    assert "aten.sigmoid" in body
    assert not {SDPA, aten.gelu.default} & set(targets(gm))


# 2. what stays


@pytest.mark.parametrize(
    ("attend", "reason"),
    [
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, torch.ones(40, 40)), "it has a mask"),
        (lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True), "it is causal"),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q[0], k[0], v[0])[None].expand_as(q),
            "its queries have 3 axes, not (batch, heads, tokens, width)",
        ),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k[:, :, :31], v[:, :, :31]),
            "it has 31 keys: packing fewer than 32 is not worth it",
        ),
        (
            lambda q, k, v: F.scaled_dot_product_attention(q, k, v[..., :8]).repeat(1, 1, 1, 2),
            "its values are 8 wide, its queries 16",
        ),
        (
            lambda q, k, v: F.scaled_dot_product_attention(*(x.bfloat16() for x in (q, k, v))).float(),
            "it is bfloat16: the kernel takes float32",
        ),
        (
            lambda q, k, v: F.scaled_dot_product_attention(*(x.repeat(1, 1, 1, 9) for x in (q, k, v)))[..., :16],
            "its heads are 144 wide: the kernel takes up to 128",
        ),
    ],
)
def test_other_attention_stays_with_a_reason(has_kernel, attend, reason):
    gm = lowered(capture(Stack(Block(attend)), X))
    assert reasons(gm) == {"blocks.0": reason}
    assert SDPA in targets(gm)


def test_attention_stays_where_the_cpu_has_no_kernel(has_none):
    gm = lowered(capture(Stack(Block()), X))
    assert reasons(gm) == {"blocks.0": "its kernel needs a CPU with AVX-512 BF16, and a C++ compiler"}
    assert SDPA in targets(gm)


def test_attention_stays_where_a_step_may_not_be_quantized(has_kernel, monkeypatch):
    gm = lowered(capture(Stack(Block()), X))
    monkeypatch.setattr(ops, "choose", aten.sigmoid.default)  # of the gelu
    assert reasons(gm) == {"blocks.0": "some of its steps are not quantized"}


def test_cross_attention_is_lowered(has_kernel):
    gm = lowered(capture(Stack(Block(lambda q, k, v: attend(q[:, :, :7], k, v).repeat(1, 1, 6, 1)[:, :, :40])), X))
    assert reasons(gm) == {}
    assert BF16 in targets(gm)


def test_a_body_without_a_kernel_stays(has_kernel):
    gm = lowered(capture(Stack(Block()), X), emulate=True)
    before = show(gm)
    assert apply(LowerFloats(), gm).changed == 0
    assert show(gm) == before


def test_the_exact_gelu_stays(has_none):
    gm = lowered(capture(Stack(Block(approximate="none")), X))
    assert apply(LowerFloats(), gm).changed == 0
    assert aten.gelu.default in targets(gm)


# 3. how far it is off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("size", [1.0, 30.0, 1e4])
def test_a_gelu_beside_quantized_linears_has_no_tanh(has_none, dtype, size):
    torch.manual_seed(0)
    captured = capture(Stack(Block()).to(dtype), (size * X).to(dtype))
    reference, gm = lowered(captured), lowered(captured)
    assert apply(LowerFloats(), gm).changed == 1
    assert aten.gelu.default in targets(reference)
    assert aten.gelu.default not in targets(gm)
    with torch.no_grad():
        (expected,), (found,) = (graph(*captured.inputs) for graph in (reference, gm))
    step = {torch.float32: 2.0**-7, torch.bfloat16: 2.0**-6}[dtype]  # rounding may move a code to its neighbour
    assert (found - expected).float().abs().max() <= step * expected.float().abs().max()


def test_the_gelu_by_a_sigmoid_is_the_gelu():
    x = torch.linspace(-12, 12, 4001)
    x = torch.cat([x, torch.tensor([-torch.inf, -3e38, -1e20, 0.0, 1e-30, 1e20, 3e38, torch.inf, torch.nan])])
    exact = torch.nn.functional.gelu(x.double(), approximate="tanh")
    found, plain = gelu_by_sigmoid(x)[0].double(), torch.nn.functional.gelu(x, approximate="tanh").double()
    assert torch.equal(found.isfinite(), plain.isfinite())
    finite = exact.isfinite() & plain.isfinite()
    assert ((found - exact)[finite].abs() <= 2.0**-21 * (1 + exact[finite].abs())).all()


@needs_kernel
@pytest.mark.parametrize("scale", [None, 1.5])
def test_attention_beside_quantized_linears_is_nearly_the_same(scale):
    torch.manual_seed(0)
    captured = capture(Stack(Block(lambda q, k, v: F.scaled_dot_product_attention(q, k, v, scale=scale))), X)
    reference, gm = lowered(captured), lowered(captured)
    assert apply(LowerFloats(), gm).changed == 2
    with torch.no_grad():
        (expected,), (found,) = (graph(*captured.inputs) for graph in (reference, gm))
    assert (found - expected).norm() <= 0.005 * expected.norm()


def test_a_lowered_body_costs_what_the_plain_one_did(has_kernel):
    captured = capture(Stack(Block()), X)
    plain, gm = captured.shared(), lowered(captured)
    apply(LowerFloats(), gm)
    costs = [flops_of(body_of(graph, body_calls(graph)[0])) for graph in (plain, gm)]
    assert costs[0] == costs[1] > 0


# 4. idempotence


def test_a_second_run_changes_nothing(has_kernel):
    gm = lowered(capture(Stack(Block()), X))
    apply(LowerFloats(), gm)
    before = show(gm)
    assert apply(LowerFloats(), gm).changed == 0
    assert show(gm) == before
