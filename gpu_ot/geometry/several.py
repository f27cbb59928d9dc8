"""A batch of problems, each with a geometry of its own: for backends that sort the points of one problem."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..problem import Problem
from .protocol import Geometry
from .swept import pull_by_apply


def singles(problem: Problem) -> list[Problem]:
    """The problems of a batch, one by one, of detached tensors; [problem] where it is one. The cost must say where its points are."""
    if not (batch := problem.shape[:-2]):
        return [problem]
    cost, sides, count = problem.cost, problem.cost.sides, batch.numel()
    a, b = (z.detach().expand(*batch, -1).reshape(count, -1) for z in (problem.a, problem.b))
    if not cost.shape[:-2]:
        cost = cost.of(z.detach() for z in cost.inputs.values())
        return [problem.restricted(cost, *each) for each in zip(a, b, strict=True)]
    assert sides is not None
    inputs = [
        z.detach() if side is None else z.detach().expand(*batch, *z.shape[-2:]).reshape(count, *z.shape[-2:])
        for z, side in zip(cost.inputs.values(), sides, strict=True)
    ]
    costs = [cost.of(z if side is None else z[k] for z, side in zip(inputs, sides, strict=True)) for k in range(count)]
    return [problem.restricted(each, a[k], b[k]) for k, each in enumerate(costs)]


def bind_each(problem: Problem, bind: Callable[[Problem], Geometry]) -> Geometry:
    """The geometry of a problem, or of each of a batch."""
    if len(problem.shape) == 2:
        return bind(problem)
    folded = problem.cost.fold()
    assert folded is not None
    return Several(tuple(folded), [bind(each) for each in singles(problem)], problem.shape[:-2])


class Several(Geometry):
    """Vectors are (*batch, n) and (*batch, m); sweeps are those of each problem, one after the other."""

    def __init__(self, inputs: Sequence[Tensor], each: Sequence[Geometry], batch: torch.Size) -> None:
        self.inputs, self.each, self.batch = tuple(inputs), tuple(each), batch
        self.dtype, self.approximate = each[0].dtype, each[0].approximate

    @property
    def T(self) -> Several:
        alpha, beta, u, v = self.inputs
        return Several((beta, alpha, v, u), [z.T for z in self.each], self.batch)

    @property
    def exact(self) -> Geometry:
        exact = [z.exact for z in self.each]
        return self if all(new is old for new, old in zip(exact, self.each, strict=True)) else Several(self.inputs, exact, self.batch)

    def finer(self, factor: float) -> Geometry | None:
        finer = [z.finer(factor) for z in self.each]
        known = [z for z in finer if z is not None]
        return Several(self.inputs, known, self.batch) if len(known) == len(finer) else None

    def initial_rows(self) -> Tensor | None:
        found = [z for each in self.each if (z := each.initial_rows()) is not None]
        return torch.stack(found).unflatten(0, self.batch) if len(found) == len(self.each) else None

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        return self._stacked(lambda geometry, h: geometry.softmin(h, eps), (h, 1))

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self._stacked(lambda geometry, k, h, v: geometry.apply(k, h, eps, v), (k, 1), (h, 1), (v, 2))

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        return self._stacked(lambda geometry, k, h: geometry.plan(k, h, eps), (k, 1), (h, 1))

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return pull_by_apply(self, k, h, eps, w)

    def _stacked(self, work: Callable[..., Tensor], *given: tuple[Tensor, int]) -> Tensor:
        """The results of all problems. Each tensor comes with how many of its axes are a problem's own."""
        batch = torch.broadcast_shapes(self.batch, *(z.shape[: z.ndim - own] for z, own in given))
        flat = [z.expand(*batch, *z.shape[z.ndim - own :]).reshape(-1, *z.shape[z.ndim - own :]) for z, own in given]
        count = len(self.each)
        found = [work(self.each[k % count], *(z[k] for z in flat)) for k in range(batch.numel())]
        return torch.stack(found).unflatten(0, batch)
