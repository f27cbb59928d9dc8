"""DTW of every target episode with every source episode: seconds for a whole pairing, and milliseconds a pair on one core.

    python bench/pairing.py [--out DIR] [--sources 500] [--targets 10] [--frames 500] [--d 8] [--repeats 3] [--workers 2]

Episodes are random walks of `frames` steps give or take a fifth, smoothed. A pairing is what `gpu-ot pair` does between reading and
writing: labels checked, distance and path of every pair, and the table of frames. Variants take turns; medians, with the least and
the largest beside them; compiling is timed by itself.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
from machine import environment

from gpu_ot.cli import _bar
from gpu_ot.lerobot.dtw import dtw
from gpu_ot.lerobot.pairing import pair_episodes
from gpu_ot.lerobot.pairs import PairOptions


def episodes(count: int, frames: int, d: int, seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(int(0.8 * frames), int(1.2 * frames) + 1, count)
    walks = [rng.normal(size=(n, d)).cumsum(0) / 10 for n in lengths]
    return [np.stack([np.convolve(np.pad(z, (4, 4), "edge"), np.full(9, 1 / 9), "valid") for z in walk.T], 1) for walk in walks]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", default=str(Path(__file__).parent / "results"))
    for name, value in (("sources", 500), ("targets", 10), ("frames", 500), ("d", 8), ("repeats", 3), ("workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=value)
    args = parser.parse_args()
    source, target = episodes(args.sources, args.frames, args.d, 0), episodes(args.targets, args.frames, args.d, 1)
    pairs = args.sources * args.targets

    start = time.perf_counter()
    dtw(source[0], target[0][:1])
    compile_s = time.perf_counter() - start
    variants = [("numba", None, args.repeats), ("numba", 50, args.repeats)]
    seconds: dict[tuple, list[float]] = {variant[:2]: [] for variant in variants}
    begun = time.monotonic()
    rounds = sum(repeats for *_, repeats in variants)
    for repeat in range(args.repeats):
        for engine, band, repeats in variants:
            if repeat < repeats:
                start = time.perf_counter()
                pair_episodes(source, target, PairOptions(band=band), workers=args.workers)
                seconds[engine, band].append(time.perf_counter() - start)
                _bar(sum(map(len, seconds.values())), rounds, time.monotonic() - begun, "pairings")
    print(file=sys.stderr)
    rows = []
    for (engine, band), times in seconds.items():
        x, y = source[0][: args.frames], target[0][: args.frames]
        ms = []
        for _ in range(9):
            start = time.perf_counter()
            dtw(x, y, band=band)
            ms.append(1e3 * (time.perf_counter() - start))
        rows.append(
            {
                "solver": engine + (f", band {band}" if band else ""),
                "pairs": pairs,
                "frames": args.frames,
                "d": args.d,
                "workers": args.workers,
                "time_s": float(np.median(times)),
                "time_min_s": min(times),
                "time_max_s": max(times),
                "repeats": len(times),
                "one_pair_ms": float(np.median(ms)),
                "compile_s": compile_s,
            }
        )
        print("  ".join(f"{key}={value:.3g}" if isinstance(value, float) else f"{key}={value}" for key, value in rows[-1].items()))
    versions = {name: importlib.metadata.version(name) for name in ("numba", "numpy") if importlib.util.find_spec(name)}
    where = environment() | versions | {"load_average": os.getloadavg()[0]}
    path = Path(args.out) / "pairing.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"environment": where, "rows": rows}, indent=1))
    print(f"wrote {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
