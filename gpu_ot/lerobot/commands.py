"""What `gpu-ot` offers to robot learning: pair, pairs show, check, train. Each function describes its arguments to a parser."""

from __future__ import annotations

import argparse
import importlib.util
import sys
import time

from .pairs import PairOptions, writable


def pair(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Dynamic time warping of every target episode with every source episode, on label columns read from the parquet files "
        "(no image is decoded): which source frames belong to each target frame, and how far episodes are from each other. Write it to a "
        "file that records what was paired, for `gpu-ot train`."
    )
    add = parser.add_argument
    add("--src", required=True, help="the source (simulated) dataset: a repo id, or its folder")
    add("--tgt", required=True, help="the target (real) dataset")
    add("--out", default="pairs.npz", help="the file to write")
    add("--keys", nargs="+", default=["observation.state"], help="label columns, side by side")
    add("--tgt-keys", nargs="+", default=None, help="their names in the target, where they differ")
    add("--slice", type=int, nargs=2, metavar=("A", "B"), default=None, help="features [A, B) of the label; all by default")
    add("--center", action="store_true", help="subtract each episode's mean")
    add("--zscore", action="store_true", help="scale each feature by its mean and deviation over both datasets")
    add("--stride", type=int, default=1, help="compare every so many frames, and interpolate in between")
    add("--band", type=float, default=None, help="Sakoe-Chiba: frames that a pairing may stray; anywhere by default")
    add("--topk", type=int, default=None, help="keep the nearest so many source episodes of each target's; all by default")
    add("--cost", choices=("euclidean", "l1", "linf"), default="euclidean", help="cost between two frames")
    add("--norm", choices=("steps", "arc", "none"), default="steps", help="what the distance is divided by")
    add("--workers", type=int, default=None, help="threads; one a processor by default")
    parser.set_defaults(run=_pair)


def _pair(args: argparse.Namespace) -> None:
    from .episodes import read_recording
    from .pairing import pair_episodes

    names = ("tgt_keys", "slice", "center", "zscore", "stride", "band", "topk", "cost", "norm")
    options = PairOptions(args.keys, *(getattr(args, name) for name in names))
    path = writable(args.out)
    source, target = read_recording(args.src, options.keys), read_recording(args.tgt, options.target_keys or options.keys)
    if importlib.util.find_spec("numba") is None:
        print("numba is not installed, and without it this takes a thousand times as long: pip install numba", file=sys.stderr)
    start = time.monotonic()

    def progress(done: int, total: int) -> None:
        args.progress(done, total, time.monotonic() - start, "pairs")

    found = pair_episodes(source, target, options, workers=args.workers, progress=progress)
    if sys.stderr.isatty():
        print(file=sys.stderr)
    found.write(path)
    print(found.summary())
    print(f"\nwrote {path} ({path.stat().st_size / 2**20:.1f} MiB) after {time.monotonic() - start:.1f} s")


def pairs(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Look at a pair file: a target episode and its nearest source episode as strips, with the path between them, and the distances of "
        "all episodes. One PNG."
    )
    add = parser.add_argument
    add("action", choices=["show"], help="what to do with them")
    add("file", help="what gpu-ot pair wrote, or the fork's JSON")
    add("--src", required=True, help="the source dataset: a repo id, or its folder")
    add("--tgt", required=True, help="the target dataset")
    add("--episode", type=int, default=None, help="the target episode to show; the one with the nearest partner by default")
    add("--camera", default=None, help="a camera, whose frames are shown beside the labels; needs LeRobot")
    add("--out", default="pairs.png", help="the PNG to write")
    parser.set_defaults(run=_show)


def _show(args: argparse.Namespace) -> None:
    from .show import show

    print(show(args.file, args.src, args.tgt, args.out, args.episode, args.camera))


def check(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "All that a training does before its first step, and none of the training: the keys of both datasets, what each feature stands "
        "for and which part of the policy embeds it, the pairs, a batch, the cost of each term, and numbers to begin with."
    )
    _training(parser, check=True)


def train(parser: argparse.ArgumentParser) -> None:
    parser.description = (
        "Run LeRobot's own training script, unmodified, with the optimal-transport loss of --ot-config added to the policy's. "
        "What it saves loads in LeRobot without this package. For several processes: torchrun ... -m gpu_ot.lerobot.train."
    )
    _training(parser)
    said = "when resuming: begin the sequence of pairs anew, as other data ask for"
    parser.add_argument("--restart-pairs", action="store_true", help=said)


def _training(parser: argparse.ArgumentParser, check: bool = False) -> None:
    parser.usage = "%(prog)s [--ot-config FILE] [--ot.KEY=VALUE ...] -- what lerobot-train takes"
    parser.add_argument("--ot-config", default=None, help="JSON or YAML; when resuming, the checkpoint's own where this is left out")
    parser.add_argument("arguments", nargs="*", metavar="-- ARGUMENTS", help="what lerobot-train takes; --ot.reg=0.05 sets a single value")
    parser.set_defaults(run=_train, check=check, restart_pairs=False, passes_on="--ot.")


def _train(args: argparse.Namespace) -> None:
    from .train import run

    run(args.ot_config, [*args.others, *args.arguments], restart_pairs=args.restart_pairs, check=args.check)
