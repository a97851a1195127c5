import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from qc_compiler.kernels import bf16_attention as kernel
from qc_compiler.kernels.bf16_attention import WIDEST, bf16_attention, has_bf16_attention

needs_kernel = pytest.mark.skipif(
    not has_bf16_attention(torch.device("cpu")), reason="this CPU has no AVX-512 BF16, or there is no compiler"
)
U = 2.0**-8


def exact(q, k, v, scale):
    return F.scaled_dot_product_attention(q.double(), k.double(), v.double(), scale=scale)


def bound(q, k, v, scale):
    """|o − exact| for each query, as the module states it."""
    q, k = q.double(), k.double()
    products = abs(scale) * q.abs() @ k.abs().transpose(-1, -2)
    shift = ((2 * U + U * U + 2.0**-16) * products).amax(-1, keepdim=True)
    weight = U + 2.0**-14
    root = torch.exp(shift) * ((1 + weight) / (1 - weight)) ** 0.5
    largest = v.double().abs().amax((-2, -1), keepdim=True)
    return (2 * (1 - 2 / (root + 1)) + U + k.shape[-2] * 2.0**-23) * largest


@needs_kernel
@given(
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 20),
    st.one_of(st.integers(1, 70), st.integers(250, 600)),
    st.integers(1, WIDEST),
    st.sampled_from([0.0, 1e-20, 0.1, 1.0, 10.0]),
    st.sampled_from([None, 0.3, -0.5]),
    st.integers(0, 2**31),
)
def test_the_documented_bound_holds_for_any_shape(batch, heads, queries, keys, width, size, scale, seed):
    generator = torch.Generator().manual_seed(seed)
    q, k, v = (size * torch.randn(batch, heads, n, width, generator=generator) for n in (queries, keys, keys))
    scale = width**-0.5 if scale is None else scale
    found = bf16_attention(q, k, v, scale)
    assert found.dtype == torch.float32
    assert ((found - exact(q, k, v, scale)).abs() <= bound(q, k, v, scale)).all()


@needs_kernel
@pytest.mark.parametrize("width", [24, 31, 32, 64, 128])
def test_it_is_as_precise_as_bfloat16(width):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(2, 3, 300, width, generator=generator) for _ in range(3))
    expected = exact(q, k, v, width**-0.5)
    assert (bf16_attention(q, k, v, width**-0.5) - expected).norm() <= 0.005 * expected.norm()


@needs_kernel
@pytest.mark.parametrize("value", [-3.0, 0.7])
def test_equal_values_stay_what_they_are(value):
    q, k = torch.randn(1, 2, 9, 16), torch.randn(1, 2, 600, 16)
    v = torch.full((1, 2, 600, 16), value).bfloat16().float()
    assert torch.allclose(bf16_attention(q, k, v, 0.25), v[:, :, :9], rtol=2.0**-16)


@needs_kernel
def test_operands_may_have_any_layout():
    fused = torch.randn(2, 50, 3, 4, 16)
    q, k, v = fused.permute(2, 0, 3, 1, 4)
    expected = bf16_attention(*(x.contiguous() for x in (q, k, v)), 0.25)
    turned = [x.transpose(2, 3).contiguous().transpose(2, 3) for x in (q, k, v)]
    for operands in ((q, k, v), turned, [x[:1].expand(2, -1, -1, -1) for x in (q, k, v)]):
        found = bf16_attention(*operands, 0.25)
        assert torch.equal(found[0], expected[0])
        assert found.stride() == torch.empty(2, 50, 4, 16).transpose(1, 2).stride()


@needs_kernel
def test_threads_change_nothing():
    q, k, v = (torch.randn(2, 3, 77, 24) for _ in range(3))
    before = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            found.append(bf16_attention(q, k, v, 0.2))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@needs_kernel
@pytest.mark.parametrize("at", [0, 33, 299])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("which", [0, 1, 2])
def test_what_is_not_finite_reaches_what_reads_it(which, bad, at):
    operands = [torch.randn(1, 2, 300, 16) for _ in range(3)]
    operands[which][0, 1, at, 3] = bad
    found, plain = bf16_attention(*operands, 0.25), F.scaled_dot_product_attention(*operands, scale=0.25)
    assert torch.equal(found.isfinite(), plain.isfinite())


@needs_kernel
def test_huge_scores_do_not_overflow():
    q, k, v = (torch.randn(1, 1, 64, 16) for _ in range(3))
    found = bf16_attention(1e4 * q, 1e4 * k, v, 1.0)
    rows = v.bfloat16().float().unsqueeze(2)  # one key has all the weight
    assert (found.unsqueeze(3) == rows).all(-1).any(-1).all()


def test_the_meta_kernel_tells_the_layout():
    q, k = torch.empty(2, 3, 5, 8, device="meta"), torch.empty(2, 3, 7, 8, device="meta")
    out = bf16_attention(q, k, k, 1.0)
    assert (out.shape, out.stride()) == ((2, 3, 5, 8), (120, 8, 24, 1))


def test_without_the_instructions_there_is_no_kernel(monkeypatch):
    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: False)
    assert not has_bf16_attention.__wrapped__(torch.device("cpu"))
    assert not has_bf16_attention.__wrapped__(torch.device("cuda"))


def test_without_a_compiler_there_is_no_kernel(monkeypatch):
    def fails():
        raise RuntimeError("no compiler")

    monkeypatch.setattr("torch.cpu._is_avx512_bf16_supported", lambda: True)
    monkeypatch.setattr(kernel, "_library", fails)
    with pytest.warns(UserWarning, match="attention stays in float32, its kernel does not compile: no compiler"):
        assert not has_bf16_attention.__wrapped__(torch.device("cpu"))
