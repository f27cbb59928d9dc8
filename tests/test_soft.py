"""Soft sorting: the hard functions for small eps, derivatives against differences, axes, units, bad input."""

import pytest
import torch

from gpu_ot import (
    KL,
    BackendError,
    Dot,
    Matrix,
    Problem,
    ProblemError,
    SqEuclidean,
    explain,
    soft_quantile,
    soft_rank,
    soft_sort,
    soft_topk,
    solve,
)  # fmt: skip
from gpu_ot.geometry.dense import Dense
from gpu_ot.geometry.select import bind
from problems import close, gradcheck, leaves, rand, randn

SHARP = 2e-5


@pytest.mark.parametrize("n", [1, 2, 7, 40])
def test_for_small_eps_they_are_the_hard_functions(n):
    x = rand(3, n)[:, torch.randperm(n, generator=torch.Generator().manual_seed(0))] + torch.arange(n)
    sharp = SHARP * (10 / max(n, 10)) ** 2
    close(soft_sort(x, eps=sharp), x.sort(-1).values, rtol=0, atol=0.05)
    close(soft_rank(x, eps=sharp), x.argsort(-1).argsort(-1).double(), rtol=0, atol=0.05)
    for q in (0.0, 0.3, 1.0):
        close(soft_quantile(x, q, eps=sharp), x.quantile(q, -1), rtol=0, atol=0.05)
    k = n // 2
    close(soft_topk(x, k, eps=1e-4), (x >= x.topk(max(k, 1)).values[..., -1:]).double() * (k > 0), rtol=0, atol=0.05)


def test_blur_keeps_sums_and_order():
    x = randn(4, 25)
    values, ranks = soft_sort(x, eps=0.05), soft_rank(x, eps=0.05)
    close(values.sum(-1), x.sum(-1), rtol=1e-5, atol=1e-5)
    close(ranks.sum(-1), torch.full((4,), 300.0, dtype=torch.float64), rtol=1e-5)
    assert (values.diff(dim=-1) > -1e-6).all() and (ranks.gather(-1, x.argsort(-1)).diff(dim=-1) > -1e-6).all()
    top = soft_topk(x, 6)
    assert (top >= 0).all() and (top <= 1 + 1e-6).all()
    close(top.sum(-1), torch.full((4,), 6.0, dtype=torch.float64), rtol=1e-5)


def test_neither_scale_nor_shift_matters():
    x = randn(9)
    close(soft_rank(1e6 * x + 1e9), soft_rank(x), rtol=0, atol=1e-5)
    close(soft_sort(1e-9 * x), 1e-9 * soft_sort(x), rtol=0, atol=1e-14)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_axes_and_types(dim):
    x = randn(4, 5, 3, dtype=torch.float32)
    for function in (soft_sort, soft_rank, lambda z, dim: soft_topk(z, 2, dim)):
        found = function(x, dim=dim)
        assert found.shape == x.shape and found.dtype == x.dtype
        close(found.movedim(dim, -1), function(x.movedim(dim, -1), dim=-1), rtol=0, atol=1e-6)
    assert soft_quantile(x, 0.5, dim).shape == x.quantile(0.5, dim).shape
    assert soft_quantile(x, torch.tensor([0.1, 0.5]), dim).shape[dim] == 2


@pytest.mark.parametrize("eps", [1e-4, 1e-3, 0.1])
def test_many_values_are_swept_along_the_line(monkeypatch, eps):
    """The same numbers and derivatives as between arrays: of a batch, with values that coincide and one far from the others."""
    x = randn(2, 301)
    x[0, :40] = 0.3
    if eps > 1e-4:  # there the derivative between arrays, the truth here, is NaN
        x[1, 7] = 40.0
    w, found = torch.linspace(0, 1, 301, dtype=torch.float64), []
    for many in (2, 10**9):
        monkeypatch.setattr("gpu_ot.soft.MANY", many)
        (z,) = leaves(x)
        values, ranks = soft_sort(z, eps=eps, tol=1e-10), soft_rank(z, eps=eps, tol=1e-10)
        found.append((values, ranks, *torch.autograd.grad((values * w).sum() + (ranks * w).sum() / 300, z)))
    for ours, truth in zip(*found, strict=True):
        close(ours, truth, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("eps", [1e-8, 1e-5, 1e-3, 1e-1, 10.0])
@pytest.mark.parametrize("offset", [0.0, 1e3])
@pytest.mark.parametrize("rough", [False, True])
def test_sums_on_the_line_are_those_of_the_matrix(eps, offset, rough):
    """Potentials of a plan, and others so rough that a point's sum comes from far away; empty atoms; signed products."""
    x, y, v = rand(113, 1, seed=1) + offset, rand(97, 1, seed=2) + offset, randn(97, 3)
    h = 0.3 * rand(97) if rough else eps * randn(97)
    h[::7] = -torch.inf
    problem = Problem(SqEuclidean(x, y), eps)
    C = problem.cost.dense()
    truth, line = Dense(Matrix(C)), bind(problem, "line")
    digits = 1e-15 * max(1.0, offset) * 10 / eps + 1e-13
    k = truth.softmin(h, eps)
    close(line.softmin(h, eps) / eps, k / eps, rtol=digits, atol=digits)
    close(line.apply(k, h, eps, v), truth.apply(k, h, eps, v), rtol=0, atol=10 * digits)


def test_the_line_serves_a_whole_solve():
    """Plans, values and all derivatives of another cost of one feature, relaxed, with weights and without some."""
    x, y, a, b = leaves(randn(23, 1, seed=1), randn(31, 1, seed=2), rand(23) + 0.1, torch.cat((torch.zeros(3), torch.rand(28))).double())
    found = []
    for backend in ("line", "dense"):
        for cost in (SqEuclidean, Dot):
            solution = solve(Problem(cost(x, y), 0.3, a, b, KL(2.0)), tol=1e-11, backend=backend, grad="implicit")
            moment = solution.value + solution.sharp_cost + (solution.plan.T @ x).square().sum() + solution.transport().sum()
            found.append((solution.f, solution.plan.to_dense(), moment, *torch.autograd.grad(moment, (x, y, a, b))))
    for ours, truth in zip((*found[0], *found[1]), (*found[2], *found[3]), strict=True):
        close(ours, truth, rtol=1e-7, atol=1e-8)
    with pytest.raises(BackendError, match="3 features"):
        solve(Problem(SqEuclidean(randn(5, 3), randn(4, 3)), 0.3), backend="line")
    assert "line" in explain(Problem(SqEuclidean(rand(7000, 1), rand(7000, 1)), 0.01)).splitlines()[0]


def test_equal_values_share_their_ranks():
    close(soft_rank(torch.full((5,), 3.0)), torch.full((5,), 2.0), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [soft_sort, soft_rank, lambda x, **o: soft_quantile(x, 0.3, **o), lambda x, **o: soft_topk(x, 2, **o)],
    ids=["s", "r", "q", "k"],
)
def test_derivatives(function):
    (x,) = leaves(randn(2, 5))
    assert gradcheck(lambda x: function(x, eps=0.1, tol=1e-11), (x,), fast_mode=True)


def test_second_derivatives():
    (x,) = leaves(randn(4))
    assert torch.autograd.gradgradcheck(lambda x: soft_rank(x, eps=0.1, tol=1e-11), (x,), nondet_tol=1e-9)


@pytest.mark.parametrize("k", [0, 3])
def test_none_and_all_of_them(k):
    (x,) = leaves(randn(3))
    found = soft_topk(x, k)
    assert (found == float(k > 0)).all() and not torch.autograd.grad(found.sum(), x)[0].any()


@pytest.mark.parametrize(
    "call, words",
    [
        (lambda: soft_sort([1.0]), "x must be a tensor"),
        (lambda: soft_sort(torch.tensor([1])), "pass x.float()"),
        (lambda: soft_sort(torch.rand(3, 0)), "x has shape (3, 0)"),
        (lambda: soft_rank(torch.rand(3), 1), "x has shape (3,)"),
        (lambda: soft_rank(torch.tensor([0.0, torch.nan])), "x holds NaN"),
        (lambda: soft_rank(torch.rand(3), eps=0.0), "eps must be a finite number > 0"),
        (lambda: soft_quantile(torch.rand(3), 1.5), "q must be a number in [0, 1]"),
        (lambda: soft_topk(torch.rand(3), 4), "k must be a whole number between 0 and the 3 values"),
    ],
)
def test_bad_input_is_named(call, words):
    with pytest.raises(ProblemError) as refusal:
        call()
    assert words in str(refusal.value)


@pytest.mark.parametrize("eps", [1e-3, 1e-5, 1e-8])
def test_sums_along_a_line_of_points_in_float32(eps):
    """Their squares cancel, and cells far off are not looked at."""
    x, y = (rand(n, 1, seed=n, dtype=torch.float32) for n in (900, 700))
    h = randn(3, 700) * eps
    h[1, ::3], h[2] = -torch.inf, -torch.inf
    h[2, 400] = 1.0  # one atom is all there is, wherever it lies
    found = bind(Problem(SqEuclidean(x, y), eps), "line").softmin(h, eps)
    truth = Dense(SqEuclidean(x.double(), y.double())).softmin(h, eps)
    close(found / eps, truth / eps, rtol=1e-13, atol=1e-11 + 1e-15 / eps)
