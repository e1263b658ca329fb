"""`transformers serve` with any build of torchvision, as `python -m mmtune.serving.transformers_engine serve MODEL`.

The command `transformers` itself fails where the compiled operators of torchvision belong to another build of torch, at its start
and when it decodes an image. Here Pillow decodes images then, as in training.
"""

from __future__ import annotations

import importlib
import io
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

from mmtune.utils.torchvision_support import prepare_torchvision


def decode_image(image: str | torch.Tensor, mode: Any = None, apply_exif_orientation: bool = True) -> torch.Tensor:
    """What `torchvision.io.decode_image` returns for an RGB image: uint8 of shape (3, height, width).

    Args:
        image: a path, or the bytes of a file, uint8 of shape (bytes,).
        mode: torchvision's; the result is always RGB.
        apply_exif_orientation: torchvision's; the result is always upright.
    """
    file = image if isinstance(image, str) else io.BytesIO(image.numpy().tobytes())
    with Image.open(file) as opened:
        return torch.from_numpy(np.array(ImageOps.exif_transpose(opened).convert("RGB"))).permute(2, 0, 1)


def run_transformers() -> None:
    """Run the command line of transformers."""
    if prepare_torchvision().operators is not None:
        importlib.import_module("torchvision.io").decode_image = decode_image  # type: ignore[attr-defined]
    from transformers.cli.transformers import app

    app()


if __name__ == "__main__":
    run_transformers()
