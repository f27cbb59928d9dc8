"""The step between two iterations, in one launch: which g comes next. The twin of `Alternating.propose` and `Anderson.next` in gpu_ot.

One program per problem walks over its columns a block at a time, all in float64. What the accelerator remembers lies in fixed buffers.
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of

NUMBERS = 8  # float64 numbers remembered of each problem, see `mix`
#: As in gpu_ot.solver.acceleration.Anderson, which says what they are for; a test compares them.
TURN, CAP, FOLLOW, SHORT, LONG, NOTHING_NEW = (tl.constexpr(z) for z in (0.9, 8.0, 4.0, 0.1, 0.5, 1e-6))
_TINY = tl.constexpr(2.2250738585072014e-308)


@dataclass
class Memory:
    """What the accelerator remembers of B problems, float64. Kernels write here in place.

    changes, moves   (B, memory, m): a ring of differences, of which `numbers` says how many count
    last, trial      (B, 2, m): where the last iteration began and its update; where the trial began and its step
    numbers          (B, NUMBERS)
    known            whether there is anything to remember; nothing in the buffers counts before
    """

    changes: Tensor
    moves: Tensor
    last: Tensor
    trial: Tensor
    numbers: Tensor
    known: bool = False

    @classmethod
    def of(cls, like: Tensor, batch: int, memory: int) -> "Memory":
        m = like.shape[-1]
        sizes = ((memory, m), (memory, m), (2, m), (2, m), (NUMBERS,))
        return cls(*(torch.empty(batch, *size, dtype=torch.float64, device=like.device) for size in sizes))


def propose(
    a: Tensor, b: Tensor, f: Tensor, g: Tensor, g_next: Tensor, eps: float, memory: Memory, *,
    gauge: bool, taus: tuple[float, float] | None = None, done: Tensor | None = None, inexact: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """The g (B, m) of the next iteration, given that the last led from g to g_next; `memory` is brought up to date.

    a, f        (B, n), only for taus; a and b may be (n,) and (m,), shared by the batch
    b, g        (B, m), and g_next; float64
    taus        of two KL penalties, not both inf: g_next is first shifted by the constant that is best in the dual
    done        (B,) bool: problems that stay at g; `inexact` 0-d bool: all of them do
    """
    batch, m = g.shape
    n = f.shape[-1]
    out = torch.empty_like(g)
    slots = triton.next_power_of_2(memory.changes.shape[1])
    block, warps = shape(m)
    tau_a, tau_b = taus or (1.0, 1.0)
    with on_device_of(g):
        propose_kernel[(batch,)](
            a, b, f, g, g_next, g if done is None else done, g if inexact is None else inexact,
            memory.changes, memory.moves, memory.last, memory.trial, memory.numbers, out,
            n, m, n if a.ndim > 1 else 0, m if b.ndim > 1 else 0, float(eps), float(tau_a), float(tau_b),
            KNOWN=int(memory.known), GAUGE=gauge, SHIFT=taus is not None, DONE=done is not None, INEXACT=inexact is not None,
            MEMORY=memory.changes.shape[1], SLOTS=slots, BLOCK=block, num_warps=warps, **FUSED,
        )  # fmt: skip
    memory.known = True
    return out


def shape(m: int) -> tuple[int, int]:
    """(columns at a time, warps): a column a thread, since more of them spill. Counted by bench/static.py, and not timed."""
    block = min(512, max(64, triton.next_power_of_2(m)))
    return block, block // 32


@triton.jit(do_not_specialize=COUNTS)
def propose_kernel(
    a, b, f, g, g_next, done, inexact, changes, moves, last, trial, numbers, out,
    n, m, a_stride, b_stride, eps: tl.float64, tau_a: tl.float64, tau_b: tl.float64,
    KNOWN: tl.constexpr, GAUGE: tl.constexpr, SHIFT: tl.constexpr, DONE: tl.constexpr, INEXACT: tl.constexpr,
    MEMORY: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """About 40 float64 numbers are read for each column, in six passes: out of the caches, at the sizes that small sweeps have."""
    problem = tl.program_id(0).to(tl.int64)
    a += problem * a_stride
    b += problem * b_stride
    g += problem * m
    g_next += problem * m
    shift = tl.full([], 0.0, tl.float64)
    if SHIFT:
        rows = log_mass(a, f + problem * n, n, tau_a, BLOCK)
        shift = (rows - log_mass(b, g_next, m, tau_b, BLOCK)) / (1 / tau_a + 1 / tau_b)
    hold = tl.full([], 0, tl.int1)
    if DONE:
        hold = tl.load(done + problem) != 0
    if INEXACT:
        hold |= tl.load(inexact) != 0
    mix(
        b, g, g_next, shift, hold, changes + problem * (MEMORY * m), moves + problem * (MEMORY * m), last + problem * (2 * m),
        trial + problem * (2 * m), numbers + problem * 8, out + problem * m, m, eps, KNOWN, GAUGE, MEMORY, SLOTS, BLOCK,
    )  # fmt: skip


@triton.jit
def mix(
    b, g, g_next, shift, hold, changes, moves, last, trial, numbers, out, m, eps, known,
    GAUGE: tl.constexpr, MEMORY: tl.constexpr, SLOTS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """`Anderson.next` for one problem, from pointers to its own vectors; `out` is the g to try next.

    numbers   of the trial: ascent, predicted, size of the update, cap; then where in the ring the next difference goes, how many of it
              count, and the size of the trial's step.

    Empty atoms weigh nothing, hold 0 in every buffer, and follow g_next.
    """
    known = tl.full([], known, tl.int32) != 0
    slot = tl.arange(0, SLOTS)[:, None]  # [S, 1]
    zero = tl.full([], 0.0, tl.float64)
    infinite = tl.full([], float("inf"), tl.float64)
    mass = zero
    mean = zero
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)  # [M]
        w = tl.load(b + cols, mask=cols < m, other=0.0)
        gap = tl.load(g_next + cols, mask=w > 0, other=0.0) - shift - tl.load(g + cols, mask=w > 0, other=0.0)
        mass += tl.sum(w, 0)
        mean += tl.sum(tl.where(w > 0, w * gap, 0.0), 0)
    mean = mean / mass if GAUGE else zero

    ascent = tl.load(numbers, mask=known, other=float("inf"))
    predicted = tl.load(numbers + 1, mask=known, other=float("inf"))
    trial_size = tl.load(numbers + 2, mask=known, other=0.0)
    cap = tl.load(numbers + 3, mask=known, other=8.0)
    head = tl.load(numbers + 4, mask=known, other=0.0).to(tl.int32)
    filled = tl.load(numbers + 5, mask=known, other=0.0).to(tl.int32)
    reach = tl.load(numbers + 6, mask=known, other=0.0)
    # The slot behind the head is the newest, and `filled` of them count.
    counts = (slot < MEMORY) & ((head - 1 - slot + MEMORY) % MEMORY < filled)  # [S, 1]

    size = zero
    slope = zero
    whole = zero
    along_change = tl.zeros([SLOTS], tl.float64)
    along_update = tl.zeros([SLOTS], tl.float64)
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        w, gap, update, share = read_update(b, g, g_next, shift, mean, mass, cols, m)
        old = tl.where(known, w > 0, False)
        size += tl.sum(share * update * update, 0)
        slope += tl.sum(excess(w, gap, eps) * tl.load(trial + m + cols, mask=old, other=0.0), 0)
        change = update - tl.load(last + m + cols, mask=old, other=0.0)
        whole += tl.sum(share * change * change, 0)
        ring = tl.load(changes + slot * m + cols[None, :], mask=counts & (w > 0)[None, :], other=0.0)  # [S, M]
        along_change += tl.sum(ring * (share * change)[None, :], 1)
        along_update += tl.sum(ring * (share * update)[None, :], 1)
    size = tl.sqrt(size)

    # Judge the trial.
    overshot = known & ((slope >= -TURN * ascent) == 0)  # NaN overshot
    shrink = ascent / (ascent - slope)
    shrink = tl.minimum(tl.maximum(tl.where(shrink == shrink, shrink, 0.0), SHORT), LONG)
    reached = FOLLOW * reach / tl.maximum(trial_size, _TINY)
    cap = tl.where(known, tl.where(overshot, tl.maximum(cap * shrink, 2.0), tl.maximum(cap, reached)), CAP)
    forget = overshot | (size > predicted)

    # Remember: the change of the update, orthogonal to those before it. Twice is enough (Kahan, Parlett).
    counts = tl.where(forget, False, counts)
    along_again = tl.zeros([SLOTS], tl.float64)
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        w, gap, update, share = read_update(b, g, g_next, shift, mean, mass, cols, m)
        change = update - tl.load(last + m + cols, mask=tl.where(known, w > 0, False), other=0.0)
        ring = tl.load(changes + slot * m + cols[None, :], mask=counts & (w > 0)[None, :], other=0.0)
        change -= tl.sum(ring * along_change[:, None], 0)
        along_again += tl.sum(ring * (share * change)[None, :], 1)
    new = zero
    along_new = zero
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        w, gap, update, share = read_update(b, g, g_next, shift, mean, mass, cols, m)
        change = update - tl.load(last + m + cols, mask=tl.where(known, w > 0, False), other=0.0)
        ring = tl.load(changes + slot * m + cols[None, :], mask=counts & (w > 0)[None, :], other=0.0)
        change = change - tl.sum(ring * along_change[:, None], 0) - tl.sum(ring * along_again[:, None], 0)
        new += tl.sum(share * change * change, 0)
        along_new += tl.sum(share * update * change, 0)
    new = tl.sqrt(new)
    fit = known & (forget == 0) & (new > NOTHING_NEW * tl.sqrt(whole))  # False for NaN
    scale = tl.where(fit, 1 / new, 0.0)
    along_new = tl.where(fit, along_new * scale, 0.0)
    took = counts
    counts &= slot != head  # the oldest makes room: it takes part in the orthogonalisation, and not in the model
    along_update = tl.sum(tl.where(counts, along_update[:, None], 0.0), 1)
    mixed = (tl.max((along_update != 0).to(tl.int32), 0) > 0) | (along_new != 0)

    # The mixed step: where the model has the smallest update.
    left_size = zero
    move_size = zero
    rise = zero
    tl.debug_barrier()
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        w, gap, update, share = read_update(b, g, g_next, shift, mean, mass, cols, m)
        old = tl.where(known, w > 0, False)
        change = update - tl.load(last + m + cols, mask=old, other=0.0)
        move = tl.load(g + cols, mask=w > 0, other=0.0) - tl.load(last + cols, mask=old, other=0.0)
        at = slot * m + cols[None, :]
        ring = tl.load(changes + at, mask=took & (w > 0)[None, :], other=0.0)  # [S, M]
        left = update - tl.sum(ring * along_update[:, None], 0)
        change = change - tl.sum(ring * along_change[:, None], 0) - tl.sum(ring * along_again[:, None], 0)
        ring = tl.load(moves + at, mask=took & (w > 0)[None, :], other=0.0)
        step = tl.sum(ring * along_update[:, None], 0)
        move = move - tl.sum(ring * along_change[:, None], 0) - tl.sum(ring * along_again[:, None], 0)
        change = tl.where(fit, change * scale, 0.0)
        move = tl.where(fit, move * scale, 0.0)
        tl.debug_barrier()  # the slot that makes room was read by other threads
        tl.store(changes + head * m + cols, change, mask=tl.where(known, cols < m, False))
        tl.store(moves + head * m + cols, move, mask=tl.where(known, cols < m, False))
        left -= along_new * change
        step = left - step - along_new * move
        left_size += tl.sum(share * left * left, 0)
        move_size += tl.sum(share * step * step, 0)
        rise += tl.sum(excess(w, gap, eps) * step, 0)
        tl.store(out + cols, step, mask=cols < m)
    left_size = tl.sqrt(left_size)
    move_size = tl.sqrt(move_size)
    limit = cap * size / tl.maximum(move_size, _TINY)
    cut = tl.where(limit < 1, limit, 1.0)
    rise *= cut
    # A plain step is never called an overshoot: Sinkhorn's own iterations cannot make the marginals worse.
    plain = (mixed & (rise > 0)) == 0
    tl.debug_barrier()
    for j in range(0, m, BLOCK):
        cols = j + tl.arange(0, BLOCK)
        w, gap, update, share = read_update(b, g, g_next, shift, mean, mass, cols, m)
        old = tl.where(known, w > 0, False)
        here = tl.load(g + cols, mask=cols < m, other=0.0)
        step = tl.where(plain, update, cut * tl.load(out + cols, mask=cols < m, other=0.0))
        held = tl.load(trial + cols, mask=old, other=0.0)
        shorter = shrink * tl.load(trial + m + cols, mask=old, other=0.0)
        start = tl.where(overshot, held, tl.where(w > 0, here, 0.0))
        step = tl.where(w > 0, tl.where(overshot, shorter, step), 0.0)
        tl.store(trial + cols, start, mask=cols < m)
        tl.store(trial + m + cols, step, mask=cols < m)
        stay = tl.where(overshot, cols < m, False)
        before = tl.load(last + cols, mask=stay, other=0.0)
        was = tl.load(last + m + cols, mask=stay, other=0.0)
        tl.store(last + cols, tl.where(overshot, before, tl.where(w > 0, here, 0.0)), mask=cols < m)
        tl.store(last + m + cols, tl.where(overshot, was, update), mask=cols < m)
        target = tl.load(g_next + cols, mask=cols < m, other=0.0) - shift
        proposed = tl.where(w > 0, start + step, target)  # an empty atom only follows
        tl.store(out + cols, tl.where(hold, here, proposed), mask=cols < m)
    tl.store(numbers, tl.where(overshot, shrink * ascent, tl.where(plain, infinite, rise)))
    tl.store(numbers + 1, tl.where(overshot | plain | (limit < 1), infinite, left_size))
    tl.store(numbers + 2, tl.where(overshot, trial_size, size))
    tl.store(numbers + 3, cap)
    kept = tl.where(known, tl.minimum(tl.where(forget, 0, filled) + 1, MEMORY), 0)
    tl.store(numbers + 4, tl.where(known, (head + 1) % MEMORY, 0).to(tl.float64))
    tl.store(numbers + 5, tl.where(mixed & plain, 0, kept).to(tl.float64))
    tl.store(numbers + 6, tl.where(overshot, shrink * reach, tl.where(plain, size, cut * move_size)))


@triton.jit
def read_update(b, g, g_next, shift, mean, mass, cols, m):
    """Of a block of columns: the weight, the gap between g_next and g, the update without what the gauge takes off, and the share."""
    w = tl.load(b + cols, mask=cols < m, other=0.0)
    gap = tl.load(g_next + cols, mask=w > 0, other=0.0) - shift - tl.load(g + cols, mask=w > 0, other=0.0)
    gap = tl.where(w > 0, gap, 0.0)
    return w, gap, tl.where(w > 0, gap - mean, 0.0), w / mass


@triton.jit
def excess(w, gap, eps):
    """b - P^T 1, the derivative of the dual in g."""
    return -w * expm1(tl.minimum(-gap / eps, 80.0))


@triton.jit
def expm1(x):
    """exp(x) - 1 in float64, without its rounding near 0: there fourteen terms of the series, beyond it what exp(x) keeps."""
    p = 1 + x / 14
    for k in tl.static_range(12):
        p = 1 + x / (13 - k) * p
    return tl.where(tl.abs(x) < 0.3, x * p, tl.exp(x) - 1)


@triton.jit
def log_mass(w, z, n, tau, BLOCK: tl.constexpr):
    """log sum w exp(-z / tau) over the atoms with mass."""
    top = tl.full([], -float("inf"), tl.float64)
    total = tl.full([], 0.0, tl.float64)
    for i in range(0, n, BLOCK):
        rows = i + tl.arange(0, BLOCK)
        weight = tl.load(w + rows, mask=rows < n, other=0.0)
        t = tl.where(weight > 0, -tl.load(z + rows, mask=weight > 0, other=0.0) / tau, -float("inf"))
        higher = tl.maximum(top, tl.max(t, 0))
        fade = tl.where(top > -float("inf"), tl.exp(top - higher), 0.0)
        total = total * fade + tl.sum(tl.where(weight > 0, weight * tl.exp(t - higher), 0.0), 0)
        top = higher
    return tl.log(total) + top
