"""Entropic transport with relaxed marginals as POT computes it: its iterations, its stopping rule, its scales.

POT updates u, then v, so the transposed problem is solved here: its rows are POT's columns, and its iterations are POT's.

Conventions: P = c exp(log u + log v - M / reg). The reference measure c is a⊗b for reg_type "kl", all ones for "entropy", or given. With
f = reg log u and g = reg log v, P is the plan a⊗b exp((f + g - C) / reg) of the cost C = M - reg log(c / a⊗b). So a reference measure is
a change of the cost, and the potentials stay the same.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import errors, gradients, transforms
from ..costs import Cost
from ..penalties import KL, TV
from ..problem import Problem, float_type, matched, vector_dtype
from ..solve import find, needs_gradient
from ..solver.criterion import Change
from ..solver.status import CONVERGED
from ..solver.step import Start
from ..vectors import in_full_precision
from . import refusals
from .answer import Answer, carried, log_weight
from .arrays import number, take_problem, take_start
from .refusals import elsewhere, print_error, warn_unless_converged

NOT_CONVERGED = (
    "Stabilized Unbalanced Sinkhorn did not converge.Try a larger entropy `reg` or a lower mass `reg_m`."
    "Or a larger absorption threshold `tau`."
)
ONLY_ENTROPY = "Reg_type not implemented yet. Use entropy."
ENTROPY_HAS_NO_REFERENCE = "If reg_type = entropy, then the matrix c is overwritten by the one matrix."

#: POT's other algorithms for relaxed marginals, by the names a caller may try.
ELSEWHERE = {"mm": "ot.unbalanced.mm_unbalanced", "lbfgsb": "ot.unbalanced.lbfgsb_unbalanced"}

#: Callers who stop POT after 3, 10 or 100 iterations want its iterates; after that only the converged plan matters.
PLAIN = 100


class Method(NamedTuple):
    """What differs between POT's methods: when they stop, and whether (f, g) is translated to the best mass."""

    both_sides: bool = True  # the change of u and of v, rather than of u alone
    check_every: int = 1
    header_every: int = 50
    translate: bool = False
    warning: str = refusals.NOT_CONVERGED
    table: bool = False  # `verbose` prints without `log`, too


METHODS = {
    "sinkhorn": Method(),
    "sinkhorn_stabilized": Method(both_sides=False, check_every=10, header_every=200, warning=NOT_CONVERGED, table=True),
    "sinkhorn_translation_invariant": Method(translate=True),
    "sinkhorn_reg_scaling": Method(),
}


@dataclass(frozen=True, kw_only=True)
class Unbalanced(Answer):
    """A solution with relaxed marginals. P = c exp(log u + log v - M / reg).

    a, b            weights as given, (n,) and (*batch, m), in the type of the potentials.
    reference_mass  sum c; 0 for the entropy, which is written sum P log P - P.
    """

    M: Tensor
    reg: Tensor | float
    taus: tuple[Tensor | float, Tensor | float]
    a: Tensor
    b: Tensor
    reference_mass: Tensor | float

    @cached_property
    def P(self) -> Tensor:
        """(*batch, n, m)."""
        return self.solution.plan.to_dense()

    def plan(self) -> Any:
        return self.give(self.P)

    def linear(self) -> Tensor:
        return gradients.inner(self.P, self.M.to(self.P.dtype))

    def log_scalings(self) -> tuple[Tensor, Tensor]:
        """(log u, log v), (*batch, n) and (*batch, m)."""
        s = self.solution
        log_u, log_v = s.f / s.problem.eps, s.g / s.problem.eps
        if s.problem.balanced:  # a was rescaled where the masses are unequal; POT's c was not
            log_u = log_u + (s.problem.a.sum(-1, keepdim=True) / self.a.sum(-1, keepdim=True)).log()
        if self.entropy:  # c = 1 does not contain the weights, so u of an empty atom must be 0: 1e-300, as POT guards its logarithms
            log_u, log_v = (torch.where(w > 0, z, math.log(1e-300)) for z, w in ((log_u, self.a), (log_v, self.b)))
        return log_u, log_v

    def objective(self) -> Tensor:
        """<P, M> + reg KL(P | c) + penalties, with generalised KL: sum p log(p / q) - p + q.

        log(P / c) is log u + log v - M / reg, so the first two terms are sums over the marginals.
        """
        P = self.P.to(self.solution.f.dtype)
        log_u, log_v = self.log_scalings()
        value = self.reg * (carried(P.sum(-1), log_u) + carried(P.sum(-2), log_v) + self.reference_mass - P.sum((-2, -1)))
        for tau, gap in zip(self.taus, self._gaps(P), strict=True):
            if number(tau) < math.inf:
                value = value + tau * gap
        return value

    def _gaps(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of each marginal, (*batch,), that its tau multiplies."""
        distance = isinstance(self.solution.problem.penalties[0], TV)
        pairs = ((P.sum(-1), self.a), (P.sum(-2), self.b))
        rows, columns = ((p - q).abs() if distance else _divergence(p, q) for p, q in pairs)
        return rows.sum(-1), columns.sum(-1)

    def optimum(self) -> Tensor:
        """The smallest `objective`, from the dual at fixed potentials: its first derivatives are those of the optimum.

        The derivatives in reg and tau come from the primal: they are the terms that these multiply, KL(P | c) and the divergences of
        the marginals.
        """
        s, problem = self.solution, self.solution.problem
        dual = gradients.value(problem, s.geometry, s.f.detach(), s.g.detach())
        value = dual + number(self.reg) * (self.reference_mass - problem.a.sum(-1) * problem.b.sum(-1))
        with torch.no_grad():
            gaps = self._gaps(self.P.to(dual.dtype))
            paid = sum(number(tau) * gap for tau, gap in zip(self.taus, gaps, strict=True) if number(tau) < math.inf)
            divergence = (self.objective() - paid - self.linear()) / number(self.reg)
        for factor, term in ((self.reg, divergence), *zip(self.taus, gaps, strict=True)):
            if isinstance(factor, Tensor):
                value = value + (factor - factor.detach()) * term
        for tau, kept, given in zip(self.taus, (problem.a, problem.b), (self.a, self.b), strict=True):
            if number(tau) < math.inf:  # atoms without support pay for staying
                value = value + number(tau) * (given.sum(-1) - kept.sum(-1))
        return value

    def log(self) -> dict[str, Any]:
        logu, logv = self.logarithms()
        costs = {} if self.many else {"cost": self.give(self.linear()), "total_cost": self.give(self.objective())}
        return {"err": self.err(), "logu": logu, "logv": logv, **costs, **self.report()}

    def report(self) -> dict[str, Any]:
        # Histograms stop together, by the largest change of all.
        s = self.solution
        converged = torch.tensor(s.status is CONVERGED, device=s.f.device)
        return super().report() | {"converged": self.back(converged), "errors": self.err()}


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """The terms p log(p / q) - p + q, with 0 log 0 = 0. An empty atom q = 0 has p = 0."""
    some = (p > 0) & (q > 0)
    return torch.where(some, p * (torch.where(some, p, 1.0) / torch.where(some, q, 1.0)).log(), 0.0) - p + q


@transforms.eagerly
@in_full_precision
def run(
    a: Any, b: Any, M: Any, reg: Any, reg_m: Any, *, method: str = "sinkhorn", reg_type: str = "kl", penalty: type[KL] | type[TV] = KL,
    c: Any = None, warmstart: Any = None, numItermax: int = 1000, stopThr: float = 1e-6, verbose: bool = False, log: bool = True,
    accelerate: bool | None = None, unroll: bool = True, warn: bool = True, names: tuple[str, str] = ("numItermax", "stopThr"),
) -> Unbalanced:  # fmt: skip
    """Solve as POT's `method` does.

    log         True: record the change in every iteration, as POT does, which means to run them one by one.
    unroll      True: differentiate the potentials through the iterations. False: only `optimum` carries a gradient.
    accelerate  True: translated to the best mass in each iteration; False: never; None: from iteration `PLAIN` on.
    names       of numItermax and stopThr in the caller's words.
    """
    rules = METHODS[method]
    after = settled_after(rules, accelerate if penalty is KL else bool(accelerate), stopThr)
    (ta, tb, tM, tc), back = take_problem(a, b, M, c=c)
    if isinstance(tM, Cost):
        raise errors.ProblemError("relaxed marginals of a Cost: gpu_ot.solve(M, a, b, reg, unbalanced=reg_m) solves them lazily.")
    if tc is not None and tc.shape != tM.shape:
        raise errors.wrong_shape("c", tc.shape, f"{errors.shape(tM.shape)} like M")
    entropy = isinstance(reg_type, str) and reg_type.lower() == "entropy"
    if not entropy and not (isinstance(reg_type, str) and reg_type.lower() == "kl"):
        raise elsewhere(f"reg_type = {reg_type!r}", "ot.unbalanced.lbfgsb_unbalanced(a, b, M, reg, reg_m, reg_div=...)")
    many = tb is not None and tb.ndim == 2
    if many and not entropy:  # POT knows nothing else for several histograms
        refusals.warn(ONLY_ENTROPY)
        entropy = True
    if entropy and tc is not None:
        refusals.warn(ENTROPY_HAS_NO_REFERENCE)
        tc = None
    if not 0 < number(reg) < math.inf:
        if number(reg) == 0:
            raise elsewhere("reg = 0", "ot.unbalanced.mm_unbalanced(a, b, M, reg_m), or pass a small reg > 0")
        raise errors.bad_eps("reg", reg)

    dtype, wide = float_type(tM), vector_dtype(tM.device)
    uniform = (torch.full((size,), 1 / size, device=tM.device, dtype=wide) for size in tM.shape)
    wa, wb = (u if w is None else w.to(wide) for w, u in zip((ta, tb), uniform, strict=True))
    taus = pair(reg_m)
    soft = tuple(number(tau) < math.inf for tau in taus)
    learnable = unroll and torch.is_grad_enabled() and any(isinstance(z, Tensor) and z.requires_grad for z in (reg, *taus))
    # P depends on M / reg and reg_m / reg alone, so a gradient in reg is one in those.
    scale, eps = (reg, 1.0) if learnable else (1.0, number(reg))
    cost = tM / reg if learnable else tM
    if tc is not None or entropy:
        cost = _with_reference(cost, eps, wa, wb, tc)
    cost = cost.to(dtype)
    sa, sb = _reachable(cost, wa, wb, ta, tb, soft)
    scaled = (tau / scale if learnable and relaxed else number(tau) / number(scale) for tau, relaxed in zip(taus, soft, strict=True))
    rows, columns = (penalty(tau) for tau in scaled)  # pyright: ignore[reportArgumentType]
    try:
        problem = Problem(cost, eps, sa, sb, (rows, columns))
    except errors.UnequalMasses as refusal:
        refusals.warn(f"The plan returned has columns b and rows proportional to a: {refusal}")
        problem = Problem(cost, eps, matched(wb, wa).to(dtype), sb, (rows, columns))
    if warmstart is None:
        f, g = torch.zeros_like(problem.a), torch.zeros_like(problem.b)
    else:
        f, g = (problem.eps * take_start(warmstart, k, like=w) for k, w in enumerate((problem.a, problem.b)))
    found = find(
        problem, order="columns", grad="unroll" if unroll and (learnable or needs_gradient(problem)) else "envelope",
        criterion=Change(stopThr, rules.both_sides, translate_after=after, relative_after=math.inf if rules.translate else after),
        start=Start(g, problem.b, f), max_iter=max(numItermax, 1), check_every=rules.check_every, accelerate="none",
        leap=rules.both_sides and not (log or verbose),
    )  # fmt: skip
    if verbose:
        for k, change in enumerate(found.errors):
            print_error(k * rules.check_every, change, 1, rules.header_every)
    if warn:
        warn_unless_converged(found, rules.warning, *names)
    mass = tc.to(wa).sum() if tc is not None else wa.sum(-1) * wb.sum(-1) * (not entropy)
    kept = reg if isinstance(reg, Tensor) and reg.requires_grad else number(reg)
    return Unbalanced(found, back, 1.0, many, entropy, M=tM, reg=kept, taus=taus, a=wa, b=wb, reference_mass=mass)


def settled_after(rules: Method, accelerate: bool | None, tol: float) -> float:
    """The iteration after which every iterate is translated to its best mass. A tolerance of 0 asks for POT's iterates alone."""
    return 0 if rules.translate or accelerate else PLAIN if accelerate is None and tol > 0 else math.inf


def pair(reg_m: Any) -> tuple[Tensor | float, Tensor | float]:
    """(tau_a, tau_b) from a number, None (a hard constraint), or a list, tuple or array of one or two of these."""
    values = list(reg_m) if isinstance(reg_m, (list, tuple)) or getattr(reg_m, "ndim", 0) == 1 else [reg_m]
    if len(values) not in (1, 2):
        raise errors.ProblemError(
            f"reg_m holds {len(values)} values. Parameter must be either a scalar, or an indexable object of length 1 or 2."
        )
    taus = [math.inf if tau is None else tau if isinstance(tau, Tensor) else float(tau) for tau in values]
    for tau in taus:
        if not number(tau) > 0:
            raise errors.ProblemError(f"reg_m must be > 0 in units of M, or float('inf') for a hard constraint, found {number(tau)}.")
    return taus[0], taus[-1]


def _with_reference(M: Tensor, eps: float, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """M - eps log(c / a⊗b), which is +inf where c = 0; c = None is all ones. Empty atoms have no mass to move, whatever their cost."""
    log_a, log_b = log_weight(a), log_weight(b)
    if c is None:
        return M + eps * (log_a.unsqueeze(-1) + log_b.unsqueeze(-2))
    if bool(((c < 0) | ~c.isfinite()).any()):
        raise errors.ProblemError("c must hold finite numbers >= 0: it is the reference measure, and 0 forbids a pair.")
    log_c = torch.where(c > 0, torch.where(c > 0, c, 1.0).to(a).log(), -math.inf)
    return M - eps * (log_c - log_a.unsqueeze(-1) - log_b.unsqueeze(-2))


def _reachable(
    cost: Tensor, wa: Tensor, wb: Tensor, a: Tensor | None, b: Tensor | None, soft: tuple[bool, ...]
) -> tuple[Tensor | None, Tensor | None]:
    """The weights, with 0 where the marginal is relaxed and the mass may go nowhere: it stays and pays its penalty."""
    C = cost.detach()
    if not bool(C.amax().isposinf().item()):
        return a, b
    open_rows = C.masked_fill((wb == 0).unsqueeze(-2), math.inf).amin(-1).isfinite()
    open_columns = C.masked_fill((wa == 0).unsqueeze(-1), math.inf).amin(-2).isfinite()
    if soft[0]:
        a = torch.where(open_rows, wa.to(cost.dtype) if a is None else a, 0.0)
    if soft[1]:
        b = torch.where(open_columns, wb.to(cost.dtype) if b is None else b, 0.0)
    return a, b
