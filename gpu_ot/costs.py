"""What it costs to move a unit of mass from x_i to y_j.

Costs of the form C_ij = alpha_i + beta_j - <u_i, v_j> *fold*: a matmul-shaped kernel needs nothing else, and a weighted
sum of such costs is again one of them, on concatenated features scaled by sqrt(weight).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from . import errors


class Folded(NamedTuple):
    """C_ij = alpha_i + beta_j - <u_i, v_j>."""

    alpha: Tensor  # (*batch, n)
    beta: Tensor  # (*batch, m)
    u: Tensor  # (*batch, n, d)
    v: Tensor  # (*batch, m, d)


class Cost:
    """A cost bound to its two sides. `shape` is (*batch, n, m); `dense()` is that array, differentiable in the inputs."""

    @property
    def inputs(self) -> dict[str, Tensor]:
        """The tensors the cost is made of, by the name the user knows them by."""
        raise NotImplementedError

    @property
    def shape(self) -> torch.Size:
        raise NotImplementedError

    def dense(self) -> Tensor:
        raise NotImplementedError

    def fold(self) -> Folded | None:
        """The folded form, or None when the cost has none."""
        return None

    def to(self, dtype: torch.dtype) -> Cost:
        raise NotImplementedError

    def __add__(self, other: Cost) -> Cost:
        return Sum(((1.0, self), (1.0, other)))

    def __rmul__(self, weight: float) -> Cost:
        return Sum(((weight, self),))

    __mul__ = __rmul__


@dataclass(frozen=True, eq=False)
class Matrix(Cost):
    """A cost the user has already computed: M (*batch, n, m). +inf forbids a pair."""

    M: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"M": self.M}

    @property
    def shape(self) -> torch.Size:
        return self.M.shape

    def dense(self) -> Tensor:
        return self.M

    def to(self, dtype: torch.dtype) -> Matrix:
        return Matrix(self.M.to(dtype))


@dataclass(frozen=True, eq=False)
class _Clouds(Cost):
    """A cost between two clouds, x (*batch, n, d) and y (*batch, m, d)."""

    x: Tensor
    y: Tensor

    def __post_init__(self) -> None:
        x, y = self.x, self.y
        if x.ndim < 2 or y.ndim < 2 or x.shape[-1] != y.shape[-1] or x.shape[:-2] != y.shape[:-2]:
            raise errors.wrong_shape("y", y.shape, f"(*batch, m, d) to match x with shape {errors.shape(x.shape)}")

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.y.shape[-2]))

    def to(self, dtype: torch.dtype) -> Cost:
        return type(self)(self.x.to(dtype), self.y.to(dtype))


def _distances(x: Tensor, y: Tensor) -> Tensor:
    # Differences first: |x|^2 + |y|^2 - 2<x, y> has no digits left for clouds far from the origin.
    return torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist")


class SqEuclidean(_Clouds):
    """C_ij = |x_i - y_j|^2."""

    def dense(self) -> Tensor:
        return _distances(self.x, self.y).square()

    def fold(self) -> Folded:
        # A common centre changes no distance and keeps the digits of clouds far from the origin.
        centre = torch.cat((self.x, self.y), -2).mean(-2, keepdim=True).detach()
        x, y = self.x - centre, self.y - centre
        root = 2**0.5  # u and v share the factor 2 evenly
        return Folded(x.square().sum(-1), y.square().sum(-1), root * x, root * y)


class Euclidean(_Clouds):
    """C_ij = |x_i - y_j|; its gradient is 0 where the points coincide."""

    def dense(self) -> Tensor:
        return _distances(self.x, self.y)


class Dot(_Clouds):
    """C_ij = -<x_i, y_j>."""

    def dense(self) -> Tensor:
        return -(self.x @ self.y.mT)

    def fold(self) -> Folded:
        return Folded(self.x.new_zeros(self.x.shape[:-1]), self.y.new_zeros(self.y.shape[:-1]), self.x, self.y)


class Cosine(_Clouds):
    """C_ij = 1 - <x_i, y_j> / (|x_i| |y_j|); a point at the origin is at cost 1 from everything."""

    def dense(self) -> Tensor:
        _, _, u, v = self.fold()
        return 1 - u @ v.mT

    def fold(self) -> Folded:
        u, v = (torch.nn.functional.normalize(z, dim=-1) for z in (self.x, self.y))
        return Folded(u.new_ones(u.shape[:-1]), v.new_zeros(v.shape[:-1]), u, v)


@dataclass(frozen=True, eq=False)
class Formula(Cost):
    """Any cost written once for arrays that broadcast: `function(x_i, y_j)` receives (*batch, n, 1, d) and
    (*batch, 1, m, d) and returns (*batch, n, m), from tensors and from lazy tensors alike.

    >>> manhattan = Formula(lambda x_i, y_j: (x_i - y_j).abs().sum(-1), x, y)
    """

    function: Callable[[Tensor, Tensor], Tensor]
    x: Tensor
    y: Tensor

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {"x": self.x, "y": self.y}

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.x.shape[:-1], self.y.shape[-2]))

    def dense(self) -> Tensor:
        return self.function(self.x.unsqueeze(-2), self.y.unsqueeze(-3))

    def to(self, dtype: torch.dtype) -> Formula:
        return Formula(self.function, self.x.to(dtype), self.y.to(dtype))


@dataclass(frozen=True, eq=False)
class Sum(Cost):
    """sum_k weight_k * cost_k, all over the same pairs. Written `0.01 * SqEuclidean(z_s, z_t) + 0.05 * SqEuclidean(l_s, l_t)`."""

    terms: tuple[tuple[float, Cost], ...]

    def __post_init__(self) -> None:
        flat: list[tuple[float, Cost]] = []
        for weight, cost in self.terms:
            flat += [(weight * w, c) for w, c in cost.terms] if isinstance(cost, Sum) else [(weight, cost)]
        object.__setattr__(self, "terms", tuple(flat))
        for _, cost in flat[1:]:
            if cost.shape != self.shape:
                raise errors.wrong_shape("a term of the cost", cost.shape, f"{errors.shape(self.shape)} like its first term")

    @property
    def inputs(self) -> dict[str, Tensor]:
        return {f"{name} of term {k}": z for k, (_, cost) in enumerate(self.terms) for name, z in cost.inputs.items()}

    @property
    def shape(self) -> torch.Size:
        return self.terms[0][1].shape

    def dense(self) -> Tensor:
        first, *rest = (weight * cost.dense() for weight, cost in self.terms)
        return sum(rest, start=first)

    def fold(self) -> Folded | None:
        folded = [(weight, cost.fold()) for weight, cost in self.terms]
        if any(part is None or weight < 0 for weight, part in folded):
            return None
        parts = [(weight, part) for weight, part in folded if part is not None]
        first, *rest = (weight * part.alpha for weight, part in parts)
        alpha = sum(rest, start=first)
        first, *rest = (weight * part.beta for weight, part in parts)
        beta = sum(rest, start=first)
        u = torch.cat([weight**0.5 * part.u for weight, part in parts], -1)
        v = torch.cat([weight**0.5 * part.v for weight, part in parts], -1)
        return Folded(alpha, beta, u, v)

    def to(self, dtype: torch.dtype) -> Sum:
        return Sum(tuple((weight, cost.to(dtype)) for weight, cost in self.terms))
