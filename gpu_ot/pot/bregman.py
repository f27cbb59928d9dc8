"""POT's `ot.bregman`, balanced: the same names, arguments, results and `log`, from one stable solver.

POT has one implementation for each way of staying clear of underflow; here all of them are the same log-domain iteration, in
POT's order (v, then u: rows exact) and with its stopping rule, so iterates agree where they can be seen. Conventions:
`u_i = a_i exp(f_i / reg)`, `v_j = b_j exp(g_j / reg)`, P = diag(u) exp(-M / reg) diag(v), up to the scale that u and v share.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors, gradients
from ..backends import bind
from ..geometry import Geometry, weigh
from ..loop import Outcome, Stop, iterate
from ..problem import Problem, matched
from ..schedule import Anneal, Constant
from ..solution import CONVERGED, STALLED
from ..solve import needs_gradient
from .arrays import take

NOT_CONVERGED = (
    "Sinkhorn did not converge. You might want to increase the number of iterations `numItermax` or the regularization parameter `reg`."
)


@dataclass
class _Transport:
    """A solved problem in the caller's terms. `many` histograms are a batch in front: (k, n) and (k, m)."""

    problem: Problem
    geometry: Geometry
    outcome: Outcome
    M: Tensor
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

    def losses(self) -> Tensor:
        """<P, M> of each histogram; forbidden pairs carry nothing."""
        M = torch.where(self.M.isinf(), 0.0, self.M).to(self.problem.dtype)
        if self.differentiable or not self.many:
            return (self.plan() * M).sum((-2, -1))
        # One plan at a time: k of them need not fit together.
        return torch.stack([(self.geometry.plan(k, h, self.problem.eps) * M).sum() for k, h in zip(self.k, self.h, strict=True)])

    def logarithms(self, scale: float = 1.0) -> tuple[Any, Any]:
        """scale * (log u, log v), shaped as POT shapes its scalings: (n,), or (n, k)."""
        u, v = self._logarithms()
        return self.give(scale * u), self.give(scale * v)

    def scalings(self) -> dict[str, Any]:
        u, v = self._logarithms()
        return {"u": self.give(u.exp()), "v": self.give(v.exp())}

    def _logarithms(self) -> tuple[Tensor, Tensor]:
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


class _Method(NamedTuple):
    """What distinguishes POT's methods in what they return: where u starts, what they measure and when, and their `log`."""

    log: Callable[[_Transport], dict[str, Any]]
    uniform_start: bool = True  # u = 1/n rather than 1: the scale of u and v in `log`
    check_every: int = 10
    joint: bool = True  # several histograms stop together
    potentials: bool = False  # warmstart is (alpha, beta) = reg log(u, v), not log(u, v)


def _knopp_log(done: _Transport) -> dict[str, Any]:
    return {"err": done.err(), "niter": done.last_iteration, **done.scalings()}


def _log_log(done: _Transport) -> dict[str, Any]:
    counts = {} if done.many else {"err": done.err(), "niter": done.last_iteration}
    log_u, log_v = done.logarithms()
    return {**counts, "log_u": log_u, "log_v": log_v, **done.scalings()}


def _scaling_log(done: _Transport) -> dict[str, Any]:
    alpha, beta = done.logarithms(done.reg)
    return {"err": done.err(), "niter": done.last_iteration, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


def _stabilized_log(done: _Transport) -> dict[str, Any]:
    logu, logv = done.logarithms()
    alpha, beta = done.logarithms(done.reg)
    return {"err": done.err(), "logu": logu, "logv": logv, "alpha": alpha, "beta": beta, "warmstart": (alpha, beta)}


def _greenkhorn_log(done: _Transport) -> dict[str, Any]:
    return done.scalings()


_METHODS = {
    "sinkhorn": _Method(_knopp_log),
    "sinkhorn_log": _Method(_log_log, uniform_start=False, joint=False),
    "sinkhorn_stabilized": _Method(_stabilized_log, check_every=20, potentials=True),
    "sinkhorn_epsilon_scaling": _Method(_scaling_log, potentials=True),
    "greenkhorn": _Method(_greenkhorn_log),
}


def _run(
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
) -> Any:
    """Solve, and return what POT's `method` would: the plan, or the losses for several histograms or `loss`; and its `log`."""
    rules = _METHODS[method]
    if print_period is not None and method == "sinkhorn_stabilized":
        rules = rules._replace(check_every=print_period)
    if method == "sinkhorn_epsilon_scaling":
        numItermax = max(36, numItermax) * numInnerItermax  # POT's stages, each of so many iterations
    done = _transport(a, b, M, reg, rules, numItermax, stopThr, verbose, warn, warmstart)
    result = done.give(done.losses() if loss or done.many else done.plan())
    return (result, {**rules.log(done), **done.story()}) if log else result


def _transport(
    a: Any, b: Any, M: Any, reg: Any, rules: _Method, max_iter: int, tol: float, verbose: bool, warn: bool, warmstart: Any
) -> _Transport:
    (ta, tb, tM), back = take(a=a, b=b, M=M)
    if tM is None or tM.ndim != 2:
        raise errors.wrong_shape("M", () if tM is None else tM.shape, "(n, m), one row for each weight of a")
    n, m = tM.shape
    if n == 0 or m == 0:
        raise errors.empty_problem(n, m)
    many = tb is not None and tb.ndim == 2
    if ta is not None and ta.shape != (n,):
        raise errors.wrong_shape("a", ta.shape, f"({n},) to match M with shape ({n}, {m})")
    if tb is not None and tb.shape[:1] + tb.shape[2:] != (m,):
        raise errors.wrong_shape("b", tb.shape, f"({m},) or ({m}, n_hists) to match M with shape ({n}, {m})")
    if tb is not None and many:
        tb = tb.mT

    cost, schedule = tM, None
    if isinstance(reg, Tensor) and reg.requires_grad:
        cost, eps = tM / reg, 1.0  # P depends on M / reg alone, so the gradient in reg is the one in M
        reg = reg.detach()
    elif float(reg) == 0:
        eps = reg = _smallest_eps(tM)
        schedule = Anneal(1e3 * eps, eps)  # straight at so small an eps, the first iterations would move nothing
        _warn(f"Warning: numerical errors at iteration 0. reg = 0 is unregularised transport; this is the plan at reg = {eps:.3g}.")
    else:
        eps = reg
    try:
        problem = Problem(cost, eps, ta, tb)
    except errors.UnequalMasses as refusal:
        if warn:
            _warn(f"The plan returned has rows a and columns proportional to b: {refusal}")
        wa, wb = (torch.full((k,), 1 / k, device=tM.device) if w is None else w for w, k in ((ta, n), (tb, m)))
        problem = Problem(cost, eps, wa, matched(wa.double(), wb.double()).to(wb.dtype))

    geometry = bind(problem)
    start = _start(problem, rules, warmstart, many, float(reg))
    differentiable = needs_gradient(problem)
    with torch.no_grad():
        stop = Stop(tol, "l2_joint" if rules.joint else "l2")
        on_check = _print_progress if verbose else None
        outcome = iterate(geometry, problem, schedule or Constant(problem.eps), start, stop, max(max_iter, 1), rules.check_every, on_check)
    if differentiable:
        outcome.f, outcome.g = gradients.unroll(problem, geometry, start, outcome.n_iter)
    if warn and outcome.status not in (CONVERGED, STALLED):
        _warn(f"{NOT_CONVERGED} Status {outcome.status}")
    return _Transport(problem, geometry, outcome, tM, float(reg), many, differentiable, rules.check_every, back)


def _smallest_eps(M: Tensor) -> float:
    """The sharpest plan that M's type still resolves: half of the digits for the costs, half for the exponent."""
    floating = M.detach() if M.is_floating_point() else M.double()
    finite = floating[floating.isfinite()]
    spread = float(finite.max() - finite.min()) if finite.numel() else 0.0
    return max(spread, 1e-30) * torch.finfo(floating.dtype).eps ** 0.5


def _start(problem: Problem, rules: _Method, warmstart: Any, many: bool, reg: float) -> Tensor:
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


def _warn(message: str) -> None:
    """A UserWarning that points at the caller's line, however many of our own frames lie between."""
    level, frame = 1, sys._getframe(0)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").startswith("gpu_ot."):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, UserWarning, stacklevel=level)


def sinkhorn_knopp(a, b, M, reg, numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None, **kwargs):
    """POT's `ot.bregman.sinkhorn_knopp`, in the log domain. Arguments and results as `sinkhorn`; `log` holds err, niter, u, v."""
    return _run("sinkhorn", a, b, M, reg, **_own(locals()))


def sinkhorn_log(a, b, M, reg, numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None, **kwargs):
    """POT's `ot.bregman.sinkhorn_log`. Arguments and results as `sinkhorn`; `log` adds log_u, log_v."""
    return _run("sinkhorn_log", a, b, M, reg, **_own(locals()))


def sinkhorn_stabilized(
    a, b, M, reg, numItermax=1000, tau=1e3, stopThr=1e-9, warmstart=None, verbose=False, print_period=20, log=False, warn=True, **kwargs
):
    """POT's `ot.bregman.sinkhorn_stabilized`. `tau` is accepted and not needed: absorption here watches the precision itself.

    `warmstart` and `log` hold alpha, beta = reg log(u), reg log(v).
    """
    return _run("sinkhorn_stabilized", a, b, M, reg, **_own(locals()))


def sinkhorn_epsilon_scaling(
    a,
    b,
    M,
    reg,
    numItermax=100,
    epsilon0=1e4,
    numInnerItermax=100,
    tau=1e3,
    stopThr=1e-9,
    warmstart=None,
    verbose=False,
    print_period=10,
    log=False,
    warn=True,
    **kwargs,
):
    """POT's `ot.bregman.sinkhorn_epsilon_scaling`: the same plan, solved at `reg` itself with the iterations POT would allow.

    `epsilon0` and `tau` are accepted and not needed. `log` holds err, niter, alpha, beta, warmstart.
    """
    return _run("sinkhorn_epsilon_scaling", a, b, M, reg, **_own(locals()))


def greenkhorn(a, b, M, reg, numItermax=10000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None):
    """POT's `ot.bregman.greenkhorn`: the plan it converges to, by full sweeps, at most `numItermax` of them, each as parallel as the
    machine; greedy single-entry updates would be serial. `log` holds u, v, n_iter."""
    return _run("greenkhorn", a, b, M, reg, **_own(locals()))


_OPTIONS = {"numItermax", "stopThr", "verbose", "log", "warn", "warmstart", "print_period", "numInnerItermax"}


def _own(arguments: dict[str, Any]) -> dict[str, Any]:
    """The options among the arguments of a front door and its **kwargs; POT ignores the others, too."""
    return {k: v for k, v in {**arguments.pop("kwargs", {}), **arguments}.items() if k in _OPTIONS}


def _known(method: str, among: Iterable[str]) -> str:
    if method.lower() not in among:
        raise errors.ProblemError(f"Unknown method '{method}'. Choose one of {', '.join(among)}.")
    return method.lower()


def sinkhorn(a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None, **kwargs):
    """Entropic optimal transport plan: `ot.sinkhorn`, on the device its tensors live on, without underflow.

    Minimises <P, M> + reg sum P log P over plans P >= 0 with marginals a and b.

    a          weights (n,), an array, tensor or list; empty or None is uniform.
    b          weights (m,), or (m, k) for k problems with the same a and M.
    M          costs (n, m); +inf forbids a pair.
    reg        > 0, in units of M; a 0-d tensor may carry a gradient.
    method     "sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling" or "greenkhorn": one solver, five logs.
    numItermax, stopThr   stop when the columns' marginals are within `stopThr` (Euclidean norm), looked at every 10 iterations.
    warmstart  (log u, log v) of an earlier call.

    Returns the plan (n, m), or for k histograms the losses <P_k, M> (k,), in the kind, type and device of the inputs; with
    `log=True` also POT's dictionary, plus `status`, `converged`, `n_iter` and `errors`. Differentiable in a, b, M and reg.
    Warns when the loop stopped short, with the reason; raises ProblemError for input that has no answer.

    Cuturi 2013, arXiv:1306.0895; Schmitzer 2019, arXiv:1610.06519.
    """
    return _run(_known(method, _METHODS), a, b, M, reg, **_own(locals()))


def sinkhorn2(
    a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=False, warmstart=None, **kwargs
):
    """The transport cost <P, M> of the plan of `sinkhorn`, without the entropy: `ot.sinkhorn2`.

    Returns a 0-d result, or (k,) for k histograms; otherwise as `sinkhorn`, but silent unless `warn=True`.
    """
    among = [name for name in _METHODS if name not in ("sinkhorn_epsilon_scaling", "greenkhorn")]  # as in POT
    return _run(_known(method, among), a, b, M, reg, loss=True, **_own(locals()))
