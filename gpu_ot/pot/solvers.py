"""POT's unified API, for its entropic problems: `ot.solve`, `ot.solve_sample`, `ot.dist`, and their result."""

from __future__ import annotations

from .. import errors
from .arrays import take
from .clouds import between
from .forwarding import forward
from .linear import solve
from .refusals import elsewhere
from .result import OTResult
from .samples import solve_sample

__all__ = ["OTResult", "dist", "solve", "solve_sample"]


def dist(x1, x2=None, metric="sqeuclidean", p=2, w=None, backend="auto", nx=None, use_tensor=False):
    """POT's `ot.dist`: the (n, m) costs between the rows of x1 (n, d) and x2 (m, d); x2 = x1 when left out.

    From differences, so that clouds far from the origin keep their digits, and with derivative 0 where points coincide.
    metric   "sqeuclidean", "euclidean", "cityblock", "minkowski" (with p, and weights w), "cosine", "correlation".
    """
    (x, y, weights), back = take(x1=x1, x2=x2, w=w)
    if x is None or (x2 is not None and y is None):
        raise errors.wrong_shape("x1" if x is None else "x2", (0,), "(n, d), one row a point")
    if backend == "scipy":
        raise elsewhere('backend = "scipy"', 'ot.dist(..., backend="scipy")')
    return back(between(x, x if y is None else y, metric, p, weights).dense())


__getattr__, __dir__ = forward(__name__, "ot.solvers")
