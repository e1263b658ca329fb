"""BLIP-2 and InstructBLIP: a Q-Former resamples an image to a few features, which come before the text."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from mmtune.families.family import ConfigRule, Family, TextError

if TYPE_CHECKING:
    import torch

QFORMER_KEYS: dict[str, ConfigRule] = {"num_query_tokens": lambda config: int(config.num_query_tokens)}
ONES = "its class gives the language model an attention mask of ones, with which packed samples would attend to each other"


class Blip2(Family):
    """A fixed number of tokens for every image."""

    def decoder_start(self, processor: Any) -> int | None:
        """With OPT and Vicuna the language model continues its prompt; T5 does not, and only its tokenizer has no bos token."""
        tokenizer = processor.tokenizer
        return int(tokenizer.pad_token_id) if tokenizer.bos_token is None else None

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """Pixels of shape (images, 3, height, width), and a token for every query."""
        outputs = processor.image_processor(list(images), return_tensors="pt")
        return dict(outputs), [self.placeholder(processor) * processor.num_query_tokens] * len(images)


class InstructBlip(Blip2):
    """A Q-Former that also reads the question."""

    def prompt_tensors(
        self, processor: Any, prompt: Callable[[], str], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """The question for the Q-Former, once for every image.

        The processor gives it the whole text. In training that would show it the answer.
        """
        if not media:
            return {}
        tokenizer = processor.qformer_tokenizer
        encoded = tokenizer(prompt(), return_tensors="pt", return_token_type_ids=False)
        images, length = len(media["pixel_values"]), encoded["input_ids"].shape[1]
        if length > tokenizer.model_max_length:
            raise TextError(f"the Q-Former reads a question of at most {tokenizer.model_max_length} tokens, got {length}")
        return {f"qformer_{name}": tensor.expand(images, -1).clone() for name, tensor in encoded.items()}

    def image_features(self, model: Any) -> Callable[..., Any] | None:
        """The features of images beside an empty question."""

        def features(pixel_values: Any, return_dict: bool = True) -> Any:
            return model.get_image_features(pixel_values, _question(pixel_values, 1), return_dict=return_dict)

        return features

    def planned_batch(self, batch: dict[str, torch.Tensor], images: int) -> dict[str, torch.Tensor]:
        """A question as long as the sample, or as the Q-Former reads."""
        if not images:
            return batch
        question = _question(batch["pixel_values"], min(512, batch["input_ids"].shape[1]))
        return {**batch, "qformer_input_ids": question}


def _question(pixel_values: Any, length: int) -> Any:
    import torch

    return torch.zeros((len(pixel_values), length), dtype=torch.long, device=pixel_values.device)


BLIP2 = Blip2(
    "blip2",
    model_types=("blip-2",),
    processors=("Blip2Processor",),
    unpackable=ONES,
    takes_virtual_tokens=False,
    processor_keys=QFORMER_KEYS,
    needs_image=True,
    images_first=True,
    scores_labels=False,
)
INSTRUCT_BLIP = InstructBlip(
    "instruct_blip",
    model_types=("instructblip",),
    processors=("InstructBlipProcessor",),
    unpackable=ONES,
    takes_virtual_tokens=False,
    processor_keys=QFORMER_KEYS,
    needs_image=True,
    images_first=True,
    scores_labels=False,
)
