"""The engines that serve a model, and the commands that start them."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

from mmtune.utils.errors import UserError, nearest
from mmtune.utils.files import expand_user

LOOPBACK = "127.0.0.1"


@dataclass(frozen=True)
class Engine:
    """A program that serves a model with an OpenAI-compatible API.

    Attributes:
        name: of `--engine`.
        program: the words that start it, before the model.
        arguments: the arguments for a model, a host and a port.
        environment: variables of its process.
        libraries: what it needs in this environment.
        decoder_only: whether it serves no encoder-decoder models.
    """

    name: str
    program: Callable[[], list[str]]
    arguments: Callable[[str, str, int], list[str]]
    environment: Mapping[str, str] = field(default_factory=dict)
    libraries: tuple[str, ...] = ()
    decoder_only: bool = False

    def command(self, model: str, port: int, options: Sequence[str], program: str | None = None) -> list[str]:
        """The command that serves a model on loopback.

        Args:
            model: a directory or a hub id.
            port: the port.
            options: options of the engine.
            program: the command that starts the engine, with its first arguments; None: the engine's own.

        Raises:
            UserError: the program or a library is not installed, or `program` cannot be split into words.
        """
        if program is None:
            check_installed(self.libraries)
        words = self.program() if program is None else _words(program)
        return [*words, *self.arguments(model, LOOPBACK, port), *options]


def _words(program: str) -> list[str]:
    try:
        words = shlex.split(program)
    except ValueError as error:
        raise UserError(f"--engine-command {program}: {error}") from error
    if not words or shutil.which(program_path := expand_user(words[0])) is None:
        raise UserError(f"--engine-command {program}: expected a program that can be executed, got {' '.join(words[:1])!r}")
    return [program_path, *words[1:]]


def _vllm() -> list[str]:
    if (program := shutil.which("vllm")) is None:
        raise UserError(
            "--engine vllm: no program `vllm` on the PATH. vLLM needs an environment of its own, because it pins another "
            "version of transformers: python -m venv vllm && vllm/bin/pip install vllm, then add --engine-command "
            "'vllm/bin/vllm serve'"
        )
    return [program, "serve"]


def _transformers_arguments(model: str, host: str, port: int) -> list[str]:
    if "@" in model and Path(model).is_dir():
        raise UserError(f"{model}: `transformers serve` reads what follows an @ as a revision; rename the directory")
    return [model, "--host", host, "--port", str(port)]


ENGINES = {
    engine.name: engine
    for engine in (
        Engine(
            "transformers",
            lambda: [sys.executable, "-m", "mmtune.serving.transformers_engine", "serve"],
            _transformers_arguments,
            libraries=("fastapi", "uvicorn"),
            decoder_only=True,
        ),
        Engine(
            "vllm",
            _vllm,
            lambda model, host, port: [model, "--host", host, "--port", str(port), "--served-model-name", model],
            {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
        ),
    )
}
"""The engines by name."""


def check_installed(libraries: Sequence[str]) -> None:
    """
    Raises:
        UserError: a library of the extra `serve` is not installed.
    """
    missing = [name for name in libraries if find_spec(name) is None]
    if missing:
        raise UserError(f"mmtune serve needs {', '.join(missing)}: pip install 'mmtune[serve]'")


def find_engine(name: str) -> Engine:
    """The engine of a name.

    Raises:
        UserError: an unknown name.
    """
    if name not in ENGINES:
        raise UserError(f"--engine {name}: no such engine{nearest(name, ENGINES)}")
    return ENGINES[name]
