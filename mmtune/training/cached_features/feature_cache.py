"""The feature cache of a run (`data.cache_features`): a frozen vision tower runs once for a row, and not at every visit.

A batch has the features that a data-loader worker found in the store, and processed images for the others. Their features are
computed and stored before the forward pass, in which the towers return the features of the batch.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from importlib import metadata
from pathlib import Path

import torch
from torch import nn
from transformers import ProcessorMixin

from mmtune.data.batching.collate import concat_padded
from mmtune.data.encoding.feature_store import FORMAT, FeatureStore, StoredFeatures, probe_samples, without_pixels
from mmtune.models.compute import in_eval_mode, move_batch, training_autocast
from mmtune.models.packed_attention import FP32_TOLERANCE, HALF_TOLERANCE
from mmtune.models.towers.vision_towers import VisionTowers
from mmtune.training.run_inputs import RunInputs
from mmtune.utils.errors import UserError, errors_at_key, reason_of

KEY = "data.cache_features"


class FeatureCache:
    """Replaces the outputs of frozen vision towers by stored ones.

    Args:
        towers: of the model that trains.
        axes: for each tensor of `VisionTowers.features`, the dimension along which those of several samples are joined.
        store: where they are stored.
    """

    def __init__(self, towers: VisionTowers, axes: Sequence[int], store: FeatureStore) -> None:
        self._towers = towers
        self._axes = axes
        self.store = store

    @contextlib.contextmanager
    def features_of(self, batch: Sequence[StoredFeatures]) -> Iterator[None]:
        """Inside, the towers return the features of a batch; those that are not stored are computed and stored first.

        Args:
            batch: `vision_features` of the batch on the device of the model; empty for a batch whose tower must run.
        """
        if not batch:
            yield
            return
        with self._towers.replaced(_joined([self._features(entry) for entry in batch], self._axes)):
            yield

    def _features(self, entry: StoredFeatures) -> list[torch.Tensor]:
        if "features" in entry:
            stored: list[torch.Tensor] = entry["features"]
            return stored
        features = self._towers.features(entry["media"])
        self.store.write(entry["key"], entry["media"], entry["replacements"], features)
        return features


def open_feature_cache(inputs: RunInputs, model: nn.Module, processor: ProcessorMixin) -> FeatureCache | None:
    """The feature cache of a run; None without `data.cache_features`.

    The logits from features are compared with those of the model itself on a few samples, whose images are random pixels.

    Args:
        model: as it trains, without the wrappers of a distributed run, on its device.

    Raises:
        UserError: a part of a tower trains or is random, or the model does not take features in place of images.
    """
    folder = inputs.recipe.data.cache_features
    if folder is None:
        return None
    with errors_at_key(KEY):
        towers = VisionTowers(model)
        if trained := towers.trained():
            raise UserError(
                f"expected a frozen vision tower, got {len(trained)} trained tensors in it, such as {trained[0]}; leave it "
                "out, or set tune.projector: frozen, which in some models is a part of the vision tower"
            )
        axes = _find_axes(inputs, towers, model, processor)
        arguments = inputs.arguments
        described = [
            FORMAT,
            [metadata.version(name) for name in ("transformers", "torch", "mmtune")],
            [str(arguments.device.type), arguments.bf16, arguments.fp16],
            towers.digest() if inputs.dist.is_main_process else None,
        ]
        name = inputs.dist.broadcast_object(hashlib.blake2b(json.dumps(described).encode(), digest_size=16).hexdigest())
    store = FeatureStore(Path(folder) / name, processor)
    print(f"{KEY}: features of {', '.join(towers.paths)} in {store.folder}")
    return FeatureCache(towers, axes, store)


def _find_axes(inputs: RunInputs, towers: VisionTowers, model: nn.Module, processor: ProcessorMixin) -> list[int]:
    """Compare logits of a few samples with those from their features; returns the dimensions along which these are joined."""
    objective, encoded = inputs.objective, probe_samples(processor)
    collator = objective.collator(processor, inputs.recipe.data.packing)

    def logits(samples: list[dict[str, torch.Tensor]]) -> torch.Tensor:
        batch = {name: value for name, value in collator(samples).items() if isinstance(value, torch.Tensor)}
        batch_inputs = objective.model_inputs(model, move_batch(model, batch))
        return objective.compute_loss(model, batch_inputs, 1).logits

    with in_eval_mode(model), training_autocast(model):
        joint, expected = towers.find_outputs(partial(logits, encoded))
        with_images = [sample for sample in encoded if "pixel_values" in sample]
        single = [towers.features(move_batch(model, sample)) for sample in with_images]
        axes = [_axis(whole, parts) for whole, *parts in zip(joint, *single, strict=True)]
        with torch.no_grad(), towers.replaced(_joined(single, axes)):
            try:
                actual = logits([without_pixels(sample) for sample in encoded])
            except (RuntimeError, ValueError, IndexError, TypeError, AttributeError) as error:
                raise UserError(
                    f"the model does not take features in place of images: {reason_of(error)}; leave it out"
                ) from error
        _compare("the logits from stored features", actual, expected)
    with training_autocast(model):  # in training mode, with dropout if there is any
        for first, again in zip(single[-1], towers.features(move_batch(model, encoded[-1])), strict=True):
            _compare("the features of an image in training mode, which dropout changes,", again, first)
    return axes


def _axis(whole: torch.Tensor, parts: Sequence[torch.Tensor]) -> int:
    """The dimension along which a tensor of two samples joins those of each; the others may be padded."""
    shapes = [tuple(tensor.shape) for tensor in (whole, *parts)]
    for axis, (size, *others) in enumerate(zip(*shapes, strict=True)):
        rest = [sizes for number, sizes in enumerate(zip(*shapes, strict=True)) if number != axis]
        if size == sum(others) and all(one == max(several) for one, *several in rest):
            return axis
    raise UserError(
        f"the features of a batch, of shape {shapes[0]}, do not join those of its samples, {shapes[1:]}; leave it out"
    )


def _joined(samples: Sequence[Sequence[torch.Tensor]], axes: Sequence[int]) -> list[torch.Tensor]:
    return [concat_padded(list(tensors), axis) for axis, *tensors in zip(axes, *samples, strict=True)]


def _compare(subject: str, actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = FP32_TOLERANCE if expected.dtype == torch.float32 else HALF_TOLERANCE
    difference = float((actual.double() - expected.double()).norm() / expected.double().norm())
    if not difference <= tolerance:
        raise UserError(f"{subject} differ by a relative {difference:.1e}, limit {tolerance:g}; leave it out")
