"""Import rules of the packages, and the rules that hold for every source file.

The checks are functions from source text to a list of faults, so that each is first shown to find the fault it is for.
"""

from __future__ import annotations

import ast
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "mmtune"
MAX_LINES = 500

MAX_FILES = 12  # Python files in one folder

# What each package, and each module at the top, may import besides itself and the package's own `__init__`.
# docs/architecture.md has the same table. A package that is not here is a fault.
BASIC = {"console", "distributed", "utils"}
MAY_IMPORT: dict[str, set[str]] = {
    "__init__": set(),
    "__main__": {"cli", "console"},
    "utils": set(),
    "console": {"utils"},
    "families": {"utils"},
    "distributed": {"console", "utils"},
    "methods": {"console", "families", "utils"},
    "recipe": {"methods", "utils"},
    "run_directory": {"distributed", "recipe", "utils"},
    "builtin": {"utils"},
    "chat_templates": {"utils"},
    "data": {"chat_templates", "console", "families", "recipe", "utils"},
    "models": BASIC | {"builtin", "chat_templates", "families", "methods", "recipe", "run_directory"},
    "tuning": BASIC | {"families", "methods", "models", "recipe"},
    "objectives": BASIC | {"chat_templates", "data", "methods", "models", "recipe"},
    "planning": BASIC | {"data", "families", "methods", "models", "objectives", "recipe", "tuning"},
    "evaluation": BASIC | {"data", "models", "recipe", "run_directory"},
    "explain": BASIC | {"data", "evaluation", "models"},
    "report": BASIC | {"data", "evaluation", "explain", "families", "methods", "recipe", "run_directory"},
    "training": BASIC
    | {"data", "evaluation", "families", "methods", "models", "objectives", "planning", "recipe", "report"}
    | {"run_directory", "tuning"},
    "release": BASIC | {"data", "evaluation", "methods", "models", "recipe", "run_directory"},
    "serving": BASIC | {"chat_templates", "data", "evaluation", "models", "recipe", "release", "run_directory"},
    "chat": BASIC | {"data", "explain", "families", "models", "report"},
    "preflight": BASIC | {"data", "evaluation", "families", "methods", "models", "recipe"},
}
# These run the whole job, and may import every package but the command line, which nothing imports.
WHOLE_JOB = {"train", "rehearse", "cli"}

UNSAFE_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
UNSAFE_CALLS = {"torch.load", "yaml.full_load", "yaml.full_load_all", "yaml.unsafe_load", "yaml.unsafe_load_all"}
UNSAFE_YAML_LOADERS = {"Loader", "CLoader", "FullLoader", "CFullLoader", "UnsafeLoader", "CUnsafeLoader"}


def sources() -> list[Path]:
    files = sorted(PACKAGE.rglob("*.py"))
    assert PACKAGE / "utils" / "errors.py" in files
    return files


def name_of(file: Path) -> str:
    """`mmtune/data/media/media.py` is `mmtune.data.media.media`; a package's `__init__.py` keeps its name."""
    return ".".join(file.relative_to(ROOT).with_suffix("").parts)


def package_of(module: str) -> str:
    """`data` for `mmtune.data.media.media`, `__init__` for the package itself."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def dotted(node: ast.AST) -> str:
    """`torch.load` for that expression; empty for one that is not a dotted name."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute) and (owner := dotted(node.value)):
        return f"{owner}.{node.attr}"
    return ""


def is_main_guard(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("__name__ == '__main__'", "'__main__' == __name__")


def imports_of(tree: ast.AST, module: str) -> list[tuple[int, str]]:
    """Every module imported anywhere in `tree`, inside functions and under TYPE_CHECKING too, with its line."""
    package = module.split(".")[:-1]
    imports: list[tuple[int, str]] = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            imports += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            origin = ".".join([*base, *([node.module] if node.module else [])])
            # `from mmtune import data` imports a subpackage, `from mmtune import __version__` only the top one.
            deep = origin == "mmtune"
            imports += [(node.lineno, f"{origin}.{alias.name}" if deep else origin) for alias in node.names]
        elif isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("import_module", "__import__"):
            names = [arg.value for arg in node.args[:1] if isinstance(arg, ast.Constant)]
            imports += [(node.lineno, name) for name in names if isinstance(name, str)]
    return imports


def packages_imported(tree: ast.AST, module: str, packages: set[str]) -> list[tuple[int, str]]:
    ours = [(line, name) for line, name in imports_of(tree, module) if name.split(".")[0] == "mmtune"]
    return [(line, package if (package := package_of(name)) in packages else "__init__") for line, name in ours]


def direction_faults(source: str, module: str, packages: set[str]) -> list[str]:
    """The imports in `source` that the table does not allow. `packages` are the names at the package's top."""
    tree, package = ast.parse(source), package_of(module)
    if package not in MAY_IMPORT and package not in WHOLE_JOB:
        return [f"{module}: a package that the table of this test does not have"]
    allowed = (packages - {"cli"} if package in WHOLE_JOB else MAY_IMPORT[package]) | {package, "__init__"}
    # A file that runs as a program hands over to the command line, and is then the start of the process and no import.
    handed_over = {
        imported
        for node in ast.walk(tree)
        if is_main_guard(node) and package in WHOLE_JOB
        for imported in packages_imported(node, module, packages)
    }
    return [
        f"{module}:{line}: {package} may not import {other}"
        for line, other in packages_imported(tree, module, packages)
        if other not in allowed and (line, other) not in handed_over
    ]


def safe_yaml_loaders(tree: ast.AST) -> set[str]:
    """The safe loaders, and the classes of this file that derive from one."""
    safe = {"yaml.SafeLoader", "yaml.CSafeLoader", "SafeLoader", "CSafeLoader"}
    classes = [node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
    for _ in classes:  # once for each step of the longest possible chain of classes
        safe |= {node.name for node in classes if any(dotted(base) in safe for base in node.bases)}
    return safe


def passes_on(handler: ast.ExceptHandler) -> bool:
    """Whether a handler that catches everything raises it again, or hands it to another thread, which will."""
    last = handler.body[-1]
    handed = [
        node
        for node in ast.walk(handler)
        if isinstance(node, ast.Call) and dotted(node.func).split(".")[-1] in ("append", "put", "set_exception")
        if handler.name and any(dotted(argument) == handler.name for argument in node.args)
    ]
    return bool(handed) or (isinstance(last, ast.Raise) and last.exc is None)


def loads_a_class_by_name(called: str) -> bool:
    """Whether a call takes the class, and with it the code, that a checkpoint names."""
    owner, _, method = called.rpartition(".")
    return method in ("from_pretrained", "from_config") and owner.split(".")[-1].lower().startswith("auto")


def content_faults(source: str, module: str) -> list[str]:
    """What no file may contain: swallowed errors, code that a checkpoint brings, unsafe loading, notes to oneself."""
    tree = ast.parse(source)
    faults: list[str] = []

    def fault(line: int, text: str) -> None:
        faults.append(f"{module}:{line}: {text}")

    safe = safe_yaml_loaders(tree)
    for line, name in imports_of(tree, module):
        if name.split(".")[0] in UNSAFE_MODULES:
            fault(line, f"imports {name}, which runs what it reads")
    for node in ast.walk(tree):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {dotted(item) if item else "" for item in caught}
            if "Exception" in names:
                fault(node.lineno, "except Exception")
            elif names & {"", "BaseException"} and not passes_on(node):
                fault(node.lineno, "catches everything and does not pass it on")
        elif isinstance(node, ast.keyword) and node.arg == "trust_remote_code":
            if isinstance(node.value, ast.Constant) and node.value.value:
                fault(node.value.lineno, "trust_remote_code is the recipe's to give")
        elif isinstance(node, ast.Dict):
            pairs = [pair for pair in zip(node.keys, node.values, strict=True) if isinstance(pair[0], ast.Constant)]
            values = [value for key, value in pairs if key.value == "trust_remote_code"]
            if any(isinstance(value, ast.Constant) and value.value for value in values):
                fault(node.lineno, "trust_remote_code is the recipe's to give")
        elif isinstance(node, ast.Attribute) and dotted(node) in {f"yaml.{name}" for name in UNSAFE_YAML_LOADERS}:
            fault(node.lineno, f"{dotted(node)} is not a safe loader")
        elif isinstance(node, ast.Call):
            called = dotted(node.func)
            if called in UNSAFE_CALLS:
                fault(node.lineno, called)
            elif loads_a_class_by_name(called) and not any(word.arg == "trust_remote_code" for word in node.keywords):
                fault(node.lineno, f"{called} without trust_remote_code: transformers would ask on standard input")
            elif called == "Console":
                fault(node.lineno, "a rich console that does not escape text; StyledConsole does")
            elif called in ("yaml.load", "yaml.load_all"):
                loaders = [*node.args[1:2], *(word.value for word in node.keywords if word.arg == "Loader")]
                if not loaders or dotted(loaders[0]) not in safe:
                    fault(node.lineno, f"{called} without a safe loader")
    lines = source.splitlines()
    for number, line in enumerate(lines, start=1):
        if note := re.search(r"\b(TODO|FIXME|XXX)\b", line):
            fault(number, note[0])
    if len(lines) > MAX_LINES:
        fault(len(lines), f"{len(lines)} lines are two files")
    return faults


def top_names() -> set[str]:
    return {item.stem for item in PACKAGE.iterdir() if item.suffix == ".py" or (item / "__init__.py").is_file()}


def public_names(source: str) -> list[str]:
    """The functions and classes at the top of a file whose names begin without an underscore."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [node.name for node in ast.parse(source).body if isinstance(node, kinds) and not node.name.startswith("_")]


def repeated(names: Iterable[str]) -> list[str]:
    return [name for name, count in Counter(names).items() if count > 1]


def shadowed(names: set[str]) -> set[str]:
    """Those of `names` that a launched `mmtune/train.py`, first on the path, would hide from every other library."""
    installed = set(metadata.packages_distributions()) - {"mmtune"}
    return (names - {"__init__", "__main__"}) & (set(sys.stdlib_module_names) | installed)


# The two halves of pydantic's own interface: it chooses their versions, and its documentation imports from them.
PARTS_OF = {"pydantic_core": "pydantic", "annotated_types": "pydantic"}


def libraries_imported() -> dict[str, str]:
    """The libraries that the package imports, each with one place where it does."""
    places: dict[str, str] = {}
    for file in sources():
        for line, name in imports_of(ast.parse(file.read_text("utf-8")), name_of(file)):
            top = name.split(".")[0]
            if top != "mmtune" and top not in sys.stdlib_module_names:
                places.setdefault(PARTS_OF.get(top, top), f"{file.relative_to(ROOT)}:{line}")
    return places


# ---- the package


@pytest.mark.parametrize("file", sources(), ids=name_of)
def test_imports_go_one_way(file: Path) -> None:
    assert direction_faults(file.read_text("utf-8"), name_of(file), top_names()) == []


@pytest.mark.parametrize("file", sources(), ids=name_of)
def test_no_file_has_forbidden_content(file: Path) -> None:
    assert content_faults(file.read_text("utf-8"), name_of(file)) == []


def test_every_folder_of_the_package_is_a_package() -> None:
    folders = {file.parent for file in sources()}
    assert [str(folder) for folder in sorted(folders) if not (folder / "__init__.py").is_file()] == []


@pytest.mark.parametrize("folder", ["mmtune", "tests"])
def test_a_folder_holds_few_files_and_a_file_name_occurs_once(folder: str) -> None:
    files = [*(ROOT / folder).rglob("*.py")]
    assert {str(place): n for place, n in Counter(file.parent for file in files).items() if n > MAX_FILES} == {}
    assert repeated(file.name for file in files if file.name not in ("__init__.py", "conftest.py")) == []


def test_the_name_of_a_public_function_or_class_occurs_once() -> None:
    assert repeated(name for file in sources() for name in public_names(file.read_text("utf-8"))) == []


def test_no_module_at_the_top_hides_a_library() -> None:
    assert shadowed(top_names()) == set()


def test_every_library_imported_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    declared = {canonicalize_name(Requirement(line).name) for line in [*project["dependencies"], *extras]}
    distributions = metadata.packages_distributions()
    missing = {
        f"{place}: {library}"
        for library, place in libraries_imported().items()
        if not declared & {canonicalize_name(name) for name in distributions.get(library, [library])}
    }
    assert missing == set()


def _pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text("utf-8").splitlines()
    pinned = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {canonicalize_name(name): version for name, version in pinned}


def test_constraints_pin_every_dependency_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))
    pins = _pins()
    extras = [line for lines in project["project"]["optional-dependencies"].values() for line in lines]
    for line in [*project["project"]["dependencies"], *extras, *project["build-system"]["requires"]]:
        requirement = Requirement(line)
        pin = pins.get(canonicalize_name(requirement.name))
        assert pin is not None, f"constraints.txt does not pin {requirement.name}"
        assert requirement.specifier.contains(pin), f"constraints.txt has {requirement.name}=={pin}, against {line}"


def test_constraints_pin_what_is_installed_and_what_that_requires() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    pins = _pins()
    waiting = [Requirement(line) for line in [*project["dependencies"], *project["optional-dependencies"]["dev"]]]
    seen: set[tuple[str, str]] = set()
    while waiting:
        requirement = waiting.pop()
        name, extras = canonicalize_name(requirement.name), requirement.extras or {""}
        exact = any(each.operator == "==" for each in requirement.specifier)
        assert name in pins or exact, f"constraints.txt does not pin {name}"  # torch's CUDA build names its companions exactly
        installed = metadata.distribution(name)
        assert name not in pins or Version(installed.version).public == pins[name], f"{name} {installed.version} is installed"
        for extra in extras:
            if (name, extra) not in seen:
                seen.add((name, extra))
                needed = [Requirement(line) for line in installed.requires or []]
                waiting += [each for each in needed if not each.marker or each.marker.evaluate({"extra": extra})]
    assert len(seen) > 100


# ---- the checks themselves find what they are for

PACKAGES = {"utils", "recipe", "data", "models", "tuning", "training", "evaluation", "release", "chat", "train", "cli"}


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmtune.data.encoding.encode", "from mmtune.training.trainer import TuningTrainer"),
        ("mmtune.data.encoding.encode", "import mmtune.models.load as load"),
        ("mmtune.data.encoding.encode", "def late():\n    from mmtune import models"),
        ("mmtune.data.message", "from ..tuning import apply"),
        ("mmtune.data.message", "from .. import tuning"),
        ("mmtune.data.__init__", "from ..models import load"),
        ("mmtune.data.encoding.encode", "import importlib\nimportlib.import_module('mmtune.release')"),
        ("mmtune.models.load", "from mmtune.data.message import Message"),
        ("mmtune.models.load", "if TYPE_CHECKING:\n    from mmtune.evaluation import run"),
        ("mmtune.utils.errors", "from mmtune.recipe.recipe import Recipe"),
        ("mmtune.recipe.recipe", "import mmtune.data"),
        ("mmtune.tuning.apply", "from mmtune.training import trainer"),
        ("mmtune.evaluation.evaluate", "from mmtune.tuning import apply"),
        ("mmtune.chat.session", "from mmtune.release import merge"),
        ("mmtune.train", "from mmtune.cli.main import main"),
        ("mmtune.data.sources.source", "if __name__ == '__main__':\n    from mmtune.cli.main import main"),
        ("mmtune.helpers", ""),
    ],
)
def test_a_forbidden_import_is_reported(module: str, source: str) -> None:
    assert len(direction_faults(source, module, PACKAGES)) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("mmtune.data.encoding.encode", "from mmtune.data import media\nfrom mmtune.utils.errors import UserError\nimport torch"),
        ("mmtune.data.__init__", "from . import media\nfrom .encode import collate"),
        ("mmtune.models.load", "from mmtune import __version__\nfrom mmtune.recipe.recipe import ModelSection"),
        ("mmtune.train", "import mmtune.chat.session\nif __name__ == '__main__':\n    from mmtune.cli.main import main"),
        ("mmtune.recipe.sections", "from mmtune.recipe.recipe import Recipe"),
        ("mmtune.data.sources.source", "from mmtune.recipe.yaml_lines import Document"),
        ("mmtune.cli.main", "from mmtune import train\nfrom mmtune.release import merge"),
        ("mmtune.models.load", "import mmtune_addons"),
    ],
)
def test_an_allowed_import_is_not_a_fault(module: str, source: str) -> None:
    assert direction_faults(source, module, PACKAGES) == []


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept Exception:\n    pass",
        "try:\n    f()\nexcept (OSError, Exception) as error:\n    raise",
        "try:\n    f()\nexcept:\n    pass",
        "try:\n    f()\nexcept BaseException:\n    cleanup()",
        "AutoModel.from_pretrained(name, trust_remote_code=True)",
        "options = {'trust_remote_code': True}",
        "torch.load(path)",
        "Console().print(table)",
        "AutoModel.from_pretrained(name, **settings)",
        "transformers.AutoProcessor.from_pretrained(name)",
        "auto.from_config(config)",
        "import pickle",
        "from joblib import load",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.FullLoader)",
        "class Lines(yaml.UnsafeLoader):\n    pass",
        "class Lines(Base):\n    pass\nyaml.load(text, Loader=Lines)",
        "yaml.unsafe_load(text)",
        "x = 1  # TO" + "DO: fix",
        "x = 1\n" * (MAX_LINES + 1),
    ],
)
def test_forbidden_content_is_reported(source: str) -> None:
    assert content_faults(source, "mmtune.data.encoding.encode")


@pytest.mark.parametrize(
    "source",
    [
        "try:\n    f()\nexcept (OSError, ValueError):\n    pass",
        "try:\n    f()\nexcept BaseException:\n    cleanup()\n    raise",
        "def generate():\n    try:\n        f()\n    except BaseException as error:\n        failed.append(error)",
        "AutoModel.from_pretrained(name, trust_remote_code=section.trust_remote_code)",
        "yaml.safe_load(text)",
        "class Lines(yaml.SafeLoader):\n    pass\nclass More(Lines):\n    pass\nyaml.load(text, Loader=More)",
        "x = 1\n" * MAX_LINES,
    ],
)
def test_allowed_content_is_not_a_fault(source: str) -> None:
    assert content_faults(source, "mmtune.data.encoding.encode") == []


def test_a_name_that_hides_a_library_is_reported() -> None:
    assert shadowed({"data", "types", "torch", "yaml"}) == {"types", "torch", "yaml"}
