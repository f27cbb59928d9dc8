"""What a backend offers: a cost bound to two sides, with two verbs and a transpose.

A softmin of softmins is a softmin: the reduction is associative over blocks of columns, so one verb serves a stored
matrix, streamed tiles, lazy formulas and rows spread over ranks. Weights enter through h = g + eps log b, and everything else
(gradients, marginals, maps) is `apply`. A backend may also run iterations in a way of its own: `iterate` and `run`.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..problem import Problem
from ..vectors import log


class Geometry(ABC):
    """A cost bound to its two sides on one backend. Vectors have the type of the potentials, see `problem.vector_dtype`."""

    #: The type the sweeps run in; its rounding bounds what the loop can reach.
    dtype: torch.dtype
    #: Whether it holds the n-by-m array, so that others of its size are no burden.
    stored: bool = False
    #: Whether a block of iterations is one launch: what takes one iteration at a time, such as annealing, does not pay then.
    single_launch: bool = False
    #: Whether its softmins are torch operations that autograd records as they are.
    native: bool = False
    #: Whether its sums have an error beyond rounding, which is then measured once the loop has ended.
    approximate: bool = False
    #: Sweeps made beside those of the iterations, since they were last counted.
    extra_sweeps: int = 0
    #: The tensors that gradients flow to, as the backend holds them: (C,) for a matrix; alpha, beta, u and v, in this order, for a cost
    #: that folds.
    inputs: tuple[Tensor, ...]

    @property
    @abstractmethod
    def T(self) -> Geometry:
        """The same cost seen from the other side."""

    @property
    def entrywise(self) -> Geometry:
        """The same cost with the matrix as its one input, where the backend holds it; otherwise itself. Through many sweeps derivatives
        are then gathered in the entries, and pulled back to the points once."""
        return self

    @property
    def exact(self) -> Geometry:
        """The same cost without the rounding that this backend was allowed; itself, where it was allowed none."""
        return self

    def finer(self, factor: float) -> Geometry | None:
        """Of an approximate backend one whose error is so many times smaller, None where there is none."""
        return None

    @abstractmethod
    def softmin(self, h: Tensor, eps: float) -> Tensor:
        """(*batch, m) -> (*batch, n):  -eps log sum_j exp((h_j - C_ij) / eps). h = -inf is an empty atom."""

    @abstractmethod
    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        """(*batch, m, c) -> (*batch, n, c):  sum_j exp((k_i + h_j - C_ij) / eps) v_j, the plan times a matrix."""

    def product(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        """`apply` on this rank's rows of v, giving this rank's rows of the result; k and h are whole. Without ranks it is `apply`."""
        return self.apply(k, h, eps, v)

    @abstractmethod
    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        """(*batch, n, m):  exp((k_i + h_j - C_ij) / eps), as an array: this rank's rows of it."""

    @abstractmethod
    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        """The gradient in each of `inputs` of a function whose derivative in C_ij is w_i exp((k_i + h_j - C_ij) / eps).

        Where some of them require a gradient, it may be 0 for the others.
        """

    def initial_rows(self) -> Tensor | None:
        """Row potentials (*batch, n) from which balanced iterations begin, where the backend knows better ones than 0."""
        return None

    def plan_cost(self, k: Tensor, h: Tensor, eps: float) -> Tensor | None:
        """(*batch,):  <P, C>, detached, where the backend knows a way of its own; None where entries are summed."""
        return None

    def first(self, f: Tensor, a: Tensor, eps: float) -> Tensor:
        """T.softmin(f + eps log a), with which the iterations begin: a backend may prepare itself for them."""
        return self.T.update(f, a, eps)

    def update(self, g: Tensor, b: Tensor, eps: float) -> Tensor:
        """softmin(g + eps log b): the update of g, (*batch, n), before it is damped."""
        return self.softmin(weigh(g, b, eps), eps)

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        """k >= 1 plain iterations from g: (f, g, g_next), where f is the update of the g returned and g_next the update of f."""
        (penalty_a, penalty_b), columns = problem.penalties, self.T
        f = g_next = g
        for _ in range(k):
            g = g_next
            f = penalty_a.damp(self.update(g, problem.b, eps), eps)
            g_next = penalty_b.damp(columns.update(f, problem.a, eps), eps)
        return f, g, g_next

    def run(self, step: Any, state: Any, k: int) -> Any:
        """The state after k iterations of a step (`gpu_ot.solver.step`), acceleration included."""
        if plain := step.plain_among(state, k):
            state = step.moved(self, state, state.g_next, None, plain, plain=True)
        for _ in range(k - plain):
            state = step.advance(self, state)
        return self.counted(state) if self.extra_sweeps else state

    def counted(self, state: Any) -> Any:
        """The state, with the extra sweeps, which are then forgotten."""
        extra, self.extra_sweeps = self.extra_sweeps, 0
        return replace(state, n_sweeps=state.n_sweeps + extra)


class Attached(Geometry):
    """A backend with other tensors of the same values in the place of its inputs: those that derivatives are to flow to."""

    def __init__(self, backend: Geometry, inputs: Sequence[Tensor]) -> None:
        self.backend, self.inputs = backend, tuple(inputs)
        self.dtype, self.stored = backend.dtype, backend.stored

    @property
    def T(self) -> Attached:
        inputs = self.inputs
        if folds(self.backend):
            alpha, beta, u, v = inputs
            inputs = beta, alpha, v, u
        elif self.stored:
            inputs = (inputs[0].mT,)
        return Attached(self.backend.T, inputs)

    def softmin(self, h: Tensor, eps: float) -> Tensor:
        return self.backend.softmin(h, eps)

    def apply(self, k: Tensor, h: Tensor, eps: float, v: Tensor) -> Tensor:
        return self.backend.apply(k, h, eps, v)

    def plan(self, k: Tensor, h: Tensor, eps: float) -> Tensor:
        return self.backend.plan(k, h, eps)

    def pull_back(self, k: Tensor, h: Tensor, eps: float, w: Tensor) -> tuple[Tensor, ...]:
        return self.backend.pull_back(k, h, eps, w)


def attach(geometry: Geometry, inputs: Sequence[Tensor]) -> Geometry:
    """The geometry with these inputs, whose values are those that it has."""
    if len(inputs) == len(geometry.inputs) and all(new is old for new, old in zip(inputs, geometry.inputs, strict=True)):
        return geometry
    return Attached(geometry.backend if isinstance(geometry, Attached) else geometry, inputs)


def folds(geometry: Geometry) -> bool:
    """Whether the inputs are alpha, beta, u and v as seen from this side, which then turn with it."""
    if isinstance(geometry, Attached):
        return folds(geometry.backend)
    inputs = geometry.inputs
    return len(inputs) == 4 and inputs[0].ndim + 1 == inputs[2].ndim and geometry.T.inputs[0] is inputs[1]


#: (right (*batch, c, m), left (*batch, c, n)) -> right P^T and left P, None for None. Lying, since products of thin matrices take
#: half as long that way (measured for c = 4 on 2 cores; from c = 32 on no difference).
Both = Callable[[Tensor | None, Tensor | None], tuple[Tensor | None, Tensor | None]]


def pull_folded(inputs: Sequence[Tensor], w: Tensor, products: Both) -> tuple[Tensor, ...]:
    """`Geometry.pull_back` for C_ij = alpha_i + beta_j - <u_i, v_j>:  w P1, P^T w, -w Pv and -P^T (w u), from products with the plan.

    In the type of w until the end. A side of which nothing requires a gradient is left out.
    """
    _, _, u, v = inputs
    wanted = needed(inputs)
    row = w.unsqueeze(-2)
    right = _with_ones(v, w.dtype) if wanted[0] or wanted[2] else None
    left = row * _with_ones(u, w.dtype) if wanted[1] or wanted[3] else None
    on_rows, on_columns = products(right, left)
    grads = [torch.zeros_like(z) for z in inputs]
    if on_rows is not None:
        on_rows = row * on_rows
        grads[0], grads[2] = on_rows[..., -1, :], -on_rows[..., :-1, :].mT
    if on_columns is not None:
        grads[1], grads[3] = on_columns[..., -1, :], -on_columns[..., :-1, :].mT
    return tuple(grad.sum_to_size(z.shape).to(z.dtype) for grad, z in zip(grads, inputs, strict=True))


def needed(inputs: Sequence[Tensor]) -> list[bool]:
    """Which inputs require a gradient; all, where none does, since `pull_back` is also called without autograd."""
    wanted = [z.requires_grad for z in inputs]
    return wanted if any(wanted) else [True] * len(wanted)


def _with_ones(z: Tensor, dtype: torch.dtype) -> Tensor:
    """[z, 1]^T, (*batch, d + 1, n)."""
    z = z.detach().mT.to(dtype)
    return torch.cat((z, torch.ones_like(z[..., :1, :])), -2)


def weigh(g: Tensor, b: Tensor, eps: float) -> Tensor:
    """h = g + eps log b; an empty atom is -inf whatever its potential."""
    return torch.where(b > 0, g + eps * log(b), -math.inf)
