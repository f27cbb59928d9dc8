"""From two batches of observations and a list of features to terms |x_i - y_j|^2 of one cost."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..errors import ProblemError
from .config import OTFeatureSpec, OTLossConfig
from .encoders import IMAGES, WHOLE, Observation, embed, unwrapped


class Term(NamedTuple):
    """weight * |x_i - y_j|^2, x (n, d) and y (m, d). `label` says whether the points are constants."""

    name: str
    weight: float
    x: Tensor
    y: Tensor


def weighted(parts: Iterable[tuple[float, Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """(n, d) and (m, d): points whose squared distance is the sum of weight * |x_i - y_j|^2."""
    x, y = zip(*((weight**0.5 * x, weight**0.5 * y) for weight, x, y in parts), strict=True)
    return torch.cat(x, -1), torch.cat(y, -1)


def terms(policy: nn.Module, source: Mapping[str, Any], target: Mapping[str, Any], cfg: OTLossConfig) -> list[Term]:
    """The terms of the cost: embeddings with the gradient to the policy, labels without, float32 or wider.

    Both sides of an embedding go through one call of the encoder, so that its batch statistics are those of both. Raises ProblemError for
    a key that is missing, a slice outside a feature, features of two widths, and rows that are not as many in all features of a side.
    """
    policy = unwrapped(policy)
    # Which of a sequence of observations is now: most policies see the past, TDMPC the future as well.
    offsets = list(getattr(getattr(policy, "config", None), "observation_delta_indices", None) or [])
    now = offsets.index(0) if 0 in offsets else -1
    src, tgt = tensors(source), tensors(target)
    specs = expanded(cfg.features, src, tgt)
    for side, obs, keys in (("source", src, [s.src_key for s in specs]), ("target", tgt, [str(s.tgt_key) for s in specs])):
        rows = {key: len(z) for key, z in obs.items() if key in keys or (WHOLE in keys and key.startswith(WHOLE))}
        if len(set(rows.values())) > 1:
            raise ProblemError(
                f"every feature of the {side} needs as many rows, found {', '.join(f'{n} of {k}' for k, n in rows.items())}."
            )
    if not specs:
        raise ProblemError("loss_config has no features: name at least one, with src_key and a weight.")
    return [_term(policy, src, tgt, spec, now, cfg.detach_label if spec.detach_label is None else spec.detach_label) for spec in specs]


def expanded(specs: Iterable[OTFeatureSpec], source: Iterable[str], target: Iterable[str]) -> list[OTFeatureSpec]:
    """The features with every wildcard replaced by the keys that it stands for, on both sides, less those that have a feature of their own;
    each with a name of its own. Raises ProblemError for one that stands for nothing, or for keys that the other side lacks."""
    source, target, specs = list(source), list(target), list(specs)
    taken = {(spec.src_key, spec.tgt_key) for spec in specs}
    out: list[OTFeatureSpec] = []
    for spec in specs:
        sides = ("source", spec.src_key, source), ("target", str(spec.tgt_key), target)
        src, tgt = (_wildcard(key, keys) for _, key, keys in sides)
        if src is None and tgt is None:
            for side, key, keys in sides:
                if key != WHOLE and key not in keys:
                    raise ProblemError(f'the {side} has no "{key}"; it has {", ".join(sorted(keys)) or "nothing"}.')
            out.append(spec)
            continue
        if src is None or tgt is None:
            raise ProblemError(f'"{spec.src_key}" and "{spec.tgt_key}": a wildcard needs one on the other side.')
        for (side, key, keys), found in zip(sides, (src, tgt), strict=True):
            if not found:
                raise ProblemError(f'"{key}" stands for nothing in the {side}, which has {", ".join(sorted(keys)) or "nothing"}.')
        if set(src) != set(tgt):
            raise ProblemError(
                f'"{spec.src_key}" and "{spec.tgt_key}" must stand for the same features on both sides: the source has '
                f"{', '.join(src.values())}, the target {', '.join(tgt.values())}."
            )
        for part in src:
            if (pair := (src[part], tgt[part])) not in taken:
                taken.add(pair)
                name = None if spec.term_name is None else f"{spec.term_name}/{part}" if part else spec.term_name
                out.append(dataclasses.replace(spec, src_key=pair[0], tgt_key=pair[1], term_name=name))
    names: set[str] = set()
    for k, spec in enumerate(out):
        name = next(name for j in itertools.count(1) if (name := spec.name if j == 1 else f"{spec.name}_{j}") not in names)
        names.add(name)
        out[k] = spec if spec.name == name else dataclasses.replace(spec, term_name=name)
    return out


def _wildcard(key: str, keys: list[str]) -> dict[str, str] | None:
    """What the star stands for -> the key, in order; None for a key without one. "observation.images" is all cameras."""
    if key == IMAGES and key not in keys:
        key = f"{IMAGES}.*"
    if "*" not in key:
        return None
    head, tail = key.split("*", 1)
    return {k[len(head) : len(k) - len(tail)]: k for k in keys if k.startswith(head) and k.endswith(tail) and not k.endswith("_is_pad")}


def flat(side: Mapping[str, Any]) -> Mapping[str, Any]:
    """One side of a batch as LeRobot has it, of {"obs": {...}, "actions": ...} as LeRobotOTPairDataset gives it."""
    if not isinstance(side.get("obs"), Mapping):
        return side
    return {**side["obs"], **({"action": side["actions"]} if "actions" in side else {})}


def tensors(side: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is a tensor or an array of numbers, as tensors."""
    found = {key: torch.as_tensor(z) if isinstance(z, np.ndarray) and z.dtype.kind in "biuf" else z for key, z in flat(side).items()}
    return {key: z for key, z in found.items() if isinstance(z, Tensor)}


def _term(policy: nn.Module, source: Observation, target: Observation, spec: OTFeatureSpec, now: int, detach: bool) -> Term:
    parts: list[tuple[float, Tensor, Tensor]] = []
    if spec.embeds:
        z = _embedded(policy, source, target, spec)
        n = len(next(z for k, z in source.items() if k == spec.src_key or (spec.src_key == WHOLE and k.startswith(WHOLE))))
        if spec.embed_cost == "cosine":  # 1 - cos is half the squared distance of what has length 1
            z = nn.functional.normalize(z, dim=-1) * 0.5**0.5
        parts.append((spec.weight_embed, z[:n], z[n:]))
    if spec.weight_label > 0:
        if spec.src_key == WHOLE:
            raise ProblemError(f'"{WHOLE}" is no label: set weight_label: 0, and add a feature for each label.')
        x, y = (_label(obs, str(key), spec, now, detach) for obs, key in ((source, spec.src_key), (target, spec.tgt_key)))
        parts.append((spec.weight_label, x, y))
    for _, x, y in parts:
        if x.shape[1:] != y.shape[1:]:
            raise ProblemError(f'"{spec.name}" has {x.shape[-1]} numbers in the source and {y.shape[-1]} in the target: they must agree.')
    x, y = weighted(parts)
    return Term(spec.name, spec.term_weight, x, y)


def _embedded(policy: nn.Module, source: Observation, target: Observation, spec: OTFeatureSpec) -> Tensor:
    """(n + m, d), of the source and then the target. The policy knows features by the target's names."""
    key = str(spec.tgt_key)
    if key == WHOLE:
        if spec.dim_slice is not None or spec.embed_path is not None:
            raise ProblemError(f'"{WHOLE}" is embedded at once by the policy itself: leave dim_slice and embed_path of "{spec.name}" out.')
        keys = [k for k in target if k in source and k.startswith("observation") and not k.endswith("_is_pad")]
        joint = {k: _seen(policy, torch.cat((source[k], target[k]))) for k in keys}
        if not joint:
            raise ProblemError("source and target have no observation in common.")
        x = next(iter(joint.values()))
    else:
        sides = [_sliced(obs[k], spec, k) for obs, k in ((source, spec.src_key), (target, key))]
        if sides[0].shape[1:] != sides[1].shape[1:]:
            raise ProblemError(
                f'"{spec.src_key}" of the source is {tuple(sides[0].shape[1:])} and "{key}" of the target {tuple(sides[1].shape[1:])}: '
                "one encoder takes both, so they must agree."
            )
        x = _seen(policy, torch.cat(sides))
        joint = {key: x}
        if "embodiment_id" in target and "embodiment_id" in source:
            joint["embodiment_id"] = torch.cat((source["embodiment_id"], target["embodiment_id"]))
    return _wide(embed(policy, key, x, joint, spec.embed_path))


def _label(observation: Observation, key: str, spec: OTFeatureSpec, now: int, detach: bool) -> Tensor:
    """(batch, d): the frame of a sequence that the feature asks for. Where frames are padded, the nearest real one stands in."""
    x = observation[key]
    x = _wide(_sliced(x.detach() if detach else x, spec, key))
    if x.ndim != 3:
        return x.flatten(1)
    if (padded := observation.get(f"{key}_is_pad")) is not None:
        # Padding is before the episode or after it, so that the nearest real frame is the first or the last of them.
        real = (~padded).int()
        first, last = real.argmax(1, keepdim=True), x.shape[1] - 1 - real.flip(1).argmax(1, keepdim=True)
        steps = torch.arange(x.shape[1], device=x.device).clamp(first, last)
        x = x.take_along_dim(steps.unsqueeze(-1), 1)
    if spec.time is None:
        return x[:, 0 if key.startswith("action") else now if now < x.shape[1] else -1]
    return x[:, 0] if spec.time == "first" else x[:, -1] if spec.time == "last" else x.flatten(1)


def _sliced(x: Tensor, spec: OTFeatureSpec, key: str) -> Tensor:
    if x.ndim == 1:
        x = x.unsqueeze(-1)
    if spec.dim_slice is None:
        return x
    if x.ndim > 3:
        raise ProblemError(
            f'dim_slice of "{spec.name}" cuts vectors, and "{key}" holds images of shape {tuple(x.shape[1:])}: leave it out.'
        )
    if not fits(spec.dim_slice, width := x.shape[-1]):
        raise ProblemError(f'dim_slice {spec.dim_slice} of "{spec.name}" is outside "{key}", which has {width} numbers.')
    return x[..., slice(*spec.dim_slice)]


def fits(ends: list[int | None], width: int) -> bool:
    return all(z is None or -width <= z <= width for z in ends) and len(range(width)[slice(*ends)]) > 0


def _seen(policy: nn.Module, x: Tensor) -> Tensor:
    """As encoders see it: the bytes of an image from 0 to 1, and no float64, which is numpy's, where the policy is float32."""
    wide = next((p.dtype for p in policy.parameters() if p.is_floating_point()), torch.float32) == torch.float64
    if x.dtype == torch.uint8 and x.ndim >= 3:
        return x.to(torch.float64 if wide else torch.float32) / 255
    return x.float() if x.dtype == torch.float64 and not wide else x


def _wide(x: Tensor) -> Tensor:
    """float32 at least: squared distances of halves have no digits left."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def only(observation: Mapping[str, Any], keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of an observation among `keys`, wildcards included, and what says which of their frames are padding."""
    found, wanted = tensors(observation), set[str]()
    for key in keys:
        stood = _wildcard(key, list(found))
        wanted |= {k for k in found if k.startswith(WHOLE)} if key == WHOLE else {key} if stood is None else set(stood.values())
    return {key: z for key, z in found.items() if key in wanted or key.removesuffix("_is_pad") in wanted}
