"""POT's `ot.solve`: entropic problems between two sets of weights, by a matrix of costs or by a Cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors, transforms
from ..costs.base import Cost
from ..distributed.costs import Sharded
from ..penalties import KL, TV
from ..problem import Problem
from ..solve import needs_gradient
from ..vectors import in_full_precision
from . import balanced, empirical, relaxed
from .answer import Answer
from .arrays import is_array, lazily, number, take, unframed
from .refusals import elsewhere, known_method
from .relaxed import ELSEWHERE, pair
from .result import OTResult

GRADS = ("autodiff", "envelope", "last_step", "detach")
#: POT's earlier name of a mode.
ALIASES = {"implicit": "envelope"}
METHODS = ("sinkhorn", "sinkhorn_log")


def solve(
    M, a=None, b=None, reg=None, c=None, reg_type="KL", unbalanced=None, unbalanced_type="KL", method=None, n_threads=1, max_iter=None,
    plan_init=None, potentials_init=None, tol=None, verbose=False, grad="autodiff",
):  # fmt: skip
    """POT's `ot.solve`: minimises <P, M> + reg R(P) (+ unbalanced D(P1, a) + unbalanced D(P^T 1, b)) over P >= 0.

    M            costs (n, m), or a gpu_ot.Cost such as SqEuclidean(x, y), which is never made an n-by-m array.
    a, b         weights (n,) and (m,); None is uniform.
    reg          > 0, in units of M.
    reg_type     "KL" for KL(P | a⊗b), or KL(P | c) when relaxed; "entropy" for sum P log P (- P when relaxed).
    unbalanced, unbalanced_type   the price of a wrong marginal, a number or a pair; "KL" or "TV". None holds the marginals exactly.
    max_iter, tol    1000, and 1e-9 by the rule of `sinkhorn_log`, or of `sinkhorn_unbalanced`.
    potentials_init  (log u, log v) to start from.
    grad         "autodiff" or "last_step": everything, through the iterations; "envelope" or "implicit": `value` alone, exact at the
                 optimum; "detach": nothing.

    Returns an OTResult. Raises Elsewhere, a NotImplementedError that names POT's function, for what is not entropic.
    """
    settings = checked(reg, reg_type, unbalanced, unbalanced_type, method, potentials_init, verbose, grad, max_iter, tol)
    M = lazily(unframed(M))
    if isinstance(M, Cost):
        (ta, tb, cost), back = take(a=a, b=b, M=M)
        return solve_cost(cost, ta, tb, back, settings)
    if not is_array(M):
        hint = " gpu_ot.solve(problem) takes a Problem." if isinstance(M, Problem) else ""
        raise errors.ProblemError(f"M must be an array, a tensor or a gpu_ot.Cost, found {type(M).__name__}.{hint}")
    return solve_matrix(M, a, b, c, settings)


class Settings(NamedTuple):
    """Everything but costs and weights, checked."""

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


def checked(
    reg: Any, reg_type: Any, unbalanced: Any, unbalanced_type: str, method: str | None, init: Any, verbose: bool, grad: str,
    max_iter: int | None, tol: float | None,
) -> Settings:  # fmt: skip
    grad = ALIASES.get(grad, grad)
    if grad not in GRADS:
        raise errors.unknown("grad", grad, GRADS)
    if grad == "last_step" and max_iter == 0:
        raise errors.ProblemError("The maximum number of iterations must be greater than 0 when using grad=last_step.")
    entropy, penalty = kinds(reg_type, unbalanced, unbalanced_type)
    if method is not None and method.lower() in ELSEWHERE:
        raise elsewhere(f"method = {method!r}", ELSEWHERE[method.lower()])
    if method is not None:
        known_method(method, METHODS)
    if reg is None or number(reg) == 0:
        raise elsewhere("reg = 0", "ot.solve(M, a, b, ...) or ot.emd" if unbalanced is None else "ot.unbalanced.mm_unbalanced")
    if number(reg) < 0:
        raise errors.bad_eps("reg", reg)
    return Settings(reg, entropy, unbalanced, penalty, init, verbose, grad, max_iter or 1000, 1e-9 if tol is None else tol)


def kinds(reg_type: Any, relaxed: Any, unbalanced_type: Any) -> tuple[bool, type[KL] | type[TV]]:
    """(entropy rather than KL, the penalty of the marginals)."""
    regular = reg_type.lower() if isinstance(reg_type, str) else None
    if regular not in ("kl", "entropy"):
        what = "a regulariser that is a pair of functions" if regular is None else f'Not implemented reg_type="{reg_type}": it'
        raise elsewhere(what, "ot.solve" if relaxed is None else "ot.unbalanced.lbfgsb_unbalanced")
    penalties: dict[str, type[KL] | type[TV]] = {"kl": KL, "tv": TV}
    if relaxed is not None and unbalanced_type.lower() not in penalties:
        raise elsewhere(f'Not implemented unbalanced_type="{unbalanced_type}": it', "ot.unbalanced.lbfgsb_unbalanced")
    return regular == "entropy", penalties.get(unbalanced_type.lower(), KL)


def problem_of(cost: Cost, reg: Any, a: Any, b: Any, relaxed: Any, penalty: type[KL] | type[TV]) -> Problem:
    """The problem of a Cost, with reg and the penalties as plain numbers."""
    rows, columns = (penalty(number(tau)) for tau in pair(relaxed))
    return Problem(cost, number(reg), a, b, (rows, columns))


@transforms.eagerly
def solve_matrix(M: Any, a: Any, b: Any, c: Any, settings: Settings) -> OTResult:
    s, reg, tau = settings, settings.reg, settings.relaxed
    if s.grad == "detach":
        M, a, b, c, reg, tau = (z.detach() if isinstance(z, Tensor) else z for z in (M, a, b, c, reg, tau))
    if s.relaxed is None:
        rules = balanced.METHODS["sinkhorn_log"]
        options: dict[str, Any] = dict(entropy=s.entropy, names=("max_iter", "tol"))
        done = balanced.solve_balanced(a, b, M, reg, rules, s.max_iter, s.tol, s.verbose, True, s.init, s.unroll, **options)
    else:
        done = relaxed.run(
            a, b, M, reg, tau, reg_type="entropy" if s.entropy else "kl", penalty=s.penalty, c=None if s.entropy else c, warmstart=s.init,
            numItermax=s.max_iter, stopThr=s.tol, verbose=s.verbose, log=False, unroll=s.unroll, names=("max_iter", "tol"),
        )  # fmt: skip
    value, linear, potentials, plan = with_gradients(done, s.grad, lambda: (done.linear(), done.logarithms(), done.plan()))
    return OTResult(value=done.give(value), value_linear=done.give(linear), potentials=potentials, plan=plan, **done.report())


@in_full_precision
def with_gradients(done: Answer, grad: str, others: Callable[[], tuple[Any, ...]]) -> tuple[Any, ...]:
    """(the objective, *others()), which carry the gradients that `grad` says."""
    # Before the others, since a plan takes the kernel that this uses.
    optimum = done.optimum() if grad == "envelope" and needs_gradient(done.solution.problem) else None
    with torch.set_grad_enabled(torch.is_grad_enabled() and grad in ("autodiff", "last_step")):
        value, *rest = done.objective(), *others()
    return value if optimum is None else value.detach() + (optimum - optimum.detach()), *rest


@transforms.eagerly
@in_full_precision
def solve_cost(cost: Cost, a: Tensor | None, b: Tensor | None, back: Callable[[Tensor], Any], settings: Settings) -> OTResult:
    """Without an n-by-m array: O((n + m) d) memory, whatever the gradient."""
    s, recorded = settings, torch.is_grad_enabled()
    if isinstance(cost, Sharded):
        raise errors.ProblemError(
            "points that ranks share are solved as solve(Problem(Sharded(...), eps)), or solve_sample(..., group=group)."
        )
    if s.entropy and s.relaxed is not None:
        raise errors.ProblemError('reg_type = "entropy" with relaxed marginals needs a matrix of costs: pass lazy=False, or reg_type="KL".')
    problem = problem_of(cost, s.reg, a, b, s.relaxed, s.penalty)
    with torch.set_grad_enabled(s.grad != "detach" and recorded):
        done = empirical.solve_lazily(problem, back, s.max_iter, s.tol, s.verbose, True, s.init, s.unroll, s.entropy, ("max_iter", "tol"))
        value = done.optimum()
    with torch.set_grad_enabled(s.unroll and recorded):
        linear, log = done.linear(), empirical.lazy_log(done)
    found: dict[str, Any] = dict(potentials=(log["u"], log["v"]), lazy_plan=log["lazy_plan"], log=log, **done.report())
    return OTResult(value=done.give(value), value_linear=done.give(linear), **found)
