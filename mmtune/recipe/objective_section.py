"""A recipe's `objective` section: what the training minimizes. Each objective has a section class of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

from pydantic import BeforeValidator, Field, StrictFloat, StrictInt, ValidationError
from pydantic_core import InitErrorDetails

from mmtune.methods.method import DEFAULT_METHOD
from mmtune.methods.method_table import METHODS
from mmtune.recipe.pass_through.arguments import error_at, format_value
from mmtune.recipe.section import PathText, Section
from mmtune.utils.errors import nearest

if TYPE_CHECKING:
    from mmtune.recipe.sections import Recipe


RouterCoefficient = Annotated[StrictFloat, Field(ge=0)] | None
ROUTER_LOSS = (
    "The weight of the load-balancing loss of a mixture of experts in the loss, where its class computes one; 0 leaves it out, "
    "null takes the base's config (router_aux_loss_coef where output_router_logits is true)."
)


class ObjectiveSection(Section):
    """The settings of one objective. A subclass names its `type` and overrides what differs."""

    uses_model_loss: ClassVar[bool] = False
    """Whether the model itself computes the loss, so that a tuning method can add a term to it."""
    type: str
    router_aux_loss_coef: RouterCoefficient = Field(default=None, description=ROUTER_LOSS)

    @property
    def models(self) -> dict[str, str]:
        """The models beside the trained one: their paths or hub ids by key of this section."""
        return {}

    def conflicts(self, recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
        """What the objective excludes in the rest of the recipe: the key and the message. An override yields these as well."""
        method = METHODS.get(str(recipe.tune.method))
        if method is not None and method.adds_to_loss and not self.uses_model_loss:
            replaced = f"{method.name} adds a term to the model's own loss, which {self.type} replaces"
            yield ("type",), f"{replaced}; use {DEFAULT_METHOD}, or type: sft"

    def for_rehearsal(self, model: str, layers: int) -> dict[str, Any]:
        """The section with every model replaced, and layers within a tiny model.

        Args:
            model: the path of the tiny model.
            layers: how many layers its text model has.
        """
        return self.model_dump(mode="json", exclude_none=True) | dict.fromkeys(self.models, model)


class SftSection(ObjectiveSection):
    """Supervised fine-tuning: cross entropy at the supervised tokens."""

    uses_model_loss = True
    type: Literal["sft"] = Field(default="sft", description="The objective.")

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(values, dict) or "type" in values:
            return values, []
        owners = {key: [name for name, section in OBJECTIVE_SECTIONS.items() if key in section.model_fields] for key in values}
        foreign = {key: names for key, names in owners.items() if names and key not in cls.model_fields}
        errors = [
            error_at(key, f"a setting of the objective {' or '.join(names)}; expected objective.type beside it, got none")
            for key, names in foreign.items()
        ]
        return {key: value for key, value in values.items() if key not in foreign}, errors


Weight = Annotated[StrictFloat, Field(ge=0)]


class LayerPairs(Section):
    """Layers of the student and of the teacher that are compared."""

    layers: tuple[tuple[StrictInt, StrictInt], ...] = Field(
        min_length=1, description="Pairs [student layer, teacher layer]; negative numbers count from the last one."
    )
    weight: Annotated[StrictFloat, Field(gt=0)] = Field(default=1.0, description="The weight of this term in the loss.")


class DistillationSection(ObjectiveSection):
    """Knowledge distillation: the student learns the teacher's distribution at the supervised tokens."""

    type: Literal["distillation"] = Field(description="The objective.")
    teacher: PathText = Field(
        description="The teacher: a run, one of its checkpoints, an adapter directory, a checkpoint, or a hub id. Its vocabulary "
        "and its image processing must be the student's."
    )
    temperature: Annotated[StrictFloat, Field(gt=0)] = Field(
        default=1.0, description="Divides the logits of both models before the divergence (TRL's temperature)."
    )
    beta: Annotated[StrictFloat, Field(ge=0, le=1)] = Field(
        default=0.0,
        description="The generalized Jensen-Shannon divergence (TRL's beta): 0 is KL(teacher || student), 1 is KL(student || "
        "teacher), 0.5 the Jensen-Shannon divergence.",
    )
    distillation_weight: Weight = Field(default=1.0, description="The weight of the divergence in the loss.")
    crossentropy_weight: Weight = Field(default=0.0, description="The weight of the cross entropy on the labels in the loss.")
    hidden_states: LayerPairs | None = Field(
        default=None,
        description="Mean squared error between hidden states. 0 is the embeddings' output, 1 the first layer's, as in "
        "transformers' hidden_states. The two models need one hidden size.",
    )
    attention_maps: LayerPairs | None = Field(
        default=None,
        description="KL divergence between attention distributions of the text model. 0 is the first layer, as in transformers' "
        "attentions. The two models need one number of heads.",
    )

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        if not isinstance(values, dict) or values.get("distillation_weight") != 0:
            return values, []
        if values.get("hidden_states") or values.get("attention_maps"):
            return values, []
        message = "0 leaves nothing of the teacher in the loss; give hidden_states or attention_maps, or type: sft"
        return values, [error_at("distillation_weight", message)]

    @property
    def models(self) -> dict[str, str]:
        return {"teacher": self.teacher}

    def for_rehearsal(self, model: str, layers: int) -> dict[str, Any]:
        section = super().for_rehearsal(model, layers)
        for name, last in {"hidden_states": layers, "attention_maps": layers - 1}.items():
            if name in section:
                section[name]["layers"] = [[max(-last, min(layer, last)) for layer in pair] for pair in section[name]["layers"]]
        return section

    def conflicts(self, recipe: Recipe) -> Iterator[tuple[tuple[str, ...], str]]:
        yield from super().conflicts(recipe)
        if self.attention_maps is None:
            return
        attention = recipe.model.attn_implementation
        if attention != "eager":
            message = f"other attention returns no maps: expected model.attn_implementation: eager, got {format_value(attention)}"
            yield ("attention_maps",), message
        if recipe.data.packing:
            yield ("attention_maps",), "packed rows have maps over several samples; take data.packing out"
        method = METHODS.get(str(recipe.tune.method))
        if method is not None and not method.packable:  # its prompt comes before every sample
            yield ("attention_maps",), f"{method.name} adds virtual tokens, which the teacher's maps lack; use {DEFAULT_METHOD}"


_AnySection = SftSection | DistillationSection

OBJECTIVE_SECTIONS: dict[str, type[ObjectiveSection]] = {
    name: section for section in get_args(_AnySection) for name in get_args(section.model_fields["type"].annotation)
}
"""By `objective.type`; `mmtune.objectives.objective_table` has the same names."""


def _by_type(value: Any) -> Any:
    if isinstance(value, ObjectiveSection):
        return value
    if not isinstance(value, Mapping):
        example = value if isinstance(value, str) and value in OBJECTIVE_SECTIONS else "sft"
        message = f"expected a mapping, such as {{type: {example}}}, got {format_value(value)}"
        raise ValidationError.from_exception_data("ObjectiveSection", [error_at((), message)])
    name = value.get("type", "sft")
    if not isinstance(name, str) or name not in OBJECTIVE_SECTIONS:
        names = tuple(OBJECTIVE_SECTIONS)
        hint = nearest(name, names) if isinstance(name, str) else ""
        message = f"expected one of {', '.join(names)}, got {format_value(name)}{hint}"
        raise ValidationError.from_exception_data("ObjectiveSection", [error_at("type", message)])
    return OBJECTIVE_SECTIONS[name].model_validate(value)


AnyObjectiveSection = Annotated[_AnySection, BeforeValidator(_by_type)]
"""A field that takes the section class of its `type`."""
