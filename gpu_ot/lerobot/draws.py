"""Batches of draws without end: ranks differ, the number of workers changes nothing, and the count of draws alone resumes a run."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset

from ..errors import ProblemError
from .dataset import LeRobotOTPairDataset
from .mixture import MixedDataset

Drawable = LeRobotOTPairDataset | MixedDataset


class DrawLoader:
    """Batches of draws without end, and where it stands.

    Rank r of w takes draws r, r + w, r + 2w, ...; rank and world default to those of torch.distributed, else of the launcher's environment.
    `start` counts the draws of all ranks. `options` are DataLoader's.

    The state counts batches that were handed out, not those that workers have ready, so the next batch after `load_state_dict` is the
    one that would have come next: with any number of workers, and from the same draw on with another batch size or number of ranks.
    Do not pass it to accelerate's `prepare`: it is already divided among ranks.
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
        here = ranks()
        self.rank, self.world = here[0] if rank is None else rank, here[1] if world is None else world
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
        """Raises ProblemError if the state belongs to other data, options or seed: the sequence could not be continued."""
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
