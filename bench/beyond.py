"""Problems made of problems against POT on a CPU: barycentres, Gromov-Wasserstein, partial transport; and assignment against torch.

    python bench/beyond.py [GROUP ...] [--repeats 5] [--gw-size 2000] [--out DIR] [--quick]

    partial   half and nine tenths of the mass, n = 300, against POT's default and logarithmic functions at their own tolerance
    images    the barycentre of four 128 x 128 images, 20 iterations, against POT's logarithmic function
    volume    the barycentre of two 64^3 volumes
    points    free support: ten clouds of 500 points, ten moves of 100 points
    gw        entropic Gromov-Wasserstein, n = --gw-size, in float64 between arrays; fused: with features
    points_gw the same of n = 10,000 points in float32, whose distances are never formed, with the memory it takes
    graphs    64 pairs of graphs with 50 nodes at once, against POT's one after the other
    low_rank  couplings of rank 20, n = 2000 (against POT and OTT-JAX) and 100,000 (alone), to a slope of 0.01
    assign    4096 samples and 3000 prototypes in float32, against the three lines of SwAV

Contestants take turns, each timed after an untimed call of its own; medians. `difference` is what our result and
POT's differ by. `points`, `gw` and `low_rank` have OTT-JAX beside them in an environment that has it. Rows go to
DIR/beyond.json, where those of groups that were not run stay.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import ott_problems
import torch
from machine import growth_mib, write
from small import Rows, apart

import gpu_ot

with contextlib.redirect_stdout(io.StringIO()):  # packages that POT imports when they are there greet on stdout
    import ot

Call = Callable[[], Any]


def in_turns(calls: dict[str, Call], repeats: int) -> tuple[dict[str, list[float]], dict[str, Any]]:
    """Milliseconds of each contestant's calls, and what the last of them returned."""
    results = {name: call() for name, call in calls.items()}
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(repeats):
        for name, call in calls.items():
            start = time.perf_counter()
            results[name] = call()
            times[name].append(1e3 * (time.perf_counter() - start))
    return times, results


def partial(rows: Rows, given: argparse.Namespace) -> None:
    n = 60 if given.quick else 300
    rng = np.random.default_rng(0)
    x, y = rng.random((n, 2)), rng.random((n, 2)) + 0.2
    M, a = np.square(x[:, None] - y[None]).sum(-1), np.full(n, 1 / n)
    for m in (0.5, 0.9):
        options = dict(m=m, stopThr=1e-9)
        calls: dict[str, Call] = {
            "gpu_ot": lambda options=options: gpu_ot.pot.partial.entropic_partial_wasserstein(a, a, M, 0.02, **options),
            "POT": lambda options=options: ot.partial.entropic_partial_wasserstein(a, a, M, 0.02, **options),
            "POT log": lambda options=options: ot.partial.entropic_partial_wasserstein_logscale(a, a, M, 0.02, **options),
        }
        times, found = in_turns(calls, given.repeats)
        notes = {"gpu_ot": {"difference": apart(found["gpu_ot"], found["POT log"])}}
        rows.add(times, case=f"mass {m}", n=n, bars={"POT": 3.0, "POT log": 3.0}, notes=notes)


def images(rows: Rows, given: argparse.Namespace) -> None:
    side = 24 if given.quick else 128
    t = np.linspace(-1, 1, side)
    u, v = np.meshgrid(t, t)
    shapes = (u**2 + v**2 < 0.4, np.abs(u) + np.abs(v) < 0.7, np.maximum(np.abs(u), np.abs(v)) < 0.5, np.abs(np.hypot(u, v) - 0.6) < 0.1)
    A = np.stack([z / z.sum() for z in (np.asarray(s, float) + 1e-8 for s in shapes)])
    options = dict(numItermax=20, stopThr=0, warn=False)
    calls: dict[str, Call] = {
        "gpu_ot": lambda: gpu_ot.pot.bregman.convolutional_barycenter2d(A, 4e-3, **options),
        "POT log": lambda: ot.bregman.convolutional_barycenter2d(A, 4e-3, method="sinkhorn_log", **options),
        "POT": lambda: ot.bregman.convolutional_barycenter2d(A, 4e-3, **options),
    }
    times, found = in_turns(calls, 1)
    notes = {"gpu_ot": {"difference": apart(found["gpu_ot"], found["POT log"])}}
    rows.add(times, case="20 iterations", n=side, bars={"POT log": 10.0}, notes=notes)


def volume(rows: Rows, given: argparse.Namespace) -> None:
    side = 12 if given.quick else 64
    t = torch.linspace(0, 1, side, dtype=torch.float64)
    grid = torch.cartesian_prod(t, t, t)
    a = torch.stack([(-(grid - c).square().sum(-1) / 0.01).exp() + 1e-9 for c in (0.3, 0.65)])
    a = a / a.sum(-1, keepdim=True)
    found: list[Any] = []
    start = time.perf_counter()
    found.append(gpu_ot.barycenter(gpu_ot.Grid((side,) * 3, 1 / (side - 1)), 4e-3, a, tol=1e-4))
    took = 1e3 * (time.perf_counter() - start)
    notes = {"gpu_ot": {"iterations": found[0].n_iter, "status": found[0].status.name}}
    rows.add({"gpu_ot": [took]}, case="two bumps, tol 1e-4", n=side, notes=notes)


def points(rows: Rows, given: argparse.Namespace) -> None:
    n, k = (50, 20) if given.quick else (500, 100)
    rng = np.random.default_rng(0)
    clouds = [rng.normal(size=(n, 2)) * rng.random(2) + rng.normal(size=2) for _ in range(10)]
    arguments = clouds, [np.full(n, 1 / n)] * 10, rng.normal(size=(k, 2)), 0.1
    options = dict(numItermax=10, stopThr=1e-12)
    calls: dict[str, Call] = {
        "gpu_ot": lambda: gpu_ot.pot.bregman.free_support_sinkhorn_barycenter(*arguments, **options),
        "POT": lambda: ot.bregman.free_support_sinkhorn_barycenter(*arguments, **options),
    }
    calls |= ott_problems.calls(ott_problems.free_barycenter, clouds, arguments[2], 0.1, 10)
    times, found = in_turns(calls, given.repeats)
    notes = {"gpu_ot": {"difference": apart(found["gpu_ot"], found["POT"])}}
    if "OTT-JAX" in found:
        notes["OTT-JAX"] = {"difference": apart(found["OTT-JAX"][0], found["POT"])}
    rows.add(times, case="10 clouds", n=n, bars={"POT": 5.0}, notes=notes)


def spaces(n: int, batch: tuple[int, ...] = (), seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    x, y = rng.normal(size=(*batch, n, 3)), rng.normal(size=(*batch, n, 2))
    D = [np.square(z[..., :, None, :] - z[..., None, :, :]).sum(-1) for z in (x, y)]
    return [z / z.max((-1, -2), keepdims=True) for z in D]


def gw(rows: Rows, given: argparse.Namespace) -> None:
    n = 100 if given.quick else given.gw_size
    gpu_ot.pot.gromov.entropic_gromov_wasserstein2(*spaces(20), epsilon=0.1, max_iter=5)  # compiles
    (C1, C2), M = spaces(n), np.random.default_rng(1).random((n, n))
    for case, more in (("plain", ()), ("fused", (M,))):
        name = "entropic_fused_gromov_wasserstein2" if more else "entropic_gromov_wasserstein2"
        options: dict[str, Any] = dict(epsilon=0.02, max_iter=200, tol=1e-6)
        calls: dict[str, Call] = {
            "gpu_ot": lambda n=name, m=more, o=options: getattr(gpu_ot.pot.gromov, n)(*m, C1, C2, log=True, **o),
            "POT": lambda n=name, m=more, o=options: getattr(ot.gromov, n)(*m, C1, C2, log=True, **o),
        }
        calls |= {} if more else ott_problems.calls(ott_problems.gromov, C1, C2, options["epsilon"], options["max_iter"])
        times, found = in_turns(calls, min(given.repeats, 3))
        (ours, log), (theirs, their_log) = found["gpu_ot"], found["POT"]
        notes = {
            "gpu_ot": {
                "difference": float(abs(ours - theirs)),
                "value": float(ours),
                "outer": log["n_iter"] + 1,
                "status": log["status"].name,
            },
            "POT": {"value": float(theirs), "checks": len(their_log["err"])},
        }
        if "OTT-JAX" in found:
            (P,) = found["OTT-JAX"]
            pairs = P.sum(1) @ C1**2 @ P.sum(1) + P.sum(0) @ C2**2 @ P.sum(0) - 2 * ((C1 @ P @ C2) * P).sum()
            notes["OTT-JAX"] = {"value": float(pairs), "marginal_error": float(abs(P.sum(1) - 1 / n).sum() + abs(P.sum(0) - 1 / n).sum())}
        rows.add(times, case=f"{case}, at most {options['max_iter']} outer", n=n, bars={"POT": 5.0}, notes=notes)


def points_gw(rows: Rows, given: argparse.Namespace) -> None:
    n = 300 if given.quick else 10_000
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(n, d, generator=generator) / 4 for d in (3, 2))
    found, took = [], []

    def run() -> None:
        start = time.perf_counter()
        found.append(gpu_ot.gromov(gpu_ot.SqEuclidean(x, x), gpu_ot.SqEuclidean(y, y), 0.05, tol=1e-3, max_iter=30))
        took.append(1e3 * (time.perf_counter() - start))

    mib = growth_mib(run)
    notes = {"gpu_ot": {"peak_mib": mib, "outer": found[0].n_iter, "inner": found[0].n_inner, "status": found[0].status.name}}
    rows.add({"gpu_ot": took}, case="from points, tol 1e-3", n=n, met=mib < 3072, notes=notes)


def graphs(rows: Rows, given: argparse.Namespace) -> None:
    B, n = (4, 20) if given.quick else (64, 50)
    C1, C2 = spaces(n, (B,))
    M = np.random.default_rng(1).random((B, n, n))
    pairs = C1, C2, np.sqrt(C1), np.sqrt(C2), M
    t1, t2, r1, r2, tM = map(torch.from_numpy, pairs)
    options = dict(epsilon=0.05, max_iter=1000, tol=1e-7)

    def fused() -> np.ndarray:
        found = gpu_ot.gromov(t1, t2, 0.05, features=tM, tol=1e-6)
        return (0.5 * found.distortion + 0.5 * (found.plan.to_dense() * tM).sum((-1, -2))).numpy()

    def plain(x: np.ndarray, y: np.ndarray) -> np.ndarray:
        return np.array([ot.gromov.entropic_gromov_wasserstein2(c, d, **options) for c, d in zip(x, y, strict=True)])

    cases: dict[str, dict[str, Call]] = {
        "squared distances": {
            "gpu_ot": lambda: gpu_ot.gromov(t1, t2, 0.05, tol=1e-6).distortion.numpy(),
            "POT": lambda: plain(C1, C2),
        },
        "distances": {
            "gpu_ot": lambda: gpu_ot.gromov(r1, r2, 0.05, tol=1e-6).distortion.numpy(),
            "POT": lambda: plain(pairs[2], pairs[3]),
        },
        "fused": {
            "gpu_ot": fused,
            "POT": lambda: np.array(
                [ot.gromov.entropic_fused_gromov_wasserstein2(m, c, d, **options) for m, c, d in zip(M, C1, C2, strict=True)]
            ),
        },
    }
    for case, calls in cases.items():
        times, found = in_turns(calls, given.repeats)
        rows.add(times, case=case, B=B, n=n, bars={"POT": 10.0}, notes={"gpu_ot": {"difference": apart(found["gpu_ot"], found["POT"])}})


def low_rank(rows: Rows, given: argparse.Namespace) -> None:
    few, many = (60, 300) if given.quick else (2000, 100_000)
    rng = np.random.default_rng(0)
    for n in (few, many):
        x, y = rng.normal(size=(n, 3)), rng.normal(size=(n, 3)) * [0.5, 1, 2] + 1
        t, u = torch.from_numpy(x), torch.from_numpy(y)
        calls: dict[str, Call] = {"gpu_ot": lambda t=t, u=u: gpu_ot.low_rank(gpu_ot.SqEuclidean(t, u), 20, tol=1e-2)}
        if n == few:
            calls["POT"] = lambda x=x, y=y: ot.lowrank_sinkhorn(x, y, rank=20, warn=False)
            calls |= ott_problems.calls(ott_problems.low_rank, x, y, 20)
        times, found = in_turns(calls, min(given.repeats, 2) if n == few else 1)
        plan = found["gpu_ot"].plan
        factors = {"gpu_ot": [z.numpy() for z in (plan.Q, plan.R, plan.g)], **{name: z for name, z in found.items() if name != "gpu_ot"}}
        notes = {name: of_factors(x, y, *z) for name, z in factors.items()}
        notes["gpu_ot"]["iterations"] = found["gpu_ot"].n_iter
        if n == few:
            M = np.square(x[:, None] - y[None]).sum(-1)
            notes["gpu_ot"] |= {"exact": float(ot.emd2([], [], M, numItermax=10**7)), "product": float(M.mean())}
        rows.add(times, case="rank 20", n=n, notes=notes)


def of_factors(x: np.ndarray, y: np.ndarray, Q: Any, R: Any, g: Any) -> dict[str, Any]:
    """<C, P> and the L1 error of the marginals of P = Q diag(1/g) R^T."""
    rows, columns = Q @ (R.sum(0) / g), R @ (Q.sum(0) / g)
    value = rows @ np.square(x).sum(1) + columns @ np.square(y).sum(1) - 2 * ((x.T @ Q) / g * (y.T @ R)).sum()
    return {"value": float(value), "marginal_error": float(abs(rows - 1 / len(x)).sum() + abs(columns - 1 / len(y)).sum())}


def assign(rows: Rows, given: argparse.Namespace) -> None:
    n, K = (256, 100) if given.quick else (4096, 3000)
    generator = torch.Generator().manual_seed(0)
    logits = torch.nn.functional.normalize(torch.randn(n, 64, generator=generator), dim=-1)
    logits = logits @ torch.nn.functional.normalize(torch.randn(K, 64, generator=generator), dim=-1).T

    def plain() -> torch.Tensor:
        Q = (logits / 0.05).exp()
        for _ in range(3):
            Q = Q / Q.sum(0)
            Q = Q / Q.sum(1, keepdim=True)
        return Q

    with torch.no_grad():
        times, found = in_turns({"gpu_ot": lambda: gpu_ot.assign(logits, temperature=0.05), "torch, no logarithms": plain}, given.repeats)
    difference = apart(found["gpu_ot"].numpy(), found["torch, no logarithms"].numpy())
    rows.add(times, case=f"K = {K}", n=n, notes={"gpu_ot": {"difference": difference}})


GROUPS = {each.__name__: each for each in (partial, images, volume, points, gw, points_gw, graphs, low_rank, assign)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="all when left out")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--gw-size", type=int, default=2000)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    kept: list[dict[str, Any]] = []
    chosen = given.groups or [*GROUPS]
    if given.out and (path := given.out / "beyond.json").exists():
        kept = [row for row in json.loads(path.read_text())["rows"] if row["section"] not in chosen]
    for name in chosen:
        rows = Rows(name)
        GROUPS[name](rows, given)
        kept += rows.rows
        if given.out:
            write(given.out, "beyond", kept)


if __name__ == "__main__":
    main()
