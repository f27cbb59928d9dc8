"""Functions of the plan, differentiable in the potentials, the weights and the cost."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..costs import Cost
from ..geometry.protocol import Geometry, attach, folds
from ..problem import Problem
from .operators import Each, apply, exponentials, pull_held, softmin


def plan(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """a_i b_j exp((f_i + g_j - C_ij) / eps) as a differentiable array (*batch, n, m)."""
    return _plan(f, g, problem.a, problem.b, _matrix(problem, geometry), problem.eps)


def _matrix(problem: Problem, geometry: Geometry) -> Tensor:
    """C as the geometry knows it, which for a folded form can be differentiated any number of times."""
    if geometry.stored and len(geometry.inputs) == 1:
        return geometry.inputs[0]
    if not geometry.stored and folds(geometry):
        alpha, beta, u, v = geometry.inputs
        return alpha.unsqueeze(-1) + beta.unsqueeze(-2) - u @ v.mT
    return problem.cost.dense()


def _plan(f: Tensor, g: Tensor, a: Tensor, b: Tensor, C: Tensor, eps: float) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2) * exponentials(f, g, C, eps, a == 0, b == 0)


def plan_product(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor, v: Tensor, transposed: bool = False) -> Tensor:
    """The plan times v (*batch, m, c), or its transpose times v (*batch, n, c), differentiable in f, g, v, the weights and the cost.

    No n-by-m array is formed.
    """
    rows, columns = ((torch.where(z.isfinite(), z, -math.inf), w.unsqueeze(-1)) for z, w in ((f, problem.a), (g, problem.b)))
    if transposed:
        rows, columns, geometry = columns, rows, geometry.T
    return rows[1] * apply(geometry, rows[0], columns[0], problem.eps, columns[1] * v)


def barycentric(problem: Problem, geometry: Geometry, g: Tensor, v: Tensor) -> Tensor:
    """sum_j P_ij v_j / sum_j P_ij in (*batch, n, c), NaN for a row that may go nowhere, as differentiable as `plan_product`."""
    s = softmin(geometry, g, problem.b, problem.eps)  # each row's own total, so that rows without weight have an image too
    sent = apply(geometry, torch.where(s.isfinite(), s, 0.0), g, problem.eps, problem.b.unsqueeze(-1) * v)
    return torch.where(s.isfinite().unsqueeze(-1), sent, math.nan)


def plan_cost(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """<P, C> in (*batch,), differentiable in f, g, the weights and the cost; an n-by-m array only where the geometry holds one."""
    if geometry.stored:
        return _inner(f, g, problem.a, problem.b, _matrix(problem, geometry), problem.eps)
    if folds(geometry):
        alpha, beta, u, v = (z.to(f.dtype) for z in geometry.inputs)
        columns = torch.cat((torch.ones_like(beta).unsqueeze(-1), beta.unsqueeze(-1), v), -1)
        sent = plan_product(problem, geometry, f, g, columns)
        return (alpha * sent[..., 0] + sent[..., 1] - (u * sent[..., 2:]).sum(-1)).sum(-1)
    if problem.cost.backend == "grid":
        return _grid_cost(problem, f, g)

    def strip(f: Tensor, g: Tensor, a: Tensor, b: Tensor, part: Cost, *inputs: Tensor) -> Tensor:
        return _inner(f, g, a, b, part.of(inputs).dense(), problem.eps)

    from torch.utils.checkpoint import checkpoint  # its first use imports for seconds

    parts = []
    for rows, part in problem.cost.strips():  # one strip at a time is in memory, also on the way back
        arguments = (f[..., rows], g, problem.a[..., rows], problem.b, part, *part.inputs.values())
        parts.append(checkpoint(strip, *arguments, use_reentrant=False))
    return torch.stack(parts).sum(0)


def _grid_cost(problem: Problem, f: Tensor, g: Tensor) -> Tensor:
    """<P, C> on a grid: for each axis a term, of a sum along each axis of which one is weighted by the cost. O(n N) numbers at a time."""
    from torch.utils.checkpoint import checkpoint

    cost: Any = problem.cost
    nodes, eps, found = cost.nodes, problem.eps, []
    costs = [cost.axis(axis).to(g.dtype) for axis in range(len(nodes))]
    b = problem.b.expand(g.shape)
    for weighted in range(len(nodes)):
        level, mass = (torch.where(z.isfinite(), z, -math.inf).unflatten(-1, nodes) for z in (g / eps, b))
        for axis, C in enumerate(costs):
            turned = (z.movedim(axis - len(nodes), -1) for z in (level, mass))
            sums = checkpoint(_along, *turned, C, eps, axis == weighted, use_reentrant=False)
            level, mass = (z.movedim(-1, axis - len(nodes)) for z in sums)
        top, mass = level.flatten(-len(nodes)), mass.flatten(-len(nodes))
        there = (problem.a > 0) & top.isfinite() & f.isfinite()
        found.append((problem.a * torch.where(there, f / eps + top, -math.inf).exp() * mass).sum(-1))
    return torch.stack(found).sum(0)


def _along(level: Tensor, mass: Tensor, C: Tensor, eps: float, weighted: bool) -> tuple[Tensor, Tensor]:
    """sum_j exp(level_j - C_ij / eps) mass_j (C_ij) along the last axis, as numbers and the logarithm, constant, of their unit."""
    z = level.unsqueeze(-2) - C / eps
    with torch.no_grad():
        top = torch.where(mass.unsqueeze(-2) > 0, z, -math.inf).amax(-1)
        top = torch.where(top > -math.inf, top, 0.0)
    e = (z - top.unsqueeze(-1)).clamp(max=300.0).exp() * mass.unsqueeze(-2)  # an empty atom may lie anywhere
    return top, (e * C if weighted else e).sum(-1)


def _inner(f: Tensor, g: Tensor, a: Tensor, b: Tensor, C: Tensor, eps: float) -> Tensor:
    return inner(_plan(f, g, a, b, C, eps), C)


def inner(P: Tensor, C: Tensor, forbids: bool = True) -> Tensor:
    """<P, C> of two arrays; forbidden pairs, if there may be any, carry nothing."""
    return (P * (torch.where(C.isfinite(), C, 0.0) if forbids else C)).sum((-1, -2))


def held_cost(geometry: Geometry, eps: float, value: Tensor, k: Tensor, h: Tensor) -> Tensor:
    """`value` = <P, C> (*batch,) as a function of C alone: P_ij = exp((k_i + h_j - C_ij) / eps) is constant."""
    return _HeldCost.apply(geometry, eps, value, k, h, *geometry.inputs)


class _HeldCost(Each):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        geometry: Geometry, eps: float, value: Tensor, k: Tensor, h: Tensor, *inputs: Tensor
    ) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.eps, _, *given = inputs
        ctx.save_for_backward(*given)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, h, *inputs = ctx.saved_tensors
        w = grad_outputs[0].to(k.dtype).unsqueeze(-1).expand_as(k)
        geometry = attach(ctx.geometry, inputs)
        pulled = pull_held(geometry, k, h, ctx.eps, w) if torch.is_grad_enabled() else geometry.pull_back(k, h, ctx.eps, w)
        return *[None] * 5, *pulled
