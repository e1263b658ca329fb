"""Whether a teacher can read a student's batches, and whether the layers that a recipe pairs can be compared."""

from __future__ import annotations

from typing import Any

import torch

from mmtune.recipe.objective_section import DistillationSection
from mmtune.utils.errors import RecipeValueError

TEACHER = "objective.teacher"


def check_vocabulary(student: dict[str, int], teacher: dict[str, int]) -> None:
    """Compare two vocabularies.

    Args:
        student, teacher: id by token.

    Raises:
        RecipeValueError: the two differ.
    """
    if student == teacher:
        return
    token = min(token for token in student.keys() | teacher.keys() if student.get(token) != teacher.get(token))
    raise RecipeValueError(
        TEACHER,
        f"expected the student's vocabulary ({len(student)} tokens), got another one ({len(teacher)} tokens): {token!r} is "
        f"{student.get(token, 'missing')} in the student's and {teacher.get(token, 'missing')} in the teacher's",
    )


def check_model_inputs(student: dict[str, Any], teacher: dict[str, Any]) -> None:
    """Compare what two processors make of one sample.

    Args:
        student, teacher: one sample with an image, encoded by each processor.

    Raises:
        RecipeValueError: the two differ, so that the teacher could not read the student's batches.
    """
    for name in sorted(student.keys() | teacher.keys()):
        student_value, teacher_value = student.get(name), teacher.get(name)
        if not (isinstance(student_value, torch.Tensor) and isinstance(teacher_value, torch.Tensor)):
            shapes = [None if each is None else tuple(each.shape) for each in (student_value, teacher_value)]
        elif student_value.shape == teacher_value.shape and torch.equal(student_value, teacher_value):
            continue
        else:
            shapes = [tuple(student_value.shape), tuple(teacher_value.shape)]
        raise RecipeValueError(
            TEACHER,
            f"its processor prepares an image differently from the student's: {name} of shape {shapes[0]} in the student's and "
            f"{shapes[1]} in the teacher's, or other values",
        )


def check_layers(settings: DistillationSection, student: Any, teacher: Any) -> None:
    """Compare the layers that a recipe pairs.

    Args:
        student, teacher: configurations of the text models.

    Raises:
        RecipeValueError: layers that a model lacks, or that are of different sizes.
    """
    compared = {
        "hidden_states": (settings.hidden_states, "hidden_size", 1),
        "attention_maps": (settings.attention_maps, "num_attention_heads", 0),
    }
    for key, (pairs, size, extra) in compared.items():
        if pairs is None:
            continue
        ours, theirs = getattr(student, size), getattr(teacher, size)
        if ours != theirs:
            raise RecipeValueError(
                f"objective.{key}",
                f"expected one {size}, got {ours} in the student and {theirs} in the teacher; leave {key} out",
            )
        for number, pair in enumerate(pairs.layers):
            for layer, (name, config) in zip(pair, (("student", student), ("teacher", teacher)), strict=True):
                count = config.num_hidden_layers + extra
                if not -count <= layer < count:
                    raise RecipeValueError(
                        f"objective.{key}.layers.{number}", f"the {name} has {key} {-count} to {count - 1}, got {layer}"
                    )
