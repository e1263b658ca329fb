"""Sections of a recipe: frozen pydantic models, each with its own checks. `mmtune.recipe.recipe` loads a recipe."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    Field,
    PrivateAttr,
    SerializerFunctionWrapHandler,
    StrictBool,
    StrictFloat,
    StrictInt,
    ValidationError,
    model_serializer,
    model_validator,
)
from pydantic_core import InitErrorDetails

from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.recipe.objective_section import AnyObjectiveSection, SftSection
from mmtune.recipe.pass_through.arguments import Settings, error_at, format_value, train_arguments
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.recipe.prompt_sections import ChoiceScores, Sampling
from mmtune.recipe.section import PassThroughArguments, PathText, Section, Text
from mmtune.recipe.source_section import Source, evaluation_source_errors
from mmtune.recipe.train_rules import evaluation_errors, feature_cache_errors, training_errors
from mmtune.recipe.tune_section import TuneSection, with_rates
from mmtune.recipe.yaml_lines import dump_yaml
from mmtune.utils.errors import closest_hint, nearest
from mmtune.utils.files import expand_user

BUILTIN_BASES = ("builtin:tiny-llava", "builtin:tiny-llava-untrained")
_ASSEMBLED_ONLY = ("projector", "vision_feature_layer", "vision_feature_select_strategy")


class Projector(Section):
    """Projector of an assembled model, between a vision encoder and a language model from two checkpoints."""

    type: Literal["mlp"] = Field(default="mlp", description="The architecture: LLaVA's two-layer MLP.")
    weights: PathText | None = Field(
        default=None, description="A run, adapter or checkpoint directory to load its weights from; null: random weights."
    )

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        return ({"type": values} if isinstance(values, str) else values), []


class ModelSection(Section):
    """Model: a vision-language checkpoint (`base`), or one assembled from `vision` and `language`."""

    base: PathText | None = Field(
        default=None,
        description="A vision-language model: a hub id, a local directory, or builtin:tiny-llava, the model that ships with "
        "mmtune (builtin:tiny-llava-untrained: the same model with random weights).",
    )
    vision: PathText | None = Field(default=None, description="A vision encoder to assemble from: hub id or directory.")
    language: PathText | None = Field(default=None, description="A language model to assemble from: hub id or directory.")
    projector: Projector | None = Field(default=None, description="Assembled models: mlp, or {type: mlp, weights: DIR}.")
    vision_feature_layer: StrictInt = Field(
        default=-2, description="Assembled models: the encoder layer that the projector reads; -2 is the second to last."
    )
    vision_feature_select_strategy: Literal["default", "full"] | None = Field(
        default=None,
        description="Assembled models: default drops the class token, full keeps all tokens; null chooses by the encoder.",
    )
    chat_template: PathText | None = Field(
        default=None, description="The name of a shipped chat template, or a .jinja file; null: the checkpoint's own."
    )
    precision: Literal["fp32", "bf16", "int8", "nf4"] = Field(
        default="fp32",
        description="Precision of the frozen weights. int8 and nf4 quantize the layers of the language model and keep the rest "
        "in bf16; trainable parameters are fp32.",
    )
    trust_remote_code: StrictBool = Field(default=False, description="Run Python code that comes with a checkpoint.")
    attn_implementation: Text | None = Field(
        default=None, description="transformers' attn_implementation (sdpa, eager, ...); null: transformers chooses."
    )

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(values, dict):
            return values, []
        errors: list[InitErrorDetails] = []
        base, components = values.get("base"), [name for name in ("vision", "language") if values.get(name) is not None]
        if base is not None:
            errors += [error_at(name, "base is given too; give either base, or vision and language") for name in components]
            for name in _ASSEMBLED_ONLY if not components else ():
                if values.get(name) is not None:
                    errors.append(
                        error_at(
                            name, "not supported with base: it is for a model assembled from vision and language; leave it out"
                        )
                    )
            if isinstance(base, str) and base.startswith("builtin:") and base not in BUILTIN_BASES:
                errors.append(error_at("base", f"unknown built-in model '{base}'{nearest(base, BUILTIN_BASES)}"))
        elif not components:
            errors.append(error_at((), "give either base, or vision and language"))
        elif len(components) == 1:
            other = "language" if components == ["vision"] else "vision"
            errors.append(error_at(components[0], f"model.{other} is missing; a model is assembled from both"))
        elif values.get("projector") is None:
            values["projector"] = "mlp"
        attention, names = values.get("attn_implementation"), library_fact("attention")
        if isinstance(attention, str) and attention not in names and not re.fullmatch(r"[\w.-]+/[^/\s]+", attention):
            expected = f"expected one of {', '.join(names)}, or a hub kernel, owner/name"
            hint = closest_hint(attention, names)
            errors.append(error_at("attn_implementation", f"{expected}, got {format_value(attention)}{hint}"))
        return values, errors

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # Keys of the other kind of model are left out, so that the YAML loads again.
        other = ("vision", "language", *_ASSEMBLED_ONLY) if self.base is not None else ("base",)
        return {name: value for name, value in handler(self).items() if name not in other}

    @property
    def checkpoints(self) -> dict[str, str]:
        """The directories and hub ids of the model by key, without a built-in base."""
        names = {"base": self.base, "vision": self.vision, "language": self.language}
        return {key: name for key, name in names.items() if name is not None and not name.startswith("builtin:")}


class DataSection(Section):
    """Training data."""

    _examples: ClassVar = {"train": "such as [{path: rows.json, template: llava}]"}
    train: tuple[Source, ...] = Field(min_length=1, description="The sources of training rows.")
    mix: Literal["repeats", "ratio"] = Field(
        default="repeats",
        description="The meaning of weight: repeats in an epoch, or the share of an epoch as long as all sources together.",
    )
    supervise: Literal["all", "last", "without_tool_calls"] = Field(
        default="all",
        description="Compute the loss on all answers of a conversation, on the last one, or on all but those with a tool call.",
    )
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="The maximum length of a sample in tokens, image tokens included; null: no limit."
    )
    over_length: Literal["error", "drop_sample", "drop_media", "shrink_media"] = Field(
        default="error",
        description="A sample longer than max_tokens: stop the run (error), drop the sample (drop_sample), drop whole images "
        "(drop_media), or reduce its images (shrink_media). The data report counts each.",
    )
    plan: StrictBool = Field(
        default=False,
        description="Count the tokens of every row before the weights are loaded, and balance the batches of the processes "
        "by them. Implied by packing, tokens_per_batch, largest_batch_first and train_sampling_strategy: group_by_length.",
    )
    packing: StrictBool = Field(
        default=False,
        description="Pack samples into rows of at most tokens_per_batch tokens; samples do not attend to each other.",
    )
    tokens_per_batch: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="The maximum number of tokens in a batch, with padding, instead of train.per_device_train_batch_size; "
        "samples are grouped by length. With packing, null: max_tokens.",
    )
    largest_batch_first: StrictBool = Field(
        default=False, description="Train the step with the most tokens first, so that running out of memory shows at once."
    )
    stream: StrictBool = Field(default=False, description="Read rows in order during training, without reading all data first.")
    shuffle_window: Annotated[StrictInt, Field(ge=1)] = Field(
        default=10_000, description="With stream: the size of the shuffle buffer, in rows of a source."
    )
    max_bad_fraction: Annotated[StrictFloat, Field(ge=0, le=1)] = Field(
        default=0.0, description="The fraction of rows, from 0 to 1, that may be quarantined before the run stops."
    )
    max_nonfinite_steps: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0,
        description="How many steps with NaN or infinite gradients may be skipped before the run stops; their rows are reported.",
    )
    check_rows: Annotated[StrictInt, Field(ge=0)] = Field(
        default=2000,
        description="How many rows are checked (text and image headers) before the weights are loaded; 0: none.",
    )
    cache_features: PathText | None = Field(
        default=None,
        description="A folder for the features of a frozen vision tower, which then runs once for a row; null: none.",
    )

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(values, dict):
            return values, []
        errors = []
        if values.get("packing") is True and values.get("tokens_per_batch") is None and values.get("max_tokens") is None:
            errors.append(error_at("packing", "give tokens_per_batch or max_tokens, the maximum length of a packed row"))
        most, longest = values.get("tokens_per_batch"), values.get("max_tokens")
        if isinstance(most, int) and isinstance(longest, int) and most < longest:
            errors.append(error_at("tokens_per_batch", f"expected at least max_tokens ({longest}), got {most}"))
        if isinstance(most, int) and longest is None and values.get("stream") is not True:
            errors.append(error_at("tokens_per_batch", "needs max_tokens, so that no sample is longer than a batch: give it too"))
        if values.get("over_length") in ("drop_sample", "drop_media", "shrink_media") and longest is None:
            errors.append(error_at("over_length", f"{values['over_length']} needs max_tokens: give it, or leave over_length out"))
        if values.get("stream") is True:
            for name in ("plan", "packing", "tokens_per_batch", "largest_batch_first"):
                if values.get(name):
                    errors.append(
                        error_at(
                            name,
                            "not supported with stream: true, where row lengths are unknown before training; leave it out",
                        )
                    )
            sources = values.get("train")
            if isinstance(sources, (list, tuple)) and len(sources) > 1 and values.get("mix") != "ratio":
                errors.append(error_at("mix", "expected ratio: the sources of a stream have no known length"))
        elif "shuffle_window" in values and values["shuffle_window"] != 10_000:
            errors.append(error_at("shuffle_window", "needs stream: true; without it all rows are shuffled; leave it out"))
        return values, errors

    @property
    def planned(self) -> bool:
        """Whether the tokens of every row are counted before weights are loaded: also if a row over max_tokens stops the run."""
        stops = self.max_tokens is not None and self.over_length == "error" and not self.stream
        return self.plan or self.packing or self.tokens_per_batch is not None or self.largest_batch_first or stops


class WhileTraining(Section):
    """Evaluation while training: which held-out rows, and what is computed besides the loss."""

    rows: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Evaluate this many rows, drawn once; null: all. The same rows are taken at every step."
    )
    seed: StrictInt = Field(default=0, description="Seed of the draw of the rows.")
    answers: StrictBool = Field(default=False, description="Answer the rows too, and report the scores of their metrics.")


class TaskFolder(Section):
    """Evaluation task: a benchmark, and the folder of its files."""

    name: PathText = Field(description="The name of a task, as `mmtune tasks` lists it, or a .yaml file.")
    path: PathText = Field(description="The folder of the benchmark's files.")


class EvaluateSection(Section):
    """Evaluation on held-out rows."""

    _examples: ClassVar = {
        "data": "such as [{path: rows.json, template: llava}]",
        "tasks": "such as [{name: pope, path: data/pope}]",
    }
    data: tuple[Source, ...] = Field(
        default=(), description="The sources of held-out rows, beside the rows that `held_out` takes from the training sources."
    )
    tasks: tuple[TaskFolder, ...] = Field(
        default=(),
        description="Benchmarks that are evaluated too, before and after tuning, such as [{name: pope, path: data/pope}].",
    )
    metric: Text | None = Field(
        default=None,
        description="A metric by name, module:function or FILE.py:function; null: the one of the data template, or exact_match.",
    )
    leakage: Literal["error", "warn"] = Field(
        default="error", description="Held-out rows that are also in the training data: stop the run, or print a warning."
    )
    answer_after: Text | None = Field(
        default=None, description="Compare only the text after this; an answer without it is unparsed. null: the whole answer."
    )
    max_new_tokens: Annotated[StrictInt, Field(ge=1)] = Field(
        default=64, description="The maximum length of a generated answer, in tokens."
    )
    score: Literal["generate", "choices"] = Field(
        default="generate",
        description="generate: generate an answer. choices: take the most likely candidate (options, verbalizer).",
    )
    choice_scores: ChoiceScores = Field(default=ChoiceScores(), description="With score: choices, how candidates are compared.")
    turns: Literal["last", "all"] = Field(
        default="last", description="Ask the last question of a conversation, or every one, with the row's answers before it."
    )
    prompt: Text | None = Field(
        default=None,
        description="The question as the model reads it, such as '{question}\\nThink step by step.'; null: as it is.",
    )
    batch_size: Annotated[StrictInt, Field(ge=1)] = Field(
        default=16, description="Answers per batch: generated answers, or candidates with score: choices."
    )
    sampling: Sampling | None = Field(
        default=None, description="Sampled answers to each question, with a majority vote; null: one greedy answer."
    )
    cache: StrictBool = Field(
        default=True, description="Take known answers of the same weights to the same input from ~/.cache/mmtune/answers."
    )
    before: StrictBool = Field(default=True, description="Evaluate the base before tuning too.")
    groups: tuple[Text, ...] = Field(
        default=(),
        description="Fields of the rows, such as language: scores by their values too, and the gap. a.b is b inside a.",
    )
    samples: Annotated[StrictInt, Field(ge=0)] = Field(
        default=24, description="How many answers the report shows with their images."
    )
    explain: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0,
        description="Of how many of these the report also shows what each token rests on (docs/explain.md), by occlusion.",
    )
    track_answers: Annotated[StrictInt, Field(ge=0)] | None = Field(
        default=None,
        description="How many rows a tracker of train.report_to gets with question, answers and images. null: 8 if it keeps "
        "them on this machine, otherwise none.",
    )
    while_training: WhileTraining = Field(
        default=WhileTraining(), description="The evaluation at the steps of train.eval_strategy."
    )

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        return values, evaluation_source_errors(values) + _score_errors(values)

    _held_out_parts: tuple[Source, ...] = PrivateAttr(default=())

    @property
    def sources(self) -> tuple[Source, ...]:
        """All sources of held-out rows: those of `data`, and the held-out parts of the training sources."""
        return (*self.data, *self._held_out_parts)


def _score_errors(values: Any) -> list[InitErrorDetails]:
    if not isinstance(values, Mapping):
        return []
    choices, adjusted = values.get("score") == "choices", values.get("choice_scores")
    prompt = values.get("prompt")
    if isinstance(prompt, str) and prompt.count("{question}") != 1:
        return [error_at("prompt", f"expected {{question}} once, where the question stands, got {format_value(prompt)}")]
    if values.get("turns") == "all" and (choices or _has_shots(values.get("data"))):
        reason = "score: choices: only the last answer of a row has candidates" if choices else "shots of a source"
        return [error_at("turns", f"all is not supported with {reason}")]
    if choices and values.get("sampling") is not None:
        return [error_at("sampling", "not supported with score: choices, which generates nothing; leave it out")]
    if choices and values.get("answer_after") is not None:
        return [error_at("answer_after", "not supported with score: choices, which compares whole choices; leave it out")]
    if (
        values.get("score", "generate") == "generate"
        and isinstance(adjusted, Mapping)
        and any(value is True for value in adjusted.values())
    ):
        return [error_at("choice_scores", "needs score: choices; give it, or leave choice_scores out")]
    return []


def _has_shots(sources: Any) -> bool:
    sources = sources if isinstance(sources, (list, tuple)) else ()
    return any(isinstance(source, Mapping) and source.get("shots") is not None for source in sources)


def _holds_rows_out(data: Any) -> bool:
    sources = data.get("train") if isinstance(data, Mapping) else ()
    sources = sources if isinstance(sources, (list, tuple)) else ()
    return any(isinstance(source, Mapping) and source.get("held_out") is not None for source in sources)


class Recipe(Section):
    """A complete recipe. `load_recipe` creates it."""

    _examples: ClassVar = {
        "model": "such as model: {base: builtin:tiny-llava}",
        "data": "such as data: {train: [{path: rows.json, template: llava}]}",
        "output_dir": "such as output_dir: runs/first",
    }
    model: ModelSection = Field(description="The model to tune.")
    tune: TuneSection = Field(default_factory=TuneSection, description="The tuning method of each component.")
    objective: AnyObjectiveSection = Field(default=SftSection(), description="What the training minimizes.")
    data: DataSection = Field(description="The rows to train on.")
    evaluate: EvaluateSection | None = Field(default=None, description="The evaluation on held-out rows; null: none.")
    train: PassThroughArguments = Field(
        default_factory=lambda: Settings({"report_to": "none"}),
        description="Arguments of transformers' TrainingArguments; those not given keep transformers' defaults.",
    )
    output_dir: PathText = Field(description="The run directory.")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(values, dict):
            return values, []
        # A section in which all lines are commented out is null in YAML.
        values = {
            name: value for name, value in values.items() if value is not None or name not in ("tune", "objective", "train")
        }
        train = values.pop("train", {})
        if not isinstance(train, Mapping):
            return values, [error_at("train", f"expected a mapping, got {format_value(train)}")]
        if isinstance(train.get("deepspeed"), str):
            train = {**train, "deepspeed": expand_user(train["deepspeed"])}
        settings, errors = train_arguments().check(train)
        errors = errors or training_errors(train)
        inner = [InitErrorDetails(type=each["type"], loc=("train", *each.get("loc", ())), input=None) for each in errors]
        if values.get("evaluate") is None and _holds_rows_out(values.get("data")):
            values["evaluate"] = {}
        data = values.get("data")
        by_length = train.get("train_sampling_strategy") == "group_by_length"
        if by_length and isinstance(data, Mapping) and data.get("stream") is not True:
            values["data"] = {**data, "plan": True}
        if "learning_rate" not in train and isinstance(values.get("tune", {}), Mapping):
            values["tune"] = with_rates(values.get("tune", {}))
        return values | {"train": Settings(settings)}, inner

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        """Reject combinations of keys in different sections that do not work."""
        if self.evaluate is not None:
            self.evaluate._held_out_parts = tuple(each.held_out_part() for each in self.data.train if each.held_out is not None)
        if errors := list(self._combination_errors()):
            raise ValidationError.from_exception_data("Recipe", errors)
        return self

    def _combination_errors(self) -> Iterator[InitErrorDetails]:
        if self.evaluate is not None and not self.evaluate.sources:
            example = self.evaluate._examples["data"]
            message = f"required, and not given; {example}, or give a source of data.train `held_out: 0.1`"
            yield error_at(("evaluate", "data"), message)
        for number, source in enumerate(self.data.train if self.data.stream else ()):
            if source.held_out is not None:
                message = (
                    "not supported with data.stream: true: rows that share an image are found by reading all rows first; write "
                    "the held-out rows into a file of their own and name it in evaluate.data"
                )
                yield error_at(("data", "train", number, "held_out"), message)
        method, precision = self.tune.method, self.model.precision
        if precision in ("int8", "nf4") and self.tune.language.method == "full":
            instead = f"use {DEFAULT_METHOD}, or bf16"
            message = f"not supported with model.precision: {precision}: quantized weights cannot be trained; {instead}"
            yield error_at(("tune", "language"), message)
        elif precision in ("int8", "nf4") and method is None and self.tune.vision.method == "full":
            message = f"full without an adapter saves the whole model, which is not supported with model.precision: {precision}"
            yield error_at(("tune", "vision"), f"{message}; use bf16, or {DEFAULT_METHOD} in tune.language")
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (self.train.get(name) or {}).get("use_reentrant"):
                yield error_at(("train", name), "use_reentrant: true gives no gradients below frozen inputs; leave it out")
        if self.data.max_nonfinite_steps and method is not None and not METHODS[method].skips_steps:
            message = f"not supported with {method}, which needs the gradients of every step; leave it out"
            yield error_at(("data", "max_nonfinite_steps"), message)
        by_tokens = self.data.packing or self.data.tokens_per_batch is not None
        for name in ("per_device_train_batch_size", "dataloader_drop_last"):
            if by_tokens and self.train.get(name) is not None:
                message = "not supported with data.packing and data.tokens_per_batch, which set the batches; leave it out"
                yield error_at(("train", name), message)
        if self.train.get("train_sampling_strategy") == "group_by_length" and (by_tokens or self.data.stream):
            message = "not supported with data.stream, where row lengths are unknown before training; leave it out"
            if by_tokens:
                message = "not supported with data.packing and data.tokens_per_batch, which sort rows by length; leave it out"
            yield error_at(("train", "train_sampling_strategy"), message)
        if self.data.stream and (self.train.get("max_steps") or -1) < 1:
            yield error_at(("train", "max_steps"), "required with data.stream: true: a stream has no known length")
        for name, message in evaluation_errors(self.train, self.evaluate is not None, self.data.stream):
            yield error_at(("train", name), message)
        if not self.evaluates_while_training and self.evaluate and self.evaluate.while_training != WhileTraining():
            message = "needs an evaluation while training: give train.eval_strategy: steps or epoch, or leave it out"
            yield error_at(("evaluate", "while_training"), message)
        for key, message in self.objective.conflicts(self):
            yield error_at(("objective", *key), message)
        if self.data.packing and method is not None and not METHODS[method].packable:
            message = (
                f"not supported with {method}: a packed row would have its prompt before the first sample only; leave it out"
            )
            yield error_at(("data", "packing"), message)
        for data_key, message in feature_cache_errors(self):
            yield error_at(("data", *data_key), message)
        checkpointing = bool(self.train.get("activation_checkpointing") or self.train.get("gradient_checkpointing"))
        if (problem := self.tune.incompatibility(precision, checkpointing=checkpointing)) is not None:
            component, reason = problem
            yield error_at(("tune", component), reason)

    @property
    def evaluates_while_training(self) -> bool:
        """Whether held-out rows are evaluated while the model trains."""
        return bool(self.train.get("eval_strategy", "no") != "no")

    @property
    def best_metric(self) -> str:
        """`train.metric_for_best_model` without the prefix `eval_`; the held-out loss if there is none."""
        return str(self.train.get("metric_for_best_model") or "loss").removeprefix("eval_")

    def origin(self, key: str) -> str:
        """Where a dotted key was written: `FILE:LINE`, `command line: KEY=VALUE`, or `default`."""
        return self._origins.get(key, "default")

    def location(self, key: str) -> str | None:
        """Where a dotted key, or its nearest parent that was written, is; None if none was written."""
        while key and key not in self._origins:
            key = key.rpartition(".")[0]
        return self._origins.get(key)

    def to_yaml(self) -> str:
        """The resolved recipe, defaults filled and overrides applied, as YAML that loads back to an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))

    def __eq__(self, other: object) -> bool:
        # Where the keys were written does not count.
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))
