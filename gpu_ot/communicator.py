"""What the core asks of whoever shares a problem. One process needs none of it: `ALONE` answers everything with its argument."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

from . import errors

T = TypeVar("T")

#: Rows and columns, the sides of a problem.
ROWS, COLUMNS = 0, 1


class Alone:
    """One process holds the problem: nothing to gather, share or agree about."""

    leads: bool = True

    def together(self, work: Callable[[], T], **settings: object) -> T:
        """What `work` returns; where it fails on one rank, or the ranks have other settings, ProblemError on all of them."""
        return work()

    def agree(self, **settings: object) -> None:
        """Raises ProblemError on every rank where the ranks have other settings."""

    def watch(self) -> contextlib.AbstractContextManager[None]:
        """Around work that the ranks do in step: whoever fails leaves word for the others."""
        return contextlib.nullcontext()

    def weights(self, name: str, side: int, w: Tensor) -> Tensor:
        """The weights of all points of a side, as whoever asks passes them."""
        return w

    def whole(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        """All points' entries along `dim` from this rank's; differentiable."""
        return z

    def share(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        """This rank's entries along `dim` from all points'; differentiable."""
        return z

    def own(self, index: Tensor, side: int) -> Tensor:
        """Those of the indices (k,) that are this rank's points."""
        return index

    def common(self, z: Tensor) -> Tensor:
        """The first rank's z."""
        return z

    def total(self, z: Tensor) -> Tensor:
        """The sum of the ranks' z, the same to the bit on all of them; differentiable."""
        return z

    def apart(self, z: Tensor) -> Tensor:
        """A whole z for work of which each rank does its part: z, whose derivative is the sum of the ranks'."""
        return z


ALONE = Alone()

#: What makes a cost of DTensors one that ranks share; distributed/costs.py, which knows ranks, puts it here.
SHARE: list[Callable[[Any], Any]] = []


def shared(cost: Any) -> Any:
    """The cost, shared where its inputs are DTensors."""
    return SHARE[0](cost) if SHARE and any(is_dtensor(z) for z in cost.inputs.values()) else cost


def is_dtensor(z: object) -> bool:
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(z, module.DTensor)


def local(name: str, z: Any, dim: int = -2) -> Tensor:
    """This rank's share of a DTensor that is sharded along `dim`; any other tensor as it is."""
    if not is_dtensor(z):
        return z
    placement = z.placements[0]
    if len(z.placements) != 1 or not placement.is_shard() or placement.dim % z.ndim != dim % z.ndim:
        raise errors.ProblemError(
            f"{name} is a DTensor placed as {z.placements}, and points are shared one dimension of a mesh along axis {dim % z.ndim}: "
            f"redistribute it to (Shard({dim % z.ndim}),)."
        )
    return z.to_local()


def form(w: Tensor | None) -> tuple[Any, ...]:
    """What must be the same of the weights on all ranks."""
    return (tuple(w.shape[:-1]), w.dtype, w.requires_grad) if isinstance(w, Tensor) else (type(w).__name__,)
