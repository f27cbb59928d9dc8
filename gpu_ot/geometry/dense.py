"""The n-by-m matrix in memory, on any device: two forms of one algorithm.

`Dense` takes every softmin in the log domain, as it is written. `Absorbed` moves potentials into a stored kernel

    K_ij = exp((f0_i + g0_j - C_ij) / eps)

once, after which an iteration is two matrix-vector products and no exponential. Same iterates, to rounding.

Of a cost that folds, alpha_i + beta_j - <u_i, v_j>, the array is formed without a graph and gradients reach alpha, beta, u and v as
products with the plan: no derivative by the matrix is stored, and nothing n by m is kept for it.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..costs.base import Cost
from ..penalties import KL, Penalty
from ..problem import Problem
from ..vectors import exp, log
from .products import Power, Products, Scaling, by_rows
from .protocol import Geometry, pull_folded, weigh


class Dense(Geometry):
    """The readable form, and the truth in tests. C is (*batch, n, m); potentials may carry further batch axes in front.

    `inputs` are alpha, beta, u and v of a Cost that folds and asks for gradients; the matrix itself otherwise.
    """

    stored = True

    def __init__(self, C: Tensor | Cost, inputs: tuple[Tensor, ...] | None = None) -> None:
        self.cost = C if isinstance(C, Cost) else None
        if isinstance(C, Cost):
            asked = torch.is_grad_enabled() and any(z.requires_grad for z in C.inputs.values())
            inputs = C.fold() if asked else None
            with torch.set_grad_enabled(asked and inputs is None):
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
        """right P^T and left P for p_ij = exp((k_i + h_j - C_ij) / eps), each where it is asked for, from one exponential of each pair."""
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

    def _blocks(self, h: Tensor) -> Iterator[slice]:
        """Blocks of rows whose wide temporaries stay in the cache of a CPU, or small beside the matrix on a GPU."""
        n, m = self.C.shape[-2:]
        budget = 2**17 if self.C.device.type == "cpu" else 2**26
        return by_rows(n, max(1, budget // (m * max(1, h.shape[:-1].numel(), self.C.shape[:-2].numel()))))


@dataclass
class _Kernel:
    """What was absorbed, and where: kept in one place for all who look at it, as `plan` may take it away."""

    products: Products | None = None
    eps: float = math.nan
    f0: Tensor = field(init=False)
    g0: Tensor = field(init=False)


#: Iterations that a kernel must have been exact for until its products are taken before the host has seen that they are.
SURE = 16


class Absorbed(Dense):
    """The fast form: matrix-vector products on a stabilised kernel, re-absorbed when its precision would suffer.

    The kernel is absorbed at g0 and f0 = min_j (C_ij - g0_j), so each row's largest entry is 1 and nothing overflows. Entries
    under `dropped` are stored as 0. A product is trusted while every sum it gives is so large that all dropped entries together
    could not change its last digit; otherwise the kernel is absorbed anew, and if that is not enough, the iteration
    is taken in the log domain. Schmitzer 2019, arXiv:1610.06519, section 3.1.
    """

    def __init__(self, C: Tensor | Cost) -> None:
        super().__init__(C)
        self.kernel = _Kernel()
        self.trust = 1  # iterations to run before looking at the range; doubled while it holds
        # exp(-64) and exp(-650) keep even K_ij v_j clear of subnormal numbers, which CPUs multiply slowly.
        self.log_dropped = -64.0 if self.dtype == torch.float32 else -650.0
        self.safe = math.exp(self.log_dropped) / torch.finfo(self.dtype).eps

    def advance(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        f = fresh = g
        done = 0
        while done < k:
            g = fresh
            just_absorbed = not self._at(eps)
            if just_absorbed:
                self._absorb(g, eps)
            step = min(self.trust, k - done)
            moved = self._multiply(problem, g, eps, step)
            if moved is not None:
                f, g, fresh = moved
                done += step
                self.trust = min(2 * self.trust, 64)
                continue
            self.extra += 2 * step
            if just_absorbed and step == 1:
                f, g, fresh = super().advance(problem, g, eps, 1)
                done += 1
            self.renew()
        return f, g, fresh

    def attempt(self, problem: Problem, g: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
        if not (self.waits and self._at(eps) and self.trust >= SURE):
            return *self.advance(problem, g, eps, 1), None
        f, _, fresh, exact = self._multiplied(problem, g, eps, 1)
        return torch.where(exact, f, self.kernel.f0), g, torch.where(exact, fresh, g), ~exact

    def renew(self) -> None:
        self.kernel.products = None
        self.trust = 1

    @property
    def waits(self) -> bool:
        """Whether the host waits for the device when it looks at a number."""
        return self.C.is_cuda

    @property
    def T(self) -> Dense:
        return _Flipped(self)

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        sums = self.sums(h, eps)
        return super().softmin(h, eps) if sums is None else self.kernel.f0 - eps * log(sums.to(h.dtype))

    def sums(self, h: Tensor, eps: float, *, columns: bool = False) -> Tensor | None:
        """The kernel times the scaling of h, from whichever side; None when there is no kernel at eps or the product is not exact."""
        kernel = self.kernel
        if kernel.products is None or not self._at(eps):
            return None
        w = exp((h - (kernel.f0 if columns else kernel.g0)) / eps).to(self.dtype)
        sums = kernel.products.columns(w) if columns else kernel.products.rows(w)
        info = torch.finfo(self.dtype)
        least = (self.safe * w.sum(-1, keepdim=True)).clamp(min=info.tiny / info.eps)  # below it, scalings that underflowed would count
        exact = (sums >= least) & sums.isfinite()
        return sums if bool(exact.all().item()) else None

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        scalings = self.scalings(k, h, eps)
        if scalings is None or self.kernel.products is None:
            return super().apply(k, h, eps, v)
        return (scalings[0].unsqueeze(-1) * (self.kernel.products.K @ (scalings[1].unsqueeze(-1) * v.to(self.dtype)))).to(h.dtype)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        scalings = self.scalings(k, h, eps) if len(self.inputs) == 1 else None
        if scalings is None:
            return super().pull_back(k, h, eps, w)
        return (self.outer(scalings[0] * w.to(self.dtype), scalings[1]),)

    def _products(self, k: Tensor, h: Tensor, eps: float, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        scalings = self.scalings(k, h, eps)
        if scalings is None or self.kernel.products is None:
            return super()._products(k, h, eps, right, left)
        (u, v), K = (z.unsqueeze(-2) for z in scalings), self.kernel.products.K
        return None if right is None else u * ((v * right) @ K.mT), None if left is None else v * ((u * left) @ K)

    def scalings(self, k: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """(u, v) with exp((k_i + h_j - C_ij) / eps) = u_i K_ij v_j; None when there is no kernel at eps, or the range is left."""
        if not self._at(eps):
            return None
        u, v = exp((k - self.kernel.f0) / eps).to(self.dtype), exp((h - self.kernel.g0) / eps).to(self.dtype)
        return (u, v) if bool((u.isfinite().all() & v.isfinite().all()).item()) else None

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """u_i K_ij v_j, summed over what the batch has beyond C."""
        assert self.kernel.products is not None
        return (self.kernel.products.K * u.unsqueeze(-1)).mul_(v.unsqueeze(-2)).sum_to_size(self.C.shape)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """The kernel itself becomes the plan: no second array, and no exponential. What follows absorbs anew."""
        scalings = self.scalings(k, h, eps)
        products = self.kernel.products
        if scalings is None or products is None or k.shape[:-1] != self.C.shape[:-2]:
            return super().plan(k, h, eps)
        (u, v), P, self.kernel.products = scalings, products.K, None
        for rows in self._blocks(h):
            P[..., rows, :].mul_(u[..., rows].unsqueeze(-1)).mul_(v.unsqueeze(-2))
        return P

    def first(self, h: Tensor, eps: float) -> Tensor:
        """Absorbed at h and the cheapest pair of each column, so that the start costs no second round of exponentials."""
        finite, level = torch.stack([h.isfinite().all(), (h == h[..., :1]).all()]).tolist()
        if h.ndim != self.C.ndim - 1 or self._shared(h) or not finite:
            return super().first(h, eps)
        if level:  # the usual start: no need to subtract before looking for the cheapest
            g0 = self.C.amin(-2).to(h.dtype) - h[..., :1]
        else:
            lows = [(self.C[..., rows, :].to(h.dtype) - h[..., rows].unsqueeze(-1)).amin(-2) for rows in self._blocks(h)]
            g0 = torch.stack(lows).amin(0)
        t = self._store(h, g0, eps).K.sum(-2)  # each column holds an entry 1: no precision to lose
        return g0 - eps * log(t.to(h.dtype))

    def _absorb(self, g: Tensor, eps: float) -> None:
        """At g and the cheapest pair of each row. Histograms over one cost share the kernel of their mean potential."""
        extra = g.ndim - (self.C.ndim - 1)
        g0 = g.mean(tuple(range(extra))) if extra > 0 else g
        shared = self._shared(g0)
        g0 = g0.mean(shared, keepdim=True) if shared else g0
        tops = [self._gaps(g0, rows).amax(-1) for rows in self._blocks(g0)]
        self._store(-torch.cat(tops, -1), g0, eps)

    def _shared(self, g: Tensor) -> list[int]:
        """The batch axes of g along which there is one cost."""
        return [i for i, (own, asked) in enumerate(zip(self.C.shape[:-2], g.shape[:-1], strict=True)) if own < asked]

    def _at(self, eps: float) -> bool:
        """Whether there is a kernel at eps."""
        return self.kernel.products is not None and eps == self.kernel.eps

    def _store(self, f0: Tensor, g0: Tensor, eps: float) -> Products:
        K = torch.empty_like(self.C, memory_format=torch.contiguous_format)
        for rows in self._blocks(g0):
            block = K[..., rows, :].copy_(self._gaps(g0, rows).add_(f0[..., rows].unsqueeze(-1)).div_(eps))
            torch.threshold_(block, self.log_dropped, -math.inf).exp_()
        products, kernel = Products(K), self.kernel
        kernel.products, kernel.f0, kernel.g0, kernel.eps = products, f0, g0, eps
        self.extra += 1
        return products

    def _multiply(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """k iterations by products alone; None when some sum left the range in which it is exact to rounding."""
        *moved, exact = self._multiplied(problem, g, eps, k)
        return (moved[0], moved[1], moved[2]) if bool(exact.item()) else None

    def _multiplied(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """k iterations by products alone, and whether every sum stayed in the range in which it is exact to rounding (0-d)."""
        products, f0, g0 = self.kernel.products, self.kernel.f0, self.kernel.g0
        assert products is not None
        a, b = problem.a.to(self.dtype), problem.b.to(self.dtype)
        rows = _HalfStep(problem.penalties[0], f0, eps)
        columns = _HalfStep(problem.penalties[1], g0, eps)
        w = exp((weigh(g, problem.b, eps) - g0) / eps).to(self.dtype)  # column weights times scalings
        scaling = rows.formula()
        s, t = products.both(w, a, scaling)
        before = None
        for _ in range(k - 1):
            before, w = t, b * columns.scaling(t)
            s, t = products.both(w, a, scaling)
        mass = (a * rows.scaling(s)).sum(-1, keepdim=True)
        # Sinkhorn's steps shrink, so a range that holds at both ends of the k iterations has held between them; anything
        # that overflowed is still inf or NaN here.
        exact = (s >= self.safe * w.sum(-1, keepdim=True)).all() & (t >= self.safe * mass).all() & mass.isfinite().all()
        exact &= s.isfinite().all() & t.isfinite().all()
        return rows.potential(s), g if before is None else columns.potential(before), columns.potential(t), exact


class _Flipped(Dense):
    """An absorbed kernel seen from the other side."""

    def __init__(self, upright: Absorbed) -> None:
        super().__init__(upright.C.mT, upright._turned)
        self.upright = upright

    @property
    def T(self) -> Dense:
        return self.upright

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        sums = self.upright.sums(h, eps, columns=True)
        return super().softmin(h, eps) if sums is None else self.upright.kernel.g0 - eps * log(sums.to(h.dtype))

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        scalings = self.upright.scalings(h, k, eps)
        if scalings is None or self.upright.kernel.products is None:
            return super().apply(k, h, eps, v)
        u, w = scalings
        return (w.unsqueeze(-1) * (self.upright.kernel.products.K.mT @ (u.unsqueeze(-1) * v.to(self.dtype)))).to(h.dtype)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        scalings = self.upright.scalings(h, k, eps) if len(self.inputs) == 1 else None
        if scalings is None:
            return super().pull_back(k, h, eps, w)
        return (self.upright.outer(scalings[0], scalings[1] * w.to(self.dtype)).mT,)

    def _products(self, k: Tensor, h: Tensor, eps: float, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        on_columns, on_rows = self.upright._products(h, k, eps, left, right)
        return on_rows, on_columns


class _HalfStep:
    """From the sums of the absorbed kernel to the other side's scaling, and to its potential."""

    def __init__(self, penalty: Penalty, offset: Tensor, eps: float) -> None:
        self.penalty, self.offset, self.eps = penalty, offset, eps

    def potential(self, sums: Tensor, part: slice = slice(None)) -> Tensor:
        offset = self.offset[..., part]
        return self.penalty.damp(offset - self.eps * log(sums.to(offset.dtype)), self.eps)

    def formula(self) -> Scaling:
        """The scaling in the simplest form that it has: Products knows two of them by name."""
        if self.penalty.balanced:
            return None
        return Power.damped(self.offset, self.penalty.tau, self.eps) if isinstance(self.penalty, KL) else self.scaling

    def scaling(self, sums: Tensor, part: slice = slice(None)) -> Tensor:
        if self.penalty.balanced:  # damp is the identity: no logarithm needed
            return sums.reciprocal()
        return exp((self.potential(sums, part) - self.offset[..., part]) / self.eps).to(sums.dtype)
