"""Hooks that mark the forward pass of a model's components in the timeline of a step."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from mmtune.families.structure import find_components
from mmtune.training.profiling.timeline import StepTimeline

CurrentTimeline = Callable[[], StepTimeline | None]
"""The timeline of the present step; None outside of a measured step."""


def hook_components(model: nn.Module, frozen_models: Sequence[nn.Module], current: CurrentTimeline) -> ExitStack:
    """Mark the forward passes of a vision-language model by component, and those of frozen models as a whole.

    Args:
        model: without the wrappers of a distributed run.
        frozen_models: that run on every batch beside it.

    Returns:
        A context whose end removes the hooks.
    """
    components = find_components(model)
    paths = {
        "vision": components.towers,
        "projector": (components.projector, *components.projector_extras),
        "language": (components.language_model,),
    }
    modules = dict(model.named_modules())
    parts = [
        (part, module)
        for part, names in paths.items()
        for name in names
        if name is not None and name in modules  # a projector's extras may be parameters
        for module in _called(modules[name])
    ]
    # Models call the embeddings of their language model by themselves, and Florence-2 its encoder and its decoder.
    children = modules[components.language_model].children()
    parts += [("language", module) for child in children for module in _called(child)]
    parts += [("frozen", module) for module in frozen_models]
    hooks = ExitStack()
    for part, module in parts:
        _hook(module, hooks, current, partial(StepTimeline.push, part=part), StepTimeline.pop)
    if components.lm_head is not None:
        _hook(modules[components.lm_head], hooks, current, partial(StepTimeline.push, part="language"), StepTimeline.end_head)
    return hooks


def hook_compiled(model: nn.Module, current: CurrentTimeline) -> ExitStack:
    """Mark the forward pass of a compiled model, whose components run no hooks; the context's end removes the hook."""
    hooks = ExitStack()
    _hook(model, hooks, current, partial(StepTimeline.push, part="compiled"), StepTimeline.end_head)
    return hooks


def _called(module: nn.Module) -> Iterator[nn.Module]:
    """The module, or those in a list: a list itself is not called."""
    return (each for inner in module for each in _called(inner)) if isinstance(module, nn.ModuleList) else iter([module])


def _hook(
    module: nn.Module,
    hooks: ExitStack,
    current: CurrentTimeline,
    enter: Callable[[StepTimeline], None],
    leave: Callable[[StepTimeline], None],
) -> None:
    def mark(change: Callable[[StepTimeline], None], *_: Any) -> None:
        timeline = current()
        if timeline is not None and not timeline.in_backward:
            change(timeline)

    hooks.callback(module.register_forward_pre_hook(partial(mark, enter)).remove)
    hooks.callback(module.register_forward_hook(partial(mark, leave)).remove)
