"""Balanced entropic transport in POT's terms: its iterations, its stopping rule, its logs.

POT has one implementation for each way of staying clear of underflow; here all of them are the same log-domain iteration, in
POT's order (v, then u: rows exact) and with its stopping rule, so iterates agree where they can be seen. Conventions:
`u_i = a_i exp(f_i / reg)`, `v_j = b_j exp(g_j / reg)`, P = diag(u) exp(-M / reg) diag(v), up to the scale that u and v share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors
from ..costs.base import Cost
from ..problem import Problem, matched
from ..solve import find, needs_gradient
from ..solver.annealing import Anneal
from ..solver.criterion import Marginal
from ..solver.status import CONVERGED, STALLED
from ..solver.step import scaled
from .answer import Answer
from .arrays import lazily, number, take, take_problem
from .refusals import unknown_method
from .refusals import warn as warn_caller

NOT_CONVERGED = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` or the regularization parameter `reg`."
)

#: POT's default limit. Whoever asks for fewer iterations sees what they gave; whoever asks for 1e7 or 1e9 wants the end.
PLAIN = 1000


class Method(NamedTuple):
    """What distinguishes POT's methods in what they return: where u starts, what they measure and when, and their `log`."""

    log: Callable[[Answer, float, int], dict[str, Any]]  # of the answer, reg and check_every
    uniform_start: bool = True  # u = 1/n rather than 1: the scale of u and v in `log`
    check_every: int = 10
    joint: bool = True  # several histograms stop together
    potentials: bool = False  # warmstart is (alpha, beta) = reg log(u, v), not log(u, v)


def _knopp_log(done: Answer, reg: float, every: int) -> dict[str, Any]:
    return {"err": done.err(every), "niter": done.last_iteration, **done.scalings()}


def _log_log(done: Answer, reg: float, every: int) -> dict[str, Any]:
    counts = {} if done.many else {"err": done.err(every), "niter": done.last_iteration}
    log_u, log_v = done.logarithms()
    return {**counts, "log_u": log_u, "log_v": log_v, **done.scalings()}


def _scaling_log(done: Answer, reg: float, every: int) -> dict[str, Any]:
    alpha, beta = done.logarithms(reg)
    return {"err": done.err(every), "niter": done.last_iteration, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


def _stabilized_log(done: Answer, reg: float, every: int) -> dict[str, Any]:
    (logu, logv), (alpha, beta) = done.logarithms(), done.logarithms(reg)
    return {"err": done.err(every), "logu": logu, "logv": logv, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


def _greenkhorn_log(done: Answer, reg: float, every: int) -> dict[str, Any]:
    return done.scalings()


METHODS = {
    "sinkhorn": Method(_knopp_log),
    "sinkhorn_log": Method(_log_log, uniform_start=False, joint=False),
    "sinkhorn_stabilized": Method(_stabilized_log, check_every=20, potentials=True),
    "sinkhorn_epsilon_scaling": Method(_scaling_log, potentials=True),
    "greenkhorn": Method(_greenkhorn_log),
}


def run(
    method: str,
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    *,
    numItermax: int,
    stopThr: float,
    verbose: bool,
    log: bool,
    warn: bool,
    warmstart: Any,
    loss: bool = False,
    print_period: int | None = None,
    numInnerItermax: int = 100,
    accelerate: bool | None = None,
) -> Any:
    """Solve, and return what POT's `method` would: the plan, or the losses for several histograms or `loss`; and its `log`."""
    rules = METHODS[method]
    if print_period is not None and method == "sinkhorn_stabilized":
        rules = rules._replace(check_every=print_period)
    if method == "sinkhorn_epsilon_scaling":
        numItermax = max(36, numItermax) * numInnerItermax  # POT's stages, each of so many iterations
    done = transport(a, b, M, reg, rules, numItermax, stopThr, verbose, warn, warmstart, accelerate=accelerate)
    told = {**rules.log(done, done.solution.problem.eps * number(done.unit), rules.check_every), **done.story()} if log else {}
    lazy = isinstance(lazily(M), Cost)
    result = done.give(done.linear()) if loss or done.many else done.lazy_plan() if lazy else done.plan()
    return (result, told) if log else result


def transport(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    rules: Method,
    max_iter: int,
    tol: float,
    verbose: bool,
    warn: bool,
    warmstart: Any,
    unroll: bool = True,
    accelerate: bool | None = None,
) -> Answer:
    """Solve as `rules` say.

    unroll      differentiate the potentials through the iterations, which are then POT's to the end, or not at all.
    accelerate  True: at once; False: never; None: from iteration `PLAIN` on.
    """
    (ta, tb, tM), back = take_problem(a, b, M)
    n, m = tM.shape
    many = tb is not None and tb.ndim == 2
    if tb is not None and many:
        tb = tb.mT

    cost, eps, unit, schedule = tM, number(reg), 1.0, None
    if isinstance(tM, Cost):
        if many or eps == 0 or (isinstance(reg, Tensor) and reg.requires_grad):
            what = "several histograms" if many else "reg = 0" if eps == 0 else "a gradient in reg"
            raise errors.ProblemError(f"M is a Cost, for which {what} is not available: pass the matrix, M.dense().")
    elif isinstance(reg, Tensor) and reg.requires_grad:
        cost, eps, unit = tM / reg, 1.0, reg  # P depends on M / reg alone, so the gradient in reg is the one in M
    elif eps == 0:
        eps = _smallest_eps(tM)
        schedule = Anneal(1e3 * eps, eps)  # straight at so small an eps, the first iterations would move nothing
        warn_caller(f"Warning: numerical errors at iteration 0. reg = 0 is unregularised transport; this is the plan at reg = {eps:.3g}.")
    try:
        problem = Problem(cost, eps, ta, tb)
    except errors.UnequalMasses as refusal:
        if warn:
            warn_caller(f"The plan returned has rows a and columns proportional to b: {refusal}")
        device = next(w.device for w in (ta, tb) if w is not None)  # uniform weights on both sides are equal
        wa, wb = (torch.full((k,), 1 / k, device=device) if w is None else w for w, k in ((ta, n), (tb, m)))
        problem = Problem(cost, eps, wa, matched(wa.double(), wb.double()).to(wb.dtype))

    replayed = unroll and needs_gradient(problem)
    # A tolerance of 0 cannot be met: it asks for that many of POT's iterations.
    plain = replayed or accelerate is False or (accelerate is None and tol <= 0)
    solution = find(
        problem,
        criterion=Marginal(tol, "l2_joint" if rules.joint else "l2"),
        start=scaled(_start(problem, rules, warmstart, many, eps * number(unit))),
        max_iter=max(max_iter, 1),
        check_every=rules.check_every,
        accelerate="none" if plain else "mixing",
        after=0 if accelerate else PLAIN,
        schedule=schedule,
        on_check=_printed(rules.check_every) if verbose else None,
        grad="unroll" if replayed else "envelope",
    )
    if warn and solution.status not in (CONVERGED, STALLED):
        warn_caller(f"{NOT_CONVERGED} Status {solution.status}")
    return Answer(solution, back, unit, many)


def _smallest_eps(M: Tensor) -> float:
    """The sharpest plan that M's type still resolves: half of the digits for the costs, half for the exponent."""
    floating = M.detach() if M.is_floating_point() else M.double()
    finite = floating[floating.isfinite()]
    spread = float(finite.max() - finite.min()) if finite.numel() else 0.0
    return max(spread, 1e-30) * torch.finfo(floating.dtype).eps ** 0.5


def _start(problem: Problem, rules: Method, warmstart: Any, many: bool, reg: float) -> Tensor:
    """eps log u to start from. v is not needed: the first half-iteration computes it from u."""
    eps, n = problem.eps, problem.a.shape[-1]
    base = -eps * math.log(n) if rules.uniform_start else 0.0
    if warmstart is None:
        return torch.full_like(problem.a, base)
    if many and not rules.joint:  # sinkhorn_log takes a pair for each histogram
        found = [None if pair is None else take(u=pair[0])[0][0] for pair in warmstart]
        log_u = torch.stack([problem.a.new_zeros(n) if u is None else u.to(problem.a) for u in found])
    else:
        (given,), _ = take(u=warmstart[0])
        if given is None or given.shape[0] != n:
            raise errors.wrong_shape(
                "warmstart[0]", () if given is None else given.shape, f"({n},), or ({n}, n_hists) for several histograms"
            )
        log_u = (given.mT if given.ndim == 2 else given).to(problem.a)
    h = eps / reg * log_u + base if rules.potentials else eps * log_u
    return h.detach().expand_as(problem.a)


def _printed(every: int) -> Callable[[int, Tensor], None]:
    """Prints POT's table, of the iterations that POT checks."""

    def on_check(n_iter: int, error: Tensor) -> None:
        at = n_iter - 1
        if at % 200 == 0:
            print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
        if at % every == 0:
            print(f"{at:5d}|{error.amax().item():8e}|")

    return on_check


OPTIONS = {"numItermax", "stopThr", "verbose", "log", "warn", "warmstart", "print_period", "numInnerItermax", "accelerate"}


def own(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a front door and its **kwargs; POT ignores the others, too."""
    return {k: v for k, v in {**arguments.pop("kwargs", {}), **arguments}.items() if k in OPTIONS}


def known(method: str, among: Iterable[str]) -> str:
    if method.lower() not in among:
        raise unknown_method(method, among)
    return method.lower()
