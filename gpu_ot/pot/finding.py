"""POT's plain iterations on our loop: in its order, looked at when it looks, and accelerated only where it would have given up."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ..geometry.protocol import weigh
from ..geometry.select import bind
from ..gradients import operators as gradients
from ..problem import Problem
from ..solution.solution import Solution
from ..solve import Scaled, needs_gradient, solve
from ..solver.annealing import Anneal, Constant
from ..solver.loop import Outcome, Stop, iterate
from ..solver.status import MAX_ITER
from .clouds import transposed


def find(
    problem: Problem,
    *,
    criterion: Stop,
    start: Scaled,
    order: str = "rows",
    max_iter: int = 1000,
    check_every: int = 10,
    accelerate: str = "none",
    after: int = 0,
    schedule: Constant | Anneal | None = None,
    on_check: Callable[[int, Tensor], None] | None = None,
    grad: str = "envelope",
) -> Solution:
    """The Solution of `problem`, whose rows, or by order="columns" whose columns, the last half-iteration made exact.

    start       of the side that is exact: f + eps log a, or g + eps log b.
    accelerate  from iteration `after` on, rounded up to a check.
    """
    grad = grad if needs_gradient(problem) else "envelope"
    if order == "columns":
        turned = solve(
            transposed(problem), start=start, max_iter=max_iter, check_every=check_every, accelerate=accelerate, grad=grad,
            tol=criterion.tol, norm=criterion.norm, on_check=on_check,
        )  # fmt: skip
        return replace(turned, problem=problem, geometry=turned.geometry.T, f=turned.g, g=turned.f)
    geometry, asked = bind(problem), torch.is_grad_enabled()

    def run(schedule: Constant | Anneal, start: Tensor, done: int, accelerate: str, until: int = max_iter) -> Outcome:
        def tell(n_iter: int, error: Tensor) -> None:
            if on_check is not None:
                on_check(done + n_iter, error)

        return iterate(geometry, problem, schedule, start, criterion, until - done, check_every, tell, accelerate)

    with torch.no_grad():
        plain = max_iter if accelerate == "none" else min(max_iter, check_every * math.ceil(after / check_every))
        first = run(schedule or Constant(problem.eps), start.rows, 0, "none" if plain else accelerate, plain or max_iter)
        if plain and first.status is MAX_ITER and first.n_iter < max_iter:
            if check_every > 1:  # the last check was one between POT's
                first.errors.pop()
            again = weigh(first.f, problem.a, problem.eps)
            first = first.then(run(Constant(problem.eps), again, first.n_iter, accelerate))
    f, g = gradients.unroll(problem, geometry, start.rows, first.n_iter) if grad == "unroll" else (first.f, first.g)

    def value() -> Tensor:
        with torch.set_grad_enabled(asked):
            return gradients.value(problem, geometry, f, g).to(problem.given_dtype)

    return Solution(problem, geometry, value, f, g, first.status, first.converged, first.n_iter, first.n_passes, torch.stack(first.errors))
