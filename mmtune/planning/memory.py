"""Memory of a training step, predicted from configs alone.

The model class runs a forward pass, a backward pass and an optimizer step on fake tensors, which have shapes, dtypes and storages
but no data. Tensors that autograd saves, checkpointing drops and autocast copies are counted as they occur, for every family and
method; no code here depends on a model's layers.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from accelerate.utils.operations import convert_outputs_to_fp32
from peft import PeftModel
from PIL import Image
from rich.table import Table
from torch import nn
from transformers import PROCESSOR_MAPPING, AutoConfig, AutoImageProcessor, Trainer, TrainingArguments

from mmtune.console.styled_console import StyledConsole
from mmtune.data.batching.collate import pack
from mmtune.families.family_table import family_of
from mmtune.families.structure import find_components, image_features_of
from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.models.compatibility import (
    read_image_processor,
    read_vision_tower,
)
from mmtune.models.components import linear_modules
from mmtune.models.fake_tensors import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    MemoryTracker,
    QuantizedLinear,
    bnb_state_bytes,
    make_prompt_tokens_real,
    suppress_fake_tensor_warnings,
)
from mmtune.models.meta_model import build_meta, config_source, unreachable_file
from mmtune.models.packed_attention import attention_by_sample
from mmtune.objectives.objective_table import OBJECTIVES
from mmtune.objectives.sft import SupervisedTuning
from mmtune.planning.memory_sizes import format_memory
from mmtune.recipe.pass_through.arguments import EARLY_STOPPING
from mmtune.recipe.recipe import DataSection, ModelSection, Recipe, Settings
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
        gradients: those that exist at the peak; with gradient accumulation, all of them.
        optimizer: optimizer states on the device; paged ones do not count.
        activations: inputs, saved tensors for the backward pass, and intermediate results.
        logits: scores over the vocabulary at supervised positions, with their copies and gradients.
        phase: forward, backward or optimizer: where the peak is.
        frozen_models: the weights of further models of the objective, such as a teacher; every device holds them in full.
    """

    weights: int
    quantization_constants: int
    trainable: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    phase: str
    frozen_models: int = 0

    @property
    def peak(self) -> int:
        """The sum of all tensors in bytes; on CUDA what `torch.cuda.max_memory_allocated` reports."""
        return sum(getattr(self, kind.name) for kind in fields(self) if kind.name != "phase")

    @property
    def overhead(self) -> int:
        """Overhead in bytes, assumed and not measured: 0.6 GB of CUDA context, and 5 % for fragmentation."""
        return CONTEXT + int(FRAGMENTS * self.peak)

    def fits(self, limit_bytes: int) -> bool:
        """Whether peak and overhead fit into a device with this memory in bytes."""
        return self.peak + self.overhead <= limit_bytes

    def as_json(self) -> dict[str, Any]:
        """All fields, and `peak` and `overhead`."""
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

    Loads configs only: `config.json` and `preprocessor_config.json` (or `processor_config.json`) of the recipe's models.
    CPU kernels are run instead of GPU kernels; attention saves the same tensors in both. Sharding and offloading by DeepSpeed and
    FSDP are not included. A batch has `train.per_device_train_batch_size` samples, or those that fill `data.tokens_per_batch`
    or a packed row.

    Args:
        recipe: its model, `tune` and `train` sections are read, and of `data` what limits a batch.
        tokens: the length of every sample, with image tokens; no sample is padded. The last one of a packed row is shorter.
        images: the number of images in every sample.
        supervised: the number of supervised tokens in every sample; None: all text tokens.
        image_size: height and width of the images in pixels; used if the number of image tokens depends on it.

    Raises:
        UserError: a config is not on this machine and cannot be downloaded, the images have more than `tokens` tokens, or the
            computation of the model depends on the values of its weights.
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
            tune = _with_plain_initialization(recipe).tune
            tuned: Any = apply_tuning(model, components, tune, steps=1000, label_tokens=range(len(tune.labels)))
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
        with _prediction_errors(recipe):
            lengths = _lengths(recipe.data, tokens, arguments.per_device_train_batch_size)
            pixels = _pixels(recipe.model, model, memory, images * lengths.count(tokens), image_size)
            batch = _batch(tuned, memory, pixels, arguments, lengths, images, supervised, recipe.data.packing)
            peak_memory, phase = _step(tuned, objective, memory, batch, arguments)
    return MemoryEstimate(**peak_memory, phase=phase)


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
    """Overrides that make a recipe fit into a memory limit, estimated one after the other, each with all before it.

    First those that do not change the result (smaller batches with accumulation, checkpointing), then optimizer states in 8 bits,
    then the precision of the weights, then an adapter instead of full tuning. Changes that save less than 2 % are left out.

    Args:
        estimate: of the unchanged recipe, with the same `tokens`, `images`, `supervised` and `image_size`.
        limit_bytes: the device's memory.

    Returns:
        Lines of overrides, each with all before it, and the predicted peak; the last one fits, if any does. Empty if the recipe
        fits unchanged.
    """
    if estimate.fits(limit_bytes):
        return []
    lines: list[str] = []
    accepted: dict[str, Any] = {}
    best = estimate

    def attempt(changes: dict[str, Any]) -> MemoryEstimate | None:
        changed = _changed(recipe, {**accepted, **changes})
        if changed is None:
            return None
        return estimate_memory(changed, tokens=tokens, images=images, supervised=supervised, image_size=image_size)

    for candidates in _suggestion_steps(recipe):
        last_estimate = attempt(candidates[-1])
        if last_estimate is None or last_estimate.peak > 0.98 * best.peak:
            continue
        chosen = candidates[-1], last_estimate
        for changes in candidates[:-1] if last_estimate.fits(limit_bytes) else ():
            candidate = attempt(changes)
            if candidate is not None and candidate.fits(limit_bytes):
                chosen = changes, candidate
                break
        accepted, best = accepted | chosen[0], chosen[1]
        outcome = "fits" if best.fits(limit_bytes) else "still too much"
        overrides = " ".join(f"{key}={_format_override(value)}" for key, value in accepted.items())
        lines.append(f"{overrides}  ({format_memory(best.peak)}, {outcome})")
        if best.fits(limit_bytes):
            break
    return lines


def print_estimate(estimate: MemoryEstimate, limit_bytes: int | None = None) -> None:
    """Print a table of the estimate, and whether it fits."""
    labels = {
        "weights": "frozen weights",
        "frozen_models": "further models of the objective (frozen)",
        "quantization_constants": "quantization constants",
        "trainable": "trainable parameters (fp32)",
        "gradients": "gradients",
        "optimizer": "optimizer states",
        "activations": "activations",
        "logits": "logits",
    }
    table = Table(title="Peak memory of a step", title_justify="left")
    table.add_column("memory")
    table.add_column("GB (10^9 bytes)", justify="right")
    for kind, words in labels.items():
        if getattr(estimate, kind):
            table.add_row(words, f"{getattr(estimate, kind) / 1e9:.2f}")
    table.add_section()
    table.add_row(
        f"peak (in the {estimate.phase} {'step' if estimate.phase == 'optimizer' else 'pass'})", f"{estimate.peak / 1e9:.2f}"
    )
    table.add_row("overhead (CUDA context, fragmentation)", f"{estimate.overhead / 1e9:.2f}")
    if limit_bytes is not None:
        verdict = "fits" if estimate.fits(limit_bytes) else "does not fit"
        table.add_row(f"limit: {verdict}", f"{limit_bytes / 1e9:.2f}")
    StyledConsole().print_table(table)


# ---- from the recipe


def _arguments(recipe: Recipe) -> TrainingArguments:
    left_out = ("report_to", "deepspeed", "ddp_backend", *EARLY_STOPPING)
    settings = {name: value for name, value in recipe.train.items() if name not in left_out}
    settings = {"use_cpu": not torch.accelerator.is_available(), **settings}
    settings |= {"report_to": "none", "bf16": recipe.model.precision != "fp32"}
    try:
        return TrainingArguments(output_dir=recipe.output_dir, **settings)
    except (ValueError, TypeError) as error:
        raise RecipeValueError("train", str(error)) from error


def _with_plain_initialization(recipe: Recipe) -> Recipe:
    """The recipe with an initialization that reads neither weights nor rows, which are not loaded here. Sizes are the same."""
    tune = recipe.tune
    for name, tuning in tune.components.items():
        if tuning.method in METHODS:
            plain = Settings({**tuning.settings, **METHODS[tuning.method].plain_initialization(tuning.settings)})
            tune = tune.model_copy(update={name: tuning.model_copy(update={"settings": plain})})
    return recipe.model_copy(update={"tune": tune})


def _changed(recipe: Recipe, changes: dict[str, Any]) -> Recipe | None:
    """The recipe with overrides; None if it is invalid."""
    values = recipe.model_dump(mode="json")
    for key, value in changes.items():
        *path, last = key.split(".")
        place = values
        for part in path:
            place = place[part]
        place[last] = value
    try:
        return Recipe.model_validate(values)
    except ValueError:  # includes pydantic's ValidationError
        return None


def _suggestion_steps(recipe: Recipe) -> Iterator[list[dict[str, Any]]]:
    """Lists of alternative overrides, the least harmful list first. The first alternative that fits is used, else the last."""
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


def _format_override(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return str(value["method"]) if isinstance(value, dict) else str(value)


@contextlib.contextmanager
def _prediction_errors(recipe: Recipe) -> Iterator[None]:
    try:
        yield
    except (DataDependentOutputException, DynamicOutputShapeException) as error:
        name = recipe.model.base or recipe.model.language
        raise RecipeValueError(
            "model", f"the memory of {name} cannot be predicted: its computation depends on the values of weights ({error})"
        ) from error


# ---- the training step


def _lengths(section: DataSection, tokens: int, rows: int) -> list[int]:
    """The tokens of each sample of a batch."""
    budget = section.tokens_per_batch or (section.max_tokens if section.packing else None)
    if budget is None:
        return [tokens] * rows
    rest = max(budget - tokens, 0) % tokens if section.packing else 0
    return [tokens] * max(budget // tokens, 1) + [rest] * (rest > 0)


def _pixels(
    section: ModelSection, model: Any, memory: MemoryTracker, count: int, size: tuple[int, int]
) -> dict[str, torch.Tensor]:
    """What the model takes of the image processor's output for blank images, as fake tensors."""
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
    settings = {**_image_settings(section), "return_tensors": "pt"}
    one, two = (processor(images=[blank] * number, **settings) for number in (1, 2))
    pixels, taken = {}, inspect.signature(model.forward).parameters
    for name in (name for name in one if name in taken):
        tensor, of_two = torch.as_tensor(one[name]), torch.as_tensor(two[name])  # some processors leave lists
        axis = next((axis for axis, size in enumerate(tensor.shape) if size != of_two.shape[axis]), 0)
        whole = (*tensor.shape[:axis], count * tensor.shape[axis], *tensor.shape[axis + 1 :])
        pixels[name] = memory.fake(tensor, whole) if tensor.is_floating_point() else torch.cat([tensor] * count, axis)
    return pixels


def _image_settings(section: ModelSection) -> dict[str, Any]:
    """The settings of a base's image processor that its processor class or its family changes, such as cutting into tiles."""
    if section.base is None:
        return {}
    config = AutoConfig.from_pretrained(config_source(section), trust_remote_code=section.trust_remote_code)
    own = getattr(PROCESSOR_MAPPING.get(type(config), None), "images_kwargs", {})
    return {**own, **family_of(str(config.model_type)).image_settings}


def _batch(
    model: Any,
    memory: MemoryTracker,
    pixels: dict[str, torch.Tensor],
    arguments: TrainingArguments,
    lengths: list[int],
    images: int,
    supervised: int | None,
    packing: bool,
) -> dict[str, torch.Tensor]:
    """A batch like the collator's. Only token ids and labels have values; they decide what the model computes.

    Args:
        lengths: from `_lengths`; samples of the first length have images.
    """
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    config, family = base.config, family_of(str(base.config.model_type))
    tokens, each = lengths[0], 0
    rows = lengths.count(tokens)
    if pixels:
        with torch.no_grad(), memory, _autocast(arguments):
            features = _image_features(base, pixels).pooler_output
        each = sum(part.numel() for part in (features if isinstance(features, (list, tuple)) else [features]))
        each //= config.get_text_config().hidden_size * rows * images
    named = ("vision_{}_token_id", "image_{}_token_id", "im_{}_id")
    marks = [
        next((token for name in named if (token := getattr(config, name.format(side), None)) is not None), None)
        for side in ("start", "end")
    ]
    image_token = getattr(config, "image_token_id", 0)  # Kosmos-2 finds image features by a mask, which `planned_batch` adds
    block = [*marks[:1], *[image_token] * each, *marks[1:]]
    head = [token for token in block if token is not None] * images if pixels else []
    if len(head) >= tokens:
        raise UserError(f"tokens: {images} image(s) take {len(head)} tokens, and a sample has {tokens} in all")
    scored = min(supervised if supervised is not None else tokens, tokens - len(head))
    if scored < 1:
        raise UserError(f"supervised: {supervised} tokens leave nothing to learn; at least 1 is right")
    text_token = next(token for token in range(len(head) + 8) if token not in head)
    types = [name for name in inspect.signature(base.forward).parameters if name.endswith("mm_token_type_ids")]
    samples = []
    for length in lengths:
        ids = torch.tensor([[*head, *[text_token] * tokens][:length] if length == tokens else [text_token] * length])
        labels = ids.masked_fill(torch.arange(length) < length - scored, -100)
        sample = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": labels}
        samples.append(sample | {name: (ids == image_token).long() for name in types})
    batch = pack(samples) if packing else {name: torch.cat([sample[name] for sample in samples]) for name in samples[0]}
    batch |= pixels
    if getattr(config, "is_encoder_decoder", False):
        question, answer = batch["input_ids"].split([tokens - scored, scored], dim=1)
        targets = {"decoder_input_ids": answer, "labels": answer.masked_fill(torch.arange(scored) == 0, -100)}
        batch |= {"input_ids": question, "attention_mask": torch.ones_like(question), **targets}
    return family.planned_batch(batch, images)


def _image_features(model: Any, pixels: dict[str, torch.Tensor]) -> Any:
    image_features = image_features_of(model)
    if image_features is None:
        raise UserError(f"{type(model).__name__} has no get_image_features, which counts the features of an image")
    taken = inspect.signature(image_features).parameters
    return image_features(**{name: tensor for name, tensor in pixels.items() if name in taken}, return_dict=True)


def _step(
    model: Any,
    objective: SupervisedTuning,
    memory: MemoryTracker,
    batch: dict[str, torch.Tensor],
    arguments: TrainingArguments,
) -> tuple[dict[Any, int], str]:
    """Run an optimizer step in the order of transformers' Trainer. Returns the peak memory by kind, and its phase.

    The optimizer creates its states in the first step. In later steps they exist from the beginning, so they are added to the
    memory of the forward and backward passes.
    """
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    for parameter in trained:
        parameter.register_post_accumulate_grad_hook(lambda p: memory.move(p.grad, "gradients"))
    forward = convert_outputs_to_fp32(_autocast(arguments)(model.__call__)) if arguments.bf16 else model
    model.train()
    for tensor in batch.values():  # all batches of the step are on the device
        memory.track(tensor, "activations")
        memory.add("activations", (arguments.gradient_accumulation_steps - 1) * tensor.nbytes)
    memory.reset_peak()
    with memory, attention_by_sample():
        for _ in range(min(arguments.gradient_accumulation_steps, 2)):
            memory.phase = "forward"
            inputs = objective.model_inputs(model, batch)
            loss = objective.compute_loss(forward, inputs, torch.tensor(1)).loss
            del inputs
            memory.phase = "backward"
            loss.backward()
            del loss
        computing, phase = memory.peak, memory.peak_phase
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
        return computing, phase
    return memory.peak, "optimizer"


def _autocast(arguments: TrainingArguments) -> torch.autocast:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=arguments.bf16)


def _optimizer(
    model: Any, memory: MemoryTracker, trained: list[nn.Parameter], arguments: TrainingArguments
) -> torch.optim.Optimizer | None:
    """The Trainer's optimizer. For bitsandbytes, only the bytes of its states are counted, and the result is None."""
    name = str(getattr(arguments.optim, "value", arguments.optim))
    if any(part in name for part in ("bnb", "8bit", "paged")):
        states = next((count for family, count in STATES.items() if name.startswith(family)), 2)
        memory.add("optimizer", sum(bnb_state_bytes(p.numel(), states, "8bit" in name, "paged" in name) for p in trained))
        return None
    kind, settings = Trainer.get_optimizer_cls_and_kwargs(arguments, model)
    optimizer: torch.optim.Optimizer = kind(trained, **settings)
    return optimizer
