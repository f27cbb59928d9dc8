"""The drop-in: `import gpu_ot.pot as ot` has every name of POT's, ours where we have it and otherwise POT's own, if POT is installed."""

# ruff: noqa: F401

from . import batch, bregman, gromov, lowrank, partial, solvers, unbalanced
from .batch import dist_batch, solve_batch, solve_sample_batch
from .bregman import barycenter, sinkhorn, sinkhorn2
from .forwarding import forward
from .lowrank import lowrank_sinkhorn
from .solvers import dist, solve, solve_sample
from .unbalanced import barycenter_unbalanced, sinkhorn_unbalanced, sinkhorn_unbalanced2

__getattr__, __dir__ = forward(__name__, "ot")
