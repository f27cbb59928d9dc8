"""Small problems on a CPU against the peers: what a call costs, from the caller's arrays to the result, and whether it is within the bar.

    python bench/small.py [GROUP ...] [--quick] [--repeats 15] [--skip-pot-batch] [--old PATH] [--busy K] [--out DIR] [--picture]

    arrays      gpu_ot.sinkhorn against ot.sinkhorn, numpy float64, to 1e-9: the same iterates; against OTT-JAX where it is installed
    tensors     the same between tensors
    gradients   sinkhorn2 between tensors and its derivative in the costs
    unbalanced  gpu_ot.sinkhorn_unbalanced against POT's, reg_m the largest cost
    batches     solve_batch of 1024 problems of 64 by 64 and of 64 of 256 by 256, against POT's, and against --old
    clouds      SamplesLoss and its derivative against GeomLoss, as it comes and run to the error that GeomLoss leaves
    alignment   the loss of gpu_ot.lerobot and its derivative, beside the route through POT
    busy        100 iterations of sinkhorn beside K other busy processes, for K of --busy (0: an idle machine); on request only

Each group runs in a process of its own: one thread, or all cores for batches and busy. Contestants take turns, each timed after an untimed
call of its own; medians of --repeats, fewer where a call takes long, with quartiles and extremes. Costs are squared distances in the unit
cube divided by their largest. --old is a checkout whose gpu_ot is timed on the same batches, in a process before and one after ours.
Rows go to DIR/small_cpu.json, where those of groups that were not run stay.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

GROUPS = ("arrays", "tensors", "gradients", "unbalanced", "batches", "clouds", "alignment")
#: Groups that may use every core.
WIDE = ("batches", "old", "busy")
SIZES, REGS, TOL = (4, 16, 64, 128, 256, 512), (0.1, 0.01), 1e-9
#: (B, n = m), how many times faster than the old path and than POT.
BATCHES = ((1024, 64, 25.0, 200.0), (64, 256, 7.0, 150.0))
#: So sharp that 100 iterations do not reach the rounding floor.
BATCH_REG = 0.01
#: Seconds that the calls of a row may take, warm-ups aside; and how long one measurement is at least.
BUDGET, SHORTEST = 40.0, 4e-3
ALIGNMENT_MS = 3.0
#: As in dense_cpu.py: so sharp that neither reaches its rounding floor within the iterations.
BUSY_REG, BUSY_ITERATIONS, BUSY_SIZES = 4e-3, 100, (64, 500, 1000, 3000)

Call = Callable[[], Any]


def bar(n: int, reg: float, pot_ms: float) -> float:
    """How many times faster than POT between numpy arrays."""
    if n <= 64:
        return 5.0 if pot_ms > 2 else 3.0
    return {128: (2.0, 5.0), 256: (1.5, 2.5)}.get(n, (1.5, 1.5))[reg < 0.05]


def in_turns(calls: dict[str, Call], repeats: int) -> dict[str, list[float]]:
    """Milliseconds of a call of each, in turns. A measurement is as many calls as take SHORTEST."""
    many = {}
    for name, call in calls.items():
        call()
        start = time.perf_counter()
        call()
        many[name] = max(1, round(SHORTEST / (time.perf_counter() - start)))
    times: dict[str, list[float]] = {name: [] for name in calls}
    begun = time.perf_counter()
    for k in range(repeats):
        if k > 2 and time.perf_counter() - begun > BUDGET:
            break
        for name, call in calls.items():
            call()
            start = time.perf_counter()
            for _ in range(many[name]):
                call()
            times[name].append(1e3 * (time.perf_counter() - start) / many[name])
    return times


class Rows:
    """The rows of a group, and a line for each comparison as it is made."""

    def __init__(self, section: str) -> None:
        self.section, self.rows = section, []

    def add(
        self,
        times: dict[str, list[float]],
        *,
        bars: dict[str, float] | None = None,
        met: bool = True,
        notes: dict[str, dict[str, Any]] | None = None,
        **asked: Any,
    ) -> None:
        """A row for each contestant. The first is ours: `bars` says how many times faster than which other it is to be.

        met    what else the bar asks for.
        notes  solver -> more keys.
        """
        medians = {name: statistics.median(found) for name, found in times.items()}
        ours = next(iter(times))
        for name, found in times.items():
            low, _, high = statistics.quantiles(found, n=4, method="inclusive") if len(found) > 1 else found * 3
            row = {"section": self.section, **asked, "solver": name, "time_ms": medians[name]}
            row |= {"time_min_ms": min(found), "time_max_ms": max(found), "q1_ms": low, "q3_ms": high, "repeats": len(found)}
            row |= (notes or {}).get(name, {})
            if name == ours:
                speeds = {peer: medians[peer] / medians[ours] for peer in times if peer != ours}
                row["speed"], row["bar"] = speeds, bars or {}
                row["met"] = met and all(speeds[peer] >= least for peer, least in (bars or {}).items() if peer in speeds)
            self.rows.append(row)
        print(line(self.rows[-len(times)]), file=sys.stderr, flush=True)


def line(row: dict[str, Any]) -> str:
    """Our row of a comparison, for the table."""
    asked = " ".join(f"{key}={row[key]}" for key in ("case", "B", "n", "d", "blur") if key in row)
    bars = {peer: f" (>= {least:g})" for peer, least in row["bar"].items()}
    speeds = "  ".join(f"{speed:8.2f}x {peer}{bars.get(peer, '')}" for peer, speed in row["speed"].items())
    notes = " ".join(f"{key}={row[key]:.1e}" for key in ("difference", "marginal_error", "peer_error") if row.get(key) is not None)
    spread = f"{row['time_ms']:9.3f} ms ({row['q1_ms']:.3f} - {row['q3_ms']:.3f})"
    return f"{'met' if row['met'] else 'NOT'}  {row['section']:<11}{asked:<42}{spread:<34}{speeds}  {notes}"


def problem(n: int, kind: str = "numpy", m: int | None = None, seed: int = 0) -> tuple[Any, Any, Any]:
    """(a, b, M) in float64."""
    import numpy as np
    import torch

    rng = np.random.default_rng(seed + n)
    x, y, a, b = rng.random((n, 3)), rng.random((m or n, 3)), rng.random(n) + 0.5, rng.random(m or n) + 0.5
    M = np.square(x[:, None] - y[None]).sum(-1)
    given = a / a.sum(), b / b.sum(), M / M.max()
    return given if kind == "numpy" else tuple(map(torch.from_numpy, given))


def apart(ours: Any, theirs: Any) -> float:
    """The largest difference, relative to the largest entry."""
    return float(abs(ours - theirs).max() / abs(theirs).max())


# The groups: Rows and what was asked -> nothing.


def arrays(rows: Rows, given: argparse.Namespace, kind: str = "numpy") -> None:
    import ot

    import gpu_ot

    for reg in REGS:
        for n in given.sizes:
            a, b, M = problem(n, kind)
            calls: dict[str, Call] = {
                "gpu_ot fp64": lambda a=a, b=b, M=M, reg=reg: gpu_ot.sinkhorn(a, b, M, reg, stopThr=TOL),
                "POT fp64": lambda a=a, b=b, M=M, reg=reg: ot.sinkhorn(a, b, M, reg, stopThr=TOL),
            }
            if kind == "numpy" and importlib.util.find_spec("ott") is not None:
                calls["OTT-JAX fp64"] = through_ott(a, b, M, reg)
            times = in_turns(calls, given.repeats)
            difference = apart(*(calls[name]() for name in ("gpu_ot fp64", "POT fp64")))
            least = bar(n, reg, statistics.median(times["POT fp64"])) * (1 if kind == "numpy" else 2)
            iterations = gpu_ot.sinkhorn(a, b, M, reg, stopThr=TOL, log=True)[1]["niter"] + 1
            bars = {"POT fp64": least} | ({"OTT-JAX fp64": 1.0} if "OTT-JAX fp64" in calls else {})
            notes = {"gpu_ot fp64": {"difference": difference, "iterations": iterations}}
            rows.add(times, case=f"reg {reg}", n=n, bars=bars, met=difference < 1e-9, notes=notes)


def tensors(rows: Rows, given: argparse.Namespace) -> None:
    arrays(rows, given, "tensors")


def through_ott(a: Any, b: Any, M: Any, reg: float) -> Call:
    """Jitted; the plan is computed to its end."""
    import jax

    jax.config.update("jax_enable_x64", True)
    import jax.numpy as jnp
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    solver = sinkhorn.Sinkhorn(threshold=TOL, max_iterations=1000, inner_iterations=10)

    @jax.jit
    def solve(a: Any, b: Any, M: Any) -> Any:
        return solver(linear_problem.LinearProblem(geometry.Geometry(cost_matrix=M, epsilon=reg), a, b)).matrix

    inside = [jnp.asarray(z) for z in (a, b, M)]
    return lambda: jax.block_until_ready(solve(*inside))


def gradients(rows: Rows, given: argparse.Namespace) -> None:
    import ot
    import torch

    import gpu_ot

    for reg in REGS:
        for n in given.sizes:
            a, b, M = problem(n, "tensors")

            def run(solver: Callable[..., Any], a: Any = a, b: Any = b, M: Any = M, reg: float = reg) -> Any:
                leaf = M.detach().requires_grad_()
                return torch.autograd.grad(solver(a, b, leaf, reg, stopThr=TOL).sum(), leaf)[0]

            calls: dict[str, Call] = {"gpu_ot fp64": lambda run=run: run(gpu_ot.sinkhorn2), "POT fp64": lambda run=run: run(ot.sinkhorn2)}
            times = in_turns(calls, given.repeats)
            difference = apart(*(call() for call in calls.values()))
            least = 2 * bar(n, reg, statistics.median(times["POT fp64"]))
            notes = {"gpu_ot fp64": {"difference": difference}}
            rows.add(times, case=f"reg {reg}", n=n, bars={"POT fp64": least}, notes=notes)


def unbalanced(rows: Rows, given: argparse.Namespace) -> None:
    import ot

    import gpu_ot

    for reg in REGS:
        for n in given.sizes:
            a, b, M = problem(n)
            calls: dict[str, Call] = {
                "gpu_ot fp64": lambda a=a, b=b, M=M, reg=reg: gpu_ot.sinkhorn_unbalanced(a, b, M, reg, 1.0),
                "POT fp64": lambda a=a, b=b, M=M, reg=reg: ot.unbalanced.sinkhorn_unbalanced(a, b, M, reg, 1.0),
            }
            times = in_turns(calls, given.repeats)
            difference = apart(*(call() for call in calls.values()))
            iterations = gpu_ot.sinkhorn_unbalanced(a, b, M, reg, 1.0, log=True)[1]["n_iter"] + 1
            least = bar(n, reg, statistics.median(times["POT fp64"]))
            notes = {"gpu_ot fp64": {"difference": difference, "iterations": iterations}}
            rows.add(times, case=f"reg {reg}", n=n, bars={"POT fp64": least}, notes=notes)


def batch_of(B: int, n: int) -> tuple[Any, Any, Any]:
    import torch

    found = [problem(n, "tensors", seed=1000 * k) for k in range(B)]
    a, b, M = (torch.stack(z) for z in zip(*found, strict=True))
    return a, b, M


def batch_cases(given: argparse.Namespace) -> Iterator[tuple[int, int, float, float, str, dict[str, Any]]]:
    for B, n, old, pot in BATCHES:
        for case, settings in (("100 iterations", dict(max_iter=100, tol=0.0)), ("to 1e-6", dict(max_iter=10_000, tol=1e-6))):
            yield (max(2, B // 32) if given.quick else B), n, old, pot, case, settings


def batches(rows: Rows, given: argparse.Namespace) -> None:
    import ot.batch

    from gpu_ot.pot.batch import solve_batch

    earlier = old_times(given) if given.old else {}
    found = []
    for B, n, least_old, least_pot, case, settings in batch_cases(given):
        a, b, M = batch_of(B, n)
        calls: dict[str, Call] = {"gpu_ot fp64": lambda a=a, b=b, M=M, s=settings: solve_batch(M, BATCH_REG, a, b, **s).plan}
        if not given.skip_pot_batch:
            calls["POT fp64"] = lambda a=a, b=b, M=M, s=settings: ot.batch.solve_batch(M, BATCH_REG, a, b, **s).plan
        notes: dict[str, Any] = {"gpu_ot fp64": {"iterations": solve_batch(M, BATCH_REG, a, b, **settings).n_iter + 1}}
        if len(calls) > 1:
            notes["gpu_ot fp64"]["difference"] = apart(*(call() for call in calls.values()))
        found.append((in_turns(calls, given.repeats), case, B, n, least_old, least_pot, notes))
    later = old_times(given) if given.old else {}
    for times, case, B, n, least_old, least_pot, notes in found:
        key = f"{n} {case}"
        if key in earlier:
            times["gpu_ot, old checkout, fp64"] = earlier[key] + later[key]
        bars = {"POT fp64": least_pot, "gpu_ot, old checkout, fp64": least_old}
        rows.add(times, case=case, B=B, n=n, bars={peer: least for peer, least in bars.items() if peer in times}, notes=notes)


def old_times(given: argparse.Namespace) -> dict[str, list[float]]:
    return child("old", given, {"PYTHONPATH": str(Path(given.old).resolve())})[0]


def old(given: argparse.Namespace) -> dict[str, list[float]]:
    """Times of the checkout on PYTHONPATH, by case."""
    import gpu_ot
    from gpu_ot.pot.batch import solve_batch

    if not Path(gpu_ot.__file__ or "").is_relative_to(Path(given.old).resolve()):
        raise SystemExit(f"--old {given.old}: Python found gpu_ot in {gpu_ot.__file__} instead.")
    times = {}
    for B, n, _, _, case, settings in batch_cases(given):
        a, b, M = batch_of(B, n)
        run = {"old": lambda a=a, b=b, M=M, s=settings: solve_batch(M, BATCH_REG, a, b, **s).plan}
        times[f"{n} {case}"] = in_turns(run, max(2, given.repeats // 4))["old"]
    return times


def clouds(rows: Rows, given: argparse.Namespace) -> None:
    import geomloss
    import torch

    import gpu_ot

    sizes, widths, blurs = ((128,), (2,), (0.05,)) if given.quick else ((128, 512, 1000), (2, 10, 50), (0.01, 0.05))
    for blur in blurs:
        for d in widths:
            for n in sizes:
                gen = torch.Generator().manual_seed(n + d)
                x, y = torch.rand(n, d, generator=gen), torch.rand(n, d, generator=gen) + 0.1

                def marginal_error(loss: Any, x: Any = x, y: Any = y, blur: float = blur) -> float:
                    """The larger L1 error of the plan's two marginals, in float64, without debiasing."""
                    f, g = (z.detach().double().view(-1) for z in loss(x, y))
                    C = torch.cdist(x.double(), y.double()).square() / 2
                    P = ((f[:, None] + g - C) / blur**2).exp() / (len(x) * len(y))
                    return max(float((P.sum(k) - 1 / P.shape[1 - k]).abs().sum()) for k in (0, 1))

                def run(loss: Any, x: Any = x, y: Any = y) -> Any:
                    leaf = x.detach().requires_grad_()
                    return torch.autograd.grad(loss(leaf, y), leaf)[0]

                theirs: dict[str, Any] = dict(p=2, blur=blur, backend="tensorized")
                left = marginal_error(geomloss.SamplesLoss("sinkhorn", debias=False, potentials=True, **theirs))
                peer = geomloss.SamplesLoss("sinkhorn", **theirs)
                # An error above 1, of exponents that overflow, is no tolerance.
                for case, tol in ((f"blur {blur}", 1e-4), (f"blur {blur}, to GeomLoss's error", min(left, 0.5))):
                    loss = gpu_ot.SamplesLoss(p=2, blur=blur, tol=tol)
                    calls: dict[str, Call] = {
                        "gpu_ot fp32": lambda loss=loss, run=run: run(loss),
                        "GeomLoss fp32": lambda peer=peer, run=run: run(peer),
                    }
                    times = in_turns(calls, given.repeats)
                    ours = marginal_error(gpu_ot.SamplesLoss(p=2, blur=blur, tol=tol, debias=False, potentials=True))
                    least = 1.0 if tol == 1e-4 or n > 512 else 3.0
                    notes = {"gpu_ot fp32": {"marginal_error": ours, "peer_error": left}, "GeomLoss fp32": {"marginal_error": left}}
                    fine = ours <= left * (1 if tol == 1e-4 else 1.05) + 1e-12
                    rows.add(times, case=case, n=n, d=d, bars={"GeomLoss fp32": least}, met=fine, notes=notes)


def alignment(rows: Rows, given: argparse.Namespace) -> None:
    import numpy as np
    import ot
    import torch

    from gpu_ot.lerobot import OTLossConfig, compute_ot_loss_for_policy

    n, d, reg, tau, key = 128, 512, 0.01, 1.0, "observation.state"

    class Policy(torch.nn.Module):
        """Its embedding is the observation."""

        def encode_feature_for_ot(self, key: str, x: torch.Tensor) -> torch.Tensor:
            return x

    gen = torch.Generator().manual_seed(0)
    x, y = torch.randn(n, d, generator=gen), torch.randn(n, d, generator=gen) + 0.3
    weight = 1 / float(torch.cdist(x, y).square().mean())
    feature = dict(src_key=key, use_learned_embed=True, weight_embed=weight, weight_label=0.0)
    cfg, policy, w = OTLossConfig.from_dict(dict(features=[feature], reg=reg, tau_src=tau, tau_tgt=tau)), Policy(), np.full(n, 1 / n)

    def ours(leaf: torch.Tensor) -> torch.Tensor:
        return compute_ot_loss_for_policy(policy, {key: leaf}, {key: y}, cfg, metrics=False)[0]

    def theirs(leaf: torch.Tensor) -> torch.Tensor:
        M = weight * torch.cdist(leaf, y).square()
        plan = ot.unbalanced.sinkhorn_knopp_unbalanced(w, w, M.detach().double().numpy(), reg, (tau, tau))
        return (torch.from_numpy(plan) * M).sum()

    def run(loss: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        leaf = x.detach().requires_grad_()
        return torch.autograd.grad(loss(leaf), leaf)[0]

    calls: dict[str, Call] = {"gpu_ot fp32": lambda: run(ours), "POT route fp32": lambda: run(theirs)}
    times = in_turns(calls, given.repeats)
    difference = apart(*(call() for call in calls.values()))
    fast = statistics.median(times["gpu_ot fp32"]) <= ALIGNMENT_MS
    notes = {"gpu_ot fp32": {"difference": difference, "bar_ms": ALIGNMENT_MS}}
    rows.add(times, case=f"reg {reg}, tau {tau:g}", n=n, d=d, met=fast, notes=notes)


def busy(rows: Rows, given: argparse.Namespace) -> None:
    import ot

    import gpu_ot

    settings: dict[str, Any] = dict(numItermax=BUSY_ITERATIONS, stopThr=0.0, warn=False)
    with others(given.busy):
        for n in (64, 500) if given.quick else BUSY_SIZES:
            a, b, M = problem(n)
            calls: dict[str, Call] = {
                "gpu_ot fp64": lambda a=a, b=b, M=M: gpu_ot.sinkhorn(a, b, M, BUSY_REG, **settings),
                "POT fp64": lambda a=a, b=b, M=M: ot.sinkhorn(a, b, M, BUSY_REG, **settings),
            }
            times = in_turns(calls, given.repeats)
            difference = apart(*(call() for call in calls.values()))
            least = 0.8 if given.busy else {500: 1.5, 1000: 1.5, 3000: 1.5}.get(n, 3.0)
            notes = {"gpu_ot fp64": {"difference": difference}}
            rows.add(times, case=f"{BUSY_ITERATIONS} iterations", n=n, bars={"POT fp64": least}, notes=notes)


@contextlib.contextmanager
def others(count: int) -> Iterator[None]:
    """That many processes that do nothing but count."""
    processes = [subprocess.Popen([sys.executable, "-c", "k = 0\nwhile True: k += 1"]) for _ in range(count)]
    try:
        time.sleep(0.5 if count else 0)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


# Processes.


def child(group: str, given: argparse.Namespace, more: dict[str, str] | None = None) -> Any:
    """What `group` gives in a process of its own, with its number of threads: [rows or times]. Progress goes to the terminal."""
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    env = {name: value for name, value in os.environ.items() if name not in names} | (more or {})
    if group not in WIDE:
        env |= dict.fromkeys(names, "1")
    command = [sys.executable, __file__, "--child", group, "--repeats", given.repeats, "--sizes", *given.sizes]
    command += [flag for flag, on in (("--quick", given.quick), ("--skip-pot-batch", given.skip_pot_batch)) if on]
    command += [word for flag, z in (("--old", given.old), ("--busy", given.busy)) if z is not None for word in (flag, z)]
    done = subprocess.run([*map(str, command)], stdout=subprocess.PIPE, text=True, env=env)
    if done.returncode:
        raise RuntimeError(f"the process of {group} ended with {done.returncode}")
    return json.loads(done.stdout.splitlines()[-1])


def inside(group: str, given: argparse.Namespace) -> None:
    """A child's work; its last line is the result."""
    import torch
    from rows import quiet

    torch.set_num_threads(os.cpu_count() or 1 if group in WIDE else 1)
    rows = Rows(f"busy {given.busy}" if group == "busy" else group)
    with quiet():
        found: Any = old(given) if group == "old" else globals()[group](rows, given)
    print(json.dumps([found if group == "old" else rows.rows]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("groups", nargs="*", metavar="GROUP", help="all but busy, when left out and without --busy")
    parser.add_argument("--sizes", type=int, nargs="+", default=SIZES, help="of arrays, tensors, gradients and unbalanced")
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--quick", action="store_true", help="3 repeats of a few rows, to see that everything runs; nothing is written")
    parser.add_argument("--skip-pot-batch", action="store_true", help="POT takes 25 s a batch")
    parser.add_argument("--old", metavar="PATH", help="a checkout of gpu_ot to time on the same batches")
    parser.add_argument("--busy", type=int, metavar="K", help="run the group busy beside K busy processes")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results", help="folder of small_cpu.json")
    parser.add_argument("--picture", action="store_true", help="charts beside the rows")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.quick:
        given.repeats, given.sizes = 3, [16, 128]
    if given.child:
        inside(given.child, given)
        return 0
    if unknown := set(given.groups) - {*GROUPS, "busy"}:
        parser.error(f"there is no group {', '.join(sorted(unknown))}; there are {', '.join((*GROUPS, 'busy'))}")
    groups = given.groups or (list(GROUPS) if given.busy is None else ["busy"])
    if "busy" in groups and given.busy is None:
        parser.error("busy needs --busy K, the number of other processes")

    from machine import write
    from rows import reason

    rows: list[dict[str, Any]] = []
    failed = []
    for group in groups:
        try:
            rows += child(group, given)[0]
        except RuntimeError as error:
            failed.append(reason(error))
            continue
        if not given.quick:
            path = write(given.out, "small_cpu", kept(given.out, rows) + rows)
    print()
    compared = [row for row in rows if "met" in row]
    print("\n".join(line(row) for row in compared))
    print(f"\n{sum(row['met'] for row in compared)} of {len(compared)} bars met", *failed, sep="\n")
    if rows and not given.quick:
        print(f"wrote {path}", *pictures(path) if given.picture else [], sep="\n      ")
    return 1 if failed else 0


def kept(out: Path, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the file holds of sections that were not run again."""
    path, again = out / "small_cpu.json", {row["section"] for row in rows}
    return [row for row in json.loads(path.read_text())["rows"] if row["section"] not in again] if path.exists() else []


def pictures(path: Path) -> list[str]:
    """Time along n of the groups where only the size varies."""
    from charts import draw
    from measures import source, tables

    of = source(path)
    shown = [table for table in tables(of) if table.section in ("arrays", "tensors", "gradients", "unbalanced")]
    known = of.environment
    credit = ", ".join(str(known[key]) for key in ("cpu", "commit") if known.get(key))
    return [str(path.parent / file) for _, file in draw("small_cpu", shown, path.parent, credit)]


if __name__ == "__main__":
    sys.exit(main())
