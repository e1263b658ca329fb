"""Verb `mmtune export gguf`: a model in the format of llama.cpp."""

from __future__ import annotations

import argparse
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmtune.cli.verb_arguments import AddVerb, add_trust
from mmtune.console.library_output import configure_console


def add_export_verbs(verbs: Any, add: AddVerb) -> None:
    """Declare the verbs under `mmtune export`.

    Args:
        verbs: argparse's subparsers.
        add: declares one verb.
    """
    verb = add(verbs, "gguf", _gguf, "convert a run or a model to GGUF files with llama.cpp's own converter")
    verb.add_argument("model", metavar="RUN_OR_MODEL", help="a run (merged if needed), a checkpoint of one, or a model directory")
    verb.add_argument("out", metavar="OUT", help="the directory of model.gguf and mmproj.gguf")
    verb.add_argument("--llama-cpp", required=True, metavar="DIR", help="a checkout of llama.cpp, with convert_hf_to_gguf.py")
    help_text = "f32, bf16, f16 or q8_0 (default: the precision of the merged weights)"
    verb.add_argument("--outtype", choices=("f32", "bf16", "f16", "q8_0"), help=help_text)
    verb.add_argument("--overwrite", action="store_true", help="replace an existing OUT")
    add_trust(verb)


def _gguf(arguments: argparse.Namespace) -> Any:
    configure_console()
    from mmtune.serving.gguf_export import PORT, export_gguf, find_converter
    from mmtune.serving.released_model import released_model

    llama_cpp = Path(arguments.llama_cpp)
    find_converter(llama_cpp)  # a wrong directory is reported before a merge
    released = released_model(Path(arguments.model), arguments.trust_remote_code)
    exported = export_gguf(
        released,
        Path(arguments.out),
        llama_cpp,
        outtype=arguments.outtype,
        overwrite=arguments.overwrite,
        trust_remote_code=arguments.trust_remote_code,
    )
    print(f"exported: {exported.model}, {exported.mmproj}")
    print(exported.server)
    if released.trained is not None:
        print(f"mmtune serve --check http://127.0.0.1:{PORT}/v1 --run {shlex.quote(str(released.trained))}")
    return asdict(exported)
