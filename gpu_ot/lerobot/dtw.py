"""Dynamic time warping: which moments of two recordings of the same task belong together.

The monotone path from (0, 0) to (n-1, m-1), in steps of (1, 1), (1, 0) and (0, 1), with the least sum of local costs (Sakoe and Chiba
1978, their symmetric form without step weights). Where several are equally good, the last step is (1, 1) before (1, 0) before (0, 1).
Two engines follow the same recurrence in the same order of operations, so they agree to the last bit, ties included.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ProblemError, unknown

#: Local cost between two frames -> what the kernels call it.
COSTS = {"euclidean": 0, "l1": 1, "linf": 2}
ENGINES = ("auto", "numba", "numpy")
#: Bytes of recorded steps that one batch of the numpy engine may take.
BATCH_BYTES = 1 << 25


@dataclass(frozen=True, eq=False)
class Alignment:
    """A path, as the run of x's frames that each frame of y meets.

    total        the sum of local costs along the path.
    first, last  (m,) int32: frame j of y meets frames first[j] to last[j] of x, both included. Runs of neighbours touch or follow on
                 each other, so they hold the whole path.
    """

    total: float
    first: np.ndarray
    last: np.ndarray

    @property
    def steps(self) -> int:
        """Cells of the path, between max(n, m) and n + m - 1."""
        return int((self.last - self.first + 1).sum())

    @property
    def path(self) -> np.ndarray:
        """(steps, 2) int64 pairs (frame of x, frame of y), in order."""
        counts = self.last - self.first + 1
        frames = np.arange(self.steps) - np.repeat(np.cumsum(counts) - counts - self.first, counts)
        return np.stack((frames, np.repeat(np.arange(len(counts)), counts)), 1)


def dtw(x: np.ndarray, y: np.ndarray, *, cost: str = "euclidean", band: float | None = None, engine: str = "auto") -> Alignment:
    """The cheapest monotone alignment of x (n, d) with y (m, d).

    cost    between two frames: "euclidean" |x_i - y_j|, "l1" the sum of the absolute differences, "linf" the largest of them.
    band    Sakoe-Chiba: how far the path may stray from the straight line between the corners, in frames of the shorter sequence (at
            least 1, so that a path exists); None for anywhere. x against y and y against x admit the same cells.
    engine  "numba", "numpy", or "auto": numba where it is installed.

    O(nm) time and nm bytes. Raises ProblemError for shapes that do not fit, values that are not finite, and an engine that is not there.
    """
    return align([checked(x, "x")], checked(y, "y"), cost=cost, band=band, engine=engine)[0]


def align(
    xs: Sequence[np.ndarray], y: np.ndarray, *, cost: str = "euclidean", band: float | None = None, engine: str = "auto"
) -> list[Alignment]:
    """`dtw` of every x in `xs` with one y, all float64 and finite (see `checked`). Nothing here holds Python's lock for long."""
    if cost not in COSTS:
        raise unknown("cost", cost, tuple(COSTS))
    if band is not None and not band >= 1:
        raise ProblemError(f"band must be at least 1 frame, found {band}. Leave it out to allow every alignment.")
    for x in xs:
        if x.shape[1] != y.shape[1]:
            raise ProblemError(f"both sides need the same features, found {x.shape[1]} and {y.shape[1]}. Slice them to what they share.")
    reach = -1.0 if band is None or math.isinf(band) else float(band)
    if available(engine) == "numpy":
        return _align_in_numpy(xs, y, COSTS[cost], reach)
    kernel = _compiled()
    columns = np.ascontiguousarray(y.T)
    return [Alignment(float(total), first, last) for total, first, last in (kernel(x, columns, COSTS[cost], reach) for x in xs)]


def available(engine: str) -> str:
    """The engine that "auto" stands for here; any other is checked and returned."""
    if engine not in ENGINES:
        raise unknown("engine", engine, ENGINES)
    found = importlib.util.find_spec("numba") is not None
    if engine == "numba" and not found:
        raise ProblemError('engine = "numba" needs numba, which is not installed: pip install numba, or take "numpy", slower and the same.')
    return ("numba" if found else "numpy") if engine == "auto" else engine


def checked(x: Any, name: str) -> np.ndarray:
    """`x` as contiguous float64 (n, d) with n, d >= 1; one feature may come as (n,)."""
    try:
        x = np.asarray(x, dtype=np.float64)
    except (TypeError, ValueError):
        raise ProblemError(f"{name} must be an array of numbers (frames, features), found {type(x).__name__}.") from None
    x = x[:, None] if x.ndim == 1 else x
    if x.ndim != 2 or 0 in x.shape:
        raise ProblemError(f"{name} has shape {x.shape}, expected (frames, features) with at least one of each.")
    if bad := int((~np.isfinite(x)).any(1).sum()):
        raise ProblemError(f"{name} holds NaN or infinity in {bad} of its {len(x)} frames. Drop or mend those episodes first.")
    return np.ascontiguousarray(x)


def _align_one(x, yt, kind, reach):  # compiled by numba; it also runs as it stands
    """(total, first (m,), last (m,)) for x (n, d) and yt (d, m), row by row; nm bytes remember the steps: 0 both, 1 x alone, 2 y alone."""
    n, d = x.shape
    m = yt.shape[1]
    long = max(n, m) - 1
    lo, hi = np.zeros(n, np.int64), np.full(n, m - 1, np.int64)
    if reach >= 0 and n > 1:
        for i in range(n):
            lo[i] = max(0, math.ceil((i * (m - 1) - reach * long) / (n - 1)))
            hi[i] = min(m - 1, math.floor((i * (m - 1) + reach * long) / (n - 1)))
    width = 0
    for i in range(n):
        width = max(width, hi[i] - lo[i] + 1)

    step = np.empty((n, width), np.uint8)
    before, row, local = np.full(m + 1, np.inf), np.full(m + 1, np.inf), np.empty(m)  # rows start at column -1
    for i in range(n):
        a, b = lo[i], hi[i] + 1
        local[a:b] = 0.0
        # Feature by feature over a whole row: the compiler turns each into vector instructions without changing the order of additions.
        for k in range(d):
            xk = x[i, k]
            if kind == 0:
                for j in range(a, b):
                    gap = xk - yt[k, j]
                    local[j] += gap * gap
            elif kind == 1:
                for j in range(a, b):
                    local[j] += abs(xk - yt[k, j])
            else:
                for j in range(a, b):
                    local[j] = max(local[j], abs(xk - yt[k, j]))
        if kind == 0:
            for j in range(a, b):
                local[j] = math.sqrt(local[j])

        row[a] = np.inf  # left of this window; right of it nothing was ever written, since windows only move to the right
        left = np.inf
        if i == 0:
            row[1] = left = local[0]
            step[0, 0] = 0
            a = 1
        for j in range(a, b):
            best, came = before[j], 0
            if before[j + 1] < best:
                best, came = before[j + 1], 1
            if left < best:
                best, came = left, 2
            left = local[j] + best
            row[j + 1] = left
            step[i, j - lo[i]] = came
        before, row = row, before

    first, last = np.empty(m, np.int32), np.empty(m, np.int32)
    i, j = n - 1, m - 1
    last[j] = i
    while i > 0 or j > 0:
        came = step[i, j - lo[i]]
        if came == 1:
            i -= 1
            continue
        first[j] = i
        j -= 1
        if came == 0:
            i -= 1
        last[j] = i
    first[0] = 0
    return float(before[m]), first, last


@lru_cache(maxsize=1)
def _compiled() -> Callable[..., tuple[float, np.ndarray, np.ndarray]]:
    import numba  # pyright: ignore[reportMissingImports]

    try:
        return numba.njit(cache=True, nogil=True)(_align_one)
    except RuntimeError:  # nowhere to keep the machine code: compile it again in every process
        return numba.njit(nogil=True)(_align_one)


def _align_in_numpy(xs: Sequence[np.ndarray], y: np.ndarray, kind: int, reach: float) -> list[Alignment]:
    order = sorted(range(len(xs)), key=lambda k: len(xs[k]))  # neighbours in length waste little padding
    found: dict[int, Alignment] = {}
    while order:
        longest = len(xs[order[-1]])
        size = max(1, min(32, BATCH_BYTES // ((longest + len(y)) * len(y))))
        batch, order = order[-size:], order[:-size]
        found.update(zip(batch, _align_batch([xs[k] for k in batch], y, kind, reach), strict=True))
    return [found[k] for k in range(len(xs))]


def _align_batch(xs: list[np.ndarray], y: np.ndarray, kind: int, reach: float) -> list[Alignment]:
    """Anti-diagonals of several problems at once: cells (i, s - i) of one s depend on those of s-1 and s-2 alone.

    Rows beyond the end of a shorter x are computed and never read: what comes later in time cannot change what came before.
    """
    lengths = np.array([len(x) for x in xs])
    B, n, m, d = len(xs), int(lengths.max()), len(y), y.shape[1]
    backwards = np.zeros((d, B, n))  # x from its last frame to its first, so that a diagonal is a plain slice
    for b, x in enumerate(xs):
        backwards[:, b, n - len(x) :] = x[::-1].T
    yt = np.ascontiguousarray(y.T)

    # The window of every row, by the same operations as the compiled rows; used where there is a band.
    short, rooms = np.maximum(lengths - 1, 1)[:, None], reach * (np.maximum(lengths, m) - 1)[:, None]
    line, slopes = np.arange(n) * (m - 1), np.maximum(lengths + m - 2, 1)[:, None]
    lo = np.where(lengths[:, None] > 1, np.ceil((line - rooms) / short), 0)
    hi = np.where(lengths[:, None] > 1, np.floor((line + rooms) / short), m - 1)

    step = np.empty((n + m - 1, B, m), np.uint8)
    one, two, now = (np.full((B, m + 1), np.inf) for _ in range(3))  # diagonals s-1, s-2 and s by column, which starts at -1
    ends = np.empty(B)
    for s in range(n + m - 1):
        a, b = max(0, s - n + 1), min(m - 1, s) + 1  # columns of this diagonal; row i = s - j
        if reach >= 0:  # no narrower than the widest band on this diagonal; what else is outside is closed below
            middle, side = s * (m - 1) / slopes, rooms / slopes
            a = max(a, int((middle - side).min()) - 1)
            b = max(a + 1, min(b, int((middle + side).max()) + 2))
        x = backwards[:, :, n - 1 - s + a : n - 1 - s + b]
        local = np.zeros((B, b - a))
        for k in range(d):
            gap = x[k] - yt[k, a:b]
            if kind == 0:
                local += np.multiply(gap, gap, out=gap)
            elif kind == 1:
                local += np.abs(gap, out=gap)
            else:
                np.maximum(local, np.abs(gap, out=gap), out=local)
        if kind == 0:
            np.sqrt(local, out=local)

        both, above, left = two[:, a:b], one[:, a + 1 : b + 1], one[:, a:b]
        came = (above < both).view(np.uint8)
        best = np.where(came, above, both)
        came[left < best] = 2
        np.minimum(best, left, out=best)
        if s == 0:
            best[:], came[:] = 0.0, 0
        step[s, :, a:b] = came
        np.add(local, best, out=now[:, a + 1 : b + 1])
        if reach >= 0:
            columns = np.arange(a, b)
            rows = slice(s - b + 1, s - a + 1)
            now[:, a + 1 : b + 1][(columns < lo[:, rows][:, ::-1]) | (columns > hi[:, rows][:, ::-1])] = np.inf
        now[:, a] = np.inf  # left of these columns; right of them nothing was ever written
        if (done := lengths == s - m + 2).any():
            ends[done] = now[done, m]
        one, two, now = now, one, two
    return [_walk(float(ends[b]), step[:, b], int(lengths[b]), m) for b in range(B)]


def _walk(total: float, step: np.ndarray, n: int, m: int) -> Alignment:
    """Back from the last corner; `step` (n+m-1, m) by diagonal and column."""
    first, last = np.empty(m, np.int32), np.empty(m, np.int32)
    i, j = n - 1, m - 1
    last[j] = i
    while i or j:
        came = step[i + j, j]
        if came == 1:
            i -= 1
            continue
        first[j] = i
        j -= 1
        if came == 0:
            i -= 1
        last[j] = i
    first[0] = 0
    return Alignment(total, first, last)
