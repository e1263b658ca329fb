"""Setup of all tests: no network, no telemetry, one thread; GPU tests are skipped without a GPU."""

from __future__ import annotations

import functools
import gc
import json
import os
import signal
import sys
import textwrap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from mmtune.utils.torchvision_support import prepare_torchvision

if TYPE_CHECKING:
    from mmtune.recipe.recipe import Recipe

# Set before torch and transformers are imported, here and in every process that a test starts. The tests need nothing
# from the network and so must not reach for it; sums in a fixed number of threads come out the same on every machine.
os.environ.update(
    HF_HUB_OFFLINE="1",
    HF_HUB_DISABLE_TELEMETRY="1",
    HF_HUB_DISABLE_PROGRESS_BARS="1",
    TOKENIZERS_PARALLELISM="false",
    OMP_NUM_THREADS="1",
    MPLBACKEND="Agg",
)


# nohup and shells that start a job in the background have these ignored, and every process that a test starts would inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

prepare_torchvision()  # before a test imports transformers

LONG = ("test_families.py", "test_quickstart.py", "test_context.py", "test_together.py", "test_faults.py", "test_capabilities.py")
"""Minutes each: begun first, or one process would be at the last of them when the other has nothing left to do."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONG.index(item.path.name) if item.path.name in LONG else len(LONG))
    gpu_tests = [item for item in items if item.get_closest_marker("gpu")]
    if not gpu_tests:
        return
    import torch

    if not torch.cuda.is_available():
        for item in gpu_tests:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


_modules_at_freeze = 0


def pytest_runtest_setup() -> None:
    """Freeze what earlier tests imported: the Trainer collects garbage at every start, and would look through all of it."""
    global _modules_at_freeze
    if len(sys.modules) > _modules_at_freeze:
        _modules_at_freeze = len(sys.modules)
        gc.collect()
        gc.freeze()


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """The caches of this session instead of the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mmtune.utils.files.USER_CACHE", tmp_path_factory.mktemp("cache"))
        yield


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Twelve rows of the quickstart's tasks with their images, as `rows.json`."""
    from mmtune.builtin.digits import TUNE_TASKS, Split, write_split

    folder = tmp_path_factory.mktemp("rows")
    path = write_split("rows", Split(scenes=12, held_out=False, tasks=TUNE_TASKS, questions=1, seed=0), folder)
    (folder / "rows.json").write_text(json.dumps(path), encoding="utf-8")
    return folder / "rows.json"


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in architecture with random weights, as an ordinary checkpoint."""
    from mmtune.builtin.tiny_checkpoint import build_untrained
    from mmtune.models.checkpoints.checkpoint_files import save_checkpoint

    out = tmp_path_factory.mktemp("base") / "model"
    save_checkpoint(*build_untrained(seed=0), out)
    return out


@pytest.fixture(scope="session")
def shallow(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with fewer layers: DeepSpeed takes its time by the number of modules."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from mmtune.builtin.tiny_checkpoint import build_untrained
    from mmtune.models.checkpoints.checkpoint_files import save_checkpoint

    model, processor = build_untrained(seed=0)
    model.config.vision_config.num_hidden_layers, model.config.text_config.num_hidden_layers = 1, 2
    out = tmp_path_factory.mktemp("shallow") / "model"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        save_checkpoint(LlavaForConditionalGeneration(model.config), processor, out)
    return out


@pytest.fixture(scope="session")
def make_recipe_in(base: Path, rows: Path) -> Callable[..., Recipe]:
    """A LoRA recipe of three steps over `rows` with its output in a folder, changed by `key=value` overrides."""

    def make(folder: Path, *overrides: str) -> Recipe:
        from mmtune.recipe.recipe import load_recipe

        text = f"""
        model: {{base: {base}}}
        tune:
          projector: {{method: full, learning_rate: 1e-3}}
          language: {{method: lora, r: 4, lora_alpha: 8}}
        data: {{train: [{{path: {rows}, template: llava}}]}}
        train: {{max_steps: 3, learning_rate: 5e-3, per_device_train_batch_size: 4, logging_steps: 1, use_cpu: true, seed: 0}}
        output_dir: {folder / "run"}
        """
        path = folder / "recipe.yaml"
        path.write_text(textwrap.dedent(text), encoding="utf-8")
        return load_recipe(path, overrides)

    return make


@pytest.fixture
def make_recipe(make_recipe_in: Callable[..., Recipe], tmp_path: Path) -> Callable[..., Recipe]:
    """As `make_recipe_in`, with the folder of the test."""
    return functools.partial(make_recipe_in, tmp_path)


@pytest.fixture(scope="session")
def untrained() -> tuple[Any, Any]:
    """The built-in architecture with random weights, in memory, and its processor. Shared: leave both as they are."""
    from mmtune.builtin.tiny_checkpoint import build_untrained

    model, processor = build_untrained(seed=0)
    return model.eval(), processor


@pytest.fixture(scope="session")
def answering_llava() -> tuple[Any, Any]:
    """As `untrained`, with weights whose answers depend on the prompt; small tied weights would repeat the last token."""
    import torch

    from mmtune.builtin.tiny_checkpoint import build_untrained

    model, processor = build_untrained(seed=0)
    generator = torch.Generator().manual_seed(0)
    head = torch.randn(model.lm_head.weight.shape, generator=generator)
    head[processor.tokenizer.all_special_ids + processor.tokenizer.convert_tokens_to_ids(["<|user|>", "<|assistant|>"])] = 0
    with torch.no_grad():
        model.lm_head.weight = torch.nn.Parameter(head)
        for name, parameter in model.named_parameters():
            if "language_model.layers" in name or "projector" in name:
                parameter.mul_(1 if parameter.ndim < 2 else 5)
    return model.eval(), processor


SPEAKS = {"vicuna_v1": "llama", "chatml": "qwen2", "llama3": "llama3", "mistral": "mistral", "gemma": "gemma", "plain": "llama"}

# Qwen2's; Llama 3's differs in its numbers. Line breaks stay together, also at the end of a prompt.
SPLIT = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


@pytest.fixture
def media(tmp_path: Path) -> Path:
    """A media root with the two pictures `a.png` and `b.png`, beside a file that lies outside it."""
    from PIL import Image

    root = tmp_path / "media"
    root.mkdir()
    Image.new("RGB", (40, 24), "teal").save(root / "a.png")
    Image.new("RGB", (24, 40), "red").save(root / "b.png")
    Image.new("RGB", (8, 8), "blue").save(tmp_path / "outside.png")
    return root


@pytest.fixture(scope="session")
def template_processors(tmp_path_factory: pytest.TempPathFactory, untrained: tuple[Any, Any]) -> dict[str, Any]:
    """A processor for each shipped chat template; the tokenizers have learnt to join runs of white space, as real ones do."""
    from mmtune.models.assemble import assemble
    from mmtune.models.tiny.tiny_models import write_tiny_language, write_tiny_vision

    root = tmp_path_factory.mktemp("template_processors")
    write_tiny_vision("clip", root / "clip")
    processors = {"tiny": untrained[1]}
    for name, family in SPEAKS.items():
        if not (root / family).exists():
            write_tiny_language(family, root / family, texts=["\n\n\n    the cat is on the mat\n\n yes no"] * 20, vocab_size=320)
            if family in ("qwen2", "llama3"):
                _split_as_published(root / family)
        processors[name] = assemble(str(root / "clip"), str(root / family), chat_template=name)[1]
    return processors


def _split_as_published(path: Path) -> None:
    from tokenizers import Regex, pre_tokenizers
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    split = pre_tokenizers.Split(Regex(SPLIT), "isolated")
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    tokenizer.save_pretrained(path)


@pytest.fixture(scope="session")
def tiny_checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with every tiny vision encoder and language model."""
    from mmtune.models.tiny.tiny_models import LANGUAGE_FAMILIES, VISION_FAMILIES, write_tiny_language, write_tiny_vision

    root = tmp_path_factory.mktemp("tiny_checkpoints")
    for seed, family in enumerate(VISION_FAMILIES):
        write_tiny_vision(family, root / family, seed)
    for seed, family in enumerate(LANGUAGE_FAMILIES):
        write_tiny_language(family, root / family, seed)
    return root


@pytest.fixture(scope="session")
def llava(tiny_checkpoints: Path) -> tuple[Any, Any]:
    from mmtune.models.assemble import assemble

    return assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"))


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Headless Chromium; the tests of a machine without it are skipped."""
    from browser import chromium  # of tests/helpers

    with chromium() as started:
        yield started
