"""
A Sinkhorn loss in a training loop
==================================

A small network turns Gaussian noise into two moons. Its only loss is the Sinkhorn divergence between a batch that it makes and a
batch of data.
"""

# %%
# The data, and a generator of three layers.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import make_moons
from torch import nn

from gpu_ot import SamplesLoss

torch.manual_seed(0)
moons = torch.tensor(make_moons(4000, noise=0.06, random_state=0)[0], dtype=torch.float32)
network = nn.Sequential(nn.Linear(2, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, 2))

# %%
# ``blur`` is a length: details below it are not seen. A tenth of the picture is a fair start.

loss = SamplesLoss(p=2, blur=0.1, tol=1e-3)
optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
values = []
for _ in range(300):
    real = moons[torch.randint(len(moons), (128,))]
    value = loss(network(torch.randn(128, 2)), real)
    optimiser.zero_grad()
    value.backward()
    optimiser.step()
    values.append(float(value.detach()))
print(f"loss: {values[0]:.3f} at the start, {sum(values[-20:]) / 20:.4f} at the end")

# %%
# Two batches of data differ by about as much as the last values of the loss: there is nothing left to learn from 128 points.

floor = [float(loss(*moons[torch.randint(len(moons), (2, 128))])) for _ in range(10)]
with torch.no_grad():
    made = network(torch.randn(1000, 2))
figure, axes = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
axes[0].semilogy(values, color="tab:blue")
axes[0].axhline(sum(floor) / 10, color="0.5", linestyle="--", label="between two batches of data")
axes[0].set(xlabel="step", ylabel="divergence")
axes[0].legend()
axes[1].scatter(*moons[:1000].T.numpy(), s=4, color="0.7", label="data")
axes[1].scatter(*made.T.numpy(), s=4, color="tab:blue", label="network")
axes[1].set(xticks=[], yticks=[], aspect="equal")
axes[1].legend()
plt.show()
