"""A virtual environment for each program of the suite, under the exact pins of requirements/.

    python benchmarks/peers/environments.py ../peer-environments [llamafactory swift trl]

pip's configuration is respected. The pins name torch without a build: where the index has a CPU build of it, pip installs that.
Packages are installed without their dependencies: the pins are complete, and torchvision and torchaudio would bring CUDA.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

REQUIREMENTS = Path(__file__).resolve().parent / "requirements"


def make_environment(folder: Path, program: str) -> None:
    subprocess.run([sys.executable, "-m", "venv", folder / program], check=True)
    pip = [folder / program / "bin" / "python", "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*pip, "-r", REQUIREMENTS / f"{program}.txt"], check=True)
    # LLaMA-Factory imports torchaudio. Its CUDA operators do not load beside a CPU build of torch, but it imports without them.
    for operators in (folder / program).glob("lib/python3*/site-packages/torchaudio/lib/_torchaudio.so"):
        operators.unlink()
    print(folder / program)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    programs = sorted(path.stem for path in REQUIREMENTS.glob("*.txt"))
    parser.add_argument("programs", nargs="*", choices=[*programs, []], default=[], help="default: all")
    arguments = parser.parse_args()
    for program in arguments.programs or programs:
        make_environment(arguments.folder, program)


if __name__ == "__main__":
    main()
