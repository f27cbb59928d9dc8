"""Potentials on disk: a long solve goes on from them, also on another machine or another number of ranks."""

from __future__ import annotations

import os
import time
from pathlib import Path

from torch import Tensor

from .. import errors


class Checkpoint:
    """Writes f and g to `path` every `minutes` of a solve, as safetensors. Where ranks share the problem, the first of them writes.

    >>> kept = Checkpoint("atlas.safetensors", minutes=10)
    >>> gpu_ot.solve(problem, checkpoint=kept, start=kept.start())

    f and g are those of all points, in the order of the ranks: any number of ranks can go on with points in the same order. They are the
    best that the loop has seen; nothing is written while eps is annealed. A file appears whole or not at all.
    Raises BackendError if safetensors is not installed.
    """

    def __init__(self, path: str | os.PathLike[str], minutes: float = 10.0) -> None:
        self.path, self.minutes = Path(path), minutes
        self._last = time.monotonic()
        _safetensors()

    def start(self) -> Tensor | None:
        """f (*batch, n) for `solve(start=...)`, to be read by every rank; None if nothing has been written yet."""
        return self.read()[0] if self.path.exists() else None

    def read(self) -> tuple[Tensor, Tensor, dict[str, str]]:
        """(f, g, {"n_iter", "eps"}) as they were written. Raises ProblemError for another file."""
        with _safetensors().safe_open(str(self.path), framework="pt") as file:
            if not {"f", "g"} <= set(file.keys()):
                raise errors.ProblemError(f"{self.path} holds {', '.join(file.keys())}, and no potentials f and g.")
            return file.get_tensor("f"), file.get_tensor("g"), dict(file.metadata() or {})

    def offer(self, n_iter: int, eps: float, f: Tensor, g: Tensor) -> None:
        """Writes if `minutes` have passed."""
        if time.monotonic() - self._last >= 60 * self.minutes:
            self.write(n_iter, eps, f, g)

    def write(self, n_iter: int, eps: float, f: Tensor, g: Tensor) -> None:
        """Writes another file in the same folder, which then replaces the last."""
        from safetensors.torch import save_file

        partial = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        tensors = {name: z.detach().to("cpu", copy=True).contiguous() for name, z in (("f", f), ("g", g))}
        try:
            save_file(tensors, str(partial), {"n_iter": str(n_iter), "eps": repr(eps)})
            with partial.open("rb") as file:
                os.fsync(file.fileno())
            os.replace(partial, self.path)
        finally:
            partial.unlink(missing_ok=True)
        self._last = time.monotonic()


def _safetensors():  # type: ignore[no-untyped-def]
    try:
        import safetensors
    except ImportError:
        raise errors.BackendError("checkpoints are written with safetensors, which is not installed: pip install safetensors") from None
    return safetensors
