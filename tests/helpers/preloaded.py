"""Imports of the fork server (forked.py): everything that a run needs, in the right order."""

import importlib

from mmtune.utils.torchvision_support import prepare_torchvision

prepare_torchvision()

import accelerate.commands.launch  # noqa: E402, F401
import deepspeed  # noqa: E402, F401
import PIL.Image  # noqa: E402
import transformers.models.clip.modeling_clip  # noqa: E402
import transformers.models.llama.modeling_llama  # noqa: E402, F401

import mmtune.cli.main  # noqa: E402
import mmtune.train  # noqa: E402, F401

PIL.Image.init()
# Faster sums between processes of one CPU, for minutes of compiling. (The attribute `deepspeed.comm.torch` is torch itself.)
importlib.import_module("deepspeed.comm.torch").build_shm_op = lambda: None  # type: ignore[attr-defined]
