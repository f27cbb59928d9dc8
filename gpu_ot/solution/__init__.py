"""The result of a solve."""

from .plan import Plan
from .solution import Solution

__all__ = ["Plan", "Solution"]
