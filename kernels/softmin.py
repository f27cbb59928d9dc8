"""s_i = -eps log sum_j exp((h_j + <u_i, v_j>) / eps), streamed over j: nothing n by m is ever stored."""

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .launches import COUNTS, FUSED, on_device_of
from .tiles import Cloud, cloud, products, row_tile
from .tuning import Tile

if TYPE_CHECKING:
    from .streamed import Level, Side


def softmin(
    u: Tensor | Cloud, v: Tensor | Cloud, h: Tensor, eps: float, *, shift: Tensor | None = None, columns_used: Tensor | None = None,
    precision: str = "fp32", wide: bool = False, tile: Tile | None = None,
) -> Tensor:  # fmt: skip
    """s (n,) or (B, n): s_i = -eps log sum_j exp((h_j + <u_i, v_j>) / eps).

    u, v    (n, d), (m, d), or with a leading B; Tensors are stored in `precision` first (see tiles.cloud), Clouds are used as they are
    h       (m,) or (B, m), in units of the products; -inf for an empty atom. A row that meets only -inf gives +inf
    shift   (n,) or (B, n): a guess of s, such as the previous potential. It stands in for the running maximum and saves
            two instructions in seven. It need not be good: any row block whose sums leave 2^-60 ... 2^60 is swept again with the
            running maximum, inside the same launch, so a bad guess costs time and never digits.
    columns_used  (B,) int32: the problem b ends with its column columns_used[b] <= m, and what lies behind is never read. Rows have
            no such length: the softmin of a row without weight is still defined, and is a gradient (in that weight).
    wide    s in float64, else fp32. Sums are fp32 either way; but beside a large s, fp32 drops digits of theirs that are right.
    tile    instead of the table's
    """
    u, v = (x if isinstance(x, Cloud) else cloud(x, precision) for x in (u, v))
    h = h.float().contiguous()
    shift = shift if shift is None else shift.float().contiguous()
    out = torch.empty(len(u.data), u.n, dtype=torch.float64 if wide else torch.float32, device=h.device)
    sweep_into(u, v, h, eps, out, shift, columns_used, tile)
    return out if h.dim() == 2 else out[0]


def sweep_into(
    u: Cloud, v: Cloud, h: Tensor, eps: float, out: Tensor, shift: Tensor | None, columns_used: Tensor | None, tile: Tile | None,
    update: "tuple[Side, Level, Tensor, Level | None] | None" = None,
) -> None:  # fmt: skip
    """Writes the softmin to `out`; for an update (side, level, f, following) also f, and the level that follows."""
    batch, n, m = len(u.data), u.n, v.n
    tile = tile or tuning.tile("softmin", u.data, u.parts, u.width, n)
    splits, per_split = tuning.split(n, m, batch, tile, u.data)
    apart = splits > 1 or (update is not None and tuning.full(u.data, u.parts, u.width, tile))
    parts = torch.empty(batch, splits, n, dtype=out.dtype, device=h.device) if apart else out
    kind, ends = 0, (h, h, h, h, h, h, 0, 1.0, 1.0, 1.0)
    if update is not None:
        side, level, f, following = update
        kind, target = (1, level) if following is None else (2, following)
        ends = level.centre, side.offset, f, side.logs, target.centre, target.h, side.stride, float(eps), *side.numbers
    with on_device_of(h):
        softmin_kernel[(batch * splits * triton.cdiv(n, tile.block_n),)](
            u.data, v.data, u.unit, v.unit, h, h if shift is None else shift, h if columns_used is None else columns_used, parts,
            n, m, u.data.shape[1], v.data.shape[1], splits, per_split, eps, *ends,
            D=u.width, PARTS=u.parts, Q=u.packed, SPARE=u.spare, SHIFTED=shift is not None, RAGGED=columns_used is not None,
            CENTRED=update is not None, UPDATE=0 if apart else kind,
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, STAGES=tile.stages, num_warps=tile.warps, **FUSED,
        )  # fmt: skip
        if apart:
            join_kernel[(triton.cdiv(n, 128), batch)](
                parts, out, n, splits, eps, *ends, UPDATE=kind, SPLITS=triton.next_power_of_2(splits), BLOCK=128, **FUSED
            )


@triton.jit(do_not_specialize=COUNTS)
def softmin_kernel(
    u, v, unit_u, unit_v, h, shift, columns_used, out, n, m, u_rows, v_rows, splits, per_split, eps,
    centre, offset, potential, logs, next_centre, next_h, logs_stride, eps_64: tl.float64, damping: tl.float64, limit: tl.float64,
    D: tl.constexpr, PARTS: tl.constexpr, Q: tl.constexpr, SPARE: tl.constexpr, SHIFTED: tl.constexpr, RAGGED: tl.constexpr,
    CENTRED: tl.constexpr, UPDATE: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """One program owns BLOCK_N rows and streams its share of the columns once; the row tile stays on chip.

    Traffic n d + (n / BLOCK_N) m (d + 1) words, no n-by-m buffer. Per pair: a multiply-add, an add, one exp2 and one add,
    plus a maximum and the tensor instructions; state per row (top, total), the reference of the exponent and the sum.

    CENTRED: `shift` is a float64 softmin without the centre of h. UPDATE: so is the result, see `store_update`.
    """
    blocks = tl.cdiv(n, BLOCK_N)
    program = tl.program_id(0)
    block = program % blocks  # neighbours in time share the columns, hence the L2
    split = program // blocks % splits
    batch = (program // (blocks * splits)).to(tl.int64)
    # exp2 is one instruction; the change of base is folded into the scale.
    scale = 1.4426950408889634 / eps
    unit = tl.load(unit_u + batch) * tl.load(unit_v + batch)
    row = u + (batch * u_rows + block * BLOCK_N) * (D * PARTS)
    start = split * per_split
    h += batch * m
    rows = block * BLOCK_N + tl.arange(0, BLOCK_N)  # [N]
    at = batch * n + rows  # [N]
    seek = start
    if RAGGED:
        m = tl.load(columns_used + batch)
        seek = tl.where(start < m, start, 0)  # a tile that is there
    stop = tl.minimum(start + per_split, m)
    if RAGGED:
        # A split with nothing left is one tile without weight: a path around the loop costs registers, and in apply spills.
        stop = tl.maximum(stop, start + 1)
    col = v + (batch * v_rows + seek) * (D * PARTS)
    tl.assume(start < stop)  # without it ptxas sees a path around the loop and serialises the tensor instructions
    none = tl.zeros([BLOCK_N], tl.float32)
    if SHIFTED:
        lift = tl.load(shift + at, mask=rows < n, other=0.0)  # [N]
        if CENTRED:
            lift = (lift + tl.load(centre + batch)).to(tl.float32)
        lift = lift * scale
        u_hi, u_lo = row_tile(row, lift / (scale * unit), D, PARTS, Q, SPARE, BLOCK_N)
        top, total = sweep(
            u_hi, u_lo, row, col, h, lift, start, stop, m, unit, scale, D, PARTS, SPARE, False, BLOCK_N, BLOCK_M, STAGES
        )  # fmt: skip
        good = (total > 8.7e-19) & (total < 1.2e18)  # 2^-60 ... 2^60, and not NaN
        if tl.sum(((rows < n) & (good == 0)).to(tl.int32), 0) > 0:
            u_hi, u_lo = row_tile(row, none, D, PARTS, Q, SPARE, BLOCK_N)
            safe_top, safe = sweep(
                u_hi, u_lo, row, col, h, none, start, stop, m, unit, scale, D, PARTS, SPARE, True, BLOCK_N, BLOCK_M, STAGES
            )  # fmt: skip
            top = tl.where(good, top, safe_top)
            total = tl.where(good, total, safe)
    else:
        u_hi, u_lo = row_tile(row, none, D, PARTS, Q, SPARE, BLOCK_N)
        top, total = sweep(
            u_hi, u_lo, row, col, h, none, start, stop, m, unit, scale, D, PARTS, SPARE, True, BLOCK_N, BLOCK_M, STAGES
        )  # fmt: skip
    # Per row, doubles cost nothing. `total` is near 1 under a good shift, so its logarithm has digits far below the last of `top`.
    s = -(top.to(tl.float64) + tl.log2(total)) / scale
    if UPDATE > 0:
        s -= tl.load(centre + batch)
        store_update(
            s, batch, rows, n, offset, potential, logs, next_centre, next_h, logs_stride, eps_64, damping, limit, UPDATE == 2
        )  # fmt: skip
    tl.store(out + (batch * splits + split) * n + rows, s, mask=rows < n)


@triton.jit
def damped(s, offset, damping, limit):
    """A penalty's potential from the softmin offset + s: divided by `damping`, and no further from 0 than `limit`."""
    return tl.minimum(tl.maximum((offset + s) / damping, -limit), limit)


@triton.jit
def store_update(
    s, batch, rows, n, offset, potential, logs, next_centre, next_h, logs_stride, eps, damping, limit, NEXT: tl.constexpr
):  # fmt: skip
    """The potential damped from a softmin s without its offset; NEXT: and as the next sweep reads it."""
    at = batch * n + rows
    alpha = tl.load(offset + at, mask=rows < n, other=0.0)
    f = damped(s, alpha, damping, limit)
    tl.store(potential + at, f, mask=rows < n)
    if NEXT:
        log_a = tl.load(logs + batch * logs_stride + rows, mask=rows < n, other=-float("inf"))
        there = log_a > -float("inf")
        h = tl.where(there, f, 0.0) + eps * log_a - alpha - tl.load(next_centre + batch)
        tl.store(next_h + at, tl.where(there, h, -float("inf")).to(tl.float32), mask=rows < n)


@triton.jit
def sweep(
    u_hi, u_lo, row, col, h, lift, start, stop, m, unit, scale,
    D: tl.constexpr, PARTS: tl.constexpr, SPARE: tl.constexpr, ONLINE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_M: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """(top, total) with sum_j exp2(t_ij) = total_i exp2(top_i); ONLINE finds top as it goes, otherwise it is -lift."""
    # -1e38, not -inf: a row that has met only h = -inf would otherwise compute inf - inf.
    top = tl.full([BLOCK_N], -1e38, tl.float32)
    total = tl.zeros([BLOCK_N], tl.float32)
    for j in tl.range(start, stop, BLOCK_M, num_stages=STAGES):
        cols = j + tl.arange(0, BLOCK_M)  # [M]
        weight = tl.load(h + cols, mask=cols < m, other=-float("inf"))  # [M]
        s, _, _ = products(u_hi, u_lo, row, col, D, PARTS, BLOCK_N, BLOCK_M)
        col += BLOCK_M * D * PARTS  # a pointer that walks has no index to overflow
        if SPARE and not ONLINE:
            total += tl.sum(tl.exp2(s * (scale * unit) + (weight * scale)[None, :]), 1)  # s holds lift already
        else:
            # Units are powers of two, so h + <u, v> rounds once, in its own scale; the next line rounds only what is left of it.
            t = s * unit + weight[None, :]  # [N, M]
            if ONLINE:
                higher = tl.maximum(top, tl.max(t, 1) * scale)
                total = total * tl.exp2(top - higher) + tl.sum(tl.exp2(t * scale - higher[:, None]), 1)
                top = higher
            else:
                total += tl.sum(tl.exp2(t * scale + lift[:, None]), 1)
    if not ONLINE:
        top = -lift
    return top, total


@triton.jit(do_not_specialize=COUNTS)
def join_kernel(
    pieces, out, n, splits, eps, centre, offset, potential, logs, next_centre, next_h, logs_stride,
    eps_64: tl.float64, damping: tl.float64, limit: tl.float64, UPDATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A softmin of softmins is a softmin: (B, splits, n) to (B, n)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    split = tl.arange(0, SPLITS)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    scale = 1.4426950408889634 / eps
    t = (
        tl.load(pieces + (batch * splits + split) * n + rows, mask=(split < splits) & (rows < n), other=float("inf")).to(tl.float64)
        * -scale
    )
    top = tl.maximum(tl.max(t, 0), -1e38)[None, :]  # [1, N]
    s = -(top + tl.log2(tl.sum(tl.exp2((t - top).to(tl.float32)), 0))[None, :]) / scale
    if UPDATE > 0:
        s -= tl.load(centre + batch)
        store_update(
            s, batch, rows, n, offset, potential, logs, next_centre, next_h, logs_stride, eps_64, damping, limit, UPDATE == 2
        )  # fmt: skip
    tl.store(out + batch * n + rows, s, mask=rows < n)
