"""What a solve is given: a cost, two measures, eps and the penalties of the marginals. All input is checked here."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from . import communicator, errors, transforms
from .communicator import ALONE, COLUMNS, ROWS
from .costs import Cost, Matrix
from .penalties import BALANCED, KL, TV, Penalty, available, upper_bounds
from .vectors import log, vector_dtype

#: Largest relative difference between two masses that is taken for rounding: of halves, and of longer numbers.
MASS_RTOL_HALF, MASS_RTOL = 1e-2, 1e-5
#: Up to so many problems the masses of all go to the host, which compares them.
FEW_MASSES = 1024


def float_type(*tensors: Tensor) -> torch.dtype:
    """The floating type that all of these promote to; integers alone become float64."""
    dtype = None
    for z in tensors:
        if z.is_floating_point():
            dtype = z.dtype if dtype is None else torch.promote_types(dtype, z.dtype)
    return dtype or torch.float64


class Learnable(NamedTuple):
    """The numbers of a problem that require a gradient, 0-d tensors: eps, and tau of the rows and of the columns."""

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
    mass       partial transport: so much mass moves, from 0 to the smaller of sum(a) and sum(b), of which no point gives or gets more than
               its weight, P1 <= a and P^T 1 <= b. A number, or (*batch,); it takes the place of `penalties`.

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
    given_dtype: torch.dtype  # of the cost's inputs, as they were passed
    dtype: torch.dtype
    forbids: bool  # whether some pair has cost +inf
    learnable: Learnable
    mass: Tensor | None  # (*batch,), in the type of the potentials

    def __init__(
        self,
        cost: Cost | Tensor,
        eps: float | Tensor | tuple[str, float],
        a: Tensor | None = None,
        b: Tensor | None = None,
        penalties: Penalty | tuple[Penalty, Penalty] = BALANCED,
        mass: Tensor | float | None = None,
    ) -> None:
        bound, a, b = communicator.localize(cost if isinstance(cost, Cost) else Matrix(cost), a, b)
        pair = penalties if isinstance(penalties, tuple) else (penalties, penalties)
        work = functools.partial(_checked, bound, eps, a, b, pair, mass)
        fields = bound.ranks.on_every_rank(work, eps=eps, penalties=pair, a=a, b=b, gradients=torch.is_grad_enabled())
        self.__dict__.update(fields)

    @classmethod
    def checked(cls, cost: Cost, eps: float, a: Tensor, b: Tensor) -> Problem:
        """A balanced problem whose numbers have been checked elsewhere."""
        fields = dict(
            cost=cost, eps=eps, a=a, b=b, penalties=(BALANCED, BALANCED), forbids=False, learnable=Learnable(None, None, None), mass=None
        )
        problem, dtype = object.__new__(cls), float_type(*cost.inputs.values())
        problem.__dict__.update(fields, given_dtype=dtype, dtype=dtype)
        return problem

    def restricted(self, cost: Cost, a: Tensor, b: Tensor, penalties: tuple[Penalty, Penalty] | None = None) -> Problem:
        """The problem between some of its points; not checked again."""
        return self._with(cost=cost, a=a, b=b, penalties=penalties or self.penalties)

    @property
    def T(self) -> Problem:
        """Rows for columns; not checked again."""
        eps, rows, columns = self.learnable
        learnable = Learnable(eps, columns, rows)
        return self._with(cost=self.cost.T, a=self.b, b=self.a, penalties=self.penalties[::-1], learnable=learnable)

    @property
    def kept(self) -> Problem:
        """The same problem, where autograd may keep its tensors; not checked again."""
        cost, a, b = _kept(self.cost, self.a, self.b)
        return self if cost is self.cost and a is self.a and b is self.b else self._with(cost=cost, a=a, b=b)

    def unwrapped(self) -> Problem:
        """The same problem of the numbers inside what torch.func makes of its tensors; not checked again."""
        cost = self.cost.of(transforms.unwrapped(z) for z in self.cost.inputs.values())
        return self._with(cost=cost, a=transforms.unwrapped(self.a), b=transforms.unwrapped(self.b))

    def _with(self, **fields: Any) -> Problem:
        other = object.__new__(Problem)
        kept = {name: self.__dict__[name] for name in Problem.__dataclass_fields__}  # without what is cached
        other.__dict__.update(kept | fields)
        return other

    @property
    def as_given(self) -> tuple[float | Tensor, tuple[Penalty, Penalty]]:
        """eps and the penalties, with the tensors in them that require a gradient."""
        eps, *taus = self.learnable
        rows, columns = (p if tau is None else type(p)(tau) for p, tau in zip(self.penalties, taus, strict=True))  # type: ignore[arg-type]
        return self.eps if eps is None else eps, (rows, columns)

    @property
    def shape(self) -> torch.Size:
        """(*batch, n, m)."""
        return torch.Size((*self.a.shape, self.b.shape[-1]))

    @cached_property
    def balanced(self) -> bool:
        """Whether both marginals are hard constraints."""
        return self.penalties[0].balanced and self.penalties[1].balanced

    @property
    def log_a(self) -> Tensor:
        """(*batch, n): -inf for empty atoms. Differentiable in a under autograd, and taken once otherwise."""
        return log(self.a) if torch.is_grad_enabled() and transforms.requires_grad(self.a) else self._logs[0]

    @property
    def log_b(self) -> Tensor:
        """(*batch, m): -inf for empty atoms. Differentiable in b under autograd, and taken once otherwise."""
        return log(self.b) if torch.is_grad_enabled() and transforms.requires_grad(self.b) else self._logs[1]

    @cached_property
    def _logs(self) -> tuple[Tensor, Tensor]:
        return log(self.a.detach()), log(self.b.detach())


def matched(a: Tensor, b: Tensor) -> Tensor:
    """b rescaled to the mass of a: balanced iterations never see the scale of b, and reach their tolerance only without it."""
    return b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


def check_cost(cost: Cost) -> None:
    """Raises ProblemError for a cost with NaN, or infinities where they mean nothing."""
    extremes = _extremes(cost)
    if extremes and not torch.stack(extremes).isfinite().all():
        _refuse_broken(cost)


def _checked(
    cost: Cost, eps: float | Tensor | tuple[str, float], a: Tensor | None, b: Tensor | None, penalties: tuple[Penalty, Penalty],
    mass: Tensor | float | None,
) -> dict[str, Any]:  # fmt: skip
    """The fields of a Problem."""
    if mass is not None:
        penalties = upper_bounds(penalties, cost.ranks is ALONE)
    cost, a, b = _kept(cost, a, b)
    inputs = cost.inputs
    tensors = inputs | {name: w for name, w in (("a", a), ("b", b)) if w is not None}
    _check_tensors(tensors)
    eps_number, pair, learnable = _numbers(cost, eps, penalties)
    if not 0 < eps_number < math.inf:
        raise errors.bad_eps("eps", eps)

    given = float_type(*inputs.values())
    halves = any(z.is_floating_point() and z.dtype.itemsize < 4 for z in tensors.values())
    mass_rtol = MASS_RTOL_HALF if halves else MASS_RTOL
    dtype = given if given.itemsize >= 4 else torch.float32
    cost = cost.to(dtype)
    shape = cost.shape
    if len(shape) < 2:
        raise errors.wrong_shape(next(iter(inputs)), shape, "(*batch, n, m)")
    *cost_batch, n, m = shape
    if not (n and m):
        raise errors.empty_problem(n, m)
    device, ranks = next(iter(tensors.values())).device, cost.ranks
    wide, weights = vector_dtype(device), []
    for side, name, w, size in ((ROWS, "a", a, n), (COLUMNS, "b", b, m)):
        w = torch.full((size,), 1 / size, dtype=wide, device=device) if w is None else ranks.gather_weights(name, side, w)
        if w.ndim == 0 or w.shape[-1] != size:
            raise errors.wrong_shape(name, w.shape, f"(*batch, {size}) to match a cost of shape ({n}, {m})")
        weights.append(w.to(wide))
    wa, wb = weights
    moved = None if mass is None else torch.as_tensor(mass, dtype=wide, device=device)
    try:
        batch = torch.broadcast_shapes(cost_batch, wa.shape[:-1], wb.shape[:-1], *(() if moved is None else (moved.shape,)))
    except RuntimeError:
        found = " and ".join(errors.shape(w.shape) for w in weights)
        raise errors.wrong_shape("the pair (a, b)", shape, f"batches that broadcast, found {found} beside that cost") from None
    wa, wb = wa.expand(*batch, n), wb.expand(*batch, m)

    if isinstance(eps, tuple) and batch.numel():
        eps_number *= float(cost.scale(eps[0]))
        if not 0 < eps_number < math.inf:
            raise errors.ProblemError(f"eps = {eps} is {eps_number} here: the costs do not vary. Give eps as a number, in their units.")

    balanced = pair[0].balanced and pair[1].balanced
    if transforms.active():  # inside a transform torch 2.7 reads not even the numbers inside
        seen = cost.of(transforms.numbers(z) for z in cost.inputs.values()), transforms.numbers(wa), transforms.numbers(wb)
        forbids, padding = transforms.outside(lambda: _check_values(*seen, balanced, mass_rtol), wa)
    else:
        forbids, padding = _check_values(cost, wa, wb, balanced, mass_rtol)
    if padding is not None:
        cost = Matrix(torch.where(padding, 0.0, cost.dense()))
    wb = matched(wa, wb) if balanced else wb
    if moved is not None:
        moved = available(moved.expand(batch), wa, wb, mass_rtol)
    return dict(
        cost=cost, eps=eps_number, a=wa, b=wb, penalties=pair, given_dtype=given, dtype=dtype, forbids=forbids, learnable=learnable,
        mass=moved,
    )  # fmt: skip


def _kept(cost: Cost, *weights: Tensor | None) -> tuple[Any, ...]:
    """Of tensors that autograd may keep: those made under torch.inference_mode, which has ended, are copied."""
    tensors = *cost.inputs.values(), *weights
    if not any(isinstance(z, Tensor) and transforms.unkept(z) for z in tensors):
        return cost, *weights
    return cost.of(map(transforms.kept, cost.inputs.values())), *(w if w is None else transforms.kept(w) for w in weights)


def _check_tensors(tensors: dict[str, Tensor]) -> None:
    for name, z in tensors.items():
        if not isinstance(z, Tensor):
            raise errors.not_a_tensor(name, z)
        if z.layout != torch.strided:
            raise errors.unusable_tensor(name, "sparse", "Pass x.to_dense(); a pair that must not be used has cost +inf.")
        if z.is_complex():
            raise errors.unusable_tensor(name, "complex", "Pass its real part or its modulus, whichever is the cost.")
    devices = {name: z.device for name, z in tensors.items()}
    if len(set(devices.values())) > 1:
        raise errors.mixed_devices({name: str(device) for name, device in devices.items()})
    if transforms.active() and any(transforms.batched(z) for z in tensors.values()):
        raise errors.ProblemError(
            "torch.vmap hides the numbers of each problem, and a solve looks at them: pass the batch itself, its axes in front, costs "
            "(*batch, n, m) or points (*batch, n, d), whose problems are solved at once. (SamplesLoss takes vmap as it is.)"
        )


def _numbers(
    cost: Cost, eps: float | Tensor | tuple[str, float], penalties: tuple[Penalty, Penalty]
) -> tuple[float, tuple[Penalty, Penalty], Learnable]:
    """eps and the penalties in plain numbers, and the tensors among them that require a gradient."""
    found: list[Tensor | None] = []
    numbers: list[Any] = []
    for given in (eps, *penalties):
        z = given.tau if isinstance(given, (KL, TV)) else given
        if not isinstance(z, Tensor):
            found.append(None)
            numbers.append(given)
            continue
        found.append(z if torch.is_grad_enabled() and transforms.requires_grad(z) else None)
        numbers.append(float(z.detach()) if z is given else type(given)(float(z.detach())))  # type: ignore[call-arg, operator]
    learnable, (number, rows, columns) = Learnable(*found), numbers
    if cost.ranks is not ALONE and any(z is not None for z in found):
        raise errors.ProblemError("eps or tau requires a gradient, which is not known where ranks share the points: pass numbers.")
    return float(number[1] if isinstance(number, tuple) else number), (rows, columns), learnable


def _check_values(cost: Cost, a: Tensor, b: Tensor, balanced: bool, mass_rtol: float) -> tuple[bool, Tensor | None]:
    """Every check that reads numbers, with one copy to the host unless something is unusual.

    Whether the cost forbids a pair, and the pairs (*batch, n, m) of lines that are padding and forbid everything, or None.
    """
    if not a.numel():  # a batch of no problems
        return False, None
    a, b = a.detach(), b.detach()
    mass_a, mass_b = a.sum(-1), b.sum(-1)
    seen = [z.amin() for z in (a, b)] + _extremes(cost)
    few = mass_a.numel() <= FEW_MASSES
    if not few:
        gap = ((mass_a - mass_b).abs() / torch.maximum(mass_a, mass_b)).amax()
        seen += [mass_a.amin(), mass_b.amin(), mass_a.amax(), mass_b.amax(), gap]
    numbers = torch.cat([z.reshape(-1) for z in (*seen, *((mass_a, mass_b) if few else ()))]).tolist()
    low_a, low_b, *extremes = numbers[: len(seen)]
    if few:
        masses = numbers[len(seen) :]
        masses = masses[: len(masses) // 2], masses[len(masses) // 2 :]
        (least_a, least_b), (most_a, most_b) = map(min, masses), map(max, masses)
        uneven = max(abs(x - y) / max(x, y, 1e-300) for x, y in zip(*masses, strict=True))
    else:
        *extremes, least_a, least_b, most_a, most_b, uneven = extremes

    for name, w, low, least, most in (("a", a, low_a, least_a, most_a), ("b", b, low_b, least_b, most_b)):
        if not (low >= 0 and most < math.inf):
            raise errors.bad_weights(name, int(w.isnan().sum()), int((w < 0).sum()), int(w.isinf().sum()))
        if least <= 0:
            raise errors.no_mass(name)
    forbids = cost.stored and extremes[1] == math.inf
    if not (extremes[0] > -math.inf if forbids else all(map(math.isfinite, extremes))):
        _refuse_broken(cost)
    if balanced and uneven > mass_rtol:
        worst = ((mass_a - mass_b).abs() / torch.maximum(mass_a, mass_b)).argmax()
        raise errors.unequal_masses(float(mass_a.reshape(-1)[worst]), float(mass_b.reshape(-1)[worst]))
    return forbids, _check_reach(cost, a, b) if forbids else None


def _extremes(cost: Cost) -> list[Tensor]:
    """The least and the largest entry of a cost that is stored, or of each input of another. NaN is both, where there is one."""
    entries = [cost.dense()] if cost.stored else cost.inputs.values()
    return [extreme for z in entries if z.numel() for extreme in z.detach().aminmax()]


def _refuse_broken(cost: Cost) -> None:
    """Raises for rows with NaN or -inf. In costs that are not stored, which forbid nothing, every infinity of an input counts."""
    if cost.stored:
        least = cost.dense().detach().amin(-1)  # NaN is the minimum of whatever holds it
        count = int((least.isnan() | least.isneginf()).sum())
    else:
        count = sum(int((~z.detach().isfinite()).sum()) for z in cost.inputs.values())
    if count:
        raise errors.broken_cost(" or ".join(cost.inputs), count, "rows" if cost.stored else "entries")


def _check_reach(cost: Cost, a: Tensor, b: Tensor) -> Tensor | None:
    """Refuse mass that may go nowhere. Lines without weight that forbid everything are padding: their pairs (*batch, n, m), or None."""
    C = cost.dense().detach()
    closed_rows, closed_columns, empty_rows, empty_columns = C.amin(-1).isposinf(), C.amin(-2).isposinf(), a == 0, b == 0
    if not torch.stack([z.any() for z in (closed_rows, closed_columns, empty_rows, empty_columns)]).any():
        return None
    reached_rows = C.masked_fill(empty_columns.unsqueeze(-2), math.inf).amin(-1).isfinite()
    reached_columns = C.masked_fill(empty_rows.unsqueeze(-1), math.inf).amin(-2).isfinite()
    for line, reached, w, name in (("row", reached_rows, a, "a"), ("column", reached_columns, b, "b")):
        if stuck := int((~reached & (w > 0)).sum()):
            raise errors.forbidden_lines(next(iter(cost.inputs)), line, stuck, name)
    padding = closed_rows.unsqueeze(-1) | closed_columns.unsqueeze(-2)
    return padding if bool(padding.any()) else None
