"""POT's `ot.solve_sample`: its unified API between points."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from .. import errors
from ..distributed.costs import Sharded
from ..distributed.dtensors import is_dtensor, local
from ..solve import solve as solve_problem
from .arrays import take
from .clouds import between, matrix, narrowed, take_points
from .linear import METHODS, checked, kinds, problem_of, solve_cost, solve_matrix
from .refusals import elsewhere, known_method
from .relaxed import ELSEWHERE
from .result import OnDemand, OTResult

GEOMLOSS = ("geomloss", "geomloss_auto", "geomloss_tensorized", "geomloss_online", "geomloss_multiscale")
#: POT's solvers of samples that are not entropic transport between these points.
OTHER_SOLVERS = ("1d", "gaussian", "gaussian_hd", "lowrank", "nystroem", "factored", "sliced", "max_sliced", "bsp")


def solve_sample(
    X_a, X_b, a=None, b=None, metric="sqeuclidean", reg=None, c=None, reg_type="KL", unbalanced=None, unbalanced_type="KL", lazy=False,
    batch_size=None, method=None, n_threads=1, max_iter=None, plan_init=None, rank=100, scaling=0.95, potentials_init=None, X_init=None,
    tol=None, verbose=False, grad="autodiff", random_state=None, debias=False, n_projections=50, projections=None, scaler=None,
    *, group=None, layout="auto",
):  # fmt: skip
    """POT's `ot.solve_sample`: `solve` between the points X_a (n, d) and X_b (m, d).

    metric   "sqeuclidean", "euclidean", "cityblock", "minkowski", "cosine" or "correlation".
    lazy     no n-by-m array, for relaxed marginals too: the result has `lazy_plan` instead of `plan`, and a `value`.
    method   "sinkhorn" or "sinkhorn_log". "geomloss", "geomloss_online", "geomloss_multiscale" and "geomloss_auto" are lazy=True with a
             `plan` that is formed when it is read.
    debias   True: values minus half of those of X_a and X_b with themselves (Feydy et al. 2019, arXiv:1810.08278).
    scaler   applied to both clouds: a function, or an object with `transform`.

    group    a process group or DeviceMesh: X_a, X_b, a and b are this rank's share of the points, or DTensors (which need no group).
             All ranks call. The result is a gpu_ot.Solution; `tol` and `max_iter` have the defaults of gpu_ot.solve. For `layout` see
             gpu_ot.Sharded.

    `batch_size`, `scaling`, `rank`, `n_projections` and the like are accepted and not needed. Otherwise as `solve`.
    """
    if group is not None or is_dtensor(X_a) or is_dtensor(X_b):
        others = dict(c=c, potentials_init=potentials_init, debias=debias or None, scaler=scaler, lazy=lazy or None, method=method)
        if refused := [name for name, value in others.items() if value is not None]:
            raise errors.ProblemError(f"{', '.join(refused)}: not known where ranks share the points. SamplesLoss(group=...) debiases.")
        entropy, penalty = kinds(reg_type, unbalanced, unbalanced_type)
        if entropy:
            raise errors.ProblemError('reg_type = "entropy" is not known where ranks share the points: pass reg_type="KL", the same plan.')
        if reg is None:
            raise errors.bad_eps("reg", reg)
        group = next((z.device_mesh for z in (X_a, X_b) if is_dtensor(z)), None) if group is None else group
        cost = Sharded(between(local("X_a", X_a), local("X_b", X_b), metric), group, layout)
        options: dict[str, Any] = dict(max_iter=10_000 if max_iter is None else max_iter, tol=1e-4 if tol is None else tol)
        return solve_problem(problem_of(cost, reg, a, b, unbalanced, penalty), grad="envelope" if grad == "autodiff" else grad, **options)
    name = None if method is None else method.lower()
    if name in OTHER_SOLVERS:
        raise elsewhere(f"method = {method!r}", f"ot.solve_sample(..., method={method!r})")
    if method is not None and name not in ELSEWHERE:
        known_method(method, (*METHODS, *GEOMLOSS))
    if scaler is not None:
        scale = getattr(scaler, "transform", scaler)
        if not callable(scale):
            raise errors.ProblemError(f"scaler must be None, an object with .transform(), or a function, found {type(scaler).__name__}.")
        X_a, X_b = scale(X_a), scale(X_b)
    on_demand = name in GEOMLOSS and name != "geomloss_tensorized"
    if name in GEOMLOSS:
        lazy, name = on_demand, None
    if debias == "split":
        raise elsewhere('debias = "split"', 'ot.solve_sample(..., debias="split")')
    settings = checked(reg, reg_type, unbalanced, unbalanced_type, name, potentials_init, verbose, grad, max_iter, tol)

    def between_clouds(X_a: Any, X_b: Any, a: Any, b: Any) -> OTResult:
        (x, y), back = take_points(X_a=X_a, X_b=X_b)
        cost = between(x, y, metric)
        if not lazy:
            return narrowed(solve_matrix(back(matrix(cost)), a, b, c, settings), cost)
        if c is not None:
            raise errors.ProblemError("c is an n-by-m array, which lazy=True is there to avoid: pass lazy=False.")
        (ta, tb), _ = take(a=a, b=b)
        return solve_cost(cost, ta, tb, back, settings)

    result = _debiased(between_clouds, X_a, X_b, a, b) if debias else between_clouds(X_a, X_b, a, b)
    return OnDemand(**vars(result)) if on_demand else result


def _debiased(between_clouds: Callable[..., OTResult], X_a: Any, X_b: Any, a: Any, b: Any) -> OTResult:
    pairs = {"res_aa": (X_a, X_a, a, a), "res_bb": (X_b, X_b, b, b), "res_ab": (X_a, X_b, a, b)}
    found = {name: between_clouds(*clouds) for name, clouds in pairs.items()}
    aa, bb, ab = found.values()
    linear = ab.value_linear - 0.5 * (aa.value_linear + bb.value_linear)
    return replace(ab, value=ab.value - 0.5 * (aa.value + bb.value), value_linear=linear, log=found)
