"""Solves inside torch.func: on the numbers that its tensors stand for, with derivatives to the tensors themselves."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from .. import transforms
from ..geometry.protocol import Geometry, attach
from ..problem import Problem

T = TypeVar("T")


def outside(problem: Problem, work: Callable[[Problem], tuple[Geometry, T]]) -> tuple[Geometry, T]:
    """`work(problem)`: a geometry and what was found on it. Within a transform of torch.func it is done on the numbers inside, and the
    geometry comes back with derivatives to the problem's own tensors."""
    if not transforms.active():
        return work(problem)
    geometry, found = transforms.outside(lambda: work(problem.unwrapped()), problem.a)
    cost = problem.cost
    if not transforms.requires_grad(*cost.inputs.values()):
        return geometry, found
    folded = cost.fold() if len(geometry.inputs) == 4 else None
    inputs = [cost.dense()] if geometry.stored and len(geometry.inputs) == 1 else cost.inputs.values() if folded is None else folded
    return attach(geometry, [z.to(old.dtype).expand(old.shape) for z, old in zip(inputs, geometry.inputs, strict=True)]), found
