"""Prompt methods: trained vectors before the input embeddings, or before every layer's keys and values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from mmtune.families.family_table import family_of
from mmtune.methods.method import MANAGED, Method
from mmtune.methods.setting_types import COUNT, DROPOUT
from mmtune.utils.errors import UserError

if TYPE_CHECKING:
    from peft import PeftConfig
    from torch import nn

_LANGUAGE_MODELS = "it is the language model's"
_COMMON: dict[str, Any] = {
    "targets": None,
    "components": ("language",),
    "selectors": {},
    "alternatives": ("gated_prefix", "lora"),
    "mergeable": False,
    "packable": False,
    "resumes_from_adapter": False,  # its file holds the prompts that the encoder computes, not the encoder
    "language_prefix": "prompt_encoder.",
}
_MANAGED = MANAGED | dict.fromkeys(
    ("token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers"), _LANGUAGE_MODELS
)


class PromptMethod(Method):
    """A method whose virtual tokens are keys and values that PEFT writes into the cache."""

    def incompatibility(self, settings: Mapping[str, Any], precision: str, model_type: str | None) -> str | None:
        """Families with mRoPE have no position for a virtual token, which needs three parts; others have no place for it."""
        if model_type is not None and not family_of(model_type).takes_virtual_tokens:
            return f"{self.name} puts virtual tokens before the text, for which {model_type} has no place; {self._advice()}"
        return self._no_position(model_type) if model_type is not None and family_of(model_type).mrope else None

    def check_model(self, model: Any, targets: Mapping[str, nn.Module], settings: Mapping[str, Any]) -> None:
        """A family without an entry shows that it has mRoPE only in its model."""
        super().check_model(model, targets, settings)
        if hasattr(model.base_model, "get_rope_index"):
            raise UserError(self._no_position(str(model.config.model_type)))

    def _no_position(self, model_type: str) -> str:
        return f"{self.name} gives its virtual tokens no position in {model_type} (mRoPE); {self._advice()}"

    def _advice(self) -> str:
        return f"use {' or '.join(self.alternatives)}"


class EmbeddedPrompt(PromptMethod):
    """A method whose virtual tokens are embeddings in the sequence, so that the logits have a position for each."""

    def virtual_tokens(self, config: PeftConfig) -> int:
        """`num_virtual_tokens`."""
        return int(config.num_virtual_tokens)


PROMPT_TUNING = EmbeddedPrompt(
    "prompt_tuning",
    "learnt embeddings before the input (arXiv 2104.08691)",
    "peft:PromptTuningConfig",
    1e-2,
    **_COMMON,
    defaults={"num_virtual_tokens": 20},
    managed=_MANAGED
    | dict.fromkeys(("prompt_tuning_init", "prompt_tuning_init_text"), "they start at random")
    | dict.fromkeys(("tokenizer_name_or_path", "tokenizer_kwargs"), "it is the base's"),
    setting_types={"num_virtual_tokens": COUNT},
)
P_TUNING = EmbeddedPrompt(
    "p_tuning",
    "learnt embeddings before the input, made by a small network (arXiv 2103.10385)",
    "peft:PromptEncoderConfig",
    1e-3,
    **_COMMON,
    defaults={"num_virtual_tokens": 20, "encoder_hidden_size": 128},
    managed=_MANAGED,
    setting_types={"num_virtual_tokens": COUNT, "encoder_hidden_size": COUNT, "encoder_dropout": DROPOUT},
)
PREFIX_TUNING = PromptMethod(
    "prefix_tuning",
    "learnt keys and values before every layer's own (arXiv 2101.00190)",
    "peft:PrefixTuningConfig",
    1e-2,
    **_COMMON,
    defaults={"num_virtual_tokens": 20},
    managed=_MANAGED,
    setting_types={"num_virtual_tokens": COUNT, "encoder_hidden_size": COUNT},
)
