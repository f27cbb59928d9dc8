"""From two batches of observations and a list of features to terms |x_i - y_j|^2 of one cost."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ..errors import ProblemError
from .config import OTFeatureSpec
from .encoders import IMAGES, WHOLE, Observation, embed


class Term(NamedTuple):
    """weight * |x_i - y_j|^2, x (n, d) and y (m, d). `label` says whether the points are constants."""

    name: str
    weight: float
    x: Tensor
    y: Tensor


def terms(policy: nn.Module, source: Observation, target: Observation, specs: Iterable[OTFeatureSpec]) -> list[Term]:
    """The terms of the cost: embeddings with the gradient to the policy, labels without, float32 or wider.

    Both sides of an embedding go through one call of the encoder, so that its batch statistics are those of both. Raises ProblemError for
    a key that is missing, a slice outside a feature, and features of two widths.
    """
    # Which of a sequence of observations is now: most policies see the past, TDMPC the future as well.
    offsets = list(getattr(getattr(policy, "config", None), "observation_delta_indices", None) or [])
    now = offsets.index(0) if 0 in offsets else -1
    found = [_term(policy, source, target, spec, now) for spec in expanded(specs, source, target)]
    if not found:
        raise ProblemError("loss_config has no features: name at least one, with src_key and a weight.")
    return found


def expanded(specs: Iterable[OTFeatureSpec], source: Iterable[str], target: Iterable[str]) -> list[OTFeatureSpec]:
    """The features with every wildcard replaced by all the keys that it stands for, on both sides. Raises ProblemError for one that stands
    for nothing, or for keys that the other side lacks."""
    source, target = list(source), list(target)
    out = []
    for spec in specs:
        assert spec.tgt_key is not None
        src, tgt = _wildcard(spec.src_key, source), _wildcard(spec.tgt_key, target)
        if src is None and tgt is None:
            for key, keys, side in ((spec.src_key, source, "source"), (spec.tgt_key, target, "target")):
                if key != WHOLE and key not in keys:
                    raise ProblemError(f'the {side} has no "{key}"; it has {", ".join(sorted(keys)) or "nothing"}.')
            out.append(spec)
            continue
        if src is None or tgt is None:
            raise ProblemError(f'"{spec.src_key}" and "{spec.tgt_key}": a wildcard needs one on the other side.')
        if not src or set(src) != set(tgt):
            raise ProblemError(
                f'"{spec.src_key}" and "{spec.tgt_key}" must stand for the same features on both sides: the source has '
                f"{', '.join(src.values()) or 'none'}, the target {', '.join(tgt.values()) or 'none'}."
            )
        base = spec.term_name or spec.src_key.rstrip(".*")
        for part in src:
            name = f"{base}/{part}" if part else base
            out.append(dataclasses.replace(spec, src_key=src[part], tgt_key=tgt[part], term_name=name))
    return out


def _wildcard(key: str, keys: list[str]) -> dict[str, str] | None:
    """What the star stands for -> the key, in order; None for a key without one. "observation.images" is all cameras."""
    if key == IMAGES and key not in keys:
        key = f"{IMAGES}.*"
    if "*" not in key:
        return None
    head, tail = key.split("*", 1)
    return {k[len(head) : len(k) - len(tail)]: k for k in keys if k.startswith(head) and k.endswith(tail) and not k.endswith("_is_pad")}


def _term(policy: nn.Module, source: Observation, target: Observation, spec: OTFeatureSpec, now: int) -> Term:
    parts: list[tuple[Tensor, Tensor]] = []
    if spec.use_learned_embed and spec.weight_embed > 0:
        z = _embedded(policy, source, target, spec)
        n = len(next(iter(source.values())))
        if spec.embed_cost == "cosine":  # 1 - cos is half the squared distance of what has length 1
            z = nn.functional.normalize(z, dim=-1) * 0.5**0.5
        parts.append((spec.weight_embed**0.5 * z[:n], spec.weight_embed**0.5 * z[n:]))
    if spec.weight_label > 0:
        if spec.src_key == WHOLE:
            raise ProblemError(f'"{WHOLE}" is no label: set weight_label: 0, and add a feature for each label.')
        labels = [_label(obs, str(key), spec, now) for obs, key in ((source, spec.src_key), (target, spec.tgt_key))]
        parts.append((spec.weight_label**0.5 * labels[0], spec.weight_label**0.5 * labels[1]))
    for x, y in parts:
        if x.shape[1:] != y.shape[1:]:
            raise ProblemError(f'"{spec.name}" has {x.shape[-1]} numbers in the source and {y.shape[-1]} in the target: they must agree.')
    x, y = (torch.cat(side, -1) for side in zip(*parts, strict=True))
    return Term(spec.name, spec.term_weight, x, y)


def _embedded(policy: nn.Module, source: Observation, target: Observation, spec: OTFeatureSpec) -> Tensor:
    """(n + m, d), of the source and then the target. The policy knows features by the target's names."""
    key = str(spec.tgt_key)
    if key == WHOLE:
        if spec.dim_slice is not None or spec.embed_path is not None:
            raise ProblemError(f'"{WHOLE}" is embedded at once by the policy itself: leave dim_slice and embed_path of "{spec.name}" out.')
        keys = [k for k in target if k in source and k.startswith("observation") and not k.endswith("_is_pad")]
        joint = {k: torch.cat((source[k], target[k])) for k in keys}
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
        x = torch.cat(sides)
        joint = {key: x}
        if "embodiment_id" in target and "embodiment_id" in source:
            joint["embodiment_id"] = torch.cat((source["embodiment_id"], target["embodiment_id"]))
    return _wide(embed(policy, key, x, joint, spec.embed_path))


def _label(observation: Observation, key: str, spec: OTFeatureSpec, now: int) -> Tensor:
    """(batch, d), detached: the frame of a sequence that the feature asks for. Where frames are padded, the nearest real one stands in."""
    x = _wide(_sliced(observation[key].detach(), spec, key))
    if x.ndim != 3:
        return x.flatten(1)
    steps = torch.arange(x.shape[1], device=x.device)
    padded = observation.get(f"{key}_is_pad")
    if padded is not None:
        # Padding is before the episode or after it, so that the nearest real frame is the first or the last of them.
        real = (~padded).int()
        first, last = real.argmax(1), x.shape[1] - 1 - real.flip(1).argmax(1)
        steps = steps.clamp(first.unsqueeze(1), last.unsqueeze(1))
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
    start, stop = spec.dim_slice
    width = x.shape[-1]
    if not all(z is None or -width <= z <= width for z in (start, stop)) or not len(range(width)[start:stop]):
        raise ProblemError(f'dim_slice {spec.dim_slice} of "{spec.name}" is outside "{key}", which has {width} numbers.')
    return x[..., start:stop]


def _wide(x: Tensor) -> Tensor:
    """float32 at least: squared distances of halves have no digits left."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def only(observation: Mapping[str, object], keys: Iterable[str]) -> dict[str, Tensor]:
    """The tensors of an observation among `keys`, wildcards included, and what says which of their frames are padding."""
    tensors = {key: z for key, z in observation.items() if isinstance(z, Tensor)}
    names = list(tensors)
    wanted: set[str] = set()
    for key in keys:
        stood = _wildcard(key, names)
        wanted |= {k for k in names if k.startswith("observation")} if key == WHOLE else {key} if stood is None else set(stood.values())
    return {key: z for key, z in tensors.items() if key in wanted or key.removesuffix("_is_pad") in wanted}
