"""A bar that shows how a loop goes."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator

from torch import Tensor


@contextlib.contextmanager
def bar(on_check: Callable[[int, Tensor], None] | None) -> Iterator[Callable[[int, Tensor], None] | None]:
    """`on_check`, which also moves a bar."""
    try:
        from tqdm import tqdm
    except ImportError:
        warnings.warn("progress=True shows tqdm's bar, which is not installed: pip install tqdm", stacklevel=5)
        yield on_check
        return
    with tqdm(unit=" iterations") as shown:

        def move(n_iter: int, errors: Tensor) -> None:
            shown.set_postfix(error=f"{float(errors.max()):.1e}", refresh=False)
            shown.update(n_iter - shown.n)
            if on_check is not None:
                on_check(n_iter, errors)

        yield move
