"""POT's `ot.batch`: B problems of one shape at once. Columns are exact. Each stops at the tolerance of its row marginal, as if alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors, gradients, transforms
from ..costs import SqEuclidean
from ..costs.clouds import inner
from ..gradients import implicit
from ..problem import Problem
from ..solve import find, needs_gradient
from ..solver.criterion import Marginal
from ..solver.step import scaled
from ..vectors import in_full_precision
from . import direct
from .answer import Answer
from .arrays import number, take
from .clouds import between, matrix, narrowed, take_points
from .forwarding import forward
from .linear import ALIASES, GRADS, with_gradients
from .refusals import NOT_CONVERGED, elsewhere, warn_unless_converged
from .result import OTResult

METHODS = ("auto", "log_sinkhorn", "sinkhorn", "proximal")
REG_TYPES = ("kl", "entropy")


@transforms.eagerly
@in_full_precision
def solve_batch(
    M, reg=None, a=None, b=None, max_iter=1000, tol=1e-5, method="auto", inner_iter=1, inner_reg=1e-3, reg_type="entropy", grad="envelope"
):
    """POT's `ot.batch.solve_batch`: minimises <P, M> + reg R(P) for each of B balanced problems.

    M          costs (B, n, m).
    a, b       weights (B, n) and (B, m), or one for all; None is uniform.
    reg_type   "entropy" for sum P log P, "kl" for KL(P | a⊗b): the same plan, another value.
    method     "log_sinkhorn" or "auto": `potentials` are (log u, log v); "sinkhorn": (u, v). One solver.
    tol        Euclidean norm of the rows' error, of each problem: it stops there, where POT goes on until the worst one does.
    grad       "envelope" or "implicit": `value` in M, a, b, reg, and `value_linear` in M, a, b, are exact at the optimum, the second by
               conjugate gradients in its backward pass; "autodiff" and "last_step": everything, through the iterations; "detach": nothing.

    Returns an OTResult: plan (B, n, m), value and value_linear (B,), potentials (B, n) and (B, m).
    """
    entropy, grad = reg_type.lower() == "entropy", ALIASES.get(grad, grad)
    settings = (("method", method, METHODS), ("reg_type", reg_type, REG_TYPES), ("grad", grad, GRADS))
    for name, given, known in settings:
        if (given.lower() if name == "reg_type" else given) not in known:
            raise errors.ProblemError(f"Unknown {name}: {given}. Must be one of {known}.")
    if method == "proximal" or (method == "auto" and (reg is None or number(reg) == 0)):
        raise elsewhere('method = "proximal", or "auto" without reg,', "ot.batch.solve_batch")
    if reg is None or not number(reg) > 0:
        raise errors.ProblemError(
            f"Sinkhorn methods require a strictly positive reg parameter, found {reg}. Please provide a valid reg value."
        )
    found = direct.batch(a, b, M, reg, max_iter, tol, entropy) or _usual(M, reg, a, b, max_iter, tol, entropy, grad)
    done, (u, v) = found.answer, found.logarithms
    warn_unless_converged(done.solution, NOT_CONVERGED, "max_iter", "tol")
    return OTResult(
        value=done.give(found.value),
        value_linear=done.give(found.linear),
        potentials=(done.give(u.exp()), done.give(v.exp())) if method == "sinkhorn" else (done.give(u), done.give(v)),
        plan=done.give(found.P),
        log={"n_iter": done.last_iteration},
        **done.report(),
    )


def _usual(M: Any, reg: Any, a: Any, b: Any, max_iter: int, tol: float, entropy: bool, grad: str) -> direct.Batch:
    """Any problems, with gradients."""
    tM, (ta, tb), back = _take_batch("M", M, a=a, b=b)
    if grad == "detach":
        tM, ta, tb = tM.detach(), *(z if z is None else z.detach() for z in (ta, tb))
        reg = number(reg)
    learnable = isinstance(reg, Tensor) and reg.requires_grad
    problem = Problem(tM / reg if learnable else tM, 1.0 if learnable else number(reg), ta, tb)
    solution = find(
        problem, order="columns", criterion=Marginal(tol, "l2"), grad="unroll" if grad in ("autodiff", "last_step") else "envelope",
        start=scaled(torch.zeros_like(problem.b)), max_iter=max(int(max_iter), 1), accelerate="none",
    )  # fmt: skip
    done = Answer(solution, back, reg if learnable else 1.0, entropy=entropy)
    value, P, logarithms = with_gradients(done, grad, lambda: (solution.plan.to_dense(), done.log_scalings()))
    sharp = grad == "envelope" and needs_gradient(problem)
    return direct.Batch(done, P, value, _sharp_cost(done) if sharp else gradients.inner(P, tM, problem.forbids), logarithms)


def _sharp_cost(done: Answer) -> Tensor:
    """<P, M> of each problem, as a function of the costs and weights by the equations that the potentials solve."""
    s = done.solution
    at = s.problem, s.geometry
    f, g = implicit.potentials(*at, s.f, s.g, caution="" if s.converged.all() else str(s.status))
    return done.unit * gradients.plan_cost(*at, f, g)


def _take_batch(name: str, M: Any, **weights: Any) -> tuple[Tensor, list[Tensor | None], Callable[[Tensor], Any]]:
    (tM, *others), back = take(**{name: M}, **weights)
    if tM is None or tM.ndim != 3:
        raise errors.wrong_shape(name, () if tM is None else tM.shape, "(B, n, m)")
    return tM, others, back


def solve_sample_batch(
    X_a, X_b, reg=None, a=None, b=None, metric="sqeuclidean", p=2, max_iter=1000, tol=1e-5, method="auto", inner_iter=1, inner_reg=1e-3,
    reg_type="entropy", grad="envelope",
):  # fmt: skip
    """POT's `ot.batch.solve_sample_batch`: `solve_batch` between the points X_a (B, n, d) and X_b (B, m, d), `metric` as `dist_batch`."""
    (x, y), back = take_points(3, X_a=X_a, X_b=X_b)
    M = back(_costs(x, y, metric, p))
    found = solve_batch(M, reg, a, b, max_iter, tol, method, inner_iter, inner_reg, reg_type, grad)
    return narrowed(found, SqEuclidean(x, y))


def dist_batch(X1, X2=None, metric="sqeuclidean", p=2, nx=None):
    """POT's `ot.batch.dist_batch`: the costs (B, n, m) between X1 (B, n, d) and X2 (B, m, d).

    metric   "sqeuclidean", "euclidean", "minkowski" with p, or "kl": sum_k y_k log(y_k / x_k) of histograms, as the rows.
    """
    (x, y), back = take_points(3, X1=X1, X2=X1 if X2 is None else X2)
    return narrowed(back(_costs(x, y, metric, p)), SqEuclidean(x, y))


@in_full_precision
def _costs(x: Tensor, y: Tensor, metric: str, p: float) -> Tensor:
    """(B, n, m), those of halves in float32."""
    if metric.lower() == "kl":
        x, y = (z.float() if z.dtype.itemsize < 4 else z for z in (x, y))
        tiny = 1e-10  # POT's guard: part of the definition here
        negative_entropy = (y * (y + tiny).log()).sum(-1)
        return negative_entropy.unsqueeze(-2) - inner((x + tiny).log(), y)
    if metric.lower() not in ("sqeuclidean", "euclidean", "minkowski"):
        raise errors.ProblemError(f"Unknown metric: {metric}. Choose 'sqeuclidean', 'euclidean', 'minkowski' or 'kl'.")
    return matrix(between(x, y, metric, p))


def bregman_log_projection_batch(K, a=None, b=None, nx=None, max_iter=10000, tol=1e-5, grad="detach"):
    """POT's `ot.batch.bregman_log_projection_batch`: the plans exp(K + u + v) with marginals a and b, K (B, n, m) a log-kernel -M / reg.

    Returns T, log_T, n_iters and potentials (u, v).
    """
    tK, _, back = _take_batch("K", K)
    found = solve_batch(back(-tK), 1.0, a, b, max_iter, tol, "log_sinkhorn", grad="detach" if grad == "detach" else "autodiff")
    u, v = found.potential_a, found.potential_b
    return {"T": found.plan, "log_T": K + u[:, :, None] + v[:, None, :], "n_iters": found.n_iter, "potentials": (u, v)}


def bregman_projection_batch(K, a=None, b=None, nx=None, max_iter=10000, tol=1e-5, grad="detach"):
    """POT's `ot.batch.bregman_projection_batch`: the plans u K v with marginals a and b, K (B, n, m) a kernel exp(-M / reg) >= 0.

    Returns T, n_iters and potentials (u, v).
    """
    tK, _, back = _take_batch("K", K)
    M = torch.where(tK > 0, -torch.where(tK > 0, tK, 1.0).log(), torch.inf)
    found = solve_batch(back(M), 1.0, a, b, max_iter, tol, "sinkhorn", grad="detach" if grad == "detach" else "autodiff")
    return {"T": found.plan, "n_iters": found.n_iter, "potentials": found.potentials}


def loss_linear_batch(M, T, nx=None):
    """POT's `ot.batch.loss_linear_batch`: <M, T> of each problem, (B,)."""
    return (_kept(M) * _kept(T)).sum((1, 2))


def _kept(z: Any) -> Any:
    return transforms.kept(z) if isinstance(z, Tensor) else z


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
