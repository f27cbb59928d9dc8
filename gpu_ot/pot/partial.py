"""POT's `ot.partial`, entropic: the same names, arguments, results and `log`, from partial transport in the one loop."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import errors, transforms
from ..problem import Problem
from ..solution import Solution
from ..solve import find, needs_gradient
from ..solver.criterion import Marginal
from ..vectors import in_full_precision
from .answer import log_weight
from .arrays import number, take_problem
from .forwarding import forward
from .refusals import known_method, print_error, warn_unless_converged

__all__ = ["entropic_partial_wasserstein", "entropic_partial_wasserstein_logscale"]

#: POT's default tolerance is 1e-100: all iterations. No marginal is that exact.
LEAST_TOL = 1e-13


def entropic_partial_wasserstein(
    a, b, M, reg, m=None, method="sinkhorn", numItermax=1000, stopThr=1e-100, verbose=False, log=False
):  # fmt: skip
    """Entropic transport of a part of the mass: `ot.partial.entropic_partial_wasserstein`, without underflow.

    Minimises <P, M> + reg sum P log P over P >= 0 with P1 <= a, P^T 1 <= b and mass m.

    a, b       weights (n,) and (m,), arrays, tensors or lists; empty or None is uniform.
    M          costs (n, m); +inf forbids a pair.
    reg        > 0, in units of M.
    m          the mass that moves, from 0 to the smaller of sum(a) and sum(b), which it is when left out.
    method     "sinkhorn" or "sinkhorn_log": one solver for both.
    numItermax, stopThr   stop when the columns' excess is below `stopThr` as a part of the mass. POT's Dykstra iteration needs about as
               many iterations as there are digits; here each has the right mass and rows, and they are accelerated.

    Returns the plan (n, m) in the kind, type and device of the inputs. With `log=True` also err, partial_w_dist = <P, M>, and `status`,
    `converged`, `n_iter`, `errors`. Differentiable in a, b and M. Warns with the reason when the loop stopped short.
    Raises ProblemError for input that has no answer.

    Benamou et al. 2015, arXiv:1412.5154, section 5.
    """
    known_method(method, ("sinkhorn", "sinkhorn_log"))
    return _run(a, b, M, reg, m, numItermax, stopThr, verbose, log)


def entropic_partial_wasserstein_logscale(a, b, M, reg, m=None, numItermax=1000, stopThr=1e-100, verbose=False, log=False):
    """POT's `ot.partial.entropic_partial_wasserstein_logscale`. Arguments and results as `entropic_partial_wasserstein`."""
    return _run(a, b, M, reg, m, numItermax, stopThr, verbose, log)


def _run(a: Any, b: Any, M: Any, reg: Any, m: Any, max_iter: int, tol: float, verbose: bool, log: bool) -> Any:
    (ta, tb, tM), back = take_problem(a, b, M)
    if tb is not None and tb.ndim > 1:
        raise errors.wrong_shape("b", tb.mT.shape, f"({tM.shape[1]},): partial transport takes one histogram at a time")
    if not isinstance(tM, Tensor):
        raise errors.ProblemError("M is a Cost; partial transport by POT's rules takes the matrix, M.dense(). Without it: Problem(mass=m).")
    solution = solve(ta, tb, tM, number(reg), None if m is None else number(m, "m"), max_iter, tol, verbose)
    warn_unless_converged(solution, "Partial transport did not converge.")
    P = solution.plan.to_dense().to(tM.dtype)
    if not log:
        return back(P)
    n_iter = max(solution.n_iter - 1, 0)
    found = [back(e.to(tM.dtype)) for e in solution.errors]
    linear = torch.where(P > 0, P * tM, 0.0).sum()
    report = {"status": solution.status, "converged": back(solution.converged), "n_iter": n_iter, "errors": found}
    return back(P), {"err": found, "partial_w_dist": back(linear), **report}


@transforms.eagerly
@in_full_precision
def solve(
    a: Tensor | None, b: Tensor | None, M: Tensor, reg: float, mass: float | None, max_iter: int, tol: float, verbose: bool = False
) -> Solution:
    """The solution of POT's problem. Its entropy has no weights in it, which are upper bounds here: they go into the costs."""
    a, b = (torch.full((k,), 1 / k, dtype=M.dtype, device=M.device) if w is None else w for w, k in zip((a, b), M.shape, strict=True))
    mass = available_mass(a, b, mass)
    C = M + reg * (log_weight(a).to(M.dtype).unsqueeze(-1) + log_weight(b).to(M.dtype))
    problem = Problem(C, reg, a, b, mass=mass)
    unroll = needs_gradient(problem)

    def line(n_iter: int, error: Tensor) -> None:
        print_error(n_iter - 1, error, 10)

    return find(
        problem, criterion=Marginal(max(tol, LEAST_TOL)), grad="unroll" if unroll else "envelope", max_iter=max(max_iter, 1),
        accelerate="none" if unroll else "mixing", on_check=line if verbose else None,
    )  # fmt: skip


def available_mass(a: Tensor, b: Tensor, mass: float | None) -> float:
    """The mass asked for, or all there is. Raises ProblemError in POT's words for more than that."""
    most = min(float(a.detach().sum()), float(b.detach().sum()))
    if mass is not None and not 0 <= mass <= most * (1 + 1e-9):
        rule = "greater than 0" if mass < 0 else "lower or equal than min(|a|_1, |b|_1)"
        raise errors.ProblemError(f"Problem infeasible. Parameter m should be {rule}, {most:.6g} here, found {mass:.6g}.")
    return most if mass is None else mass


__getattr__, __dir__ = forward(__name__, "ot.partial")
