"""The model that an engine serves: a full checkpoint, merged from a run where needed."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from pathlib import Path

from mmtune.models.checkpoints.trained_weights import TrainedWeights, locate_trained_weights, read_adapter_config
from mmtune.models.checkpoints.weights_hash import hash_checkpoints
from mmtune.utils.errors import UserError
from mmtune.utils.files import check_writable, read_json_object
from mmtune.utils.manifest import MANIFEST


@dataclass(frozen=True)
class ReleasedModel:
    """A model that an engine can load.

    Attributes:
        path: its directory, or a hub id.
        trained: the run or checkpoint whose answers it can be compared with; None without one.
    """

    path: str
    trained: Path | None


def released_model(path: Path, trust_remote_code: bool = False) -> ReleasedModel:
    """The full model of a run, checkpoint or model. A run is merged into RUN/merged, with the check of `mmtune merge`.

    Also a run that trained all weights, because a release has no settings that engines apply and evaluation does not. Engines
    load adapters of few methods, and none with modules that were trained in full (`modules_to_save`, as the projector by
    default). A merge of the same weights is used again.

    Raises:
        UserError: no such model, an adapter without its run, a method that cannot be merged, or a directory with other weights at
            the place of the merge.
        CheckFailed: the merged model differs from the trained one.
    """
    trained = locate_trained_weights(path)
    of_run = trained.run.recipe.is_file()
    if not (trained.is_adapter or of_run):
        return ReleasedModel(str(trained.path), None)
    if not of_run:
        raise UserError(
            f"{path}: engines serve a full model; expected a run, or the result of `mmtune merge`, got an adapter alone"
        )
    out = trained.run.path / (f"merged_step_{trained.step}" if trained.is_checkpoint else "merged")
    digest = hash_checkpoints([str(trained.path)])
    source = trained.path if trained.is_checkpoint else trained.run.path
    if not out.exists():
        check_writable(out.absolute().parent, f"{out}: ")
        import torch

        from mmtune.release.merge import merge, merge_line

        print(f"{source}: {_why_merged(trained)}; merging into {out}", flush=True)
        print(merge_line(out, merge(source, out, trust_remote_code=trust_remote_code)))
        gc.collect()
        if torch.accelerator.is_available():
            torch.accelerator.empty_cache()  # the engine needs the memory
    elif not (out / MANIFEST).is_file() or read_json_object(out / MANIFEST).get("trained") != digest:
        raise UserError(
            f"{out}: expected the merge of {trained.path}, got other weights; replace them with `mmtune merge {path} {out} "
            f"--overwrite`, or serve them with `mmtune serve {out}`"
        )
    return ReleasedModel(str(out), source)


def _why_merged(trained: TrainedWeights) -> str:
    if not trained.is_adapter:
        return "a release has no settings that engines apply and evaluation does not"
    if modules := read_adapter_config(trained.path).get("modules_to_save"):
        return f"engines load no adapter with modules that were trained in full ({', '.join(modules[:3])})"
    return "engines serve a full model"


def check_decoder_only(model: str, trust_remote_code: bool = False) -> None:
    """
    Raises:
        UserError: an encoder-decoder model. `transformers serve` leaves out as many tokens of its answer as the prompt has.
    """
    from transformers import AutoConfig

    config = AutoConfig.from_pretrained(model, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise UserError(
            f"{model}: `transformers serve` returns the answers of encoder-decoder models ({config.model_type}) without their "
            "beginning; serve it with another engine: --engine-command"
        )
