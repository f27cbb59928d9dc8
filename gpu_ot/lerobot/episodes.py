"""Label columns of a LeRobotDataset, straight from its parquet files: no image is decoded, and lerobot need not be installed."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ProblemError
from .settings import needed


@dataclass(frozen=True, eq=False)
class Side:
    """Which recordings were meant: enough to notice that they are not the ones given later.

    name      the repo id or folder it was read from, which two copies may differ in.
    fps       frames a second, None where unknown.
    episodes  (E,) int64 numbers of the episodes, increasing.
    lengths   (E,) int64 frames of each.
    digest    hash of the labels in float64, None where they were never seen.
    exact     False: `lengths` is only how far a file without lengths reaches.
    """

    name: str
    fps: float | None
    episodes: np.ndarray
    lengths: np.ndarray
    digest: str | None = None
    exact: bool = True


@dataclass(frozen=True, eq=False)
class Recording:
    """The episodes of a dataset with their labels (frames, d) one after another."""

    side: Side
    keys: tuple[str, ...]
    labels: np.ndarray

    def episodes(self) -> list[np.ndarray]:
        return np.split(self.labels, np.cumsum(self.side.lengths)[:-1])


def digest(labels: np.ndarray) -> str:
    return hashlib.blake2b(np.ascontiguousarray(labels, dtype="<f8").tobytes(), digest_size=16).hexdigest()


def folder_of(dataset: str | Path) -> Path:
    """The folder of a dataset given by its folder, or by its repo id: where LeRobot keeps it ($HF_LEROBOT_HOME), or downloads it to.

    Raises ProblemError with the way to get it.
    """
    if (folder := Path(dataset).expanduser()).is_dir():
        if (folder / "meta" / "info.json").is_file():
            return folder
        raise ProblemError(f"{folder} is no LeRobotDataset: it has no meta/info.json. Name the folder that holds meta/ and data/.")
    cache = os.environ.get("HF_LEROBOT_HOME") or Path(os.environ.get("HF_HOME") or "~/.cache/huggingface") / "lerobot"
    home = Path(cache).expanduser() / str(dataset)
    if (home / "meta" / "info.json").is_file():
        return home
    try:
        from lerobot.datasets.lerobot_dataset import LeRobotDataset  # pyright: ignore[reportMissingImports]

        return Path(LeRobotDataset(str(dataset), download_videos=False).root)
    except ImportError:
        why = "lerobot, which could download it, is not installed"
    except Exception as problem:  # the hub's client fails in many ways, and so do packages that do not fit together
        first = (str(problem).strip() or type(problem).__name__).splitlines()[0]
        why = f"lerobot does not get it: {first}"
    raise ProblemError(f'there is no dataset "{dataset}": not a folder, not {home}, and {why}. Download it first, then name its folder.')


def read_recording(dataset: str | Path, keys: Sequence[str] = ("observation.state",), *, partial: bool = False) -> Recording:
    """The columns `keys` of every frame, side by side, of a LeRobotDataset (formats v3.0 and v2.1) given by its folder or repo id.

    Needs pyarrow, which lerobot brings. `partial` accepts a download of some of the episodes. Raises ProblemError for a missing key (with
    the ones there are), rows that are missing or doubled, numbers of frames and episodes other than meta/info.json says, labels that are
    not numbers, and NaN.
    """
    folder = folder_of(dataset)
    info = _info(folder)
    files = sorted((folder / "data").rglob("*.parquet"))
    if not files:
        raise ProblemError(f"{folder} holds no data/**/*.parquet. Download the dataset again; videos are not needed for pairing.")
    episodes, frames, parts = zip(*(_columns(file, keys) for file in files), strict=True)
    if len(widths := {part.shape[1] for part in parts}) > 1:
        raise ProblemError(f"{', '.join(keys)} has {' and '.join(map(str, sorted(widths)))} features in different files of {folder}.")
    episode, frame, labels = map(np.concatenate, (episodes, frames, parts))

    order = np.lexsort((frame, episode))
    episode, frame, labels = episode[order], frame[order], labels[order]
    numbers, starts, lengths = np.unique(episode, return_index=True, return_counts=True)
    wrong = frame != np.arange(len(frame)) - np.repeat(starts, lengths)
    if wrong.any():
        raise ProblemError(
            f"episode {episode[wrong][0]} of {folder} has frames missing or twice around frame {frame[wrong][0]}. Repair or drop it first."
        )
    for name, found in (("total_episodes", len(numbers)), ("total_frames", len(frame))):
        if name in info and (info[name] < found if partial else info[name] != found):
            raise ProblemError(
                f"{folder} promises {name} = {info[name]} in meta/info.json, and its parquet files hold {found}. The recording was not "
                "closed (call finalize()), or the download is not complete."
            )
    if (bad := ~np.isfinite(labels).all(1)).any():
        said = f"{', '.join(keys)} holds NaN or infinity in {bad.sum()} frames, first in episode {episode[bad][0]}"
        raise ProblemError(f"{said}. Repair or drop it first.")
    side = Side(str(dataset), float(info["fps"]) if info.get("fps") else None, numbers, lengths, digest(labels))
    return Recording(side, tuple(keys), labels)


def _info(folder: Path) -> dict[str, Any]:
    path = folder / "meta" / "info.json"
    try:
        info = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise ProblemError(f"{path} cannot be read: {problem}.") from None
    if not isinstance(info, dict):
        raise ProblemError(f"{path} holds no description of a dataset.")
    version = str(info.get("codebase_version", "v3.0")).lstrip("v")
    if not version.startswith(("2.1", "3.")):
        raise ProblemError(f"{folder} has LeRobot's format v{version}; v2.1 and v3.x are read. Convert it with lerobot's own script.")
    return info


def _columns(file: Path, keys: Sequence[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(episode, frame, labels (rows, d)) of one file."""
    said = "reading a LeRobotDataset needs pyarrow, which is not installed: pip install gpu_ot[lerobot]"
    pa, pq = needed("pyarrow", said), needed("pyarrow.parquet", said)
    try:
        there = pq.read_schema(file)
        if missing := [key for key in keys if key not in there.names]:
            numbers = ", ".join(field.name for field in there if _innermost(field.type, pa) is not None)
            raise ProblemError(f'"{missing[0]}" is no column of {file}; of numbers it has {numbers}.')
        table = pq.read_table(file, columns=["episode_index", "frame_index", *keys])
    except (OSError, pa.ArrowInvalid) as problem:
        raise ProblemError(f"{file} cannot be read: {str(problem).splitlines()[0]} Was the recording closed with finalize()?") from None
    episode, frame = (table[name].to_numpy().astype(np.int64) for name in ("episode_index", "frame_index"))
    return episode, frame, np.concatenate([_numbers(table[key], key, file, pa) for key in keys], 1)


def _innermost(kind: Any, pa: Any) -> Any:
    """The type inside lists of lists, None if it is no number."""
    kind = kind.storage_type if isinstance(kind, pa.BaseExtensionType) else kind
    while pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind):
        kind = kind.value_type
    return kind if pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_boolean(kind) else None


def _numbers(column: Any, key: str, file: Path, pa: Any) -> np.ndarray:
    """(rows, d) float64 of a column of numbers or of lists of them; what is empty becomes NaN, which is refused later."""
    if _innermost(column.type, pa) is None:
        raise ProblemError(f'"{key}" of {file} holds {column.type}, and pairs are found by numbers. Name a state or an action.')
    try:
        return np.array(column.to_pylist(), dtype=np.float64).reshape(len(column), -1 if len(column) else 1)
    except (TypeError, ValueError):
        raise ProblemError(f'"{key}" of {file} has more numbers in some frames than in others; every frame needs as many.') from None
