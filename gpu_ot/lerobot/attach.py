"""A policy whose training loss includes the alignment: in `forward`, so that one graph serves DDP, by swapping the policy's class.

A closure in place of `forward` would break what unwraps, copies and saves policies; a subclass of the policy's own class breaks nothing,
and what is saved is the plain policy.
"""

from __future__ import annotations

import copyreg
import dataclasses
import itertools
import logging
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProblemError
from .config import OTConfig, OTLossConfig
from .encoders import Observation, unwrapped
from .features import flat, only, terms, weighted
from .loss import CostScale, alarm, align, floats, refuse_nan, wide
from .settings import needed

#: A batch of each side, row by row in pairs: (source, target), or {"src": ..., "tgt": ...} as LeRobotOTPairDataset gives it.
Pair = Any
#: Makes a batch of observations what the policy is trained on: normalised, on its device.
Preprocess = Callable[[dict[str, Any]], Mapping[str, Any]]
#: Batches to iterate over again and again, or a function of the step to begin from that gives them.
Batches = Iterable[Pair] | Callable[[int], Iterable[Pair]]


class CoTraining:
    """What a policy carries while it is aligned: where pairs come from, how far it has got, and what it reports.

    pairs       batches (source, target): an iterable, begun anew when it ends, or a function of the step to go on from.
    preprocess  applied to each side of a batch; when left out, tensors are only moved to the policy's device.
    log_every   steps between metrics, which are copied to the host, reported and checked on those alone; 0 for none.
    out_dir     where pictures of the plan go, for cfg.plan_every.
    main        whether this process reports.
    held_out    a batch that is never aligned, or what makes it, for cfg.retrieval_every.
    """

    def __init__(
        self,
        cfg: OTConfig,
        pairs: Batches,
        preprocess: Preprocess | None = None,
        log_every: int = 100,
        out_dir: str | Path | None = None,
        main: bool = True,
        held_out: Pair | Callable[[], Pair] | None = None,
    ) -> None:
        if not cfg.loss_config.features:
            raise ProblemError("loss_config has no features: name at least one, with src_key and a weight.")
        if main and cfg.plan_every and out_dir is None:
            raise ProblemError("plan_every draws pictures and there is nowhere to put them: pass out_dir, or plan_every: 0.")
        if main and cfg.plan_every:  # now, not after hours
            needed("matplotlib.figure", "plan_every draws pictures, which needs matplotlib: pip install matplotlib, or plan_every: 0.")
        if main and cfg.tensorboard_dir is not None:
            needed("torch.utils.tensorboard", "tensorboard_dir needs TensorBoard: pip install tensorboard, or leave it out.")
        if main and cfg.retrieval_every and held_out is None:
            raise ProblemError("retrieval_every needs pairs that are not trained on: pass held_out, or retrieval_every: 0.")
        if cfg.retrieval_every and not any(spec.embeds for spec in cfg.loss_config.features):
            raise ProblemError(
                "retrieval_every looks in the embedding, and no feature is embedded: set use_learned_embed, or leave it out."
            )
        self.cfg, self.preprocess, self.log_every, self.main = cfg, preprocess, log_every, main
        self.out_dir = None if out_dir is None else Path(out_dir)
        self.pairs, self.held_out = pairs, held_out
        self.step, self.scale = 0, CostScale(shared=True)
        self.last: dict[str, float] = {}  # the metrics last reported
        self._batches: Iterator[Pair] | None = None
        self._pending: list[tuple[list[str], Tensor, Any]] = []
        self._board: Any = None

    def add_to(self, policy: nn.Module, out: Any) -> Any:
        """What the policy's `forward` gives, (loss, info) or the loss alone, with the alignment in it."""
        if not (bare := isinstance(out, Tensor)) and not (isinstance(out, tuple) and len(out) == 2):
            raise ProblemError(f"the policy's forward must return (loss, info) or the loss while it trains, found {type(out).__name__}.")
        loss, info = (out, None) if bare else out
        cfg, step, weight, told = self.cfg, self.step + 1, self.cfg.weight_at(self.step), {}
        if weight > 0:
            loss, told = self._added(policy, loss, weight)
        if self.main and cfg.retrieval_every and step % cfg.retrieval_every == 0:
            held = self.held_out() if callable(self.held_out) else self.held_out
            told |= retrieval(policy, *self.seen(policy, held), cfg.loss_config)
        if told:
            self._report(step, told)
            info = {**(info or {}), **told}
        self.step = step
        return loss if bare else (loss, info)

    def _added(self, policy: nn.Module, loss: Tensor, weight: float) -> tuple[Tensor, dict[str, float]]:
        """The sum, and what is to be reported at this step."""
        cfg, step = self.cfg, self.step + 1
        due, norms, plan = (n > 0 and step % n == 0 for n in (self.log_every, cfg.grad_norms_every, cfg.plan_every))
        self._batches = self._batches or self._endless()
        found = terms(policy, *self.seen(policy, next(self._batches)), cfg.loss_config)
        aligned = align(found, cfg.loss_config, self.scale, gather=cfg.gather, metrics=due)
        self._watch(*aligned.finite)
        weighted, told = weight * aligned.loss, {}
        if due or norms:
            told = floats({"bc_loss": loss.detach().mean(), **aligned.metrics, "ot_loss_weighted": weighted.detach()})
            told |= {"lambda_ot": weight} | (_gradients(policy, loss, weighted) if norms else {})
        if plan and self.main and self.out_dir is not None:
            _picture(aligned.plan(), self.out_dir / "ot_plans" / f"{step:06d}.png", step)
        return loss + weighted.to(loss.dtype), told

    def seen(self, policy: nn.Module, pair: Pair) -> tuple[Observation, Observation]:
        """Both sides as the policy is given its batches: normalised, on its device, and no more than the features ask for."""
        device = next(policy.parameters()).device
        sides = []
        for name, batch in zip(("src", "tgt"), (pair["src"], pair["tgt"]) if isinstance(pair, Mapping) else pair, strict=True):
            batch = flat(batch)
            seen = batch if self.preprocess is None else self.preprocess(dict(batch))
            named = [str(getattr(spec, f"{name}_key")) for spec in self.cfg.loss_config.features]
            if lost := [key for key in named if key in batch and key not in seen]:
                raise ProblemError(
                    f'"{lost[0]}" does not come out of the preprocessor, which keeps "action" and what begins with "observation.". Give '
                    "the feature such a name in the dataset."
                )
            kept = only(seen, [*named, *(self.cfg.obs_keys or ()), "embodiment_id"])
            sides.append({key: z.to(device) for key, z in kept.items()})
        return sides[0], sides[1]

    def _watch(self, names: list[str], finite: Tensor) -> None:
        """Refuses NaN, without waiting for a GPU: the flags of a step are read when they have arrived, by the next one as a rule."""
        if finite.device.type != "cuda":
            return refuse_nan(names, finite)
        here, arrived = torch.empty(finite.shape, dtype=torch.bool, pin_memory=True), torch.cuda.Event()
        here.copy_(finite, non_blocking=True)
        arrived.record(torch.cuda.current_stream(finite.device))  # whichever device is current
        self._pending.append((names, here, arrived))
        while self._pending and self._pending[0][2].query():
            refuse_nan(*self._pending.pop(0)[:2])

    def _endless(self) -> Iterator[Pair]:
        start = self.step
        for again in itertools.count():
            before = start
            for pair in self.pairs(start) if callable(self.pairs) else self.pairs:
                start += 1
                yield pair
            if before == start and again:
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
        logging.info("ot step:%d %s", step, " ".join(f"{name}:{value:.4g}" for name, value in reported.items()))
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


class _Aligned:
    """In front of a policy's own class: its loss, and the alignment's while it trains."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        training: CoTraining | None = self.__dict__.get("_co_training")
        if training is None or not (self.training and torch.is_grad_enabled()):  # pyright: ignore[reportAttributeAccessIssue]
            return out
        add_to: Any = torch.compiler.disable(training.add_to)  # reads data and reports, which is not for a compiler
        return add_to(self, out)

    def __reduce_ex__(self, protocol: Any) -> Any:
        """What is saved or copied is the plain policy: it loads where this package is not, and a copy is not co-trained."""
        reduced: Any = super().__reduce_ex__(max(2, int(protocol)))
        _, _, state, *rest = reduced
        plain = {key: z for key, z in state.items() if key != "_co_training"}
        return copyreg._reconstructor, (type(self).__mro__[2], object, None), plain, *rest  # pyright: ignore[reportAttributeAccessIssue]


def attach_ot(policy: nn.Module, pairs: Batches, cfg: OTConfig, preprocess: Preprocess | None = None, **options: Any) -> CoTraining:
    """Adds lambda_ot times the alignment to what `policy.forward(batch)` returns while it trains: (loss, info), or the loss alone.

    A policy inside torch.compile or DistributedDataParallel is reached through it. Arguments and `options` as CoTraining. Raises
    ProblemError for a policy that has one attached.

    >>> training = attach_ot(policy, pair_loader, OTConfig.from_file("ot.yaml"), preprocess=preprocessor)
    >>> loss, info = policy.forward(batch)  # info holds the metrics on every 100th step
    >>> torch.save(training.state_dict(), "ot.pt")
    """
    policy = unwrapped(policy)
    if isinstance(policy, _Aligned):
        raise ProblemError("this policy is co-trained already: detach_ot(policy) first.")
    training = CoTraining(cfg, pairs, preprocess, **options)
    policy._co_training = training  # pyright: ignore[reportArgumentType]
    cls = type(policy)
    policy.__class__ = type(cls.__name__, (_Aligned, cls), {"__module__": cls.__module__, "__qualname__": cls.__qualname__})
    return training


def detach_ot(policy: nn.Module) -> nn.Module:
    """The policy as it was before `attach_ot`."""
    if isinstance(inner := unwrapped(policy), _Aligned):
        inner.__class__ = type(inner).__mro__[2]
        del inner._co_training
    return policy


def retrieval(policy: nn.Module, source: Mapping[str, Any], target: Mapping[str, Any], cfg: OTLossConfig) -> dict[str, float]:
    """{"ot_retrieval_top1": the share of target rows whose nearest source row, in the embedding alone, is the one of their pair}.

    In evaluation mode and without a gradient. Chance is one over the rows.
    """
    specs = [dataclasses.replace(spec, weight_label=0.0) for spec in cfg.features if spec.embeds]
    training = [part for part in policy.modules() if part.training]
    try:
        policy.eval()
        with torch.no_grad():
            x, y = weighted(term[1:] for term in terms(policy, source, target, dataclasses.replace(cfg, features=specs)))
    finally:
        for part in training:
            part.training = True
    nearest = torch.cdist(y.double(), x.double()).argmin(1)
    return {"ot_retrieval_top1": float((nearest == torch.arange(len(y), device=y.device)).double().mean())}


def _gradients(policy: nn.Module, bc: Tensor, ot: Tensor) -> dict[str, float]:
    """Norms of both gradients over the parameters that the alignment reaches, where they pull against each other."""
    parameters = [p for p in policy.parameters() if p.requires_grad]
    pulls = torch.autograd.grad(ot, parameters, retain_graph=True, allow_unused=True)
    reached = [p for p, g in zip(parameters, pulls, strict=True) if g is not None]
    other = torch.autograd.grad(bc.mean(), reached, retain_graph=True, allow_unused=True)
    each = [[torch.linalg.vector_norm(wide(g)) for g in found if g is not None] or [torch.zeros(())] for found in (pulls, other)]
    ours, theirs = torch.stack([torch.stack(norms).norm().to(bc.device) for norms in each]).tolist()
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
