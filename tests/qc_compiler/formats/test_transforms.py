import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qc_compiler.errors import OptionError
from qc_compiler.formats import parse_format
from qc_compiler.formats.schemes import recipe_of
from qc_compiler.formats.transforms import balancing_scales, hadamard, low_rank, rotate, rotation_size


@pytest.mark.parametrize("size", [1, 2, 16, 128])
def test_a_hadamard_matrix_is_orthogonal_and_symmetric(size):
    matrix = hadamard(size).double()
    assert torch.equal(matrix, matrix.T)
    assert torch.allclose(matrix @ matrix, torch.eye(size, dtype=torch.float64), atol=1e-6)
    assert torch.allclose(matrix.abs(), torch.full((size, size), size**-0.5, dtype=torch.float64))


@given(st.integers(1, 6), st.integers(1, 300), st.integers(0, 2**31))
def test_rotating_both_leaves_the_product(rows, width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = (torch.randn(n, width, generator=generator) for n in (rows, 5))
    matrix = hadamard(rotation_size(width))
    exact = x.double() @ w.double().T
    assert torch.allclose(rotate(x, matrix).double() @ rotate(w, matrix).double().T, exact, atol=1e-4)


def test_rotating_spreads_an_outlier():
    x = torch.randn(8, 128, generator=torch.Generator().manual_seed(0))
    x[:, 7] *= 100
    form, matrix = parse_format("int4"), hadamard(128)
    error = (form.round_trip(x) - x).norm()
    rotated = rotate(x, matrix)
    assert (form.round_trip(rotated) - rotated).norm() < error / 2


@given(st.integers(1, 40), st.integers(0, 2**31))
def test_balancing_leaves_the_product_and_evens_the_channels(width, seed):
    generator = torch.Generator().manual_seed(seed)
    x, w = torch.randn(6, width, generator=generator), torch.randn(5, width, generator=generator)
    x[:, 0] *= 100
    w[:, -1] = 0
    scales = balancing_scales(x.abs().amax(dim=0), w.abs().amax(dim=0))
    assert scales.isfinite().all()
    assert scales[-1] == 1
    assert torch.allclose((x / scales).double() @ (w * scales).double().T, x.double() @ w.double().T, atol=1e-3)
    used = slice(0, width - 1)
    assert torch.allclose((x / scales).abs().amax(dim=0)[used], (w * scales).abs().amax(dim=0)[used], rtol=1e-4)


@given(st.integers(1, 20), st.integers(1, 20), st.integers(1, 24), st.integers(0, 2**31))
def test_a_low_rank_branch_and_its_residual_are_the_weight(outer, inner, rank, seed):
    w = torch.randn(outer, inner, generator=torch.Generator().manual_seed(seed))
    up, down, residual = low_rank(w, rank)
    assert torch.allclose(up @ down + residual, w, atol=1e-5)
    assert (up.shape[1], down.shape[0]) == (min(rank, outer, inner),) * 2
    best = torch.linalg.svdvals(w)[rank:].square().sum().sqrt()
    assert abs(float(residual.norm() - best)) < 1e-4


def test_additions_to_a_scheme():
    (scheme,) = recipe_of("nvfp4+rank16+rotation").schemes
    assert (scheme.weight, scheme.rotation, scheme.rank) == ("nvfp4", True, 16)
    assert [s.rotation for s in recipe_of("dmpq+rotation").schemes] == [True, True]
    with pytest.raises(OptionError, match="'spin' cannot be added, valid: balance, inverse, online, rank32, rotation"):
        recipe_of("w8a8+spin")
    with pytest.raises(OptionError, match="did you mean 'w8a8'"):
        recipe_of("w8a9")
