"""Sorting, ranks, quantiles and the k largest, as differentiable functions: the entropic plan from values to sorted places on the line."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from . import errors
from .costs import SqEuclidean
from .geometry import line
from .initial import sorted_potentials
from .problem import Problem
from .solution import Solution
from .solve import solve

#: Values from which on a sweep along the line is the faster one. Measured on one core, see bench/FACTS.md.
MANY = 2000


def soft_sort(x: Tensor, dim: int = -1, *, eps: float = 1e-3, tol: float = 1e-6) -> Tensor:
    """The values along an axis in ascending order, blurred and differentiable: as `x.sort(dim).values` for eps -> 0.

    Place j gets the mean of the values that the plan sends there.

    x     values, any shape; the other axes are a batch.
    eps   > 0: how much is blurred, as a part of the squared range of the places. Values are brought to (0, 1) first, by their mean and
          standard deviation and a logistic function, so neither their scale nor a shift matters.
    tol   of the plan's marginals, see `solve`.

    A sweep is over the n^2 pairs of values and places, on a CPU from 2000 values on over the n points alone. The result has the shape and
    type of x, and derivatives (implicit, first and second). Raises ProblemError for NaN and infinities.
    Cuturi, Teboul and Vert 2019, arXiv:1905.11885.
    """
    solution, z = _placed(x, dim, eps, tol)
    return _back(_sorted(solution, z), x, dim)


def soft_rank(x: Tensor, dim: int = -1, *, eps: float = 1e-3, tol: float = 1e-6) -> Tensor:
    """The place of each value along an axis, from 0 to n - 1, blurred and differentiable: as `x.argsort(dim).argsort(dim)` for eps -> 0.

    The mean of the places that the plan sends a value to. Arguments and errors as `soft_sort`; the result has the shape of x.
    """
    solution, z = _placed(x, dim, eps, tol)
    n = z.shape[-1]
    places = torch.arange(n, dtype=z.dtype, device=z.device)
    return _back(n * (solution.plan @ places.expand_as(z).unsqueeze(-1)).squeeze(-1), x, dim)


def soft_quantile(x: Tensor, q: float | Tensor, dim: int = -1, *, eps: float = 1e-3, tol: float = 1e-6) -> Tensor:
    """Quantiles along an axis, blurred and differentiable: as `torch.quantile(x, q, dim)` for eps -> 0.

    q     in [0, 1]: a number, whose axis goes, or (k,), whose results are k along the axis `dim`.

    Between two places `soft_sort` is interpolated. Arguments and errors as there.
    """
    levels = torch.as_tensor(q, dtype=torch.float64, device=x.device if isinstance(x, Tensor) else None)
    if levels.ndim > 1 or not bool(((levels >= 0) & (levels <= 1)).all()):
        raise errors.ProblemError(f"q must be a number in [0, 1] or several, (k,), found {q}.")
    solution, z = _placed(x, dim, eps, tol)
    values = _sorted(solution, z)
    at = levels.reshape(-1) * (z.shape[-1] - 1)
    low = at.floor().long().clamp(max=max(z.shape[-1] - 2, 0))
    high = (low + 1).clamp(max=z.shape[-1] - 1)
    found = _back(values[..., low] + (at - low) * (values[..., high] - values[..., low]), x, dim)
    return found.squeeze(dim) if levels.ndim == 0 else found


def soft_topk(x: Tensor, k: int, dim: int = -1, *, eps: float = 1e-2, tol: float = 1e-6) -> Tensor:
    """How far each value along an axis is among the k largest: in [0, 1], of sum k, blurred and differentiable.

    The plan sends n - k parts of the mass to 0 and k to 1. For eps -> 0 it is 1 for the k largest and 0 for the others. Arguments and
    errors as `soft_sort`. Xie et al. 2020, arXiv:2002.06504.
    """
    _check(x, dim)
    n = x.shape[dim]
    if k != int(k) or not 0 <= k <= n:
        raise errors.ProblemError(f"k must be a whole number between 0 and the {n} values along the axis, found {k}.")
    if k in (0, n):
        return torch.full_like(x, float(k > 0)) + 0 * x
    weights = torch.tensor([1 - k / n, k / n], dtype=torch.float64, device=x.device)
    solution, z = _placed(x, dim, eps, tol, weights)
    ends = z.new_tensor([0.0, 1.0]).expand(*z.shape[:-1], 2)
    return _back(n * (solution.plan @ ends.unsqueeze(-1)).squeeze(-1), x, dim)


def _placed(x: Tensor, dim: int, eps: float, tol: float, weights: Tensor | None = None) -> tuple[Solution, Tensor]:
    """The plan (*batch, n, m) from the values to evenly spaced places in [0, 1], and the values (*batch, n) in float64."""
    _check(x, dim)
    if not 0 < eps < math.inf:
        raise errors.bad_eps("eps", eps)
    z = x.movedim(dim, -1).double()
    centred = z - z.mean(-1, keepdim=True)
    spread = centred.square().mean(-1, keepdim=True)
    unit = torch.where(spread > 0, torch.where(spread > 0, spread, 1.0).sqrt(), 1.0)
    squashed = (centred / unit).sigmoid().unsqueeze(-1)
    m = z.shape[-1] if weights is None else len(weights)
    places = torch.linspace(0, 1, m, dtype=z.dtype, device=z.device) if m > 1 else z.new_full((1,), 0.5)
    y = places.unsqueeze(-1).expand(*z.shape[:-1], m, 1)
    b = None if weights is None else weights.expand(*z.shape[:-1], m)
    problem = Problem(SqEuclidean(squashed, y), eps, b=b)
    start = sorted_potentials(squashed.detach(), y, b=b)
    return solve(problem, grad="implicit", tol=tol, start=start, backend=_backend(problem)), z


def _backend(problem: Problem) -> str:
    """From so many values on, sums of Gaussians on the line take less time than products on arrays."""
    n, m = problem.shape[-2:]
    return "line" if min(n, m) >= MANY and line.refuse(problem) is None else "auto"


def _sorted(solution: Solution, z: Tensor) -> Tensor:
    """n times P^T z for uniform places."""
    return z.shape[-1] * (solution.plan.T @ z.unsqueeze(-1)).squeeze(-1)


def _back(found: Tensor, x: Tensor, dim: int) -> Tensor:
    return found.movedim(-1, dim).to(x.dtype)


def _check(x: Tensor, dim: int) -> None:
    if not isinstance(x, Tensor):
        raise errors.not_a_tensor("x", x)
    if not x.is_floating_point():
        raise errors.ProblemError(f"x must hold floating numbers, found {x.dtype}: pass x.float().")
    if x.ndim == 0 or not -x.ndim <= dim < x.ndim or not x.shape[dim]:
        raise errors.wrong_shape("x", x.shape, f"at least one value along the axis dim = {dim}")
    if not bool(x.detach().isfinite().all()):
        raise errors.broken_cost("x", int((~x.detach().isfinite()).sum()), "values")
