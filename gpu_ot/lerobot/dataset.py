"""Pairs of frames to align: a torch dataset of one epoch, and a sequence without end in which draw n depends on (seed, n) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from ..errors import ProblemError
from .config import OTConfig
from .episodes import read_recording
from .frames import ORDER, PARTNER, FrameCache, FrameDataset, Frames, draw_number, fingerprint, generator, transforms_of
from .pairfile import read_pairs
from .pairs import Pairs


class Draw(NamedTuple):
    """One pair: rows of the two datasets, and where it comes from."""

    source: int
    target: int
    source_episode: int
    target_episode: int
    distance: float


class LeRobotOTPairDataset(Dataset[dict[str, Any]]):
    """Source and target frames that belong together: {"src": {"obs": {...}, "actions": ...}, "tgt": {...}}, with whatever else a frame has
    among its observations; torch's default collate batches them.

    len() target frames make an epoch. Item n is target frame n with a source frame drawn as OTConfig says, a new one each time, from
    torch's random numbers as they stand in this process: for a DataLoader of one's own, shuffled or not. `item(n)`, for any n >= 0, is draw
    n of a sequence that never ends and depends on the seed alone: draws k len() to (k + 1) len() - 1 visit each target frame once, in an
    order of their own. `DrawLoader` iterates over those, divides them among ranks, and can be resumed.

    src_dataset, tgt_dataset  two LeRobotDatasets, or whatever serves as a `FrameDataset`; they may hold a part of the episodes.
    pairs             `Pairs`, or the file. Checked against the datasets, their labels included where they are on disk (`verify`).
    sampling          window_size, no_window, sharpness, cutoff, topk_src_episodes and seed of this OTConfig; by default source frames are
                      drawn within 10 frames, from episodes at distances around 0.01 or below.
    episodes          use these target episodes alone; None for all.
    image_transforms  of the cameras of both sides, after uint8 has become float in [0, 1]; by default those that the target (or the
                      source) dataset came with. Random ones follow the draw.
    cache_bytes       of decoded frames, before transforms, in each worker. Items share memory with it: do not write into them.

    Raises ProblemError when datasets and pairs do not fit together, saying how.
    """

    def __init__(
        self,
        src_dataset: FrameDataset,
        tgt_dataset: FrameDataset,
        pairs: Pairs | str | Path,
        sampling: OTConfig | None = None,
        *,
        episodes: Sequence[int] | None = None,
        image_transforms: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 256 << 20,
        verify: bool = True,
    ) -> None:
        pairs = pairs if isinstance(pairs, Pairs) else read_pairs(pairs)
        self.sampling = sampling or OTConfig(window_size=10, sharpness=10.0, cutoff=0.01)
        self.seed = self.sampling.seed or 0
        transforms = image_transforms or transforms_of(tgt_dataset) or transforms_of(src_dataset)
        cache = FrameCache(cache_bytes)
        self.source = Frames(src_dataset, "source", transforms, cache)
        self.target = Frames(tgt_dataset, "target", transforms, cache)
        pairs.check(self.source.side, self.target.side)
        if verify:
            _same_labels(pairs, self.source, self.target)

        self.pairs = pairs
        self._place = {episode: k for k, episode in enumerate(self.source.side.episodes.tolist())}
        there = self.target.side.episodes.tolist()
        chosen = there if episodes is None else [int(episode) for episode in episodes]
        if strange := set(chosen) - set(there):
            raise ProblemError(f"the target dataset has no episode {min(strange)}.")
        self.rows = self.target.rows(chosen)
        self._partners = {episode: self._partners_of(episode) for episode in chosen}

    def _partners_of(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, cumulated probabilities) of one target episode, among the source episodes that are there."""
        listed = self.pairs.of(episode)
        there = np.array([k for k in listed if int(self.pairs.source_episode[k]) in self._place], dtype=np.int64)
        if len(there) == 0:
            raise ProblemError(
                f"target episode {episode} is paired with {len(listed)} episodes, none of which the source dataset holds. Load "
                "those episodes, or pair again with the ones there are."
            )
        there = there[: self.sampling.topk_src_episodes]
        return there, np.cumsum(self.sampling.probabilities(self.pairs.distance[there]))

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def law(self) -> str:
        episodes = [(f.side.episodes.tolist(), f.side.lengths.tolist()) for f in (self.source, self.target)]
        names = ("target_episode", "source_episode", "distance", "first", "count")
        s = self.sampling
        given = (s.window_size, s.no_window, s.sharpness, s.cutoff, s.topk_src_episodes, self.seed, sorted(self._partners), episodes)
        return fingerprint(given, *(getattr(self.pairs, name) for name in names))

    def draw(self, n: int) -> Draw:
        """The rows of draw n, without decoding anything."""
        epoch, position = divmod(draw_number(n), len(self))
        return self._drawn(int(self.rows[_order(self.seed, epoch, len(self))[position]]), position, epoch)

    def _drawn(self, row: int, *counter: int) -> Draw:
        at = int(np.searchsorted(self.target.starts, row, "right")) - 1
        episode, frame = int(self.target.side.episodes[at]), row - int(self.target.starts[at])
        rng = generator(self.seed, PARTNER, *counter)
        partners, cumulated = self._partners[episode]
        pair = int(partners[min(np.searchsorted(cumulated, rng.random() * cumulated[-1], "right"), len(partners) - 1)])
        source_episode = int(self.pairs.source_episode[pair])
        length = int(self.source.side.lengths[place := self._place[source_episode]])
        if self.sampling.no_window:
            found = int(rng.integers(length))
        else:
            # A file that lists fewer frames than the episode has, as old ones may, is continued by its last row.
            rows, w = int(self.pairs.offsets[pair + 1] - self.pairs.offsets[pair]), self.sampling.window_size
            aligned = self.pairs.frames_of(pair, min(frame, rows - 1))
            found = int(aligned[rng.integers(len(aligned))]) + (int(rng.integers(-w, w)) if w else 0)
            found = min(max(found, 0), length - 1)
        return Draw(int(self.source.starts[place]) + found, row, source_episode, episode, float(self.pairs.distance[pair]))

    def __getitem__(self, n: int) -> dict[str, Any]:
        if not 0 <= n < len(self):
            raise IndexError(f"an epoch has {len(self)} pairs, found number {n}; item(n) goes on beyond it")
        salt = int(torch.randint(2**62, ()))
        return self._item(self._drawn(int(self.rows[n]), int(n), salt), salt)

    def item(self, n: int) -> dict[str, Any]:
        """The frames of draw n."""
        return self._item(self.draw(n), int(n))

    def _item(self, drawn: Draw, counter: int) -> dict[str, Any]:
        sides = {}
        for k, (name, frames, row) in enumerate((("src", self.source, drawn.source), ("tgt", self.target, drawn.target))):
            obs = frames.frame(row, (self.seed, counter, k))
            sides[name] = {"actions": obs.pop("action")} if "action" in obs else {}
            sides[name] = {"obs": obs, **sides[name]}
        return sides


@lru_cache(maxsize=4)  # draws near an epoch's end alternate between two
def _order(seed: int, epoch: int, rows: int) -> np.ndarray:
    return generator(seed, ORDER, 0, epoch).permutation(rows)


def _same_labels(pairs: Pairs, *sides: Frames) -> None:
    for frames, ours, keys in zip(sides, (pairs.source, pairs.target), pairs.keys, strict=True):
        root = getattr(frames.dataset, "root", None)
        if ours.digest and keys and root is not None and (Path(root) / "meta" / "info.json").is_file():
            pairs.check(**{frames.role: read_recording(root, keys, partial=True)})
