"""No module outside `mmtune/families/` names a model family: a `model_type`, or a class of a processor, model or config."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES

from mmtune.families.family_table import FAMILIES, OUT_OF_SCOPE

PACKAGE = Path(__file__).parents[2] / "mmtune"
MODULES = {path.relative_to(PACKAGE).as_posix(): path for path in sorted(PACKAGE.rglob("*.py"))}

EXEMPT = {
    "models/assemble.py": "models assembled from parts are LLaVA models",
    "models/compatibility.py": "the parts of assembled models",
    "models/meta_model.py": "the config of an assembled model",
    "builtin/tiny_checkpoint.py": "the built-in model is a LLaVA model",
    "models/tiny/tiny_bases.py": "tiny models of the families of rehearsals",
    "models/tiny/tiny_models.py": "tiny models of the families of rehearsals",
    "models/tiny/tiny_templates.py": "the chat templates of tiny models",
    "chat_templates/resolving.py": "a shipped chat template has the name of its family",
}
"""Modules that may name families, with the reason."""

ENGLISH = {"git", "aria"}
"""Types that are words or programs as well."""
TYPES = {*MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES, *OUT_OF_SCOPE, *(name for f in FAMILIES.values() for name in f.model_types)}
IMAGE_PROCESSORS = {name for family in FAMILIES.values() for name in family.image_processors}
CLASSES = {
    *(name for family in FAMILIES.values() for name in family.processors),
    *(name for each in IMAGE_PROCESSORS for name in (each, f"{each}Fast", f"{each}Pil")),
    *(mapping[name] for mapping in (CONFIG_MAPPING_NAMES, PROCESSOR_MAPPING_NAMES) for name in TYPES & mapping.keys()),
    *(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.values()),
} - {"CLIPProcessor"}  # of two-tower models as well


def named_families(source: str) -> list[str]:
    """Line and text of each string and identifier that is a type, or has the name of a class of one family."""
    tree = ast.parse(source)
    skipped = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}  # docstrings
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
            names = [*(alias.name for alias in node.names), getattr(node, "module", None) or ""]
            texts = [part for name in names for part in name.split(".")]
        for text in texts:
            if text in TYPES - ENGLISH or CLASSES.intersection(re.findall(r"\w+", text)):
                hits.append(f"{getattr(node, 'lineno', 0)}: {text}")
    return hits


@pytest.mark.parametrize(
    "source",
    [
        'if config.model_type == "qwen2_vl": pass',
        'if type(processor).__name__ in ("Idefics2Processor", "Other"): pass',
        "from transformers import LlavaForConditionalGeneration",
        "from transformers.models.mllama.processing_mllama import rotate",
        "x = isinstance(config, Gemma3Config)",
        'settings = {"pixtral": 1, "mistral3": 2}',
        "from mmtune.families.separate.mllama import MLLAMA",
    ],
)
def test_a_family_name_is_reported(source: str) -> None:
    assert named_families(source)


def test_text_for_people_and_programs_are_not_names() -> None:
    assert not named_families('"""As LLaVA does."""\nx = "such as model: {base: builtin:tiny-llava}"\ny = ["git", "log"]')


@pytest.mark.parametrize("name", [name for name in MODULES if not name.startswith("families/")])
def test_no_module_outside_families_names_one(name: str) -> None:
    hits = named_families(MODULES[name].read_text(encoding="utf-8"))
    assert bool(hits) == (name in EXEMPT), hits
