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
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from .. import transforms
from ..costs import Cost
from ..errors import ProblemError
from ..geometry.protocol import Attached, Geometry, attach, folds, weigh
from ..penalties import KL, Penalty
from ..problem import Problem

T = TypeVar("T")


class Each(torch.autograd.Function):
    """An operation that torch.vmap runs for one of its many after the other, as for the rows of a Jacobian."""

    @classmethod
    def vmap(cls, info: Any, in_dims: Any, *args: Any) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        found = [
            cls.apply(*(z.select(dim, i) if isinstance(z, Tensor) and dim is not None else z for z, dim in zip(args, in_dims, strict=True)))
            for i in range(info.batch_size)
        ]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(torch.stack(same) for same in zip(*found, strict=True)), (0,) * len(found[0])


class _Softmin(Each):
    @staticmethod
    def forward(geometry: Geometry, eps: float, g: Tensor, b: Tensor, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return geometry.softmin(weigh(g, b, eps), eps)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.eps, *given = inputs
        ctx.save_for_backward(output, *given)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        s, g, b, *inputs = ctx.saved_tensors
        geometry = attach(ctx.geometry, inputs)
        return None, None, *pull_softmin(geometry, g, b, ctx.eps, s, grad_outputs[0], ctx.needs_input_grad[2:])


class _Apply(Each):
    @staticmethod
    def forward(geometry: Geometry, eps: float, k: Tensor, h: Tensor, v: Tensor, *inputs: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return geometry.apply(k, _present(h, v), eps, v)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.geometry, ctx.eps, *given = inputs
        ctx.save_for_backward(output, *given)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        out, k, h, v, *inputs = ctx.saved_tensors
        geometry = attach(ctx.geometry, inputs)
        return None, None, *pull_apply(geometry, k, h, ctx.eps, v, out, grad_outputs[0], ctx.needs_input_grad[2:])


def apart(problem: Problem, work: Callable[[Problem], tuple[Geometry, T]]) -> tuple[Geometry, T]:
    """`work(problem)`: a geometry and what was found on it. Within a transform of torch.func it is done on the numbers inside, and the
    geometry comes back with derivatives to the problem's own tensors."""
    if not transforms.active():
        return work(problem)
    geometry, found = transforms.outside(lambda: work(problem.plain()), problem.a)
    cost = problem.cost
    if not any(transforms.asks(z) for z in cost.inputs.values()):
        return geometry, found
    folded = cost.fold() if len(geometry.inputs) == 4 else None
    inputs = [cost.dense()] if geometry.stored and len(geometry.inputs) == 1 else cost.inputs.values() if folded is None else folded
    return attach(geometry, [z.to(old.dtype).expand(old.shape) for z, old in zip(inputs, geometry.inputs, strict=True)]), found


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
    if geometry.stored and len(inputs) == 1:
        if torch.is_grad_enabled():
            P = _exponentials(k, h, inputs[0], eps, (w == 0).all(-1), (z == 0).all(-1))
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

    Differentiable in w, and in the points of a cost that folds. Raises NotImplementedError where others are asked for that.
    """
    inputs, machine, column = geometry.inputs, _machine(geometry), w.unsqueeze(-1)
    if geometry.stored and len(inputs) == 1:
        return ((_HeldPlan.apply(machine, eps, k, h) * column.to(geometry.dtype)).sum_to_size(inputs[0].shape),)
    if folds(geometry):
        u, v = (torch.cat((z, torch.ones_like(z[..., :1])), -1).to(w.dtype) for z in inputs[2:])
        rows = column * _HeldTimes.apply(machine, eps, k, h, v)
        columns = _HeldTimes.apply(machine.T, eps, h, k, column * u)
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
    """`pull_back` by the machine itself, which knows no derivative of it. torch.func differentiates whatever it can, and is told only
    when it asks for that."""

    @staticmethod
    def forward(geometry: Geometry, eps: float, k: Tensor, h: Tensor, w: Tensor, z: Tensor, *inputs: Tensor) -> tuple[Tensor, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        # The machine takes a sign on the rows alone: z is split into what adds and what subtracts.
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
    return type(_machine(geometry)).__name__


def _machine(geometry: Geometry) -> Geometry:
    return geometry.machine if isinstance(geometry, Attached) else geometry


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


def value(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """The dual at (f, g), in (*batch,):

        D = sum a reward_a(f) + sum b reward_b(g) - eps (sum_i a_i exp((f_i - s_i) / eps) - |a||b|)

    with s = softmin(C, g + eps log b). At detached optimal potentials its derivatives in the cost and the weights are those of
    the value (the envelope theorem), with no rescaling. Feydy et al. 2019, arXiv:1810.08278, equation (9). Second derivatives then
    raise NotImplementedError.
    """
    at = (problem.penalties, problem.eps, geometry, f, g, problem.a, problem.b)
    if transforms.asks(f) or transforms.asks(g):
        return dual(*at)[0]
    D = _Envelope.apply(*at, *geometry.inputs)[0]
    for number, slope in _slopes(problem, geometry, f, g):
        D = D + _Along.apply(number, slope)
    return D


def _slopes(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(number, dD / dnumber at held potentials, (*batch,)) for eps and each tau that is learnt.

        dD / deps = KL(P | a⊗b) = sum P (f_i + g_j - C_ij) / eps - |P| + |a||b|,    dD / dtau = KL(P1 | a) for P1 = a exp(-f / tau)

    The first takes two sweeps more.
    """
    (eps, *taus), found = problem.learnt, []
    with torch.no_grad():
        if eps is not None:
            level = torch.where(g.isfinite(), g, 0.0)
            sent = transport(problem, geometry, f, g, torch.stack((torch.ones_like(level), level), -1))
            inner = (torch.where(f.isfinite(), f, 0.0) * sent[..., 0] + sent[..., 1]).sum(-1) - sharp_cost(problem, geometry, f, g)
            found.append((eps, inner / problem.eps - sent[..., 0].sum(-1) + problem.a.sum(-1) * problem.b.sum(-1)))
        for tau, penalty, w, z in zip(taus, problem.penalties, (problem.a, problem.b), (f, g), strict=True):
            if tau is not None and isinstance(penalty, KL) and not penalty.balanced:
                t = z / penalty.tau
                found.append((tau, torch.where(w > 0, -w * (torch.expm1(-t) + t * (-t).exp()), 0.0).sum(-1)))
    return found


class _Along(Each):
    """0, whose derivative in a number is `slope` (*batch,)."""

    @staticmethod
    def forward(number: Tensor, slope: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return torch.zeros_like(slope)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled() and not transforms.active():
            raise NotImplementedError(_HELD)
        return _AlongGradient.apply(*ctx.saved_tensors, grad_outputs[0]), None


class _AlongGradient(Each):
    @staticmethod
    def forward(number: Tensor, slope: Tensor, grad: Tensor) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (slope * grad).sum().to(number).reshape(number.shape)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(_HELD)


def refuse_learnt(problem: Problem, mode: str) -> None:
    """Raises ProblemError where eps or tau is learnt: of the potentials, and by other modes, their derivatives are not known."""
    if any(z is not None for z in problem.learnt):
        raise ProblemError(
            f'eps or tau requires a gradient, and grad="{mode}" knows no derivative in it: grad="envelope" has that of the value. For '
            "potentials and plans divide the cost and every tau by eps and pass eps=1; the potentials are then in units of eps."
        )


Penalties = tuple[Penalty, Penalty]


def dual(penalties: Penalties, eps: float, geometry: Geometry, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(D, s) of `value`."""
    penalty_a, penalty_b = penalties
    s = softmin(geometry, g, b, eps)
    rows = torch.where(s.isfinite(), ((f - s) / eps).exp(), 0.0)
    mass = a.sum(-1) * b.sum(-1)
    return (a * penalty_a.reward(f)).sum(-1) + (b * penalty_b.reward(g)).sum(-1) - eps * ((a * rows).sum(-1) - mass), s


def pull_dual(
    penalties: Penalties, eps: float, geometry: Geometry, f: Tensor, g: Tensor, a: Tensor, b: Tensor,
    s: Tensor, grad: Tensor, needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients in a, b and each input of a function whose derivative in D is `grad`, f and g held."""
    penalty_a, penalty_b = penalties
    grad = grad.unsqueeze(-1)
    rows = torch.where(s.isfinite(), ((f - s) / eps).exp(), 0.0)
    _, grad_b, *grads = pull_softmin(geometry, g, b, eps, s, grad * a * rows, [False, *needed[1:]])
    grad_a = grad * (penalty_a.reward(f) - eps * rows + eps * b.sum(-1, keepdim=True)) if needed[0] else None
    if grad_b is not None:
        grad_b = grad_b + grad * (penalty_b.reward(g) + eps * a.sum(-1, keepdim=True))
    return grad_a, grad_b, *grads


class _Envelope(Each):
    """`dual` and its derivative with the potentials held still, the first of the value."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        penalties: Penalties, eps: float, geometry: Geometry, f: Tensor, g: Tensor, a: Tensor, b: Tensor, *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        return dual(penalties, eps, geometry, f, g, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *ctx.fixed, f, g, a, b = inputs[:7]
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(f, g, a, b, output[1], *inputs[7:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled() and not transforms.active():
            raise NotImplementedError(_HELD)
        f, g, a, b, s, *inputs = ctx.saved_tensors
        needed = ctx.needs_input_grad[5:]
        found = iter(_EnvelopeGradients.apply(*ctx.fixed, tuple(needed), f, g, a, b, s, grad_outputs[0], *inputs))
        return *(None,) * 5, *(next(found) if wanted else None for wanted in needed)


class _EnvelopeGradients(Each):
    """The first derivatives. What a derivative of them would be is half a second derivative, and would pass for a whole."""

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        penalties: Penalties, eps: float, geometry: Geometry, needed: tuple[bool, ...],
        f: Tensor, g: Tensor, a: Tensor, b: Tensor, s: Tensor, grad: Tensor, *inputs: Tensor,
    ) -> tuple[Tensor, ...]:  # fmt: skip
        with torch.no_grad():
            found = pull_dual(penalties, eps, geometry, f, g, a, b, s, grad, needed)
        return tuple(z for z, wanted in zip(found, needed, strict=True) if wanted and z is not None)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Any:  # pyright: ignore[reportIncompatibleMethodOverride]
        raise NotImplementedError(_HELD)


_HELD = (
    "second derivatives of a value are not in its envelope, which holds the potentials still: solve with "
    'grad="implicit", or leave out create_graph=True.'
)


def unroll(problem: Problem, geometry: Geometry, start: Tensor, k: int, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(f, g) after k iterations from the row potentials `start`, as a function of the start, the cost and the weights.

    `weight` (*batch, n) belongs to the start alone; when left out, `start` holds its weights already, f + eps log a.

    Exact for whatever was computed, converged or not. O((n + m) k) memory beside the cost, and the time of k readable
    iterations forward and again backward.
    """
    penalty_a, penalty_b = problem.penalties
    refuse_learnt(problem, "unroll")
    eps, geometry = problem.eps, geometry.entrywise
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
    if geometry.stored and len(geometry.inputs) == 1:
        return geometry.inputs[0]
    if not geometry.stored and folds(geometry):
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
        return _inner(f, g, problem.a, problem.b, _matrix(problem, geometry), problem.eps)
    if folds(geometry):
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
