"""POT's unified API, for its entropic problems: `ot.solve`, `ot.solve_sample`, `ot.dist`, and their result."""

from __future__ import annotations

from .arrays import take
from .clouds import between, matrix, narrowed, take_points
from .forwarding import forward
from .linear import solve
from .refusals import elsewhere
from .result import OTResult
from .samples import solve_sample

__all__ = ["OTResult", "dist", "solve", "solve_sample"]


def dist(x1, x2=None, metric="sqeuclidean", p=2, w=None, backend="auto", nx=None, use_tensor=False):
    """POT's `ot.dist`: the (n, m) costs between the rows of x1 (n, d) and x2 (m, d); x2 = x1 when left out.

    Computed from differences: clouds far from the origin keep their digits, and the derivative is 0 where points coincide.
    metric   "sqeuclidean", "euclidean", "cityblock", "minkowski" with p, all with weights w of the coordinates; "cosine", "correlation".
    """
    if backend == "scipy":
        raise elsewhere('backend = "scipy"', 'ot.dist(..., backend="scipy")')
    (x, y), back = take_points(x1=x1, x2=x1 if x2 is None else x2)
    (_, weights), _ = take(x1=x1, w=w)
    cost = between(x, y, metric, p, weights)
    return narrowed(back(matrix(cost)), cost)


__getattr__, __dir__ = forward(__name__, "ot.solvers")
