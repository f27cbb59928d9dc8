"""How outputs depend on inputs, written once for every machine.

The one derivative needed is softmin's. With s_i = -eps log sum_j b_j exp((g_j - C_ij) / eps) and
p_ij = exp((s_i + g_j - C_ij) / eps),

    ds_i / dC_ij = b_j p_ij,    ds_i / dg_j = b_j p_ij * -1,    ds_i / db_j = -eps p_ij.

Taken in the weight itself, not in its logarithm, it is finite at b_j = 0 too, where log b has no derivative.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .geometry import Geometry, weigh
from .problem import Problem


class _Softmin(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: Geometry, eps: float, g: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:
        s = geometry.softmin(weigh(g, b, eps), eps)
        ctx.geometry, ctx.eps = geometry, eps
        ctx.save_for_backward(s, g, b)
        return s

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():  # create_graph=True: what follows is not recorded, and half a second derivative would pass for a whole
            raise NotImplementedError("second derivatives of a transport plan or value are not available yet; leave out create_graph=True.")
        (grad,) = grad_outputs
        s, g, b = ctx.saved_tensors
        geometry, eps = ctx.geometry, ctx.eps
        grad_g = grad_b = None
        grads: tuple[Tensor | None, ...] = (None,) * len(geometry.inputs)
        # A row that meets no mass has s = inf and moves nothing.
        s, grad = torch.where(s.isfinite(), s, 0.0), torch.where(s.isfinite(), grad, 0.0)
        if ctx.needs_input_grad[2] or ctx.needs_input_grad[3]:
            pulled = geometry.T.apply(g, s, eps, grad.unsqueeze(-1)).squeeze(-1)  # sum_i p_ij grad_i
            grad_g, grad_b = -b * pulled, -eps * pulled
        if any(ctx.needs_input_grad[4:]):
            grads = geometry.pull_back(s, weigh(g, b, eps), eps, grad)
        return None, None, grad_g, grad_b, *grads


def softmin(geometry: Geometry, g: Tensor, b: Tensor, eps: float) -> Tensor:
    """-eps log sum_j b_j exp((g_j - C_ij) / eps), differentiable (once) in g, b and the geometry's inputs."""
    return _Softmin.apply(geometry, eps, g, b, *geometry.inputs)


def value(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """The dual at (f, g), in (*batch,):

        D = sum a reward_a(f) + sum b reward_b(g) - eps (sum_i a_i exp((f_i - s_i) / eps) - |a||b|)

    with s = softmin(C, g + eps log b). At detached optimal potentials its derivatives in the cost and the weights are those of
    the value (the envelope theorem), with no rescaling. Feydy et al. 2019, arXiv:1810.08278, equation (9).
    """
    (penalty_a, penalty_b), a, b, eps = problem.penalties, problem.a, problem.b, problem.eps
    s = softmin(geometry, g, b, eps)
    rows = torch.where(s.isfinite(), ((f - s) / eps).exp(), 0.0)
    mass = a.sum(-1) * b.sum(-1)
    return (a * penalty_a.reward(f)).sum(-1) + (b * penalty_b.reward(g)).sum(-1) - eps * ((a * rows).sum(-1) - mass)


def unroll(problem: Problem, geometry: Geometry, start: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """(f, g) after k iterations from the row potentials `start`, as a function of the cost and the weights.

    Exact for whatever was computed, converged or not. O((n + m) k) memory beside the cost, and the time of k readable
    iterations forward and again backward.
    """
    penalty_a, penalty_b = problem.penalties
    eps = problem.eps
    f, g = start, torch.zeros_like(problem.b)
    weight = torch.ones_like(start)  # `start` holds its weights already
    for _ in range(k):
        g = penalty_b.damp(softmin(geometry.T, f, weight, eps), eps)
        f = penalty_a.damp(softmin(geometry, g, problem.b, eps), eps)
        weight = problem.a
    return f, g


def plan(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """a_i b_j exp((f_i + g_j - C_ij) / eps) as a differentiable array, for geometries whose only input is the matrix."""
    (C,) = geometry.inputs
    a, b = problem.a, problem.b
    exponent = (f.unsqueeze(-1) + g.unsqueeze(-2) - C) / problem.eps
    # Between two empty atoms nothing bounds the exponent, and inf times their weight 0 would be NaN.
    both_empty = (a == 0).unsqueeze(-1) & (b == 0).unsqueeze(-2)
    return a.unsqueeze(-1) * b.unsqueeze(-2) * exponent.masked_fill(both_empty, -torch.inf).exp()
