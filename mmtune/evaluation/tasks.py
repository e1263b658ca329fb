"""Evaluation tasks: YAML files that say how a benchmark is read from its published files, asked and scored.

A task has a data template and a recipe's `evaluate` section, whose paths lie below the benchmark's folder. `docs/evaluation.md`
documents the format; `data_templates/eval/` has the shipped tasks.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field, ValidationError
from pydantic_core import InitErrorDetails

from mmtune.data.sources.reader import check_source
from mmtune.data.sources.source import data_files, is_missing_path
from mmtune.data.templates.template import load_data_template
from mmtune.evaluation.metrics.metric_table import check_template_metric, metric_name
from mmtune.recipe.pass_through.arguments import error_at, format_value
from mmtune.recipe.recipe import EvaluateSection, Source
from mmtune.recipe.section import Section, Text
from mmtune.recipe.yaml_lines import Document, apply_override, located_message, read_document
from mmtune.utils.errors import RecipeValueError, UserError, errors_at_key, nearest
from mmtune.utils.shipped import shipped_dir, yaml_files

PATHS = ("path", "join", "media_root")
"""Keys of a source that lie below the folder of the benchmark."""


class TaskFile(Section):
    """A task as its file says it, with paths that are relative to the benchmark's folder."""

    description: Text = Field(description="What the benchmark asks, and what its score is.")
    url: Text = Field(description="Where the files come from, such as the benchmark's page.")
    source: Text = Field(description="The address of the code or the paper that the prompt and the scoring rule come from.")
    template: Any = Field(description="A data template: a shipped one, a .yaml file, or its keys.")
    evaluate: EvaluateSection = Field(description="As in a recipe: the files of rows, and the settings that the benchmark fixes.")

    @classmethod
    def _normalize(cls, values: Any) -> tuple[Any, list[InitErrorDetails]]:
        template = values.get("template") if isinstance(values, dict) else None
        if template is None or (isinstance(template, (str, dict)) and template):
            return values, []
        message = f"expected the name of a data template, a .yaml file or the keys of one, got {format_value(template)}"
        return values, [error_at("template", message)]


OF_A_RUN = ("tasks", "leakage", "before", "samples", "while_training")
"""Keys of `evaluate` that say what a training run does."""


@dataclass(frozen=True)
class Task:
    """An evaluation task on the files of a folder.

    Attributes:
        name: the file name without `.yaml`.
        file: what the YAML file says.
        section: its `evaluate` section, with the paths of the files.
        document: the values of the file, with their lines.
    """

    name: str
    file: TaskFile
    section: EvaluateSection
    document: Document

    @contextmanager
    def located_errors(self) -> Iterator[None]:
        """Add to each RecipeValueError of the block the task's name, and the line where its key was written."""
        try:
            yield
        except RecipeValueError as error:
            origin = self.document.origin(error.key)
            raise UserError(f"task {self.name}: {located_message(origin, error.key, error.problem)}") from error


def shipped_tasks() -> dict[str, Path]:
    """The shipped tasks by name, as `yaml_files`."""
    return yaml_files(shipped_dir("data_templates") / "eval")


def read_task(name: str, overrides: Sequence[str] = ()) -> tuple[Document, TaskFile]:
    """Read and check a task's file.

    Args:
        name: a shipped task, or a `.yaml` file.
        overrides: `evaluate.key=value`.

    Raises:
        UserError: an unknown name, or a file that is not a valid task, with one problem per line.
    """
    shipped = shipped_tasks()
    if name not in shipped and not name.endswith((".yaml", ".yml")):
        raise UserError(f"unknown task '{name}'; expected a shipped one or a .yaml file{nearest(name, set(shipped))}")
    path = shipped.get(name, Path(name))
    document = read_document(path, "task", ", ".join(TaskFile.model_fields))
    for number, override in enumerate(overrides):
        apply_override(document, override, number, {})
    template = document.values.get("template")
    evaluate = document.values.get("evaluate")
    sources = evaluate.get("data") if isinstance(evaluate, dict) else None
    for source in sources if isinstance(sources, list) and template is not None else ():
        if isinstance(source, dict):
            source.setdefault("template", template if isinstance(template, str) else str(path))
    file = None
    try:
        file = TaskFile.model_validate(document.values)
    except ValidationError as error:
        for detail in error.errors():
            document.report(".".join(map(str, detail["loc"])), detail["msg"])
    if file is not None and not file.evaluate.data:
        document.report("evaluate.data", "required, and not given; such as [{path: rows.json}]")
    for key in OF_A_RUN:
        if isinstance(evaluate, dict) and key in evaluate:
            document.report(f"evaluate.{key}", "has no effect in a task; leave it out")
    document.raise_problems()
    assert file is not None
    if isinstance(template, dict):
        load_data_template(str(path))
    for number, source in enumerate(file.evaluate.data):
        try:
            with errors_at_key("template"):
                check_source(source)
                check_template_metric(source.template, load_data_template(source.template).metric)
        except RecipeValueError as error:
            key = f"evaluate.data.{number}.{error.key}"
            document.report("template" if error.key == "template" and key not in document.origins else key, error.problem)
    document.raise_problems()
    return document, file


def load_task(name: str, folder: Path, overrides: Sequence[str] = ()) -> Task:
    """A task on the files of a folder.

    Args:
        name: a shipped task, or a `.yaml` file.
        folder: the benchmark's folder.
        overrides: `evaluate.key=value`.

    Raises:
        UserError: as `read_task`; or files that are missing, with where they come from.
    """
    document, file = read_task(name, overrides)
    task = Path(name).stem if name.endswith((".yaml", ".yml")) else name
    sources = tuple(_below(source, folder) for source in file.evaluate.data)
    missing = [path for source in sources for path in _missing(source)]
    if missing:
        paths = "\n".join(f"  {path}" for path in dict.fromkeys(missing))
        raise UserError(f"task {task}: no such file or folder; the files come from {file.url}:\n{paths}")
    return Task(task, file, file.evaluate.model_copy(update={"data": sources}), document)


def recipe_tasks(section: EvaluateSection) -> list[Task]:
    """The tasks of a recipe. Batch size and cache are the recipe's; rows that are in the training data are a warning.

    Raises:
        RecipeValueError: a task cannot be read, or its files are missing.
    """
    tasks: dict[str, Task] = {}
    for number, entry in enumerate(section.tasks):
        with errors_at_key(f"evaluate.tasks.{number}"):
            task = load_task(entry.name, Path(entry.path))
            if task.name in tasks:
                raise UserError(f"expected each task once, got {task.name} again")
        settings = {"batch_size": section.batch_size, "cache": section.cache, "leakage": "warn"}
        tasks[task.name] = replace(task, section=task.section.model_copy(update=settings))
    return list(tasks.values())


def task_rows() -> list[dict[str, Any]]:
    """The shipped tasks: name, description, metrics, the files below the folder, where they come from, and the source."""
    rows = []
    for name in shipped_tasks():
        _, file = read_task(name)
        metrics = [metric_name(file.evaluate.metric, load_data_template(source.template).metric) for source in file.evaluate.data]
        files = [getattr(source, key) for source in file.evaluate.data for key in PATHS]
        rows.append(
            {
                "task": name,
                "about": file.description,
                "metrics": list(dict.fromkeys(metrics)),
                "files": list(dict.fromkeys(path for path in files if path is not None)),
                "url": file.url,
                "source": file.source,
            }
        )
    return rows


def _below(source: Source, folder: Path) -> Source:
    """The source with its paths below a folder. Media paths are relative to the folder, where the task does not name another."""
    paths = {key: str(folder / value) for key in PATHS if (value := getattr(source, key)) is not None}
    shots = source.shots and source.shots.model_copy(update=_below_shots(source.shots, folder))
    return source.model_copy(update={"media_root": str(folder), **paths, "shots": shots})


def _below_shots(shots: Any, folder: Path) -> dict[str, str]:
    return {key: str(folder / value) for key in PATHS if (value := getattr(shots, key)) is not None}


def _missing(source: Source) -> Iterator[str]:
    """The paths of a source that do not exist. A pattern must match a file."""
    for path in (source.path, source.join, source.media_root):
        if path is None or Path(path).exists():
            continue
        if path == source.media_root or is_missing_path(path):
            yield path
            continue
        try:
            data_files(path)
        except UserError:
            yield path


def print_tasks(rows: Sequence[Mapping[str, Any]]) -> None:
    """Print the rows of `task_rows`."""
    for row in rows:
        print(f"{row['task']} ({', '.join(row['metrics'])}): {row['about']}")
        print(f"  files below DIR: {', '.join(row['files'])}")
        print(f"  files come from: {row['url']}")
        print(f"  prompt and score: {row['source']}")
