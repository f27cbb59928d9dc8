"""The numbers of the mesh, which machine code and operations of torch share."""

#: Nodes along an axis of a tile and of a cell, whose points share a tilt; those that a cell's points reach; the variance of a B-spline.
TILE, CELL, WINDOW, BETA = 8, 4, 8, 1 / 3
#: Largest tilt, e-folds a node: points then move by at most 4 nodes, and stay within their window.
STEEPEST = 12.0
#: The middle of a window.
MIDDLE = (WINDOW - 1) / 2
