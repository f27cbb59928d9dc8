"""What to align and how firmly, as dataclasses that read JSON and YAML, the LeRobot fork's own files among them.

Whoever writes a file by hand misspells a key: an unknown one is an error that names the nearest known.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from ..costs import SCALES
from ..errors import ProblemError, unknown

TIMES = ("first", "last", "flatten")
EMBED_COSTS = ("sqeuclidean", "cosine")
#: By name; soft_diagonal and band take a number.
REFERENCES = ("product", "diagonal", "soft_diagonal", "band")
COST_SCALES = ("none", "mean", "median", "quantile")

_C = TypeVar("_C", bound="_Config")


@dataclass
class _Config:
    """Reading, writing and refusing, once for all of them."""

    @classmethod
    def from_dict(cls: type[_C], given: Mapping[str, Any]) -> _C:
        """From keys and values as a JSON or YAML file has them. Raises ProblemError for a key that is not known, with the nearest."""
        if not isinstance(given, Mapping):
            raise ProblemError(f"{cls.__name__} is made of keys and values, found {type(given).__name__}: {given!r:.80}")
        known = [f.name for f in dataclasses.fields(cls)]
        required = [f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING]
        for key in given:
            if key not in known:
                near = difflib.get_close_matches(str(key), known, 1, 0.5)
                hint = f'did you mean "{near[0]}"?' if near else f"it has {', '.join(known)}."
                raise ProblemError(f'{cls.__name__} has no key "{key}": {hint}')
        if missing := [key for key in required if key not in given]:
            raise ProblemError(f"{cls.__name__} needs {' and '.join(missing)}, found only {', '.join(given) or 'nothing'}.")
        return cls(**given)

    @classmethod
    def from_file(cls: type[_C], path: str | Path) -> _C:
        """From a .json, .yaml or .yml file. Raises ProblemError naming the file."""
        try:
            return cls.from_dict(cls._found_in(read(path)))
        except ProblemError as problem:
            raise ProblemError(f"{path}: {problem}") from None

    @classmethod
    def _found_in(cls, given: Any) -> Any:
        """The part of a file that is meant."""
        return given

    def to_dict(self) -> dict[str, Any]:
        """Keys and values that `from_dict` reads, and a JSON or YAML file can hold."""
        return dataclasses.asdict(self)


def read(path: str | Path) -> Any:
    """What a JSON or YAML file holds. YAML needs PyYAML, which LeRobot brings."""
    path = Path(path)
    try:
        text = path.read_text()
    except OSError as problem:
        raise ProblemError(f"it cannot be read: {problem.strerror}.") from None
    if path.suffix in (".yaml", ".yml"):
        try:
            import yaml  # pyright: ignore[reportMissingModuleSource]
        except ModuleNotFoundError:
            raise ProblemError("reading YAML needs PyYAML: pip install pyyaml, or write the same keys as JSON.") from None
        try:
            return yaml.safe_load(text)
        except yaml.YAMLError as problem:
            raise ProblemError(f"it is not YAML: {problem}") from None
    try:
        return json.loads(text)
    except json.JSONDecodeError as problem:
        raise ProblemError(f"it is not JSON: {problem}") from None


@dataclass
class OTTermConfig(_Config):
    """One term of the cost: M = sum of weight * M_term.

    name    what it is called in logs; unique.
    weight  >= 0.
    """

    name: str
    weight: float = 1.0

    def __post_init__(self) -> None:
        self.weight = _number("weight", self.weight, least=0)


@dataclass
class TransportConfig(_Config):
    """How mass moves, given what it costs.

    reg         eps > 0, in units of the cost; or relative, ["mean", 0.05], to the "std", "mean", "median" or "max" of the batch's costs.
    tau_src     what a unit of source mass costs that goes nowhere, in units of the cost; null or inf holds the marginal exactly.
    tau_tgt     the same of the target.
    reference   the measure r of the entropic term eps KL(P | r):
                "product"             a⊗b, what entropic transport means everywhere else;
                "diagonal"            pairs (i, i) alone, so nothing moves between pairs: P_ii = exp(-M_ii / (eps + tau_src + tau_tgt)) / n;
                "soft_diagonal(rho)"  (1 - rho) diagonal + rho product: pairs are preferred, 0 < rho <= 1;
                "band(width)"         pairs with |i - j| <= width alike, and no others.
    heuristic   the fork's name: true is "diagonal", false leaves `reference` as it is.
    cost_scale  what M is divided by, a running average that carries no gradient: "none", "mean", "median" or "quantile(q)" of the costs.
                reg and tau are then in units of a typical cost, which training moves.
    momentum    of that average.
    tol, max_iter, backend  of the solver, see gpu_ot.solve.
    """

    reg: float | list[Any] = 0.01
    tau_src: float | None = None
    tau_tgt: float | None = None
    heuristic: bool = False
    reference: str = "product"
    cost_scale: str = "none"
    momentum: float = 0.9
    tol: float = 1e-6
    max_iter: int = 10_000
    backend: str = "auto"

    def __post_init__(self) -> None:
        if isinstance(self.reg, (list, tuple)):
            if len(self.reg) != 2 or self.reg[0] not in SCALES:
                raise ProblemError(f'reg must be a number or ["mean", 0.05], with one of {", ".join(SCALES)}; found {self.reg!r}.')
            self.reg = [self.reg[0], _number("reg", self.reg[1], above=0)]
        else:
            self.reg = _number("reg", self.reg, above=0)
        self.tau_src, self.tau_tgt = _tau("tau_src", self.tau_src), _tau("tau_tgt", self.tau_tgt)
        named, _ = call(self.reference, "reference", REFERENCES)
        if self.heuristic:
            if named not in ("product", "diagonal"):
                raise ProblemError(f'heuristic: true means reference: diagonal, but reference is "{self.reference}". Leave one out.')
            self.reference = "diagonal"
        if call(self.cost_scale, "cost_scale", COST_SCALES)[0] != "none" and isinstance(self.reg, list):
            raise ProblemError("reg is relative to the costs already: leave cost_scale out, or give reg as a number.")
        self.momentum = _number("momentum", self.momentum, least=0)
        if self.momentum >= 1:
            raise ProblemError(f"momentum must be below 1, found {self.momentum}: the average would never move.")
        self.tol, self.max_iter = _number("tol", self.tol, least=0), int(_number("max_iter", self.max_iter, least=1))

    @property
    def taus(self) -> tuple[float, float]:
        """(tau_src, tau_tgt), inf where the marginal is held exactly."""
        return (math.inf if self.tau_src is None else self.tau_src), (math.inf if self.tau_tgt is None else self.tau_tgt)


@dataclass
class OTCostConfig(TransportConfig):
    """Costs that the caller has computed: `terms`, a list of OTTermConfig, names and weighs them. The rest as in TransportConfig."""

    terms: list[OTTermConfig] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.terms = [z if isinstance(z, OTTermConfig) else OTTermConfig.from_dict(z) for z in self.terms]
        _unique([z.name for z in self.terms])


@dataclass
class OTFeatureSpec(_Config):
    """A feature of both sides, compared by the policy's embedding, as it is (a label), or both:

        M_term = weight_embed |z_s - z_t|^2 + weight_label |l_s - l_t|^2

    src_key, tgt_key   keys of the observation, tgt_key that of the source when left out. "observation.images.*" is every camera, each a
                       term of its own with these weights; "observation" is the whole observation, for policies that embed it at once
                       (Diffusion, TDMPC, and those whose encode_feature_for_ot("observation", x) takes a dict).
    dim_slice          [start, stop] along the last axis, of what is embedded and of the label alike.
    use_learned_embed  whether the policy's encoder is used; weight_embed counts only then.
    weight_embed       of the embedding's distance.
    weight_label       of the label's, which carries no gradient.
    embed_cost         "sqeuclidean", or "cosine": 1 - cos in place of the squared distance.
    embed_path         a dotted path in the policy, "model.backbone", of what embeds this feature; found by itself for known policies, and
                       not used for those with a method encode_feature_for_ot.
    embed_name         read and not used, as in the fork.
    time               which frame of a sequence is the label, "first", "last", or "flatten": all side by side. When left out, the first of
                       actions, and of observations the one that is now.
    term_name          in logs; made of the keys when left out. Unique.
    term_weight        of the whole term.
    """

    src_key: str
    tgt_key: str | None = None
    dim_slice: list[int | None] | None = None
    use_learned_embed: bool = False
    embed_name: str | None = None
    embed_path: str | None = None
    embed_cost: str = "sqeuclidean"
    weight_embed: float = 1.0
    weight_label: float = 1.0
    time: str | None = None
    term_name: str | None = None
    term_weight: float = 1.0

    def __post_init__(self) -> None:
        if self.tgt_key is None:
            self.tgt_key = self.src_key
        if isinstance(self.dim_slice, Mapping):  # the fork has {"start": 0, "stop": 8}, too
            self.dim_slice = [self.dim_slice.get("start"), self.dim_slice.get("stop")]
        if self.dim_slice is not None and (len(self.dim_slice) != 2 or not all(z is None or isinstance(z, int) for z in self.dim_slice)):
            raise ProblemError(f"dim_slice of {self.src_key} must be [start, stop], found {self.dim_slice!r}.")
        self.weight_embed = _number("weight_embed", self.weight_embed, least=0)
        self.weight_label = _number("weight_label", self.weight_label, least=0)
        self.term_weight = _number("term_weight", self.term_weight, least=0)
        if self.embed_cost not in EMBED_COSTS:
            raise unknown("embed_cost", self.embed_cost, EMBED_COSTS)
        if self.time is not None and self.time not in TIMES:
            raise unknown("time", self.time, TIMES)

    @property
    def name(self) -> str:
        if self.term_name is not None:
            return self.term_name
        keys = self.src_key if self.src_key == self.tgt_key else f"{self.src_key}->{self.tgt_key}"
        if self.dim_slice is None:
            return keys
        start, stop = ("" if z is None else z for z in self.dim_slice)
        return f"{keys}[{start}:{stop}]"


@dataclass
class OTLossConfig(TransportConfig):
    """Features of a policy's observations, `features`, a list of OTFeatureSpec. The rest as in TransportConfig."""

    features: list[OTFeatureSpec] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.features = [z if isinstance(z, OTFeatureSpec) else OTFeatureSpec.from_dict(z) for z in self.features]
        _unique([z.name for z in self.features])
        for spec in self.features:
            if spec.weight_label == 0 and not (spec.use_learned_embed and spec.weight_embed > 0):
                raise ProblemError(
                    f'the feature "{spec.name}" counts for nothing: weight_label is 0 and it is not embedded '
                    "(use_learned_embed: true, weight_embed > 0). Give it a weight or leave it out."
                )

    @classmethod
    def _found_in(cls, given: Any) -> Any:
        for key in ("ot", "loss_config"):  # of a whole training
            if isinstance(given, Mapping) and key in given and "features" not in given:
                given = given[key]
        return given


@dataclass
class OTConfig(_Config):
    """Co-training on a source (simulated) and a target (real) dataset; the target is the one that LeRobot trains on.

    enable             false trains as if this were not there.
    src_repo_id, src_root  the source dataset.
    pair_info_path     which frames belong together: a file of `gpu-ot pair`, or the fork's JSON.
    lambda_ot          total loss = BC + lambda_ot * OT.
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
    plan_every         a picture of the plan every so many steps, as PNG and to W&B where it runs; 0 for none.
    grad_norms_every   the norms of both gradients every so many steps, at the price of a second backward pass; 0 for none.
    tensorboard_dir    where to write TensorBoard's logs, if anywhere.
    loss_config        the loss, an OTLossConfig.
    """

    enable: bool = True
    src_repo_id: str | None = None
    src_root: str | None = None
    pair_info_path: str | None = None
    lambda_ot: float = 0.1
    warmup_steps: int = 0
    batch_ratio: float = 0.5
    batch_size: int | None = None
    obs_keys: list[str] | None = None
    base_index_src: int = 0
    base_index_tgt: int = 0
    window_size: int = 0
    no_window: bool = False
    sharpness: float = 0.0
    cutoff: float | None = None
    topk_src_episodes: int | None = None
    bc_src_weight: float | None = None
    bc_paired_share: float | None = None
    normalize_bc_weights_by_ds_size: bool = True
    seed: int | None = None
    num_workers: int = 0
    cache_mib: int = 256
    gather: bool = False
    plan_every: int = 0
    grad_norms_every: int = 0
    tensorboard_dir: str | None = None
    loss_config: OTLossConfig = field(default_factory=OTLossConfig)

    def __post_init__(self) -> None:
        if not isinstance(self.loss_config, OTLossConfig):
            self.loss_config = OTLossConfig.from_dict(self.loss_config)
        self.lambda_ot = _number("lambda_ot", self.lambda_ot, least=0)
        self.batch_ratio = _number("batch_ratio", self.batch_ratio, above=0)
        self.sharpness = _number("sharpness", self.sharpness, least=0)
        if isinstance(self.obs_keys, str):
            self.obs_keys = [self.obs_keys]
        if self.cutoff is not None:
            self.cutoff = _number("cutoff", self.cutoff)
        for name in ("enable", "no_window", "normalize_bc_weights_by_ds_size", "gather"):
            if not isinstance(given := getattr(self, name), bool):
                raise ProblemError(f"{name} must be true or false, found {given!r}.")
        for name in ("warmup_steps", "window_size", "num_workers", "cache_mib", "plan_every", "grad_norms_every"):
            setattr(self, name, _whole(name, getattr(self, name), 0))
        for name, least in (("batch_size", 1), ("topk_src_episodes", 1), ("seed", 0)):
            if (given := getattr(self, name)) is not None:
                setattr(self, name, _whole(name, given, least))
        for name in ("bc_src_weight", "bc_paired_share"):
            share = getattr(self, name)
            if share is not None and not 0 <= _number(name, share) <= 1:
                raise ProblemError(f"{name} must be a share from 0 to 1, found {share}.")

    @classmethod
    def _found_in(cls, given: Any) -> Any:
        return given["ot"] if isinstance(given, Mapping) and isinstance(given.get("ot"), Mapping) else given

    def pairs_of(self, batch_size: int) -> int:
        """Pairs of a step beside LeRobot's `batch_size`."""
        return self.batch_size if self.batch_size is not None else max(1, int(self.batch_ratio * batch_size))

    def weight_at(self, step: int) -> float:
        """lambda_ot at a step, which counts from 0."""
        return self.lambda_ot * min(1.0, (step + 1) / self.warmup_steps) if self.warmup_steps else self.lambda_ot


def call(text: str, name: str, known: tuple[str, ...]) -> tuple[str, float | None]:
    """("band", 3.0) of "band(3)", ("mean", None) of "mean"; checked. Numbers that belong to a name must be there."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([^)]*?)\s*\))?\s*", str(text))
    if match is None or match[1] not in known:
        raise unknown(name, text, known)
    word, inside = match[1], match[2]
    bounds = {"soft_diagonal": (0.0, 1.0), "quantile": (0.0, 1.0), "band": (-1.0, math.inf)}
    if word not in bounds:
        if inside is not None:
            raise ProblemError(f'{name}: "{word}" takes no number, found "{text}".')
        return word, None
    low, high = bounds[word]
    try:
        number = float(inside)
    except (TypeError, ValueError):
        raise ProblemError(f'{name}: "{word}" takes a number, as in "{word}({0.1 if high == 1 else 3})"; found "{text}".') from None
    if not low < number <= high or (word == "band" and number != int(number)):
        wanted = "a whole number of at least 0" if word == "band" else "a number above 0 and at most 1"
        raise ProblemError(f'{name}: "{word}" takes {wanted}, found "{text}".')
    return word, number


def _number(name: str, given: Any, *, least: float = -math.inf, above: float = -math.inf) -> float:
    try:
        value = float(given)
    except (TypeError, ValueError):
        value = math.nan
    if isinstance(given, bool) or not least <= value < math.inf or not value > above:
        bound = f" above {above:g}" if above > -math.inf else f" of at least {least:g}" if least > -math.inf else ""
        raise ProblemError(f"{name} must be a finite number{bound}, found {given!r}.")
    return value


def _whole(name: str, given: Any, least: int) -> int:
    if (value := _number(name, given, least=least)) != int(value):
        raise ProblemError(f"{name} must be a whole number, found {given!r}.")
    return int(value)


def _tau(name: str, given: Any) -> float | None:
    """None for a marginal held exactly, which files write null, inf or ".inf"."""
    if given is None or (isinstance(given, (float, str)) and str(given).strip().lower() in ("inf", ".inf", "infinity")):
        return None
    return _number(name, given, above=0)


def _unique(names: list[str]) -> None:
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ProblemError(
            f'two terms are called "{repeated[0]}", and would overwrite each other in the logs. Give each a term_name of its own.'
        )
