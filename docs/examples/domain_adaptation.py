"""
Domain adaptation with an out-of-sample map
===========================================

A classifier knows clean digits and is asked about digits under a lamp, seen through a soft lens. A plan between the two domains uses
no label of the second. Its map also serves pictures which were not part of the plan.
"""

# %%
# The digits are scikit-learn's, 8 by 8. The second camera blurs and dims them, and a lamp shines from the lower right.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_digits

from gpu_ot import Problem, SqEuclidean, solve

digits = load_digits()
pictures, labels = torch.tensor(digits.images / 16.0, dtype=torch.float32), torch.tensor(digits.target)
source, target, held_out = torch.randperm(len(pictures), generator=torch.Generator().manual_seed(0)).tensor_split([500, 1000])
lens = torch.tensor([1.0, 2.0, 1.0])[:, None] * torch.tensor([1.0, 2.0, 1.0]) / 16
lamp = torch.linspace(0.2, 1, 8)[:, None] * torch.linspace(0, 1, 8)


def second_camera(z):
    return 0.7 * torch.nn.functional.conv2d(z[:, None], lens[None, None], padding=1)[:, 0] + lamp


x = pictures[source].flatten(1)
y, new = second_camera(pictures[target]).flatten(1), second_camera(pictures[held_out]).flatten(1)

# %%
# The plan goes from the second camera to the first. Squared distances take no notice of a shift that all pictures share, such as the
# lamp's. ``transport(new)`` maps the pictures that were held out.

solution = solve(Problem(SqEuclidean(y, x), eps=("mean", 0.02)))
mapped = solution.transport(new)
print(solution.status)


# %%
# The nearest clean picture decides on the label.


def accuracy(points):
    return float((labels[source][torch.cdist(points, x).argmin(1)] == labels[held_out]).float().mean())


print(f"as seen: {accuracy(new):.0%}, mapped: {accuracy(mapped):.0%}")

# %%
# Held-out pictures: as the second camera sees them, and where the map sends them.

figure, axes = plt.subplots(2, 8, figsize=(10, 2.9), layout="constrained")
for k in range(8):
    for row, image in enumerate((new[k], mapped[k])):
        axes[row, k].imshow(image.view(8, 8), cmap="gray")
        axes[row, k].set(xticks=[], yticks=[])
axes[0, 0].set_ylabel("seen")
axes[1, 0].set_ylabel("mapped")
plt.show()
