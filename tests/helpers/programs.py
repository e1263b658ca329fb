"""Python programs in processes of their own, as a user of plain transformers would write them."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from pathlib import Path

PREPARE = """
import sys
from mmtune.utils.torchvision_support import prepare_torchvision
kept = prepare_torchvision()
for name in [name for name in sys.modules if name.partition(".")[0] == "mmtune"]:
    del sys.modules[name]
"""
"""transformers does not load where torchvision's operators belong to another build of torch. Nothing else of mmtune stays."""


def run_program(program: str, *arguments: str | Path, cwd: Path | None = None) -> str:
    """Run a program; its standard output. A failure shows what it printed."""
    command = [sys.executable, "-c", PREPARE + textwrap.dedent(program), *map(str, arguments)]
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
