"""Small problems, whole: one program per problem runs a block of iterations, acceleration included, in a single launch."""

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of
from .step import Memory, log_mass, mix

#: With and without the step. Left to itself, ptxas would rather spill a few numbers than give up another block on a multiprocessor.
REGISTERS = {True: 255, False: 128}
LARGEST = 1024  # columns; whole rows lie in the registers of one program, and up to here its 4096 entries are four rows or more


def run(
    C: Tensor, a: Tensor, b: Tensor, f: Tensor | None, g: Tensor | None, g_next: Tensor, eps: float, k: int, *,
    taus: tuple[float, float] = (float("inf"), float("inf")), plain: int | None = None, memory: Memory | None = None, gauge: bool = False,
    shifted: bool = False, done: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """k >= 1 iterations: f (B, n), g (B, m) whose update f is, and g_next (B, m) the update of f, from where these were before.

    With f = damp_a softmin(C, g + eps log b) and P_ij = a_i b_j exp((f_i + g_j - C_ij) / eps).

    C        (B, n, m), or (1, n, m) shared by the batch: read as fp32; +inf forbids a pair. n as large as you like, m up to LARGEST
    a, b     (B, n), (B, m), or (n,), (m,) shared by the batch: weights, used as fp32; zeros are legal, and pad ragged problems
    g_next   (B, m): where a plain iteration starts, of any size; potentials are returned in its type, and in float64 keep digits that
             fp32 has not. f and g are needed for the others
    taus     in units of the cost, inf for a hard constraint: damp_a = tau_a / (tau_a + eps)
    plain    how many of the k, the first ones, start from g_next; all, when left out. The others start from what `step.mix` proposes,
             which remembers in `memory`; gauge and shifted as for `step.propose`
    done     (B,) bool: problems that stay where they are, unless plain > 0
    """
    C, g_next = C.float().contiguous(), g_next.contiguous()
    (batch, m), n = g_next.shape, a.shape[-1]
    if not fits(n, m):
        raise ValueError(f"C is {n} by {m} where at most {LARGEST} columns and 2^31 padded entries are served; use the streamed kernels.")
    plain = k if plain is None else plain
    mixing = plain < k
    assert memory is not None or not mixing
    f_out, g_out, fresh = (torch.empty(batch, size, dtype=g_next.dtype, device=C.device) for size in (n, m, m))
    block_n, block_m, warps = shape(n, m, mixing)
    padded = triton.cdiv(n, block_n) * block_n
    K = torch.empty(batch, padded, block_m, dtype=torch.float32, device=C.device)
    lines = torch.empty(batch, 3, padded, dtype=torch.float32, device=C.device)
    f, g = (g_next if z is None else z.contiguous() for z in (f, g))
    buffers = (g_next,) * 5 if memory is None else (memory.changes, memory.moves, memory.last, memory.trial, memory.numbers)
    size = 1 if memory is None else memory.changes.shape[1]
    proposed = torch.empty_like(g_next) if mixing else g_next
    (tau_a, tau_b), (loss_a, loss_b) = taus, (eps / (tau + eps) for tau in taus)
    with on_device_of(C):
        run_kernel[(batch,)](
            C, a, b, f, g, g_next, g_next if done is None else done, K, lines, f_out, g_out, fresh, *buffers, proposed,
            0 if len(C) < batch else n * m, n if a.dim() > 1 else 0, m if b.dim() > 1 else 0, n, m, k, plain,
            int(memory is not None and memory.known), eps, loss_a, loss_b, float(eps), float(tau_a), float(tau_b),
            LOSS=loss_a > 0, MIXING=mixing, GAUGE=gauge, SHIFT=shifted, DONE=done is not None and plain == 0,
            MEMORY=size, SLOTS=triton.next_power_of_2(size), STEP=min(block_m, 32 * warps),
            BLOCK_N=block_n, BLOCK_M=block_m, num_warps=warps, **({} if torch.version.hip else dict(maxnreg=REGISTERS[mixing])), **FUSED,
        )  # fmt: skip
    if memory is not None and mixing:
        memory.known = True
    return f_out, g_out, fresh


def fits(n: int, m: int) -> bool:
    """Whether one program serves such a problem: offsets in its padded array have 32 bits."""
    return m <= LARGEST and (n + 128) * max(16, triton.next_power_of_2(m)) < 2**31


def shape(n: int, m: int, mixing: bool = False) -> tuple[int, int, int]:
    """(block_n, block_m, warps): a row block holds whole rows, 8 entries per thread, 4 if it is small. With 16, one program would fill
    the registers.

    2048 entries up to 128 columns, so that two problems hide each other's waiting; beyond it there are seldom enough problems for
    that, and one takes all 16 warps. With the step inside it needs more than the 128 registers that 16 warps leave each thread, and takes
    8. bench/static.py counts them; none of it has been timed.
    """
    block_m = max(16, triton.next_power_of_2(m))
    block_n = (2048 if block_m <= 128 or mixing else 4096) // block_m
    if block_m < 64:
        block_n = min(block_n, max(16, triton.next_power_of_2(n)))
    entries = block_n * block_m
    return block_n, block_m, entries // (256 if entries > 1024 else 128)


@triton.jit(do_not_specialize=COUNTS)
def run_kernel(
    C, a, b, f_before, g_before, start, done, K, lines, f, g, fresh_g, changes, moves, last, trial, numbers, proposed,
    C_stride, a_stride, b_stride, n, m, iterations, plain, known, eps, loss_a, loss_b,
    eps_64: tl.float64, tau_a: tl.float64, tau_b: tl.float64,
    LOSS: tl.constexpr, MIXING: tl.constexpr, GAUGE: tl.constexpr, SHIFT: tl.constexpr, DONE: tl.constexpr,
    MEMORY: tl.constexpr, SLOTS: tl.constexpr, STEP: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr,
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

    Between the iterations `mix` reads g and g_next, and f for the shift of relaxed marginals, where the results are to be.
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
    a += problem * a_stride
    b += problem * b_stride
    f += problem * n
    g += problem * m
    fresh_g += problem * m
    beta = tl.load(b + cols, mask=live, other=0.0).to(tl.float32)  # [M]
    log_b = tl.log2(beta)  # -inf for an empty atom
    given = tl.load(start + problem * m + cols, mask=live, other=0.0)  # [M], float64 perhaps
    reached = tl.abs(given) < float("inf")
    g0, g_hi = absorbed_at(start + problem * m, cols, live)
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
    count = tl.full([], iterations, tl.int32)
    if MIXING:
        tl.store(g + cols, tl.load(g_before + problem * m + cols, mask=live, other=0.0), mask=live)
        tl.store(fresh_g + cols, given, mask=live)
        for i in range(0, n, BLOCK_M):
            rows = i + tl.arange(0, BLOCK_M)
            tl.store(f + rows, tl.load(f_before + problem * n + rows, mask=rows < n, other=0.0), mask=rows < n)
        if DONE:
            count = tl.where(tl.load(done + problem) != 0, 0, count)
    for step in range(count):
        G = fresh
        if MIXING:
            tl.debug_barrier()
            if step >= plain:
                shift = tl.full([], 0.0, tl.float64)
                if SHIFT:
                    shift = (log_mass(a, f, n, tau_a, STEP) - log_mass(b, fresh_g, m, tau_b, STEP)) / (1 / tau_a + 1 / tau_b)
                stay = tl.full([], 0, tl.int1)
                mix(
                    b, g, fresh_g, shift, stay, changes + problem * (MEMORY * m), moves + problem * (MEMORY * m),
                    last + problem * (2 * m), trial + problem * (2 * m), numbers + problem * 8, proposed + problem * m, m, eps_64,
                    known + step - plain, GAUGE, MEMORY, SLOTS, STEP,
                )  # fmt: skip
                tl.debug_barrier()
                now = tl.load(proposed + problem * m + cols, mask=live, other=0.0)
            else:
                now = tl.load(fresh_g + cols, mask=live, other=0.0)
            # Read again, so that nothing has to stay in registers during `mix`.
            g0, g_hi = absorbed_at(start + problem * m, cols, live)
            G = ((now - g0) * scale).to(tl.float32)
            beta = tl.load(b + cols, mask=live, other=0.0).to(tl.float32)
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
                T = k + (near + tl.log2(beta))[None, :]  # [N, M]
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
        if MIXING:
            g0, g_hi = absorbed_at(start + problem * m, cols, live)
        tl.store(g + cols, g0 + G / scale, mask=live)
        tl.store(fresh_g + cols, g0 + fresh / scale, mask=live)
        if SHIFT:
            tl.debug_barrier()
            store_rows(f, state, low, n, scale, loss_a, BLOCK_N)
    if count > 0:
        tl.debug_barrier()
        store_rows(f, state, low, n, scale, loss_a, BLOCK_N)


@triton.jit
def absorbed_at(start, cols, live):
    """g0, and its nearest fp32: `start`, but 0 for an empty atom that no row may use, whose potential is inf."""
    given = tl.load(start + cols, mask=live, other=0.0)
    g0 = tl.where(tl.abs(given) < float("inf"), given, 0.0)
    return g0, g0.to(tl.float32)


@triton.jit
def store_rows(f, state, low, n, scale, loss_a, BLOCK_N: tl.constexpr):
    """f from S, which counts from f0."""
    for i in range(0, n, BLOCK_N):
        rows = i + tl.arange(0, BLOCK_N)  # [N]
        S = tl.load(state + rows)  # [N]
        s = tl.load(low + rows).to(f.dtype.element_ty) + S / scale
        tl.store(f + rows, tl.where(tl.abs(S) < float("inf"), s - loss_a * s, s), mask=rows < n)


@triton.jit
def within(total):
    """Far enough from both ends of fp32 that nothing was lost, and not NaN."""
    return (total > 8.7e-19) & (total < 1.2e18)  # 2^-60 ... 2^60
