"""Frames of a dataset, decoded once while they fit in memory, scaled and transformed; and the numbers that draws are made of."""

from __future__ import annotations

import copy
import hashlib
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import ProblemError
from .episodes import Side

#: The second word of the generators' key: what is drawn.
ORDER, PARTNER, MIXTURE, AUGMENTATION = range(1, 5)

#: What serves as a dataset: len(), items, and `hf_dataset["episode_index"]` with the episode of every row, each episode's rows together and
#: in order of time, as a LeRobotDataset has them. Used where they are there: `meta.fps`, `meta.camera_keys`, `meta.features`, `root`,
#: `repo_id`, `image_transforms`.
FrameDataset = Any


def generator(seed: int, purpose: int, *counter: int) -> np.random.Generator:
    """Random numbers that depend on these numbers alone. Philox: Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"."""
    words = [0, *counter, 0, 0][:4]  # the lowest word counts within a draw
    return np.random.Generator(np.random.Philox(key=[seed, purpose], counter=words))


def draw_number(n: int) -> int:
    if n < 0:
        raise IndexError(f"draws are numbered from 0, found {n}")
    return int(n)


def fingerprint(given: object, *arrays: np.ndarray) -> str:
    """Of what the draws of a dataset follow: two with one fingerprint draw the same rows."""
    text = hashlib.blake2b(repr(given).encode(), digest_size=8)
    for array in arrays:
        text.update(np.ascontiguousarray(array).astype("<f8").tobytes())
    return text.hexdigest()


class FrameCache:
    """Decoded frames, the least recently used dropped first when there are too many bytes. Empty again in every worker."""

    def __init__(self, limit: int) -> None:
        self.limit, self.held = int(limit), 0
        self._kept: OrderedDict[Any, tuple[dict[str, Any], int]] = OrderedDict()

    def get(self, key: Any, decode: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        if (found := self._kept.get(key)) is not None:
            self._kept.move_to_end(key)
            return found[0]
        item = decode()
        size = sum(v.numel() * v.element_size() for v in item.values() if isinstance(v, Tensor)) + 256 * len(item)
        if size <= self.limit:
            self._kept[key] = (item, size)
            self.held += size
            while self.held > self.limit:
                self.held -= self._kept.popitem(last=False)[1][1]
        return item

    def __len__(self) -> int:
        return len(self._kept)

    def __getstate__(self) -> dict[str, Any]:
        return {"limit": self.limit, "held": 0, "_kept": OrderedDict()}


class Frames:
    """A dataset's frames, decoded once while they fit, scaled and transformed."""

    def __init__(self, dataset: FrameDataset, role: str, transforms: Callable[[Tensor], Tensor] | None, cache: FrameCache) -> None:
        self.side, self.starts = episodes_of(dataset, role)
        self.dataset, self.role, self.transforms, self.cache = without_transforms(dataset), role, transforms, cache
        meta = getattr(self.dataset, "meta", None)
        cameras = getattr(meta, "camera_keys", None)
        self.cameras = None if cameras is None else frozenset(cameras) - set(getattr(meta, "depth_keys", ()))
        self.features: dict[str, Any] | None = getattr(meta, "features", None)

    def rows(self, episodes: Sequence[int] | None = None, drop_last: int = 0) -> np.ndarray:
        """The rows of some episodes, all by default, without the last `drop_last` of each."""
        chosen = np.ones(len(self.starts), bool) if episodes is None else np.isin(self.side.episodes, episodes)
        ends = self.starts + (self.side.lengths - drop_last).clip(min=0)
        return np.concatenate([np.arange(a, b) for a, b in zip(self.starts[chosen], ends[chosen], strict=True)] or [np.arange(0)])

    def frame(self, row: int, draw: tuple[int, int, int]) -> dict[str, Any]:
        """Row `row`; random transforms follow `draw` = (seed, draw, side)."""
        item = dict(self.cache.get((id(self), row), lambda: self.dataset[row]))
        images = [key for key, value in item.items() if self._is_image(key, value)]
        for key in images:
            image = item[key]
            # A transform may work in place, and the cache holds what it would work on.
            item[key] = image.float() / 255 if image.dtype == torch.uint8 else image.clone() if self.transforms else image
        if self.transforms and images:
            before = torch.get_rng_state()
            seed = generator(draw[0], AUGMENTATION, *draw[1:]).integers(2**63)
            torch.default_generator.manual_seed(int(seed))  # torch.manual_seed would also reset the accelerator's
            try:
                for key in images:
                    item[key] = self.transforms(item[key])
            finally:
                torch.set_rng_state(before)
        return item

    def _is_image(self, key: str, value: Any) -> bool:
        named = key.startswith("observation.image") if self.cameras is None else key in self.cameras
        return named and isinstance(value, Tensor) and value.ndim >= 3


def episodes_of(dataset: FrameDataset, role: str) -> tuple[Side, np.ndarray]:
    """The episodes, and the first row of each, from the column alone."""
    try:
        rows = dataset.hf_dataset
        rows = rows.select_columns(["episode_index"]).with_format("numpy") if hasattr(rows, "with_format") else rows
        column = np.asarray(rows["episode_index"][:]).astype(np.int64).reshape(-1)
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise ProblemError(
            f"the {role} dataset ({type(dataset).__name__}) does not tell the episode of every row ({problem}): it needs "
            'hf_dataset["episode_index"], as LeRobotDataset has it.'
        ) from None
    if len(column) == 0 or len(column) != len(dataset):
        raise ProblemError(f"the {role} dataset has {len(dataset)} frames, and {len(column)} of them belong to an episode.")
    starts = np.flatnonzero(np.diff(column, prepend=column[0] - 1))
    numbers, lengths = column[starts], np.diff(starts, append=len(column))
    if len(set(numbers.tolist())) < len(numbers):
        raise ProblemError(f"the rows of an episode of the {role} dataset are not together. Sort the dataset by episode and time.")
    if (np.diff(numbers) <= 0).any():
        raise ProblemError(f"the episodes of the {role} dataset are not in increasing order. Sort the dataset by episode and time.")
    name = str(getattr(dataset, "repo_id", None) or getattr(dataset, "root", None) or type(dataset).__name__)
    fps = getattr(getattr(dataset, "meta", None), "fps", None)
    return Side(name, float(fps) if fps else None, numbers, lengths), starts


def transforms_of(dataset: FrameDataset) -> Callable[[Tensor], Tensor] | None:
    return getattr(dataset, "image_transforms", None)


def without_transforms(dataset: FrameDataset) -> FrameDataset:
    """The dataset, or a view of it that leaves images as they are: what is cached must not be augmented once and for all."""
    if transforms_of(dataset) is None:
        return dataset
    view: Any = copy.copy(dataset)
    if getattr(view, "reader", None) is not None:  # LeRobot 0.6 keeps a second reference, in an object that would be shared
        view.reader = copy.copy(view.reader)
        view.reader.set_image_transforms(None)
    view.image_transforms = None
    return view
