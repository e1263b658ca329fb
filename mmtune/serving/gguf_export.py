"""Export to GGUF files for llama.cpp, written by llama.cpp's own converter."""

from __future__ import annotations

import re
import shlex
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import AutoImageProcessor

from mmtune.console.terminal_text import escape_controls
from mmtune.models.checkpoints.trained_weights import locate_trained_weights
from mmtune.recipe.recipe import load_recipe
from mmtune.release.merge import locate_run_base
from mmtune.serving.engines import LOOPBACK
from mmtune.serving.released_model import ReleasedModel
from mmtune.utils.errors import UserError
from mmtune.utils.files import read_json_object, replaced_directory
from mmtune.utils.manifest import MANIFEST, write_manifest

CONVERTER = "convert_hf_to_gguf.py"
PORT = 8000
_SENTENCEPIECE = "tokenizer.model"
_RUN = (
    "import os, runpy, sys; from mmtune.utils.torchvision_support import prepare_torchvision; prepare_torchvision(); "
    "sys.argv = sys.argv[1:]; sys.path[0] = os.path.dirname(sys.argv[0]); runpy.run_path(sys.argv[0], run_name='__main__')"
)
"""Runs a script, which imports modules beside it, with any build of torchvision."""
_REASON = re.compile(r"(?:\w*(?:Error|Exception): |ERROR:[\w-]+:)(.+)")


@dataclass(frozen=True)
class GgufExport:
    """The files of an export.

    Attributes:
        model: the language model, with the tokenizer and the chat template.
        mmproj: the vision encoder and the projector.
        server: the command that serves them with llama.cpp.
    """

    model: str
    mmproj: str
    server: str


def find_converter(llama_cpp: Path) -> Path:
    """The converter of a llama.cpp checkout.

    Raises:
        UserError: the directory has none.
    """
    script = llama_cpp.resolve() / CONVERTER
    if not script.is_file():
        raise UserError(f"--llama-cpp {llama_cpp}: expected a checkout of llama.cpp with {CONVERTER}, found no such file")
    return script


def export_gguf(
    released: ReleasedModel,
    out: Path,
    llama_cpp: Path,
    *,
    outtype: str | None = None,
    overwrite: bool = False,
    trust_remote_code: bool = False,
) -> GgufExport:
    """Convert a full model to two GGUF files, `model.gguf` and `mmproj.gguf`.

    Args:
        released: the full model.
        out: the directory of the files; it has its name when both are complete.
        llama_cpp: a checkout of llama.cpp.
        outtype: f32, bf16, f16 or q8_0; None: the precision of the model's weights.
        overwrite: replace an earlier export.
        trust_remote_code: whether code in the model may be executed.

    Raises:
        UserError: the model is not a local directory, the converter does not take its family or fails, or `out` must not be
            written.
    """
    script, source = find_converter(llama_cpp), Path(released.path)
    if not source.is_dir():
        raise UserError(f"{source}: the converter reads a directory; download the model: hf download {source} --local-dir DIR")
    config = read_json_object(source / "config.json")
    outtype = outtype or ("f32" if (config.get("dtype") or config.get("torch_dtype")) == "float32" else "bf16")
    with (
        replaced_directory(out, overwrite, MANIFEST, [source, llama_cpp]) as folder,
        tempfile.TemporaryDirectory(prefix="mmtune-gguf-") as linked,
    ):
        _link_files(released, source, Path(linked))
        # The vision part first: it is small, and the part that most families lack.
        for name, part, options in (("mmproj", "vision part", ["--mmproj"]), ("model", "language model", [])):
            print(f"converting: {part} of {source} to {outtype}", flush=True)
            file = (folder / f"{name}.gguf").absolute()
            reason = _run_converter(script, file, [linked, "--outfile", str(file), "--outtype", outtype, *options])
            if reason is not None:
                family = f"{config.get('model_type')} ({', '.join(config.get('architectures') or ['no architecture'])})"
                raise UserError(f"{source}: llama.cpp's converter does not convert the {part} of {family}: {reason}")
        image_options = _image_options(source, trust_remote_code)
        write_manifest(folder, model=str(source), outtype=outtype)
    model, mmproj = str(out / "model.gguf"), str(out / "mmproj.gguf")
    return GgufExport(model, mmproj, _server_command(script.parent, ["-m", model, "--mmproj", mmproj, *image_options]))


def _link_files(released: ReleasedModel, source: Path, linked: Path) -> None:
    """Link the files of a model into a directory, and `tokenizer.model` of its base, which transformers does not save again.

    Without that file the converter would need the model's BPE tokenizer to be one that it knows.
    """
    for path in source.iterdir():
        (linked / path.name).symlink_to(path.resolve())
    if released.trained is None or (linked / _SENTENCEPIECE).exists():
        return
    trained = locate_trained_weights(released.trained)
    base = locate_run_base(trained, load_recipe(trained.run.recipe))
    if base is not None and (path := Path(base) / _SENTENCEPIECE).is_file():
        (linked / _SENTENCEPIECE).symlink_to(path.resolve())


def _run_converter(script: Path, file: Path, arguments: Sequence[str]) -> str | None:
    """Run the converter; why it did not write the file, or None if it did."""
    done = subprocess.run(
        [sys.executable, "-c", _RUN, str(script), *arguments],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    if done.returncode == 0 and _is_gguf(file):
        return None
    lines = [escape_controls(line) for line in done.stdout.decode("utf-8", "replace").splitlines() if line.strip()]
    reasons = [match[1] for line in lines if (match := _REASON.search(line))]
    reason = (reasons or lines or ["no output"])[-1]
    if done.returncode < 0:
        return f"it was ended by {signal.Signals(-done.returncode).name}"
    if done.returncode == 0:
        return f"it wrote no GGUF file: {reason}"
    if match := re.search(r"No module named '(\w+)'", reason):
        return f"{reason}; pip install {match[1]}"
    return reason


def _is_gguf(file: Path) -> bool:
    if not file.is_file():
        return False
    with file.open("rb") as opened:
        return opened.read(4) == b"GGUF"


def _image_options(source: Path, trust_remote_code: bool) -> list[str]:
    """Options of llama.cpp's server for the pixel bounds of training, which GGUF files do not have.

    Of processors that resize to a number of pixels, as those of Qwen-VL: an image token is `merge_size` squared patches.
    """
    processor: Any = AutoImageProcessor.from_pretrained(source, trust_remote_code=trust_remote_code)
    size, merge = dict(processor.size), getattr(processor, "merge_size", None)
    if merge is None or not {"shortest_edge", "longest_edge"} <= {name for name, value in size.items() if value}:
        return []
    pixels = (processor.patch_size * merge) ** 2
    least, most = -(-size["shortest_edge"] // pixels), size["longest_edge"] // pixels
    return ["--image-min-tokens", str(least), "--image-max-tokens", str(most)]


def _server_command(llama_cpp: Path, options: Sequence[str]) -> str:
    built = llama_cpp / "build" / "bin" / "llama-server"
    program = str(built) if built.is_file() else "llama-server"
    return shlex.join([program, *options, "--host", LOOPBACK, "--port", str(PORT)])
