"""Unbalanced Gromov-Wasserstein: marginals at a price, which is of pairs of points, as the distortion is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..costs import Cost
from ..penalties import KL
from ..problem import Problem
from ..solve import find
from ..solver.criterion import Marginal
from ..solver.status import DIVERGED, Status
from ..solver.step import Start
from .loop import INNER, LOOSEST, MOVING, SETTLED
from .result import Gromov
from .spaces import Matrices

VANISHED = Status(
    "diverged",
    "The mass of the plan has vanished: no pair of pairs is worth its distortion at this price. Raise tau, in units of the loss.",
)


def relaxed(
    spaces: Matrices, features: Cost | None, alpha: float, eps: float, a: Tensor | None, b: Tensor | None, tau: float,
    start: Tensor | None, tol: float, max_iter: int, settings: dict[str, Any], on_check: Callable[[int, Tensor], None] | None,
) -> Gromov:  # fmt: skip
    """A stationary plan P of alpha <L⊗P, P> + (1 - alpha) <M, P> + tau KL⊗(P1 | a) + tau KL⊗(P^T 1 | b) + eps KL⊗(P | a⊗b), for
    KL⊗(p | q) = KL(p⊗p | q⊗q).

    With the second factor of every product held at a plan Q of mass q, the objective is q times that of the transport problem with costs

        (alpha L⊗Q + (1 - alpha) M / 2 + tau <Q1, log Q1/a> + tau <Q^T 1, log Q^T 1/b> + eps <Q, log Q/ab>) / q

    at eps and KL(tau): Séjourné, Vialard and Peyré 2021, arXiv:2009.04266, algorithm 1. Its plan P, scaled to the mass sqrt(|P| q), is the
    next Q.
    """
    if not 0 < tau < math.inf:
        raise errors.ProblemError(f"tau must be a price > 0, in units of the loss, found {tau}: leave it out for hard marginals.")
    blank = torch.zeros(spaces.shape, dtype=spaces.dtype, device=spaces.device)
    M = None if features is None else features.dense().to(spaces.dtype)
    given = Problem(blank, eps, a, b, KL(tau))
    weights = given.a.detach(), given.b.detach()
    history, n_inner, change, f, status, solution = [], 0, None, None, MOVING, None
    settled = torch.zeros((), dtype=torch.bool, device=spaces.device)
    with torch.no_grad():
        Q = _first(weights, start, spaces)
        costs = _costs(spaces, M, alpha, given.eps, tau, *weights, Q)
        for _ in range(max_iter):
            inner = min(INNER * max(tol, LOOSEST if change is None else float(change.amin())), LOOSEST)
            problem = Problem(costs, eps, *weights, KL(tau))
            at = None if f is None else Start(f, problem.a)
            solution = find(problem, criterion=Marginal(inner), start=at, accelerate="auto" if at is None else "mixing", **settings)
            f, n_inner = solution.f, n_inner + solution.n_iter
            P = solution.plan.to_dense().double()
            mass = P.sum((-1, -2), keepdim=True)
            Q = P * (Q.sum((-1, -2), keepdim=True) / mass).sqrt()
            following = _costs(spaces, M, alpha, given.eps, tau, *weights, Q)
            change = (following - costs).abs().amax((-1, -2)).double() / given.eps
            history.append(change)
            if on_check is not None:
                on_check(len(history), change)
            if not bool(change.isfinite().all()):
                status, settled = VANISHED if bool(f.isfinite().all()) else DIVERGED, torch.zeros_like(settled)
                break
            settled = (change <= tol) & (solution.converged | (solution.status.name == "stalled")) & (inner <= INNER * tol)
            if bool(settled.all()):
                status = SETTLED
                break
            costs = following
    assert solution is not None
    value, distortion = _objective(spaces, M, alpha, given.eps, tau, given.a, given.b, Q)
    dtype, f, g = solution.problem.given_dtype, solution.f, solution.g
    settled = settled.expand(value.shape)
    return Gromov(
        value.to(dtype), distortion.to(dtype), Q.to(dtype), f, g, status, settled, len(history), n_inner, torch.stack(history)
    )  # fmt: skip


def _first(weights: tuple[Tensor, Tensor], start: Tensor | None, spaces: Matrices) -> Tensor:
    """A plan (*batch, n, m) in float64: a⊗b with the mass between those of a and b, or the one that is given."""
    a, b = weights
    if start is None:
        return a.unsqueeze(-1) * b.unsqueeze(-2) / (a.sum(-1) * b.sum(-1)).sqrt()[..., None, None]
    if start.shape[-2:] != spaces.shape:
        raise errors.wrong_shape("start", start.shape, f"(*batch, {spaces.shape[0]}, {spaces.shape[1]}), a plan")
    if not bool(((start >= 0) & start.isfinite()).all()) or not bool((start.sum((-1, -2)) > 0).all()):
        raise errors.ProblemError("start must hold finite masses >= 0, and some > 0: it is a plan, as of an earlier result, or a⊗b.")
    return start.detach().double()


def _costs(spaces: Matrices, M: Tensor | None, alpha: float, eps: float, tau: float, a: Tensor, b: Tensor, Q: Tensor) -> Tensor:
    costs = alpha * spaces.slope(spaces.moments(Q))
    if M is not None:
        costs = costs + (1 - alpha) / 2 * M
    rows, columns = Q.sum(-1), Q.sum(-2)
    held = tau * (_entropy(rows, a) + _entropy(columns, b)) + eps * _entropy(Q.flatten(-2), (a.unsqueeze(-1) * b.unsqueeze(-2)).flatten(-2))
    return ((costs + held[..., None, None].to(costs)) / Q.sum((-1, -2), keepdim=True).to(costs)).contiguous()


def _objective(
    spaces: Matrices, M: Tensor | None, alpha: float, eps: float, tau: float, a: Tensor, b: Tensor, P: Tensor
) -> tuple[Tensor, Tensor]:
    """(the objective, its sum over pairs of pairs) at a plan that is held."""
    distortion = (spaces.slope(spaces.moments(P)) * P.to(spaces.dtype)).sum((-1, -2)).double()
    value = alpha * distortion
    if M is not None:
        value = value + (1 - alpha) * (P * M.double()).sum((-1, -2))
    prior = a.unsqueeze(-1) * b.unsqueeze(-2)
    for price, p, q in ((tau, P.sum(-1), a), (tau, P.sum(-2), b), (eps, P.flatten(-2), prior.flatten(-2))):
        mass, full = p.sum(-1), q.sum(-1)
        value = value + price * (2 * mass * _entropy(p, q) - mass.square() + full.square())
    return value, distortion


def _entropy(p: Tensor, q: Tensor) -> Tensor:
    """<p, log p/q>, (*batch,)."""
    some = p > 0
    return torch.where(some, p * (torch.where(some, p, 1.0).log() - torch.where(some, q, 1.0).log()), 0.0).sum(-1)
