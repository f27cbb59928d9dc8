"""Which frames of the source belong to which frames of the target: kept in a small file, and believed only when it fits the data."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProblemError
from .dtw import COSTS
from .episodes import Recording, Side
from .settings import Settings, bounded, choice

FORMAT = "gpu_ot pairs"
VERSION = 1
ARRAYS = ("target_episode", "source_episode", "total", "steps", "distance", "offsets", "first", "count")


@dataclass
class PairOptions(Settings):
    """How episodes are compared.

    keys         label columns, side by side: the proprioception that both robots share; target_keys their names in the target.
    dim_slice    [a, b): which of the concatenated features.
    center       subtract each episode's mean, so that two workspaces may be offset.
    zscore       divide by the standard deviation over all frames of both sets, after subtracting the mean (a constant feature is 0).
    stride       compare every so many frames (and the last one), and interpolate the pairing in between.
    band         Sakoe-Chiba, in frames of the shorter episode; None for none. See `dtw`.
    topk         keep the nearest so many source episodes of each target episode; None for all.
    cost         between frames: "euclidean", "l1", "linf".
    norm         of the distance. "steps": mean cost of a step of the path; "arc": the summed cost over the mean arc length of the two
                 episodes (times the stride, which leaves out summands); "none": the summed cost.
    """

    keys: tuple[str, ...] = ("observation.state",)
    target_keys: tuple[str, ...] | None = None
    dim_slice: tuple[int, int] | None = None
    center: bool = False
    zscore: bool = False
    stride: int = bounded(1, least=1, whole=True)
    band: float | None = bounded(None, least=1)
    topk: int | None = bounded(None, least=1, whole=True)
    cost: str = choice("euclidean", COSTS)
    norm: str = choice("steps", ("steps", "arc", "none"))

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("keys", "target_keys"):  # JSON has lists, and one key is easily given without one
            if (given := getattr(self, name)) is not None:
                setattr(self, name, given := (given,) if isinstance(given, str) else tuple(given))
                if not given or not all(isinstance(key, str) for key in given):
                    raise ProblemError(f'{name} is empty or holds no keys: name at least one label, such as "observation.state".')
        if self.dim_slice is not None:
            ends = list(self.dim_slice)
            if len(ends) != 2 or not all(type(z) is int for z in ends) or not 0 <= ends[0] < ends[1]:
                raise ProblemError(f"dim_slice must be [a, b) with 0 <= a < b, found {ends}.")
            self.dim_slice = ends[0], ends[1]


@dataclass(frozen=True, eq=False)
class Pairs:
    """Aligned pairs of episodes, sorted by target episode and within it by distance.

    source, target    which recordings they index.
    options           how they were found, None where the file does not say.
    target_episode, source_episode  (p,) numbers of the episodes of each pair.
    total             (p,) summed cost along the path; `steps` (p,) its cells; `distance` (p,) the normalised one.
    first, count      (rows,) the source frames of a target frame: first, ..., first + count - 1, counted from 0 in the episode.
                      Pair k owns rows offsets[k] to offsets[k + 1], one for each frame of its target episode.
    frames            where the frames of a row are not neighbours (old files), first and count point into this list instead.
    """

    source: Side
    target: Side
    options: PairOptions | None
    target_episode: np.ndarray
    source_episode: np.ndarray
    total: np.ndarray
    steps: np.ndarray
    distance: np.ndarray
    offsets: np.ndarray
    first: np.ndarray
    count: np.ndarray
    frames: np.ndarray | None = None

    def __post_init__(self) -> None:
        _validate(self)

    def __len__(self) -> int:
        return len(self.target_episode)

    @property
    def keys(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The label columns of source and target; none where the file does not say."""
        return ((), ()) if self.options is None else (self.options.keys, self.options.target_keys or self.options.keys)

    @classmethod
    def of_rows(cls, source: Side, target: Side, options: PairOptions | None, rows: Iterable[Sequence[Any]], *frames: np.ndarray) -> Pairs:
        """From rows (target episode, source episode, total, steps, distance, first, count), the last two arrays."""
        *numbers, first, count = zip(*rows, strict=True)
        offsets = np.concatenate(([0], np.cumsum([len(each) for each in first])))
        columns: list[Any] = [np.array(column) for column in numbers]
        columns += [offsets, np.concatenate(first), np.concatenate(count), *frames]
        return cls(source, target, options, *columns)

    def of(self, target_episode: int) -> range:
        """The pairs of one target episode, the nearest first."""
        low, high = np.searchsorted(self.target_episode, [target_episode, target_episode + 1])
        return range(int(low), int(high))

    def frames_of(self, pair: int, frame: int) -> np.ndarray:
        """Source frames that belong to a target frame of a pair."""
        row = int(self.offsets[pair]) + frame
        run = np.arange(self.first[row], self.first[row] + self.count[row])
        return run if self.frames is None else self.frames[run]

    def check(self, source: Side | Recording | None = None, target: Side | Recording | None = None) -> None:
        """Raises ProblemError saying what differs if these recordings are not the ones that were paired: frames a second, episodes, their
        lengths or the labels. Names may differ, since folders move; a side with only some of the episodes is good for those."""
        for role, ours, given in (("source", self.source, source), ("target", self.target, target)):
            if given is not None:
                _compare(role, ours, given.side if isinstance(given, Recording) else given)

    def summary(self) -> str:
        """What was found, in a few lines."""
        d = np.array([self.distance[self.of(t)[0]] for t in np.unique(self.target_episode).tolist()])
        low, middle, high = np.quantile(self.distance, [0.1, 0.5, 0.9])
        return (
            f"{len(d)} target episodes, each with {len(self) / len(d):g} of {len(self.source.episodes)} source episodes\n"
            f"distance of the nearest: median {np.median(d):.4g}, largest {d.max():.4g}\n"
            f"distance of all: {low:.4g} to {high:.4g} (10 % to 90 %), median {middle:.4g}; cutoff and sharpness are in these units"
        )

    def write(self, path: str | Path) -> Path:
        """As compact arrays (.npz, nothing pickled); whole or not at all."""
        path = Path(path)
        sides = (("source", self.source), ("target", self.target))
        options = dataclasses.asdict(self.options) if self.options else None
        header: dict[str, Any] = {"format": FORMAT, "version": VERSION, "index_base": 0, "options": options}
        header |= {role: {name: getattr(side, name) for name in ("name", "fps", "digest", "exact")} for role, side in sides}
        arrays = {name: getattr(self, name) for name in (*ARRAYS, "frames") if getattr(self, name) is not None}
        arrays |= {f"{role}_{name}": getattr(side, name) for role, side in sides for name in ("episodes", "lengths")}
        with _beside(path) as partial:
            with partial.open("wb") as file:
                small: dict[str, Any] = {name: _narrow(each) for name, each in arrays.items()}
                np.savez_compressed(file, header=np.array(json.dumps(header)), **small)
            partial.replace(path)
        return path


def writable(path: str | Path) -> Path:
    """The path, made sure of before minutes are spent. Raises ProblemError."""
    path = Path(path)
    if path.suffix == ".json":
        raise ProblemError(f"{path} would hold arrays; name it .npz. JSON is only read.")
    with _beside(path) as partial:
        partial.touch()
    return path


@contextmanager
def _beside(path: Path) -> Iterator[Path]:
    """A file beside `path`, gone in the end, whatever happens. Raises ProblemError where none can be written."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield partial
    except OSError as problem:
        raise ProblemError(f"{path} cannot be written ({problem.strerror}). Name a file in a folder of yours with --out.") from None
    finally:
        partial.unlink(missing_ok=True)


def _validate(pairs: Pairs) -> None:
    """Raises ProblemError unless every row points into an episode that exists."""
    p, rows = len(pairs.target_episode), len(pairs.first)
    if p == 0:
        raise ProblemError("there are no pairs.")
    sizes = {len(getattr(pairs, name)) for name in ("source_episode", "total", "steps", "distance")} | {len(pairs.offsets) - 1}
    if sizes != {p} or len(pairs.count) != rows or pairs.offsets[0] != 0 or pairs.offsets[-1] != rows:
        raise ProblemError("the arrays do not have the lengths that belong together; the file is damaged. Pair again.")
    lengths = []
    for role, side, episodes in (("source", pairs.source, pairs.source_episode), ("target", pairs.target, pairs.target_episode)):
        if len(side.episodes) != len(side.lengths) or (np.diff(side.episodes.astype(np.int64)) <= 0).any() or (side.lengths < 1).any():
            raise ProblemError(f"the {role} episodes must be numbered in increasing order and have frames. Pair again.")
        if strange := sorted(set(np.asarray(episodes).tolist()) - set(np.asarray(side.episodes).tolist())):
            known = f"from {side.episodes[0]} to {side.episodes[-1]}" if len(side.episodes) else "none"
            raise ProblemError(f"{role} episode {strange[0]} is paired and does not exist: there are {known}. Pair again.")
        lengths.append(side.lengths[np.searchsorted(side.episodes, episodes)].astype(np.int64))
    owned = np.diff(pairs.offsets.astype(np.int64))
    if (owned != lengths[1]).any():
        k = int((owned != lengths[1]).argmax())
        raise ProblemError(f"pair {k} has {owned[k]} rows for the {lengths[1][k]} frames of target episode {pairs.target_episode[k]}.")
    if (np.diff(pairs.target_episode.astype(np.int64)) < 0).any():
        raise ProblemError("the pairs must be sorted by target episode. Pair again.")
    if not all((np.isfinite(z) & (z >= 0)).all() for z in (pairs.distance, pairs.total, pairs.steps)):
        raise ProblemError("a distance is negative, infinite or NaN. Pair again, with labels that are finite numbers.")
    first, count = pairs.first.astype(np.int64), pairs.count.astype(np.int64)
    last, limit, row = first + count - 1, np.repeat(lengths[0], owned), np.arange(rows)
    if pairs.frames is not None:
        if (first < 0).any() or (count < 1).any() or (last >= len(pairs.frames)).any():
            raise ProblemError("a row points outside the list of frames; the file is damaged. Pair again.")
        row = np.repeat(row, count)
        first = last = pairs.frames[np.arange(len(row)) + np.repeat(first - (np.cumsum(count) - count), count)]
        limit = limit[row]
    bad = (first < 0) | (last >= limit) | (last < first)
    if bad.any():
        at = int(bad.argmax())
        k = int(np.searchsorted(pairs.offsets, row[at], "right") - 1)
        raise ProblemError(
            f"frame {row[at] - pairs.offsets[k]} of target episode {pairs.target_episode[k]} is paired with frames {first[at]} to "
            f"{last[at]} of source episode {pairs.source_episode[k]}, which has {limit[at]}. Pair again."
        )


def _compare(role: str, ours: Side, given: Side) -> None:
    differs = []
    if ours.fps and given.fps and ours.fps != given.fps:
        differs.append(f"it runs at {given.fps:g} frames a second instead of {ours.fps:g}")
    at = np.searchsorted(ours.episodes, given.episodes).clip(max=len(ours.episodes) - 1)
    known = ours.episodes[at] == given.episodes
    if ours.exact and not known.all():
        differs.append(f"it has {len(given.episodes)} episodes instead of {len(ours.episodes)}, {given.episodes[~known][0]} among them")
    found, expected, numbers = given.lengths[known], ours.lengths[at][known], given.episodes[known]
    wrong = found != expected if ours.exact and given.exact else found < expected
    if wrong.any():
        more = f", and {wrong.sum() - 1} more episodes differ" if wrong.sum() > 1 else ""
        least = f"{'' if ours.exact else 'at least '}{expected[wrong][0]}"
        differs.append(f"episode {numbers[wrong][0]} has {found[wrong][0]} frames instead of {least}{more}")
    if not differs and ours.digest and given.digest and len(given.episodes) == len(ours.episodes) and ours.digest != given.digest:
        differs.append("its labels have other values")
    if differs:
        raise ProblemError(
            f"the {role} dataset {given.name} is not the one that was paired ({ours.name}): {'; '.join(differs)}. Name the right "
            "dataset or pair file, or pair again with gpu-ot pair."
        )


def _narrow(array: np.ndarray) -> np.ndarray:
    """The smallest unsigned type that holds these numbers of episodes, frames and rows."""
    counts = array.dtype.kind in "iu" and array.size > 0 and array.min() >= 0
    return array.astype(np.min_scalar_type(int(array.max()))) if counts else array
