"""What it costs to move a unit of mass from x_i to y_j: the protocol, and the kinds of cost that come with it."""

from ..communicator import COLUMNS, ROWS
from .base import Axis, Cost, Folded, Index, Points
from .clouds import Cosine, Dot, Euclidean, Formula, SqEuclidean
from .grid import Grid
from .lazy_tensor import Lazy
from .matrix import Matrix
from .scale import SCALES
from .sum import Sum

__all__ = ["COLUMNS", "ROWS", "SCALES", "Axis", "Cosine", "Cost", "Dot", "Euclidean", "Folded", "Formula", "Grid", "Index", "Lazy"]
__all__ += ["Matrix", "Points", "SqEuclidean", "Sum"]
