"""How dearly a marginal is held: exactly, or at a price.

Each penalty appears in the algorithm only through two maps: `damp`, what a softmin becomes when mass may leak, and
`reward`, what a unit of mass at a given potential earns in the dual.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from .errors import ProblemError, bad_mass
from .vectors import exp, log

#: exp(-EMPTY) is 0 in float64.
EMPTY = 1000.0


class Penalty(Protocol):
    @property
    def balanced(self) -> bool: ...

    def damp(self, f: Tensor, eps: float) -> Tensor: ...

    def reward(self, f: Tensor) -> Tensor: ...


def _checked(tau: float) -> None:
    if not tau > 0:
        raise ProblemError(f"tau must be > 0 in units of the cost, or math.inf for a hard constraint, found {tau}.")


@dataclass(frozen=True)
class KL:
    """Marginal penalty tau * KL(P1 | a). `tau = inf` is the hard constraint P1 = a.

    `tau` has the units of the cost: below it, moving a unit of mass is worth it; far above,
    dropping the mass is. Séjourné et al. 2019, arXiv:1910.12958, Table 1 (their rho).
    """

    tau: float = math.inf

    def __post_init__(self) -> None:
        _checked(self.tau)

    @property
    def balanced(self) -> bool:
        return math.isinf(self.tau)

    def damp(self, f: Tensor, eps: float) -> Tensor:
        return f / (1 + eps / self.tau)  # eps / inf is exactly 0, so balanced needs no branch

    def reward(self, f: Tensor) -> Tensor:
        """What a unit of mass at potential `f` earns in the dual, -phi*(-f); `f` itself as tau -> inf."""
        if self.balanced:
            return f
        return -self.tau * torch.expm1(-f / self.tau)  # 1 - exp(-f/tau) has no digits left once f << tau


BALANCED = KL()


@dataclass(frozen=True)
class TV:
    """Marginal penalty tau * |P1 - a|_1: mass travels at most a cost of 2 tau, or stays where it is.

    Séjourné et al. 2019, arXiv:1910.12958, Table 1.
    """

    tau: float

    def __post_init__(self) -> None:
        _checked(self.tau)

    @property
    def balanced(self) -> bool:
        return math.isinf(self.tau)

    def damp(self, f: Tensor, eps: float) -> Tensor:
        return f.clamp(-self.tau, self.tau)

    def reward(self, f: Tensor) -> Tensor:
        return f.clamp(max=self.tau)


@dataclass(frozen=True, eq=False)
class AtMost:
    """P1 <= a: what is left over costs nothing. `level` (*batch, 1) is the multiplier of the total mass, which one side's potentials carry.

    The conjugate of the constraint 0 <= r <= 1 is max(., 0), so a row is clamped at the potential from which on it would give more than it
    has. Benamou et al. 2015, arXiv:1412.5154, section 5 (partial transport).
    """

    level: Tensor | float = 0.0
    balanced: bool = False

    def damp(self, f: Tensor, eps: float) -> Tensor:
        return _least(f, self.level)

    def reward(self, f: Tensor) -> Tensor:
        return _least(f, self.level)


def _least(f: Tensor, level: Tensor | float) -> Tensor:
    return torch.minimum(f, level) if isinstance(level, Tensor) else f.clamp(max=level)


def upper_bounds(penalties: tuple[Penalty, Penalty], alone: bool) -> tuple[Penalty, Penalty]:
    """The penalties of partial transport, in the place of the default ones. `alone`: whether no ranks share the points."""
    if not alone or any(penalty is not BALANCED for penalty in penalties):
        found = "penalties are given, too" if alone else "ranks share the points"
        raise ProblemError(f"mass says how much moves, of marginals that are upper bounds, and {found}: leave one of them out.")
    return AtMost(), AtMost()


def available(mass: Tensor, a: Tensor, b: Tensor, mass_rtol: float) -> Tensor:
    """(*batch,): the mass to be moved, where there is so much, without what rounding adds."""
    most = torch.minimum(a.sum(-1), b.sum(-1))
    wrong = ~((mass >= 0) & (mass <= most * (1 + mass_rtol)))
    if mass.numel() and bool(wrong.any()):
        at = int(wrong.reshape(-1).byte().argmax())
        raise bad_mass(float(mass.reshape(-1)[at]), float(most.reshape(-1)[at]))
    return mass - (mass - most).detach().clamp(min=0)  # the derivative in the mass stays


def filled(s: Tensor, a: Tensor, mass: Tensor, eps: float) -> Tensor:
    """(*batch, 1): the level lam at which rows with potentials min(s_i, lam) give `mass` (*batch, 1) in all,

        sum_i a_i min(1, exp((lam - s_i) / eps)) = mass,

    for softmins s (*batch, n): rows with s_i <= lam give all they have. Where all of them do, lam is the largest s_i with mass; for a mass
    of 0 it is so low that every exponential is 0. Differentiable in s, a and mass. O(n log n).
    """
    with torch.no_grad():
        present = (a > 0) & s.isfinite()
        z, order = torch.where(present, s, math.inf).sort(-1)
        w, low = torch.where(present, a, 0.0).gather(-1, order), z[..., :1]
        # At lam = z_k the rows before k give all they have, and those from k on a sum of exponentials. It grows with k.
        exponents = torch.where(z.isfinite(), (z - low) / eps, math.inf)
        rest = (log(w) - exponents).flip(-1).logcumsumexp(-1).flip(-1)
        given = w.cumsum(-1) - w + torch.where(w > 0, (exponents + rest).exp(), 0.0)
        lam = torch.where((given <= mass) & (w > 0), z, -math.inf).amax(-1, keepdim=True)
        full, low = present & (s <= lam), torch.where(low.isfinite(), low, 0.0)
        base = torch.where(present & ~full, s, math.inf).amin(-1, keepdim=True)
        nothing = low - EMPTY * eps
    # At the right rows, the same in closed form.
    partly = present & ~full
    left = mass - torch.where(full, a, 0.0).sum(-1, keepdim=True)
    sums = torch.where(partly, a * ((base - torch.where(partly, s, base)) / eps).exp(), 0.0).sum(-1, keepdim=True)
    some = (sums > 0) & (left > 0)
    level = base + eps * (torch.where(some, left, 1.0).log() - torch.where(some, sums, 1.0).log())
    return torch.where(some, level, torch.where((mass > 0) & lam.isfinite(), lam, nothing))


def clamped(s: Tensor, lam: Tensor) -> Tensor:
    """min(s, lam), with the derivative of s where they are equal."""
    return torch.where(s <= lam, s, lam)


def best_shift(penalties: tuple[Penalty, Penalty], a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> Tensor | float:
    """(*batch, 1): the lam at which the dual of (f + lam, g - lam) is largest; 0 for hard marginals, where it is the same for all.

    <a, exp(-(f + lam) / tau_a)> = <b, exp(-(g - lam) / tau_b)>: the plan's mass counted from either side. Large tau makes this the slowest
    direction of the iterations. Séjourné et al. 2022, arXiv:2201.00730, Proposition 3. In closed form for KL alone.
    """
    rows, columns = penalties
    if (rows.balanced and columns.balanced) or not (isinstance(rows, KL) and isinstance(columns, KL)):
        return 0.0
    return (_log_mass(a, -f / rows.tau) - _log_mass(b, -g / columns.tau)) / (1 / rows.tau + 1 / columns.tau)


def translate(penalties: tuple[Penalty, Penalty], eps: float, a: Tensor, b: Tensor, f: Tensor, g: Tensor) -> tuple[Tensor, Tensor]:
    """g + p and its update f + q, for the constant p that is best in the dual; f must be the update of g. KL penalties.

    Shifting g by p shifts f by q = -p tau_a / (tau_a + eps) and leaves the rows' mass at sum a exp(-(f + q) / tau_a); the dual is largest
    in p where sum b exp(-(g + p) / tau_b) is the same:

        p = log(sum b exp(-g / tau_b) / sum a exp(-f / tau_a)) / (1 / tau_b + 1 / (tau_a + eps)).

    With tau = inf the sum is |a| or |b|. Shifted potentials have shifted updates, so iterations between two translations move (f, g)
    as if each had been translated: an iterate of the translation-invariant Sinkhorn of Séjourné, Vialard and Peyré 2022,
    arXiv:2201.00730, is the plain one, translated.
    """
    tau_a, tau_b = (cast(KL, penalty).tau for penalty in penalties)
    rate = 1 / tau_b + 1 / (tau_a + eps)
    if not rate > 0:  # both hard: the dual does not depend on p
        return f, g
    p = (_log_mass(b, -g / tau_b) - _log_mass(a, -f / tau_a)) / rate
    return f - p / (1 + eps / tau_a), g + p


def _log_mass(w: Tensor, z: Tensor) -> Tensor:
    """log sum w exp(z), (*batch, 1), with a derivative at w = 0."""
    top = torch.where(w > 0, z, -math.inf).amax(-1, keepdim=True).detach()
    z = torch.where(w > 0, z, torch.where(z < top, z, top))  # an empty atom may lie anywhere
    return log((w * exp(z - top)).sum(-1, keepdim=True)) + top
