"""Where the components of a vision-language model are, found in its structure.

transformers gives every model accessors for the encoder of a modality, the decoder and the output head. What lies between is the
projector: the modules and parameters in neither, or, where the vision tower contains it (Qwen-VL), the parts of the tower that
transformers names as projectors. `check_image_tokens` proves the result on the features of an image.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from peft import PeftModel
from torch import nn

from mmtune.families.family_table import family_of
from mmtune.utils.errors import RecipeValueError

PROJECTOR_NAMES = ("merger", "projector", "connector", "aligner", "resampler", "projection")
"""Words in the names that transformers gives a projector inside a vision tower."""

OTHER_MODALITIES = ("audio", "video")


@dataclass(frozen=True)
class Components:
    """Dotted module paths of the components of a model.

    Attributes:
        vision_tower: the image encoder; in Qwen-VL it contains the projector. None in a model that has no encoder.
        projector: the module that maps image features, or the pixels themselves, to the width of the language model. None where
            images become tokens of the vocabulary.
        language_model: the decoder, with its token embeddings.
        lm_head: the output embeddings.
        projector_extras: further modules and parameters of the projector (LLaVA-NeXT's `image_newline`, Qwen3-VL's DeepStack
            mergers).
        vision_extras: further vision towers (DeepSeek-VL's for a high resolution).
        others: parts that take no part in reading an image, such as an audio tower. They stay frozen.
        bypassed: last names of linear layers whose weight the model reads without calling the layer. Adapters on them would not
            train, and they are not quantized.
    """

    vision_tower: str | None
    projector: str | None
    language_model: str
    lm_head: str | None
    projector_extras: tuple[str, ...] = ()
    vision_extras: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()

    @property
    def towers(self) -> tuple[str, ...]:
        """All vision towers."""
        return (*([] if self.vision_tower is None else [self.vision_tower]), *self.vision_extras)


def find_components(model: nn.Module) -> Components:
    """Find the components of a vision-language model, plain or wrapped by PEFT.

    Returns:
        Paths for `model.get_submodule`; those of `projector_extras` and `others` may also be parameters.

    Raises:
        UserError: a model without one of the components, or with parts that belong to none; lists what was found.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    model_type = str(getattr(getattr(inner, "config", None), "model_type", None))
    subject = f"{type(inner).__name__} (model_type {model_type!r})"
    names = {id(module): name for name, module in inner.named_modules()}
    family = family_of(model_type)

    def path(module: Any) -> str | None:
        return names.get(id(module)) or None  # the model itself is no component

    head = path(output_head(inner))
    language = family.language_model or path(_accessor(inner, "get_decoder"))
    vision = None if family.encoder_free else family.encoder or path(_accessor(inner, "get_encoder", modality="image"))
    paths = {"vision tower": vision, "language model": language, "output head": head}
    is_nested = vision is not None and language is not None and is_inside(language, vision)
    if (vision is None and not family.encoder_free) or language is None or head is None or is_nested:
        missing = [name for name, where in paths.items() if where is None] or ["vision tower"]
        raise RecipeValueError("model", f"{subject} has no {', no '.join(missing)}; found {_listing(paths)}")
    audio = [path(_accessor(inner, "get_encoder", modality=modality)) for modality in OTHER_MODALITIES]
    others = [*family.others, *(each for each in audio if each not in (None, vision, language))]
    others = [each for each in dict.fromkeys(others) if not is_inside(str(vision), each) and _has(inner, each)]
    towers = family.encoder_extras
    between = _outside(inner, [each for each in (vision, language, head, *towers, *others) if each is not None])
    others += [part for part in between if any(word in part.rpartition(".")[2] for word in OTHER_MODALITIES)]
    projectors = [each for each in family.projector_of(inner) if _has(inner, each)] or _projectors(
        inner, vision, [part for part in between if part not in others]
    )
    if not projectors and vision is not None:
        inside = ", ".join(name for name, _ in inner.get_submodule(vision).named_children())
        raise RecipeValueError("model", f"{subject} has no projector; found {_listing(paths)}, with {inside} in the vision tower")
    prefix = {id(module): name for name, module in model.named_modules()}[id(inner)] + "." if inner is not model else ""
    return Components(
        vision_tower=None if vision is None else prefix + vision,
        projector=prefix + projectors[0] if projectors else None,
        language_model=prefix + language,
        lm_head=prefix + head,
        projector_extras=tuple(prefix + each for each in projectors[1:]),
        vision_extras=tuple(prefix + each for each in towers),
        others=tuple(prefix + each for each in others),
        bypassed=family.bypassed,
    )


def image_features_of(model: Any) -> Callable[..., Any] | None:
    """`get_image_features` of a model, or of its part without the head; None if it has none.

    Some models leave it to that part (DeepSeek-VL, Janus), or pass inputs on to it without naming them (MiniCPM-V, VideoLLaMA 3).
    """

    def names_inputs(owner: Any) -> bool:
        parameters = inspect.signature(getattr(owner, "get_image_features", lambda: None)).parameters.values()
        return any(each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD) for each in parameters)

    owners = (getattr(model, "base_model", None), model)
    return family_of(str(model.config.model_type)).image_features(next(filter(names_inputs, owners), model))


def output_head(model: Any) -> nn.Module | None:
    """The output embeddings of a model, or of its language model if that has its own; None if there are none."""
    for owner in (model, _accessor(model, "get_decoder")):
        head: nn.Module | None = _accessor(owner, "get_output_embeddings")
        if head is not None:
            return head
    return None


def _accessor(model: Any, name: str, **modality: str) -> Any:
    """What an accessor of transformers returns; None where a class has none for the modality."""
    if not hasattr(model, name):
        return None
    try:
        return getattr(model, name)(**modality)
    except (AttributeError, ValueError, KeyError, TypeError):
        return None


def _projectors(model: nn.Module, vision: str | None, between: list[str]) -> list[str]:
    """What lies between encoder and decoder, the largest module first; else the parts of the vision tower named as projectors."""
    if not between and vision is not None:
        tower = model.get_submodule(vision)
        between = [
            f"{vision}.{name}"
            for name, module in tower.named_children()
            if any(word in name for word in PROJECTOR_NAMES) and any(True for _ in module.parameters())
        ]
    modules = dict(model.named_modules())

    def size(module: nn.Module) -> int:
        return sum(parameter.numel() for parameter in module.parameters())

    def rank(path: str) -> tuple[bool, int]:  # parameters, and lists such as Qwen3-VL's mergers of deeper layers, come last
        module = modules.get(path)
        return module is None or isinstance(module, nn.ModuleList), 0 if module is None else -size(module)

    return sorted(between, key=rank)


def _outside(model: nn.Module, claimed: list[str]) -> list[str]:
    """The modules and parameters outside the claimed paths, each as large as possible."""
    names = [name for name, _ in model.named_parameters() if not any(is_inside(name, path) for path in claimed)]
    parts: dict[str, None] = {}
    for name in names:
        pieces = name.split(".")
        ends = (".".join(pieces[:end]) for end in range(1, len(pieces) + 1))
        parts[next(part for part in ends if not any(is_inside(path, part) for path in claimed))] = None
    return list(parts)


def is_inside(name: str, path: str) -> bool:
    """Whether a dotted name is a path or lies below it."""
    return name == path or name.startswith(path + ".")


def _has(model: nn.Module, path: str) -> bool:
    owner, _, name = path.rpartition(".")
    try:
        return hasattr(model.get_submodule(owner), name)
    except AttributeError:
        return False


def _listing(paths: dict[str, str | None]) -> str:
    return ", ".join(f"{name} {path}" for name, path in paths.items() if path is not None) or "none of them"
