"""s_i = -eps log sum_j exp((h_j + <u_i, v_j>) / eps), streamed over j: nothing n by m is ever stored."""

import contextlib
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from . import tuning
from .tiles import Cloud, cloud, products, row_tile
from .tuning import Tile


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
    _sweep(u, v, h, eps, out, shift, columns_used, tile)
    return out if h.dim() == 2 else out[0]


@dataclass
class Side:
    """One side of an iteration on streamed points, for B problems.

    cloud    its points, n of them
    offset   (B, n) float64, alpha of the cost alpha_i + beta_j - <u_i, v_j>
    logs     (B, n) float64, or (n,) shared by the batch: logarithms of the weights, -inf for an empty atom
    damping  potentials are divided by it, and kept within +- limit
    last     (B, n) float64: the last softmin found for it, without the offset; None at first
    """

    cloud: Cloud
    offset: Tensor
    logs: Tensor
    damping: float = 1.0
    limit: float = float("inf")
    last: Tensor | None = None

    @property
    def stride(self) -> int:
        return self.logs.shape[-1] if self.logs.dim() > 1 else 0

    @property
    def numbers(self) -> tuple[float, float]:
        return float(self.damping), float(self.limit)


class _Level:
    """h = g + eps log b - beta of one side in fp32, without `centre`, which stays wide: an offset costs the others no digits."""

    def __init__(self, side: Side, batch: int) -> None:
        device = side.offset.device
        self.side = side
        self.h = torch.empty(batch, side.cloud.n, dtype=torch.float32, device=device)
        self.centre = torch.empty(batch, dtype=torch.float64, device=device)
        self.used = torch.empty(batch, dtype=torch.int32, device=device)


def update(rows: Side, columns: Side, g: Tensor, eps: float) -> Tensor:
    """f (B, n), the damped softmin of g (B, m), in two launches, three where columns are split; and `rows.last` is brought up to date."""
    level = _Level(columns, len(g))
    with on_device_of(g):
        _centre(level, g, eps)
        return _update(rows, level, eps)


def iterate(rows: Side, columns: Side, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(f, g, g_next) after k iterations from g (B, m), f the update of g and g_next that of f: 2 k + 1 launches, one more the first time.

    No vector is touched by anything else: a sweep damps its result and writes it as the next one reads it. That one is centred at
    the largest entry of the potential before, since nobody knows the new one's yet; iterations move it by less than its spread.
    """
    batch = len(g)
    of_g, of_f = _Level(columns, batch), _Level(rows, batch)
    known = rows.last is not None
    f = g_next = g
    with on_device_of(g):
        _centre(of_g, g, eps, of_f if known else None)
        for i in range(k):
            g = g_next
            f = _update(rows, of_g, eps, of_f if known else None)
            if not known:
                _centre(of_f, f, eps)
                known = True
            g_next = _update(columns, of_f, eps, of_g if i + 1 < k else None)
    return f, g, g_next


def _centre(level: _Level, g: Tensor, eps: float, other: _Level | None = None) -> None:
    """The level of g; and of the other side's last potential its centre alone."""
    side, m = level.side, g.shape[-1]
    far = other or level
    n, last = far.side.cloud.n, far.side.last
    block = min(2048, max(64, triton.next_power_of_2(max(n, m) if other else m)))
    centre_kernel[(len(g), 2 if other else 1)](
        g, side.logs, side.offset, level.h, level.centre, level.used, m, side.stride,
        g if last is None else last, far.side.logs, far.side.offset, far.centre, far.used, n, far.side.stride,
        float(eps), *far.side.numbers, BLOCK=block, num_warps=max(1, block // 128),
    )  # fmt: skip


def _update(side: Side, level: _Level, eps: float, following: _Level | None = None) -> Tensor:
    """The potential of a side from the level of the other; `following`, the side's own, is written for the next sweep."""
    n = side.cloud.n
    f, s = (torch.empty(len(level.h), n, dtype=torch.float64, device=level.h.device) for _ in range(2))
    used = level.used if len(level.h) > 1 else None
    _sweep(side.cloud, level.side.cloud, level.h, eps, s, side.last, used, None, (side, level, f, following))
    side.last = s
    return f


def _sweep(
    u: Cloud, v: Cloud, h: Tensor, eps: float, out: Tensor, shift: Tensor | None, columns_used: Tensor | None, tile: Tile | None,
    update: tuple[Side, _Level, Tensor, _Level | None] | None = None,
) -> None:  # fmt: skip
    """Writes the softmin to `out`; for an update (side, level, f, following) also f, and the level that follows."""
    batch, n, m = len(u.data), u.n, v.n
    tile = tile or tuning.tile("softmin", u.data, u.parts, u.width, n)
    splits, per_split = tuning.split(n, m, batch, tile, u.data)
    apart = splits > 1 or (update is not None and tuning.full(u.data, u.parts, u.width))
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
            BLOCK_N=tile.block_n, BLOCK_M=tile.block_m, STAGES=tile.stages, num_warps=tile.warps,
        )  # fmt: skip
        if apart:
            join_kernel[(triton.cdiv(n, 128), batch)](
                parts, out, n, splits, eps, *ends, UPDATE=kind, SPLITS=triton.next_power_of_2(splits), BLOCK=128
            )


def on_device_of(x: Tensor):
    """Triton launches on the current device, which need not be the one that holds the data."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@triton.jit
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
def centre_kernel(
    g, logs, beta, h, centre, columns_used, m, logs_stride, last, last_logs, last_offset, last_centre, last_used, n, last_stride,
    eps: tl.float64, damping: tl.float64, limit: tl.float64, BLOCK: tl.constexpr,
):  # fmt: skip
    """h = g + eps log b - beta in fp32 without its largest entry, `centre`; and the number of columns up to the last with weight.

    A second program per problem does the same for the other side's potential, that of its last softmin, and writes no h.
    """
    problem = tl.program_id(0).to(tl.int64)
    top = tl.full([], -float("inf"), tl.float64)
    used = tl.full([], 0, tl.int32)
    if tl.program_id(1) == 0:
        g += problem * m
        beta += problem * m
        logs += problem * logs_stride
        for j in range(0, m, BLOCK):
            cols = j + tl.arange(0, BLOCK)
            wide = weighed(g, logs, beta, cols, m, eps)
            top = tl.maximum(top, tl.max(wide, 0))
            used = tl.maximum(used, tl.max(tl.where((cols < m) & (wide != -float("inf")), cols + 1, 0), 0))  # NaN is no empty atom
        top = tl.where(top > -float("inf"), top, 0.0)
        for j in range(0, m, BLOCK):
            cols = j + tl.arange(0, BLOCK)
            tl.store(h + problem * m + cols, (weighed(g, logs, beta, cols, m, eps) - top).to(tl.float32), mask=cols < m)
        tl.store(centre + problem, top)
        tl.store(columns_used + problem, used)
    else:
        for i in range(0, n, BLOCK):
            rows = i + tl.arange(0, BLOCK)
            log_a = tl.load(last_logs + problem * last_stride + rows, mask=rows < n, other=-float("inf"))
            there = log_a > -float("inf")
            alpha = tl.load(last_offset + problem * n + rows, mask=there, other=0.0)
            f = damped(tl.load(last + problem * n + rows, mask=there, other=0.0), alpha, damping, limit)
            wide = tl.where(there & (f < float("inf")), f + eps * log_a - alpha, -float("inf"))
            top = tl.maximum(top, tl.max(wide, 0))
            used = tl.maximum(used, tl.max(tl.where(there, rows + 1, 0), 0))
        tl.store(last_centre + problem, tl.where(top > -float("inf"), top, 0.0))
        tl.store(last_used + problem, used)


@triton.jit
def weighed(g, logs, beta, cols, m, eps):
    """An empty atom is -inf whatever its potential."""
    log_b = tl.load(logs + cols, mask=cols < m, other=-float("inf"))
    there = log_b > -float("inf")
    wide = tl.load(g + cols, mask=there, other=0.0) + eps * log_b - tl.load(beta + cols, mask=there, other=0.0)
    return tl.where(there, wide, -float("inf"))


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


@triton.jit
def join_kernel(
    parts, out, n, splits, eps, centre, offset, potential, logs, next_centre, next_h, logs_stride,
    eps_64: tl.float64, damping: tl.float64, limit: tl.float64, UPDATE: tl.constexpr, SPLITS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A softmin of softmins is a softmin: (B, splits, n) to (B, n)."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)[None, :]
    split = tl.arange(0, SPLITS)[:, None]
    batch = tl.program_id(1).to(tl.int64)
    scale = 1.4426950408889634 / eps
    t = tl.load(parts + (batch * splits + split) * n + rows, mask=(split < splits) & (rows < n), other=float("inf")).to(tl.float64) * -scale
    top = tl.maximum(tl.max(t, 0), -1e38)[None, :]  # [1, N]
    s = -(top + tl.log2(tl.sum(tl.exp2((t - top).to(tl.float32)), 0))[None, :]) / scale
    if UPDATE > 0:
        s -= tl.load(centre + batch)
        store_update(
            s, batch, rows, n, offset, potential, logs, next_centre, next_h, logs_stride, eps_64, damping, limit, UPDATE == 2
        )  # fmt: skip
    tl.store(out + batch * n + rows, s, mask=rows < n)
