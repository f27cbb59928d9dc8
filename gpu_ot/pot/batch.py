"""POT's `ot.batch`: B problems of one shape at once. Columns are exact, and all stop together when the worst row marginal is."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import errors
from ..problem import Problem
from ..solve import find
from ..solver.criterion import Marginal
from ..solver.step import scaled
from .answer import Answer
from .arrays import number, take
from .clouds import between
from .forwarding import forward
from .linear import GRADS, with_gradient
from .refusals import elsewhere
from .result import OTResult

METHODS = ("auto", "log_sinkhorn", "sinkhorn", "proximal")
REG_TYPES = ("kl", "entropy")


def solve_batch(
    M,
    reg=None,
    a=None,
    b=None,
    max_iter=1000,
    tol=1e-5,
    method="auto",
    inner_iter=1,
    inner_reg=1e-3,
    reg_type="entropy",
    grad="envelope",
):
    """POT's `ot.batch.solve_batch`: minimises <P, M> + reg R(P) for each of B balanced problems.

    M          costs (B, n, m).
    a, b       weights (B, n) and (B, m), or one for all; None is uniform.
    reg_type   "entropy" for sum P log P, "kl" for KL(P | a⊗b): the same plan, another value.
    method     "log_sinkhorn" or "auto": `potentials` are (log u, log v); "sinkhorn": (u, v). One solver.
    tol        Euclidean norm of the rows' error, in the worst problem.
    grad       "envelope": `value` in M, a, b, reg is exact at the optimum, and `value_linear` has the plan for its derivative in M;
               "autodiff" and "last_step": everything, through the iterations; "detach": nothing.

    Returns an OTResult: plan (B, n, m), value and value_linear (B,), potentials (B, n) and (B, m).
    """
    if method not in METHODS:
        raise errors.ProblemError(f"Unknown method: {method}. Must be one of {METHODS}.")
    if reg_type.lower() not in REG_TYPES:
        raise errors.ProblemError(f"Unknown reg_type: {reg_type}. Must be one of {REG_TYPES}.")
    if grad not in GRADS:
        raise errors.ProblemError(f"Unknown grad: {grad}. Must be one of {GRADS}.")
    if method == "proximal" or (method == "auto" and (reg is None or number(reg) == 0)):
        raise elsewhere('method = "proximal", or "auto" without reg,', "ot.batch.solve_batch")
    if reg is None or not number(reg) > 0:
        raise errors.ProblemError(
            f"Sinkhorn methods require a strictly positive reg parameter, found {reg}. Please provide a valid reg value."
        )
    (tM, ta, tb), back = take(M=M, a=a, b=b)
    if tM is None or tM.ndim != 3:
        raise errors.wrong_shape("M", () if tM is None else tM.shape, "(B, n, m)")
    if grad == "detach":
        tM, ta, tb = tM.detach(), *(z if z is None else z.detach() for z in (ta, tb))
        reg = number(reg)
    unroll = grad in ("autodiff", "last_step")
    learnable = isinstance(reg, Tensor) and reg.requires_grad
    problem = Problem(tM / reg if learnable else tM, 1.0 if learnable else number(reg), ta, tb)
    solution = find(
        problem,
        order="columns",
        criterion=Marginal(tol, "l2"),
        start=scaled(torch.zeros_like(problem.b)),  # v = 1
        max_iter=max(max_iter, 1),
        accelerate="none",
        grad="unroll" if unroll else "envelope",
    )
    done, entropy = Answer(solution, back, reg if learnable else 1.0), reg_type.lower() == "entropy"
    with torch.set_grad_enabled(unroll and torch.is_grad_enabled()):
        value, P = done.objective(entropy), solution.plan.to_dense()
        u, v = done.scalings().values() if method == "sinkhorn" else done.logarithms()
    if grad == "envelope" and torch.is_grad_enabled():
        value = with_gradient(value, done.optimum(entropy))
    return OTResult(
        value=done.give(value),
        value_linear=done.give(loss_linear_batch(torch.where(tM.isinf(), 0.0, tM), P)),
        potentials=(u, v),
        plan=done.give(P),
        log={"n_iter": done.last_iteration},
        **done.story(),
    )


def solve_sample_batch(
    X_a,
    X_b,
    reg=None,
    a=None,
    b=None,
    metric="sqeuclidean",
    p=2,
    max_iter=1000,
    tol=1e-5,
    method="auto",
    inner_iter=1,
    inner_reg=1e-3,
    reg_type="entropy",
    grad="envelope",
):
    """POT's `ot.batch.solve_sample_batch`: `solve_batch` between the points X_a (B, n, d) and X_b (B, m, d), `metric` as `dist_batch`."""
    M = dist_batch(X_a, X_b, metric=metric, p=p)
    return solve_batch(M, reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad)


def dist_batch(X1, X2=None, metric="sqeuclidean", p=2, nx=None):
    """POT's `ot.batch.dist_batch`: the costs (B, n, m) between X1 (B, n, d) and X2 (B, m, d).

    metric   "sqeuclidean", "euclidean", "minkowski" with p, or "kl": sum_k y_k log(y_k / x_k) of histograms, as the rows.
    """
    (x, y), back = take(X1=X1, X2=X1 if X2 is None else X2)
    if x is None or y is None or x.ndim != 3 or y.ndim != 3:
        raise errors.wrong_shape("X1" if x is None or x.ndim != 3 else "X2", () if x is None else x.shape, "(B, n, d)")
    if metric.lower() == "kl":
        tiny = 1e-10  # POT's guard: part of the definition here
        negative_entropy = (y * (y + tiny).log()).sum(-1)
        return back(negative_entropy.unsqueeze(-2) - (x + tiny).log() @ y.mT)
    if metric.lower() not in ("sqeuclidean", "euclidean", "minkowski"):
        raise errors.ProblemError(f"Unknown metric: {metric}. Choose 'sqeuclidean', 'euclidean', 'minkowski' or 'kl'.")
    return back(between(x, y, metric, p).dense())


def bregman_log_projection_batch(K, a=None, b=None, nx=None, max_iter=10000, tol=1e-5, grad="detach"):
    """POT's `ot.batch.bregman_log_projection_batch`: the plans exp(K + u + v) with marginals a and b, K (B, n, m) a log-kernel -M / reg.

    Returns T, log_T, n_iters and potentials (u, v).
    """
    (tK,), back = take(K=K)
    if tK is None or tK.ndim != 3:
        raise errors.wrong_shape("K", () if tK is None else tK.shape, "(B, n, m)")
    found = solve_batch(back(-tK), 1.0, a, b, max_iter, tol, "log_sinkhorn", grad="detach" if grad == "detach" else "autodiff")
    u, v = found.potential_a, found.potential_b
    return {"T": found.plan, "log_T": K + u[:, :, None] + v[:, None, :], "n_iters": found.n_iter, "potentials": (u, v)}


def bregman_projection_batch(K, a=None, b=None, nx=None, max_iter=10000, tol=1e-5, grad="detach"):
    """POT's `ot.batch.bregman_projection_batch`: the plans u K v with marginals a and b, K (B, n, m) a kernel exp(-M / reg) >= 0.

    Returns T, n_iters and potentials (u, v).
    """
    (tK,), back = take(K=K)
    if tK is None or tK.ndim != 3:
        raise errors.wrong_shape("K", () if tK is None else tK.shape, "(B, n, m)")
    M = torch.where(tK > 0, -torch.where(tK > 0, tK, 1.0).log(), torch.inf)
    found = solve_batch(back(M), 1.0, a, b, max_iter, tol, "sinkhorn", grad="detach" if grad == "detach" else "autodiff")
    return {"T": found.plan, "n_iters": found.n_iter, "potentials": found.potentials}


def loss_linear_batch(M, T, nx=None):
    """POT's `ot.batch.loss_linear_batch`: <M, T> of each problem, (B,)."""
    return (M * T).sum((1, 2))


def loss_linear_samples_batch(X, Y, T, metric="sqeuclidean"):
    """POT's `ot.batch.loss_linear_samples_batch`: <C, T> for the costs C between X (B, n, d) and Y (B, m, d), (B,)."""
    return loss_linear_batch(dist_batch(X, Y, metric=metric), T)


def entropy_batch(T, nx=None, eps=1e-16):
    """POT's `ot.batch.entropy_batch`: -sum T log T of each plan, (B,); 0 log 0 is 0."""
    (tT,), back = take(T=T)
    if tT is None:
        raise errors.wrong_shape("T", (0,), "(B, n, m)")
    some = tT > 0
    return back(-torch.where(some, tT * torch.where(some, tT, 1.0).log(), 0.0).sum((1, 2)))


__getattr__, __dir__ = forward(__name__, "ot.batch")
