"""POT's `ot.bregman`: the same names, arguments, results and `log`, all from the solver in `balanced`."""

from __future__ import annotations

import torch

from .balanced import METHODS, run, solve_balanced
from .barycenters import (
    barycenter,
    barycenter_debiased,
    barycenter_sinkhorn,
    barycenter_stabilized,
    convolutional_barycenter2d,
    convolutional_barycenter2d_debiased,
    free_support_sinkhorn_barycenter,
)
from .empirical import empirical_sinkhorn, empirical_sinkhorn2, empirical_sinkhorn_divergence
from .forwarding import forward
from .mixtures import jcpot_barycenter, unmix
from .refusals import known_method

__all__ = [
    "barycenter",
    "barycenter_debiased",
    "barycenter_sinkhorn",
    "barycenter_stabilized",
    "convolutional_barycenter2d",
    "convolutional_barycenter2d_debiased",
    "empirical_sinkhorn",
    "empirical_sinkhorn2",
    "empirical_sinkhorn_divergence",
    "free_support_sinkhorn_barycenter",
    "greenkhorn",
    "jcpot_barycenter",
    "screenkhorn",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_epsilon_scaling",
    "sinkhorn_knopp",
    "sinkhorn_log",
    "sinkhorn_stabilized",
    "unmix",
]


def sinkhorn_knopp(a, b, M, reg, numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None, **kwargs):
    """POT's `ot.bregman.sinkhorn_knopp`, in the log domain. Arguments and results as `sinkhorn`; `log` holds err, niter, u, v."""
    return run("sinkhorn", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, **kwargs)


def sinkhorn_log(a, b, M, reg, numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None, **kwargs):
    """POT's `ot.bregman.sinkhorn_log`. Arguments and results as `sinkhorn`; `log` adds log_u, log_v."""
    return run("sinkhorn_log", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, **kwargs)


def sinkhorn_stabilized(
    a, b, M, reg, numItermax=1000, tau=1e3, stopThr=1e-9, warmstart=None, verbose=False, print_period=20, log=False, warn=True, **kwargs
):
    """POT's `ot.bregman.sinkhorn_stabilized`. `tau` is accepted and not needed: absorption here follows the precision itself.

    `warmstart` and `log` hold alpha, beta = reg log(u), reg log(v).
    """
    options = (numItermax, stopThr, verbose, log, warn, warmstart)
    return run("sinkhorn_stabilized", a, b, M, reg, *options, print_period=print_period, **kwargs)


def sinkhorn_epsilon_scaling(
    a, b, M, reg, numItermax=100, epsilon0=1e4, numInnerItermax=100, tau=1e3, stopThr=1e-9, warmstart=None, verbose=False, print_period=10,
    log=False, warn=True, **kwargs,
):  # fmt: skip
    """POT's `ot.bregman.sinkhorn_epsilon_scaling`: one iteration at each reg from `epsilon0` down, then at `reg` until the plan is there.

    numItermax, numInnerItermax   their product limits the iterations. POT runs 35 stages whatever `numItermax` says.
    `tau` is accepted and not needed. `log` holds err, niter, alpha, beta, warmstart.
    """
    options = (numItermax, stopThr, verbose, log, warn, warmstart)
    return run("sinkhorn_epsilon_scaling", a, b, M, reg, *options, numInnerItermax=numInnerItermax, epsilon0=epsilon0, **kwargs)


def greenkhorn(a, b, M, reg, numItermax=10000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None):
    """POT's `ot.bregman.greenkhorn`: the plan it converges to, in at most `numItermax` iterations of `sinkhorn`. `log` holds u, v, n_iter.

    Greedy updates of single entries would be serial; full sweeps run in parallel.
    """
    return run("greenkhorn", a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart)


def screenkhorn(
    a, b, M, reg, ns_budget=None, nt_budget=None, uniform=False, restricted=True, maxiter=10000, maxfun=10000, pgtol=1e-09, verbose=False,
    log=False,
):  # fmt: skip
    """POT's `ot.bregman.screenkhorn`, of mass 1, with every point kept: the plan that screening approximates.

    POT fixes the scalings of all but `ns_budget` and `nt_budget` points, which costs accuracy in the marginals. Full sweeps are cheaper
    here than its L-BFGS-B. `maxiter` and `pgtol` limit the iterations; the other settings are accepted and not needed. `log` holds
    u, v with P = u exp(-M / reg) v, and Isel, Jsel, which are all True.

    Alaya et al. 2019, arXiv:1906.08540.
    """
    done = solve_balanced(a, b, M, reg, METHODS["sinkhorn"], maxiter, pgtol, verbose, True, None)
    mass = done.solution.transport_mass
    result = done.give(done.solution.plan.to_dense() / mass)
    if not log:
        return result
    u, v = done.solution.problem.a, done.solution.problem.b
    kept = {name: done.back(torch.ones_like(w, dtype=torch.bool)) for name, w in (("Isel", u), ("Jsel", v))}
    return result, {**done.scalings(mass), **kept, **done.report()}


def sinkhorn(a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=True, warmstart=None, **kwargs):
    """Entropic optimal transport plan: `ot.sinkhorn`, on the device of its tensors, without underflow.

    Minimises <P, M> + reg sum P log P over plans P >= 0 with marginals a and b.

    a          weights (n,), an array, tensor or list; empty or None is uniform.
    b          weights (m,), or (m, k) for k problems with the same a and M.
    M          costs (n, m); +inf forbids a pair. A gpu_ot.Cost, as SqEuclidean(x, y), is never made an n-by-m array.
    reg        > 0, in units of M; a 0-d tensor may carry a gradient.
    method     "sinkhorn", "sinkhorn_log", "sinkhorn_stabilized", "sinkhorn_epsilon_scaling" or "greenkhorn": one solver, five logs.
    numItermax, stopThr   stop when the columns' marginals are within `stopThr` (Euclidean norm), checked every 10 iterations.
    warmstart  (log u, log v) of an earlier call.
    accelerate   (keyword) None: POT's iterations for the first 1000, accelerated ones after that. False: never. True: at once.
                 With a gradient, which goes through the iterations: never.

    Returns the plan (n, m), a lazy one for a Cost, or the losses <P_k, M> (k,) of k histograms, in the kind, type and device of the
    inputs. With `log=True` also POT's dictionary, plus `status`, `converged`, `n_iter` and `errors`. Differentiable in a, b, M and reg.
    Warns with the reason when the loop stopped short. Raises ProblemError for input that has no answer.

    Cuturi 2013, arXiv:1306.0895; Schmitzer 2019, arXiv:1610.06519.
    """
    return run(known_method(method, METHODS), a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, **kwargs)


def sinkhorn2(
    a, b, M, reg, method="sinkhorn", numItermax=1000, stopThr=1e-9, verbose=False, log=False, warn=False, warmstart=None, **kwargs
):
    """The transport cost <P, M> of the plan of `sinkhorn`, without the entropy: `ot.sinkhorn2`.

    Returns a 0-d result, or (k,) for k histograms; otherwise as `sinkhorn`, but silent unless `warn=True`.
    """
    among = [name for name in METHODS if name not in ("sinkhorn_epsilon_scaling", "greenkhorn")]  # as in POT
    return run(known_method(method, among), a, b, M, reg, numItermax, stopThr, verbose, log, warn, warmstart, True, **kwargs)


__getattr__, __dir__ = forward(__name__, "ot.bregman")
