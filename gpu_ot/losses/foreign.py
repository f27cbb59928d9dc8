"""Other packages' names of settings, for callers who come from there: what each is called here."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import ProblemError

#: Setting -> (whose it is, what to write instead). flash-sinkhorn's SamplesLoss, OTT's Geometry and Sinkhorn.
KNOWN = {
    "half_cost": ("flash-sinkhorn", "costs are |x - y|^p / p, its half_cost=True; for |x - y|^2 pass cost=gpu_ot.SqEuclidean"),
    "eps": ("flash-sinkhorn", "pass blur = eps ** (1 / p): eps is blur ** p"),
    "epsilon": ("OTT", "pass blur = epsilon ** (1 / p) to SamplesLoss, eps = epsilon to Problem and SinkhornLoss"),
    "n_iters": ("flash-sinkhorn", "pass max_iter, the most that a solve may take, and tol, at which it stops"),
    "max_iterations": ("OTT", "pass max_iter"),
    "min_iterations": ("OTT", "leave it out: a solve stops when tol is met"),
    "inner_iterations": ("OTT", "pass check_every to gpu_ot.solve"),
    "threshold": ("OTT and flash-sinkhorn", "pass tol, the L1 error of the marginals as a fraction of the mass"),
    "reach_x": ("flash-sinkhorn", "pass penalties=(KL(reach_x ** p), KL(reach_y ** p)) to a Problem: reach holds for both sides"),
    "reach_y": ("flash-sinkhorn", "pass penalties=(KL(reach_x ** p), KL(reach_y ** p)) to a Problem: reach holds for both sides"),
    "tau_a": ("OTT", "pass tau = eps t / (1 - t) for its t, to KL or as tau of SinkhornLoss"),
    "tau_b": ("OTT", "pass tau = eps t / (1 - t) for its t, to KL or as tau of SinkhornLoss"),
    "allow_tf32": ("flash-sinkhorn", 'pass precision="tf32" to gpu_ot.solve; a loss computes in the type of its points'),
    "use_epsilon_scaling": ("flash-sinkhorn", 'leave it out: accelerate="auto" anneals where it pays'),
    "lse_mode": ("OTT", "leave it out: all solves are in the log domain"),
    "momentum": ("OTT", "leave it out: accelerate names the ways to accelerate"),
    "anderson": ("OTT", 'pass accelerate="mixing" to gpu_ot.solve'),
    "implicit_diff": ("OTT", 'pass grad="implicit"'),
    "reg": ("POT", "pass eps to Problem and SinkhornLoss, blur = reg ** (1 / p) to SamplesLoss"),
    "reg_m": ("POT", "pass tau to KL or SinkhornLoss, reach = reg_m ** (1 / p) to SamplesLoss"),
    "numItermax": ("POT", "pass max_iter"),
    "stopThr": ("POT", "pass tol"),
}  # fmt: skip


def refuse(door: str, settings: Iterable[str]) -> None:
    """Raises ProblemError for settings that `door` does not have, with what they are called here."""
    unknown = list(settings)
    if not unknown:
        return
    said = [f"{name} is {KNOWN[name][0]}'s: {KNOWN[name][1]}." if name in KNOWN else f"{name} is not known." for name in unknown]
    raise ProblemError(f"{door} has no {', '.join(unknown)}. {' '.join(said)}")
