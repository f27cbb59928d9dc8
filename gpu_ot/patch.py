"""`python -m gpu_ot.patch [--device cuda] script.py [arguments]` runs an unmodified script with this package's solvers in POT's place,
and with `--geomloss` its SamplesLoss in geomloss's.

Also `-m module [arguments]` for a module. `gpu_ot.patch()` is the same from within Python.
"""

from __future__ import annotations

import argparse
import runpy
import sys
from pathlib import Path

import gpu_ot


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(prog="python -m gpu_ot.patch", description="Run a script with gpu_ot's solvers in POT's place.")
    parser.add_argument("--device", help="where numpy arrays are solved, for instance cuda; the CPU when left out")
    parser.add_argument("--geomloss", action="store_true", help="put ours in the place of geomloss.SamplesLoss, too")
    parser.add_argument("-m", dest="module", action="store_true", help="the name is that of a module")
    parser.add_argument("script", help="path of the script")
    parser.add_argument("arguments", nargs=argparse.REMAINDER, help="what the script finds in sys.argv")
    given = parser.parse_args(arguments)
    if not given.module and not Path(given.script).is_file():
        parser.error(f"{given.script} is not a file")
    sys.argv = [given.script, *given.arguments]
    with gpu_ot.pot.patching.patch(given.device, geomloss=given.geomloss):
        if given.module:
            sys.path[0] = ""
            runpy.run_module(given.script, run_name="__main__", alter_sys=True)
        else:
            sys.path[0] = str(Path(given.script).resolve().parent)
            runpy.run_path(given.script, run_name="__main__")


if __name__ == "__main__":
    main(sys.argv[1:])
