"""Balanced entropic transport in POT's terms: its iterations, its stopping rule, its logs.

POT has one implementation for each way of staying clear of underflow; here all of them are the same log-domain iteration, in
POT's order (v, then u: rows exact) and with its stopping rule, so iterates agree where they can be seen. Conventions:
`u_i = a_i exp(f_i / reg)`, `v_j = b_j exp(g_j / reg)`, P = diag(u) exp(-M / reg) diag(v), up to the scale that u and v share.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors, gradients
from ..costs import Cost
from ..geometry.protocol import Geometry, weigh
from ..problem import Problem, matched
from ..solution import Solution
from ..solve import find, needs_gradient
from ..solver.annealing import Anneal
from ..solver.criterion import Marginal
from ..solver.status import CONVERGED, STALLED
from ..solver.step import Start
from .arrays import number, take, take_problem
from .clouds import linear_cost
from .lazy import LazyPlan
from .refusals import unknown_method
from .refusals import warn as warn_caller

NOT_CONVERGED = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` or the regularization parameter `reg`."
)

#: POT's default limit. Whoever asks for fewer iterations sees what they gave; whoever asks for 1e7 or 1e9 wants the end.
PLAIN = 1000


@dataclass
class Transport:
    """A solved problem in the caller's terms. `many` histograms are a batch in front: (k, n) and (k, m)."""

    problem: Problem
    geometry: Geometry
    outcome: Solution
    M: Tensor | Cost
    reg: float
    many: bool
    differentiable: bool
    check_every: int
    back: Callable[[Tensor], Any]

    def give(self, z: Tensor) -> Any:
        return self.back(z.to(self.problem.given_dtype))

    @property
    def k(self) -> Tensor:
        return weigh(self.outcome.f, self.problem.a, self.problem.eps)

    @property
    def h(self) -> Tensor:
        return weigh(self.outcome.g, self.problem.b, self.problem.eps)

    def plan(self) -> Tensor:
        if self.differentiable:
            return gradients.plan(self.problem, self.geometry, self.outcome.f, self.outcome.g)
        return self.geometry.plan(self.k, self.h, self.problem.eps)

    def lazy_plan(self) -> LazyPlan:
        return LazyPlan(self.problem, self.outcome.f, self.outcome.g, self.back, self.geometry)

    def losses(self) -> Tensor:
        """<P, M> of each histogram; forbidden pairs carry nothing."""
        if isinstance(self.M, Cost):
            return linear_cost(self.problem, self.outcome.f, self.outcome.g)
        M = torch.where(self.M.isinf(), 0.0, self.M).to(self.problem.dtype)
        if self.differentiable or not self.many:
            return (self.plan() * M).sum((-2, -1))
        # One plan at a time: k of them need not fit together.
        return torch.stack([(self.geometry.plan(k, h, self.problem.eps) * M).sum() for k, h in zip(self.k, self.h, strict=True)])

    def logarithms(self, scale: float = 1.0) -> tuple[Any, Any]:
        """scale * (log u, log v), shaped as POT shapes its scalings: (n,), or (n, k)."""
        u, v = self.scaling_logarithms()
        return self.give(scale * u), self.give(scale * v)

    def scalings(self) -> dict[str, Any]:
        u, v = self.scaling_logarithms()
        return {"u": self.give(u.exp()), "v": self.give(v.exp())}

    def scaling_logarithms(self) -> tuple[Tensor, Tensor]:
        u, v = self.k / self.problem.eps, self.h / self.problem.eps
        return (u.mT, v.mT) if self.many else (u, v)

    def err(self) -> list[Any]:
        """One number a look, at iterations 0, check_every, 2 check_every, ... as POT counts them."""
        regular = (self.outcome.n_iter - 1) // self.check_every + 1
        return [self.give(e.amax()) for e in self.outcome.errors[:regular]]

    def story(self) -> dict[str, Any]:
        """What POT does not tell: how the loop ended."""
        return {
            "status": self.outcome.status,
            "converged": self.back(self.outcome.converged),
            "n_iter": self.last_iteration,
            "errors": [self.give(e) for e in self.outcome.errors],
        }

    @property
    def last_iteration(self) -> int:
        return self.outcome.n_iter - 1  # POT counts from 0


class Method(NamedTuple):
    """What distinguishes POT's methods in what they return: where u starts, what they measure and when, and their `log`."""

    log: Callable[[Transport], dict[str, Any]]
    uniform_start: bool = True  # u = 1/n rather than 1: the scale of u and v in `log`
    check_every: int = 10
    joint: bool = True  # several histograms stop together
    potentials: bool = False  # warmstart is (alpha, beta) = reg log(u, v), not log(u, v)


def _knopp_log(done: Transport) -> dict[str, Any]:
    return {"err": done.err(), "niter": done.last_iteration, **done.scalings()}


def _log_log(done: Transport) -> dict[str, Any]:
    counts = {} if done.many else {"err": done.err(), "niter": done.last_iteration}
    log_u, log_v = done.logarithms()
    return {**counts, "log_u": log_u, "log_v": log_v, **done.scalings()}


def _scaling_log(done: Transport) -> dict[str, Any]:
    alpha, beta = done.logarithms(done.reg)
    return {"err": done.err(), "niter": done.last_iteration, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


def _stabilized_log(done: Transport) -> dict[str, Any]:
    logu, logv = done.logarithms()
    alpha, beta = done.logarithms(done.reg)
    return {"err": done.err(), "logu": logu, "logv": logv, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


def _greenkhorn_log(done: Transport) -> dict[str, Any]:
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
    result = done.give(done.losses()) if loss or done.many else done.lazy_plan() if isinstance(done.M, Cost) else done.give(done.plan())
    return (result, {**rules.log(done), **done.story()}) if log else result


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
) -> Transport:
    """Solve as `rules` say.

    unroll      differentiate the potentials through the iterations, which are then POT's to the end, or not at all.
    accelerate  True: at once; False: never; None: from iteration `PLAIN` on.
    """
    (ta, tb, tM), back = take_problem(a, b, M)
    n, m = tM.shape
    many = tb is not None and tb.ndim == 2
    if tb is not None and many:
        tb = tb.mT

    cost, schedule = tM, None
    if isinstance(tM, Cost):
        if many or number(reg) == 0 or (isinstance(reg, Tensor) and reg.requires_grad):
            what = "several histograms" if many else "reg = 0" if number(reg) == 0 else "a gradient in reg"
            raise errors.ProblemError(f"M is a Cost, for which {what} is not available: pass the matrix, M.dense().")
        eps = number(reg)
    elif isinstance(reg, Tensor) and reg.requires_grad:
        cost, eps = tM / reg, 1.0  # P depends on M / reg alone, so the gradient in reg is the one in M
        reg = reg.detach()
    elif number(reg) == 0:
        eps = reg = _smallest_eps(tM)
        schedule = Anneal(1e3 * eps, eps)  # straight at so small an eps, the first iterations would move nothing
        warn_caller(f"Warning: numerical errors at iteration 0. reg = 0 is unregularised transport; this is the plan at reg = {eps:.3g}.")
    else:
        eps = reg
    try:
        problem = Problem(cost, eps, ta, tb)
    except errors.UnequalMasses as refusal:
        if warn:
            warn_caller(f"The plan returned has rows a and columns proportional to b: {refusal}")
        device = next(w.device for w in (ta, tb) if w is not None)  # uniform weights on both sides are equal
        wa, wb = (torch.full((k,), 1 / k, device=device) if w is None else w for w, k in ((ta, n), (tb, m)))
        problem = Problem(cost, eps, wa, matched(wa.double(), wb.double()).to(wb.dtype))

    start = _start(problem, rules, warmstart, many, number(reg))
    differentiable = unroll and needs_gradient(problem)
    # A tolerance of 0 cannot be met: it asks for that many of POT's iterations.
    plain = differentiable or accelerate is False or (accelerate is None and tol <= 0)

    def on_check(n_iter: int, error: Tensor) -> None:
        if (n_iter - 1) % rules.check_every == 0:
            _print_progress(n_iter, error)

    found = find(
        problem,
        grad="unroll" if differentiable else "envelope",
        criterion=Marginal(tol, "l2_joint" if rules.joint else "l2"),
        start=Start(start, torch.ones_like(start)),
        max_iter=max(max_iter, 1),
        check_every=rules.check_every,
        accelerate="none" if plain or schedule else "mixing",
        after=0 if accelerate else PLAIN,
        schedule=schedule,
        on_check=on_check if verbose else None,
    )
    if warn and found.status not in (CONVERGED, STALLED):
        warn_caller(f"{NOT_CONVERGED} Status {found.status}")
    return Transport(problem, found.geometry, found, tM, number(reg), many, differentiable, rules.check_every, back)


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


def _print_progress(n_iter: int, error: Tensor) -> None:
    at = n_iter - 1
    if at % 200 == 0:
        print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
    print(f"{at:5d}|{error.amax().item():8e}|")


OPTIONS = {"numItermax", "stopThr", "verbose", "log", "warn", "warmstart", "print_period", "numInnerItermax", "accelerate"}


def own(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a front door and its **kwargs; POT ignores the others, too."""
    return {k: v for k, v in {**arguments.pop("kwargs", {}), **arguments}.items() if k in OPTIONS}


def known(method: str, among: Iterable[str]) -> str:
    if method.lower() not in among:
        raise unknown_method(method, among)
    return method.lower()
