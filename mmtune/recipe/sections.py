"""The recipe's sections as frozen typed objects, each with its own checks. `mmtune.recipe.recipe` reads and writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal

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

from mmtune.methods.method_table import METHODS, refusal
from mmtune.recipe.media_sections import WINDOW, Augment, evaluation_augment_errors, window_errors
from mmtune.recipe.objective_section import AnyObjectiveSection, SftSection
from mmtune.recipe.pass_through.arguments import Settings, error_at, format_value, train_arguments
from mmtune.recipe.pass_through.library_facts import library_fact
from mmtune.recipe.prompt_sections import (
    WHERE,
    FieldsToValues,
    LabelsToWords,
    NamesToText,
    Shots,
    values_errors,
    verbalizer_errors,
    where_errors,
)
from mmtune.recipe.section import PassThroughArguments, PathText, Section, Text
from mmtune.recipe.train_rules import training_errors
from mmtune.recipe.tune_section import TuneSection, with_rates
from mmtune.recipe.yaml_lines import dump_yaml
from mmtune.utils.errors import nearest
from mmtune.utils.files import expand_user

BUILTIN_BASES = ("builtin:tiny-llava", "builtin:tiny-llava-untrained")
_ASSEMBLED_ONLY = ("projector", "vision_feature_layer", "vision_feature_select_strategy")


class Projector(Section):
    """The projector between a vision encoder and a language model that come from two checkpoints."""

    type: Literal["mlp"] = Field(default="mlp", description="Its form: LLaVA's two-layer MLP.")
    weights: PathText | None = Field(
        default=None, description="A run, adapter or checkpoint directory to take its weights from; null: random."
    )

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        return ({"type": given} if isinstance(given, str) else given), []


class ModelSection(Section):
    """The model: a ready vision-language checkpoint (`base`), or one put together from `vision` and `language`."""

    base: PathText | None = Field(
        default=None,
        description="A ready vision-language model: a hub id, a local directory, or builtin:tiny-llava, the small one "
        "that ships (builtin:tiny-llava-untrained is the same with random weights).",
    )
    vision: PathText | None = Field(default=None, description="A vision encoder to assemble from: hub id or directory.")
    language: PathText | None = Field(default=None, description="A language model to assemble from: hub id or directory.")
    projector: Projector | None = Field(default=None, description="Assembled models: mlp, or {type: mlp, weights: DIR}.")
    vision_feature_layer: StrictInt = Field(
        default=-2, description="Assembled models: the encoder layer that is projected; -2 is the last but one."
    )
    vision_feature_select_strategy: Literal["default", "full"] | None = Field(
        default=None,
        description="Assembled models: default drops the class token, full keeps all; null follows the encoder.",
    )
    chat_template: PathText | None = Field(
        default=None, description="A shipped chat template's name or a .jinja file; null takes the checkpoint's own."
    )
    precision: Literal["fp32", "bf16", "int8", "nf4"] = Field(
        default="fp32",
        description="The base's weights while training. int8 and nf4 quantize the language model's layers and keep the rest in "
        "bf16; what trains is fp32.",
    )
    trust_remote_code: StrictBool = Field(default=False, description="Run Python code that comes with a checkpoint.")
    attn_implementation: Text | None = Field(
        default=None, description="transformers' attn_implementation (sdpa, eager, ...); null: transformers chooses."
    )

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(given, dict):
            return given, []
        errors: list[InitErrorDetails] = []
        base, parts = given.get("base"), [part for part in ("vision", "language") if given.get(part) is not None]
        if base is not None:
            errors += [error_at(part, "base is given too; give either base, or vision and language") for part in parts]
            for name in _ASSEMBLED_ONLY if not parts else ():
                if given.get(name) is not None:
                    errors.append(error_at(name, "only means something for a model assembled from vision and language"))
            if isinstance(base, str) and base.startswith("builtin:") and base not in BUILTIN_BASES:
                errors.append(error_at("base", f"no built-in model '{base}'{nearest(base, BUILTIN_BASES)}"))
        elif not parts:
            errors.append(error_at((), "give either base, or vision and language"))
        elif len(parts) == 1:
            other = "language" if parts == ["vision"] else "vision"
            errors.append(error_at(parts[0], f"{other} is missing; a model is assembled from both"))
        elif given.get("projector") is None:
            given["projector"] = "mlp"
        attention, names = given.get("attn_implementation"), library_fact("attention")
        if isinstance(attention, str) and attention not in names and not re.fullmatch(r"[\w.-]+/[^/\s]+", attention):
            told = f"expected one of {', '.join(names)}, or a kernel of the hub, owner/name, got {format_value(attention)}"
            near = nearest(attention, set(names))
            errors.append(error_at("attn_implementation", told + (near if "did you mean" in near else "")))
        return given, errors

    @model_serializer(mode="wrap")
    def _serialize(self, handler: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # What the other form alone would have is left out, so that the text loads again.
        other = ("vision", "language", *_ASSEMBLED_ONLY) if self.base is not None else ("base",)
        return {name: value for name, value in handler(self).items() if name not in other}

    @property
    def checkpoints(self) -> dict[str, str]:
        """By key the directories and hub ids that the model is made of; a built-in base is not one."""
        names = {"base": self.base, "vision": self.vision, "language": self.language}
        return {key: name for key, name in names.items() if name is not None and not name.startswith("builtin:")}


class Source(Section):
    """Where rows are and how to read them."""

    path: PathText = Field(
        description="A file of rows (.json, .jsonl, .csv, .tsv, .parquet, .arrow, .tar), a glob or brace list of such files, a "
        "folder of them, a directory that datasets saved, or a hub id (org/name@config:split)."
    )
    template: PathText = Field(description="A shipped data template's name, or a template of your own (.yaml).")
    media_root: PathText | None = Field(default=None, description="Where media paths start; null: the file's own directory.")
    allow_outside_root: StrictBool = Field(
        default=False, description="Let media paths lead out of media_root, by .., an absolute path or a link."
    )
    allow_urls: StrictBool = Field(
        default=False, description="Fetch media that are http or https URLs, within limits, and keep them in a cache."
    )
    window: tuple[StrictFloat, StrictFloat] | None = Field(default=None, description=WINDOW)
    augment: Augment | None = Field(default=None, description="Random changes to the training images; null: none.")
    limit: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="Take only the first so many rows; null takes all."
    )
    weight: Annotated[StrictFloat, Field(gt=0)] = Field(
        default=1.0, description="How often an epoch takes the source (data.mix: repeats), or its part of an epoch (ratio)."
    )
    where: FieldsToValues | None = Field(default=None, description=WHERE)
    image_placeholder: Literal["error", "add"] = Field(
        default="error",
        description="A row with images and no placeholder for any of them: an error, or the images are added at the start of the "
        "first user turn.",
    )
    ignore: tuple[Text, ...] = Field(
        default=(), description="Fields of the rows that name or hold media and are meant to be left out; others are an error."
    )
    join: PathText | None = Field(
        default=None, description="A second file with a partner for each row, for templates that ask for one (vqa_v2)."
    )
    values: NamesToText | None = Field(
        default=None, description="Values for names that the template leaves open, such as {images: val2014} for vqa_v2."
    )
    system: Text | None = Field(default=None, description="A system message for rows that have none of their own.")
    shots: Shots | None = Field(default=None, description="Few-shot examples before each question.")
    shuffle_options: StrictBool = Field(default=False, description="Shuffle the answer options of templates that declare them.")
    verbalizer: LabelsToWords | None = Field(
        default=None,
        description="Label to answer words, {'0': cat, '1': dog}, or a list of words from label 0 on; for templates that declare "
        "labels.",
    )
    seed: StrictInt = Field(
        default=0,
        description="Of the choice of phrasing, examples and the order of options, the same in every epoch, and of augment.",
    )

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        if isinstance(given, dict) and isinstance(given.get("shots"), Mapping) and "path" in given:
            given["shots"] = {"path": given["path"], **given["shots"]}
        return given, where_errors(given) + verbalizer_errors(given) + values_errors(given) + window_errors(given)


class DataSection(Section):
    """The training data."""

    train: tuple[Source, ...] = Field(min_length=1, description="The sources of training rows.")
    mix: Literal["repeats", "ratio"] = Field(
        default="repeats",
        description="What the weights of sources are: repeats in an epoch, or ratios of an epoch as long as all sources.",
    )
    supervise: Literal["all", "last"] = Field(
        default="all", description="Loss on all answers of a conversation, or on its last one."
    )
    max_tokens: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None, description="The longest sample, in tokens with its images; null is no limit."
    )
    over_length: Literal["error", "drop_sample", "drop_media", "shrink_media"] = Field(
        default="error",
        description="A sample over max_tokens stops the run (error), is dropped (drop_sample), loses whole images (drop_media), "
        "or has its images made smaller (shrink_media); all are counted.",
    )
    plan: StrictBool = Field(
        default=False,
        description="Count every row's tokens before weights load, and balance batches over the processes by them. packing, "
        "tokens_per_batch and largest_batch_first do so too.",
    )
    packing: StrictBool = Field(
        default=False, description="Join samples, which do not attend to each other, to rows of at most tokens_per_batch tokens."
    )
    tokens_per_batch: Annotated[StrictInt, Field(ge=1)] | None = Field(
        default=None,
        description="The most tokens in a batch, padding counted, in place of train.per_device_train_batch_size; samples of "
        "similar lengths come together. With packing, null is max_tokens.",
    )
    largest_batch_first: StrictBool = Field(
        default=False, description="Begin with the step that has the most tokens, so that too little memory shows at once."
    )
    stream: StrictBool = Field(
        default=False, description="Read the rows in order as training goes, without looking through the whole data first."
    )
    shuffle_window: Annotated[StrictInt, Field(ge=1)] = Field(
        default=10_000, description="With stream: how many rows of a source are shuffled among themselves."
    )
    max_bad_fraction: Annotated[StrictFloat, Field(ge=0, le=1)] = Field(
        default=0.0, description="The fraction of rows that may be quarantined before the run stops, from 0 to 1."
    )
    max_nonfinite_steps: Annotated[StrictInt, Field(ge=0)] = Field(
        default=0,
        description="How many steps whose gradients are NaN or infinite may be skipped before the run stops, their rows named.",
    )
    check_rows: Annotated[StrictInt, Field(ge=0)] = Field(
        default=2000,
        description="How many rows have their text and image headers checked before weights load; 0 for none.",
    )

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(given, dict):
            return given, []
        errors = []
        if given.get("packing") is True and given.get("tokens_per_batch") is None and given.get("max_tokens") is None:
            errors.append(error_at("packing", "give tokens_per_batch or max_tokens: the longest row of joined samples"))
        most, longest = given.get("tokens_per_batch"), given.get("max_tokens")
        if isinstance(most, int) and isinstance(longest, int) and most < longest:
            errors.append(error_at("tokens_per_batch", f"expected at least max_tokens ({longest}), got {most}"))
        if isinstance(most, int) and longest is None and given.get("stream") is not True:
            errors.append(error_at("tokens_per_batch", "give max_tokens too, so that no sample is longer than a batch"))
        if given.get("over_length") in ("drop_sample", "drop_media", "shrink_media") and longest is None:
            errors.append(error_at("over_length", f"{given['over_length']} means nothing without max_tokens"))
        if given.get("stream") is True:
            for name in ("plan", "packing", "tokens_per_batch", "largest_batch_first"):
                if given.get(name):
                    errors.append(error_at(name, "needs every row's length before training, which a stream does not know"))
            sources = given.get("train")
            if isinstance(sources, (list, tuple)) and len(sources) > 1 and given.get("mix") != "ratio":
                errors.append(error_at("mix", "the sources of a stream have no known length: give mix: ratio"))
        elif "shuffle_window" in given and given["shuffle_window"] != 10_000:
            errors.append(error_at("shuffle_window", "means nothing without stream: true; otherwise all rows are shuffled"))
        return given, errors

    @property
    def planned(self) -> bool:
        """Whether every row's tokens are counted before weights load; where a long row stops the run, it stops there."""
        stops = self.max_tokens is not None and self.over_length == "error" and not self.stream
        return self.plan or self.packing or self.tokens_per_batch is not None or self.largest_batch_first or stops


class EvaluateSection(Section):
    """Exact match on held-out rows."""

    data: tuple[Source, ...] = Field(min_length=1, description="The sources of held-out rows.")
    answer_after: Text | None = Field(
        default=None, description="Compare only what follows this text in the answer; null compares the whole answer."
    )
    max_new_tokens: Annotated[StrictInt, Field(ge=1)] = Field(
        default=64, description="The longest answer to generate, in tokens."
    )
    score: Literal["generate", "choices"] = Field(
        default="generate",
        description="Generate an answer, or take the likeliest of the row's candidates: answer options, or a verbalizer's words.",
    )
    batch_size: Annotated[StrictInt, Field(ge=1)] = Field(default=16, description="Rows that are answered at once.")
    before: StrictBool = Field(default=True, description="Evaluate before tuning too, for comparison.")
    samples: Annotated[StrictInt, Field(ge=0)] = Field(
        default=24, description="How many answers the report shows with their images."
    )

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        return given, evaluation_augment_errors(given)


class Recipe(Section):
    """A whole recipe. Make one with `load_recipe`."""

    model: ModelSection = Field(description="The model to tune.")
    tune: TuneSection = Field(default_factory=TuneSection, description="What trains, and by which method.")
    objective: AnyObjectiveSection = Field(default=SftSection(), description="What the training minimizes.")
    data: DataSection = Field(description="The rows to train on.")
    evaluate: EvaluateSection | None = Field(default=None, description="The held-out evaluation; null evaluates nothing.")
    train: PassThroughArguments = Field(
        default_factory=lambda: Settings({"report_to": "none"}),
        description="transformers' TrainingArguments, by their own names; those not given keep transformers' defaults.",
    )
    output_dir: PathText = Field(description="The run directory.")

    _origins: dict[str, str] = PrivateAttr(default_factory=dict)

    @classmethod
    def _normalize(cls, given: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(given, dict):
            return given, []
        # A section whose every line is commented out reads as null.
        given = {name: value for name, value in given.items() if value is not None or name not in ("tune", "objective", "train")}
        train = given.pop("train", {})
        if not isinstance(train, Mapping):
            return given, [error_at("train", f"expected a mapping, got {format_value(train)}")]
        if isinstance(train.get("deepspeed"), str):
            train = {**train, "deepspeed": expand_user(train["deepspeed"])}
        settings, errors = train_arguments().check(train)
        errors = errors or training_errors(train)
        inner = [InitErrorDetails(type=f["type"], loc=("train", *f.get("loc", ())), input=None) for f in errors]
        if "learning_rate" not in train and isinstance(given.get("tune", {}), Mapping):
            given["tune"] = with_rates(given.get("tune", {}))
        return given | {"train": Settings(settings)}, inner

    @model_validator(mode="after")
    def _check_combinations(self) -> Recipe:
        """Refuse what the method's table says does not work, and write the methods' learning rates out."""
        method, precision = self.tune.method, self.model.precision
        if precision in ("int8", "nf4"):
            if self.tune.language.method == "full":
                told = f"quantized weights cannot train: with model.precision: {precision} use lora, or bf16 with full"
                raise ValidationError.from_exception_data("Recipe", [error_at(("tune", "language"), told)])
            if method is None and self.tune.vision.method == "full":
                told = f"leaves a whole model, which model.precision: {precision} is not; use bf16, or lora in the language model"
                raise ValidationError.from_exception_data("Recipe", [error_at(("tune", "vision"), told)])
        for name in ("activation_checkpointing_kwargs", "gradient_checkpointing_kwargs"):
            if (self.train.get(name) or {}).get("use_reentrant"):
                told = "use_reentrant: true gives no gradients below frozen inputs; leave it out"
                raise ValidationError.from_exception_data("Recipe", [error_at(("train", name), told)])
        if self.data.max_nonfinite_steps and method == "adalora":
            told = "adalora ranks by every step's gradients, so none can be skipped; leave it out"
            raise ValidationError.from_exception_data("Recipe", [error_at(("data", "max_nonfinite_steps"), told)])
        by_tokens = self.data.packing or self.data.tokens_per_batch is not None
        for name in ("per_device_train_batch_size", "dataloader_drop_last"):
            if by_tokens and self.train.get(name) is not None:
                told = "means nothing where data.packing or data.tokens_per_batch makes the batches; leave it out"
                raise ValidationError.from_exception_data("Recipe", [error_at(("train", name), told)])
        if self.data.stream and (self.train.get("max_steps") or -1) < 1:
            told = "a stream has no known length: give train.max_steps"
            raise ValidationError.from_exception_data("Recipe", [error_at(("train", "max_steps"), told)])
        for key, message in self.objective.conflicts(self):
            raise ValidationError.from_exception_data("Recipe", [error_at(("objective", *key), message)])
        if self.data.packing and method is not None and METHODS[method].kind == "prompt":
            told = f"{method} puts its prompt before the first sample of a packed row and before no other; take packing out"
            raise ValidationError.from_exception_data("Recipe", [error_at(("data", "packing"), told)])
        if method is None:
            return self
        settings = next(t.settings for t in self.tune.components.values() if t.method == method)
        checkpointing = bool(self.train.get("activation_checkpointing") or self.train.get("gradient_checkpointing"))
        reason = refusal(method, settings, precision=self.model.precision, checkpointing=checkpointing)
        if reason is not None:
            where = next(name for name, tuning in self.tune.components.items() if tuning.method == method)
            raise ValidationError.from_exception_data("Recipe", [error_at(("tune", where), reason)])
        return self

    def origin(self, key: str) -> str:
        """Where a dotted key was written: `FILE:LINE`, `command line: KEY=VALUE`, or `default`."""
        return self._origins.get(key, "default")

    def place(self, key: str) -> str | None:
        """Where a dotted key, or the nearest above it, was written; None where nothing of it was."""
        while key and key not in self._origins:
            key = key.rpartition(".")[0]
        return self._origins.get(key)

    def to_yaml(self) -> str:
        """The resolved recipe, defaults filled and overrides applied, as YAML that loads back to an equal recipe."""
        return dump_yaml(self.model_dump(mode="json"))

    def __eq__(self, other: object) -> bool:
        # Where its keys were written is no part of what a recipe says.
        return isinstance(other, Recipe) and self.__dict__ == other.__dict__

    def __hash__(self) -> int:
        return hash(tuple(self.__dict__.values()))
