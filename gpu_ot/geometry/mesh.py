"""Costs that fold in at most three features, such as squared distances for d <= 3, by way of a mesh: O(n) a sweep, whatever n.

C_ij = alpha_i + beta_j - <u_i, v_j> is |u_i - v_j|^2 / 2 beside terms of i and of j alone, so exp(-C / eps) is a Gaussian of variance eps
in u. Points are deposited on a mesh of `per` nodes a standard deviation, the mesh is multiplied by the Gaussian along one axis after the
other, and the result is gathered at the other points: see `compiled.mesh`.

The same is true of A u and A^-T v, moved as one likes. The A here makes the covariances of both clouds one, so that mass travels as little
as a linear change of coordinates allows: where it stays near, the mesh is exact.
"""

from __future__ import annotations

import contextlib
import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .. import compiled, errors
from ..compiled.splines import TILE
from ..problem import Problem
from . import nodes
from .coordinates import AXES, coordinates
from .protocol import Geometry
from .several import bind_each
from .swept import Swept
from .tiles import MOST_TILES, Level, Levels, each, shares

#: Nodes a standard deviation: what the error of the marginals is about for 1, between which limits, and up to which a mesh is finer than it
#: need be while its tiles take no more than half as long as the points: mass that travels far needs it.
ERROR, COARSEST, FINEST, AMPLE = 5e-3, 1.7, 6.0, 3.5
#: Points that a thread is worth waking for.
LEAST = 2**14


class Rates(NamedTuple):
    """Seconds that a sweep takes, about: for itself, for a point and for a tile."""

    sweep: float
    point: float
    tile: float


#: Measured on 2 cores: machine code, and torch. On a GPU not timed but counted: 200 launches, and 3 and 500 kB of memory.
MACHINE, TORCH, GPU = Rates(0.0, 40e-9, 17e-6), Rates(0.0, 1.3e-6, 450e-6), Rates(2e-3, 5e-9, 0.5e-6)


def refuse(problem: Problem) -> str | None:
    """Why this problem cannot be taken by way of a mesh, or None."""
    if problem.a.device.type == "mps":
        return "its tensors are on an Apple GPU, which has no float64"
    return refuse_cost(problem)


def by_torch(problem: Problem) -> bool:
    """Whether the sums are operations of torch: on a GPU, and where there is no machine code."""
    return problem.a.device.type != "cpu" or compiled.refused() is not None


def rates(problem: Problem) -> Rates:
    return MACHINE if not by_torch(problem) else TORCH if problem.a.device.type == "cpu" else GPU


def refuse_cost(problem: Problem) -> str | None:
    """Why the cost has no coordinates of few axes, or None."""
    cost = problem.cost
    if not cost.folds:
        return f"the cost is {cost.describe()}, which is no squared distance: its kernel is not Gaussian"
    if not problem.a.numel():
        return "it is a batch of no problems"
    if cost.shape[:-2] and cost.sides is None:
        return f"it is a batch of costs, and {cost.describe()} does not say where the points of each are"
    if (d := features(problem)) > AXES:
        return f"its points have {d} features, and this is for at most {AXES}"
    return None


def features(problem: Problem) -> int:
    """Features of the folded cost, read from a single pair where one can be cut out."""
    cost = problem.cost
    folded = (cost.part(slice(0, 1), slice(0, 1)) if cost.cuts else cost).fold()
    return AXES + 1 if folded is None else folded.u.shape[-1]


def per_of(problem: Problem, tol: float) -> float:
    """Nodes a standard deviation for a solve to `tol`, half of which is left to the mesh: its error falls as the fourth power."""
    per = min(max((2 * ERROR / max(tol, 1e-12)) ** 0.25, COARSEST), FINEST)
    (n, m), extent, rate = problem.shape[-2:], extents(problem), rates(problem)
    while per < AMPLE and rate.tile * tiles(extent, 1.1 * per) < rate.point * (n + m) / 2:
        per *= 1.1
    return per


def sweeps_within(seconds: float, problem: Problem, tol: float) -> bool:
    """Whether there is room for the mesh, and a sweep takes no longer, about."""
    rate = rates(problem)
    left = seconds - rate.sweep - rate.point * sum(problem.shape[-2:])
    if left <= 0:  # whatever the extent of the clouds, which a GPU would be asked for
        return False
    most = nodes.MOST_NODES // TILE**3 if by_torch(problem) else MOST_TILES
    return tiles(extents(problem), per_of(problem, tol)) < min(most, left / rate.tile)


class Mesh(Swept):
    """`softmin` and `apply` by way of a mesh, as exact as its step allows.

    The tilts of the cells (see `compiled.mesh`) are those of the last `softmin` that was gathered there, so a result depends on the last
    one, within the error of the mesh.
    """

    approximate = True

    def __init__(self, problem: Problem, per: float) -> None:
        super().__init__(problem)
        self.per, self.pair = per, (nodes.Pair if by_torch(problem) else Pair)(problem, per)
        self.pair.level(problem.eps)

    def finer(self, factor: float) -> Mesh | None:
        per = self.per * factor**0.25
        if self.per >= FINEST or per > 1.5 * FINEST:
            return None
        with contextlib.suppress(errors.BackendError):
            return Mesh(self.problem, min(max(per, 1.25 * self.per), FINEST))
        return None

    @property
    def offsets(self) -> tuple[Tensor, Tensor]:
        return self.pair.offsets

    def updated(self, g: Tensor, log_w: Tensor | None, eps: float, damping: float) -> Tensor:
        return self.pair.updated(g, log_w, eps, damping, self._turned)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        columns = [self._product(k, h, eps, v[..., c]) for c in range(v.shape[-1])]
        return torch.stack(columns, -1) if columns else h.new_zeros(*k.shape, 0)

    def _product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        logs, sign = self.pair.sums(h, v.to(h), eps, self._turned)
        return sign * (logs + k / eps).exp()


class Pair(Levels):
    """The two clouds in coordinates in which mass stays near, and their meshes at the last values of eps."""

    def __init__(self, problem: Problem, per: float) -> None:
        super().__init__(per)
        self.offsets, points = coordinates(problem)
        self.shifts, self.points = (array(self.offsets[0]), array(self.offsets[1])), (array(points[0]), array(points[1]))
        ends = [np.stack((lines.min(1), lines.max(1))) for lines in (np.ascontiguousarray(z.T) for z in self.points)]
        self.box = np.minimum(ends[0][0], ends[1][0]), np.maximum(ends[0][1], ends[1][1])

    def updated(self, g: Tensor, log_w: Tensor | None, eps: float, damping: float, turned: bool) -> Tensor:
        """softmin(g + eps log w) / damping at the rows, or, turned, at the columns. The tilts are found anew."""
        from ..compiled import levels

        level, (own, other) = self.level(eps), self.shifts[::-1] if turned else self.shifts
        source, target = level.clouds[not turned], level.clouds[turned]
        h, logs, out = np.empty(len(other)), np.empty(len(own)), torch.empty(len(own), dtype=torch.float64)
        weights = np.empty(0) if log_w is None else array(log_w)
        each(shares(len(h), LEAST), levels.load, array(g), weights, other, source.order, eps, h)
        level.sums(h, np.ones_like(h), turned, True, logs, np.empty_like(logs))
        logs += level.constant
        each(shares(len(logs), LEAST), levels.store, logs, own, target.order, eps, damping, out.numpy())
        return out

    def sums(self, h: Tensor, v: Tensor, eps: float, turned: bool) -> tuple[Tensor, Tensor]:
        """log |sum_j exp((h_j - C_ij) / eps) v_j| and its sign, at the rows, or, turned, at the columns."""
        level, (own, other) = self.level(eps), self.shifts[::-1] if turned else self.shifts
        source, target = level.clouds[not turned], level.clouds[turned]
        sign = array(v)[source.order]
        # An atom whose factor is 0 is absent, and nothing bounds its exponent.
        L = np.where(sign == 0, -np.inf, ((array(h) - other) / eps)[source.order])
        found = np.empty((2, len(own)))
        level.sums(L, sign, turned, False, *found)
        out = np.empty_like(found)
        out[:, target.order] = found
        return torch.from_numpy(out[0] + level.constant - own / eps), torch.from_numpy(out[1])

    def _made(self, step: float, last: Level | None) -> Level:
        return Level(self.points, self.box, step, self.per, last)


def array(z: Tensor) -> np.ndarray:
    return z.detach().resolve_neg().contiguous().numpy()


def bind(problem: Problem, tol: float | None = None) -> Geometry:
    """The problem on a mesh that is as fine as a marginal error of `tol` needs; as fine as there is, without.

    Raises BackendError where eps is too small beside the extent of the clouds.
    """
    per = FINEST if tol is None else per_of(problem, tol)
    return bind_each(problem, lambda one: Mesh(one, per))


def memory(problem: Problem) -> int:
    """Bytes of both clouds with what is kept beside them, and of the mesh at eps."""
    *batch, n, m = problem.shape
    mesh = 8 * TILE**3 * math.ceil(tiles(extents(problem), COARSEST))
    if not by_torch(problem):
        return math.prod(batch) * (200 * (n + m) + 2 * mesh)
    return math.prod(batch) * (400 * (n + m) + 4 * mesh) + 6 * 8 * nodes.entries(problem.a)


def extents(problem: Problem) -> Tensor:
    """(d,): the sides of the box of both clouds, in standard deviations of the kernel; the largest of a batch."""
    folded = problem.cost.fold()
    assert folded is not None
    with torch.no_grad():
        sides = [torch.stack(z.aminmax(dim=-2)).double() for z in (folded.u, folded.v)]
        size = torch.maximum(sides[0][1], sides[1][1]) - torch.minimum(sides[0][0], sides[1][0])
        return size.reshape(-1, size.shape[-1]).amax(0).cpu() / math.sqrt(problem.eps)


def tiles(extent: Tensor, per: float) -> float:
    """Tiles of a mesh of `per` nodes a deviation, about: those of the box, though the clouds are taken in coordinates of their own."""
    return float((extent * per / 8 + 2).prod())
