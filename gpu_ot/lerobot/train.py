"""LeRobot's own training script with the alignment in its loss: nothing of it is copied, and what it saves loads without this package.

    gpu-ot train --ot-config ot.yaml -- --dataset.repo_id=real --policy.type=act ...
    torchrun --nproc_per_node=2 -m gpu_ot.lerobot.train --ot-config ot.yaml -- ...

The script is asked for at six of its own names: its dataset (to add the source), its policy (to attach to), its processors (pairs are
normalised as batches are), its endless loader (the BC mix), and its saving and loading (the place in the sequence of pairs).
"""

from __future__ import annotations

import dataclasses
import importlib
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from ..errors import ProblemError
from .attach import CoTraining, Pair, attach_ot
from .config import OTConfig
from .dataset import DrawLoader, LeRobotOTPairDataset, MixedDataset, PairSampling, co_training, ranks
from .encoders import WHOLE
from .features import expanded
from .pairs import read_pairs

CONFIG, STATE = "ot_config.json", "ot_state.json"


def run(ot_config: str | Path | None, arguments: Sequence[str]) -> None:
    """LeRobot's training with `arguments`, as its own command takes them, and the alignment of `ot_config`.

    ot_config  a JSON or YAML file; when left out, that of the checkpoint which `arguments` resume from.

    Raises ProblemError where LeRobot is not installed, for a configuration that does not fit the datasets, and what LeRobot raises.
    """
    cfg = None if ot_config is None else OTConfig.from_file(ot_config)
    script = _script()
    before = sys.argv
    sys.argv = ["lerobot-train", *arguments]
    try:
        with _Launch(cfg, script).in_place():
            script.main()
    finally:
        sys.argv = before


def _script() -> ModuleType:
    try:
        return importlib.import_module("lerobot.scripts.lerobot_train")
    except ModuleNotFoundError as missing:
        raise ProblemError(f"training needs LeRobot, and {missing.name} is not installed: pip install lerobot (0.4.4 or newer).") from None


class _Launch:
    """One run of the script: what it made, as far as it has got."""

    def __init__(self, cfg: OTConfig | None, script: ModuleType) -> None:
        self.given, self.script = cfg, script
        self.train_cfg: Any = None
        self.training: CoTraining | None = None
        self.preprocessor: Callable[[dict[str, Any]], Any] | None = None
        self.loaders: dict[str, DrawLoader] = {}
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

        def wrapped(name: str) -> Callable[..., Any]:
            return lambda *args, **kwargs: ours[name](originals[name], *args, **kwargs)

        for name in originals:
            setattr(self.script, name, wrapped(name))
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
            if (folder / STATE).exists():
                self.resumed = json.loads((folder / STATE).read_text())
            if self.given is None and (folder / CONFIG).exists():
                self.given = OTConfig.from_file(folder / CONFIG)
        if self.given is None:
            raise ProblemError("there is nothing to align: pass --ot-config, or resume from a checkpoint that was co-trained.")
        self.cfg = self.given
        if self.cfg.enable:
            self._source()
        return made

    def _source(self) -> None:
        """The source dataset, seen as the target is: the same frames of history, the same image transforms."""
        from lerobot.datasets.factory import resolve_delta_timestamps  # pyright: ignore[reportMissingImports]
        from lerobot.datasets.lerobot_dataset import (  # pyright: ignore[reportMissingImports]
            LeRobotDataset,
            LeRobotDatasetMetadata,
        )

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
        self.source = LeRobotDataset(
            name,
            root=cfg.src_root,
            delta_timestamps=resolve_delta_timestamps(self.train_cfg.policy, meta),
            image_transforms=getattr(target, "image_transforms", None),
            tolerance_s=self.train_cfg.tolerance_s,
            **like_the_target,
        )
        self.pairs = read_pairs(cfg.pair_info_path, base_index_src=cfg.base_index_src, base_index_tgt=cfg.base_index_tgt)
        # Where a feature has another name in the source, the source's takes the target's: one preprocessor normalises both.
        made = {WHOLE} | (
            {"state"} if getattr(self.train_cfg.policy, "type", "") == "groot" else set()
        )  # by the policy, or by its preprocessor
        there = {*target.meta.features, *made}
        found = expanded(cfg.loss_config.features, {*meta.features, *made}, there)
        self.rename: dict[str, str] = {s.src_key: str(s.tgt_key) for s in found if s.src_key not in there}
        # A pretrained policy's preprocessor renames by --rename_map, and features are wanted as they come out of it.
        pretrained = getattr(self.train_cfg.policy, "pretrained_path", None)
        processed = (getattr(self.train_cfg, "rename_map", None) or {}) if pretrained else {}
        found = [
            dataclasses.replace(
                spec,
                src_key=processed.get(key := self.rename.get(spec.src_key, spec.src_key), key),
                tgt_key=processed.get(spec.tgt_key, spec.tgt_key),
                term_name=spec.name,
            )
            for spec in found
        ]
        # A copy: checkpoints keep what was given, since the source's own names are wanted again when the run is resumed.
        self.cfg = dataclasses.replace(cfg, loss_config=dataclasses.replace(cfg.loss_config, features=found))

    def _policy(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        policy = original(*args, **kwargs)
        if self.cfg.enable:
            t = self.train_cfg
            self.training = attach_ot(policy, self._pairs, self.cfg, self._preprocess, t.log_freq, t.output_dir, main=ranks()[0] == 0)
        return policy

    def _processors(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        made = original(*args, **kwargs)
        self.preprocessor = made[0]
        return made

    def _preprocess(self, batch: dict[str, Any]) -> Any:
        assert self.preprocessor is not None, "the script makes its processors before the first step"
        return self.preprocessor(batch)

    @property
    def _seed(self) -> int:
        return next(int(seed) for seed in (self.cfg.seed, self.train_cfg.seed, 0) if seed is not None)

    def _pairs(self, start: int) -> Iterator[Pair]:
        """Batches of pairs, of which step `start` takes the first."""
        cfg = self.cfg
        sampling = PairSampling(cfg.window_size, cfg.no_window, cfg.sharpness, cfg.cutoff, cfg.topk_src_episodes, self._seed)
        dataset = LeRobotOTPairDataset(self.source, self.target, self.pairs, sampling, cache_bytes=cfg.cache_mib << 20)
        for batch in self._loader("pairs", dataset, cfg.pairs_of(self.train_cfg.batch_size), start, cfg.num_workers):
            source: dict[str, Any] = batch["source"]
            yield {self._renamed(key): z for key, z in source.items()}, batch["target"]

    def _renamed(self, key: str) -> str:
        """The target's name of a source feature, and of the column that says where it is padded."""
        feature = key.removesuffix("_is_pad")
        return self.rename.get(feature, feature) + key[len(feature) :]

    def _loader(self, name: str, dataset: LeRobotOTPairDataset | MixedDataset, size: int, start: int, workers: int) -> DrawLoader:
        """From where the checkpoint left it, or from step `start` on."""
        rank, world = ranks()
        options: dict[str, Any] = {"num_workers": workers, "pin_memory": torch.cuda.is_available()}
        if workers:  # as 0.6 lets one choose
            given = {"multiprocessing_context": "dataloader_multiprocessing_context", "prefetch_factor": "prefetch_factor"}
            options |= {name: getattr(self.train_cfg, key) for name, key in given.items() if hasattr(self.train_cfg, key)}
        loader = DrawLoader(dataset, size, rank=rank, world=world, start=start * size * world, **options)
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
        mixed = co_training(
            self.source,
            self.target,
            self.pairs,
            src_weight=cfg.bc_src_weight,
            paired_share=cfg.bc_paired_share,
            per_frame=not cfg.normalize_bc_weights_by_ds_size,
            topk_src_episodes=cfg.topk_src_episodes,
            drop_last=int(getattr(t.policy, "drop_n_last_frames", 0)),
            seed=self._seed,
            cache_bytes=cfg.cache_mib << 20,
        )
        return self._loader("bc", mixed, t.batch_size, self.training.step if self.training else 0, t.num_workers)

    def _save(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        out = original(*args, **kwargs)
        if self.training is not None and self.given is not None:
            folder = Path(kwargs["checkpoint_dir"] if "checkpoint_dir" in kwargs else args[0]) / "training_state"
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


if __name__ == "__main__":
    from ..cli import main

    sys.exit(main(["train", *sys.argv[1:]]))
