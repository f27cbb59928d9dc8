"""
Convergence and acceleration, seen
==================================

Sinkhorn's own iterations slow down as ``eps`` shrinks. ``solve`` looks at its first iterations, anneals ``eps`` where that pays,
and then mixes the last updates. The curves show what each part brings.
"""

# %%
# The same problem three times: Sinkhorn's own iterations, mixing alone, and the default.

import matplotlib.pyplot as plt
import torch

import gpu_ot.plots
from gpu_ot import Problem, SqEuclidean, solve

generator = torch.Generator().manual_seed(0)
x, y = torch.rand(2, 300, 3, generator=generator, dtype=torch.float64)
problem = Problem(SqEuclidean(x, y), eps=("std", 0.005))

figure, axis = plt.subplots(figsize=(7.5, 4.4), layout="constrained")
for name, label in (("none", "Sinkhorn's own iterations"), ("mixing", "mixing"), ("auto", "auto: annealing, then mixing")):
    seen = []
    solution = solve(problem, tol=1e-6, accelerate=name, check_every=1, on_check=lambda k, error, seen=seen: seen.append((k, float(error))))
    axis.loglog(*zip(*seen, strict=True), label=f"{label}: {solution.n_sweeps} sweeps")
axis.set(xlabel="iterations", ylabel="marginal error")
axis.legend()
plt.show()

# %%
# The first part of the green curve is at a larger ``eps``: the errors there are those of another, easier problem, and they pay off later.
#
# A curve that falls steadily is converging. A curve that turns flat at the precision of the type has *stalled*: more iterations do
# not help, more digits do. ``gpu_ot.plots.convergence`` draws the errors of any solution with its status as the title.

gpu_ot.plots.convergence(solution, tol=1e-6)
plt.show()
