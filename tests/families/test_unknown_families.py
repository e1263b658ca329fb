"""A family that mmtune has never heard of: a class that is defined here, as code in a checkpoint."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import remote_vl
import torch
import transformers as tf
from family_cases import CASES
from PIL import Image
from remote_vl.modeling_kite import KiteConfig, KiteForConditionalGeneration, KiteProcessor
from safetensors.torch import load_file

import mmtune
from mmtune.cli.main import entry_point
from mmtune.data.encoding.encoding_checks import check_encoding
from mmtune.families.structure import find_components
from mmtune.models.tiny.tiny_bases import TEXT, VISION, text_sizes, tiny_tokenizer
from mmtune.recipe.tune_section import TuneSection
from mmtune.tuning.apply import apply_tuning
from mmtune.utils.errors import UserError

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for b in m.content %}"
    "{{ b.text if b.type == 'text' else '<kite>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def _processor(processor_class: type[KiteProcessor]) -> Any:
    tokenizer = tiny_tokenizer(("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<kite>"), pad="<|endoftext|>", eos="<|im_end|>")
    images = tf.CLIPImageProcessor(size={"shortest_edge": 56}, crop_size={"height": 56, "width": 56})
    processor = processor_class(images, tokenizer)
    processor.chat_template = TEMPLATE
    return processor


@pytest.fixture(scope="module")
def kite(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Path]]:
    """A function that writes a recipe over a `kite` checkpoint with its code, and rows; returns the recipe's path."""
    folder = tmp_path_factory.mktemp("kite")
    Image.new("RGB", (60, 40), "teal").save(folder / "a.png")
    turns = [{"role": "user", "content": "<image>What is it?"}, {"role": "assistant", "content": "a cat"}]
    (folder / "rows.json").write_text(json.dumps([{"images": ["a.png"], "messages": turns}] * 4))
    processor = _processor(KiteProcessor)
    config = KiteConfig({**VISION}, {**text_sizes(processor.tokenizer)}, processor.image_token_id)
    torch.manual_seed(0)
    KiteForConditionalGeneration(config).save_pretrained(folder / "base")
    processor.save_pretrained(folder / "base")
    assert TEXT["hidden_size"] == config.text_config.hidden_size

    def write(model: str, auto_class: str | None, out: Path) -> Path:
        """`auto_class`: the class of transformers through which `auto_map` names the model; None without code."""
        base = out / "base"
        shutil.copytree(folder / "base", base)
        if auto_class is not None:
            shutil.copy(Path(remote_vl.__file__).parent / "modeling_kite.py", base)
            processor_class = "KiteProcessor" if auto_class == "AutoModelForImageTextToText" else "OlderKiteProcessor"
            names = {"AutoConfig": "KiteConfig", auto_class: "KiteForConditionalGeneration", "AutoProcessor": processor_class}
            for file in ("config.json", "processor_config.json"):
                content = json.loads((base / file).read_text())
                content["auto_map"] = {key: f"modeling_kite.{name}" for key, name in names.items()}
                (base / file).write_text(json.dumps(content))
        (out / "recipe.yaml").write_text(
            f"model: {{base: {base}{model}}}\ntune: {{vision: {{method: lora, r: 2}}, language: {{method: lora, r: 2}}}}\n"
            f"data: {{train: [{{path: {folder / 'rows.json'}, template: messages}}]}}\n"
            f"evaluate: {{data: [{{path: {folder / 'rows.json'}, template: messages}}], leakage: warn, max_new_tokens: 4}}\n"
            f"train: {{max_steps: 3, learning_rate: 1e-2, per_device_train_batch_size: 4, use_cpu: true, logging_steps: 1}}\n"
            f"output_dir: {out / 'run'}\n"
        )
        return out / "recipe.yaml"

    yield write
    shutil.rmtree(folder)


def _goes_through(recipe: Path, capsys: pytest.CaptureFixture[str], *trust: str) -> None:
    """Check, plan, train, merge with parity, and evaluate the merged model."""
    run, merged = recipe.parent / "run", recipe.parent / "merged"
    commands: list[list[Any]] = [["recipe", "check", recipe], ["data", "check", recipe], ["plan", recipe], ["train", recipe]]
    commands += [
        ["merge", run, merged, "--dtype", "fp32", *trust],
        ["eval", merged, "--recipe", recipe, "--out", recipe.parent / "answers.jsonl", *trust],
    ]
    for command in commands:
        assert entry_point([str(argument) for argument in command]) == 0, capsys.readouterr()
    losses = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert losses[-1] < losses[0]
    modules = json.loads((run / "adapter" / "adapter_config.json").read_text())
    assert modules["modules_to_save"] == ["tail"]
    keys = load_file(run / "adapter" / "adapter_model.safetensors")
    assert all(any(f".{part}." in key for key in keys) for part in ("vision_tower", "tail", "language_model"))


@pytest.mark.parametrize(
    "auto_class", ["AutoModelForCausalLM", pytest.param("AutoModelForImageTextToText", marks=pytest.mark.slow)]
)
def test_a_class_in_the_checkpoint_goes_the_same_way(
    kite: Callable[..., Path], auto_class: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = kite("", auto_class, tmp_path / "refused")
    assert entry_point(["train", str(recipe)]) == 2
    assert "set model.trust_remote_code: true" in capsys.readouterr().err
    _goes_through(kite(", trust_remote_code: true", auto_class, tmp_path / "trusted"), capsys, "--trust-remote-code")


class PrefixedKiteProcessor(KiteProcessor):
    """Writes a prefix that neither the chat template nor the replacement of an image shows."""

    def __call__(self, images: Any = None, text: Any = None, **kwargs: Any) -> Any:
        return super().__call__(images, [f"image: {each}" for each in text], **kwargs)


class RefusingKiteProcessor(KiteProcessor):
    def apply_chat_template(self, *arguments: Any, **kwargs: Any) -> Any:
        raise ValueError("one image only")


def test_a_processor_that_encodes_otherwise_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    check_encoding(_processor(KiteProcessor))
    with pytest.raises(UserError, match=r"PrefixedKiteProcessor: expected .* as by its apply_chat_template; not so: input_ids"):
        check_encoding(_processor(PrefixedKiteProcessor))
    assert capsys.readouterr().out == ""
    check_encoding(_processor(RefusingKiteProcessor))
    assert "its encoding is not compared: its apply_chat_template fails (one image only)" in capsys.readouterr().out


def test_a_prompt_method_is_an_error_where_only_the_model_shows_three_positions() -> None:
    base = CASES["glm_ocr"].base
    with torch.device("meta"):
        model = tf.AutoModelForImageTextToText.from_config(base.config(base.processor()))
    with pytest.raises(UserError, match=r"tune\.language: prompt_tuning gives .* no position in glm_ocr \(mRoPE\)"):
        apply_tuning(model, find_components(model), TuneSection.model_validate({"language": {"method": "prompt_tuning"}}))


def test_types_of_transformers_work_that_no_file_of_the_package_names() -> None:
    source = "\n".join(file.read_text() for file in Path(mmtune.__file__).parent.rglob("*.py"))
    plain = {name for name in CASES if not re.search(rf"\b{re.escape(name)}\b", source)}
    assert len(plain) >= 20, sorted(plain)
