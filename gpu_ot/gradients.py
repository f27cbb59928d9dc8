"""How outputs depend on inputs, written once for every machine.

Two functions of a geometry are differentiable, and the derivative of either is made of the same two, to any order. With
p_ij = exp((k_i + h_j - C_ij) / eps), `apply` is sum_j p_ij v_j, and

    d apply_i = sum_j p_ij (dv_j + v_j (dk_i + dh_j - dC_ij) / eps).

With s_i = softmin_i = -eps log sum_j b_j exp((g_j - C_ij) / eps) and p of k = s, h = g,

    ds_i / dC_ij = b_j p_ij,    ds_i / dg_j = -b_j p_ij,    ds_i / db_j = -eps p_ij.

Taken in the weight itself, not in its logarithm, it is finite at b_j = 0 too, where log b has no derivative.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .costs import Cost
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
        s, g, b = ctx.saved_tensors
        return None, None, *pull_softmin(ctx.geometry, g, b, ctx.eps, s, grad_outputs[0], ctx.needs_input_grad[2:])


class _Apply(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, geometry: Geometry, eps: float, k: Tensor, h: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:
        out = geometry.apply(k, _present(h, v), eps, v)
        ctx.geometry, ctx.eps = geometry, eps
        ctx.save_for_backward(k, h, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, h, v, out = ctx.saved_tensors
        return None, None, *pull_apply(ctx.geometry, k, h, ctx.eps, v, out, grad_outputs[0], ctx.needs_input_grad[2:])


def softmin(geometry: Geometry, g: Tensor, b: Tensor, eps: float) -> Tensor:
    """-eps log sum_j b_j exp((g_j - C_ij) / eps), differentiable in g, b and the geometry's inputs."""
    return _Softmin.apply(geometry, eps, g, b, *geometry.inputs)


def apply(geometry: Geometry, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
    """sum_j exp((k_i + h_j - C_ij) / eps) v_j, (*batch, n, c), differentiable in k, h, v and the geometry's inputs.

    An atom whose row of v is zero is absent: nothing bounds its exponents, and inf times 0 would be NaN.
    """
    return _Apply.apply(geometry, eps, k, h, v, *geometry.inputs)


def pull_softmin(
    geometry: Geometry, g: Tensor, b: Tensor, eps: float, s: Tensor, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients in g, b and each input of a function whose derivative in s = softmin(geometry, g, b, eps) is `grad`."""
    # A row that meets no mass has s = inf and moves nothing.
    s, grad = torch.where(s.isfinite(), s, 0.0), torch.where(s.isfinite(), grad, 0.0)
    grad_g = grad_b = None
    grads: tuple[Tensor | None, ...] = (None,) * len(geometry.inputs)
    if needed[0] or needed[1]:
        pulled = apply(geometry.T, g, s, eps, grad.unsqueeze(-1)).squeeze(-1)  # sum_i p_ij grad_i
        grad_g, grad_b = -b * pulled, -eps * pulled
    if any(needed[2:]):
        if torch.is_grad_enabled():
            grads = pull_back(geometry, s, g, eps, grad.unsqueeze(-1), b.unsqueeze(-1))
        else:
            grads = geometry.pull_back(s, weigh(g, b, eps), eps, grad)
    return grad_g, grad_b, *grads


def pull_apply(
    geometry: Geometry, k: Tensor, h: Tensor, eps: float, v: Tensor, out: Tensor, grad: Tensor, needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients in k, h, v and each input of a function whose derivative in out = apply(geometry, k, h, eps, v) is `grad`."""
    grad_k = grad_h = grad_v = None
    grads: tuple[Tensor | None, ...] = (None,) * len(geometry.inputs)
    if needed[0]:
        grad_k = ((grad * out).sum(-1) / eps).sum_to_size(k.shape)
    if needed[1] or needed[2]:
        grad_v = apply(geometry.T, h, k, eps, grad)
        grad_h = ((v * grad_v).sum(-1) / eps).sum_to_size(h.shape)
        grad_v = grad_v.sum_to_size(v.shape)
    if any(needed[3:]):
        grads = pull_back(geometry, k, h, eps, -grad / eps, v)
    return grad_k, grad_h, grad_v, *grads


def pull_back(geometry: Geometry, k: Tensor, h: Tensor, eps: float, w: Tensor, z: Tensor) -> tuple[Tensor, ...]:
    """The gradient in each input of a function whose derivative in C_ij is exp((k_i + h_j - C_ij) / eps) sum_c w_ic z_jc.

    Differentiable in all of these and in the inputs, where the geometry holds the matrix or the folded form of the cost. Raises
    NotImplementedError where another one is asked for that.
    """
    inputs = geometry.inputs
    if geometry.stored:
        if torch.is_grad_enabled():
            P = _exponentials(k, h, inputs[0], eps, (w == 0).all(-1), (z == 0).all(-1))
        else:
            P = geometry.plan(_present(k, w), _present(h, z), eps)
        return ((P * (w @ z.mT).to(P.dtype)).sum_to_size(inputs[0].shape).to(inputs[0].dtype),)
    if _folds(geometry):
        _, _, u, v = inputs
        alpha, grad_u = _pull_side(geometry, k, h, eps, w, z, v)
        beta, grad_v = _pull_side(geometry.T, h, k, eps, z, w, u)
        return tuple(grad.sum_to_size(x.shape).to(x.dtype) for grad, x in zip((alpha, beta, grad_u, grad_v), inputs, strict=True))
    if torch.is_grad_enabled():
        raise NotImplementedError(
            f"second derivatives in the points are not known to {type(geometry).__name__} for this cost: "
            'use backend="dense", or for a cost that folds, such as SqEuclidean, backend="chunked".'
        )
    # The machine takes a sign on the rows alone: z is split into what adds and what subtracts.
    parts = [
        geometry.pull_back(k, weigh(h, (sign * z[..., c]).clamp(min=0), eps), eps, sign * w[..., c])
        for c in range(z.shape[-1])
        for sign in (1, -1)
    ]
    return tuple(torch.stack(same).sum(0) for same in zip(*parts, strict=True))


def _pull_side(geometry: Geometry, k: Tensor, h: Tensor, eps: float, w: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `pull_back` means for alpha and u of C_ij = alpha_i + beta_j - <u_i, v_j>: plan products with z and with z v."""
    v = v.to(z.dtype)
    c, d = z.shape[-1], v.shape[-1]
    both = (z.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)  # (*batch, m, c d)
    sums = apply(geometry, k, h, eps, torch.cat((z.expand(*both.shape[:-1], c), both), -1))
    return (w * sums[..., :c]).sum(-1), -(w.unsqueeze(-1) * sums[..., c:].unflatten(-1, (c, d))).sum(-2)


def _folds(geometry: Geometry) -> bool:
    """Whether the inputs are alpha, beta, u and v as seen from this side, which then turn with it."""
    inputs = geometry.inputs
    return len(inputs) == 4 and inputs[0].ndim + 1 == inputs[2].ndim and geometry.T.inputs[0] is inputs[1]


def _present(h: Tensor, v: Tensor) -> Tensor:
    """h, and -inf for the atoms whose row of v is zero."""
    return torch.where((v != 0).any(-1), h, -math.inf)


class _FirstOnly(torch.autograd.Function):
    """The identity. What follows a backward of it is half a second derivative, and would pass for a whole."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise NotImplementedError(
                "second derivatives of a value are not in its envelope, which holds the potentials still: solve with "
                'grad="implicit", or leave out create_graph=True.'
            )
        return grad_outputs[0]


def value(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """The dual at (f, g), in (*batch,):

        D = sum a reward_a(f) + sum b reward_b(g) - eps (sum_i a_i exp((f_i - s_i) / eps) - |a||b|)

    with s = softmin(C, g + eps log b). At detached optimal potentials its derivatives in the cost and the weights are those of
    the value (the envelope theorem), with no rescaling. Feydy et al. 2019, arXiv:1810.08278, equation (9). Second derivatives then
    raise NotImplementedError.
    """
    (penalty_a, penalty_b), a, b, eps = problem.penalties, problem.a, problem.b, problem.eps
    s = softmin(geometry, g, b, eps)
    rows = torch.where(s.isfinite(), ((f - s) / eps).exp(), 0.0)
    mass = a.sum(-1) * b.sum(-1)
    dual = (a * penalty_a.reward(f)).sum(-1) + (b * penalty_b.reward(g)).sum(-1) - eps * ((a * rows).sum(-1) - mass)
    return dual if f.requires_grad or g.requires_grad else _FirstOnly.apply(dual)


def unroll(problem: Problem, geometry: Geometry, start: Tensor, k: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(f, g) after k iterations from the row potentials `start`, as a function of the start, the cost and the weights.

    `weight` (*batch, n) belongs to the start alone; when left out, `start` holds its weights already, f + eps log a.

    Exact for whatever was computed, converged or not. O((n + m) k) memory beside the cost, and the time of k readable
    iterations forward and again backward.
    """
    penalty_a, penalty_b = problem.penalties
    eps = problem.eps
    f, g = start, torch.zeros_like(problem.b)
    weight = torch.ones_like(start) if weight is None else weight
    for _ in range(k):
        g = penalty_b.damp(softmin(geometry.T, f, weight, eps), eps)
        f = penalty_a.damp(softmin(geometry, g, problem.b, eps), eps)
        weight = problem.a
    return f, g


def plan(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """a_i b_j exp((f_i + g_j - C_ij) / eps) as a differentiable array (*batch, n, m)."""
    return _plan(f, g, problem.a, problem.b, _matrix(problem, geometry), problem.eps)


def _matrix(problem: Problem, geometry: Geometry) -> Tensor:
    """C as the geometry knows it, which for a folded form can be differentiated any number of times."""
    if geometry.stored:
        return geometry.inputs[0]
    if _folds(geometry):
        alpha, beta, u, v = geometry.inputs
        return alpha.unsqueeze(-1) + beta.unsqueeze(-2) - u @ v.mT
    return problem.cost.dense()


def _plan(f: Tensor, g: Tensor, a: Tensor, b: Tensor, C: Tensor, eps: float) -> Tensor:
    return a.unsqueeze(-1) * b.unsqueeze(-2) * _exponentials(f, g, C, eps, a == 0, b == 0)


def _exponentials(k: Tensor, h: Tensor, C: Tensor, eps: float, empty_rows: Tensor, empty_columns: Tensor) -> Tensor:
    exponent = (k.unsqueeze(-1) + h.unsqueeze(-2) - C) / eps
    # Between two empty atoms nothing bounds the exponent, and inf times their weight 0 would be NaN.
    return exponent.masked_fill(empty_rows.unsqueeze(-1) & empty_columns.unsqueeze(-2), -math.inf).exp()


def transport(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor, v: Tensor, transposed: bool = False) -> Tensor:
    """The plan times v (*batch, m, c), or its transpose times v (*batch, n, c), differentiable in f, g, v, the weights and the cost.

    No n-by-m array is formed.
    """
    rows, columns = ((torch.where(z.isfinite(), z, -math.inf), w.unsqueeze(-1)) for z, w in ((f, problem.a), (g, problem.b)))
    if transposed:
        rows, columns, geometry = columns, rows, geometry.T
    return rows[1] * apply(geometry, rows[0], columns[0], problem.eps, columns[1] * v)


def average(problem: Problem, geometry: Geometry, g: Tensor, v: Tensor) -> Tensor:
    """sum_j P_ij v_j / sum_j P_ij in (*batch, n, c), NaN for a row that may go nowhere, as differentiable as `transport`."""
    s = softmin(geometry, g, problem.b, problem.eps)  # each row's own total, so that rows without weight have an image too
    sent = apply(geometry, torch.where(s.isfinite(), s, 0.0), g, problem.eps, problem.b.unsqueeze(-1) * v)
    return torch.where(s.isfinite().unsqueeze(-1), sent, math.nan)


def sharp_cost(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """<P, C> in (*batch,), differentiable in f, g, the weights and the cost; an n-by-m array only where the geometry holds one."""
    if geometry.stored:
        return _inner(f, g, problem.a, problem.b, geometry.inputs[0], problem.eps)
    if _folds(geometry):
        alpha, beta, u, v = (z.to(f.dtype) for z in geometry.inputs)
        columns = torch.cat((torch.ones_like(beta).unsqueeze(-1), beta.unsqueeze(-1), v), -1)
        sent = transport(problem, geometry, f, g, columns)
        return (alpha * sent[..., 0] + sent[..., 1] - (u * sent[..., 2:]).sum(-1)).sum(-1)

    def strip(f: Tensor, g: Tensor, a: Tensor, b: Tensor, part: Cost, *inputs: Tensor) -> Tensor:
        return _inner(f, g, a, b, part.of(inputs).dense(), problem.eps)

    from torch.utils.checkpoint import checkpoint  # its first use imports for seconds

    parts = []
    for rows, part in problem.cost.strips():  # one strip at a time is in memory, also on the way back
        arguments = (f[..., rows], g, problem.a[..., rows], problem.b, part, *part.inputs.values())
        parts.append(checkpoint(strip, *arguments, use_reentrant=False))
    return torch.stack(parts).sum(0)


def _inner(f: Tensor, g: Tensor, a: Tensor, b: Tensor, C: Tensor, eps: float) -> Tensor:
    return (_plan(f, g, a, b, C, eps) * torch.where(C.isfinite(), C, 0.0)).sum((-1, -2))
