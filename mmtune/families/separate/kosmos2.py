"""Kosmos-2: queries resample an image to a few features, which come after the first special token."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families import box_convention
from mmtune.families.family import Family, Span

if TYPE_CHECKING:
    import torch


class Kosmos2(Family):
    """A fixed number of tokens for the image, whose places a mask marks: their ids are those of common words."""

    def placeholder(self, processor: Any) -> str:
        """The token before the image features; the processor also writes it for every feature, until it sets their ids."""
        return str(processor.boi_token)

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Pixels of shape (1, 3, height, width), and `num_image_tokens` tokens between two markers."""
        outputs = processor.image_processor(list(images), return_tensors="pt")
        tokens = processor.boi_token * (1 + processor.num_image_tokens) + processor.eoi_token
        return dict(outputs), [tokens] * len(images)

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """The bos token before the image, and a space after it."""
        bos, end = processor.tokenizer.bos_token, image_ends[-1]
        shift = len(bos) + 1
        return f"{bos}{text[:end]} {text[end:]}", [(first + shift, last + shift) for first, last in spans]

    def token_tensors(
        self, processor: Any, input_ids: list[int], supervised: list[bool], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The places of the image features, and their ids: those that follow the unknown token's."""
        import torch

        tokenizer, count = processor.tokenizer, processor.num_image_tokens
        start = input_ids.index(tokenizer.convert_tokens_to_ids(processor.boi_token)) + 1
        ids, places = torch.tensor([input_ids]), torch.zeros((1, len(input_ids)), dtype=torch.long)
        ids[0, start : start + count] = torch.arange(count) + tokenizer.unk_token_id + 1
        places[0, start : start + count] = 1
        return {"input_ids": ids, "image_embeds_position_mask": places}

    def count_image_tokens(self, processor: Any, text: str, token_id: int) -> int:
        """All but the first, which stands before the features."""
        return super().count_image_tokens(processor, text, token_id) - 1

    def image_features(self, model: Any) -> Callable[..., Any] | None:
        """What `get_image_features` of the class without a head returns; the class with a head has no such method."""
        from transformers import Kosmos2Model

        def features(pixel_values: Any, return_dict: bool = True) -> Any:
            return Kosmos2Model.get_image_features(model, pixel_values, return_dict=return_dict)

        return features

    def planned_batch(self, batch: dict[str, torch.Tensor], images: int) -> dict[str, torch.Tensor]:
        """The image features are first in the row."""
        if not images:
            return batch
        ids = batch["input_ids"]
        return {**batch, "image_embeds_position_mask": (ids == ids[:, :1]).long()}

    def prepare_model(self, model: Any) -> None:
        """The positions of generated tokens must not count the padding before a row.

        transformers counts the tokens in the cache, with their padding.
        """
        model.get_submodule("text_model.model").register_forward_pre_hook(_set_positions, with_kwargs=True)


def _set_positions(module: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of the language model with `position_ids` of shape (rows, length), counted from the attention mask."""
    mask, ids = inputs.get("attention_mask"), inputs.get("input_ids")
    if mask is None or ids is None or mask.ndim != 2 or inputs.get("position_ids") is not None:
        return arguments, inputs
    positions = mask.cumsum(dim=1) * mask + module.embed_positions.padding_idx
    return arguments, {**inputs, "position_ids": positions[:, -ids.shape[1] :].long().contiguous()}


KOSMOS2 = Kosmos2(
    "kosmos2",
    model_types=("kosmos-2",),
    processors=("Kosmos2Processor",),
    language_model="text_model.model",
    unpackable="its class takes a mask of tokens only, with which packed samples would attend to each other",
    takes_virtual_tokens=False,
    processor_keys={"num_image_tokens": lambda config: int(config.latent_query_num)},
    needs_image=True,
    one_image=True,
    images_first=True,
    box_conventions={"Kosmos2Processor": box_convention.KOSMOS2},
)
