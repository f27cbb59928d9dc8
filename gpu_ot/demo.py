"""`gpu-ot demo`: two photographs exchange their colours through one plan. A table compares POT's numbers for a plan between samples."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ot
import torch
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from sklearn.datasets import load_sample_images
from threadpoolctl import threadpool_limits
from torch import Tensor
from tqdm import tqdm

import gpu_ot

from . import errors
from .errors import ProblemError

#: The same for all four solvers; `TOLERANCE` is POT's stopThr, the Euclidean norm of the column marginal's error.
MAX_ITER, TOLERANCE = 2000, 1e-6
#: L1 error of the marginals between all pixels, as a part of the mass: no shade of 256 shows it.
EVERY_PIXEL_TOL = 1e-2
#: Numbers in the largest array of the map, some pixels by all samples: 32 MiB in float32.
CHUNK = 2**23
#: Rows and columns in the picture's close-up of the plan.
ZOOM = 60
#: Brightness of linear RGB, ITU-R BT.709; good enough to sort by.
LUMINANCE = (0.2126, 0.7152, 0.0722)


def run(*, device: str, pixels: int, reg: float, out: str) -> None:
    """Solve between `pixels` colours of each photograph and print the table; recolour both photographs, by the plan between all of their
    pixels where the mesh serves, else by that of the sample, and write the PNG.

    device   where gpu_ot runs; POT runs in numpy.
    reg      > 0, in units of the cost, the squared distance in RGB with channels in [0, 1].
    out      the PNG; its folder is created.

    Raises ProblemError, naming the option and the way out, before any work is done.
    """
    where, path = _device(device), Path(out)
    if not 0 < reg < math.inf:
        raise errors.bad_eps("--reg", reg)
    china, flower = photographs()
    largest = min(len(p.reshape(-1, 3)) for p in (china, flower))
    if not 2 <= pixels <= largest:
        raise ProblemError(f"--pixels must be between 2 and {largest}, the size of the photographs, found {pixels}. 800 are plenty.")
    _make_room(path)

    generator = torch.Generator().manual_seed(0)
    x, y = sample(china, pixels, generator), sample(flower, pixels, generator)
    C = torch.cdist(x, y, compute_mode="donot_use_mm_for_euclid_dist").square()
    entries = compare(C, reg, where)
    print(table(entries, C, reg))

    _, _, ours, _ = entries
    painted = every_pixel(china, flower, reg, where)
    if painted is None:
        with tqdm(total=2 * largest, desc="recolouring", unit="px", unit_scale=True) as bar:
            painted = [
                recolour(china, y, ours.log["log_v"], reg, where, bar),
                recolour(flower, x, ours.log["log_u"], reg, where, bar),
            ]
    draw(path, (china, flower), painted, (x, y), ours.plan, reg)
    print(f"wrote {path}")


def photographs() -> tuple[Tensor, Tensor]:
    """china and flower, (427, 640, 3) in [0, 1], float64: files inside scikit-learn."""
    china, flower = (torch.tensor(image, dtype=torch.float64) / 255 for image in load_sample_images().images)
    return china, flower


def sample(photo: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """(size, 3) colours of as many different pixels."""
    colours = photo.reshape(-1, 3)
    return colours[torch.randperm(len(colours), generator=generator)[:size]]


@dataclass(frozen=True)
class Entry:
    """One solver's answer. `plan` is (n, n) in float64 on the host; `ended` is the solver's report of how its loop ended."""

    solver: str
    seconds: float
    plan: Tensor
    log: dict[str, Any]
    ended: str

    @property
    def marginal_error(self) -> float:
        """|P1 - a|_1 + |P^T 1 - b|_1 for uniform weights."""
        return sum(float((self.plan.sum(axis) - 1 / len(self.plan)).abs().sum()) for axis in (0, 1))


def compare(C: Tensor, reg: float, device: torch.device) -> list[Entry]:
    """POT `sinkhorn` and `sinkhorn_log` in numpy, ours in fp64 and fp32 on `device`: the same call, the same tolerance, one CPU thread."""
    a = torch.full((len(C),), 1 / len(C), dtype=C.dtype)
    host = a.numpy(), C.numpy()
    double, single = ((a.to(device, dtype), C.to(device, dtype)) for dtype in (torch.float64, torch.float32))
    contestants: list[tuple[str, Callable[..., Any], str, tuple[Any, Any]]] = [
        ("POT sinkhorn", ot.sinkhorn, "sinkhorn", host),
        ("POT sinkhorn_log", ot.sinkhorn, "sinkhorn_log", host),
        (f"gpu_ot fp64, {device}", gpu_ot.sinkhorn, "sinkhorn_log", double),
        (f"gpu_ot fp32, {device}", gpu_ot.sinkhorn, "sinkhorn_log", single),
    ]
    entries = []
    # At this size a second thread gains nothing, and on a busy computer waiting for it can cost a hundredfold.
    with tqdm(contestants, unit="solver") as bar, threadpool_limits(1):
        for name, solver, method, (weights, costs) in bar:
            bar.set_description(name)
            entries.append(_timed(name, solver, weights, costs, reg, method))
    return entries


def _timed(name: str, solver: Callable[..., Any], a: Any, C: Any, reg: float, method: str) -> Entry:
    options = dict(method=method, stopThr=TOLERANCE, log=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        solver(a, a, C, reg, numItermax=1, warn=False, **options)  # loads libraries and kernels, off the clock
        caught.clear()
        start = time.perf_counter()
        plan, log = solver(a, a, C, reg, numItermax=MAX_ITER, **options)
        plan = torch.as_tensor(plan).double().cpu()  # also waits for the device
        seconds = time.perf_counter() - start
    # POT has no status, only warnings: the first sentence of each, once.
    sentences = dict.fromkeys(str(w.message).removeprefix("Warning: ").partition(". ")[0] for w in caught)
    warned = "warned: " + "; ".join(sentences) if sentences else "no warning"
    return Entry(name, seconds, plan, log, log["status"].name if "status" in log else warned)


def table(entries: list[Entry], C: Tensor, reg: float) -> str:
    """One line a solver. Plans are compared with that of POT's `sinkhorn_log`, the most accurate of POT's own."""
    truth = entries[1].plan
    lines = [
        f"{len(C)} pixels of each photograph, uniform weights; squared RGB distance, largest {float(C.max()):.2f}; reg = {reg:g}.",
        f"All: one CPU thread, at most {MAX_ITER} iterations, stopping at a column error of {TOLERANCE:g} (Euclidean norm).",
        f"Plan difference: largest entry of |P - P'|, P' from POT's sinkhorn_log, whose own largest entry is {float(truth.max()):.1e}.",
        "",
        f"{'solver':<20}{'seconds':>8}{'iterations':>12}{'marginal error':>16}{'plan difference':>17}  ended",
    ]
    for entry in entries:
        difference = "reference" if entry.plan is truth else f"{float((entry.plan - truth).abs().max()):.1e}"
        iterations = entry.log["niter"] + 1  # POT counts from 0
        numbers = f"{entry.seconds:>8.2f}{iterations:>12}{entry.marginal_error:>16.1e}{difference:>17}"
        lines.append(f"{entry.solver:<20}{numbers}  {entry.ended}")
    return "\n".join(lines)


def extend(x: Tensor, y: Tensor, log_v: Tensor, reg: float) -> Tensor:
    """(k, 3) colours -> the (k, 3) colours they become: T(x) = sum_j w_j y_j, w_j proportional to v_j exp(-|x - y_j|^2 / reg).

    Here v_j = b_j exp(g_j / reg). At a sampled x_i the weights are row i of the plan, u_i exp(-C_ij / reg) v_j, divided by its sum, so
    T(x_i) is the barycentric map (P y)_i / (P 1)_i. u_i cancels, so the formula holds for pixels that were not sampled, too.

    Seguy et al. 2018, arXiv:1711.02283; Pooladian & Niles-Weed 2021, arXiv:2109.12004 (the entropic map).
    """
    # |x|^2 is the same for all j and cancels in the softmax, which leaves one matrix product.
    return torch.addmm(log_v - y.square().sum(-1) / reg, x, y.T, alpha=2 / reg).softmax(-1) @ y


def every_pixel(china: Tensor, flower: Tensor, reg: float, device: torch.device) -> list[Tensor] | None:
    """Both photographs in the colours of the other, by one plan between all of their pixels; None where the mesh does not serve, such as
    on a GPU or for a tiny reg."""
    x, y = (photo.reshape(-1, 3).to(device) for photo in (china, flower))
    problem, start = gpu_ot.Problem(gpu_ot.SqEuclidean(x, y), reg), time.perf_counter()
    try:
        solution = gpu_ot.solve(problem, tol=EVERY_PIXEL_TOL, backend="mesh")
    except gpu_ot.BackendError:
        return None
    if not bool(solution.converged):
        return None
    print(
        f"\nall {len(x)} pixels of each photograph: {solution.n_iter} iterations by way of a mesh, {time.perf_counter() - start:.1f} s; "
        f"{solution.measured}."
    )
    k, h = solution.levels
    back = solution.geometry.T.apply(h, k, reg, torch.cat((x, torch.ones_like(x[:, :1])), -1))
    return [solution.transport().cpu().view_as(china), (back[:, :3] / back[:, 3:]).cpu().view_as(flower)]


def recolour(photo: Tensor, y: Tensor, log_v: Tensor, reg: float, device: torch.device, bar: tqdm[Any]) -> Tensor:
    """Every pixel of `photo` through `extend`, a chunk at a time."""
    # In float32 an exponent of 3 / reg is wrong by 3 / reg * 6e-8: invisible among 256 shades unless reg is tiny.
    dtype = torch.float32 if reg > 1e-4 else torch.float64
    y, log_v = y.to(device, dtype), log_v.to(device, dtype)
    painted = []
    for pixels in photo.reshape(-1, 3).split(max(1, CHUNK // len(y))):
        painted.append(extend(pixels.to(y), y, log_v, reg).cpu())
        bar.update(len(pixels))
    return torch.cat(painted).reshape(photo.shape)


def draw(
    path: Path, photos: tuple[Tensor, Tensor], painted: list[Tensor], samples: tuple[Tensor, Tensor], plan: Tensor, reg: float
) -> None:
    """Originals, results, the plan and a close-up of it, in one PNG. A Figure of its own: no window, no global state."""
    figure = Figure(figsize=(13.2, 6.5), dpi=110, layout="constrained")
    axes = figure.subplots(2, 3, width_ratios=(1.5, 1.5, 1.15))
    titles = (("china", "china in the colours of flower"), ("flower", "flower in the colours of china"))
    for row, photo, result, names in zip(axes, photos, painted, titles, strict=True):
        for ax, image, name in zip(row, (photo, result), names, strict=False):
            ax.imshow(image.clamp(0, 1).numpy())
            ax.set_title(name)
            ax.axis("off")

    order_x, order_y = (z.mv(z.new_tensor(LUMINANCE)).argsort() for z in samples)
    x, y, shares = samples[0][order_x], samples[1][order_y], len(plan) * plan[order_x][:, order_y]
    top, left, size = _liveliest(shares, y)
    down, across = slice(top, top + size), slice(left, left + size)
    whole, close = axes[:, 2]
    _draw_plan(whole, shares, x, y)
    whole.add_patch(Rectangle((left - 0.5, top - 0.5), size, size, fill=False, edgecolor="white", linewidth=1.2))
    whole.set_title(f"the plan, {len(plan)} × {len(plan)} sampled pixels")
    image = _draw_plan(close, shares[down, across], x[down], y[across])
    close.set_title(f"the marked {size} × {size} of it")
    label = f"share of a china pixel that goes to a flower pixel, reg = {reg:g}"
    figure.colorbar(image, ax=[whole, close], label=label, extend="both", shrink=0.9, aspect=40)
    figure.savefig(path, format="png")


def _liveliest(shares: Tensor, y: Tensor) -> tuple[int, int, int]:
    """(top, left, size) of the close-up: the window with the largest product of mass and variance of colours."""
    size = min(ZOOM, len(shares))
    mass = torch.nn.functional.avg_pool2d(shares[None], size, stride=1)[0]
    spread = y.unfold(0, size, 1).var(-1).sum(-1)
    top, left = divmod(int((mass * spread).nan_to_num().argmax()), mass.shape[1])
    return top, left, size


def _draw_plan(ax: Axes, shares: Tensor, x: Tensor, y: Tensor) -> Any:
    """A heat-map of the shares. Strips beside it show the colours of its rows and columns, from dark to light."""
    image = ax.imshow(shares.numpy(), norm=LogNorm(1e-4, 1e-1, clip=True), cmap="magma")
    ax.set_xticks([])
    ax.set_yticks([])
    for colours, place, shape in ((x, (-0.07, 0, 0.05, 1), (-1, 1, 3)), (y, (0, -0.07, 1, 0.05), (1, -1, 3))):
        strip = ax.inset_axes(place)
        strip.imshow(colours.reshape(shape).numpy(), aspect="auto", interpolation="nearest")
        strip.axis("off")
    return image


def _device(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.zeros(1, dtype=torch.float64, device=device).item()
    except (RuntimeError, AssertionError, TypeError, NotImplementedError) as problem:
        why = str(problem).splitlines()[0].rstrip(".")
        raise ProblemError(f"--device {name} cannot be used here ({why}). --device cpu works everywhere.") from None
    return device


def _make_room(path: Path) -> None:
    """Raises ProblemError if `path` cannot be written: now, not after a minute of work."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        existed = path.exists()
        path.open("ab").close()
        if not existed:
            path.unlink()
    except OSError as problem:
        raise ProblemError(f"--out {path} cannot be written ({problem.strerror}). Name a file in a folder of yours.") from None
