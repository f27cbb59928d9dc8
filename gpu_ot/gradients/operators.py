"""Softmin and apply as differentiable functions, written once for every backend.

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

from .. import transforms
from ..geometry.protocol import Attached, Geometry, attach, folds, weigh


class Each(transforms.Function):
    """An operation that torch.vmap runs for one of its many after the other, as for the rows of a Jacobian."""

    opaque = True

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = [
            cls.apply(*(z.select(dim, i) if isinstance(z, Tensor) and dim is not None else z for z, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(torch.stack(same) for same in zip(*found, strict=True)), (0,) * len(found[0])


class _Operator(Each):
    """An operator of a geometry at one eps. What the backward pass needs is its output and its tensors."""

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.eps, *given = inputs
        ctx.save_for_backward(output, *given)


class _Softmin(_Operator):
    @staticmethod
    def forward(geometry: Geometry, eps: float, g: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return geometry.update(g, b, eps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        s, g, b, *inputs = ctx.saved_tensors
        geometry = attach(ctx.geometry, inputs)
        return None, None, *pull_softmin(geometry, g, b, ctx.eps, s, grad_outputs[0], ctx.needs_input_grad[2:])


class _Apply(_Operator):
    @staticmethod
    def forward(geometry: Geometry, eps: float, k: Tensor, h: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return geometry.apply(k, _present(h, v), eps, v)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, k, h, v, *inputs = ctx.saved_tensors
        geometry = attach(ctx.geometry, inputs)
        return None, None, *pull_apply(geometry, k, h, ctx.eps, v, out, grad_outputs[0], ctx.needs_input_grad[2:])


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
    NotImplementedError for another geometry that is to be differentiated again.
    """
    inputs = geometry.inputs
    if geometry.stored and len(inputs) == 1:
        if torch.is_grad_enabled():
            P = exponentials(k, h, inputs[0], eps, (w == 0).all(-1), (z == 0).all(-1))
        else:
            P = geometry.plan(_present(k, w), _present(h, z), eps)
        return ((P * (w @ z.mT).to(P.dtype)).sum_to_size(inputs[0].shape).to(inputs[0].dtype),)
    if folds(geometry):
        _, _, u, v = inputs
        alpha, grad_u = _pull_side(geometry, k, h, eps, w, z, v)
        beta, grad_v = _pull_side(geometry.T, h, k, eps, z, w, u)
        return tuple(grad.sum_to_size(x.shape).to(x.dtype) for grad, x in zip((alpha, beta, grad_u, grad_v), inputs, strict=True))
    if torch.is_grad_enabled() and not transforms.active():
        raise NotImplementedError(_NO_SECOND.format(_name(geometry)))
    return _PullBack.apply(geometry, eps, k, h, w, z, *inputs)


def pull_held(geometry: Geometry, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
    """The gradients in the inputs of a function whose derivative in C_ij is w_i p_ij, p_ij = exp((k_i + h_j - C_ij) / eps) constant.

    Differentiable in w, and in the points of a cost that folds. Raises NotImplementedError where other inputs are to be.
    """
    inputs, backend, column = geometry.inputs, _backend(geometry), w.unsqueeze(-1)
    if geometry.stored and len(inputs) == 1:
        return ((_HeldPlan.apply(backend, eps, k, h) * column.to(geometry.dtype)).sum_to_size(inputs[0].shape),)
    if folds(geometry):
        u, v = (torch.cat((z, torch.ones_like(z[..., :1])), -1).to(w.dtype) for z in inputs[2:])
        rows = column * _HeldTimes.apply(backend, eps, k, h, v)
        columns = _HeldTimes.apply(backend.T, eps, h, k, column * u)
        grads = rows[..., -1], columns[..., -1], -rows[..., :-1], -columns[..., :-1]
        return tuple(grad.sum_to_size(z.shape).to(z.dtype) for grad, z in zip(grads, inputs, strict=True))
    return pull_back(geometry, k, h, eps, column, torch.ones_like(h).unsqueeze(-1))


class _HeldTimes(Each):
    """`apply` as a function of v alone, which is linear."""

    @staticmethod
    def forward(geometry: Geometry, eps: float, k: Tensor, h: Tensor, v: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return geometry.apply(k, h, eps, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.eps, k, h, _ = inputs
        ctx.save_for_backward(k, h)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        k, h = ctx.saved_tensors
        return None, None, None, None, _HeldTimes.apply(ctx.geometry.T, ctx.eps, h, k, grad_outputs[0])


class _HeldPlan(Each):
    """The array of constants."""

    @staticmethod
    def forward(geometry: Geometry, eps: float, k: Tensor, h: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return geometry.plan(k, h, eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)


class _PullBack(Each):
    """`pull_back` by the backend itself, which knows no derivative of it. torch.func differentiates whatever it can, and is told only
    when it asks for that."""

    @staticmethod
    def forward(geometry: Geometry, eps: float, k: Tensor, h: Tensor, w: Tensor, z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The backend takes a sign on the rows alone: z is split into what adds and what subtracts.
        parts = [
            geometry.pull_back(k, weigh(h, (sign * z[..., c]).clamp(min=0), eps), eps, sign * w[..., c])
            for c in range(z.shape[-1])
            for sign in (1, -1)
        ]
        return tuple(torch.stack(same).sum(0) for same in zip(*parts, strict=True))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.name = _name(inputs[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(_NO_SECOND.format(ctx.name))


_NO_SECOND = (
    "second derivatives in the points are not known to {} for this cost: "
    'use backend="dense", or for a cost that folds, such as SqEuclidean, backend="chunked".'
)


def _name(geometry: Geometry) -> str:
    return type(_backend(geometry)).__name__


def _backend(geometry: Geometry) -> Geometry:
    return geometry.backend if isinstance(geometry, Attached) else geometry


def _pull_side(geometry: Geometry, k: Tensor, h: Tensor, eps: float, w: Tensor, z: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """What `pull_back` means for alpha and u of C_ij = alpha_i + beta_j - <u_i, v_j>: plan products with z and with z v."""
    v = v.to(z.dtype)
    c, d = z.shape[-1], v.shape[-1]
    both = (z.unsqueeze(-1) * v.unsqueeze(-2)).flatten(-2)  # (*batch, m, c d)
    sums = apply(geometry, k, h, eps, torch.cat((z.expand(*both.shape[:-1], c), both), -1))
    return (w * sums[..., :c]).sum(-1), -(w.unsqueeze(-1) * sums[..., c:].unflatten(-1, (c, d))).sum(-2)


def _present(h: Tensor, v: Tensor) -> Tensor:
    """h, and -inf for the atoms whose row of v is zero."""
    return torch.where((v != 0).any(-1), h, -math.inf)


def exponentials(k: Tensor, h: Tensor, C: Tensor, eps: float, empty_rows: Tensor, empty_columns: Tensor) -> Tensor:
    exponent = (k.unsqueeze(-1) + h.unsqueeze(-2) - C) / eps
    # Between two empty atoms nothing bounds the exponent, and inf times their weight 0 would be NaN.
    return exponent.masked_fill(empty_rows.unsqueeze(-1) & empty_columns.unsqueeze(-2), -math.inf).exp()


class Differentiable(Attached):
    """A geometry whose iterations autograd records, in everything: the start, the weights, the penalties and the cost."""

    def __init__(self, geometry: Geometry) -> None:
        super().__init__(geometry, geometry.inputs)

    @property
    def T(self) -> Differentiable:
        return Differentiable(self.backend.T)

    def update(self, g: Tensor, b: Tensor, eps: float) -> Tensor:
        return softmin(self.backend, g, b, eps)
