"""The wheel, built and installed in an empty environment, has the files and commands of the checkout."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base

pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parent.parent


def run(*command: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Run with nothing in the environment that leads back to the checkout; the outcome is the caller's to judge."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV")}
    return subprocess.run([str(part) for part in command], cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def succeed(*command: str | Path, cwd: Path) -> str:
    done = run(*command, cwd=cwd)
    assert done.returncode == 0, f"{command} ended with {done.returncode}\n{done.stdout}\n{done.stderr}"
    return done.stdout


def shipped_files() -> dict[str, bytes]:
    """The files of the checkout that a wheel must carry, by their path in the wheel."""
    files = {
        f"mmtune/_shipped/{kind}/{file.relative_to(ROOT / kind).as_posix()}": file.read_bytes()
        for kind in ("recipes", "data_templates")
        for file in (ROOT / kind).rglob("*")
        if file.suffix in (".yaml", ".json")
    }
    package = (file for file in (ROOT / "mmtune").rglob("*") if file.is_file() and "__pycache__" not in file.parts)
    return files | {file.relative_to(ROOT).as_posix(): file.read_bytes() for file in package}


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A wheel built from the sdist built from the checkout, as a release is, so that the sdist is held to it too."""
    out = tmp_path_factory.mktemp("dist")
    succeed(sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT, cwd=out)
    [built] = out.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The `bin` of a new environment that holds the wheel, and borrows the libraries it depends on from this one.

    The running environment's site-packages comes after the new one's own, by a `.pth` line. Python does not read the
    `.pth` files of a folder that was itself added by one, so the editable install of the checkout stays behind.
    """
    environment = tmp_path_factory.mktemp("environment") / "venv"
    succeed(sys.executable, "-m", "venv", "--without-pip", environment, cwd=environment.parent)
    python = environment / "bin" / "python"
    site_packages = Path(
        succeed(python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))", cwd=environment.parent).strip()
    )
    pip = [sys.executable, "-m", "pip", "--python", python, "install", "--quiet", "--no-deps", "--no-index"]
    succeed(*pip, wheel, cwd=environment.parent)
    outer = dict.fromkeys([sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    (site_packages / "libraries_of_the_test_run.pth").write_text("\n".join(outer) + "\n")
    return environment / "bin"


def test_the_wheel_carries_every_file_of_the_checkout(wheel: Path) -> None:
    expected = shipped_files()
    assert any("/recipes/" in name for name in expected) and any("/data_templates/" in name for name in expected)
    with zipfile.ZipFile(wheel) as archive:
        carried = {name: archive.read(name) for name in archive.namelist() if not name.split("/")[0].endswith("-info")}
    assert sorted(carried) == sorted(expected)
    assert carried == expected


def test_the_sdist_carries_what_a_contributor_needs(wheel: Path) -> None:
    [sdist] = wheel.parent.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames()}
    assert {"LICENSE", "Makefile", "constraints.txt", "docs/architecture.md", "tests/test_wheel.py"} <= names


def test_the_installed_package_is_the_wheels(installed: Path, tmp_path: Path) -> None:
    where = succeed(installed / "python", "-c", "import mmtune; print(mmtune.__file__)", cwd=tmp_path)
    assert Path(where.strip()).is_relative_to(installed.parent)


def test_help_lists_the_commands(installed: Path, tmp_path: Path) -> None:
    text = succeed(installed / "mmtune", "--help", cwd=tmp_path)
    for verb in ("train", "recipe", "data", "assemble", "merge", "chat"):
        assert verb in text


def test_recipe_list_names_every_recipe(installed: Path, tmp_path: Path) -> None:
    text = succeed(installed / "mmtune", "recipe", "list", cwd=tmp_path)
    recipes = sorted(file.stem for file in (ROOT / "recipes").glob("*.yaml"))
    assert "quickstart" in recipes
    for name in recipes:
        assert name in text
    json.loads(succeed(installed / "mmtune", "recipe", "list", "--json", cwd=tmp_path))


def test_recipe_copy_gives_the_checkouts_file(installed: Path, tmp_path: Path) -> None:
    succeed(installed / "mmtune", "recipe", "copy", "quickstart", cwd=tmp_path)
    assert (tmp_path / "quickstart.yaml").read_bytes() == (ROOT / "recipes" / "quickstart.yaml").read_bytes()


def test_an_unknown_shipped_recipe_is_a_user_error(installed: Path, tmp_path: Path) -> None:
    done = run(installed / "mmtune", "recipe", "copy", "quikstart", cwd=tmp_path)
    assert done.returncode == 2
    assert "quickstart" in done.stderr
    assert "Traceback" not in done.stderr
    assert list(tmp_path.iterdir()) == []


def test_a_data_template_of_the_wheel_is_found(installed: Path, tmp_path: Path) -> None:
    """The library finds its own templates, with no checkout beside it."""
    code = "from mmtune.utils.shipped import shipped_dir; print(shipped_dir('data_templates') / 'llava.yaml')"
    path = Path(succeed(installed / "python", "-c", code, cwd=tmp_path).strip())
    assert path.is_relative_to(installed.parent)
    assert path.read_bytes() == (ROOT / "data_templates" / "llava.yaml").read_bytes()


TRAIN_TO_CHAT = """
import json, sys
from pathlib import Path
from mmtune.cli.main import entry_point
for base in map(Path, sys.argv[1:]):
    folder = base.parent / f"of_{base.name}"
    folder.mkdir()
    (folder / "a.png").write_bytes((base.parent / "a.png").read_bytes())
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "red"}]
    (folder / "rows.json").write_text(json.dumps([{"images": ["a.png"], "messages": turns}] * 2))
    recipe = {
        "model": {"base": str(base)},
        "tune": {"language": {"method": "lora", "r": 2}},
        "data": {"train": [{"path": str(folder / "rows.json"), "template": "messages"}]},
        "train": {"max_steps": 1, "learning_rate": 0.01, "per_device_train_batch_size": 2, "use_cpu": True},
        "output_dir": str(folder / "run"),
    }
    (folder / "recipe.yaml").write_text(json.dumps(recipe))
    merge = ["merge", folder / "run", folder / "merged", "--dtype", "fp32", "--samples", "1"]
    ask = ["--image", base.parent / "a.png", "--prompt", "What is it?", "--max-new-tokens", "3"]
    for command in (["train", folder / "recipe.yaml"], merge, ["chat", folder / "run", *ask], ["chat", folder / "merged", *ask]):
        assert entry_point([str(word) for word in command]) == 0, command
"""


def test_released_families_go_from_train_to_chat(installed: Path, tmp_path: Path) -> None:
    families = ("qwen2_5_vl", "internvl", "smolvlm", "gemma3")
    bases = [write_tiny_base(BASES[family], tmp_path / family) for family in families]
    Image.new("RGB", (60, 40), "red").save(tmp_path / "a.png")
    succeed(installed / "python", "-c", TRAIN_TO_CHAT, *bases, cwd=tmp_path)
