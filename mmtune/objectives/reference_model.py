"""A trained, frozen model beside the one that trains, such as a teacher."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from torch import nn
from transformers import PreTrainedConfig, ProcessorMixin

from mmtune.methods.method import Method
from mmtune.methods.method_table import METHODS
from mmtune.models.checkpoints.trained_weights import TrainedWeights, locate_adapter_base, locate_trained_weights
from mmtune.models.fake_tensors import make_prompt_tokens_real
from mmtune.models.load import DTYPES, adapter_method, errors_about, load_processor, load_trained, supported_config
from mmtune.models.meta_model import build_meta
from mmtune.recipe.recipe import ModelSection
from mmtune.utils.hub import locate_checkpoint


@dataclass(frozen=True)
class ReferenceModel:
    """A run, one of its checkpoints, an adapter directory, a checkpoint or a hub id. Loaded lazily.

    Attributes:
        weights: where its weights are.
        section: its base as a recipe's `model` section.
    """

    weights: TrainedWeights
    section: ModelSection

    @cached_property
    def config(self) -> PreTrainedConfig:
        """The configuration of its base.

        Raises:
            UserError: a missing or invalid configuration, or an unsupported family.
        """
        base = str(self.section.base)
        with errors_about(base):
            return supported_config(locate_checkpoint(base), base, self.section.trust_remote_code)

    @property
    def method(self) -> Method | None:
        """The method of its adapter; None where it has none.

        Raises:
            UserError: an adapter of an unsupported method.
        """
        return METHODS[adapter_method(self.weights.path)] if self.weights.is_adapter else None

    def load_processor(self) -> ProcessorMixin:
        """Its processor, which an adapter directory holds itself; the chat template is as stored.

        Raises:
            UserError: files that are missing or cannot be read, or an unsupported processor.
        """
        path = str(self.weights.path)
        return load_processor(locate_checkpoint(path), path, self.config, self.section.trust_remote_code)

    def load(self) -> nn.Module:
        """The model on the CPU: unquantized, in eval mode, no parameter requires a gradient.

        Raises:
            UserError: its files are damaged or incomplete.
        """
        section, weights = self.section, self.weights
        stored_template = weights.is_adapter or weights.run.recipe.is_file()
        template = None if stored_template else section.chat_template  # a published checkpoint's own may not serve
        model: Any = load_trained(weights, DTYPES[section.precision], template, section.trust_remote_code)[0]
        if section.attn_implementation is not None:
            model.set_attn_implementation(section.attn_implementation)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen

    def build_meta(self) -> nn.Module:
        """The same model without weights (meta tensors), its adapter included."""
        model: Any = build_meta(self.section, self.config)
        if (method := self.method) is not None:
            config = method.config_class().from_pretrained(str(self.weights.path))
            with torch.device("meta"):
                model = get_peft_model(model, config)
            make_prompt_tokens_real(model)
        frozen: nn.Module = model.requires_grad_(False).eval()
        return frozen


def find_reference_model(path: str, trained: ModelSection, attn_implementation: str | None = None) -> ReferenceModel:
    """Find a reference model and describe its base.

    Args:
        path: of a run, a checkpoint, an adapter or a model, or a hub id.
        trained: the `model` section of the model that trains: its chat template, its permission to run code, and its
            precision; a reference model is in fp32 beside fp32, and in bf16 otherwise.
        attn_implementation: of the reference model; None takes its own.

    Raises:
        UserError: nothing is there, or an adapter whose base is missing.
    """
    weights = locate_trained_weights(Path(path))
    base = locate_adapter_base(weights.path) if weights.is_adapter else str(weights.path)
    section = ModelSection(
        base=base,
        precision="fp32" if trained.precision == "fp32" else "bf16",
        chat_template=trained.chat_template,
        attn_implementation=attn_implementation,
        trust_remote_code=trained.trust_remote_code,
    )
    return ReferenceModel(weights, section)
