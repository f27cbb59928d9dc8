"""POT's entropic Gromov-Wasserstein barycentres, plain and fused: a space between others, from `gpu_ot.gromov` for all of them at once."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import errors
from ..costs import SqEuclidean
from ..problem import float_type
from ..solver.status import Status
from .arrays import number, take
from .refusals import Elsewhere, elsewhere, print_error
from .refusals import warn as tell

#: Tolerance of the plans of a turn: POT's is 1e-4, at every tenth iteration.
PLANS = 1e-6
#: Under "kl_loss", what is added to distances that plans are found for, and the least distance whose logarithm is averaged.
ABOVE_ZERO, LEAST = 1e-18, 1e-16

SETTLED = Status("converged", "The barycentre has stopped moving.")
MOVING = Status(
    "max_iter",
    "The barycentre still moves, by the last entry of `errors`. Raise max_iter, raise epsilon, or loosen tol; or pass warmstartT=True.",
)


def entropic_gromov_barycenters(
    N, Cs, ps=None, p=None, lambdas=None, loss_fun="square_loss", epsilon=0.1, symmetric=True, max_iter=1000, tol=1e-9,
    stop_criterion="barycenter", warmstartT=False, verbose=False, log=False, init_C=None, random_state=None, **kwargs,
):  # fmt: skip
    """Distances (N, N) of a space between spaces Cs, a list of (n_s, n_s): `ot.gromov.entropic_gromov_barycenters`.

    Takes turns: plans between the barycentre and each space, by `gpu_ot.gromov` for all spaces at once, and the distances that are best for
    these plans.

    ps, p, lambdas   weights of the spaces' points (lists of (n_s,)), of the barycentre's (N,), and of the spaces; uniform when left out.
    loss_fun         "square_loss" or "kl_loss".
    epsilon          > 0, in units of the loss.
    max_iter, tol    of the turns, and `max_iter` of each solve.
    stop_criterion   "barycenter": the Frobenius norm of the last move. "loss": the relative change of the sum of losses.
    warmstartT       True: solves go on from the last plans.
    init_C           the distances to begin with; otherwise those of random points in the plane, as POT draws them from `random_state`.
    `numItermax` limits the iterations of transport problems. `symmetric` is found. solver="PPA" is POT's alone.

    Returns C (N, N), detached, and with `log=True` err (and loss), T, p, `status`, `converged`, `n_iter`, `errors`.
    Peyré, Cuturi and Solomon 2016, ICML.
    """
    posed = _posed(N, Cs, None, ps, p, lambdas, loss_fun, epsilon, 1.0, stop_criterion, kwargs)
    start = None if init_C is None else posed.own("init_C", init_C, (posed.N, posed.N))
    C = posed.drawn(random_state, True) if start is None else start
    return posed.run(C, None, True, False, max_iter, tol, stop_criterion, warmstartT, verbose, log)


def entropic_fused_gromov_barycenters(
    N, Ys, Cs, ps=None, p=None, lambdas=None, loss_fun="square_loss", epsilon=0.1, symmetric=True, alpha=0.5, max_iter=1000, tol=1e-9,
    stop_criterion="barycenter", warmstartT=False, verbose=False, log=False, init_C=None, init_Y=None, fixed_structure=False,
    fixed_features=False, random_state=None, **kwargs,
):  # fmt: skip
    """Features (N, d) and distances (N, N) of a space between spaces with features Ys, a list of (n_s, d): POT's
    `ot.gromov.entropic_fused_gromov_barycenters`.

    init_Y           the features to begin with; 0 when left out.
    fixed_structure, fixed_features   keep `init_C` or `init_Y`, which must be given.

    Other arguments as `entropic_gromov_barycenters`. Returns (Y, C), detached, and with `log=True` T, p, Ms, the report, and err_feature,
    err_structure and Ts_iter, or loss and err_rel_loss. POT (0.9.7) returns the features as they were before the first turn, and under
    "barycenter" stops after it; here they are those of the last turn, and turns end when features and distances have both stopped moving.
    Vayer et al. 2019, arXiv:1811.02834.
    """
    posed = _posed(N, Cs, Ys, ps, p, lambdas, loss_fun, epsilon, number(alpha, "alpha"), stop_criterion, kwargs)
    for name, fixed, z in (("C", fixed_structure, init_C), ("Y", fixed_features, init_Y)):
        if fixed and z is None:
            raise Elsewhere(f"If {name} is fixed it must be provided in init_{name}.")  # POT has an error of its own for it
    assert posed.Ys is not None
    d = posed.Ys.shape[-1]
    C = posed.drawn(random_state, False) if init_C is None else posed.own("init_C", init_C, (posed.N, posed.N))
    Y = posed.p.new_zeros(posed.N, d) if init_Y is None else posed.own("init_Y", init_Y, (posed.N, d))
    return posed.run(C, Y, not fixed_structure, not fixed_features, max_iter, tol, stop_criterion, warmstartT, verbose, log)


@dataclass(frozen=True, eq=False)
class _Posed:
    """S spaces, padded to one number of points by some without weight."""

    N: int
    Cs: Tensor  # (S, n, n)
    Ys: Tensor | None  # (S, n, d)
    ps: Tensor  # (S, n)
    p: Tensor  # (N,)
    lambdas: Tensor  # (S,)
    sizes: list[int]
    loss: str
    eps: float
    alpha: float
    inner_iter: int
    back: Callable[[Tensor], Any]

    def own(self, name: str, z: Any, shape: tuple[int, ...]) -> Tensor:
        (taken,), _ = take(**{name: z})
        if taken is None or taken.shape != shape:
            raise errors.wrong_shape(name, () if taken is None else taken.shape, f"{errors.shape(shape)} for N = {self.N}")
        return taken.detach().to(self.p)

    def drawn(self, random_state: Any, to_one: bool) -> Tensor:
        """Squared distances of random points in the plane, as POT draws them."""
        if not isinstance(random_state, np.random.RandomState):
            random_state = np.random.mtrand._rand if random_state is None else np.random.RandomState(random_state)  # type: ignore[attr-defined]
        z = torch.from_numpy(random_state.randn(self.N, 2))
        C = SqEuclidean(z, z).dense()
        return (C / C.max() if to_one else C).to(self.p)

    @torch.no_grad()
    def run(
        self, C: Tensor, Y: Tensor | None, structure: bool, features: bool, max_iter: int, tol: float, criterion: str, warm: bool,
        verbose: bool, log: bool,
    ) -> Any:  # fmt: skip
        T, loss, moves, losses, plans, status = None, 1e15, [], [], [], MOVING
        for k in range(max(max_iter, 1)):
            found, T = self.solved(C, Y, T if warm else None, max_iter)
            M = self.between(Y)
            total = float(self.alpha * found.distortion.sum() + (0.0 if M is None else (1 - self.alpha) * (M * T).sum()))
            new_C = self.structure(T) if structure else C
            new_Y = self.features(T) if features else Y
            moved_C = (new_C - C).norm()
            moved_Y = torch.zeros_like(moved_C) if Y is None or new_Y is None else (new_Y - Y).norm()
            C, Y, change = new_C, new_Y, abs(total - loss) / loss if loss else float("nan")
            loss = total
            losses.append(total)
            plans.append([self.back(t) for t in self.parts(T)])
            moves.append((moved_Y, moved_C, moved_C.new_tensor(change)))
            error = torch.maximum(moved_C, moved_Y) if criterion == "barycenter" else moves[-1][2]
            if verbose:
                print_error(k, error, 1)
            if float(error) <= tol:
                status = SETTLED
                break
        if status is MOVING:
            tell(f"The barycentre did not converge. Status {status.name}: {status.explanation}")
        results = (self.back(C),) if Y is None else (self.back(Y), self.back(C))
        if not log:
            return results[0] if Y is None else results
        assert T is not None
        return *results, self.entries(T, Y, moves, losses, plans, status, criterion)

    def entries(
        self, T: Tensor, Y: Tensor | None, moves: list[Any], losses: list[float], plans: list[Any], status: Status, criterion: str
    ) -> dict[str, Any]:
        of_Y, of_C, of_loss = ([self.back(z) for z in each] for each in zip(*moves, strict=True))
        M, by_move = self.between(Y), criterion == "barycenter"
        errors_ = [self.back(torch.maximum(y, c)) for y, c, _ in moves] if by_move else of_loss
        report = {"status": status, "converged": status is SETTLED, "n_iter": len(moves) - 1, "errors": errors_}
        found: dict[str, Any] = {"T": [self.back(t) for t in self.parts(T)], "p": self.back(self.p), **report}
        if M is None:
            return {"err": errors_, **({} if by_move else {"loss": losses}), **found}
        found["Ms"] = [self.back(m) for m in self.parts(M)]
        if by_move:
            return {"err_feature": of_Y, "err_structure": of_C, "Ts_iter": plans, **found}
        return {"loss": losses, "err_rel_loss": of_loss, **found}

    def solved(self, C: Tensor, Y: Tensor | None, start: Tensor | None, max_iter: int) -> tuple[Any, Tensor]:
        above = ABOVE_ZERO if self.loss == "kl" else 0.0
        S, n = self.ps.shape
        found = sys.modules["gpu_ot"].gromov(
            C.expand(S, -1, -1) + above, self.Cs + above, self.eps, self.p.expand(S, -1), self.ps, features=self.between(Y),
            alpha=None if Y is None else self.alpha, loss=self.loss, start=start, tol=PLANS * min(n, self.N) ** 0.5,
            max_iter=max(max_iter, 1), inner_iter=self.inner_iter,
        )  # fmt: skip
        return found, found.plan.to_dense()

    def between(self, Y: Tensor | None) -> Tensor | None:
        """Squared distances between the features of the barycentre and of the spaces, (S, N, n)."""
        if Y is None:
            return None
        assert self.Ys is not None
        return SqEuclidean(Y.expand(len(self.Ys), -1, -1).contiguous(), self.Ys).dense()

    def structure(self, T: Tensor) -> Tensor:
        """The distances that are best for these plans: their mean under the plans, or of their logarithms."""
        Cs = self.Cs.clamp(min=LEAST).log() if self.loss == "kl" else self.Cs
        total = (self.lambdas[:, None, None] * (T @ Cs @ T.mT)).sum(0) * self.inverse.unsqueeze(-1) * self.inverse
        return total.exp() if self.loss == "kl" else total

    def features(self, T: Tensor) -> Tensor:
        assert self.Ys is not None
        return (self.lambdas[:, None, None] * (T @ self.Ys)).sum(0) * self.inverse.unsqueeze(-1)

    @property
    def inverse(self) -> Tensor:
        return torch.where(self.p > 0, 1 / torch.where(self.p > 0, self.p, 1.0), 0.0)

    def parts(self, z: Tensor) -> list[Tensor]:
        """Of (S, N, n), without padding."""
        return [each[:, :size] for each, size in zip(z, self.sizes, strict=True)]


def _posed(
    N: Any, Cs: Sequence[Any], Ys: Sequence[Any] | None, ps: Sequence[Any] | None, p: Any, lambdas: Any, loss_fun: str, epsilon: Any,
    alpha: float, criterion: str, options: dict[str, Any],
) -> _Posed:  # fmt: skip
    if loss_fun not in ("square_loss", "kl_loss"):
        raise errors.ProblemError(f"Unknown `loss_fun='{loss_fun}'`. Use one of: 'square_loss', 'kl_loss'.")
    if criterion not in ("barycenter", "loss"):
        raise errors.ProblemError(f"Unknown `stop_criterion='{criterion}'`. Use one of: 'barycenter', 'loss'.")
    if options.get("solver", "PGD") != "PGD":
        raise elsewhere(f'solver = "{options["solver"]}"', "ot.gromov.entropic_gromov_barycenters")
    if int(N) < 1:
        raise errors.ProblemError(f"N must be at least 1, found {N}: it is the number of points of the barycentre.")
    lists = {"Cs": Cs, "Ys": Ys, "ps": ps}
    for name, each in lists.items():
        if each is not None and (len(each) != len(Cs) or not len(each) or isinstance(each[0], list)):
            raise errors.ProblemError(f"{name} must be a list of as many arrays as Cs, at least one, found {len(each)} beside {len(Cs)}.")
    named = {f"{name}[{k}]": z for name, each in lists.items() if each is not None for k, z in enumerate(each)}
    taken, back = take(**named, p=p)
    found = dict(zip((*named, "p"), taken, strict=True))
    spaces = [found[f"Cs[{k}]"] for k in range(len(Cs))]
    for k, C in enumerate(spaces):
        if C is None or C.ndim != 2 or C.shape[0] != C.shape[1]:
            raise errors.wrong_shape(f"Cs[{k}]", () if C is None else C.shape, "(n, n), the distances within a space")
    dtype, sizes = float_type(*spaces), [len(C) for C in spaces]
    weights = [C.new_full((len(C),), 1 / len(C), dtype=dtype) if ps is None else found[f"ps[{k}]"] for k, C in enumerate(spaces)]
    features = None if Ys is None else [found[f"Ys[{k}]"] for k in range(len(Cs))]
    for k, n in enumerate(sizes):
        for name, z, ndim in (("ps", weights[k], 1), ("Ys", None if features is None else features[k], 2)):
            if (name == "ps" or features is not None) and (z is None or z.ndim != ndim or len(z) != n):
                raise errors.wrong_shape(f"{name}[{k}]", () if z is None else z.shape, f"({n}{', d' * (ndim - 1)}) to match Cs[{k}]")
    p = spaces[0].new_full((int(N),), 1 / int(N), dtype=dtype) if found["p"] is None else found["p"].to(dtype)
    if p.shape != (int(N),):
        raise errors.wrong_shape("p", p.shape, f"({N},) for N = {N}")
    shares = [1 / len(Cs)] * len(Cs) if lambdas is None else [number(z, "lambdas") for z in lambdas]
    share = torch.tensor(shares, dtype=dtype)
    if share.shape != (len(Cs),):
        raise errors.wrong_shape("lambdas", share.shape, f"({len(Cs)},), a weight for each space")
    most = max(sizes)

    def padded(each: list[Tensor], dims: int) -> Tensor:
        pads = [[0, most - len(z)] if dims == 1 else [0, 0, 0, most - len(z)] if dims == 2 else [0, most - len(z)] * 2 for z in each]
        return torch.stack([torch.nn.functional.pad(z.detach().to(dtype), pad) for z, pad in zip(each, pads, strict=True)])

    return _Posed(
        int(N), padded(spaces, 3), None if features is None else padded(features, 2), padded(weights, 1), p.detach(), share.to(p), sizes,
        loss_fun.removesuffix("_loss"), number(epsilon, "epsilon"), alpha, options.get("numItermax", 1000), back,
    )  # fmt: skip
