"""Against a dense mask in float64, at every edge of the tiles."""

from unittest.mock import patch

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.functional import scaled_dot_product_attention

from qc_compiler.attention import CACHED, FULL, INT8, reference
from qc_compiler.formats.integer import ROUNDING
from qc_compiler.kernels import cpu_attention as module
from qc_compiler.kernels.cpu_attention import INT8_KEYS, INT8_QUERIES, SHORT, TILE, cpu_attention

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
TEXTS = [0, 1, -1, 7, -7, 37, -37]


def operands(batch, heads, size, depth=8, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shape = (3, batch, size, heads, depth)  # as linears leave them
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).transpose(2, 3)


def attend(qkv, windows, num_text, kept=None, rows=None, scale=0.5):
    return cpu_attention(*qkv, ints(windows), ints(rows or [0] * len(windows)), kept, num_text, scale)


def ints(values):
    return torch.tensor(values, dtype=torch.int32)


def expected(qkv, windows, num_text, kept=None, rows=None, scale=0.5):
    cached = [None if kept is None else kept[:, row].double() for row in rows or [0] * len(windows)]
    dense = [qkv.shape[-2] if window == FULL else window for window in windows]
    return reference(*qkv.double(), dense, cached, num_text, scale)


def bound(qkv, scale=0.5):
    """Rounding of scores, of exponentials (20 ulp), of a sum over keys, and where it is coarser of the dtype."""
    query, key, value = qkv.double().abs()
    size, depth = query.shape[-2:]
    unit = torch.finfo(qkv.dtype).eps / 2
    inner = min(unit, 2**-24)
    scores = inner * ((depth + 3) * scale * (query @ key.transpose(-1, -2)).max() + 40)
    coarse = 0 if inner == unit else 4 * unit  # probabilities, both parts, their sum
    return float((torch.expm1(2 * scores) + (size + 8) * inner + coarse) * value.max())


def check(qkv, windows, num_text, **kwargs):
    out = attend(qkv, windows, num_text, **kwargs)
    assert out.dtype == qkv.dtype
    assert out.transpose(1, 2).is_contiguous()
    error = float((out.double() - expected(qkv, windows, num_text, **kwargs)).abs().max())
    assert error <= bound(qkv), (error, bound(qkv))
    return out


cases = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 3),
        "num_vision": st.integers(1, 200),
        "num_text": st.integers(-40, 40),
        "windows": st.lists(
            st.sampled_from([FULL, CACHED]) | st.integers(1, 40) | st.integers(1, 200), min_size=1, max_size=4
        ),
        "dtype": st.sampled_from(DTYPES),
        "short": st.sampled_from([0, 0, 0, SHORT]),
        "seed": st.integers(0, 9),
    }
)


@settings(max_examples=300, deadline=None)
@given(cases)
def test_any_mixture_of_heads_is_what_the_dense_mask_says(case):
    size = case["num_vision"] + abs(case["num_text"])
    windows, heads = case["windows"], len(case["windows"])
    *qkv, kept = (operands(case["batch"], heads, size, dtype=case["dtype"], seed=seed)[0] for seed in range(4))
    with patch.object(module, "SHORT", case["short"]):
        out = check(torch.stack(qkv), windows, case["num_text"], kept=kept, rows=list(range(heads))[::-1])
    for head, window in enumerate(windows):
        if window == CACHED:
            assert torch.equal(out[:, head], kept[:, heads - 1 - head])


def tiled(qkv, windows, num_text):
    with patch.object(module, "SHORT", 0), patch.object(module, "scaled_dot_product_attention", None):
        return check(qkv, windows, num_text)


@pytest.mark.parametrize("num_text", TEXTS)
@pytest.mark.parametrize("window", [1, 2, 15, 16, 31, 32, 33])
def test_tiles_are_exact_at_their_edges(window, num_text):
    for num_vision in (2 * window + TILE, 2 * window + TILE + 1, 2 * window + 2 * TILE - 1, 2 * window + 3 * TILE + 5):
        tiled(operands(1, 2, num_vision + abs(num_text), dtype=torch.float64), [window, window], num_text)


@pytest.mark.parametrize("num_text", TEXTS)
def test_every_window_up_to_the_widest(num_text):
    num_vision = 75
    qkv = operands(1, 1, num_vision + abs(num_text), dtype=torch.float64)
    with patch.object(module, "SHORT", 0):
        for window in range(1, num_vision + 2):
            check(qkv, [window], num_text)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("num_text", [0, 40, -40])
def test_each_dtype_in_tiles(dtype, num_text):
    tiled(operands(2, 3, SHORT + 77, 16, dtype), [9, 20, 9], num_text)


def test_long_windows_whose_first_keys_are_all_masked():
    tiled(operands(1, 1, 1500), [700], 0)  # the kernel takes 512 keys at once


@pytest.mark.parametrize("windows", [[5] * 2, [5, 9]])
def test_more_samples_than_heads(windows):
    tiled(operands(5, 2, 150), windows, 3)


@pytest.mark.parametrize("windows", [[5, 5], [5, FULL], [INT8, FULL]])
def test_any_layout_even_of_the_last_dimension(windows):
    qkv = operands(2, 2, SHORT + 50, 16)
    strided = torch.stack([qkv, torch.full_like(qkv, torch.nan)], -1)[..., 0]
    for other in (strided, qkv.contiguous(), qkv.transpose(3, 4).contiguous().transpose(3, 4)):
        torch.testing.assert_close(attend(other, windows, 7), attend(qkv, windows, 7))


@pytest.mark.parametrize("short", [True, False])
def test_which_path_is_taken(short):
    qkv = operands(1, 1, SHORT + 4 - short)
    with patch.object(module, "_arrow", wraps=module._arrow) as arrow:
        check(qkv, [9], 4)
    assert arrow.called is not short


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [FULL, 99, 1000])
def test_full_heads_are_bit_for_bit_what_pytorch_computes(dtype, window):
    qkv = operands(2, 3, 105, dtype=dtype)
    out = attend(qkv, [window, FULL, 99], -5)
    assert torch.equal(out, scaled_dot_product_attention(*qkv, scale=0.5))
    assert out.transpose(1, 2).is_contiguous()


def test_only_cached_heads():
    kept = torch.randn(2, 3, 40, 8)
    out = attend(operands(2, 4, 40), [CACHED] * 4, 5, kept, [2, 0, 0, 1])
    assert torch.equal(out, kept[:, [2, 0, 0, 1]])
    assert out.transpose(1, 2).is_contiguous()


@pytest.mark.parametrize("num_vision", [0, 1, 2])
@pytest.mark.parametrize("num_text", [9, -9])
def test_hardly_any_vision(num_vision, num_text):
    kept = torch.randn(1, 1, 9 + num_vision, 8)
    check(operands(1, 4, 9 + num_vision), [1, 5, FULL, CACHED], num_text, kept=kept)


@pytest.mark.parametrize("num_text", [20, -20])
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("operand", ["key", "value"])
def test_what_is_not_finite_reaches_no_farther_than_its_end(operand, bad, num_text):
    window, size, where = 10, SHORT + 100, 200
    qkv = operands(1, 1, size)
    qkv[["query", "key", "value"].index(operand), :, :, where] = bad
    out = attend(qkv, [window], num_text)
    far = (torch.arange(size) - where).abs() > 2 * window + TILE - 1
    far[: max(num_text, 0)] = far[size + min(num_text, 0) :] = False  # the text attends all
    assert far.sum() > 100
    assert out[:, :, far].isfinite().all()
    assert not out[:, :, where].isfinite().all()


def test_scores_beyond_any_exponential_stay_finite():
    tiled(operands(1, 1, 150, dtype=torch.float64) * torch.tensor([30, 30, 1]).view(3, 1, 1, 1, 1), [9], 5)


def codes(x, block):
    """int8 codes of (S, D) and the scale of each token."""
    scale = torch.cat([(part.abs().max() / 127).expand(len(part)) for part in x.float().split(block)])
    return (x.float() / scale[:, None]).round().long(), scale.double()


@pytest.mark.parametrize("size", [64, 65, 130, 400])
def test_int8_heads_are_what_integer_products_say(size):
    query, key, value = qkv = operands(1, 1, size, 16)
    qkv *= torch.logspace(-2, 0.5, size)[:, None]  # every block another scale
    q, q_scale = codes(query[0, 0], 128)
    k, k_scale = codes(key[0, 0] - key[0, 0].mean(0), 64)
    probabilities = (0.25 * q_scale[:, None] * (q @ k.T) * k_scale).softmax(-1)
    error = (attend(qkv, [INT8], 0, scale=0.25)[0, 0] - probabilities @ value[0, 0].double()).abs().max()
    assert error <= bound(qkv, 0.25)


def int8_bound(qkv, scale):
    """(e²ᵋ − 1)·max|v|, ε the largest error of a score."""
    query, key, value = qkv.double()
    key = key - key.mean(2, keepdim=True)
    q_scale, k_scale = (x.abs().amax((2, 3), keepdim=True) / 127 * ROUNDING for x in (query, key))
    q_sum, k_sum = (x.abs().sum(-1).amax(-1)[..., None, None] for x in (query, key))
    score = scale * (q_sum * k_scale + k_sum * q_scale + query.shape[-1] * q_scale * k_scale / 2) / 2
    return float(torch.expm1(2 * score.max()) * value.abs().max())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("size", [63, 300])
def test_int8_heads_are_within_their_bound(size, dtype):
    qkv = operands(2, 3, size, 16, dtype)
    out = attend(qkv, [INT8, FULL, INT8], 7, scale=0.25)
    error = (out.double() - expected(qkv, [FULL] * 3, 0, scale=0.25)).abs().amax((0, 2, 3))
    rounding = bound(qkv.float() if dtype == torch.float64 else qkv, 0.25)
    assert out.dtype == dtype
    assert error[1] <= rounding
    assert error.max() <= int8_bound(qkv, 0.25) + rounding


def test_int8_codes_survive_a_channel_that_is_large_in_all_keys():
    query, key, value = qkv = operands(1, 1, 300, 16)
    key[..., 3] += 100
    full = expected(qkv, [FULL], 0)

    def distance(out):
        return float((out.double() - full).norm() / full.norm())

    plain = scaled_dot_product_attention(
        module._through_codes(query, INT8_QUERIES), module._through_codes(key, INT8_KEYS), value, scale=0.5
    )
    assert 1e-4 < distance(attend(qkv, [INT8], 0)) < 0.02
    assert distance(plain) > 0.2
