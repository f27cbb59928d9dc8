"""Bind, iterate, attach the gradient: the only caller of the loop."""

from __future__ import annotations

import contextlib
import functools
import warnings
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec

import torch
from torch import Tensor

from . import errors, gradients, transforms
from .geometry.protocol import Geometry
from .geometry.select import bind
from .gradients import implicit
from .gradients.fixed_point import TOL, TOL_SINGLE, fixed_point
from .penalties import AtMost
from .problem import Problem
from .solution import Solution
from .solution.measured import measure
from .solver.acceleration import Anderson
from .solver.annealing import Anneal, Constant
from .solver.bar import bar
from .solver.criterion import Criterion, Marginal
from .solver.loop import iterations, sinkhorn
from .solver.monitor import Outcome
from .solver.partial import Partial
from .solver.status import CONVERGED, DIVERGED, STALLED, inexact
from .solver.step import Alternating, Start, State, Symmetric

if TYPE_CHECKING:
    from .distributed.checkpoint import Checkpoint

GRADS = ("envelope", "implicit", "unroll")
ACCELERATORS = ("auto", "mixing", "none")
ORDERS = ("rows", "columns", "symmetric")

Options = ParamSpec("Options")


def _of_a_problem(function: Callable[Options, Solution]) -> Callable[Options, Solution]:
    """The function, and for calls that are POT's an error that names the way out."""

    @functools.wraps(function)
    def call(*args: Any, **options: Any) -> Solution:
        found = args[0] if args else options.get("problem", options.get("M"))
        if not isinstance(found, Problem):
            raise errors.not_a_problem(found)
        if len(args) > 1:
            raise errors.ProblemError(
                "a Problem holds its weights, eps and penalties already: pass them to Problem(cost, eps, a, b, penalties)."
            )
        return function(*args, **options)  # pyright: ignore[reportCallIssue]

    return call


@transforms.eagerly
@_of_a_problem
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
    start: Tensor | Solution | None = None,
    schedule: Constant | Anneal | None = None,
    on_check: Callable[[int, Tensor], None] | None = None,
    checkpoint: Checkpoint | None = None,
    precision: str = "fp32",
    strict: bool = False,
    progress: bool = False,
) -> Solution:
    """Entropic transport between the two measures of `problem`, in the log domain, on the device its tensors live on.

    Minimises <C, P> + eps KL(P | a⊗b) plus the marginal penalties; batched over leading axes.

    backend      "auto", or by name: "dense", "resident", "chunked", "keops", "triton", "mesh", "multiscale", "line", "grid",
                 "softmin"; `gpu_ot.explain(problem)` says why. "mesh" has an error of its own, which is measured: `Solution.measured`.
    grad         how the outputs depend on the inputs: "envelope" is exact for the first derivatives of `value` at convergence and costs
                 one sweep; "implicit" differentiates f and g, too, through the equations that they solve at convergence (set `tol`
                 as small as the derivatives should be exact), and again: second derivatives of `value` in all of its inputs;
                 "unroll" differentiates f, g and `value` through every iteration that was run, any number of times.
                 All of this holds inside torch.func.grad, vjp and jacrev, nested too; in place of vmap pass the batch itself.
    tol, norm    when to stop: L1 marginal error as a fraction of the mass, or see `gpu_ot.solver.criterion.Marginal`. 0 asks for all
                 of `max_iter`; a positive one that the type cannot reach ends the loop as *stalled*.
    max_iter     iterations at most; a status says so when they run out.
    check_every  iterations between checks of the error; when left out, 1 on a CPU, where a check is free, and 10 otherwise.
    accelerate   "auto": a few plain iterations, then eps annealed where they show that this pays, then Anderson mixing; or by name:
                 "mixing" alone, or "none", Sinkhorn's own iterations.
    start        where to start: row potentials f (*batch, n) in units of the cost, or a Solution, also of other points or another
                 eps; zeros when left out.
    schedule     how eps reaches its target, `Constant` or `Anneal`; when left out, `accelerate` decides.
    on_check     called with (iterations, errors) at each check.
    checkpoint   where the potentials are written every so many minutes, see `Checkpoint`.
    precision    what "triton" may round float32 points to on the way: "tf32", "bf16" or "fp16" sweeps are faster, and their
                 potentials are then corrected in "fp32", the default. Other backends compute in the type they are given.
    strict       raise NotConverged, with the explanation, unless every problem met the tolerance.
    progress     show iterations and the largest error while it runs: tqdm's bar, or a warning where tqdm is not installed.

    Returns a Solution: `value` (*batch,) in units of the cost, potentials f (*batch, n) and g (*batch, m),
    a lazy plan, and a `status` that says whether, when and why the loop stopped.
    Raises ProblemError for a setting that does not exist, BackendError for a backend that cannot serve this problem. Not
    converging is a status, not an exception; an eps too small to be resolved is a warning, too.

    Feydy et al. 2019, arXiv:1810.08278 (the dual and its loop); Séjourné et al. 2019, arXiv:1910.12958 (relaxed marginals).
    """
    ranks = problem.cost.ranks
    ranks.agree(
        backend=backend, grad=grad, tol=tol, norm=norm, max_iter=max_iter, check_every=check_every, accelerate=accelerate,
        schedule=schedule, precision=precision, strict=strict, start=type(start).__name__, gradients=torch.is_grad_enabled(),
    )  # fmt: skip
    keep = checkpoint.offer if checkpoint is not None and ranks.rank == 0 else None
    with ranks.report_failure(), bar(on_check) if progress and ranks.rank == 0 else contextlib.nullcontext(on_check) as on_check:
        rows = start_rows(start, problem)
        if start is not None:
            ranks.agree(start=rows)
        solution = find(
            problem, backend=backend, precision=precision, grad=grad, criterion=Marginal(tol, norm),
            start=None if start is None else Start(rows, problem.a),
            max_iter=max_iter, check_every=check_every, accelerate=accelerate if start is None or accelerate != "auto" else "mixing",
            schedule=schedule, on_check=on_check, keep=keep,
        )  # fmt: skip
        _ = solution.value  # computed now: the inputs may change in place before somebody reads it
        if solution.status is DIVERGED:
            ranks.check_points(problem.cost)  # which may have changed since the problem was made
    if solution.status.name == "unresolved":
        warnings.warn(f"gpu_ot.solve, {solution.status}", RuntimeWarning, stacklevel=4)
    return solution.raise_unless_converged() if strict else solution


@transforms.eagerly
def find(
    problem: Problem,
    *,
    order: str = "rows",
    backend: str = "auto",
    precision: str = "fp32",
    grad: str = "envelope",
    criterion: Criterion | None = None,
    start: Start | None = None,
    max_iter: int = 10_000,
    check_every: int | None = None,
    accelerate: str = "auto",
    after: float = 0,
    leap: bool = False,
    schedule: Constant | Anneal | None = None,
    on_check: Callable[[int, Tensor], None] | None = None,
    keep: Callable[[int, float, Tensor, Tensor], None] | None = None,
) -> Solution:
    """`solve` with everything that the front doors set: what other packages' functions differ in.

    order       which marginal is exact, "rows" or "columns"; "symmetric" where both sides are one measure, see `Symmetric`.
    criterion   when to stop; Marginal() when left out.
    start       row potentials, for order="columns" those of the columns; when left out 0, or what the backend proposes.
    after       plain iterations before acceleration sets in.
    leap        see `gpu_ot.solver.annealing.blocks`.

    The result's `errors` are in the unit of the criterion. Settings as in `solve` otherwise; they are checked here.
    """
    for name, given, known in (("grad", grad, GRADS), ("accelerate", accelerate, ACCELERATORS), ("order", order, ORDERS)):
        if given not in known:
            raise errors.unknown(name, given, known)
    if max_iter < 1:
        raise errors.ProblemError(f"max_iter must be at least 1, found {max_iter}.")
    problem = problem.kept
    if not problem.a.numel():
        return _of_nothing(problem, order)
    grad = grad if grad == "implicit" or needs_gradient(problem) else "envelope"
    unrolled = grad == "unroll"
    if unrolled and (isinstance(schedule, Anneal) or accelerate == "mixing"):
        raise errors.ProblemError(
            'grad="unroll" differentiates plain iterations at one eps: leave `schedule` and `accelerate` out, or use grad="envelope".'
        )
    accelerate = "none" if unrolled or after >= max_iter else accelerate
    posed, rule = problem.T if order == "columns" else problem, criterion or Marginal()
    unstarted = start is None
    start = start or Start(torch.zeros_like(posed.a), posed.a)
    every = check_every or (1 if accelerate != "none" and problem.a.device.type == "cpu" else 10)

    def search(problem: Problem) -> tuple[Geometry, Outcome]:
        geometry, at = bind(problem, backend, precision, rule.part_of_mass if grad == "envelope" else None), start.numbers()
        run: dict[str, Any] = dict(check_every=every, on_check=on_check, keep=keep, leap=leap)
        auto = accelerate == "auto" and schedule is None and order != "symmetric" and not geometry.single_launch
        step = _step(problem, order, accelerate, after)
        if auto and unstarted and problem.balanced and (rows := geometry.initial_rows()) is not None:
            at = at._replace(f=rows)
        with torch.no_grad():
            own_rule = rule.stricter() if geometry.approximate else rule
            outcome = sinkhorn(geometry, step, own_rule, at, max_iter=max_iter, schedule=schedule, auto=auto, **run)
        further = functools.partial(_further, problem, step, max_iter, run)
        exact = geometry.exact  # bound with gradients on: they reach the cost through it
        if geometry.approximate and exact is geometry:
            geometry, outcome = _measured(problem, geometry, own_rule, rule.tol, outcome, further)
            if backend != "auto" or outcome.status.name != "inexact":
                return geometry, outcome
            exact = bind(problem, "multiscale", precision, rule.part_of_mass).exact  # whoever named no backend gets what they asked for
        if exact is geometry:
            return geometry, outcome
        return exact, further(exact, rule, outcome)

    with torch.autocast(problem.a.device.type, enabled=False):  # it would turn products of float32 into halves
        geometry, end = gradients.outside(posed, search)
        f, g = end.f, end.g
        if unrolled:
            f, g = _unroll(posed, geometry, start, end, rule)
        if grad == "implicit" and problem.mass is None:
            f, g = implicit.potentials(posed, geometry, f, g, caution=_caution(end))
        elif grad == "implicit":
            f, g = _partial(posed, geometry, end)
        if order == "columns":
            f, g, geometry = g, f, geometry.T
            end.measured = end.measured and end.measured.T
            if problem.mass is not None:  # the multiplier of the mass goes over to the rows
                level = torch.where(problem.b > 0, g, -torch.inf).amax(-1, keepdim=True)
                f, g = f + level, g - level
        history = torch.stack(end.errors) if end.errors else end.f.new_zeros(0, *end.f.shape[:-1])
    recorded = torch.is_grad_enabled()
    more, held, values = 0.0, (f, g), implicit if grad == "implicit" else gradients
    if problem.mass is not None:
        if grad == "implicit":  # the value's own derivatives are the envelope's
            held, values = (f.detach(), g.detach()), gradients
        level = torch.where(problem.a.detach() > 0, held[0], -torch.inf).amax(-1, keepdim=True)
        more = (level * (problem.mass.unsqueeze(-1) - problem.a.sum(-1, keepdim=True))).squeeze(-1)
        problem = problem.restricted(problem.cost, problem.a, problem.b, (AtMost(level), AtMost()))

    def value() -> Tensor:
        with torch.set_grad_enabled(recorded), torch.autocast(problem.a.device.type, enabled=False):
            return values.value(problem, geometry, *held) + more

    return Solution(problem, geometry, value, f, g, end.status, end.converged, end.n_iter, end.n_sweeps, history, end.measured)


def _further(
    problem: Problem, step: Alternating, max_iter: int, run: dict[str, Any], geometry: Geometry, rule: Criterion, before: Outcome
) -> Outcome:
    """On from the end of a loop by the sums of another backend."""
    left, start = max(max_iter - before.n_iter, 1), Start(before.f, problem.a.detach())
    with torch.no_grad():
        end = sinkhorn(geometry, step, rule, start, max_iter=left, **run)
    end.n_iter, end.n_sweeps, end.errors = end.n_iter + before.n_iter, end.n_sweeps + before.n_sweeps, before.errors + end.errors
    return end


def _measured(
    problem: Problem,
    geometry: Geometry,
    rule: Criterion,
    tol: float,
    end: Outcome,
    further: Callable[[Geometry, Criterion, Outcome], Outcome],
) -> tuple[Geometry, Outcome]:
    """The end of a loop on sums that are not exact, measured by those that are; on finer ones where the error asks for it."""
    end.measured = measure(problem, end.f, end.g)
    ended = CONVERGED, STALLED  # by the sums of the mesh, or at the floor of their own errors
    while tol > 0 and end.status in ended and not end.measured.bound <= tol:
        finer = geometry.finer(end.measured.error / (tol / 2))
        if finer is None:
            break
        geometry, end = finer, further(finer, rule, end)
        end.measured = measure(problem, end.f, end.g)
    if tol > 0 and end.status in ended:
        met = end.measured.bound <= tol
        end.status, end.converged = CONVERGED if met else inexact(str(end.measured), tol), torch.full_like(end.converged, met)
    return geometry, end


def _of_nothing(problem: Problem, order: str) -> Solution:
    """The solution of a batch of no problems, in its shapes, with gradients of 0 for what all problems share."""
    geometry = bind(problem, "softmin")
    numbers = [z for z in problem.learnable if z is not None]
    tie = torch.stack([z.double().sum() for z in (problem.a, problem.b, *problem.cost.inputs.values(), *numbers)]).sum() * 0
    f, g = torch.zeros_like(problem.a), torch.zeros_like(problem.b)
    value, none = f.sum(-1) + tie, torch.ones(f.shape[:-1], dtype=torch.bool, device=f.device)
    return Solution(problem, geometry, lambda: value, f + tie, g + tie, CONVERGED, none, 0, 0, f.new_zeros(0, *f.shape[:-1]))


def _step(problem: Problem, order: str, accelerate: str, after: float = 0) -> Alternating:
    if problem.mass is not None:  # the multiplier of the mass makes (f + c, g - c) another plan
        return Partial(problem, problem.eps) if accelerate == "none" else Partial(problem, problem.eps, Anderson(gauge=False))
    if order == "symmetric":  # (f + c, f + c) is another plan, unlike (f + c, g - c)
        return Symmetric(problem, problem.eps, Anderson(gauge=False))
    if accelerate == "none":
        return Alternating(problem, problem.eps)
    return Alternating(problem, problem.eps, Anderson(gauge=problem.balanced), plain_until=int(after))


def _unroll(problem: Problem, geometry: Geometry, start: Start, end: Outcome, criterion: Criterion) -> tuple[Tensor, Tensor]:
    """The potentials again, as a function of the start, the cost and the weights: exact for whatever was computed, converged or not.

    O((n + m) k) memory for k iterations beside the cost, and their time in the readable form, forward and again backward.
    """
    gradients.refuse_learnable(problem, "unroll")
    learnable = problem.restricted(problem.cost, problem.a, problem.b, problem.as_given[1])
    step = _step(learnable, "rows", "none")
    state = iterations(gradients.Differentiable(geometry.entrywise), step, start, end.n_iter)
    return criterion.seen(step, state)


def _partial(problem: Problem, geometry: Geometry, end: Outcome) -> tuple[Tensor, Tensor]:
    """The potentials of partial transport, as functions of cost, weights and mass: g is the fixed point of an iteration."""
    gradients.refuse_learnable(problem, "implicit")
    step, map_ = _step(problem, "rows", "none"), gradients.Differentiable(geometry.entrywise)

    def once(g: Tensor) -> State:
        return step.moved(map_, State(g, g, g), g, None, 1)

    if needs_gradient(problem) and (caution := _caution(end)):
        warnings.warn(caution, RuntimeWarning, stacklevel=3)
    (g,) = fixed_point(lambda at: (once(at[0]).g_next,), (end.g,), TOL if geometry.dtype == torch.float64 else TOL_SINGLE)
    return once(g).f, g


def _caution(end: Outcome) -> str:
    """A warning for implicit derivatives at these potentials; empty where the potentials are as good as the type allows."""
    if end.status in (CONVERGED, STALLED):
        return ""
    return (
        f"implicit derivatives are exact at convergence, and these potentials are not there: marginal error "
        f"{float(end.errors[-1].amax()) if end.errors else float('nan'):.3g}. {end.status}"
    )


def start_rows(start: Tensor | Solution | None, problem: Problem) -> Tensor:
    """Row potentials to start from, (*batch, n)."""
    f = torch.zeros_like(problem.a) if start is None else start
    if isinstance(f, Solution):
        f = f.potential_a(problem.cost)
    if f.ndim == 0 or f.shape[-1] != problem.a.shape[-1]:
        raise errors.wrong_shape("start", f.shape, f"(*batch, {problem.a.shape[-1]}), a potential for each row")
    return torch.where(f.isfinite(), f, 0.0).to(problem.a).expand_as(problem.a)


def needs_gradient(problem: Problem) -> bool:
    """Whether a tensor of the problem requires a gradient here and now."""
    numbers = [z for z in problem.learnable if z is not None]
    numbers += [] if problem.mass is None else [problem.mass]
    return torch.is_grad_enabled() and transforms.requires_grad(problem.a, problem.b, *problem.cost.inputs.values(), *numbers)
