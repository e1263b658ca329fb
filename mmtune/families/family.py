"""A model family: where its components are, and how its processor turns an image into tokens.

`Family` holds what is true of most: components are found in the model's structure, and the processor itself says with which text
it replaces the placeholder of an image. A family that differs is an entry of `family_table.py`, in a file of its own when it has
code. torch and transformers are imported inside the hooks, because recipes are checked without them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from mmtune.families.box_convention import BoxConvention
from mmtune.families.expanded_text import TEXT_KEYS, expanded_images

if TYPE_CHECKING:
    import torch
    from transformers import ProcessorMixin

Span = tuple[int, int]
"""First and past-the-last character."""

Size = tuple[int, int]
"""(width, height) in pixels, upright."""

Geometry = dict[str, Any]
"""The values that a processor's `replace_image_token` reads, as its image processor would return them."""

ConfigRule = Callable[[Any], Any]
"""A function from a model's config to the value of a processor key; None if the config does not determine it."""


class TextError(ValueError):
    """A conversation that the family's processor cannot encode."""


@dataclass(frozen=True)
class Family:
    """One family, or several that differ from most in the same way.

    Attributes:
        name: of its entry, and of its tests.
        model_types: `model_type` of the configs for which the entry holds.
        processors: class names of the processors for which it holds; subclasses count.
        encoder: path of the vision tower, where transformers' accessor does not return it.
        encoder_free: whether the model has no vision tower: the projector reads pixels, or images are tokens of the vocabulary.
        language_model: path of the language model, where transformers' accessor does not return it.
        projector: paths of the projector, the main module first, then further modules and parameters that are trained with it;
            empty where structure tells (`structure.py`). A path that the model lacks is left out.
        encoder_extras: paths of further vision towers.
        others: paths of parts that take no part in reading an image, such as an audio tower. They stay frozen.
        bypassed: last names of linear layers whose weight the model reads without calling the layer.
        unpackable: why packed samples would attend to each other; None where they do not.
        mrope: whether a position has three parts: time, height and width, so that it is known before a model is built.
        takes_virtual_tokens: whether a prompt method can put virtual tokens before its input embeddings.
        image_settings: arguments of every call of the image processor.
        image_processors: class names of the image processors that `geometry` supports.
        processor_keys: keys of the processor that determine the number of image tokens, with the rule for each value.
        needs_image: whether its processor or its model takes no conversation without an image.
        one_image: whether its processor takes at most one image in a conversation.
        images_first: whether its processor puts all images before the text and its first special token. Its chat template then
            writes nothing for an image.
        embeds_image_token: whether the image token has a row in the embeddings.
        placeholder_is_image_token: whether the chat template's placeholder is the token of the image features.
        scores_labels: whether its class computes the loss of labels from logits at supervised positions. Otherwise the objective
            computes it.
        media_types_key: the name under which its model takes `mm_token_type_ids`.
        box_conventions: the box convention of its models by the class name of their processor; none where it is unknown.
    """

    name: str
    model_types: tuple[str, ...] = ()
    processors: tuple[str, ...] = ()
    encoder: str | None = None
    encoder_free: bool = False
    language_model: str | None = None
    projector: tuple[str, ...] = ()
    encoder_extras: tuple[str, ...] = ()
    others: tuple[str, ...] = ()
    bypassed: tuple[str, ...] = ()
    unpackable: str | None = None
    mrope: bool = False
    takes_virtual_tokens: bool = True
    image_settings: Mapping[str, Any] = field(default_factory=dict)
    image_processors: tuple[str, ...] = ()
    processor_keys: Mapping[str, ConfigRule] = field(default_factory=dict)
    needs_image: bool = False
    one_image: bool = False
    images_first: bool = False
    embeds_image_token: bool = True
    placeholder_is_image_token: bool = True
    scores_labels: bool = True
    media_types_key: str = "mm_token_type_ids"
    box_conventions: Mapping[str, BoxConvention] = field(default_factory=dict)

    def placeholder(self, processor: Any) -> str:
        """The text that the chat template writes for an image."""
        return str(processor.image_token)

    def decoder_start(self, processor: Any) -> int | None:
        """The token with which the decoder of an encoder-decoder model starts; None for a model that continues its prompt.

        An encoder-decoder model reads the question with its encoder, and its decoder writes one answer.
        """
        return None

    def has_placeholder(self, processor: ProcessorMixin) -> bool:
        """Whether it is known what stands for an image in the text."""
        return type(self).process_images is not Family.process_images or isinstance(getattr(processor, "image_token", None), str)

    def projector_of(self, model: Any) -> tuple[str, ...]:
        """`projector`, where the paths depend on the number of layers."""
        return self.projector

    def complete_processor(self, processor: Any, filled: Mapping[str, Any]) -> None:
        """Set attributes that the processor computes from its keys, after `filled` were set from the model's config."""

    def process_images(self, processor: Any, images: Sequence[Any]) -> tuple[dict[str, torch.Tensor], list[str]]:
        """The media tensors of one sample's images, and the text with which each placeholder is replaced.

        Args:
            images: of one sample, in order; at least one PIL image.

        Raises:
            UserError: the text is unknown.
            ValueError: an image that the processor rejects.
        """
        import torch
        from transformers import ProcessorMixin

        if type(processor).replace_image_token is ProcessorMixin.replace_image_token:
            return expanded_images(processor, images)
        outputs: Mapping[str, Any] = processor(
            images=[list(images)],
            text=[self.placeholder(processor) * len(images)],
            images_kwargs={"return_tensors": "pt", **self.image_settings},
            return_text_replacement_offsets=True,
        )
        if "text_replacement_offsets" not in outputs:  # a processor that writes the text itself
            return expanded_images(processor, images)
        replacements = [change["replacement"] for change in outputs["text_replacement_offsets"][0]]
        return {key: torch.as_tensor(value) for key, value in outputs.items() if key not in TEXT_KEYS}, replacements

    def count_image_tokens(self, processor: Any, text: str, token_id: int) -> int:
        """The number of image features for which `text`, the replacement of one placeholder, has places."""
        return int(processor.tokenizer(text, add_special_tokens=False)["input_ids"].count(token_id))

    def image_features(self, model: Any) -> Callable[..., Any] | None:
        """The function that returns the features of an image as `pooler_output`: the model's `get_image_features`, if it has one.

        Args:
            model: the model, or its part without the head.
        """
        features: Callable[..., Any] | None = getattr(model, "get_image_features", None)
        return features

    def geometry(self, processor: Any, settings: Mapping[str, Any], sizes: Sequence[Size]) -> Geometry | None:
        """What the image processor would return for images of these sizes, without pixels; None if the real one is needed.

        A rule is used only after it has agreed with the real processor on a few sizes.

        Args:
            settings: of the image processor, with the processor's defaults.
            sizes: of all images of one sample.

        Raises:
            ValueError: an image that the processor rejects, with the same message.
        """
        return None

    def resized_size(self, settings: Mapping[str, Any], size: Size) -> Size:
        """The size to which the image processor resizes an image, for a box convention in pixels of that size.

        Args:
            settings: as `geometry`.
            size: of the image.

        Raises:
            ValueError: an image that the processor rejects.
        """
        return size

    def mark_text(self, processor: Any, text: str, spans: list[Span], image_ends: Sequence[int]) -> tuple[str, list[Span]]:
        """A rendered conversation with what the processor adds beyond images, and its shifted answer spans.

        Args:
            image_ends: the position after each image placeholder.

        Raises:
            TextError: a conversation that the processor cannot encode.
        """
        return text, spans

    def replacements_in_text(
        self, processor: Any, text: str, placeholders: Sequence[Span], replacements: Sequence[str]
    ) -> Sequence[str]:
        """The replacements of a text's placeholders, where they depend on what stands beside them.

        Args:
            text: as `mark_text` returned it.
            placeholders: the span of each placeholder.
            replacements: the text of each image alone, as `process_images` returned it.
        """
        return replacements

    def token_tensors(
        self, processor: Any, input_ids: list[int], supervised: list[bool], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Further tensors of shape (1, length) or (1, length, images, ...) that the model takes; they replace those of the same
        name.

        Args:
            media: the media tensors of `process_images`; empty without images.
        """
        return {}

    def prompt_tensors(
        self, processor: Any, prompt: Callable[[], str], media: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        """Further tensors that the model computes image features from, besides those of `process_images`.

        Args:
            prompt: returns the rendered conversation up to its first answer, without images: what a model that reads a question
                beside the image may see in training and when it answers.
            media: the media tensors of `process_images`; empty without images.

        Raises:
            TextError: a prompt that the family's processor cannot encode.
        """
        return {}

    def planned_batch(self, batch: dict[str, torch.Tensor], images: int) -> dict[str, torch.Tensor]:
        """The batch for which memory is predicted, in the shapes of the collator.

        Args:
            batch: token tensors of shape (rows, length), and media tensors of single images joined along the first dimension.
            images: the number of images of a row.
        """
        return batch

    def prepare_model(self, model: Any) -> None:
        """Correct what the class of a loaded model computes, where a row of a batch would depend on the others."""
