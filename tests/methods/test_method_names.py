"""No module outside `mmtune/methods/` names a tuning method."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING

from mmtune.methods.method_table import METHODS

PACKAGE = Path(__file__).parents[2] / "mmtune"
MODULES = sorted(path for path in PACKAGE.rglob("*.py") if path.relative_to(PACKAGE).parts[0] != "methods")

VARIANTS = {"rslora", "loraplus", "pissa", "olora", "eva", *(name for method in METHODS.values() for name in method.variants)}
NAMES = {*METHODS, *VARIANTS}
ENGLISH = {"miss", "bottleneck", "road"}
"""Names that are words of English as well: only a string that is nothing else counts."""
CLASSES = {entry.__name__ for mapping in (PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING) for entry in mapping.values()}
WORD = re.compile(r"(?<![A-Za-z0-9])(" + "|".join(sorted(NAMES - ENGLISH, key=len, reverse=True)) + r")(?![A-Za-z0-9])")


def docstrings(tree: ast.AST) -> set[int]:
    """Identities of strings that are statements: docstrings, and those below an assignment."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)}


def named_methods(source: str) -> list[str]:
    """Line and text of each string and identifier that names a method, a variant, or a PEFT class of one method."""
    tree = ast.parse(source)
    skipped = docstrings(tree)
    hits = []
    for node in ast.walk(tree):
        texts: list[str] = []
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in skipped:
            texts = [node.value]
        elif isinstance(node, ast.Name):
            texts = [node.id]
        elif isinstance(node, ast.Attribute):
            texts = [node.attr]
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            texts = [node.name]
        elif isinstance(node, (ast.arg, ast.keyword)):
            texts = [node.arg or ""]
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            texts = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
        for text in texts:
            words = set(re.findall(r"\w+", text))
            if WORD.search(text.lower()) or text in ENGLISH & NAMES or words & CLASSES:
                hits.append(f"{getattr(node, 'lineno', 0)}: {text}")
    return hits


@pytest.mark.parametrize(
    "source",
    [
        'if method == "lora": pass',
        'allowed = (None, "lora")',
        'raise ValueError(f"{name} fails; use lora")',
        'rate *= 2 if ".lora_B." in name else 1',
        'config["lora_alpha"] = 2',
        'if init == "eva": pass',
        'if method == "miss": pass',
        "from peft import LoraConfig",
        "x = isinstance(tuner, AdaLoraModel)",
        "from mmtune.methods.entries.lora import LORA",
        "model.lora_A",
        'config = {"peft:PromptEncoderConfig": 1}',
    ],
)
def test_a_method_name_is_reported(source: str) -> None:
    assert named_methods(source)


def test_text_for_people_and_english_words_are_not_names() -> None:
    assert not named_methods('"""As LoRA does."""\nx = "rows that miss a field"\ny = "often"\nz = "the bottleneck is the disk"')


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.relative_to(PACKAGE).as_posix())
def test_no_module_outside_methods_names_one(path: Path) -> None:
    assert named_methods(path.read_text(encoding="utf-8")) == []
