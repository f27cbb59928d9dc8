"""
Simulation and reality in one embedding
=======================================

An encoder sees the poses of a robot in a simulator and, turned and shifted, in reality. Imitation alone keeps the two apart. The
alignment loss of Cheng et al. 2025 (arXiv:2509.18631) brings them together.
"""

# %%
# Poses, what the two kinds of sensors make of them, and the action that an expert takes.

import matplotlib.pyplot as plt
import torch
from torch import nn

from gpu_ot.lerobot import OTFeatureSpec, OTLossConfig, compute_ot_loss_for_policy

torch.manual_seed(0)
turn = torch.linalg.qr(torch.randn(3, 3)).Q


def poses(n):
    return 2 * torch.rand(n, 3) - 1


def real(pose):
    return pose @ turn.mT + torch.tensor([2.0, -2.0, 2.0])


def action(pose):
    return torch.cat((torch.sin(2 * pose[:, :1]) + pose[:, 1:2] * pose[:, 2:], pose.flip(-1)), -1)


class Policy(nn.Module):
    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(3, 96), nn.GELU(), nn.Linear(96, 96), nn.GELU(), nn.Linear(96, 8))
        self.head = nn.Sequential(nn.Linear(8, 64), nn.GELU(), nn.Linear(64, 4))

    def forward(self, seen):
        return self.head(self.encoder(seen))

    def encode_feature_for_ot(self, key, x):
        return self.encoder(x)


# %%
# The cost of a pair is a sum: how far apart the embeddings are, and how far apart the labels, here the pose that both sides know.

embedding = OTFeatureSpec("observation.state", use_learned_embed=True, weight_embed=1.0, weight_label=0.0, term_name="embedding")
label = OTFeatureSpec("pose", weight_label=1.0, term_name="pose")
config = OTLossConfig([embedding, label], reg=0.01, tau_src=1.0, tau_tgt=1.0)


def train(weight, steps=300):
    torch.manual_seed(1)
    policy = Policy()
    optimiser = torch.optim.Adam(policy.parameters())
    rate = torch.optim.lr_scheduler.OneCycleLR(optimiser, 6e-3, total_steps=steps)
    for _ in range(steps):
        many, few = poses(116), poses(12)  # demonstrations: many simulated, few real
        loss = (policy(torch.cat((many, real(few)))) - action(torch.cat((many, few)))).square().mean()
        if weight:
            pose = poses(96)
            src, tgt = ({"observation.state": z, "pose": pose} for z in (pose, real(pose)))
            loss = loss + weight * compute_ot_loss_for_policy(policy, src, tgt, config)[0]
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        rate.step()
    return policy


# %%
# Held-out poses: is the simulated frame that is nearest to a real one its own twin?

pose = poses(100)
figure, axes = plt.subplots(1, 2, figsize=(9.5, 4.2), layout="constrained")
for axis, (name, weight) in zip(axes, (("imitation alone", 0.0), ("with optimal transport", 1.0)), strict=True):
    policy = train(weight)
    with torch.no_grad():
        z_s, z_t = policy.encoder(pose), policy.encoder(real(pose))
    found = float((torch.cdist(z_t, z_s).argmin(1) == torch.arange(100)).float().mean())
    both = torch.cat((z_s, z_t))
    flat = ((both - both.mean(0)) @ torch.linalg.svd(both - both.mean(0), full_matrices=False).Vh[:2].mT).unflatten(0, (2, -1))
    axis.plot(*flat.permute(2, 0, 1).numpy(), color="0.8", linewidth=0.6, zorder=0)
    for points, side, colour in zip(flat, ("simulated", "real"), ("tab:blue", "tab:orange"), strict=True):
        axis.scatter(*points.mT.numpy(), s=10, label=side, color=colour)
    axis.set(title=f"{name}: {found:.0%} find their twin", xticks=[], yticks=[])
axes[1].legend()
plt.show()
