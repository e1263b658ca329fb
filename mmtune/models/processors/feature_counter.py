"""The number of image features that a model computes for an image, and what they depend on, before weights are loaded."""

from __future__ import annotations

import inspect
import json
from collections.abc import Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig

from mmtune.distributed.sharded_parameters import meta_init
from mmtune.families.structure import Components, find_components, image_features_of, is_inside
from mmtune.models.checkpoints.config_keys import without_keys
from mmtune.models.checkpoints.remote_code import auto_class
from mmtune.models.components import component_of
from mmtune.models.fake_tensors import MemoryTracker, suppress_fake_tensor_warnings
from mmtune.utils.errors import UserError

IRRELEVANT = ("_name_or_path", "dtype", "transformers_version")
"""Keys of a config that do not change a number of features: a merged checkpoint differs from its base in them."""


class FeatureCounter:
    """A model built from its config on fake tensors, whose vision tower and projector run on images of a processor.

    Attributes:
        model_class: the name of the model's class.
        image_features: the function that returns the features of an image; None if the class has none.
    """

    def __init__(self, config: PreTrainedConfig, trust_remote_code: bool) -> None:
        """Build the model and find its components.

        Raises:
            UserError: ambiguous components, or a parameter in none.
        """
        with suppress_fake_tensor_warnings(), meta_init():
            model: Any = auto_class(config).from_config(config, trust_remote_code=trust_remote_code).eval()
        components = find_components(model)
        for name, _ in model.named_parameters():
            component_of(name, components)
        self.model_class = type(model).__name__
        self.image_features = image_features_of(model)
        self._model, self._components = model, components
        self._memory, self._width = MemoryTracker(0), config.get_text_config().hidden_size
        with suppress_fake_tensor_warnings():
            self._memory.track_model(model)
        self._counts: dict[str, int] = {}

    def count(self, media: Mapping[str, torch.Tensor]) -> int:
        """The number of features for the media tensors of one image, each of the language model's hidden size.

        The first call checks on which components the features depend.

        Raises:
            UserError: features that do not depend on the vision tower and the projector, or on more than these.
            RuntimeError, ValueError, IndexError, TypeError, AttributeError: as the model for tensors that it does not expect.
            DataDependentOutputException, DynamicOutputShapeException: the number depends on weights.
        """
        assert self.image_features is not None
        parameters = inspect.signature(self.image_features).parameters
        inputs = {name: value for name, value in media.items() if name in parameters}
        key = str({name: value.shape if value.is_floating_point() else value.tolist() for name, value in inputs.items()})
        if key not in self._counts:
            with suppress_fake_tensor_warnings(), self._memory, torch.set_grad_enabled(not self._counts):
                outputs = self.image_features(**inputs, return_dict=True)
                if not self._counts:
                    _check_gradients(self._model, self._components, outputs)
            values = sum(tensor.numel() for tensor in _tensors(outputs.pooler_output))
            if values % self._width:
                raise ValueError(f"expected image features of {self._width} values, got {values} values in all")
            self._counts[key] = values // self._width
        return self._counts[key]


_KEPT: dict[str, FeatureCounter] = {}


def feature_counter(config: PreTrainedConfig, trust_remote_code: bool) -> FeatureCounter:
    """The counter of a config. The last one is kept, because a command loads a model and copies of it.

    Args:
        config: of the model; it is not changed.
        trust_remote_code: whether code in the checkpoint may be executed.

    Raises:
        UserError: as `FeatureCounter`.
    """
    described = without_keys(json.loads(config.to_json_string(use_diff=False)), IRRELEVANT)
    key = f"{type(config)} {json.dumps(described, sort_keys=True)}"
    if key not in _KEPT:
        copied = type(config).from_dict(config.to_dict())  # from_config modifies the config
        counter = FeatureCounter(copied, trust_remote_code)
        _KEPT.clear()
        _KEPT[key] = counter
    return _KEPT[key]


def _tensors(value: Any) -> list[torch.Tensor]:
    """The tensors in nested lists."""
    if isinstance(value, (list, tuple)):
        return [tensor for each in value for tensor in _tensors(each)]
    return [value] if isinstance(value, torch.Tensor) else []


def _check_gradients(model: Any, components: Components, outputs: Mapping[str, Any]) -> None:
    """Check that the features depend on the vision tower and on every part of the projector, and on no other component.

    Images that are tokens of the vocabulary have no projector: the language model embeds them.

    Args:
        outputs: all that the model returns for an image: its features as `pooler_output`, those of deeper layers that some
            families add, and what an image tokenizer computes beside them.

    Raises:
        UserError: they do not, so that what was taken for the projector is something else; lists the components.
    """
    reached, by_features = _reached(model, list(outputs.values())), _reached(model, outputs["pooler_output"])
    needed = [*components.towers, components.projector, *components.projector_extras]
    parts = {path: any(is_inside(name, path) for name in reached) for path in needed if path is not None}
    allowed = ("vision", "projector") if components.projector is not None else ("vision", "language")
    parts |= dict.fromkeys(sorted(name for name in by_features if component_of(name, components) not in allowed), False)
    if wrong := [path for path, is_right in parts.items() if not is_right]:
        raise UserError(
            f"{type(model).__name__}: expected image features that depend on the vision tower and the projector "
            f"({', '.join(path for path in needed if path)}), and on nothing else; not so: {', '.join(wrong[:8])}; "
            "the family needs an entry (CONTRIBUTING.md)"
        )


def _reached(model: Any, outputs: Any) -> set[str]:
    """The names of the parameters on which the tensors in nested lists depend."""
    leaves = leaves_of(_tensors(outputs))
    return {name for name, parameter in model.named_parameters() if id(parameter) in leaves}


def leaves_of(tensors: list[torch.Tensor]) -> set[int]:
    """The identities of the parameters to which a backward pass from these tensors would lead; nothing is computed."""
    pending = [tensor.grad_fn for tensor in tensors if tensor.grad_fn is not None]
    nodes, leaves = set(pending), set()
    while pending:
        node = pending.pop()
        if (leaf := getattr(node, "variable", None)) is not None:
            leaves.add(id(leaf))
        following = {each for each, _ in node.next_functions if each is not None} - nodes
        nodes |= following
        pending += following
    return leaves
