"""The command line, `gpu-ot`: one subcommand a room, which is imported only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from . import __version__
from .errors import BackendError, ProblemError


class _Parser(argparse.ArgumentParser):
    """Refusals are one line; the usage is one `--help` away."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message}; {self.prog} --help lists the options.\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns 0, or 2 for a request that was refused, with one line on stderr; alone it prints its help."""
    parser = _Parser(prog="gpu-ot", description="Optimal transport that stays on the device.")
    parser.add_argument("--version", action="version", version=f"gpu_ot {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="")
    _add_demo(commands)
    _add_tune(commands)
    _add_pair(commands)
    _add_train(commands)

    args = parser.parse_args(argv)
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        args.run(args)
    except (ProblemError, BackendError) as refusal:
        print(f"gpu-ot: {refusal}", file=sys.stderr)
        return 2
    return 0


def _add_demo(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "demo",
        help="exchange the colours of two photographs, and compare with POT",
        description="Exchange the colours of the two photographs that ship inside scikit-learn, both ways from one solve: one PNG, "
        "and a table of POT and gpu_ot on the same problem. Needs no network.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--device", default="cpu", help="where gpu_ot runs: cpu, cuda, cuda:1; POT runs in numpy")
    parser.add_argument("--pixels", type=int, default=800, help="pixels sampled from each photograph; memory and time grow as its square")
    parser.add_argument("--reg", type=float, default=5e-3, help="entropic regularisation, in squared RGB distance (black to white is 3)")
    parser.add_argument("--out", default="out/demo.png", help="the PNG to write")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    try:
        with contextlib.redirect_stdout(io.StringIO()):  # packages that POT imports when they are there greet on stdout
            from . import demo
    except ModuleNotFoundError as missing:
        package = (missing.name or "").partition(".")[0]
        if package not in (
            known := {"sklearn": "scikit-learn", "matplotlib": "matplotlib", "ot": "POT", "tqdm": "tqdm", "threadpoolctl": "threadpoolctl"}
        ):
            raise
        raise ProblemError(f"the demo needs {known[package]}, which is not installed: pip install gpu_ot[demo]") from None
    demo.run(device=args.device, pixels=args.pixels, reg=args.reg, out=args.out)


def _add_tune(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "tune",
        help="time the kernels' block shapes on this GPU and keep what is faster",
        description="Time the candidate block shapes of the Triton kernels on this GPU, for the sizes given, and write the fastest to a "
        "file that later processes read. Compiles some forty shapes per kernel and size: minutes. Nothing is tuned unless asked for here.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--d", type=_positive, nargs="+", default=[3, 64], help="features of the points")
    parser.add_argument(
        "--n", type=_positive, nargs="+", default=[10_000], help="points on each side; a row serves sizes within 4 times of it"
    )
    parser.add_argument("--precision", nargs="+", choices=("fp32", "tf32", "bf16", "fp16"), default=["fp32"], help="storage of the points")
    parser.add_argument("--device", default="cuda", help="which GPU: cuda, cuda:1")
    parser.add_argument(
        "--out", default=None, help="the file; by default $GPU_OT_TUNING, else gpu_ot/tuning.json in the user's cache folder"
    )
    parser.set_defaults(run=_tune)


def _positive(text: str) -> int:
    if (value := int(text)) < 1:
        raise ValueError
    return value


_positive.__name__ = "number of at least 1"  # what argparse calls it when it refuses


def _tune(args: argparse.Namespace) -> None:
    import torch

    if not torch.cuda.is_available():
        raise BackendError(
            "tune times kernels on a GPU, and torch finds none here. Nothing was written; without a file the kernels use their own table."
        )
    try:
        device = torch.device(args.device)
        torch.zeros(1, device=device)
    except RuntimeError as problem:
        raise ProblemError(f"--device {args.device} cannot be used here ({str(problem).splitlines()[0]}).") from None
    if device.type != "cuda" or os.environ.get("TRITON_INTERPRET") == "1":
        raise ProblemError("--device must name a GPU, and TRITON_INTERPRET must not be set: the interpreter's times mean nothing.")
    try:
        from .kernels import trial, tuning  # pyright: ignore[reportMissingImports]
    except ModuleNotFoundError as missing:
        raise BackendError(f"tune needs {missing.name}, which is not installed: pip install triton (it exists for Linux).") from None

    path = _tuning_file(args.out, tuning)
    trials = [
        trial.Trial(kernel, precision, n, d)
        for precision in args.precision for d in args.d for n in args.n for kernel in ("softmin", "vector", "apply")
    ]  # fmt: skip
    device = torch.device("cuda", torch.cuda.current_device() if device.index is None else device.index)
    outcomes, start = [], time.monotonic()
    with torch.cuda.device(device):
        arch = tuning.architecture(torch.empty(0, device=device))
        for done, total, outcome in trial.run(trials, device, arch):
            _bar(done, total, time.monotonic() - start)
            if outcome is not None:  # written at once: an interrupted run keeps what it found
                outcomes.append(outcome)
                _keep(path, tuning, device, outcome)
    print(file=sys.stderr)
    print(tuned_table(outcomes))
    print(f"\nwrote {path}: processes that start from now on read it" + (f" if {tuning.ENVIRONMENT} names it." if args.out else "."))


def _tuning_file(out: str | None, tuning: Any) -> Path:
    """Where to write; finds out whether it can be written, and whether what is there is ours, before minutes are spent."""
    path = Path(out) if out else tuning.cache_file()
    if path is None:
        raise ProblemError(
            f"{tuning.ENVIRONMENT} is empty, so no file is read and none would be written. Unset it, or name one with --out."
        )
    try:
        if path.exists():
            tuning.read(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        probe = path.with_name(f"{path.name}.{os.getpid()}.partial")
        probe.touch()
        probe.unlink()
    except ValueError as problem:
        raise ProblemError(f"{path} is not a file of timed tiles: {problem}. Delete it (rm {path}), or name another with --out.") from None
    except OSError as problem:
        raise ProblemError(f"{path} cannot be written ({problem.strerror}). Name a file in a folder of yours with --out.") from None
    return path


def _keep(path: Path, tuning: Any, device: Any, outcome: Any) -> None:
    try:
        tuning.write(path, tuning.machine(device), [outcome.row()])
    except OSError as problem:
        raise ProblemError(f"{path} cannot be written any more ({problem.strerror}). Name another file with --out.") from None


def _bar(done: int, total: int, seconds: float, what: str = "shapes") -> None:
    """One line on a terminal, rewritten; in a log, a line every tenth of the way."""
    left = f"{seconds / done * (total - done):.0f} s left"
    if sys.stderr.isatty():
        filled = 30 * done // total
        print(f"\r{'█' * filled}{'░' * (30 - filled)} {done}/{total} {what}, {left}   ", end="", file=sys.stderr, flush=True)
    elif done == total or done % max(1, total // 10) == 0:
        print(f"{done}/{total} {what}, {left}", file=sys.stderr, flush=True)


def tuned_table(outcomes: Sequence[Any]) -> str:
    """The table's tile against the fastest, a line a kernel and size. Tiles are rows x columns, warps, stages."""
    lines = [f"{'kernel':<9}{'points':<7}{'d':>5}{'n':>8}  {'tile of the table':<20}{'ms':>9}  {'fastest tile':<20}{'ms':>9}{'gain':>8}"]
    for o in outcomes:
        old, new = (f"{t.block_n}x{t.block_m} w{t.warps} s{t.stages}" for t in (o.old, o.new))
        gain = f"{o.old_ms / o.new_ms:.2f}x" if o.new != o.old else "kept"
        asked = f"{o.trial.kernel:<9}{o.trial.precision:<7}{o.trial.d:>5}{o.trial.n:>8}"
        lines.append(f"{asked}  {old:<20}{o.old_ms:>9.4g}  {new:<20}{o.new_ms:>9.4g}{gain:>8}")
    return "\n".join(lines)


def _add_pair(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "pair",
        help="find which frames of two LeRobot datasets belong together",
        description="Dynamic time warping of every target episode with every source episode, on label columns read from the parquet files "
        "(no image is decoded): which source frames belong to each target frame, and how far episodes are from each other. Write it to a "
        "file that records what was paired, for `gpu-ot train`.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--src", required=True, help="the source (simulated) dataset: a repo id, or its folder")
    parser.add_argument("--tgt", required=True, help="the target (real) dataset")
    parser.add_argument("--out", default="pairs.npz", help="the file to write")
    parser.add_argument("--keys", nargs="+", default=["observation.state"], help="label columns, side by side")
    parser.add_argument("--tgt-keys", nargs="+", default=None, help="their names in the target, where they differ")
    parser.add_argument("--slice", type=int, nargs=2, metavar=("A", "B"), default=None, help="features [A, B) of the label; all by default")
    parser.add_argument("--center", action="store_true", help="subtract each episode's mean")
    parser.add_argument("--zscore", action="store_true", help="scale each feature by its mean and deviation over both datasets")
    parser.add_argument("--stride", type=_positive, default=1, help="compare every so many frames, and interpolate in between")
    parser.add_argument("--band", type=float, default=None, help="Sakoe-Chiba: frames that a pairing may stray; anywhere by default")
    parser.add_argument(
        "--topk", type=_positive, default=None, help="keep the nearest so many source episodes of each target's; all by default"
    )
    parser.add_argument("--cost", choices=("euclidean", "l1", "linf"), default="euclidean", help="cost between two frames")
    parser.add_argument("--norm", choices=("steps", "arc", "none"), default="steps", help="what the distance is divided by")
    parser.add_argument("--engine", choices=("auto", "numba", "numpy"), default="auto", help="the same pairs; numba is faster")
    parser.add_argument("--workers", type=_positive, default=None, help="threads; one a processor by default")
    parser.set_defaults(run=_pair)


def _pair(args: argparse.Namespace) -> None:
    from .lerobot.episodes import read_recording
    from .lerobot.pairing import pair_episodes
    from .lerobot.pairs import PairOptions, writable

    options = PairOptions(
        tuple(args.keys), args.tgt_keys, args.slice, args.center, args.zscore, args.stride, args.band, args.topk, args.cost, args.norm
    )  # fmt: skip
    path = writable(args.out)
    source, target = read_recording(args.src, options.keys), read_recording(args.tgt, options.target_keys or options.keys)
    start = time.monotonic()
    pairs = pair_episodes(
        source,
        target,
        options,
        engine=args.engine,
        workers=args.workers,
        progress=lambda done, total: _bar(done, total, time.monotonic() - start, "pairs"),
    )
    if sys.stderr.isatty():
        print(file=sys.stderr)
    pairs.write(path)
    print(pairs.summary())
    print(f"\nwrote {path} ({path.stat().st_size / 2**20:.1f} MiB) after {time.monotonic() - start:.1f} s")


def _add_train(commands: argparse._SubParsersAction[_Parser]) -> None:
    parser = commands.add_parser(
        "train",
        help="LeRobot's training with the alignment in its loss",
        description="Run LeRobot's own training script, unmodified, with the optimal-transport loss of --ot-config added to the policy's. "
        "What it saves loads in LeRobot without this package. For several processes: torchrun ... -m gpu_ot.lerobot.train.",
    )
    parser.add_argument("--ot-config", default=None, help="JSON or YAML; when resuming, the checkpoint's own where this is left out")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="what lerobot-train takes")
    parser.set_defaults(run=_train)


def _train(args: argparse.Namespace) -> None:
    from .lerobot.train import run

    run(args.ot_config, args.arguments)


if __name__ == "__main__":
    sys.exit(main())
