"""Validate, bind, loop, attach the gradient."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from . import errors, gradients
from .backends import bind
from .geometry import weigh
from .loop import Stop, iterate
from .problem import Problem
from .schedule import Anneal, Constant
from .solution import Solution


def solve(
    problem: Problem,
    *,
    backend: str = "auto",
    grad: str = "envelope",
    tol: float = 1e-4,
    norm: str = "l1",
    max_iter: int = 10_000,
    check_every: int = 10,
    start: Tensor | None = None,
    schedule: Constant | Anneal | None = None,
    on_check: Callable[[int, Tensor], None] | None = None,
) -> Solution:
    """Entropic transport between the two measures of `problem`, in the log domain, on the device its tensors live on.

    Minimises <C, P> + eps KL(P | a⊗b) plus the marginal penalties; batched over leading axes.

    backend      "auto", or by name: "dense", "chunked", "keops", "triton", "softmin"; `gpu_ot.explain(problem)` says which and why.
    grad         how the outputs depend on the inputs: "envelope" is exact for `value` at convergence and costs one sweep;
                 "unroll" differentiates f, g and `value` through every iteration that was run.
    tol, norm    when to stop: L1 marginal error as a fraction of the mass, or see `gpu_ot.loop.Stop`.
    max_iter     iterations at most; a status says so when they run out.
    check_every  iterations between looks at the error, each of which waits for the device.
    start        row potentials f + eps log a to start from, (*batch, n) in units of the cost; zeros when left out.
    schedule     how eps reaches its target; constant when left out.
    on_check     called with (iterations, errors) at each look.

    Returns a Solution: `value` (*batch,) in units of the cost, potentials f (*batch, n) and g (*batch, m),
    a lazy plan, and a `status` that says whether, when and why the loop stopped.
    Raises ProblemError for a setting that does not exist, BackendError for a backend that cannot serve this problem. Not
    converging is a status, not an exception.

    Feydy et al. 2019, arXiv:1810.08278 (the dual and its loop); Séjourné et al. 2019, arXiv:1910.12958 (relaxed marginals).
    """
    if grad not in ("envelope", "unroll"):
        raise errors.unknown("grad", grad, ["envelope", "unroll"])
    if max_iter < 1:
        raise errors.ProblemError(f"max_iter must be at least 1, found {max_iter}.")
    geometry = bind(problem, backend)
    if start is None:
        start = weigh(torch.zeros_like(problem.a), problem.a.detach(), problem.eps)
    start = start.to(problem.a).expand_as(problem.a)
    with torch.no_grad():
        outcome = iterate(
            geometry, problem, schedule or Constant(problem.eps), start.detach(), Stop(tol, norm), max_iter, check_every, on_check
        )
    f, g = outcome.f, outcome.g
    if grad == "unroll" and needs_gradient(problem):
        if isinstance(schedule, Anneal):
            raise errors.ProblemError('grad="unroll" replays iterations at one eps: leave `schedule` out, or use grad="envelope".')
        f, g = gradients.unroll(problem, geometry, start, outcome.n_iter)
    value = gradients.value(problem, geometry, f, g).to(problem.given_dtype)
    history = torch.stack(outcome.errors)
    return Solution(problem, geometry, value, f, g, outcome.status, outcome.converged, outcome.n_iter, history)


def needs_gradient(problem: Problem) -> bool:
    """Whether anything in the problem asks for a gradient here and now."""
    inputs = (problem.a, problem.b, *problem.cost.inputs.values())
    return torch.is_grad_enabled() and any(z.requires_grad for z in inputs)
