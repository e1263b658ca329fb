"""Tiny vision encoders and language models: small random checkpoints of common architectures.

Tests use them, and `mmtune train --rehearse` runs a full-size recipe on them without network access.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from tokenizers import Tokenizer, decoders, pre_tokenizers, processors
from tokenizers.models import BPE
from tokenizers.trainers import BpeTrainer
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    BitImageProcessor,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    Dinov2Config,
    Dinov2Model,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipImageProcessor,
    SiglipModel,
    ViTConfig,
    ViTImageProcessor,
    ViTModel,
)

from mmtune.utils.errors import UserError, nearest
from mmtune.utils.hub import cached_snapshot

Kind = Literal["vision", "language", "base"]

PATCH, IMAGE = 14, 56
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
TEXT_TOWER = {
    **TOWER,
    "vocab_size": 64,
    "max_position_embeddings": 16,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": 1,
}
DECODER = {**TOWER, "num_hidden_layers": 2, "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 4096}

VISION_FAMILIES = ("clip", "siglip", "dinov2", "vit")
BASE_FAMILIES = (
    "llava",
    "llava_next",
    "llava_onevision",
    "qwen2_vl",
    "qwen2_5_vl",
    "qwen3_vl",
    "idefics3",
    "smolvlm",
    "internvl",
    "gemma3",
    "paligemma",
    "mistral3",
)

TEXT_ONLY_CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)

_LLAMA = {"specials": ["<unk>", "<s>", "</s>"], "unk": "<unk>", "bos": "<s>", "eos": "</s>"}
_QWEN = {"specials": ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], "eos": "<|im_end|>", "pad": "<|endoftext|>"}
_GEMMA: dict[str, Any] = {"specials": ["<pad>", "<eos>", "<bos>", "<unk>", "<start_of_turn>", "<end_of_turn>"]}
_GEMMA |= {"pad": "<pad>", "eos": "<eos>", "bos": "<bos>", "unk": "<unk>"}
_LLAMA3 = {
    "specials": ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"],
    "bos": "<|begin_of_text|>",
    "eos": "<|end_of_text|>",
}
LANGUAGE_FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", **_LLAMA},
    "llama3": {"model_type": "llama", **_LLAMA3},
    "qwen2": {"model_type": "qwen2", "tied": True, "multiple": 64, "template": TEXT_ONLY_CHATML, **_QWEN},
    "qwen3": {"model_type": "qwen3", "multiple": 64, "template": TEXT_ONLY_CHATML, **_QWEN},
    "mistral": {"model_type": "mistral", **_LLAMA, "specials": [*_LLAMA["specials"], "[INST]", "[/INST]"]},
    "gemma": {"model_type": "gemma", "tied": True, **_GEMMA},
    "gemma3": {"model_type": "gemma3_text", "tied": True, **_GEMMA},
    "mixtral": {
        "model_type": "mixtral",
        **_LLAMA,
        "specials": [*_LLAMA["specials"], "[INST]", "[/INST]"],
        "experts": {"num_local_experts": 4, "num_experts_per_tok": 2},
    },
    "qwen3_moe": {
        "model_type": "qwen3_moe",
        "multiple": 64,
        "template": TEXT_ONLY_CHATML,
        **_QWEN,
        "experts": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32},
    },
}
"""Settings of each family: model type, special tokens, tied embeddings, padding multiple of the embedding rows, chat template,
and config fields of its experts."""

MODEL_TYPES: dict[str, dict[str, str]] = {
    "vision": {"clip_vision_model": "clip", "siglip_vision_model": "siglip"} | {name: name for name in VISION_FAMILIES},
    "language": {"llama": "llama", "qwen2": "qwen2", "qwen3": "qwen3", "mistral": "mistral"}
    | {"gemma": "gemma", "gemma3_text": "gemma3", "mixtral": "mixtral", "qwen3_moe": "qwen3_moe"},
    "base": {name: name for name in BASE_FAMILIES},
}

NAMES: dict[str, list[tuple[str, str]]] = {
    "vision": [
        (r"siglip(?!.*naflex)", "siglip"),
        (r"(^|[/_-])clip[-_]", "clip"),
        (r"dinov2", "dinov2"),
        (r"(^|/)vit-", "vit"),
    ],
    "language": [
        (r"llama-?3", "llama3"),
        (r"vicuna|llama", "llama"),
        (r"qwen-?3(?!.*vl).*-a\d+b", "qwen3_moe"),
        (r"qwen-?3(?!.*vl)", "qwen3"),
        (r"qwen-?(1\.5|2)(?!.*vl)", "qwen2"),
        (r"mistral-", "mistral"),
        (r"mixtral", "mixtral"),
        (r"gemma-3-(1b|270m)", "gemma3"),
        (r"(^|/)gemma-\d+b", "gemma"),
    ],
    "base": [
        (r"llava-onevision(?!-1\.5)", "llava_onevision"),
        (r"llava-?(v1\.6|next(?!-video))", "llava_next"),
        (r"llava(?!.*(next|onevision|video|interleave))", "llava"),
        (r"pixtral", "llava_pixtral"),
        (r"qwen2-?vl", "qwen2_vl"),
        (r"qwen2\.5-?vl", "qwen2_5_vl"),
        (r"qwen3-?vl", "qwen3_vl"),
        (r"idefics3", "idefics3"),
        (r"smolvlm", "smolvlm"),
        (r"internvl.*-hf", "internvl"),
        (r"gemma-3-(4|12|27)b|medgemma-(1\.5-)?4b", "gemma3"),
        (r"paligemma", "paligemma"),
        (r"mistral-small-3\.[12]", "mistral3"),
    ],
}
"""Patterns of well-known hub names and their families, for checkpoints that are not on this machine; the first match counts."""


def write_tiny_vision(family: str, out: Path, seed: int = 0) -> Path:
    """Write a tiny random vision encoder with its image processor.

    CLIP and SigLIP include the text tower, and DINOv2's processor crops to fewer pixels than its `image_size`, both as in the
    published checkpoints.

    Args:
        family: clip, siglip, dinov2 or vit. Each splits 56 x 56 pixels into 16 patches.
        out: the directory to write.
        seed: the seed of the weights.

    Raises:
        UserError: an unknown family.
    """
    if family not in VISION_FAMILIES:
        raise UserError(f"unknown tiny vision encoder {family!r}{nearest(family, VISION_FAMILIES)}")
    square, grid = {"height": IMAGE, "width": IMAGE}, {"patch_size": PATCH, "image_size": IMAGE}
    model: Any
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        if family == "clip":
            model = CLIPModel(CLIPConfig(vision_config={**TOWER, **grid}, text_config=TEXT_TOWER, projection_dim=16))
            CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=square).save_pretrained(out)
        elif family == "siglip":
            model = SiglipModel(SiglipConfig(vision_config={**TOWER, **grid}, text_config=TEXT_TOWER))
            SiglipImageProcessor(size=square).save_pretrained(out)
        elif family == "dinov2":
            size = {**TOWER, "mlp_ratio": 2, "patch_size": PATCH, "image_size": IMAGE + PATCH}
            size.pop("intermediate_size")
            model = Dinov2Model(Dinov2Config(**size))
            BitImageProcessor(size={"shortest_edge": IMAGE + 8}, crop_size=square).save_pretrained(out)
        else:
            model = ViTModel(ViTConfig(**TOWER, **grid))
            ViTImageProcessor(size=square).save_pretrained(out)
    model.save_pretrained(out)
    return out


def write_tiny_language(
    family: str, out: Path, seed: int = 0, *, texts: Iterable[str] = (), vocab_size: int = 0, **overrides: Any
) -> Path:
    """Write a tiny random language model with a byte-level tokenizer that has the special tokens of the family.

    Args:
        family: a key of `LANGUAGE_FAMILIES`.
        out: the directory to write.
        seed: the seed of the weights.
        texts: training texts of the tokenizer; without texts every byte is a token.
        vocab_size: the maximum vocabulary size, with bytes and special tokens.
        overrides: fields of the model's config, such as `hidden_size`.

    Raises:
        UserError: an unknown family.
    """
    if family not in LANGUAGE_FAMILIES:
        raise UserError(f"unknown tiny language model {family!r}{nearest(family, set(LANGUAGE_FAMILIES))}")
    settings = LANGUAGE_FAMILIES[family]
    tokenizer = byte_level_tokenizer(settings, texts, vocab_size)
    multiple = settings.get("multiple", 1)
    size = {**DECODER, "vocab_size": -(-len(tokenizer) // multiple) * multiple}
    size |= {**settings.get("experts", {}), **overrides}
    config = AutoConfig.for_model(
        settings["model_type"],
        tie_word_embeddings=settings.get("tied", False),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **size,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def tiny_family(checkpoint: str, kind: Kind) -> str:
    """The family of the tiny model that replaces a checkpoint in a rehearsal, determined without network access.

    Args:
        checkpoint: a local directory or a hub id. If its `config.json` is on this machine, its `model_type` decides, otherwise
            its name (`NAMES`).
        kind: vision, language, or base (a ready vision-language model).

    Raises:
        UserError: neither config nor name determines a family.
    """
    model_type = _local_model_type(checkpoint)
    if model_type is not None:
        family = MODEL_TYPES[kind].get(model_type[0])
        if family is None:
            supported = ", ".join(sorted(MODEL_TYPES[kind]))
            raise UserError(
                f"{checkpoint}: model_type {model_type[0]!r} cannot be rehearsed as {kind}: no tiny model; supported: {supported}"
            )
        return "llama3" if family == "llama" and model_type[1] >= 128_000 else family
    for pattern, family in NAMES[kind]:
        if re.search(pattern, checkpoint.lower()):
            return family
    raise UserError(
        f"{checkpoint}: cannot choose a tiny {kind} model: its config.json is not on this machine, and its name is not a known "
        f"one. If its model_type is one of {', '.join(sorted(MODEL_TYPES[kind]))}, download the file (hf download {checkpoint} "
        "config.json) or give a local directory; other model types cannot be rehearsed"
    )


def _local_model_type(checkpoint: str) -> tuple[str, int] | None:
    """`model_type` and vocabulary size of a checkpoint whose `config.json` is on this machine, otherwise None."""
    file = Path(checkpoint, "config.json")
    if not file.is_file():
        if Path(checkpoint).is_dir():
            raise UserError(f"{checkpoint}: expected config.json in the directory, found none")
        if not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", checkpoint):
            return None
        if (folder := cached_snapshot(checkpoint)) is None:
            return None
        file = folder / "config.json"
    config = json.loads(file.read_text())
    return str(config.get("model_type")), int(config.get("vocab_size") or 0)


def byte_level_tokenizer(
    settings: dict[str, Any], texts: Iterable[str], vocab_size: int = 0, merges: int = 0
) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with a family's special tokens.

    Args:
        settings: `specials`, the special tokens; `bos`, `eos`, `pad` and `unk`, those with these roles; `adds_bos`, False if the
            tokenizer does not prepend bos; `named`, further special tokens, as a list or by tokenizer attribute (such as
            `image_token`); `template`, the chat template.
        texts: training texts.
        vocab_size: the maximum vocabulary size, with bytes and special tokens.
        merges: the minimum number of merges.
    """
    specials: list[str] = settings["specials"]
    backend = Tokenizer(BPE(unk_token=None))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    size = max(vocab_size, len(alphabet) + len(specials) + merges)
    backend.train_from_iterator(
        texts,
        BpeTrainer(vocab_size=size, special_tokens=specials, initial_alphabet=alphabet, show_progress=False),
    )
    if "bos" in settings and settings.get("adds_bos", True):
        bos = settings["bos"]
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", pair=f"{bos} $A {bos} $B", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    names = {f"{key}_token": settings[key] for key in ("bos", "eos", "pad", "unk") if key in settings}
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        **({"extra_special_tokens": settings["named"]} if "named" in settings else {}),
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    )
    tokenizer.chat_template = settings.get("template")
    return tokenizer
