"""POT's entropic barycentres: the same names, arguments, results and `log`, from `gpu_ot.barycenter`."""

from __future__ import annotations

import math
import sys
from typing import Any

import torch
from torch import Tensor

from .. import errors
from ..costs import Grid
from ..penalties import BALANCED, KL
from .answer import log_weight
from .arrays import number, take
from .refusals import NOT_CONVERGED, known_method, print_error, warn_unless_converged


def barycenter(
    A, M, reg, weights=None, method="sinkhorn", numItermax=10000, stopThr=1e-4, verbose=False, log=False, warn=True, **kwargs
):  # fmt: skip
    """Entropic barycentre of the histograms A (n, k) under the costs M (n, n): `ot.bregman.barycenter`, in the log domain.

    weights    (k,), uniform when left out.
    method     "sinkhorn", "sinkhorn_stabilized" or "sinkhorn_log": one solver for all.
    numItermax, stopThr   stop when the standard deviation of the marginals, summed over the points, is below `stopThr`.

    Returns the barycentre (n,), and with `log=True` err, niter, `status`, `converged`, `n_iter`, `errors`, and for the stabilized method
    logu and logv (n, k) of the plans diag(u) exp(-M / reg) diag(v). Differentiable in A, M and weights, through the iterations.
    Benamou et al. 2015, arXiv:1412.5154.
    """
    name = known_method(method, ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_log"))
    keys = ("logu", "logv") if name == "sinkhorn_stabilized" else None
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, warn, keys=keys)


def barycenter_sinkhorn(A, M, reg, weights=None, numItermax=1000, stopThr=1e-4, verbose=False, log=False, warn=True):
    """POT's `ot.bregman.barycenter_sinkhorn`. Arguments and results as `barycenter`."""
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, warn)


def barycenter_stabilized(A, M, reg, tau=1e10, weights=None, numItermax=1000, stopThr=1e-4, verbose=False, log=False, warn=True):
    """POT's `ot.bregman.barycenter_stabilized`; `tau` is accepted and not needed. Arguments and results as `barycenter`."""
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, warn, keys=("logu", "logv"))


def barycenter_debiased(
    A, M, reg, weights=None, method="sinkhorn", numItermax=10000, stopThr=1e-4, verbose=False, log=False, warn=True, **kwargs
):  # fmt: skip
    """The barycentre of Sinkhorn divergences: `ot.bregman.barycenter_debiased`. Arguments and results as `barycenter`.

    Janati et al. 2020, arXiv:2006.02575.
    """
    known_method(method, ("sinkhorn", "sinkhorn_log"))
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, warn, debiased=True)


def barycenter_unbalanced(
    A, M, reg, reg_m, method="sinkhorn", weights=None, numItermax=1000, stopThr=1e-6, verbose=False, log=False, **kwargs
):  # fmt: skip
    """Entropic barycentre of histograms of any mass: `ot.unbalanced.barycenter_unbalanced`. Arguments and results as `barycenter`.

    reg_m   the price of the marginals, in units of M. Chizat et al. 2018, arXiv:1607.05816.

    `log` holds logu and logv (n, k), too.
    """
    known_method(method, ("sinkhorn", "sinkhorn_stabilized", "sinkhorn_reg_scaling"))
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, True, reg_m, keys=("logu", "logv"))


def barycenter_unbalanced_sinkhorn(A, M, reg, reg_m, weights=None, numItermax=1000, stopThr=1e-6, verbose=False, log=False):
    """POT's `ot.unbalanced.barycenter_unbalanced_sinkhorn`. Arguments and results as `barycenter_unbalanced`."""
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, True, reg_m, keys=("logu", "logv"))


def barycenter_unbalanced_stabilized(A, M, reg, reg_m, weights=None, tau=1e3, numItermax=1000, stopThr=1e-6, verbose=False, log=False):
    """POT's `ot.unbalanced.barycenter_unbalanced_stabilized`; `tau` is accepted and not needed. As `barycenter_unbalanced`."""
    return _run(A, M, reg, weights, numItermax, stopThr, verbose, log, True, reg_m, keys=("logu", "logv"))


def convolutional_barycenter2d(
    A, reg, weights=None, method="sinkhorn", numItermax=10000, stopThr=1e-4, verbose=False, log=False, warn=True, **kwargs
):  # fmt: skip
    """Entropic barycentre of images A (k, width, height) on the unit square: `ot.bregman.convolutional_barycenter2d`.

    The squared distances of a grid are a sum over its axes, so a sweep is a product with a small kernel along each. Where such a product
    would underflow, it is taken in the log domain. Arguments and results as `barycenter`; the result is (width, height),
    and for the method "sinkhorn" `log` holds U and V (k, width, height) of the plans diag(U) K diag(V).
    Solomon et al. 2015, doi:10.1145/2766963.
    """
    keys = ("U", "V") if known_method(method, ("sinkhorn", "sinkhorn_log")) == "sinkhorn" else None
    return _run(A, None, reg, weights, numItermax, stopThr, verbose, log, warn, keys=keys)


def convolutional_barycenter2d_debiased(
    A, reg, weights=None, method="sinkhorn", numItermax=10000, stopThr=1e-3, verbose=False, log=False, warn=True, **kwargs
):  # fmt: skip
    """The barycentre of Sinkhorn divergences: `ot.bregman.convolutional_barycenter2d_debiased`, as `convolutional_barycenter2d`."""
    keys = ("U", "V") if known_method(method, ("sinkhorn", "sinkhorn_log")) == "sinkhorn" else None
    return _run(A, None, reg, weights, numItermax, stopThr, verbose, log, warn, debiased=True, keys=keys)


def free_support_sinkhorn_barycenter(
    measures_locations, measures_weights, X_init, reg, b=None, weights=None, numItermax=100, numInnerItermax=1000, stopThr=1e-7,
    verbose=False, log=None, **kwargs,
):  # fmt: skip
    """Points that move to the entropic barycentre of clouds: `ot.bregman.free_support_sinkhorn_barycenter`.

    measures_locations, measures_weights   lists of k arrays (n_i, d) and (n_i,).
    X_init                  (m, d), where the points begin.
    b, weights              (m,) of the points and (k,) of the clouds; uniform when left out.
    numItermax, stopThr     moves at most, and the squared displacement that ends them.
    numInnerItermax         iterations of each transport problem; all are solved at once, from where the last move left them.

    Returns the points (m, d), and with `log=True` displacement_square_norms and `status`. Differentiable in nothing: detached.
    Cuturi and Doucet 2014, arXiv:1310.4375.
    """
    named = {f"measures_locations[{k}]": z for k, z in enumerate(measures_locations)}
    named |= {f"measures_weights[{k}]": z for k, z in enumerate(measures_weights)}
    (X, tb, w, *rest), back = take(X_init=X_init, b=b, weights=weights, **named)
    clouds, masses = rest[: len(measures_locations)], rest[len(measures_locations) :]
    inner = float(kwargs.get("stopThr", 1e-9))
    with torch.no_grad():
        found = sys.modules["gpu_ot"].free_barycenter(
            clouds, number(reg), X, a=masses, b=tb, weights=w, tol=stopThr, inner_tol=inner, max_iter=numItermax,
            inner_iter=numInnerItermax,
        )  # fmt: skip
    assert found.points is not None
    if verbose:
        for k, norm in enumerate(found.errors.tolist()):
            print(f"iteration {k}, displacement_square_norm={norm}\n")
    points = back(found.points.to(X.dtype))
    return (points, {"displacement_square_norms": [back(e) for e in found.errors], "status": found.status}) if log else points


def _run(
    A: Any, M: Any, reg: Any, weights: Any, max_iter: int, tol: float, verbose: bool, log: bool, warn: bool, reg_m: Any = None,
    debiased: bool = False, keys: tuple[str, str] | None = None,
) -> Any:  # fmt: skip
    images = M is None
    (tA, tM, w), back = take(A=A, M=M, weights=weights)
    if tA is None or tA.ndim != 2 + images:
        raise errors.wrong_shape("A", () if tA is None else tA.shape, "(k, width, height)" if images else "(n, k), a column a histogram")
    eps, dtype = number(reg), tA.dtype
    a = tA.flatten(-2) if images else tA.mT
    if images:
        spacing = [1 / max(k - 1, 1) for k in tA.shape[1:]]
        cost: Any = Grid(tA.shape[1:], torch.tensor(spacing, dtype=torch.float64, device=tA.device))
        a = a.double()
    else:
        cost = tM
        if tM is None or tM.shape != (tA.shape[0],) * 2:
            found = () if tM is None else tM.shape
            raise errors.wrong_shape("M", found, f"({tA.shape[0]}, {tA.shape[0]}), the costs between the rows of A")
    penalty = BALANCED if reg_m is None else KL(number(reg_m, "reg_m"))
    if reg_m is not None:  # POT's entropy is relative to 1, not to the weights: they go into the costs
        cost = tM + eps * (log_weight(a) - torch.tensor(float(a.shape[-1])).log()).to(tM.dtype).unsqueeze(-1)

    def line(n_iter: int, error: Tensor) -> None:
        print_error(n_iter - 1, error, 10)

    found = sys.modules["gpu_ot"].barycenter(
        cost, eps, a, w, penalty=penalty, debiased=debiased, cost_bb=cost if debiased else None, grad="unroll", tol=tol,
        max_iter=max(max_iter, 1), on_check=line if verbose else None,
    )  # fmt: skip
    if warn:
        warn_unless_converged(found, NOT_CONVERGED)
    result = back(found.weights.to(dtype).view(tA.shape[1:] if images else -1))
    if not log:
        return result
    errors_ = [back(e) for e in found.errors]
    report = {"status": found.status, "converged": back(found.converged), "n_iter": max(found.n_iter - 1, 0), "errors": errors_}
    if keys is not None:
        # The plans are a_i / m exp((f_i + g_j - C_ij) / eps), and where marginals are relaxed a_i / m is a part of C.
        log_u, log_v = found.f / eps, found.g / eps
        if reg_m is None:
            # The debiasing scaling d solves d K d = beta in POT's measure, and m d is ours.
            scale = 0.0 if debiased else math.log(cost.shape[-1])
            log_u, log_v = log_u + log_weight(a) - scale, log_v - math.log(cost.shape[-1]) + scale
        for key, z in zip(keys, (log_u, log_v), strict=True):
            report[key] = back((z.exp().view(tA.shape) if images else z.mT).to(dtype))
    return result, {"err": errors_, "niter": max(found.n_iter - 1, 0), **report}
