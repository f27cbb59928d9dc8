"""Which frames of the source belong to which frames of the target: kept in a small file, and believed only when it fits the data."""

from __future__ import annotations

import dataclasses
import json
import os
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProblemError, unknown
from .dtw import COSTS
from .episodes import Recording, Side

NORMS = ("steps", "arc", "none")
FORMAT = "gpu_ot pairs"
VERSION = 1


@dataclass(frozen=True)
class PairOptions:
    """How episodes are compared.

    keys         label columns, side by side: the proprioception that both robots share.
    target_keys  their names in the target where they differ.
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
    stride: int = 1
    band: float | None = None
    topk: int | None = None
    cost: str = "euclidean"
    norm: str = "steps"

    def __post_init__(self) -> None:
        for name in ("keys", "target_keys"):  # JSON has lists, and one key is easily given without one
            if (given := getattr(self, name)) is not None:
                object.__setattr__(self, name, (given,) if isinstance(given, str) else tuple(given))
        if not self.keys:
            raise ProblemError('keys is empty: name at least one label, such as "observation.state".')
        if self.cost not in COSTS:
            raise unknown("cost", self.cost, tuple(COSTS))
        if self.norm not in NORMS:
            raise unknown("norm", self.norm, NORMS)
        for name in ("stride", "topk"):
            value = getattr(self, name)
            if value is not None and (value != int(value) or value < 1):
                raise ProblemError(f"{name} must be a whole number of at least 1, found {value}.")
        if self.band is not None and not self.band >= 1:
            raise ProblemError(f"band must be at least 1 frame, found {self.band}. Leave it out to allow every alignment.")
        if self.dim_slice is not None:
            if len(self.dim_slice) != 2 or not 0 <= self.dim_slice[0] < self.dim_slice[1]:
                raise ProblemError(f"dim_slice must be [a, b) with 0 <= a < b, found {list(self.dim_slice)}.")
            object.__setattr__(self, "dim_slice", (int(self.dim_slice[0]), int(self.dim_slice[1])))


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
        """Raises ProblemError saying what differs if these recordings are not the ones that were paired.

        Names may differ, since folders move; frames a second, episodes, their lengths and the labels may not. A side that holds only
        some of the episodes is good for those.
        """
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
        header = {
            "format": FORMAT,
            "version": VERSION,
            "index_base": 0,
            "options": dataclasses.asdict(self.options) if self.options else None,
            **{
                role: {"name": side.name, "fps": side.fps, "digest": side.digest, "exact": side.exact}
                for role, side in (("source", self.source), ("target", self.target))
            },
        }
        arrays: dict[str, Any] = {name: getattr(self, name) for name in _ARRAYS}
        if self.frames is not None:
            arrays["frames"] = self.frames
        for role, side in (("source", self.source), ("target", self.target)):
            arrays |= {f"{role}_episodes": side.episodes, f"{role}_lengths": side.lengths}
        partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with partial.open("wb") as file:
                small: dict[str, Any] = {name: _narrow(each) for name, each in arrays.items()}
                np.savez_compressed(file, header=np.array(json.dumps(header)), **small)
            partial.replace(path)
        except OSError as problem:
            partial.unlink(missing_ok=True)
            raise _unwritable(path, problem) from None
        return path


def writable(path: str | Path) -> Path:
    """The path, made sure of before minutes are spent. Raises ProblemError."""
    path = Path(path)
    if path.suffix == ".json":
        raise ProblemError(f"{path} would hold arrays; name it .npz. JSON is only read.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.{os.getpid()}.partial")
        probe.touch()
        probe.unlink()
    except OSError as problem:
        raise _unwritable(path, problem) from None
    return path


def _unwritable(path: Path, problem: OSError) -> ProblemError:
    return ProblemError(f"{path} cannot be written ({problem.strerror}). Name a file in a folder of yours with --out.")


_ARRAYS = ("target_episode", "source_episode", "total", "steps", "distance", "offsets", "first", "count")


def read_pairs(path: str | Path, *, norm: str = "steps", base_index_src: int = 0, base_index_tgt: int = 0) -> Pairs:
    """Pairs of a file of `gpu-ot pair`, or of the fork's JSON {tgt_demo: [{demo_name, raw_dtw_dist, pairing: {tgt: [src, ...]}}]}.

    Validated: episodes exist, frames are inside them, every row has one. What follows is for JSON, which does not say:
    norm            "steps" divides raw_dtw_dist by the listed matches, which are the cells of the path; "none" keeps it.
    base_index_...  the number that the file gives the first episode of a side. Frames count from 0 in their episode.
    """
    path = Path(path)
    try:
        if path.suffix == ".json":
            return _read_json(json.loads(path.read_text(encoding="utf-8")), path, norm, base_index_src, base_index_tgt)
        return _read_npz(path)
    except FileNotFoundError:
        raise ProblemError(f"there is no pair file {path}. Make one: gpu-ot pair --src ... --tgt ... --out {path}") from None
    except ProblemError as problem:
        raise problem if str(path) in str(problem) else ProblemError(f"{path}: {problem}") from None
    except (OSError, ValueError, KeyError, TypeError, zipfile.BadZipFile) as problem:
        raise ProblemError(
            f"{path} is no pair file ({type(problem).__name__}: {problem}). gpu-ot pair writes .npz; of JSON, the fork's is read."
        ) from None


def _read_npz(path: Path) -> Pairs:
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(str(file["header"])) if "header" in file else {}
        if header.get("format") != FORMAT:
            raise ProblemError(f"{path} is an .npz of something else. Make a pair file with gpu-ot pair.")
        if header["version"] > VERSION:
            raise ProblemError(f"{path} has format {header['version']}, and this release reads up to {VERSION}: pip install -U gpu_ot")
        sides = [
            Side(
                header[role]["name"],
                header[role]["fps"],
                file[f"{role}_episodes"].astype(np.int64),
                file[f"{role}_lengths"].astype(np.int64),
                header[role]["digest"],
                header[role]["exact"],
            )
            for role in ("source", "target")
        ]
        options = PairOptions(**header["options"]) if header["options"] else None
        arrays = [file[name] for name in (*_ARRAYS, *(["frames"] if "frames" in file else []))]
        return Pairs(sides[0], sides[1], options, *(each.astype(np.int64) if each.dtype.kind in "iu" else each for each in arrays))


def _read_json(given: Any, path: Path, norm: str, base_src: int, base_tgt: int) -> Pairs:
    if not isinstance(given, dict) or not given:
        raise ProblemError(f"{path} must hold {{target demo: [matches]}}, found {type(given).__name__} of length {len(given or [])}.")
    if norm not in ("steps", "none"):
        raise ProblemError(f'norm = "{norm}" cannot be had from {path}, which holds summed distances: "steps" or "none".')
    rows = []
    for name, matches in given.items():
        for match in matches:
            if missing := [key for key in ("demo_name", "raw_dtw_dist", "pairing") if key not in match]:
                raise ProblemError(f"{path}: a match of {name} has no {missing[0]}; it has {', '.join(map(str, match))}.")
            runs = {int(t): np.asarray(s, dtype=np.int64).reshape(-1) for t, s in match["pairing"].items()}
            runs = {t: s for t, s in sorted(runs.items()) if len(s)}
            if not runs:
                raise ProblemError(f"{path}: {match['demo_name']} is matched with {name} and pairs no frame. Drop that match.")
            steps = sum(map(len, runs.values()))
            total = float(match["raw_dtw_dist"])
            distance = total / steps if norm == "steps" else total
            rows.append((_number(name, base_tgt, path), distance, _number(match["demo_name"], base_src, path), total, steps, runs))
    if not rows:
        raise ProblemError(f"{path} matches nothing.")
    rows.sort(key=lambda row: row[:3])

    reach: dict[int, int] = {}
    for episode, *_, runs in rows:
        reach[episode] = max(reach.get(episode, 0), max(runs) + 1)
    frames, firsts, counts, offset = [], [], [], 0
    for episode, *_, runs in rows:
        listed = np.array(list(runs))
        if listed[0] < 0:
            raise ProblemError(f"{path}: target episode {episode + base_tgt} has a frame {listed[0]}; frames count from 0.")
        sizes = np.array([len(s) for s in runs.values()])
        # A file made with a stride lists some frames only: the others take the nearest listed one's.
        at = np.arange(reach[episode])
        right = np.searchsorted(listed, at).clip(max=len(listed) - 1)
        left = (right - 1).clip(min=0)
        nearest = np.where(np.abs(listed[left] - at) <= np.abs(listed[right] - at), left, right)
        firsts.append(offset + (np.cumsum(sizes) - sizes)[nearest])
        counts.append(sizes[nearest])
        frames += runs.values()
        offset += int(sizes.sum())

    target = Side(f"{path}, target", None, np.array(sorted(reach)), np.array([reach[k] for k in sorted(reach)]), exact=False)
    ends: dict[int, int] = {}
    for _, _, episode, _, _, runs in rows:
        ends[episode] = max(ends.get(episode, 1), max(int(s.max()) for s in runs.values()) + 1)
    source = Side(f"{path}, source", None, np.array(sorted(ends)), np.array([ends[k] for k in sorted(ends)]), exact=False)
    t, distances, s, totals, steps = (np.array(column) for column in list(zip(*rows, strict=True))[:5])
    offsets = np.concatenate(([0], np.cumsum([len(each) for each in firsts])))
    every = np.concatenate(frames)
    return Pairs(source, target, None, t, s, totals, steps, distances, offsets, np.concatenate(firsts), np.concatenate(counts), every)


def _number(name: Any, base: int, path: Path) -> int:
    """12 of 12, "12", "demo_12" or "episode_000012", less what the first one is called."""
    match = re.search(r"(\d+)$", str(name))
    if match is None:
        raise ProblemError(f'{path}: "{name}" ends in no number, so it names no episode; expected demo_12 or 12.')
    if (number := int(match[1]) - base) < 0:
        raise ProblemError(f"{path}: {name} comes before the first episode, which was said to be {base} (base_index_src, base_index_tgt).")
    return number


def _validate(pairs: Pairs) -> None:
    """Raises ProblemError unless every row points into an episode that exists."""
    p, rows = len(pairs.target_episode), len(pairs.first)
    if p == 0:
        raise ProblemError("there are no pairs.")
    sizes = {len(getattr(pairs, name)) for name in ("source_episode", "total", "steps", "distance")}
    if sizes != {p} or len(pairs.offsets) != p + 1 or len(pairs.count) != rows or pairs.offsets[0] != 0 or pairs.offsets[-1] != rows:
        raise ProblemError("the arrays do not have the lengths that belong together; the file is damaged. Pair again.")
    lengths = []
    for role, side, episodes in (("source", pairs.source, pairs.source_episode), ("target", pairs.target, pairs.target_episode)):
        if len(side.episodes) != len(side.lengths) or (np.diff(side.episodes.astype(np.int64)) <= 0).any() or (side.lengths < 1).any():
            raise ProblemError(f"the {role} episodes must be numbered in increasing order and have frames. Pair again.")
        at = np.searchsorted(side.episodes, episodes).clip(max=max(len(side.episodes) - 1, 0))
        if len(side.episodes) == 0 or (side.episodes[at] != episodes).any():
            known = (
                f"there are {len(side.episodes)} from {side.episodes[0]} to {side.episodes[-1]}" if len(side.episodes) else "there are none"
            )
            strange = sorted(set(np.asarray(episodes).tolist()) - set(np.asarray(side.episodes).tolist()))
            raise ProblemError(f"{role} episode {strange[0]} is paired and does not exist: {known}. Pair again.")
        lengths.append(side.lengths[at].astype(np.int64))
    owned = np.diff(pairs.offsets.astype(np.int64))
    if (owned != lengths[1]).any():
        k = int((owned != lengths[1]).argmax())
        raise ProblemError(f"pair {k} has {owned[k]} rows for the {lengths[1][k]} frames of target episode {pairs.target_episode[k]}.")
    if (np.diff(pairs.target_episode.astype(np.int64)) < 0).any():
        raise ProblemError("the pairs must be sorted by target episode. Pair again.")
    if not (np.isfinite(pairs.distance) & (pairs.distance >= 0)).all():
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
        least = "" if ours.exact else "at least "
        differs.append(
            f"episode {numbers[wrong][0]} has {found[wrong][0]} frames instead of {least}{expected[wrong][0]}"
            + (f", and {wrong.sum() - 1} more episodes differ" if wrong.sum() > 1 else "")
        )
    if not differs and ours.digest and given.digest and len(given.episodes) == len(ours.episodes) and ours.digest != given.digest:
        differs.append("its labels have other values")
    if differs:
        raise ProblemError(
            f"the {role} dataset {given.name} is not the one that was paired ({ours.name}): {'; '.join(differs)}. Name the right "
            "dataset or pair file, or pair again with gpu-ot pair."
        )


def _narrow(array: np.ndarray) -> np.ndarray:
    """The smallest unsigned type that holds these numbers of episodes, frames and rows."""
    if array.dtype.kind not in "iu" or array.size == 0:
        return array
    return array.astype(np.min_scalar_type(int(array.max()))) if array.min() >= 0 else array
