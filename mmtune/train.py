"""The main job, from a recipe to a run directory; read it top to bottom and you know the program.

Runs as `mmtune train RECIPE [key=value ...]` and as `accelerate launch mmtune/train.py RECIPE [key=value ...]`.
"""

import os
import sys

if not __package__:  # launched as a file: its own folder comes first on the path and would shadow library names
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path[:] = [entry for entry in sys.path if os.path.abspath(entry or ".") != here]
    sys.path.insert(0, os.path.dirname(here))

import time
from typing import Any

import torch
from transformers import PrinterCallback, ProgressCallback, TrainingArguments, set_seed

from mmtune.data.dataset import Collator, DataReport, Samples, TrainingSet, check_rows
from mmtune.data.encode import check_chat_template
from mmtune.errors import UserError
from mmtune.evaluation.report import print_scores, write_report
from mmtune.evaluation.run import as_json, check_questions, evaluate, score, write_answers
from mmtune.model.checkpoint import save_checkpoint
from mmtune.model.components import find_components
from mmtune.model.load import UNTRAINED, load_base, resolve_base
from mmtune.recipe import Recipe, check_files
from mmtune.release.card import model_card
from mmtune.run_directory import check_output_dir, new_run, peak_memory_mb
from mmtune.training.callbacks import FrozenInputsStayFrozen, RecordMetrics, draw_loss_curve
from mmtune.training.trainer import TuningTrainer
from mmtune.tuning.apply import apply_tuning, count_parameters, keeps_adapter, learning_rates, print_parameters


def train(recipe: Recipe, command: list[str], overwrite: bool = False) -> dict[str, Any]:
    """Tune a model by a recipe.

    Args:
        recipe: what to train, on what, how, and where to leave it.
        command: kept in the run's `environment.json`.
        overwrite: replace an earlier run at the recipe's `output_dir`.

    Returns:
        The figures that `summary.json` holds.

    Raises:
        UserError: the recipe or its data are at fault; before any weight is loaded where that can be known.
        CheckFailed: the loss became NaN or infinite.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("this version trains in one process; launch it with --num_processes 1")

    # What goes in: the files are there, the rows make sense.
    check_files(recipe)
    check_output_dir(recipe, overwrite)
    samples = Samples(recipe.data.train)
    data_report = DataReport(rows=len(samples))
    check_rows(samples, data_report, recipe.data.check_rows)
    data_report.stop_past(recipe.data.max_bad_fraction)
    if recipe.evaluate:
        check_questions(recipe.evaluate)
    arguments = training_arguments(recipe)
    set_seed(arguments.seed)

    # The base, and what it can do before tuning.
    model, processor = load_base(recipe.model, arguments.seed)
    check_chat_template(processor)
    components = find_components(model)
    model.to(arguments.device)
    before = None
    adapts = keeps_adapter(recipe.tune)
    with new_run(recipe, command, overwrite) as run:
        data_report.write(run.data_report)
        if recipe.evaluate and recipe.evaluate.before:
            before = evaluate(model, processor, recipe.evaluate)
            write_answers(before, run.answers("before"))

        # What trains.
        if adapts:
            if recipe.model.base in (None, UNTRAINED):  # made here, so there is no directory yet for the adapter to name
                save_checkpoint(model, processor, run.base)
                model.name_or_path = str(run.base.resolve())
            else:
                model.name_or_path = resolve_base(recipe.model.base)
        model = apply_tuning(model, components, recipe.tune)
        counts = count_parameters(model, components, recipe.tune, arguments.learning_rate)
        print_parameters(counts)

    # Training.
    trainer = TuningTrainer(
        model=model,
        args=arguments,
        train_dataset=TrainingSet(samples, processor, recipe.data.max_tokens, recipe.data.over_length),
        data_collator=Collator(processor.tokenizer.pad_token_id),
        processing_class=processor,
        callbacks=[RecordMetrics(run.metrics), FrozenInputsStayFrozen()],
        data_report=data_report,
        max_bad_fraction=recipe.data.max_bad_fraction,
        learning_rates=learning_rates(model, components, recipe.tune),
    )
    for shown_twice in (ProgressCallback, PrinterCallback):
        trainer.remove_callback(shown_twice)
    start = time.perf_counter()
    try:
        trainer.train()
    finally:
        data_report.write(run.data_report)
    train_seconds = round(time.perf_counter() - start, 1)
    print(data_report.summary())

    # What comes out.
    out = run.adapter if adapts else run.model
    model.save_pretrained(out)
    processor.save_pretrained(out)
    model.generation_config.save_pretrained(out)  # with the stop tokens of the chat template, which PEFT would not keep
    draw_loss_curve(run.metrics, run.loss_curve)
    figures: dict[str, Any] = {
        "train_seconds": train_seconds,
        "trainable_parameters": sum(count.trainable for count in counts),
        "total_parameters": sum(count.total for count in counts),
        "peak_memory_mb": peak_memory_mb(),
        "rows": len(samples),
        "dropped_over_length": len(data_report.dropped_over_length),
        "quarantined": len(data_report.quarantined),
    }
    if recipe.evaluate:
        after = evaluate(model, processor, recipe.evaluate)
        write_answers(after, run.answers("after"))
        tuned = score(after, recipe.evaluate)
        figures |= {
            "questions": tuned[-1].questions,
            "tuned_accuracy": tuned[-1].accuracy,
            "tuned_interval": tuned[-1].interval,
            "majority_accuracy": tuned[-1].majority_accuracy,
            "tuned_scores": as_json(tuned),
        }
        if before:
            base = score(before, recipe.evaluate)
            figures |= {
                "base_accuracy": base[-1].accuracy,
                "base_interval": base[-1].interval,
                "base_scores": as_json(base),
            }
    summary = run.update_summary(figures | {"peak_memory_mb": peak_memory_mb()})
    write_report(run, recipe)
    if not adapts:
        (run.model / "README.md").write_text(model_card(recipe, summary, run), encoding="utf-8")
    print_scores(summary)
    print(f"run: {run.path} (report.html, summary.json, {out.name}/)")
    return summary


def training_arguments(recipe: Recipe) -> TrainingArguments:
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
    }
    settings |= recipe.train
    try:
        arguments = TrainingArguments(
            **settings,
            output_dir=os.path.join(recipe.output_dir, "checkpoints"),
            bf16=recipe.model.precision == "bf16",
            remove_unused_columns=False,
            label_names=["labels"],
            include_num_input_tokens_seen="non_padding",
            logging_nan_inf_filter=False,
        )
    except (ValueError, TypeError) as error:
        raise UserError(f"train: {error}") from error
    if arguments.n_gpu > 1:  # the Trainer would wrap the model in DataParallel, which gathers losses that are already divided
        raise UserError(f"this version trains on one GPU and sees {arguments.n_gpu}; choose one, as with CUDA_VISIBLE_DEVICES=0")
    return arguments


if __name__ == "__main__":
    from mmtune.cli import entry_point

    sys.exit(entry_point(["train", *sys.argv[1:]]))
