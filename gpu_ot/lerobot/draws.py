"""Draws without end: the mixture of frames to imitate, and batches of it or of pairs, which ranks share and the count of draws resumes."""

from __future__ import annotations

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..errors import ProblemError
from .config import OTConfig
from .dataset import LeRobotOTPairDataset
from .frames import MIXTURE, FrameCache, FrameDataset, Frames, draw_number, episodes_of, fingerprint, generator, transforms_of
from .pairs import Pairs


class Part(NamedTuple):
    """A share of a mixture: frames of a dataset, all of them or those of some episodes, without the last `drop_last` of each episode."""

    name: str
    dataset: FrameDataset
    share: float
    episodes: Sequence[int] | None = None
    drop_last: int = 0


class MixedDataset:
    """Frames of several datasets: draw n takes a part by its share, then one of its frames uniformly, by (seed, n) alone.

    Items are the datasets' own, with the columns that all parts have; `image_transforms` and `cache_bytes` as for the pairs. len() is the
    frames of all parts. Raises ProblemError for a part without frames, shares without a positive sum, and columns of different shapes.
    """

    def __init__(
        self, parts: Sequence[Part], seed: int = 0, image_transforms: Callable[[Tensor], Tensor] | None = None, cache_bytes: int = 256 << 20
    ) -> None:
        parts = [part for part in parts if part.share != 0]
        shares = np.array([part.share for part in parts], dtype=np.float64)
        if len(parts) == 0 or not (np.isfinite(shares) & (shares > 0)).all():
            given = ", ".join(f"{part.name} {part.share}" for part in parts) or "only zeros"
            raise ProblemError(f"shares must be finite and >= 0 with a positive sum, found {given}.")
        transforms = image_transforms or next((t for part in reversed(parts) if (t := transforms_of(part.dataset))), None)
        cache = FrameCache(cache_bytes)
        self.seed, self.parts, self.cumulated = seed, parts, np.cumsum(shares / shares.sum())
        by_id: dict[int, Frames] = {}  # one table and one place in the cache for a dataset that several parts share
        self.frames = [by_id.setdefault(id(p.dataset), Frames(p.dataset, p.name, transforms, cache)) for p in parts]
        self.rows = [frames.rows(part.episodes, part.drop_last) for part, frames in zip(parts, self.frames, strict=True)]
        if empty := [part for part, rows in zip(parts, self.rows, strict=True) if not len(rows)]:
            raise ProblemError(f"{empty[0].name} has a share of {empty[0].share:g} and no frames to give. Give that share to another part.")
        self._dropped = _not_shared(parts, self.frames, transforms is not None)

    def __len__(self) -> int:
        return sum(map(len, self.rows))

    @property
    def law(self) -> str:
        return fingerprint((self.seed, self.cumulated.tolist()), *self.rows)

    def draw(self, n: int) -> tuple[int, int]:
        """(part, row of its dataset) of draw n."""
        rng = generator(self.seed, MIXTURE, draw_number(n))
        part = min(int(np.searchsorted(self.cumulated, rng.random(), "right")), len(self.parts) - 1)
        return part, int(self.rows[part][rng.integers(len(self.rows[part]))])

    def item(self, n: int) -> dict[str, Any]:
        """The frame of draw n."""
        part, row = self.draw(n)
        item = self.frames[part].frame(row, (self.seed, int(n), 0))
        return {key: value for key, value in item.items() if key not in self._dropped}


def co_training(
    src_dataset: FrameDataset, tgt_dataset: FrameDataset, pairs: Pairs, cfg: OTConfig, drop_last: int = 0, **options: Any
) -> MixedDataset:
    """The batch to imitate: paired source episodes, the other source episodes, and the target, by the shares of `cfg`; see OTConfig.

    Where all source episodes are paired, or none of those there are, the others have no frames and these have all of the source's share.
    `drop_last` frames at the end of each episode are not drawn, as some policies ask for; `options` of `MixedDataset`.
    """
    there, _ = episodes_of(src_dataset, "source")
    chosen = {int(pairs.source_episode[k]) for t in pairs.target.episodes.tolist() for k in pairs.of(t)[: cfg.topk_src_episodes]}
    paired = [e for e in there.episodes.tolist() if e in chosen]
    others = [e for e in there.episodes.tolist() if e not in chosen]
    share = (0.5 if cfg.bc_paired_share is None else cfg.bc_paired_share) if paired and others else float(bool(paired))
    sizes = (1, 1) if cfg.normalize_bc_weights_by_ds_size else (int(there.lengths.sum()), len(tgt_dataset))
    source, target = (cfg.bc_src_weight or 0.0) * sizes[0], (1 - (cfg.bc_src_weight or 0.0)) * sizes[1]
    parts = [
        Part("paired source", src_dataset, source * share, paired, drop_last),
        Part("other source", src_dataset, source * (1 - share), others, drop_last),
        Part("target", tgt_dataset, target, None, drop_last),
    ]
    return MixedDataset(parts, **options)


def _not_shared(parts: Sequence[Part], frames: Sequence[Frames], transformed: bool) -> frozenset[str]:
    """Columns that some parts lack: a batch cannot hold them."""
    known = [(part.name, f.features, f.cameras or ()) for part, f in zip(parts, frames, strict=True) if f.features]
    if len(known) < 2:
        return frozenset()
    every = [set(columns) for _, columns, _ in known]
    shared = set.intersection(*every)
    for key in sorted(shared):
        if transformed and key in known[0][2]:
            continue  # transforms may bring them to one size
        shapes = {name: tuple(columns[key].get("shape") or ()) for name, columns, _ in known}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{shape} in {name}" for name, shape in shapes.items())
            raise ProblemError(f'"{key}" has the shapes {found}: no batch can hold them. Resize images with image_transforms, pad states.')
    dropped = set.union(*every) - shared
    named = {"task_index": "task", "subtask_index": "subtask"}  # texts that LeRobot adds for an index
    return frozenset(dropped | {f"{key}_is_pad" for key in dropped} | {named[key] for key in dropped if key in named})


Drawable = LeRobotOTPairDataset | MixedDataset


class DrawLoader:
    """Batches of draws without end, and where it stands.

    Rank r of w takes draws r, r + w, r + 2w, ... from `start` on; rank and world default to those of torch.distributed, else of the
    launcher's environment. `options` are DataLoader's. Do not pass it to accelerate's `prepare`: it is already divided among ranks.

    The state counts batches that were handed out, not those that workers have ready, so the next batch after `load_state_dict` is the
    one that would have come next: with any number of workers, and from the same draw on with another batch size or number of ranks.
    """

    def __init__(
        self, dataset: Drawable, batch_size: int, *, rank: int | None = None, world: int | None = None, start: int = 0, **options: Any
    ) -> None:
        if batch_size < 1:
            raise ProblemError(f"batch_size must be at least 1, found {batch_size}.")
        if len(dataset) == 0:
            raise ProblemError("the dataset has no frames.")
        # Its own generator: a DataLoader otherwise takes a number from torch's, and training with it would not be what it was.
        self.options: dict[str, Any] = {"generator": torch.Generator()} | options
        self.dataset, self.batch_size = dataset, batch_size
        self.rank, self.world = (here if given is None else given for given, here in zip((rank, world), ranks(), strict=True))
        if not 0 <= self.rank < self.world or start < 0:
            raise ProblemError(f"need 0 <= rank < world and start >= 0, found rank = {self.rank}, world = {self.world}, start = {start}.")
        self.start, self.batches = start, 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> DrawLoader:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            numbers: Any = itertools.count(self.start + self.rank, self.world)
            self._iterator = iter(DataLoader(_Drawn(self.dataset), self.batch_size, sampler=numbers, **self.options))
        batch = next(self._iterator)
        self.batches += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The draws of all ranks so far, and the law they follow."""
        return {"draw": self.start + self.batches * self.batch_size * self.world, "law": self.dataset.law}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ProblemError for a state of other data, options or seed."""
        same_law(state, self.dataset)
        self._iterator = None  # workers that run ahead are on the old course
        self.start, self.batches = int(state["draw"]), 0


def same_law(state: dict[str, Any], dataset: Drawable) -> None:
    if state.get("law") != dataset.law:
        raise ProblemError(
            f"the saved draws follow law {state.get('law')}, and these would follow {dataset.law}: seed, sampling options, shares, "
            "pair file or datasets have changed. Resume with the same, or begin the draws anew: --restart-pairs of gpu-ot train."
        )


class _Drawn(Dataset[dict[str, Any]]):
    def __init__(self, dataset: Drawable) -> None:
        self.dataset = dataset

    def __getitem__(self, n: int) -> dict[str, Any]:
        return self.dataset.item(n)


def ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
