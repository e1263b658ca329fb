"""Tiny random models of the packable families, and encoded samples for them: images of several sizes, several images, none."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForImageTextToText,
    Idefics3Config,
    LlavaConfig,
    Qwen2_5_VLConfig,
    Qwen2VLConfig,
    Qwen3VLConfig,
    Qwen3VLMoeConfig,
    SmolVLMConfig,
)

IMAGE, VOCABULARY = 3, 64
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TOWER = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
QWEN_TOKENS = {"image_token_id": IMAGE, "video_token_id": 4, "vision_start_token_id": 5, "vision_end_token_id": 6}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}


def _llava(language: str, **settings: Any) -> LlavaConfig:
    tower = {"model_type": "clip_vision_model", "image_size": 28, "patch_size": 14, **TOWER}
    text = {"model_type": language, "head_dim": 16, **TEXT, **settings}
    return LlavaConfig(vision_config=tower, text_config=text, image_token_id=IMAGE)


def _qwen2_5() -> Qwen2_5_VLConfig:
    # One layer of windows, two patches wide after merging, and one of whole images.
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32}
    tower |= {"patch_size": 14, "window_size": 56, "fullatt_block_indexes": [1]}
    return Qwen2_5_VLConfig(vision_config=tower, text_config={"rope_parameters": MROPE, **TEXT}, **QWEN_TOKENS)


def _qwen2() -> Qwen2VLConfig:
    tower = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 14}
    return Qwen2VLConfig(vision_config=tower, text_config={"rope_parameters": MROPE, **TEXT}, **QWEN_TOKENS)


def _qwen3(config: type[Any], **settings: Any) -> Any:
    tower = {"depth": 2, "hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "out_hidden_size": 32, "patch_size": 14}
    tower |= {"num_position_embeddings": 16, "deepstack_visual_indexes": [0]}
    rope = {"rope_type": "default", "mrope_section": [3, 3, 2], "rope_theta": 1e4}
    text = {"head_dim": 16, "rope_parameters": rope, **TEXT, **settings}
    return config(vision_config=tower, text_config=text, **QWEN_TOKENS)


def _idefics3(config: type[Any]) -> Any:
    tower = {"image_size": 28, "patch_size": 7, **TOWER}
    text = {"model_type": "llama", **TEXT}
    return config(vision_config=tower, text_config=text, image_token_id=IMAGE, scale_factor=2, pad_token_id=0)


CONFIGS: dict[str, Any] = {
    "llava": lambda: _llava("llama"),
    "llava_qwen2": lambda: _llava("qwen2"),
    "llava_qwen3": lambda: _llava("qwen3"),
    "llava_mistral": lambda: _llava("mistral", sliding_window=6),
    "llava_gemma": lambda: _llava("gemma"),
    "llava_gemma3": lambda: _llava("gemma3_text", sliding_window=6, layer_types=["sliding_attention", "full_attention"]),
    "qwen2_vl": _qwen2,
    "qwen2_5_vl": _qwen2_5,
    "qwen3_vl": lambda: _qwen3(Qwen3VLConfig),
    "qwen3_vl_moe": lambda: _qwen3(Qwen3VLMoeConfig, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32),
    "idefics3": lambda: _idefics3(Idefics3Config),
    "smolvlm": lambda: _idefics3(SmolVLMConfig),
}


def tiny(family: str, attention: str = "sdpa") -> Any:
    """A random model in training mode, its weights large enough that what one token sees of another shows."""
    torch.manual_seed(0)
    model = AutoModelForImageTextToText.from_config(CONFIGS[family](), attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(std=0.15)
    return model.train()


def samples(family: str) -> list[dict[str, torch.Tensor]]:
    """An image, text alone, two images, an image of another size; each with a supervised end of its own length."""
    generator = torch.Generator().manual_seed(1)
    shapes: list[list[tuple[int, int]]] = [[(4, 4)], [], [(2, 6), (4, 2)], [(8, 6)]]
    encoded = []
    for shape, words, answer in zip(shapes, (9, 14, 6, 11), (3, 5, 2, 4), strict=True):
        pieces, media = _media(family, shape, generator)
        text = torch.randint(8, VOCABULARY, (words,), generator=generator).tolist()
        ids, types = text[:2], [0, 0]
        for piece in pieces:
            ids, types = [*ids, *piece, 7], [*types, *([1] * len(piece)), 0]
        ids, types = torch.tensor([[*ids, *text[2:]]]), torch.tensor([[*types, *([0] * (words - 2))]])
        labels = ids.clone()
        labels[:, :-answer] = -100
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **media}
        encoded.append({**sample, "mm_token_type_ids": types} if family.startswith("qwen") else sample)
    # The first token too: nothing predicts it, in a row of many samples either.
    encoded[1]["labels"] = encoded[1]["input_ids"].clone()
    return encoded


def _media(
    family: str, shapes: list[tuple[int, int]], generator: torch.Generator
) -> tuple[list[list[int]], dict[str, torch.Tensor]]:
    """For each image its tokens, and the tensors of all of them; `shapes` are (height, width) in patches."""
    if not shapes:
        return [], {}
    if family.startswith("qwen"):
        grid = torch.tensor([(1, height, width) for height, width in shapes])
        width = 3 * 2 * 14 * 14
        pixels = torch.randn(int(grid.prod(1).sum()), width, generator=generator)
        return [[IMAGE] * (h * w // 4) for h, w in shapes], {"pixel_values": pixels, "image_grid_thw": grid}
    if family.startswith("llava"):
        return [[IMAGE] * 4 for _ in shapes], {"pixel_values": torch.randn(len(shapes), 3, 28, 28, generator=generator)}
    tiles = [h * w // 4 for h, w in shapes]
    pixels = torch.randn(1, sum(tiles), 3, 28, 28, generator=generator)
    mask = torch.ones(1, sum(tiles), 28, 28, dtype=torch.long)
    return [[IMAGE] * (4 * count) for count in tiles], {"pixel_values": pixels, "pixel_attention_mask": mask}
