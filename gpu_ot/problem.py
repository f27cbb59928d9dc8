"""What is asked: a cost, two measures, how sharp, and how firmly the marginals hold. The one gate where input is checked."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple, cast

import torch
from torch import Tensor

from . import errors
from .costs import Cost, Matrix
from .penalties import BALANCED, Penalty

#: Largest relative difference between two masses that is taken for rounding, by the size of the input's numbers.
MASS_RTOL = {2: 1e-2, 4: 1e-5, 8: 1e-5}


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


@dataclass(frozen=True, eq=False)
class Problem:
    """Minimise over P >= 0:  <C, P> + eps KL(P | a⊗b) + penalty_a(P1) + penalty_b(P^T 1).

    cost       a Cost, or the matrix itself (*batch, n, m); +inf forbids a pair.
    eps        > 0, in units of the cost.
    a, b       weights (*batch, n) and (*batch, m), >= 0; None is uniform of mass 1. Batches broadcast.
    penalties  one for both marginals or a pair (rows, columns); the default KL() holds them exactly.

    After validation `a` and `b` are (*batch, n) and (*batch, m) in the type of the potentials, and the cost is in
    `dtype`, the type the sweeps run in: the inputs' own, float32 for halves.

    Raises ProblemError naming the argument, what was found and the way out.
    """

    cost: Cost
    eps: float
    a: Tensor
    b: Tensor
    penalties: tuple[Penalty, Penalty]
    given_dtype: torch.dtype

    def __init__(
        self,
        cost: Cost | Tensor,
        eps: float,
        a: Tensor | None = None,
        b: Tensor | None = None,
        penalties: Penalty | tuple[Penalty, Penalty] = BALANCED,
    ) -> None:
        bound = cost if isinstance(cost, Cost) else Matrix(cost)
        pair = penalties if isinstance(penalties, tuple) else (penalties, penalties)
        named = {**bound.inputs, "a": a, "b": b}
        for name, z in named.items():
            if z is not None or name not in ("a", "b"):
                _check_tensor(name, z)
        tensors = {name: z for name, z in named.items() if z is not None}
        if len({z.device for z in tensors.values()}) > 1:
            raise errors.mixed_devices({name: str(z.device) for name, z in tensors.items()})
        if isinstance(eps, Tensor) and eps.requires_grad:
            raise errors.ProblemError("eps is a tensor that requires a gradient: divide the cost and every tau by it and pass eps=1.")
        if not 0 < (number := float(eps)) < math.inf:
            raise errors.bad_eps("eps", eps)

        given = float_type(*tensors.values())
        dtype = given if given.itemsize >= 4 else torch.float32
        bound = bound.to(dtype)
        *cost_batch, n, m = _checked_shape(bound)
        device = next(iter(tensors.values())).device
        wide = vector_dtype(device)
        weights = []
        for name, w, size in (("a", a, n), ("b", b, m)):
            if w is None:
                w = torch.full((size,), 1 / size, dtype=wide, device=device)
            if w.ndim == 0 or w.shape[-1] != size:
                raise errors.wrong_shape(name, w.shape, f"(*batch, {size}) to match a cost of shape ({n}, {m})")
            weights.append(w.to(wide))
        try:
            batch = torch.broadcast_shapes(torch.Size(cost_batch), *(w.shape[:-1] for w in weights))
        except RuntimeError:
            found = " and ".join(errors.shape(w.shape) for w in weights)
            raise errors.wrong_shape("the pair (a, b)", bound.shape, f"batches that broadcast, found {found} beside that cost") from None
        wa, wb = (w.expand(*batch, w.shape[-1]) for w in weights)

        balanced = pair[0].balanced and pair[1].balanced
        bound = _check_values(bound, wa, wb, balanced, MASS_RTOL[given.itemsize])
        if balanced:
            wb = matched(wa, wb)
        for field, value in dict(cost=bound, eps=number, a=wa, b=wb, penalties=pair, given_dtype=given).items():
            object.__setattr__(self, field, value)

    @property
    def dtype(self) -> torch.dtype:
        return float_type(*self.cost.inputs.values())

    @property
    def shape(self) -> torch.Size:
        """(*batch, n, m)."""
        return torch.Size((*self.a.shape, self.b.shape[-1]))


def matched(a: Tensor, b: Tensor) -> Tensor:
    """b rescaled to the mass of a: balanced iterations never see the scale of b, and reach their tolerance only without it."""
    return b * (a.sum(-1, keepdim=True) / b.sum(-1, keepdim=True))


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


def _check_values(cost: Cost, a: Tensor, b: Tensor, balanced: bool, mass_rtol: float) -> Cost:
    """Every check that looks at numbers, at the price of one copy to the host (two when there are empty atoms)."""
    mass_a, mass_b = a.detach().sum(-1), b.detach().sum(-1)
    gap = ((mass_a - mass_b).abs() / torch.maximum(mass_a, mass_b)).reshape(-1)
    worst = gap.nan_to_num(nan=0.0).argmax()
    uneven = torch.stack([gap[worst], mass_a.reshape(-1)[worst], mass_b.reshape(-1)[worst]])
    lows = _lowest(cost, None, None)
    refused = torch.stack([_count(lows[0].isnan() | lows[0].isneginf()), _count(lows[0].isposinf()), _count(lows[1].isposinf())]).to(
        a.dtype
    )
    host = torch.cat([_look(a.detach()), _look(b.detach()), uneven, refused]).tolist()

    looks = {"a": _Found(*host[:5]), "b": _Found(*host[5:10])}
    for name, found in looks.items():
        if found.nan or found.negative or found.infinite:
            raise errors.bad_weights(name, int(found.nan), int(found.negative), int(found.infinite))
        if found.lightest <= 0:
            raise errors.no_mass(name)
    (gap_found, one, other), (n_nan, dead_rows, dead_columns) = host[10:13], host[13:]
    if n_nan:
        raise errors.nan_cost(" and ".join(cost.inputs), int(n_nan))
    if balanced and gap_found > mass_rtol:
        raise errors.unequal_masses(one, other)
    empty_atoms = looks["a"].zero + looks["b"].zero > 0
    if not (empty_atoms or dead_rows or dead_columns):
        return cost
    return _check_reach(cost, a.detach(), b.detach())


def _count(flags: Tensor) -> Tensor:
    return flags.sum()


def _lowest(cost: Cost, a: Tensor | None, b: Tensor | None) -> tuple[Tensor, Tensor]:
    """The cheapest pair of each row and column, among the partners with weight when weights are given.

    Costs between clouds forbid nothing: there the points themselves stand in, so that NaN is found without the matrix.
    """
    if not isinstance(cost, Matrix):
        finite = torch.stack([torch.where(z.detach().isfinite().all(), 0.0, math.nan) for z in cost.inputs.values()])
        return finite, finite
    M = cost.M.detach()
    if a is None or b is None:
        return M.amin(-1), M.amin(-2)
    return M.masked_fill((b == 0).unsqueeze(-2), math.inf).amin(-1), M.masked_fill((a == 0).unsqueeze(-1), math.inf).amin(-2)


def _check_reach(cost: Cost, a: Tensor, b: Tensor) -> Cost:
    """Refuse mass that may go nowhere; lines without weight that forbid everything are padding, and get cost 0."""
    if not isinstance(cost, Matrix):
        return cost
    for line, low, w, name in zip(("row", "column"), _lowest(cost, a, b), (a, b), ("a", "b"), strict=True):
        stuck = int((low.isposinf() & (w > 0)).sum())
        if stuck:
            raise errors.forbidden_lines(next(iter(cost.inputs)), line, stuck, name)
    rows, columns = _lowest(cost, None, None)
    padding = rows.isposinf().unsqueeze(-1) | columns.isposinf().unsqueeze(-2)
    return Matrix(cast(Tensor, torch.where(padding, 0.0, cost.M)))
