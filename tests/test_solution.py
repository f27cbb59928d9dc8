"""What a solution can be asked: maps and potentials at new points, numbers of its plan, and pairs drawn from it."""

import math

import pytest
import torch
from scipy import stats

import gpu_ot
from conformance import COSTS
from gpu_ot import KL, TV, Matrix, Problem, ProblemError, SqEuclidean
from gpu_ot.costs import base as costs
from gpu_ot.solution import plan as plans
from gpu_ot.solution import solution
from problems import generator, measures, pairwise, rand, randn, weights

EPS = 0.05

NAMES = ("squared", "dot", "euclidean", "formula", "mixed sum")
PENALTIES = {"balanced": KL(), "kl": KL(0.5), "semi": (KL(), KL(0.2)), "tv": TV(0.3)}


def clouds(n=23, m=31, batch=(), seed=0):
    return measures(n, m, 2, batch, shift=0.1, seed=seed)[:2]


def solved(name="squared", penalty="balanced", batch=(), eps=EPS, weighted=None):
    """Weights of mass 1.5, some of them 0 on each side."""
    a, b = (1.5 * weights(n, batch if weighted is None else weighted, empty=3) for n in (23, 31))
    return gpu_ot.solve(Problem(COSTS[name][0](*clouds(batch=batch)), eps, a, b, PENALTIES[penalty]), backend="softmin", tol=1e-12)


def dense_plan(found):
    """P written out, in float64."""
    problem = found.problem
    exponent = (found.f.unsqueeze(-1) + found.g.unsqueeze(-2) - problem.cost.dense().double()) / problem.eps
    P = problem.a.unsqueeze(-1) * problem.b.unsqueeze(-2) * exponent.exp()
    return P.nan_to_num(nan=0.0)


# ---- new points -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, penalty, batch", pairwise(NAMES, PENALTIES, [(), (2,)]))
def test_potentials_as_functions_meet_the_potentials_at_their_own_points(name, penalty, batch, monkeypatch):
    found = solved(name, penalty, batch)
    for block in (costs.BLOCK, 100):  # 100: a few rows at a time
        monkeypatch.setattr(costs, "BLOCK", block)
        x, y = (z.clone() for z in found.problem.cost.points)
        torch.testing.assert_close(found.potential_a(x), found.f, rtol=0, atol=1e-9)
        there = found.problem.b > 0  # an accelerated loop moves g where there is mass
        torch.testing.assert_close(found.potential_b(y)[there], found.g[there], rtol=0, atol=1e-9)


@pytest.mark.parametrize("name, batch", pairwise(NAMES, [(), (2,)]))
def test_the_map_of_new_points_meets_the_map_at_the_old_ones(name, batch, monkeypatch):
    found = solved(name, "kl", batch)
    x, y = found.problem.cost.points
    P = dense_plan(found)
    there = found.problem.a > 0
    expected = (P @ y / P.sum(-1, keepdim=True))[there]
    torch.testing.assert_close(found.transport()[there], expected, rtol=0, atol=1e-10)
    for block in (costs.BLOCK, 100):
        monkeypatch.setattr(costs, "BLOCK", block)
        torch.testing.assert_close(found.transport(x.clone())[there], expected, rtol=0, atol=1e-10)
        torch.testing.assert_close(found.transport(x[..., 4:6, :]), found.transport()[..., 4:6, :], rtol=0, atol=1e-10)


def test_the_map_of_a_translation_is_the_translation():
    """For |x - y|^2 and y = x + t the exact map is the translation, and the entropic one is off by no more than the blur."""
    x, new = randn(2000, 2), 0.5 * randn(50, 2, seed=1)
    t = torch.tensor([3.0, -1.0], dtype=torch.float64)
    found = gpu_ot.solve(Problem(SqEuclidean(x, x + t), 0.05), tol=1e-6)
    assert (found.transport(new) - new - t).norm(dim=-1).mean() < 0.05


def test_gradients_of_the_potential_give_the_map():
    """For |x - y|^2:  grad f(x) = 2 (x - T(x)), the entropic Brenier map."""
    found = solved()
    x = clouds(seed=7)[0].requires_grad_()
    (grad,) = torch.autograd.grad(found.potential_a(x).sum(), x)
    torch.testing.assert_close(x - grad / 2, found.transport(x).detach(), rtol=0, atol=1e-10)


def test_anything_can_be_carried_over():
    found = solved("matrix")
    labels = torch.eye(31, dtype=torch.float64)[:, :4]
    P = dense_plan(found)
    there = found.problem.a > 0
    torch.testing.assert_close(found.transport(y=labels)[there], (P @ labels / P.sum(-1, keepdim=True))[there], rtol=0, atol=1e-12)
    with pytest.raises(ProblemError, match=r"y has shape \(30, 4\), expected \(\*batch, 31, c\)"):
        found.transport(y=labels[:30])
    for ask in (lambda: found.transport(), lambda: found.transport(torch.rand(3, 2), labels), lambda: found.potential_a(torch.rand(3, 2))):
        with pytest.raises(ProblemError, match="Matrix has no points"):
            ask()


def test_a_point_that_may_go_nowhere_has_no_image():
    M = torch.tensor([[0.0, 1.0], [math.inf, math.inf], [1.0, 0.0]], dtype=torch.float64)
    a = torch.tensor([0.5, 0.0, 0.5], dtype=torch.float64)
    found = gpu_ot.solve(Problem(M, 0.1, a))
    image = found.transport(y=torch.tensor([[1.0], [2.0]], dtype=torch.float64))
    assert image[[0, 2]].isfinite().all()
    assert found.sharp_cost.isfinite() and found.normalized_entropy.isfinite()


def test_potentials_extend_to_other_problems():
    found = solved()
    x, _ = found.problem.cost.points
    x_new, y_new = clouds(40, 20, seed=9)
    torch.testing.assert_close(found.potential_a(SqEuclidean(x_new, y_new)), found.potential_a(x_new))
    torch.testing.assert_close(found.potential_b(SqEuclidean(x_new, y_new)), found.potential_b(y_new))
    torch.testing.assert_close(found.potential_a(SqEuclidean(x, y_new)), found.f)
    torch.testing.assert_close(found.potential_a(Matrix(torch.rand(23, 8))), found.f)
    with pytest.raises(ProblemError, match=r"23 rows like the old, found 24"):
        found.potential_a(Matrix(torch.rand(24, 8)))
    with pytest.raises(ProblemError, match=r"x has shape \(5, 3\)"):
        found.potential_a(torch.rand(5, 3))


# ---- numbers of the plan ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, penalty, batch, large", pairwise((*NAMES, "matrix"), PENALTIES, [(), (2, 2)], [solution.LARGE, 0]))
def test_numbers_are_those_of_the_written_plan(name, penalty, batch, large, monkeypatch):
    monkeypatch.setattr(solution, "LARGE", large)
    monkeypatch.setattr(costs, "BLOCK", 300)
    found = solved(name, penalty, batch)
    P, C = dense_plan(found), found.problem.cost.dense()
    torch.testing.assert_close(found.sharp_cost, (P * C).sum((-1, -2)), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(found.transport_mass, P.sum((-1, -2)), rtol=1e-10, atol=0)

    Q = P / P.sum((-1, -2), keepdim=True)
    entropy = lambda p, dims: -torch.special.xlogy(p, p).sum(dims)  # noqa: E731
    H_a, H_b = entropy(Q.sum(-1), -1), entropy(Q.sum(-2), -1)
    expected = 1 - (H_a + H_b - entropy(Q, (-1, -2))) / torch.minimum(H_a, H_b)
    torch.testing.assert_close(found.normalized_entropy, expected, rtol=0, atol=1e-9)
    assert not found.sharp_cost.requires_grad


def test_forbidden_pairs_cost_nothing():
    M = clouds()[0] @ clouds()[1].mT
    M[2, 4] = M[7, :20] = math.inf
    found = gpu_ot.solve(Problem(M, EPS), tol=1e-9)
    P = dense_plan(found)
    torch.testing.assert_close(found.sharp_cost, torch.where(P > 0, P * M, 0.0).sum(), rtol=1e-10, atol=0)


def test_normalized_entropy_runs_from_a_matching_to_independence():
    x = torch.arange(20, dtype=torch.float64).unsqueeze(-1)
    sharp, blurred = (gpu_ot.solve(Problem(SqEuclidean(x, x + 0.1), eps), tol=1e-10) for eps in (1e-2, 1e7))
    assert abs(float(sharp.normalized_entropy)) < 1e-9 and abs(float(blurred.normalized_entropy) - 1) < 1e-4
    assert float(gpu_ot.solve(Problem(SqEuclidean(x[:1], x), 0.1)).normalized_entropy) == 1.0
    sizes = [float(gpu_ot.solve(Problem(SqEuclidean(x, x), eps), tol=1e-10).normalized_entropy) for eps in (0.1, 1, 10, 100)]
    assert sizes == sorted(sizes)


def test_numbers_come_in_the_problems_type():
    found = gpu_ot.solve(Problem(SqEuclidean(*(z.float() for z in clouds())), EPS))
    assert {found.sharp_cost.dtype, found.transport_mass.dtype, found.normalized_entropy.dtype, found.transport().dtype} == {torch.float32}


# ---- the plan ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, batch", pairwise((*NAMES, "matrix"), [(), (2,)]))
def test_views_of_the_plan(name, batch):
    found = solved(name, "kl", batch)
    plan, P = found.plan, dense_plan(found)
    assert plan.shape == P.shape and plan.T.shape == P.mT.shape and plan.ndim == P.ndim
    close = dict(rtol=1e-9, atol=1e-14)
    for dim in (-1, -2, P.ndim - 1, P.ndim - 2):
        torch.testing.assert_close(plan.sum(dim), P.sum(dim), **close)
        torch.testing.assert_close(plan.T.sum(dim), P.mT.sum(dim), **close)
    torch.testing.assert_close(plan.sum(), P.sum(), **close)
    torch.testing.assert_close(plan.diagonal(), P.diagonal(dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(plan.T.diagonal(), P.mT.diagonal(dim1=-2, dim2=-1), **close)
    torch.testing.assert_close(plan.T.T.to_dense(), P, **close)
    torch.testing.assert_close(plan @ rand(*batch, 31, 2), P @ rand(*batch, 31, 2), **close)
    torch.testing.assert_close(plan.marginals, (P.sum(-1), P.sum(-2)), **close)
    with pytest.raises(ProblemError, match="dim = 5 is not known"):
        plan.sum(5)


def test_diagonals_longer_than_a_block():
    x, y = clouds(200, 150)
    found = gpu_ot.solve(Problem(SqEuclidean(x, y), 0.5))
    torch.testing.assert_close(found.plan.diagonal(), dense_plan(found).diagonal(), rtol=1e-9, atol=0)


def chi_square(pairs, P):
    """The p-value of the counts of `pairs` under P, cells of small expectation taken together."""
    rows, columns = pairs
    n, m = P.shape
    counts = torch.bincount(rows * m + columns, minlength=n * m).double()
    expected = (P / P.sum()).flatten() * len(rows)
    assert (counts[expected == 0] == 0).all()
    rare = expected < 10
    seen, due = (torch.cat([z[~rare], z[rare].sum().reshape(1)]) for z in (counts, expected))
    keep = due > 0
    return stats.chisquare(seen[keep].numpy(), (due[keep] * seen.sum() / due.sum()).numpy()).pvalue


@pytest.mark.parametrize("name, penalty, flipped", pairwise(["squared", "formula", "matrix"], ["balanced", "kl"], [False, True]))
def test_pairs_are_drawn_in_proportion_to_the_plan(name, penalty, flipped, monkeypatch):
    monkeypatch.setattr(plans, "BLOCK", 2**15)  # blocks of draws
    monkeypatch.setattr(plans, "WIDTH", 7)  # and of columns
    found = solved(name, penalty)
    plan, P = (found.plan.T, dense_plan(found).mT) if flipped else (found.plan, dense_plan(found))
    pairs = plan.sample(40_000, generator(3))
    assert all(z.shape == (40_000,) and z.dtype == torch.int64 for z in pairs)
    assert 1e-3 < chi_square(pairs, P) < 1 - 1e-6
    assert all((z >= 3).all() for z in pairs)  # the first three atoms of each side are empty
    columns = plan.sample_columns(torch.full((30_000,), 7), generator(6))
    assert chi_square((torch.zeros_like(columns), columns), P[7:8]) > 1e-3


def test_the_test_of_proportions_can_fail():
    found = solved()
    pairs = found.plan.sample(40_000, generator(3))
    assert chi_square(pairs, dense_plan(solved(eps=1.3 * EPS))) < 1e-3


@pytest.mark.parametrize("name, batch", [("squared", (2, 2)), ("matrix", (2, 2)), ("squared", ())])
def test_each_problem_of_a_batch_has_its_own_pairs(name, batch):
    """And so has each of several histograms over one cost."""
    found = solved(name, batch=batch, weighted=(2, 2))
    rows, columns = found.plan.sample(20_000, generator(4))
    assert rows.shape == columns.shape == (2, 2, 20_000)
    for k in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert chi_square((rows[k], columns[k]), dense_plan(found)[k]) > 1e-3


def test_draws_repeat_with_their_generator():
    plan = solved().plan
    first, again, other = (plan.sample(50, generator(seed)) for seed in (1, 1, 2))
    assert all(torch.equal(*pair) for pair in zip(first, again, strict=True)) and not torch.equal(first[0], other[0])


def test_rows_without_a_partner_draw_none():
    M = torch.tensor([[0.0, 1.0], [math.inf, math.inf]], dtype=torch.float64)
    plan = gpu_ot.Plan(None, torch.zeros(2), torch.zeros(2), 1.0, torch.float64, Matrix(M))
    assert plan.sample_columns(torch.tensor([0, 1, 1]))[1:].tolist() == [-1, -1]
    with pytest.raises(ProblemError, match="made without its cost"):
        gpu_ot.Plan(None, torch.zeros(2), torch.zeros(2), 1.0, torch.float64).diagonal()


@pytest.mark.parametrize("u", [0.0, 1 - 2**-53, 1.0])
def test_the_ends_of_the_draw_fall_on_rows_with_mass(u, monkeypatch):
    a = torch.tensor([0.0, 0.3, 0.0, 0.7, 0.0], dtype=torch.float64)
    plan = gpu_ot.solve(Problem(torch.rand(5, 4, dtype=torch.float64), 0.1, a)).plan
    monkeypatch.setattr(torch, "rand", lambda *shape, dtype, device, generator: torch.full(shape, u, dtype=dtype))
    assert plan.sample(3)[0].tolist() == [1 if u == 0 else 3] * 3


def test_one_row_holding_nearly_all_the_mass_is_drawn_in_range():
    """Running totals that no longer grow, and draws that round up to them."""
    a = torch.tensor([1.0, 1e-30, 0.0], dtype=torch.float64)
    found = gpu_ot.solve(Problem(torch.rand(3, 4, dtype=torch.float64), 0.1, a))
    rows, columns = found.plan.sample(1000, generator(0))
    assert (rows == 0).all() and (columns >= 0).all() and (columns < 4).all()


def test_nothing_carries_a_gradient():
    x, y = (z.requires_grad_() for z in clouds())
    found = gpu_ot.solve(Problem(SqEuclidean(x, y), EPS))
    assert found.value.requires_grad
    outputs = [found.sharp_cost, found.transport_mass, found.normalized_entropy, found.transport(), found.transport(x.detach())]
    outputs += [found.potential_a(x.detach()), found.potential_b(y.detach()), found.plan.diagonal(), found.plan.sum(-1), found.plan @ y]
    assert not any(z.requires_grad for z in outputs)
    assert found.transport(clouds(seed=4)[0].requires_grad_()).requires_grad
