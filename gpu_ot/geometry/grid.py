"""Regular grids: a softmin is one small product per axis, on any device, in numbers that cannot overflow.

With C_ij a sum over axes, sum_j exp((h_j - C_ij) / eps) is a sum along the first axis of sums along the second. Along one axis

    out_i = log sum_j exp(L_j - c_ij),    c = C / eps,

is taken for blocks of neighbouring i about some k: exp(L_j - c_kj - top) is formed once, and the product with exp(c_kj - c_ij) does all.
Blocks are as long as that matrix stays within exp(+-RANGE): for a large eps the whole axis is one, a product on an absorbed kernel, and
for eps -> 0 each i has a block of its own, a logsumexp. Nothing is ever inexact, and nobody has to ask. Sums of positive terms first try
one product for the whole axis, with exp(-c): where h is as smooth as the costs every sum of it is large enough, whatever eps.
"""

from __future__ import annotations

import math
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from .products import by_rows
from .protocol import Geometry, needed

#: Exponents of a block's matrix. What is dropped from a sum is exp(-700) of its largest term about k, so exp(-300) of any that counts.
RANGE = 200.0
#: A sum of positive terms of a whole axis is exact from here on: what underflows in it is 1e-28 of it.
SAFE = 1e-280

#: log |z| and the sign of z, None for positive.
Signed = tuple[Tensor, Tensor | None]


def refuse(problem: Problem) -> str | None:
    """Why this problem is not one of a grid, or None."""
    if problem.cost.backend == "grid":
        return None
    return f"the cost is {problem.cost.describe()}, and no gpu_ot.Grid"


def memory(problem: Problem) -> int:
    """Bytes: four vectors, and the matrices of the axes."""
    return 32 * problem.a.numel() + 16 * sum(k * k for k in getattr(problem.cost, "nodes", ()))


class OnGrid(Geometry):
    """A `Grid` cost. `inputs` is its spacing."""

    dtype = torch.float64

    def __init__(self, problem: Problem) -> None:
        cost: Any = problem.cost  # a Grid, or what has its `nodes`, `spacing`, `p` and `axis`
        self.cost, self.inputs = cost, (cost.spacing,)
        with torch.no_grad():
            self.costs = [cost.axis(k).double() for k in range(len(cost.nodes))]
        self._kernels: tuple[float, list[_Axis]] = math.nan, []

    @property
    def T(self) -> OnGrid:
        return self

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        logs, _ = self._sums((h / eps, None), eps)
        return -eps * logs

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        v = v.to(h.dtype).movedim(-1, 0)
        logs, sign = self._sums(_signed(v, h / eps), eps)
        return _number((logs + k / eps, sign)).movedim(0, -1)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        n, spacing = self.cost.shape[0], self.cost.spacing
        P = torch.empty(*torch.broadcast_shapes(k.shape[:-1], h.shape[:-1]), n, n, dtype=spacing.dtype, device=spacing.device)
        with torch.no_grad():
            for rows in by_rows(n, max(1, 2**22 // (n * max(1, h.shape[:-1].numel())))):
                C = self.cost.part(rows, slice(None)).dense().to(h.dtype)
                P[..., rows, :] = ((k[..., rows].unsqueeze(-1) + h.unsqueeze(-2) - C) / eps).exp()
        return P

    def plan_cost(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """A sum over the axes, each of three products."""
        sums = [self._sums((h / eps, None), eps, weighted=axis)[0] for axis in range(len(self.costs))]
        return torch.stack([(logs + k / eps).exp().sum(-1) for logs in sums]).sum(0)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """C along an axis is (spacing steps)^p, so its derivative in the spacing is p C / spacing."""
        if not needed(self.inputs)[0]:
            return (torch.zeros_like(self.cost.spacing),)
        grads = []
        for axis in range(len(self.costs)):
            logs, _ = self._sums((h / eps, None), eps, weighted=axis)
            grads.append((w * (logs + k / eps).exp()).sum())
        spacing = self.cost.spacing.detach()
        return (self.cost.p * torch.stack(grads).to(spacing) / spacing,)

    def _sums(self, given: Signed, eps: float, weighted: int = -1) -> Signed:
        """log |sum_j exp(L_j - C_ij / eps)| and its sign. weighted: each term times its cost along that axis."""
        logs, sign = (None if z is None else z.unflatten(-1, self.cost.nodes) for z in given)
        assert logs is not None
        axes, d = self._axes(eps), len(self.costs)
        for axis in range(d):
            turned = logs.movedim(axis - d, -1), None if sign is None else sign.movedim(axis - d, -1)
            logs, sign = (
                None if z is None else z.movedim(-1, axis - d) for z in _along(turned, axes[axis], self.costs[axis], axis == weighted)
            )
            assert logs is not None
        return logs.flatten(-d), None if sign is None else sign.flatten(-d)

    def _axes(self, eps: float) -> list[_Axis]:
        if self._kernels[0] != eps:
            self._kernels = eps, [_Axis(C / eps) for C in self.costs]
        return self._kernels[1]


class _Axis:
    """The costs over eps along one axis: their kernel, and the blocks that serve where it underflows."""

    def __init__(self, c: Tensor) -> None:
        self.c, self.kernel = c, (-c).exp()

    @cached_property
    def blocks(self) -> list[_Block]:
        return _blocks(self.c)


class _Block:
    """Neighbouring nodes of an axis, and the product that gives their sums from those about node k."""

    def __init__(self, rows: slice, c: Tensor) -> None:
        self.rows = rows
        k = (rows.start + rows.stop) // 2
        self.level = c[k]  # (N,)
        self.matrix = (c[k] - c[rows]).exp().mT.contiguous()  # (N, rows)


def _blocks(c: Tensor) -> list[_Block]:
    """The fewest equal blocks whose matrices stay within RANGE. c (N, N), costs over eps."""
    size = len(c)
    # A block reaches half its length to both sides of its middle: c changes by at most so much.
    change = (c[1:] - c[:-1]).abs().amax() if size > 1 else c.new_zeros(())
    reach = RANGE / max(float(change), 1e-300)
    length = max(1, min(size, int(min(2 * reach, 2.0 * size))))
    return [_Block(rows, c) for rows in by_rows(size, length)]


def _along(given: Signed, axis: _Axis, C: Tensor, weighted: bool) -> Signed:
    """The sums along the last axis."""
    if given[1] is not None or weighted or given[0].device.type != "cpu":  # where a look at the sums is a wait
        return _by_blocks(given, axis.blocks, C, weighted)
    logs = given[0]
    top = logs.amax(-1, keepdim=True)
    top = torch.where(top > -math.inf, top, 0.0)
    sums = (logs - top).exp_() @ axis.kernel  # symmetric
    wrong = (sums < SAFE).any(-1)
    out = sums.log_().add_(top)
    if bool(wrong.any()):
        out[wrong] = _by_blocks((logs[wrong], None), axis.blocks, C, False)[0]
    return out, None


def _by_blocks(given: Signed, blocks: list[_Block], C: Tensor, weighted: bool) -> Signed:
    logs, sign = given
    out, signs = torch.empty_like(logs), None if sign is None else torch.empty_like(sign)
    for block in blocks:
        z = logs - block.level
        top = z.amax(-1, keepdim=True)
        top = torch.where(top > -math.inf, top, 0.0)
        e = (z - top).exp()
        e = e if sign is None else e * sign
        matrix = block.matrix * C[block.rows].mT if weighted else block.matrix
        sums = e @ matrix
        out[..., block.rows] = sums.abs().log() + top
        if signs is not None:
            signs[..., block.rows] = sums.sign()
    return out, signs


def _signed(v: Tensor, logs: Tensor) -> Signed:
    """exp(logs) v; where v is 0 the atom is absent, whatever its logarithm."""
    return torch.where(v == 0, -math.inf, logs + v.abs().log()), v.sign()


def _number(z: Signed) -> Tensor:
    logs, sign = z
    return logs.exp() if sign is None else torch.where(sign == 0, 0.0, sign * logs.exp())
