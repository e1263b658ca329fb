"""The main job, from a recipe to a run directory; read it top to bottom and you know the program.

Runs as `mmtune train RECIPE [key=value ...]` and as `accelerate launch mmtune/train.py RECIPE [key=value ...]`.
"""

import os
import sys

if not __package__:  # launched as a file: its own folder comes first on the path and would shadow library names
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    sys.path.insert(0, os.path.dirname(here))
    from mmtune.console.library_output import configure_console

    configure_console()  # before the imports below have their say

import shutil
import signal
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from mmtune.chat_templates.resolving import use_chat_template
from mmtune.console.library_output import rank_prefix
from mmtune.data.batching.sample_stream import SampleStream
from mmtune.data.data_report import NO_SAMPLE, DataReport
from mmtune.data.dataset import IndexedSamples, check_rows, open_samples
from mmtune.data.encoding.encode import check_chat_template
from mmtune.distributed.context import (
    DistributedContext,
    check_launch,
    check_same,
    check_strategy,
    configure_fsdp,
    init_distributed,
    is_launched,
    launched_with_deepspeed,
)
from mmtune.distributed.sharded_parameters import full_state_dict, gathered_forward
from mmtune.evaluation.evaluate import check_questions, evaluate, read_answers, score, scores_to_dicts, write_answers
from mmtune.evaluation.run_report import write_report
from mmtune.evaluation.scores import print_scores
from mmtune.methods.method_table import refusal
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.checkpoints.locate_base import CHECKPOINT_MARK, UNTRAINED, locate_base, resolve_base
from mmtune.models.checkpoints.unread_tensors import append_tensors, describe_unread_tensors, find_unread_tensors
from mmtune.models.components import find_components
from mmtune.models.generation import DEFAULT_MAX_NEW_TOKENS, generation_settings, unused_settings
from mmtune.models.load import (
    ADAPTER_CONFIG,
    base_config,
    base_model_type,
    load_bare_processor,
    load_base,
    load_weights,
)
from mmtune.models.packed_attention import check_packable_family
from mmtune.models.quantize import QUANTIZED
from mmtune.objectives.objective_table import build_objective
from mmtune.objectives.sft import pad_token_id
from mmtune.planning.plan_cache import signatures
from mmtune.preflight import check_recipe
from mmtune.recipe.recipe import ModelSection, Recipe
from mmtune.release.model_card import model_card
from mmtune.run_directory import RunDirectory, check_output_dir, clear_leftover, new_run, peak_memory_mb, step_of, versions
from mmtune.training.callbacks import DisableInputRequireGrads, RecordMetrics, StopOnSignal, draw_loss_curve
from mmtune.training.checkpoint import (
    REPORT,
    check_resumable,
    check_same_recipe,
    flat,
    last_checkpoint,
    named_checkpoint,
    truncate_to_step,
)
from mmtune.training.dataloader import first_batches, optimizer_steps, order_rows, plan_rows, prove_packed_rows, rows_to_take
from mmtune.training.trackers import reporters, start_trackers
from mmtune.training.trainer import TuningTrainer
from mmtune.tuning.apply import (
    apply_tuning,
    count_parameters,
    learning_rates,
    print_parameters,
    print_trained_modules,
    trained_modules,
)
from mmtune.tuning.peft_config import frozen_parts, keeps_adapter
from mmtune.tuning.save import initial_factors, save_tuned
from mmtune.utils.errors import RecipeValueError, Stopped, UserError, errors_at_key
from mmtune.utils.files import check_writable, linked_directory, replaced_directory


def train(recipe: Recipe, command: list[str], overwrite: bool = False, resume: bool | Path = False) -> dict[str, Any]:
    """Tune a model by a recipe.

    Args:
        recipe: what to train, on what, how, and where to leave it.
        command: kept in the run's `environment.json`.
        overwrite: replace an earlier run at the recipe's `output_dir`.
        resume: go on with the run at the recipe's `output_dir`, from its last good checkpoint, or from the one at this path. True
            begins a run that has none yet, and leaves a finished one alone, so that one command can be given until it is done.

    Returns:
        The figures that `summary.json` holds; in processes other than the first, nothing.

    Raises:
        UserError: the recipe or its data are at fault; before any weight is loaded where that can be known.
        CheckFailed: the loss became NaN or infinite.
    """
    # What goes in: the files are there, the rows make sense.
    check_recipe(recipe)
    check_launch(recipe.model.precision, recipe.train.get("deepspeed"))
    earlier = RunDirectory(Path(recipe.output_dir))
    if not (rank_prefix() or resume or overwrite):  # in the first process
        clear_leftover(RunDirectory(linked_directory(earlier.path)))
    checkpoint = None
    if resume is True and earlier.summary.is_file():
        check_same_recipe(recipe, earlier)
        print(f"resume: {earlier.path} is finished; --overwrite trains it again")
        return earlier.read_summary()
    if resume:
        checkpoint = last_checkpoint(earlier) if resume is True else named_checkpoint(earlier, Path(resume))
    if checkpoint is None:
        if resume:
            print(f"resume: {earlier.path} has no checkpoint yet, so it begins; train.save_strategy and save_steps write them")
            overwrite = True  # what a start has left
        check_output_dir(recipe, overwrite)
    arguments = build_training_arguments(recipe)
    if arguments.process_index == 0:
        with errors_at_key("output_dir"):
            check_writable(earlier.path if checkpoint is not None else earlier.path.parent)
    samples = open_samples(recipe.data)
    data_report = DataReport(rows=rows_to_take(samples, arguments), streamed=recipe.data.stream)
    check_rows(samples, data_report, recipe.data.check_rows)
    data_report.stop_past(recipe.data.max_bad_fraction)
    if recipe.evaluate:
        check_questions(recipe.evaluate)
    is_sharded = recipe.model.precision not in QUANTIZED and not recipe.tune.needs_whole_weights
    dist = init_distributed(arguments, recipe.model.precision, is_sharded)
    mine = {**flat(recipe.model_dump(mode="json")), **versions(), "rows": data_report.rows}
    check_same(dist, {**mine, "checkpoint": checkpoint and checkpoint.name})  # a shared file system may lag behind in one
    check_method(recipe, dist)
    if dist.fsdp:
        check_fsdp(recipe, arguments, checkpoint)
    if checkpoint is not None:
        check_resumable(recipe, earlier, checkpoint, dist)
    processor = load_bare_processor(recipe.model)
    check_chat_template(processor)
    objective = build_objective(recipe, processor)
    lengths = None
    if recipe.data.planned and isinstance(samples, IndexedSamples):
        lengths = plan_rows(samples, recipe, processor, data_report, dist)
    elif recipe.data.stream and recipe.data.max_tokens is not None and recipe.data.over_length == "error":
        print(
            "data.stream: rows are not counted beforehand, so one that is longer than data.max_tokens stops the run at its batch"
        )
    print(f"training: {dist.layout}, {arguments.device}")
    set_seed(arguments.seed)

    # The base.
    model, processor = load_base(recipe.model, arguments.seed, processor)
    components = find_components(model)
    encoder = objective.encoder(processor, recipe.data)
    collator = objective.collator(processor, recipe.data.packing, always_images=dist.size > 1)
    rows, batches = order_rows(samples, encoder, collator, recipe.data, arguments, dist, lengths)
    adapts = keeps_adapter(recipe.tune)
    before = None
    with new_run(recipe, command, overwrite, dist) if checkpoint is None else nullcontext(earlier) as run:
        if dist.is_main_process:
            data_report.write(run.data_report)
        model = materialize_base(model, processor, recipe.model, run.base if adapts else None, dist)
        if recipe.model.precision not in QUANTIZED:  # bitsandbytes has put those where they stay
            model.to(arguments.device)

        # What it can do before tuning.
        if checkpoint is not None and run.answers("before").is_file():
            before = read_answers(run.answers("before"))
        elif recipe.evaluate and recipe.evaluate.before:
            with gathered_forward(model):
                before = evaluate(model, processor, recipe.evaluate, dist, "before tuning")
            if dist.is_main_process:
                write_answers(before, run.answers("before"))

        # What trains.
        steps = optimizer_steps(arguments, batches)
        sample = first_batches(samples, encoder, pad_token_id(processor))
        set_seed(arguments.seed)  # what is drawn does not hang on how the base came here
        kept_frozen = frozen_parts(model, components, recipe.tune)
        model = apply_tuning(model, components, recipe.tune, steps=steps, batches=sample)
        components = find_components(model)
        counts = count_parameters(model, components, recipe.tune, arguments.learning_rate)
        print_trained_modules(trained_modules(model))
        print_parameters(counts)
        for part in kept_frozen:
            print(f"tune.projector: {part} stays frozen: PEFT saves modules beside an adapter, and it is a parameter of its own")
        initial = initial_factors(model)
        if recipe.data.packing and isinstance(samples, IndexedSamples):
            with gathered_forward(model):
                prove_packed_rows(model, samples, encoder, pad_token_id(processor))

    # Training.
    stop = StopOnSignal(dist)
    trainer = TuningTrainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=collator,
        processing_class=processor,
        callbacks=[RecordMetrics(run.metrics), DisableInputRequireGrads(), stop],
        objective=objective,
        data_report=data_report,
        max_bad_fraction=recipe.data.max_bad_fraction,
        max_nonfinite_steps=recipe.data.max_nonfinite_steps,
        dist=dist,
        learning_rates=learning_rates(model, components, recipe.tune, arguments.learning_rate),
        dummy_batch=objective.dummy_batch(processor),
        batches=batches,
        source_names=samples.names if len(recipe.data.train) > 1 else (),
        data_files=signatures(recipe.data.train) if dist.is_main_process else {},  # who keeps the checkpoints
        initial=initial,
    )
    check_strategy(trainer.accelerator, dist, recipe.model.precision)
    if dist.fsdp:
        configure_fsdp(trainer.accelerator, model)
    for shown_twice in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown_twice)
    start_trackers(trainer, run)
    start = time.perf_counter()
    if checkpoint is not None:
        print(f"resume: from {checkpoint}, after {step_of(checkpoint)} steps")
        restore_training_state(checkpoint, run, data_report, rows, arguments)
    never_trained = False
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    except (UserError, RuntimeError):  # such as a row that stops the run, or a first batch that memory does not hold
        never_trained = checkpoint is None and trainer.state.global_step == 0
        raise
    finally:
        stop.restore()
        if dist.is_main_process and never_trained:  # nothing is left that would be in the way of the next start
            shutil.rmtree(run.path, ignore_errors=True)
        elif dist.is_main_process:
            data_report.write(run.data_report)
    if stop.received is not None:
        name = signal.Signals(stop.received).name
        kept = "under FSDP2 there is no checkpoint" if dist.fsdp else "--resume goes on from there"
        raise Stopped(stop.received, f"by {name} after step {trainer.state.global_step}; {kept}")
    if not trainer.supervised and checkpoint is None:
        raise UserError(f"no row that was taken could train: {data_report.summary()}; see {run.data_report}")
    train_seconds = round(time.perf_counter() - start, 1)
    print(data_report.summary())

    # What comes out.
    out = run.adapter if adapts else run.model
    mark = ADAPTER_CONFIG if adapts else CHECKPOINT_MARK
    with replaced_directory(out, True, mark) if dist.is_main_process else nullcontext(out) as made:
        save_tuned(model, made, initial, dist.is_main_process)
        if dist.is_main_process:
            processor.save_pretrained(made)
            model.generation_config.save_pretrained(made)  # with the chat template's stop tokens, which PEFT would not keep
            if not adapts and recipe.model.base not in (None, UNTRAINED):
                carried = append_tensors(find_unread_tensors(model, locate_base(str(recipe.model.base))), made)
                if carried:
                    print(describe_unread_tensors(model, carried))
    after = evaluate(model, processor, recipe.evaluate, dist, "after tuning") if recipe.evaluate else []
    if not dist.is_main_process:
        return {}
    answer_tokens = recipe.evaluate.max_new_tokens if recipe.evaluate else DEFAULT_MAX_NEW_TOKENS
    draw_loss_curve(run.metrics, run.loss_curve)
    figures: dict[str, Any] = {
        "train_seconds": train_seconds,
        "steps": trainer.state.global_step,
        "layout": dist.layout,
        "trainable_parameters": sum(count.trainable for count in counts),
        "total_parameters": sum(count.total for count in counts),
        "peak_memory_mb": peak_memory_mb(),
        "rows": data_report.rows,
        "dropped_over_length": len(data_report.dropped_over_length),
        "quarantined": len(data_report.quarantined),
        "skipped_steps": len(data_report.skipped_steps),
        "steps_without_samples": data_report.count_skipped(NO_SAMPLE),
        "generation": generation_settings(model, processor, answer_tokens),
        "generation_not_used": unused_settings(model),
    }
    if recipe.evaluate:
        write_answers(after, run.answers("after"))
        tuned = score(after, recipe.evaluate)
        figures |= {
            "questions": tuned[-1].questions,
            "tuned_accuracy": tuned[-1].accuracy,
            "tuned_interval": tuned[-1].interval,
            "majority_accuracy": tuned[-1].majority_accuracy,
            "tuned_scores": scores_to_dicts(tuned),
        }
        if before:
            base = score(before, recipe.evaluate)
            figures |= {
                "base_accuracy": base[-1].accuracy,
                "base_interval": base[-1].interval,
                "base_scores": scores_to_dicts(base),
            }
    figures["peak_memory_mb"] = peak_memory_mb()
    write_report(run, recipe, figures)
    if not adapts:
        (run.model / "README.md").write_text(model_card(recipe, figures, run), encoding="utf-8")
    run.update_summary(figures)  # the last file: a run that has it is finished
    print_scores(figures)
    return figures


def check_method(recipe: Recipe, dist: DistributedContext) -> None:
    """
    Raises:
        UserError: a method or packing that does not work with the base's family or the ZeRO stage, before any weight is loaded.
    """
    if recipe.data.max_nonfinite_steps and dist.zero_stage == 0:
        raise RecipeValueError(
            "data.max_nonfinite_steps", "DeepSpeed without ZeRO takes every step, so none can be skipped; leave it out"
        )
    if recipe.model.base not in (None, UNTRAINED):
        config = base_config(recipe.model)  # refuses families that are not supported
        if recipe.data.packing:
            check_packable_family(config)
    for component, tuning in recipe.tune.components.items():
        if tuning.method == recipe.tune.method:
            reason = refusal(
                tuning.method,
                tuning.settings,
                precision=recipe.model.precision,
                model_type=base_model_type(recipe.model),
                zero_stage=dist.zero_stage,
            )
            if reason is not None:
                raise RecipeValueError(f"tune.{component}", f"{reason}")


def check_fsdp(recipe: Recipe, arguments: TrainingArguments, checkpoint: Path | None) -> None:
    """
    Raises:
        UserError: what has not been held to one process under FSDP2.
    """
    if recipe.model.precision in QUANTIZED:
        raise RecipeValueError(
            "model.precision", f"{recipe.model.precision}: FSDP2 does not divide quantized weights; launch with DDP or ZeRO"
        )
    if recipe.tune.method not in (None, "lora"):
        raise RecipeValueError(
            "tune", f"{recipe.tune.method} has not been proven under FSDP2; launch with DDP or ZeRO, or use lora"
        )
    if arguments.save_strategy != "no" or checkpoint is not None:
        raise RecipeValueError(
            "train.save_strategy",
            "a run under FSDP2 cannot go on from a checkpoint yet; leave it out, or launch with DDP or ZeRO",
        )


def restore_training_state(
    checkpoint: Path, run: RunDirectory, report: DataReport, rows: Any, arguments: TrainingArguments
) -> None:
    """Put the data, the report and the metrics where the checkpoint left them."""
    report.load(checkpoint / REPORT)
    if arguments.process_index == 0:
        truncate_to_step(run, step_of(checkpoint))
    if isinstance(rows, SampleStream):
        rows.start_at(step_of(checkpoint) * arguments.gradient_accumulation_steps)
        arguments.ignore_data_skip = True  # the stream has passed over them, unparsed


def materialize_base(model: Any, processor: Any, section: ModelSection, made: Path | None, dist: DistributedContext) -> Any:
    """Give the base a place that an adapter can name, and its precision.

    Args:
        made: where a model that was made here is written; None when the run leaves a whole model, which needs no base.

    Returns:
        The model; quantized from what was written, if it was made here for int8 or nf4.
    """
    if section.base not in (None, UNTRAINED):
        model.name_or_path = resolve_base(section.base)
    elif made is not None:
        there = (made / CHECKPOINT_MARK).exists()
        dist.barrier()  # until every process has looked
        if not there:
            with full_state_dict(model, dist.is_main_process) as state:
                if dist.is_main_process:
                    save_checkpoint(model, processor, made, state_dict=state)
            dist.barrier()
        if section.precision in QUANTIZED:
            model = load_weights(str(made), section)
            use_chat_template(model, processor, processor.chat_template)
        model.name_or_path = str(made.resolve())
    return model


def build_training_arguments(recipe: Recipe) -> TrainingArguments:
    """transformers' own arguments from the recipe's `train` section, with what mmtune decides.

    Raises:
        UserError: values that TrainingArguments refuses together.
    """
    settings: dict[str, Any] = {
        "report_to": "none",
        "logging_steps": 10,
        "save_strategy": "no",
        "dataloader_pin_memory": torch.cuda.is_available(),
        "use_cpu": not torch.accelerator.is_available(),
        "ddp_find_unused_parameters": True,  # a tower's last layers may be trained and unused, checkpointing or not
    }
    settings |= recipe.train
    settings.pop("deepspeed", None)  # `check_launch` has seen to it
    if not is_launched():  # TrainingArguments would look for the process group that a launcher sets up
        settings.pop("ddp_backend", None)
    try:
        arguments = TrainingArguments(
            **settings,
            output_dir=os.path.join(recipe.output_dir, "checkpoints"),
            # DeepSpeed's own mixed precision would round what trains: `init_distributed` has it use torch's autocast as well
            bf16=recipe.model.precision != "fp32" and not launched_with_deepspeed(),
            remove_unused_columns=False,
            label_names=["labels"],
            logging_nan_inf_filter=False,
        )
    except (ValueError, TypeError) as error:
        raise RecipeValueError("train", f"{error}") from error
    arguments.report_to = reporters(settings["report_to"])
    if arguments.n_gpu > 1:  # the Trainer would wrap the model in DataParallel, which gathers losses that are already divided
        raise UserError(
            f"one process sees {arguments.n_gpu} GPUs: give each its own (accelerate launch --multi_gpu --num_processes "
            f"{arguments.n_gpu} mmtune/train.py RECIPE), or choose one, as with CUDA_VISIBLE_DEVICES=0"
        )
    return arguments


def without_trackers(recipe: Recipe) -> Recipe:
    """The same recipe with `report_to: none`."""
    return recipe.model_copy(update={"train": {**recipe.train, "report_to": "none"}})


if __name__ == "__main__":
    from mmtune.cli.main import entry_point

    sys.exit(entry_point(["train", *sys.argv[1:]]))
