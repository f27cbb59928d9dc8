"""What a training would align, in words and numbers, from all that it has made before its first step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
from torch.utils.data import default_collate

from .encoders import served_by, unwrapped
from .features import terms
from .loss import CostScale, align, floats

if TYPE_CHECKING:
    from .train import _Launch


def report(launch: _Launch) -> None:
    """Prints both datasets' keys, what embeds each feature, the pairs, one batch's costs and masses, and numbers to begin with."""
    cfg, policy, pairs, named = launch.cfg, unwrapped(launch.policy), launch.pairs, {new: old for old, new in launch.rename.items()}
    for role, data in (("source", launch.source), ("target", launch.target)):
        keys = [(key, feature["dtype"], "x".join(map(str, feature["shape"]))) for key, feature in data.meta.features.items()]
        _table(f"{role} {data.repo_id}: {data.num_episodes} episodes, {len(data)} frames, {data.fps} a second", keys)

    rows = [("feature", "of the source", "of the target", "weights", "embedded by")]
    for spec in cfg.loss_config.features:
        part = "" if spec.dim_slice is None else "[{}:{}]".format(*("" if z is None else z for z in spec.dim_slice))
        weights = [f"embed {spec.term_weight * spec.weight_embed:g}"] * spec.embeds
        weights += [f"label {spec.term_weight * spec.weight_label:g}"] * (spec.weight_label > 0)
        by = served_by(policy, str(spec.tgt_key), spec.embed_path) if spec.embeds else "nothing: a label"
        rows.append((spec.name, named.get(spec.src_key, spec.src_key) + part, f"{spec.tgt_key}{part}", ", ".join(weights), by))
    _table("features", rows)
    print(f"pairs of {cfg.pair_info_path}", *pairs.summary().splitlines(), sep="\n  ", end="\n\n")

    size = cfg.pairs_of(launch.train_cfg.batch_size)
    assert launch.training is not None
    batch = launch.training.seen(policy, launch.sides(default_collate([launch.aligned.item(n) for n in range(size)])))
    m = floats(align(terms(policy, *batch, cfg.loss_config), cfg.loss_config, CostScale()).metrics)
    rows = [("term", "mean cost", "share of the cost", "share of the loss")]
    for name in (key.removeprefix("ot_cost/") for key in m if key.startswith("ot_cost/")):
        share = m[f"ot_moved/{name}"] / (m["ot_loss"] or 1.0)
        rows.append((name, f"{m[f'ot_cost/{name}']:.4g}", f"{m[f'ot_share/{name}']:.1%}", f"{share:.1%}"))
    _table(f"a batch of {size} pairs", rows)
    for name in ("ot_loss", "ot_pi_sum", "ot_pi_diag", "ot_diag_ratio", "ot_plan_entropy"):
        print(f"  {name}: {m[name]:.4g}")

    nearest = float(np.median([pairs.distance[pairs.of(t)[0]] for t in np.unique(pairs.target_episode).tolist()]))
    unit, of = 1.0, "with cost_scale, costs are in units of a typical one"
    if cfg.loss_config.cost_scale == "none":
        unit, of = sum(spec.term_weight * m[f"ot_cost/{spec.name}"] for spec in cfg.loss_config.features), "the mean cost of this batch"
    print(
        f"\nnumbers to begin with\n  cutoff: {nearest:.3g}  # for half of the target episodes the nearest source episode is nearer\n"
        f"  reg: {0.05 * unit:.3g}  # a twentieth of a typical cost\n  tau_src: {unit:.3g}  # {of}\n  tau_tgt: {unit:.3g}"
    )


def _table(title: str, rows: Sequence[Sequence[str]]) -> None:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows)
    print(title, *lines, sep="\n  ", end="\n\n")
