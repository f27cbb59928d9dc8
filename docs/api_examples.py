"""A short example for each public name. The site shows them on the name's page, and a test runs each on its own."""

# %% Problem
import torch
from gpu_ot import KL, Problem, SqEuclidean

x, y = torch.rand(200, 3), torch.rand(300, 3)
hard = Problem(SqEuclidean(x, y), eps=0.01)  # uniform weights, both marginals exact
relative = Problem(SqEuclidean(x, y), eps=("std", 0.05))  # 5 % of the cost's standard deviation
relaxed = Problem(torch.rand(20, 30), eps=0.1, penalties=(KL(), KL(tau=0.5)))  # rows exact, columns at a price
partial = Problem(SqEuclidean(x, y), eps=0.01, mass=0.8)  # 80 % of the mass moves, whichever is the cheapest to move

# %% solve
import torch
import gpu_ot
from gpu_ot import Problem, SqEuclidean

x, y = torch.rand(200, 3, requires_grad=True), torch.rand(300, 3)
solution = gpu_ot.solve(Problem(SqEuclidean(x, y), eps=0.05))
assert solution.converged, solution.status
solution.value.backward()  # x.grad

# %% Solution
import torch
from gpu_ot import Problem, SqEuclidean, solve

x, y = torch.rand(200, 2), torch.rand(300, 2)
solution = solve(Problem(SqEuclidean(x, y), eps=0.05))
print(solution.status, solution.n_iter, solution.value, solution.sharp_cost)
mapped = solution.transport()  # where the plan sends each x, (200, 2)
new = solution.transport(torch.rand(7, 2))  # the same for points it has not seen

# %% Plan
import torch
from gpu_ot import Problem, SqEuclidean, solve

x, y = torch.rand(200, 2), torch.rand(300, 2)
P = solve(Problem(SqEuclidean(x, y), eps=0.05)).plan
i, j = P.sample(256)  # pairs drawn with the probabilities of the plan
averaged = P @ y  # (200, 2), without an n-by-m array
corner = P[:5, :5]
dense = P.to_dense()

# %% Status
import torch
from gpu_ot import Problem, solve

status = solve(Problem(torch.rand(20, 30), eps=0.001), max_iter=3).status
assert status.name == "max_iter"
print(status.explanation)  # what happened and what to change

# %% explain
import torch
import gpu_ot

print(gpu_ot.explain(gpu_ot.Problem(gpu_ot.SqEuclidean(torch.rand(20_000, 3), torch.rand(20_000, 3)), eps=0.01)))

# %% SqEuclidean
import torch
from gpu_ot import SqEuclidean

x, y = torch.rand(5, 2), torch.rand(6, 2)
C = SqEuclidean(x, y).dense()  # (5, 6)
torch.testing.assert_close(C[0, 0], (x[0] - y[0]).square().sum())

# %% Euclidean
import torch
from gpu_ot import Euclidean, Problem, solve

value = solve(Problem(Euclidean(torch.rand(50, 2), torch.rand(60, 2)), eps=0.05)).value

# %% Cosine
import torch
from gpu_ot import Cosine, Problem, solve

value = solve(Problem(Cosine(torch.randn(50, 16), torch.randn(60, 16)), eps=0.05)).value

# %% Dot
import torch
from gpu_ot import Dot, Problem, solve

value = solve(Problem(Dot(torch.randn(50, 4), torch.randn(60, 4)), eps=0.5)).value  # the largest correlation, negated

# %% Matrix
import math
import torch
from gpu_ot import Matrix, Problem, solve

M = torch.rand(20, 30)
M[0, :10] = math.inf  # forbidden pairs
P = solve(Problem(Matrix(M), eps=0.1)).plan.to_dense()  # Problem(M, ...) is the same
assert P[0, :10].sum() == 0

# %% Formula
import torch
from gpu_ot import Formula, Problem, solve

x, y = torch.rand(50, 2), torch.rand(60, 2)
cost = Formula(lambda x, y: (x - y).abs().sum(-1), x, y)  # city-block distance
value = solve(Problem(cost, eps=0.05)).value

# %% Grid
import torch
from gpu_ot import Grid, Problem, solve

images = torch.rand(2, 32, 32) + 0.1
a, b = (images / images.sum((-1, -2), keepdim=True)).flatten(-2)  # (1024,) each
solution = solve(Problem(Grid((32, 32)), eps=0.01, a=a, b=b))
torus = Grid((16, 16, 16), spacing=0.1, periodic=True)

# %% Lazy
import torch
from gpu_ot import Lazy, Problem


def pose(x, y):
    """Your own formula of pykeops, (n, d) and (m, d); KeOps compiles it for the first solve, which needs a C++ compiler."""
    from pykeops.torch import LazyTensor

    return Problem(Lazy(((LazyTensor(x[:, None]) - LazyTensor(y[None])) ** 2).sum(-1)), eps=0.05)


# %% Sum
import torch
from gpu_ot import Cosine, Problem, SqEuclidean, solve

z, label = (torch.randn(40, 16), torch.randn(30, 16)), (torch.rand(40, 7), torch.rand(30, 7))
cost = Cosine(*z) + 0.05 * SqEuclidean(*label)
value = solve(Problem(cost, eps=0.05)).value

# %% Cost
import torch
from gpu_ot import Cost, Problem, solve
from gpu_ot.costs import COLUMNS, ROWS


class Cubic(Cost):
    sides = ROWS, COLUMNS  # which input belongs to which side
    inputs = property(lambda self: {"x": self.x, "y": self.y})
    shape = property(lambda self: torch.Size((*self.x.shape[:-1], self.y.shape[-2])))

    def __init__(self, x, y):
        self.x, self.y = x, y

    def of(self, inputs):
        return Cubic(*inputs)

    def dense(self):
        return torch.cdist(self.x, self.y) ** 3


value = solve(Problem(Cubic(torch.rand(50, 2), torch.rand(60, 2)), eps=0.05)).value

# %% KL
import torch
from gpu_ot import KL, Problem, SqEuclidean, solve

x, y = torch.rand(50, 2), torch.rand(60, 2) + 3
cost = SqEuclidean(x, y)  # around 18
few = solve(Problem(cost, eps=0.1, penalties=KL(tau=1.0))).transport_mass
most = solve(Problem(cost, eps=0.1, penalties=KL(tau=1000.0))).transport_mass
assert few < 0.1 < 0.9 < most

# %% TV
import torch
from gpu_ot import TV, Problem, SqEuclidean, solve

x, y = torch.rand(50, 2), torch.rand(60, 2) + 3
solution = solve(Problem(SqEuclidean(x, y), eps=0.1, penalties=TV(tau=1.0)))
assert solution.transport_mass < 0.01  # every trip costs more than 2 tau

# %% SamplesLoss
import torch
from gpu_ot import SamplesLoss

x, y = torch.randn(300, 2, requires_grad=True), torch.randn(200, 2) + 1
loss = SamplesLoss(p=2, blur=0.05)(x, y)
loss.backward()

# %% SinkhornLoss
import torch
from gpu_ot import SinkhornLoss

M = torch.rand(8, 20, 30, requires_grad=True)  # a batch of eight
loss = SinkhornLoss(eps=0.1, tau=2.0, reduction="mean")(M)
loss.backward()

# %% divergence
import torch
from gpu_ot import Problem, SqEuclidean, divergence

x, y = torch.rand(100, 2), torch.rand(120, 2) + 0.5
result = divergence(Problem(SqEuclidean(x, y), eps=0.05))
assert result.value > 0
assert abs(divergence(Problem(SqEuclidean(x, x), eps=0.05)).value) < 1e-4

# %% Divergence
import torch
from gpu_ot import Problem, SqEuclidean, divergence

result = divergence(Problem(SqEuclidean(torch.rand(100, 2), torch.rand(120, 2)), eps=0.05))
print(result.status, result.n_sweeps)
f, g, plan = result.f, result.g, result.plan

# %% self_term
import torch
from gpu_ot import Problem, SqEuclidean, divergence, self_term

y = torch.rand(120, 2)
kept = self_term(SqEuclidean(y, y), eps=0.05)  # the target does not change: solved once
for _ in range(3):
    x = torch.rand(100, 2)
    value = divergence(Problem(SqEuclidean(x, y), eps=0.05), self_b=kept).value

# %% SelfTerm
import torch
from gpu_ot import SqEuclidean, self_term

y = torch.rand(120, 2, requires_grad=True)
term = self_term(SqEuclidean(y, y), eps=0.05)
print(term.value, term.status)
constant = term.detach()

# %% barycenter
import torch
from gpu_ot import SqEuclidean, barycenter

x = torch.linspace(0, 1, 60).unsqueeze(-1)
a = torch.stack([torch.exp(-((x[:, 0] - c) ** 2) / 0.005) for c in (0.2, 0.7)])
a = a / a.sum(-1, keepdim=True)
between = barycenter(SqEuclidean(x, x), 0.002, a).weights  # (60,)
path = barycenter(SqEuclidean(x, x), 0.002, a, torch.tensor([[0.8, 0.2], [0.5, 0.5], [0.2, 0.8]])).weights  # (3, 60), at once
weights = torch.tensor([0.3, 0.7], requires_grad=True)
barycenter(SqEuclidean(x, x), 0.002, a, weights).weights.square().sum().backward()  # weights.grad

# %% free_barycenter
import torch
from gpu_ot import free_barycenter

clouds = [torch.randn(50, 2), torch.randn(70, 2) + torch.tensor([4.0, 0.0])]
found = free_barycenter(clouds, 0.1, start=torch.randn(30, 2))
print(found.status, found.points.mean(0))  # about (2, 0)

# %% Barycenter
import torch
from gpu_ot import barycenter

M = torch.rand(20, 20)
found = barycenter(M + M.T, 0.1, torch.full((2, 20), 1 / 20), max_iter=3)
print(found.status, found.n_iter, found.weights.sum())

# %% gromov
import torch
from gpu_ot import SqEuclidean, gromov

x, y = torch.randn(80, 3), torch.randn(90, 2)
found = gromov(SqEuclidean(x, x), SqEuclidean(y, y), eps=2.0)  # no distance matrix is formed
P = found.plan.to_dense()  # (80, 90)
graphs = torch.rand(16, 20, 20)
graphs = graphs + graphs.mT
all_at_once = gromov(graphs, graphs.flip(0), eps=0.1, tol=1e-4, max_iter=200).value  # (16,)

# %% Gromov
import torch
from gpu_ot import gromov

C, M = torch.rand(12, 12), torch.rand(12, 12)
found = gromov(C + C.T, C + C.T, eps=0.05, features=M, alpha=0.7)
print(found.status, found.n_iter, found.value, found.distortion)

# %% low_rank
import torch
from gpu_ot import SqEuclidean, low_rank

x, y = torch.randn(5000, 3), 2 * torch.randn(4000, 3) + 1
found = low_rank(SqEuclidean(x, y), rank=10, tol=1e-2)  # linear in the number of points
print(found.status, found.sharp_cost)  # an upper bound of the optimal cost
sent = 5000 * (found.plan @ y)  # where each x goes, (5000, 3)

# %% LowRank
import torch
from gpu_ot import SqEuclidean, low_rank

x, y = torch.rand(200, 2, requires_grad=True), torch.rand(300, 2)
found = low_rank(SqEuclidean(x, y), rank=5, eps=0.05, tol=1e-4)
found.value.backward()  # x.grad
clusters = found.plan.Q.argmax(-1)  # of each x, (200,); cluster k of x goes to cluster k of y
again = low_rank(SqEuclidean(x.detach() + 0.01, y), rank=5, eps=0.05, start=found)

# %% assign
import torch
from gpu_ot import assign

embeddings, prototypes = (torch.nn.functional.normalize(torch.randn(k, 16), dim=-1) for k in (256, 30))
with torch.no_grad():
    targets = assign(embeddings @ prototypes.T, temperature=0.05)  # (256, 30): rows sum to 1, columns to about 256 / 30
routed = assign(torch.randn(64, 8), temperature=1.0, capacity=1.25)  # no expert gets more than 1.25 times its share

# %% soft_sort
import torch
from gpu_ot import soft_sort

x = torch.randn(5, 12, requires_grad=True)
values = soft_sort(x, eps=1e-3)  # (5, 12), ascending
values[:, 0].sum().backward()  # the derivative of a blurred minimum

# %% soft_rank
import torch
from gpu_ot import soft_rank

scores, truth = torch.randn(30, requires_grad=True), torch.randn(30)
difference = soft_rank(scores) - soft_rank(truth)
difference.square().mean().backward()  # Spearman's correlation as a loss

# %% soft_quantile
import torch
from gpu_ot import soft_quantile

residuals = torch.randn(100, requires_grad=True)
soft_quantile(residuals.abs(), 0.5).backward()  # least median of squares, as a loss

# %% soft_topk
import torch
from gpu_ot import soft_topk

gates = soft_topk(torch.randn(8, 16), k=2)  # (8, 16): rows sum to 2

# %% sorted_potentials
import torch
from gpu_ot import Problem, SqEuclidean, solve, sorted_potentials

x, y = torch.rand(200, 1), torch.rand(300, 1)
problem = Problem(SqEuclidean(x, y), eps=1e-3)
solution = solve(problem, start=sorted_potentials(x, y))

# %% gaussian_potentials
import torch
from gpu_ot import Problem, SqEuclidean, gaussian_potentials, solve

x, y = torch.randn(200, 3), 2 * torch.randn(300, 3) + 1
solution = solve(Problem(SqEuclidean(x, y), eps=0.1), start=gaussian_potentials(x, y))

# %% Constant
import torch
from gpu_ot import Constant, Problem, solve

problem = Problem(torch.rand(20, 30), eps=0.1)
solution = solve(problem, schedule=Constant(problem.eps))

# %% Anneal
import torch
from gpu_ot import Anneal, Problem, solve

problem = Problem(torch.rand(200, 300), eps=0.01)
solution = solve(problem, schedule=Anneal(start=1.0, target=problem.eps, factor=0.6))

# %% Checkpoint
import tempfile
import torch
from gpu_ot import Checkpoint, Problem, SqEuclidean, solve

problem = Problem(SqEuclidean(torch.rand(200, 3), torch.rand(300, 3)), eps=0.01)
with tempfile.TemporaryDirectory() as folder:
    kept = Checkpoint(f"{folder}/potentials.safetensors", minutes=10)
    solution = solve(problem, checkpoint=kept, start=kept.start())  # goes on from the file if there is one

# %% Sharded
import torch
import torch.distributed as dist
from gpu_ot import Problem, Sharded, SqEuclidean, solve

group = dist.group.WORLD if dist.is_initialized() else None  # one process alone is a group of one
x, y = torch.rand(200, 3), torch.rand(300, 3)  # this rank's share
solution = solve(Problem(Sharded(SqEuclidean(x, y), group), eps=0.05))

# %% ProblemError
import torch
import gpu_ot

try:
    gpu_ot.Problem(torch.rand(20, 30), eps=-1.0)
except gpu_ot.ProblemError as error:
    print(error)  # eps must be a finite number > 0 in units of the cost, found -1.0. ...

# %% BackendError
import torch
import gpu_ot

try:
    gpu_ot.solve(gpu_ot.Problem(torch.rand(20, 30), eps=0.1), backend="keops")
except gpu_ot.BackendError as error:
    print(error)  # backend "keops" cannot serve this problem: ...

# %% NotConverged
import torch
import gpu_ot

try:
    gpu_ot.solve(gpu_ot.Problem(torch.rand(20, 30), eps=0.001), max_iter=2, strict=True)
except gpu_ot.NotConverged as error:
    print(error)  # max_iter: The iterations ran out ...

# %% RankFailed
import gpu_ot


def solve_or_leave(problem):
    """On every rank: one that fails ends the others, too, with its message."""
    try:
        return gpu_ot.solve(problem)
    except gpu_ot.RankFailed as error:
        raise SystemExit(str(error)) from error


# %% patch
import numpy as np
import ot
import gpu_ot

a, M = np.full(20, 1 / 20), np.random.default_rng(0).random((20, 20))
with gpu_ot.patch():
    P = ot.sinkhorn(a, a, M, 0.01)  # solved by this package

# %% sinkhorn
import torch
import gpu_ot

M = torch.rand(20, 30)
P = gpu_ot.sinkhorn([], [], M, 0.1)  # empty weights are uniform
P, log = gpu_ot.sinkhorn([], [], M, 0.1, log=True)
print(log["status"], log["n_iter"])

# %% sinkhorn2
import torch
import gpu_ot

M = torch.rand(20, 30, requires_grad=True)
gpu_ot.sinkhorn2([], [], M, 0.1).backward()  # the derivative of <P, M>

# %% sinkhorn_knopp
import numpy as np
import gpu_ot

P = gpu_ot.sinkhorn_knopp([], [], np.random.default_rng(0).random((20, 30)), 0.1)

# %% sinkhorn_log
import torch
import gpu_ot

P, log = gpu_ot.sinkhorn_log([], [], torch.rand(20, 30), 0.1, log=True)
print(log["log_u"].shape, log["log_v"].shape)

# %% sinkhorn_stabilized
import torch
import gpu_ot

P = gpu_ot.sinkhorn_stabilized([], [], torch.rand(20, 30), 1e-3)

# %% sinkhorn_epsilon_scaling
import torch
import gpu_ot

P = gpu_ot.sinkhorn_epsilon_scaling([], [], torch.rand(20, 30), 1e-2)

# %% greenkhorn
import torch
import gpu_ot

P = gpu_ot.greenkhorn([], [], torch.rand(20, 30), 0.1)

# %% screenkhorn
import torch
import gpu_ot

a, b = torch.full((20,), 1 / 20), torch.full((30,), 1 / 30)
P = gpu_ot.screenkhorn(a, b, torch.rand(20, 30), 0.1)

# %% sinkhorn_unbalanced
import torch
import gpu_ot

a, b = torch.full((20,), 0.05), torch.full((30,), 0.05)  # masses 1 and 1.5
P = gpu_ot.sinkhorn_unbalanced(a, b, torch.rand(20, 30), 0.1, 1.0)

# %% sinkhorn_unbalanced2
import torch
import gpu_ot

M = torch.rand(20, 30, requires_grad=True)
gpu_ot.sinkhorn_unbalanced2([], [], M, 0.1, 1.0).backward()

# %% sinkhorn_knopp_unbalanced
import torch
import gpu_ot

P = gpu_ot.sinkhorn_knopp_unbalanced([], [], torch.rand(20, 30), 0.1, 1.0)

# %% sinkhorn_stabilized_unbalanced
import torch
import gpu_ot

P = gpu_ot.sinkhorn_stabilized_unbalanced([], [], torch.rand(20, 30), 0.01, 1.0)

# %% sinkhorn_unbalanced_translation_invariant
import torch
import gpu_ot

P = gpu_ot.sinkhorn_unbalanced_translation_invariant([], [], torch.rand(20, 30), 0.1, 100.0)

# %% empirical_sinkhorn
import torch
import gpu_ot

P = gpu_ot.empirical_sinkhorn(torch.rand(20, 2), torch.rand(30, 2), 0.1)

# %% empirical_sinkhorn2
import torch
import gpu_ot

x = torch.rand(20, 2, requires_grad=True)
gpu_ot.empirical_sinkhorn2(x, torch.rand(30, 2), 0.1).backward()

# %% empirical_sinkhorn_divergence
import torch
import gpu_ot

value = gpu_ot.empirical_sinkhorn_divergence(torch.rand(20, 2), torch.rand(30, 2), 0.1)

# %% solve_sample
import torch
import gpu_ot

result = gpu_ot.solve_sample(torch.rand(20, 2), torch.rand(30, 2), reg=0.1)
print(result.value_linear, result.plan.shape)

# %% OTResult
import torch
import gpu_ot

result = gpu_ot.pot.solve(torch.rand(20, 30), reg=0.1)
print(result.value, result.value_linear, result.plan.shape, result.potentials[0].shape)

# %% dist
import torch
import gpu_ot

M = gpu_ot.dist(torch.rand(20, 2), torch.rand(30, 2))  # squared Euclidean unless told otherwise

# %% solve_batch
import torch
import gpu_ot

result = gpu_ot.solve_batch(torch.rand(8, 20, 30), reg=0.1)
print(result.plan.shape)

# %% solve_sample_batch
import torch
import gpu_ot

result = gpu_ot.solve_sample_batch(torch.rand(8, 20, 2), torch.rand(8, 30, 2), reg=0.1)

# %% dist_batch
import torch
import gpu_ot

M = gpu_ot.dist_batch(torch.rand(8, 20, 2), torch.rand(8, 30, 2))

# %% loss_linear_batch
import torch
import gpu_ot

M = torch.rand(8, 20, 30)
values = gpu_ot.loss_linear_batch(M, gpu_ot.solve_batch(M, reg=0.1).plan)  # (8,)

# %% loss_linear_samples_batch
import torch
import gpu_ot

X, Y = torch.rand(8, 20, 2), torch.rand(8, 30, 2)
T = gpu_ot.solve_sample_batch(X, Y, reg=0.1).plan
values = gpu_ot.loss_linear_samples_batch(X, Y, T)

# %% bregman_projection_batch
import torch
import gpu_ot

K = torch.exp(-torch.rand(8, 20, 20) / 0.1)
result = gpu_ot.bregman_projection_batch(K)

# %% bregman_log_projection_batch
import torch
import gpu_ot

result = gpu_ot.bregman_log_projection_batch(-torch.rand(8, 20, 20) / 0.1)

# %% bregman
import torch
import gpu_ot

P = gpu_ot.bregman.sinkhorn([], [], torch.rand(20, 30), 0.1)

# %% unbalanced
import torch
import gpu_ot

P = gpu_ot.unbalanced.sinkhorn_unbalanced([], [], torch.rand(20, 30), 0.1, 1.0)

# %% pot
import numpy as np
import gpu_ot.pot as ot

a, M = np.full(20, 1 / 20), np.random.default_rng(0).random((20, 20))
P = ot.sinkhorn(a, a, M, 0.1)  # this package's
exact = ot.emd(a, a, M)  # POT's own

# %% plots.convergence
import torch
import gpu_ot.plots

gpu_ot.plots.convergence(gpu_ot.solve(gpu_ot.Problem(torch.rand(50, 60), eps=0.01)), tol=1e-4)

# %% plots.plan
import torch
import gpu_ot.plots

gpu_ot.plots.plan(gpu_ot.solve(gpu_ot.Problem(torch.rand(50, 60), eps=0.01)))

# %% plots.matching
import torch
import gpu_ot.plots
from gpu_ot import Problem, SqEuclidean, solve

x, y = torch.rand(50, 2), torch.rand(60, 2) + 1
gpu_ot.plots.matching(x, y, solve(Problem(SqEuclidean(x, y), eps=0.01)))

# %% lerobot.OTFeatureSpec
from gpu_ot.lerobot import OTFeatureSpec

state = OTFeatureSpec("observation.state", dim_slice=slice(0, 8), use_learned_embed=True, weight_embed=0.5, weight_label=0.5)

# %% lerobot.OTLossConfig
from gpu_ot.lerobot import OTFeatureSpec, OTLossConfig

state = OTFeatureSpec("observation.state", use_learned_embed=True, weight_embed=0.5, weight_label=0.5)
config = OTLossConfig([state], reg=0.05, reg_m=1.0, cost_scale="mean")

# %% lerobot.compute_ot_loss_for_policy
import torch
from torch import nn
from gpu_ot.lerobot import OTFeatureSpec, OTLossConfig, compute_ot_loss_for_policy


class Policy(nn.Linear):
    def encode_feature_for_ot(self, key, x):
        return super().forward(x)


config = OTLossConfig([OTFeatureSpec("observation.state", use_learned_embed=True, weight_embed=0.5, weight_label=0.5)], reg=0.05, reg_m=1.0)
src, tgt = ({"observation.state": torch.randn(32, 8)} for _ in range(2))
loss, metrics = compute_ot_loss_for_policy(Policy(8, 4), src, tgt, config)
loss.backward()
