"""Entropic transport with relaxed marginals in POT's terms: its iterations, its stopping rule, its scales.

POT updates u, then v, so this solves the transposed problem: its rows are POT's columns, and what the loop calls an iteration
is POT's. Conventions: P = c * exp(log u + log v - M / reg) for a reference measure c, which is a⊗b for reg_type "kl", all ones
for "entropy", or given. With f = reg log u, g = reg log v this is the plan a⊗b exp((f + g - C) / reg) of the cost
C = M - reg log(c / a⊗b), whose potentials are the same f and g: any reference is a change of the cost.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .. import errors, gradients
from ..costs import Cost
from ..penalties import KL, TV
from ..problem import Problem, float_type, matched, vector_dtype
from ..solve import find, needs_gradient
from ..solver.criterion import Change
from ..solver.status import CONVERGED, STALLED
from ..solver.step import Start
from .answer import Answer, carried
from .arrays import lazily, number, take, take_problem
from .refusals import elsewhere, warn

NOT_CONVERGED = (
    "Stabilized Unbalanced Sinkhorn did not converge.Try a larger entropy `reg` or a lower mass `reg_m`."
    "Or a larger absorption threshold `tau`."
)
ENTROPY_HAS_NO_REFERENCE = "If reg_type = entropy, then the matrix c is overwritten by the one matrix."

#: POT's other algorithms for relaxed marginals, by the names a caller may try.
ELSEWHERE = {"mm": "ot.unbalanced.mm_unbalanced", "lbfgsb": "ot.unbalanced.lbfgsb_unbalanced"}

#: POT's callers stop on purpose after 3, 10 or 100 iterations and see what they gave; after that only the end matters.
PLAIN = 100


class Method(NamedTuple):
    """What distinguishes POT's methods: when they stop, and whether the common constant of (f, g) is set to its optimum."""

    both_sides: bool = True  # the change of u and of v, rather than of u alone
    check_every: int = 1
    header_every: int = 50
    translate: bool = False
    warns: bool = False


METHODS = {
    "sinkhorn": Method(),
    "sinkhorn_stabilized": Method(both_sides=False, check_every=10, header_every=200, warns=True),
    "sinkhorn_translation_invariant": Method(translate=True),
    "sinkhorn_reg_scaling": Method(),
}


def print_progress(changes: list[Tensor], rules: Method) -> None:
    for k, change in enumerate(changes):
        at = k * rules.check_every
        if at % rules.header_every == 0:
            print("{:5s}|{:12s}".format("It.", "Err") + "\n" + "-" * 19)
        print(f"{at:5d}|{float(change.amax()):8e}|")


@dataclass(frozen=True)
class Unbalanced(Answer):
    """A solution of relaxed marginals, translated. `many` histograms are a batch in front.

    a, b            weights as given, (n,) and (*batch, m), in the type of the potentials.
    reference_mass  sum c; 0 for the entropy, which is written sum P log P - P.
    """

    M: Tensor | None = None
    reg: Tensor | float = 1.0
    taus: tuple[Tensor | float, Tensor | float] = (math.inf, math.inf)
    a: Tensor | None = None
    b: Tensor | None = None
    reference_mass: Tensor | float = 0.0
    entropy: bool = False

    @cached_property
    def P(self) -> Tensor:
        """(*batch, n, m)."""
        return self.solution.plan.to_dense()

    def plan(self) -> Any:
        return self.give(self.P)

    def linear(self) -> Tensor:
        return gradients.inner(self.P, cast(Tensor, self.M).to(self.P.dtype))

    def potentials(self) -> tuple[Tensor, Tensor]:
        """(log u, log v), (*batch, n) and (*batch, m), with P = c exp(log u + log v - M / reg)."""
        s, log_u = self.solution, self.solution.f / self.solution.problem.eps
        if s.problem.balanced:  # a was rescaled where the masses are unequal; POT's c was not
            log_u = log_u + (s.problem.a.sum(-1, keepdim=True) / cast(Tensor, self.a).sum(-1, keepdim=True)).log()
        return log_u, s.g / s.problem.eps

    def total(self) -> Tensor:
        """<P, M> + reg KL(P | c) + penalties, with generalised KL: sum p log(p / q) - p + q.

        log(P / c) is log u + log v - M / reg, so the first two terms are sums over the marginals.
        """
        P = self.P.to(self.solution.f.dtype)
        log_u, log_v = self.potentials()
        earned = carried(P.sum(-1), log_u) + carried(P.sum(-2), log_v)
        value = self.reg * (earned + self.reference_mass - P.sum((-2, -1)))
        for tau, gap in zip(self.taus, self._gaps(P), strict=True):
            if number(tau) < math.inf:
                value = value + tau * gap
        return value

    def _gaps(self, P: Tensor) -> tuple[Tensor, Tensor]:
        """The divergence of each marginal, (*batch,), that its tau multiplies."""
        by_distance = isinstance(self.solution.problem.penalties[0], TV)
        pairs = ((P.sum(-1), cast(Tensor, self.a)), (P.sum(-2), cast(Tensor, self.b)))
        rows, columns = ((p - q).abs() if by_distance else _divergence(p, q) for p, q in pairs)
        return rows.sum(-1), columns.sum(-1)

    def envelope(self) -> Tensor:
        """`total` at the optimum, from the dual at fixed potentials: its first derivatives are those of the optimum.

        In reg and tau the primal gives them at once: they multiply KL(P | c) and the divergences of the marginals.
        """
        s, problem = self.solution, self.solution.problem
        dual = gradients.value(problem, s.geometry, s.f.detach(), s.g.detach())
        value = dual + number(self.reg) * (self.reference_mass - problem.a.sum(-1) * problem.b.sum(-1))
        with torch.no_grad():
            P, total = self.P.to(dual.dtype), self.total()
            gaps = self._gaps(P)
            paid = sum(number(tau) * gap for tau, gap in zip(self.taus, gaps, strict=True) if number(tau) < math.inf)
            divergence = (total - paid - self.linear()) / number(self.reg)
        for factor, term in ((self.reg, divergence), *zip(self.taus, gaps, strict=True)):
            if isinstance(factor, Tensor):
                value = value + (factor - factor.detach()) * term
        for tau, kept, wanted in zip(self.taus, (problem.a, problem.b), (self.a, self.b), strict=True):
            if number(tau) < math.inf:  # atoms without support pay for staying
                value = value + number(tau) * (cast(Tensor, wanted).sum(-1) - kept.sum(-1))
        return value

    def logarithms(self, scale: float = 1.0) -> tuple[Any, Any]:
        """log u (n,) and log v (m,), or (n, k) and (m, k)."""
        both = []
        for logs, w in zip(self.potentials(), (cast(Tensor, self.a), cast(Tensor, self.b)), strict=True):
            if self.entropy:  # c = 1 does not know that an atom is empty, so u must: 1e-300, as POT guards its logarithms
                logs = torch.where(w > 0, logs, math.log(1e-300))
            both.append(self.give(scale * (logs.mT if self.many else logs)))
        return both[0], both[1]

    def log(self) -> dict[str, Any]:
        logu, logv = self.logarithms()
        log: dict[str, Any] = {"err": self.err(), "logu": logu, "logv": logv}
        if not self.many:
            log |= {"cost": self.give(self.linear()), "total_cost": self.give(self.total())}
        return log | self.story()

    def story(self) -> dict[str, Any]:
        # Histograms stop together, by the largest change of all.
        told, s = super().story(), self.solution
        converged = torch.tensor(s.status is CONVERGED, device=s.f.device)
        return told | {"converged": self.back(converged), "errors": [self.give(e.amax()) for e in s.errors]}


def _divergence(p: Tensor, q: Tensor) -> Tensor:
    """The terms p log(p / q) - p + q, with 0 log 0 = 0. An empty atom q = 0 has p = 0."""
    some = (p > 0) & (q > 0)
    return torch.where(some, p * (torch.where(some, p, 1.0) / torch.where(some, q, 1.0)).log(), 0.0) - p + q


def run(
    a: Any,
    b: Any,
    M: Any,
    reg: Any,
    reg_m: Any,
    *,
    method: str = "sinkhorn",
    reg_type: str = "kl",
    penalty: type[KL] | type[TV] = KL,
    c: Any = None,
    warmstart: Any = None,
    numItermax: int = 1000,
    stopThr: float = 1e-6,
    verbose: bool = False,
    log: bool = True,
    accelerate: bool | None = None,
    unroll: bool = True,
) -> Unbalanced:
    """Solve as POT's `method` does. `log` asks for the change in every iteration, as POT records it, at the price of running them singly.

    unroll      differentiate the potentials through the iterations; if not, only the `envelope` carries a gradient.
    accelerate  True: translated to the best mass in each iteration; False: never; None: from iteration `PLAIN` on.
    """
    rules = METHODS[method]
    after = 0 if rules.translate or accelerate else PLAIN if accelerate is None and penalty is KL else math.inf
    if isinstance(lazily(M), Cost):
        raise errors.ProblemError("relaxed marginals of a Cost: gpu_ot.solve(M, a, b, reg, unbalanced=reg_m) solves them lazily.")
    (ta, tb, tM, tc), back = take_problem(a, b, M, c=c)
    (n, m), many = tM.shape, tb is not None and tb.ndim == 2
    if tc is not None and tc.shape != (n, m):
        raise errors.wrong_shape("c", tc.shape, f"({n}, {m}) like M")
    entropy = _is_entropy(reg_type)
    if entropy and tc is not None:
        warn(ENTROPY_HAS_NO_REFERENCE)
        tc = None
    if not 0 < number(reg) < math.inf:
        if number(reg) == 0:
            raise elsewhere("reg = 0", "ot.unbalanced.mm_unbalanced(a, b, M, reg_m), or pass a small reg > 0")
        raise errors.bad_eps("reg", reg)

    (wa, wb), dtype = _wide_weights(tM, ta, tb), float_type(*(z for z in (tM, ta, tb, tc) if z is not None))
    taus = pair(reg_m)
    relaxed = (number(taus[0]) < math.inf, number(taus[1]) < math.inf)
    learnable = unroll and torch.is_grad_enabled() and any(isinstance(z, Tensor) and z.requires_grad for z in (reg, *taus))
    # P depends on M / reg and reg_m / reg alone, so a gradient in reg is one in those.
    scale, eps = (reg, 1.0) if learnable else (1.0, number(reg))
    cost = tM / reg if learnable else tM
    if tc is not None or entropy:
        cost = _with_reference(cost, eps, wa, wb, tc)
    cost = cost.to(dtype)
    sa, sb = _reachable(cost, wa, wb, ta, tb, relaxed)
    both = [
        cast(float, tau / scale if learnable and soft else number(tau) / number(scale)) for tau, soft in zip(taus, relaxed, strict=True)
    ]
    penalties = penalty(both[0]), penalty(both[1])
    try:
        problem = Problem(cost, eps, sa, sb, penalties)
    except errors.UnequalMasses as refusal:
        warn(f"The plan returned has columns b and rows proportional to a: {refusal}")
        problem = Problem(cost, eps, matched(wb, wa).to(dtype), sb, penalties)
    start = _initial(warmstart, problem)
    differentiable = unroll and (learnable or needs_gradient(problem))
    found = find(
        problem,
        order="columns",
        grad="unroll" if differentiable else "envelope",
        criterion=Change(stopThr, rules.both_sides, translate_after=after, relative_after=math.inf if rules.translate else after),
        start=Start(start[1], problem.b, start[0]),
        max_iter=max(numItermax, 1),
        check_every=rules.check_every,
        accelerate="none",
        leap=rules.both_sides and not (log or verbose),
    )
    if verbose:
        print_progress(list(found.errors), rules)
    if rules.warns and found.status not in (CONVERGED, STALLED):
        warn(f"{NOT_CONVERGED} Status {found.status}")
    mass = tc.to(wa).sum() if tc is not None else wa.sum(-1) * wb.sum(-1) * (not entropy)
    kept = reg if isinstance(reg, Tensor) and reg.requires_grad else number(reg)
    return Unbalanced(found, back, 1.0, many, tM, kept, taus, wa, wb, mass, entropy)


def _is_entropy(reg_type: Any) -> bool:
    name = reg_type.lower() if isinstance(reg_type, str) else reg_type
    if name not in ("kl", "entropy"):
        raise elsewhere(f"reg_type = {reg_type!r}", "ot.unbalanced.lbfgsb_unbalanced(a, b, M, reg, reg_m, reg_div=...)")
    return name == "entropy"


def pair(reg_m: Any) -> tuple[Tensor | float, Tensor | float]:
    """(tau_a, tau_b) of a number, None (a hard constraint), or one or two of them in whatever holds them."""
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


def _wide_weights(M: Tensor, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """(n,) and (*batch, m), in the type of the potentials."""
    wide = vector_dtype(M.device)
    uniform = [torch.full((size,), 1 / size, device=M.device, dtype=wide) for size in M.shape]
    return uniform[0] if a is None else a.to(wide), uniform[1] if b is None else b.mT.to(wide) if b.ndim == 2 else b.to(wide)


def _with_reference(M: Tensor, eps: float, a: Tensor, b: Tensor, c: Tensor | None) -> Tensor:
    """M - eps log(c / a⊗b), which is +inf where c = 0; c = None is all ones. Empty atoms have no mass to move, whatever their cost."""
    log_a, log_b = (torch.where(w > 0, torch.where(w > 0, w, 1.0).log(), 0.0) for w in (a, b))
    if c is None:
        return M + eps * (log_a.unsqueeze(-1) + log_b.unsqueeze(-2))
    if bool(((c < 0) | ~c.isfinite()).any()):
        raise errors.ProblemError("c must hold finite numbers >= 0: it is the reference measure, and 0 forbids a pair.")
    log_c = torch.where(c > 0, torch.where(c > 0, c, 1.0).to(a).log(), -math.inf)
    return M - eps * (log_c - log_a.unsqueeze(-1) - log_b.unsqueeze(-2))


def _reachable(
    cost: Tensor, wa: Tensor, wb: Tensor, a: Tensor | None, b: Tensor | None, relaxed: tuple[bool, bool]
) -> tuple[Tensor | None, Tensor | None]:
    """The weights, without those whose mass has nowhere to go: where the marginal is relaxed, it stays and pays its penalty."""
    b = b.mT if b is not None and b.ndim == 2 else b
    C = cost.detach()
    if not bool(C.amax().isposinf().item()):
        return a, b
    open_rows = C.masked_fill((wb == 0).unsqueeze(-2), math.inf).amin(-1).isfinite()
    open_columns = C.masked_fill((wa == 0).unsqueeze(-1), math.inf).amin(-2).isfinite()
    if relaxed[0]:
        a = torch.where(open_rows, wa.to(cost.dtype) if a is None else a, 0.0)
    if relaxed[1]:
        b = torch.where(open_columns, wb.to(cost.dtype) if b is None else b, 0.0)
    return a, b


def _initial(warmstart: Any, problem: Problem) -> tuple[Tensor, Tensor]:
    """reg (log u, log v) to start from, zeros when left out."""
    shapes = (problem.a.shape, problem.b.shape)
    if warmstart is None:
        return problem.a.new_zeros(shapes[0]), problem.b.new_zeros(shapes[1])
    found = []
    for k, shape in enumerate(shapes):
        (z,), _ = take(warmstart=warmstart[k])
        z = z.mT if z is not None and z.ndim == 2 else z
        if z is None or z.shape[-1] != shape[-1]:
            raise errors.wrong_shape(f"warmstart[{k}]", () if z is None else z.shape, f"({shape[-1]},), or ({shape[-1]}, n_hists)")
        found.append(problem.eps * z.detach().to(problem.a).expand(shape))
    return found[0], found[1]
