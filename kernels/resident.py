"""Small problems, whole: one program per problem runs every iteration and its own stopping test, in a single launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .softmin import on_device_of

LARGEST = 1024  # columns; whole rows lie in the registers of one program, and up to here its 4096 entries are four rows or more


def sinkhorn(
    C: Tensor, a: Tensor, b: Tensor, eps: float, *, tau_a: float = float("inf"), tau_b: float = float("inf"),
    g: Tensor | None = None, tol: float = 1e-4, max_iter: int = 1000,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Potentials of a batch of small problems: f (B, n), g (B, m), the iterations each took (B,) and its error (B,).

    As `iterate`, which also returns the next g; here C may be (n, m) with everything else unbatched, and g starts at 0 when left out.
    """
    batched = C.dim() == 3
    if not batched:
        C, a, b, g = C[None], a[None], b[None], g if g is None else g[None]
    start = torch.zeros_like(b) if g is None else g
    f, g, _, steps, error = iterate(C, a, b, start, eps, tau_a=tau_a, tau_b=tau_b, tol=tol, max_iter=max_iter)
    outputs = f, g, steps, error
    return outputs if batched else tuple(x[0] for x in outputs)


def iterate(
    C: Tensor, a: Tensor, b: Tensor, g: Tensor, eps: float, *,
    tau_a: float = float("inf"), tau_b: float = float("inf"), tol: float = 0.0, max_iter: int = 1,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """Up to `max_iter` (>= 1) iterations from g: f (B, n), g (B, m) whose update f is, `fresh` (B, m) the update of f, the iterations
    each problem took (B,) and its error (B,). With f = damp_a softmin(C, g + eps log b) and P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).

    C        (B, n, m), or (1, n, m) shared by the batch: read as fp32; +inf forbids a pair. n as large as you like, m up to LARGEST
    a, b     (B, n), (B, m): weights, used as fp32; zeros are legal, and pad ragged problems
    g        (B, m): where to start, of any size; potentials are returned in its type, and in float64 keep digits that fp32 has not
    tau_a    in units of the cost, inf for a hard constraint: damp_a = tau_a / (tau_a + eps); likewise tau_b
    tol      a problem stops once sum_j b_j |expm1((g_j - fresh_j) / eps)| <= tol sum(b), for balanced problems the L1 error of
             its column marginal; the error is returned in the same unit, as a fraction of the mass
    """
    C, a, b, g = C.float().contiguous(), a.contiguous(), b.contiguous(), g.contiguous()
    (batch, m), n = g.shape, a.shape[1]
    if m > LARGEST or n * m >= 2**31:
        raise ValueError(f"C is {n} by {m} where at most {LARGEST} columns and 2^31 entries are served; use the streamed kernels.")
    f, g_out, fresh = (torch.empty(batch, size, dtype=g.dtype, device=g.device) for size in (n, m, m))
    steps = torch.empty(batch, dtype=torch.int32, device=C.device)
    error = torch.empty(batch, dtype=torch.float32, device=C.device)
    block_n, block_m, warps = shape(n, m)
    padded = triton.cdiv(n, block_n) * block_n
    K = torch.empty(batch, padded, block_m, dtype=torch.float32, device=C.device)
    lines = torch.empty(batch, 3, padded, dtype=torch.float32, device=C.device)
    loss_a, loss_b = eps / (tau_a + eps), eps / (tau_b + eps)
    with on_device_of(C):
        sinkhorn_kernel[(batch,)](
            C, a, b, g, K, lines, f, g_out, fresh, steps, error, 0 if len(C) < batch else n * m, n, m, eps, loss_a, loss_b, tol, max_iter,
            LOSS=loss_a > 0, BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps,
        )  # fmt: skip
    return f, g_out, fresh, steps, error


def shape(n: int, m: int) -> tuple[int, int, int]:
    """(block_n, block_m, warps): a row block holds whole rows, 8 entries per thread, 4 if it is small. With 16, one program would fill
    the registers.

    2048 entries up to 128 columns, so that two problems hide each other's waiting; beyond it there are seldom enough problems for
    that, and one takes all 16 warps. bench/static.py counts its registers; it has not been timed.
    """
    block_m = max(16, triton.next_power_of_2(m))
    block_n = (2048 if block_m <= 128 else 4096) // block_m
    if block_m < 64:
        block_n = min(block_n, max(16, triton.next_power_of_2(n)))
    entries = block_n * block_m
    return block_n, block_m, entries // (256 if entries > 1024 else 128)


@triton.jit
def sinkhorn_kernel(
    C, a, b, start, K, lines, f, g, fresh_g, steps, error, C_stride, n, m, eps, loss_a, loss_b, tol, max_iter,
    LOSS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
):  # fmt: skip
    """One exp2, one read of K and 24 instructions per entry and iteration, out of the L1 cache while n m is below 32k or so.

    First the potentials are absorbed, so that fp32 holds no g / eps of 1e4 and more: K_ij = (f0_i + g0_j - C_ij) / eps log2(e) with
    g0 = start and f0 = min_j (C_ij - g0_j - eps log b_j). From then on S and G count from f0 and g0, in units of eps / log2(e).

    With E = exp2(K + S + G), the row sums of E b give the next S, the softmin of the row before it is damped; and since E is at
    hand, its columns weighted by a exp2(D) / sums give the next G, without a second exponential. D = -(f0 + S) loss is what damping
    takes off S; where it is large there is no mass. A sum that leaves 2^-60 ... 2^60 (a first iteration, a small eps) is computed
    again around its own maximum: absorption, when it is needed.

    K is stored in whole tiles, -inf beyond n and m, so that the loop needs no masks and reads 16 bytes at a time whatever m is (an m that
    16 does not divide cost four times the instructions). `lines` holds f0, S and the weight of every row.
    """
    problem = tl.program_id(0).to(tl.int64)
    scale = 1.4426950408889634 / eps
    cols = tl.arange(0, BLOCK_M)  # [M]
    live = cols < m
    tile = tl.arange(0, BLOCK_N)[:, None] * BLOCK_M + cols[None, :]  # [N, M]
    padded = tl.cdiv(n, BLOCK_N) * BLOCK_N
    C += problem * C_stride
    K += problem * padded * BLOCK_M
    low = lines + problem * 3 * padded
    state = low + padded
    weights = state + padded
    a += problem * n
    beta = tl.load(b + problem * m + cols, mask=live, other=0.0).to(tl.float32)  # [M]
    log_b = tl.log2(beta)  # -inf for an empty atom
    mass = tl.sum(beta, 0)
    given = tl.load(start + problem * m + cols, mask=live, other=0.0)  # [M], float64 perhaps
    reached = tl.abs(given) < float("inf")  # an empty atom that no row may use has potential inf
    g0 = tl.where(reached, given, 0.0)
    g_hi = g0.to(tl.float32)
    g_lo = (g0 - g_hi).to(tl.float32)
    for i in range(0, n, BLOCK_N):
        rows = i + tl.arange(0, BLOCK_N)  # [N]
        inside = (rows < n)[:, None] & live[None, :]
        cost = tl.load(C + rows[:, None] * m + cols[None, :], mask=inside, other=float("inf"))  # [N, M]
        # C - g_hi as an unevaluated sum of two numbers (Knuth 1997, 4.2.2 theorem B); near its minimum subtracting f0 is exact, too.
        T = cost - g_hi[None, :]
        back = T - cost
        rest = (cost - (T - back)) - (g_hi[None, :] + back)
        f0 = tl.min(T - (log_b / scale)[None, :], 1)  # [N]
        f0 = tl.where(f0 < float("inf"), f0, 0.0)
        exponent = -((T - f0[:, None]) + (rest - g_lo[None, :])) * scale
        tl.store(K + i * BLOCK_M + tile, tl.where(cost < float("inf"), exponent, -float("inf")))
        tl.store(low + rows, f0)
        tl.store(state + rows, tl.zeros([BLOCK_N], tl.float32))
        tl.store(weights + rows, tl.load(a + rows, mask=rows < n, other=0.0).to(tl.float32))
    G = tl.where(reached, 0.0, given).to(tl.float32)
    fresh = G
    step = 0
    wrong = mass * float("inf")
    while (step < max_iter) & (wrong > tol * mass):
        G = fresh
        near = tl.where(tl.abs(G) < float("inf"), G, 0.0)  # [M]; see `reached`
        columns = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
        tl.debug_barrier()  # S of the last turn, written by other threads
        for i in range(0, n, BLOCK_N):
            rows = i + tl.arange(0, BLOCK_N)  # [N]
            k = tl.load(K + i * BLOCK_M + tile)  # [N, M]
            S = tl.load(state + rows)  # [N]
            alpha = tl.load(weights + rows)  # [N]
            E = tl.exp2(k + (S[:, None] + near[None, :]))  # [N, M]
            total = tl.sum(E * beta[None, :], 1)  # [N]
            if tl.sum(((rows < n) & (within(total) == 0)).to(tl.int32), 0) > 0:
                T = k + (near + log_b)[None, :]  # [N, M]
                top = tl.maximum(tl.max(T, 1), -1e38)  # -1e38, not -inf: rows beyond n would compute inf - inf
                S = tl.where(rows < n, -(top + tl.log2(tl.sum(tl.exp2(T - top[:, None]), 1))), 0.0)
                total = tl.where(rows < n, 1.0, total)
                E = tl.exp2(k + (S[:, None] + near[None, :]))
            S -= tl.log2(total)
            weight = alpha / total  # [N]
            if LOSS:
                weight *= tl.exp2(-loss_a * (tl.load(low + rows) * scale + S))
            columns += tl.where((alpha > 0)[:, None], E * weight[:, None], 0.0)  # an empty row may have overflowed
            tl.store(state + rows, S)
        column = tl.sum(columns, 0)  # [M]
        fresh = near - tl.log2(column)
        if tl.sum((live & (within(column) == 0)).to(tl.int32), 0) > 0:
            tl.debug_barrier()
            top = tl.full([BLOCK_M], -1e38, tl.float32)
            total_m = tl.zeros([BLOCK_M], tl.float32)
            for i in range(0, n, BLOCK_N):
                rows = i + tl.arange(0, BLOCK_N)  # [N]
                k = tl.load(K + i * BLOCK_M + tile)  # [N, M]
                S = tl.load(state + rows)  # [N]
                alpha = tl.load(weights + rows)  # [N]
                h = S - loss_a * (tl.load(low + rows) * scale + S) + tl.log2(alpha)
                T = k + tl.where(alpha > 0, h, -float("inf"))[:, None]  # [N, M]
                higher = tl.maximum(top, tl.max(T, 0))
                total_m = total_m * tl.exp2(top - higher) + tl.sum(tl.exp2(T - higher[None, :]), 0)
                top = higher
            fresh = -(top + tl.log2(total_m))
        fresh = tl.where(fresh < float("inf"), fresh - loss_b * (g_hi * scale + fresh), fresh)
        fresh = tl.where(live, fresh, 0.0)  # columns beyond m summed to nothing
        change = tl.where(live & (beta > 0), (G - fresh) * 0.6931471805599453, 0.0)  # [M]
        # expm1: what exp(x) - 1 loses near 0 is what a small tolerance asks for.
        moved = tl.where(tl.abs(change) < 0.02, change * (1 + change * (0.5 + change / 6)), tl.exp2(G - fresh) - 1)
        wrong = tl.sum(tl.where(live & (beta > 0), beta * tl.abs(moved), 0.0), 0)
        step += 1
    tl.debug_barrier()
    for i in range(0, n, BLOCK_N):
        rows = i + tl.arange(0, BLOCK_N)  # [N]
        S = tl.load(state + rows)  # [N]
        s = tl.load(low + rows).to(given.dtype) + S / scale
        tl.store(f + problem * n + rows, tl.where(tl.abs(S) < float("inf"), s - loss_a * s, s), mask=rows < n)
    tl.store(g + problem * m + cols, g0 + G / scale, mask=live)
    tl.store(fresh_g + problem * m + cols, g0 + fresh / scale, mask=live)
    tl.store(steps + problem, step)
    tl.store(error + problem, wrong / mass)


@triton.jit
def within(total):
    """Far enough from both ends of fp32 that nothing was lost, and not NaN."""
    return (total > 8.7e-19) & (total < 1.2e18)  # 2^-60 ... 2^60
