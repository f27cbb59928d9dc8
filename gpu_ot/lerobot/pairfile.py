"""Reading pair files: ours, and the LeRobot fork's JSON. What is damaged is refused, whatever is wrong with it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProblemError
from .episodes import Side
from .pairs import ARRAYS, FORMAT, VERSION, PairOptions, Pairs
from .settings import read


def read_pairs(path: str | Path, *, norm: str = "steps", base_index_src: int = 0, base_index_tgt: int = 0) -> Pairs:
    """Pairs of a file of `gpu-ot pair`, or of the fork's JSON {tgt_demo: [{demo_name, raw_dtw_dist, pairing: {tgt: [src, ...]}}]}.

    Validated: types, episodes exist, frames are inside them, every row has one. What follows is for JSON, which does not say:
    norm            "steps" divides raw_dtw_dist by the listed matches, which are the cells of the path; "none" keeps it.
    base_index_...  the number that the file gives the first episode of a side. Frames count from 0 in their episode.
    """
    path = Path(path)
    again = f"Make it again: gpu-ot pair --src ... --tgt ... --out {path.with_suffix('.npz')}"
    if not path.is_file():
        raise ProblemError(f"there is no pair file {path}. {again}")
    try:
        if path.suffix == ".json":
            return _read_json(read(path), path, norm, base_index_src, base_index_tgt)
        return _read_npz(path)
    except ProblemError as problem:
        raise problem if str(path) in str(problem) else ProblemError(f"{path}: {problem} {again}") from None
    except Exception as problem:  # a damaged archive fails in a dozen ways: zlib, zipfile, struct, tokenize, numpy and more have their own
        said = str(problem).strip() or "it ends too early"
        raise ProblemError(f"{path} is no pair file, or a damaged one ({type(problem).__name__}: {said:.200}). {again}") from None


def _read_npz(path: Path) -> Pairs:
    with np.load(path, allow_pickle=False) as file:
        header = json.loads(str(file["header"])) if "header" in file else {}
        if not isinstance(header, dict) or header.get("format") != FORMAT:
            raise ProblemError(f"{path} is an .npz of something else. Make a pair file with gpu-ot pair.")
        if _typed(header, "version", int) > VERSION:
            raise ProblemError(f"{path} has format {header['version']}, and this release reads up to {VERSION}: pip install -U gpu_ot")
        sides = []
        for role in ("source", "target"):
            known = _typed(header, role, dict)
            name, fps, digest = _typed(known, "name", str), _typed(known, "fps", float, int, None), _typed(known, "digest", str, None)
            episodes, lengths = (_column(file, f"{role}_{what}") for what in ("episodes", "lengths"))
            sides.append(Side(name, fps, episodes, lengths, digest, _typed(known, "exact", bool)))
        options = PairOptions.from_dict(header["options"]) if _typed(header, "options", dict, None) else None
        columns = [_column(file, name, float if name in ("total", "distance") else int) for name in ARRAYS]
        return Pairs(sides[0], sides[1], options, *columns, frames=_column(file, "frames") if "frames" in file else None)


def _typed(header: dict[str, Any], name: str, *kinds: type | None) -> Any:
    value = header[name]
    if type(value) not in [type(None) if kind is None else kind for kind in kinds]:
        raise ProblemError(f'"{name}" of its header is {value!r:.40}; the file is damaged.')
    return value


def _column(file: Any, name: str, kind: type = int) -> np.ndarray:
    column = file[name]
    if column.ndim != 1 or column.dtype.kind not in ("iu" if kind is int else "f"):
        raise ProblemError(f'"{name}" is an array of {column.dtype} with {column.ndim} axes; the file is damaged.')
    return column.astype(np.int64 if kind is int else np.float64)


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
            runs = {int(t): np.asarray(s).reshape(-1) for t, s in match["pairing"].items()}
            if odd := [s for s in runs.values() if len(s) and s.dtype.kind != "i"] or [0] * (
                type(match["raw_dtw_dist"]) not in (int, float)
            ):
                raise ProblemError(f"{path}: a match of {name} holds {odd[0]!r:.60} where whole numbers, or a distance, belong.")
            runs = {t: s for t, s in sorted(runs.items()) if len(s)}
            if not runs:
                raise ProblemError(f"{path}: {match['demo_name']} is matched with {name} and pairs no frame. Drop that match.")
            steps, total = sum(map(len, runs.values())), float(match["raw_dtw_dist"])
            distance = total / steps if norm == "steps" else total
            rows.append((_number(name, base_tgt, path), distance, _number(match["demo_name"], base_src, path), total, steps, runs))
    if not rows:
        raise ProblemError(f"{path} matches nothing.")
    rows.sort(key=lambda row: row[:3])

    ends: tuple[dict[int, int], dict[int, int]] = {}, {}
    for t, _, s, _, _, runs in rows:
        if min(runs) < 0:
            raise ProblemError(f"{path}: target episode {t + base_tgt} has a frame {min(runs)}; frames count from 0.")
        for known, episode, last in ((ends[0], s, max(int(frames.max()) for frames in runs.values())), (ends[1], t, max(runs))):
            known[episode] = max(known.get(episode, 1), last + 1)
    source, target = (
        Side(f"{path}, {role}", None, np.array(sorted(known)), np.array([known[k] for k in sorted(known)]), exact=False)
        for role, known in zip(("source", "target"), ends, strict=True)
    )
    found, every, offset = [], [], 0
    for t, distance, s, total, steps, runs in rows:
        listed, sizes = np.array(list(runs)), np.array([len(frames) for frames in runs.values()])
        # A file made with a stride lists some frames only: the others take the nearest listed one's.
        nearest = np.searchsorted((listed[1:] + listed[:-1]) / 2, np.arange(ends[1][t]))
        found.append((t, s, total, steps, distance, offset + (np.cumsum(sizes) - sizes)[nearest], sizes[nearest]))
        every += runs.values()
        offset += steps
    return Pairs.of_rows(source, target, None, found, np.concatenate(every))


def _number(name: Any, base: int, path: Path) -> int:
    """12 of 12, "12", "demo_12" or "episode_000012", less what the first one is called."""
    match = re.search(r"(\d+)$", str(name))
    if match is None:
        raise ProblemError(f'{path}: "{name}" ends in no number, so it names no episode; expected demo_12 or 12.')
    if (number := int(match[1]) - base) < 0:
        raise ProblemError(f"{path}: {name} comes before the first episode, which was said to be {base} (base_index_src, base_index_tgt).")
    return number
