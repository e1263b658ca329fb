"""Write a release, and prove from disk that it is what was trained."""

from __future__ import annotations

import gc
import math
import re
import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, PreTrainedModel, ProcessorMixin

from mmtune.data.dataset import IndexedSamples, open_samples
from mmtune.data.message import Sample
from mmtune.models.checkpoints.adapter_export import export_adapter
from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK, UNTRAINED, locate_base
from mmtune.models.checkpoints.trained_weights import (
    TrainedWeights,
    locate_adapter_base,
    read_adapter_base,
    report_removed_checkpoint,
)
from mmtune.models.checkpoints.unread_tensors import append_tensors, describe_unread_tensors, find_unread_tensors
from mmtune.models.compute import to_best_device
from mmtune.models.generation import DEFAULT_MAX_NEW_TOKENS
from mmtune.models.load import DTYPES, load_base, load_strictly, load_trained
from mmtune.models.quantize import QUANTIZED, prepare_quantized, quantization_config
from mmtune.recipe.recipe import Recipe, load_recipe, needed_paths
from mmtune.release.merge_weights import check_mergeable, locate_run_adapter, locate_run_weights, merge_adapter, merge_weighted
from mmtune.release.model_card import adapter_card, model_card
from mmtune.release.parity import ModelOutputs, answer_logits, collect_outputs, compare, count_same_answers
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.files import check_links_stay, read_record, replaced_directory
from mmtune.utils.manifest import NAME as MANIFEST
from mmtune.utils.manifest import write_manifest

TOLERANCE = 1e-4
"""Largest logit difference in fp32 between adapter and folded model: the rounding of one matrix sum against two."""

ROUNDING = 0.5
"""How much a release of half precision may be changed by its rounding, as a part of what the adapter changed (means of absolute
logit differences). A model that loses more than half of its tuning to rounding is another model."""


@dataclass(frozen=True)
class Parity:
    """How a release, loaded back from disk and run in fp32, compares with the adapter on its fp32 base.

    Attributes:
        merge_samples: on how many.
        merge_dtype: of the released weights.
        merge_max_logit_difference, merge_mean_logit_difference, merge_kl: see `parity.Difference`.
        merge_same_answers: greedy answers that are the same text.
        merge_unrounded_difference: the largest logit difference before rounding to `merge_dtype`.
        merge_tolerance: what `merge_unrounded_difference` may be.
        merge_difference_from_base: largest logit difference from the untuned base, which the release must not equal.
        merge_step, merge_steps: the optimizer steps that the released weights have behind them, and those of the whole run.
        merge_copied_tensors: tensors of the base that its class does not read, which are in the release as they are.
        trained: the same against the adapter on the quantized base that it was trained on; nothing is asked of these.
        quantized: the quantized release, loaded back, against the merged model; nothing is asked of these.
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
    """What a release is written as.

    Attributes:
        dtype: fp32 or bf16; None follows the run's precision.
        max_shard_size: of a safetensors file, as transformers takes it.
        quantize: int8 or nf4, to write a quantized release beside the whole one, under its name and `-int8` or `-nf4`.
    """

    dtype: str | None = None
    max_shard_size: str = "5GB"
    quantize: str | None = None


def merge(
    path: Path,
    out: Path,
    *,
    form: ExportOptions | None = None,
    overwrite: bool = False,
    count: int = 32,
    trust_remote_code: bool = False,
) -> Parity:
    """Write the merged model of a run to `out`.

    The base is loaded unquantized in fp32, the adapter folded in (the model of a run without one is taken as it is), the result
    written beside `out`, loaded back from disk, and compared with what was trained on up to `count` samples of the recipe's
    held-out data (of its training data when it evaluates nothing). `out` takes its name last.

    Args:
        path: a run, or one of its checkpoints. Of a run that has not finished the last good checkpoint is taken.
        out: where the merged model goes.
        form: of the release.
        overwrite: replace an existing `out`, which stays whole until the new one is proven.
        count: samples to compare on.
        trust_remote_code: whether code that comes with the base or the run may run.

    Returns:
        The figures, which also go into the model card and, of a finished run, into its `summary.json`.

    Raises:
        UserError: no run, an adapter that cannot be folded or is damaged, a missing base, an `out` that must not be
            replaced.
        CheckFailed: the merged model differs from what was trained, or equals the base; nothing is left at `out`.
    """
    source = locate_run_weights(path)
    run = source.run
    recipe = load_recipe(run.recipe)
    if source.is_adapter:
        check_mergeable(source)
    job = _Job(recipe, form or ExportOptions(), count, _base_on_disk(source, recipe), trust_remote_code)
    needed = [path, run.path, *needed_paths(recipe), *([Path(job.base)] if job.base else [])]
    with ExitStack() as stack:
        fresh = job.open(stack, out, overwrite, needed)
        trained = None
        if recipe.model.precision in QUANTIZED:
            trained = job.collect_outputs(*load_trained(source, trust_remote_code=trust_remote_code), "as trained")
        model, processor = load_trained(source, torch.float32, trust_remote_code=trust_remote_code)
        to_best_device(model)
        adapter = job.collect_outputs(model, processor, "as trained, in fp32")
        if source.is_adapter:
            with model.disable_adapter():
                base = answer_logits(model, processor, job.samples, "the base")
            merged = merge_adapter(model)
            folded = job.collect_outputs(merged, processor, "merged")
        else:
            section = recipe.model.model_copy(update={"precision": "fp32", "trust_remote_code": trust_remote_code})
            untuned, _ = load_base(section, recipe.train.get("seed", 42))
            base = answer_logits(to_best_device(untuned).eval(), processor, job.samples, "the base")
            del untuned
            merged, folded = model, adapter
        _check_merge(adapter, base, folded)
        parity = job.write(fresh, merged, processor, adapter, base, folded)
        del model, merged
        if trained is not None:
            parity = replace(parity, trained=_figures(trained, folded))
        parity = job.write_quantized(folded, processor, parity)
        summary = read_weights_summary(source)
        parity = replace(parity, merge_step=source.step or summary.get("steps"), merge_steps=summary.get("steps"))
        job.finish(summary | asdict(parity), run)
    if run.summary.is_file() and not source.is_checkpoint:
        run.update_summary(asdict(parity))
    return parity


def read_weights_summary(trained: TrainedWeights) -> dict[str, Any]:
    """What a run's `summary.json` says; of a checkpoint, what is known of it, and nothing of the finished run."""
    if not trained.is_checkpoint:
        return trained.run.read_summary() if trained.run.summary.is_file() else {}
    report = read_record(
        trained.path / trained.run.data_report.name, rows=(int, type(None)), dropped_over_length=list, quarantined=list
    )
    counts = {name: len(report[name]) for name in ("dropped_over_length", "quarantined")}
    return {"steps": trained.steps, "rows": report["rows"], **counts}


def _base_on_disk(source: TrainedWeights, recipe: Recipe) -> str | None:
    """The checkpoint that a run started from; None where it was made in memory and not written."""
    if source.is_adapter:
        return locate_adapter_base(source.path)
    return None if recipe.model.base in (None, UNTRAINED) else locate_base(str(recipe.model.base))


def combine_adapters(
    parts: Sequence[tuple[Path, float]],
    out: Path,
    *,
    form: ExportOptions | None = None,
    overwrite: bool = False,
    count: int = 32,
    trust_remote_code: bool = False,
) -> Parity:
    """Write one base plus the weighted sum of several adapters' changes to `out`.

    What is compared with the release from disk is the sum in memory: there is no trained model to compare a sum with.

    Args:
        parts: runs or checkpoints, and their weights.
        out, form, overwrite, count, trust_remote_code: as for `merge`; samples come from the first run.

    Raises:
        UserError, CheckFailed: as `merge`.
    """
    for path, weight in parts:
        if not math.isfinite(weight):
            raise UserError(f"{path}: {weight} is no weight")
    runs = [(locate_run_adapter(path), weight) for path, weight in parts]
    for trained, _ in runs:
        check_mergeable(trained)
    first = runs[0][0].run
    recipe = load_recipe(first.recipe)
    job = _Job(recipe, form or ExportOptions(), count, locate_adapter_base(runs[0][0].path), trust_remote_code)
    needed = [*(trained.run.path for trained, _ in runs), *(trained.path for trained, _ in runs), Path(str(job.base))]
    needed += needed_paths(recipe)
    with ExitStack() as stack:
        fresh = job.open(stack, out, overwrite, needed)
        merged, processor = merge_weighted(runs, trust_remote_code)
        folded = job.collect_outputs(to_best_device(merged), processor, "merged")
        base_name = str(job.base)
        untuned = load_strictly(base_name, base_name, quiet=True, dtype=torch.float32, trust_remote_code=trust_remote_code)
        base = answer_logits(to_best_device(untuned), processor, job.samples, "the base")
        del untuned
        if compare(base, folded.logits).largest <= TOLERANCE / 100:
            raise CheckFailed("the merged model equals the base: the adapters changed nothing, or cancel")
        parity = job.write(fresh, merged, processor, folded, base, folded)
        del merged
        parity = job.write_quantized(folded, processor, parity)
        names = [str(trained.path if trained.is_checkpoint else trained.run.path) for trained, _ in runs]
        weights = [weight for _, weight in runs]
        job.finish(asdict(parity) | {"adapters": list(zip(names, weights, strict=True))}, first)
    return parity


def release_adapter(
    path: Path, out: Path, *, overwrite: bool = False, count: int = 32, trust_remote_code: bool = False
) -> dict[str, Any]:
    """Release a run as its adapter and, unless that is on the hub, its base: for methods that cannot be folded.

    `out` gets `adapter/`, `base/`, and a card that shows how to load them. They are loaded back that way and compared with
    the run's own adapter, which must give the same logits.

    Returns:
        `samples`, `max_logit_difference`, `same_answers`, `merge_step`, `merge_steps`.

    Raises:
        UserError: no adapter in the run, or an `out` that must not be replaced.
        CheckFailed: what was released differs from the run.
    """
    source = locate_run_adapter(path)
    run = source.run
    recipe = load_recipe(run.recipe)
    job = _Job(recipe, ExportOptions(), count, trust_remote_code=trust_remote_code)
    base = Path(read_adapter_base(source.path))
    needed = [path, run.path, base, *needed_paths(recipe)]
    with report_removed_checkpoint(source), replaced_directory(out, overwrite, MANIFEST, needed) as fresh:
        for folder in (source.path, *([base] if base.is_dir() else [])):
            check_links_stay(folder)
        model, processor = load_trained(source, torch.float32, trust_remote_code=trust_remote_code)
        expected = job.collect_outputs(to_best_device(model), processor, "as trained, in fp32")
        if base.is_dir():
            shutil.copytree(base, fresh / "base")
        # A base in the release is found beside the adapter, wherever the release goes.
        export_adapter(source, processor, fresh / "adapter", base="base" if base.is_dir() else str(base))
        result = job.collect_outputs(*_placed(job.load(fresh / "adapter")), "the release")
        figures = _figures(expected, result)
        if figures["max_logit_difference"] > 1e-6 or figures["same_answers"] < figures["samples"]:
            raise CheckFailed(f"the released adapter differs from the run's: {figures}")
        summary = read_weights_summary(source)
        steps = {"merge_step": source.step or summary.get("steps"), "merge_steps": summary.get("steps")}
        card = adapter_card(recipe, summary | steps, run, figures, base.is_dir())
        (fresh / "README.md").write_text(card, encoding="utf-8")
        write_manifest(fresh, step=steps["merge_step"], steps=steps["merge_steps"])
    return figures | steps


def parity_samples(recipe: Recipe, count: int) -> list[Sample]:
    """Up to `count` samples spread over the recipe's held-out data, or its training data, not augmented, when it has none."""
    plain = tuple(source.model_copy(update={"augment": None}) for source in recipe.data.train)
    samples = (
        IndexedSamples(recipe.evaluate.data) if recipe.evaluate else open_samples(recipe.data.model_copy(update={"train": plain}))
    )
    return [handle() for handle in islice(samples.subset(count), count)]


class _Job:
    """What is asked of every model of one merge, and how the result is written."""

    def __init__(
        self, recipe: Recipe, form: ExportOptions, count: int, base: str | None = None, trust_remote_code: bool = False
    ) -> None:
        if count < 1:
            raise UserError(f"--samples {count}: a release is compared on at least one sample")
        if not re.fullmatch(r"\d+[KMGT]I?B", form.max_shard_size.upper()):
            raise UserError(f"--max-shard-size {form.max_shard_size}: expected a size such as 5GB")
        self.samples = parity_samples(recipe, count)
        self.form = form
        self.dtype = form.dtype or ("fp32" if recipe.model.precision == "fp32" else "bf16")
        self.base = base  # the checkpoint from which tensors are carried over
        self.written: list[Path] = []
        self._trusts = trust_remote_code
        self._recipe = recipe
        self._unread: dict[str, Path] = {}
        self._carried: dict[str, Any] = {}
        self._new_tokens = recipe.evaluate.max_new_tokens if recipe.evaluate else DEFAULT_MAX_NEW_TOKENS

    def open(self, stack: ExitStack, out: Path, overwrite: bool, needed: Sequence[Path]) -> Path:
        """Temporary directories for the release and, if it is asked for, the quantized one; refused before anything is loaded."""
        self.written = [stack.enter_context(replaced_directory(out, overwrite, CHECKPOINT_MARK, needed))]
        if self.form.quantize is not None:
            beside = out.with_name(f"{out.name}-{self.form.quantize}")
            self.written.append(stack.enter_context(replaced_directory(beside, overwrite, CHECKPOINT_MARK, needed)))
        return self.written[0]

    def load(self, released: Path) -> tuple[Any, ProcessorMixin]:
        """What was written, loaded back from disk in fp32."""
        return load_trained(released, torch.float32, trust_remote_code=self._trusts)

    def collect_outputs(self, model: PreTrainedModel, processor: ProcessorMixin, what: str) -> ModelOutputs:
        return collect_outputs(model, processor, self.samples, self._new_tokens, what)

    def write(
        self,
        fresh: Path,
        merged: PreTrainedModel,
        processor: ProcessorMixin,
        adapter: ModelOutputs,
        base: list[torch.Tensor],
        folded: ModelOutputs,
    ) -> Parity:
        """Write the model in its dtype, load it back in fp32, and compare."""
        merged.to(DTYPES[self.dtype]).save_pretrained(fresh, max_shard_size=self.form.max_shard_size)
        processor.save_pretrained(fresh)
        if self.base is not None:
            self._unread = find_unread_tensors(merged, self.base)
            self._carried = append_tensors(self._unread, fresh, self.form.max_shard_size)
            if self._carried:
                print(describe_unread_tensors(merged, self._carried))
        merged.to("meta")  # its memory is wanted for the model that is loaded back
        gc.collect()
        result = self.collect_outputs(*_placed(self.load(fresh)), "the release")
        difference = compare(adapter.logits, result.logits)
        parity = Parity(
            merge_samples=len(self.samples),
            merge_dtype=self.dtype,
            merge_max_logit_difference=difference.largest,
            merge_mean_logit_difference=difference.mean,
            merge_kl=difference.kl,
            merge_same_answers=count_same_answers(adapter, result),
            merge_unrounded_difference=compare(adapter.logits, folded.logits).largest,
            merge_tolerance=TOLERANCE,
            merge_difference_from_base=compare(base, result.logits).largest,
            merge_copied_tensors=tuple(self._carried),
        )
        _check_release(parity, change=compare(base, adapter.logits).mean)
        return parity

    def write_quantized(self, merged: ModelOutputs, processor: ProcessorMixin, parity: Parity) -> Parity:
        """Write the quantized release beside the whole one, if it is asked for."""
        kind = self.form.quantize
        if kind is None:
            return parity
        whole, fresh = self.written
        config = quantization_config(str(whole), kind, self._trusts)
        where = {"": torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")}
        model = AutoModelForImageTextToText.from_pretrained(
            str(whole),
            dtype=torch.bfloat16,
            quantization_config=config,
            device_map=where,
            trust_remote_code=self._trusts,
        )
        prepare_quantized(model)
        model.save_pretrained(fresh, max_shard_size=self.form.max_shard_size)
        processor.save_pretrained(fresh)
        append_tensors(self._unread, fresh, self.form.max_shard_size)
        expected = self.collect_outputs(model, processor, kind)
        reloaded = AutoModelForImageTextToText.from_pretrained(str(fresh), device_map=where, trust_remote_code=self._trusts)
        prepare_quantized(reloaded)
        result = self.collect_outputs(reloaded, processor, f"the {kind} release")
        if (apart := compare(expected.logits, result.logits).largest) > TOLERANCE:
            raise CheckFailed(f"the {kind} release, loaded back from disk, differs from what was written: by {apart:.3g}")
        return replace(parity, quantized=_figures(merged, result))

    def finish(self, summary: dict[str, Any], run: RunDirectory) -> None:
        """Write the cards and the manifests."""
        about = {"step": summary["merge_step"], "steps": summary["merge_steps"], "copied_tensors": self._carried}
        for folder in self.written:
            (folder / "README.md").write_text(model_card(self._recipe, summary, run), encoding="utf-8")
            write_manifest(folder, **about)


def _placed(loaded: tuple[Any, ProcessorMixin]) -> tuple[Any, ProcessorMixin]:
    return to_best_device(loaded[0]), loaded[1]


def _figures(one: ModelOutputs, other: ModelOutputs) -> dict[str, Any]:
    difference = compare(one.logits, other.logits)
    return {
        "samples": len(one.answers),
        "max_logit_difference": difference.largest,
        "mean_logit_difference": difference.mean,
        "kl": difference.kl,
        "same_answers": count_same_answers(one, other),
    }


def _check_merge(adapter: ModelOutputs, base: list[torch.Tensor], folded: ModelOutputs) -> None:
    if compare(base, folded.logits).largest <= TOLERANCE / 100:
        raise CheckFailed("the merged model equals the base: tuning changed nothing, or the adapter was not folded in")
    apart = compare(adapter.logits, folded.logits).largest
    if apart > TOLERANCE:
        raise CheckFailed(
            f"the merged model differs from the adapter: largest logit difference {apart:.3g}, more than {TOLERANCE:g}"
        )
    if (same := count_same_answers(adapter, folded)) < len(adapter.answers):
        raise CheckFailed(
            f"the merged model answers {len(adapter.answers) - same} of {len(adapter.answers)} samples unlike the adapter"
        )


def _check_release(parity: Parity, change: float) -> None:
    exact = parity.merge_dtype == "fp32"
    apart, allowed = parity.merge_mean_logit_difference, ROUNDING * change
    if exact and (parity.merge_max_logit_difference > TOLERANCE or parity.merge_same_answers < parity.merge_samples):
        raise CheckFailed(
            f"the merged model, loaded back from disk, differs from the adapter: largest logit difference "
            f"{parity.merge_max_logit_difference:.3g}, {parity.merge_same_answers} of {parity.merge_samples} answers the same"
        )
    if not exact and not apart <= allowed:  # also when a logit is not finite
        raise CheckFailed(
            f"rounding the merged model to {parity.merge_dtype} changes its logits by {apart:.3g} on average, more than "
            f"{allowed:.3g}, half of what the adapter changed"
        )
