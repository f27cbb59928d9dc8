"""A Solution in POT's words: its scales and shapes, its objective, the caller's kind of array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..solution.plan import Plan
from ..solution.solution import Solution
from .arrays import take, tensors


@dataclass(frozen=True)
class Answer:
    """`solution`, translated. P = diag(u) exp(-M / reg) diag(v) with u = a exp(f / eps) and v = b exp(g / eps), up to the scale they share.

    unit   what one unit of the problem's cost is in M's: reg where the problem is that of M / reg, otherwise 1.
    many   histograms are a batch in front, (k, n) and (k, m), which POT has behind.
    """

    solution: Solution
    back: Callable[[Tensor], Any]
    unit: Tensor | float = 1.0
    many: bool = False

    def give(self, z: Tensor) -> Any:
        return self.back(z.to(self.solution.problem.given_dtype))

    def plan(self) -> Any:
        return self.give(self.solution.plan.to_dense())

    def lazy_plan(self) -> Any:
        return in_kind(self.solution.plan, self.back)

    def linear(self) -> Tensor:
        """<P, M>, of each histogram; forbidden pairs carry nothing."""
        return self.unit * self.solution.sharp_cost

    def objective(self, entropy: bool) -> Tensor:
        """<P, M> + reg KL(P | a⊗b), or + reg sum P log P, of the plan as it is: eps log(P / a⊗b) is f + g - C, so the marginals know it."""
        s, (rows, columns) = self.solution, self.solution.plan.wide_marginals
        value = carried(rows, s.f) + carried(columns, s.g)
        if entropy:  # sum P log P = sum P log(P / a⊗b) + the same of the weights
            value = value + s.problem.eps * (carried(rows, log_weight(s.problem.a)) + carried(columns, log_weight(s.problem.b)))
        return self.unit * value

    def optimum(self, entropy: bool) -> Tensor:
        """`objective` where it is smallest, from the dual: by grad="envelope" it has the derivatives of the optimum."""
        s, value = self.solution, self.solution.wide_value
        return self.unit * (value + s.problem.eps * _entropy_of(s.problem) if entropy else value)

    def logarithms(self, scale: float = 1.0) -> tuple[Any, Any]:
        """scale * (log u, log v), shaped as POT shapes its scalings: (n,), or (n, k). -inf for an empty atom."""
        u, v = self._logarithms()
        return self.give(scale * u), self.give(scale * v)

    def scalings(self, mass: Tensor | float = 1.0) -> dict[str, Any]:
        """u and v, of the plan divided by `mass`."""
        u, v = self._logarithms()
        return {"u": self.give(u.exp() / mass), "v": self.give(v.exp())}

    def _logarithms(self) -> tuple[Tensor, Tensor]:
        s = self.solution
        pairs = ((s.f, s.problem.a), (s.g, s.problem.b))
        u, v = (torch.where(w > 0, z / s.problem.eps + log_weight(w), -torch.inf) for z, w in pairs)
        return (u.mT, v.mT) if self.many else (u, v)

    def err(self, check_every: int | None = None) -> list[Any]:
        """One number a check: all of them, or those at iterations 0, check_every, 2 check_every, ... as POT counts them."""
        checks = None if check_every is None else self.last_iteration // check_every + 1
        return [self.give(e.amax()) for e in self.solution.errors[:checks]]

    def story(self) -> dict[str, Any]:
        """What POT does not tell: how the loop ended."""
        return {
            "status": self.solution.status,
            "converged": self.back(self.solution.converged),
            "n_iter": self.last_iteration,
            "errors": [self.give(e) for e in self.solution.errors],
        }

    @property
    def last_iteration(self) -> int:
        return self.solution.n_iter - 1  # POT counts from 0


def carried(mass: Tensor, z: Tensor) -> Tensor:
    """Where no mass is, z may be anything."""
    return (mass * torch.where(mass > 0, z, 0.0)).sum(-1)


def log_weight(w: Tensor) -> Tensor:
    """log w, and 0 with derivative 0 at w = 0: an empty atom has no entropy."""
    return torch.where(w > 0, torch.where(w > 0, w, 1.0).log(), 0.0)


def _entropy_of(problem: Problem) -> Tensor:
    """sum a log a + sum b log b, what sum P log P has beyond KL(P | a⊗b)."""
    return (problem.a * log_weight(problem.a)).sum(-1) + (problem.b * log_weight(problem.b)).sum(-1)


def in_kind(plan: Plan, back: Callable[[Tensor], Any]) -> Any:
    """The plan, for callers without tensors as one whose results are in their kind of array."""
    return plan if back is tensors else ConvertedPlan(plan, back)


class ConvertedPlan:
    """A Plan whose results are in the caller's kind of array."""

    ndim = 2

    def __init__(self, plan: Plan, back: Callable[[Tensor], Any]) -> None:
        self._plan, self._back = plan, back
        self.shape, self.dtype = tuple(plan.shape), plan.dtype

    @property
    def T(self) -> ConvertedPlan:
        return ConvertedPlan(self._plan.T, self._back)

    def __getitem__(self, key: Any) -> Any:
        return self._back(self._plan[key])

    def __matmul__(self, v: Any) -> Any:
        (vector,), back = take(v=v)
        return back(self._plan @ torch.as_tensor(v if vector is None else vector).to(self._plan.dtype))

    def to_dense(self) -> Any:
        return self._back(self._plan.to_dense())

    def sum(self, axis: int | None = None) -> Any:
        return self._back(self._plan.sum(axis))

    def diagonal(self) -> Any:
        return self._back(self._plan.diagonal())

    def sample(self, k: int, generator: torch.Generator | None = None) -> tuple[Any, Any]:
        rows, columns = self._plan.sample(k, generator)
        return self._back(rows), self._back(columns)

    def sample_columns(self, rows: Any = None, generator: torch.Generator | None = None) -> Any:
        (given,), _ = take(rows=rows)
        return self._back(self._plan.sample_columns(None if given is None else given.long(), generator))

    def __repr__(self) -> str:
        return repr(self._plan)
