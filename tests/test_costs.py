"""Costs: the matrix, its folded form, sums, and the digits both keep."""

from __future__ import annotations

import pytest
import torch

from gpu_ot import Cosine, Dot, Euclidean, Formula, ProblemError, SqEuclidean


def clouds(n=7, m=9, d=3, batch=(), offset=0.0, dtype=torch.float64):
    gen = torch.Generator().manual_seed(0)
    x, y = (torch.randn(*batch, k, d, generator=gen, dtype=torch.float64) + offset for k in (n, m))
    return x.to(dtype), y.to(dtype)


COSTS = {
    "squared": SqEuclidean,
    "dot": Dot,
    "cosine": Cosine,
    "sum": lambda x, y: 0.3 * SqEuclidean(x, y) + 2 * Cosine(x, y) + Dot(x, y) * 0.1,
}


@pytest.mark.parametrize("name", COSTS)
@pytest.mark.parametrize("batch", [(), (2, 3)])
def test_the_folded_form_is_the_cost(name, batch):
    cost = COSTS[name](*clouds(batch=batch))
    alpha, beta, u, v = cost.fold()
    torch.testing.assert_close(alpha.unsqueeze(-1) + beta.unsqueeze(-2) - u @ v.mT, cost.dense())
    assert cost.dense().shape == cost.shape == (*batch, 7, 9)


def test_formulas_see_arrays_that_broadcast():
    x, y = clouds()
    torch.testing.assert_close(Formula(lambda x, y: (x - y).abs().sum(-1), x, y).dense(), torch.cdist(x, y, p=1))
    assert Formula(lambda x, y: (x - y).abs().sum(-1), x, y).fold() is None
    assert (SqEuclidean(x, y) + Euclidean(x, y)).fold() is None


def test_far_off_centre_clouds_keep_their_digits():
    x, y = clouds(offset=1000.0, dtype=torch.float32)
    truth = torch.cdist(x.double(), y.double()).square()
    alpha, beta, u, v = SqEuclidean(x, y).fold()
    for C in (SqEuclidean(x, y).dense(), alpha.unsqueeze(-1) + beta - u @ v.mT):
        assert (C - truth).abs().max() <= 1e-5 * truth.max()


def test_gradients_at_coincident_points_are_zero():
    x = torch.zeros(2, 3, requires_grad=True)
    for cost in (SqEuclidean, Euclidean):
        (grad,) = torch.autograd.grad(cost(x, torch.zeros(2, 3)).dense().sum(), x)
        assert (grad == 0).all()


def test_a_point_at_the_origin_has_no_direction():
    assert (Cosine(torch.zeros(1, 3), torch.rand(4, 3)).dense() == 1).all()


def test_terms_must_be_over_the_same_pairs():
    x, y = clouds()
    with pytest.raises(ProblemError, match=r"\(7, 8\).*\(7, 9\)"):
        SqEuclidean(x, y) + SqEuclidean(x, y[:8])
