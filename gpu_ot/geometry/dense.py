"""The n-by-m matrix in memory, on any device, every softmin in the log domain.

Of a cost that folds, alpha_i + beta_j - <u_i, v_j>, the array is formed without a graph and gradients reach alpha, beta, u and v as
products with the plan: no derivative by the matrix is stored, and nothing n by m is kept for it.
"""

from __future__ import annotations

import copy
import math
from operator import attrgetter

import torch
from torch import Tensor

from ..costs import Cost
from .products import by_rows
from .protocol import Geometry, pull_folded


class Dense(Geometry):
    """The readable form, and the truth in tests. C is (*batch, n, m); potentials may carry further batch axes in front.

    `inputs` are alpha, beta, u and v of a Cost that folds and requires a gradient; the matrix itself otherwise.
    """

    stored = True

    def __init__(self, C: Tensor | Cost, inputs: tuple[Tensor, ...] | None = None) -> None:
        self.cost = None if isinstance(C, Tensor) else C
        if not isinstance(C, Tensor):
            differentiable = torch.is_grad_enabled() and any(map(attrgetter("requires_grad"), C.inputs.values()))
            inputs = C.fold() if differentiable else None
            with torch.set_grad_enabled(differentiable and inputs is None):
                C = C.dense()
        self.inputs = (C,) if inputs is None else tuple(inputs)
        self.C = C.detach()
        self.dtype = C.dtype

    @property
    def T(self) -> Dense:
        return Dense(self.C.mT, self._turned)

    @property
    def entrywise(self) -> Dense:
        if len(self.inputs) == 1 or self.cost is None:
            return self
        other = copy.copy(self)
        other.inputs = (self.cost.dense(),)
        return other

    @property
    def _turned(self) -> tuple[Tensor, ...]:
        """The inputs as seen from the other side."""
        if len(self.inputs) == 1:
            return (self.inputs[0].mT,)
        alpha, beta, u, v = self.inputs
        return beta, alpha, v, u

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        parts = []
        for rows in self._blocks(h):
            z = self._gaps(h, rows)
            top = z.amax(-1, keepdim=True)
            top = torch.where(top > -math.inf, top, 0.0)  # a row that reaches nothing: -inf - 0, not -inf - -inf
            total = z.sub_(top).div_(eps).to(self.dtype).exp_().sum(-1)
            parts.append(-top.squeeze(-1) - eps * total.to(h.dtype).log())
        return torch.cat(parts, -1)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        v = v.to(self.dtype)
        return torch.cat([self._exp(k, h, eps, rows) @ v for rows in self._blocks(h)], -2).to(h.dtype)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        P = self._empty(k, h)
        for rows in self._blocks(h):
            P[..., rows, :] = self._exp(k, h, eps, rows)
        return P

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        if len(self.inputs) > 1:
            return pull_folded(self.inputs, w.to(self.dtype), lambda right, left: self._products(k, h, eps, right, left))
        w = w.to(self.dtype).unsqueeze(-1)
        grad = self._empty(k, h)
        for rows in self._blocks(h):
            grad[..., rows, :] = self._exp(k, h, eps, rows).mul_(w[..., rows, :])
        return (grad.sum_to_size(self.C.shape),)

    def _products(self, k: Tensor, h: Tensor, eps: float, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """right P^T and left P for p_ij = exp((k_i + h_j - C_ij) / eps), None for None, from one exponential of each pair."""
        on_rows, on_columns = [], None
        for rows in self._blocks(h):
            E = self._exp(k, h, eps, rows)
            if right is not None:
                on_rows.append(right @ E.mT)
            if left is not None:
                part = left[..., rows] @ E
                on_columns = part if on_columns is None else on_columns.add_(part)
        return torch.cat(on_rows, -1) if on_rows else None, on_columns

    def _empty(self, k: Tensor, h: Tensor) -> Tensor:
        return self.C.new_empty(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], self.C.shape[:-2]), *self.C.shape[-2:])

    def _exp(self, k: Tensor, h: Tensor, eps: float, rows: slice) -> Tensor:
        z = self._gaps(h, rows)
        return z.add_(k[..., rows].unsqueeze(-1)).div_(eps).to(self.dtype).exp_()

    def _gaps(self, h: Tensor, rows: slice) -> Tensor:
        """h_j - C_ij for these rows, in the type of h: wide. (Converted first: an operation on two types is many times slower.)"""
        return h.unsqueeze(-2) - self.C[..., rows, :].to(h.dtype)

    def _blocks(self, h: Tensor) -> list[slice]:
        """Blocks of rows whose wide temporaries stay in the cache of a CPU, or small beside the matrix on a GPU."""
        n, m = self.C.shape[-2:]
        budget = 2**17 if self.C.device.type == "cpu" else 2**26
        return by_rows(n, max(1, budget // (m * max(1, h.shape[:-1].numel(), self.C.shape[:-2].numel()))))
