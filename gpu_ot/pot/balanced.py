"""Balanced entropic transport as POT computes it: its iterations, its stopping rule, its logs.

POT has one implementation for each way of avoiding underflow. Here all of them are one log-domain iteration, in POT's order (v, then u:
rows exact) and with POT's stopping rule, so that iterates agree with POT's. Conventions:
u_i = a_i exp(f_i / reg), v_j = b_j exp(g_j / reg), P = diag(u) exp(-M / reg) diag(v), up to the scale that u and v share.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors, transforms
from ..costs.base import Cost
from ..problem import Problem, matched
from ..solve import find, needs_gradient
from ..solver.annealing import Anneal
from ..solver.criterion import Marginal
from ..solver.step import scaled
from ..vectors import in_full_precision
from . import direct, unrolled
from .answer import Answer
from .arrays import number, take_problem, take_start
from .refusals import NOT_CONVERGED, print_error, warn_unless_converged
from .refusals import warn as warn_caller

#: POT's default limit. A caller who allows fewer iterations gets POT's iterates; one who allows 1e7 wants the converged plan.
PLAIN = 1000


class Method(NamedTuple):
    """What differs between POT's methods: the keys of `log`, the start, and when the error is measured."""

    log: str
    uniform_start: bool = True  # u = 1/n rather than 1: the scale of u and v in `log`
    check_every: int = 10
    joint: bool = True  # several histograms stop together
    potentials: bool = False  # warmstart is (alpha, beta) = reg log(u, v), not log(u, v)
    headers: int = 20  # lines of the table of `verbose` under one header; 0 where POT prints nothing
    last_line: bool = True  # whether the table has the error that ends the loop

    def table(self, tol: float) -> Callable[[int, Tensor], None]:
        """Prints the lines of POT's table where POT does."""

        def line(n_iter: int, error: Tensor) -> None:
            if self.headers and (self.last_line or not float(error.amax()) < tol):
                print_error(n_iter - 1, error, self.check_every, self.headers * self.check_every)

        return line


METHODS = {
    "sinkhorn": Method("err niter u v", last_line=False),
    "sinkhorn_log": Method("err niter log_u log_v u v", uniform_start=False, joint=False),
    "sinkhorn_stabilized": Method("err logu logv alpha beta warmstart", check_every=20, potentials=True),
    "sinkhorn_epsilon_scaling": Method("err niter alpha beta warmstart", potentials=True, headers=10),
    "greenkhorn": Method("u v", headers=0),
}


def run(
    method: str, a: Any, b: Any, M: Any, reg: Any, numItermax: int, stopThr: float, verbose: bool, log: bool, warn: bool, warmstart: Any,
    loss: bool = False, /, *, print_period: int | None = None, numInnerItermax: int = 100, epsilon0: float | None = None,
    accelerate: bool | None = None, **ignored: Any,
) -> Any:  # fmt: skip
    """What POT's `method` returns: the plan, or with `loss` or several histograms the losses; and `log`. POT ignores unknown options."""
    rules = METHODS[method]
    if print_period is not None and method == "sinkhorn_stabilized":
        rules = rules._replace(check_every=print_period)
    if method == "sinkhorn_epsilon_scaling":
        numItermax = max(numItermax, 1) * numInnerItermax  # so many stages, each of so many iterations
        epsilon0 = 1e4 if epsilon0 is None else epsilon0
    gradients = unrolled.required(a, b, M)
    if not verbose and warmstart is None and epsilon0 is None and not (gradients and log):
        found = direct.balanced(a, b, M, reg, rules, numItermax, stopThr, math.inf if gradients else _after(accelerate, stopThr), gradients)
        if found is not None:
            if warn:
                warn_unless_converged(found)
            if gradients:
                options = (reg, rules, numItermax, stopThr, False, False, None)
                P = unrolled.plan(a, b, M, found, lambda a, b, M: solve_balanced(a, b, M, *options, accelerate=False).plan())
                return (P.double() * M.double()).sum().to(P.dtype) if loss else P
            result = found.cost() if loss else found.plan()
            return (result, _log(found.answer(), rules)) if log else result
    done = solve_balanced(a, b, M, reg, rules, numItermax, stopThr, verbose, warn, warmstart, accelerate=accelerate, above=epsilon0)
    lazy = not done.solution.problem.cost.stored
    result = done.give(done.linear()) if loss or done.many else done.lazy_plan() if lazy else done.plan()
    return (result, _log(done, rules)) if log else result


def _log(done: Answer, rules: Method) -> dict[str, Any]:
    """POT's `log`, and how the loop ended."""
    log_u, log_v = done.logarithms()
    alpha, beta = done.logarithms(done.solution.problem.eps * number(done.unit))
    logs = {"log_u": log_u, "log_v": log_v, "logu": log_u, "logv": log_v, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}
    log = {"err": done.err(rules.check_every), "niter": done.last_iteration, **logs, **done.scalings()}
    absent = ("err", "niter") if done.many and not rules.joint else ()
    return {**{key: log[key] for key in rules.log.split() if key not in absent}, **done.report()}


@transforms.eagerly
@in_full_precision
def solve_balanced(
    a: Any, b: Any, M: Any, reg: Any, rules: Method, max_iter: int, tol: float, verbose: bool, warn: bool, warmstart: Any,
    unroll: bool = True, accelerate: bool | None = None, entropy: bool = False, above: float | None = None,
    names: tuple[str, str] = ("numItermax", "stopThr"),
) -> Answer:  # fmt: skip
    """Solve by the rules of one of POT's methods.

    unroll      True: the potentials are differentiated through the iterations, which are POT's to the end. False: not at all.
    accelerate  True: at once; False: never; None: from iteration `PLAIN` on.
    above       an eps to come down from, an iteration at each, where nothing is to be differentiated.
    names       of max_iter and tol in the caller's words.
    """
    (ta, tb, tM), back = take_problem(a, b, M)
    n, m = tM.shape
    many = tb is not None and tb.ndim == 2
    learnable = isinstance(reg, Tensor) and reg.requires_grad
    cost, eps, unit, schedule = tM, number(reg), 1.0, None
    if isinstance(tM, Cost):
        if many or eps == 0 or learnable:
            what = "several histograms" if many else "reg = 0" if eps == 0 else "a gradient in reg"
            raise errors.ProblemError(f"M is a Cost, for which {what} is not available: pass the matrix, M.dense().")
    elif learnable:
        cost, eps, unit = tM / reg, 1.0, reg  # P depends on M / reg alone, so the gradient in reg is the one in M
    elif eps == 0:
        eps = _smallest_eps(tM)
        schedule = Anneal(1e3 * eps, eps)  # started at so small an eps, the first iterations would change nothing
        warn_caller(f"Warning: numerical errors at iteration 0. reg = 0 is unregularised transport; this is the plan at reg = {eps:.3g}.")
    try:
        problem = Problem(cost, eps, ta, tb)
    except errors.UnequalMasses as refusal:
        if warn:
            warn_caller(f"The plan returned has rows a and columns proportional to b: {refusal}")
        device = next(w.device for w in (ta, tb) if w is not None)  # uniform weights on both sides are equal
        wa, wb = (torch.full((k,), 1 / k, device=device) if w is None else w for w, k in ((ta, n), (tb, m)))
        problem = Problem(cost, eps, wa, matched(wa.double(), wb.double()).to(wb.dtype))

    unrolled = unroll and needs_gradient(problem)
    if above is not None and schedule is None and warmstart is None and not unrolled:
        above = min(above / number(unit), float(problem.cost.scale("max")))  # nothing changes beyond the largest cost
        schedule = Anneal(above, problem.eps, math.exp(-1))
    after = math.inf if unrolled else _after(accelerate, tol)
    solution = find(
        problem, criterion=Marginal(tol, "l2_joint" if rules.joint else "l2"), grad="unroll" if unrolled else "envelope",
        start=scaled(_start(problem, rules, warmstart, many, eps * number(unit))), schedule=schedule, max_iter=max(max_iter, 1),
        check_every=rules.check_every, accelerate="none" if after == math.inf else "mixing", after=after,
        on_check=rules.table(tol) if verbose else None,
    )  # fmt: skip
    if warn:
        warn_unless_converged(solution, NOT_CONVERGED, *names)
    return Answer(solution, back, unit, many, entropy)


def _after(accelerate: bool | None, tol: float) -> float:
    """The plain iterations before acceleration sets in."""
    if accelerate is None:
        return PLAIN if tol > 0 else math.inf  # a tolerance of 0 cannot be met: all iterations are then POT's
    return 0 if accelerate else math.inf


def _smallest_eps(M: Tensor) -> float:
    """The sharpest plan that M's type still resolves: half of the digits for the costs, half for the exponent."""
    floating = M.detach() if M.is_floating_point() else M.double()
    finite = floating[floating.isfinite()]
    spread = float(finite.max() - finite.min()) if finite.numel() else 0.0
    return max(spread, 1e-30) * torch.finfo(floating.dtype).eps ** 0.5


def _start(problem: Problem, rules: Method, warmstart: Any, many: bool, reg: float) -> Tensor:
    """eps log u to start from. v is not needed: the first half-iteration computes it from u."""
    eps, a = problem.eps, problem.a
    base = -eps * math.log(a.shape[-1]) if rules.uniform_start else 0.0
    if warmstart is None:
        return torch.full_like(a, base)
    if many and not rules.joint:  # sinkhorn_log takes a pair for each histogram, and None for a cold start
        cold = [pair is None or pair[0] is None for pair in warmstart]
        log_u = torch.stack([torch.zeros_like(w) if c else take_start(pair, 0, w) for c, pair, w in zip(cold, warmstart, a, strict=True)])
    else:
        log_u = take_start(warmstart, 0, a)
    return eps / reg * log_u + base if rules.potentials else eps * log_u
