"""What came out: potentials, a lazy plan, and an account of how the loop ended."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from .errors import NotConverged
from .geometry import Geometry, weigh
from .problem import Problem


@dataclass(frozen=True)
class Status:
    """How the loop ended. `name` for programs, `explanation` for people."""

    name: str
    explanation: str

    def __str__(self) -> str:
        return f"{self.name}: {self.explanation}"


CONVERGED = Status("converged", "The marginals are within the tolerance.")
MAX_ITER = Status(
    "max_iter",
    "The iterations ran out before the marginals were within the tolerance. The number needed grows like (largest cost / eps): "
    "raise max_iter, raise eps, or loosen tol; the last entry of `errors` says how far off the marginals are. If it has not moved for "
    "long, forbidden pairs (+inf costs) may leave some mass without a partner.",
)
STALLED = Status(
    "stalled",
    "The marginals are as exact as this floating type can hold them, which is less exact than the tolerance asked for. Nothing "
    "is wrong with the plan; for more digits pass float64 costs, or set a tolerance this type can reach.",
)
DIVERGED = Status(
    "diverged",
    "The potentials left the range of floating numbers. Look for costs that are huge against eps in every pair of a row or column.",
)


class Plan:
    """P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps), computed where it is needed and never stored.

    `P @ v`, `P.T @ v` and `marginals` are sweeps over the cost; `to_dense()` is the (*batch, n, m) array.
    """

    def __init__(self, geometry: Geometry, k: Tensor, h: Tensor, eps: float, dtype: torch.dtype) -> None:
        self._geometry, self._k, self._h, self._eps, self.dtype = geometry, k, h, eps, dtype

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._k.shape, self._h.shape[-1]))

    @property
    def T(self) -> Plan:
        return Plan(self._geometry.T, self._h, self._k, self._eps, self.dtype)

    def to_dense(self) -> Tensor:
        return self._geometry.plan(self._k, self._h, self._eps).to(self.dtype)

    def __matmul__(self, v: Tensor) -> Tensor:
        """(m,) or (*batch, m, c) -> (n,) or (*batch, n, c)."""
        columns = v.unsqueeze(-1) if v.ndim == 1 else v
        out = self._geometry.apply(self._k, self._h, self._eps, columns).to(self.dtype)
        return out.squeeze(-1) if v.ndim == 1 else out

    @cached_property
    def marginals(self) -> tuple[Tensor, Tensor]:
        """P1 (*batch, n) and P^T 1 (*batch, m)."""
        ones_m, ones_n = torch.ones_like(self._h).unsqueeze(-1), torch.ones_like(self._k).unsqueeze(-1)
        return (self @ ones_m).squeeze(-1), (self.T @ ones_n).squeeze(-1)

    def __repr__(self) -> str:
        return f"Plan{tuple(self.shape)}"


@dataclass(frozen=True, eq=False)
class Solution:
    """The result of `solve`.

    value    (*batch,) the regularised optimum, in units of the cost; differentiable as `grad` says.
    f, g     (*batch, n) and (*batch, m) potentials, float64: f / eps needs more digits than float32 has.
    status   how the loop ended, in words; for a batch, the least happy of its problems.
    converged  (*batch,) which problems met the tolerance.
    n_iter   iterations run.
    errors   (checks, *batch) the marginal errors at each look, in the unit of the stopping rule.
    """

    problem: Problem
    geometry: Geometry
    value: Tensor
    f: Tensor
    g: Tensor
    status: Status
    converged: Tensor
    n_iter: int
    errors: Tensor

    @cached_property
    def plan(self) -> Plan:
        """The lazy plan, detached: `grad="unroll"` and the front doors give plans that carry a gradient."""
        problem, eps = self.problem, self.problem.eps
        k, h = weigh(self.f.detach(), problem.a.detach(), eps), weigh(self.g.detach(), problem.b.detach(), eps)
        return Plan(self.geometry, k, h, eps, problem.given_dtype)

    def raise_unless_converged(self) -> Solution:
        """This solution, or NotConverged with the status's explanation."""
        if not bool(self.converged.all()):
            last = float(self.errors[-1].max()) if len(self.errors) else float("nan")
            raise NotConverged(f"{self.status} (after {self.n_iter} iterations, marginal error {last:.3g})")
        return self
