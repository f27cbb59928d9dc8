"""How ranks learn that one of them has failed: from a record in the store of torch.distributed, or from an error of the transport."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist

from .. import errors


class Failures:
    """The first failure in a group, recorded in the default store of its processes.

    A rank that is killed closes its connections; one that hangs exceeds the timeout of the group. In both cases the transport raises on
    the others, and `guard` turns its error into RankFailed.
    """

    def __init__(self, rank: int, size: int, first: int) -> None:
        self.rank, self.size, self._key = rank, size, f"gpu_ot/failure/{first}/{size}"

    @contextlib.contextmanager
    def guard(self, doing: str) -> Iterator[None]:
        """RankFailed in place of the transport's error, with its text and what the rank that failed has recorded."""
        try:
            yield
        except RuntimeError as error:
            said = str(error).strip().split("\n")[0]
            raise errors.rank_failed(self.rank, self.size, doing, self._recorded(), said) from error

    @contextlib.contextmanager
    def report(self) -> Iterator[None]:
        """On an error, record it in the store so that the other ranks can name it."""
        try:
            yield
        except (errors.RankFailed, errors.RankRefused, errors.RanksDiffer):  # the others know
            raise
        except BaseException as error:
            with contextlib.suppress(Exception):  # the first record stays
                _store().compare_set(self._key, "", f"rank {self.rank} raised {type(error).__name__}: {error}".removesuffix(": "))
            raise

    def forget(self) -> None:
        """Drops the record of an earlier solve. An exchange must follow, so that no new record is dropped."""
        if self.size > 1 and self.rank == 0:
            with contextlib.suppress(Exception):
                _store().delete_key(self._key)

    def _recorded(self) -> str | None:
        with contextlib.suppress(Exception):  # the store ends with the process that holds it
            if _store().check([self._key]):
                return _store().get(self._key).decode() or None
        return None


def _store() -> Any:
    return dist.distributed_c10d._get_default_store()
