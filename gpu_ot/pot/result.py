"""The result of POT's unified API."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np

from ..solution.plan import Plan
from ..solver.status import Status
from .answer import ConvertedPlan


@dataclass
class OTResult:
    """POT's `OTResult`, and how the loop ended.

    plan        (n, m), or (B, n, m) for a batch; None where the problem is solved lazily.
    lazy_plan   slices, multiplies and samples the plan without forming it; None where it is formed.
    potentials  (log u, log v) in POT's scale for the function that was called.
    value       the regularised optimum; `value_linear` is its part <P, M>.
    status      how the loop ended, in words; `converged`, `n_iter` (the last iteration, from 0) and `errors` for programs.
    """

    value: Any = None
    value_linear: Any = None
    potentials: tuple[Any, Any] | None = None
    plan: Any = None
    lazy_plan: Plan | ConvertedPlan | None = None
    log: dict[str, Any] | None = None
    status: Status | str | None = None
    converged: Any = None
    n_iter: int | None = None
    errors: list[Any] = field(default_factory=list)
    value_quad: None = None
    _backend: None = field(default=None, repr=False)  # POT's own code reads it; None is numpy's, which accepts tensors

    @property
    def potential_a(self) -> Any:
        return None if self.potentials is None else self.potentials[0]

    @property
    def potential_b(self) -> Any:
        return None if self.potentials is None else self.potentials[1]

    @property
    def sparse_plan(self) -> Any:
        """The plan in compressed rows: scipy's for numpy, torch's for tensors."""
        if self.plan is None:
            return None
        if isinstance(self.plan, np.ndarray):
            from scipy.sparse import csr_matrix

            return csr_matrix(self.plan)
        return self.plan.to_sparse_csr()

    @property
    def marginal_a(self) -> Any:
        return self._marginal(-1)

    @property
    def marginal_b(self) -> Any:
        return self._marginal(-2)

    @property
    def marginals(self) -> tuple[Any, Any] | None:
        return None if self.lazy_plan is None and self.plan is None else (self.marginal_a, self.marginal_b)

    def _marginal(self, axis: int) -> Any:
        plan = self.plan if self.lazy_plan is None else self.lazy_plan
        return None if plan is None else plan.sum(axis)

    @property
    def a_to_b(self) -> Any:
        raise NotImplementedError("multiply the plan: (plan @ X_b) / plan.sum(1)[:, None] maps the points of a.")

    @property
    def b_to_a(self) -> Any:
        raise NotImplementedError("multiply the plan: (plan.T @ X_a) / plan.sum(0)[:, None] maps the points of b.")

    @property
    def citation(self) -> str:
        return "Flamary et al., POT: Python Optimal Transport, JMLR 22(78), 2021, whose interface this is."


class OnDemand(OTResult):
    """A lazy result whose `plan` is formed when it is read, as geomloss's results do."""

    _formed: Any = None

    @property
    def plan(self) -> Any:
        if self._formed is None and self.lazy_plan is not None:
            self._formed = self.lazy_plan[:]
        return self._formed

    @plan.setter
    def plan(self, P: Any) -> None:
        self._formed = P
