"""The machines: each binds a problem's cost to hardware as a Geometry."""

from __future__ import annotations

from .. import errors
from ..geometry import Geometry
from ..problem import Problem
from .dense import Absorbed, Dense

#: "dense" runs the absorbed form; "softmin" is the same algorithm as it is written in papers, the truth in tests.
BACKENDS = {"dense": Absorbed, "softmin": Dense}


def bind(problem: Problem, backend: str = "auto") -> Geometry:
    """The problem's cost as a Geometry. Raises ProblemError for a backend that does not exist."""
    if backend == "auto":
        backend = "dense"
    if backend not in BACKENDS:
        raise errors.unknown("backend", backend, ["auto", *BACKENDS])
    return BACKENDS[backend](problem.cost.dense())
