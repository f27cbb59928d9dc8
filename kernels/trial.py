"""Timing the candidate tiles of tuning.py on this GPU. Only `gpu-ot tune` asks for it."""

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import tuning
from .apply import apply
from .softmin import softmin
from .tiles import Cloud, cloud
from .tuning import Tile

GAIN = 0.98  # of the table's time: less is noise
Call = Callable[[Tile], Tensor]
Timer = Callable[[list[Call], list[Tile], int], list[float | None]]


@dataclass(frozen=True)
class Trial:
    """One row of the table and the size it is timed at."""

    kernel: str
    precision: str
    n: int
    d: int

    def calls(self, device: torch.device) -> list[Call]:
        """Everything that the row would serve at this size: a tile that cannot run all of it is no candidate."""
        gen = torch.Generator().manual_seed(0)
        x, y = (torch.randn(self.n, self.d, generator=gen).to(device) / self.d**0.5 for _ in range(2))
        u, v = cloud(x, self.precision), cloud(y, self.precision)
        h = torch.zeros(self.n, device=device)
        shift = softmin(u, v, h, 1.0)
        if self.kernel == "softmin":
            return [lambda tile: softmin(u, v, h, 1.0, shift=shift, tile=tile), lambda tile: softmin(u, v, h, 1.0, tile=tile)]
        if self.kernel == "vector":
            w = torch.ones(self.n, 1, device=device)
            return [lambda tile: apply(u, v, shift, h, 1.0, w, precision=self.precision, tile=tile)]
        # The gradient at the points, from a matrix of its own, and, where that exists, as the stored points themselves.
        own = cloud(torch.randn(self.n, self.bucket or self.d, generator=gen).to(device), self.precision, weights=True)
        given: list[Cloud] = [own] if v.packed or self.precision == "tf32" else [own, v]
        return [lambda tile, w=w: apply(u, v, shift, h, 1.0, w, precision=self.precision, tile=tile) for w in given]

    @property
    def stored(self) -> Cloud:
        return cloud(torch.zeros(1, self.d), self.precision)

    @property
    def storage(self) -> str:
        return "pair" if self.stored.parts == 2 else "tf32" if self.precision == "tf32" else "half"

    @property
    def bucket(self) -> int:
        return next((b for b in tuning.BUCKETS if self.stored.width <= b), 0)


@dataclass(frozen=True)
class Outcome:
    """The table's tile and the fastest, milliseconds of each when they took turns."""

    trial: Trial
    old: Tile
    new: Tile
    old_ms: float
    new_ms: float

    def row(self) -> dict:
        t = self.trial
        return dict(kernel=t.kernel, storage=t.storage, bucket=t.bucket, n=t.n, tile=self.new, time_ms=self.new_ms, table_ms=self.old_ms)


def run(trials: list[Trial], device: torch.device, arch: str, timer: Timer | None = None) -> Iterator[tuple[int, int, Outcome | None]]:
    """(candidates done, candidates in all, an outcome whenever a trial ends). `timer` stands in for the GPU's clock in tests."""
    fields = [tuning.candidates(t.kernel, arch, t.storage, t.bucket, t.n <= tuning.THIN) for t in trials]
    done, total = 0, sum(map(len, fields))
    for trial, field in zip(trials, fields, strict=True):
        calls = trial.calls(device) if timer is None else []
        clock = timer or Stopwatch(calls, field[0], 1e-5 if trial.precision == "fp32" else 4e-3)
        times: dict[Tile, float] = {}
        for tile in field:
            (ms,) = clock(calls, [tile], 5)
            if ms is not None:
                times[tile] = ms
            done += 1
            yield done, total, None
        old = field[0]
        if old not in times:
            raise RuntimeError(f"the table's own tile {old} does not run for {trial}")
        best = min(times, key=lambda tile: times[tile])
        before, after = times[old], times[best]
        if best != old:  # the winner of many short races may have been lucky: again, in turns
            again = clock(calls, [old, best], 15)
            before, after = again[0] or before, again[1] or after
        if best != old and after > GAIN * before:
            best, after = old, before
        yield done, total, Outcome(trial, old, best, before, after)


class Stopwatch:
    """Median milliseconds of one round of `calls`, tiles in turns, by the GPU's clock. None for a tile that does not run or errs."""

    def __init__(self, calls: list[Call], reference: Tile, slack: float) -> None:
        self.slack = slack  # another order of the sums moves results by no more of their size than rounding does
        self.right = [call(reference) for call in calls]

    def __call__(self, calls: list[Call], tiles: list[Tile], rounds: int) -> list[float | None]:
        good: dict[Tile, list[float]] = {tile: [] for tile in tiles if self._agrees(calls, tile)}
        for _ in range(rounds):
            for tile, times in good.items():
                first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
                first.record()
                for call in calls:
                    call(tile)
                last.record()
                last.synchronize()
                times.append(first.elapsed_time(last))
        return [statistics.median(good[tile]) if tile in good else None for tile in tiles]

    def _agrees(self, calls: list[Call], tile: Tile) -> bool:
        """Runs it once, which compiles it."""
        try:
            found = [call(tile) for call in calls]
            torch.cuda.synchronize()
        except Exception:  # too much shared memory, too many registers, a compiler that gives up: not a candidate here
            return False
        return all(bool(((a - b).abs().max() <= self.slack * b.abs().max()).item()) for a, b in zip(found, self.right, strict=True))
