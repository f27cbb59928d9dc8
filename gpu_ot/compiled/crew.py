"""Several cores on the rows of one large kernel, none of which ever waits for long.

Whoever iterates posts the vectors of a product, and then takes chunks of rows like everybody else. A chunk that somebody has taken
and not finished in the time of one chunk (its core went to another process) is simply computed again: sums go to buffers of whoever
makes them, so a latecomer disturbs nothing. Chunks depend on the kernel alone and are added in their order: the result is the same,
to the last bit, on any number of cores.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from llvmlite import ir  # pyright: ignore[reportMissingImports]
from numba import types  # pyright: ignore[reportMissingImports]
from numba.extending import intrinsic  # pyright: ignore[reportMissingImports]

from .machine import borrowing, compiled
from .visits import both

#: Bytes of a chunk of rows; how often a helper looks for work before it leaves; and so many chunks too late send all helpers away.
CHUNK_BYTES, PATIENCE, LATENESS = 2**20, 10_000_000, 5
#: The word that hands out chunks: how many products were posted, and the next chunk of the last.
CHUNK_BITS = 24
MASK = 2**CHUNK_BITS - 1
WORD, STOP, LATE = 0, 8, 1  # far from each other, as are the entries of `done`
APART = 8


class Crew(NamedTuple):
    """What is posted, and the buffers of each hand, of which the first is whoever iterates. Empty where one core does it all.

    rows of a chunk; words (16,) and done (hands, chunks * APART) int64; done is the product that a chunk was finished for.
    given (m + n,) in the kernel's type: w and a of `both`; damping (n + 1,): its c and p. found (hands, 2 n + chunks m): s, u, and t of
    each chunk.
    """

    rows: int
    words: np.ndarray
    done: np.ndarray
    given: np.ndarray
    damping: np.ndarray
    found: np.ndarray


def crew(n: int, m: int, dtype: np.dtype, hands: int) -> Crew:
    """For n by m kernels; hands = 0: nobody."""
    rows = chunk_rows(m, dtype.itemsize)
    chunks = -(-n // rows) if hands else 0
    n, m = (n, m) if hands else (0, 0)
    found = np.empty((hands, 2 * n + chunks * m), dtype)
    return Crew(rows, np.zeros(16, np.int64), np.zeros((hands, chunks * APART), np.int64), np.empty(m + n, dtype), np.empty(n + 1), found)


def chunk_rows(m: int, itemsize: int) -> int:
    return max(8, CHUNK_BYTES // (m * itemsize) // 8 * 8)


@compiled
def alone(K):
    """No crew, for kernels of this type."""
    whole = np.empty((0, 0), np.int64)
    return Crew(0, np.empty(0, np.int64), whole, np.empty(0, K.dtype), np.empty(0), np.empty((0, 0), K.dtype))


def _pointer(context, builder, array_type, array, index):
    from numba.core import cgutils  # pyright: ignore[reportMissingImports]

    view = context.make_array(array_type)(context, builder, array)
    return cgutils.get_item_pointer(context, builder, array_type, view, [index], wraparound=False)


@intrinsic
def _add(typing_context, words, index):
    """words[index] += 1 at once; what it was."""

    def code(context, builder, signature, arguments):
        place = _pointer(context, builder, signature.args[0], *arguments)
        return builder.atomic_rmw("add", place, ir.Constant(ir.IntType(64), 1), "seq_cst")

    return types.int64(words, types.intp), code


@intrinsic
def _load(typing_context, words, index):
    def code(context, builder, signature, arguments):
        return builder.load_atomic(_pointer(context, builder, signature.args[0], *arguments), "seq_cst", 8)

    return types.int64(words, types.intp), code


@intrinsic
def _store(typing_context, words, index, value):
    def code(context, builder, signature, arguments):
        place = _pointer(context, builder, signature.args[0], *arguments[:2])
        builder.store_atomic(arguments[2], place, "seq_cst", 8)
        return context.get_dummy_value()

    return types.void(words, types.intp, types.int64), code


@borrowing
def _chunk(K, crew, hand, i):
    n, m = K.shape
    low, high = i * crew.rows, min((i + 1) * crew.rows, n)
    a, c, found = crew.given[m + low : m + high], crew.damping[low:high], crew.found[hand]
    s, u, t = found[low:high], found[n + low : n + high], found[2 * n + i * m : 2 * n + (i + 1) * m]
    both(K[low:high], crew.given[:m], a, crew.damping[n], c, s, u, t, False)


@borrowing
def both_shared(K, w, a, p, c, s, u, t, crew):
    """`visits.both`, with whoever helps."""
    (n, m), hands, chunks = K.shape, len(crew.found), crew.done.shape[1] // APART
    for j in range(m):
        crew.given[j], t[j] = w[j], 0
    for i in range(n):
        crew.given[m + i], crew.damping[i] = a[i], c[i]
    crew.damping[n] = p
    product = (_load(crew.words, WORD) >> CHUNK_BITS) + 1  # pyright: ignore[reportCallIssue]
    _store(crew.words, WORD, product << CHUNK_BITS)  # pyright: ignore[reportCallIssue]
    while True:
        i = _add(crew.words, WORD) & MASK
        if i >= chunks:
            break
        _chunk(K, crew, 0, i)
        crew.done[0, i * APART] = product
    for i in range(chunks):
        by, looks = -1, 0
        while by < 0:
            for hand in range(hands):
                if _load(crew.done[hand], i * APART) == product:
                    by = hand
                    break
            looks += 1
            if by < 0 and looks > crew.rows * m // hands:
                _chunk(K, crew, 0, i)
                by = 0
                crew.words[LATE] += 1
        found, part = crew.found[by], 2 * n + i * m
        for r in range(i * crew.rows, min((i + 1) * crew.rows, n)):
            s[r], u[r] = found[r], found[n + r]
        for j in range(m):
            t[j] += found[part + j]
    if crew.words[LATE] > LATENESS:  # the cores are others': whoever helps only takes time from whoever iterates
        _store(crew.words, STOP, 1)  # pyright: ignore[reportCallIssue]


@compiled
def help_out(K, crew, hand):
    """Chunks of whatever is posted, until `dismiss` or for want of work."""
    chunks, idle = crew.done.shape[1] // APART, 0
    while _load(crew.words, STOP) == 0 and idle < PATIENCE:  # pyright: ignore[reportCallIssue]
        idle += 1
        if _load(crew.words, WORD) & MASK >= chunks:
            continue
        word = _add(crew.words, WORD)
        i = word & MASK
        if i < chunks:
            _chunk(K, crew, hand, i)
            _store(crew.done[hand], i * APART, word >> CHUNK_BITS)  # pyright: ignore[reportCallIssue]
            idle = 0


@compiled
def dismiss(crew):
    """Nobody needs to look for work any more."""
    _store(crew.words, STOP, 1)  # pyright: ignore[reportCallIssue]
