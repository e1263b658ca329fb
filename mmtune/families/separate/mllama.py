"""Mllama (Llama 3.2 Vision): an image is one token, and the tokens after it attend to its tiles in cross-attention layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from mmtune.families.family import Family

if TYPE_CHECKING:
    import torch


_MEDIA = ("pixel_values", "aspect_ratio_ids", "aspect_ratio_mask")


class Mllama(Family):
    """Features beside the sequence, with a mask of shape (1, length, images, tiles)."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Tiles of shape (1, images, tiles, 3, height, width) with their aspect ratios, and one token for each image."""
        outputs = processor.image_processor([list(images)], return_tensors="pt")
        return {name: outputs[name] for name in _MEDIA}, [processor.image_token] * len(images)

    def token_tensors(
        self, processor: Any, input_ids: list[int], supervised: list[bool], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The tokens after an image, up to the next image, attend to its tiles; adjacent images are seen together."""
        import torch
        from transformers.models.mllama import processing_mllama as mllama

        if not media:
            return {}
        ratios = media["aspect_ratio_mask"]
        mask = mllama.convert_sparse_cross_attention_mask_to_dense(
            [mllama.get_cross_attention_token_mask(input_ids, processor.image_token_id)],
            num_tiles=ratios.sum(dim=-1).tolist(),
            max_num_tiles=ratios.shape[-1],
            length=len(input_ids),
        )
        return {"cross_attention_mask": torch.from_numpy(mask)}

    def image_features(self, model: Any) -> Callable[..., Any] | None:
        """The mean of the features of each image, which has one token."""

        def features(pixel_values: Any, aspect_ratio_ids: Any, aspect_ratio_mask: Any, return_dict: bool = True) -> Any:
            from transformers.modeling_outputs import BaseModelOutputWithPooling

            states = model.model.vision_model(pixel_values, aspect_ratio_ids, aspect_ratio_mask).last_hidden_state
            states = model.model.multi_modal_projector(states)  # (rows, images, tiles, features of a tile, width)
            return BaseModelOutputWithPooling(pooler_output=states.mean(dim=(2, 3)).flatten(0, 1))

        return features

    def planned_batch(self, batch: dict[str, torch.Tensor], images: int) -> dict[str, torch.Tensor]:
        """Media of shape (rows, images, ...), and tokens that attend to all images."""
        import torch

        if not images:
            return batch
        rows, length = batch["input_ids"].shape
        media = {name: batch[name].reshape(rows, images, *batch[name].shape[2:]) for name in _MEDIA}
        shape = (rows, length, *media["aspect_ratio_mask"].shape[1:])
        return {**batch, **media, "cross_attention_mask": torch.ones(shape, dtype=torch.long)}

    def prepare_model(self, model: Any) -> None:
        """A row must not see the empty images that pad it beside rows with more images.

        transformers lets a token that may see no image (one before the first image, or of a row without images) attend to all
        features, so that its output depends on the batch. Here it attends to all features of its own row, as in a batch of its
        own. A row without images gets features of zero, hence keys and values of zero: cross-attention adds nothing, as in a
        batch without images, where these layers are left out.
        """
        tiles = model.config.vision_config.max_num_tiles
        model.get_submodule("model.language_model").register_forward_pre_hook(
            partial(_hide_empty_images, tiles), with_kwargs=True
        )


def _hide_empty_images(
    tiles: int, module: Any, arguments: tuple[Any, ...], inputs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The inputs of the language model with the images hidden that no token of a row may see.

    `cross_attention_states` has the shape (rows x images x tiles, features, width), `cross_attention_mask` (rows, 1, length,
    images x tiles x features) with 0 where a token attends, and `full_text_row_masked_out_mask` (rows, 1, length, 1) with 0 for a
    token that may see no image.
    """
    import torch

    states, mask = inputs.get("cross_attention_states"), inputs.get("cross_attention_mask")
    if states is None or mask is None:
        return arguments, inputs
    rows = mask.shape[0]
    images = states.shape[0] // rows // tiles
    seen = (mask == 0) & inputs["full_text_row_masked_out_mask"].bool()
    own = seen.any(dim=2).view(rows, images, -1).any(dim=2)
    hidden = ~own.repeat_interleave(mask.shape[-1] // images, dim=1)
    return arguments, {
        **inputs,
        "cross_attention_states": states * own.repeat_interleave(tiles, dim=1).view(-1, 1, 1).to(states.dtype),
        "cross_attention_mask": mask.masked_fill(hidden[:, None, None], torch.finfo(mask.dtype).min),
    }


MLLAMA = Mllama(
    "mllama",
    model_types=("mllama",),
    processors=("MllamaProcessor",),
    unpackable="its tokens that come before an image, or have none, would attend to the images of the other samples in a row",
    takes_virtual_tokens=False,
    processor_keys={"image_processor.max_image_tiles": lambda config: config.vision_config.max_num_tiles},
    embeds_image_token=False,
)
