"""Where the vision tower, the projector, the language model and its head live inside a vision-language model.

Everything that treats components differently asks here: freezing, tuning targets, learning rates, quantization skips.
Modules are found by identity, through the accessors that transformers gives every model, and never by a substring of a
name.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from peft import PeftModel
from torch import nn

from mmtune.families.family_table import PROJECTORS
from mmtune.methods.method_table import LANGUAGE_PREFIXES
from mmtune.methods.selectors import compile_selector, is_match
from mmtune.utils.errors import RecipeValueError, UserError, nearest

Component = Literal["vision", "projector", "language", "lm_head"]

PEFT_PREFIX = "base_model.model."
PEFT_PREFIXES = ("", PEFT_PREFIX, "base_model.")
"""What PEFT puts before a module's name: nothing, a tuner's wrapper, or a prompt method's."""


@dataclass(frozen=True)
class Components:
    """Dotted paths inside one model.

    Attributes:
        vision_tower: the image encoder; in Qwen-VL it encloses the projector.
        projector: the module that brings image features to the language model's width.
        language_model: the decoder, with its token embeddings.
        lm_head: the output embeddings.
        projector_extras: further modules and parameters that belong to the projector (LLaVA-NeXT's `image_newline`,
            Qwen3-VL's DeepStack mergers).
    """

    vision_tower: str | None
    projector: str | None
    language_model: str
    lm_head: str | None
    projector_extras: tuple[str, ...] = ()


def find_components(model: nn.Module) -> Components:
    """Find the components of a vision-language model, plain or wrapped by PEFT.

    Args:
        model: a `...ForConditionalGeneration` of one of the families in `PROJECTORS`.

    Returns:
        Paths that `model.get_submodule` takes, for `projector_extras` paths of modules or parameters.

    Raises:
        UserError: for a family that is not known.
    """
    inner: Any = model.get_base_model() if isinstance(model, PeftModel) else model
    model_type = getattr(getattr(inner, "config", None), "model_type", None)
    names = {id(module): name for name, module in model.named_modules()}
    prefix = names[id(inner)] + "." if inner is not model else ""
    head = inner.get_output_embeddings() if hasattr(inner, "get_output_embeddings") else None
    if model_type not in PROJECTORS or head is None:
        raise RecipeValueError(
            "model",
            f"{type(inner).__name__} (model_type {model_type!r}) is not a family whose components are known; known: "
            f"{', '.join(sorted(PROJECTORS))}, each as its ...ForConditionalGeneration class",
        )
    known = {name for name, _ in (*inner.named_modules(), *inner.named_parameters())}
    projectors = [path for path in PROJECTORS[model_type] if path in known]
    vision, language = inner.get_encoder(modality="image"), inner.get_decoder()
    found = {"vision tower": vision is not inner and id(vision) in names, "language model": id(language) in names}
    found["projector"] = bool(projectors)
    missing = [name for name, there in found.items() if not there]
    if missing:
        raise RecipeValueError(
            "model", f"found no {' and no '.join(missing)} in {type(inner).__name__} (model_type {model_type!r})"
        )
    return Components(
        vision_tower=names[id(vision)],
        projector=prefix + projectors[0],
        language_model=names[id(language)],
        lm_head=names[id(head)],
        projector_extras=tuple(prefix + path for path in projectors[1:]),
    )


def component_of(name: str, components: Components) -> Component:
    """The component that owns a parameter or module; where one lies inside another, the longest path wins.

    Args:
        name: a dotted name, with or without PEFT's `base_model.model.`.

    Raises:
        UserError: when no component owns it (a module that encloses several, or an unknown one).
    """
    if name.startswith(LANGUAGE_PREFIXES):
        return "language"
    owner, depth = None, -1
    for path, component in _paths(components):
        for spelled in {name.removeprefix(prefix) for prefix in PEFT_PREFIXES}:
            for root in {path.removeprefix(prefix) for prefix in PEFT_PREFIXES}:
                if (spelled == root or spelled.startswith(root + ".")) and len(root) > depth:
                    owner, depth = component, len(root)
    if owner is None:
        raise RecipeValueError("model", f"{name!r} lies in no component: {', '.join(path for path, _ in _paths(components))}")
    return owner


def linear_modules(model: nn.Module, components: Components, component: Component) -> list[str]:
    """Full paths of the linear layers of a component, quantized ones too, without the language model's head.

    Call it before adapters are attached: an adapter's own matrices are linear layers as well.
    """
    return [
        name
        for name, module in _modules_of(model, components, component)
        if isinstance(module, nn.Linear) and name != components.lm_head
    ]


def select_modules(model: nn.Module, components: Components, component: Component, selector: str | list[str]) -> list[str]:
    """Full paths of the modules of a component that a selector names.

    Args:
        selector: "all-linear"; "all-norm"; or a regular expression that must match a module's whole path below the component, or
            its last name; or a list of names, each matching the last parts of a path (`q_proj`, `self_attn.q_proj`).

    Returns:
        Paths in the order of the model; only modules that hold parameters themselves and have no children.

    Raises:
        UserError: when the selector, or one entry of the list, matches nothing.
    """
    if selector == "all-linear":
        found = linear_modules(model, components, component)
        if not found:
            raise UserError(f"all-linear: the {component} component has no linear layer; {_there(model, components, component)}")
        return found
    leaves = _leaves(model, components, component)
    if selector == "all-norm":
        found = [name for name in leaves if type(model.get_submodule(name)).__name__.endswith("Norm")]
        if not found:
            raise UserError(f"all-norm: the {component} component has no normalization; {_there(model, components, component)}")
        return found
    if isinstance(selector, str):
        pattern = compile_selector(selector)
        found = [n for n, below in leaves.items() if is_match(pattern, below) or is_match(pattern, n.rpartition(".")[2])]
        if not found:
            raise UserError(f"{selector!r} matches no module of the {component}; {_there(model, components, component)}")
        return found
    chosen: set[str] = set()
    for entry in selector:
        matches = {name for name in leaves if name == entry or name.endswith("." + entry)}
        if not matches:
            hint = nearest(entry, {name.rpartition(".")[2] for name in leaves})
            raise UserError(f"{entry!r} matches no module of the {component}{hint}; {_there(model, components, component)}")
        chosen |= matches
    if not chosen:
        raise UserError(f"an empty list selects no module of the {component}; {_there(model, components, component)}")
    return [name for name in leaves if name in chosen]


def select_parameters(model: nn.Module, components: Components, component: Component, names: list[str]) -> list[str]:
    """Full paths of the parameters of a component whose last parts are given, such as `experts.down_proj`.

    Raises:
        UserError: when an entry matches nothing, or a parameter that is no matrix or stack of matrices.
    """
    there = {name: p for name, p in model.named_parameters() if component_of(name, components) == component}
    chosen = []
    for entry in names:
        found = [name for name in there if name == entry or name.endswith("." + entry)]
        if not found:
            hint = nearest(entry, {name.rpartition(".")[2] for name in there})
            raise UserError(f"{entry!r} matches no parameter of the {component}{hint}")
        flat = next((name for name in found if there[name].ndim not in (2, 3)), None)
        if flat is not None:
            raise UserError(f"{entry!r}: {flat} has {there[flat].ndim} dimension; a matrix or a stack of matrices is right")
        chosen += found
    return list(dict.fromkeys(chosen))


def _paths(components: Components) -> list[tuple[str, Component]]:
    """Every path with its component; on a tie of equal paths the first wins."""
    pairs: list[tuple[str | None, Component]] = [
        (components.lm_head, "lm_head"),
        (components.projector, "projector"),
        *((path, "projector") for path in components.projector_extras),
        (components.vision_tower, "vision"),
        (components.language_model, "language"),
    ]
    return [(path, component) for path, component in pairs if path is not None]


def _modules_of(model: nn.Module, components: Components, component: Component) -> list[tuple[str, nn.Module]]:
    roots = tuple(path for path, owner in _paths(components) if owner == component)
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(name == root or name.startswith(root + ".") for root in roots) and component_of(name, components) == component
    ]


def _leaves(model: nn.Module, components: Components, component: Component) -> dict[str, str]:
    """Full path of every leaf module with parameters, and its path below the component."""
    roots = [path for path, owner in _paths(components) if owner == component]
    leaves = {}
    for name, module in _modules_of(model, components, component):
        if not any(module.children()) and any(True for _ in module.parameters(recurse=False)):
            root = max((path for path in roots if name == path or name.startswith(path + ".")), key=len)
            leaves[name] = name.removeprefix(root).lstrip(".")
    return leaves


def _there(model: nn.Module, components: Components, component: Component) -> str:
    kinds: dict[str, list[str]] = {}
    for name in _leaves(model, components, component):
        kinds.setdefault(name.rpartition(".")[2], []).append(name)
    shown = [f"{last} ({len(paths)})" for last, paths in sorted(kinds.items())]
    return f"modules there: {', '.join(shown) or 'none'}"
