"""Measurement of method capabilities by running each method in each precision; writes `mmtune/methods/capabilities.json`.

    python tests/methods/measure_capabilities.py            # runs every cell and writes the file; half an hour
    python tests/methods/measure_capabilities.py NAME ...   # runs the cells of these methods and keeps the others as they are

`test_capabilities.py` runs some cells of every method again and holds the file to them.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

sys.path.insert(0, str(Path(__file__).parents[1] / "helpers"))  # as pytest has it
import torchvision_prepared as torchvision_prepared
from launched import launch, nothing_known, reason

from mmtune.methods import capability_table
from mmtune.methods.method_table import METHODS
from mmtune.models.load import load_trained
from mmtune.recipe.recipe import Recipe, load_recipe
from mmtune.release.merge import merge
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import CheckFailed, UserError

VARIANTS = {
    name: {"method": method.name, **variant.settings} for method in METHODS.values() for name, variant in method.variants.items()
}
"""Settings that change what a method can do, measured as methods of their own."""

# Settings that fit a model 128 wide.
SETTINGS: dict[str, dict[str, Any]] = {"gated_prefix": {"adapter_layers": 2}}


# At ZeRO-1 and 2 its processes wait for each other for ever; at ZeRO-3 it runs, and no rank can move.
PARTED_GRADIENTS = "rank allocation reads full gradients, which ZeRO shards"


def names() -> list[str]:
    return [*METHODS, *VARIANTS]


def write_recipe(name: str, precision: str, rows: Path, base: Path, run: Path, **settings: Any) -> Path:
    """A recipe of two steps of two samples, beside its run directory."""
    language = {"method": name, **SETTINGS.get(name, {}), **VARIANTS.get(name, {})}
    document = {
        "model": {"base": str(base), "precision": precision},
        "tune": {"projector": {"method": "full", "learning_rate": 1e-3}, "language": language},
        "data": {"train": [{"path": str(rows), "template": "llava"}]},
        "train": {
            "max_steps": 2,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "seed": 0,
            "disable_tqdm": True,
            **settings,
        },
        "output_dir": str(run),
    }
    path = run.with_suffix(".yaml")
    path.write_text(json.dumps(document), encoding="utf-8")
    return path


def losses(run: Path) -> list[float]:
    lines = RunDirectory(run).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["loss"] for line in lines]


def check_losses(expected: list[float], actual: list[float], precision: str) -> None:
    apart = max(abs(a - b) for a, b in zip(expected, actual, strict=True))
    if apart > (1e-4 if precision == "fp32" else 2e-2):
        raise CheckFailed(f"its losses differ by {apart:.2g}")


def measure(name: str, precision: str, rows: Path, base: Path, folder: Path) -> dict[str, Any]:
    """`train`, `checkpointing` and `merge` of one cell: true, or the reason why not."""
    run = folder / "run"

    def recipe(checkpointing: bool) -> Recipe:
        return load_recipe(write_recipe(name, precision, rows, base, run, activation_checkpointing=checkpointing))

    with nothing_known():
        plain: list[float] = []

        def trains() -> None:
            train(recipe(False), ["test"], overwrite=True)
            plain.extend(losses(run))

        cell = {"train": reason(trains)}
        if cell["train"] is not True:
            return {**cell, "checkpointing": cell["train"], "merge": "it does not train"}
        if not capability_table.measured_method(name).mergeable:
            cell["merge"] = "it does not change the weights of the base"
        else:
            cell["merge"] = reason(lambda: merge(run, folder / "out", overwrite=True, count=2))

        def same_losses() -> None:
            train(recipe(True), ["test"], overwrite=True)
            check_losses(plain, losses(run), precision)

        cell["checkpointing"] = reason(same_losses)
    return cell


def measure_zero(cells: list[tuple[str, str, int]], rows: Path, base: Path, folder: Path) -> list[bool | str]:
    """Whether a (method, precision, ZeRO stage) trains in two processes as it does in one, and leaves a whole adapter."""
    alone: dict[tuple[str, str], list[float]] = {}
    runs = [folder / "_".join(map(str, cell)) for cell in cells]
    with nothing_known():
        for name, precision, _ in cells:
            if (name, precision) not in alone:
                run = folder / f"alone_{name}_{precision}"
                train(load_recipe(write_recipe(name, precision, rows, base, run)), ["test"], overwrite=True)
                alone[name, precision] = losses(run)
    recipes = [
        (write_recipe(*cell[:2], rows, base, run, per_device_train_batch_size=1), f"zero{cell[2]}")
        for cell, run in zip(cells, runs, strict=True)
    ]

    def same(cell: tuple[str, str, int], run: Path) -> None:
        name, precision, _ = cell
        check_losses(alone[name, precision], losses(run), precision)
        load_trained(run)  # refuses an adapter that is not whole
        one = load_file(folder / f"alone_{name}_{precision}" / "adapter" / "adapter_model.safetensors")
        two = load_file(run / "adapter" / "adapter_model.safetensors")
        apart = max(float((one[key].double() - two[key].double()).abs().mean()) for key in one)  # some hold indices
        if one.keys() != two.keys() or (precision == "fp32" and apart > 1e-6):
            raise CheckFailed(f"its adapter differs by {apart:.2g} on average in one tensor")

    trained = zip(cells, runs, launch(recipes, folder), strict=True)
    return [reason(lambda cell=cell, run=run: same(cell, run)) if done is True else done for cell, run, done in trained]


def measure_all(selected: Sequence[str]) -> dict[str, dict[str, dict[str, Any]]]:
    """Every cell of the selected methods and variants: by name and precision."""
    from mmtune.builtin.digits import TUNE_TASKS, Split, write_split
    from mmtune.builtin.tiny_checkpoint import build_untrained
    from mmtune.models.checkpoints.checkpoint_files import save_checkpoint

    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        split = write_split("rows", Split(scenes=12, held_out=False, tasks=TUNE_TASKS, questions=1, seed=0), folder)
        (folder / "rows.json").write_text(json.dumps(split), encoding="utf-8")
        save_checkpoint(*build_untrained(seed=0), folder / "base")
        rows, base = folder / "rows.json", folder / "base"
        measured = {name: {p: measure(name, p, rows, base, folder) for p in capability_table.PRECISIONS} for name in selected}
        cells = [
            (name, precision, stage)
            for name in selected
            for precision in capability_table.PRECISIONS
            for stage in capability_table.ZERO_STAGES
            if measured[name][precision]["train"] is True and name != "adalora"
        ]
        sharded = dict(zip(cells, measure_zero(cells, rows, base, folder), strict=True))
    for name, by_precision in measured.items():
        for precision, cell in by_precision.items():
            for stage in capability_table.ZERO_STAGES:
                why = "it does not train" if cell["train"] is not True else PARTED_GRADIENTS
                cell[f"zero{stage}"] = sharded.get((name, precision, stage), why)
    return measured


def main(selected: Sequence[str]) -> None:
    """Measure the selected methods, or all, and write the file.

    Raises:
        UserError: no such method, or the file was measured with other versions of the libraries.
    """
    if unknown := set(selected) - set(names()):
        raise UserError(f"expected methods or variants ({', '.join(names())}), got {', '.join(sorted(unknown))}")
    libraries = ("torch", "transformers", "peft", "bitsandbytes", "accelerate", "deepspeed")
    versions = {name: metadata.version(name) for name in libraries}
    earlier = json.loads(capability_table.CAPABILITIES.read_text(encoding="utf-8"))
    if selected and earlier["versions"] != versions:
        raise UserError(f"the other methods were measured with {earlier['versions']}; measure all with {versions}")
    torch.set_num_threads(1)
    cells_by_name = measure_all(selected or names())
    measured = earlier["methods"] | cells_by_name if selected else cells_by_name
    document = {"versions": versions, "methods": {name: measured[name] for name in names() if name in measured}}
    capability_table.CAPABILITIES.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    for name, by_precision in cells_by_name.items():
        for precision, cell in by_precision.items():
            works = [what for what, outcome in cell.items() if outcome is True]
            print(f"{name}, {precision}: {', '.join(works) or 'nothing'}")
            for what, outcome in cell.items():
                if outcome is not True:
                    print(f"  {what}: {outcome}")


if __name__ == "__main__":
    main(sys.argv[1:])
