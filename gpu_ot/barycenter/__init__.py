"""Barycentres: the measure with the smallest weighted sum of transport values to others, on a fixed support or on points that move."""

from .fixed import barycenter
from .free import free_barycenter
from .result import Barycenter

__all__ = ["Barycenter", "barycenter", "free_barycenter"]
