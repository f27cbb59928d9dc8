"""Relaxed marginals: the same loop, held to POT, to duality and to each other's limits."""

from __future__ import annotations

import math

import ot
import pytest
import torch

import gpu_ot
from gpu_ot import KL, TV
from gpu_ot.problem import Problem

TIGHT = dict(tol=1e-13, max_iter=5000)


@pytest.mark.parametrize("backend", ["dense", "softmin"])
@pytest.mark.parametrize("taus", [(0.5, 0.5), (0.2, 3.0), (math.inf, 0.3)])
def test_kl_is_pots_unbalanced_plan(problem, backend, taus):
    a, b, M = problem(20, 25)
    b = 1.7 * b  # masses may differ
    ours = gpu_ot.solve(Problem(M, 0.05, a, b, (KL(taus[0]), KL(taus[1]))), backend=backend, **TIGHT).plan.to_dense()
    theirs = ot.unbalanced.sinkhorn_unbalanced(a, b, M, 0.05, list(taus), numItermax=20000, stopThr=1e-14)
    torch.testing.assert_close(ours, theirs, rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("penalty", [KL(), KL(0.3), KL(30.0), TV(0.2), (KL(), TV(0.1))], ids=str)
@pytest.mark.parametrize("backend", ["dense", "softmin"])
def test_primal_and_dual_meet(problem, penalty, backend):
    """No gap between <P, C> + eps KL(P | a⊗b) + penalties and the dual value: neither can be wrong alone."""
    a, b, M = problem(15, 18)
    eps = 0.05
    solution = gpu_ot.solve(Problem(M, eps, a, b, penalty), backend=backend, **TIGHT)
    P, ab = solution.plan.to_dense(), a.unsqueeze(-1) * b

    def kl(p, q):
        return (p * (p / q).log()).sum() - p.sum() + q.sum()

    def price(p, q, held):
        if held.balanced:
            return torch.zeros(())
        return held.tau * (kl(p, q) if isinstance(held, KL) else (p - q).abs().sum())

    held_a, held_b = solution.problem.penalties
    primal = (P * M).sum() + eps * kl(P, ab) + price(P.sum(1), a, held_a) + price(P.sum(0), b, held_b)
    assert abs(float(primal - solution.value)) <= 1e-11


def test_a_dear_penalty_is_a_constraint(problem):
    a, b, M = problem(10, 12)
    hard = gpu_ot.solve(Problem(M, 0.05, a, b), **TIGHT)
    dear = gpu_ot.solve(Problem(M, 0.05, a, b, KL(1e5)), tol=1e-8, max_iter=10_000)
    torch.testing.assert_close(dear.plan.to_dense(), hard.plan.to_dense(), rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize("penalty", [KL, TV])
def test_a_penalty_of_nothing_is_refused(penalty):
    with pytest.raises(gpu_ot.ProblemError, match="tau must be > 0"):
        penalty(0.0)
