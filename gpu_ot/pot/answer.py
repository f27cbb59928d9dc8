"""A Solution in POT's conventions: its scales, shapes and objective, in the caller's kind of array."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from .. import gradients
from ..geometry.protocol import weigh
from ..solution.plan import Plan
from ..solution.solution import Solution
from .arrays import take, tensors


@dataclass(frozen=True)
class Answer:
    """A balanced `solution`. P = diag(u) exp(-M / reg) diag(v), u = a exp(f / eps), v = b exp(g / eps), up to the scale they share.

    unit     one unit of the problem's cost in units of M: reg if the problem is that of M / reg, otherwise 1.
    many     several histograms: batches (k, n) and (k, m) here, (n, k) and (m, k) in POT.
    entropy  the objective has reg sum P log P in place of reg KL(P | a⊗b).
    """

    solution: Solution
    back: Callable[[Tensor], Any]
    unit: Tensor | float = 1.0
    many: bool = False
    entropy: bool = False

    def give(self, z: Tensor) -> Any:
        return self.back(z.to(self.solution.problem.given_dtype))

    @property
    def unresolved(self) -> bool:
        """Whether eps is too small for the potentials, so that exponents made of both mean nothing."""
        return self.solution.status.name == "unresolved"

    @cached_property
    def P(self) -> Tensor:
        """(*batch, n, m). Its rows are exact even where eps is not resolved."""
        s = self.solution
        if not self.unresolved:
            return s.plan.to_dense()
        C = s.problem.cost.dense().to(s.g.dtype)
        return s.problem.a.unsqueeze(-1) * ((weigh(s.g, s.problem.b, s.problem.eps).unsqueeze(-2) - C) / s.problem.eps).softmax(-1)

    def plan(self) -> Any:
        return self.give(self.P)

    def lazy_plan(self) -> Any:
        return self.solution.plan if self.back is tensors else ConvertedPlan(self.solution.plan, self.back)

    def linear(self) -> Tensor:
        """<P, M> of each histogram; forbidden pairs carry nothing."""
        linear = gradients.inner(self.P, self.solution.problem.cost.dense()) if self.unresolved else self.solution.sharp_cost
        return self.unit * linear

    def objective(self) -> Tensor:
        """<P, M> + reg KL(P | a⊗b), or + reg sum P log P, of the plan at hand.

        eps log(P / a⊗b) = f + g - C, so both are sums over the marginals.
        """
        s, (rows, columns) = self.solution, self.solution.plan.wide_marginals
        value = carried(rows, s.f) + carried(columns, s.g)
        return self.unit * (value + self._entropy_of_weights(rows, columns) if self.entropy else value)

    def optimum(self) -> Tensor:
        """The smallest `objective`, from the dual: with grad="envelope" its derivatives are those of the optimum."""
        s, value = self.solution, self.solution.wide_value
        return self.unit * (value + self._entropy_of_weights(s.problem.a, s.problem.b) if self.entropy else value)

    def _entropy_of_weights(self, rows: Tensor, columns: Tensor) -> Tensor:
        """eps sum P log(a⊗b), the difference between the two regularisers, of a plan with these marginals."""
        problem = self.solution.problem
        return problem.eps * ((rows * log_weight(problem.a)).sum(-1) + (columns * log_weight(problem.b)).sum(-1))

    def log_scalings(self) -> tuple[Tensor, Tensor]:
        """(log u, log v), (*batch, n) and (*batch, m). -inf for an empty atom."""
        s = self.solution
        pairs = ((s.f, s.problem.a), (s.g, s.problem.b))
        u, v = (torch.where(w > 0, z / s.problem.eps + log_weight(w), -torch.inf) for z, w in pairs)
        return u, v

    def logarithms(self, scale: float = 1.0) -> tuple[Any, Any]:
        """scale * (log u, log v) in POT's shapes: (n,) and (m,), or (n, k) and (m, k)."""
        u, v = (self.give(scale * (z.mT if self.many else z)) for z in self.log_scalings())
        return u, v

    def scalings(self, mass: Tensor | float = 1.0) -> dict[str, Any]:
        """u and v in POT's shapes, of the plan divided by `mass`."""
        u, v = (z.mT.exp() if self.many else z.exp() for z in self.log_scalings())
        return {"u": self.give(u / mass), "v": self.give(v)}

    def err(self, check_every: int | None = None) -> list[Any]:
        """One error a check: all of them, or those that POT makes, at iterations 0, check_every, 2 check_every, ..."""
        checks = None if check_every is None else self.last_iteration // check_every + 1
        return [self.give(e.amax()) for e in self.solution.errors[:checks]]

    def report(self) -> dict[str, Any]:
        """How the loop ended, which POT does not say."""
        return {
            "status": self.solution.status,
            "converged": self.back(self.solution.converged),
            "n_iter": self.last_iteration,
            "errors": [self.give(e) for e in self.solution.errors],
        }

    @property
    def last_iteration(self) -> int:
        return max(self.solution.n_iter - 1, 0)  # POT counts from 0


def carried(mass: Tensor, z: Tensor) -> Tensor:
    """sum of mass * z over the last axis. z may be anything where no mass is."""
    return (mass * torch.where(mass > 0, z, 0.0)).sum(-1)


def log_weight(w: Tensor) -> Tensor:
    """log w, and 0 with derivative 0 at w = 0: an empty atom has no entropy."""
    return torch.where(w > 0, torch.where(w > 0, w, 1.0).log(), 0.0)


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
