"""Release: merge adapters into their base, write the result, reload it from disk and verify it."""

from __future__ import annotations

import gc
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PreTrainedModel, ProcessorMixin

from mmtune.data.dataset import IndexedSamples, open_samples
from mmtune.data.message import Sample
from mmtune.models.checkpoints.adapter_export import export_adapter
from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK, UNTRAINED, locate_base
from mmtune.models.checkpoints.remote_code import auto_class
from mmtune.models.checkpoints.trained_weights import (
    TrainedWeights,
    locate_adapter_base,
    read_adapter_base,
    report_removed_checkpoint,
)
from mmtune.models.checkpoints.unread_tensors import append_tensors, describe_unread_tensors, find_unread_tensors
from mmtune.models.checkpoints.weights_hash import hash_checkpoints
from mmtune.models.compute import adapter_disabled, to_best_device
from mmtune.models.generation import DEFAULT_MAX_NEW_TOKENS, drop_greedy_settings
from mmtune.models.load import DTYPES, load_base, load_strictly, load_trained, resolve_model
from mmtune.models.quantize import QUANTIZED, prepare_quantized, quantization_config
from mmtune.recipe.recipe import Recipe, load_recipe, needed_paths
from mmtune.release.merge_weights import check_mergeable, locate_run_adapter, locate_run_weights, merge_adapter, merge_weighted
from mmtune.release.model_card import adapter_card, model_card
from mmtune.release.parity import ModelOutputs, answer_logits, collect_outputs, compare, count_same_answers
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.files import check_links, read_record, replaced_directory
from mmtune.utils.manifest import MANIFEST, write_manifest

TOLERANCE = 1e-4
"""Largest allowed logit difference in fp32 between the adapter on its base and the merged model (rounding of the merged sum)."""

MAX_ROUNDING_LOSS = 0.5
"""Largest allowed ratio of the change by rounding to half precision to the change by tuning (mean absolute logit differences)."""


@dataclass(frozen=True)
class Parity:
    """Comparison of a release, reloaded from disk and run in fp32, with the adapter on its fp32 base.

    Attributes:
        merge_samples: the number of samples compared.
        merge_dtype: the dtype of the released weights.
        merge_max_logit_difference, merge_mean_logit_difference, merge_kl: see `parity.LogitDifference`.
        merge_same_answers: the number of identical greedy answers.
        merge_unrounded_difference: the largest logit difference before rounding to `merge_dtype`.
        merge_tolerance: the upper limit of `merge_unrounded_difference`.
        merge_difference_from_base: the largest logit difference from the untuned base; above 0.
        merge_step, merge_steps: the optimizer step of the released weights, and the number of steps of the run.
        merge_copied_tensors: tensors that the model class does not read, copied from the base unchanged.
        trained: the merged model compared with the adapter on the quantized base that it was trained on; no limit applies.
        quantized: the reloaded quantized release compared with the merged model; no limit applies.
    """

    merge_samples: int
    merge_dtype: str
    merge_max_logit_difference: float
    merge_mean_logit_difference: float
    merge_kl: float
    merge_same_answers: int
    merge_unrounded_difference: float
    merge_tolerance: float
    merge_difference_from_base: float
    merge_step: int | None = None
    merge_steps: int | None = None
    merge_copied_tensors: tuple[str, ...] = ()
    trained: dict[str, Any] | None = None
    quantized: dict[str, Any] | None = None


@dataclass(frozen=True)
class ExportOptions:
    """The format of a release.

    Attributes:
        dtype: fp32 or bf16; None: fp32 if the run's precision is fp32, else bf16.
        max_shard_size: the maximum size of a safetensors file, as in `save_pretrained`.
        quantize: int8 or nf4: also write a quantized release next to it, with the suffix `-int8` or `-nf4`.
    """

    dtype: str | None = None
    max_shard_size: str = "5GB"
    quantize: str | None = None


def merge(
    path: Path,
    out: Path,
    *,
    options: ExportOptions | None = None,
    overwrite: bool = False,
    count: int = 32,
    trust_remote_code: bool = False,
) -> Parity:
    """Merge the adapter of a run into its base and verify the result from disk.

    The base is loaded unquantized in fp32 and the adapter is merged into it; the model of a run without an adapter is used
    unchanged. The result is written to a temporary directory, reloaded from disk, and compared with the trained model on up to
    `count` held-out samples (training samples if the recipe has no `evaluate` section). Only then is it renamed to `out`.

    Args:
        path: a run or one of its checkpoints; for an unfinished run, its last valid checkpoint is used.
        out: the directory of the release.
        options: the format of the release.
        overwrite: replace an existing `out`; it stays in place until the new release is verified.
        count: the number of samples to compare.
        trust_remote_code: whether code in the base or the run may be executed.

    Returns:
        The comparison, which is also written to the model card and, for a finished run, to its `summary.json`.

    Raises:
        UserError: not a run, an adapter that cannot be merged or is damaged, a missing base, or an `out` that must not be
            replaced.
        CheckFailed: the merged model differs from the trained one or equals the base; `out` is not written.
    """
    source = locate_run_weights(path)
    run = source.run
    recipe = load_recipe(run.recipe)
    if source.is_adapter:
        check_mergeable(source)
    writer = _ReleaseWriter(recipe, options or ExportOptions(), count, locate_run_base(source, recipe), trust_remote_code)
    needed = [path, run.path, *needed_paths(recipe), *([Path(writer.base)] if writer.base else [])]
    with ExitStack() as stack:
        folder = writer.open(stack, out, overwrite, needed)
        trained_outputs = None
        if recipe.model.precision in QUANTIZED:
            trained = load_trained(source, trust_remote_code=trust_remote_code)
            trained_outputs = writer.collect(*trained, "trained model")
            del trained
        model, processor = load_trained(source, torch.float32, trust_remote_code=trust_remote_code)
        to_best_device(model)
        adapter_outputs = writer.collect(model, processor, "trained model in fp32")
        if source.is_adapter:
            with adapter_disabled(model):
                base_logits = answer_logits(model, processor, writer.samples, "base")
            merged = merge_adapter(model)
            merged_outputs = writer.collect(merged, processor, "merged model")
        else:
            untuned = load_untuned(recipe, trust_remote_code)
            base_logits = answer_logits(untuned, processor, writer.samples, "base")
            del untuned
            merged, merged_outputs = model, adapter_outputs
        _check_merge(adapter_outputs, base_logits, merged_outputs)
        parity = writer.write(folder, merged, processor, adapter_outputs, base_logits, merged_outputs)
        del model, merged
        if trained_outputs is not None:
            parity = replace(parity, trained=_comparison(trained_outputs, merged_outputs))
        parity = writer.write_quantized(merged_outputs, processor, parity)
        summary = read_weights_summary(source)
        parity = replace(parity, merge_step=source.step or summary.get("steps"), merge_steps=summary.get("steps"))
        writer.finish(summary | asdict(parity), run, trained=hash_checkpoints([str(source.path)]))
    if run.summary.is_file() and not source.is_checkpoint:
        run.update_summary(asdict(parity))
    return parity


def load_untuned(recipe: Recipe, trust_remote_code: bool = False) -> PreTrainedModel:
    """The base of a recipe before tuning, in fp32 and eval mode on the best device.

    Raises:
        UserError: as `load_base`.
    """
    section = recipe.model.model_copy(update={"precision": "fp32", "trust_remote_code": trust_remote_code})
    untuned, _ = load_base(resolve_model(section), recipe.train.get("seed", 42))
    return to_best_device(untuned).eval()


def merge_line(out: Path, parity: Parity) -> str:
    """One line for the terminal about a merge that was verified."""
    step = "" if parity.merge_step == parity.merge_steps else f" (step {parity.merge_step} of {parity.merge_steps})"
    return (
        f"merged: {out}{step}: largest logit difference {parity.merge_max_logit_difference:.2g} on {parity.merge_samples} "
        f"samples, {parity.merge_same_answers} greedy answers are the same"
    )


def read_weights_summary(trained: TrainedWeights) -> dict[str, Any]:
    """The `summary.json` of a run; for a checkpoint, only its own steps and row counts, and nothing of the finished run."""
    if not trained.is_checkpoint:
        return trained.run.read_summary() if trained.run.summary.is_file() else {}
    report = read_record(
        trained.path / trained.run.data_report.name, rows=(int, type(None)), dropped_over_length=list, quarantined=list
    )
    counts = {name: len(report[name]) for name in ("dropped_over_length", "quarantined")}
    return {"steps": trained.steps, "rows": report["rows"], **counts}


def locate_run_base(source: TrainedWeights, recipe: Recipe) -> str | None:
    """The checkpoint that a run started from; None if its base was created in memory and not saved."""
    if source.is_adapter:
        return locate_adapter_base(source.path)
    return None if recipe.model.base in (None, UNTRAINED) else locate_base(str(recipe.model.base))


def combine_adapters(
    weighted_paths: Sequence[tuple[Path, float]],
    out: Path,
    *,
    options: ExportOptions | None = None,
    overwrite: bool = False,
    count: int = 32,
    trust_remote_code: bool = False,
) -> Parity:
    """Merge the weighted sum of several adapters into their base and verify the result from disk.

    The release is compared with the merged model in memory, because no trained model of the sum exists.

    Args:
        weighted_paths: runs or checkpoints, and their weights.
        out, options, overwrite, count, trust_remote_code: as for `merge`; the samples are those of the first run.

    Raises:
        UserError, CheckFailed: as `merge`.
    """
    for path, weight in weighted_paths:
        if not math.isfinite(weight):
            raise UserError(f"{path}: expected a finite weight, got {weight}")
    runs = [(locate_run_adapter(path), weight) for path, weight in weighted_paths]
    for trained, _ in runs:
        check_mergeable(trained)
    first = runs[0][0].run
    recipe = load_recipe(first.recipe)
    base_name = locate_adapter_base(runs[0][0].path)
    writer = _ReleaseWriter(recipe, options or ExportOptions(), count, base_name, trust_remote_code)
    needed = [*(trained.run.path for trained, _ in runs), *(trained.path for trained, _ in runs), Path(base_name)]
    needed += needed_paths(recipe)
    with ExitStack() as stack:
        folder = writer.open(stack, out, overwrite, needed)
        merged, processor = merge_weighted(runs, trust_remote_code)
        merged_outputs = writer.collect(to_best_device(merged), processor, "merged model")
        untuned = load_strictly(base_name, base_name, quiet=True, dtype=torch.float32, trust_remote_code=trust_remote_code)
        base_logits = answer_logits(to_best_device(untuned), processor, writer.samples, "base")
        del untuned
        if compare(base_logits, merged_outputs.logits).largest <= TOLERANCE / 100:
            raise CheckFailed("the merged model equals the base: the adapters change nothing, or their changes cancel out")
        parity = writer.write(folder, merged, processor, merged_outputs, base_logits, merged_outputs)
        del merged
        parity = writer.write_quantized(merged_outputs, processor, parity)
        names = [str(trained.path if trained.is_checkpoint else trained.run.path) for trained, _ in runs]
        weights = [weight for _, weight in runs]
        writer.finish(asdict(parity) | {"adapters": list(zip(names, weights, strict=True))}, first)
    return parity


def release_adapter(
    path: Path, out: Path, *, overwrite: bool = False, count: int = 32, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Release the adapter of a run without merging it, with its base unless that is on the hub, and verify it from disk.

    For methods that cannot be merged. `out` has `adapter/`, `base/`, and a model card that shows how to load them. The release
    is reloaded that way, and its logits must equal those of the run.

    Returns:
        `samples`, `max_logit_difference`, `same_answers`, `merge_step`, `merge_steps`.

    Raises:
        UserError: the run has no adapter, or `out` must not be replaced.
        CheckFailed: the release differs from the run.
    """
    source = locate_run_adapter(path)
    run = source.run
    recipe = load_recipe(run.recipe)
    writer = _ReleaseWriter(recipe, ExportOptions(), count, trust_remote_code=trust_remote_code)
    base = Path(read_adapter_base(source.path))
    needed = [path, run.path, base, *needed_paths(recipe)]
    with report_removed_checkpoint(source), replaced_directory(out, overwrite, MANIFEST, needed) as folder:
        for copied in (source.path, *([base] if base.is_dir() else [])):
            check_links(copied)
        model, processor = load_trained(source, torch.float32, trust_remote_code=trust_remote_code)
        expected = writer.collect(to_best_device(model), processor, "trained model in fp32")
        if base.is_dir():
            shutil.copytree(base, folder / "base")
        # The name of a local base is relative, so that the release can be moved.
        export_adapter(source, processor, folder / "adapter", base="base" if base.is_dir() else str(base))
        comparison = _comparison(expected, writer.collect_released(folder / "adapter"))
        if comparison["max_logit_difference"] > 1e-6 or comparison["same_answers"] < comparison["samples"]:
            raise CheckFailed(f"the released adapter differs from the adapter of the run: {comparison}")
        summary = read_weights_summary(source)
        steps = {"merge_step": source.step or summary.get("steps"), "merge_steps": summary.get("steps")}
        card = adapter_card(recipe, summary | steps, run, comparison, base.is_dir())
        (folder / "README.md").write_text(card, encoding="utf-8")
        write_manifest(folder, step=steps["merge_step"], steps=steps["merge_steps"])
    return comparison | steps


def parity_samples(recipe: Recipe, count: int) -> list[Sample]:
    """Up to `count` samples, spread over the held-out data; over the training data without augmentation if there is none."""
    plain = tuple(source.model_copy(update={"augment": None}) for source in recipe.data.train)
    samples = (
        IndexedSamples(recipe.evaluate.sources)
        if recipe.evaluate
        else open_samples(recipe.data.model_copy(update={"train": plain}))
    )
    return [handle() for handle in islice(samples.subset(count), count)]


class _ReleaseWriter:
    """Writes a release and compares models on the same samples.

    Args:
        recipe: the recipe of the run.
        options: the format of the release.
        count: the number of samples to compare.
        base: the checkpoint whose unread tensors are copied into the release.
        trust_remote_code: whether code in the base or the run may be executed.
    """

    def __init__(
        self, recipe: Recipe, options: ExportOptions, count: int, base: str | None = None, trust_remote_code: bool = False
    ) -> None:
        if count < 1:
            raise UserError(f"--samples {count}: expected at least 1")
        if not re.fullmatch(r"\d+[KMGT]I?B", options.max_shard_size.upper()):
            raise UserError(f"--max-shard-size {options.max_shard_size}: expected a size such as 5GB")
        self.samples = parity_samples(recipe, count)
        self.options = options
        self.dtype = options.dtype or ("fp32" if recipe.model.precision == "fp32" else "bf16")
        self.base = base
        self.folders: list[Path] = []
        self._trust_remote_code = trust_remote_code
        self._recipe = recipe
        self._unread: dict[str, Path] = {}
        self._copied: dict[str, Any] = {}
        self._max_new_tokens = recipe.evaluate.max_new_tokens if recipe.evaluate else DEFAULT_MAX_NEW_TOKENS

    def open(self, stack: ExitStack, out: Path, overwrite: bool, needed: Sequence[Path]) -> Path:
        """Open temporary directories for the release and the quantized release, if any; checks `out` before weights load."""
        self.folders = [stack.enter_context(replaced_directory(out, overwrite, CHECKPOINT_MARK, needed))]
        if self.options.quantize is not None:
            quantized = out.with_name(f"{out.name}-{self.options.quantize}")
            self.folders.append(stack.enter_context(replaced_directory(quantized, overwrite, CHECKPOINT_MARK, needed)))
        return self.folders[0]

    def collect(self, model: PreTrainedModel, processor: ProcessorMixin, label: str) -> ModelOutputs:
        """The outputs of a model on the samples."""
        return collect_outputs(model, processor, self.samples, self._max_new_tokens, label)

    def collect_released(self, folder: Path) -> ModelOutputs:
        """The outputs of a written release, reloaded from disk in fp32."""
        model, processor = load_trained(folder, torch.float32, trust_remote_code=self._trust_remote_code)
        return self.collect(to_best_device(model), processor, "release")

    def write(
        self,
        folder: Path,
        merged: PreTrainedModel,
        processor: ProcessorMixin,
        adapter_outputs: ModelOutputs,
        base_logits: list[torch.Tensor],
        merged_outputs: ModelOutputs,
    ) -> Parity:
        """Write the model in its dtype, reload it in fp32, and compare."""
        if dropped := drop_greedy_settings(merged):
            settings = ", ".join(f"{name} {value}" for name, value in dropped.items())
            print(f"generation_config.json: without {settings}: training and evaluation do not use it, and engines would")
        merged.to(DTYPES[self.dtype]).save_pretrained(folder, max_shard_size=self.options.max_shard_size)
        processor.save_pretrained(folder)
        if self.base is not None:
            self._unread = find_unread_tensors(merged, self.base)
            self._copied = append_tensors(self._unread, folder, self.options.max_shard_size)
            if self._copied:
                print(describe_unread_tensors(merged, self._copied))
        merged.to("meta")  # frees the memory for the reloaded model
        gc.collect()
        released = self.collect_released(folder)
        difference = compare(adapter_outputs.logits, released.logits)
        parity = Parity(
            merge_samples=len(self.samples),
            merge_dtype=self.dtype,
            merge_max_logit_difference=difference.largest,
            merge_mean_logit_difference=difference.mean,
            merge_kl=difference.kl,
            merge_same_answers=count_same_answers(adapter_outputs, released),
            merge_unrounded_difference=compare(adapter_outputs.logits, merged_outputs.logits).largest,
            merge_tolerance=TOLERANCE,
            merge_difference_from_base=compare(base_logits, released.logits).largest,
            merge_copied_tensors=tuple(self._copied),
        )
        _check_release(parity, tuning_change=compare(base_logits, adapter_outputs.logits).mean)
        return parity

    def write_quantized(self, merged_outputs: ModelOutputs, processor: ProcessorMixin, parity: Parity) -> Parity:
        """Write the quantized release, if the options have one, and verify it from disk."""
        precision = self.options.quantize
        if precision is None:
            return parity
        source, folder = self.folders
        base_config = AutoConfig.from_pretrained(source, trust_remote_code=self._trust_remote_code)
        config = quantization_config(base_config, precision, self._trust_remote_code)
        device_map = {"": torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")}
        load = partial(auto_class(base_config).from_pretrained, device_map=device_map, trust_remote_code=self._trust_remote_code)
        model = load(str(source), dtype=torch.bfloat16, quantization_config=config)
        prepare_quantized(model)
        model.save_pretrained(folder, max_shard_size=self.options.max_shard_size)
        processor.save_pretrained(folder)
        append_tensors(self._unread, folder, self.options.max_shard_size)
        expected = self.collect(model, processor, f"{precision} model")
        reloaded = load(str(folder))
        prepare_quantized(reloaded)
        released = self.collect(reloaded, processor, f"{precision} release")
        if (difference := compare(expected.logits, released.logits).largest) > TOLERANCE:
            raise CheckFailed(
                f"the {precision} release, reloaded from disk, differs from the saved model: largest logit difference "
                f"{difference:.3g}, limit {TOLERANCE:g}"
            )
        return replace(parity, quantized=_comparison(merged_outputs, released))

    def finish(self, summary: dict[str, Any], run: RunDirectory, trained: str | None = None) -> None:
        """Write the model cards and the manifests. `trained` is the hash of the files of the trained weights."""
        contents = {"step": summary["merge_step"], "steps": summary["merge_steps"], "copied_tensors": self._copied}
        contents |= {"trained": trained}
        for folder in self.folders:
            (folder / "README.md").write_text(model_card(self._recipe, summary, run), encoding="utf-8")
            write_manifest(folder, **contents)


def _comparison(expected: ModelOutputs, actual: ModelOutputs) -> dict[str, Any]:
    difference = compare(expected.logits, actual.logits)
    return {
        "samples": len(expected.answers),
        "max_logit_difference": difference.largest,
        "mean_logit_difference": difference.mean,
        "kl": difference.kl,
        "same_answers": count_same_answers(expected, actual),
    }


def _check_merge(adapter: ModelOutputs, base_logits: list[torch.Tensor], merged: ModelOutputs) -> None:
    """Compare the merged model in memory with the adapter on its base.

    Raises:
        CheckFailed: the merged model equals the base, or differs from the adapter in logits or greedy answers.
    """
    if compare(base_logits, merged.logits).largest <= TOLERANCE / 100:
        raise CheckFailed("the merged model equals the base: tuning changed nothing, or the adapter was not merged")
    difference = compare(adapter.logits, merged.logits).largest
    if difference > TOLERANCE:
        raise CheckFailed(
            f"the merged model differs from the adapter: largest logit difference {difference:.3g}, limit {TOLERANCE:g}"
        )
    if (same := count_same_answers(adapter, merged)) < len(adapter.answers):
        raise CheckFailed(
            f"the merged model differs from the adapter: expected {len(adapter.answers)} identical greedy answers, got {same}"
        )


def _check_release(parity: Parity, tuning_change: float) -> None:
    """Check a release that was reloaded from disk.

    Args:
        parity: the comparison with the adapter.
        tuning_change: the mean logit difference between base and adapter.

    Raises:
        CheckFailed: an fp32 release that differs from the adapter, or a bf16 release that loses too much by rounding.
    """
    difference, limit = parity.merge_mean_logit_difference, MAX_ROUNDING_LOSS * tuning_change
    if parity.merge_dtype == "fp32":
        if parity.merge_max_logit_difference > TOLERANCE or parity.merge_same_answers < parity.merge_samples:
            raise CheckFailed(
                "the merged model, reloaded from disk, differs from the adapter: largest logit difference "
                f"{parity.merge_max_logit_difference:.3g}, limit {TOLERANCE:g}; {parity.merge_same_answers} of "
                f"{parity.merge_samples} greedy answers identical"
            )
    elif not difference <= limit:  # "not <=" is also true for NaN
        raise CheckFailed(
            f"rounding the merged model to {parity.merge_dtype} changes its logits by {difference:.3g} on average, limit "
            f"{limit:.3g} (half of the change by tuning); write it in fp32: --dtype fp32"
        )
