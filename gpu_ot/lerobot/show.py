"""A picture of what was paired: two episodes as strips with the path between them, and how far all episodes are from each other."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from ..errors import ProblemError
from .episodes import folder_of, read_recording
from .pairfile import read_pairs
from .pairs import writable
from .settings import needed

#: Frames of a camera that a strip shows.
SHOWN = 8


def show(file: str | Path, src: str, tgt: str, out: str | Path, episode: int | None = None, camera: str | None = None) -> str:
    """Writes a PNG, and says what it shows: target episode `episode`, by default the one with the nearest partner, below and its nearest
    source episode on the left, as strips of their labels or of `camera`; the DTW path between them; the distances of all, these two marked.

    Raises ProblemError for datasets that were not paired, an episode that has no pair, and a camera without LeRobot to decode it.
    """
    Figure = needed("matplotlib.figure", "drawing pairs needs matplotlib: pip install matplotlib.").Figure
    pairs = read_pairs(file)
    sides = [read_recording(name, keys or ["observation.state"]) for name, keys in zip((src, tgt), pairs.keys, strict=True)]
    pairs.check(*sides)
    if episode is None:
        episode = int(pairs.target_episode[pairs.distance.argmin()])
    if not (mine := pairs.of(episode)):
        raise ProblemError(
            f"target episode {episode} has no pairs in {file}; those from {pairs.target_episode[0]} to {pairs.target_episode[-1]} do."
        )
    k, partner = mine[0], int(pairs.source_episode[mine[0]])
    rows = int(pairs.offsets[k + 1] - pairs.offsets[k])
    path = [(t, s) for t in range(rows) for s in pairs.frames_of(k, t).tolist()]

    figure = Figure(figsize=(11, 5.5), layout="constrained")
    grid = figure.add_gridspec(2, 3, width_ratios=(1, 4, 5), height_ratios=(4, 1))
    episodes = [of.episodes()[np.searchsorted(of.side.episodes, number)] for of, number in zip(sides, (partner, episode), strict=True)]
    ax = figure.add_subplot(grid[0, 1])
    ax.plot(*zip(*path, strict=True), color="tab:red", lw=1.5)
    ends = {"xlim": (-0.5, rows - 0.5), "ylim": (-0.5, len(episodes[0]) - 0.5)}
    ax.set(**ends, xticks=[], yticks=[], title=f"distance {pairs.distance[k]:.4g}")
    placed = (src, partner, grid[0, 0], "source"), (tgt, episode, grid[1, 1], "target")
    for z, (name, number, place, role) in zip(episodes, placed, strict=True):
        upright = role == "source"
        z = (z - z.min(0)) / np.ptp(z, 0).clip(1e-12)
        parts = _pictures(name, number, len(z), camera) if camera else [row[None] if upright else row[:, None] for row in z]
        strip = np.concatenate(parts[::-1], 0) if upright else np.concatenate(parts, 1)
        ax = figure.add_subplot(place)
        ax.imshow(strip, aspect="auto", extent=(0, 1, -0.5, len(z) - 0.5) if upright else (-0.5, len(z) - 0.5, 0, 1))
        ax.set(**{"xticks" if upright else "yticks": [], "ylabel" if upright else "xlabel": f"frame of {role} episode {number}"})

    targets, sources = np.unique(pairs.target_episode), np.unique(pairs.source_episode)
    table = np.full((len(targets), len(sources)), np.nan)
    table[np.searchsorted(targets, pairs.target_episode), np.searchsorted(sources, pairs.source_episode)] = pairs.distance
    ax = figure.add_subplot(grid[:, 2])
    shown = ax.imshow(table, aspect="auto", interpolation="nearest", cmap="magma_r")
    ax.plot(np.searchsorted(sources, partner), np.searchsorted(targets, episode), "s", mfc="none", mec="tab:green", ms=10)
    ax.set(xlabel="source episode", ylabel="target episode", title=f"{len(pairs)} pairs of episodes")
    for axis, numbers in ((ax.xaxis, sources), (ax.yaxis, targets)):
        at = np.unique(np.linspace(0, len(numbers) - 1, min(10, len(numbers))).round().astype(int))
        axis.set_ticks(at, [str(numbers[j]) for j in at])
    figure.colorbar(shown, label="distance: cutoff and sharpness are in these units")
    out = writable(out)
    figure.savefig(out, format="png", dpi=120)
    return f"wrote {out}: target episode {episode} and source episode {partner}, at distance {pairs.distance[k]:.4g}"


def _pictures(dataset: str, episode: int, frames: int, camera: str) -> list[np.ndarray]:
    """(height, width, 3) of a few frames from the first to the last."""
    lerobot = needed("lerobot.datasets.lerobot_dataset", "--camera decodes frames, which needs LeRobot; without it the labels are shown.")
    found = lerobot.LeRobotDataset(dataset, root=folder_of(dataset), episodes=[episode])
    if camera not in found.meta.camera_keys:
        raise ProblemError(f'{dataset} has no camera "{camera}"; it has {", ".join(found.meta.camera_keys) or "none"}.')
    rows = np.linspace(0, frames - 1, min(SHOWN, frames)).round().astype(int)
    return [found[int(row)][camera].permute(1, 2, 0).numpy() for row in rows]
