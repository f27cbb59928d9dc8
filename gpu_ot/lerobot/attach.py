"""A policy whose training loss includes the alignment: in `forward`, so that one graph serves DDP, by swapping the policy's class.

A closure in place of `forward` would break what unwraps, copies and saves policies; a subclass of the policy's own class breaks nothing,
and what is saved is the plain policy.
"""

from __future__ import annotations

import importlib
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProblemError
from ..problem import vector_dtype
from .config import OTConfig
from .encoders import Observation
from .features import only
from .loss import CostScale, alarm, align, floats

#: A batch of each side, row by row in pairs.
Pair = tuple[Mapping[str, Any], Mapping[str, Any]]
#: Makes a batch of observations what the policy is trained on: normalised, on its device.
Preprocess = Callable[[dict[str, Any]], Mapping[str, Any]]


class CoTraining:
    """What a policy carries while it is aligned: where pairs come from, how far it has got, and what it reports.

    pairs       batches (source, target); an iterable, begun anew when it ends, or a function of the step to go on from.
    preprocess  applied to each side of a batch; when left out, tensors are only moved to the policy's device.
    log_every   steps between metrics: they are copied to the host, reported and checked on those alone; 0 for none.
    out_dir     where pictures of the plan go, for cfg.plan_every.
    main        whether this process reports.
    """

    def __init__(
        self,
        cfg: OTConfig,
        pairs: Iterable[Pair] | Callable[[int], Iterable[Pair]],
        preprocess: Preprocess | None = None,
        log_every: int = 100,
        out_dir: str | Path | None = None,
        main: bool = True,
    ) -> None:
        if not cfg.loss_config.features:
            raise ProblemError("loss_config has no features: name at least one, with src_key and a weight.")
        if main and cfg.plan_every:  # now, not after hours
            if out_dir is None:
                raise ProblemError("plan_every draws pictures and there is nowhere to put them: pass out_dir, or plan_every: 0.")
            _needs("matplotlib.figure", "plan_every draws pictures, which needs matplotlib: pip install matplotlib, or plan_every: 0.")
        if main and cfg.tensorboard_dir is not None:
            _needs("torch.utils.tensorboard", "tensorboard_dir needs TensorBoard: pip install tensorboard, or leave it out.")
        self.cfg, self.preprocess, self.log_every, self.main = cfg, preprocess, log_every, main
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.pairs = pairs
        self.step = 0
        self.scale = CostScale(shared=True)
        self.last: dict[str, float] = {}  # the metrics last reported
        self._batches: Iterator[Pair] | None = None
        self._board: Any = None

    def add_to(self, policy: nn.Module, loss: Tensor, info: dict[str, Any] | None) -> tuple[Tensor, dict[str, Any] | None]:
        """BC's loss and what it reports, with the alignment's."""
        cfg, step = self.cfg, self.step + 1
        due = self.log_every > 0 and step % self.log_every == 0
        source, target = self._next(policy)
        aligned = align(policy, source, target, cfg.loss_config, scale=self.scale, gather=cfg.gather, metrics=due)
        weighted = cfg.weight_at(self.step) * aligned.loss
        if due or (cfg.grad_norms_every and step % cfg.grad_norms_every == 0):
            reported = floats({"bc_loss": loss.detach().mean(), **aligned.metrics})
            if cfg.grad_norms_every and step % cfg.grad_norms_every == 0:
                reported |= _gradients(policy, loss, weighted)
            self._report(step, reported)
            info = {**(info or {}), **reported}
        if self.main and self.out_dir is not None and cfg.plan_every and step % cfg.plan_every == 0:
            _picture(aligned.plan(), self.out_dir / "ot_plans" / f"{step:06d}.png", step)
        self.step = step
        return loss + weighted.to(loss.dtype), info

    def _next(self, policy: nn.Module) -> tuple[Observation, Observation]:
        if self._batches is None:
            self._batches = self._endless()
        device = next(policy.parameters()).device
        sides = []
        for side, batch in zip("st", next(self._batches), strict=True):
            seen = {key: z.to(device) if isinstance(z, Tensor) else z for key, z in batch.items()} if self.preprocess is None else batch
            seen = seen if self.preprocess is None else self.preprocess(dict(seen))
            named = [str(spec.src_key if side == "s" else spec.tgt_key) for spec in self.cfg.loss_config.features]
            if lost := [key for key in named if key in batch and key not in seen]:
                raise ProblemError(
                    f'"{lost[0]}" does not come out of the preprocessor, which keeps "action" and what begins with "observation.". Give '
                    "the feature such a name in the dataset."
                )
            sides.append(only(seen, [*named, *(self.cfg.obs_keys or ()), "embodiment_id"]))
        return sides[0], sides[1]

    def _endless(self) -> Iterator[Pair]:
        first = start = self.step
        while True:
            found = iter(self.pairs(start) if callable(self.pairs) else self.pairs)
            before = start
            for pair in found:
                start += 1
                yield pair
            if first < before == start:
                raise ProblemError(
                    "the pairs have come to an end and do not begin anew, as a generator does not: pass what can be iterated again, such "
                    "as a list or a DataLoader, or a function of the step that makes the generator."
                )
            if before == start:
                raise ProblemError("there are no pairs to align: the pair file, or what its options leave of it, is empty.")

    def _report(self, step: int, reported: dict[str, float]) -> None:
        self.last = reported
        if not self.main:
            return
        logging.info("ot step:%d %s", step, " ".join(f"{name.removeprefix('ot_')}:{value:.4g}" for name, value in reported.items()))
        if "ot_pi_sum" in reported and (warning := alarm(reported, self.cfg.loss_config)):
            logging.warning(warning)
        if self.cfg.tensorboard_dir is not None:
            if self._board is None:
                from torch.utils.tensorboard import SummaryWriter

                self._board = SummaryWriter(self.cfg.tensorboard_dir)
            for name, value in reported.items():
                self._board.add_scalar(f"train/{name}", value, step)
            self._board.flush()

    def state_dict(self) -> dict[str, Any]:
        """What `load_state_dict` needs to go on with the very next pair, where `pairs` is a function of the step; else with the first."""
        return {"step": self.step, "scale": self.scale.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.step = int(state["step"])
        self.scale.load_state_dict(state.get("scale", {}))
        self._batches = None

    def __deepcopy__(self, memo: object) -> None:
        """A copy of the policy, for averaging or evaluation, is not co-trained."""
        return None

    def __reduce__(self) -> tuple[type[None], tuple[()]]:
        return type(None), ()


class _Aligned:
    """In front of a policy's own class: its loss, and the alignment's while it trains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        training: CoTraining | None = self.__dict__.get("_co_training")
        if training is None or not (self.training and torch.is_grad_enabled()):  # pyright: ignore[reportAttributeAccessIssue]
            return out
        loss, info = out
        return training.add_to(self, loss, info)  # pyright: ignore[reportArgumentType]


def attach_ot(
    policy: nn.Module,
    pairs: Iterable[Pair] | Callable[[int], Iterable[Pair]],
    cfg: OTConfig,
    preprocess: Preprocess | None = None,
    log_every: int = 100,
    out_dir: str | Path | None = None,
    main: bool = True,
) -> CoTraining:
    """Adds lambda_ot times the alignment to what `policy.forward(batch)` returns while it trains: (loss, info). Arguments as CoTraining.

    >>> training = attach_ot(policy, pair_loader, OTConfig.from_file("ot.yaml"), preprocess=preprocessor)
    >>> loss, info = policy.forward(batch)  # info holds the metrics on every 100th step
    >>> torch.save(training.state_dict(), "ot.pt")

    Raises ProblemError for a policy that has one attached.
    """
    if isinstance(policy, _Aligned):
        raise ProblemError("this policy is co-trained already: detach_ot(policy) first.")
    training = CoTraining(cfg, pairs, preprocess, log_every, out_dir, main)
    policy._co_training = training  # pyright: ignore[reportArgumentType]
    cls = type(policy)
    policy.__class__ = type(cls.__name__, (_Aligned, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    return training


def detach_ot(policy: nn.Module) -> nn.Module:
    """The policy as it was before `attach_ot`."""
    if isinstance(policy, _Aligned):
        policy.__class__ = type(policy).__mro__[2]
        del policy._co_training
    return policy


def _gradients(policy: nn.Module, bc: Tensor, ot: Tensor) -> dict[str, float]:
    """Norms of both gradients over the parameters that the alignment reaches, where they pull against each other."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    pulls = torch.autograd.grad(ot, parameters, retain_graph=True, allow_unused=True)
    reached = [(p, g) for p, g in zip(parameters, pulls, strict=True) if g is not None]
    other = torch.autograd.grad(bc.mean(), [p for p, _ in reached], retain_graph=True, allow_unused=True)
    norms = [
        torch.stack([torch.linalg.vector_norm(g, dtype=vector_dtype(g.device)) for g in found] or [torch.zeros(())]).norm()
        for found in ([g for _, g in reached], [g for g in other if g is not None])
    ]
    ours, theirs = torch.stack([z.to(bc.device) for z in norms]).tolist()
    return {"ot_grad_norm": ours, "bc_grad_norm": theirs, "ot_grad_ratio": ours / theirs if theirs > 0 else float("inf")}


def _picture(plan: Tensor, path: Path, step: int) -> None:
    """The plan as a heat map, where people would look for its diagonal; to W&B as well where that runs."""
    from matplotlib.figure import Figure

    path.parent.mkdir(parents=True, exist_ok=True)
    P = plan.detach().cpu().double().numpy()
    figure = Figure(figsize=(5, 4.3), layout="constrained")
    ax = figure.add_subplot()
    shown = ax.imshow(P * max(P.shape), cmap="magma", interpolation="nearest", vmin=0)
    ax.set(xlabel="target row", ylabel="source row", title=f"step {step}: {float(P.sum()):.3g} of the mass moves")
    figure.colorbar(shown, label="mass, in units of one row's")
    figure.savefig(path, dpi=120)
    wandb = sys.modules.get("wandb")
    if wandb is not None and getattr(wandb, "run", None) is not None:
        wandb.log({"train/ot_plan": wandb.Image(str(path))}, step=step)


def _needs(module: str, why: str) -> None:
    try:
        importlib.import_module(module)
    except ModuleNotFoundError:
        raise ProblemError(why) from None
