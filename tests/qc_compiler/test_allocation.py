import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from qc_compiler import allocation
from qc_compiler.allocation import WIDTHS, BlockErrors, allocate, mean_bits_of, weight_errors


def block(number, errors, sizes=None, kind="body_0"):
    """A block whose linears cost `errors`, (L, 3), at 4, 8 and 16 bits."""
    errors = np.array(errors, dtype=np.float64)
    sizes = np.array(sizes or [32] * len(errors), dtype=np.int64)
    return BlockErrors(kind, tuple(f"blocks.{number}.{i}" for i in range(len(errors))), sizes, errors)


def lists_of(blocks, bits):
    return [tuple(bits[site] for site in block.sites) for block in blocks]


def cost(blocks, lists):
    return sum(b.errors[i, WIDTHS.index(width)] for b, row in zip(blocks, lists) for i, width in enumerate(row))


def num_bits(blocks, lists):
    return sum(int(b.sizes @ np.array(row)) for b, row in zip(blocks, lists))


def num_bodies(blocks, lists, kind):
    return len({row for b, row in zip(blocks, lists) if b.kind == kind})


def least_cost(blocks, choices, mean_bits, bound):
    """Returns the least cost over all ways to give each block one of its choices, by trying them all."""
    budget = mean_bits * sum(int(b.sizes.sum()) for b in blocks)
    return min(
        cost(blocks, lists)
        for lists in itertools.product(*choices)
        if num_bits(blocks, lists) <= budget and all(num_bodies(blocks, lists, b.kind) <= bound for b in blocks)
    )


@st.composite
def instances(draw, max_sites=2, max_blocks=4):
    """A few blocks of two kinds, and a budget in eighths of a bit: small enough to be exact."""
    num_sites = {kind: draw(st.integers(1, max_sites)) for kind in ("a", "b")}
    shapes = {kind: draw(st.lists(st.integers(1, 9), min_size=n, max_size=n)) for kind, n in num_sites.items()}
    found = []
    for number, kind in enumerate(draw(st.lists(st.sampled_from("ab"), min_size=1, max_size=max_blocks))):
        rows = st.lists(st.integers(0, 1000), min_size=3, max_size=3).map(lambda row: sorted(row, reverse=True))
        errors = draw(st.lists(rows, min_size=num_sites[kind], max_size=num_sites[kind]))
        found.append(block(number, errors, shapes[kind], kind))
    return found, draw(st.integers(32, 128)) / 8, draw(st.integers(1, 3))


@settings(deadline=None, max_examples=60)
@given(instances())
def test_the_budget_and_the_number_of_bodies_are_never_exceeded(instance):
    blocks, mean_bits, bound = instance
    bits = allocate(blocks, mean_bits, bound)
    lists = lists_of(blocks, bits)
    assert set(bits) == {site for b in blocks for site in b.sites}
    assert set(bits.values()) <= set(WIDTHS)
    assert num_bits(blocks, lists) <= mean_bits * sum(int(b.sizes.sum()) for b in blocks)
    assert all(num_bodies(blocks, lists, b.kind) <= bound for b in blocks)


@settings(deadline=None, max_examples=60)
@given(instances(max_sites=1))
def test_blocks_of_one_linear_get_what_trying_everything_finds(instance):
    blocks, mean_bits, bound = instance
    found = cost(blocks, lists_of(blocks, allocate(blocks, mean_bits, bound)))
    best = least_cost(blocks, [[(width,) for width in WIDTHS]] * len(blocks), mean_bits, bound)
    assert best <= found <= best * (1 + 1e-3) + 1e-3  # the costs are whole numbers


@settings(deadline=None, max_examples=60)
@given(instances(max_blocks=3))
def test_among_its_lists_the_best_is_found(instance):
    blocks, mean_bits, bound = instance
    found = cost(blocks, lists_of(blocks, allocate(blocks, mean_bits, bound)))
    choices = [allocation._candidates([other for other in blocks if other.kind == b.kind]) for b in blocks]
    best = least_cost(blocks, choices, mean_bits, bound)
    assert best <= found <= best * (1 + 1e-3) + 1e-3


def test_the_sensitive_linear_gets_the_bits():
    bits = allocate([block(0, [[9, 1, 0], [4, 3, 0]])], 6.0)
    assert bits == {"blocks.0.0": 8, "blocks.0.1": 4}


def test_a_large_weight_uses_more_of_the_budget():
    """Both want eight bits alike; the large one cannot be paid."""
    bits = allocate([block(0, [[4, 1, 0], [5, 1, 0]], sizes=[10, 90])], 5.0)
    assert bits == {"blocks.0.0": 8, "blocks.0.1": 4}


FOUR = [[[9, 0, 0], [1, 0, 0]], [[1, 0, 0], [9, 0, 0]], [[9, 0, 0], [9, 0, 0]], [[1, 0, 0], [1, 0, 0]]]


@pytest.mark.parametrize("bound", [1, 2, 3, 4])
def test_a_tight_bound_on_bodies_limits_and_costs(bound):
    """Four blocks want (8, 4), (4, 8), (8, 8) and (4, 4); with fewer lists some share one, at a price."""
    blocks = [block(i, errors) for i, errors in enumerate(FOUR)]
    lists = lists_of(blocks, allocate(blocks, 6.0, bound))
    assert num_bodies(blocks, lists, "body_0") <= bound
    if bound == 4:
        assert lists == [(8, 4), (4, 8), (8, 8), (4, 4)]
    everything = [list(itertools.product(WIDTHS, repeat=2))] * 4
    assert cost(blocks, lists) == least_cost(blocks, everything, 6.0, bound) == {1: 20, 2: 12, 3: 12, 4: 4}[bound]


def test_the_bound_is_for_each_kind():
    """Two blocks of each kind, one sensitive: with one list a kind, each kind has to take one for both."""
    rows = [[[9, 0, 0]], [[1, 0, 0]]]
    blocks = [block(i, rows[i % 2], kind="ab"[i // 2]) for i in range(4)]
    assert lists_of(blocks, allocate(blocks, 6.0, 2)) == [(8,), (4,), (8,), (4,)]
    lists = lists_of(blocks, allocate(blocks, 6.0, 1))
    assert lists in ([(8,), (8,), (4,), (4,)], [(4,), (4,), (8,), (8,)])


def test_blocks_of_two_kinds_may_have_different_numbers_of_linears():
    blocks = [block(0, [[9, 1, 0]], kind="a"), block(1, [[8, 1, 0], [0, 0, 0]], kind="b")]
    assert lists_of(blocks, allocate(blocks, 20 / 3)) == [(8,), (8, 4)]


@pytest.mark.parametrize("width", WIDTHS)
def test_a_budget_of_one_width_where_errors_fall(width):
    """Exactly that width everywhere at 4 and 16; at 8 equal linears gain most from eight bits each."""
    blocks = [block(i, [[100.0, 1.0, 0.0]] * 2) for i in range(3)]
    assert set(allocate(blocks, float(width)).values()) == {width}


def test_four_bits_are_all_that_four_bits_pay_for():
    blocks = [block(i, [[10.0**i, 0, 0]], sizes=[1 + i]) for i in range(4)]
    assert set(allocate(blocks, 4.0).values()) == {4}


def test_without_errors_anything_within_the_budget_will_do():
    blocks = [block(i, [[0, 0, 0]] * 2) for i in range(3)]
    for mean_bits in (4.0, 5.0, 16.0):
        assert num_bits(blocks, lists_of(blocks, allocate(blocks, mean_bits))) <= mean_bits * 6 * 32


def test_without_linears_there_is_nothing_to_allocate():
    assert allocate([], 5.0) == {}


@pytest.mark.parametrize("shape", [(3, 128), (5, 300), (2, 32)])
def test_the_errors_of_a_weight(shape):
    """Directly: int4 in groups of 128 with the scale amax / 7, int8 in rows with amax / 127."""
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))

    def rounded(x, top):
        scale = np.abs(x).max() / top
        return np.round(x / scale) * scale

    w = weight.double().numpy()
    ends = [*range(0, shape[1], 128), shape[1]]
    four = [np.concatenate([rounded(row[a:b], 7) for a, b in itertools.pairwise(ends)]) for row in w]
    expected = [((w_hat - w) ** 2).sum() / (w**2).sum() for w_hat in (four, [rounded(row, 127) for row in w])]
    np.testing.assert_allclose(weight_errors(weight), [*expected, 0.0], rtol=1e-4)
    np.testing.assert_allclose(weight_errors(weight * 100), [*expected, 0.0], rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_errors_of_a_weight_are_found_in_float32(dtype):
    weight = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).to(dtype)
    assert (weight_errors(weight) == weight_errors(weight.float())).all()


def test_a_weight_of_zeros_has_no_error():
    assert weight_errors(torch.zeros(3, 32)).tolist() == [0.0, 0.0, 0.0]


def test_mean_bits():
    assert mean_bits_of({"a": 4, "b": 8}, {"a": 30, "b": 10, "c": 7}) == 5.0
