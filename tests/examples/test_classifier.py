"""The Fréchet distance of two sets of features."""

import pytest
import torch
from scipy.linalg import sqrtm

from classifier import frechet_distance


def with_moments(mean, std):
    """Returns features (2·K, K) with exactly this mean and a diagonal covariance."""
    size = len(mean)
    cross = torch.cat([torch.eye(size), -torch.eye(size)]).double() * ((2 * size - 1) / 2) ** 0.5
    return torch.tensor(mean) + cross * torch.tensor(std)


def test_diagonal_covariances_have_a_closed_form():
    a, b = with_moments([0.0, 1.0, -2.0], [1.0, 2.0, 0.5]), with_moments([1.0, 1.0, 2.0], [3.0, 2.0, 1.5])
    closed = (1.0 + 16.0) + ((1.0 - 3.0) ** 2 + (0.5 - 1.5) ** 2)
    assert frechet_distance(a, b) == pytest.approx(closed, rel=1e-6)


def test_covariances_that_do_not_commute():
    generator = torch.Generator().manual_seed(0)
    a, b = (
        torch.randn(n, 8, generator=generator).double() @ torch.randn(8, 8, generator=generator).double()
        for n in (50, 70)
    )
    root = torch.from_numpy(sqrtm((a.T.cov() @ b.T.cov()).numpy()).real)
    formula = (a.mean(0) - b.mean(0)).square().sum() + (a.T.cov() + b.T.cov() - 2 * root).trace()
    assert frechet_distance(a, b) == pytest.approx(formula.item(), rel=1e-9)


def test_a_set_has_no_distance_to_itself_even_with_dead_features():
    a = torch.randn(100, 8, generator=torch.Generator().manual_seed(0))
    a[:, 3:5] = 0
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-10)
    assert frechet_distance(a, 2 * a) == pytest.approx(frechet_distance(2 * a, a))


def test_samples_of_one_distribution_come_closer_the_more_there_are():
    generator = torch.Generator().manual_seed(0)
    distances = [frechet_distance(*torch.randn(2, n, 16, generator=generator)) for n in (30, 300, 3000)]
    assert distances == sorted(distances, reverse=True)
    assert distances[-1] < 0.1
