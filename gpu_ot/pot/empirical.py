"""POT's Sinkhorn between clouds of points: with the matrix in memory as `ot.sinkhorn`, or lazily, without any n-by-m array.

Lazily POT updates f, then g, and measures the error of the rows, so the transposed problem is solved here. POT's lazy potentials are
logarithms that contain the weights: P = exp(f + g - C / reg).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import errors, transforms
from ..problem import Problem
from ..solve import find
from ..solver.criterion import Marginal
from ..solver.step import scaled
from ..vectors import in_full_precision
from .answer import Answer
from .arrays import take, take_start
from .balanced import METHODS, run
from .clouds import between, matrix, narrowed, take_points
from .refusals import NOT_CONVERGED, known_method, warn_unless_converged


@in_full_precision
def solve_lazily(
    problem: Problem, back: Callable[[Tensor], Any], max_iter: int, tol: float, verbose: bool, warn: bool, warmstart: Any,
    unroll: bool = True, entropy: bool = False, names: tuple[str, str] = ("numIterMax", "stopThr"),
) -> Answer:  # fmt: skip
    """Solve with exact columns, until the L1 error of the rows is below `tol`; f and g carry a gradient with `unroll`."""
    start = torch.zeros_like(problem.b) if warmstart is None else problem.eps * take_start(warmstart, 1, problem.b)
    solution = find(
        problem, order="columns", criterion=Marginal(tol / float(problem.a.detach().sum())), grad="unroll" if unroll else "envelope",
        start=scaled(start), max_iter=max(max_iter, 1), accelerate="none", on_check=_print_progress if verbose else None,
    )  # fmt: skip
    if warn:
        warn_unless_converged(solution, NOT_CONVERGED, *names)
    return Answer(solution, back, entropy=entropy)


def lazy_log(done: Answer) -> dict[str, Any]:
    """POT's `log` of a lazy solve."""
    f, g = done.logarithms()
    return {"err": done.err(), "u": f, "v": g, "niter": done.last_iteration, "lazy_plan": done.lazy_plan(), **done.report()}


def _print_progress(n_iter: int, error: Tensor) -> None:
    if n_iter % 100 == 1 and n_iter > 1:  # POT's first line comes after 100 iterations
        print(f"Error in marginal at iteration {n_iter} = {float(error.amax())}")


@transforms.eagerly
def _between_points(
    loss: bool, X_s: Any, X_t: Any, reg: Any, a: Any, b: Any, metric: Any, max_iter: int, tol: float, lazy: bool, batch: Any, verbose: bool,
    log: bool, warn: bool, warmstart: Any, options: dict[str, Any],
) -> Any:  # fmt: skip
    """The plan, lazily the potentials, or with `loss` <P, C>; and the log."""
    (x, y), back = take_points(X_s=X_s, X_t=X_t)
    cost = between(x, y, metric)
    if not lazy:
        method, M = known_method(options.pop("method", "sinkhorn"), METHODS), back(matrix(cost))
        return narrowed(run(method, a, b, M, reg, max_iter, tol, verbose, log, warn, warmstart, loss, **options), cost)
    if not (isinstance(batch, int) or (isinstance(batch, tuple) and len(batch) == 2)):
        raise errors.ProblemError(f"Batch size must be in integer or a tuple of two integers, found {batch!r}.")
    (_, ta, tb), back = take(X_s=X_s, a=a, b=b)
    done = solve_lazily(Problem(cost, reg, ta, tb), back, max_iter, tol, verbose, warn, warmstart)
    result = (done.give(done.linear()),) if loss else done.logarithms()
    if log:
        return *result, lazy_log(done)
    return result[0] if loss else result


def empirical_sinkhorn(
    X_s, X_t, reg, a=None, b=None, metric="sqeuclidean", numIterMax=10000, stopThr=1e-9, isLazy=False, batchSize=100, verbose=False,
    log=False, warn=True, warmstart=None, **kwargs,
):  # fmt: skip
    """POT's `ot.bregman.empirical_sinkhorn`: transport between the points X_s (n, d) and X_t (m, d).

    isLazy     no n-by-m array: returns the potentials (f, g) with P = exp(f + g - C / reg), and with `log` also a dictionary with
               err, u = f, v = g, niter and `lazy_plan`, which slices, multiplies and samples.
    metric     "sqeuclidean", "euclidean", "cityblock", "minkowski", "cosine", "correlation".
    batchSize  accepted and not needed.

    Otherwise returns the plan of `sinkhorn` on the matrix of costs. Differentiable in the points and the weights, lazily too.
    """
    settings = (numIterMax, stopThr, isLazy, batchSize, verbose, log, warn, warmstart, kwargs)
    return _between_points(False, X_s, X_t, reg, a, b, metric, *settings)


def empirical_sinkhorn2(
    X_s, X_t, reg, a=None, b=None, metric="sqeuclidean", numIterMax=10000, stopThr=1e-9, isLazy=False, batchSize=100, verbose=False,
    log=False, warn=True, warmstart=None, **kwargs,
):  # fmt: skip
    """POT's `ot.bregman.empirical_sinkhorn2`: the cost <P, C> of the plan of `empirical_sinkhorn`, 0-d; with isLazy in blocks."""
    settings = (numIterMax, stopThr, isLazy, batchSize, verbose, log, warn, warmstart, kwargs)
    return _between_points(True, X_s, X_t, reg, a, b, metric, *settings)


def empirical_sinkhorn_divergence(
    X_s, X_t, reg, a=None, b=None, metric="sqeuclidean", numIterMax=10000, stopThr=1e-9, verbose=False, log=False, warn=True,
    warmstart=None, **kwargs,
):  # fmt: skip
    """POT's `ot.bregman.empirical_sinkhorn_divergence`: max(0, <P_ab, C> - (<P_aa, C> + <P_bb, C>) / 2), of linear costs.

    Returns a number for numpy and a tensor (1,) for torch, as POT does; `log` holds the three losses and their logs.
    """
    options: dict[str, Any] = dict(metric=metric, numIterMax=numIterMax, stopThr=stopThr, verbose=verbose, log=True, warn=warn, **kwargs)
    self_a, self_b = (None, None) if warmstart is None else ((z, z) for z in warmstart)
    loss_ab, log_ab = empirical_sinkhorn2(X_s, X_t, reg, a, b, warmstart=warmstart, **options)
    loss_a, log_a = empirical_sinkhorn2(X_s, X_s, reg, a, a, warmstart=self_a, **options)
    loss_b, log_b = empirical_sinkhorn2(X_t, X_t, reg, b, b, warmstart=self_b, **options)
    divergence = loss_ab - 0.5 * (loss_a + loss_b)
    divergence = divergence.clamp(min=0).reshape(1) if isinstance(divergence, Tensor) else max(divergence, divergence * 0)
    if not log:
        return divergence
    losses = {"sinkhorn_loss_ab": loss_ab, "sinkhorn_loss_a": loss_a, "sinkhorn_loss_b": loss_b}
    return divergence, {**losses, "log_sinkhorn_ab": log_ab, "log_sinkhorn_a": log_a, "log_sinkhorn_b": log_b}
