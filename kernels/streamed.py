"""Iterations on streamed points: a launch a sweep, which damps its result and writes it as the next one reads it."""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from .launches import COUNTS, FUSED, on_device_of
from .softmin import damped, sweep_into
from .tiles import Cloud


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


class Level:
    """h = g + eps log b - beta of one side in fp32, without `centre`, which stays wide: an offset costs the others no digits."""

    def __init__(self, side: Side, batch: int) -> None:
        device = side.offset.device
        self.side = side
        self.h = torch.empty(batch, side.cloud.n, dtype=torch.float32, device=device)
        self.centre = torch.empty(batch, dtype=torch.float64, device=device)
        self.used = torch.empty(batch, dtype=torch.int32, device=device)


def update(rows: Side, columns: Side, g: Tensor, eps: float) -> Tensor:
    """f (B, n), the damped softmin of g (B, m), in two launches, three where columns are split; and `rows.last` is brought up to date."""
    level = Level(columns, len(g))
    with on_device_of(g):
        _centre(level, g, eps)
        return _update(rows, level, eps)


def iterate(rows: Side, columns: Side, g: Tensor, eps: float, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """(f, g, g_next) after k iterations from g (B, m), f the update of g and g_next that of f: 2 k + 1 launches, one more the first time.

    No vector is touched by anything else: a sweep damps its result and writes it as the next one reads it. That one is centred at
    the largest entry of the potential before, since nobody knows the new one's yet; iterations move it by less than its spread.
    """
    batch = len(g)
    of_g, of_f = Level(columns, batch), Level(rows, batch)
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


def _centre(level: Level, g: Tensor, eps: float, other: Level | None = None) -> None:
    """The level of g; and of the other side's last potential its centre alone."""
    side, m = level.side, g.shape[-1]
    far = other or level
    n, last = far.side.cloud.n, far.side.last
    block = min(2048, max(64, triton.next_power_of_2(max(n, m) if other else m)))
    centre_kernel[(len(g), 2 if other else 1)](
        g, side.logs, side.offset, level.h, level.centre, level.used, m, side.stride,
        g if last is None else last, far.side.logs, far.side.offset, far.centre, far.used, n, far.side.stride,
        float(eps), *far.side.numbers, BLOCK=block, num_warps=max(1, block // 256), **FUSED,
    )  # fmt: skip


def _update(side: Side, level: Level, eps: float, following: Level | None = None) -> Tensor:
    """The potential of a side from the level of the other; `following`, the side's own, is written for the next sweep."""
    n = side.cloud.n
    f, s = (torch.empty(len(level.h), n, dtype=torch.float64, device=level.h.device) for _ in range(2))
    used = level.used if len(level.h) > 1 else None
    sweep_into(side.cloud, level.side.cloud, level.h, eps, s, side.last, used, None, (side, level, f, following))
    side.last = s
    return f


@triton.jit(do_not_specialize=COUNTS)
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
