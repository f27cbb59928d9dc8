"""Costs between the nodes of one regular grid: a sum over axes, whose kernel is a product of one small matrix per axis."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from .. import errors
from ..vectors import in_full_precision
from . import scale
from .base import Cost, Index

AXES = 3


class Grid(Cost):
    """C_ij = sum over axes of |spacing (k - l)|^p, between the nodes i = (k, ...) and j = (l, ...) of a regular grid in 1 to 3 dimensions.

    shape     nodes along each axis, (128, 128) for an image. The problem has n = m = prod(shape) rows and columns, in the order of
              `image.flatten()`: weights are (*batch, n).
    spacing   the distance of two neighbours, in the unit of length: a number, one for each axis, or a tensor of these, (axes,), which
              then gets derivatives of the value. Its device is that of the problem. The default 1 / max(shape) fits the grid
              into the unit cube.
    p         the power of the distance along an axis, > 0: 2 for the squared Euclidean distance, 1 for the city-block distance.
    periodic  whether each axis is a circle: one flag, or one for each axis.

    A sweep is one product per axis: O(n (N_1 + N_2 + N_3)) operations in place of n^2, see `gpu_ot.geometry.grid`.
    Raises ProblemError for shapes, spacings and powers without meaning. Solomon et al. 2015, doi:10.1145/2766963, section 3.
    """

    symmetric = True
    backend = "grid"

    def __init__(
        self,
        shape: Sequence[int],
        spacing: float | Sequence[float] | Tensor | None = None,
        p: float = 2.0,
        periodic: bool | Sequence[bool] = False,
    ) -> None:
        self.nodes = tuple(int(k) for k in shape)
        if not 1 <= len(self.nodes) <= AXES or min(self.nodes) < 1:
            raise errors.ProblemError(f"shape must be the nodes of 1 to {AXES} axes, each at least 1, found {tuple(shape)}.")
        if not 0 < p < math.inf:
            raise errors.ProblemError(f"p must be a power > 0, 2 for squared distances, found {p}.")
        axes = len(self.nodes)
        spacing = 1 / max(self.nodes) if spacing is None else spacing
        if not isinstance(spacing, Tensor):
            spacing = torch.tensor(spacing, dtype=torch.float64)
        if spacing.shape not in ((), (1,), (axes,)):
            raise errors.wrong_shape("spacing", spacing.shape, f"(), or ({axes},): a length for each axis of the shape {self.nodes}")
        if not bool((spacing.detach() > 0).all()):
            raise errors.ProblemError(f"spacing must be a length > 0, found {spacing.tolist()}.")
        self.periodic = (periodic,) * axes if isinstance(periodic, bool) else tuple(bool(z) for z in periodic)
        if len(self.periodic) != axes:
            raise errors.ProblemError(f"periodic must be one flag or {axes}, one for each axis, found {len(self.periodic)}.")
        self.p, self.spacing = float(p), spacing.expand(axes) if spacing.ndim else spacing.repeat(axes)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"spacing": self.spacing}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((math.prod(self.nodes),) * 2)

    def of(self, inputs: Iterable[Tensor]) -> Grid:
        (spacing,) = inputs
        other = object.__new__(Grid)
        other.__dict__.update(self.__dict__, spacing=spacing)
        return other

    def axis(self, k: int) -> Tensor:
        """(N, N): the cost along one axis, differentiable in the spacing."""
        steps = self._steps(k, *(torch.arange(self.nodes[k], device=self.spacing.device) for _ in range(2)))
        return (self.spacing[k] * steps) ** self.p

    def dense(self) -> Tensor:
        every = torch.arange(self.shape[0], device=self.spacing.device)
        return self._between_nodes(every, every)

    def part(self, rows: Index, cols: Index) -> Cost:
        return _Nodes(self, *(self._chosen(z) for z in (rows, cols)))

    @property
    def T(self) -> Grid:
        return self

    def within(self, side: int) -> Grid:
        return self

    def some(self, problems: int) -> Cost:
        return self

    @in_full_precision
    def scale(self, kind: str) -> Tensor:
        """As `Cost.scale`: the mean, the variance and the maximum of a sum over axes are sums over axes."""
        if kind not in scale.SCALES or kind == "median":
            return super().scale(kind)
        with torch.no_grad():
            costs = [self.axis(k).double() for k in range(len(self.nodes))]
            if kind == "max":
                return torch.stack([C.amax() for C in costs]).sum()
            if kind == "mean":
                return torch.stack([C.mean() for C in costs]).sum()
            return torch.stack([C.var(correction=0) for C in costs]).sum().sqrt()

    def describe(self) -> str:
        return f"a grid of {' x '.join(map(str, self.nodes))} nodes"

    def _steps(self, k: int, i: Tensor, j: Tensor) -> Tensor:
        """(len(i), len(j)): how many steps apart two coordinates of axis k are."""
        steps = (i.unsqueeze(-1) - j.unsqueeze(-2)).abs()
        steps = torch.minimum(steps, self.nodes[k] - steps) if self.periodic[k] else steps
        return steps.to(self.spacing.dtype)

    def _between_nodes(self, rows: Tensor, cols: Tensor) -> Tensor:
        coordinates = [torch.unravel_index(z, self.nodes) for z in (rows, cols)]
        costs = [(self.spacing[k] * self._steps(k, i, j)) ** self.p for k, (i, j) in enumerate(zip(*coordinates, strict=True))]
        return torch.stack(costs).sum(0)

    def _chosen(self, index: Index) -> Tensor:
        return torch.arange(self.shape[0], device=self.spacing.device)[index] if isinstance(index, slice) else index


class _Nodes(Cost):
    """A grid between some of its nodes."""

    sides = None

    def __init__(self, grid: Grid, rows: Tensor, cols: Tensor) -> None:
        self.grid, self.rows, self.cols = grid, rows, cols

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.grid.inputs

    @property
    def shape(self) -> torch.Size:
        batch = torch.broadcast_shapes(self.rows.shape[:-1], self.cols.shape[:-1])
        return torch.Size((*batch, self.rows.shape[-1], self.cols.shape[-1]))

    def dense(self) -> Tensor:
        return self.grid._between_nodes(self.rows, self.cols)

    def of(self, inputs: Iterable[Tensor]) -> _Nodes:
        return _Nodes(self.grid.of(inputs), self.rows, self.cols)

    def part(self, rows: Index, cols: Index) -> _Nodes:
        return _Nodes(self.grid, self.rows[..., rows], self.cols[..., cols])

    @property
    def T(self) -> _Nodes:
        return _Nodes(self.grid, self.cols, self.rows)
