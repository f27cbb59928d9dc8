"""Iterations on an absorbed kernel K_ij = exp((f0_i + g0_j - C_ij) / eps): from a potential to potentials, two launches an iteration.

The twin of `Absorbed._multiply` in gpu_ot.geometry. Between two products only O(n + m) numbers are touched, by one kernel.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of
from .scaling import parts_of_both, powered

BLOCK = 512


@dataclass
class Side:
    """What belongs to one side of an iteration; float64.

    weights  (B, n), or (n,) shared by the batch
    offset   (B, n), the potential that is absorbed
    damping  1 + eps / tau
    power    None for a hard marginal, whose scaling is 1 / sums; (p, c) as in `scaling.both`
    """

    weights: Tensor
    offset: Tensor
    damping: float = 1.0
    power: tuple[Tensor, Tensor] | None = None

    @property
    def stride(self) -> int:
        return self.weights.shape[-1] if self.weights.dim() > 1 else 0


def iterate(
    K: Tensor, rows: Side, columns: Side, g: Tensor, eps: float, k: int, safe: float, *,
    hold: bool = False, inexact: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(f, g, g_next) after k iterations from g (B, m), f the update of g and g_next of f, and whether every sum was exact (0-d bool).

    K        (B, n, m) contiguous, fp32 or fp64, of rows that fit (`scaling.fits`)
    safe     a sum is exact when it is at least this part of the numbers that are summed
    hold     for whoever does not wait for the answer: an inexact iteration gives f = f0 and g_next = g, and the last result is
             whether it, or `inexact` before it, was not exact
    """
    batch, n, m = K.shape
    device, blocks = K.device, triton.cdiv(max(n, m), BLOCK)
    w = torch.empty(batch, m, dtype=K.dtype, device=device)
    f = torch.empty(batch, n, dtype=torch.float64, device=device)
    g_out, g_next = torch.empty_like(g) if k > 1 else g, torch.empty_like(g)
    sizes = torch.empty(batch, blocks, 5, dtype=torch.float64, device=device)
    exact = torch.empty((), dtype=torch.bool, device=device)
    empty = rows.offset
    p_a, c_a = rows.power or (empty, empty)
    p_b, c_b = columns.power or (empty, empty)
    sums = before = w
    grid = (triton.cdiv(m, BLOCK), batch)
    eps, safe = float(eps), float(safe)
    with on_device_of(K):
        weigh_kernel[grid](g, columns.weights, columns.offset, w, m, columns.stride, eps, BLOCK=BLOCK, **FUSED)
        for i in range(k):
            if i:
                before = torch.empty_like(w)
                again_kernel[grid](
                    sums, columns.weights, p_b, c_b, before, w, m, sums.shape[1], columns.stride,
                    POWER=columns.power is not None, BLOCK=BLOCK, **FUSED,
                )  # fmt: skip
            s, sums = parts_of_both(K, w, rows.weights, rows.stride, rows.power)
        potentials_kernel[(blocks, batch)](
            s, sums, before, w, rows.weights, p_a, c_a, rows.offset, columns.offset, f, g_out, g_next, sizes,
            n, m, sums.shape[1], rows.stride, eps, float(rows.damping), float(columns.damping),
            POWER=rows.power is not None, LONG=k > 1, BLOCK=BLOCK, **FUSED,
        )  # fmt: skip
        settle_kernel[(blocks, batch) if hold else (1,)](
            sizes, f, rows.offset, g_out, g_next, exact, exact if inexact is None else inexact, batch, blocks, n, m, safe,
            HOLD=hold, INEXACT=inexact is not None, PROBLEMS=min(64, triton.next_power_of_2(batch)),
            BLOCKS=triton.next_power_of_2(blocks), BLOCK=BLOCK, **FUSED,
        )  # fmt: skip
    return f, g_out, g_next, exact


def softmin(K: Tensor, b: Tensor, f0: Tensor, g0: Tensor, g: Tensor, eps: float, safe: float) -> tuple[Tensor, Tensor]:
    """(s, exact): the softmin (B, n) over j of g + eps log b, before it is damped, and for each problem whether every sum was exact.

    K (B, n, m); b (B, m) or (m,); f0 (B, n); g0 and g (B, m); float64 beside K. `safe` as for `iterate`.
    """
    batch, n, m = K.shape
    w = torch.empty(batch, m, dtype=K.dtype, device=K.device)
    s = torch.empty(batch, n, dtype=torch.float64, device=K.device)
    exact = torch.empty(batch, dtype=torch.bool, device=K.device)
    info = torch.finfo(K.dtype)
    with on_device_of(K):
        weigh_kernel[(triton.cdiv(m, BLOCK), batch)](g, b, g0, w, m, m if b.dim() > 1 else 0, float(eps), BLOCK=BLOCK, **FUSED)
        sums = K[0] @ w[0] if batch == 1 else torch.bmm(K, w.unsqueeze(-1))
        softmin_kernel[(batch,)](
            sums, w, f0, s, exact, n, m, float(eps), float(safe), info.tiny / info.eps, BLOCK=BLOCK, num_warps=4, **FUSED
        )
    return s, exact


@triton.jit(do_not_specialize=COUNTS)
def softmin_kernel(
    sums, w, f0, s, exact, n, m, eps: tl.float64, safe: tl.float64, floor: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """Below `floor` scalings that underflowed would count."""
    problem = tl.program_id(0).to(tl.int64)
    taken = tl.full([], 0.0, tl.float64)
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        taken += tl.sum(tl.load(w + problem * m + cols, mask=cols < m, other=0.0).to(tl.float64), 0)
    least = tl.maximum(safe * taken, floor)
    wrong = tl.full([], 0, tl.int32)
    for i in range(0, n, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        total = tl.load(sums + problem * n + rows, mask=rows < n, other=1.0).to(tl.float64)
        good = (total >= least) & (total < float("inf"))
        wrong += tl.sum(((rows < n) & (good == 0)).to(tl.int32), 0)
        x = tl.load(f0 + problem * n + rows, mask=rows < n, other=0.0) - eps * tl.log(total)
        tl.store(s + problem * n + rows, x, mask=rows < n)
    tl.store(exact + problem, wrong == 0)


@triton.jit(do_not_specialize=COUNTS)
def weigh_kernel(g, b, g0, w, m, b_stride, eps: tl.float64, BLOCK: tl.constexpr):
    """w = b exp((g - g0) / eps), in the type of the kernel. The potential of an empty atom may be anything."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    problem = tl.program_id(1).to(tl.int64)
    weight = tl.load(b + problem * b_stride + cols, mask=cols < m, other=0.0)
    there = weight > 0
    moved = tl.load(g + problem * m + cols, mask=there, other=0.0) - tl.load(g0 + problem * m + cols, mask=there, other=0.0)
    tl.store(w + problem * m + cols, tl.where(there, weight * tl.exp(moved / eps), 0.0).to(w.dtype.element_ty), mask=cols < m)


@triton.jit(do_not_specialize=COUNTS)
def again_kernel(
    sums, b, p, c, t, w, m, parts, b_stride, POWER: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """t, the sum of its parts, and the w of the next iteration."""
    cols = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    problem = tl.program_id(1).to(tl.int64)
    total = joined(sums + problem * parts * m, cols, m, parts, BLOCK)
    weight = tl.load(b + problem * b_stride + cols, mask=cols < m, other=0.0).to(total.dtype)
    if POWER:
        weight *= powered(total, tl.load(p), tl.load(c + problem * m + cols, mask=cols < m, other=0.0))
    else:
        weight /= total
    tl.store(t + problem * m + cols, total, mask=cols < m)
    tl.store(w + problem * m + cols, weight, mask=cols < m)


@triton.jit
def joined(sums, cols, m, parts, BLOCK: tl.constexpr):
    total = tl.zeros([BLOCK], sums.dtype.element_ty)
    for part in range(parts):
        total += tl.load(sums + part * m + cols, mask=cols < m, other=0.0)
    return total


@triton.jit(do_not_specialize=COUNTS)
def potentials_kernel(
    s, sums, before, w, a, p, c, f0, g0, f, g, g_next, sizes, n, m, parts, a_stride, eps: tl.float64, damping_a: tl.float64,
    damping_b: tl.float64, POWER: tl.constexpr, LONG: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """f, g_next and, of several iterations, g; and of this block the least sums, what was summed, and how many sums are no numbers."""
    block = tl.program_id(0)
    at = block * BLOCK + tl.arange(0, BLOCK)
    problem = tl.program_id(1).to(tl.int64)
    f0 += problem * n
    g0 += problem * m
    total = tl.load(s + problem * n + at, mask=at < n, other=1.0)
    weight = tl.load(a + problem * a_stride + at, mask=at < n, other=0.0).to(total.dtype)
    if POWER:
        weight *= powered(total, tl.load(p), tl.load(c + problem * n + at, mask=at < n, other=0.0))
    else:
        weight /= total
    weight = tl.where(at < n, weight, 0.0).to(tl.float64)
    # `powered` needs a normal number.
    least = 1.2e-38 if total.dtype == tl.float32 else 2.3e-308
    broken = tl.sum(((at < n) & (((total > least) & (total < float("inf"))) == 0)).to(tl.int32), 0)
    broken += tl.sum(((tl.abs(weight) < float("inf")) == 0).to(tl.int32), 0)
    least_s = tl.min(tl.where(at < n, total.to(tl.float64), float("inf")), 0)
    x = (tl.load(f0 + at, mask=at < n, other=0.0) - eps * tl.log(total.to(tl.float64))) / damping_a
    tl.store(f + problem * n + at, x, mask=at < n)

    total = joined(sums + problem * parts * m, at, m, parts, BLOCK)
    broken += tl.sum(((at < m) & ((tl.abs(total) < float("inf")) == 0)).to(tl.int32), 0)
    least_t = tl.min(tl.where(at < m, total.to(tl.float64), float("inf")), 0)
    offset = tl.load(g0 + at, mask=at < m, other=0.0)
    tl.store(g_next + problem * m + at, (offset - eps * tl.log(total.to(tl.float64))) / damping_b, mask=at < m)
    if LONG:
        total = tl.load(before + problem * m + at, mask=at < m, other=1.0)
        tl.store(g + problem * m + at, (offset - eps * tl.log(total.to(tl.float64))) / damping_b, mask=at < m)

    sizes += (problem * tl.num_programs(0) + block) * 5
    tl.store(sizes, least_s)
    tl.store(sizes + 1, least_t)
    tl.store(sizes + 2, tl.sum(tl.load(w + problem * m + at, mask=at < m, other=0.0).to(tl.float64), 0))
    tl.store(sizes + 3, tl.sum(weight, 0))
    tl.store(sizes + 4, broken.to(tl.float64))


@triton.jit(do_not_specialize=COUNTS)
def settle_kernel(
    sizes, f, f0, g, g_next, exact, inexact, batch, blocks, n, m, safe: tl.float64,
    HOLD: tl.constexpr, INEXACT: tl.constexpr, PROBLEMS: tl.constexpr, BLOCKS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether all sums of all problems were exact. To hold: the block's potentials where they were, if not."""
    part = tl.arange(0, BLOCKS)[None, :]
    wrong = tl.full([], 0, tl.int32)
    for i in range(0, batch, PROBLEMS):
        problems = i + tl.arange(0, PROBLEMS)
        there = (problems < batch)[:, None] & (part < blocks)  # [P, parts]
        at = sizes + (problems[:, None].to(tl.int64) * blocks + part) * 5
        least_s = tl.min(tl.load(at, mask=there, other=float("inf")), 1)
        least_t = tl.min(tl.load(at + 1, mask=there, other=float("inf")), 1)
        taken = tl.sum(tl.load(at + 2, mask=there, other=0.0), 1)
        mass = tl.sum(tl.load(at + 3, mask=there, other=0.0), 1)
        broken = tl.sum(tl.load(at + 4, mask=there, other=0.0), 1)
        good = (least_s >= safe * taken) & (least_t >= safe * mass) & (broken == 0) & (mass < float("inf"))
        wrong += tl.sum(((problems < batch) & (good == 0)).to(tl.int32), 0)
    if HOLD:
        block = tl.program_id(0)
        problem = tl.program_id(1).to(tl.int64)
        if wrong > 0:
            rows = block * BLOCK + tl.arange(0, BLOCK)
            tl.store(f + problem * n + rows, tl.load(f0 + problem * n + rows, mask=rows < n, other=0.0), mask=rows < n)
            tl.store(g_next + problem * m + rows, tl.load(g + problem * m + rows, mask=rows < m, other=0.0), mask=rows < m)
        if INEXACT:
            wrong += (tl.load(inexact) != 0).to(tl.int32)
        if (block == 0) & (problem == 0):
            tl.store(exact, wrong > 0)
    else:
        tl.store(exact, wrong == 0)
