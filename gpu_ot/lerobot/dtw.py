"""Dynamic time warping: which moments of two recordings of the same task belong together.

The monotone path from (0, 0) to (n-1, m-1), in steps of (1, 1), (1, 0) and (0, 1), with the least sum of local costs (Sakoe and Chiba
1978, their symmetric form without step weights). Where several are equally good, the last step is (1, 1) before (1, 0) before (0, 1).
numba compiles the recurrence where it is installed; the same function runs without it, to the last bit, some thousand times slower.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np

from ..errors import ProblemError, unknown

#: Local cost between two frames -> what the kernels call it.
COSTS = {"euclidean": 0, "l1": 1, "linf": 2}


@dataclass(frozen=True, eq=False)
class Alignment:
    """A path, as the run of x's frames that each frame of y meets.

    total        the sum of local costs along the path.
    first, last  (m,) int32: frame j of y meets frames first[j] to last[j] of x, both included; these hold the whole path.
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


def dtw(x: np.ndarray, y: np.ndarray, *, cost: str = "euclidean", band: float | None = None) -> Alignment:
    """The cheapest monotone alignment of x (n, d) with y (m, d).

    cost  between two frames: "euclidean" |x_i - y_j|, "l1" the sum of the absolute differences, "linf" the largest of them.
    band  Sakoe-Chiba: how far the path may stray from the straight line between the corners, in frames of the shorter sequence (at
          least 1, so that a path exists); None for anywhere. x against y and y against x admit the same cells.

    O(nm) time and nm bytes, without Python's lock where it is compiled. Raises ProblemError for shapes that do not fit, and for NaN.
    """
    x, y = checked(x, "x"), checked(y, "y")
    if cost not in COSTS:
        raise unknown("cost", cost, tuple(COSTS))
    if band is not None and not band >= 1:
        raise ProblemError(f"band must be at least 1 frame, found {band}. Leave it out to allow every alignment.")
    if x.shape[1] != y.shape[1]:
        raise ProblemError(f"both sides need the same features, found {x.shape[1]} and {y.shape[1]}. Slice them to what they share.")
    reach = -1.0 if band is None or math.isinf(band) else float(band)
    return Alignment(*compiled()(x, np.ascontiguousarray(y.T), COSTS[cost], reach))


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
    width = (hi - lo).max() + 1

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
def compiled() -> Callable[..., tuple[float, np.ndarray, np.ndarray]]:
    """The recurrence: machine code where there is numba, else as it stands."""
    try:
        import numba  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError:
        return _align_one
    try:
        return numba.njit(cache=True, nogil=True)(_align_one)
    except RuntimeError:  # nowhere to keep the machine code: compile it again in every process
        return numba.njit(nogil=True)(_align_one)
