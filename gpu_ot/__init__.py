"""Differentiable optimal transport that stays on the device: log-domain Sinkhorn, and a drop-in for POT's."""

from .backends import explain
from .costs import Cosine, Cost, Dot, Euclidean, Formula, Matrix, SqEuclidean
from .errors import BackendError, NotConverged, ProblemError
from .penalties import KL, TV
from .pot import bregman
from .pot.bregman import sinkhorn, sinkhorn2
from .problem import Problem
from .schedule import Anneal, Constant
from .solution import Plan, Solution, Status
from .solve import solve

__version__ = "0.1.0"

__all__ = [
    "KL",
    "TV",
    "Anneal",
    "BackendError",
    "Constant",
    "Cosine",
    "Cost",
    "Dot",
    "Euclidean",
    "Formula",
    "Matrix",
    "NotConverged",
    "Plan",
    "Problem",
    "ProblemError",
    "Solution",
    "SqEuclidean",
    "Status",
    "bregman",
    "explain",
    "sinkhorn",
    "sinkhorn2",
    "solve",
]
