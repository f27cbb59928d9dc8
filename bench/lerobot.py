"""What the alignment costs in training: a step of behaviour cloning alone, with our loss, and with the route through POT in numpy.

    python bench/lerobot.py [--out DIR] [--batch 128] [--steps 15] [--policy act]

Batches of 128, as released with arXiv:2509.18631: at its settings (reference diagonal, reg 0.1, tau 0.05) and at reg 0.01, tau 1 with plans
that move mass. `--policy mlp` needs no LeRobot and has little else to do in a step; `--policy act` is LeRobot's ACT on states alone, at its
default size but for chunks of 20 actions. The POT route is the fork's: the costs go to numpy in float64, `sinkhorn_knopp_unbalanced` with
POT's defaults, the plan comes back. Costs are scaled so that their mean is 1. Interleaved, one untimed step of each before; medians, with
the least and largest.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from machine import write
from torch import Tensor, nn
from tqdm import tqdm

from gpu_ot.lerobot import OTLossConfig, compute_ot_loss_for_policy

with contextlib.redirect_stdout(io.StringIO()):
    import ot

STATE, WIDTH, ACTIONS = "observation.state", 8, 8
SETTINGS = {
    "released: diagonal, reg 0.1, tau 0.05": dict(reg=0.1, tau_src=0.05, tau_tgt=0.05, heuristic=True),
    "product, reg 0.01, tau 1": dict(reg=0.01, tau_src=1.0, tau_tgt=1.0),
}


class Mlp(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(WIDTH, 512), nn.GELU(), nn.Linear(512, 512))
        self.head = nn.Sequential(nn.GELU(), nn.Linear(512, ACTIONS))

    def encode_feature_for_ot(self, key: str, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, None]:
        return (self.head(self.encoder(batch[STATE])) - batch["action"][:, 0]).square().mean(), None


def act() -> nn.Module:
    sys.path.remove(str(Path(__file__).resolve().parent))  # where this file would pass for the package of its name
    from lerobot.configs.types import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    config = ACTConfig(device="cpu", push_to_hub=False, pretrained_backbone_weights=None, chunk_size=20, n_action_steps=20)
    environment_state = PolicyFeature(type=FeatureType.ENV, shape=(WIDTH,))  # ACT wants a camera or this
    config.input_features = {
        STATE: PolicyFeature(type=FeatureType.STATE, shape=(WIDTH,)),
        "observation.environment_state": environment_state,
    }
    config.output_features = {"action": PolicyFeature(type=FeatureType.ACTION, shape=(ACTIONS,))}
    return ACTPolicy(config)


def through_pot(
    policy: nn.Module, source: dict[str, Tensor], target: dict[str, Tensor], given: dict[str, Any], weights: tuple[float, float]
) -> Tensor:
    """The same loss, with the plan of POT."""
    x, y = source[STATE], target[STATE]
    encode = policy.encoder if isinstance(policy, Mlp) else policy.model.encoder_robot_state_input_proj
    z = encode(torch.cat((x, y)))
    M = weights[0] * torch.cdist(z[: len(x)], z[len(x) :]).square() + weights[1] * torch.cdist(x, y).square()
    a = np.full(len(x), 1 / len(x))
    c = np.eye(len(x)) / len(x) if given.get("heuristic") else None
    taus = given["tau_src"], given["tau_tgt"]
    plan = ot.unbalanced.sinkhorn_knopp_unbalanced(a, a, M.detach().double().numpy(), given["reg"], taus, c=c)
    return (torch.from_numpy(plan) * M).sum()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="a folder for lerobot_<policy>.json")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--steps", type=int, default=15)
    parser.add_argument("--policy", choices=("mlp", "act"), default="mlp")
    args = parser.parse_args()
    torch.manual_seed(0)
    policy = Mlp() if args.policy == "mlp" else act()
    policy.train()
    optimizer = torch.optim.AdamW(policy.parameters(), 1e-5)
    source, target = {STATE: torch.randn(args.batch, WIDTH)}, {STATE: torch.randn(args.batch, WIDTH) + 0.3}
    chunk = 1 if args.policy == "mlp" else policy.config.chunk_size
    batch = {STATE: torch.randn(args.batch, WIDTH), "action": torch.randn(args.batch, chunk, ACTIONS)}
    batch |= {
        "observation.environment_state": torch.randn(args.batch, WIDTH),
        "action_is_pad": torch.zeros(args.batch, chunk, dtype=torch.bool),
    }

    spec = dict(src_key=STATE, use_learned_embed=True, weight_embed=1.0, weight_label=0.0, term_name="embedding")
    label = dict(src_key=STATE, weight_label=1.0, term_name="label")
    means = []
    for one in (spec, label):  # so that both terms have mean 1/2
        cfg = OTLossConfig.from_dict(dict(features=[one], reg=1.0))
        means.append(float(compute_ot_loss_for_policy(policy, source, target, cfg)[1][f"ot_cost/{one['term_name']}"]))
    weights = 0.5 / means[0], 0.5 / means[1]
    features = [spec | dict(weight_embed=weights[0]), label | dict(weight_label=weights[1])]

    def step(alignment: Callable[[], Tensor] | None) -> None:
        loss, _ = policy.forward(batch)
        if alignment is not None:
            loss = loss + 0.1 * alignment()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    routes: dict[tuple[str, str], Callable[[], None]] = {("imitation alone", "-"): lambda: step(None)}
    differences = {}
    for name, given in SETTINGS.items():
        cfg = OTLossConfig.from_dict(dict(features=features, tol=1e-4) | given)

        def ours(cfg: OTLossConfig = cfg) -> Tensor:
            return compute_ot_loss_for_policy(policy, source, target, cfg, metrics=False)[0]

        def theirs(given: dict[str, Any] = given) -> Tensor:
            return through_pot(policy, source, target, given, weights)

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            one, other = float(ours().detach()), float(theirs().detach())
        differences[name] = abs(one - other) / abs(other)
        routes[name, "gpu_ot"] = lambda ours=ours: step(ours)
        routes[name, "POT"] = lambda theirs=theirs: step(theirs)

    times: dict[tuple[str, str], list[float]] = {key: [] for key in routes}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # POT's, of iterations that ran out
        for k in tqdm(range(args.steps + 1), desc=args.policy, file=sys.stderr):
            for key, route in routes.items():
                start = time.perf_counter()
                route()
                if k:
                    times[key].append(time.perf_counter() - start)

    alone = statistics.median(times["imitation alone", "-"])
    print(f"\n{args.policy}, batch {args.batch}, a step in ms; what the alignment adds to {1e3 * alone:.1f} of imitation alone\n")
    print(f"{'setting':<40}{'route':<8}{'median':>9}{'min':>9}{'max':>9}{'added':>9}{'share':>8}{'loss differs':>14}")
    rows = []
    for (name, route), found in times.items():
        middle = statistics.median(found)
        row: dict[str, Any] = {
            "policy": args.policy, "batch": args.batch, "setting": name, "route": route, "steps": len(found), "step_ms": 1e3 * middle,
            "min_ms": 1e3 * min(found), "max_ms": 1e3 * max(found), "added_ms": 1e3 * (middle - alone), "share": 1 - alone / middle,
            "loss_difference": differences.get(name),
        }  # fmt: skip
        rows.append(row)
        differs = "" if name not in differences or route == "POT" else f"{differences[name]:.1e}"
        print(
            f"{name:<40}{route:<8}{row['step_ms']:>9.1f}{row['min_ms']:>9.1f}{row['max_ms']:>9.1f}{row['added_ms']:>9.1f}{row['share']:>8.1%}{differs:>14}"
        )
    if args.out is not None:
        print(f"\nwrote {write(args.out, f'lerobot_{args.policy}', rows)}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
