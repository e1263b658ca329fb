"""A training run, from a recipe to a run directory: validate, load, tune, fit, export, summarize.

Runs as `mmtune train RECIPE [key=value ...]` and as `accelerate launch mmtune/train.py RECIPE [key=value ...]`.
"""

import os
import sys

if not __package__:  # launched as a file: its own folder comes first on the path and would shadow library names
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    sys.path.insert(0, os.path.dirname(here))
    from mmtune.console.library_output import configure_console

    configure_console()  # before the imports below print warnings

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from transformers import ProcessorMixin, set_seed

from mmtune.data.data_report import DataReport
from mmtune.data.dataset import check_rows, open_samples
from mmtune.data.encoding.encoding_checks import check_encoding, label_tokens
from mmtune.distributed.context import check_same, init_distributed
from mmtune.distributed.launch import check_launch
from mmtune.evaluation.answers import Answer
from mmtune.evaluation.evaluate import check_held_out
from mmtune.evaluation.scores import print_scores
from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK
from mmtune.models.checkpoints.unread_tensors import copy_unread_tensors
from mmtune.models.load import ADAPTER_CONFIG, load_base, resolve_model
from mmtune.models.materialize import materialize_base
from mmtune.objectives.objective_table import build_objective
from mmtune.preflight import check_recipe
from mmtune.recipe.recipe import Recipe
from mmtune.release.model_card import model_card
from mmtune.report.explanations.run_explanations import check_explained, write_explanations
from mmtune.report.run_report import finished_state, stops_reported, write_report
from mmtune.run_directory import RunDirectory, new_run, peak_memory_mb, versions
from mmtune.training.cached_features.feature_cache import FeatureCache, open_feature_cache
from mmtune.training.checkpoint import check_resumable, choose_start, finished_summary, flatten, restore_training_state
from mmtune.training.dataloader import TrainingData, optimizer_steps, plan_rows, prepare_data, prove_packed_rows, rows_to_take
from mmtune.training.fit import check_profile, create_trainer, run_training
from mmtune.training.held_out.held_out_rows import plan_held_out
from mmtune.training.profiling.profile_table import profile_section
from mmtune.training.run_inputs import RunInputs
from mmtune.training.run_results import evaluate_base, evaluate_tuned, result_metrics
from mmtune.training.trackers.run_trackers import RunTrackers
from mmtune.training.training_arguments import build_training_arguments
from mmtune.tuning.apply import TunedModel, tune_model
from mmtune.tuning.peft_config import keeps_adapter
from mmtune.tuning.save import save_tuned
from mmtune.tuning.strategy_support import check_method, takes_sharded_weights
from mmtune.utils.errors import errors_at_key
from mmtune.utils.files import check_writable, replaced_directory


def train(
    recipe: Recipe, command: list[str], overwrite: bool = False, resume: bool | Path = False, profile: int = 0
) -> dict[str, Any]:
    """Tune a model by a recipe.

    Args:
        command: recorded in the run's `environment.json`.
        overwrite: replace an earlier run at the recipe's `output_dir`.
        resume: resume the run at the recipe's `output_dir`, from its last good checkpoint or from the one at this path. True
            starts a run that has no checkpoint yet and leaves a finished one alone, so that a scheduler can repeat one command.
        profile: profile this many steps after a warm-up (`mmtune.training.profiling`); the result of training is the same.

    Returns:
        The metrics of `summary.json`; in processes other than the main one, an empty dictionary.

    Raises:
        UserError: an error in the recipe or its data; before any weight is loaded where that can be known.
        CheckFailed: the loss became NaN or infinite.
    """
    check_recipe(recipe)
    check_launch(recipe.model.precision, recipe.train.get("deepspeed"))
    if resume is True and (summary := finished_summary(recipe)) is not None:
        return summary
    inputs = validate(recipe, overwrite, resume, profile)
    model, processor, data = load(inputs)
    with nullcontext(inputs.run) if inputs.checkpoint else new_run(recipe, command, inputs.overwrite, inputs.dist) as run:
        if inputs.dist.is_main_process:
            inputs.data_report.write(run.data_report)
        adapter_base = run.base if keeps_adapter(recipe.tune) else None
        model = materialize_base(model, processor, inputs.base, adapter_base, inputs.dist, inputs.arguments.device)
        before = evaluate_base(inputs, model, processor, run)
        tuned = tune(inputs, model, data)
        feature_cache = open_feature_cache(inputs, tuned.model, processor)
    with stops_reported(run, recipe, inputs.dist.is_main_process), RunTrackers(inputs, run, before) as trackers:
        metrics = fit(inputs, tuned, data, processor, run, feature_cache, trackers)
        export(inputs, tuned, processor, run)
        return summarize(inputs, tuned, processor, run, before, metrics, trackers)


def validate(recipe: Recipe, overwrite: bool, resume: bool | Path, profile: int = 0) -> RunInputs:
    """Preflight: check paths, launch environment, rows and parallelism strategy before any weight is loaded."""
    run = RunDirectory(Path(recipe.output_dir))
    checkpoint, overwrite = choose_start(recipe, overwrite, resume)
    arguments = build_training_arguments(recipe)
    if arguments.process_index == 0:
        with errors_at_key("output_dir"):
            check_writable(run.path.parent if checkpoint is None else run.path)

    samples = open_samples(recipe.data)
    data_report = DataReport(rows_to_take(samples, arguments), streamed=recipe.data.stream, held_out=samples.held_out)
    check_rows(samples, data_report, recipe.data.check_rows)
    data_report.stop_past(recipe.data.max_bad_fraction)
    check_held_out(recipe, samples)
    dist = init_distributed(arguments, recipe.model.precision, takes_sharded_weights(recipe))
    check_explained(recipe, dist)
    settings = {**flatten(recipe.model_dump(mode="json")), **versions(), "rows": data_report.rows}
    check_same(dist, {**settings, "checkpoint": checkpoint and checkpoint.name})  # a shared file system may lag behind on one
    if checkpoint is not None:
        check_resumable(recipe, run, checkpoint, dist)
    base = resolve_model(recipe.model)
    check_method(recipe, base, arguments, dist, checkpoint)
    check_encoding(base.processor)
    labels = label_tokens(base.processor, recipe.tune.labels)
    objective = build_objective(recipe, base)
    lengths = plan_rows(samples, recipe, base.processor, data_report, dist)
    print(f"training: {dist.strategy}, {arguments.device}")
    held_out = plan_held_out(recipe, base.processor, dist)
    inputs = RunInputs(
        recipe, overwrite, checkpoint, arguments, dist, samples, data_report, base, objective, lengths, held_out, labels, profile
    )
    check_profile(inputs)
    return inputs


def load(inputs: RunInputs) -> tuple[Any, ProcessorMixin, TrainingData]:
    """The base, its processor, and the training rows in their batches."""
    set_seed(inputs.arguments.seed)
    model, processor = load_base(inputs.base, inputs.arguments.seed)
    inputs.objective.load_models(inputs.recipe, inputs.arguments.device, inputs.dist)
    return model, processor, prepare_data(inputs, processor)


def tune(inputs: RunInputs, model: Any, data: TrainingData) -> TunedModel:
    """Freeze, unfreeze and wrap the model as the recipe says, and print the trainable parameters."""
    arguments = inputs.arguments
    set_seed(arguments.seed)  # initial values must not depend on how the base was loaded
    steps = optimizer_steps(arguments, data.batches)
    tuned = tune_model(
        model,
        inputs.recipe.tune,
        arguments.learning_rate,
        steps=steps,
        batches=data.first_batches(),
        label_tokens=inputs.label_tokens,
    )
    if inputs.recipe.data.packing:
        prove_packed_rows(tuned.model, data)
    return tuned


def fit(
    inputs: RunInputs,
    tuned: TunedModel,
    data: TrainingData,
    processor: ProcessorMixin,
    run: RunDirectory,
    feature_cache: FeatureCache | None,
    trackers: RunTrackers,
) -> dict[str, Any]:
    """Train with transformers' Trainer, from the checkpoint if there is one; returns metrics of `summary.json`."""
    trainer = create_trainer(inputs, tuned, data, processor, run, feature_cache, trackers)
    if inputs.checkpoint is not None:
        restore_training_state(inputs.checkpoint, run, inputs.data_report, data.rows, inputs.arguments)
    return run_training(trainer, inputs, run, trackers)


def export(inputs: RunInputs, tuned: TunedModel, processor: ProcessorMixin, run: RunDirectory) -> None:
    """Write the adapter or the full model, with its processor and generation config."""
    recipe, is_main, model = inputs.recipe, inputs.dist.is_main_process, tuned.model
    adapts = keeps_adapter(recipe.tune)
    out, mark = (run.adapter, ADAPTER_CONFIG) if adapts else (run.model, CHECKPOINT_MARK)
    with replaced_directory(out, True, mark) if is_main else nullcontext(out) as folder:
        save_tuned(model, folder, tuned.initial, is_main)
        if is_main:
            processor.save_pretrained(folder)
            model.generation_config.save_pretrained(folder)  # with the chat template's stop tokens, which PEFT would not keep
            if not adapts and inputs.base.location is not None:
                copy_unread_tensors(model, inputs.base.location, folder)


def summarize(
    inputs: RunInputs,
    tuned: TunedModel,
    processor: ProcessorMixin,
    run: RunDirectory,
    before: list[Answer],
    metrics: dict[str, Any],
    trackers: RunTrackers,
) -> dict[str, Any]:
    """Evaluate the tuned model, write the report and `summary.json`, and send the results to the trackers."""
    recipe, section = inputs.recipe, inputs.recipe.evaluate
    after = evaluate_tuned(inputs, tuned.model, processor, run)
    if not inputs.dist.is_main_process:
        return {}
    metrics |= result_metrics(inputs, tuned, processor, run, before, after)
    if section and section.explain:
        write_explanations(tuned.model, processor, section, run, before, after)
    metrics["peak_memory_mb"] = peak_memory_mb()
    write_report(run, recipe, finished_state(metrics), summary=metrics, profile=profile_section(run))
    if not keeps_adapter(recipe.tune):
        (run.model / "README.md").write_text(model_card(recipe, metrics, run), encoding="utf-8")
    run.update_summary(metrics)  # the last file: a run that has it is finished
    print_scores(metrics)
    trackers.add_results(metrics, after)
    return metrics


if __name__ == "__main__":
    from mmtune.cli.main import entry_point

    sys.exit(entry_point(["train", *sys.argv[1:]]))
