from .solution import Plan, Solution

__all__ = ["Plan", "Solution"]
