"""
Colour transfer
===============

Two photographs exchange their colours. The plan is solved between 400 sampled pixels of each photograph,
and the entropic map extends it to every pixel.
"""

# %%
# The photographs come with scikit-learn. A pixel is a point in the RGB cube.

import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_sample_images

from gpu_ot import Problem, SqEuclidean, solve

china, flower = (torch.tensor(image[::4, ::4] / 255.0, dtype=torch.float32) for image in load_sample_images().images)
generator = torch.Generator().manual_seed(0)


def sample(image, count=400):
    pixels = image.reshape(-1, 3)
    return pixels[torch.randperm(len(pixels), generator=generator)[:count]]


# %%
# One problem is enough for both directions. ``eps`` is 2 % of the mean cost: sharp enough to keep the colours apart.

x, y = sample(china), sample(flower)
solution = solve(Problem(SqEuclidean(x, y), eps=("mean", 0.02)))
print(solution.status)

# %%
# ``transport`` takes points that the plan has never seen. The other direction is the transposed problem.

back = solve(Problem(SqEuclidean(y, x), eps=("mean", 0.02)), start=solution.g)
recoloured_china = solution.transport(china.reshape(-1, 3)).view_as(china)
recoloured_flower = back.transport(flower.reshape(-1, 3)).view_as(flower)

figure, axes = plt.subplots(2, 2, figsize=(8, 5.6), layout="constrained")
for axis, image, title in zip(
    axes.flat,
    (china, recoloured_china, flower, recoloured_flower),
    ("temple", "temple in the flower's colours", "flower", "flower in the temple's colours"),
    strict=True,
):
    axis.imshow(image.clamp(0, 1))
    axis.set(title=title, xticks=[], yticks=[])
plt.show()
