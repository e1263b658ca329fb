"""Cache of answers by content: everything that an answer depends on is in its key.

The key of a model has its weights, adapter, dtypes, device type, attention implementation, tokenizer and the versions of the
libraries. The key of a question has the tensors that the model reads (token ids and the processor's output) and the generation
settings. Each process appends to a file of its own, a line with a checksum for each answer, so that several processes can write
at once and a killed one leaves what it wrote.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import secrets
import time
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import ProcessorMixin

import mmtune
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.models.checkpoints.config_keys import without_keys
from mmtune.run_directory import versions
from mmtune.utils.errors import UserError
from mmtune.utils.files import user_cache
from mmtune.utils.transformers_private import attention_of

FORMAT = 1
"""Part of the key of a model, so that files of another format are not read."""
IRRELEVANT_KEYS = ("_name_or_path", "use_cache")
"""Keys of a config that change no answer: where it was read, and what training switches off and generation sets itself."""
MAX_BYTES = 2**30
"""Maximum size of all files together; the least recently used ones are removed."""


def answers_folder() -> Path | None:
    """The folder of the cache, `~/.cache/mmtune/answers`; None for a user without a home directory."""
    with suppress(UserError):
        return user_cache("answers")
    return None


def model_key(model: Any, processor: ProcessorMixin, weights: str) -> str:
    """The key of a model: 32 characters that depend on everything its answers depend on, but the question and the settings.

    Args:
        model: the loaded model, plain or with an adapter, on its device.
        processor: its processor.
        weights: the hash of the files that it was loaded from (`mmtune.models.checkpoints.weights_hash`).
    """
    parameters = list(model.named_parameters())
    backend = getattr(processor.tokenizer, "backend_tokenizer", None)
    content = {
        "format": FORMAT,
        "weights": weights,
        "class": type(model).__name__,
        "config": without_keys(model.config.to_dict(), IRRELEVANT_KEYS),
        "attention": [attention_of(config) for config in _configs(model.config)],
        "dtypes": [[name, str(parameter.dtype)] for name, parameter in parameters],
        "devices": sorted({parameter.device.type for _, parameter in parameters}),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "tokenizer": backend.to_str() if backend else processor.tokenizer.get_vocab(),
        "versions": versions(),
        "code": _code_digest(),
    }
    return _digest(json.dumps(content, sort_keys=True, default=str).encode())


@functools.cache
def _code_digest() -> str:
    """The digest of mmtune's source files, which an installation from a working copy changes without a new version."""
    package = Path(mmtune.__file__).parent
    return _digest(b"".join(file.read_bytes() for file in sorted(package.rglob("*.py"))))


def _configs(config: Any) -> list[Any]:
    """A config and those of its parts, which can have attention implementations of their own."""
    return [config, *(getattr(config, name) for name in sorted(config.sub_configs) if getattr(config, name, None) is not None)]


def question_key(tensors: Iterable[Mapping[str, torch.Tensor]], settings: Mapping[str, Any]) -> str:
    """The key of a question: 32 characters that depend on what the model reads and on the generation settings.

    Args:
        tensors: the encoded prompt, or the encoded candidates, on the CPU.
        settings: everything else that the answer depends on, as JSON values.
    """
    content = hashlib.blake2b(json.dumps(settings, sort_keys=True, default=str).encode(), digest_size=16)
    hashed: dict[int, bytes] = {}  # candidates share their media
    for encoded in tensors:
        for name in sorted(encoded):
            tensor = encoded[name]
            if id(tensor) not in hashed:
                data = tensor.contiguous().flatten().view(torch.uint8).numpy().data
                hashed[id(tensor)] = hashlib.blake2b(data, digest_size=16).digest()
            content.update(json.dumps([name, str(tensor.dtype), list(tensor.shape)]).encode() + hashed[id(tensor)])
    return content.hexdigest()


class AnswerCache:
    """The answers of one model.

    Attributes:
        folder: as below.
        hits: how many questions were known.

    Args:
        answers: those that are known, by the key of their question.
        folder: where new ones are written; None: nowhere, in a process that another one writes for.
    """

    def __init__(self, answers: dict[str, Prediction], folder: Path | None) -> None:
        self._answers = answers
        self.folder = folder
        self._file: Path | None = None
        self.hits = 0

    def get(self, key: str) -> Prediction | None:
        """The answer to a question, if it is known."""
        prediction = self._answers.get(key)
        self.hits += prediction is not None
        return prediction

    def add(self, answers: Mapping[str, Prediction]) -> None:
        """Add answers by the keys of their questions, and write them."""
        self._answers |= answers
        if self.folder is None:
            return
        try:
            if self._file is None:
                self.folder.mkdir(parents=True, exist_ok=True)
                self._file = self.folder / f"{time.time_ns()}-{os.getpid()}-{secrets.token_hex(4)}.jsonl"
            with self._file.open("ab") as file:
                file.write(b"".join(_line(key, asdict(prediction)) for key, prediction in answers.items()))
        except OSError as error:
            print(f"answer cache: cannot write in {self.folder}: {error.strerror or error}; answers are no longer cached")
            self.folder = None


def open_answer_cache(
    model: Any, processor: ProcessorMixin, weights: str | None, dist: DistributedContext = SINGLE_PROCESS
) -> AnswerCache | None:
    """The cache of a model's answers; None where there is none.

    With sharded weights every process must answer the same questions, so all know the answers that the main process has read,
    and it alone writes.

    Args:
        model, processor: as for `model_key`.
        weights: as for `model_key`; None if the files of the model are not known.
        dist: the processes of the evaluation.
    """
    root = answers_folder()
    if weights is None or root is None:
        return None
    folder = root / model_key(model, processor, weights)
    reads = not dist.sharded or dist.is_main_process
    answers = _read(folder) if reads else {}
    if reads:
        _remove_old(root)
    if dist.sharded:
        answers = dist.broadcast_object(answers)
    return AnswerCache(answers, folder if reads else None)


def _read(folder: Path) -> dict[str, Prediction]:
    """All answers in a folder. Damaged lines are counted and left out."""
    answers: dict[str, Prediction] = {}
    damaged = 0
    for file in sorted(folder.glob("*.jsonl")):
        try:
            lines = file.read_bytes().splitlines()
            os.utime(file)
        except OSError:  # another process has just removed it
            continue
        for line in lines:
            entry = _entry(line)
            if entry is None:
                damaged += 1
            else:
                answers[entry[0]] = entry[1]
    if damaged:
        print(f"answer cache: {damaged} damaged {'entry' if damaged == 1 else 'entries'} in {folder}; computed again")
    return answers


def _line(key: str, value: Mapping[str, Any]) -> bytes:
    content = json.dumps([key, value])
    return f"{_digest(content.encode())} {content}\n".encode()


def _entry(line: bytes) -> tuple[str, Prediction] | None:
    """The key and the answer of a line; None if it does not match its checksum."""
    digest, _, content = line.partition(b" ")
    if digest.decode("ascii", "replace") != _digest(content):
        return None
    key, value = json.loads(content)
    return key, Prediction(**{**value, **{name: tuple(value[name]) for name in ("answers", "scores", "tokens")}})


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def _remove_old(root: Path) -> None:
    """Remove the least recently used files until the others have `MAX_BYTES` together."""
    files: list[tuple[float, int, Path]] = []
    for file in root.glob("*/*.jsonl"):
        try:
            status = file.stat()
        except FileNotFoundError:  # another process has just removed it
            continue
        files.append((status.st_mtime, status.st_size, file))
    excess = sum(size for _, size, _ in files) - MAX_BYTES
    for _, size, file in sorted(files):
        if excess <= 0:
            break
        file.unlink(missing_ok=True)
        excess -= size
