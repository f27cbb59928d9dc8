"""Pictures hold the numbers that they say they do."""

import subprocess
import sys

import pytest
import torch

import gpu_ot
from gpu_ot import Plan, Problem, ProblemError, SqEuclidean, plots
from problems import close, measures, weights

matplotlib = pytest.importorskip("matplotlib")
matplotlib.use("Agg")
plt = pytest.importorskip("matplotlib.pyplot")


@pytest.fixture(autouse=True)
def _closed():
    yield
    plt.close("all")


def clouds(n, m, batch=()):
    return measures(n, m, 2, batch, shift=0.0)[:2]


def solved(n=30, m=40, batch=()):
    return gpu_ot.solve(Problem(SqEuclidean(*clouds(n, m, batch)), 0.01, weights(n)), tol=1e-6)


def test_the_curve_is_the_errors():
    found = solved()
    ax = plots.convergence(found, tol=1e-6)
    curve, tolerance = ax.get_lines()
    assert list(curve.get_ydata()) == found.errors.tolist() and list(tolerance.get_ydata()) == [1e-6, 1e-6]
    assert ax.get_yscale() == "log"
    assert ax.get_title() == f"converged: {found.n_iter} iterations, {found.n_sweeps} sweeps over the pairs"
    assert ax.get_xlabel() and ax.get_ylabel()


def test_batches_get_lines_or_a_band():
    few, many = solved(batch=(3,)), solved(5, 6, batch=(2, 6))
    assert len(plots.convergence(few).get_lines()) == 3
    ax = plots.convergence(many)
    assert len(ax.get_lines()) == 1 and len(ax.collections) == 1
    top = ax.collections[0].get_paths()[0].vertices[:, 1].max()
    assert top == pytest.approx(float(many.errors.max()))


def test_an_error_of_zero_is_drawn():
    x, _ = clouds(1, 1)
    ax = plots.convergence(gpu_ot.solve(Problem(SqEuclidean(x, x + 1), 0.1)))
    assert all(y > 0 for line in ax.get_lines() for y in line.get_ydata())
    ax.figure.canvas.draw()


def steps(ax):
    return ax.patches[0].get_data().values


def test_the_heat_map_is_the_plan():
    found = solved()
    ax = plots.plan(found)
    P = found.plan.to_dense()
    close(ax.images[0].get_array().data ** 2, P, rtol=1e-6, atol=1e-15)
    for side, masses in zip(ax.child_axes, (P.sum(0), P.sum(1)), strict=True):
        close(steps(side), masses, rtol=1e-9)
    ax.figure.canvas.draw()


@pytest.mark.parametrize("numbers", [plots.NUMBERS, 1])
def test_large_plans_are_averaged_without_being_formed(numbers, monkeypatch):
    monkeypatch.setattr(plots, "CELLS", 8)
    monkeypatch.setattr(plots, "NUMBERS", numbers)  # 1: one group of columns a sweep
    found = solved(30, 17)
    P = found.plan.to_dense()
    monkeypatch.setattr(Plan, "to_dense", lambda self: pytest.fail("formed the plan"))
    widths = []
    product = Plan.__matmul__
    monkeypatch.setattr(Plan, "__matmul__", lambda self, v: widths.append(v.shape[-1]) or product(self, v))
    ax = plots.plan(found)
    assert max(widths) == (6 if numbers > 1 else 1)
    expected = [[float(block.mean()) for block in rows.split(3, 1)] for rows in P.split(4, 0)]
    close(ax.images[0].get_array().data ** 2, expected, rtol=1e-6, atol=1e-15)
    assert tuple(ax.images[0].get_extent()) == (0, 18, 32, 0) and ax.get_xlim() == (0, 17) and ax.get_ylim() == (30, 0)
    close(steps(ax.child_axes[1]), [float(rows.sum(1).mean()) for rows in P.split(4)], rtol=1e-9)


def test_lines_join_the_heaviest_pairs():
    x, y = clouds(12, 15)
    found = gpu_ot.solve(Problem(SqEuclidean(x, y), 1e-3), tol=1e-9)
    ax = plots.matching(x, y, found, k=10)
    lines = ax.collections[0]
    P = found.plan.to_dense()
    segments = lines.get_segments()
    assert len(segments) == 10
    masses = []
    for (start, end), colour in zip(segments, lines.get_colors(), strict=True):
        i = int((x - torch.as_tensor(start)).square().sum(-1).argmin())
        j = int((y - torch.as_tensor(end)).square().sum(-1).argmin())
        assert (x[i].numpy() == start).all() and (y[j].numpy() == end).all()
        masses.append((float(P[i, j]), float(colour[3])))
    assert sum(mass for mass, _ in masses) > 0.8 * float(P.flatten().topk(10).values.sum())
    assert max(masses)[1] > min(masses)[1]
    again = plots.matching(x, y, found, k=10).collections[0].get_segments()
    assert all((one == other).all() for one, other in zip(segments, again, strict=True))
    ax.figure.canvas.draw()


def test_axes_given_are_drawn_on():
    found = solved()
    figure, axes = plt.subplots(1, 3)
    drawn = plots.convergence(found, axes[0]), plots.plan(found, axes[1]), plots.matching(*clouds(30, 40), found, ax=axes[2])
    assert list(drawn) == list(axes) and plt.get_fignums() == [figure.number]


def test_misuse_is_refused():
    x, y = clouds(30, 40)
    for draw in (plots.plan, lambda found: plots.matching(x, y, found)):
        with pytest.raises(ProblemError, match=r"\(2, 30, 40\), expected \(n, m\): one problem"):
            draw(solved(batch=(2,)))
    with pytest.raises(ProblemError, match=r"y has shape \(39, 2\), expected \(40, 2\)"):
        plots.matching(x, y[:39], solved())


def test_matplotlib_is_asked_for_only_when_drawing():
    code = (
        "import sys; sys.modules['matplotlib'] = None; import torch, gpu_ot; from gpu_ot import plots;"
        "plots.convergence(gpu_ot.solve(gpu_ot.Problem(torch.rand(3, 4), 0.1)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "ImportError: gpu_ot.plots draws with matplotlib, which is not installed: pip install matplotlib" in done.stderr
