"""What each method does in each precision, found by running it: the source of `mmtune/methods/capabilities.json`.

    python tests/methods/measure.py      # runs every cell and writes the file; a few minutes

`test_capabilities.py` runs the same cells and holds the file to them.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from mmtune.errors import CheckFailed, UserError
from mmtune.methods import table
from mmtune.recipe import Recipe, load_recipe
from mmtune.release.merge import merge
from mmtune.run_directory import RunDirectory
from mmtune.train import train

VARIANTS = {"dora": {"method": "lora", "use_dora": True}}
"""Settings that change what a method can do, measured as methods of their own."""

# Settings that fit a model 128 wide.
SETTINGS: dict[str, dict[str, Any]] = {"gated_prefix": {"adapter_layers": 2}}


def names() -> list[str]:
    return [*table.METHODS, *VARIANTS]


@contextmanager
def nothing_known() -> Iterator[None]:
    """The recipe refuses what the table says does not work; here that is what is asked."""
    real = table.capabilities
    table.capabilities = dict  # type: ignore[assignment]
    try:
        yield
    finally:
        table.capabilities = real


def measure(name: str, precision: str, rows: Path, base: Path, folder: Path) -> dict[str, Any]:
    """`train`, `checkpointing` and `merge` of one cell: true, or the reason why not."""

    def recipe(checkpointing: bool) -> Recipe:
        language = {"method": name, **SETTINGS.get(name, {}), **VARIANTS.get(name, {})}
        document = {
            "model": {"base": str(base), "precision": precision},
            "tune": {"projector": {"method": "full", "learning_rate": 1e-3}, "language": language},
            "data": {"train": [{"path": str(rows), "template": "llava"}]},
            "train": {
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "logging_steps": 1,
                "use_cpu": True,
                "seed": 0,
                "activation_checkpointing": checkpointing,
                "disable_tqdm": True,
            },
            "output_dir": str(folder / "run"),
        }
        path = folder / "recipe.yaml"
        path.write_text(json.dumps(document), encoding="utf-8")
        return load_recipe(path)

    def losses() -> list[float]:
        lines = RunDirectory(folder / "run").metrics.read_text(encoding="utf-8").splitlines()
        return [json.loads(line)["loss"] for line in lines]

    with nothing_known():
        plain: list[float] = []

        def trains() -> None:
            train(recipe(False), ["test"], overwrite=True)
            plain.extend(losses())

        cell = {"train": reason(trains)}
        if cell["train"] is not True:
            return {**cell, "checkpointing": cell["train"], "merge": "it does not train"}
        if (name if name in table.METHODS else "lora") in table.METHODS and not _method(name).mergeable:
            cell["merge"] = "it is no change of weights"
        else:
            cell["merge"] = reason(lambda: merge(folder / "run", folder / "out", overwrite=True, count=2))

        def same_losses() -> None:
            train(recipe(True), ["test"], overwrite=True)
            apart = max(abs(a - b) for a, b in zip(plain, losses(), strict=True))
            if apart > (1e-4 if precision == "fp32" else 2e-2):
                raise CheckFailed(f"its losses differ by {apart:.2g}")

        cell["checkpointing"] = reason(same_losses)
    return cell


def reason(run: Callable[[], Any]) -> bool | str:
    """True, or the first line of what was raised: a method that fails is what is looked for here."""
    try:
        run()
    except (
        UserError,
        CheckFailed,
        RuntimeError,
        ValueError,
        AttributeError,
        TypeError,
        NotImplementedError,
        IndexError,
    ) as error:
        return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:120]}"
    return True


def _method(name: str) -> table.Method:
    return table.METHODS[VARIANTS.get(name, {"method": name})["method"]]


def main() -> None:
    from mmtune.builtin.digits import TUNE_TASKS, Part, make_part
    from mmtune.builtin.tiny import build_untrained
    from mmtune.model.checkpoint import save_checkpoint

    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        made = make_part("rows", Part(scenes=12, held_out=False, tasks=TUNE_TASKS, questions=1, seed=0), folder)
        (folder / "rows.json").write_text(json.dumps(made), encoding="utf-8")
        save_checkpoint(*build_untrained(seed=0), folder / "base")
        measured = {
            name: {p: measure(name, p, folder / "rows.json", folder / "base", folder) for p in table.PRECISIONS}
            for name in names()
        }
    libraries = ("torch", "transformers", "peft", "bitsandbytes")
    found = {"versions": {name: metadata.version(name) for name in libraries}, "methods": measured}
    table.CAPABILITIES.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
