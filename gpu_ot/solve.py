"""Validate, bind, loop, attach the gradient."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from . import errors, transforms
from .geometry.protocol import Geometry, weigh
from .geometry.select import bind
from .gradients import implicit
from .gradients import operators as gradients
from .problem import Problem
from .solution.solution import Solution
from .solver.annealing import Anneal, Constant
from .solver.loop import Outcome, Stop, iterate
from .solver.status import CONVERGED, DIVERGED, STALLED

if TYPE_CHECKING:
    from .distributed.checkpoint import Checkpoint

GRADS = ("envelope", "implicit", "unroll")


def solve(
    problem: Problem,
    *,
    backend: str = "auto",
    grad: str = "envelope",
    tol: float = 1e-4,
    norm: str = "l1",
    max_iter: int = 10_000,
    check_every: int | None = None,
    accelerate: str = "auto",
    start: Tensor | Solution | Scaled | None = None,
    schedule: Constant | Anneal | None = None,
    on_check: Callable[[int, Tensor], None] | None = None,
    checkpoint: Checkpoint | None = None,
    precision: str = "fp32",
    strict: bool = False,
) -> Solution:
    """Entropic transport between the two measures of `problem`, in the log domain, on the device its tensors live on.

    Minimises <C, P> + eps KL(P | a⊗b) plus the marginal penalties; batched over leading axes.

    backend      "auto", or by name: "dense", "resident", "chunked", "keops", "triton", "softmin"; `gpu_ot.explain(problem)` says why.
    grad         how the outputs depend on the inputs: "envelope" is exact for the first derivatives of `value` at convergence and costs
                 one sweep; "implicit" differentiates f and g, too, through the equations that they solve at convergence (set `tol`
                 as small as the derivatives should be exact), and again: second derivatives of `value` in all of its inputs;
                 "unroll" differentiates f, g and `value` through every iteration that was run, any number of times.
                 All of this holds inside torch.func.grad, vjp and jacrev, nested too; in place of vmap pass the batch itself.
    tol, norm    when to stop: L1 marginal error as a fraction of the mass, or see `gpu_ot.solver.loop.Stop`.
    max_iter     iterations at most; a status says so when they run out.
    check_every  iterations between looks at the error; when left out, every one on a CPU, where a look is free, and 10 otherwise.
    accelerate   "auto": a few plain iterations, then eps annealed where they show that this pays, then "mixing"; or by name,
                 "mixing", "relaxation" (see gpu_ot.solver.acceleration) or "none", Sinkhorn's own iterations.
    start        where to start: row potentials f (*batch, n) in units of the cost, or a Solution, also of other points or another
                 eps; zeros when left out.
    schedule     how eps reaches its target, `Constant` or `Anneal`; when left out, `accelerate` decides.
    on_check     called with (iterations, errors) at each look.
    checkpoint   where the potentials are written every so many minutes, see `Checkpoint`.
    precision    what "triton" may round float32 points to on the way: "tf32", "bf16" or "fp16" sweeps are faster, and their
                 potentials are then corrected in "fp32", the default. Other backends compute in the type they are given.
    strict       raise NotConverged, with the explanation, unless every problem met the tolerance.

    Returns a Solution: `value` (*batch,) in units of the cost, potentials f (*batch, n) and g (*batch, m),
    a lazy plan, and a `status` that says whether, when and why the loop stopped.
    Raises ProblemError for a setting that does not exist, BackendError for a backend that cannot serve this problem. Not
    converging is a status, not an exception.

    Feydy et al. 2019, arXiv:1810.08278 (the dual and its loop); Séjourné et al. 2019, arXiv:1910.12958 (relaxed marginals).
    """
    ranks = problem.cost.ranks
    ranks.agree(
        backend=backend, grad=grad, tol=tol, norm=norm, max_iter=max_iter, check_every=check_every, accelerate=accelerate,
        schedule=schedule, precision=precision, strict=strict, start=type(start).__name__, gradients=torch.is_grad_enabled(),
    )  # fmt: skip
    if grad not in GRADS:
        raise errors.unknown("grad", grad, GRADS)
    if max_iter < 1:
        raise errors.ProblemError(f"max_iter must be at least 1, found {max_iter}.")
    with ranks.report_failure(), torch.autocast(problem.a.device.type, enabled=False):  # it would turn products of float32 into halves
        rows, weight = _rows(start, problem)
        if start is not None:
            ranks.agree(start=rows)
        replayed = grad == "unroll" and needs_gradient(problem)
        if replayed and isinstance(schedule, Anneal):
            raise errors.ProblemError('grad="unroll" replays iterations at one eps: leave `schedule` out, or use grad="envelope".')
        if replayed and accelerate not in ("auto", "none"):
            raise errors.ProblemError('grad="unroll" replays plain iterations: leave `accelerate` out, or use grad="envelope".')
        stop, first = Stop(tol, norm), weigh(rows, weight, problem.eps).detach()
        keep = checkpoint.offer if checkpoint is not None and ranks.rank == 0 else None

        def search(problem: Problem) -> tuple[Geometry, Outcome]:
            geometry = bind(problem, backend, precision)
            mixed = "auto" if start is None and schedule is None else "mixing"
            how = ("none" if replayed or not geometry.accelerates else mixed) if accelerate == "auto" else accelerate
            every = check_every or (1 if how != "none" and problem.a.device.type == "cpu" else 10)
            at = schedule or Constant(problem.eps)
            with torch.no_grad():
                outcome = iterate(geometry, problem, at, transforms.numbers(first), stop, max_iter, every, on_check, how, keep)
            exact = geometry.exact  # where gradients are asked for, they reach the cost through this
            if exact is geometry:
                return geometry, outcome
            left = max(max_iter - outcome.n_iter, 1)
            with torch.no_grad():
                again = weigh(outcome.f, problem.a, problem.eps)
                corrected = iterate(exact, problem, Constant(problem.eps), again, stop, left, every, on_check, how, keep)
            return exact, outcome.then(corrected)

        geometry, outcome = gradients.apart(problem, search)
        if outcome.status is DIVERGED:
            ranks.check_points(problem.cost)  # which may have changed since the problem was made
        f, g = outcome.f, outcome.g
        if replayed:
            f, g = gradients.unroll(problem, geometry, rows, outcome.n_iter, weight)
        if grad == "implicit":
            f, g = implicit.potentials(problem, geometry, f, g, caution=_caution(outcome))
        value = (implicit if grad == "implicit" else gradients).value(problem, geometry, f, g).to(problem.given_dtype)
        history = torch.stack(outcome.errors)
        solution = Solution(problem, geometry, value, f, g, outcome.status, outcome.converged, outcome.n_iter, outcome.n_passes, history)
        return solution.raise_unless_converged() if strict else solution


def _caution(outcome: Outcome) -> str:
    """What to say where implicit derivatives of these potentials are asked for; nothing where they are as good as the type allows."""
    if outcome.status in (CONVERGED, STALLED):
        return ""
    return (
        f"implicit derivatives are exact at convergence, and these potentials are not there: marginal error "
        f"{float(outcome.errors[-1].amax()):.3g}. {outcome.status}"
    )


class Scaled(NamedTuple):
    """Rows to start from with their weights, f + eps log a = eps log u: for conventions that have u where ours has f."""

    rows: Tensor


def _rows(start: Tensor | Solution | Scaled | None, problem: Problem) -> tuple[Tensor, Tensor]:
    """Row potentials to start from and the weights that belong to them, (*batch, n) each."""
    if isinstance(start, Scaled):
        return start.rows.to(problem.a).expand_as(problem.a), torch.ones_like(problem.a)
    f = torch.zeros_like(problem.a) if start is None else start
    if isinstance(f, Solution):
        f = f.potential_a(problem.cost)
    if f.ndim == 0 or f.shape[-1] != problem.a.shape[-1]:
        raise errors.wrong_shape("start", f.shape, f"(*batch, {problem.a.shape[-1]}), a potential for each row")
    return torch.where(f.isfinite(), f, 0.0).to(problem.a).expand_as(problem.a), problem.a


def needs_gradient(problem: Problem) -> bool:
    """Whether anything in the problem asks for a gradient here and now."""
    inputs = (problem.a, problem.b, *problem.cost.inputs.values())
    return torch.is_grad_enabled() and any(transforms.asks(z) for z in inputs)
