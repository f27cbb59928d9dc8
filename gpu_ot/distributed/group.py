"""The collectives of a torch.distributed group."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import errors
from .failure import Failures

T = TypeVar("T")


@dataclass(frozen=True)
class _Refusal:
    """What a rank that has raised sends in place of an answer."""

    text: str


class Group:
    """A process group or one-dimensional DeviceMesh; None is the default group, or this process alone where there is none.

    Every method is called by all ranks, in the same order. Sums are taken by one rank for each entry, in the order of the ranks, and then
    gathered: the same to the bit on every rank and in every run, at the traffic of an all-reduce.
    """

    def __init__(self, group: Any = None) -> None:
        if hasattr(group, "mesh_dim_names"):  # a DeviceMesh
            if group.ndim != 1:
                raise errors.ProblemError(
                    f"group is a DeviceMesh of {group.ndim} dimensions; points are shared along one: pass mesh[name]."
                )
            group = group.get_group()
        self.process_group = group
        exists = group is not None or (dist.is_available() and dist.is_initialized())
        self.size = dist.get_world_size(group) if exists else 1
        self.rank = dist.get_rank(group) if exists else 0
        if self.rank < 0:
            raise errors.ProblemError("this process is no member of the group that shares the problem.")
        self.failures = Failures(self.rank, self.size, self._global(0))

    # Objects: sizes, settings, refusals.

    def exchange(self, value: Any) -> list[Any]:
        """Every rank's value, in their order. RankRefused on all ranks if one sends a refusal."""
        if self.size == 1:
            return [value]
        values: list[Any] = [None] * self.size
        with self.failures.guard("an exchange of settings"):
            dist.all_gather_object(values, value, group=self.process_group)
        refusals = [(rank, one.text) for rank, one in enumerate(values) if isinstance(one, _Refusal)]
        if refusals:
            raise errors.rank_refused(refusals, self.size)
        return values

    def agree(self, settings: dict[str, Any]) -> None:
        """Raises ProblemError on every rank if one has other settings, by their repr, than the first."""
        seen = self.exchange({name: repr(value) for name, value in settings.items()})
        for name, rank in itertools.product(seen[0], range(1, self.size)):
            if seen[rank].get(name) != seen[0][name]:
                raise errors.ranks_differ(name, 0, seen[0][name], rank, seen[rank].get(name, "nothing"))

    def on_every_rank(self, work: Callable[[], T], settings: dict[str, Any]) -> T:
        """`work()`, or ProblemError on every rank if it raises on one or the settings differ.

        `work` may communicate by `exchange` alone: a rank that has raised sends its refusal there, whichever exchange the others are at.
        """
        try:
            self.agree(settings)
            result = work()
        except (errors.RankRefused, errors.RanksDiffer, errors.RankFailed):
            raise
        except Exception as error:
            if self.size == 1:
                raise
            try:
                self.exchange(_Refusal(f"{error}" if isinstance(error, errors.ProblemError) else f"{type(error).__name__}: {error}"))
            except errors.RankRefused as refused:
                if refused.unanimous:  # no rank's own fault: the error as it is
                    raise error from None
                raise refused from error
            raise
        self.exchange(None)
        return result

    # Tensors.

    def gather(self, z: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """The ranks' z, of `sizes` along `dim`, one after the other. Each sends its own, padded to the largest, to all others."""
        if self.size == 1:
            return z
        z, top = z.movedim(dim, 0).contiguous(), max(sizes)
        if len(z) < top:
            z = torch.cat((z, z.new_zeros(top - len(z), *z.shape[1:])))
        out = z.new_empty(self.size * top, *z.shape[1:])
        all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor  # the new name and the old
        with self.failures.guard("an all-gather"):
            all_gather(out, z, group=self.process_group)
        if min(sizes) < top:
            out = torch.cat([out[rank * top : rank * top + size] for rank, size in enumerate(sizes)])
        return out.movedim(0, dim)

    def scatter(self, z: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """(ranks, *): the part of each rank's z, of `sizes` along `dim`, that is for this rank."""
        if self.size == 1:
            return z.unsqueeze(0)
        z, own = z.movedim(dim, 0).contiguous(), sizes[self.rank]
        out = z.new_empty(self.size * own, *z.shape[1:])
        with self.failures.guard("an all-to-all"):
            dist.all_to_all_single(out, z, [own] * self.size, list(sizes), group=self.process_group)
        return out.view(self.size, own, *z.shape[1:]).movedim(1, dim)

    def reduce(self, z: Tensor, how: Callable[[Tensor], Tensor], dim: int = -1) -> Tensor:
        """The ranks' z, all of one shape, reduced by `how` over a new first axis; on every rank."""
        if self.size == 1:
            return z
        sizes = even_sizes(z.shape[dim], self.size)
        return self.gather(how(self.scatter(z, sizes, dim)), sizes, dim)

    def sum(self, z: Tensor, dim: int = -1) -> Tensor:
        """The sum of the ranks' z, on every rank."""
        return self.reduce(z, lambda parts: parts.sum(0), dim) if z.ndim else self.sum(z.unsqueeze(0)).squeeze(0)

    def broadcast(self, z: Tensor) -> Tensor:
        """The first rank's z."""
        if self.size == 1:
            return z
        z = z.contiguous()
        with self.failures.guard("a broadcast"):
            dist.broadcast(z, self._global(0), group=self.process_group)
        return z

    def ring(self, own: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, its tensors), (*batch, size, c) each, for every rank in turn, this one first.

        Shards travel from rank to rank: while one is worked on, the next is on its way. Must be run to its end. Each rank sends all shards
        but its successor's.
        """
        held = [z.contiguous() for z in own]
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            coming: list[Tensor] = []
            handles: list[Any] = []
            if step + 1 < self.size:
                coming, handles = self.pass_on(held, sizes[(owner - 1) % self.size], tag=0)
            yield owner, held
            self.wait(handles)
            held = coming

    def pass_on(self, held: Sequence[Tensor], size: int, tag: int) -> tuple[list[Tensor], list[Any]]:
        """Sends `held` to the next rank and receives as many tensors, with `size` rows each, from the one before; nothing for no rows.
        The tensors that come, and the handles to wait for."""
        coming = [z.new_empty(*z.shape[:-2], size, z.shape[-1]) for z in held]
        after, before = (self._global((self.rank + step) % self.size) for step in (1, -1))
        moves = [dist.P2POp(dist.isend, z, after, self.process_group, tag) for z in held if z.numel()]
        moves += [dist.P2POp(dist.irecv, z, before, self.process_group, tag) for z in coming if z.numel()]
        with self.failures.guard("a ring"):
            return coming, dist.batch_isend_irecv(moves) if moves else []

    def wait(self, handles: Sequence[Any]) -> None:
        with self.failures.guard("a ring"):
            for handle in handles:
                handle.wait()

    def _global(self, rank: int) -> int:
        """The rank in the default group, by which torch addresses it."""
        return rank if self.process_group is None else dist.get_global_rank(self.process_group, rank)


def even_sizes(size: int, count: int) -> list[int]:
    """`size` in `count` parts that differ by one at most."""
    return [size // count + (part < size % count) for part in range(count)]
