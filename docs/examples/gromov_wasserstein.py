"""
A spiral and a Swiss roll
=========================

Points of spaces that have nothing in common but their distances: a spiral in the plane is matched to a Swiss roll in space.
"""

# %%
# The two clouds, whose colour is the position along the curve. It is not used for the matching.

import matplotlib.pyplot as plt
import torch

from gpu_ot import SqEuclidean, gromov

generator = torch.Generator().manual_seed(0)
s, t = (4 + 9 * torch.rand(150, generator=generator, dtype=torch.float64) for _ in range(2))
spiral = torch.stack((s * s.cos(), s * s.sin()), 1) / 10
roll = torch.stack((t * t.cos(), 3 * torch.rand(150, generator=generator, dtype=torch.float64), t * t.sin()), 1) / 10

# %%
# Squared distances fold, so no distance matrix is formed: each step is one transport problem of a cost with few features. Steps go to
# a stationary plan, not always the best: of four starts near a⊗b, solved at once, the best is kept.

starts = 1 + torch.rand(4, 150, 150, generator=generator, dtype=torch.float64)
starts = starts / starts.sum((-1, -2), keepdim=True)
found = gromov(SqEuclidean(spiral, spiral), SqEuclidean(roll, roll), eps=0.02, start=starts, tol=1e-3, max_iter=300)
best = int(found.value.argmin())
P = found.plan.to_dense()[best]
print(found.status.name, found.n_iter, [round(v, 4) for v in found.value.tolist()])

# %%
# Each point of the roll takes the colour of the points that it was matched to.

colour = P.T @ s / P.sum(0)
figure = plt.figure(figsize=(11, 3.8), layout="constrained")
plane, space = figure.add_subplot(1, 3, 1), figure.add_subplot(1, 3, 2, projection="3d")
plane.scatter(*spiral.T.numpy(), c=s, cmap="viridis", s=14)
plane.set(title="spiral", aspect="equal", xticks=[], yticks=[])
space.scatter(*roll.T.numpy(), c=colour, cmap="viridis", s=14)
space.set(title="roll, coloured by the plan")
matched = figure.add_subplot(1, 3, 3)
matched.scatter(t, colour, s=10, color="tab:blue")
matched.set(xlabel="position on the roll", ylabel="position on the spiral")
plt.show()
