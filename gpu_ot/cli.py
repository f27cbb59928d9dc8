"""The command line, `gpu-ot`: one subcommand a room, which is imported only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import importlib
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


#: Command -> (the function that describes its arguments, what it does in a line). A room registers its own; it is imported when asked for.
COMMANDS = {
    "demo": ("gpu_ot.cli:_describe_demo", "exchange the colours of two photographs, and compare with POT"),
    "compile": ("gpu_ot.warm:describe", "compile what runs on a CPU now, rather than at the first call"),
    "tune": ("gpu_ot.cli:_describe_tune", "time the kernels' block shapes on this GPU and keep what is faster"),
    "pair": ("gpu_ot.lerobot.commands:pair", "find which frames of two LeRobot datasets belong together"),
    "pairs": ("gpu_ot.lerobot.commands:pairs", "show what a pair file holds: episode strips with the path between them, and distances"),
    "check": ("gpu_ot.lerobot.commands:check", "what a training would align: keys, encoders, a batch and its costs; no training"),
    "train": ("gpu_ot.lerobot.commands:train", "LeRobot's training with the alignment in its loss"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one subcommand. Returns 0, or 2 for a request that was refused, with one line on stderr; alone it prints its help."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = _Parser(prog="gpu-ot", description="Optimal transport that stays on the device.")
    parser.add_argument("--version", action="version", version=f"gpu_ot {__version__}")
    parser.set_defaults(progress=_bar)
    commands = parser.add_subparsers(title="commands", metavar="")
    for name, (dotted, summary) in COMMANDS.items():
        command = commands.add_parser(name, help=summary)
        if name in argv[:1]:
            module, function = dotted.split(":")
            getattr(importlib.import_module(module), function)(command)

    args, others = parser.parse_known_args(argv)
    if not all(each.startswith(getattr(args, "passes_on", "\n")) for each in others):
        parser.error(f"unrecognized arguments: {' '.join(others)}")
    args.others = others
    if not hasattr(args, "run"):
        parser.print_help()
        return 0
    try:
        args.run(args)
    except (ProblemError, BackendError) as refusal:
        print(f"gpu-ot: {refusal}", file=sys.stderr)
        return 2
    return 0


def _describe_demo(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.ArgumentDefaultsHelpFormatter
    parser.description = (
        "Exchange the colours of the two photographs that ship inside scikit-learn, both ways from one solve: one PNG, "
        "and a table of POT and gpu_ot on the same problem. Needs no network."
    )
    parser.add_argument("--device", default="cpu", help="where gpu_ot runs: cpu, cuda, cuda:1; POT runs in numpy")
    parser.add_argument(
        "--pixels",
        type=int,
        default=800,
        help="pixels sampled from each photograph for the table and the picture of the plan; memory and time grow as its square",
    )
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


def _describe_tune(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Time the candidate block shapes of the Triton kernels on this GPU, for the sizes given, and write the fastest to a "
        "file that later processes read. Compiles some forty shapes per kernel and size: minutes. Nothing is tuned unless asked for here."
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


if __name__ == "__main__":
    sys.exit(main())
