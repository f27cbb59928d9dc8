"""POT's unified API, for its entropic problems: `ot.solve`, `ot.solve_sample`, `ot.dist`, and their result.

One name, two forms: `solve(Problem(...))` is our own, `solve(M, a, b, reg, ...)` POT's.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple, overload

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..costs.base import Cost
from ..distributed.costs import Sharded
from ..distributed.dtensors import is_dtensor, local
from ..gradients import operators as gradients
from ..penalties import KL, TV
from ..problem import Problem
from ..solution.solution import Solution
from ..solve import solve as solve_problem
from ..solver.status import CONVERGED, STALLED, Status
from . import balanced
from .arrays import is_array, lazily, number, take, tensors
from .clouds import between
from .empirical import Limits, streamed
from .lazy import LazyPlan
from .refusals import elsewhere, unknown_method, warn
from .relaxed import ELSEWHERE, pair, run

GRADS = ("autodiff", "envelope", "last_step", "detach")
METHODS = ("sinkhorn", "sinkhorn_log")
GEOMLOSS = ("geomloss", "geomloss_auto", "geomloss_tensorized", "geomloss_online", "geomloss_multiscale")
#: POT's solvers of samples that are no entropic transport between these points.
OTHER_SOLVERS = ("1d", "gaussian", "gaussian_hd", "lowrank", "nystroem", "factored", "sliced", "max_sliced", "bsp")


@dataclass
class OTResult:
    """What POT's `OTResult` holds, and how the loop ended.

    plan        (n, m), or (B, n, m) for a batch; None where the problem is solved lazily.
    lazy_plan   slices, multiplies and samples the plan without forming it; None where it is formed.
    potentials  (log u, log v) in POT's scale for the function that was called.
    value       the regularised optimum; `value_linear` is its part <P, M>.
    status      how the loop ended, in words; `converged`, `n_iter` (the last iteration, from 0) and `errors` for programs.
    """

    value: Any = None
    value_linear: Any = None
    potentials: tuple[Any, Any] | None = None
    plan: Any = None
    lazy_plan: LazyPlan | None = None
    log: dict[str, Any] | None = None
    status: Status | str | None = None
    converged: Any = None
    n_iter: int | None = None
    errors: list[Any] = field(default_factory=list)
    value_quad: None = None
    _backend: None = field(default=None, repr=False)  # POT's own code asks for one; None is numpy's, which passes tensors on

    @property
    def potential_a(self) -> Any:
        return None if self.potentials is None else self.potentials[0]

    @property
    def potential_b(self) -> Any:
        return None if self.potentials is None else self.potentials[1]

    @property
    def sparse_plan(self) -> Any:
        """The plan in compressed rows: scipy's for numpy, torch's for tensors."""
        if self.plan is None:
            return None
        if isinstance(self.plan, np.ndarray):
            from scipy.sparse import csr_matrix

            return csr_matrix(self.plan)
        return self.plan.to_sparse_csr()

    @property
    def marginal_a(self) -> Any:
        return self._marginal(-1)

    @property
    def marginal_b(self) -> Any:
        return self._marginal(-2)

    @property
    def marginals(self) -> tuple[Any, Any] | None:
        return None if self.lazy_plan is None and self.plan is None else (self.marginal_a, self.marginal_b)

    def _marginal(self, axis: int) -> Any:
        if self.lazy_plan is not None:
            return self.lazy_plan.sum(axis)
        return None if self.plan is None else self.plan.sum(axis)

    @property
    def a_to_b(self) -> Any:
        raise NotImplementedError("multiply the plan: (plan @ X_b) / plan.sum(1)[:, None] maps the points of a.")

    @property
    def b_to_a(self) -> Any:
        raise NotImplementedError("multiply the plan: (plan.T @ X_a) / plan.sum(0)[:, None] maps the points of b.")

    @property
    def citation(self) -> str:
        return "Flamary et al., POT: Python Optimal Transport, JMLR 22(78), 2021, whose interface this is."


class OnDemand(OTResult):
    """A lazy result whose `plan` is formed when it is read, as geomloss's results do."""

    _formed: Any = None

    @property
    def plan(self) -> Any:
        if self._formed is None and self.lazy_plan is not None:
            self._formed = self.lazy_plan.to_dense()
        return self._formed

    @plan.setter
    def plan(self, P: Any) -> None:
        self._formed = P


@overload
def solve(M: Problem, *, max_iter: int = ..., tol: float = ..., grad: str = ..., **options: Any) -> Solution: ...
@overload
def solve(
    M: Any,
    a: Any = ...,
    b: Any = ...,
    reg: Any = ...,
    c: Any = ...,
    reg_type: Any = ...,
    unbalanced: Any = ...,
    unbalanced_type: str = ...,
    method: str | None = ...,
    n_threads: int = ...,
    max_iter: int | None = ...,
    plan_init: Any = ...,
    potentials_init: Any = ...,
    tol: float | None = ...,
    verbose: bool = ...,
    grad: str = ...,
) -> OTResult: ...
def solve(
    M,
    a=None,
    b=None,
    reg=None,
    c=None,
    reg_type="KL",
    unbalanced=None,
    unbalanced_type="KL",
    method=None,
    n_threads=1,
    max_iter=None,
    plan_init=None,
    potentials_init=None,
    tol=None,
    verbose=False,
    grad="autodiff",
    **options,
):
    """`solve(problem, *, backend, grad, tol, ...)` is `gpu_ot.solve` of a Problem, see there; otherwise POT's `ot.solve`:

    Minimises <P, M> + reg R(P) (+ unbalanced D(P1, a) + unbalanced D(P^T 1, b)) over P >= 0.

    M            costs (n, m), or a gpu_ot.Cost such as SqEuclidean(x, y), which is never made an n-by-m array.
    a, b         weights (n,) and (m,); None is uniform.
    reg          > 0, in units of M.
    reg_type     "KL" for KL(P | a⊗b), or KL(P | c) when relaxed; "entropy" for sum P log P (- P when relaxed).
    unbalanced, unbalanced_type   how dearly the marginals are held, a number or a pair; "KL" or "TV". None holds them exactly.
    max_iter, tol    1000, and 1e-9 by the rule of `sinkhorn_log`, or of `sinkhorn_unbalanced`.
    potentials_init  (log u, log v) to start from.
    grad         "autodiff": everything, through the iterations, and so is "last_step"; "envelope": `value` alone, exact at the
                 optimum; "detach": nothing.

    Returns an OTResult. Raises Elsewhere, a NotImplementedError that names POT's function, for what is not entropic.
    """
    if isinstance(M, Problem):
        return _solve_problem(M, (a, b, reg, c, unbalanced), max_iter, tol, grad, options)
    if options:
        raise TypeError(f"solve() of a matrix takes no {', '.join(options)}; they belong to solve(Problem(M, eps, a, b), ...).")
    return _solve_costs(M, a, b, reg, c, reg_type, unbalanced, unbalanced_type, method, max_iter, potentials_init, tol, verbose, grad)


def _solve_costs(
    M: Any,
    a: Any,
    b: Any,
    reg: Any,
    c: Any,
    reg_type: Any,
    relaxed: Any,
    unbalanced_type: str,
    method: str | None,
    max_iter: int | None,
    init: Any,
    tol: float | None,
    verbose: bool,
    grad: str,
) -> OTResult:
    if grad not in GRADS:
        raise errors.unknown("grad", grad, GRADS)
    if grad == "last_step" and max_iter == 0:
        raise errors.ProblemError("The maximum number of iterations must be greater than 0 when using grad=last_step.")
    entropy, penalty = _kinds(reg_type, relaxed, unbalanced_type)
    if method is not None and method.lower() not in METHODS:
        if method.lower() in ELSEWHERE:
            raise elsewhere(f"method = {method!r}", ELSEWHERE[method.lower()])
        raise unknown_method(method, METHODS)
    if reg is None or number(reg) == 0:
        raise elsewhere("reg = 0", "ot.solve(M, a, b, ...) or ot.emd" if relaxed is None else "ot.unbalanced.mm_unbalanced")
    if number(reg) < 0:
        raise errors.bad_eps("reg", reg)
    asked = _Asked(reg, entropy, relaxed, penalty, init, verbose, grad, max_iter or 1000, 1e-9 if tol is None else tol)
    M = lazily(M)
    if isinstance(M, Cost):
        (ta, tb), back = take(a=a, b=b)
        return _solve_lazily(M, ta, tb, back if is_array(a) or is_array(b) else tensors, asked)
    if not is_array(M):
        raise errors.ProblemError(f"M must be an array, a tensor, a gpu_ot.Cost or a Problem, found {type(M).__name__}.")
    return _solve_balanced(M, a, b, asked) if relaxed is None else _solve_relaxed(M, a, b, c, asked)


class _Asked(NamedTuple):
    """What is asked beside costs and weights, checked."""

    reg: Any
    entropy: bool
    relaxed: Any
    penalty: type[KL] | type[TV]
    init: Any
    verbose: bool
    grad: str
    max_iter: int
    tol: float

    @property
    def unroll(self) -> bool:
        return self.grad in ("autodiff", "last_step")


def _solve_problem(problem: Problem, pots: tuple[Any, ...], max_iter: Any, tol: Any, grad: str, options: dict[str, Any]) -> Solution:
    if any(z is not None for z in pots):
        raise errors.ProblemError(
            "a Problem holds its weights, eps and penalties already: pass them to Problem(cost, eps, a, b, penalties)."
        )
    given = dict(max_iter=max_iter, tol=tol, grad=None if grad == "autodiff" else grad)
    return solve_problem(problem, **{k: v for k, v in given.items() if v is not None}, **options)


def _kinds(reg_type: Any, relaxed: Any, unbalanced_type: Any) -> tuple[bool, type[KL] | type[TV]]:
    """(entropy rather than KL, the penalty of the marginals)."""
    regular = reg_type.lower() if isinstance(reg_type, str) else None
    if regular not in ("kl", "entropy"):
        what = "a regulariser that is a pair of functions" if regular is None else f'Not implemented reg_type="{reg_type}": it'
        raise elsewhere(what, "ot.solve" if relaxed is None else "ot.unbalanced.lbfgsb_unbalanced")
    kinds: dict[str, type[KL] | type[TV]] = {"kl": KL, "tv": TV}
    if relaxed is not None and unbalanced_type.lower() not in kinds:
        raise elsewhere(f'Not implemented unbalanced_type="{unbalanced_type}": it', "ot.unbalanced.lbfgsb_unbalanced")
    return regular == "entropy", kinds.get(unbalanced_type.lower(), KL)


def _detached(*inputs: Any) -> list[Any]:
    return [z.detach() if isinstance(z, Tensor) else z for z in inputs]


def _with_gradient(number: Tensor, of: Tensor | None) -> Tensor:
    """`number` as computed, with the gradient of `of`."""
    return number if of is None else number.detach() + (of - of.detach())


def _solve_balanced(M: Any, a: Any, b: Any, asked: _Asked) -> OTResult:
    reg, unroll = asked.reg, asked.unroll
    if asked.grad == "detach":
        M, a, b, reg = _detached(M, a, b, reg)
    rules = balanced.METHODS["sinkhorn_log"]
    done = balanced.transport(a, b, M, reg, rules, asked.max_iter, asked.tol, asked.verbose, True, asked.init, unroll)
    problem, f, g = done.problem, done.outcome.f, done.outcome.g
    with torch.set_grad_enabled(unroll and torch.is_grad_enabled()):
        P = done.plan()
        wide = P.to(f.dtype)
        rows, columns = wide.sum(-1), wide.sum(-2)
        value = reg / problem.eps * (carried(rows, f) + carried(columns, g))
        if asked.entropy:  # sum P log P = sum P log(P / a⊗b) + the same of the weights
            value = value + reg * (carried(rows, log_weight(problem.a)) + carried(columns, log_weight(problem.b)))
        linear = done.losses()
    if asked.grad == "envelope" and torch.is_grad_enabled():
        envelope = reg / problem.eps * gradients.value(problem, done.geometry, f, g)
        if asked.entropy:
            envelope = envelope + reg * entropy_of(problem)
        value = _with_gradient(value, envelope)
    return OTResult(
        value=done.give(value),
        value_linear=done.give(linear),
        potentials=done.logarithms(),
        plan=done.give(P),
        **_ending(done.story()),
    )


def _solve_relaxed(M: Any, a: Any, b: Any, c: Any, asked: _Asked) -> OTResult:
    reg, tau = asked.reg, asked.relaxed
    if asked.grad == "detach":
        M, a, b, c, reg, tau = _detached(M, a, b, c, reg, tau)
    done = run(
        a,
        b,
        M,
        reg,
        tau,
        reg_type="entropy" if asked.entropy else "kl",
        penalty=asked.penalty,
        c=None if asked.entropy else c,
        warmstart=asked.init,
        numItermax=asked.max_iter,
        stopThr=asked.tol,
        verbose=asked.verbose,
        log=False,
        unroll=asked.unroll,
    )
    if done.state.status not in (CONVERGED, STALLED):
        warn(f"{balanced.NOT_CONVERGED} Status {done.state.status}")
    with torch.set_grad_enabled(asked.unroll and torch.is_grad_enabled()):
        value, linear, P = done.total(), done.linear(), done.plan()
    if asked.grad == "envelope" and torch.is_grad_enabled():
        value = _with_gradient(value, done.envelope())
    return OTResult(
        value=done.give(value),
        value_linear=done.give(linear),
        potentials=done.logarithms(),
        plan=done.give(P),
        **_ending(done.story()),
    )


def _solve_lazily(cost: Cost, a: Tensor | None, b: Tensor | None, back: Callable[[Tensor], Any], asked: _Asked) -> OTResult:
    """No n-by-m array: O((n + m) d) memory, whatever the gradient."""
    if isinstance(cost, Sharded):
        raise errors.ProblemError(
            "points that ranks share are solved as solve(Problem(Sharded(...), eps)), or solve_sample(..., group=group)."
        )
    if asked.entropy and asked.relaxed is not None:
        raise errors.ProblemError('reg_type = "entropy" with relaxed marginals needs a matrix of costs: pass lazy=False, or reg_type="KL".')
    taus = (math.inf, math.inf) if asked.relaxed is None else pair(asked.relaxed)
    problem = Problem(cost, number(asked.reg), a, b, (asked.penalty(number(taus[0])), asked.penalty(number(taus[1]))))
    limits = Limits(asked.max_iter, asked.tol, asked.verbose, warn=True)
    with torch.set_grad_enabled(asked.grad != "detach" and torch.is_grad_enabled()):
        done = streamed(problem, back, limits, asked.init, asked.unroll)
        value = done.solution.value.to(problem.a)
        if asked.entropy:
            value = value + problem.eps * entropy_of(problem)
    with torch.set_grad_enabled(asked.unroll and torch.is_grad_enabled()):
        linear, potentials = done.linear(), done.logarithms()
        log = done.log()
    return OTResult(
        value=done.give(value),
        value_linear=done.give(linear),
        potentials=potentials,
        lazy_plan=done.plan(),
        log=log,
        **_ending(done.story()),
    )


def _ending(story: dict[str, Any]) -> dict[str, Any]:
    return {k: story[k] for k in ("status", "converged", "n_iter", "errors")}


def carried(mass: Tensor, z: Tensor) -> Tensor:
    """Where no mass is, z may be anything."""
    return (mass * torch.where(mass > 0, z, 0.0)).sum(-1)


def log_weight(w: Tensor) -> Tensor:
    """log w, and 0 with derivative 0 at w = 0: an empty atom has no entropy."""
    return torch.where(w > 0, torch.where(w > 0, w, 1.0).log(), 0.0)


def entropy_of(problem: Problem) -> Tensor:
    """sum a log a + sum b log b, what sum P log P has beyond KL(P | a⊗b)."""
    return (problem.a * log_weight(problem.a)).sum(-1) + (problem.b * log_weight(problem.b)).sum(-1)


def solve_sample(
    X_a,
    X_b,
    a=None,
    b=None,
    metric="sqeuclidean",
    reg=None,
    c=None,
    reg_type="KL",
    unbalanced=None,
    unbalanced_type="KL",
    lazy=False,
    batch_size=None,
    method=None,
    n_threads=1,
    max_iter=None,
    plan_init=None,
    rank=100,
    scaling=0.95,
    potentials_init=None,
    X_init=None,
    tol=None,
    verbose=False,
    grad="autodiff",
    random_state=None,
    debias=False,
    n_projections=50,
    projections=None,
    scaler=None,
    *,
    group=None,
    layout="auto",
):
    """POT's `ot.solve_sample`: `solve` between the points X_a (n, d) and X_b (m, d).

    metric   "sqeuclidean", "euclidean", "cityblock", "minkowski", "cosine" or "correlation".
    lazy     no n-by-m array, for relaxed marginals too: the result has `lazy_plan` instead of `plan`, and a `value`.
    method   "sinkhorn" or "sinkhorn_log"; "geomloss", "geomloss_online", "geomloss_multiscale" and "geomloss_auto" mean lazy=True, and
             form `plan` when it is read.
    debias   True: values minus half of those of X_a and X_b with themselves (Feydy et al. 2019, arXiv:1810.08278).
    scaler   applied to both clouds: a function, or an object with `transform`.

    group    a process group or DeviceMesh: X_a, X_b, a and b are this rank's share of the points, or DTensors (which need no group). All
             ranks call, and get what `solve(Problem(...))` gives, a gpu_ot.Solution, with its `tol` and `max_iter`; see gpu_ot.Sharded,
             also for `layout`.

    `batch_size`, `scaling`, `rank`, `n_projections` and the like are accepted and not needed. Otherwise as `solve`.
    """
    if group is not None or is_dtensor(X_a) or is_dtensor(X_b):
        others = dict(c=c, potentials_init=potentials_init, debias=debias or None, scaler=scaler, lazy=lazy or None, method=method)
        if refused := [name for name, value in others.items() if value is not None]:
            raise errors.ProblemError(f"{', '.join(refused)}: not known where ranks share the points. SamplesLoss(group=...) debiases.")
        return _solve_shared(X_a, X_b, a, b, metric, reg, reg_type, unbalanced, unbalanced_type, max_iter, tol, grad, group, layout)
    name = None if method is None else method.lower()
    if name in OTHER_SOLVERS:
        raise elsewhere(f"method = {method!r}", f"ot.solve_sample(..., method={method!r})")
    if name is not None and name not in (*METHODS, *GEOMLOSS, *ELSEWHERE):
        raise unknown_method(method, (*METHODS, *GEOMLOSS))
    if scaler is not None:
        X_a, X_b = _scaled(scaler, X_a), _scaled(scaler, X_b)
    on_demand = name in GEOMLOSS and name != "geomloss_tensorized"
    if name in GEOMLOSS:
        lazy, name = on_demand, None
    if debias == "split":
        raise elsewhere('debias = "split"', 'ot.solve_sample(..., debias="split")')

    def between_clouds(X_a: Any, X_b: Any, a: Any, b: Any) -> OTResult:
        (x, y), back = take(X_a=X_a, X_b=X_b)
        if x is None or y is None:
            raise errors.wrong_shape("X_a" if x is None else "X_b", (0,), "(n, d), one row a point")
        cost = between(x, y, metric)
        options = (reg, c, reg_type, unbalanced, unbalanced_type, name, max_iter, potentials_init, tol, verbose, grad)
        if not lazy:
            return _solve_costs(back(cost.dense()), a, b, *options)
        if c is not None:
            raise errors.ProblemError("c is an n-by-m array, which lazy=True is there to avoid: pass lazy=False.")
        (ta, tb), _ = take(a=a, b=b)
        result = _solve_costs(cost, ta, tb, *options)
        return result if back is tensors else _returned(result, back)

    result = _debiased(between_clouds, X_a, X_b, a, b) if debias else between_clouds(X_a, X_b, a, b)
    return OnDemand(**{name: getattr(result, name) for name in OTResult.__dataclass_fields__}) if on_demand else result


def _solve_shared(
    X_a: Any, X_b: Any, a: Any, b: Any, metric: str, reg: Any, reg_type: Any, relaxed: Any, unbalanced_type: str,
    max_iter: int | None, tol: float | None, grad: str, group: Any, layout: str,
) -> Solution:  # fmt: skip
    entropy, penalty = _kinds(reg_type, relaxed, unbalanced_type)
    if entropy:
        raise errors.ProblemError('reg_type = "entropy" is not known where ranks share the points: pass reg_type="KL", the same plan.')
    if reg is None:
        raise errors.bad_eps("reg", reg)
    group = next((z.device_mesh for z in (X_a, X_b) if is_dtensor(z)), None) if group is None else group
    x, y = local("X_a", X_a), local("X_b", X_b)
    taus = (math.inf, math.inf) if relaxed is None else pair(relaxed)
    cost = Sharded(between(x, y, metric), group, layout)
    problem = Problem(cost, number(reg), a, b, (penalty(number(taus[0])), penalty(number(taus[1]))))
    return _solve_problem(problem, (), max_iter, tol, grad, {})


def _returned(result: OTResult, back: Callable[[Tensor], Any]) -> OTResult:
    """A lazy result in the caller's kind of array."""

    def there(z: Any) -> Any:
        if isinstance(z, Tensor):
            return back(z)
        if isinstance(z, (list, tuple)):
            return type(z)(there(y) for y in z)
        if isinstance(z, dict):
            return {k: there(y) for k, y in z.items()}
        return z.returning(back) if isinstance(z, LazyPlan) else z

    return OTResult(**{name: there(getattr(result, name)) for name in OTResult.__dataclass_fields__})


def _scaled(scaler: Any, X: Any) -> Any:
    if callable(getattr(scaler, "transform", None)):
        return scaler.transform(X)
    if callable(scaler):
        return scaler(X)
    raise errors.ProblemError(f"scaler must be None, an object with .transform(), or a function, found {type(scaler).__name__}.")


def _debiased(between_clouds: Callable[..., OTResult], X_a: Any, X_b: Any, a: Any, b: Any) -> OTResult:
    pairs = {"res_aa": (X_a, X_a, a, a), "res_bb": (X_b, X_b, b, b), "res_ab": (X_a, X_b, a, b)}
    found = {name: between_clouds(*clouds) for name, clouds in pairs.items()}
    aa, bb, ab = found.values()
    return OTResult(
        value=ab.value - 0.5 * (aa.value + bb.value),
        value_linear=ab.value_linear - 0.5 * (aa.value_linear + bb.value_linear),
        potentials=ab.potentials,
        plan=ab.plan,
        lazy_plan=ab.lazy_plan,
        log=found,
        status=ab.status,
        converged=ab.converged,
        n_iter=ab.n_iter,
        errors=ab.errors,
    )


def dist(x1, x2=None, metric="sqeuclidean", p=2, w=None, backend="auto", nx=None, use_tensor=False):
    """POT's `ot.dist`: the (n, m) costs between the rows of x1 (n, d) and x2 (m, d); x2 = x1 when left out.

    From differences, so that clouds far from the origin keep their digits, and with derivative 0 where points coincide.
    metric   "sqeuclidean", "euclidean", "cityblock", "minkowski" (with p, and weights w), "cosine", "correlation".
    """
    (x, y, weights), back = take(x1=x1, x2=x2, w=w)
    if x is None or (x2 is not None and y is None):
        raise errors.wrong_shape("x1" if x is None else "x2", (0,), "(n, d), one row a point")
    if backend == "scipy":
        raise elsewhere('backend = "scipy"', 'ot.dist(..., backend="scipy")')
    return back(between(x, x if y is None else y, metric, p, weights).dense())
