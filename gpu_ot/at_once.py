"""Losses between two small clouds on a CPU in one piece: solves, values and derivatives as compiled functions.

The same problems, steps and rules as everywhere else; what is not that plain goes the usual way.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from . import compiled, transforms
from .costs import Cost
from .geometry.absorbed import range_of
from .gradients.envelope import HELD
from .problem import Problem
from .solver import annealing
from .solver.compiled import STATUS, resolved, rule_of, tuning
from .solver.criterion import Marginal
from .solver.status import CONVERGED, DIVERGED, Status

#: Bytes of a kernel up to which one core is the faster way: three solves of one after the other.
LARGEST_BYTES = 2**24


class Term(NamedTuple):
    """A transport value, its derivatives in C, a and b (empty without slopes), its potential f, and how its loop ended."""

    value: float
    slope: np.ndarray
    a: np.ndarray
    b: np.ndarray
    f: np.ndarray
    n_sweeps: int
    status: Status


def serves(problem: Problem) -> bool:
    """Whether this is such a problem: one pair of clouds, whose three kernels are small."""
    n, m = problem.shape[-2:]
    return (
        len(problem.shape) == 2 and problem.a.device.type == "cpu" and max(n, m) ** 2 * problem.dtype.itemsize <= LARGEST_BYTES
        and compiled.refused() is None and not transforms.active()
    )  # fmt: skip


def divergence(problem: Problem, debias: bool, tol: float, max_iter: int) -> tuple[Tensor, Status, int] | None:
    """(the value of `losses.divergence`, or of OT(a, b) without `debias`, with its first derivatives; a status; sweeps); None where the
    usual way may do better."""
    x, y = problem.cost.inputs.values()
    needed = [torch.is_grad_enabled() and z.requires_grad for z in (x, y, problem.a, problem.b)]
    solve = functools.partial(_solved, problem, any(needed), tol, max_iter)
    a, b = _numbers(problem.a), _numbers(problem.b)
    zeros = np.zeros(len(a))
    with torch.no_grad():
        cost = problem.cost.of(z.detach() for z in (x, y))
        if debias:
            own = solve(cost.within(0), a, a, 0, zeros), solve(cost.within(1), b, b, 1, np.zeros(len(b)))
            between = solve(cost, a, b, None, own[0].f)
        else:
            own, between = (), solve(cost, a, b, None, zeros)
    terms = (between, *own)
    if any(term.status is DIVERGED for term in terms):
        return None
    masses, eps = a.sum() - b.sum(), problem.eps
    value = between.value
    if debias:
        value += eps / 2 * masses**2 - sum(term.value for term in own) / 2
    out = torch.tensor(value, dtype=torch.float64)
    if any(needed):
        out = _Held.apply(x, y, problem.a, problem.b, out, functools.partial(_slopes, cost, eps * masses, terms, needed))
    status = next((term.status for term in terms if term.status is not CONVERGED), CONVERGED)
    return out, status, sum(term.n_sweeps for term in terms)


def held_cost(problem: Problem, tol: float, max_iter: int) -> tuple[Tensor, Tensor, Status, int] | None:
    """(<P, C> with P constant, the plan P (n, m), a status, iterations) of a cost between clouds; None as for `divergence`."""
    from .compiled.block import Measures, State
    from .compiled.transport import inner, write_plan

    x, y = problem.cost.inputs.values()
    with torch.no_grad():
        cost = problem.cost.of(z.detach() for z in (x, y))
        a, b = _numbers(problem.a), _numbers(problem.b)
        kernel, f, g, counts, status = _search(problem, cost, a, b, None, np.zeros(len(a)), tol, max_iter)
        if status is DIVERGED:
            return None
        tau_a, tau_b = _taus(problem.penalties)
        P = np.empty_like(kernel.K)
        write_plan(kernel, Measures(a[None], b[None], problem.eps, tau_a, tau_b), State(f, g, g), P)
        plan, out = torch.from_numpy(P), torch.tensor(inner(P, kernel.C), dtype=problem.given_dtype)
    if torch.is_grad_enabled() and (x.requires_grad or y.requires_grad):
        out = _Held.apply(x, y, problem.a, problem.b, out, lambda: [*cost.pull(plan), None, None])  # pyright: ignore[reportAttributeAccessIssue]
    return out, plan, status, int(counts[0])


def _solved(
    problem: Problem, slopes: bool, tol: float, max_iter: int, cost: Cost, a: np.ndarray, b: np.ndarray, side: int | None, start: np.ndarray
) -> Term:
    from .compiled.search import value

    kernel, f, g, counts, status = _search(problem, cost, a, b, side, start, tol, max_iter)
    taus = _taus(problem.penalties if side is None else (problem.penalties[side],) * 2)
    ga, gb = np.empty(len(a)), np.empty(len(b))
    D = value(kernel, a, b, problem.eps, *taus, f[0], g[0], slopes, ga, gb)
    return Term(D, kernel.K, ga, gb, f[0], int(counts[2]), status)


def _search(
    problem: Problem, cost: Cost, a: np.ndarray, b: np.ndarray, side: int | None, start: np.ndarray, tol: float, max_iter: int
) -> tuple[Any, np.ndarray, np.ndarray, np.ndarray, Status]:
    """The kernel, f (1, n), g (1, m), counts and status between two measures, or of one side's measure and itself. Where eps
    is not resolved it is DIVERGED, too: the usual way says so."""
    from .compiled.search import Annealing, search

    C = cost.dense().contiguous().numpy()
    taus = _taus(problem.penalties if side is None else (problem.penalties[side],) * 2)
    constants = Annealing(annealing.PROBE_ITERATIONS, annealing.SETTLE, annealing.FEW, annealing.ANNEAL_FACTOR)
    kernel, f, g, counts, status, _ = search(
        C, a, b, problem.eps, *taus, start, a, _rule(tol, problem.dtype), tuning(side is None and problem.balanced), constants,
        side is not None, *range_of(C.itemsize), max_iter,
    )  # fmt: skip
    end = STATUS[status]
    return kernel, f, g, counts, end if end is CONVERGED or resolved(f, g, problem.eps) else DIVERGED


def _numbers(w: Tensor) -> np.ndarray:
    return w.detach().resolve_neg().contiguous().numpy()


def _taus(penalties: Sequence[Any]) -> tuple[float, float]:
    return float(penalties[0].tau), float(penalties[1].tau)


@functools.lru_cache
def _rule(tol: float, dtype: torch.dtype) -> Any:
    return rule_of(Marginal(tol), dtype)


def _slopes(cost: Any, pull: float, terms: tuple[Term, ...], needed: list[bool]) -> list[Tensor | None]:
    """The derivatives in x, y, a and b. pull: that of eps/2 (|a| - |b|)^2 in |a|."""
    between, *own = terms
    on_points: list[Any] = [None, None]
    if any(needed[:2]):
        on_points[:] = cost.pull(torch.from_numpy(between.slope))
        for side, term in enumerate(own):
            if needed[side]:
                rows, columns = cost.within(side).pull(torch.from_numpy(term.slope))
                on_points[side] -= (rows + columns) / 2
    ga, gb = between.a, between.b
    if own:
        ga, gb = ga - (own[0].a + own[0].b) / 2 + pull, gb - (own[1].a + own[1].b) / 2 - pull
    found = [*on_points, torch.from_numpy(ga), torch.from_numpy(gb)]
    return [z if want else None for z, want in zip(found, needed, strict=True)]


class _Held(transforms.Function):
    """A value known already, with its first derivatives."""

    opaque = True

    @staticmethod
    def forward(x: Tensor, y: Tensor, a: Tensor, b: Tensor, value: Tensor, slopes: Any) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        return value

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.slopes = inputs[-1]()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:  # pyright: ignore[reportIncompatibleMethodOverride]
        if torch.is_grad_enabled():
            raise NotImplementedError(HELD)
        return *(z if z is None else grad_outputs[0].to(z.dtype) * z for z in ctx.slopes), None, None
