"""Path length of the plainest LoRA run: the functions and files of mmtune that it executes.

    python benchmarks/path_length.py [--out FILE]

The recipe tunes the built-in model with LoRA on the language model, from one source of twelve rows: no evaluation, packing,
streaming, checkpoints or resuming, two optimizer steps in one process.

What counts: distinct functions and methods that are defined with `def` in a Python file of the package, from the call of
`load_recipe` to the return of `train`. Rows are encoded and collated in this process (`dataloader_num_workers: 0`), so that
these functions count. Properties count; generators and context managers count once. Lambdas, comprehensions, class bodies, module
bodies, templates, functions of libraries and functions that dataclasses generate do not count, and neither does the command line.
The first lines give the same count for each step of `train.py` alone: what a reader of that step meets.

The number says how much of the package a reader meets on the way of one run. It is no target for inlining.
"""

from __future__ import annotations

import argparse
import contextlib
import inspect
import io
import json
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from types import CodeType, FrameType

from PIL import Image

from mmtune.console.library_output import configure_console

PACKAGE = Path(__file__).resolve().parent.parent / "mmtune"
STEPS = ("recipe", "train", "validate", "load", "tune", "fit", "export", "summarize")
"""`recipe` is `load_recipe`; the others are functions of `train.py`. Calls between two steps count with the earlier one."""


def plainest_recipe(folder: Path) -> Path:
    """Rows, images and a recipe of nothing but defaults and what a LoRA run needs; returns the recipe's path."""
    rows = []
    for number in range(12):
        Image.new("RGB", (64, 48), (20 * number, 0, 0)).save(folder / f"{number}.png")
        turns = [{"from": "human", "value": "<image>\nHow red is it?"}, {"from": "gpt", "value": f"{number} of 12"}]
        rows.append({"id": str(number), "image": f"{number}.png", "conversations": turns})
    (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
    recipe = {
        "model": {"base": "builtin:tiny-llava", "precision": "fp32"},
        "tune": {"projector": "frozen", "language": {"method": "lora", "r": 8}},
        "data": {"train": [{"path": str(folder / "rows.json"), "template": "llava"}]},
        "train": {"max_steps": 2, "per_device_train_batch_size": 2, "dataloader_num_workers": 0},
        "output_dir": str(folder / "run"),
    }
    path = folder / "recipe.yaml"
    path.write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
    return path


@contextlib.contextmanager
def executed_code() -> Iterator[dict[str, set[CodeType]]]:
    """Inside, the code objects of the package that run are collected by step, in threads that start here too."""
    codes: dict[str, set[CodeType]] = {step: set() for step in STEPS}
    step = "recipe"

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal step
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(str(PACKAGE)):
            if code.co_name in STEPS and code.co_filename == str(PACKAGE / "train.py"):
                step = code.co_name
            codes[step].add(code)

    threading.setprofile(profile)
    sys.setprofile(profile)
    try:
        yield codes
    finally:
        sys.setprofile(None)
        threading.setprofile(None)


def functions_by_file(codes: set[CodeType]) -> dict[str, list[str]]:
    """Qualified names of functions by the path of their file in the package; class bodies are left out."""
    by_file: dict[str, list[str]] = defaultdict(list)
    for code in codes:
        if code.co_flags & inspect.CO_NEWLOCALS and code.co_name[0] != "<" and code.co_filename.endswith(".py"):
            by_file[str(Path(code.co_filename).resolve().relative_to(PACKAGE))].append(code.co_qualname)
    return {file: sorted(by_file[file]) for file in sorted(by_file)}


def count_functions(by_file: dict[str, list[str]]) -> int:
    """The number of functions in all files."""
    return sum(map(len, by_file.values()))


def main() -> None:
    """Train, print the functions by file, and write them to a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="write the list to this file too")
    arguments = parser.parse_args()
    configure_console()
    from mmtune.recipe.recipe import load_recipe
    from mmtune.train import train

    with tempfile.TemporaryDirectory() as folder:
        path = plainest_recipe(Path(folder))
        with contextlib.redirect_stdout(io.StringIO()), executed_code() as codes:
            train(load_recipe(path), ["benchmark"])
    by_file = functions_by_file(set().union(*codes.values()))
    lines = [f"{count_functions(by_file)} functions in {len(by_file)} files", ""]
    for step in STEPS:
        of_step = functions_by_file(codes[step])
        lines.append(f"{step:14} {count_functions(of_step):4} functions in {len(of_step):2} files")
    lines.append("")
    for file, names in by_file.items():
        lines += [f"{file} ({len(names)})", *(f"    {name}" for name in names)]
    text = "\n".join(lines)
    print(text)
    if arguments.out:
        arguments.out.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
