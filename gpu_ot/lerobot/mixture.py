"""The frames to imitate: a mixture of the source's and the target's by shares, in which draw n depends on (seed, n) alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from ..errors import ProblemError
from .config import OTConfig
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
    """Frames of several datasets by shares; item n is draw n, for any n >= 0, with replacement.

    A draw takes a part with probability proportional to its share, then one of its frames uniformly. Items are the datasets' own, with the
    columns that all parts have; `image_transforms` and `cache_bytes` as for the pairs. len() is the frames of all parts.
    Raises ProblemError for a part without frames, shares without a positive sum, and columns of different shapes.
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
    source = cfg.bc_src_weight or 0.0
    target = 1 - source
    if not cfg.normalize_bc_weights_by_ds_size:
        source, target = source * there.frames, target * len(tgt_dataset)
    parts = [
        Part("paired source", src_dataset, source * share, paired, drop_last),
        Part("other source", src_dataset, source * (1 - share), others, drop_last),
        Part("target", tgt_dataset, target, None, drop_last),
    ]
    return MixedDataset(parts, **options)


def _not_shared(parts: Sequence[Part], frames: Sequence[Frames], transformed: bool) -> frozenset[str]:
    """Columns that some parts lack: a batch cannot hold them."""
    known = [(part.name, f) for part, f in zip(parts, frames, strict=True) if f.features]
    if len(known) < 2:
        return frozenset()
    every = [set(f.features or ()) for _, f in known]
    shared = set.intersection(*every)
    for key in sorted(shared):
        if transformed and known[0][1].cameras and key in known[0][1].cameras:
            continue  # transforms may bring them to one size
        shapes = {name: tuple((f.features or {})[key].get("shape") or ()) for name, f in known}
        if len(set(shapes.values())) > 1:
            found = ", ".join(f"{shape} in {name}" for name, shape in shapes.items())
            raise ProblemError(f'"{key}" has the shapes {found}: no batch can hold them. Resize images with image_transforms, pad states.')
    dropped = set.union(*every) - shared
    named = {"task_index": "task", "subtask_index": "subtask"}  # texts that LeRobot adds for an index
    return frozenset(dropped | {f"{key}_is_pad" for key in dropped} | {named[key] for key in dropped if key in named})
