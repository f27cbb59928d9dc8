"""The command line, `gpu-ot`: one subcommand a room, which is imported only when it is asked for."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Sequence
from typing import NoReturn

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


if __name__ == "__main__":
    sys.exit(main())
