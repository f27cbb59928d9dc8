"""Small problems, whole: one program per problem runs every iteration and its own stopping test, in a single launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmin import on_device_of

LARGEST = 256  # columns; beyond it a row block no longer fits the registers of one program


def sinkhorn(
    C: Tensor, a: Tensor, b: Tensor, eps: float, *, damp_a: float = 1.0, damp_b: float = 1.0,
    g: Tensor | None = None, tol: float = 1e-4, max_iter: int = 1000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Potentials of a batch of small problems: f (B, n), g (B, m), the iterations each took (B,) and its error (B,).

    C        (B, n, m), or (n, m) with everything else unbatched; n as large as you like, m up to 256
    a, b     (B, n), (B, m): weights; zeros are legal, and pad ragged problems
    damp_a   tau / (tau + eps), 1 for balanced; likewise damp_b
    g        (B, m): where to start, default 0
    tol      a problem stops once sum_j b_j |expm1((g_j - fresh_j) / eps)| <= tol sum(b), for balanced problems the L1 error of
             its column marginal; the error is returned in the same unit, as a fraction of the mass

    With f = damp_a softmin(C, g + eps log b) and P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).
    """
    batched = C.dim() == 3
    if not batched:
        C, a, b, g = C[None], a[None], b[None], g if g is None else g[None]
    C, a, b = (x.float().contiguous() for x in (C, a, b))
    batch, n, m = C.shape
    start = b if g is None else g.float().contiguous()
    f = torch.empty(batch, n, dtype=torch.float32, device=C.device)
    g_out = torch.empty(batch, m, dtype=torch.float32, device=C.device)
    steps = torch.empty(batch, dtype=torch.int32, device=C.device)
    error = torch.empty(batch, dtype=torch.float32, device=C.device)
    block_n, block_m, warps = shape(n, m)
    with on_device_of(C):
        sinkhorn_kernel[(batch,)](
            C, a, b, start, f, g_out, steps, error, n, m, eps, damp_a, damp_b, tol, max_iter,
            WARM=g is not None, BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps,
        )  # fmt: skip
    outputs = f, g_out, steps, error
    return outputs if batched else tuple(x[0] for x in outputs)


def shape(n: int, m: int) -> tuple[int, int, int]:
    """(block_n, block_m, warps): a row block holds whole rows, up to 4096 entries, 8 or 16 per thread.

    bench/static.py counts its registers; it has not been timed.
    """
    block_m = max(16, triton.next_power_of_2(m))
    block_n = max(16, min(triton.next_power_of_2(n), 4096 // block_m))
    return block_n, block_m, max(1, block_n * block_m // (512 if block_m <= 128 else 256))


@triton.jit
def sinkhorn_kernel(
    C, a, b, start, f, g, steps, error, n, m, eps, damp_a, damp_b, tol, max_iter,
    WARM: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One exp2 and one read of C per entry and iteration, out of the L1 cache while n m is below 32k or so.

    With E = exp2(K + F + G), K = -C and all three in units of eps / log 2, the row sums of E b give the next F; and since E is at
    hand, its columns weighted by a exp2(next F - F) give the next G, without a second exponential. A sum that leaves
    2^-60 ... 2^60 (a first iteration, a small eps) is computed again around its own maximum: absorption, when it is needed.
    """
    problem = tl.program_id(0).to(tl.int64)
    scale = 1.4426950408889634 / eps
    cols = tl.arange(0, BLOCK_M)  # [M]
    live = cols < m
    C += problem * n * m
    a += problem * n
    f += problem * n
    beta = tl.load(b + problem * m + cols, mask=live, other=0.0)  # [M]
    log_b = tl.log2(beta)  # -inf for an empty atom
    mass = tl.sum(beta, 0)
    fresh = tl.zeros([BLOCK_M], tl.float32)
    if WARM:
        fresh = tl.load(start + problem * m + cols, mask=live, other=0.0) * scale
    G = fresh
    for i in range(0, n, BLOCK_N):
        rows = i + tl.arange(0, BLOCK_N)  # [N]
        tl.store(f + rows, tl.zeros([BLOCK_N], tl.float32), mask=rows < n)
    step = 0
    wrong = mass * float("inf")
    while (step < max_iter) & (wrong > tol * mass):
        G = fresh
        column = tl.zeros([BLOCK_M], tl.float32)
        tl.debug_barrier()  # f of the last turn, written by other threads
        for i in range(0, n, BLOCK_N):
            rows = i + tl.arange(0, BLOCK_N)  # [N]
            K = tl.load(C + rows[:, None] * m + cols[None, :], mask=(rows < n)[:, None] & live[None, :], other=float("inf")) * -scale
            F = tl.load(f + rows, mask=rows < n, other=0.0)  # [N]
            alpha = tl.load(a + rows, mask=rows < n, other=0.0)  # [N]
            E = tl.exp2(K + (F[:, None] + G[None, :]))  # [N, M]
            total = tl.sum(E * beta[None, :], 1)  # [N]
            if tl.sum(((rows < n) & (within(total) == 0)).to(tl.int32), 0) > 0:
                T = K + (G + log_b)[None, :]  # [N, M]
                top = tl.maximum(tl.max(T, 1), -1e38)  # -1e38, not -inf: rows beyond n would compute inf - inf
                F = tl.where(rows < n, -(top + tl.log2(tl.sum(tl.exp2(T - top[:, None]), 1))), 0.0)
                total = tl.where(rows < n, 1.0, total)
                E = tl.exp2(K + (F[:, None] + G[None, :]))
            following = damp_a * (F - tl.log2(total))  # [N]
            weight = alpha * tl.exp2(following - F)  # [N]
            column += tl.sum(tl.where((alpha > 0)[:, None], E * weight[:, None], 0.0), 0)  # an empty row may have overflowed
            tl.store(f + rows, following, mask=rows < n)
        fresh = damp_b * (G - tl.log2(column))
        if tl.sum((live & (within(column) == 0)).to(tl.int32), 0) > 0:
            tl.debug_barrier()
            top = tl.full([BLOCK_M], -1e38, tl.float32)
            total_m = tl.zeros([BLOCK_M], tl.float32)
            for i in range(0, n, BLOCK_N):
                rows = i + tl.arange(0, BLOCK_N)  # [N]
                K = tl.load(C + rows[:, None] * m + cols[None, :], mask=(rows < n)[:, None] & live[None, :], other=float("inf")) * -scale
                F = tl.load(f + rows, mask=rows < n, other=0.0) + tl.log2(tl.load(a + rows, mask=rows < n, other=0.0))
                T = K + F[:, None]  # [N, M]
                higher = tl.maximum(top, tl.max(T, 0))
                total_m = total_m * tl.exp2(top - higher) + tl.sum(tl.exp2(T - higher[None, :]), 0)
                top = higher
            fresh = -damp_b * (top + tl.log2(total_m))
        fresh = tl.where(live, fresh, 0.0)  # columns beyond m summed to nothing
        change = tl.where(live & (beta > 0), (G - fresh) * 0.6931471805599453, 0.0)  # [M]
        # expm1: what exp(x) - 1 loses near 0 is what a small tolerance asks for.
        moved = tl.where(tl.abs(change) < 0.02, change * (1 + change * (0.5 + change / 6)), tl.exp2(G - fresh) - 1)
        wrong = tl.sum(tl.where(live & (beta > 0), beta * tl.abs(moved), 0.0), 0)
        step += 1
    tl.debug_barrier()
    for i in range(0, n, BLOCK_N):
        rows = i + tl.arange(0, BLOCK_N)  # [N]
        tl.store(f + rows, tl.load(f + rows, mask=rows < n, other=0.0) / scale, mask=rows < n)
    tl.store(g + problem * m + cols, G / scale, mask=live)
    tl.store(steps + problem, step)
    tl.store(error + problem, wrong / mass)


@triton.jit
def within(total):
    """Far enough from both ends of fp32 that nothing was lost, and not NaN."""
    return (total > 8.7e-19) & (total < 1.2e18)  # 2^-60 ... 2^60
