"""Couplings of low rank: feasible always, between the exact plan and a⊗b, no worse than POT's; projections, batches, derivatives."""

import math
import warnings
from dataclasses import replace

import numpy as np
import ot
import pytest
import torch

from gpu_ot import Cosine, Dot, Euclidean, Matrix, Problem, ProblemError, SqEuclidean, low_rank, solve
from gpu_ot.low_rank import LowRankPlan
from gpu_ot.solver.factors import FIRST, project
from problems import close, clouds, differences, leaves, rand, randn, weights


def moons(n, m, d=2, batch=()):
    """Clouds of different shapes, and weights: three empty atoms among the first."""
    x, y = clouds(n, m, d, batch)
    return x, 1.0 + y * torch.linspace(0.5, 2, d, dtype=x.dtype), weights(n, batch, empty=3), weights(m, batch)


def exact(x, y, a, b):
    return ot.emd2(a.numpy(), b.numpy(), torch.cdist(x, y).square().numpy())


def off(plan, a, b):
    """L1 errors of the marginals of Q and R, and of the coupling."""
    found = (*plan.marginals, plan.Q.sum(-1), plan.R.sum(-1), plan.R.sum(-2))
    return max(float((z - w).abs().sum(-1).max()) for z, w in zip(found, (a, b, a, b, plan.g), strict=True))


@pytest.mark.parametrize("n, m, d, rank", [(61, 53, 2, 7), (90, 110, 5, 12)])
def test_it_lies_between_the_exact_plan_and_the_product_and_is_no_worse_than_pots(n, m, d, rank):
    x, y, a, b = moons(n, m, d)
    found = low_rank(SqEuclidean(x, y), rank, a, b)
    assert found.converged and off(found.plan, a, b) < 1e-9
    C, P = SqEuclidean(x, y).dense(), found.plan.to_dense()
    close(found.sharp_cost, (C * P).sum(), rtol=1e-12)
    least, most = exact(x, y, a, b), float(a @ C @ b)
    assert least < found.sharp_cost < least + 0.3 * (most - least)
    keep = a > 0  # POT takes no empty atoms
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        Q, R, g = ot.lowrank.lowrank_sinkhorn(*(z.numpy() for z in (x[keep], y, a[keep], b)), reg=0, rank=rank)
    assert found.sharp_cost < ((Q / g) @ R.T * C[keep].numpy()).sum()


def test_the_gap_closes_with_the_rank():
    """Of what a⊗b pays above the exact plan, the parts that couplings of rank 1, 2, 4, 16 and n still pay."""
    x, y = moons(48, 48)[:2]
    a = torch.full((48,), 1 / 48, dtype=x.dtype)
    least, most = exact(x, y, a, a), float(SqEuclidean(x, y).dense().mean())
    gaps = [(float(low_rank(SqEuclidean(x, y), r).sharp_cost) - least) / (most - least) for r in (1, 2, 4, 16, 48)]
    assert gaps == sorted(gaps, reverse=True) and gaps[0] == pytest.approx(1)
    assert gaps[2] < 0.35 and gaps[3] < 0.08 and gaps[4] < 0.05


def test_few_points_need_no_more_rank():
    """Between r points and many, the exact plan has rank r, and it is found."""
    x, y, a, b = rand(4, 2), rand(70, 2, seed=3) + 0.5, weights(4), weights(70)
    found = low_rank(SqEuclidean(x, y), 4, a, b, tol=1e-5, max_iter=2000)
    assert float(found.sharp_cost) == pytest.approx(exact(x, y, a, b), rel=1e-3)


def test_rank_one_is_the_product():
    x, y, a, b = moons(9, 7, 3)
    found = low_rank(SqEuclidean(x, y), 1, a, b)
    close(found.plan.to_dense(), a.unsqueeze(-1) * b, rtol=1e-12, atol=1e-15)
    close(found.value, a @ SqEuclidean(x, y).dense() @ b, rtol=1e-12)
    assert found.converged and found.n_iter == 1


def test_the_value_is_the_objective():
    x, y, a, b = moons(31, 29)
    a, b = 3 * a, 3 * b
    found = low_rank(SqEuclidean(x, y), 6, a, b, eps=0.2)
    plan = found.plan
    priors = a.unsqueeze(-1) / 6, b.unsqueeze(-1) / 6, torch.tensor(3 / 6, dtype=a.dtype)
    entropy = sum(torch.special.xlogy(z, z / p).nan_to_num().sum() for z, p in zip((plan.Q, plan.R, plan.g), priors, strict=True))
    close(found.value, found.sharp_cost + 0.2 * entropy, rtol=1e-10)
    close(plan.sum(), 3.0, rtol=1e-10)


@pytest.mark.parametrize("cost", [Dot, Cosine, lambda x, y: SqEuclidean(x, y) + 0.5 * Dot(x, y)], ids=["dot", "cosine", "sum"])
def test_whatever_folds(cost):
    x, y, a, b = moons(40, 30, 3)
    found = low_rank(cost(x, y), 5, a, b)
    assert off(found.plan, a, b) < 1e-9
    C = cost(x, y).dense()
    close(found.sharp_cost, (C * found.plan.to_dense()).sum(), rtol=1e-10, atol=1e-12)
    assert found.sharp_cost < a @ C @ b


@pytest.mark.parametrize("eps", [0.0, 0.1])
def test_batches_units_and_places(eps):
    """A batch is its problems; units and places change nothing; float32 gives the same clusters."""
    x, y, a, b = moons(35, 41, 3, (3,))
    options = dict(eps=eps, tol=1e-2)
    together = low_rank(SqEuclidean(x, y), 5, a, b, **options)
    assert off(together.plan, a, b) < 1e-9 and together.errors.shape == (together.n_iter, 3)
    further = low_rank(SqEuclidean(x, y), 5, a, b, start=together, eps=eps, tol=1e-3)
    for k in range(3):
        start = replace(together, plan=LowRankPlan(*(z[k] for z in (together.plan.Q, together.plan.R, together.plan.g))))
        alone = low_rank(SqEuclidean(x[k], y[k]), 5, a[k], b[k], start=start, eps=eps, tol=1e-3)
        close(alone.value, further.value[k], rtol=1e-7)
        assert further.value[k] <= together.value[k] and alone.n_iter <= further.n_iter
    one = low_rank(SqEuclidean(x[0], y[0]), 5, a[0], b[0], **options)
    for unit in (1e-6, 1e6):
        scaled = low_rank(SqEuclidean(unit * (x[0] + 50), unit * (y[0] + 50)), 5, a[0], b[0], eps=eps * unit**2, tol=1e-2)
        close(scaled.sharp_cost / unit**2, one.sharp_cost, rtol=1e-6)
    single = low_rank(SqEuclidean(x[0].float() + 100, y[0].float() + 100), 5, a[0].float(), b[0].float(), **options)
    assert single.value.dtype == single.plan.Q.dtype == torch.float32
    close(single.value, one.value, rtol=2e-3)


@pytest.mark.parametrize("batch", [(), (2, 2)])
def test_derivatives(batch):
    """Envelope: at a stationary coupling, the derivatives are those at the coupling as it is. Differences go on from it."""
    x, y, a, b = moons(14, 12, 2, batch)
    options = dict(eps=0.5, tol=1e-9, max_iter=3000)
    start = low_rank(SqEuclidean(x, y), 3, a, b, **options)
    assert start.converged.all()
    inputs = leaves(x, y, a, b)
    found = low_rank(SqEuclidean(*inputs[:2]), 3, *inputs[2:], start=start, **options)
    grads = torch.autograd.grad(found.value.sum(), inputs)
    move = [randn(*z.shape, seed=k) for k, z in enumerate(inputs)]
    move[2], move[3] = a * (move[2] - (a * move[2]).sum(-1, keepdim=True)), b * (move[3] - (b * move[3]).sum(-1, keepdim=True))
    for k in range(4):

        def value(z, k=k):
            args = [z[0] if j == k else w for j, w in enumerate((x, y, a, b))]
            return [low_rank(SqEuclidean(*args[:2]), 3, *args[2:], start=start, **options).value.sum()]

        (slope,) = differences(value, [((x, y, a, b)[k], move[k])], 1e-3)
        close((grads[k] * move[k]).sum(), slope, rtol=2e-6, atol=1e-7)
    # Of degree 1 in both weights together; b is brought to the mass of a.
    close((grads[2] * a).sum(), found.value.sum(), rtol=1e-6)
    close((grads[3] * b).sum(-1), torch.zeros(batch), atol=1e-6)


def dykstra(z, w, log_g, floor, rounds):
    """The projection as the paper has it, by turns in the log domain, until nothing moves."""
    h = [torch.zeros_like(log_g), torch.zeros_like(log_g)]
    for _ in range(rounds):
        f = [v.log() - (each + s).logsumexp(-1) for each, v, s in zip(z, w, h, strict=True)]
        c = [(each + shift.unsqueeze(-1)).logsumexp(-2) for each, shift in zip(z, f, strict=True)]
        level = ((log_g + c[0] + c[1]) / 3).clamp(min=floor)
        h, last = [level - each for each in c], h
        if all(map(torch.equal, h, last)):
            break
    return [(each + shift.unsqueeze(-1) + s).exp() for each, shift, s in zip(z, f, h, strict=True)], level.exp()


@pytest.mark.parametrize("least", [1e-10, 0.15])
@pytest.mark.parametrize("spread", [0.1, 3.0, 30.0])
def test_projections_are_dykstras(least, spread):
    z, w = (spread * randn(23, 6, seed=1), spread * randn(17, 6, seed=2)), (weights(23), weights(17))
    log_g, floor = randn(6, seed=3), math.log(least)
    found = project(tuple(q[None] for q in z), tuple(v[None] for v in w), log_g[None], floor, max_iter=FIRST)
    assert float(found.error) < 1e-10 and float(found.g.min()) > 0.999 * least
    truth, g = dykstra(z, w, log_g, floor, 20_000)
    for (_, p), v, Q in zip(found.sides, w, truth, strict=True):
        close(v.unsqueeze(-1) * p[0], Q, rtol=0, atol=1e-8)
    close(found.g[0], g, rtol=0, atol=1e-8)


def test_clusters_have_the_least_mass_asked_for():
    x, y, a, b = moons(50, 40)
    found = low_rank(SqEuclidean(x, y), 8, a, b, least=0.1)
    assert off(found.plan, a, b) < 1e-9 and float(found.plan.g.min()) > 0.1 - 1e-9


def test_the_plan_is_used_without_being_formed():
    x, y, a, b = moons(13, 11, 3)
    plan = low_rank(SqEuclidean(x, y), 4, a, b).plan
    P, v = plan.to_dense(), randn(11, 2)
    close(plan @ v, P @ v, rtol=1e-12)
    close(plan.T @ a, P.T @ a, rtol=1e-12)
    close(plan[2:5, 1], P[2:5, 1:2], rtol=1e-12)
    close(plan[-1], P[-1:], rtol=1e-12)
    close(plan.diagonal(), P.diagonal(), rtol=1e-12)
    close(plan.sum(0), P.sum(0), rtol=1e-12)
    assert plan.shape == (13, 11) and plan.T.shape == (11, 13) and "rank 4" in repr(plan)
    with pytest.raises(ProblemError, match="v has shape"):
        plan @ v[:5]
    with pytest.raises(ProblemError, match="dim"):
        plan.sum(2)


def test_few_and_no_points():
    """One point, one atom with mass, no problems in the batch, halves, and a point far away."""
    x, y = rand(1, 2), rand(9, 2, seed=1)
    close(low_rank(SqEuclidean(x, y), 1).value, SqEuclidean(x, y).dense().mean(), rtol=1e-12)
    a = torch.zeros(9, dtype=x.dtype)
    a[4] = 1
    found = low_rank(SqEuclidean(y, y + 1), 3, a)
    close(found.sharp_cost, SqEuclidean(y[4:5], y + 1).dense().mean(), rtol=1e-9)
    assert low_rank(SqEuclidean(rand(0, 8, 2), rand(0, 7, 2)), 3).value.shape == (0,)
    half = low_rank(SqEuclidean(y.half(), y.half() + 1), 3)
    assert half.converged and half.value.dtype == half.plan.dtype == torch.float16
    far = torch.cat((y, y[:1] + 1e7))
    found = low_rank(SqEuclidean(far, y), 3)
    assert found.value.isfinite() and off(found.plan, torch.full((10,), 0.1), torch.full((9,), 1 / 9)) < 1e-7


def test_points_in_one_place_and_equal_calls():
    x, y = torch.ones(6, 2), torch.zeros(5, 2)
    found = low_rank(SqEuclidean(x, y), 3)
    assert found.converged and float(found.value) == pytest.approx(2.0)
    x, y, a, b = moons(300, 280)
    first, second, other = (low_rank(SqEuclidean(x, y), 5, a, b, generator=g) for g in (None, None, torch.Generator().manual_seed(7)))
    assert torch.equal(first.plan.Q, second.plan.Q) and not torch.equal(first.plan.Q, other.plan.Q)


def test_of_several_starts_the_best_is_taken():
    x, y, a, b = moons(60, 50, 2, (3,))
    one, four = (low_rank(SqEuclidean(x, y), 6, a, b, starts=k, tol=1e-2).value for k in (1, 4))
    assert bool((four <= one + 1e-9).all()) and bool((four < one - 1e-4).any())


def test_running_out_is_a_status():
    x, y, a, b = moons(40, 40)
    found = low_rank(SqEuclidean(x, y), 6, a, b, max_iter=1, tol=1e-9)
    assert found.status.name == "max_iter" and not found.converged and found.n_iter == 1 and off(found.plan, a, b) < 1e-9
    assert "upper bound" in found.status.explanation
    found = low_rank(SqEuclidean(x, y), 6, a, b, inner_iter=1)
    assert found.status.name == "inexact" and "inner_iter" in found.status.explanation


def test_full_rank_with_entropy_is_above_the_entropic_plan():
    """<C, P> of any coupling is at least the optimum of entropic transport without its entropy's gain, which is 0 for a⊗b."""
    x, y, a, b = moons(30, 30)
    P = solve(Problem(SqEuclidean(x, y), 0.05, a, b), tol=1e-9)
    found = low_rank(SqEuclidean(x, y), 30, a, b)
    assert float(found.sharp_cost) > exact(x, y, a, b) and float(found.sharp_cost) < float(P.value)


X, Y = rand(6, 2), rand(5, 2)


@pytest.mark.parametrize(
    "given, words",
    [
        (dict(cost=Euclidean(X, Y)), "does not fold"),
        (dict(cost=rand(6, 5)), "does not fold"),
        (dict(cost=Matrix(rand(6, 5))), "does not fold"),
        (dict(cost="a cost"), "cost must be a tensor"),
        (dict(rank=0), "rank must be a whole number from 1 to min(n, m) = 5"),
        (dict(rank=6), "rank must be a whole number"),
        (dict(rank=2.5), "rank must be a whole number"),
        (dict(least=0.5), "at most 1 / rank = 0.333333"),
        (dict(least=0.0), "least must be > 0"),
        (dict(eps=-1.0), "eps must be a finite number >= 0"),
        (dict(eps=("std", 0.1)), "eps must be a finite number >= 0"),
        (dict(max_iter=0), "max_iter must be at least 1"),
        (dict(inner_iter=0), "inner_iter must be at least 1"),
        (dict(starts=0), "starts must be at least 1"),
        (dict(a=torch.ones(6), b=torch.ones(5)), "balanced transport moves every unit"),
        (dict(a=-torch.ones(6)), "a must hold finite weights"),
        (dict(cost=SqEuclidean(X * np.nan, Y)), "NaN"),
    ],
)
def test_bad_input_is_named(given, words):
    with pytest.raises(ProblemError) as refusal:
        low_rank(**{"cost": SqEuclidean(X, Y), "rank": 3, **given})
    assert words in str(refusal.value)


def test_starts_are_of_the_same_sizes():
    with pytest.raises(ProblemError, match=r"start\.plan\.Q has shape"):
        low_rank(SqEuclidean(X, Y), 3, start=low_rank(SqEuclidean(X, Y), 2))


def test_a_problem_that_is_stuck_leaves_the_others_alone(monkeypatch):
    """And its weights have the derivative at the step that was taken."""
    from gpu_ot.solver import factors

    x, y = (rand(2, n, 2, seed=n) for n in (12, 10))
    step = factors.Descent._step

    def stuck(self, old, *rest):
        new, found, *more = step(self, old, *rest)
        return new, found & torch.tensor([True, False])[: len(found)], *more

    alone = low_rank(SqEuclidean(x[0], y[0]), 3, eps=0.05, starts=1)
    monkeypatch.setattr(factors.Descent, "_step", stuck)
    both = low_rank(SqEuclidean(x, y), 3, eps=0.05, starts=1)
    assert both.status.name == "stalled" and both.converged.tolist() == [True, False]
    assert both.value.isfinite().all() and float(both.value[0]) == pytest.approx(float(alone.value), rel=1e-3)


def test_multipliers_belong_to_the_last_step_that_was_taken(monkeypatch):
    """Also where the descent was cut short, and would have gone on with a longer one."""
    from gpu_ot.solver import factors

    lengths, ends, step, run = [], [], factors.Descent._step, factors.Descent.run
    monkeypatch.setattr(factors.Descent, "_step", lambda self, *given: (lengths.append(found := step(self, *given)), found)[1])
    monkeypatch.setattr(factors.Descent, "run", lambda self, *given: (ends.append(end := run(self, *given)), end)[1])
    low_rank(SqEuclidean(rand(9, 2), rand(8, 2, seed=1)), 3, eps=0.2, starts=1, max_iter=4)
    assert len(ends[-1].slopes) == 4 and torch.equal(ends[-1].step, lengths[-1][2])
