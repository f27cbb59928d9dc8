"""POT's `ot.solve`: entropic problems between two sets of weights, by a matrix of costs or by a Cost."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from ..costs.base import Cost
from ..distributed.costs import Sharded
from ..penalties import KL, TV
from ..problem import Problem
from ..solver.status import CONVERGED, STALLED
from . import balanced
from .arrays import is_array, lazily, number, take, tensors
from .empirical import Limits, log_of, streamed
from .refusals import elsewhere, unknown_method, warn
from .relaxed import ELSEWHERE, pair, run
from .result import OTResult

GRADS = ("autodiff", "envelope", "last_step", "detach")
METHODS = ("sinkhorn", "sinkhorn_log")


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
):
    """POT's `ot.solve`: minimises <P, M> + reg R(P) (+ unbalanced D(P1, a) + unbalanced D(P^T 1, b)) over P >= 0.

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
    if grad not in GRADS:
        raise errors.unknown("grad", grad, GRADS)
    if grad == "last_step" and max_iter == 0:
        raise errors.ProblemError("The maximum number of iterations must be greater than 0 when using grad=last_step.")
    entropy, penalty = kinds(reg_type, unbalanced, unbalanced_type)
    if method is not None and method.lower() not in METHODS:
        if method.lower() in ELSEWHERE:
            raise elsewhere(f"method = {method!r}", ELSEWHERE[method.lower()])
        raise unknown_method(method, METHODS)
    if reg is None or number(reg) == 0:
        raise elsewhere("reg = 0", "ot.solve(M, a, b, ...) or ot.emd" if unbalanced is None else "ot.unbalanced.mm_unbalanced")
    if number(reg) < 0:
        raise errors.bad_eps("reg", reg)
    asked = _Asked(reg, entropy, unbalanced, penalty, potentials_init, verbose, grad, max_iter or 1000, 1e-9 if tol is None else tol)
    M = lazily(M)
    if isinstance(M, Cost):
        (ta, tb), back = take(a=a, b=b)
        return _solve_lazily(M, ta, tb, back if is_array(a) or is_array(b) else tensors, asked)
    if not is_array(M):
        hint = " gpu_ot.solve(problem) takes a Problem." if isinstance(M, Problem) else ""
        raise errors.ProblemError(f"M must be an array, a tensor or a gpu_ot.Cost, found {type(M).__name__}.{hint}")
    return _solve_balanced(M, a, b, asked) if unbalanced is None else _solve_relaxed(M, a, b, c, asked)


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


def kinds(reg_type: Any, relaxed: Any, unbalanced_type: Any) -> tuple[bool, type[KL] | type[TV]]:
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


def with_gradient(number: Tensor, of: Tensor) -> Tensor:
    """`number` as computed, with the gradient of `of`."""
    return number.detach() + (of - of.detach())


def _solve_balanced(M: Any, a: Any, b: Any, asked: _Asked) -> OTResult:
    reg, unroll = asked.reg, asked.unroll
    if asked.grad == "detach":
        M, a, b, reg = _detached(M, a, b, reg)
    rules = balanced.METHODS["sinkhorn_log"]
    done = balanced.transport(a, b, M, reg, rules, asked.max_iter, asked.tol, asked.verbose, True, asked.init, unroll)
    with torch.set_grad_enabled(unroll and torch.is_grad_enabled()):
        value, linear = done.objective(asked.entropy), done.linear()
    if asked.grad == "envelope" and torch.is_grad_enabled():
        value = with_gradient(value, done.optimum(asked.entropy))
    return OTResult(
        value=done.give(value),
        value_linear=done.give(linear),
        potentials=done.logarithms(),
        plan=done.plan(),
        **done.story(),
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
    if done.solution.status not in (CONVERGED, STALLED):
        warn(f"{balanced.NOT_CONVERGED} Status {done.solution.status}")
    with torch.set_grad_enabled(asked.unroll and torch.is_grad_enabled()):
        value, linear, P = done.total(), done.linear(), done.plan()
    if asked.grad == "envelope" and torch.is_grad_enabled():
        value = with_gradient(value, done.envelope())
    return OTResult(
        value=done.give(value),
        value_linear=done.give(linear),
        potentials=done.logarithms(),
        plan=P,
        **done.story(),
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
        value = done.optimum(asked.entropy)
    with torch.set_grad_enabled(asked.unroll and torch.is_grad_enabled()):
        linear, log = done.linear(), log_of(done)
    return OTResult(
        value=done.give(value),
        value_linear=done.give(linear),
        potentials=(log["u"], log["v"]),
        lazy_plan=log["lazy_plan"],
        log=log,
        **done.story(),
    )
