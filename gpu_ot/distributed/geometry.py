"""What both layouts share: the geometries of a rank's pieces. Vectors come in and go out replicated."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..costs import Cost
from ..geometry.protocol import Geometry, needed
from ..penalties import Penalty
from ..problem import Problem
from .pieces import Pieces

#: Binds a problem's cost on one backend.
Bind = Callable[[Problem], Geometry]


class Spread(Geometry):
    """A sharded problem, whose pieces `bind_piece` binds."""

    def __init__(self, problem: Problem, bind_piece: Bind, pieces: Pieces) -> None:
        self.problem, self.bind_piece, self.pieces = problem, bind_piece, pieces
        self.shards, self.group = pieces.shards, pieces.shards.group
        self.inputs = tuple(z for z, _ in pieces.inputs)
        one = bind_piece(pieces.zeros(problem, 1, 1))  # a rank without points has a backend, too
        self.dtype, self.rounds = one.dtype, one.exact is not one

    @property
    def exact(self) -> Geometry:
        return type(self)(self.problem, lambda piece: self.bind_piece(piece).exact, self.pieces) if self.rounds else self

    def shard(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        return self.shards.narrow(z, side, dim)

    def gather(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        sizes = self.shards.sizes[side]
        return z if sizes is None else self.group.gather(z, sizes, dim)

    def bound(self, cost: Cost, rows: slice, columns: slice, penalties: tuple[Penalty, Penalty] | None = None) -> Geometry | None:
        """The geometry of a piece, between the points at `rows` and `columns`; None where it is empty."""
        if not cost.shape[-2:].numel():
            return None
        a, b = self.problem.a.detach()[..., rows], self.problem.b.detach()[..., columns]
        return self.bind_piece(self.problem.restricted(cost, a, b, penalties))

    def pull_back_piece(
        self, cost: Cost, rows: slice, columns: slice, flipped: bool, k: Tensor, h: Tensor, eps: float, w: Tensor
    ) -> list[Tensor]:
        """`pull_back` in the inputs of a piece, or of its transpose."""
        leaves = [z.detach().requires_grad_(want) for z, want in zip(cost.inputs.values(), needed(self.inputs), strict=True)]
        with torch.enable_grad():
            geometry = self.bound(cost.of(leaves), rows, columns)
            if geometry is None:
                return [torch.zeros_like(z) for z in leaves]
            geometry = geometry.T if flipped else geometry
            into = geometry.inputs
        with torch.no_grad():
            found = geometry.pull_back(k, h, eps, w)
        into, found = zip(*((z, grad) for z, grad in zip(into, found, strict=True) if z.requires_grad), strict=True)
        grads = iter(torch.autograd.grad(into, [z for z in leaves if z.requires_grad], found, allow_unused=True))
        pulled = [next(grads) if z.requires_grad else None for z in leaves]
        return [torch.zeros_like(z) if grad is None else grad for z, grad in zip(leaves, pulled, strict=True)]


def batch_of(k: Tensor, h: Tensor, v: Tensor | None = None) -> torch.Size:
    """The batch axes of k (*batch, n), h (*batch, m) and v (*batch, m, c) together."""
    return torch.broadcast_shapes(k.shape[:-1], h.shape[:-1], () if v is None else v.shape[:-2])


def softmin_of_softmins(parts: Tensor, eps: float) -> Tensor:
    """(parts, *) -> (*)."""
    return parts[0] if len(parts) == 1 else -eps * (parts / -eps).logsumexp(0)
