"""Gromov-Wasserstein between spaces given by matrices or by points."""

from .outer import Gromov, gromov

__all__ = ["Gromov", "gromov"]
