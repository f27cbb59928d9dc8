"""Pictures of a solution: its convergence, the plan with its marginals, and the matched points.

Each function draws on `ax`, or on a new figure, and returns the Axes. matplotlib is imported on the first call.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from . import errors
from .solution.solution import Solution

if TYPE_CHECKING:
    from matplotlib.axes import Axes

#: Colour-blind readers can distinguish these. Okabe and Ito 2008.
BLUE, ORANGE, GREY = "#0072B2", "#D55E00", "#595959"
LINES = (BLUE, ORANGE, "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
LARGE, SMALL = 12, 10  # points
#: Most cells on a side of a heat-map, and most numbers that one sweep for it returns.
CELLS, NUMBERS = 512, 2**25


def convergence(solution: Solution, ax: Axes | None = None, tol: float | None = None) -> Axes:
    """The marginal errors at each check, on a logarithmic scale, in the unit of the stopping rule. The title says how the loop ended.

    tol  the tolerance, drawn as a line.

    Up to 7 problems of a batch get a line each. More are drawn as a band that contains all, with their median.
    """
    axes = _axes(ax, (6.0, 4.0))
    found = solution.errors.detach().cpu().double()
    least = found[found > 0].min() if bool((found > 0).any()) else 1e-300
    lines = found.reshape(len(found), -1).clamp(min=float(least)).numpy()  # an error of 0 has no logarithm
    checks, several = range(1, len(lines) + 1), lines.shape[1] > 1
    if lines.shape[1] <= len(LINES):
        for k, (line, colour) in enumerate(zip(lines.T, LINES, strict=False)):
            axes.plot(checks, line, color=colour, marker="." if len(checks) < 50 else None, label=f"problem {k}" if several else None)
    else:
        axes.fill_between(checks, lines.min(1), lines.max(1), color=BLUE, alpha=0.25, label=f"all {lines.shape[1]} problems")
        axes.plot(checks, np.median(lines, 1), color=BLUE, label="median")
    if tol is not None:
        axes.axhline(tol, color=GREY, linestyle="--", label=f"tolerance {tol:g}")
    if axes.get_legend_handles_labels()[0]:
        axes.legend(fontsize=SMALL)
    axes.set_yscale("log")
    axes.grid(True, alpha=0.3)
    _label(axes, "check of the error", "marginal error")
    axes.set_title(f"{solution.status.name}: {solution.n_iter} iterations, {solution.n_sweeps} sweeps over the pairs", fontsize=LARGE)
    return axes


def plan(solution: Solution, ax: Axes | None = None) -> Axes:
    """The plan as a heat-map, darker for more mass, with its row sums at the right and its column sums on top.

    More than 512 rows or columns are averaged in groups of neighbours, by sweeps that return some groups of columns at a time: there is
    no n-by-m array. Raises ProblemError for a batch.
    """
    _one_problem(solution)
    axes = _axes(ax, (6.5, 6.0))
    n, m = solution.shape
    sums, rows, columns = (z.numpy() for z in _groups(solution))
    P = sums / (rows[:, None] * columns)
    edges = [np.arange(len(sizes) + 1.0) * sizes[0] for sizes in (rows, columns)]
    axes.imshow(np.sqrt(P), cmap="Blues", aspect="auto", extent=(0, edges[1][-1], edges[0][-1], 0), interpolation="nearest")
    axes.set_xlim(0, m)
    axes.set_ylim(n, 0)
    _label(axes, f"target point j, of {m}", f"source point i, of {n}")
    top, side = axes.inset_axes((0, 1.02, 1, 0.18)), axes.inset_axes((1.02, 0, 0.18, 1))
    per_column, per_row = sums.sum(0) / columns, sums.sum(1) / rows
    top.stairs(per_column, edges[1], fill=True, color=ORANGE)
    side.stairs(per_row, edges[0], fill=True, color=ORANGE, orientation="horizontal")
    top.set_xlim(0, m)
    side.set_ylim(n, 0)
    top.tick_params(labelsize=SMALL, labelbottom=False)
    side.tick_params(labelsize=SMALL, labelleft=False, bottom=False, labelbottom=False, top=True, labeltop=True)
    top.spines[["top", "right"]].set_visible(False)
    side.spines[["bottom", "right"]].set_visible(False)
    for ticks, highest in ((top.yaxis, per_column.max()), (side.xaxis, per_row.max())):
        ticks.set_ticks([float(highest)], [f"{float(highest):.2g}"])
    top.set_ylabel("column sum", fontsize=SMALL)
    side.set_xlabel("row sum", fontsize=SMALL)
    side.xaxis.set_label_position("top")
    averaged = "" if (n, m) == P.shape else f", means of {int(rows[0])} by {int(columns[0])} points"
    top.set_title(f"mass {float(sums.sum()):.4g}{averaged}; shade: square root", fontsize=LARGE)
    return axes


def matching(x: Tensor, y: Tensor, solution: Solution, k: int = 200, ax: Axes | None = None) -> Axes:
    """The clouds x (n, 2) and y (m, 2), and lines between up to k of the pairs with the most mass, more opaque for more of it.

    These are the pairs drawn most often among 20 k draws from the plan, the same at each call. The size of a point shows its weight.
    Raises ProblemError for a batch, for clouds that are not in the plane, and for clouds of other sizes than the solution's.
    """
    _one_problem(solution)
    for name, z, size in (("x", x, solution.shape[0]), ("y", y, solution.shape[1])):
        if z.shape != (size, 2):
            raise errors.wrong_shape(name, z.shape, f"({size}, 2): points in the plane, as many as in the solution")
    axes = _axes(ax, (6.0, 6.0))
    from matplotlib.collections import LineCollection
    from matplotlib.colors import to_rgba

    m = solution.shape[1]
    generator = torch.Generator(solution.f.device).manual_seed(0)
    rows, columns = solution.plan.sample(20 * k, generator)
    pairs, counts = torch.unique(rows * m + columns, return_counts=True)
    heaviest = counts.topk(min(k, len(counts))).indices
    rows, columns = pairs[heaviest] // m, pairs[heaviest] % m
    x, y = x.detach(), y.detach()
    segments = torch.stack((x[rows], y[columns]), 1).cpu().numpy()
    opacity = (counts[heaviest] / counts.max()).clamp(min=0.05).tolist()
    axes.add_collection(LineCollection(list(segments), colors=[(*to_rgba(GREY)[:3], alpha) for alpha in opacity], linewidths=1.2, zorder=1))
    for name, z, w, colour, marker in (("x", x, solution.problem.a, BLUE, "o"), ("y", y, solution.problem.b, ORANGE, "^")):
        sizes = 30 * w.detach() / w.detach().mean()
        axes.scatter(
            *z.T.cpu(), s=sizes.cpu(), color=colour, marker=marker, label=f"{name}, {len(z)} points", zorder=2, alpha=0.9, linewidths=0
        )
    axes.legend(fontsize=SMALL)
    axes.set_aspect("equal", adjustable="datalim")
    _label(axes, "first coordinate", "second coordinate")
    shown = int(counts[heaviest].sum()) / (20 * k)
    axes.set_title(f"{len(heaviest)} heaviest pairs, about {100 * shown:.0f} % of the mass", fontsize=LARGE)
    return axes


def _groups(solution: Solution) -> tuple[Tensor, Tensor, Tensor]:
    """The plan summed over groups of neighbours, at most CELLS a side, and the number of rows and columns of each group; on the host."""
    (n, m), plan = solution.shape, solution.plan
    lengths = [-(-size // CELLS) for size in (n, m)]
    row_of, column_of = (torch.arange(size, device=solution.f.device) // length for size, length in zip((n, m), lengths, strict=True))
    rows, columns = row_of.bincount(), column_of.bincount()
    cells = solution.f.new_zeros(len(rows), len(columns))
    step = max(1, NUMBERS // (n + m))
    for j in range(0, len(columns), step):
        groups = torch.arange(j, min(j + step, len(columns)), device=cells.device)
        summed = plan @ (column_of.unsqueeze(-1) == groups).to(cells)
        cells[:, j : j + step].index_add_(0, row_of, summed.to(cells))
    return cells.cpu(), rows.cpu(), columns.cpu()


def _one_problem(solution: Solution) -> None:
    if len(solution.shape) > 2:
        raise errors.wrong_shape("the plan", solution.shape, "(n, m): one problem, solve the one to be shown on its own")


def _axes(ax: Axes | None, size: tuple[float, float]) -> Any:
    try:
        import matplotlib.pyplot as plt
    except ImportError as missing:
        raise ImportError("gpu_ot.plots draws with matplotlib, which is not installed: pip install matplotlib") from missing
    return plt.subplots(figsize=size, layout="constrained")[1] if ax is None else ax


def _label(ax: Any, x: str, y: str) -> None:
    ax.set_xlabel(x, fontsize=LARGE)
    ax.set_ylabel(y, fontsize=LARGE)
    ax.tick_params(labelsize=SMALL)
