"""Arithmetic that several families share: patches of a vision tower, and images of which only the shape is read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mmtune.families.family import Size

if TYPE_CHECKING:
    import numpy as np

SQUARE_PROCESSORS = ("CLIPImageProcessor", "SiglipImageProcessor", "BitImageProcessor", "ViTImageProcessor", "DeiTImageProcessor")
"""Image processors that resize and crop every image to one size."""

PREFIX_TOKENS = {
    "clip_vision_model": 1,
    "siglip_vision_model": 0,
    "dinov2": 1,
    "dinov2_with_registers": 1,
    "dinov3_vit": 1,
    "vit": 1,
}
"""Number of class tokens before the patches of a vision tower, by `model_type`; register tokens are not included."""


def patch_size(config: Any) -> int:
    """The side of the vision tower's patches in pixels."""
    size = config.vision_config.patch_size
    return int(size if isinstance(size, int) else size[0])


def grid_tokens(config: Any) -> int:
    """The number of patches of the vision tower's image size."""
    size = config.vision_config.image_size
    return (int(size if isinstance(size, int) else size[0]) // patch_size(config)) ** 2


def extra_tokens(config: Any) -> int | None:
    """The number of class and register tokens of the vision tower; None if its type is unknown."""
    tower = config.vision_config
    class_tokens = PREFIX_TOKENS.get(tower.model_type)
    return None if class_tokens is None else class_tokens + (getattr(tower, "num_register_tokens", 0) or 0)


def shape_only_image(size: Size) -> np.ndarray[Any, Any]:
    """An array of shape (3, height, width) with one byte of memory, for functions that read only the shape."""
    import numpy as np

    return np.broadcast_to(np.uint8(0), (3, size[1], size[0]))
