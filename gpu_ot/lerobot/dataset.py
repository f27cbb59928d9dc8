"""Pairs of frames to align, and a mixture of frames to imitate: as torch datasets whose items are a function of one number.

Draw n of a dataset is computed from (seed, n) by a counter-based generator. Rank r of w takes draws r, r + w, r + 2w, ...: ranks differ,
the number of workers changes nothing, and a run is resumed by the count of draws alone.
"""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import os
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, Sampler

from ..errors import ProblemError
from .episodes import read_recording
from .frames import MIXTURE, ORDER, PARTNER, FrameCache, FrameDataset, Frames, episodes_of, generator, matches, transforms_of
from .pairs import Pairs, read_pairs


@dataclass(frozen=True)
class PairSampling:
    """How a source frame is drawn for a target frame.

    window_size        w: jitter around the aligned frame, uniform in [-w, w), clipped to the episode; 0 for none.
    no_window          any frame of the source episode instead of the aligned ones.
    sharpness, cutoff  an episode at normalised distance d is drawn with weight 1 / (1 + exp(sharpness (d - cutoff))); with cutoff None
                       with weight exp(-sharpness d).
    topk_src_episodes  only the nearest so many episodes of each target episode; None for all in the file.
    seed               of every draw.
    """

    window_size: int = 10
    no_window: bool = False
    sharpness: float = 10.0
    cutoff: float | None = 0.01
    topk_src_episodes: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        for name, least in (("window_size", 0), ("sharpness", 0), ("seed", 0)):
            if not getattr(self, name) >= least:
                raise ProblemError(f"{name} must be at least {least}, found {getattr(self, name)}.")
        if self.topk_src_episodes is not None and self.topk_src_episodes < 1:
            raise ProblemError(f"topk_src_episodes must be at least 1, found {self.topk_src_episodes}. Leave it out to keep all.")

    def probabilities(self, distance: np.ndarray) -> np.ndarray:
        """Of episodes at these distances; sums to 1 also where every weight by itself underflows."""
        gap = np.asarray(distance, dtype=np.float64)
        log = -self.sharpness * gap if self.cutoff is None else -np.logaddexp(0, self.sharpness * (gap - self.cutoff))
        weight = np.exp(log - log.max())
        return weight / weight.sum()


class Draw(NamedTuple):
    """One pair: rows of the two datasets, and where it comes from."""

    source: int
    target: int
    source_episode: int
    target_episode: int
    distance: float


class LeRobotOTPairDataset(Dataset[dict[str, Any]]):
    """Source and target frames that belong together; item n is draw n, for any n >= 0.

    len() target frames make an epoch: draws k len() to (k + 1) len() - 1 visit each of them once, in an order of their own, each with a
    source frame by `PairSampling`. Items are {"source": frame, "target": frame, "pair": {...}} with frames as the datasets give them
    and the numbers of `Draw` (and n as "draw"); torch's default collate batches them. Iterate with `DrawLoader`.

    src_dataset, tgt_dataset  two LeRobotDatasets, or whatever serves as a `FrameDataset`; they may hold a part of the episodes.
    pairs                     `Pairs`, or the file. Checked against the datasets, their labels included where they are on disk (`verify`).
    keys                      keep these of each frame, wildcards allowed; None for all.
    image_transforms          applied to the cameras of both sides, after uint8 has become float in [0, 1]; by default those that the
                              target (or the source) dataset came with. Random ones follow the draw.
    cache_bytes               of decoded frames, before transforms, in each worker. Items share memory with it: do not write into them.

    Raises ProblemError when datasets and pairs do not fit together, saying how.
    """

    def __init__(
        self,
        src_dataset: FrameDataset,
        tgt_dataset: FrameDataset,
        pairs: Pairs | str | Path,
        sampling: PairSampling | None = None,
        *,
        keys: Sequence[str] | None = None,
        image_transforms: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 256 << 20,
        verify: bool = True,
    ) -> None:
        pairs = pairs if isinstance(pairs, Pairs) else read_pairs(pairs)
        self.sampling = sampling or PairSampling()
        transforms = image_transforms or transforms_of(tgt_dataset) or transforms_of(src_dataset)
        cache = FrameCache(cache_bytes)
        self.source = Frames(src_dataset, "source", keys, transforms, cache)
        self.target = Frames(tgt_dataset, "target", keys, transforms, cache)
        _same_patterns(keys, self.source, self.target)
        pairs.check(self.source.side, self.target.side)
        if verify:
            _same_labels(pairs, self.source, self.target)

        self.pairs = pairs
        self._starts = {role: dict(zip(f.side.episodes.tolist(), f.starts.tolist(), strict=True)) for role, f in self._sides()}
        self._lengths = {role: dict(zip(f.side.episodes.tolist(), f.side.lengths.tolist(), strict=True)) for role, f in self._sides()}
        self._partners = {episode: self._partners_of(episode) for episode in self.target.side.episodes.tolist()}
        self._orders: OrderedDict[int, np.ndarray] = OrderedDict()

    def _sides(self) -> tuple[tuple[str, Frames], ...]:
        return ("source", self.source), ("target", self.target)

    def _partners_of(self, episode: int) -> tuple[np.ndarray, np.ndarray]:
        """(pairs, cumulated probabilities) of one target episode, among the source episodes that are there."""
        listed = self.pairs.of(episode)
        there = np.array([k for k in listed if int(self.pairs.source_episode[k]) in self._starts["source"]], dtype=np.int64)
        if len(there) == 0:
            raise ProblemError(
                f"target episode {episode} is paired with {len(listed)} episodes, none of which the source dataset holds. Load "
                "those episodes, or pair again with the ones there are."
            )
        there = there[: self.sampling.topk_src_episodes]
        return there, np.cumsum(self.sampling.probabilities(self.pairs.distance[there]))

    def __len__(self) -> int:
        return len(self.target)

    @property
    def law(self) -> str:
        """Names the sequence of draws: two datasets with one law draw the same rows."""
        parts = [dataclasses.astuple(self.sampling), [(f.side.episodes.tolist(), f.side.lengths.tolist()) for _, f in self._sides()]]
        text = hashlib.blake2b(repr(parts).encode(), digest_size=8)
        for name in ("target_episode", "source_episode", "distance", "first", "count"):
            text.update(np.ascontiguousarray(getattr(self.pairs, name)).astype("<f8").tobytes())
        return text.hexdigest()

    def draw(self, n: int) -> Draw:
        """The rows of draw n, without decoding anything."""
        epoch, position = divmod(_draw_number(n), len(self))
        row = int(self._order(epoch)[position])
        at = int(np.searchsorted(self.target.starts, row, "right")) - 1
        episode, frame = int(self.target.side.episodes[at]), row - int(self.target.starts[at])
        rng = generator(self.sampling.seed, PARTNER, position, epoch)
        partners, cumulated = self._partners[episode]
        pair = int(partners[min(np.searchsorted(cumulated, rng.random() * cumulated[-1], "right"), len(partners) - 1)])
        source_episode = int(self.pairs.source_episode[pair])
        length = self._lengths["source"][source_episode]
        if self.sampling.no_window:
            found = int(rng.integers(length))
        else:
            # A file that lists fewer frames than the episode has, as old ones may, is continued by its last row.
            rows = int(self.pairs.offsets[pair + 1] - self.pairs.offsets[pair])
            aligned = self.pairs.frames_of(pair, min(frame, rows - 1))
            found = int(aligned[rng.integers(len(aligned))])
            if w := self.sampling.window_size:
                found += int(rng.integers(-w, w))
            found = min(max(found, 0), length - 1)
        return Draw(self._starts["source"][source_episode] + found, row, source_episode, episode, float(self.pairs.distance[pair]))

    def _order(self, epoch: int) -> np.ndarray:
        if epoch not in self._orders:
            self._orders[epoch] = generator(self.sampling.seed, ORDER, 0, epoch).permutation(len(self))
            while len(self._orders) > 2:  # draws near an epoch's end alternate between two
                self._orders.popitem(last=False)
        return self._orders[epoch]

    def __getitem__(self, n: int) -> dict[str, Any]:
        drawn = self.draw(n)
        return {
            "source": self.source.frame(drawn.source, (self.sampling.seed, int(n), 0)),
            "target": self.target.frame(drawn.target, (self.sampling.seed, int(n), 1)),
            "pair": {"draw": int(n), **drawn._asdict()},
        }

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_orders": OrderedDict()}


@dataclass(frozen=True, eq=False)
class Part:
    """A share of a mixture: frames of a dataset, all of them or those of some episodes, without the last `drop_last` of each episode."""

    name: str
    dataset: FrameDataset
    share: float
    episodes: Sequence[int] | None = None
    drop_last: int = 0


class MixedDataset(Dataset[dict[str, Any]]):
    """Frames of several datasets by shares; item n is draw n, for any n >= 0, with replacement.

    A draw takes a part with probability proportional to its share, then one of its frames uniformly. Items are the datasets' own, with the
    columns that all parts have; `image_transforms` and `cache_bytes` as for the pairs. len() is the frames of all parts.
    Raises ProblemError for a part without frames, shares without a positive sum, and columns of different shapes.
    """

    def __init__(
        self,
        parts: Sequence[Part],
        *,
        seed: int = 0,
        image_transforms: Callable[[Tensor], Tensor] | None = None,
        cache_bytes: int = 256 << 20,
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
        self.frames = [by_id.setdefault(id(p.dataset), Frames(p.dataset, p.name, None, transforms, cache)) for p in parts]
        self._runs = [_runs(part, frames) for part, frames in zip(parts, self.frames, strict=True)]
        self._dropped = _not_shared(parts, self.frames, transforms is not None)

    def __len__(self) -> int:
        return sum(int(ends[-1]) for _, ends in self._runs)

    @property
    def meta(self) -> Any:
        """Of the last part, which by convention is the target."""
        return getattr(self.parts[-1].dataset, "meta", None)

    @property
    def law(self) -> str:
        runs = [(starts.tolist(), ends.tolist()) for starts, ends in self._runs]
        return hashlib.blake2b(repr((self.seed, self.cumulated.tolist(), runs)).encode(), digest_size=8).hexdigest()

    def draw(self, n: int) -> tuple[int, int]:
        """(part, row of its dataset) of draw n."""
        rng = generator(self.seed, MIXTURE, _draw_number(n))
        part = min(int(np.searchsorted(self.cumulated, rng.random(), "right")), len(self.parts) - 1)
        starts, ends = self._runs[part]
        k = int(rng.integers(ends[-1]))
        run = bisect.bisect_right(ends, k)
        return part, int(starts[run] + k - (ends[run - 1] if run else 0))

    def __getitem__(self, n: int) -> dict[str, Any]:
        part, row = self.draw(n)
        item = self.frames[part].frame(row, (self.seed, int(n), 0))
        return {key: value for key, value in item.items() if key not in self._dropped}


def co_training(
    src_dataset: FrameDataset,
    tgt_dataset: FrameDataset,
    pairs: Pairs,
    *,
    src_weight: float = 0.9,
    paired_share: float | None = None,
    per_frame: bool = False,
    topk_src_episodes: int | None = None,
    drop_last: int = 0,
    **options: Any,
) -> MixedDataset:
    """The batch to imitate: paired source episodes, the other source episodes, and the target; by default the paper's 0.45, 0.45, 0.1.

    src_weight         share of the source; the target has the rest.
    paired_share       of that, the share of paired episodes; by default half. Where all source episodes are paired, or none of those
                       there are, the others have no frames and these have all of it.
    per_frame          src_weight and 1 - src_weight weigh a frame of the source and one of the target, so the larger set gets more.
    topk_src_episodes  what counts as paired: among the nearest so many of a target episode.
    drop_last          frames at the end of each episode that are not drawn, as some policies ask for.
    options            of `MixedDataset`.
    """
    for name, share in (("src_weight", src_weight), ("paired_share", paired_share)):
        if share is not None and not 0 <= share <= 1:
            raise ProblemError(f"{name} must be a share from 0 to 1, found {share}.")
    there = episodes_of(src_dataset, "source").side
    chosen = {int(pairs.source_episode[k]) for t in pairs.target.episodes.tolist() for k in pairs.of(t)[:topk_src_episodes]}
    paired = [e for e in there.episodes.tolist() if e in chosen]
    others = [e for e in there.episodes.tolist() if e not in chosen]
    share = (0.5 if paired_share is None else paired_share) if paired and others else float(bool(paired))
    source, target = src_weight, 1 - src_weight
    if per_frame:
        source, target = source * there.frames, target * len(tgt_dataset)
    parts = [
        Part("paired source", src_dataset, source * share, paired, drop_last),
        Part("other source", src_dataset, source * (1 - share), others, drop_last),
        Part("target", tgt_dataset, target, None, drop_last),
    ]
    return MixedDataset(parts, **options)


class Draws(Sampler[int]):
    """Draws `rank`, `rank + world`, ... from `start` on, for a DataLoader of one's own; for ever, or `length` of them a pass.

    A second pass goes on where the first one ended. rank and world default to those of torch.distributed, else of the launcher's
    environment. `start` counts the draws of all ranks.
    """

    def __init__(self, *, rank: int | None = None, world: int | None = None, start: int = 0, length: int | None = None) -> None:
        here = ranks()
        self.rank, self.world = here[0] if rank is None else rank, here[1] if world is None else world
        if not 0 <= self.rank < self.world or start < 0:
            raise ProblemError(f"need 0 <= rank < world and start >= 0, found rank = {self.rank}, world = {self.world}, start = {start}.")
        self.start, self.length = start, length

    def __iter__(self) -> Iterator[int]:
        k, start = 0, self.start
        while self.length is None or k < self.length:
            yield start + k * self.world + self.rank
            k += 1
        self.start = start + k * self.world

    def __len__(self) -> int:
        if self.length is None:
            raise TypeError("these draws have no end; give length=")
        return self.length


class DrawLoader:
    """Batches of draws without end, and where it stands.

    The state counts batches that were handed out, not those that workers have ready, so the next batch after `load_state_dict` is the
    one that would have come next: with any number of workers, and from the same draw on with another batch size or number of ranks.
    Do not pass it to accelerate's `prepare`: it is already divided among ranks. `options` are DataLoader's.
    """

    def __init__(
        self,
        dataset: LeRobotOTPairDataset | MixedDataset,
        batch_size: int,
        *,
        rank: int | None = None,
        world: int | None = None,
        start: int = 0,
        **options: Any,
    ) -> None:
        if batch_size < 1:
            raise ProblemError(f"batch_size must be at least 1, found {batch_size}.")
        if len(dataset) == 0:
            raise ProblemError("the dataset has no frames.")
        # Its own generator: a DataLoader otherwise takes a number from torch's, and training with it would not be what it was.
        self.options: dict[str, Any] = {"generator": torch.Generator()} | options
        self.dataset, self.batch_size = dataset, batch_size
        self.sampler = Draws(rank=rank, world=world, start=start)
        self.batches = 0
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> DrawLoader:
        return self

    def __next__(self) -> Any:
        if self._iterator is None:
            self._iterator = iter(DataLoader(self.dataset, self.batch_size, sampler=self.sampler, **self.options))
        batch = next(self._iterator)
        self.batches += 1
        return batch

    def state_dict(self) -> dict[str, Any]:
        """The draws of all ranks so far, and the law they follow."""
        return {"draw": self.sampler.start + self.batches * self.batch_size * self.sampler.world, "law": self.dataset.law}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises ProblemError if the state belongs to other data, options or seed: the sequence could not be continued."""
        if state.get("law") != (law := self.dataset.law):
            raise ProblemError(
                f"the saved sampler drew by law {state.get('law')}, and this one draws by {law}: seed, sampling options, pair file or "
                "datasets have changed. Resume with the same, or start this sampler anew by leaving its state out."
            )
        self._iterator = None  # workers that run ahead are on the old course
        self.sampler.start, self.batches = int(state["draw"]), 0


def _same_labels(pairs: Pairs, *sides: Frames) -> None:
    for frames, ours, keys in zip(sides, (pairs.source, pairs.target), _keys(pairs), strict=True):
        root = getattr(frames.dataset, "root", None)
        if ours.digest and keys and root is not None and (Path(root) / "meta" / "info.json").is_file():
            there = read_recording(root, keys, partial=True)
            pairs.check(**{frames.role: there})


def _keys(pairs: Pairs) -> tuple[Sequence[str], Sequence[str]]:
    if pairs.options is None:
        return (), ()
    return pairs.options.keys, pairs.options.target_keys or pairs.options.keys


def _same_patterns(keys: Sequence[str] | None, *sides: Frames) -> None:
    for pattern in keys or ():
        known = [key for frames in sides for key in frames.features or ()]
        if known and not any(matches(key, [pattern]) for key in known):
            raise ProblemError(f'keys has "{pattern}", which neither dataset has; there are {", ".join(dict.fromkeys(known))}.')


def _runs(part: Part, frames: Frames) -> tuple[np.ndarray, np.ndarray]:
    """(first row of each chosen episode, frames up to its end)."""
    if part.episodes is None:
        chosen = np.arange(len(frames.side.episodes))
    else:
        place = {episode: k for k, episode in enumerate(frames.side.episodes.tolist())}
        if strange := [episode for episode in part.episodes if int(episode) not in place]:
            raise ProblemError(f"{part.name} has no episode {strange[0]}.")
        chosen = np.array([place[int(episode)] for episode in part.episodes], dtype=np.int64)
    ends = np.cumsum((frames.side.lengths[chosen] - part.drop_last).clip(min=0))
    if len(chosen) == 0 or ends[-1] == 0:
        raise ProblemError(f"{part.name} has a share of {part.share:g} and no frames to give. Give that share to another part.")
    return frames.starts[chosen], ends


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


def _draw_number(n: int) -> int:
    if n < 0:
        raise IndexError(f"draws are numbered from 0, found {n}")
    return int(n)


def ranks() -> tuple[int, int]:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
