"""Where a policy's own embedding of an observation lives, with its gradient.

Asked in turn: the policy's method `encode_feature_for_ot(key, x)`, which may give None, the dotted path of the configuration, and what is
known of LeRobot's policies. Nothing here needs LeRobot: policies are recognised by their `name`.
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import ProblemError

#: The whole observation at once.
WHOLE = "observation"
STATE, ENVIRONMENT = "observation.state", "observation.environment_state"
IMAGES = "observation.images"

Observation = Mapping[str, Tensor]
#: (policy, key, x, observation) -> (batch, ...)
Encoder = Callable[[Any, str, Tensor, Observation], Tensor]


def embed(policy: nn.Module, key: str, x: Tensor, observation: Observation, path: str | None = None) -> Tensor:
    """(batch, d): the policy's embedding of `x`, its feature `key`, sliced already; `observation` is what it belongs to.

    x  (batch, dim), (batch, time, dim), (batch, channels, height, width) or (batch, time, channels, height, width).

    Sequences are embedded frame by frame and laid side by side. Raises ProblemError where nothing is known that embeds this feature, and
    for an embedding without a gradient.
    """
    hook, source = getattr(policy, "encode_feature_for_ot", None), "the policy's encode_feature_for_ot"
    z = hook(key, dict(observation) if key == WHOLE else x) if hook else None
    if z is None:
        encoder, source = _found(policy, key, path)
        z = encoder(policy, key, x, observation)
    if not isinstance(z, Tensor) or z.shape[:1] != x.shape[:1]:
        found = tuple(z.shape) if isinstance(z, Tensor) else type(z).__name__
        raise ProblemError(f'{source} must give a tensor with {len(x)} rows for "{key}", found {found}.')
    if torch.is_grad_enabled() and not z.requires_grad:
        raise ProblemError(
            f'the embedding of "{key}" by {source} carries no gradient, so that aligning it could teach the policy nothing: its parameters '
            "are frozen, or it hands the feature through as it is. Unfreeze it, name another part of the policy with embed_path, or set "
            "use_learned_embed: false and compare the feature itself with weight_label."
        )
    return z.flatten(1)


def served_by(policy: nn.Module, key: str, path: str | None = None) -> str:
    """What embeds this feature, in words. Raises ProblemError where nothing does."""
    if not hasattr(policy, "encode_feature_for_ot"):
        return _found(policy, key, path)[1]
    with contextlib.suppress(ProblemError):
        return f"the policy's encode_feature_for_ot, or {_found(policy, key, path)[1]}"
    return "the policy's encode_feature_for_ot"


def unwrapped(policy: nn.Module) -> nn.Module:
    """The policy inside torch.compile, DistributedDataParallel and their like."""
    while True:
        wraps = type(policy).__module__.startswith(("torch.", "accelerate.", "deepspeed."))
        inner = getattr(policy, "_orig_mod", None) or (getattr(policy, "module", None) if wraps else None)
        if not isinstance(inner, nn.Module):
            return policy
        policy = inner


def _found(policy: nn.Module, key: str, path: str | None) -> tuple[Encoder, str]:
    """The encoder of this feature beside the policy's own method, and what to call it."""
    return (_known(policy, key), f"{_name(policy)}'s encoder of {key}") if path is None else (_by_path(policy, path), f'"{path}"')


def _by_path(policy: nn.Module, path: str) -> Encoder:
    part: object = policy
    for name in path.split("."):
        if not hasattr(part, name):
            offered = ", ".join(name for name, _ in part.named_children()) if isinstance(part, nn.Module) else ""
            raise ProblemError(f'embed_path "{path}": {type(part).__name__} has no "{name}"; its parts are {offered or "none"}.')
        part = getattr(part, name)
    if not callable(part):
        raise ProblemError(f'embed_path "{path}" is no module but {type(part).__name__}.')
    return lambda policy, key, x, observation: _frames(lambda z: _pooled(part(z)), x, _is_image(x, key))


def _known(policy: nn.Module, key: str) -> Encoder:
    if (kind := _name(policy)) not in KNOWN:
        raise ProblemError(
            f'how {kind} embeds an observation is not known, "{key}" here. Give the policy a method encode_feature_for_ot(key, x) '
            f"that returns a tensor, name the part of it that embeds with embed_path, or use one of {', '.join(KNOWN)}."
        )
    for matches, encoder in KNOWN[kind]:
        if key == matches or (matches == IMAGES and _is_camera(key)):
            return encoder
    offered = ", ".join(f'"{"observation.images.<camera>" if key == IMAGES else key}"' for key, _ in KNOWN[kind])
    raise ProblemError(
        f'{kind} has no embedding of "{key}" alone; it embeds {offered}. Name a part of it with embed_path, or compare the feature itself '
        "with weight_label."
    )


def _name(policy: nn.Module) -> str:
    return str(getattr(policy, "name", None) or type(policy).__name__)


def _is_camera(key: str) -> bool:
    return key == "observation.image" or key.startswith((f"{IMAGES}.", "observation.image."))


def _is_image(x: Tensor, key: str) -> bool:
    return x.ndim >= 4 or (_is_camera(key) and x.ndim == 3)


def _frames(encoder: Callable[[Tensor], Tensor], x: Tensor, image: bool) -> Tensor:
    """An encoder of single frames over sequences: (batch, time, ...) -> (batch, time, d)."""
    if x.ndim == (4 if image else 2):
        return encoder(x)
    return encoder(x.flatten(0, 1)).unflatten(0, x.shape[:2])


def _pooled(z: object) -> Tensor:
    """(batch, d): feature maps and tokens averaged."""
    if isinstance(z, Mapping):
        z = next((z[name] for name in ("feature_map", "pooler_output") if name in z), next(iter(z.values())))
    if not isinstance(z, Tensor):
        raise ProblemError(f"an embedding must be a tensor, found {type(z).__name__}.")
    return z.mean((-2, -1)) if z.ndim == 4 else z.mean(-2) if z.ndim == 3 else z


def _at(path: str) -> Encoder:
    """A part of the policy that embeds vectors."""

    def encoder(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
        try:
            part = policy.get_submodule(path)
        except AttributeError:
            raise ProblemError(f'{_name(policy)} was built without "{key}": it has no part {path} to embed it.') from None
        width = getattr(part, "in_features", x.shape[-1])
        if width != x.shape[-1]:
            raise ProblemError(f'{path} embeds {width} numbers of "{key}", found {x.shape[-1]}: its dim_slice must keep them all.')
        return _frames(part, x, False)

    return encoder


def _image(embed: Callable[[Any, Tensor], Tensor]) -> Encoder:
    """A policy that embeds single images."""
    return lambda policy, key, x, observation: _frames(lambda z: _pooled(embed(policy, z)), x, True)


def _diffusion_whole(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
    found = dict(observation)
    if cameras := list(policy.config.image_features or ()):  # on one axis: (batch, time, camera, ...)
        found[IMAGES] = torch.stack([found[key] if found[key].ndim == 5 else found[key].unsqueeze(1) for key in cameras], -4)
    return policy.diffusion._prepare_global_conditioning(found)


def _diffusion_image(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
    encoder = policy.diffusion.rgb_encoder
    return _frames(encoder[list(policy.config.image_features).index(key)] if isinstance(encoder, nn.ModuleList) else encoder, x, True)


def _tdmpc_image(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
    if key != (first := next(iter(policy.config.image_features))):
        raise ProblemError(f'TDMPC embeds one camera, "{first}", found "{key}".')
    return _frames(policy.model._encoder.image_enc_layers, x, True)


def _tokens(prepare: str, embed: str) -> Encoder:
    """A policy that resizes images by a method of its own and embeds them as tokens; of a sequence, the last frame."""

    def encoder(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
        images = getattr(policy, prepare)({key: x[:, -1] if x.ndim == 5 else x})[0]
        return _pooled(operator.attrgetter(embed)(policy.model)(images[0] if isinstance(images, list) else images[:, 0]))

    return encoder


def _padded_state(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
    return policy.model.state_proj(policy.prepare_state({STATE: x}))


def _groot_state(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
    if "embodiment_id" not in observation:
        raise ProblemError("GR00T embeds a state by its robot: its preprocessor must leave embodiment_id in the batch.")
    head = policy._groot_model.action_head
    if hasattr(getattr(head, "config", None), "state_history_length"):  # N1.7 lays the frames side by side
        x = x.flatten(1).unsqueeze(1)
    return head.state_encoder(x, observation["embodiment_id"])


def _dit_image(policy: Any, key: str, x: Tensor, observation: Observation) -> Tensor:
    part = policy.observation_encoder
    encoder = part.vision_encoder or part.vision_encoders[part.camera_names.index(key)]
    return _frames(lambda z: encoder(part._apply_preprocessing(z)).flatten(1), x, True)


_PALIGEMMA = _tokens("_preprocess_images", "paligemma_with_expert.embed_image")

#: Policy -> what it embeds, and how.
KNOWN: dict[str, tuple[tuple[str, Encoder], ...]] = {
    "act": (
        (STATE, _at("model.encoder_robot_state_input_proj")),
        (ENVIRONMENT, _at("model.encoder_env_state_input_proj")),
        (IMAGES, _image(lambda policy, z: policy.model.encoder_img_feat_input_proj(policy.model.backbone(z)["feature_map"]))),
    ),
    "diffusion": ((WHOLE, _diffusion_whole), (IMAGES, _diffusion_image)),
    "vqbet": (
        (STATE, _at("vqbet.state_projector")),
        (IMAGES, _image(lambda policy, z: policy.vqbet.rgb_feature_projector(policy.vqbet.rgb_encoder(z)))),
    ),
    "tdmpc": (
        (WHOLE, lambda policy, key, x, observation: policy.model.encode(dict(observation))),
        (STATE, _at("model._encoder.state_enc_layers")),
        (ENVIRONMENT, _at("model._encoder.env_state_enc_layers")),
        (IMAGES, _tdmpc_image),
    ),
    "smolvla": ((STATE, _padded_state), (IMAGES, _tokens("prepare_images", "vlm_with_expert.embed_image"))),
    "pi0": ((STATE, _padded_state), (IMAGES, _PALIGEMMA)),
    "pi05": ((IMAGES, _PALIGEMMA),),  # it and pi0_fast write the state into the prompt
    "pi0_fast": ((IMAGES, _PALIGEMMA),),
    "xvla": ((IMAGES, _tokens("_prepare_images", "vlm.get_image_features")),),  # the state goes in beside the actions
    "groot": (("state", _groot_state),),  # as its preprocessor calls it
    "multi_task_dit": (
        (WHOLE, lambda policy, key, x, observation: policy.observation_encoder.encode(policy._prepare_batch(dict(observation)))),
        (IMAGES, _dit_image),
    ),
}
