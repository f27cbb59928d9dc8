"""Who shares a problem: one process, or the ranks of a torch.distributed group.

What has one number for each point of the whole problem (weights, potentials, marginals) is whole on every rank, the same to the bit, so
that the loop decides the same everywhere. What has a row for each point (points, their gradients, images, products with the plan) is
shared: a rank holds the rows of its own points, and the whole is the ranks' shares in their order.

A derivative of something whole is whole as well: each rank holds all of it, and the ranks' losses are one loss, not a sum of several.
So gathering shares is differentiated by taking one's own share, and taking one's share by gathering.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import os
import socket
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from .. import errors
from ..communicator import Alone

T = TypeVar("T")

#: Seconds that a rank which has lost its connection looks for the one that ended.
GRACE = 3.0


@dataclass(frozen=True)
class _Refusal:
    """What a rank tells in place of an answer: it has raised."""

    text: str


class Ranks:
    """The collectives of one process group; None is the default group, or this process alone where there is none.

    Sums over ranks are taken by one rank for each entry, in the order of the ranks, and then handed out: the same to the bit on all of
    them and in every run, at the traffic of an all-reduce.
    """

    def __init__(self, group: Any = None) -> None:
        if hasattr(group, "mesh_dim_names"):  # a DeviceMesh
            if group.ndim != 1:
                raise errors.ProblemError(
                    f"group is a DeviceMesh of {group.ndim} dimensions; points are shared along one: pass mesh[name]."
                )
            group = group.get_group()
        self.group = group
        there = group is not None or (dist.is_available() and dist.is_initialized())
        self.size = dist.get_world_size(group) if there else 1
        self.rank = dist.get_rank(group) if there else 0
        if self.rank < 0:
            raise errors.ProblemError("this process is no member of the group that shares the problem.")
        self.peers: list[tuple[str, int]] = []

    # What ranks tell each other as objects: sizes, settings, refusals.

    def exchange(self, told: Any) -> list[Any]:
        """What every rank tells, in their order. Where one tells of a refusal, RankRefused on all."""
        if self.size == 1:
            return [told]
        found: list[Any] = [None] * self.size
        with self.guarded("an exchange of settings"):
            dist.all_gather_object(found, told, group=self.group)
        refusals = [(rank, one.text) for rank, one in enumerate(found) if isinstance(one, _Refusal)]
        if refusals:
            raise errors.rank_refused(refusals, self.size)
        return found

    def agree(self, settings: dict[str, Any]) -> None:
        """Raises ProblemError on every rank where one has another value, by its repr, under some name than the first."""
        told = self.exchange({name: repr(value) for name, value in settings.items()})
        for name, rank in itertools.product(told[0], range(1, self.size)):
            if told[rank].get(name) != told[0][name]:
                raise errors.ranks_differ(name, 0, told[0][name], rank, told[rank].get(name, "nothing"))

    def together(self, work: Callable[[], T], settings: dict[str, Any]) -> T:
        """`work` on every rank, with the same settings, or ProblemError on every rank. All that ranks send in it are exchanges, so that the
        word of a rank that has failed is met by the next exchange of the others."""
        try:
            self.agree(settings)
            result = work()
        except (errors.RankRefused, errors.RanksDiffer, errors.RankFailed):
            raise
        except Exception as found:
            if self.size == 1:
                raise
            try:
                self.exchange(_Refusal(f"{found}" if isinstance(found, errors.ProblemError) else f"{type(found).__name__}: {found}"))
            except errors.RankRefused as refused:
                if refused.unanimous:  # no rank's own fault: the error as it is
                    raise found from None
                raise refused from found
            raise
        self.exchange(None)
        return result

    def meet(self) -> None:
        """Learns which process is which rank, so that one that ends can be named."""
        self.peers = self.exchange((socket.gethostname(), os.getpid()))

    # Tensors. Every one of these is called by all ranks, in the same order.

    def gather(self, z: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """The ranks' z, of `sizes` along `dim`, one after the other. Each sends its own, padded to the largest, to all others."""
        if self.size == 1:
            return z
        z, top = z.movedim(dim, 0).contiguous(), max(sizes)
        if len(z) < top:
            z = torch.cat((z, z.new_zeros(top - len(z), *z.shape[1:])))
        out = z.new_empty(self.size * top, *z.shape[1:])
        with self.guarded("an all-gather"):
            _all_gather(out, z, self.group)
        if min(sizes) < top:
            out = torch.cat([out[rank * top : rank * top + size] for rank, size in enumerate(sizes)])
        return out.movedim(0, dim)

    def scatter(self, z: Tensor, sizes: Sequence[int], dim: int = -1) -> Tensor:
        """(ranks, *): what each rank's z holds for this one, of `sizes` along `dim`. Each sends the others their parts."""
        if self.size == 1:
            return z.unsqueeze(0)
        z, own = z.movedim(dim, 0).contiguous(), sizes[self.rank]
        out = z.new_empty(self.size * own, *z.shape[1:])
        with self.guarded("an all-to-all"):
            dist.all_to_all_single(out, z, [own] * self.size, list(sizes), group=self.group)
        return out.view(self.size, own, *z.shape[1:]).movedim(1, dim)

    def joined(self, z: Tensor, how: Callable[[Tensor], Tensor], dim: int = -1) -> Tensor:
        """The ranks' z, all of one shape, reduced by `how` over a new first axis; whole on every rank."""
        if self.size == 1:
            return z
        sizes = even(z.shape[dim], self.size)
        return self.gather(how(self.scatter(z, sizes, dim)), sizes, dim)

    def total(self, z: Tensor, dim: int = -1) -> Tensor:
        """The sum of the ranks' z, whole on every rank."""
        return self.joined(z, lambda parts: parts.sum(0), dim) if z.ndim else self.total(z.unsqueeze(0)).squeeze(0)

    def common(self, z: Tensor) -> Tensor:
        """The first rank's z on all."""
        if self.size == 1:
            return z
        z = z.contiguous()
        with self.guarded("a broadcast"):
            dist.broadcast(z, self.member(0), group=self.group)
        return z

    def round(self, own: Sequence[Tensor], sizes: Sequence[int]) -> Iterator[tuple[int, list[Tensor]]]:
        """(owner, its tensors) of every rank in turn, (*batch, size, c) each, this one's first: whole shares travel from rank to rank, and
        while one is worked on the next is on its way. To be taken to its end. Each rank sends all shares but its successor's."""
        held = [z.contiguous() for z in own]
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            coming: list[Tensor] = []
            on_its_way: list[Any] = []
            if step + 1 < self.size:
                size = sizes[(owner - 1) % self.size]
                coming = [z.new_empty(*z.shape[:-2], size, z.shape[-1]) for z in held]
                on_its_way = self.send_on(held, coming, tag=0)
            yield owner, held
            self.arrived(on_its_way)
            held = coming

    def send_on(self, held: Sequence[Tensor], coming: Sequence[Tensor], tag: int) -> list[Any]:
        """Sends `held` to the next rank and `coming` for from the one before; what is empty does not travel. Handles to wait for."""
        after, before = (self.member((self.rank + step) % self.size) for step in (1, -1))
        moves = [dist.P2POp(dist.isend, z, after, self.group, tag) for z in held if z.numel()]
        moves += [dist.P2POp(dist.irecv, z, before, self.group, tag) for z in coming if z.numel()]
        with self.guarded("a ring"):
            return dist.batch_isend_irecv(moves) if moves else []

    def arrived(self, on_its_way: Sequence[Any]) -> None:
        with self.guarded("a ring"):
            for one in on_its_way:
                one.wait()

    def member(self, rank: int) -> int:
        """The rank in the default group, by which torch addresses it."""
        return rank if self.group is None else dist.get_global_rank(self.group, rank)

    # Ranks that end.

    @contextlib.contextmanager
    def guarded(self, doing: str) -> Iterator[None]:
        """RankFailed, with the rank and the cause where they can be known, in place of what the transport says."""
        try:
            yield
        except RuntimeError as found:
            raise self._failed(doing, found) from found

    @contextlib.contextmanager
    def watch(self) -> Iterator[None]:
        """Whoever raises in here leaves word for the others, who then wait for it in vain."""
        try:
            yield
        except (errors.RankFailed, errors.RankRefused, errors.RanksDiffer):  # the others know
            raise
        except BaseException as found:
            self._leave_word(f"rank {self.rank} raised {type(found).__name__}: {found}".removesuffix(": "))
            raise

    def forget(self) -> None:
        """Word of an earlier failure is no word of the next. To be followed by an exchange."""
        if self.size > 1 and self.rank == 0 and (store := _store()) is not None:
            with contextlib.suppress(Exception):
                store.delete_key(self._key)

    def _failed(self, doing: str, found: RuntimeError) -> errors.RankFailed:
        cause, until = self._word(), time.monotonic() + GRACE
        while cause is None and time.monotonic() < until:
            # A connection closes a moment before its process has ended, and before whoever noticed first has said so.
            if ended := [f"rank {rank} (process {pid}) {how}" for rank, (host, pid) in enumerate(self.peers) if (how := _ended(host, pid))]:
                cause = self._leave_word(" and ".join(ended))
            else:
                time.sleep(0.05)
                cause = self._word()
        said = str(found).strip().split("\n")[0]
        return errors.rank_failed(self.rank, self.size, doing, cause, said)

    @property
    def _key(self) -> str:
        return f"gpu_ot/failure/{'' if self.group is None else self.member(0)}/{self.size}"

    def _word(self) -> str | None:
        """What the first rank to fail, or to notice, has said."""
        with contextlib.suppress(Exception):
            store = _store()
            if store is not None and store.check([self._key]):
                return store.get(self._key).decode() or None
        return None

    def _leave_word(self, text: str) -> str:
        """Says so, unless another was first; whose word it is now."""
        with contextlib.suppress(Exception):
            store = _store()
            if store is not None:
                return store.compare_set(self._key, "", text).decode()
        return text


class Shares(Alone):
    """The points of a problem, `sizes[side][rank]` of them on each rank; None for a side that every rank holds whole."""

    def __init__(self, ranks: Ranks, sizes: tuple[list[int] | None, list[int] | None]) -> None:
        self.ranks, self.sizes = ranks, sizes
        self.leads = ranks.rank == 0

    def slice(self, side: int, rank: int | None = None) -> slice:
        """Where a rank's points, or this one's, stand among all."""
        sizes = self.sizes[side]
        if sizes is None:
            return slice(None)
        rank = self.ranks.rank if rank is None else rank
        start = sum(sizes[:rank])
        return slice(start, start + sizes[rank])

    def together(self, work: Callable[[], T], **settings: object) -> T:
        return self.ranks.together(work, settings)

    def agree(self, **settings: object) -> None:
        self.ranks.forget()
        self.ranks.agree({name: digest(value) if isinstance(value, Tensor) else value for name, value in settings.items()})

    def watch(self) -> contextlib.AbstractContextManager[None]:
        return self.ranks.watch()

    def weights(self, name: str, side: int, w: Tensor) -> Tensor:
        """From each rank's share, or the same whole on every rank."""
        sizes, ranks, seen = self.sizes[side], self.ranks, w.detach()
        bad = [int(count) for count in (seen.isnan().sum(), (seen < 0).sum(), seen.isinf().sum())]
        if any(bad):
            raise errors.bad_weights(name, *bad)
        if sizes is not None and (w.ndim == 0 or w.shape[-1] not in (sizes[ranks.rank], sum(sizes))):
            raise errors.wrong_shape(name, w.shape, f"(*batch, {sizes[ranks.rank]}), a weight for each point of this rank")
        told = ranks.exchange((tuple(w.shape), digest(w)))
        if sizes is not None and [shape[-1] for shape, _ in told] == sizes:
            parts = ranks.exchange(seen.cpu())
            return _Whole.apply(w, torch.cat(parts, -1).to(w.device), self.slice(side), -1)
        if odd := [rank for rank, one in enumerate(told) if one != told[0]]:
            raise errors.ranks_differ(name, 0, "these weights", odd[0], "others, neither those of its share nor the same")
        return w

    def whole(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        sizes = self.sizes[side]
        if sizes is None:
            return z
        own = sizes[self.ranks.rank]
        if z.ndim < -dim or z.shape[dim] != own:
            raise errors.wrong_shape("what is gathered", z.shape, f"{own} along axis {dim}, one for each of this rank's points")
        return _Whole.apply(z, self.ranks.gather(z.detach(), sizes, dim), self.slice(side), dim)

    def share(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        sizes = self.sizes[side]
        return z if sizes is None else _Share.apply(z, self.ranks, sizes, self.slice(side), dim)

    def own(self, index: Tensor, side: int) -> Tensor:
        mine = self.slice(side)
        if index.ndim > 1:
            raise errors.ProblemError("pairs of a batch are not drawn where ranks share the points: solve its problems one by one.")
        return index if mine.start is None else index[(index >= mine.start) & (index < mine.stop)]

    def common(self, z: Tensor) -> Tensor:
        return self.ranks.common(z)

    def total(self, z: Tensor) -> Tensor:
        return _Total.apply(z, self.ranks)

    def apart(self, z: Tensor) -> Tensor:
        return _Apart.apply(z, self.ranks)


class _Whole(torch.autograd.Function):
    """(shares, gathered) -> gathered."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, gathered: Tensor, where: slice, dim: int) -> Tensor:
        ctx.where, ctx.dim = where, dim
        return gathered.clone() if gathered is own else gathered

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        where = ctx.where
        return grad_outputs[0].narrow(ctx.dim, where.start, where.stop - where.start), None, None, None


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, ranks: Ranks, sizes: list[int], where: slice, dim: int) -> Tensor:
        ctx.ranks, ctx.sizes, ctx.dim = ranks, sizes, dim
        return z.narrow(dim, where.start, where.stop - where.start).clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _once_only()
        return ctx.ranks.gather(grad_outputs[0], ctx.sizes, ctx.dim), None, None, None, None


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, ranks: Ranks) -> Tensor:
        return ranks.total(z).clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return grad_outputs[0], None


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, z: Tensor, ranks: Ranks) -> Tensor:
        ctx.ranks = ranks
        return z.view_as(z)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        _once_only()
        grad = grad_outputs[0]
        return ctx.ranks.total(grad, -2 if grad.ndim > 1 else -1), None


def _once_only() -> None:
    if torch.is_grad_enabled():
        raise NotImplementedError("second derivatives of what ranks share are not known; leave out create_graph=True.")


def even(size: int, count: int) -> list[int]:
    """`size` in `count` parts that differ by one at most."""
    return [size // count + (part < size % count) for part in range(count)]


def digest(z: Tensor) -> str:
    """A number of the entries and the type of z, to the bit."""
    z = z.detach().cpu()
    return hashlib.sha256(f"{tuple(z.shape)}{z.dtype}".encode() + z.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16]


def _all_gather(out: Tensor, z: Tensor, group: Any) -> None:
    (getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor)(out, z, group=group)  # the new name and the old


def _store() -> Any:
    """The key-value store that the group met by, or None."""
    try:
        return dist.distributed_c10d._get_default_store()
    except (AttributeError, ValueError, RuntimeError):
        return None


def _ended(host: str, pid: int) -> str | None:
    """How a process of this host is no longer there, or None. Of another host's nothing is known."""
    if host != socket.gethostname() or pid == os.getpid():
        return None
    try:
        os.kill(pid, 0)
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except ProcessLookupError:
        return "has ended"
    except OSError:  # no /proc here, or another user's
        return None
    return {"Z": "has ended", "X": "has ended", "T": "is stopped"}.get(state)
