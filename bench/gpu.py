"""One command for a day with a GPU: are the kernels right on it, and how fast are they beside their peers and the chip's limits?

    python bench/gpu.py [--out DIR] [--minutes 9]     writes DIR/gpu.json after every row, so that a kill loses nothing
    python bench/gpu.py --dry                         everything tiny, on a device that is not there: checks this script

First one launch of each kernel, then parity: every kernel and precision against float64 torch on the device, its error beside torch's
own in float32. A failure is printed, the exit code is 1, and times of what has failed are not reported (they are in the rows, marked as
measured on red tests). Then timings, the most telling first: contestants interleaved, medians and extremes of CUDA events, peak memory
of torch's allocator, and the floor: what the chip needs at least for the exponentials, the arithmetic or the products, whichever is
longest. A peer that is not installed or fails is a row that says so. Every section has its share of the minutes and ends with it; what no
time was left for is a row too.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import sys
import threading
import time
import traceback
import warnings

from machine import DRY, START, empty_cache  # first: it settles the environment before Triton is imported

# isort: split
import torch
from parity import compilations, tasks, work
from protocols import SECTIONS
from rows import PEERS, SHARES, Clock, Report, reason


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--out", help="folder for gpu.json")
    parser.add_argument("--dry", action="store_true", help="everything tiny, in Triton's interpreter, without a GPU")
    parser.add_argument(
        "--only", nargs="+", choices=list(SECTIONS), default=list(SECTIONS), help="sections to run; timings want parity first"
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--seconds", type=float, default=60.0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if not DRY and not torch.cuda.is_available():
        print("bench/gpu.py: no GPU here, nothing measured (--dry checks the script itself).")
        return 0
    if importlib.util.find_spec("triton") is None:
        print("bench/gpu.py: Triton is not installed, nothing measured.")
        return 0
    # float32 means float32: peers and truths alike.
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cudnn.allow_tf32 = False
    torch.manual_seed(0)
    if DRY:
        torch.set_num_threads(1)  # nothing here is large enough for two
    if args.worker:
        warnings.simplefilter("ignore")  # a bad shift overflows, which is what it is for; the interpreter says so
        return work(args.worker, args.seconds)
    report, clock = Report(args.out), Clock(args.minutes)
    print("  ".join(f"{key}={value}" for key, value in report.environment.items() if value is not None))

    plan(args.minutes)
    for name, module in PEERS.items():
        if importlib.util.find_spec(module) is None:
            report.add(section="peers", case="absent", solver=name, skipped="not installed")

    def cut_off() -> None:
        """The last resort against a peer that neither ends nor can be interrupted."""
        report.add(section="end", case="cut off", solver="the clock", error=f"not done after {args.minutes} minutes")
        code = report.finish()
        sys.stdout.flush()
        os._exit(code)

    watchdog = threading.Timer(60 * args.minutes - (time.monotonic() - START), cut_off)
    watchdog.daemon = True
    watchdog.start()
    for name, section in SECTIONS.items():
        if name not in args.only:
            continue
        clock.enter(name)
        print(f"\n{name} ({max(clock.left(), 0):.0f} s)", flush=True)
        try:
            section(report, clock)
        except Exception as error:
            # A section that breaks is a defect of this script or of the package, never of a peer: as loud as a failed check.
            report.add(section=name, case="the section itself", solver="gpu_ot", error=reason(error))
            traceback.print_exc(limit=-3)
        empty_cache()
    watchdog.cancel()
    return report.finish()


#: Seconds that a kernel takes one core to compile, measured offline, and the cores that do it.
COMPILE_S, CORES = 1.5, max(1, min(8, (os.cpu_count() or 2) // 2))


def plan(minutes: float) -> None:
    """What is to come, and that it fits."""
    count, seconds = compilations(), 58 * minutes
    print(f"\n{'stage':<12}{'seconds':>8}  of {60 * minutes:.0f}, and what for")
    for name, share in SHARES.items():
        what = (SECTIONS[name].__doc__ or "").split("\n")[0]
        if name == "parity":
            compiling = COMPILE_S * count / CORES
            what += f" {len(tasks())} groups; about {count} kernels to compile, {compiling:.0f} s on {CORES} cores."
        print(f"{name:<12}{share * seconds:>8.0f}  {what}")
    print(f"{'in all':<12}{sum(SHARES.values()) * seconds:>8.0f}\n", flush=True)


if __name__ == "__main__":
    sys.exit(main())
