"""What the core asks of whoever shares a problem. One process needs none of it: `ALONE` answers everything with its argument."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor

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
