"""The n-by-m matrix in memory, on any device: two forms of one algorithm.

`Dense` takes every softmin in the log domain, as it is written. `Absorbed` moves potentials into a stored kernel

    K_ij = exp((f0_i + g0_j - C_ij) / eps)

once, after which an iteration is two matrix-vector products and no exponential. Same iterates, to rounding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from ..geometry import Geometry, weigh
from ..penalties import KL, Penalty
from ..problem import Problem
from ..vectors import exp, log
from .products import Power, Products, Scaling, by_rows


class Dense(Geometry):
    """The readable form, and the truth in tests. C is (*batch, n, m); potentials may carry further batch axes in front."""

    stored = True

    def __init__(self, C: Tensor) -> None:
        self.inputs = (C,)
        self.C = C.detach()
        self.dtype = C.dtype

    @property
    def T(self) -> Dense:
        return Dense(self.inputs[0].mT)

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
        P = self.C.new_empty(*torch.broadcast_shapes(k.shape[:-1], self.C.shape[:-2]), *self.C.shape[-2:])
        for rows in self._blocks(h):
            P[..., rows, :] = self._exp(k, h, eps, rows)
        return P

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        grad = self.plan(k, h, eps).mul_(w.to(self.dtype).unsqueeze(-1))
        return (grad.sum_to_size(self.C.shape),)

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


class Absorbed(Dense):
    """The fast form: matrix-vector products on a stabilised kernel, re-absorbed when its precision would suffer.

    The kernel is absorbed at g0 and f0 = min_j (C_ij - g0_j), so each row's largest entry is 1 and nothing overflows. Entries
    under `dropped` are stored as 0. A product is trusted while every sum it gives is so large that all dropped entries together
    could not change its last digit; otherwise the kernel is absorbed anew, and if that is not enough, the iteration
    is taken in the log domain. Schmitzer 2019, arXiv:1610.06519, section 3.1.
    """

    def __init__(self, C: Tensor) -> None:
        super().__init__(C)
        self.kernel: Products | None = None
        self.eps = math.nan
        self.trust = 1  # iterations to run before looking at the range; doubled while it holds
        # exp(-64) and exp(-650) keep even K_ij v_j clear of subnormal numbers, which CPUs multiply slowly.
        self.log_dropped = -64.0 if self.dtype == torch.float32 else -650.0
        self.safe = math.exp(self.log_dropped) / torch.finfo(self.dtype).eps

    def advance(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        f = fresh = g
        done = 0
        while done < k:
            g = fresh
            just_absorbed = self.kernel is None or eps != self.eps
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
            self.trust = 1
            self.kernel = None
        return f, g, fresh

    @property
    def T(self) -> Dense:
        return _Flipped(self)

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        sums = self.sums(h, eps)
        return super().softmin(h, eps) if sums is None else self.f0 - eps * log(sums.to(h.dtype))

    def sums(self, h: Tensor, eps: float, *, columns: bool = False) -> Tensor | None:
        """The kernel times the scaling of h, from whichever side; None when there is no kernel at eps or the product is not exact."""
        if self.kernel is None or eps != self.eps:
            return None
        w = exp((h - (self.f0 if columns else self.g0)) / eps).to(self.dtype)
        sums = self.kernel.columns(w) if columns else self.kernel.rows(w)
        exact = (sums >= self.safe * w.sum(-1, keepdim=True)) & sums.isfinite()
        return sums if bool(exact.all().item()) else None

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        scalings = self.scalings(k, h, eps)
        if scalings is None or self.kernel is None:
            return super().apply(k, h, eps, v)
        return (scalings[0].unsqueeze(-1) * (self.kernel.K @ (scalings[1].unsqueeze(-1) * v.to(self.dtype)))).to(h.dtype)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        scalings = self.scalings(k, h, eps)
        if scalings is None:
            return super().pull_back(k, h, eps, w)
        return (self.outer(scalings[0] * w.to(self.dtype), scalings[1]),)

    def scalings(self, k: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """(u, v) with exp((k_i + h_j - C_ij) / eps) = u_i K_ij v_j; None when there is no kernel at eps, or the range is left."""
        if self.kernel is None or eps != self.eps:
            return None
        u, v = exp((k - self.f0) / eps).to(self.dtype), exp((h - self.g0) / eps).to(self.dtype)
        return (u, v) if bool((u.isfinite().all() & v.isfinite().all()).item()) else None

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """u_i K_ij v_j, summed over what the batch has beyond C."""
        assert self.kernel is not None
        return (self.kernel.K * u.unsqueeze(-1)).mul_(v.unsqueeze(-2)).sum_to_size(self.C.shape)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """The kernel itself becomes the plan: no second array, and no exponential. What follows absorbs anew."""
        scalings = self.scalings(k, h, eps)
        if scalings is None or self.kernel is None or k.shape[:-1] != self.C.shape[:-2]:
            return super().plan(k, h, eps)
        (u, v), P, self.kernel = scalings, self.kernel.K, None
        for rows in self._blocks(h):
            P[..., rows, :].mul_(u[..., rows].unsqueeze(-1)).mul_(v.unsqueeze(-2))
        return P

    def first(self, h: Tensor, eps: float) -> Tensor:
        """Absorbed at h and the cheapest pair of each column, so that the start costs no second round of exponentials."""
        finite, level = torch.stack([h.isfinite().all(), (h == h[..., :1]).all()]).tolist()
        if h.ndim != self.C.ndim - 1 or not finite:
            return super().first(h, eps)
        if level:  # the usual start: no need to subtract before looking for the cheapest
            g0 = self.C.amin(-2).to(h.dtype) - h[..., :1]
        else:
            lows = [(self.C[..., rows, :].to(h.dtype) - h[..., rows].unsqueeze(-1)).amin(-2) for rows in self._blocks(h)]
            g0 = torch.stack(lows).amin(0)
        self._store(h, g0, eps)
        assert self.kernel is not None
        t = self.kernel.K.sum(-2)  # each column holds an entry 1: no precision to lose
        return self.g0 - eps * log(t.to(h.dtype))

    def _absorb(self, g: Tensor, eps: float) -> None:
        """At g and the cheapest pair of each row. Histograms over one cost share the kernel of their mean potential."""
        extra = g.ndim - (self.C.ndim - 1)
        g0 = g.mean(tuple(range(extra))) if extra > 0 else g
        tops = [self._gaps(g0, rows).amax(-1) for rows in self._blocks(g0)]
        self._store(-torch.cat(tops, -1), g0, eps)

    def _store(self, f0: Tensor, g0: Tensor, eps: float) -> None:
        K = torch.empty_like(self.C, memory_format=torch.contiguous_format)
        for rows in self._blocks(g0):
            block = K[..., rows, :].copy_(self._gaps(g0, rows).add_(f0[..., rows].unsqueeze(-1)).div_(eps))
            torch.threshold_(block, self.log_dropped, -math.inf).exp_()
        self.kernel, self.f0, self.g0, self.eps = Products(K), f0, g0, eps
        self.extra += 1

    def _multiply(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """k iterations by products alone; None when some sum left the range in which it is exact to rounding."""
        assert self.kernel is not None
        a, b = problem.a.to(self.dtype), problem.b.to(self.dtype)
        rows = _HalfStep(problem.penalties[0], self.f0, eps)
        columns = _HalfStep(problem.penalties[1], self.g0, eps)
        w = exp((weigh(g, problem.b, eps) - self.g0) / eps).to(self.dtype)  # column weights times scalings
        scaling = rows.formula()
        s, t = self.kernel.both(w, a, scaling)
        before = None
        for _ in range(k - 1):
            before, w = t, b * columns.scaling(t)
            s, t = self.kernel.both(w, a, scaling)
        mass = (a * rows.scaling(s)).sum(-1, keepdim=True)
        # Sinkhorn's steps shrink, so a range that holds at both ends of the k iterations has held between them; anything
        # that overflowed is still inf or NaN here.
        exact = (s >= self.safe * w.sum(-1, keepdim=True)).all() & (t >= self.safe * mass).all() & mass.isfinite().all()
        exact &= s.isfinite().all() & t.isfinite().all()
        if not bool(exact.item()):
            return None
        return rows.potential(s), g if before is None else columns.potential(before), columns.potential(t)


class _Flipped(Dense):
    """An absorbed kernel seen from the other side."""

    def __init__(self, upright: Absorbed) -> None:
        super().__init__(upright.inputs[0].mT)
        self.upright = upright

    @property
    def T(self) -> Dense:
        return self.upright

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        sums = self.upright.sums(h, eps, columns=True)
        return super().softmin(h, eps) if sums is None else self.upright.g0 - eps * log(sums.to(h.dtype))

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        scalings = self.upright.scalings(h, k, eps)
        if scalings is None or self.upright.kernel is None:
            return super().apply(k, h, eps, v)
        u, w = scalings
        return (w.unsqueeze(-1) * (self.upright.kernel.K.mT @ (u.unsqueeze(-1) * v.to(self.dtype)))).to(h.dtype)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        scalings = self.upright.scalings(h, k, eps)
        if scalings is None:
            return super().pull_back(k, h, eps, w)
        return (self.upright.outer(scalings[0], scalings[1] * w.to(self.dtype)).mT,)


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
