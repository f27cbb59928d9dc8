"""Costs between two clouds of points."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..communicator import COLUMNS, ROWS
from ..vectors import in_full_precision
from .base import Axis, Cost, Folded, unmatched

#: Features from which squared distances of float32 points on a CPU are products in float64, and numbers of a slab of those (4 MiB).
WIDE, SLAB = 16, 2**19


class _Pointed(Cost):
    """A cost between points x (*batch, n, d) and y (*batch, m, d)."""

    x: Tensor
    y: Tensor
    sides = (ROWS, COLUMNS)

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.y.shape[-2]))


@dataclass(frozen=True, eq=False)
class _Clouds(_Pointed):
    """One of the usual ones, the same whichever side it is seen from."""

    x: Tensor
    y: Tensor
    symmetric = True

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
            raise unmatched(x, y)

    def of(self, inputs: Iterable[Tensor]) -> Cost:
        return type(self)(*inputs)

    @property
    def T(self) -> Cost:
        return self.of((self.y, self.x))


class _Distances(transforms.Function):
    """|x_i - y_j| or its square, (*batch, n, m). torch's own has no second derivative, and of the square it could not have the right one
    where points coincide."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, squared: bool) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if squared and x.dtype == torch.float32 and x.device.type == "cpu" and x.shape[-1] >= WIDE:
            return _squares(x, y)
        # Differences first: |x|^2 + |y|^2 - 2<x, y> has no digits left for clouds far from the origin.
        D = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")
        return D.square() if squared else D

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, y, ctx.squared = inputs
        ctx.save_for_backward(x, y, output)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (G,), (x, y, C) = grad_outputs, ctx.saved_tensors
        need_x, need_y, _ = ctx.needs_input_grad
        if not torch.is_grad_enabled():
            D = C.sqrt() if ctx.squared else C
            G = 2 * D * G if ctx.squared else G
            back = torch.ops.aten._cdist_backward
            grad_x = back(G.contiguous(), x, y, 2.0, D) if need_x else None
            return grad_x, back(G.mT.contiguous(), y, x, 2.0, D.mT.contiguous()) if need_y else None, None
        return *_pull(x, y, C, G, ctx.squared), None


def _distances(x: Tensor, y: Tensor, squared: bool) -> Tensor:
    if x.dtype.itemsize < 4:  # of halves torch knows none on a CPU
        return _Distances.apply(x.float(), y.float(), squared).to(x.dtype)
    return _Distances.apply(x, y, squared)


def _pull(x: Tensor, y: Tensor, C: Tensor, G: Tensor, squared: bool) -> tuple[Tensor, Tensor]:
    """The derivatives in x and y of a function whose derivative in C is G, as products about a common centre."""
    W = 2 * G if squared else torch.where(C > 0, G / torch.where(C > 0, C, 1.0), 0.0)
    centre = torch.cat((x, y), -2).mean(-2, keepdim=True).detach()
    x, y = x - centre, y - centre
    return W.sum(-1, keepdim=True) * x - W @ y, W.sum(-2).unsqueeze(-1) * y - W.mT @ x


def _squares(x: Tensor, y: Tensor) -> Tensor:
    """|x_i - y_j|^2 of float32 points by products in float64 about a common centre: 16 digits of |x|^2 leave more of a distance than
    differences in float32 do, and from WIDE features on it is the faster way, 9 times at 64."""
    centre = torch.cat((x, y), -2).mean(-2, keepdim=True)
    u, v = (x - centre).double(), (y - centre).double()
    left = torch.cat((u, u.square().sum(-1, keepdim=True), torch.ones_like(u[..., :1])), -1)
    right = torch.cat((-2 * v, torch.ones_like(v[..., :1]), v.square().sum(-1, keepdim=True)), -1).mT.contiguous()
    C = (x[..., :1, :1] + y[..., :1, :1]).new_empty(*x.shape[:-1], y.shape[-2])  # under torch.vmap, of as many as either
    step = max(1, SLAB // max(1, y.shape[-2] * x.shape[:-2].numel()))
    for i in range(0, x.shape[-2], step):
        C[..., i : i + step, :] = (left[..., i : i + step, :] @ right).clamp(min=0)
    return C


def inner(u: Tensor, v: Tensor) -> Tensor:
    """<u_i, v_j>, (*batch, n, m), in full precision, its derivatives too."""
    return _Inner.apply(u, v)


class _Inner(transforms.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(u: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return u @ v.mT

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        (G,), (u, v), (need_u, need_v) = grad_outputs, ctx.saved_tensors, ctx.needs_input_grad
        return inner(G, v.mT) if need_u else None, inner(G.mT, u.mT) if need_v else None


class SqEuclidean(_Clouds):
    """C_ij = |x_i - y_j|^2."""

    folds = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    def dense(self) -> Tensor:
        return _distances(self.x, self.y, True)

    def pull(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """The derivatives in x and y of a function whose derivative in C is G (*batch, n, m)."""
        return _pull(self.x, self.y, G, G, True)

    def formula(self, i: Axis, j: Axis) -> Any:
        return (i(self.x) - j(self.y)).square().sum(-1)

    def fold(self) -> Folded:
        # A common centre changes no distance and keeps the digits of clouds far from the origin.
        centre = torch.cat((self.x, self.y), -2).mean(-2, keepdim=True).detach()
        x, y = self.x - centre, self.y - centre
        root = 2**0.5  # u and v share the factor 2 evenly
        return Folded(x.square().sum(-1), y.square().sum(-1), root * x, root * y)


class Euclidean(_Clouds):
    """C_ij = |x_i - y_j|; its gradient is 0 where the points coincide."""

    def dense(self) -> Tensor:
        return _distances(self.x, self.y, False)

    def pull(self, G: Tensor) -> tuple[Tensor, Tensor]:
        """As `SqEuclidean.pull`; 0 where the points coincide."""
        return _pull(self.x, self.y, self.dense(), G, False)

    def formula(self, i: Axis, j: Axis) -> Any:
        return (i(self.x) - j(self.y)).square().sum(-1).sqrt()


class Dot(_Clouds):
    """C_ij = -<x_i, y_j>."""

    folds = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    @in_full_precision
    def dense(self) -> Tensor:
        return -inner(self.x, self.y)

    def formula(self, i: Axis, j: Axis) -> Any:
        return -(i(self.x) | j(self.y))

    def fold(self) -> Folded:
        return Folded(self.x.new_zeros(self.x.shape[:-1]), self.y.new_zeros(self.y.shape[:-1]), self.x, self.y)


class Cosine(_Clouds):
    """C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|); a point at the origin is at cost 1 from everything."""

    folds = True  # pyright: ignore[reportAssignmentType, reportIncompatibleMethodOverride]

    @in_full_precision
    def dense(self) -> Tensor:
        _, _, u, v = self.fold()
        return 1 - inner(u, v)

    def formula(self, i: Axis, j: Axis) -> Any:
        _, _, u, v = self.fold()
        return 1 - (i(u) | j(v))

    def fold(self) -> Folded:
        u, v = (torch.nn.functional.normalize(z, dim=-1) for z in (self.x, self.y))
        return Folded(u.new_ones(u.shape[:-1]), v.new_zeros(v.shape[:-1]), u, v)


@dataclass(frozen=True, eq=False)
class Formula(_Pointed):
    """Any cost written once for arrays that broadcast: `function(x_i, y_j)` receives (*batch, n, 1, d) and
    (*batch, 1, m, d) and returns (*batch, n, m), from tensors and from lazy tensors alike.

    >>> manhattan = Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x, y)
    """

    function: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor

    @property
    def depth(self) -> int:
        return self.x.shape[-1] + 1

    def dense(self) -> Tensor:
        return self.function(self.x.unsqueeze(-2), self.y.unsqueeze(-3))

    def formula(self, i: Axis, j: Axis) -> Any:
        C = self.function(i(self.x), j(self.y))
        if not hasattr(C, "__GenericLazyTensor__"):
            raise TypeError(f"its function returned {type(C).__name__}")
        return C

    def of(self, inputs: Iterable[Tensor]) -> Formula:
        return Formula(self.function, *inputs)

    @property
    def T(self) -> Formula:
        function = self.function
        return Formula(lambda y_i, x_j: function(x_j, y_i), self.y, self.x)
