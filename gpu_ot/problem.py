"""What is asked: a cost, two measures, how sharp, and how firmly the marginals hold. The one gate where input is checked."""

from __future__ import annotations

import copy
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import communicator, errors, transforms
from .communicator import ALONE, COLUMNS, ROWS
from .costs import Cost, Matrix
from .penalties import BALANCED, KL, TV, Penalty

#: Largest relative difference between two masses that is taken for rounding: of halves, and of longer numbers.
MASS_RTOL_HALF, MASS_RTOL = 1e-2, 1e-5


def vector_dtype(device: torch.device) -> torch.dtype:
    """Potentials and weights are float64 whatever the cost's type: f / eps reaches 1e4 and more, and float32 would keep
    three digits of the plan. They are O(n + m), so this costs nothing. (Apple's GPUs have no float64.)"""
    return torch.float32 if device.type == "mps" else torch.float64


def float_type(*tensors: Tensor) -> torch.dtype:
    """The floating type that all of these promote to; integers alone become float64."""
    floating = [z.dtype for z in tensors if z.is_floating_point()]
    if not floating:
        return torch.float64
    dtype = floating[0]
    for other in floating[1:]:
        dtype = torch.promote_types(dtype, other)
    return dtype


class Learnable(NamedTuple):
    """The numbers of a problem that derivatives are asked of, 0-d tensors: eps, and tau of the rows and of the columns."""

    eps: Tensor | None
    rows: Tensor | None
    columns: Tensor | None


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise over P >= 0:  <C, P> + eps KL(P | a⊗b) + penalty_a(P1) + penalty_b(P^T 1).

    cost       a Cost, or the matrix itself (*batch, n, m); +inf forbids a pair.
    eps        > 0, in units of the cost; or relative to it, ("std", 0.05), also of its "mean", "median" or "max", see `Cost.scale`.
    a, b       weights (*batch, n) and (*batch, m), >= 0; None is uniform of mass 1. Batches broadcast.
    penalties  one for both marginals or a pair (rows, columns); the default KL() holds them exactly.

    eps, and tau of KL, may be tensors of one number, which then get derivatives of the value: grad="envelope".

    After validation `a` and `b` are (*batch, n) and (*batch, m) in the type of the potentials, and the cost is in `dtype`, the type the
    sweeps run in: that of the cost's inputs, float32 for halves, whatever the type of the weights.

    Raises ProblemError naming the argument, what was found and the way out.
    """

    cost: Cost
    eps: float
    a: Tensor
    b: Tensor
    penalties: tuple[Penalty, Penalty]
    given_dtype: torch.dtype
    forbids: bool  # whether some pair has cost +inf
    learnable: Learnable

    def __init__(
        self,
        cost: Cost | Tensor,
        eps: float | Tensor | tuple[str, float],
        a: Tensor | None = None,
        b: Tensor | None = None,
        penalties: Penalty | tuple[Penalty, Penalty] = BALANCED,
    ) -> None:
        bound, a, b = communicator.localize(cost if isinstance(cost, Cost) else Matrix(cost), a, b)
        pair = penalties if isinstance(penalties, tuple) else (penalties, penalties)
        asked = dict(eps=eps, penalties=pair, a=_form(a), b=_form(b), gradients=torch.is_grad_enabled())
        fields = bound.ranks.on_every_rank(lambda: self._checked(bound, eps, a, b, pair), **asked)
        for field, value in fields.items():
            object.__setattr__(self, field, value)

    @staticmethod
    def _checked(
        bound: Cost, eps: float | Tensor | tuple[str, float], a: Tensor | None, b: Tensor | None, pair: tuple[Penalty, Penalty]
    ) -> dict[str, Any]:
        """The fields."""
        named = {**bound.inputs, "a": a, "b": b}
        for name, z in named.items():
            if z is not None or name not in ("a", "b"):
                _check_tensor(name, z)
        tensors = {name: z for name, z in named.items() if z is not None}
        if len({z.device for z in tensors.values()}) > 1:
            raise errors.mixed_devices({name: str(z.device) for name, z in tensors.items()})
        if transforms.active() and any(transforms.batched(z) for z in tensors.values()):
            raise errors.ProblemError(
                "torch.vmap hides the numbers of each problem, and a solve looks at them: pass the batch itself, its axes in front, costs "
                "(*batch, n, m) or points (*batch, n, d), whose problems are solved at once. (SamplesLoss takes vmap as it is.)"
            )
        learnable, pair = _learnable(bound, eps, pair)
        relative = eps if isinstance(eps, tuple) else None
        number = float(eps[1] if isinstance(eps, tuple) else eps.detach() if isinstance(eps, Tensor) else eps)
        if not 0 < number < math.inf:
            raise errors.bad_eps("eps", eps)

        given = float_type(*bound.inputs.values())
        exact = float_type(*tensors.values()).itemsize >= 4
        dtype = given if given.itemsize >= 4 else torch.float32
        bound = bound.to(dtype)
        *cost_batch, n, m = _checked_shape(bound)
        device = next(iter(tensors.values())).device
        wide = vector_dtype(device)
        weights = []
        for side, name, w, size in ((ROWS, "a", a, n), (COLUMNS, "b", b, m)):
            uniform = torch.full((size,), 1 / size, dtype=wide, device=device)
            w = uniform if w is None else bound.ranks.gather_weights(name, side, w)
            if w.ndim == 0 or w.shape[-1] != size:
                raise errors.wrong_shape(name, w.shape, f"(*batch, {size}) to match a cost of shape ({n}, {m})")
            weights.append(w.to(wide))
        try:
            batch = torch.broadcast_shapes(torch.Size(cost_batch), *(w.shape[:-1] for w in weights))
        except RuntimeError:
            found = " and ".join(errors.shape(w.shape) for w in weights)
            raise errors.wrong_shape("the pair (a, b)", bound.shape, f"batches that broadcast, found {found} beside that cost") from None
        wa, wb = (w.expand(*batch, w.shape[-1]) for w in weights)

        if relative is not None:
            number *= float(bound.scale(relative[0]))
            if not 0 < number < math.inf:
                raise errors.ProblemError(
                    f"eps = {relative} is {number} here: the costs do not vary. Give eps as a number, in their units."
                )

        balanced = pair[0].balanced and pair[1].balanced
        bound, forbids = _check_values(bound, wa, wb, balanced, MASS_RTOL if exact else MASS_RTOL_HALF)
        if balanced:
            wb = matched(wa, wb)
        return dict(cost=bound, eps=number, a=wa, b=wb, penalties=pair, given_dtype=given, forbids=forbids, learnable=learnable)

    def restricted(self, cost: Cost, a: Tensor, b: Tensor, penalties: tuple[Penalty, Penalty] | None = None) -> Problem:
        """The same problem of a part of its points, whose numbers are checked already."""
        return self._with(cost=cost, a=a, b=b, penalties=penalties or self.penalties)

    @property
    def T(self) -> Problem:
        """Rows for columns; not checked again."""
        eps, rows, columns = self.learnable
        learnable = Learnable(eps, columns, rows)
        return self._with(cost=self.cost.T, a=self.b, b=self.a, penalties=self.penalties[::-1], learnable=learnable)

    def _with(self, **fields: Any) -> Problem:
        other = copy.copy(self)
        for field, value in fields.items():
            object.__setattr__(other, field, value)
        return other

    @property
    def dtype(self) -> torch.dtype:
        return float_type(*self.cost.inputs.values())

    def unwrapped(self) -> Problem:
        """The same problem of the numbers inside what torch.func makes of its tensors; not checked again."""
        cost = self.cost.of(transforms.unwrapped(z) for z in self.cost.inputs.values())
        return self._with(cost=cost, a=transforms.unwrapped(self.a), b=transforms.unwrapped(self.b))

    @property
    def as_given(self) -> tuple[float | Tensor, tuple[Penalty, Penalty]]:
        """eps and the penalties with the tensors in them that derivatives are asked of."""
        eps, *taus = self.learnable
        rows, columns = (p if tau is None else type(p)(tau) for p, tau in zip(self.penalties, taus, strict=True))  # type: ignore[arg-type]
        return self.eps if eps is None else eps, (rows, columns)

    @property
    def shape(self) -> torch.Size:
        """(*batch, n, m)."""
        return torch.Size((*self.a.shape, self.b.shape[-1]))


def _form(w: Tensor | None) -> tuple[Any, ...]:
    """What must be the same of the weights on every rank."""
    return (tuple(w.shape[:-1]), w.dtype, w.requires_grad) if isinstance(w, Tensor) else (type(w).__name__,)


def matched(a: Tensor, b: Tensor) -> Tensor:
    """b rescaled to the mass of a: balanced iterations never see the scale of b, and reach their tolerance only without it."""
    return b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


def _learnable(
    cost: Cost, eps: float | Tensor | tuple[str, float], penalties: tuple[Penalty, Penalty]
) -> tuple[Learnable, tuple[Penalty, Penalty]]:
    """What derivatives are asked of, and the penalties in plain numbers."""
    taus = [penalty.tau if isinstance(penalty, (KL, TV)) else None for penalty in penalties]
    found = [z if isinstance(z, Tensor) and transforms.requires_grad(z) and torch.is_grad_enabled() else None for z in (eps, *taus)]
    plain = [type(p)(float(tau.detach())) if isinstance(tau, Tensor) else p for p, tau in zip(penalties, taus, strict=True)]  # type: ignore[call-arg]
    if any(z is not None for z in found) and cost.ranks is not ALONE:
        raise errors.ProblemError("eps or tau requires a gradient, which is not known where ranks share the points: pass numbers.")
    return Learnable(*found), (plain[0], plain[1])


def _check_tensor(name: str, z: object) -> None:
    if not isinstance(z, Tensor):
        raise errors.not_a_tensor(name, z)
    if z.layout != torch.strided:
        raise errors.unusable_tensor(name, "sparse", "Pass x.to_dense(); a pair that must not be used has cost +inf.")
    if z.is_complex():
        raise errors.unusable_tensor(name, "complex", "Pass its real part or its modulus, whichever is the cost.")


def _checked_shape(cost: Cost) -> torch.Size:
    if len(cost.shape) < 2:
        raise errors.wrong_shape(next(iter(cost.inputs)), cost.shape, "(*batch, n, m)")
    if min(cost.shape[-2:]) == 0:
        raise errors.empty_problem(*cost.shape[-2:])
    return cost.shape


class _Found(NamedTuple):
    """What a look at the weights found, as numbers on the host."""

    nan: float
    negative: float
    infinite: float
    zero: float
    lightest: float  # the smallest mass in the batch


def _look(w: Tensor) -> Tensor:
    counts = [w.isnan().sum(), (w < 0).sum(), w.isinf().sum(), (w == 0).sum()]
    return torch.stack([*(c.to(w.dtype) for c in counts), w.sum(-1).amin()])


def _check_values(cost: Cost, a: Tensor, b: Tensor, balanced: bool, mass_rtol: float) -> tuple[Cost, bool]:
    """Every check that looks at numbers, at the price of one copy to the host (more only when something is unusual): the cost, and
    whether it forbids a pair."""
    wa, wb = a.detach(), b.detach()
    mass_a, mass_b = wa.sum(-1).reshape(-1), wb.sum(-1).reshape(-1)
    gap = ((mass_a - mass_b).abs() / torch.maximum(mass_a, mass_b)).nan_to_num(nan=0.0)
    worst = gap.argmax()
    flaws = _flaws(cost)
    checks = torch.cat([_look(wa), _look(wb), torch.stack([gap[worst], mass_a[worst], mass_b[worst]]), flaws.to(wa.dtype)])
    # Inside a transform torch 2.7 reads not even the numbers inside.
    host = transforms.outside(transforms.numbers(checks).tolist, checks) if transforms.active() else checks.tolist()

    looks = {"a": _Found(*host[:5]), "b": _Found(*host[5:10])}
    for name, found in looks.items():
        if found.nan or found.negative or found.infinite:
            raise errors.bad_weights(name, int(found.nan), int(found.negative), int(found.infinite))
        if found.lightest <= 0:
            raise errors.no_mass(name)
    (uneven, heavier, lighter), (broken, closed_rows, closed_columns, forbids) = host[10:13], host[13:]
    if broken:
        raise _broken(cost, int(broken))
    if balanced and uneven > mass_rtol:
        raise errors.unequal_masses(heavier, lighter)
    if cost.stored and forbids and (closed_rows or closed_columns or looks["a"].zero or looks["b"].zero):
        cost = _check_reach(cost, wa, wb, bool(closed_rows or closed_columns))
    return cost, bool(forbids)


def check_cost(cost: Cost) -> None:
    """Raises ProblemError for a cost with NaN, or infinities where they mean nothing."""
    if broken := int(_flaws(cost)[0]):
        raise _broken(cost, broken)


def _broken(cost: Cost, count: int) -> errors.ProblemError:
    return errors.broken_cost(" or ".join(cost.inputs), count, "rows" if cost.stored else "entries")


def _flaws(cost: Cost) -> Tensor:
    """(4,): rows with NaN or -inf, rows and columns with +inf alone, whether there is a +inf. For costs that are not stored, which forbid
    nothing, entries of the inputs that are not finite."""
    if cost.stored:
        C = cost.dense().detach()
        rows, columns = C.amin(-1), C.amin(-2)  # NaN is the minimum of whatever holds it
        bad = (rows.isnan() | rows.isneginf()).sum()
        return torch.stack([bad, rows.isposinf().sum(), columns.isposinf().sum(), C.amax().isposinf().long()])
    points = [(~z.detach().isfinite()).sum() for z in cost.inputs.values()]
    return torch.stack([sum(points, start=torch.zeros_like(points[0])), *[torch.zeros_like(points[0])] * 3])


def _check_reach(cost: Cost, a: Tensor, b: Tensor, closed: bool) -> Cost:
    """Refuse mass that may go nowhere; lines without weight that forbid everything are padding, and get cost 0."""
    C = cost.dense().detach()
    open_rows = C.masked_fill((b == 0).unsqueeze(-2), math.inf).amin(-1).isfinite()
    open_columns = C.masked_fill((a == 0).unsqueeze(-1), math.inf).amin(-2).isfinite()
    for line, is_open, w, name in (("row", open_rows, a, "a"), ("column", open_columns, b, "b")):
        if stuck := int((~is_open & (w > 0)).sum()):
            raise errors.forbidden_lines(next(iter(cost.inputs)), line, stuck, name)
    if not closed:
        return cost
    padding = C.amin(-1).isposinf().unsqueeze(-1) | C.amin(-2).isposinf().unsqueeze(-2)
    return Matrix(torch.where(padding, 0.0, cost.dense()))
