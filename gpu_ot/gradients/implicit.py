"""Potentials as functions of the cost and the weights, through the equations they solve.

At convergence f = damp_a(s_a) and g = damp_b(s_b) with s_a = softmin(C, g, b) and s_b = softmin(C^T, f, a). With row-stochastic
A = -ds_a / dg and B = -ds_b / df, and the slopes D = diag(damp'), small changes obey

    df = D_a (r_a - A dg),    dg = D_b (r_b - B df)                                    (tangent)

for r the change of s_a and s_b at fixed potentials; and cotangents F, G of f, g pull back to cotangents of s_a, s_b

    w_a = D_a (F - B^T w_b),    w_b = D_b (G - A^T w_a).                                (adjoint)

As diag(rho) A = P = B^T diag(kappa) for the plan P and its marginals, both reduce to one symmetric system in the columns,

    (diag(kappa) / D_b - P^T D_a A) q = rhs,

solved by conjugate gradients at two products with the plan an iteration. Where both marginals are hard, it is singular along
q = 1, the gauge (f + c, g - c), and solved in the complement. In the same way Luise et al. 2018, arXiv:1805.11897, and
Cuturi et al. 2020, arXiv:2002.03229.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..errors import NotConverged
from ..geometry.protocol import Geometry, attach, weigh
from ..penalties import Penalty
from ..problem import Problem
from .envelope import Penalties, dual, pull_dual, refuse_learnable
from .operators import Each, apply, pull_apply, pull_softmin, softmin

#: Relative residual of the linear systems, where sweeps run in float64 and where they do not, and the iterations allowed to reach it.
TOL, TOL_SINGLE, LIMIT = 1e-11, 1e-6, 5000
#: How much more than the tolerance is let pass where rounding explains it. Without a bound, a solution that grows along a direction in
#: which the system is all but singular would explain anything.
SLACK = 100.0
#: Iterations between checks of the residual on a device where a check makes the host wait.
CHECK_EVERY = 8


def potentials(
    problem: Problem, geometry: Geometry, f: Tensor, g: Tensor, *, caution: str = "", tol: float | None = None, limit: int = LIMIT
) -> tuple[Tensor, Tensor]:
    """(f, g) as differentiable functions of the cost and the weights, given their values at convergence.

    As exact as the iterations left f and g. Between hard marginals (f + c, g - c) serves as well: they come back in the gauge
    <a, f> = <b, g>, in which their derivatives are meant. The same freedom is left by TV penalties that clamp nothing; there only what it
    does not change, the plan and the value, has a derivative. Can be differentiated again wherever `operators.pull_back` can.

    caution  said as a warning in the backward, for potentials that are not converged.
    tol      relative residual of the linear systems; TOL or TOL_SINGLE when left out.
    limit    conjugate-gradient iterations; where they run out, the backward raises NotConverged.
    """
    refuse_learnable(problem, "implicit")
    if tol is None:
        tol = TOL if geometry.dtype == torch.float64 else TOL_SINGLE
    system = _System(geometry, geometry.T, problem.penalties, problem.eps, tol, limit, caution)
    a, b = problem.a, problem.b
    with torch.no_grad():  # no marginal tells the loop about the potentials of empty columns, so they may lag behind
        g = torch.where(b > 0, g, problem.penalties[1].damp(softmin(system.columns, f, a, problem.eps), problem.eps))
    f, g = _Potentials.apply(system, f.detach(), g.detach(), a, b, *geometry.inputs, *system.columns.inputs)
    if problem.balanced:
        heights = ((w * torch.where(z.isfinite(), z, 0.0)).sum(-1, keepdim=True) for w, z in ((a, f), (b, g)))
        over = (next(heights) - next(heights)) / (2 * a.sum(-1, keepdim=True))
        f, g = f - over, g + over
    return f, g


def value(problem: Problem, geometry: Geometry, f: Tensor, g: Tensor) -> Tensor:
    """`envelope.value` at the potentials of `potentials`, (*batch,): its first derivatives cost one sweep, as the envelope's do, and see
    f and g move when they are differentiated again."""
    return _Value.apply(problem.penalties, problem.eps, geometry, f, g, problem.a, problem.b, *geometry.inputs)


@dataclass(frozen=True)
class _System:
    rows: Geometry
    columns: Geometry
    penalties: tuple[Penalty, Penalty]
    eps: float
    tol: float
    limit: int
    caution: str

    def attached(self, inputs: Sequence[Tensor]) -> _System:
        """The same system of the tensors that derivatives are to flow to, those of the rows and those of the columns."""
        half = len(inputs) // 2
        return replace(self, rows=attach(self.rows, inputs[:half]), columns=attach(self.columns, inputs[half:]))


class _Potentials(Each):
    @staticmethod
    def forward(system: _System, f: Tensor, g: Tensor, a: Tensor, b: Tensor, *inputs: Tensor) -> tuple[Tensor, Tensor]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return f.clone(), g.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.system = inputs[0]
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*output, *inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor | None) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if all(grad is None for grad in grad_outputs):  # the value alone was differentiated, see _Value
            return (None,) * len(ctx.needs_input_grad)
        f, g, a, b, *inputs = ctx.saved_tensors
        system = ctx.system.attached(inputs)
        cotangents = [torch.zeros_like(z) if grad is None else grad for z, grad in zip((f, g), grad_outputs, strict=True)]
        if system.caution:
            warnings.warn(system.caution, RuntimeWarning, stacklevel=2)
        rows, columns, eps = system.rows, system.columns, system.eps
        s_a, s_b = softmin(rows, g, b, eps), softmin(columns, f, a, eps)
        w_a, w_b = _Linear.apply(system, True, *cotangents, s_a, s_b, f, g, a, b, *rows.inputs, *columns.inputs)
        _, _, _, need_a, need_b, *need = ctx.needs_input_grad
        count = len(rows.inputs)
        _, grad_b, *into_rows = pull_softmin(rows, g, b, eps, s_a, w_a, [False, need_b, *need[:count]])
        _, grad_a, *into_columns = pull_softmin(columns, f, a, eps, s_b, w_b, [False, need_a, *need[count:]])
        return None, None, None, grad_a, grad_b, *into_rows, *into_columns


class _Linear(Each):
    """Solves the adjoint system, or the tangent one. The derivative of either takes a solve of the other:

    for tangents (t_a, t_b) and adjoints (w_a, w_b) the equations move by d(<w_a, A t_b> + <w_b, B t_a>).
    """

    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        system: _System, adjoint: bool, on_rows: Tensor, on_columns: Tensor,
        s_a: Tensor, s_b: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor, *inputs: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        return _solve(system, adjoint, on_rows, on_columns, s_a, s_b, f, g, a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        ctx.system, ctx.adjoint = inputs[:2]
        ctx.save_for_backward(*output, *inputs[4:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        *found, s_a, s_b, f, g, a, b = ctx.saved_tensors[:8]
        system = ctx.system.attached(ctx.saved_tensors[8:])
        rows, columns, eps = system.rows, system.columns, system.eps
        into = _Linear.apply(system, not ctx.adjoint, *grad_outputs, s_a, s_b, f, g, a, b, *rows.inputs, *columns.inputs)
        (t_a, t_b), (w_a, w_b) = (into, found) if ctx.adjoint else (found, into)
        need, count = ctx.needs_input_grad[10:], len(rows.inputs)
        moved = []  # A t_b = apply(s_a, g, b t_b) and B t_a = apply(s_b, f, a t_a), and what these are pulled back to
        for side, s, h, weight, t, w, needed in (
            (rows, s_a, g, b, t_b, w_a, need[:count]),
            (columns, s_b, f, a, t_a, w_b, need[count:]),
        ):
            s = torch.where(s.isfinite(), s, -math.inf)
            v = (weight * t).unsqueeze(-1)
            moved.append((t, *pull_apply(side, s, h, eps, v, apply(side, s, h, eps, v), -w.unsqueeze(-1), [True] * 3 + list(needed))))
        (t_b, grad_s_a, grad_g, grad_v_b, *into_rows), (t_a, grad_s_b, grad_f, grad_v_a, *into_columns) = moved
        grad_a, grad_b = t_a * grad_v_a.squeeze(-1), t_b * grad_v_b.squeeze(-1)
        return None, None, *into, grad_s_a, grad_s_b, grad_f, grad_g, grad_a, grad_b, *into_rows, *into_columns


class _Value(Each):
    @staticmethod
    def forward(  # pyright: ignore[reportIncompatibleMethodOverride]
        penalties: Penalties, eps: float, geometry: Geometry, f: Tensor, g: Tensor, a: Tensor, b: Tensor, *inputs: Tensor
    ) -> Tensor:
        return dual(penalties, eps, geometry, f, g, a, b)[0]

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.penalties, ctx.eps, ctx.geometry = inputs[:3]
        ctx.save_for_backward(*inputs[3:])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        f, g, a, b, *inputs = ctx.saved_tensors
        geometry = attach(ctx.geometry, inputs)
        s = softmin(geometry, g, b, ctx.eps)
        grads = pull_dual(ctx.penalties, ctx.eps, geometry, f, g, a, b, s, grad_outputs[0], ctx.needs_input_grad[5:])
        return *(None,) * 5, *grads  # nothing for f and g, at which the dual is stationary


def _solve(
    system: _System, adjoint: bool, on_rows: Tensor, on_columns: Tensor,
    s_a: Tensor, s_b: Tensor, f: Tensor, g: Tensor, a: Tensor, b: Tensor,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(w_a, w_b) of the adjoint system for (F, G) = (on_rows, on_columns), or (df, dg) of the tangent one for (r_a, r_b)."""
    eps = system.eps
    k, h = weigh(f, a, eps), weigh(g, b, eps)
    slope_a, slope_b = (_slope(penalty, s, eps) for penalty, s in zip(system.penalties, (s_a, s_b), strict=True))
    rho, kappa = (torch.where(w > 0, w * ((z - s) / eps).exp(), 0.0) for w, z, s in ((a, f, s_a), (b, g, s_b)))
    s_a, s_b = (torch.where(s.isfinite(), s, -math.inf) for s in (s_a, s_b))

    def times(geometry: Geometry, k: Tensor, h: Tensor, z: Tensor) -> Tensor:
        return geometry.apply(k, h, eps, z.unsqueeze(-1)).squeeze(-1)

    def A(z: Tensor) -> Tensor:
        return times(system.rows, s_a, h, z)

    def A_T(z: Tensor) -> Tensor:
        return times(system.columns, h, s_a, z)

    def P(z: Tensor) -> Tensor:
        return times(system.rows, k, h, z)

    def P_T(z: Tensor) -> Tensor:
        return times(system.columns, h, k, z)

    heavy = (kappa > 0) & (slope_b > 0)  # the columns that can answer
    diagonal = torch.where(heavy, kappa / torch.where(heavy, slope_b, 1.0), 1.0)
    # The gauge is free where nothing gives way on either side.
    free = ((slope_a == 1) | (rho == 0)).all(-1, keepdim=True) & ((slope_b == 1) | (kappa == 0)).all(-1, keepdim=True)

    def solve(first: Tensor, second: Tensor) -> Tensor:
        return _conjugate_gradients(lambda q: diagonal * q - P_T(slope_a * A(q)), first, second, diagonal, heavy, free, system)

    if adjoint:
        # Empty columns see the rows and are not seen: their cotangent is known, and first handed on to the rows.
        empty = torch.where(kappa > 0, 0.0, slope_b * on_columns)
        on_rows = on_rows - times(system.rows, k, s_b, empty)
        w_a = slope_a * (on_rows - P(solve(on_columns, A_T(slope_a * on_rows))))
        return w_a, slope_b * (on_columns - A_T(w_a))
    f_dot = slope_a * (on_rows - A(solve(kappa * on_columns, P_T(slope_a * on_rows))))
    return f_dot, slope_b * (on_columns - times(system.columns, s_b, k, f_dot))


def _slope(penalty: Penalty, s: Tensor, eps: float) -> Tensor:
    """damp' at s, which for every penalty here is constant but for kinks."""
    with torch.enable_grad():
        s = s.detach().requires_grad_()
        (slope,) = torch.autograd.grad(penalty.damp(s, eps).sum(), s)
    return slope


def _conjugate_gradients(
    matvec: Callable[[Tensor], Tensor], first: Tensor, second: Tensor, diagonal: Tensor, heavy: Tensor, free: Tensor, system: _System
) -> Tensor:
    """q with matvec(q) = first - second on the `heavy` columns and 0 elsewhere, for each problem of a batch; along 1 undetermined
    where `free`.

    Preconditioned by `diagonal`, and stopped in the norm that this defines by the true residual: within `system.tol` of the right-hand
    side, or within what rounding q in the sweeps makes of it if that is no more than SLACK times as much. A right-hand side that is nothing
    but the rounding of its two parts is not solved for. Raises NotConverged.
    """
    weight = torch.where(heavy, diagonal, 0.0)

    def within(r: Tensor) -> Tensor:
        """What of r the system can answer: its range is orthogonal to 1 where the gauge is free."""
        r = torch.where(heavy, r, 0.0)
        return r - torch.where(free, weight * (r.sum(-1, keepdim=True) / weight.sum(-1, keepdim=True)), 0.0)

    def dot(x: Tensor, y: Tensor) -> Tensor:
        return (x * y).sum(-1, keepdim=True)

    def norm(r: Tensor) -> Tensor:
        return dot(r, r / diagonal).sqrt()

    def allowed(q: Tensor) -> Tensor:
        return (digit * dot(q, weight * q).sqrt()).clamp(min=system.tol * size, max=SLACK * system.tol * size).clamp(min=least)

    digit = 8 * torch.finfo(system.rows.dtype).eps
    rhs = within(first - second)
    q, r, size, least = torch.zeros_like(rhs), rhs, norm(rhs), digit * (norm(within(first)) + norm(within(second)))
    left = torch.full_like(size, math.inf)
    every = 1 if rhs.device.type == "cpu" else CHECK_EVERY
    taken = 0
    while True:
        z = r / diagonal
        p, rz, goal = z, dot(r, z), (0.5 * allowed(q)).square()
        for _ in range(system.limit - taken):
            taken += 1
            Sp = within(matvec(p))
            curvature = dot(p, Sp)
            going = (rz > goal) & (curvature > 0)
            step = torch.where(going, rz / torch.where(going, curvature, 1.0), 0.0)
            q, r = q + step * p, r - step * Sp
            z = r / diagonal
            rz, before = torch.where(going, dot(r, z), rz), rz
            p = z + torch.where(going, rz / torch.where(going, before, 1.0), 0.0) * p
            if taken % every == 0 and not bool(going.any().item()):
                break
        # The residual above is a recurrence, which goes on falling where the true one stands still.
        r = within(rhs - matvec(q))
        left, last = norm(r), left
        met = left <= allowed(q)
        done, better = torch.stack((met.all(), (~met & (left < 0.5 * last)).any())).tolist()
        if done:
            return q
        if taken >= system.limit or not better:
            worst = float(torch.where(met, 0.0, left / size).amax())
            raise NotConverged(
                f"the linear system behind an implicit derivative is not solved: after {taken} conjugate-gradient iterations "
                f"{int((~met).sum())} of {met.numel()} problems have a relative residual of up to {worst:.2g}, above {system.tol:.2g}. "
                "It is as ill-conditioned as the iterations are slow, and singular where the plan falls into parts whose potentials "
                'move freely against each other: raise eps, solve to a smaller tol, pass float64 costs, or use grad="unroll".'
            )
