"""Run a recipe from end to end in a minute: tiny random weights of the same families, a few rows in the same formats.

It finds what would otherwise fail hours in: a setting that the libraries reject, a target that matches nothing, a format that
the template does not read, an adapter that does not load back, a merge that differs. It needs no network and no weights. Under a
launcher it runs in several processes, on the CPU too, and finds what a parallelism strategy does not support.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from mmtune.data.sources.reader import example_rows, write_rows
from mmtune.data.sources.source import Row
from mmtune.data.templates.template import DataTemplate, load_data_template
from mmtune.distributed.accelerate_private import fsdp_on_cpu
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext, init_distributed
from mmtune.distributed.deepspeed_private import disable_sharded_construction
from mmtune.distributed.launch import check_launch, is_launched, launched_with_deepspeed, launched_with_fsdp
from mmtune.evaluation.metrics.metric_table import is_held_out_loss
from mmtune.evaluation.predictions.answering import generate_answers
from mmtune.methods.method_table import METHODS
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.checkpoints.locate_base import local_folder
from mmtune.models.load import base_config, load_base, load_trained, resolve_model
from mmtune.models.meta_model import read_model_config
from mmtune.models.tiny.shrunk_base import local_files, write_shrunk_base
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.models.tiny.tiny_models import DECODER, tiny_family, write_tiny_language, write_tiny_vision
from mmtune.recipe.recipe import ModelSection, Recipe, Source, load_recipe
from mmtune.release.merge import ExportOptions, merge, parity_samples, release_adapter
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.training.training_arguments import build_training_arguments, without_trackers
from mmtune.utils.errors import UserError

ROWS = 4


def rehearse(recipe: Recipe) -> dict[str, Any]:
    """Load, take one optimizer step, save, load back, answer, and merge where there is an adapter, in a temporary folder.

    Under a launcher all processes train together, with the launcher's parallelism strategy. The main process then does the rest
    alone, as after a real run.

    Returns:
        The rehearsed run's figures; in processes other than the first, nothing.

    Raises:
        UserError, CheckFailed: whatever the real run would raise.
    """
    with fsdp_on_cpu() if launched_with_fsdp() else nullcontext():
        dist = _join(recipe)
        with _shared_folder(dist) as place:
            file = _write_small(recipe, place, dist) if dist.is_main_process else None
            small = load_recipe(dist.broadcast_object(file))
            summary = train(small, ["mmtune", "train", "--rehearse"])
            disable_sharded_construction()  # after ZeRO-3, so that one process can load the model alone
            if dist.is_main_process:
                summary |= _use(small, place)
            dist.barrier()
            return summary


def _join(recipe: Recipe) -> DistributedContext:
    """The processes of the launcher, which know each other before there is a small recipe to train."""
    if not is_launched():
        if "deepspeed" in recipe.train:
            print(
                "rehearsal: train.deepspeed is left out in one process; start several (torchrun or accelerate launch) to try it"
            )
        return SINGLE_PROCESS
    if os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]) != os.environ["WORLD_SIZE"]:
        raise UserError("a rehearsal's files are temporary ones of one machine: launch it on one machine, with several processes")
    check_launch(recipe.model.precision, recipe.train.get("deepspeed"))
    if launched_with_fsdp() and not torch.accelerator.is_available():
        print("rehearsal: FSDP2 shards on the CPU, which accelerate leaves to GPUs; the run itself needs them")
    arguments = build_training_arguments(without_trackers(recipe))
    return init_distributed(arguments, recipe.model.precision)


@contextmanager
def _shared_folder(dist: DistributedContext) -> Iterator[Path]:
    """A temporary folder of all processes, which the first one makes and removes, however they end."""
    with ExitStack() as stack:
        folder = None
        if dist.is_main_process:
            stack.enter_context(dist.unwinding())
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="mmtune-rehearsal-"))
        yield Path(dist.broadcast_object(folder))


def _use(small: Recipe, place: Path) -> dict[str, Any]:
    """Load the trained model back, ask it, and release it."""
    run = RunDirectory(Path(small.output_dir))
    model, processor = load_trained(run.path)
    answers = generate_answers(model, processor, parity_samples(small, 2), max_new_tokens=4, batch_size=2)
    print(f"loaded back and asked: {len(answers)} answers")
    method = METHODS.get(str(small.tune.method))
    figures: dict[str, Any] = {}
    if run.adapter.is_dir() and (method is None or method.mergeable):
        # One step from random weights changes less than bf16's rounding, which is an error of a real merge.
        parity = merge(run.path, place / "merged", options=ExportOptions(dtype="fp32"), count=2)
        figures = asdict(parity)
        print(f"merged: largest logit difference {parity.merge_max_logit_difference:.2g}")
    elif run.adapter.is_dir():
        released = release_adapter(run.path, place / "released", count=2)
        figures = {"released": released}
        print(f"released beside its base: largest logit difference {released['max_logit_difference']:.2g}")
    print("rehearsal passed: the recipe runs from end to end; the figures above are those of random weights and made-up rows")
    return figures


def _write_small(recipe: Recipe, place: Path, dist: DistributedContext) -> Path:
    """The same recipe with tiny models, as a file, so that it is read and checked like any other."""
    small: dict[str, Any] = json.loads(json.dumps(recipe.model_dump(mode="json", exclude_none=True)))
    _shrink_model(recipe, small["model"], place)
    if not launched_with_deepspeed():  # whose configuration may name the recipe's
        small["train"] |= {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 1}
    each = small["train"].get("per_device_train_batch_size", 8) * small["train"].get("gradient_accumulation_steps", 1)
    _shrink_data(recipe.data.train, small["data"]["train"], place / "train", max(ROWS, each * dist.size))
    if recipe.evaluate:
        sources = recipe.evaluate.sources
        small["evaluate"]["data"] = [source.model_dump(mode="json", exclude_none=True) for source in sources]
        _shrink_data(sources, small["evaluate"]["data"], place / "evaluate", max(ROWS, dist.size))
        small["evaluate"]["tasks"] = []  # their files may be on another machine
        small["evaluate"]["leakage"] = "warn"  # all rows are copies of the template's example
        small["evaluate"]["max_new_tokens"] = 4
    if recipe.objective.models:
        section = ModelSection.model_validate(small["model"])
        layers = read_model_config(section).get_text_config().num_hidden_layers
        small["objective"] = recipe.objective.for_rehearsal(_tiny_model(section, place / "reference"), layers)
    own_tokenizer = recipe.model.base is not None and local_files(recipe.model.base) is not None
    if recipe.data.max_tokens is not None and not own_tokenizer:  # a byte-level tokenizer counts more tokens than the real one
        small["data"]["max_tokens"] = 20 * recipe.data.max_tokens
    language = small["tune"]["language"]
    if language.get("adapter_layers"):
        language["adapter_layers"] = min(language["adapter_layers"], DECODER["num_hidden_layers"])
    if recipe.tune.labels and not own_tokenizer:
        print("rehearsal: soft_verbalizer is left out, because the byte-level tokenizer has several tokens for a label")
        del language["soft_verbalizer"]
        if not language.get("target_modules", True):  # the labels trained alone
            del language["target_modules"]
    small["train"] |= {
        "max_steps": 1,
        "warmup_steps": 0,
        "dataloader_num_workers": 0,
        "logging_steps": 1,
        "report_to": "none",
    }
    if small["train"].get("save_strategy", "no") != "no":
        small["train"] |= {"save_strategy": "steps", "save_steps": 1}
    if recipe.evaluates_while_training:
        small["train"] |= {"eval_strategy": "steps", "eval_steps": 1, "eval_delay": 0}
        if is_held_out_loss(recipe.best_metric):  # of a source, by its file
            small["train"]["metric_for_best_model"] = "loss"
    if not is_launched():
        small["train"].pop("deepspeed", None)
    elif isinstance(recipe.train.get("deepspeed"), str):
        small["train"]["deepspeed"] = str(Path(recipe.train["deepspeed"]).absolute())
    small["output_dir"] = str(place / "run")
    path = place / "recipe.yaml"
    path.write_text(json.dumps(small, indent=1), encoding="utf-8")  # JSON is YAML
    return path


def _shrink_model(recipe: Recipe, section: dict[str, Any], place: Path) -> None:
    base = recipe.model.base
    if base is None:
        assert recipe.model.vision is not None and recipe.model.language is not None  # the recipe holds this
        vision = write_tiny_vision(tiny_family(recipe.model.vision, "vision"), place / "vision")
        language = write_tiny_language(tiny_family(recipe.model.language, "language"), place / "language")
        section |= {"vision": str(vision), "language": str(language), "projector": "mlp"}
    elif not base.startswith("builtin:"):
        if local_folder(base) is not None:
            base_config(recipe.model)  # an error for unsupported families
        if (files := local_files(base)) is not None:
            section["base"] = str(
                write_shrunk_base(base, files, place / "base", trust_remote_code=recipe.model.trust_remote_code)
            )
            return
        family = tiny_family(base, "base")
        section["base"] = str(write_tiny_base(BASES[family], place / "base"))
        print(
            f"rehearsal: {base} is not on this machine; the tiny {family} stands in for it, so its own tokenizer, "
            "chat template and image sizes are not rehearsed"
        )
        if section.get("chat_template") is None:
            section["chat_template"] = BASES[family].required_template


def _tiny_model(section: ModelSection, path: Path) -> str:
    """A full model like the tiny base: the base itself, or a model assembled from the same components."""
    if section.base is not None and not section.base.startswith("builtin:"):
        return section.base
    if section.base is not None:
        return "builtin:tiny-llava"
    model, processor = load_base(resolve_model(section), seed=1)
    save_checkpoint(model, processor, path)
    return str(path)


def _shrink_data(sources: Sequence[Source], sections: list[dict[str, Any]], place: Path, count: int) -> None:
    """Replace the data of sources by rows from the templates' examples, with an image for every path in them."""
    for number, (source, section) in enumerate(zip(sources, sections, strict=True)):
        folder = place / str(number)
        folder.mkdir(parents=True)
        template = load_data_template(source.template)
        section |= _stand_in(source, template, folder / "rows.json", count, seed=number)
        if source.shots is not None:
            other = load_data_template(source.shots.template or source.template)
            shots = _stand_in(source, other, folder / "shots.json", source.shots.count + 1, seed=number)
            section["shots"] = {"count": source.shots.count, "template": source.shots.template, "same_image": True, **shots}
        if source.verbalizer is not None and template.verbalizer is not None:
            label = template.verbalizer.label_of("example", template.example, template.example)
            section["verbalizer"] = {label: next(iter(source.verbalizer.values())), **source.verbalizer}
        for name in ("limit", "where", "held_out", *(("join",) if template.join is None or template.join.same_file else ())):
            section.pop(name, None)


def _stand_in(source: Source, template: DataTemplate, path: Path, count: int, seed: int) -> dict[str, str]:
    """Write rows from the template's example, with their images; returns the keys of a source."""
    rows = example_rows(template, count)
    for name in dict.fromkeys(name for row in rows for name in example_images(template, row, dict(source.values or {}))):
        picture = (path.parent / name).resolve()
        if not picture.is_relative_to(path.parent.resolve()):
            raise UserError(f"template {source.template}: its example names {name}, outside of the media root")
        draw_picture(picture, seed=seed)
    return {**write_rows(template, rows, path), "media_root": str(path.parent)}


def example_images(template: DataTemplate, row: Row | None = None, values: Mapping[str, str] | None = None) -> list[str]:
    """The image files that a row names.

    Args:
        template: reads the row.
        row: in the template's format; None: its example.
        values: what the source gives for the names that the template leaves open.
    """
    row = template.example if row is None else row
    paths: list[str] = []
    suffixes = Image.registered_extensions()

    def walk(value: Any) -> None:
        if isinstance(value, dict):
            for item in value.values():
                walk(item)
        elif isinstance(value, list):
            for item in value:
                walk(item)
        elif isinstance(value, str) and Path(value).suffix.lower() in suffixes and "\n" not in value:
            paths.append(value)

    if template.conversation is None:
        paths = [name for kind, name in template.columns().media_values(row, values) if kind == "image"]
    else:
        walk(row)
    return list(dict.fromkeys(paths))


def draw_picture(path: Path, seed: int) -> None:
    """A small picture of random pixels."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size=(48, 64, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
