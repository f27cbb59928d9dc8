"""Costs between clouds in plain torch, block by block: any cost, any device, nothing n by m ever in memory.

A softmin of softmins is a softmin, so a block of rows and columns is formed, reduced and dropped. Blocks have the type of the
potentials, whatever that of the points: float32 exponents lose digits that the potentials have. On a CPU that costs little. Measured on
2 cores at d = 3, exponent and exponential take 0.9 ns a pair in float64, and 0.7 in float32 after a float64 product.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from ..costs import Cost, Folded
from ..problem import Problem, vector_dtype
from ..vectors import exp, log
from .products import by_rows
from .protocol import needed, pull_folded
from .trusting import SURE, Trusting

#: Entries of a block. Measured on 2 cores with n = 10k, from 2^17 to 2^21: within 15 % of each other; this one is 4 MB.
CPU_ENTRIES = 2**19
#: On a GPU: long enough to hide the launches, small beside any card's memory (128 MiB of float64).
GPU_ENTRIES = 2**24
#: Rows that a block spanning all columns must have for both directions to be worth taking from it, and the entries it may grow to.
FUSED_ROWS, FUSED_ENTRIES = 8, 2**22
#: Iterations between two looks at the range of the sums, at most.
LONGEST_STRIDE = 64

#: (rows, cols) -> the exponents of that block, (*batch, rows, cols), for the caller to overwrite
Exponents = Callable[[slice, slice], Tensor]


def refuse(problem: Problem) -> str | None:
    """Why this problem cannot be taken in blocks, or None."""
    cost = problem.cost
    if cost.stored:
        return f"the cost is {cost.describe()} that is already in memory; there is nothing to save"
    if cost.backend not in (None, "chunked"):
        return f'the cost is {cost.describe()}, which "{cost.backend}" runs without blocks'
    if not cost.folds:
        try:
            cost.part(slice(0, 1), slice(0, 1))
        except NotImplementedError as why:
            return f"it has no fold(), and {why}"
    return None


class Chunked(Trusting):
    """A Cost between clouds, taken in blocks. O((n + m) d) memory and a block; n m exponentials a sweep.

    `inputs` are alpha, beta, u and v of a cost that folds, for autograd to carry on to the points; the points themselves otherwise.
    """

    def __init__(self, cost: Cost | _Folding | _Sliced) -> None:
        super().__init__()
        folded = cost.fold() if isinstance(cost, Cost) else None
        self.pairs = _Folding(folded) if folded is not None else _Sliced(cost) if isinstance(cost, Cost) else cost
        self.inputs = self.pairs.inputs
        self.dtype = vector_dtype(self.inputs[0].device)
        self.guess: Tensor | None = None  # the last softmin of the rows, (*batch, n)
        self.exact_at, self.stride = math.nan, 1  # the eps of the last fused iterations; how many to run before looking at their sums

    @property
    def T(self) -> Chunked:
        return Chunked(self.pairs.T)

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        n, m = self.pairs.shape[-2:]
        k = h.new_zeros(n)
        exponents, tile = self.pairs.exponents(k, h, eps), self._tile(h)
        # Results are written into arrays that exist before the blocks do. Kept in small tensors of their own, they would lie
        # between the freed blocks and keep the allocator from using that memory again: several hundred MB in a long solve.
        logs = h.new_empty(*self._batch(h), n)
        for rows in by_rows(n, tile[0]):
            parts = [_log_total(exponents(rows, cols)) for cols in by_rows(m, tile[1])]
            logs[..., rows] = parts[0] if len(parts) == 1 else torch.stack(parts, -1).logsumexp(-1)
        return -eps * logs

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        v = v.to(h.dtype)
        out = v.new_zeros(*self._batch(k, h, v[..., 0]), self.pairs.shape[-2], v.shape[-1])
        for rows, cols, E in self._blocks(k, h, eps):
            out[..., rows, :] += E @ v[..., cols, :]
        return out

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        P = torch.empty(*self._batch(k, h), *self.pairs.shape[-2:], dtype=self.inputs[0].dtype, device=h.device)
        for rows, cols, E in self._blocks(k, h, eps):
            P[..., rows, cols] = E
        return P

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        pairs = self.pairs
        if not isinstance(pairs, _Sliced):
            return pull_folded(self.inputs, w, lambda right, left: self._products(k, h, eps, right, left))
        grads = [torch.zeros_like(z, dtype=self.dtype) for z in self.inputs]
        for rows, cols, E in self._blocks(k, h, eps):
            G = E * w[..., rows].unsqueeze(-1)
            pairs.pull_back(G.sum_to_size(*pairs.shape[:-2], *G.shape[-2:]), rows, cols, grads)
        return tuple(grad.to(z.dtype) for grad, z in zip(grads, self.inputs, strict=True))

    def _products(self, k: Tensor, h: Tensor, eps: float, right: Tensor | None, left: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """right P^T and left P for p_ij = exp((k_i + h_j - C_ij) / eps), None for None, from one exponential of each pair."""
        (n, m), batch = self.pairs.shape[-2:], self._batch(k, h)
        on_rows = None if right is None else h.new_zeros(*batch, right.shape[-2], n)
        on_columns = None if left is None else h.new_zeros(*batch, left.shape[-2], m)
        for rows, cols, E in self._blocks(k, h, eps):
            if on_rows is not None and right is not None:
                on_rows[..., rows] += right[..., cols] @ E.mT
            if on_columns is not None and left is not None:
                on_columns[..., cols] += left[..., rows] @ E
        return on_rows, on_columns

    def _blocks(self, k: Tensor, h: Tensor, eps: float) -> Iterator[tuple[slice, slice, Tensor]]:
        """(rows, cols, exp((k_i + h_j - C_ij) / eps)) of each block."""
        (n, m), exponents, (height, width) = self.pairs.shape[-2:], self.pairs.exponents(k, h, eps), self._tile(h)
        for rows in by_rows(n, height):
            for cols in by_rows(m, width):
                yield rows, cols, exponents(rows, cols).exp_()

    def update(self, g: Tensor, b: Tensor, eps: float) -> Tensor:
        self.guess = super().update(g, b, eps)
        return self.guess

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """Both half-steps of an iteration from one exponential of each pair.

        The last softmin replaces the rows' maximum: the update of a block of rows follows from one exponential of its entries, and so
        does its part of the columns' update. Where that guess leaves the range of the type, as in the first iterations at small eps,
        the iteration takes its two sweeps.
        """
        f = g_next = g
        done = 0
        while done < k:
            g = g_next
            step = min(self.stride, k - done)
            moved = self._several(problem, g, eps, step)
            if moved is None:
                f, _, g_next = super().iterate(problem, g, eps, 1)
                done, self.stride = done + 1, 1
                continue
            f, g, g_next = moved
            done, self.exact_at = done + step, eps
            if self._waited_for(g):  # a CPU may as well look each time
                self.stride = min(2 * self.stride, LONGEST_STRIDE)
        return f, g, g_next

    def _several(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor] | None:
        """(f, g, g_next) after k fused iterations, with one read; None where some sum was not exact, or they cannot be fused."""
        start, right, f, g_next = self.guess, None, g, g
        for _ in range(k):
            g = g_next
            moved = self._fused(problem, g, self.guess, eps) if self.guess is not None else None
            if moved is None:
                return None
            f, g_next, self.guess, exact = moved
            right = exact if right is None else right & exact
        if right is not None and bool(right.item()):
            return f, g, g_next
        self.guess = start
        return None

    def _trusts(self, eps: float) -> bool:
        return self.guess is not None and eps == self.exact_at and self.stride >= SURE

    def _held(self, problem: Problem, g: Tensor, eps: float, inexact: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        before = self.guess
        moved = None if before is None else self._fused(problem, g, before, eps)
        assert before is not None and moved is not None  # as in the iterations that were trusted
        f, g_next, s, exact = moved
        self.guess = torch.where(exact, s, before)
        return torch.where(exact, f, before), g, torch.where(exact, g_next, g), ~exact if inexact is None else inexact | ~exact

    def _distrust(self) -> None:
        self.guess, self.stride = None, 1

    def _fused(self, problem: Problem, g: Tensor, s0: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor, Tensor] | None:
        """(f, g_next, s, whether every sum stayed in the range in which it is exact to rounding); None where the columns are too many.

        With E_ij = exp((s0_i + g_j - C_ij) / eps):  s_i = s0_i - eps log (E b)_i  and, for w_i = a_i exp((f_i - s0_i) / eps),
        the columns' softmin is g_j - eps log (E^T w)_j. What underflows, an entry or its product with a weight, is below the smallest
        number `tiny` or that times the weight: it changes no digit of a sum of more than tiny / finfo.eps times the weights or 1.
        """
        (penalty_a, penalty_b), a, b = problem.penalties, problem.a, problem.b
        (n, m), size = self.pairs.shape[-2:], self._copies(g)
        block = max(FUSED_ROWS, self._entries() // (m * size))
        if block * m * size > max(FUSED_ENTRIES, self._entries()):
            return None
        exponents, every = self.pairs.exponents(s0, g, eps), slice(0, m)
        s, t, reached = s0.clone(), b.new_zeros(b.shape), b.new_empty(s0.shape)
        scaled = b.new_empty(s0.shape)
        for rows in by_rows(n, block):
            E = exponents(rows, every).exp_()
            sums = (E @ b.unsqueeze(-1)).squeeze(-1)
            reached[..., rows] = sums
            s[..., rows] -= eps * log(sums)
            scaled[..., rows] = a[..., rows] * exp((penalty_a.damp(s[..., rows], eps) - s0[..., rows]) / eps)
            t += (scaled[..., rows].unsqueeze(-2) @ E).squeeze(-2)
        info = torch.finfo(g.dtype)
        safe = info.tiny / info.eps
        least_s, least_t = (safe * w.sum(-1, keepdim=True).clamp(min=1) for w in (b, scaled))
        exact = (reached >= least_s).all() & reached.isfinite().all() & (t >= least_t).all() & t.isfinite().all()
        return penalty_a.damp(s, eps), penalty_b.damp(g - eps * log(t), eps), s, exact

    def _batch(self, *vectors: Tensor) -> torch.Size:
        return torch.broadcast_shapes(*(z.shape[:-1] for z in vectors), self.pairs.shape[:-2])

    def _copies(self, h: Tensor) -> int:
        return self._batch(h).numel() * self.pairs.depth

    def _entries(self) -> int:
        return CPU_ENTRIES if self.inputs[0].device.type == "cpu" else GPU_ENTRIES

    def _tile(self, h: Tensor) -> tuple[int, int]:
        """Rows and columns of a block: long rows, since the reductions run along them."""
        entries = max(1, self._entries() // self._copies(h))
        cols = min(self.pairs.shape[-1], 2**14, entries)
        return max(1, entries // cols), cols


def _log_total(z: Tensor) -> Tensor:
    """log sum_j exp(z_ij), over z; -inf for a row of nothing but -inf."""
    top = z.amax(-1, keepdim=True)
    top = torch.where(top > -torch.inf, top, 0.0)
    return top.squeeze(-1) + z.sub_(top).exp_().sum(-1).log()


class _Folding:
    """C_ij = alpha_i + beta_j - <u_i, v_j>: the exponents of a block are one product of two slim matrices."""

    depth = 1

    def __init__(self, folded: Folded) -> None:
        self.inputs = tuple(folded)
        wide = vector_dtype(folded.u.device)
        self.wide = Folded(*(z.detach().to(wide) for z in folded))
        self.shape = torch.Size((*folded.alpha.shape, folded.beta.shape[-1]))

    @property
    def T(self) -> _Folding:
        return _Folding(Folded(*self.inputs).T)

    def exponents(self, k: Tensor, h: Tensor, eps: float) -> Exponents:
        alpha, beta, u, v = self.wide
        # [u / eps, 1, p] [v, q, 1]^T. Nothing in these columns is 0, so h = -inf stays -inf and never becomes 0 * inf.
        left = _beside(u / eps, torch.ones_like(alpha), (k - alpha) / eps)
        right = _beside(v, (h - beta) / eps, torch.ones_like(beta)).mT.contiguous()
        return lambda rows, cols: left[..., rows, :] @ right[..., cols]


def _beside(z: Tensor, *columns: Tensor) -> Tensor:
    """z (*batch, n, d) with further columns (*batch, n), whose batches broadcast."""
    batch = torch.broadcast_shapes(z.shape[:-2], *(column.shape[:-1] for column in columns))
    stacked = [column.expand(*batch, -1).unsqueeze(-1) for column in columns]
    return torch.cat((z.expand(*batch, -1, -1), *stacked), -1)


class _Sliced:
    """Any other cost, bound anew to the points of each block."""

    def __init__(self, cost: Cost, transposed: bool = False) -> None:
        self.cost, self.transposed = cost, transposed
        self.inputs = tuple(cost.inputs.values())
        *batch, n, m = cost.shape
        self.shape = torch.Size((*batch, m, n) if transposed else (*batch, n, m))
        self.depth = cost.depth

    @property
    def T(self) -> _Sliced:
        return _Sliced(self.cost, not self.transposed)

    def exponents(self, k: Tensor, h: Tensor, eps: float) -> Exponents:
        cost = self.cost.of(z.detach() for z in self.inputs)

        def block(rows: slice, cols: slice) -> Tensor:
            C = self._seen(self._part(cost, rows, cols).to(h.dtype))
            return (h[..., cols].unsqueeze(-2) - C).add_(k[..., rows].unsqueeze(-1)).div_(eps)

        return block

    def pull_back(self, G: Tensor, rows: slice, cols: slice, grads: list[Tensor]) -> None:
        """Adds to `grads` what the derivative G (*batch, rows, cols) in this block of C means for the inputs, see `needed`."""
        part, wanted = self._part(self.cost, rows, cols), needed(self.inputs)
        into = list(self._part(self.cost.of(grads), rows, cols).inputs.values())
        windows = len(into) == len(grads) and all(map(_shares_memory, into, grads))  # the part's inputs are views of the whole's
        inputs, into = (part.inputs.values(), into) if windows else (self.inputs, grads)
        leaves = [z.detach().to(G.dtype).requires_grad_(want) for z, want in zip(inputs, wanted, strict=True)]
        with torch.enable_grad():
            C = self._seen(part.of(leaves) if windows else self._part(self.cost.of(leaves), rows, cols))
        found = iter(torch.autograd.grad(C, [z for z in leaves if z.requires_grad], G, allow_unused=True))
        for window, want in zip(into, wanted, strict=True):
            if want and (grad := next(found)) is not None:
                window += grad

    def _part(self, cost: Cost, rows: slice, cols: slice) -> Cost:
        return cost.part(cols, rows) if self.transposed else cost.part(rows, cols)

    def _seen(self, cost: Cost) -> Tensor:
        return cost.dense().mT if self.transposed else cost.dense()


def _shares_memory(part: Tensor, whole: Tensor) -> bool:
    return part.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
