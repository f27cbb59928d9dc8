"""The two spaces of a Gromov-Wasserstein problem, and the slope of its objective at a plan."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..costs import Cost
from ..costs.base import Folded, Index
from ..problem import float_type
from ..solution import Plan

#: The rank up to which a matrix is looked for factors, and how many of its last digits these may miss.
RANK, ROUNDED = 24, 64.0


@dataclass(frozen=True, eq=False)
class Moments:
    """What of a plan the slope depends on: its marginals (*batch, n) and (*batch, m), and the plan itself or B^T P D; None for the plan
    that is the product of its marginals."""

    rows: Tensor
    columns: Tensor
    middle: Tensor | None


class Matrices:
    """Spaces given as matrices: L(s, t) = f1(s) + f2(t) - h1(s) h2(t)."""

    def __init__(self, Cx: Tensor, Cy: Tensor, loss: str) -> None:
        self.dtype = float_type(Cx, Cy)
        self.dtype = self.dtype if self.dtype.itemsize >= 4 else torch.float32
        Cx, Cy = Cx.to(self.dtype), Cy.to(self.dtype)
        self.shape = Cx.shape[-1], Cy.shape[-1]
        if loss == "square":
            self.f1, self.f2, self.h1, self.h2 = Cx.square(), Cy.square(), Cx, 2 * Cy
        else:
            if not bool((Cx > 0).all() & (Cy > 0).all()):
                raise errors.ProblemError('loss="kl" is of matrices with entries > 0, and some are not: add a little, or take "square".')
            self.f1, self.f2, self.h1, self.h2 = Cx * Cx.log() - Cx, Cy, Cx, Cy.log()
        self.lopsided = not all(torch.equal(C, C.mT) for C in (Cx, Cy))
        self.thin_x, self.thin_y = (None, None) if self.lopsided else (thin(self.h1), thin(self.h2))

    def part(self, index: Tensor) -> Matrices:
        """Those of some problems of a batch with one axis."""
        part = copy.copy(self)
        for name in ("f1", "f2", "h1", "h2"):
            C = getattr(self, name)
            setattr(part, name, C[index] if C.ndim > 2 else C)
        for name in ("thin_x", "thin_y"):
            factors = getattr(self, name)
            setattr(part, name, tuple(z[index] if z.ndim > 2 else z for z in factors) if factors is not None else None)
        return part

    def moments(self, plan: Plan | Tensor) -> Moments:
        P = (plan if isinstance(plan, Tensor) else plan.to_dense()).to(self.dtype)
        return Moments(P.sum(-1), P.sum(-2), P)

    @property
    def device(self) -> torch.device:
        return self.h1.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.f1, self.f2, self.h1, self.h2

    def of_product(self, a: Tensor, b: Tensor) -> Moments:
        a, b = a.to(self.dtype), b.to(self.dtype)
        left = a.sum(-1, keepdim=True), b.sum(-1, keepdim=True)
        return Moments(a * left[1], b * left[0], None)

    def slope(self, at: Moments) -> Tensor:
        """L⊗P, (*batch, n, m); symmetrised where the matrices are not symmetric."""
        L = self._product(at, self.f1, self.f2, self.h1, self.h2)
        if self.lopsided:
            L = (L + self._product(at, self.f1.mT, self.f2.mT, self.h1.mT, self.h2.mT)) / 2
        return L

    def _product(self, at: Moments, f1: Tensor, f2: Tensor, h1: Tensor, h2: Tensor) -> Tensor:
        rows, columns = ((f @ w.unsqueeze(-1)).squeeze(-1) for f, w in ((f1, at.rows), (f2, at.columns)))
        return rows.unsqueeze(-1) + columns.unsqueeze(-2) - self._middle(h1, at, h2)

    def _middle(self, h1: Tensor, at: Moments, h2: Tensor) -> Tensor:
        """h1 P h2^T, through the factors of one of them where it has few: O(n m r) then, and not O(n m (n + m))."""
        if (P := at.middle) is None:
            mass = at.rows.sum(-1, keepdim=True)
            return (h1 @ at.rows.unsqueeze(-1)) @ (h2 @ (at.columns / torch.where(mass > 0, mass, 1.0)).unsqueeze(-1)).mT
        if torch.is_grad_enabled() or (self.thin_x is None and self.thin_y is None):
            return h1 @ P @ h2.mT
        if self.thin_x is None:
            assert self.thin_y is not None
            Q, R = self.thin_y
            return h1 @ (P @ R.mT) @ Q.mT
        Q, R = self.thin_x
        right = R @ P
        return Q @ (right @ h2.mT if self.thin_y is None else (right @ self.thin_y[1].mT) @ self.thin_y[0].mT)

    def distortion(self, at: Moments, plan: Plan | Tensor) -> Tensor:
        assert at.middle is not None
        return (self.slope(at) * at.middle).sum((-1, -2))


class Points:
    """Spaces whose costs fold, Cx = A B^T and Cy = D E^T with d + 2 columns: everything about a plan goes through B^T P D."""

    def __init__(self, x: Cost, y: Cost) -> None:
        self.shape = x.shape[-1], y.shape[-1]
        (self.A, self.B), (self.D, self.E) = _factors(x), _factors(y)
        self.dtype = self.A.dtype

    def moments(self, plan: Plan | Tensor) -> Moments:
        rows, columns = (plan.sum(-1), plan.sum(-2)) if isinstance(plan, Tensor) else plan.wide_marginals
        return Moments(rows.to(self.dtype), columns.to(self.dtype), self.B.mT @ self._times(plan, self.D))

    @property
    def device(self) -> torch.device:
        return self.A.device

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        return self.A, self.B, self.D, self.E

    def of_product(self, a: Tensor, b: Tensor) -> Moments:
        a, b = a.to(self.dtype), b.to(self.dtype)
        return Moments(a, b, (self.B.mT @ a.unsqueeze(-1)) @ (self.D.mT @ b.unsqueeze(-1)).mT)

    def slope(self, at: Moments) -> Factored:
        rows, columns = _squares(self.A, self.B, at.rows), _squares(self.E, self.D, at.columns)
        assert at.middle is not None
        return Factored(rows, columns, 2 * self.A @ at.middle, self.E)

    def distortion(self, at: Moments, plan: Plan | Tensor) -> Tensor:
        rows, columns = _squares(self.A, self.B, at.rows), _squares(self.E, self.D, at.columns)
        other = self.A.mT @ self._times(plan, self.E)
        assert at.middle is not None
        return (at.rows * rows).sum(-1) + (at.columns * columns).sum(-1) - 2 * (at.middle * other).sum((-1, -2))

    def _times(self, plan: Plan | Tensor, v: Tensor) -> Tensor:
        return plan.to(self.dtype) @ v if isinstance(plan, Tensor) else Times.apply(plan, v)


class Times(torch.autograd.Function):
    """A plan that is held times v (m, c) or (*batch, m, c), differentiable in v."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, v: Tensor) -> Tensor:
        ctx.plan, ctx.shape = plan, v.shape
        return (plan @ v.expand(*plan.shape[:-2], *v.shape[-2:])).to(v.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return None, (ctx.plan.T @ grad).to(grad.dtype).sum_to_size(ctx.shape)


class Factored(Cost):
    """C_ij = alpha_i + beta_j - <u_i, v_j> of any (*batch, n), (*batch, m), (*batch, n, k) and (*batch, m, k)."""

    def __init__(self, alpha: Tensor, beta: Tensor, u: Tensor, v: Tensor) -> None:
        batch = torch.broadcast_shapes(alpha.shape[:-1], beta.shape[:-1], u.shape[:-2], v.shape[:-2])
        self.parts = Folded(
            alpha.expand(*batch, -1), beta.expand(*batch, -1), u.expand(*batch, *u.shape[-2:]), v.expand(*batch, *v.shape[-2:])
        )

    @property
    def inputs(self) -> dict[str, Tensor]:
        return self.parts._asdict()

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.parts.alpha.shape, self.parts.beta.shape[-1]))

    def dense(self) -> Tensor:
        alpha, beta, u, v = self.parts
        return alpha.unsqueeze(-1) + beta.unsqueeze(-2) - u @ v.mT

    def of(self, inputs: Iterable[Tensor]) -> Factored:
        return Factored(*inputs)

    def fold(self) -> Folded:
        return self.parts

    def part(self, rows: Index, cols: Index) -> Factored:
        if not (isinstance(rows, slice) and isinstance(cols, slice)):
            raise NotImplementedError("a factored cost is taken apart by slices")
        alpha, beta, u, v = self.parts
        return Factored(alpha[..., rows], beta[..., cols], u[..., rows, :], v[..., cols, :])

    @property
    def T(self) -> Factored:
        return self.of(self.parts.T)


def given(x: Cost | Tensor, y: Cost | Tensor, loss: str) -> Matrices | Points:
    for name, z in (("cost_x", x), ("cost_y", y)):
        shape = getattr(z, "shape", None)
        if shape is None:
            raise errors.not_a_tensor(name, z)
        if len(shape) < 2 or shape[-1] != shape[-2] or not shape[-1]:
            raise errors.wrong_shape(name, shape, "(*batch, n, n), the distances within one space")
        if 0 in shape:
            raise errors.ProblemError(f"{name} has shape {errors.shape(shape)}, a batch of no spaces: pass one at least.")
    if loss == "square" and not isinstance(x, Tensor) and not isinstance(y, Tensor) and x.folds and y.folds:
        return Points(x, y)
    matrices = [z if isinstance(z, Tensor) else z.dense() for z in (x, y)]
    for name, C in zip(("cost_x", "cost_y"), matrices, strict=True):
        if not bool(C.detach().isfinite().all()):
            raise errors.broken_cost(name, int((~C.detach().isfinite()).any(-1).sum()), "rows")
    Cx, Cy = matrices
    return Matrices(Cx, Cy, loss)


def _factors(cost: Cost) -> tuple[Tensor, Tensor]:
    """(A, B), (*batch, n, d + 2) each, with C = A B^T."""
    folded = cost.fold()
    assert folded is not None
    alpha, beta, u, v = folded
    ones = torch.ones_like(alpha).unsqueeze(-1)
    return torch.cat((alpha.unsqueeze(-1), ones, -u), -1), torch.cat((ones, beta.unsqueeze(-1), v), -1)


def thin(C: Tensor) -> tuple[Tensor, Tensor] | None:
    """(Q, R), (*batch, n, r) and (*batch, r, n), with C = Q R to rounding, for r = RANK: squared distances have d + 2. None for other
    matrices and for small ones, whose products cost less than the search. Halko, Martinsson and Tropp 2011, arXiv:0909.4061."""
    n = C.shape[-1]
    if n < 8 * RANK:
        return None
    C = C.detach()
    probes = torch.randn(n, RANK, dtype=C.dtype, generator=torch.Generator().manual_seed(0)).to(C.device)
    Q = torch.linalg.qr(C @ probes)[0]
    R = Q.mT @ C
    rest = (C - Q @ R).abs().amax()
    return (Q, R) if bool(rest <= ROUNDED * torch.finfo(C.dtype).eps * C.abs().amax()) else None


def _squares(A: Tensor, B: Tensor, w: Tensor) -> Tensor:
    """sum_k C_ik^2 w_k for C = A B^T, (*batch, n), at O(n d^2)."""
    return ((A @ (B.mT @ (w.unsqueeze(-1) * B))) * A).sum(-1)


def distance(one: Tensor | Factored, other: Tensor | Factored) -> Tensor:
    """The largest difference of two slopes, (*batch,)."""
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return (one - other).abs().amax((-1, -2)).double()
    assert not isinstance(one, Tensor) and not isinstance(other, Tensor)
    (alpha, beta, u, v), (alpha0, beta0, u0, _) = one.parts, other.parts
    difference = Factored(alpha - alpha0, beta - beta0, u - u0, v)
    return torch.stack([part.dense().abs().amax((-1, -2)).double() for _, part in difference.strips()]).amax(0)


def largest(slope: Tensor | Factored) -> float:
    """At least the largest entry, about."""
    if isinstance(slope, Tensor):
        return float(slope.abs().amax())
    return float(slope.parts.alpha.abs().amax() + slope.parts.beta.abs().amax())
