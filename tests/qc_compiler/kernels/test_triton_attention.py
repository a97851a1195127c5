import pytest
import torch
from hypothesis import Phase, example, given, settings
from hypothesis import strategies as st

pytest.importorskip("triton")

from qc_compiler.attention import CACHED, FULL, INT8, reference
from qc_compiler.kernels.triton_attention import GROUP, _schedule, triton_attention
from qc_compiler.kernels.triton_linear import INTERPRETED

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# u of the documented bound; Triton's interpreter truncates to bfloat16 where the hardware rounds
UNITS = {torch.float32: 2.0**-24, torch.bfloat16: 2.0**-7 if INTERPRETED else 2.0**-8, torch.float16: 2.0**-11}
INT32 = {"dtype": torch.int32}


def attend(query, key, value, windows, cached, num_text):
    """The kernel's result, with the cached heads in any order in `kept`."""
    held = [head for head, window in enumerate(windows) if window == CACHED][::-1]
    rows = [held.index(head) if head in held else 99 for head in range(len(windows))]
    kept = torch.stack([cached[head] for head in held], 1) if held else None
    y = triton_attention(
        query, key, value, torch.tensor(windows, **INT32), torch.tensor(rows, **INT32), kept, num_text, scale_of(query)
    )
    assert (y.shape, y.dtype) == (query.shape, query.dtype)
    assert y.transpose(1, 2).is_contiguous()
    return y


def scale_of(query):
    return query.shape[-1] ** -0.5


def exact(query, key, value, windows, cached, num_text):
    """Attention in float64, and the bound that the kernel's module gives on the distance from it."""
    q, k, v, kept = (x.double() for x in (query, key, value, torch.stack(list(cached))))
    scale, tokens, size = scale_of(query), *query.shape[2:]
    dense = [FULL if window == INT8 else window for window in windows]
    y, weight = (reference(q, k, part, dense, kept, num_text, scale) for part in (v, v.abs()))
    largest = scale * (q.abs() @ k.abs().transpose(-1, -2)).amax(-1, keepdim=True)
    unit, epsilon = UNITS[query.dtype], 2**-23 * (size * largest + tokens + 8)
    bound = unit * y.abs() + (unit + 2 * epsilon) * weight
    if query.dtype == torch.float16:
        bound += 2**-25 * v.abs().sum(2, keepdim=True)
    smooth = k - k.mean(2, keepdim=True)
    alpha = q.abs().amax(-1, keepdim=True) / 127
    beta = [part.abs().amax((2, 3), keepdim=True).expand(*part.shape[:3], 1) for part in smooth.split(GROUP, 2)]
    beta = torch.cat(beta, 2).transpose(2, 3) / 127
    sizes_q, sizes_k = q.abs().sum(-1, keepdim=True), smooth.abs().sum(-1)[:, :, None]
    sigma = scale * (alpha * sizes_k / 2 + beta * sizes_q / 2 + size * alpha * beta / 4).amax(-1, keepdim=True)
    for head, window in enumerate(windows):
        if window == CACHED:
            bound[:, head] = 0
        if window == INT8:
            bound[:, head] += torch.expm1(2 * sigma[:, head]) * weight[:, head]
    return y, bound


def operands(batch, heads, tokens, size, dtype=torch.float32, seed=0):
    """Query, key, value and the outputs that heads may have cached."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(4, batch, heads, tokens, size, generator=generator).to(dtype).to(DEVICE)
    return x[0], x[1], x[2], list(x[3].unbind(1))


def assert_within_bound(query, key, value, windows, cached, num_text):
    found = attend(query, key, value, windows, cached, num_text)
    y, bound = exact(query, key, value, windows, cached, num_text)
    assert ((found.double() - y).abs() <= bound).all()
    for head, window in enumerate(windows):
        assert window != CACHED or torch.equal(found[:, head], cached[head])
    return found, y, bound


LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "tokens first": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "a part": lambda x: torch.cat([x, x], -1)[..., : x.shape[-1]],
    "d strided": lambda x: x.transpose(2, 3).contiguous().transpose(2, 3),
}


@settings(deadline=None, max_examples=20, derandomize=True, phases=[Phase.explicit, Phase.generate])
@given(
    st.integers(1, 2),
    st.lists(st.sampled_from([FULL, INT8, CACHED, 1, 3, 15, 2**31 - 1]), min_size=1, max_size=3),
    st.integers(1, 45),
    st.integers(-20, 20),
    st.sampled_from([16, 48, 64, 72, 80, 96, 128]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.lists(st.sampled_from(list(LAYOUTS)), min_size=3, max_size=3),
    st.integers(0, 2**31),
)
@example(1, [CACHED, INT8, CACHED], 7, 7, 72, torch.bfloat16, ["tokens first"] * 3, 0)  # no vision
@example(2, [CACHED, INT8, CACHED, INT8], 9, 0, 16, torch.float32, ["contiguous"] * 3, 0)
@example(2, [1, FULL], 33, -1, 80, torch.float16, ["contiguous"] * 3, 0)
def test_any_heads_of_any_shape(batch, windows, tokens, num_text, size, dtype, layouts, seed):
    num_text = max(-tokens, min(tokens, num_text))
    *inputs, cached = operands(batch, len(windows), tokens, size, dtype, seed)
    inputs = [LAYOUTS[layout](x) for layout, x in zip(layouts, inputs)]
    assert_within_bound(*inputs, windows, cached, num_text)


@pytest.mark.parametrize("num_text", [0, 20, -20])
def test_whole_and_partial_tiles(num_text):
    """Windows that hold tiles without a mask, and text of a tile and a rest; float32, where no edge can hide."""
    windows = [FULL, 20, 1, 15, 49, INT8]
    *inputs, cached = operands(1, len(windows), 70, 16)
    assert_within_bound(*inputs, windows, cached, num_text)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_bound_is_tight(dtype):
    query, key, value, cached = operands(1, 1, 40, 32, dtype)
    found, y, bound = assert_within_bound(query, key, value.abs(), [FULL], cached, 0)
    assert ((found - y).abs() / bound).max() > 1 / 3


def test_scores_of_int8():
    """Two groups of keys of different size, and an offset that all keys share: it is gone before the codes are made."""
    query, key, value, cached = operands(1, 1, GROUP + 20, 32)
    key[:, :, GROUP:] *= 0.05
    key += 30 * torch.randn(32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    found, y, _ = assert_within_bound(query, key, value, [INT8], cached, 0)
    assert 1e-4 < (found - y).norm() / y.norm() < 0.02
    query[:, :, 3] = 0  # nothing to take a scale of
    assert_within_bound(query, torch.zeros_like(key), value, [INT8], cached, 0)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_tiles_outside_the_arrow_are_not_loaded():
    query, key, value, cached = operands(1, 1, 400, 16)
    key[:, :, 145:], value[:, :, 145:] = float("nan"), float("nan")
    y = attend(query, key, value, [1], cached, 16)[0, 0]
    assert y[16:144].isfinite().all()  # whole tiles of queries, for any tile up to 128
    assert y[146:].isnan().all()
    assert y[:16].isnan().all()  # text attends all


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_what_is_not_finite_reaches_what_attends_it():
    windows = [FULL, 5, INT8]
    query, key, value, cached = operands(1, 3, 40, 16)
    query[:, :, 3, 2], query[:, :, 20, 0] = float("nan"), float("inf")
    key[:, :2, 30, 1], key[:, :2, 9, 0] = float("nan"), float("inf")
    key[:, 0, 30, 1] = 1  # else nothing of the full head is left to compare
    y = reference(query, key, value, [FULL, 5, FULL], cached, 7, scale_of(query))
    found = attend(query, key, value, windows, cached, 7)
    assert torch.equal(found.isnan(), y.isnan())
    assert 0 < y[:, 0].isnan().float().mean() < 1
    assert torch.allclose(found[:, :2], y[:, :2], equal_nan=True, atol=1e-5)
    key[:, 2, 39, 0] = float("inf")
    assert attend(query, key, value, windows, cached, 7)[:, 2].isnan().all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning")  # numpy's, in the interpreter
def test_a_tile_of_which_every_score_is_minus_infinity():
    query, key, value, cached = operands(1, 1, 40, 16)
    query[..., 0], key[:, :, :16, 0] = -1, float("inf")
    y = reference(query, key, value, [FULL], cached, 0, scale_of(query))
    assert y.isfinite().all()
    assert torch.allclose(attend(query, key, value, [FULL], cached, 0), y, atol=1e-5)
    key[..., 0] = float("inf")
    assert attend(query, key, value, [FULL], cached, 0).isnan().all()


def test_heads_that_take_long_come_first():
    found = _schedule((3, CACHED, FULL, INT8, 9, INT8), (0, 4, 0, 0, 0, 0), torch.device("cpu"))
    assert found.tolist() == [[2, FULL, 0], [3, INT8, 0], [5, INT8, 1], [4, 9, 0], [0, 3, 0], [1, CACHED, 4]]


def test_no_tokens():
    query, key, value, cached = operands(2, 2, 5, 16, torch.bfloat16)
    assert attend(query[:, :, :0], key[:, :, :0], value[:, :, :0], [1, FULL], cached, 0).shape == (2, 2, 0, 16)


def test_a_cached_head_needs_what_was_kept():
    query, key, value, _ = operands(1, 1, 5, 16)
    with pytest.raises(AssertionError):
        triton_attention(query, key, value, torch.tensor([CACHED], **INT32), torch.zeros(1, **INT32), None, 0, 1.0)


@pytest.mark.cuda
@pytest.mark.parametrize("num_text", [333, -333])
@pytest.mark.parametrize("size", [64, 72, 128])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_real_sizes(dtype, size, num_text):
    windows = [FULL, 300, INT8, CACHED, 77, 5000]
    inputs = operands(2, len(windows), 3001, size, dtype)
    assert_within_bound(*inputs[:3], windows, inputs[3], num_text)
