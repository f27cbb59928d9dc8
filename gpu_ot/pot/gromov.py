"""POT's `ot.gromov`, entropic: the same names, arguments, results and `log`, from `gpu_ot.gromov`."""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor

from .. import errors
from .answer import log_weight
from .arrays import number, take
from .forwarding import forward
from .gromov_barycenters import entropic_fused_gromov_barycenters, entropic_gromov_barycenters
from .partial import available_mass
from .refusals import elsewhere, print_error, warn_unless_converged

__all__ = [
    "entropic_fused_gromov_barycenters",
    "entropic_fused_gromov_wasserstein",
    "entropic_fused_gromov_wasserstein2",
    "entropic_gromov_barycenters",
    "entropic_gromov_wasserstein",
    "entropic_gromov_wasserstein2",
    "entropic_partial_gromov_wasserstein",
    "entropic_partial_gromov_wasserstein2",
]

#: Added to matrices under "kl_loss", whose logarithm POT takes of their zeros, too: diagonals of distances have them.
ABOVE_ZERO = 1e-18

#: POT's default tolerance of the plan is 1e-9; no more is asked of the costs that it moves.
LEAST_TOL = 1e-10


def entropic_gromov_wasserstein(
    C1, C2, p=None, q=None, loss_fun="square_loss", epsilon=0.1, symmetric=None, G0=None, max_iter=1000, tol=1e-9, solver="PGD",
    warmstart=False, verbose=False, log=False, **kwargs,
):  # fmt: skip
    """Entropic Gromov-Wasserstein plan between C1 (n, n) and C2 (m, m): `ot.gromov.entropic_gromov_wasserstein`.

    p, q       weights, uniform when left out.
    loss_fun   "square_loss" or "kl_loss".
    epsilon    > 0, in units of the loss.
    G0         the plan to begin with.
    max_iter, tol   of the outer loop. POT ends it when the plan moves by less than `tol` in the Euclidean norm; here it ends when the costs
               move by so little that no plan of mass 1 could move by more, checked at every iteration.
    `symmetric` is found, transport problems always start from the last potentials, and `numItermax` limits their iterations; other
    options are accepted and not needed. solver="PPA" is POT's alone.

    Returns the plan (n, m), and with `log=True` err, gw_dist, `status`, `converged`, `n_iter`, `errors`. Differentiable in C1, C2, p and q,
    implicitly. Peyré, Cuturi and Solomon 2016, ICML.
    """
    return _run(None, C1, C2, p, q, loss_fun, epsilon, 1.0, G0, max_iter, tol, solver, verbose, log, kwargs)


def entropic_gromov_wasserstein2(
    C1, C2, p=None, q=None, loss_fun="square_loss", epsilon=0.1, symmetric=None, G0=None, max_iter=1000, tol=1e-9, solver="PGD",
    warmstart=False, verbose=False, log=False, **kwargs,
):  # fmt: skip
    """The loss of the plan of `entropic_gromov_wasserstein`, without the entropy: `ot.gromov.entropic_gromov_wasserstein2`."""
    return _run(None, C1, C2, p, q, loss_fun, epsilon, 1.0, G0, max_iter, tol, solver, verbose, log, kwargs, loss=True)


def entropic_fused_gromov_wasserstein(
    M, C1, C2, p=None, q=None, loss_fun="square_loss", epsilon=0.1, symmetric=None, alpha=0.5, G0=None, max_iter=1000, tol=1e-9,
    solver="PGD", warmstart=False, verbose=False, log=False, **kwargs,
):  # fmt: skip
    """The same with costs M (n, m) between features, of weight 1 - alpha: `ot.gromov.entropic_fused_gromov_wasserstein`.

    Arguments and results as `entropic_gromov_wasserstein`; `log` holds fgw_dist. Vayer et al. 2019, arXiv:1811.02834.
    """
    return _run(M, C1, C2, p, q, loss_fun, epsilon, alpha, G0, max_iter, tol, solver, verbose, log, kwargs)


def entropic_fused_gromov_wasserstein2(
    M, C1, C2, p=None, q=None, loss_fun="square_loss", epsilon=0.1, symmetric=None, alpha=0.5, G0=None, max_iter=1000, tol=1e-9,
    solver="PGD", warmstart=False, verbose=False, log=False, **kwargs,
):  # fmt: skip
    """The loss of the plan of `entropic_fused_gromov_wasserstein`: `ot.gromov.entropic_fused_gromov_wasserstein2`."""
    return _run(M, C1, C2, p, q, loss_fun, epsilon, alpha, G0, max_iter, tol, solver, verbose, log, kwargs, loss=True)


def entropic_partial_gromov_wasserstein(
    C1, C2, p=None, q=None, reg=1.0, m=None, loss_fun="square_loss", G0=None, numItermax=1000, tol=1e-7, symmetric=None, log=False,
    verbose=False,
):  # fmt: skip
    """Entropic Gromov-Wasserstein plan of a part of the mass: `ot.gromov.entropic_partial_gromov_wasserstein`.

    m   the mass that moves, from 0 to the smaller of sum(p) and sum(q), which it is when left out.

    Returns the plan (n, m), detached, and with `log=True` err, partial_gw_dist and the report of `entropic_gromov_wasserstein`, whose other
    arguments these are. Chapel, Alaya and Gasso 2020, arXiv:2002.08276.
    """
    return _run_partial(C1, C2, p, q, reg, m, loss_fun, G0, numItermax, tol, verbose, log)


def entropic_partial_gromov_wasserstein2(
    C1, C2, p=None, q=None, reg=1.0, m=None, loss_fun="square_loss", G0=None, numItermax=1000, tol=1e-7, symmetric=None, log=False,
    verbose=False,
):  # fmt: skip
    """The loss of the plan of `entropic_partial_gromov_wasserstein`: `ot.gromov.entropic_partial_gromov_wasserstein2`."""
    P, found = _run_partial(C1, C2, p, q, reg, m, loss_fun, G0, numItermax, tol, verbose, True)
    return (found["partial_gw_dist"], {**found, "T": P}) if log else found["partial_gw_dist"]


@torch.no_grad()
def _run_partial(
    C1: Any, C2: Any, p: Any, q: Any, reg: Any, m: Any, loss_fun: str, G0: Any, max_iter: int, tol: float, verbose: bool, log: bool
) -> Any:
    if loss_fun not in ("square_loss", "kl_loss"):
        raise errors.ProblemError(f"Unknown `loss_fun='{loss_fun}'`. Use one of: 'square_loss', 'kl_loss'.")
    (x, y, a, b, start), back = take(C1=C1, C2=C2, p=p, q=q, G0=G0)
    x, y = (z + ABOVE_ZERO if loss_fun == "kl_loss" else z for z in (x, y))
    a, b = (z.new_full(z.shape[:1], 1 / len(z)) if w is None else w for z, w in ((x, a), (y, b)))
    mass = available_mass(a, b, None if m is None else number(m, "m"))
    eps = number(reg)
    # POT's entropy has no weights in it. With half of everything, they enter as costs of features: C = shift / 2 + L⊗P at eps / 2.
    shift = eps * (log_weight(a).unsqueeze(-1) + log_weight(b))

    def line(n_iter: int, change: Tensor) -> None:
        print_error(n_iter - 1, change, 10)

    found = sys.modules["gpu_ot"].gromov(
        x, y, eps / 2, a, b, features=shift.to(x.dtype), alpha=0.5, loss=loss_fun.removesuffix("_loss"), mass=mass, start=start,
        tol=_of_costs(tol, x, y), max_iter=max(max_iter, 1), on_check=line if verbose else None,
    )  # fmt: skip
    if found.status.name != "converged":
        warn_unless_converged(found, "Partial Gromov-Wasserstein did not converge.", "numItermax", "tol")
    P = back(found.plan.to_dense())
    changes = [back(e.to(found.value.dtype)) for e in found.errors]
    report = {"status": found.status, "converged": back(found.converged), "n_iter": found.n_iter - 1, "errors": changes}
    return (P, {"err": changes[::10], "partial_gw_dist": back(found.distortion), **report}) if log else P


def _run(
    M: Any, C1: Any, C2: Any, p: Any, q: Any, loss_fun: str, epsilon: Any, alpha: Any, G0: Any, max_iter: int, tol: float, solver: str,
    verbose: bool, log: bool, options: dict[str, Any], loss: bool = False,
) -> Any:  # fmt: skip
    if solver not in ("PGD", "PPA"):
        raise errors.ProblemError(f"Unknown solver '{solver}'. Pick one in ['PGD', 'PPA'].")
    if loss_fun not in ("square_loss", "kl_loss"):
        raise errors.ProblemError(f"Unknown `loss_fun='{loss_fun}'`. Use one of: 'square_loss', 'kl_loss'.")
    if solver == "PPA":
        raise elsewhere('solver = "PPA"', 'ot.gromov.entropic_gromov_wasserstein(..., solver="PPA")')
    fused = M is not None
    (tM, x, y, a, b, start), back = take(M=M, C1=C1, C2=C2, p=p, q=q, G0=G0)
    x, y = (z + ABOVE_ZERO if loss_fun == "kl_loss" else z for z in (x, y))
    alpha = number(alpha, "alpha")

    def line(n_iter: int, change: Tensor) -> None:
        print_error(n_iter - 1, change, 10)

    found = sys.modules["gpu_ot"].gromov(
        x, y, number(epsilon, "epsilon"), a, b, features=tM, alpha=alpha if fused else None, loss=loss_fun.removesuffix("_loss"),
        start=start, grad="implicit", tol=_of_costs(tol, x, y), max_iter=max(max_iter, 1), inner_iter=options.get("numItermax", 1000),
        on_check=line if verbose else None,
    )  # fmt: skip
    if found.status.name != "converged":
        warn_unless_converged(found, "Gromov-Wasserstein did not converge.", "max_iter", "tol")
    P = found.plan if isinstance(found.plan, Tensor) else found.plan.to_dense()
    pairs = alpha * found.distortion
    linear = (1 - alpha) * torch.where(P != 0, P * tM, 0.0).sum() if fused else 0.0
    dist = pairs + linear
    if not log:
        return back(dist if loss else P)
    changes = [back(e.to(P.dtype)) for e in found.errors]
    report = {"status": found.status, "converged": back(found.converged), "n_iter": found.n_iter - 1, "errors": changes}
    entries = {"err": changes[::10], "fgw_dist" if fused else "gw_dist": back(dist), **report}
    if loss:
        entries["T"] = back(P)
        entries |= {"quad_loss": back(pairs), "lin_loss": back(linear)} if isinstance(linear, Tensor) else {}
    return back(dist if loss else P), entries


def _of_costs(tol: float, x: Tensor, y: Tensor) -> float:
    """How far costs may move, in units of eps, for a plan that may move by `tol`: the norm of a plan between k equal masses is at most
    1 / sqrt(k)."""
    return max(tol, LEAST_TOL) * min(len(x), len(y)) ** 0.5


__getattr__, __dir__ = forward(__name__, "ot.gromov")
