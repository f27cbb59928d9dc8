"""Gromov-Wasserstein between spaces given by matrices or by points."""

from .outer import gromov
from .result import Gromov

__all__ = ["Gromov", "gromov"]
