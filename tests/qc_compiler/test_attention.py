import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from qc_compiler import ops
from qc_compiler.attention import CACHED, FULL, arrow_mask, attended_share, reference

B, H, S, D = 2, 3, 7, 4


@st.composite
def arrows(draw):
    """Returns S, T (negative if the text comes last) and w."""
    vision, text = draw(st.integers(1, 12)), draw(st.integers(0, 5))
    return vision + text, draw(st.sampled_from([text, -text])), draw(st.integers(1, 15))


# -- the algebra


@settings(deadline=None)
@given(arrows())
def test_a_mask_is_what_its_definition_says_of_each_pair(arrow):
    tokens, num_text, window = arrow
    text = range(num_text) if num_text >= 0 else range(tokens + num_text, tokens)
    mask = arrow_mask(tokens, num_text, window)
    assert mask.shape == (tokens, tokens)
    for i in range(tokens):
        for j in range(tokens):
            assert mask[i, j].item() == (i in text or j in text or abs(i - j) <= window)


@settings(deadline=None)
@given(arrows())
def test_the_attended_share_counts_the_mask(arrow):
    tokens, num_text, window = arrow
    counted = arrow_mask(tokens, num_text, window).double().mean().item()
    assert attended_share(window, tokens, num_text) == pytest.approx(counted, abs=1e-12)


@pytest.mark.parametrize(("code", "share"), [(FULL, 1.0), (-2, 1.0), (CACHED, 0.0), (6, 1.0)])
def test_codes_attend_all_or_nothing(code, share):
    assert attended_share(code, 9, 2) == share


def qkv(dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(B, S, H, D, generator=generator).to(dtype).transpose(1, 2) for _ in range(3)]


def test_the_reference_with_full_heads_is_attention():
    q, k, v = qkv(torch.float64)
    found = reference(q, k, v, [FULL] * H, [None] * H, 2, 0.3)
    torch.testing.assert_close(found, F.scaled_dot_product_attention(q, k, v, scale=0.3))


@pytest.mark.parametrize("num_text", [0, 2, -2])
def test_the_reference_is_attention_under_each_heads_mask(num_text):
    (q, k, v), cached = qkv(torch.float64), torch.full((B, S, D), 5.0, dtype=torch.float64)
    found = reference(q, k, v, [1, CACHED, 3], [None, cached, None], num_text, D**-0.5)
    masks = torch.stack([arrow_mask(S, num_text, w) for w in (1, 99, 3)])
    expected = F.scaled_dot_product_attention(q, k, v, attn_mask=masks)
    expected[:, 1] = 5.0
    torch.testing.assert_close(found, expected)


# -- the operators


ROWS = (1, -1, 0)  # head 2 is kept in row 0, head 0 in row 1


def modes(*windows, rows=ROWS):
    return torch.tensor([windows, rows], dtype=torch.int32)


def kept(count=2, dtype=torch.float32):
    return torch.arange(count, dtype=dtype)[None, :, None, None].expand(B, count, S, D).contiguous()


def headwise(windows, dtype=torch.float32, num_text=2):
    return (*qkv(dtype), modes(*windows), kept(dtype=dtype), num_text, 0.3)


OPERATORS = {
    "full": (ops.headwise_attention, lambda dtype: headwise((FULL,) * H, dtype)),
    "mixed": (ops.headwise_attention, lambda dtype: headwise((2, FULL, CACHED), dtype)),
    "nothing kept": (ops.headwise_attention, lambda dtype: (*qkv(dtype), modes(1, 2, 3), None, -2, 0.3)),
    "store": (ops.store_heads, lambda dtype: (qkv(dtype)[0], modes(1, 2, 3), 2)),
    "load": (ops.load_heads, lambda dtype: (kept(3, dtype), modes(0, 0, 0, rows=(2, 0, 1)))),
}


@pytest.mark.parametrize("name", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fake_results_are_like_the_real_ones(name, dtype):
    operator, make = OPERATORS[name]
    real = operator(*make(dtype))
    with torch._subclasses.FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake = operator(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in make(dtype)))
    assert (fake.shape, fake.stride(), fake.dtype) == (real.shape, real.stride(), dtype)


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_keep_the_rules_of_torch(name):
    operator, make = OPERATORS[name]
    torch.library.opcheck(operator, make(torch.float32))


def test_full_heads_are_attention_to_the_bit():
    q, k, v = qkv()
    found = ops.headwise_attention(q, k, v, modes(FULL, FULL, FULL), None, 2, D**-0.5)
    assert torch.equal(found, F.scaled_dot_product_attention(q, k, v))


def test_a_cached_head_is_its_row_and_the_others_are_computed():
    found = ops.headwise_attention(*headwise((CACHED, FULL, CACHED)))
    assert (found[:, 0] == 1).all()
    assert (found[:, 2] == 0).all()
    assert not found[:, 1].eq(found[:, 1, :1]).all()


def test_kept_heads_stand_in_the_order_of_their_rows():
    output = qkv()[0]
    stored = ops.store_heads(output, modes(FULL, FULL, FULL), 2)
    assert torch.equal(stored, output[:, [2, 0]])
    assert stored.is_contiguous()


@given(st.permutations(range(H)))
def test_what_is_stored_is_loaded_again(rows):
    output, steering = qkv()[0], modes(0, 0, 0, rows=rows)
    assert torch.equal(ops.load_heads(ops.store_heads(output, steering, H), steering), output)


def test_an_observer_sees_the_operands_and_gives_the_result_until_it_leaves():
    seen = []

    def observe(query, *_):
        seen.append(query.shape)
        return torch.zeros_like(query)

    operands = headwise((FULL,) * H)
    with pytest.raises(ZeroDivisionError), ops.observed(observe):
        assert not ops.headwise_attention(*operands).any()
        raise ZeroDivisionError
    assert ops.headwise_attention(*operands).any()
    assert seen == [(B, H, S, D)]
