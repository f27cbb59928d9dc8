"""One solve on several ranks: time and bytes an iteration, and what they would come to on a thousand GPUs.

    torchrun --nproc-per-node 2 bench/sharded.py [--out DIR] [--points 2000] [--dimensions 64] [--iterations 6] [--repeats 5]
    python bench/sharded.py --out DIR --draw

Each run adds the rows of its number of ranks to sharded.json and draws sharded.png anew: strong scaling (n = m points shared by all ranks)
and weak scaling (n / 4 rows a rank, against as many columns), both layouts, plain iterations of the streaming backend on one core a rank.
Bytes are counted where they leave, in torch's own collectives, and stand beside the count from the layout. The model

    seconds = pairs / rate + messages * latency + bytes / bandwidth        (in the ring, the larger of work and points under way)

is fitted to the least times of the rows, which other work on the machine disturbs least. The same formula with numbers of GPUs and
their networks, which are assumed and not measured, is drawn
up to 1024 ranks and marked as modelled.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from machine import environment

import gpu_ot
from gpu_ot import Problem, Sharded, SqEuclidean
from gpu_ot.communicator import COLUMNS, ROWS
from gpu_ot.distributed.group import Group, even_sizes

#: Sweeps over the pairs of an iteration: the backends of "replicated" take both half-steps from one, those of "ring" take two.
SWEEPS = {"replicated": 1, "ring": 2}
#: Assumed of GPUs, none of them measured. Pairs a second: the kernels' 5.6 issued instructions a pair (bench/FACTS.md, d = 64) on 132
#: multiprocessors of 4 x 32 lanes at 1.755 GHz, so a floor of the time. Bytes a second and seconds a message of the networks.
GPU_RATE = 132 * 128 * 1.755e9 / 5.62
NETWORKS = {"NVLink, 450 GB/s": (450e9, 5e-6), "network, 400 Gb/s": (50e9, 1e-5)}
MODELLED = dict(n=1_000_000, d=64, ranks=[2**k for k in range(11)])


@contextlib.contextmanager
def counted(size: int, rank: int) -> Iterator[list[int]]:
    """[bytes that this rank sends to others, messages], while it lasts."""
    sent, real = [0, 0], {}
    names = ("all_gather_single", "all_gather_into_tensor", "all_to_all_single", "batch_isend_irecv", "broadcast")

    def wrap(name: str, call: Any) -> Any:
        def counting(*args: Any, **options: Any) -> Any:
            if name.startswith("all_gather"):
                sent[0] += (size - 1) * args[1].numel() * args[1].itemsize
                sent[1] += size - 1
            elif name == "all_to_all_single":
                sent[0] += (len(args[1]) - args[3][rank]) * args[1][:1].numel() * args[1].itemsize
                sent[1] += size - 1
            elif name == "broadcast":
                raise AssertionError("a broadcast in an iteration")
            else:
                moves = [move.tensor for move in args[0] if move.op is dist.isend]
                sent[0] += sum(z.numel() * z.itemsize for z in moves)
                sent[1] += len(moves)
            return call(*args, **options)

        return counting

    for name in names:
        if hasattr(dist, name):
            real[name] = getattr(dist, name)
            setattr(dist, name, wrap(name, real[name]))
    try:
        yield sent
    finally:
        for name, call in real.items():
            setattr(dist, name, call)


def traffic(cost: Sharded, checks: int = 1, rank: int | None = None, vector_bytes: int = 8) -> int:
    """Bytes that a rank (this one) sends in an iteration with so many convergence checks. For n rows, m columns and R ranks:

    replicated  each rank sends its softmins of the columns to the ranks that join them, an even part of the columns each, and those send
                what they joined to all: 2 (R - 1) / R m numbers. A check gathers the row potentials: (R - 1) n_r, n_r the largest shard.
    ring        all shards but its successor's pass through a rank, y for the rows and x for the columns; and (R - 1) (n_r + m_r)
                numbers for the softmins.
    """
    size, rank = cost.ranks.group.size, cost.ranks.rank if rank is None else rank
    rows, columns = cost.ranks.sizes
    m, batch = cost.shape[-1], max(1, cost.shape[:-2].numel())
    if size == 1:
        return 0
    assert rows is not None
    if cost.layout == "replicated":
        parts = even_sizes(m, size)
        return batch * vector_bytes * (m - parts[rank] + (size - 1) * (parts[0] + checks * max(rows)))
    assert columns is not None
    sent = (size - 1) * (max(rows) + max(columns)) * vector_bytes * batch
    for side, sizes in ((ROWS, rows), (COLUMNS, columns)):
        width = sum(z.shape[-1] * z.itemsize for z in cost.pieces.points(side))
        sent += batch * width * (sum(sizes) - sizes[(rank + 1) % size])
    return sent


def measure(n: int, m: int, d: int, layout: str, iterations: int, repeats: int) -> dict[str, Any]:
    """Seconds, bytes and messages an iteration: the difference of a long and a short run, so that what happens once falls out."""
    ranks = Group()
    rows, columns = (even_sizes(size, ranks.size)[ranks.rank] for size in (n, m))
    gen = torch.Generator().manual_seed(ranks.rank)
    x, y = torch.rand(rows, d, generator=gen), torch.rand(columns, d, generator=gen) + 0.1
    problem = Problem(Sharded(SqEuclidean(x, y), layout=layout), ("std", 0.1))
    assert isinstance(problem.cost, Sharded)

    def run(k: int) -> float:
        if ranks.size > 1:
            dist.barrier()
        begun = time.perf_counter()
        gpu_ot.solve(problem, backend="chunked", tol=0, max_iter=1 + k, check_every=iterations, accelerate="none")
        return time.perf_counter() - begun

    run(1)
    pairs = torch.tensor([(run(iterations), run(3 * iterations)) for _ in range(repeats)], dtype=torch.float64)
    if ranks.size > 1:
        dist.all_reduce(pairs, dist.ReduceOp.MAX)  # the slowest rank's
    short, long = pairs.T
    middle, least, most = (
        float(late - early) / (2 * iterations)
        for early, late in ((short.median(), long.median()), (short.amin(), long.amin()), (short.amin(), long.amax()))
    )
    counts = []
    for k in (iterations, 3 * iterations):
        with counted(ranks.size, ranks.rank) as sent:
            gpu_ot.solve(problem, backend="chunked", tol=0, max_iter=1 + k, check_every=iterations, accelerate="none")
        counts.append(list(sent))
    sent, messages = ((late - early) / (2 * iterations) for early, late in zip(*counts, strict=True))
    unseen = traffic(problem.cost, checks=0)  # the row potentials are sent once in so many iterations
    expected = unseen + (traffic(problem.cost, checks=1) - unseen) / iterations
    return dict(
        n=n, m=m, d=d, layout=layout, ranks=ranks.size, time_s=middle, time_min_s=min(least, middle), time_max_s=most,
        bytes_sent=sent, bytes_expected=expected, bytes_match=abs(sent - expected) < 0.5, messages=messages, dtype="fp32", repeats=repeats,
    )  # fmt: skip


def work(row: dict[str, Any], cores: int) -> tuple[float, float, float]:
    """(pairs a core, messages, bytes) of an iteration on one rank. More ranks than cores share them."""
    pairs = SWEEPS[row["layout"]] * row["n"] * row["m"] / row["ranks"] * max(1.0, row["ranks"] / cores)
    return pairs, row["messages"], row["bytes_sent"]


def fit(rows: list[dict[str, Any]], cores: int) -> dict[str, float]:
    """Seconds a pair, a message and a byte, none negative, with the least relative error: the best of all subsets of the three."""
    A = torch.tensor([work(row, cores) for row in rows], dtype=torch.float64)
    t = torch.tensor([row["time_min_s"] for row in rows], dtype=torch.float64)
    A = A / t.unsqueeze(1)
    scale = A.amax(0).clamp(min=1e-300)
    best, least = torch.zeros(3, dtype=torch.float64), float("inf")
    for kept in ([0], [0, 1], [0, 2], [0, 1, 2]):
        found = torch.linalg.lstsq((A / scale)[:, kept], torch.ones_like(t)).solution
        error = float(((A / scale)[:, kept] @ found - 1).square().mean().sqrt())
        if bool((found >= 0).all()) and error < least:
            least, best = error, torch.zeros(3, dtype=torch.float64).index_copy(0, torch.tensor(kept), found)
    pair, message, byte = (best / scale).tolist()
    return dict(seconds_a_pair=pair, seconds_a_message=message, seconds_a_byte=byte, relative_error=least)


def modelled() -> list[dict[str, Any]]:
    """Iterations on GPUs, none of which was run."""
    n, d, rows = MODELLED["n"], MODELLED["d"], []
    for network, (bandwidth, latency) in NETWORKS.items():
        for layout in SWEEPS:
            for ranks in MODELLED["ranks"]:
                share = -(-n // ranks)
                busy = 2 * n * share / GPU_RATE  # there "replicated", too, takes two sweeps an iteration
                if layout == "replicated":
                    sent, messages = 2 * (ranks - 1) / ranks * n * 8, 2 * (ranks - 1)
                    seconds = busy + messages * latency + sent / bandwidth
                else:
                    around, vectors = 2 * (ranks - 1) * share * d * 4, 2 * (ranks - 1) * share * 8
                    sent, messages = around + vectors, 4 * (ranks - 1)
                    seconds = max(busy, messages / 2 * latency + around / bandwidth) + messages / 2 * latency + vectors / bandwidth
                rows.append(
                    dict(
                        section="modelled, not measured", solver=f"gpu_ot {layout}, {network}", layout=layout, network=network, ranks=ranks,
                        n=n, m=n, d=d, modelled=True, modelled_s=seconds, modelled_bytes=sent, modelled_work_s=busy,
                    )
                )  # fmt: skip
    return rows


def draw(rows: list[dict[str, Any]], fitted: dict[str, float], out: Path, cores: int) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from charts import DPI, STYLE
    from matplotlib.figure import Figure

    colours = {"replicated": "#0072B2", "ring": "#D55E00"}
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(9.6, 3.6), dpi=DPI, layout="constrained")
        strong, weak, far = figure.subplots(1, 3)
        for ax, scaling in ((strong, "strong"), (weak, "weak")):
            for layout, colour in colours.items():
                mine = sorted((row for row in rows if row["scaling"] == scaling and row["layout"] == layout), key=lambda row: row["ranks"])
                at, seconds = [row["ranks"] for row in mine], [1e3 * row["time_min_s"] for row in mine]
                spread = [[0.0] * len(mine), [max(0.0, 1e3 * row["time_s"] - t) for t, row in zip(seconds, mine, strict=True)]]
                ax.errorbar(at, seconds, yerr=spread, marker="o", capsize=2.5, color=colour, label=f"{layout}, measured")
                ax.plot(at, [1e3 * predicted(row, fitted, cores) for row in mine], linestyle=":", marker="x", color=colour, label="the fit")
            ax.axvspan(cores + 0.1, max([cores + 0.5, *(row["ranks"] for row in rows)]) + 0.5, color="#EEEEEE")
            ax.set(
                title=f"{scaling} scaling, gloo on {cores} cores", xlabel="ranks (grey: more than cores)", ylabel="ms an iteration", ylim=0
            )
        strong.legend(fontsize=7)
        lines = modelled()
        for name in dict.fromkeys(row["solver"] for row in lines):
            mine = [row for row in lines if row["solver"] == name]
            style = "--" if "NVLink" in name else ":"
            look = dict(linestyle=style, marker="o", markerfacecolor="white", markersize=4, color=colours[mine[0]["layout"]])
            far.plot([row["ranks"] for row in mine], [1e3 * row["modelled_s"] for row in mine], **look, label=name.removeprefix("gpu_ot "))
        far.set(xscale="log", yscale="log", xlabel="GPUs", ylabel="ms an iteration")
        far.set_title(f"MODELLED, no GPU was run\nn = m = {MODELLED['n']:,}, d = {MODELLED['d']}")
        far.legend(fontsize=6.5)
        figure.savefig(out / "sharded.png")


def predicted(row: dict[str, Any], fitted: dict[str, float], cores: int) -> float:
    pairs, messages, sent = work(row, cores)
    return pairs * fitted["seconds_a_pair"] + messages * fitted["seconds_a_message"] + sent * fitted["seconds_a_byte"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for sharded.json and sharded.png")
    parser.add_argument("--points", type=int, default=2000)
    parser.add_argument("--dimensions", type=int, default=64)
    parser.add_argument("--iterations", type=int, default=6)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--draw", action="store_true", help="measure nothing: fit and draw what is there")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size > 1:
        dist.init_process_group("gloo")
    n, cores = arguments.points, os.cpu_count() or 1
    if not arguments.draw:
        for layout in SWEEPS:
            for scaling, there in (("strong", n), ("weak", n // 4 * size)):
                found = measure(there, n, arguments.dimensions, layout, arguments.iterations, arguments.repeats)
                rows.append(dict(section=f"{scaling} scaling", solver=f"gpu_ot {layout}", scaling=scaling, modelled=False, **found))
                if int(os.environ.get("RANK", "0")) == 0:
                    print("  ".join(f"{k}={v:.4g}" if isinstance(v, float) else f"{k}={v}" for k, v in rows[-1].items()), flush=True)
    if int(os.environ.get("RANK", "0")) == 0 and arguments.out:
        arguments.out.mkdir(parents=True, exist_ok=True)
        file = arguments.out / "sharded.json"
        before = json.loads(file.read_text()) if file.exists() else {"environment": environment(), "rows": []}
        kept = [row for row in before["rows"] if not row["modelled"] and (arguments.draw or row["ranks"] != size)]
        rows = sorted(kept + rows, key=lambda row: (row["scaling"], row["layout"], row["ranks"]))
        fitted = fit(rows, cores)
        print("fitted:", "  ".join(f"{k}={v:.3g}" for k, v in fitted.items()))
        where = before["environment"] if arguments.draw else environment()
        text = {"environment": where, "fitted": fitted, "rows": rows + modelled()}
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(text, indent=1))
        partial.replace(file)
        draw(rows, fitted, arguments.out, cores)
    failed = [row for row in rows if not row["modelled"] and not row["bytes_match"]]
    if size > 1:
        dist.destroy_process_group()
    return int(bool(failed))


if __name__ == "__main__":
    raise SystemExit(main())
