"""Modules and parameters of a vision-language model by component: vision tower, projector, language model, output head, others.

Freezing, tuning targets, learning-rate groups and quantization use these paths, which `families/structure.py` finds.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Literal

from torch import nn

from mmtune.distributed.deepspeed_private import full_shape
from mmtune.families.structure import Components
from mmtune.methods.method_table import LANGUAGE_PREFIXES
from mmtune.methods.selectors import ALL_EXPERTS, compile_selector, is_match, is_router
from mmtune.models.experts.expert_stacks import find_experts
from mmtune.utils.errors import RecipeValueError, UserError, nearest

Component = Literal["vision", "projector", "language", "lm_head", "others"]

PEFT_PREFIX = "base_model.model."
PEFT_PREFIXES = ("", PEFT_PREFIX, "base_model.")
"""Prefixes of module names: none, that of a PEFT tuner, and that of a PEFT prompt method."""


def component_of(name: str, components: Components) -> Component:
    """The component of a parameter or module; for nested components the one with the longest path.

    Args:
        name: a dotted name, with or without PEFT's prefix `base_model.model.`.

    Raises:
        UserError: the name is in no component (a module that contains several, or an unknown one).
    """
    if name.startswith(LANGUAGE_PREFIXES):
        return "language"
    match, length = None, -1
    for path, component in _paths(components):
        for plain_name in {name.removeprefix(prefix) for prefix in PEFT_PREFIXES}:
            for root in {path.removeprefix(prefix) for prefix in PEFT_PREFIXES}:
                if (plain_name == root or plain_name.startswith(root + ".")) and len(root) > length:
                    match, length = component, len(root)
    if match is None:
        raise RecipeValueError("model", f"{name!r} is in no component: {', '.join(path for path, _ in _paths(components))}")
    return match


def linear_modules(model: nn.Module, components: Components, component: Component) -> list[str]:
    """Full paths of the linear layers of a component that the model calls, including quantized ones, without head and routers.

    Layers of an indexer, which selects the positions that sparse attention reads, are left out: the loss has no gradient there.
    Call it before adapters are attached, because adapter matrices are linear layers, too.
    """
    modules = _modules_of(model, components, component)
    indexers = tuple(f"{name}." for name, module in modules if type(module).__name__.endswith("Indexer"))
    return [
        name
        for name, module in modules
        if isinstance(module, nn.Linear)
        and name != components.lm_head
        and name.rpartition(".")[2] not in components.bypassed
        and not name.startswith(indexers)
        and not is_router(module)
    ]


def select_modules(model: nn.Module, components: Components, component: Component, selector: str | list[str]) -> list[str]:
    """Full paths of the modules of a component that a selector matches.

    Args:
        selector: "all-linear"; "all-norm"; a regular expression that must match the full path of a module below the component, or
            its last name; or a list of path endings (`q_proj`, `self_attn.q_proj`).

    Returns:
        Paths in the order of the model; only leaf modules with parameters.

    Raises:
        UserError: the selector, or one entry of the list, matches nothing.
    """
    available = partial(_describe_modules, model, components, component)
    if selector == "all-linear":
        matches = linear_modules(model, components, component)
        if not matches:
            raise UserError(f"all-linear: the {component} component has no linear layer; {available()}")
        return matches
    leaves = _leaves(model, components, component)
    if selector == "all-norm":
        matches = [name for name in leaves if type(model.get_submodule(name)).__name__.endswith("Norm")]
        if not matches:
            raise UserError(f"all-norm: the {component} component has no normalization layer; {available()}")
        return matches
    if isinstance(selector, str):
        pattern = compile_selector(selector)
        matches = [n for n, below in leaves.items() if is_match(pattern, below) or is_match(pattern, n.rpartition(".")[2])]
        if not matches:
            raise UserError(f"{selector!r} matches no module of the {component} component; {available()}")
        return matches
    selected: set[str] = set()
    for entry in selector:
        entry_matches = {name for name in leaves if name == entry or name.endswith("." + entry)}
        if not entry_matches:
            hint = nearest(entry, {name.rpartition(".")[2] for name in leaves})
            raise UserError(f"{entry!r} matches no module of the {component} component{hint}; {available()}")
        selected |= entry_matches
    if not selected:
        raise UserError(f"an empty list selects no module of the {component} component; {available()}")
    return [name for name in leaves if name in selected]


def select_parameters(model: nn.Module, components: Components, component: Component, names: str | list[str]) -> list[str]:
    """Full paths of the parameters of a component that end with one of `names`, such as `experts.down_proj`.

    Args:
        names: path endings; or "all-experts", the stacked weights of all experts.

    Raises:
        UserError: an entry that matches nothing, or a parameter that is neither a matrix nor a stack of matrices.
    """
    stacks = [stack for stack in find_experts(model).values() if component_of(stack.module, components) == component]
    if names == ALL_EXPERTS:
        if not stacks:
            raise UserError(
                f"{ALL_EXPERTS}: the {component} component has no experts that are stacked in one parameter; leave it out: "
                "target_modules selects experts that are linear layers"
            )
        return [path for stack in stacks for path in stack.paths]
    parameters = {name: p for name, p in model.named_parameters() if component_of(name, components) == component}
    selected = []
    for entry in names:
        matches = [name for name in parameters if name == entry or name.endswith("." + entry)]
        if not matches:
            hint = nearest(entry, {name.rpartition(".")[2] for name in parameters})
            hint += f"; the stacked experts are target_parameters: {ALL_EXPERTS}" if stacks else ""
            raise UserError(f"{entry!r} matches no parameter of the {component} component{hint}")
        dimensions = {name: len(full_shape(parameters[name])) for name in matches}
        other = next((name for name, count in dimensions.items() if count not in (2, 3)), None)
        if other is not None:
            raise UserError(f"{entry!r}: {other}: expected a parameter of 2 or 3 dimensions, got {dimensions[other]}")
        selected += matches
    return list(dict.fromkeys(selected))


def _paths(components: Components) -> list[tuple[str, Component]]:
    """All paths with their components; of equal paths the first one counts."""
    pairs: list[tuple[str | None, Component]] = [
        (components.lm_head, "lm_head"),
        (components.projector, "projector"),
        *((path, "projector") for path in components.projector_extras),
        *((path, "vision") for path in components.towers),
        (components.language_model, "language"),
        *((path, "others") for path in components.others),
    ]
    return [(path, component) for path, component in pairs if path is not None]


def _modules_of(model: nn.Module, components: Components, component: Component) -> list[tuple[str, nn.Module]]:
    roots = tuple(path for path, path_component in _paths(components) if path_component == component)
    return [
        (name, module)
        for name, module in model.named_modules()
        if any(name == root or name.startswith(root + ".") for root in roots) and component_of(name, components) == component
    ]


def _leaves(model: nn.Module, components: Components, component: Component) -> dict[str, str]:
    """Full paths of the leaf modules with parameters, each with its path below the component."""
    roots = [path for path, path_component in _paths(components) if path_component == component]
    leaves = {}
    for name, module in _modules_of(model, components, component):
        own, inner = (sum(1 for _ in module.parameters(recurse=recurse)) for recurse in (False, True))
        if own and own == inner:
            root = max((path for path in roots if name == path or name.startswith(path + ".")), key=len)
            leaves[name] = name.removeprefix(root).lstrip(".")
    return leaves


def _describe_modules(model: nn.Module, components: Components, component: Component) -> str:
    """The last names of a component's modules with their counts, for messages."""
    counts = Counter(name.rpartition(".")[2] for name in _leaves(model, components, component))
    return f"its modules: {', '.join(f'{name} ({count})' for name, count in sorted(counts.items())) or 'none'}"
