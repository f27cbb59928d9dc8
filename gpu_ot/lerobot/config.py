"""What to align and how firmly, as dataclasses that read JSON and YAML, the LeRobot fork's own files among them.

Whoever writes a file by hand misspells a key: an unknown one is an error that names the nearest known.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import numpy as np

from ..errors import ProblemError
from .settings import Settings, bounded, call, choice, made, number

#: By name; soft_diagonal and band take a number.
REFERENCES = ("product", "diagonal", "soft_diagonal", "band")
SCALES = ("std", "mean", "median", "max")
COST_SCALES = ("none", "mean", "median", "quantile")


@dataclass
class OTTermConfig(Settings):
    """One term of the cost M = sum of weight * M_term: `name`, unique, is what it is called in logs; weight >= 0."""

    name: str
    weight: float = bounded(1.0, least=0)


@dataclass
class OTFeatureSpec(Settings):
    """A feature of both sides, compared by the policy's embedding, as it is (a label), or both:

        M_term = weight_embed |z_s - z_t|^2 + weight_label |l_s - l_t|^2

    src_key, tgt_key   keys of the observation, tgt_key that of the source when left out. "observation.images.*" is every camera that no
                       other feature names, each a term of its own; "observation" is the whole observation, for policies that embed it
                       at once (Diffusion, TDMPC, and those whose encode_feature_for_ot("observation", x) takes a dict).
    dim_slice          [start, stop], or a slice without a step, along the last axis: of what is embedded and of the label alike.
    use_learned_embed  whether the policy's encoder is used; weight_embed, of the embedding's distance, counts only then.
    embed_name         read and not used, as in the fork.
    weight_label       of the label's distance.
    term_name          in logs; src_key when left out. Of two terms with one name the second becomes name_2.
    term_weight        of the whole term.
    embed_path         a dotted path in the policy, "model.backbone", of what embeds this feature; found by itself for known policies, and
                       asked after the policy's own encode_feature_for_ot.
    embed_cost         "sqeuclidean", or "cosine": 1 - cos in place of the squared distance.
    time               which frame of a sequence is the label, "first", "last", or "flatten": all side by side. When left out, the first of
                       actions, and of observations the one that is now.
    detach_label       whether this label carries no gradient; as the loss says when left out.
    """

    src_key: str
    tgt_key: str | None = None
    dim_slice: Any = None
    use_learned_embed: bool = False
    embed_name: str | None = None
    weight_embed: float = bounded(1.0, least=0)
    weight_label: float = bounded(1.0, least=0)
    term_name: str | None = None
    term_weight: float = bounded(1.0, least=0)
    embed_path: str | None = None
    embed_cost: str = choice("sqeuclidean", ("sqeuclidean", "cosine"))
    time: str | None = choice(None, ("first", "last", "flatten"))
    detach_label: bool | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tgt_key is None:
            self.tgt_key = self.src_key
        self.dim_slice = _ends(self.dim_slice, self.src_key)

    @property
    def name(self) -> str:
        return self.src_key if self.term_name is None else self.term_name

    @property
    def embeds(self) -> bool:
        return self.use_learned_embed and self.weight_embed > 0


@dataclass
class _Terms(Settings):
    terms: list[OTTermConfig] = field(default_factory=list)


@dataclass
class _Features(Settings):
    features: list[OTFeatureSpec] = field(default_factory=list)


@dataclass
class TransportConfig(Settings):
    """How mass moves, given what it costs.

    reg         eps > 0, in units of the cost; or relative, ["mean", 0.05], to the "std", "mean", "median" or "max" of the batch's costs.
    tau_src     what a unit of source mass costs that goes nowhere, in units of the cost; null or inf holds the marginal exactly.
    tau_tgt     the same of the target.
    heuristic   the fork's name: true is reference "diagonal", false leaves `reference` as it is.
    reference   the measure r of the entropic term eps KL(P | r):
                "product"             a⊗b, what entropic transport means everywhere else;
                "diagonal"            pairs (i, i) alone, so nothing moves between pairs: P_ii = exp(-M_ii / (eps + tau_src + tau_tgt)) / n;
                "soft_diagonal(rho)"  (1 - rho) diagonal + rho product: pairs are preferred, 0 < rho <= 1;
                "band(width)"         pairs with |i - j| <= width alike, and no others.
    cost_scale  what M is divided by, a running average that carries no gradient: "none", "mean", "median" or "quantile(q)" of the costs.
                reg and tau are then in units of a typical cost, which training moves.
    momentum    of that average.
    tol, max_iter, backend  of the solver, see gpu_ot.solve.
    reg_m, tau1, tau2  other names of the taus, as in POT and the fork: reg_m is both, as one number or [tau_src, tau_tgt].
    """

    reg: float | list[Any] = 0.01
    tau_src: float | None = None
    tau_tgt: float | None = None
    heuristic: bool = False
    reference: str = "product"
    cost_scale: str = "none"
    momentum: float = bounded(0.9, least=0)
    tol: float = bounded(1e-6, least=0)
    max_iter: int = bounded(10_000, least=1, whole=True)
    backend: str = "auto"
    reg_m: InitVar[Any] = None
    tau1: InitVar[Any] = None
    tau2: InitVar[Any] = None

    def __post_init__(self, reg_m: Any, tau1: Any, tau2: Any) -> None:
        super().__post_init__()
        relative, value = self.reg if isinstance(self.reg, (list, tuple)) and len(self.reg) == 2 else (None, self.reg)
        if isinstance(self.reg, (list, tuple)) and relative not in SCALES:
            raise ProblemError(f'reg must be a number or ["mean", 0.05], with one of {", ".join(SCALES)}; found {self.reg!r}.')
        value = number("reg", value, above=0)
        self.reg = value if relative is None else [relative, value]
        if len(both := tuple(reg_m) if isinstance(reg_m, (list, tuple)) else (reg_m, reg_m)) != 2:
            raise ProblemError(f"reg_m must be a number or [tau_src, tau_tgt], found {reg_m!r}.")
        for name, other, given, of_both in (("tau_src", "tau1", tau1, both[0]), ("tau_tgt", "tau2", tau2, both[1])):
            said = {n: z for n, z in ((name, getattr(self, name)), (other, given), ("reg_m", of_both)) if z is not None}
            if len(said) > 1:
                found = " and ".join(map(str, said.values()))
                raise ProblemError(f"{' and '.join(said)} are names of one number, found {found}. Keep one.")
            setattr(self, name, next((_tau(n, z) for n, z in said.items()), None))
        named, _ = call(self.reference, "reference", REFERENCES)
        if self.heuristic and named not in ("product", "diagonal"):
            raise ProblemError(f'heuristic: true means reference: diagonal, but reference is "{self.reference}". Leave one out.')
        self.reference = "diagonal" if self.heuristic else self.reference
        if call(self.cost_scale, "cost_scale", COST_SCALES)[0] != "none" and isinstance(self.reg, list):
            raise ProblemError("reg is relative to the costs already: leave cost_scale out, or give reg as a number.")
        if self.momentum >= 1:
            raise ProblemError(f"momentum must be below 1, found {self.momentum}: the average would never move.")

    @property
    def taus(self) -> tuple[float, float]:
        """(tau_src, tau_tgt), inf where the marginal is held exactly."""
        return (math.inf if self.tau_src is None else self.tau_src), (math.inf if self.tau_tgt is None else self.tau_tgt)


@dataclass
class OTCostConfig(TransportConfig, _Terms):
    """Costs that the caller has computed, named and weighed by `terms`, a list of OTTermConfig. The rest as in TransportConfig."""

    def __post_init__(self, reg_m: Any, tau1: Any, tau2: Any) -> None:
        super().__post_init__(reg_m, tau1, tau2)
        self.terms = made(OTTermConfig, self.terms, "terms")
        names = [term.name for term in self.terms]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ProblemError(f'two terms are called "{twice[0]}", and mean the same costs. Add their weights up in one.')


@dataclass
class OTLossConfig(TransportConfig, _Features):
    """`features`, a list of OTFeatureSpec; `detach_label`, whether labels carry no gradient. The rest as in TransportConfig."""

    detach_label: bool = True
    INSIDE = "ot", "loss_config"

    def __post_init__(self, reg_m: Any, tau1: Any, tau2: Any) -> None:
        super().__post_init__(reg_m, tau1, tau2)
        self.features = made(OTFeatureSpec, self.features, "features")
        for spec in self.features:
            if spec.weight_label == 0 and not spec.embeds:
                raise ProblemError(
                    f'the feature "{spec.name}" counts for nothing: weight_label is 0 and it is not embedded '
                    "(use_learned_embed: true, weight_embed > 0). Give it a weight or leave it out."
                )


@dataclass
class OTConfig(Settings):
    """Co-training on a source (simulated) and a target (real) dataset; the target is the one that LeRobot trains on.

    enable             false trains as if this were not there.
    src_repo_id, src_root  the source dataset.
    pair_info_path     which frames belong together: a file of `gpu-ot pair`, or the fork's JSON.
    lambda_ot          total loss = BC + lambda_ot * OT; 0 decodes, embeds and solves nothing (but for retrieval_every).
    warmup_steps       lambda_ot grows to its value in a straight line over so many steps.
    batch_ratio        pairs of a step, as a share of LeRobot's batch_size; at least one.
    batch_size         pairs of a step, in place of batch_ratio.
    obs_keys           further keys of the observations that the policy's encoders need; those that features name are always there.
    base_index_src, base_index_tgt  what the fork's pair file calls the first episode.
    window_size        frames of jitter on either side of the aligned source frame, within its episode.
    no_window          any frame of the source episode instead.
    sharpness, cutoff  source episodes are drawn with weight 1 / (1 + exp(sharpness (d - cutoff))) of their distance d; without a
                       cutoff, with the fork's exp(-sharpness d).
    topk_src_episodes  keep the nearest so many of each target episode.
    bc_src_weight      share of the BC batch drawn from the source, split evenly between its paired and its other episodes where there are
                       both; null leaves the BC batch to LeRobot.
    bc_paired_share    of that, the share of paired episodes, in place of an even split.
    normalize_bc_weights_by_ds_size  true: bc_src_weight is the share itself. false: every frame of the source weighs bc_src_weight and
                       every frame of the target 1 - bc_src_weight, so that the larger dataset gets more.
    seed               of the pairs; LeRobot's when left out.
    num_workers        processes that decode pairs.
    cache_mib          memory for decoded frames, in each of them; with bc_src_weight once more in each of LeRobot's own.
    gather             one problem over the batches of all ranks, instead of one each.
    retrieval_every    every so many steps (those that LeRobot logs, for W&B), how often the embedding of a real frame is nearest to that of
                       its simulated partner among 64, in target episodes that are then held out of the alignment:
                       `ot_retrieval_top1`; 0 for never.
    held_out_episodes  how many of the last target episodes those are.
    plan_every         a picture of the plan every so many steps, as PNG and to W&B where it runs; 0 for none.
    grad_norms_every   the norms of both gradients every so many steps, at the price of a second backward pass; 0 for none.
    tensorboard_dir    where to write TensorBoard's logs, if anywhere.
    loss_config        the loss, an OTLossConfig.
    """

    enable: bool = True
    src_repo_id: str | None = None
    src_root: str | None = None
    pair_info_path: str | None = None
    lambda_ot: float = bounded(0.1, least=0)
    warmup_steps: int = bounded(0, least=0, whole=True)
    batch_ratio: float = bounded(0.5, above=0)
    batch_size: int | None = bounded(None, least=1, whole=True)
    obs_keys: list[str] | None = None
    base_index_src: int = bounded(0, least=0, whole=True)
    base_index_tgt: int = bounded(0, least=0, whole=True)
    window_size: int = bounded(0, least=0, whole=True)
    no_window: bool = False
    sharpness: float = bounded(0.0, least=0)
    cutoff: float | None = bounded(None)
    topk_src_episodes: int | None = bounded(None, least=1, whole=True)
    bc_src_weight: float | None = bounded(None, least=0, most=1)
    bc_paired_share: float | None = bounded(None, least=0, most=1)
    normalize_bc_weights_by_ds_size: bool = True
    seed: int | None = bounded(None, least=0, whole=True)
    num_workers: int = bounded(0, least=0, whole=True)
    cache_mib: int = bounded(256, least=0, whole=True)
    gather: bool = False
    retrieval_every: int = bounded(0, least=0, whole=True)
    held_out_episodes: int = bounded(1, least=1, whole=True)
    plan_every: int = bounded(0, least=0, whole=True)
    grad_norms_every: int = bounded(0, least=0, whole=True)
    tensorboard_dir: str | None = None
    loss_config: OTLossConfig = field(default_factory=OTLossConfig)
    INSIDE = ("ot",)

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.loss_config, OTLossConfig):
            self.loss_config = OTLossConfig.from_dict(self.loss_config)
        self.obs_keys = [self.obs_keys] if isinstance(self.obs_keys, str) else self.obs_keys
        if self.obs_keys is not None:
            if not isinstance(self.obs_keys, Sequence) or not all(isinstance(key, str) for key in self.obs_keys):
                raise ProblemError(f"obs_keys must be a list of keys, found {self.obs_keys!r}.")
            self.obs_keys = list(self.obs_keys)

    @classmethod
    def _place(cls, key: str) -> list[str]:
        ours, inner = (inspect.signature(kind).parameters for kind in (cls, OTLossConfig))
        return ["loss_config", key] if key in inner and key not in ours else [key]

    def probabilities(self, distance: np.ndarray) -> np.ndarray:
        """Of source episodes at these distances; sums to 1 also where every weight by itself underflows."""
        gap = np.asarray(distance, dtype=np.float64)
        log = -self.sharpness * gap if self.cutoff is None else -np.logaddexp(0, self.sharpness * (gap - self.cutoff))
        weight = np.exp(log - log.max())
        return weight / weight.sum()

    def pairs_of(self, batch_size: int) -> int:
        """Pairs of a step beside LeRobot's `batch_size`."""
        return self.batch_size if self.batch_size is not None else max(1, int(self.batch_ratio * batch_size))

    def weight_at(self, step: int) -> float:
        """lambda_ot at a step, which counts from 0."""
        return self.lambda_ot * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lambda_ot


def _ends(given: Any, key: str) -> list[int | None] | None:
    """[start, stop] of whatever says so."""
    if given is None:
        return None
    if isinstance(given, slice):
        if given.step not in (None, 1):
            raise ProblemError(f"dim_slice of {key} must be [start, stop], found a step of {given.step!r}: neighbours stay together.")
        given = [given.start, given.stop]
    elif isinstance(given, Mapping):  # the fork has {"start": 0, "stop": 8}, too
        given = [given.get("start"), given.get("stop")]
    if not isinstance(given, (list, tuple)) or len(given) != 2 or not all(z is None or type(z) is int for z in given):
        raise ProblemError(f"dim_slice of {key} must be [start, stop], two whole numbers or null, found {given!r}.")
    return list(given)


def _tau(name: str, given: Any) -> float | None:
    """None for a marginal held exactly, which files write null, inf or ".inf"."""
    if isinstance(given, (float, str)) and str(given).strip().lower() in ("inf", ".inf", "infinity"):
        return None
    return number(name, given, above=0)
