"""Small problems on a GPU, whole: k iterations of every problem of a batch in one launch, one program each.

The matrices are formed once, batched, also for costs between clouds. The kernel first absorbs the potentials it starts from. Every
iteration then reads that absorbed array, n m words that stay in the caches beside one multiprocessor. Reading points instead would
save the sweep that absorbs, and cost d more products a pair in every iteration.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..penalties import KL
from ..problem import Problem
from .dense import Dense
from .products import kernels_refused, vectors


class Resident(Dense):
    """`Dense` in all but `iterate` and `run`, which are one launch.

    C is (n, m), shared by the batch, or (*batch, n, m) with batch axes that broadcast to the problem's.
    """

    single_launch = True

    def __init__(self, C: Tensor) -> None:
        super().__init__(C)
        self.C = self.C.contiguous()  # once, and not in every launch

    def iterate(self, problem: Problem, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
        a, b = problem.a, problem.b
        if g.shape != b.shape:  # more potentials than problems
            return super().iterate(problem, g, eps, k)
        f, g_now, g_next = resident_iterate(
            self._costs(problem), vectors(a), vectors(b), g.reshape(-1, g.shape[-1]), eps, *_taus(problem), k
        )
        return f.view(a.shape), g_now.view(g.shape), g_next.view(g.shape)

    def run(self, step: Any, state: Any, k: int) -> Any:
        """One launch, acceleration included."""
        problem, plain = step.problem, step.unproposed(state, k)
        if plain is None or plain == k or torch.is_grad_enabled() or state.g.shape != problem.b.shape or state.inexact is not None:
            return super().run(step, state, k)
        from ..kernels import resident  # pyright: ignore[reportMissingImports]
        from ..kernels.step import Memory  # pyright: ignore[reportMissingImports]

        f, g, g_next = (z.reshape(-1, z.shape[-1]).contiguous() for z in (state.f, state.g, state.g_next))
        memory = state.memory
        if plain or memory is None:
            memory = Memory.of(g, len(g), step.accelerator.memory)
        moved = resident.run(
            self._costs(problem), vectors(problem.a), vectors(problem.b), f, g, g_next, step.eps, k,
            taus=_taus(problem), plain=plain, memory=memory, gauge=step.accelerator.gauge, shifted=not problem.balanced,
            done=None if state.done is None else state.done.reshape(-1),
        )  # fmt: skip
        f, g, g_next = (z.view(old.shape) for z, old in zip(moved, (state.f, state.g, state.g_next), strict=True))
        n_iter, age, n_sweeps = state.n_iter + k, state.age + k, state.n_sweeps + 2 * k
        return replace(state, f=f, g=g, g_next=g_next, memory=memory, n_iter=n_iter, age=age, n_sweeps=n_sweeps, plain=False)

    def _costs(self, problem: Problem) -> Tensor:
        """(B, n, m), or (1, n, m) shared by the batch."""
        n, m = self.C.shape[-2:]
        return (self.C if self.C.numel() == n * m else self.C.expand(*problem.shape)).reshape(-1, n, m)

    @classmethod
    def refuse(cls, problem: Problem) -> str | None:
        """Why this backend cannot serve the problem, or None. Reads no numbers, and waits for no device."""
        if why := kernels_refused(problem.a.device):
            return why
        if problem.dtype == torch.float64:
            return "its numbers are float64 and the kernel is float32. Pass a float32 cost if six digits are enough."
        if not all(penalty.balanced or isinstance(penalty, KL) for penalty in problem.penalties):
            return "the kernel knows hard marginals and KL penalties, and one of these is neither."
        from ..kernels.resident import LARGEST, fits  # pyright: ignore[reportMissingImports]

        n, m = problem.shape[-2:]
        if not fits(n, m):
            return (
                f"a problem is {n} by {m}, and one program serves up to {LARGEST} columns and 2^31 entries, padded to a power of two of "
                "columns. Where the rows are fewer, swap the two sides."
            )
        return None

    @classmethod
    def memory(cls, problem: Problem) -> int:
        """Bytes of the matrix and of the absorbed one, whose rows are padded to a power of two and whose number is to a tile's."""
        n, m = problem.shape[-2:]
        width = max(16, 1 << (m - 1).bit_length())
        height = -(-n // 16) * 16
        return problem.dtype.itemsize * problem.shape[:-2].numel() * (n * m + height * width)


def _taus(problem: Problem) -> tuple[float, float]:
    tau_a, tau_b = (penalty.tau if isinstance(penalty, KL) else math.inf for penalty in problem.penalties)
    return tau_a, tau_b


# As an operator, so that torch.compile passes over the launch instead of breaking its graph there.
@torch.library.custom_op(
    "gpu_ot::resident_iterate",
    mutates_args=(),
    schema="(Tensor C, Tensor a, Tensor b, Tensor g, float eps, float tau_a, float tau_b, int k) -> (Tensor, Tensor, Tensor)",
)
def resident_iterate(
    C: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float, tau_a: float, tau_b: float, k: int
) -> tuple[Tensor, Tensor, Tensor]:
    """f (B, n), g and g_next (B, m) after k plain iterations, from C (B or 1, n, m), a (B, n), b and g (B, m): gpu_ot.kernels.resident."""
    from ..kernels.resident import run  # pyright: ignore[reportMissingImports]

    return run(C, a, b, None, None, g, eps, k, taus=(tau_a, tau_b))


@resident_iterate.register_fake
def _(C, a, b, g, eps, tau_a, tau_b, k):  # type: ignore[no-untyped-def]
    return g.new_empty(len(g), a.shape[-1]), g.new_empty(g.shape), g.new_empty(g.shape)
