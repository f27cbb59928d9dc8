"""A policy learns from a simulator and imitates in the real world, whose sensors are rotated and shifted: co-training aligns them.

    python bench/examples/cotraining.py --out cotraining.png

Many demonstrations in simulation, a few of the same movements in reality, at another pace. The robot's pose is known in both, which is
the label; what the policy sees is not the same, y = R x + b. Episodes are paired by DTW on the pose, pairs are drawn as for LeRobot,
and the optimal-transport loss pulls the embeddings of what belongs together to the same place. Measured on movements that nobody trained
on: of 100 simulated frames, is the one of the same pose the nearest to a real frame? Imitation alone has no reason to make it so.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from gpu_ot.lerobot import DrawLoader, LeRobotOTPairDataset, OTConfig, attach_ot
from gpu_ot.lerobot.pairing import PairOptions, pair_episodes

STATE, POSE = "observation.state", "pose"
FRAMES = 50


class Movements:
    """Smooth movements of three joints, which can be made at any pace."""

    def __init__(self, count: int, generator: torch.Generator) -> None:
        self.frequency, self.phase, self.size = torch.rand(3, count, 1, 3, generator=generator)

    def __call__(self, times: Tensor) -> Tensor:
        """(count, frames, 3) poses at times (count or 1, frames) from 0 to 1."""
        angle = 2 * torch.pi * ((0.5 + self.frequency[: len(times)]) * times.unsqueeze(-1) + self.phase[: len(times)])
        return (0.6 + 0.4 * self.size[: len(times)]) * torch.sin(angle)


def steady(count: int) -> Tensor:
    return torch.linspace(0, 1, FRAMES).expand(count, -1)


def another_pace(count: int, generator: torch.Generator) -> Tensor:
    """(count, FRAMES) times from 0 to 1, now faster and now slower."""
    t = steady(count)
    lead = torch.rand(count, 1, generator=generator) - 0.5
    return t + 0.2 * lead * torch.sin(torch.pi * t)


def seen_in_reality(pose: Tensor) -> Tensor:
    """What the real sensors make of a pose; the simulated ones show the pose itself."""
    generator = torch.Generator().manual_seed(1)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=generator)).Q
    return pose @ turn.mT + torch.tensor([2.0, -2.0, 2.0])


def action(pose: Tensor) -> Tensor:
    """(..., 4) what the expert does there."""
    return torch.cat((torch.sin(2 * pose[..., :1]) + pose[..., 1:2] * pose[..., 2:], pose.flip(-1)), -1)


class Recorded:
    """Episodes in memory, in the form that pairs are drawn from."""

    def __init__(self, pose: Tensor, sensed: Callable[[Tensor], Tensor]) -> None:
        self.pose = pose
        columns = {STATE: sensed(pose), POSE: pose, "action": action(pose)}
        self.columns = {key: z.flatten(0, 1) for key, z in columns.items()}
        self.hf_dataset = {"episode_index": np.repeat(np.arange(len(pose)), FRAMES)}

    def __len__(self) -> int:
        return len(self.columns[POSE])

    def __getitem__(self, index: int) -> dict[str, Any]:
        return {key: z[index] for key, z in self.columns.items()}


class Policy(nn.Module):
    """From what is seen to what is done, through an embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, 128), nn.GELU(), nn.Linear(128, 8))
        self.head = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4))

    def encode_feature_for_ot(self, key: str, x: Tensor) -> Tensor:
        return self.encoder(x)

    def forward(self, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, float] | None]:
        return (self.head(self.encoder(batch[STATE])) - batch["action"]).square().mean(), None


def config(lambda_ot: float) -> OTConfig:
    embedding = dict(src_key=STATE, use_learned_embed=True, weight_embed=1.0, weight_label=0.0, term_name="embedding")
    label = dict(src_key=POSE, weight_label=1.0, term_name="pose")
    loss = dict(features=[embedding, label], reg=0.01, tau_src=1.0, tau_tgt=1.0, tol=1e-4)
    return OTConfig.from_dict(dict(lambda_ot=lambda_ot, window_size=1, sharpness=50.0, cutoff=0.1, loss_config=loss))


def recordings(generator: torch.Generator) -> tuple[Recorded, Recorded]:
    """60 simulated episodes; 15 of these movements in reality, at a pace of their own."""
    movements = Movements(60, generator)
    return Recorded(movements(steady(60)), lambda pose: pose), Recorded(movements(another_pace(15, generator)), seen_in_reality)


def paired(source: Recorded, target: Recorded, cfg: OTConfig, size: int = 128) -> DrawLoader:
    """Batches of frames that belong together by the pose."""
    pairs = pair_episodes([z.numpy() for z in source.pose], [z.numpy() for z in target.pose], PairOptions(keys=(POSE,)))
    return DrawLoader(LeRobotOTPairDataset(source, target, pairs, cfg), size)


def train(source: Recorded, target: Recorded, lambda_ot: float, steps: int = 300, seed: int = 0) -> tuple[Policy, list[float]]:
    """A policy, and how many real frames of held-out episodes find their simulated twin, every 20 steps."""
    torch.manual_seed(seed)
    policy, generator = Policy(), torch.Generator().manual_seed(seed)
    if lambda_ot > 0:
        cfg = config(lambda_ot)
        attach_ot(policy, paired(source, target, cfg), cfg, log_every=50)
    optimizer = torch.optim.Adam(policy.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimizer, 6e-3, total_steps=steps)
    found = []
    for step in range(steps):
        if step % 20 == 0:
            found.append(retrieved(policy))
        rows = torch.randint(len(source), (116,), generator=generator), torch.randint(len(target), (12,), generator=generator)
        parts = [{key: z[k] for key, z in side.columns.items()} for side, k in zip((source, target), rows, strict=True)]
        loss, _ = policy.forward({key: torch.cat([part[key] for part in parts]) for key in (STATE, "action")})
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        rate.step()
    return policy, [*found, retrieved(policy)]


def held_out(count: int = 100) -> Tensor:
    """(count, 3) poses of episodes that nobody trained on."""
    generator = torch.Generator().manual_seed(5)
    return Movements(20, generator)(steady(20)).flatten(0, 1)[torch.randperm(20 * FRAMES, generator=generator)[:count]]


def retrieved(policy: Policy) -> float:
    """The share of real frames whose nearest simulated frame, in the embedding, is that of their own pose."""
    pose = held_out()
    with torch.no_grad():
        z_s, z_t = policy.encoder(pose), policy.encoder(seen_in_reality(pose))
    return float((torch.cdist(z_t, z_s).argmin(1) == torch.arange(len(pose))).float().mean())


def picture(policies: dict[str, Policy], found: dict[str, list[float]], path: Path) -> None:
    """Embeddings of held-out frames in two principal coordinates, a line from each real frame to its simulated twin."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.6), layout="constrained")
    *axes, last = figure.subplots(1, 3)
    pose = held_out()
    for axis, (name, policy) in zip(axes, policies.items(), strict=True):
        with torch.no_grad():
            both = torch.cat((policy.encoder(pose), policy.encoder(seen_in_reality(pose))))
        flat = ((both - both.mean(0)) @ torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:2].mT).unflatten(0, (2, -1))
        axis.plot(*flat.permute(2, 0, 1).numpy(), color="0.8", linewidth=0.6, zorder=0)
        for points, label, colour in zip(flat, ("simulated", "real"), ("tab:blue", "tab:orange"), strict=True):
            axis.scatter(*points.mT.numpy(), s=9, label=label, color=colour)
        axis.set(title=f"{name}: {found[name][-1]:.0%} find their twin", xticks=[], yticks=[])
        axis.legend(loc="upper right", fontsize=8)
    for name, shares in found.items():
        last.plot([20 * k for k in range(len(shares))], shares, label=name)
    last.set(xlabel="step", ylabel="real frames that find their twin", ylim=(0, 1))
    last.legend()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("out/cotraining.png"))
    parser.add_argument("--steps", type=int, default=300)
    args = parser.parse_args()
    source, target = recordings(torch.Generator().manual_seed(0))
    policies, found = {}, {}
    for name, lambda_ot in (("imitation alone", 0.0), ("with optimal transport", 1.0)):
        policies[name], found[name] = train(source, target, lambda_ot, args.steps)
        print(f"{name:<24}{found[name][-1]:>5.0%} of held-out real frames find their simulated twin")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    picture(policies, found, args.out)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
