"""The communicator of a problem that the ranks of a group share.

A derivative of something replicated is replicated as well: the ranks' losses are one loss, not a sum of several. So the backward of
a gather takes this rank's shard, and the backward of taking a shard gathers.
"""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import errors
from ..communicator import Alone
from ..problem import check_cost
from .group import Group

T = TypeVar("T")


class Shards(Alone):
    """Rank r of the group holds `sizes[side][r]` points of a side, after those of the ranks before it; None for a side that every rank
    holds whole."""

    def __init__(self, group: Group, sizes: tuple[list[int] | None, list[int] | None]) -> None:
        self.group, self.sizes, self.rank = group, sizes, group.rank

    def slice(self, side: int, rank: int | None = None) -> slice:
        """The positions of a rank's points, or this one's, among all."""
        sizes = self.sizes[side]
        if sizes is None:
            return slice(None)
        rank = self.rank if rank is None else rank
        start = sum(sizes[:rank])
        return slice(start, start + sizes[rank])

    def narrow(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        """A view of this rank's shard of a replicated z."""
        own = self.slice(side)
        return z if own.start is None else z.narrow(dim, own.start, own.stop - own.start)

    def on_every_rank(self, work: Callable[[], T], **settings: object) -> T:
        return self.group.on_every_rank(work, {name: _form(value) for name, value in settings.items()})

    def agree(self, **settings: object) -> None:
        self.group.failures.forget()
        self.group.agree({name: _digest(value) if isinstance(value, Tensor) else value for name, value in settings.items()})

    def report_failure(self) -> contextlib.AbstractContextManager[None]:
        return self.group.failures.report()

    def check_points(self, cost: Any) -> None:
        self.on_every_rank(lambda: check_cost(cost))

    def gather(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        sizes = self.sizes[side]
        if sizes is None:
            return z
        own = sizes[self.rank]
        if z.ndim < -dim or z.shape[dim] != own:
            raise errors.wrong_shape("what is gathered", z.shape, f"{own} along axis {dim}, one for each of this rank's points")
        return _Linear.apply(z, self.group.gather(z.detach(), sizes, dim), lambda grad: self.narrow(grad, side, dim))

    def gather_weights(self, name: str, side: int, w: Tensor) -> Tensor:
        sizes, group, seen = self.sizes[side], self.group, w.detach()
        bad = [int(count) for count in (seen.isnan().sum(), (seen < 0).sum(), seen.isinf().sum())]
        if any(bad):
            raise errors.bad_weights(name, *bad)
        if sizes is not None and (w.ndim == 0 or w.shape[-1] not in (sizes[group.rank], sum(sizes))):
            raise errors.wrong_shape(name, w.shape, f"(*batch, {sizes[group.rank]}), a weight for each point of this rank")
        forms = group.exchange((tuple(w.shape), _digest(w)))
        if sizes is not None and [shape[-1] for shape, _ in forms] == sizes:
            parts = group.exchange(seen.cpu())
            return _Linear.apply(w, torch.cat(parts, -1).to(w.device), lambda grad: self.narrow(grad, side))
        if odd := [rank for rank, form in enumerate(forms) if form != forms[0]]:
            raise errors.ranks_differ(name, 0, "these weights", odd[0], "others, neither those of its share nor the same")
        return w

    def shard(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        sizes = self.sizes[side]
        if sizes is None:
            return z
        return _Linear.apply(z, self.narrow(z.detach(), side, dim).clone(), _once(lambda grad: self.group.gather(grad, sizes, dim)))

    def local_indices(self, index: Tensor, side: int) -> Tensor:
        own = self.slice(side)
        if index.ndim > 1:
            raise errors.ProblemError("pairs of a batch are not drawn where ranks share the points: solve its problems one by one.")
        return index if own.start is None else index[(index >= own.start) & (index < own.stop)]

    def broadcast(self, z: Tensor) -> Tensor:
        return self.group.broadcast(z)

    def sum(self, z: Tensor) -> Tensor:
        return _Linear.apply(z, self.group.sum(z.detach()), lambda grad: grad)

    def replicate(self, z: Tensor) -> Tensor:
        return _Linear.apply(z, z.detach(), _once(lambda grad: self.group.sum(grad, -2 if grad.ndim > 1 else -1)))

    # Work of the cost, see costs.py.

    def local_rows(self, cost: Any) -> Any:
        return cost.local_rows()

    def largest(self, problem: Any) -> Any:
        return problem.cost.largest(problem)

    def bind(self, problem: Any, bind_piece: Callable[[Any], Any]) -> Any:
        return problem.cost.bind(problem, bind_piece)


class _Linear(torch.autograd.Function):
    """(z, result, pull_back) -> result, a linear function of z whose gradient in z is `pull_back` of its own."""

    @staticmethod
    def forward(ctx: Any, z: Tensor, result: Tensor, pull_back: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.pull_back = pull_back
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return ctx.pull_back(grad_outputs[0]), None, None


def _once(pull_back: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """For a `pull_back` that communicates, which autograd cannot see."""

    def call(grad: Tensor) -> Tensor:
        if torch.is_grad_enabled():
            raise NotImplementedError("second derivatives of what ranks share are not known; leave out create_graph=True.")
        return pull_back(grad)

    return call


def _form(value: object) -> object:
    """What must be the same of a setting on every rank: not the values of weights, nor their number."""
    if isinstance(value, Tensor):
        return (tuple(value.shape[:-1]), value.dtype, value.requires_grad) if value.ndim else value
    return type(value).__name__ if hasattr(value, "__array__") else value


def _digest(z: Tensor) -> str:
    """A hash of shape, type and entries, to the bit."""
    z = z.detach().cpu()
    return hashlib.sha256(f"{tuple(z.shape)}{z.dtype}".encode() + z.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]
