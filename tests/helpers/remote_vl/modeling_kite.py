"""A vision-language model that neither transformers nor mmtune knows, as the code of a checkpoint: `kite`.

A convolution and two transformer layers read the image, a gated layer maps the features, and a Llama model reads the text.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import nn
from transformers import (
    AutoModel,
    BatchFeature,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationMixin,
    LlamaConfig,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import BaseModelOutputWithPooling
from transformers.models.llava.modeling_llava import LlavaCausalLMOutputWithPast
from transformers.processing_utils import ProcessorMixin


class KiteConfig(PreTrainedConfig):
    model_type = "kite"
    sub_configs: ClassVar[dict[str, type]] = {"vision_config": CLIPVisionConfig, "text_config": LlamaConfig}

    def __init__(self, vision_config: Any = None, text_config: Any = None, image_token_id: int = 0, **kwargs: Any) -> None:
        parts = {"vision_config": vision_config, "text_config": text_config}
        for name, kind in self.sub_configs.items():
            setattr(self, name, parts[name] if isinstance(parts[name], kind) else kind(**(parts[name] or {})))
        self.image_token_id = image_token_id
        super().__init__(**kwargs)


class KiteTail(nn.Module):
    def __init__(self, config: KiteConfig) -> None:
        super().__init__()
        self.up = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)
        self.gate = nn.Linear(config.vision_config.hidden_size, config.text_config.hidden_size)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.up(features) * self.gate(features).sigmoid()


class KiteForConditionalGeneration(PreTrainedModel, GenerationMixin):
    config_class = KiteConfig
    _no_split_modules: ClassVar[list[str]] = ["CLIPEncoderLayer", "LlamaDecoderLayer"]
    _supports_sdpa = True
    supports_gradient_checkpointing = True

    def __init__(self, config: KiteConfig) -> None:
        super().__init__(config)
        self.vision_tower = CLIPVisionModel(config.vision_config)
        self.tail = KiteTail(config)
        self.language_model = AutoModel.from_config(config.text_config)
        self.lm_head = nn.Linear(config.text_config.hidden_size, config.text_config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.language_model.get_input_embeddings()

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def get_image_features(self, pixel_values: torch.Tensor, **kwargs: Any) -> Any:
        hidden = self.vision_tower(pixel_values, output_hidden_states=True).hidden_states[-1][:, 1:]
        return BaseModelOutputWithPooling(last_hidden_state=hidden, pooler_output=self.tail(hidden))

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **kwargs: Any,
    ) -> LlavaCausalLMOutputWithPast:
        if inputs_embeds is None:
            inputs_embeds = self.get_input_embeddings()(input_ids)
            if pixel_values is not None:
                features = self.get_image_features(pixel_values).pooler_output.flatten(0, 1).to(inputs_embeds.dtype)
                inputs_embeds = inputs_embeds.masked_scatter((input_ids == self.config.image_token_id)[..., None], features)
        outputs = self.language_model(
            inputs_embeds=inputs_embeds,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            **kwargs,
        )
        positions = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, positions] if isinstance(positions, slice) else hidden[positions][None])
        loss = None if labels is None else self.loss_function(logits, labels, self.config.text_config.vocab_size, **kwargs)
        return LlavaCausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)

    def prepare_inputs_for_generation(self, input_ids: torch.Tensor, pixel_values: Any = None, **kwargs: Any) -> dict[str, Any]:
        inputs = super().prepare_inputs_for_generation(input_ids, **kwargs)
        if kwargs.get("is_first_iteration", True):
            inputs["pixel_values"] = pixel_values
        return inputs


class KiteProcessor(ProcessorMixin):
    def __init__(self, image_processor: Any = None, tokenizer: Any = None, features: int = 16, **kwargs: Any) -> None:
        self.image_token = "<kite>"
        self.image_token_id = tokenizer.convert_tokens_to_ids(self.image_token)
        self.features = features
        super().__init__(image_processor, tokenizer, **kwargs)

    def replace_image_token(self, image_inputs: dict[str, Any], image_idx: int, **kwargs: Any) -> str:
        return self.image_token * self.features


class OlderKiteProcessor(KiteProcessor):
    """A processor that expands the text itself and reports nothing, as older code in checkpoints does."""

    replace_image_token = ProcessorMixin.replace_image_token

    def __call__(self, text: Any = None, images: Any = None, return_tensors: Any = None, **kwargs: Any) -> Any:
        texts = [each.replace(self.image_token, self.image_token * self.features) for each in text]
        media = {} if images is None else self.image_processor(images, return_tensors=return_tensors)
        return BatchFeature({**self.tokenizer(texts, return_tensors=return_tensors, padding=True), **media})
