"""Differentiable optimal transport that stays on the device: log-domain Sinkhorn, and in `gpu_ot.pot` a drop-in for POT."""

from . import pot
from .assign import assign
from .barycenter import Barycenter, barycenter, free_barycenter
from .costs import Cosine, Cost, Dot, Euclidean, Formula, Grid, Lazy, Matrix, SqEuclidean, Sum
from .distributed.checkpoint import Checkpoint
from .distributed.costs import Sharded
from .errors import BackendError, NotConverged, ProblemError, RankFailed
from .geometry.select import explain
from .gromov import Gromov, gromov
from .initial import gaussian_potentials, sorted_potentials
from .losses.divergence import Divergence, SelfTerm, divergence, self_term
from .losses.samples import SamplesLoss
from .losses.sinkhorn import SinkhornLoss
from .low_rank import LowRank, low_rank
from .penalties import KL, TV
from .pot.batch import (
    bregman_log_projection_batch,
    bregman_projection_batch,
    dist_batch,
    loss_linear_batch,
    loss_linear_samples_batch,
    solve_batch,
    solve_sample_batch,
)
from .pot.bregman import (
    empirical_sinkhorn,
    empirical_sinkhorn2,
    empirical_sinkhorn_divergence,
    greenkhorn,
    screenkhorn,
    sinkhorn,
    sinkhorn2,
    sinkhorn_epsilon_scaling,
    sinkhorn_knopp,
    sinkhorn_log,
    sinkhorn_stabilized,
)
from .pot.forwarding import Ours, missing
from .pot.patching import patch
from .pot.solvers import OTResult, dist, solve_sample
from .pot.unbalanced import (
    sinkhorn_knopp_unbalanced,
    sinkhorn_stabilized_unbalanced,
    sinkhorn_unbalanced,
    sinkhorn_unbalanced2,
    sinkhorn_unbalanced_translation_invariant,
)
from .problem import Problem
from .soft import soft_quantile, soft_rank, soft_sort, soft_topk
from .solution.plan import Plan
from .solution.solution import Solution
from .solve import solve
from .solver.annealing import Anneal, Constant
from .solver.status import Status

__version__ = "0.1.0"

bregman, unbalanced = Ours("gpu_ot.bregman", pot.bregman), Ours("gpu_ot.unbalanced", pot.unbalanced)
__getattr__ = missing("gpu_ot", "gpu_ot.pot")

__all__ = [
    "KL",
    "TV",
    "Anneal",
    "BackendError",
    "Barycenter",
    "Checkpoint",
    "Constant",
    "Cosine",
    "Cost",
    "Divergence",
    "Dot",
    "Euclidean",
    "Formula",
    "Grid",
    "Gromov",
    "Lazy",
    "LowRank",
    "Matrix",
    "NotConverged",
    "OTResult",
    "Plan",
    "Problem",
    "ProblemError",
    "RankFailed",
    "SamplesLoss",
    "SelfTerm",
    "Sharded",
    "SinkhornLoss",
    "Solution",
    "SqEuclidean",
    "Status",
    "Sum",
    "assign",
    "barycenter",
    "bregman",
    "bregman_log_projection_batch",
    "bregman_projection_batch",
    "dist",
    "dist_batch",
    "divergence",
    "empirical_sinkhorn",
    "empirical_sinkhorn2",
    "empirical_sinkhorn_divergence",
    "explain",
    "free_barycenter",
    "gaussian_potentials",
    "greenkhorn",
    "gromov",
    "loss_linear_batch",
    "loss_linear_samples_batch",
    "low_rank",
    "patch",
    "pot",
    "screenkhorn",
    "self_term",
    "sinkhorn",
    "sinkhorn2",
    "sinkhorn_epsilon_scaling",
    "sinkhorn_knopp",
    "sinkhorn_knopp_unbalanced",
    "sinkhorn_log",
    "sinkhorn_stabilized",
    "sinkhorn_stabilized_unbalanced",
    "sinkhorn_unbalanced",
    "sinkhorn_unbalanced2",
    "sinkhorn_unbalanced_translation_invariant",
    "soft_quantile",
    "soft_rank",
    "soft_sort",
    "soft_topk",
    "solve",
    "solve_batch",
    "solve_sample",
    "solve_sample_batch",
    "sorted_potentials",
    "unbalanced",
]
