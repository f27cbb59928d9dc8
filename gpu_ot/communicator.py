"""The communicator: how the core addresses the ranks that share a problem. `ALONE` is that of a single process, which holds everything.

A vector with one entry for each point of the whole problem (weights, potentials, marginals) is replicated: every rank holds all of it, the
same to the bit. A matrix with a row for each point (points, their gradients, products with the plan) is sharded: a rank holds its own rows.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
P = TypeVar("P")

#: Rows and columns, the sides of a problem.
ROWS, COLUMNS = 0, 1


def localize(cost: Any, a: Any, b: Any) -> tuple[Any, Any, Any]:
    """A problem's cost and weights, with this rank's shards in the place of DTensors once `gpu_ot.distributed` has replaced this
    function by its own."""
    return cost, a, b


class Alone:
    """The communicator of one process. `gpu_ot.distributed.communicator.Shards` is that of several."""

    rank: int = 0

    # Ranks agree, or fail together.

    def on_every_rank(self, work: Callable[[], T], **settings: object) -> T:
        """`work()`. If it raises on some rank, or the settings differ, ProblemError on every rank."""
        return work()

    def agree(self, **settings: object) -> None:
        """Raises ProblemError on every rank if the settings differ."""

    def report_failure(self) -> contextlib.AbstractContextManager[None]:
        """On an error in its body, tells the other ranks, so that they raise RankFailed with its cause."""
        return contextlib.nullcontext()

    def check_points(self, cost: Any) -> None:
        """After a loop that diverged: raises ProblemError on every rank if the points of one are no longer finite."""

    # Tensors. `dim` is the axis of the points.

    def gather(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        """All ranks' shards, one after the other. Backward takes this rank's shard of the gradient."""
        return z

    def gather_weights(self, name: str, side: int, w: Tensor) -> Tensor:
        """The weights of all points of a side, from shards or from the same vector on every rank."""
        return w

    def shard(self, z: Tensor, side: int, dim: int = -1) -> Tensor:
        """This rank's shard of a replicated z. Backward gathers."""
        return z

    def local_indices(self, index: Tensor, side: int) -> Tensor:
        """Those of the indices (k,) of points that are this rank's."""
        return index

    def broadcast(self, z: Tensor) -> Tensor:
        """The first rank's z."""
        return z

    def sum(self, z: Tensor) -> Tensor:
        """The sum of the ranks' z, the same to the bit on all of them. Backward passes the gradient on."""
        return z

    def replicate(self, z: Tensor) -> Tensor:
        """A replicated z, as input of work that the ranks divide. Backward sums their gradients."""
        return z

    # Costs and geometries.

    def local_rows(self, cost: T) -> T:
        """The cost between this rank's rows and all columns, differentiable."""
        return cost

    def largest(self, problem: T) -> T:
        """A problem like the largest piece that a rank binds: by it, all ranks choose the same backend."""
        return problem

    def bind(self, problem: P, bind_piece: Callable[[P], T]) -> T:
        """The geometry of the problem, whose pieces `bind_piece` binds."""
        return bind_piece(problem)


ALONE = Alone()
