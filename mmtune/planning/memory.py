"""How much memory a recipe's training step will take, before anything but configs is downloaded.

The real model class runs a real forward pass, backward pass and optimizer step on fake tensors: they have shapes, dtypes and
storages, and no data. What autograd saves, what checkpointing drops and what autocast copies are therefore counted as they
happen, for every family and method alike; nothing here knows a model's layers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import PeftModel
from PIL import Image
from rich.table import Table
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from transformers import (
    AutoImageProcessor,
    Trainer,
    TrainingArguments,
)

from mmtune.console.styled_console import StyledConsole
from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.models.compatibility import (
    read_image_processor,
    read_vision_tower,
)
from mmtune.models.components import find_components, linear_modules
from mmtune.models.fake_tensors import (
    MemoryTracker,
    QuantizedLinear,
    bnb_state_bytes,
    make_prompt_tokens_real,
    suppress_fake_tensor_warnings,
)
from mmtune.models.meta_model import build_meta, config_source, unreachable_file
from mmtune.objectives.objective_table import OBJECTIVES
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.recipe import ModelSection, Recipe, Settings
from mmtune.tuning.apply import apply_tuning
from mmtune.utils.errors import RecipeValueError, UserError

STATES = {"adamw": 2, "lion": 1, "rmsprop": 1, "ademamix": 3}  # bitsandbytes optimizers: tensors of state for a parameter
CONTEXT, FRAGMENTS = 600_000_000, 0.05  # allowed for a CUDA context with its workspaces, and for gaps between tensors


@dataclass(frozen=True)
class MemoryEstimate:
    """Peak memory of a training step, in bytes.

    Attributes:
        weights: frozen weights and buffers, as stored.
        quantization_constants: what dequantizes them.
        trainable: trained parameters, in fp32.
        gradients: those that exist at that moment; all of them where gradients accumulate.
        optimizer: the optimizer's states that stay on the device; paged ones do not count.
        activations: what the backward pass needs, inputs, and intermediate results.
        logits: scores over the vocabulary at supervised positions, with their copies and gradients.
        moment: forward, backward or optimizer: when that is.
        frozen_models: the weights of further models of the objective, such as a teacher; every device holds them in full.
    """

    weights: int
    quantization_constants: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    moment: str
    frozen_models: int = 0

    @property
    def peak(self) -> int:
        """All tensors together, in bytes; on CUDA what `torch.cuda.max_memory_allocated` reports."""
        return sum(getattr(self, kind.name) for kind in fields(self) if kind.name != "moment")

    @property
    def overhead(self) -> int:
        """An allowance in bytes, not a measurement: 0.6 GB of CUDA context, and 5 % for gaps between tensors."""
        return CONTEXT + int(FRAGMENTS * self.peak)

    def fits(self, limit_bytes: int) -> bool:
        """Whether a GPU of so many bytes holds the peak and the allowance."""
        return self.peak + self.overhead <= limit_bytes

    def as_json(self) -> dict[str, Any]:
        """Every figure in bytes, `peak` and `overhead` too."""
        return asdict(self) | {"peak": self.peak, "overhead": self.overhead}


def estimate_memory(
    recipe: Recipe,
    *,
    tokens: int,
    images: int = 1,
    supervised: int | None = None,
    image_size: tuple[int, int] = (672, 672),
) -> MemoryEstimate:
    """Predict the peak memory of a training step after the first, on one device that holds the full model.

    Loads configs only: `config.json` and `preprocessor_config.json` (or `processor_config.json`) of what the recipe names.
    CPU kernels stand in for a GPU's, whose attention saves the same tensors; DeepSpeed and FSDP, which divide or offload what
    is counted here, are left out.

    Args:
        recipe: its model, `tune` and `train` sections are read.
        tokens: the length of every sample, image tokens included; no sample is padded.
        images: how many images every sample has.
        supervised: how many tokens of every sample are supervised; None: all that are not image tokens.
        image_size: height and width of the images in pixels; matters where the number of image tokens follows from it.

    Raises:
        UserError: a config that is not on this machine and cannot be downloaded, images that take more than `tokens`, or a
            model whose computation depends on values that only real weights have.
    """
    arguments = _arguments(recipe)
    objective = OBJECTIVES[recipe.objective.type](recipe.objective)
    with suppress_fake_tensor_warnings():
        model = build_meta(recipe.model)
        components = find_components(model)
        if recipe.model.precision in ("int8", "nf4"):
            for name in linear_modules(model, components, "language"):
                model.set_submodule(name, QuantizedLinear(model.get_submodule(name), recipe.model.precision))
        with torch.device("meta"):
            tuned: Any = apply_tuning(model, components, _with_plain_initialization(recipe).tune, steps=1000)
        make_prompt_tokens_real(tuned)
        tuned.config.use_cache = arguments.use_cache
        if arguments.activation_checkpointing:
            settings = dict(arguments.activation_checkpointing_kwargs or {})
            every, offload = settings.pop("every_n_layers", 1), settings.pop("offload", False)
            tuned.activation_checkpointing_enable(settings or None, every_n_layers=every, offload=offload)
        tuned.disable_input_require_grads()  # as training does: a frozen tower takes no part in the backward pass
        memory = MemoryTracker(model.config.get_text_config().vocab_size)
        memory.track_model(tuned)
        objective.build_meta_models(recipe)
        for frozen in objective.frozen_models:
            memory.track_model(frozen, "frozen_models")
        with _told(recipe):
            pixels = _pixels(recipe.model, memory, images * arguments.per_device_train_batch_size, image_size)
            batch = _batch(tuned, memory, pixels, arguments, tokens, images, supervised)
            fullest, moment = _step(tuned, objective, memory, batch, arguments)
    return MemoryEstimate(**fullest, moment=moment)


def suggestions(
    recipe: Recipe,
    estimate: MemoryEstimate,
    limit_bytes: int,
    *,
    tokens: int,
    images: int = 1,
    supervised: int | None = None,
    image_size: tuple[int, int] = (672, 672),
) -> list[str]:
    """Changes of the recipe that bring it within a limit, least harm first; each is estimated again, with those before it.

    First what leaves the result as it is (smaller batches accumulated, checkpointing), then optimizer states in 8 bits, then
    the weights' precision, then an adapter in place of full tuning. A change that saves less than 2 % is left out.

    Args:
        estimate: the recipe's own, from the same `tokens`, `images`, `supervised` and `image_size`.
        limit_bytes: the device's memory.

    Returns:
        Lines of overrides, each with all that came before, and the peak to expect; the last fits, if any does. Empty when the
        recipe fits as it is.
    """
    if estimate.fits(limit_bytes):
        return []
    lines: list[str] = []
    taken: dict[str, Any] = {}
    best = estimate

    def attempt(changes: dict[str, Any]) -> MemoryEstimate | None:
        changed = _changed(recipe, {**taken, **changes})
        if changed is None:
            return None
        return estimate_memory(changed, tokens=tokens, images=images, supervised=supervised, image_size=image_size)

    for ladder in _ladders(recipe):
        furthest = attempt(ladder[-1])
        if furthest is None or furthest.peak > 0.98 * best.peak:
            continue
        found = ladder[-1], furthest
        for changes in ladder[:-1] if furthest.fits(limit_bytes) else ():
            tried = attempt(changes)
            if tried is not None and tried.fits(limit_bytes):
                found = changes, tried
                break
        taken, best = taken | found[0], found[1]
        outcome = "fits" if best.fits(limit_bytes) else "still too much"
        lines.append(f"{' '.join(f'{key}={_written(value)}' for key, value in taken.items())}  ({_gb(best.peak)}, {outcome})")
        if best.fits(limit_bytes):
            break
    return lines


def print_estimate(estimate: MemoryEstimate, limit_bytes: int | None = None) -> None:
    """A table of the estimate, and whether it fits."""
    told = {
        "weights": "frozen weights",
        "frozen_models": "further models of the objective (frozen)",
        "quantization_constants": "quantization constants",
        "trainable": "trained parameters (fp32)",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "activations": "activations",
        "logits": "logits",
    }
    table = Table(title="Peak memory of a step", title_justify="left")
    table.add_column("what")
    table.add_column("GB (10^9 bytes)", justify="right")
    for kind, words in told.items():
        if getattr(estimate, kind):
            table.add_row(words, f"{getattr(estimate, kind) / 1e9:.2f}")
    table.add_section()
    table.add_row(f"peak, in the {estimate.moment}", f"{estimate.peak / 1e9:.2f}")
    table.add_row("allowance for CUDA and gaps", f"{estimate.overhead / 1e9:.2f}")
    if limit_bytes is not None:
        verdict = "fits" if estimate.fits(limit_bytes) else "does not fit"
        table.add_row(f"limit: {verdict}", f"{limit_bytes / 1e9:.2f}")
    StyledConsole().print_table(table)


# ---- what the recipe says


def _arguments(recipe: Recipe) -> TrainingArguments:
    left_out = ("report_to", "deepspeed", "ddp_backend")
    settings = {name: value for name, value in recipe.train.items() if name not in left_out}
    settings = {"use_cpu": not torch.accelerator.is_available(), **settings}
    settings |= {"report_to": "none", "bf16": recipe.model.precision != "fp32"}
    try:
        return TrainingArguments(output_dir=recipe.output_dir, **settings)
    except (ValueError, TypeError) as error:
        raise RecipeValueError("train", f"{error}") from error


def _with_plain_initialization(recipe: Recipe) -> Recipe:
    """The same sizes without initializations that read weights or rows, which fake tensors do not have."""
    tune = recipe.tune
    for name, tuning in tune.components.items():
        if tuning.method in METHODS:
            plain = Settings({**tuning.settings, **METHODS[tuning.method].plain_initialization(tuning.settings)})
            tune = tune.model_copy(update={name: tuning.model_copy(update={"settings": plain})})
    return recipe.model_copy(update={"tune": tune})


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The recipe with overrides, or None where it would be refused."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place[part]
        place[last] = value
    try:
        return Recipe.model_validate(values)
    except ValueError:  # pydantic's own error is one
        return None


def _ladders(recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """Changes by growing harm; of each list the first that is enough is taken, or else the last that helps."""
    arguments = _arguments(recipe)
    batch, steps = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    halves = [2**n for n in range(1, batch.bit_length()) if batch % 2**n == 0]
    if halves:
        yield [{"train.per_device_train_batch_size": batch // n, "train.gradient_accumulation_steps": steps * n} for n in halves]
    if not arguments.activation_checkpointing:
        yield [{"train.activation_checkpointing": True}]
    optimizer = str(getattr(arguments.optim, "value", arguments.optim))
    if optimizer.startswith("adamw_torch"):
        yield [{"train.optim": "adamw_bnb_8bit"}]
    if recipe.model.precision == "fp32":
        yield [{"model.precision": "bf16"}]
    if recipe.tune.language.method == "full":
        yield [{"tune.language": {"method": DEFAULT_METHOD}}]
    if recipe.model.precision != "nf4":
        yield [{"model.precision": "nf4"}]


def _written(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value["method"]) if isinstance(value, dict) else str(value)


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.1f} MB"


@contextlib.contextmanager
def _told(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        name = recipe.model.base or recipe.model.language
        raise RecipeValueError(
            "model", f"the memory of {name} cannot be predicted: what it computes depends on weights ({error})"
        ) from error


# ---- what a step is made of


def _pixels(section: ModelSection, memory: MemoryTracker, count: int, size: tuple[int, int]) -> dict[str, torch.Tensor]:
    """What the image processor makes of blank images."""
    if not count:
        return {}
    if section.base is None:
        processor = read_image_processor(
            read_vision_tower(str(section.vision), section.trust_remote_code), section.trust_remote_code
        )
    else:
        try:
            processor = AutoImageProcessor.from_pretrained(config_source(section), trust_remote_code=section.trust_remote_code)
        except (OSError, ValueError, ImportError) as error:
            raise UserError(unreachable_file("model.base", section.base, "preprocessor_config.json", error)) from error
    blank = Image.new("RGB", (size[1], size[0]))
    one = processor(images=[blank], return_tensors="pt")
    made = {}
    for name, tensor in one.items():
        if name in ("pixel_values", "image_grid_thw", "image_sizes", "pixel_attention_mask"):
            whole = (count * tensor.shape[0], *tensor.shape[1:])
            made[name] = memory.fake(tensor, whole) if tensor.is_floating_point() else tensor.expand(whole).clone()
    return made


def _batch(
    model: Any,
    memory: MemoryTracker,
    pixels: dict[str, torch.Tensor],
    arguments: TrainingArguments,
    tokens: int,
    images: int,
    supervised: int | None,
) -> dict[str, torch.Tensor]:
    """A batch as the collator makes it; only what steers the model has values."""
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config, width = base.config, base.config.get_text_config().hidden_size
    rows, each = arguments.per_device_train_batch_size, 0
    if pixels:
        with torch.no_grad(), memory, _autocast(arguments):
            features = base.get_image_features(**pixels, return_dict=True).pooler_output
        each = sum(part.numel() for part in (features if isinstance(features, (list, tuple)) else [features]))
        each //= width * rows * images
    marks = [getattr(config, name, None) for name in ("vision_start_token_id", "vision_end_token_id")]
    image_token = config.image_token_id
    block = [*marks[:1], *[image_token] * each, *marks[1:]]
    head = [token for token in block if token is not None] * images if pixels else []
    if len(head) >= tokens:
        raise UserError(f"tokens: {images} image(s) take {len(head)} tokens, and a sample has {tokens} in all")
    scored = min(supervised if supervised is not None else tokens, tokens - len(head))
    if scored < 1:
        raise UserError(f"supervised: {supervised} tokens leave nothing to learn; at least 1 is right")
    text_token = next(token for token in range(len(head) + 8) if token not in head)
    ids = torch.tensor([head + [text_token] * (tokens - len(head))] * rows)
    labels = ids.masked_fill(torch.arange(tokens) < tokens - scored, -100)
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels, **pixels}
    if marks[0] is not None:
        batch["mm_token_type_ids"] = (ids == image_token).long()
    return batch


def _step(
    model: Any,
    objective: SupervisedTuning,
    memory: MemoryTracker,
    batch: dict[str, torch.Tensor],
    arguments: TrainingArguments,
) -> tuple[dict[Any, int], str]:
    """A whole optimizer step in the order of transformers' Trainer; what was live at its fullest, by kind, and when that was.

    The optimizer makes its states in the first step. Those of later steps have them from the beginning, so they are added to
    what the forward and backward passes took.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: memory.move(p.grad, "gradients"))
    forward = convert_outputs_to_fp32(_autocast(arguments)(model.__call__)) if arguments.bf16 else model
    model.train()
    for tensor in batch.values():  # the loader has put every batch of the step on the device
        memory.track(tensor, "activations")
        memory.add("activations", (arguments.gradient_accumulation_steps - 1) * tensor.nbytes)
    memory.reset_peak()
    with memory:
        for _ in range(min(arguments.gradient_accumulation_steps, 2)):
            memory.phase = "forward"
            inputs = objective.model_inputs(model, batch)
            loss = objective.compute_loss(forward, inputs, torch.tensor(1)).loss
            del inputs
            memory.phase = "backward"
            loss.backward()
            del loss
        computing, moment = memory.peak, memory.peak_phase
        memory.phase, memory.allocating = "optimizer", "optimizer"
        memory.reset_peak()
        reached = [parameter for parameter in trained if parameter.grad is not None]
        if arguments.max_grad_norm:
            nn.utils.clip_grad_norm_(reached, arguments.max_grad_norm)
        optimizer = _optimizer(model, memory, reached, arguments)
        if optimizer is not None:
            optimizer.step()
    computing["optimizer"] = memory.live["optimizer"]
    if sum(computing.values()) >= sum(memory.peak.values()):
        return computing, moment
    return memory.peak, "optimizer"


def _autocast(arguments: TrainingArguments) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16)


def _optimizer(
    model: Any, memory: MemoryTracker, trained: list[nn.Parameter], arguments: TrainingArguments
) -> torch.optim.Optimizer | None:
    """The Trainer's optimizer; of bitsandbytes' only the bytes of the states are counted."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if any(part in name for part in ("bnb", "8bit", "paged")):
        states = next((count for family, count in STATES.items() if name.startswith(family)), 2)
        memory.add("optimizer", sum(bnb_state_bytes(p.numel(), states, "8bit" in name, "paged" in name) for p in trained))
        return None
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: torch.optim.Optimizer = kind(trained, **settings)
    return optimizer
