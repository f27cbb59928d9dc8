"""The backends: each binds a problem's cost to hardware as a Geometry. Which one `auto` takes, and why not the others."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from .. import errors
from ..communicator import ALONE
from ..problem import Problem, vector_dtype
from . import chunked, grid, keops, line, mesh, multiscale, triton
from .absorbed import Absorbed
from .compiled import Compiled
from .dense import Dense
from .protocol import Geometry
from .resident import Resident

#: What `auto` may spend on the two n-by-m arrays of "dense": n = m = 5800 in float32, 4100 in float64. With the 250 MB that torch itself
#: takes, a solve stays within half a gigabyte (a gradient that reaches the points of a cost that does not fold needs about five more
#: such arrays, of one that folds none). Time would allow far more: measured on 2 cores at d = 3, an iteration on stored arrays takes
#: 0.2 ns a pair. Forming the cost anew takes 1.3 in blocks, 3 for one that does not fold, 17 for a formula of all coordinates; KeOps
#: takes 10, 7 and 6.
DENSE_BYTES = 2**28

#: Up to this many rows and columns a problem is one program's work on a GPU. Not timed, but counted from the compiled kernel: 24 slots
#: a pair and iteration are 6 us of one multiprocessor at 256 by 256, where the other backends launch ten kernels of 2-5 us each. At
#: 1024 by 1024 it is 100 us, which only many problems at once would gain from; a measurement may move this.
RESIDENT = 256


#: Seconds that an iteration takes for a pair, about: in blocks on 2 cores; through the kernels, not timed but counted.
PAIR_S, GPU_PAIR_S = 1.3e-9, 5e-13

#: The tolerance of a solve that names none.
TOL = 1e-4

PRECISIONS = ("fp32", "tf32", "bf16", "fp16")


@dataclass(frozen=True)
class Backend:
    """One backend, as `bind` and `explain` know it.

    refuse   why it cannot serve a problem, or None.
    bind     the problem's cost as its Geometry; only called when it does not refuse.
    memory   bytes that it needs beside the inputs, about: what it stores and its largest temporaries.
    """

    refuse: Callable[[Problem], str | None]
    bind: Callable[[Problem], Geometry]
    memory: Callable[[Problem], int]


def _matrix_bytes(problem: Problem) -> int:
    return problem.shape.numel() * problem.dtype.itemsize


def _cloud_bytes(problem: Problem) -> int:
    """One copy of both clouds with the two columns that the folded form adds, in the type of the potentials."""
    n, m = problem.shape[-2:]
    d = sum(z.shape[-1] for z in problem.cost.inputs.values() if z.ndim) // 2 + 2
    copies = problem.shape.numel() // (n * m)
    return copies * (n + m) * d * vector_dtype(problem.a.device).itemsize


def _block_bytes(problem: Problem) -> int:
    """Three wide temporaries of one block."""
    entries = chunked.CPU_ENTRIES if problem.a.device.type == "cpu" else chunked.GPU_ENTRIES
    return 3 * vector_dtype(problem.a.device).itemsize * min(entries, problem.shape.numel())


#: By name, in order of preference where nothing else decides. "dense" runs the absorbed form; "softmin" is the same algorithm as it is
#: written in papers, the truth in tests.
BACKENDS = {
    "compiled": Backend(Compiled.refuse, lambda problem: Compiled(problem.cost), lambda problem: 2 * _matrix_bytes(problem)),
    "dense": Backend(lambda problem: None, lambda problem: Absorbed(problem.cost), lambda problem: 2 * _matrix_bytes(problem)),
    "resident": Backend(Resident.refuse, lambda problem: Resident(problem.cost.dense()), Resident.memory),
    "triton": Backend(triton.Streaming.refuse, triton.Streaming, lambda problem: 2 * _cloud_bytes(problem)),
    "chunked": Backend(
        chunked.refuse, lambda problem: chunked.Chunked(problem.cost), lambda problem: 3 * _cloud_bytes(problem) + _block_bytes(problem)
    ),
    "keops": Backend(keops.refuse, lambda problem: keops.Keops(problem.cost), lambda problem: 2 * _cloud_bytes(problem)),
    "grid": Backend(grid.refuse, grid.OnGrid, grid.memory),
    "line": Backend(line.refuse, line.Line, line.memory),
    "mesh": Backend(mesh.refuse, mesh.bind, mesh.memory),
    "multiscale": Backend(multiscale.refuse, multiscale.bind, multiscale.memory),
    "softmin": Backend(lambda problem: None, lambda problem: Dense(problem.cost), _matrix_bytes),
}


class Rule(NamedTuple):
    """Take `backend`, `because`, unless it refuses the problem: then the next rule decides."""

    backend: str
    because: str


def _rules(problem: Problem, tol: float | None) -> Iterator[Rule]:
    """Those that hold for the problem. "dense" serves everything, so the last is never refused."""
    cost, gpu = problem.cost, _on(problem, "cuda")
    if (own := cost.backend) is not None:
        if own not in BACKENDS:
            raise errors.unknown("backend of the cost", own, [*BACKENDS])
        yield Rule(own, f'the cost is {cost.describe()}, and "{own}" runs it as it is written')
    if gpu and max(problem.shape[-2:]) <= RESIDENT and (cost.stored or _fits(problem)):
        yield Rule(
            "resident",
            "the problems are so small that launches take longer than the work, and one launch runs many iterations of all of them",
        )
    if _on(problem, "cpu") and (cost.stored or _fits(problem)):
        yield Rule("compiled", "its n-by-m arrays fit in memory, and on a CPU machine code runs all iterations in one call")
    if cost.stored:
        yield Rule("dense", "the cost is a matrix that is in memory already")
    if _fits(problem):
        yield Rule(
            "dense",
            f"both n-by-m arrays fit in {DENSE_BYTES >> 20} MiB, and products on stored arrays are the fastest iterations there are",
        )
    large = "the n-by-m arrays are too large to keep"
    few = multiscale.refuse(problem) is None and multiscale.pays(problem)
    if gpu and few:
        yield Rule("multiscale", f"{large}, and eps reaches so few points that about {multiscale.share(problem):.1%} of the pairs are left")
    if line.refuse(problem) is None:
        yield Rule("line", f"{large}, its points have one feature, and sums of Gaussians on a line need no pairs")
    if tol is not None and mesh.refuse(problem) is None and _quicker(problem, tol):
        yield Rule(
            "mesh", f"{large}, its points have few features, and a mesh of {mesh.per_of(problem, tol):.1f} nodes a blur is exact enough"
        )
    if gpu and cost.folds:
        yield Rule("triton", f"{large}, the cost folds, and the kernels stream it through the tensor cores")
    if gpu:
        yield Rule("keops", "the cost does not go through the kernels, and KeOps compiles a loop for it")
    if _on(problem, "cpu") and cost.depth > 1:
        yield Rule("keops", f"{large}, and torch would hold every coordinate of the formula, where KeOps compiles a loop")
    if few:
        yield Rule("multiscale", f"{large}, and eps reaches so few points that about {multiscale.share(problem):.1%} of the pairs are left")
    yield Rule("chunked", f"{large}, and blocks of them are formed, reduced and dropped")
    if _on(problem, "cpu"):
        yield Rule("keops", f"{large}, and the cost cannot be taken in blocks")
    yield Rule("dense", "nothing else can serve this cost, whatever the memory")


def _on(problem: Problem, device: str) -> bool:
    return problem.a.device.type == device


def _fits(problem: Problem) -> bool:
    return BACKENDS["dense"].memory(problem) <= DENSE_BYTES


def _quicker(problem: Problem, tol: float) -> bool:
    """Whether an iteration by way of a mesh takes half the time of an exact one and fits. For CPUs measured, see bench/FACTS.md."""
    n, m = problem.shape[-2:]
    a_pair = GPU_PAIR_S if problem.a.is_cuda else PAIR_S
    return mesh.sweeps_within(a_pair * n * m / 4, problem, tol)


def bind(problem: Problem, backend: str = "auto", precision: str = "fp32", tol: float | None = None) -> Geometry:
    """The problem's cost as a Geometry; `precision` is what "triton" may round points to, and nothing to the others. `tol` is the marginal
    error that is asked for, where it may come from the sums: only then "auto" takes a backend that is not exact.

    Raises ProblemError for a backend that does not exist, BackendError for one that cannot serve this problem, with the reason.
    """
    ranks = problem.cost.ranks
    largest = ranks.largest(problem)
    if backend == "auto":
        backend = _choose(largest, tol if ranks is ALONE else None)[0].backend
    elif backend not in BACKENDS:
        raise errors.unknown("backend", backend, ["auto", *BACKENDS])
    elif why := BACKENDS[backend].refuse(largest):
        raise errors.backend_refused(backend, why)
    if precision not in PRECISIONS:
        raise errors.unknown("precision", precision, PRECISIONS)
    if backend in ("line", "mesh", "multiscale") and ranks is not ALONE:
        raise errors.backend_refused(backend, "ranks share its points, and it needs all of them")
    bind_piece = BACKENDS[backend].bind
    if backend == "triton":
        bind_piece = functools.partial(triton.Streaming, precision=precision)
    elif backend in ("mesh", "multiscale"):
        bind_piece = functools.partial(BACKENDS[backend].bind, tol=tol)  # pyright: ignore[reportCallIssue]
    return ranks.bind(problem, lambda piece: piece.cost.geometry(piece, bind_piece))


def explain(problem: Problem, tol: float | None = TOL) -> str:
    """Which backend "auto" takes for this problem and why, the memory each would need beside the inputs, and why not the others.

    tol  that of the solve; None for one whose marginals or derivatives must be exact, as with grad="implicit".

    >>> print(gpu_ot.explain(Problem(SqEuclidean(x, y), eps=0.1)))
    """
    kind, largest = problem.cost.describe(), problem.cost.ranks.largest(problem)
    if largest is not problem:
        return f"{problem.shape[-2]} by {problem.shape[-1]}, {kind}. The largest piece:\n{explain(largest, None)}"
    taken, overruled = _choose(problem, tol)
    *batch, n, m = problem.shape
    count = f"{problem.shape.numel() // (n * m)} problems of " if batch else ""
    lines = [
        f'{count}{n} by {m}, {kind}, {str(problem.dtype).removeprefix("torch.")} on {problem.a.device}: auto takes "{taken.backend}".',
        f"  because {taken.because}",
    ]
    lines += [f'  instead of "{rule.backend}", which was refused' for rule in overruled]
    width = max(map(len, BACKENDS))
    for name, backend in BACKENDS.items():
        why = backend.refuse(problem)
        verdict = "taken" if name == taken.backend else f"refused: {why}" if why else f"passed over: {_passed_over(name, problem)}"
        lines.append(f"  {name:<{width}}  {'-' if why else _human(backend.memory(problem)):>8}  {verdict}")
    return "\n".join(lines)


def _choose(problem: Problem, tol: float | None = TOL) -> tuple[Rule, list[Rule]]:
    """The rule that decides, and those before it whose backends refused the problem."""
    overruled: list[Rule] = []
    for rule in _rules(problem, tol):
        if BACKENDS[rule.backend].refuse(problem) is None:
            return rule, overruled
        overruled.append(rule)
    raise AssertionError("the last rule takes everything")


def _passed_over(name: str, problem: Problem) -> str:
    if name == "softmin":
        return 'the readable form of "dense", for tests: slower, and never chosen'
    if name == "compiled":
        return f"its n-by-m arrays exceed {DENSE_BYTES >> 20} MiB"
    if name == "resident":
        return f"for problems of up to {RESIDENT} by {RESIDENT} on a GPU"
    if name == "grid":
        return "the cost is stored"
    if name == "line":
        return "its n-by-m arrays fit in memory, and products on them are fast enough: by name from a few thousand points on"
    if name == "mesh":
        return "slower than an exact backend at this size and this eps"
    if name == "multiscale":
        return (
            "slower while the n-by-m arrays fit in memory" if _fits(problem) else "eps reaches too many of the pairs, or a mesh is faster"
        )
    if name == "dense" and problem.cost.backend is not None:
        return f"whoever passes {problem.cost.describe()} wants no n-by-m array"
    if name == "dense":
        return "slower on this device" if _fits(problem) else f"its n-by-m arrays exceed {DENSE_BYTES >> 20} MiB"
    if name == "keops":
        return "slower here, and each new formula waits for a compiler"
    return "slower while the n-by-m arrays fit in memory" if _fits(problem) else "slower for this cost on this device"


def _human(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB" if size < 1000 else f"{size:,.0f} GB"
