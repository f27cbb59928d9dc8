"""POT's Sinkhorn between clouds of points: with the matrix in memory as `ot.sinkhorn`, or lazily, without any n-by-m array.

Lazily POT updates f, then g, and looks at the rows, so these solve the transposed problem; its potentials are logarithms that hold the
weights: P = exp(f + g - C / reg).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from ..problem import Problem
from ..solve import find
from ..solver.criterion import Marginal
from ..solver.status import CONVERGED, STALLED
from ..solver.step import scaled
from .answer import Answer
from .arrays import take
from .balanced import METHODS, NOT_CONVERGED, known, own, run
from .clouds import between
from .refusals import warn as warn_caller


class Limits(NamedTuple):
    """How far to go, and what to say on the way."""

    max_iter: int
    tol: float  # L1 error of the rows
    verbose: bool = False
    warn: bool = True


def streamed(problem: Problem, back: Callable[[Tensor], Any], limits: Limits, warmstart: Any = None, unroll: bool = True) -> Answer:
    """Solve, columns exact, until the L1 error of the rows is small enough; f, g carry a gradient where an input does."""
    start = torch.zeros_like(problem.b)
    if warmstart is not None:
        (given,), _ = take(warmstart=warmstart[1])
        if given is None or given.shape != problem.b.shape:
            found = () if given is None else given.shape
            raise errors.wrong_shape("warmstart[1]", found, errors.shape(problem.b.shape))
        start = problem.eps * given.detach().to(problem.b)
    solution = find(
        problem,
        order="columns",
        criterion=Marginal(limits.tol / float(problem.a.detach().sum())),
        start=scaled(start),
        max_iter=max(limits.max_iter, 1),
        accelerate="none",
        on_check=_print_progress if limits.verbose else None,
        grad="unroll" if unroll else "envelope",
    )
    if limits.warn and solution.status not in (CONVERGED, STALLED):
        warn_caller(f"{NOT_CONVERGED} Status {solution.status}")
    return Answer(solution, back)


def log_of(done: Answer) -> dict[str, Any]:
    f, g = done.logarithms()
    return {"err": done.err(), "u": f, "v": g, "niter": done.last_iteration, "lazy_plan": done.lazy_plan(), **done.story()}


def _print_progress(n_iter: int, error: Tensor) -> None:
    if n_iter % 100 == 1:
        print(f"Error in marginal at iteration {n_iter} = {float(error.amax())}")


def _problem(X_s: Any, X_t: Any, reg: Any, a: Any, b: Any, metric: Any) -> tuple[Problem, Callable[[Tensor], Any]]:
    (x, y, ta, tb), back = take(X_s=X_s, X_t=X_t, a=a, b=b)
    if x is None or y is None or x.ndim != 2 or y.ndim != 2:
        raise errors.wrong_shape("X_s" if x is None or x.ndim != 2 else "X_t", () if x is None else x.shape, "(n, d), one row a point")
    return Problem(between(x, y, metric), reg, ta, tb), back


def _check_batch(batchSize: Any) -> None:
    if not (isinstance(batchSize, int) or (isinstance(batchSize, tuple) and len(batchSize) == 2)):
        raise errors.ProblemError(f"Batch size must be in integer or a tuple of two integers, found {batchSize!r}.")


def _dense(X_s: Any, X_t: Any, reg: Any, a: Any, b: Any, metric: Any, options: dict[str, Any], loss: bool) -> Any:
    """`sinkhorn` or `sinkhorn2` on the matrix of costs, in the kind of the points."""
    (x, y), back = take(X_s=X_s, X_t=X_t)
    if x is None or y is None:
        raise errors.wrong_shape("X_s" if x is None else "X_t", (0,), "(n, d), one row a point")
    M = back(between(x, y, metric).dense())
    return run(known(options.pop("method", "sinkhorn"), METHODS), a, b, M, reg, loss=loss, **own(options))


def empirical_sinkhorn(
    X_s,
    X_t,
    reg,
    a=None,
    b=None,
    metric="sqeuclidean",
    numIterMax=10000,
    stopThr=1e-9,
    isLazy=False,
    batchSize=100,
    verbose=False,
    log=False,
    warn=True,
    warmstart=None,
    **kwargs,
):
    """POT's `ot.bregman.empirical_sinkhorn`: transport between the points X_s (n, d) and X_t (m, d).

    isLazy     no n-by-m array: returns the potentials (f, g) with P = exp(f + g - C / reg), and with `log` also a dictionary with
               err, u = f, v = g, niter and `lazy_plan`, which slices, multiplies and samples.
    metric     "sqeuclidean", "euclidean", "cityblock", "minkowski", "cosine", "correlation".
    batchSize  accepted; the blocks suit the machine.

    Otherwise returns the plan of `sinkhorn` on the matrix of costs. Differentiable in the points and the weights, lazily too.
    """
    if not isLazy:
        options = dict(numItermax=numIterMax, stopThr=stopThr, verbose=verbose, log=log, warn=warn, warmstart=warmstart, **kwargs)
        return _dense(X_s, X_t, reg, a, b, metric, options, loss=False)
    _check_batch(batchSize)
    problem, back = _problem(X_s, X_t, reg, a, b, metric)
    done = streamed(problem, back, Limits(numIterMax, stopThr, verbose, warn), warmstart)
    return (*done.logarithms(), log_of(done)) if log else done.logarithms()


def empirical_sinkhorn2(
    X_s,
    X_t,
    reg,
    a=None,
    b=None,
    metric="sqeuclidean",
    numIterMax=10000,
    stopThr=1e-9,
    isLazy=False,
    batchSize=100,
    verbose=False,
    log=False,
    warn=True,
    warmstart=None,
    **kwargs,
):
    """POT's `ot.bregman.empirical_sinkhorn2`: the cost <P, C> of the plan of `empirical_sinkhorn`, 0-d; with isLazy in blocks."""
    if not isLazy:
        options = dict(numItermax=numIterMax, stopThr=stopThr, verbose=verbose, log=log, warn=warn, warmstart=warmstart, **kwargs)
        return _dense(X_s, X_t, reg, a, b, metric, options, loss=True)
    _check_batch(batchSize)
    problem, back = _problem(X_s, X_t, reg, a, b, metric)
    done = streamed(problem, back, Limits(numIterMax, stopThr, verbose, warn), warmstart)
    loss = done.give(done.linear())
    return (loss, log_of(done)) if log else loss


def empirical_sinkhorn_divergence(
    X_s,
    X_t,
    reg,
    a=None,
    b=None,
    metric="sqeuclidean",
    numIterMax=10000,
    stopThr=1e-9,
    verbose=False,
    log=False,
    warn=True,
    warmstart=None,
    **kwargs,
):
    """POT's `ot.bregman.empirical_sinkhorn_divergence`: max(0, <P_ab, C> - (<P_aa, C> + <P_bb, C>) / 2), of linear costs.

    Returns a number for numpy and a tensor (1,) for torch, as POT does; `log` holds the three losses and their logs.
    """
    options: dict[str, Any] = dict(metric=metric, numIterMax=numIterMax, stopThr=stopThr, verbose=verbose, log=True, warn=warn, **kwargs)
    u, v = (None, None) if warmstart is None else warmstart
    self_a, self_b = (None if z is None else (z, z) for z in (u, v))
    loss_ab, log_ab = empirical_sinkhorn2(X_s, X_t, reg, a, b, warmstart=warmstart, **options)
    loss_a, log_a = empirical_sinkhorn2(X_s, X_s, reg, a, a, warmstart=self_a, **options)
    loss_b, log_b = empirical_sinkhorn2(X_t, X_t, reg, b, b, warmstart=self_b, **options)
    divergence = loss_ab - 0.5 * (loss_a + loss_b)
    divergence = divergence.clamp(min=0).reshape(1) if isinstance(divergence, Tensor) else max(divergence, divergence * 0)
    if not log:
        return divergence
    losses = {"sinkhorn_loss_ab": loss_ab, "sinkhorn_loss_a": loss_a, "sinkhorn_loss_b": loss_b}
    return divergence, {**losses, "log_sinkhorn_ab": log_ab, "log_sinkhorn_a": log_a, "log_sinkhorn_b": log_b}
