"""The value, the dual at given potentials, and the vectors its gradient is made of: one launch each, one program per problem.

The twin of `dual` and of the vectors in `pull_dual` of gpu_ot.gradients.envelope.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of
from .step import expm1

#: How dearly a marginal is held.
HARD, KL, TV = 0, 1, 2
Penalty = tuple[int, float]  # kind, tau


def dual(a: Tensor, b: Tensor, f: Tensor, g: Tensor, s: Tensor, eps: float, rows: Penalty, columns: Penalty) -> Tensor:
    """(B,): sum a reward_a(f) + sum b reward_b(g) - eps (sum a exp((f - s) / eps) - |a||b|), for vectors (B, n) and (B, m) in float64.

    a and b may be (n,) and (m,), shared by the batch. Empty atoms count for nothing, whatever their potentials.
    """
    (batch, m), n = g.shape, f.shape[-1]
    D = torch.empty(batch, dtype=torch.float64, device=g.device)
    block = _block(n, m)
    with on_device_of(g):
        dual_kernel[(batch,)](
            a, b, f, g, s, D, n, m, *_strides(a, b), float(eps), float(rows[1]), float(columns[1]),
            ROWS=rows[0], COLUMNS=columns[0], BLOCK=block, num_warps=block // 64, **FUSED,
        )  # fmt: skip
    return D


def pull(
    a: Tensor, b: Tensor, f: Tensor, g: Tensor, s: Tensor, grad: Tensor, eps: float, rows: Penalty, columns: Penalty
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(k, h, w, grad_a, grad_b) for a function whose derivative in D is grad (B,).

    Its derivative in C_ij is w_i exp((k_i + h_j - C_ij) / eps), with k = s, or 0 where s is inf, and h = g + eps log b. grad_a is the
    whole derivative in a, grad_b that in b beside -eps sum_i w_i exp((k_i + g_j - C_ij) / eps).
    """
    (batch, m), n = g.shape, f.shape[-1]
    k, w, grad_a = (torch.empty_like(f) for _ in range(3))
    h, grad_b = torch.empty_like(g), torch.empty_like(g)
    block = _block(n, m)
    with on_device_of(g):
        pull_kernel[(batch,)](
            a, b, f, g, s, grad, k, h, w, grad_a, grad_b, n, m, *_strides(a, b), float(eps), float(rows[1]), float(columns[1]),
            ROWS=rows[0], COLUMNS=columns[0], BLOCK=block, num_warps=block // 64, **FUSED,
        )  # fmt: skip
    return k, h, w, grad_a, grad_b


def _block(n: int, m: int) -> int:
    return min(512, max(64, triton.next_power_of_2(max(n, m))))


def _strides(a: Tensor, b: Tensor) -> tuple[int, int]:
    return a.shape[-1] if a.dim() > 1 else 0, b.shape[-1] if b.dim() > 1 else 0


@triton.jit
def reward(f, tau, KIND: tl.constexpr):
    """What a unit of mass at potential f earns in the dual."""
    if KIND == 1:
        f = -tau * expm1(-f / tau)
    if KIND == 2:
        f = tl.minimum(f, tau)
    return f


@triton.jit(do_not_specialize=COUNTS)
def dual_kernel(
    a, b, f, g, s, D, n, m, a_stride, b_stride, eps: tl.float64, tau_a: tl.float64, tau_b: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    a += problem * a_stride
    b += problem * b_stride
    zero = tl.full([], 0.0, tl.float64)
    value = zero
    sent = zero
    mass_a = zero
    mass_b = zero
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        weight = tl.load(a + at, mask=at < n, other=0.0)
        x = tl.load(f + problem * n + at, mask=weight > 0, other=0.0)
        t = tl.load(s + problem * n + at, mask=weight > 0, other=0.0)
        value += tl.sum(tl.where(weight > 0, weight * reward(x, tau_a, ROWS), 0.0), 0)
        there = (weight > 0) & (tl.abs(t) < float("inf"))
        sent += tl.sum(tl.where(there, weight * tl.exp(tl.where(there, x - t, 0.0) / eps), 0.0), 0)
        mass_a += tl.sum(weight, 0)
    for j in range(0, m, BLOCK):
        at = j + tl.arange(0, BLOCK)
        weight = tl.load(b + at, mask=at < m, other=0.0)
        y = tl.load(g + problem * m + at, mask=weight > 0, other=0.0)
        value += tl.sum(tl.where(weight > 0, weight * reward(y, tau_b, COLUMNS), 0.0), 0)
        mass_b += tl.sum(weight, 0)
    tl.store(D + problem, value - eps * (sent - mass_a * mass_b))


@triton.jit(do_not_specialize=COUNTS)
def pull_kernel(
    a, b, f, g, s, grad, k, h, w, grad_a, grad_b, n, m, a_stride, b_stride, eps: tl.float64, tau_a: tl.float64, tau_b: tl.float64,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    problem = tl.program_id(0).to(tl.int64)
    a += problem * a_stride
    b += problem * b_stride
    of_value = tl.load(grad + problem)
    mass_a = tl.full([], 0.0, tl.float64)
    mass_b = mass_a
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        mass_a += tl.sum(tl.load(a + at, mask=at < n, other=0.0), 0)
    for j in range(0, m, BLOCK):
        at = j + tl.arange(0, BLOCK)
        mass_b += tl.sum(tl.load(b + at, mask=at < m, other=0.0), 0)
    for i in range(0, n, BLOCK):
        at = i + tl.arange(0, BLOCK)
        weight = tl.load(a + at, mask=at < n, other=0.0)
        x = tl.load(f + problem * n + at, mask=at < n, other=0.0)
        t = tl.load(s + problem * n + at, mask=at < n, other=0.0)
        there = tl.abs(t) < float("inf")
        sent = tl.where(there, tl.exp(tl.where(there, x - t, 0.0) / eps), 0.0)
        tl.store(k + problem * n + at, tl.where(there, t, 0.0), mask=at < n)
        tl.store(w + problem * n + at, tl.where(there, of_value * weight * sent, 0.0), mask=at < n)
        tl.store(grad_a + problem * n + at, of_value * (reward(x, tau_a, ROWS) - eps * sent + eps * mass_b), mask=at < n)
    for j in range(0, m, BLOCK):
        at = j + tl.arange(0, BLOCK)
        weight = tl.load(b + at, mask=at < m, other=0.0)
        y = tl.load(g + problem * m + at, mask=at < m, other=0.0)
        tl.store(h + problem * m + at, tl.where(weight > 0, y + eps * tl.log(weight), -float("inf")), mask=at < m)
        tl.store(grad_b + problem * m + at, of_value * (reward(y, tau_b, COLUMNS) + eps * mass_a), mask=at < m)
