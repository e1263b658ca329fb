"""The training loop of a run: its Trainer, and what is written when it ends."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from transformers import PrinterCallback, ProcessorMixin, ProgressCallback

from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.feature_store import FeatureStore
from mmtune.data.sources.row_cache import file_signatures
from mmtune.distributed.context import check_strategy
from mmtune.distributed.fsdp import configure_fsdp
from mmtune.report.first_batch import record_first_batch
from mmtune.report.live_report import LiveReport
from mmtune.run_directory import RunDirectory, step_of
from mmtune.training.cached_features.feature_cache import FeatureCache
from mmtune.training.callbacks import DisableInputRequireGrads, RecordMetrics, StopOnSignal, UpdateReport, early_stopping
from mmtune.training.checkpoint import fixed_sources
from mmtune.training.dataloader import TrainingData, first_samples, make_batches, optimizer_steps
from mmtune.training.held_out.held_out_answers import held_out_scores
from mmtune.training.held_out.held_out_loss import HeldOutLoss
from mmtune.training.profiling.profiled_trainer import ProfiledTrainer
from mmtune.training.profiling.step_profiler import WARMUP, ProfileSettings, run_facts, traced_steps
from mmtune.training.run_inputs import RunInputs
from mmtune.training.trackers.run_trackers import RunTrackers
from mmtune.training.trainer import TuningTrainer
from mmtune.tuning.apply import TunedModel, modules_record
from mmtune.utils.errors import UserError
from mmtune.utils.files import replace_text, report_disk_errors
from mmtune.utils.hub import hub_revision


def check_profile(inputs: RunInputs) -> None:
    """Compare the number of steps to profile with the steps that the run takes, before any weight is loaded.

    Raises:
        UserError: the run has too few steps.
    """
    samples, arguments = inputs.samples, inputs.arguments
    if not inputs.profile:
        return
    batches = None
    if isinstance(samples, IndexedSamples):
        batches = make_batches(samples, inputs.recipe.data, arguments, inputs.dist, inputs.lengths)
    left = optimizer_steps(arguments, batches) - (0 if inputs.checkpoint is None else step_of(inputs.checkpoint))
    further = 1 + traced_steps(arguments.gradient_accumulation_steps)
    if (most := left - WARMUP - further) < inputs.profile:
        expected = f"expected at most {most}" if most > 0 else "the run is too short"
        raise UserError(
            f"--profile {inputs.profile}: {expected}: {left} steps are left, and a profile takes {WARMUP} before its own and "
            f"{further} after; {'lower it, or ' if most > 0 else ''}raise train.max_steps or train.num_train_epochs"
        )


def create_trainer(
    inputs: RunInputs,
    tuned: TunedModel,
    data: TrainingData,
    processor: ProcessorMixin,
    run: RunDirectory,
    feature_cache: FeatureCache | None,
    trackers: RunTrackers,
) -> TuningTrainer:
    """The Trainer of a run, with its parallelism strategy checked and its trackers started.

    Raises:
        UserError: accelerate set up another strategy than the launcher announced, or a tracker does not start.
    """
    recipe, dist = inputs.recipe, inputs.dist
    data.encoder.features = store = None if feature_cache is None else feature_cache.store
    kind: Callable[..., TuningTrainer] = TuningTrainer
    if data.spans is not None:
        settings = ProfileSettings(inputs.profile, data.spans, run, run_facts(recipe, inputs.arguments, dist, tuned.model))
        kind = partial(ProfiledTrainer, profile=settings)
    trainer = kind(
        model=tuned.model,
        args=inputs.arguments,
        train_dataset=data.rows,
        data_collator=data.collator,
        processing_class=processor,
        callbacks=[RecordMetrics(run.metrics), DisableInputRequireGrads(), *early_stopping(recipe.train)],
        data_report=inputs.data_report,
        max_bad_fraction=recipe.data.max_bad_fraction,
        max_nonfinite_steps=recipe.data.max_nonfinite_steps,
        dist=dist,
        learning_rates=tuned.learning_rates,
        rate_names={count.learning_rate: count.component for count in tuned.counts if count.learning_rate is not None},
        objective=inputs.objective,
        dummy_batch=inputs.objective.dummy_batch(processor),
        batches=data.batches,
        source_names=data.source_names,
        data_files=file_signatures(fixed_sources(recipe)) if dist.is_main_process else {},  # only it finalizes checkpoints
        initial=tuned.initial,
        feature_cache=feature_cache,
        record_batch=_batch_recorder(inputs, data, processor, run),
        **_held_out(inputs, processor, store, trackers),
    )
    check_strategy(trainer.accelerator, dist, recipe.model.precision)
    if dist.fsdp:
        configure_fsdp(trainer.accelerator, tuned.model)
    for duplicate in (ProgressCallback, PrinterCallback):  # RecordMetrics prints the same
        trainer.remove_callback(duplicate)
    trackers.start(trainer)
    if dist.is_main_process:
        revision = hub_revision(inputs.base.location)
        replace_text(run.modules, json.dumps({"base_revision": revision, **modules_record(tuned)}, indent=2) + "\n")
        trainer.add_callback(UpdateReport(LiveReport(run, recipe)))
    return trainer


def _batch_recorder(
    inputs: RunInputs, data: TrainingData, processor: ProcessorMixin, run: RunDirectory
) -> Callable[[Mapping[str, Any], Sequence[str]], None] | None:
    """Records the first batch of a new run, from the batch and the ids of its rows; None in the other processes."""
    if not inputs.dist.is_main_process or inputs.checkpoint is not None:
        return None

    def record(batch: Mapping[str, Any], rows: Sequence[str]) -> None:
        with report_disk_errors(run.first_batch):
            record_first_batch(run.first_batch, processor, inputs.recipe.data, batch, rows, first_samples(data))

    return record


def _held_out(
    inputs: RunInputs, processor: ProcessorMixin, features: FeatureStore | None, trackers: RunTrackers
) -> dict[str, Any]:
    """The Trainer's arguments for the evaluation while training."""
    rows, section, dist = inputs.held_out, inputs.recipe.evaluate, inputs.dist
    if rows is None or section is None:
        return {}
    loss = HeldOutLoss(rows, inputs.objective, processor, dist, section.batch_size, features)
    if not section.while_training.answers:
        return {"held_out": loss}
    scores = partial(held_out_scores, processor=processor, section=section, rows=rows, dist=dist, on_answers=trackers.add_answers)
    return {"held_out": loss, "held_out_scores": scores}


def run_training(trainer: TuningTrainer, inputs: RunInputs, run: RunDirectory, trackers: RunTrackers) -> dict[str, Any]:
    """Train to the end, and write the data report however training ends.

    A new run that fails before its first step leaves nothing behind.

    Returns:
        `train_seconds` and `steps`, for the summary, and those of `best_step_metrics`.

    Raises:
        Stopped: a signal ended training after a complete step.
        UserError: no usable training sample, or an error of `TuningTrainer.train`.
    """
    checkpoint, report, is_main_process = inputs.checkpoint, inputs.data_report, inputs.dist.is_main_process
    stop = StopOnSignal(inputs.dist)
    trainer.add_callback(stop)
    start = time.perf_counter()
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (UserError, RuntimeError):  # such as a row that stops the run, or a first batch that does not fit into memory
        if is_main_process and checkpoint is None and trainer.state.global_step == 0:
            trackers.finish(failed=True)  # their files are among those that are removed
            shutil.rmtree(run.path, ignore_errors=True)
        raise
    finally:
        stop.restore()
        if is_main_process and run.path.is_dir():
            report.write(run.data_report)
    stop.raise_if_received(trainer.state.global_step)
    if not trainer.supervised and checkpoint is None:
        raise UserError(
            f"no usable training sample: every sampled row was dropped or quarantined; {report.summary()}; see {run.data_report}"
        )
    print(report.summary())
    seconds = round(time.perf_counter() - start, 1)
    return {"train_seconds": seconds, "steps": trainer.state.global_step, **best_step_metrics(trainer)}


def best_step_metrics(trainer: TuningTrainer) -> dict[str, Any]:
    """`best_step`, `best_metric` and `metric_for_best_model`, which are printed too; empty where nothing was evaluated."""
    state, args = trainer.state, trainer.args
    if not state.best_global_step:
        if args.load_best_model_at_end:
            print("no step was evaluated: the run keeps the weights of its last step")
        return {}
    name = f"eval_{args.metric_for_best_model}"
    note = "; the run keeps its weights" if args.load_best_model_at_end else ""
    print(f"best step: {state.best_global_step} of {state.global_step}, {name} {state.best_metric:.4f}{note}")
    return {"best_step": state.best_global_step, "best_metric": state.best_metric, "metric_for_best_model": name}
