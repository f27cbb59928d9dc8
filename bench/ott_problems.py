"""What OTT-JAX has of the problems in `bench/beyond.py`, as calls of no arguments: jitted, in float64, each run to its end.

OTT needs an environment of its own, with jax, ott-jax and this package's dependencies; elsewhere `calls` has nothing to add.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Call = Callable[[], Any]


def calls(make: Callable[..., Call], *given: Any) -> dict[str, Call]:
    """One contestant more, where OTT is installed."""
    if importlib.util.find_spec("ott") is None:
        return {}
    import jax

    jax.config.update("jax_enable_x64", True)
    return {"OTT-JAX": make(*given)}


def ready(function: Callable[..., Any], *given: Any) -> Call:
    import jax
    import jax.numpy as jnp

    inside, jitted = [jnp.asarray(z) for z in given], jax.jit(function)
    return lambda: [np.asarray(z) for z in jax.block_until_ready(jitted(*inside))]


def low_rank(x: Any, y: Any, rank: int) -> Call:
    """(Q, R, g). With OTT's own gamma = 10 and threshold = 1e-3 it stops near a⊗b."""
    from ott.geometry import pointcloud
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn_lr

    solver = sinkhorn_lr.LRSinkhorn(rank=rank, gamma=100.0, threshold=1e-6, max_iterations=2000)

    def solve(x: Any, y: Any) -> Any:
        found = solver(linear_problem.LinearProblem(pointcloud.PointCloud(x, y)))
        return found.q, found.r, found.g

    return ready(solve, x, y)


def gromov(Cx: Any, Cy: Any, eps: float, max_iter: int) -> Call:
    """(plan,) for the square loss. OTT's slope is half of ours, and so is its eps."""
    from ott.geometry import geometry
    from ott.problems.quadratic import quadratic_problem
    from ott.solvers.linear import sinkhorn
    from ott.solvers.quadratic import gromov_wasserstein

    inner = sinkhorn.Sinkhorn(threshold=1e-6, max_iterations=1000)
    solver = gromov_wasserstein.GromovWasserstein(inner, epsilon=eps / 2, threshold=1e-6, max_iterations=max_iter, warm_start=True)

    def solve(Cx: Any, Cy: Any) -> Any:
        found = solver(quadratic_problem.QuadraticProblem(geometry.Geometry(cost_matrix=Cx), geometry.Geometry(cost_matrix=Cy)))
        return (found.matrix,)

    return ready(solve, Cx, Cy)


def free_barycenter(clouds: Sequence[Any], start: Any, eps: float, moves: int) -> Call:
    """(points,) after so many moves."""
    import jax.numpy as jnp
    from ott.problems.linear import barycenter_problem
    from ott.solvers.linear import continuous_barycenter, sinkhorn

    inner = sinkhorn.Sinkhorn(threshold=1e-6, max_iterations=1000)
    solver = continuous_barycenter.FreeWassersteinBarycenter(inner, threshold=0.0, min_iterations=moves, max_iterations=moves)

    def solve(clouds: Any, start: Any) -> Any:
        problem = barycenter_problem.FreeBarycenterProblem(clouds, jnp.full(clouds.shape[:2], 1 / clouds.shape[1]), epsilon=eps)
        return (solver(problem, bar_size=len(start), x_init=start).x,)

    return ready(solve, np.stack(clouds), start)
