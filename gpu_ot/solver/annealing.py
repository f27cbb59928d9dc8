"""Which eps the loop uses when."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Constant:
    """The target from the first iteration on."""

    target: float

    def approach(self) -> Iterator[float]:
        """The values of eps, one iteration each, before the loop settles on `target`."""
        return iter(())


@dataclass(frozen=True)
class Anneal:
    """From `start`, of the order of the largest cost, down to `target` by `factor` an iteration.

    Large eps moves mass far in few iterations, small eps sharpens it: Schmitzer 2019, arXiv:1610.06519, section 3.2.
    """

    start: float
    target: float
    factor: float = 0.5

    def approach(self) -> Iterator[float]:
        eps = self.start
        while eps > self.target:
            yield eps
            eps *= self.factor
