"""The n-by-m matrix in memory with potentials absorbed into a stored kernel,

    K_ij = exp((f0_i + g0_j - C_ij) / eps),

after which an iteration is two matrix-vector products and no exponential. The same iterates as `Dense`, to rounding.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..costs import Cost
from ..penalties import KL, Penalty
from ..problem import Problem
from ..vectors import PIECE, exp, log
from . import absorbed_launches, graphs
from .dense import Dense
from .products import Power, Products, Scaling
from .protocol import weigh
from .trusting import SURE, Trusting

#: Iterations between two checks of the range of the sums, at most.
LONGEST_STRIDE = 64


@functools.cache
def range_of(itemsize: int) -> tuple[float, float]:
    """(the exponent up to which entries are dropped, the part of the weights' total from which on a sum is exact) for float32, float64.

    exp(-64) and exp(-650) keep even K_ij v_j clear of subnormal numbers, which CPUs multiply slowly.
    """
    dropped, dtype = (-64.0, torch.float32) if itemsize == 4 else (-650.0, torch.float64)
    return dropped, math.exp(dropped) / torch.finfo(dtype).eps


@dataclass
class _Kernel:
    """The absorbed kernel, the potentials in it and its eps. Both views share it, since `plan` may take the array away."""

    products: Products | None = None
    eps: float = math.nan
    f0: Tensor = field(init=False)
    g0: Tensor = field(init=False)
    sides: tuple[tuple[Penalty, Penalty], _Side, _Side] | None = None  # for the penalties they were made of
    launched: tuple[Problem, Any, Any] | None = None  # the same for Triton's kernels, and the problem
    scaled: list[tuple[Any, ...]] = field(default_factory=list)  # the last answers of `scalings`: k, h, (u, v)


class Absorbed(Trusting, Dense):
    """Matrix-vector products on a stabilised kernel, which is rebuilt when its precision would suffer.

    The kernel is absorbed at g0 and f0 = min_j (C_ij - g0_j), so each row's largest entry is 1 and nothing overflows. Entries
    under `log_dropped` are stored as 0. A product is exact, to rounding, while every sum it gives is so large that all dropped entries
    together could not change its last digit; otherwise the kernel is rebuilt at the potentials of the moment, and if that is not enough,
    the iteration is taken in the log domain. Schmitzer 2019, arXiv:1610.06519, section 3.1.
    """

    def __init__(self, C: Tensor | Cost) -> None:
        Trusting.__init__(self)
        Dense.__init__(self, C)
        self.kernel = _Kernel()
        self.plain = graphs.Repeated()
        self.stride = 1  # iterations to run before looking at the range; doubled while it holds
        self.log_dropped, self.safe = range_of(self.dtype.itemsize)

    @property
    def T(self) -> Dense:
        return _Transposed(self)

    # Iterations.

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        f = g_next = g
        done = 0
        while done < k:
            g = g_next
            new = self.kernel.products is None or eps != self.kernel.eps
            if new:
                self._absorb(g, eps)
            step = min(self.stride, k - done)
            *found, exact = self._multiply(problem, g, eps, step)
            if exact.item():
                f, g, g_next = found
                done += step
                self.stride = min(2 * self.stride, LONGEST_STRIDE)
                continue
            self.extra_sweeps += 2 * step
            if new and step == 1:
                f, g, g_next = super().iterate(problem, g, eps, 1)
                done += 1
            self._drop()
        return f, g, g_next

    def _trusts(self, eps: float) -> bool:
        return self._at(eps) and self.stride >= SURE

    def _held(self, problem: Problem, g: Tensor, eps: float, inexact: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        if absorbed_launches.serve(self, problem, g):
            f, _, g_next, inexact = absorbed_launches.iterate(self, problem, g, eps, 1, hold=True, inexact=inexact)
            return f, g, g_next, inexact
        f, _, g_next, exact = self._multiply(problem, g, eps, 1)
        inexact = ~exact if inexact is None else inexact | ~exact
        return torch.where(exact, f, self.kernel.f0), g, torch.where(exact, g_next, g), inexact

    def _same(self, step: Any, state: Any) -> Any:
        if state.inexact is None or not self._trusts(step.eps) or not absorbed_launches.serve(self, step.problem, state.g):
            return None
        return graphs.Same(self.kernel.products)

    def _distrust(self) -> None:
        self._drop()

    def first(self, f: Tensor, a: Tensor, eps: float) -> Tensor:
        """Absorbed at the start and the cheapest pair of each column, so that the start costs no second round of exponentials."""
        h = weigh(f, a, eps)
        if h.ndim != self.C.ndim - 1 or self._shared(h):
            return super().first(f, a, eps)
        # Where the host would wait for it nobody asks: an empty row gives a row of zeros, right here and inexact in the first iteration.
        waits = self.waits or self.C.is_cuda
        finite, level = (True, False) if waits else torch.stack([h.isfinite().all(), (h == h[..., :1]).all()]).tolist()
        if not finite:
            return super().first(f, a, eps)
        if level:  # the usual start: no need to subtract before looking for the cheapest
            g0 = self.C.amin(-2).to(h.dtype) - h[..., :1]
        else:
            lows = [(self.C[..., rows, :].to(h.dtype) - h[..., rows].unsqueeze(-1)).amin(-2) for rows in self._blocks(h)]
            g0 = lows[0] if len(lows) == 1 else torch.stack(lows).amin(0)
        t = self._build(h, g0, eps).K.sum(-2)  # each column holds an entry 1: no precision to lose
        return g0 - eps * log(t.to(h.dtype))

    def _multiply(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """(f, g, g_next) after k iterations by products alone, and whether every sum stayed in the range in which it is exact (0-d)."""
        kernel, products = self.kernel, self.kernel.products
        assert products is not None
        if absorbed_launches.serve(self, problem, g):
            return absorbed_launches.iterate(self, problem, g, eps, k)
        if kernel.sides is None or kernel.sides[0] is not problem.penalties:
            rows, columns = problem.penalties
            kernel.sides = problem.penalties, _Side(rows, kernel.f0, eps), _Side(columns, kernel.g0, eps)
        _, rows, columns = kernel.sides
        a, b = problem.a.to(self.dtype), problem.b.to(self.dtype)
        # Column weights times scalings; the potential of an empty atom may be anything.
        w = torch.where(problem.b > 0, problem.b * exp((g - kernel.g0) / eps), 0.0).to(self.dtype)
        s, t, w, before = products.iterate(w, a, b, rows.scaling, columns.scaling, k)
        mass = ((a / s) if rows.scaling is None else a * rows.scaling(s)).sum(-1, keepdim=True)
        # Sinkhorn's steps shrink, so a range that holds at both ends of the k iterations has held between them; anything
        # that overflowed is still inf or NaN here.
        exact = (s >= self._least(w.sum(-1, keepdim=True))).all() & (t >= self._least(mass)).all() & mass.isfinite().all()
        exact &= s.isfinite().all() & t.isfinite().all()
        if rows.hard and columns.hard:  # `_Side.potential`, in place: the commonest case
            f = kernel.f0 - eps * rows.log(s.to(g.dtype))
            g = g if before is None else kernel.g0 - eps * columns.log(before.to(g.dtype))
            return f, g, kernel.g0 - eps * columns.log(t.to(g.dtype)), exact
        return rows.potential(s), g if before is None else columns.potential(before), columns.potential(t), exact

    def _absorb(self, g: Tensor, eps: float) -> None:
        """At g and the cheapest pair of each row. Histograms over one cost share the kernel of their mean potential."""
        extra = g.ndim - (self.C.ndim - 1)
        g0 = g.mean(tuple(range(extra))) if extra > 0 else g
        shared = self._shared(g0)
        g0 = g0.mean(shared, keepdim=True) if shared else g0
        self._build(None, g0, eps)

    def _build(self, f0: Tensor | None, g0: Tensor, eps: float) -> Products:
        """At f0; None for the cheapest pair of each row."""
        K, f0 = absorbed_launches.build(self, f0, g0, eps) or self._exponentials(f0, g0, eps)
        products, kernel = Products(K), self.kernel
        kernel.products, kernel.f0, kernel.g0, kernel.eps, kernel.sides, kernel.launched = products, f0, g0, eps, None, None
        kernel.scaled = []
        self.extra_sweeps += 1
        return products

    def _exponentials(self, f0: Tensor | None, g0: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        if f0 is None:
            f0 = -torch.cat([self._gaps(g0, rows).amax(-1) for rows in self._blocks(g0)], -1)
        K = torch.empty_like(self.C, memory_format=torch.contiguous_format)
        for rows in self._blocks(g0):
            block = K[..., rows, :].copy_(self._gaps(g0, rows).add_(f0[..., rows].unsqueeze(-1)).div_(eps))
            torch.threshold_(block, self.log_dropped, -math.inf).exp_()
        return K, f0

    def _shared(self, g: Tensor) -> list[int]:
        """The batch axes of g along which there is one cost."""
        return [i for i, (own, wanted) in enumerate(zip(self.C.shape[:-2], g.shape[:-1], strict=True)) if own < wanted]

    def _at(self, eps: float) -> bool:
        """Whether there is a kernel at eps."""
        return self.kernel.products is not None and eps == self.kernel.eps

    def _drop(self) -> None:
        self.kernel.products, self.stride = None, 1

    # The verbs, by the kernel where it serves.

    def update(self, g: Tensor, b: Tensor, eps: float) -> Tensor:
        s = absorbed_launches.softmin(self, g, b, eps) if self._at(eps) else None
        return super().update(g, b, eps) if s is None else s

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        sums = self.sums(h, eps)
        return super().softmin(h, eps) if sums is None else self.kernel.f0 - eps * log(sums.to(h.dtype))

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        scalings = self.scalings(k, h, eps)
        if scalings is None or self.kernel.products is None:
            return super().apply(k, h, eps, v)
        return (scalings[0].unsqueeze(-1) * (self.kernel.products.K @ (scalings[1].unsqueeze(-1) * v.to(self.dtype)))).to(h.dtype)

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

    def sums(self, h: Tensor, eps: float, *, columns: bool = False) -> Tensor | None:
        """The kernel times the scaling of h, from whichever side; None when there is no kernel at eps or the product is not exact."""
        kernel = self.kernel
        if kernel.products is None or not self._at(eps):
            return None
        w = exp((h - (kernel.f0 if columns else kernel.g0)) / eps).to(self.dtype)
        sums = kernel.products.columns(w) if columns else kernel.products.rows(w)
        exact = (sums >= self._least(w.sum(-1, keepdim=True))) & sums.isfinite()
        return sums if bool(exact.all().item()) else None

    def _least(self, total: Tensor) -> Tensor:
        """The sum of products with numbers of this `total` from which on it is exact: below it, numbers that underflowed would count."""
        info = torch.finfo(self.dtype)
        return (self.safe * total).clamp(min=info.tiny / info.eps)

    def scalings(self, k: Tensor, h: Tensor, eps: float) -> tuple[Tensor, Tensor] | None:
        """(u, v) with exp((k_i + h_j - C_ij) / eps) = u_i K_ij v_j; None when there is no kernel at eps, or the range is left.

        Whether it is left, the host has to wait for. Conjugate gradients ask again with the same k and h: those are answered at once.
        """
        if not self._at(eps):
            return None
        kernel = self.kernel
        for old_k, old_h, answer in kernel.scaled:
            if old_k is k and old_h is h:
                return answer
        u, v = exp((k - kernel.f0) / eps).to(self.dtype), exp((h - kernel.g0) / eps).to(self.dtype)
        found = (u, v) if bool((u.isfinite().all() & v.isfinite().all()).item()) else None
        kernel.scaled = [*kernel.scaled[-3:], (k, h, found)]
        return found

    def outer(self, u: Tensor, v: Tensor) -> Tensor:
        """u_i K_ij v_j, summed over what the batch has beyond C."""
        assert self.kernel.products is not None
        return (self.kernel.products.K * u.unsqueeze(-1)).mul_(v.unsqueeze(-2)).sum_to_size(self.C.shape)


class _Transposed(Dense):
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

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        return self.upright.plan(h, k, eps).mT

    def _products(self, k: Tensor, h: Tensor, eps: float, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        on_columns, on_rows = self.upright._products(h, k, eps, left, right)
        return on_rows, on_columns


class _Side:
    """One side of an iteration on the absorbed kernel: from the kernel's sums to its scaling, and to its potential.

    scaling   None for 1 / sums, the hard constraint: no logarithm needed.
    """

    def __init__(self, penalty: Penalty, offset: Tensor, eps: float) -> None:
        self.penalty, self.offset, self.eps, self.hard = penalty, offset, eps, penalty.balanced
        self.log = torch.log if offset.numel() <= PIECE else log
        self.scaling: Scaling = None
        if not self.hard:
            self.scaling = Power.damped(offset, penalty.tau, eps) if isinstance(penalty, KL) else self._scaling

    def potential(self, sums: Tensor, part: slice = slice(None)) -> Tensor:
        offset = self.offset[..., part]
        softmin = offset - self.eps * self.log(sums.to(offset.dtype))
        return softmin if self.hard else self.penalty.damp(softmin, self.eps)

    def _scaling(self, sums: Tensor, part: slice = slice(None)) -> Tensor:
        return exp((self.potential(sums, part) - self.offset[..., part]) / self.eps).to(sums.dtype)
