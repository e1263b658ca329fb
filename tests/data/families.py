"""A small processor of every family, built offline from its class, with a chat template in its family's manner.

Image sizes are small, so that tests are fast; what decides how many tokens an image has (tiles, grids, thumbnails, row ends) is
each family's own. Where a class wants a package that only its videos need, a stand-in takes its place.
"""

from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Callable
from functools import cache
from typing import Any
from unittest import mock

import transformers as tf
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers.video_processing_utils import VideoProcessorMixin

TEXTS = ["\n\n\n    the cat is on the mat, what is it?\n\n yes no a photo of two dogs and a bird."] * 20

TURNS = (
    "{{%- for m in messages -%}}{{%- set lead = ('assistant' if m.role == 'assistant' else m.role) -%}}"
    "{{{{- '<|im_start|>' ~ lead ~ '\n' -}}}}"
    "{{%- if m.role == 'assistant' -%}}{{%- generation -%}}{{%- for b in m.content -%}}{{{{- b.text -}}}}{{%- endfor -%}}"
    "{{{{- '<|im_end|>' -}}}}{{%- endgeneration -%}}{{{{- '\n' -}}}}"
    "{{%- else -%}}{{%- for b in m.content -%}}{{{{- b.text if b.type == 'text' else '{image}' -}}}}{{%- endfor -%}}"
    "{{{{- '<|im_end|>\n' -}}}}{{%- endif -%}}{{%- endfor -%}}"
    "{{%- if add_generation_prompt -%}}{{{{- '<|im_start|>assistant\n' -}}}}{{%- endif -%}}"
)
UTTERANCES = (
    "<|im_start|>{% for m in messages %}{{ m.role | capitalize }}:"
    "{% if m.role == 'assistant' %}{% generation %} {% for b in m.content %}{{ b.text }}{% endfor %}<end_of_utterance>"
    "{% endgeneration %}{{ '\n' }}{% else %}{{ '' if m.content[0].type == 'image' else ' ' }}"
    "{% for b in m.content %}{{ b.text if b.type == 'text' else '<image>' }}{% endfor %}<end_of_utterance>{{ '\n' }}"
    "{% endif %}{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}{{ '<start_of_turn>' ~ ('model' if m.role == 'assistant' else 'user') ~ '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{% for b in m.content %}{{ b.text }}{% endfor %}<end_of_turn>"
    "{% endgeneration %}{{ '\n' }}{% else %}{% for b in m.content %}{{ b.text if b.type == 'text' else '<start_of_image>' }}"
    "{% endfor %}{{ '<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# PaliGemma's processor writes <bos> after the last image itself, and a newline at the end of a prompt.
PREFIX = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '\n' }}{% generation %}"
    "{% for b in m.content %}{{ b.text }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{% for b in m.content %}{{ b.text if b.type == 'text' else '<image>' }}{% endfor %}{% endif %}{% endfor %}"
)
INSTRUCTION = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}"
    "{% for b in m.content %}{{ b.text }}{% endfor %}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ '[INST]' }}{% for b in m.content %}{{ b.text if b.type == 'text' else '[IMG]' }}{% endfor %}{{ '[/INST]' }}"
    "{% endif %}{% endfor %}"
)
SIDE = 56
"""Pixels of a LLaVA's square image."""
CHATML = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def byte_level(specials: tuple[str, ...], named: dict[str, str] | None = None, **names: str) -> tf.PreTrainedTokenizerFast:
    """A byte-level tokenizer with a few merges.

    Args:
        specials: special tokens.
        named: special tokens that the tokenizer also has as attributes, such as `image_token`.
        names: which of them are `bos_token` and so on.
    """
    bare = Tokenizer(BPE(unk_token=None))
    bare.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bare.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    everything = list(dict.fromkeys([*specials, *(named or {}).values()]))
    trainer = BpeTrainer(
        vocab_size=len(alphabet) + len(everything) + 60,
        special_tokens=everything,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bare.train_from_iterator(TEXTS, trainer)
    return tf.PreTrainedTokenizerFast(
        tokenizer_object=bare,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        extra_special_tokens=named or [token for token in specials if token not in names.values()],
        **names,
    )


class NoVideos(VideoProcessorMixin):
    """Stands where a family's video processor does, which needs torchvision."""

    merge_size, temporal_patch_size, patch_size = 2, 2, 14
    num_frames, fps = 8, 1


def _chatml(image: str) -> str:
    return TURNS.format(image=image)


def _llava(kind: type[tf.ProcessorMixin], images: Callable[..., Any], **settings: Any) -> tf.ProcessorMixin:
    return kind(
        images(size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, **settings),
        byte_level((*CHATML, "<image>"), pad_token="<|endoftext|>", eos_token="<|im_end|>"),
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=_chatml("<image>\n"),
    )


def llava() -> tf.ProcessorMixin:
    return _llava(tf.LlavaProcessor, tf.CLIPImageProcessor)


def llava_next() -> tf.ProcessorMixin:
    from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil

    tiles = [[SIDE * h, SIDE * w] for h, w in ((1, 2), (2, 1), (2, 2), (3, 1), (1, 3))]
    return _llava(tf.LlavaNextProcessor, LlavaNextImageProcessorPil, image_grid_pinpoints=tiles)


def llava_onevision() -> tf.ProcessorMixin:
    from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil

    images = LlavaOnevisionImageProcessorPil(
        size={"height": SIDE, "width": SIDE},
        image_grid_pinpoints=[[SIDE * h, SIDE * w] for h in range(1, 7) for w in range(1, 7)],
    )
    return tf.LlavaOnevisionProcessor(
        images,
        byte_level((*CHATML, "<image>", "<video>"), pad_token="<|endoftext|>", eos_token="<|im_end|>"),
        NoVideos(),
        num_image_tokens=16,
        vision_feature_select_strategy="full",
        chat_template=_chatml("<image>\n"),
    )


def _qwen(kind: type[tf.ProcessorMixin], patch_size: int) -> tf.ProcessorMixin:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    factor = 2 * patch_size
    images = Qwen2VLImageProcessorPil(
        patch_size=patch_size, merge_size=2, min_pixels=4 * factor * factor, max_pixels=64 * factor * factor
    )
    vision = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
    tokenizer = byte_level((*CHATML, *vision), pad_token="<|endoftext|>", eos_token="<|im_end|>")
    return kind(images, tokenizer, NoVideos(), chat_template=_chatml("<|vision_start|><|image_pad|><|vision_end|>"))


def qwen2_vl() -> tf.ProcessorMixin:
    return _qwen(tf.Qwen2VLProcessor, 14)


def qwen2_5_vl() -> tf.ProcessorMixin:
    return _qwen(tf.Qwen2_5_VLProcessor, 14)


def qwen3_vl() -> tf.ProcessorMixin:
    return _qwen(tf.Qwen3VLProcessor, 16)


def _utterance_tokenizer() -> tf.PreTrainedTokenizerFast:
    grid = tuple(f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7))
    image = ("<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>", "<video>")
    return byte_level((*CHATML, *image, *grid), pad_token="<|im_end|>", bos_token="<|im_start|>", eos_token="<end_of_utterance>")


def idefics3() -> tf.ProcessorMixin:
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    images = Idefics3ImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 28})
    return tf.Idefics3Processor(images, _utterance_tokenizer(), image_seq_len=4, chat_template=UTTERANCES)


def smolvlm() -> tf.ProcessorMixin:
    from transformers.models.smolvlm import processing_smolvlm
    from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil

    if processing_smolvlm.num2words is None:
        processing_smolvlm.num2words = str  # writes how many frames a video has
    images = SmolVLMImageProcessorPil(size={"longest_edge": 112}, max_image_size={"longest_edge": 28})
    return processing_smolvlm.SmolVLMProcessor(
        images, _utterance_tokenizer(), NoVideos(), image_seq_len=4, chat_template=UTTERANCES
    )


def internvl() -> tf.ProcessorMixin:
    from transformers.models.got_ocr2.image_processing_pil_got_ocr2 import GotOcr2ImageProcessorPil

    named = {"start_image_token": "<img>", "end_image_token": "</img>", "context_image_token": "<IMG_CONTEXT>"}
    named |= {"video_token": "<video>"}
    tokenizer = byte_level(CHATML, named, pad_token="<|endoftext|>", eos_token="<|im_end|>")
    images = GotOcr2ImageProcessorPil(size={"height": 28, "width": 28}, max_patches=6)
    return tf.InternVLProcessor(images, tokenizer, NoVideos(), image_seq_length=4, chat_template=_chatml("<IMG_CONTEXT>\n"))


def gemma3() -> tf.ProcessorMixin:
    from transformers.models.gemma3.image_processing_pil_gemma3 import Gemma3ImageProcessorPil

    named = {"boi_token": "<start_of_image>", "eoi_token": "<end_of_image>", "image_token": "<image_soft_token>"}
    names = {"bos_token": "<bos>", "eos_token": "<eos>", "pad_token": "<pad>"}
    tokenizer = byte_level(("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"), named, **names)
    tokenizer.add_special_tokens(
        {"extra_special_tokens": ["<start_of_turn>", "<end_of_turn>"]}, replace_extra_special_tokens=False
    )
    images = Gemma3ImageProcessorPil(
        size={"height": 56, "width": 56},
        do_pan_and_scan=False,
        pan_and_scan_min_crop_size=16,
        pan_and_scan_max_num_crops=4,
        pan_and_scan_min_ratio_to_activate=1.2,
    )
    return tf.Gemma3Processor(images, tokenizer, image_seq_length=16, chat_template=GEMMA)


def paligemma() -> tf.ProcessorMixin:
    images = tf.SiglipImageProcessor(size={"height": 56, "width": 56})
    images.image_seq_length = 16
    tokenizer = byte_level(("<pad>", "<eos>", "<bos>", "<image>"), bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")
    return tf.PaliGemmaProcessor(images, tokenizer, chat_template=PREFIX)


def pixtral() -> tf.ProcessorMixin:
    from transformers.models.pixtral import image_processing_pil_pixtral as pil

    specials = ("<unk>", "<s>", "</s>", "[INST]", "[/INST]", "[IMG]", "[IMG_BREAK]", "[IMG_END]")
    tokenizer = byte_level(specials, bos_token="<s>", eos_token="</s>", pad_token="<unk>")
    images = pil.PixtralImageProcessorPil(size={"longest_edge": 128}, patch_size=8)
    kind = _pixtral_class()
    return kind(images, tokenizer, patch_size=8, spatial_merge_size=2, chat_template=INSTRUCTION)


def _pixtral_class() -> Any:
    """Pixtral's processor imports one function from a module that needs torchvision; its twin without it has the same one."""
    name = "transformers.models.pixtral.image_processing_pixtral"
    try:
        importlib.import_module(name)
    except ModuleNotFoundError:
        from transformers.models.pixtral.image_processing_pil_pixtral import get_resize_output_image_size

        twin = types.ModuleType(name)
        twin.get_resize_output_image_size = get_resize_output_image_size  # type: ignore[attr-defined]
        sys.modules[name] = twin
        try:
            return importlib.import_module("transformers.models.pixtral.processing_pixtral").PixtralProcessor
        finally:
            del sys.modules[name]
    return tf.PixtralProcessor


MAKERS: tuple[Callable[[], tf.ProcessorMixin], ...] = (
    llava,
    llava_next,
    llava_onevision,
    qwen2_vl,
    qwen2_5_vl,
    qwen3_vl,
    idefics3,
    smolvlm,
    internvl,
    gemma3,
    paligemma,
    pixtral,
)


def _without_torchvision(maker: Callable[[], tf.ProcessorMixin]) -> Callable[[], tf.ProcessorMixin]:
    """The class check of a processor's parts looks video processors up, and fails where torchvision is not installed."""

    @cache
    def make() -> tf.ProcessorMixin:
        with mock.patch.object(tf.ProcessorMixin, "check_argument_for_proper_class"):
            return maker()

    return make


FAMILIES: dict[str, Callable[[], tf.ProcessorMixin]] = {maker.__name__: _without_torchvision(maker) for maker in MAKERS}
"""Builds a family's processor by name, once. Shared: leave them as they are, or take a deep copy."""
