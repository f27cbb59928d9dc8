"""LeRobot's own training script with the alignment in its loss: nothing of it is copied, and what it saves loads without this package.

    gpu-ot train --ot-config ot.yaml -- --dataset.repo_id=real --policy.type=act ...
    torchrun --nproc_per_node=2 -m gpu_ot.lerobot.train --ot-config ot.yaml -- ...

Functions of the script are wrapped by name: its dataset (to add the source), its policy (to attach to), its processors (pairs are
normalised as batches are), its endless loader (the BC mix), and its saving and loading (the place in the sequence of pairs).
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import runpy
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils.data import default_collate

from ..errors import ProblemError
from .attach import CoTraining, Pair, attach_ot
from .check import report
from .config import OTConfig, OTFeatureSpec
from .dataset import LeRobotOTPairDataset
from .draws import Drawable, DrawLoader, co_training, ranks, same_law
from .encoders import WHOLE
from .features import expanded, fits, flat
from .frames import transforms_of
from .pairfile import read_pairs
from .settings import needed

CONFIG, STATE = "ot_config.json", "ot_state.json"
#: Held-out pairs among which partners are looked for.
HELD_OUT = 64


class _Checked(Exception):
    """The end of a check."""


def run(ot_config: str | Path | None, arguments: Sequence[str], *, restart_pairs: bool = False, check: bool = False) -> None:
    """LeRobot's training with `arguments`, as its own command takes them, and the alignment of `ot_config`.

    ot_config      a JSON or YAML file; when left out, that of the checkpoint which `arguments` resume from.
    arguments      those that begin with "--ot." set single values of the configuration.
    restart_pairs  begin the draws anew where a resumed run would go on with them: what decides which pairs are drawn, the datasets, the
                   pair file, the options of sampling and the seed, may change with it alone; lambda_ot and the loss without it, too.
    check          print what would be aligned and return before the first step.

    Raises ProblemError where LeRobot is not installed, for a configuration that does not fit the datasets, and what LeRobot raises.
    """
    overrides = [each for each in arguments if each.startswith("--ot.")]
    cfg = None if ot_config is None else OTConfig.from_file(ot_config, overrides)
    said = "training needs LeRobot, and {} is not installed: pip install lerobot (0.4.4 or newer)."
    script = needed("lerobot.scripts.lerobot_train", said)
    before = sys.argv
    sys.argv = ["lerobot-train", *(each for each in arguments if each not in overrides), *(["--wandb.enable=false"] if check else [])]
    try:
        with _Launch(cfg, script, overrides, restart_pairs, check).in_place(), contextlib.suppress(_Checked):
            script.main()
    finally:
        sys.argv = before


class _Launch:
    """One run of the script: what it made, as far as it has got."""

    def __init__(
        self, cfg: OTConfig | None, script: ModuleType, overrides: Sequence[str] = (), restart: bool = False, check: bool = False
    ) -> None:
        self.given, self.script, self.overrides, self.restart, self.check = cfg, script, overrides, restart, check
        self.train_cfg: Any = None
        self.training: CoTraining | None = None
        self.preprocessor: Callable[[dict[str, Any]], Any] | None = None
        self.loaders: dict[str, DrawLoader] = {}
        self.held_out: LeRobotOTPairDataset | None = None
        self.resumed: dict[str, Any] = {}

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The script with our names in place of its own."""
        ours = {
            "make_dataset": self._dataset,  # LeRobot 0.4
            "make_train_eval_datasets": self._dataset,  # 0.5 and later
            "make_policy": self._policy,
            "make_pre_post_processors": self._processors,
            "cycle": self._cycle,
            "save_checkpoint": self._save,
            "load_training_state": self._load,
        }
        originals = {name: getattr(self.script, name) for name in ours if hasattr(self.script, name)}
        if missing := [name for name in list(ours)[2:] if name not in originals]:
            raise ProblemError(
                f"this LeRobot's training script has no {', '.join(missing)}: use 0.4.4 to 0.6, or attach_ot in a loop of yours."
            )

        for name, original in originals.items():
            setattr(self.script, name, functools.partial(ours[name], original))
        try:
            yield
        finally:
            for name, original in originals.items():
                setattr(self.script, name, original)

    def _dataset(self, original: Callable[..., Any], cfg: Any, *args: Any, **kwargs: Any) -> Any:
        made = original(cfg, *args, **kwargs)
        self.train_cfg, self.target = cfg, made[0] if isinstance(made, tuple) else made
        if cfg.resume:
            folder = Path(cfg.checkpoint_path) / "training_state"
            self.resumed = json.loads((folder / STATE).read_text()) if (folder / STATE).exists() else {}
            if (folder / CONFIG).exists():
                self.given = self.given or OTConfig.from_file(folder / CONFIG, self.overrides)
                old, new = (_leaves(each.to_dict()) for each in (OTConfig.from_file(folder / CONFIG), self.given))
                if changed := [f"{key} {old.get(key)} -> {new.get(key)}" for key in old | new if old.get(key) != new.get(key)]:
                    logging.info("resumed with other settings than before: %s", ", ".join(changed))
            if self.restart:
                logging.info("the draws of pairs and of the mixture begin anew")
                self.resumed = {key: state for key, state in self.resumed.items() if key not in ("pairs", "bc")}
        if self.given is None:
            raise ProblemError("there is nothing to align: pass --ot-config, or resume from a checkpoint that was co-trained.")
        self.cfg = self.given
        if self.cfg.enable:
            self._source()
        return made

    def _source(self) -> None:
        """The source dataset, seen as the target is: the same frames of history, the same image transforms."""
        from lerobot.datasets.factory import resolve_delta_timestamps  # pyright: ignore[reportMissingImports]
        from lerobot.datasets.lerobot_dataset import LeRobotDataset, LeRobotDatasetMetadata  # pyright: ignore[reportMissingImports]

        cfg, target = self.cfg, self.target
        if cfg.src_repo_id is None and cfg.src_root is None:
            raise ProblemError("src_repo_id is missing: the source dataset, by its name, or by its folder with src_root.")
        if cfg.pair_info_path is None:
            raise ProblemError("pair_info_path is missing: make the file with gpu-ot pair --src ... --tgt ... --out pairs.npz.")
        name = cfg.src_repo_id or Path(str(cfg.src_root)).name
        meta = LeRobotDatasetMetadata(name, root=cfg.src_root)
        given = self.train_cfg.dataset
        like_the_target = {key: getattr(given, key) for key in ("video_backend", "depth_output_unit") if hasattr(given, key)}
        if hasattr(target, "_return_uint8"):  # 0.6: a quarter of the memory for decoded frames
            like_the_target["return_uint8"] = target._return_uint8
        like_the_target |= {"image_transforms": transforms_of(target), "tolerance_s": self.train_cfg.tolerance_s}
        history = resolve_delta_timestamps(self.train_cfg.policy, meta)
        self.source = LeRobotDataset(name, root=cfg.src_root, delta_timestamps=history, **like_the_target)
        pairs = self.pairs = read_pairs(cfg.pair_info_path, base_index_src=cfg.base_index_src, base_index_tgt=cfg.base_index_tgt)
        # Where a feature has another name in the source, the source's takes the target's: one preprocessor normalises both.
        made = {WHOLE, "state"} if getattr(self.train_cfg.policy, "type", "") == "groot" else {WHOLE}  # by the policy, or its preprocessor
        there = {*target.meta.features, *made}
        found = expanded(cfg.loss_config.features, {*meta.features, *made}, there)
        self.rename: dict[str, str] = {s.src_key: str(s.tgt_key) for s in found if s.src_key not in there}
        _fit(found, meta.features, target.meta.features, self.rename, transforms_of(target) is not None)
        # A pretrained policy's preprocessor renames by --rename_map, and features are wanted as they come out of it.
        pretrained = getattr(self.train_cfg.policy, "pretrained_path", None)
        processed = (getattr(self.train_cfg, "rename_map", None) or {}) if pretrained else {}
        renamed = ((spec, self.rename.get(spec.src_key, spec.src_key), str(spec.tgt_key)) for spec in found)
        found = [
            dataclasses.replace(spec, src_key=processed.get(src, src), tgt_key=processed.get(tgt, tgt), term_name=spec.name)
            for spec, src, tgt in renamed
        ]
        # A copy: checkpoints keep what was given, since the source's own names are wanted again when the run is resumed.
        self.cfg = dataclasses.replace(cfg, loss_config=dataclasses.replace(cfg.loss_config, features=found))

        sampling = dataclasses.replace(cfg, seed=self._seed)
        data = functools.partial(LeRobotOTPairDataset, self.source, target, pairs, cache_bytes=cfg.cache_mib << 20)
        every = pairs.target.episodes.tolist()
        held = every[-cfg.held_out_episodes :] if cfg.retrieval_every else []
        if len(held) == len(every):
            raise ProblemError(f"held_out_episodes: {len(held)} are all target episodes there are, and none is left to align.")
        self.aligned = data(sampling, episodes=every[: -len(held)] if held else None)
        nearest = dataclasses.replace(sampling, window_size=0, no_window=False, topk_src_episodes=1)
        self.held_out = data(nearest, episodes=held, verify=False) if held else None
        if "pairs" in self.resumed:
            same_law(self.resumed["pairs"], self.aligned)

    def _policy(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        policy = original(*args, **kwargs)
        if self.cfg.enable:
            t, held = self.train_cfg, None if self.held_out is None else lambda: self._held
            options = {"log_every": t.log_freq, "out_dir": t.output_dir, "main": ranks()[0] == 0, "held_out": held}
            self.training = attach_ot(policy, self._pairs, self.cfg, self._preprocess, **options)
            self.policy = policy
        return policy

    def _processors(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        self.preprocessor = made[0]
        if self.check:
            report(self)
            raise _Checked
        return made

    def _preprocess(self, batch: dict[str, Any]) -> Any:
        assert self.preprocessor is not None, "the script makes its processors before the first step"
        return self.preprocessor(batch)

    @property
    def _seed(self) -> int:
        return int((self.train_cfg.seed or 0) if self.cfg.seed is None else self.cfg.seed)

    def _pairs(self, start: int) -> Iterator[Pair]:
        """Batches of pairs, of which step `start` takes the first."""
        for batch in self._loader("pairs", self.aligned, self.cfg.pairs_of(self.train_cfg.batch_size), start, self.cfg.num_workers):
            yield self.sides(batch)

    @functools.cached_property
    def _held(self) -> Pair:
        assert self.held_out is not None
        return self.sides(default_collate([self.held_out.item(n) for n in range(min(HELD_OUT, len(self.held_out)))]))

    def sides(self, batch: dict[str, Any]) -> Pair:
        """(source, target) as LeRobot has its batches, by the target's names."""
        return {self._renamed(key): z for key, z in flat(batch["src"]).items()}, flat(batch["tgt"])

    def _renamed(self, key: str) -> str:
        """The target's name of a source feature, and of the column that says where it is padded."""
        feature = key.removesuffix("_is_pad")
        return self.rename.get(feature, feature) + key[len(feature) :]

    def _loader(self, name: str, dataset: Drawable, size: int, start: int, workers: int) -> DrawLoader:
        """From where the checkpoint left it, or from step `start` on."""
        rank, world = ranks()
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
        if workers:  # as 0.6 lets one choose
            given = {"multiprocessing_context": "dataloader_multiprocessing_context", "prefetch_factor": "prefetch_factor"}
            options |= {name: getattr(self.train_cfg, key) for name, key in given.items() if hasattr(self.train_cfg, key)}
        loader = DrawLoader(dataset, size, rank=rank, world=world, start=0 if self.restart else start * size * world, **options)
        if name in self.resumed:
            loader.load_state_dict(self.resumed[name])
        self.loaders[name] = loader
        return loader

    def _cycle(self, original: Callable[..., Any], loader: Any) -> Iterator[Any]:
        cfg, t = self.cfg, self.train_cfg
        if not cfg.enable or cfg.bc_src_weight is None or loader.dataset is not self.target:
            return original(loader)
        if self.rename:
            raise ProblemError(
                f"the BC batch cannot mix datasets whose features differ in name, {self.rename}: rename them, or leave bc_src_weight out."
            )
        drop = int(getattr(t.policy, "drop_n_last_frames", 0))
        mixed = co_training(self.source, self.target, self.pairs, cfg, drop, seed=self._seed, cache_bytes=cfg.cache_mib << 20)
        return self._loader("bc", mixed, t.batch_size, self.training.step if self.training else 0, t.num_workers)

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if self.training is not None and self.given is not None:
            folder = Path(kwargs.get("checkpoint_dir") or args[0]) / "training_state"
            folder.mkdir(parents=True, exist_ok=True)
            state = self.training.state_dict() | {name: loader.state_dict() for name, loader in self.loaders.items()}
            for name, content in ((CONFIG, self.given.to_dict()), (STATE, state)):
                partial = folder / f"{name}.partial"
                partial.write_text(json.dumps(content, indent=2))
                partial.replace(folder / name)
        return out

    def _load(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if self.training is not None:
            self.training.load_state_dict(self.resumed or {"step": out[0]})
        return out


def _leaves(given: Any, path: str = "") -> dict[str, Any]:
    """Dotted path -> value of nested keys and values."""
    if not isinstance(given, (dict, list)):
        return {path: given}
    inner = given.items() if isinstance(given, dict) else enumerate(given)
    return {name: leaf for key, each in inner for name, leaf in _leaves(each, f"{path}.{key}" if path else str(key)).items()}


def _fit(found: Sequence[OTFeatureSpec], source: dict[str, Any], target: dict[str, Any], rename: dict[str, str], resized: bool) -> None:
    """Raises ProblemError for features that one preprocessor or one encoder could not take from both datasets, and for slices outside."""
    embedded = {spec.tgt_key for spec in found if spec.embeds}
    for key, feature in source.items():
        name = rename.get(key, key)
        ours, theirs = (tuple((each or {}).get("shape") or ()) for each in (feature, target.get(name)))
        camera = feature.get("dtype") in ("image", "video")
        if not theirs or ours == theirs or (camera and (resized or name not in embedded)):
            continue
        what = "one encoder takes both" if camera else "both are normalised by the target's statistics"
        raise ProblemError(
            f'"{name}" has shape {ours} in the source and {theirs} in the target, and {what}. Bring the datasets to one shape: a dim_slice '
            "cuts what is compared, not what the policy is given."
        )
    for spec in found:
        shape = (target.get(str(spec.tgt_key)) or {}).get("shape") or ()
        if spec.dim_slice is not None and len(shape) == 1 and not fits(spec.dim_slice, shape[0]):
            raise ProblemError(f'dim_slice {spec.dim_slice} of "{spec.name}" is outside "{spec.tgt_key}", which has {shape[0]} numbers.')


if __name__ == "__main__":  # torchrun -m gpu_ot.lerobot.train: the command, by its own name
    sys.argv.insert(1, "train")
    runpy.run_module("gpu_ot.cli", run_name="__main__")
