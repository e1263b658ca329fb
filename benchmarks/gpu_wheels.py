"""A folder of wheels for a GPU machine without a package index: what benchmarks/gpu.py and `pytest -m gpu` need beside torch.

The machine has torch with its dependencies, version 2.11 or newer. transformers is among the wheels, because mmtune does not run
with older versions than that of constraints.txt. Wheels are for Linux on x86-64 and are divided into folders of at most --limit
MiB, which can be copied one by one.

    python benchmarks/gpu_wheels.py wheels
    python -m pip install --no-index --no-deps wheels/*/*.whl      # on the GPU machine
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = (
    "accelerate",
    "annotated-types",
    "bitsandbytes",
    "datasets",
    "dill",
    "h11",
    "httpcore2",
    "httpx2",
    "huggingface_hub",
    "hypothesis",
    "iniconfig",
    "joblib",
    "markdown-it-py",
    "mdurl",
    "multiprocess",
    "pandas",
    "peft",
    "pillow",
    "pluggy",
    "prompt_toolkit",
    "psutil",
    "pyarrow",
    "pydantic",
    "pydantic_core",
    "Pygments",
    "pytest",
    "pytest-timeout",
    "python-dateutil",
    "regex",
    "rich",
    "safetensors",
    "scikit-learn",
    "scipy",
    "sortedcontainers",
    "threadpoolctl",
    "tokenizers",
    "transformers",
    "trl",
    "truststore",
    "typing-inspection",
    "wcwidth",
    "xxhash",
)
MIB = 1024 * 1024


def divide(sizes: dict[str, int], limit: int) -> list[list[str]]:
    """Names in groups whose sizes sum to at most `limit`, the largest first; one that is larger alone is a group of its own."""
    groups: list[list[str]] = []
    for name in sorted(sizes, key=lambda name: -sizes[name]):
        room = (group for group in groups if sum(sizes[other] for other in group) + sizes[name] <= limit)
        if (group := next(room, None)) is None:
            groups.append([name])
        else:
            group.append(name)
    return groups


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--python", default="3.12", help="version of Python on the GPU machine")
    parser.add_argument("--packages", nargs="+", default=PACKAGES, metavar="NAME")
    parser.add_argument("--limit", type=int, default=50, help="MiB in a folder; a larger wheel has one of its own")
    options = parser.parse_args()
    pins = dict(line.split("==") for line in (ROOT / "constraints.txt").read_text().splitlines() if "==" in line)
    names = [f"{name}=={pins[name]}" for name in options.packages]
    platforms = [f"--platform=manylinux_2_{minor}_x86_64" for minor in (17, 24, 27, 28)]
    options.folder.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:", *platforms]
    command += ["--platform=manylinux2014_x86_64", f"--python-version={options.python}", f"--dest={options.folder}", *names]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit("pip could not download the wheels; its message is above")
    sizes = {path.name: path.stat().st_size for path in options.folder.glob("*.whl")}
    for number, group in enumerate(divide(sizes, options.limit * MIB), 1):
        part = options.folder / f"part{number}"
        part.mkdir(exist_ok=True)
        for name in group:
            (options.folder / name).rename(part / name)
        print(f"{part}: {len(group)} wheels, {sum(sizes[name] for name in group) / MIB:.0f} MiB")


if __name__ == "__main__":
    main()
