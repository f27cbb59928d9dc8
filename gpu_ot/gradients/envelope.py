"""The value, the dual at the potentials, and its derivatives with the potentials held still: the envelope theorem."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import transforms
from ..errors import ProblemError
from ..geometry.products import serves_vectors, vectors
from ..geometry.protocol import Geometry
from ..penalties import KL, TV, Penalty
from ..problem import Problem
from .coupling import plan_cost, plan_product
from .operators import Each, pull_softmin, softmin


def value(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """The dual at (f, g), in (*batch,):

        D = sum a reward_a(f) + sum b reward_b(g) - eps (sum_i a_i exp((f_i - s_i) / eps) - |a||b|)

    with s = softmin(C, g + eps log b). At detached optimal potentials its derivatives in the cost and the weights are those of
    the value (the envelope theorem), with no rescaling. Feydy et al. 2019, arXiv:1810.08278, equation (9). Second derivatives then
    raise NotImplementedError.
    """
    at = (problem.penalties, problem.eps, geometry, f, g, problem.a, problem.b)
    if transforms.requires_grad(f, g):
        return dual(problem.as_given[1], *at[1:])[0]
    D = _Envelope.apply(*at, *geometry.inputs)[0]
    for number, slope in _slopes(problem, geometry, f, g):
        D = D + _Along.apply(number, slope)
    return D


def _slopes(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(number, dD / dnumber at held potentials, (*batch,)) for eps and each tau that is learnable.

        dD / deps = KL(P | a⊗b) = sum P (f_i + g_j - C_ij) / eps - |P| + |a||b|,    dD / dtau = KL(P1 | a) for P1 = a exp(-f / tau)

    The first takes two sweeps more.
    """
    (eps, *taus), found = problem.learnable, []
    with torch.no_grad():
        if eps is not None:
            level = torch.where(g.isfinite(), g, 0.0)
            sent = plan_product(problem, geometry, f, g, torch.stack((torch.ones_like(level), level), -1))
            inner = (torch.where(f.isfinite(), f, 0.0) * sent[..., 0] + sent[..., 1]).sum(-1) - plan_cost(problem, geometry, f, g)
            found.append((eps, inner / problem.eps - sent[..., 0].sum(-1) + problem.a.sum(-1) * problem.b.sum(-1)))
        for tau, penalty, w, z in zip(taus, problem.penalties, (problem.a, problem.b), (f, g), strict=True):
            if tau is None:
                continue
            if not isinstance(penalty, KL):
                raise ProblemError("tau of TV is a tensor that requires a gradient: its derivatives are not known, those of KL(tau) are.")
            if not penalty.balanced:
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
            raise NotImplementedError(HELD)
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
        raise NotImplementedError(HELD)


def refuse_learnable(problem: Problem, mode: str) -> None:
    """Raises ProblemError where eps or tau requires a gradient that `mode` does not know."""
    if problem.learnable.eps is not None or (mode != "unroll" and any(z is not None for z in problem.learnable)):
        raise ProblemError(
            f'eps or tau requires a gradient, and grad="{mode}" knows no derivative in it: grad="envelope" has that of the value. For '
            "potentials and plans divide the cost and every tau by eps and pass eps=1; the potentials are then in units of eps."
        )


Penalties = tuple[Penalty, Penalty]


def dual(penalties: Penalties, eps: float, geometry: Geometry, f: Tensor, g: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """(D, s) of `value`."""
    penalty_a, penalty_b = penalties
    s = softmin(geometry, g, b, eps)
    if (kinds := _kinds(penalties, f, g, a, b, s)) is not None:
        from ..kernels.dual import dual  # pyright: ignore[reportMissingImports]

        return dual(vectors(a), vectors(b), *(z.reshape(-1, z.shape[-1]).contiguous() for z in (f, g, s)), eps, *kinds).view(
            f.shape[:-1]
        ), s
    rows = torch.where(s.isfinite(), ((f - s) / eps).exp(), 0.0)
    mass = a.sum(-1) * b.sum(-1)
    return (a * penalty_a.reward(f)).sum(-1) + (b * penalty_b.reward(g)).sum(-1) - eps * ((a * rows).sum(-1) - mass), s


def pull_dual(
    penalties: Penalties, eps: float, geometry: Geometry, f: Tensor, g: Tensor, a: Tensor, b: Tensor,
    s: Tensor, grad: Tensor, needed: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """The gradients in a, b and each input of a function whose derivative in D is `grad`, f and g held."""
    penalty_a, penalty_b = penalties
    if not needed[1] and (kinds := _kinds(penalties, f, g, a, b, s)) is not None:  # one launch, and the sweeps
        from ..kernels.dual import pull  # pyright: ignore[reportMissingImports]

        flat = (z.reshape(-1, z.shape[-1]).contiguous() for z in (f, g, s))
        k, h, w, grad_a, _ = pull(vectors(a), vectors(b), *flat, grad.reshape(-1).to(f.dtype).contiguous(), eps, *kinds)
        grads = geometry.pull_back(k.view(f.shape), h.view(g.shape), eps, w.view(f.shape)) if any(needed[2:]) else (None,) * len(needed[2:])
        return grad_a.view(f.shape) if needed[0] else None, None, *grads
    grad = grad.unsqueeze(-1)
    rows = torch.where(s.isfinite(), ((f - s) / eps).exp(), 0.0)
    _, grad_b, *grads = pull_softmin(geometry, g, b, eps, s, grad * a * rows, [False, *needed[1:]])
    grad_a = grad * (penalty_a.reward(f) - eps * rows + eps * b.sum(-1, keepdim=True)) if needed[0] else None
    if grad_b is not None:
        grad_b = grad_b + grad * (penalty_b.reward(g) + eps * a.sum(-1, keepdim=True))
    return grad_a, grad_b, *grads


def _kinds(penalties: Penalties, f: Tensor, g: Tensor, a: Tensor, b: Tensor, s: Tensor) -> list[tuple[int, float]] | None:
    """The penalties as kernels take them, where they serve."""
    if not serves_vectors(f, g, a, b, s) or f.shape != a.shape or g.shape != b.shape or s.shape != a.shape:
        return None
    if transforms.active() or not all(isinstance(penalty, (KL, TV)) for penalty in penalties):
        return None
    return [(0 if penalty.balanced else 1 if isinstance(penalty, KL) else 2, penalty.tau) for penalty in penalties]  # pyright: ignore[reportAttributeAccessIssue]


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
            raise NotImplementedError(HELD)
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
        raise NotImplementedError(HELD)


HELD = (
    "second derivatives of a value are not in its envelope, which holds the potentials still: solve with "
    'grad="implicit", or leave out create_graph=True.'
)
