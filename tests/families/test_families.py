"""Every family from checkpoint files to answers, with its real processor, compared with plain transformers and PEFT.

Each family's tiny checkpoint has the files of its releases (`models/tiny/tiny_bases.py`). All commands run in this process.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers as tf
from family_cases import CASES
from family_cases.family_case import FamilyCase
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file

from mmtune.cli.main import entry_point
from mmtune.data.batching.collate import collate, pack
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_choices, encode_sample
from mmtune.data.message import Sample, text_of
from mmtune.evaluation.predictions.choices import score_choices
from mmtune.evaluation.predictions.prompt_cache import shares_prompt
from mmtune.families.family_table import FAMILIES, family_of
from mmtune.models.load import load_trained
from mmtune.models.packed_attention import attention_by_sample, check_packable, packed_inputs
from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base
from mmtune.recipe.recipe import load_recipe
from mmtune.run_directory import RunDirectory
from mmtune.utils.errors import UserError

FAST = ("llava", "qwen2_5_vl", "internvl", "gemma3")
"""Families of the fast tests; the others are slow."""
FAMILY = [family if family in FAST else pytest.param(family, marks=pytest.mark.slow) for family in CASES]
SIZES = [(90, 70), (40, 120), (64, 64), (200, 60)]
LORA = "language: {method: lora, r: 4, lora_alpha: 8, target_modules: all-linear}"
SGD = "optim: sgd, learning_rate: 1.0, max_grad_norm: 0, lr_scheduler_type: constant"

Write = Callable[..., Path]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five conversations: one turn and two, no image, one and two images of several sizes; `images.json` without the first.

    `single.json` has those of one image.
    """
    folder = tmp_path_factory.mktemp("rows")
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        pixels = random.integers(0, 256, size=(height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
    conversations = [
        ([], ["Is it text?", "yes, it is"]),
        (["0.png"], ["<image>What is it?", "a red cat", "Again?", "no"]),
        (["1.png"], ["<image>How many?", "two"]),
        (["2.png", "3.png"], ["<image><image>Which?", "the first one"]),
        (["3.png"], ["<image>Where is the bird?", "on the mat"]),
    ]
    content = [
        {"images": images, "messages": [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]}
        for images, turns in conversations
    ]
    (folder / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    (folder / "images.json").write_text(json.dumps(content[1:]), encoding="utf-8")
    (folder / "single.json").write_text(json.dumps([row for row in content if len(row["images"]) == 1]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A function that returns the tiny checkpoint of a family; it is written once."""
    folder = tmp_path_factory.mktemp("bases")

    def base(family: str) -> Path:
        return folder / family if (folder / family).exists() else write_tiny_base(CASES[family].base, folder / family)

    return base


@pytest.fixture
def write(rows: Path, bases: Callable[[str], Path], tmp_path: Path) -> Write:
    """A function that writes a recipe of one step over all rows and returns its path; its output is `run` in its folder."""

    def recipe(family: str, tune: str, model: str = "", data: str = "", train: str = "learning_rate: 1e-2") -> Path:
        case = CASES[family]
        template = case.base.required_template
        data_file = rows / ("single.json" if case.one_image else "images.json" if case.needs_image else "rows.json")
        data += f", supervise: {case.supervise}"
        batch = "" if "packing" in data else ", per_device_train_batch_size: 5"
        folder = tmp_path / str(len(list(tmp_path.iterdir())))
        folder.mkdir()
        if case.template_file is not None:
            template = str(folder / "template.jinja")
            Path(template).write_text(case.template_file, encoding="utf-8")
        model += f", chat_template: {template}" if template else ""
        (folder / "recipe.yaml").write_text(
            f"""
            model: {{base: {bases(family)}{model}}}
            tune: {{{tune}}}
            data: {{train: [{{path: {data_file}, template: messages}}]{data}}}
            evaluate: {{data: [{{path: {data_file}, template: messages}}], leakage: warn, max_new_tokens: 6, before: false}}
            train: {{max_steps: 1, logging_steps: 1, use_cpu: true, {train}{batch}}}
            output_dir: {folder / "run"}
            """
        )
        return folder / "recipe.yaml"

    return recipe


def mmtune(*arguments: str | Path) -> int:
    return entry_point([str(argument) for argument in arguments])


def test_every_family_has_a_tiny_checkpoint() -> None:
    types = {re.sub("_pixtral$", "", name) for name in CASES}
    assert all(types & set(family.model_types) for family in FAMILIES.values() if family.model_types)
    assert set(FAST) <= set(BASES) and len(FAST) == 4


@pytest.mark.parametrize("family", FAMILY)
def test_a_training_step_equals_that_of_plain_transformers_and_peft(
    family: str, write: Write, bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Labels, loss, gradients of LoRA and projector, and answers of the merged model; check and plan before, chat after."""
    path = write(family, LORA if CASES[family].projector else f"{LORA}, projector: {{method: frozen}}", train=SGD)
    run, merged = path.parent / "run", path.parent / "merged"
    for command in (["recipe", "check", path], ["data", "check", path], ["plan", path], ["train", path]):
        expected = 2 if command[0] == "plan" and CASES[family].unpredictable else 0
        assert mmtune(*command) == expected, capsys.readouterr()
    output = capsys.readouterr()
    assert ("cannot be predicted" in output.err) == CASES[family].unpredictable
    printed = output.out
    assert mmtune("merge", run, merged, "--dtype", "fp32", "--samples", "2") == 0, capsys.readouterr()

    recipe = load_recipe(path)
    samples = list(IndexedSamples(recipe.data.train))
    processor = tf.AutoProcessor.from_pretrained(run / "adapter")
    encoded = [encode_sample(sample, processor, supervise=recipe.data.supervise) for sample in samples]
    for sample, tensors in zip(samples, encoded, strict=True):
        labels = tensors["labels"]
        answers = [text_of(message) for message in sample.messages if message["role"] == "assistant"]
        answers = answers[-1:] if recipe.data.supervise == "last" else answers
        supervised_text = processor.tokenizer.decode(labels[labels != -100])
        assert supervised_text == "".join(CASES[family].leading + answer + CASES[family].end for answer in answers)

    model = _reference(bases(family), run / "adapter")
    has_newline = any(name.endswith("model.image_newline") for name, _ in model.named_parameters())
    assert ("model.image_newline stays frozen" in printed) == has_newline
    loss = _reference_loss(
        model, [[row] for row in encoded] if CASES[family].alone else [encoded], processor, CASES[family].lists
    )
    loss.backward()
    [logged] = [row["loss"] for row in map(json.loads, (run / "metrics.jsonl").read_text().splitlines()) if "loss" in row]
    assert logged == pytest.approx(loss.item(), rel=1e-4, abs=1e-4)
    trained = load_file(run / "adapter" / "adapter_model.safetensors")
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and ".lora_A." not in name:  # the gradient of A is zero where B is
            saved = trained[_saved_name(name)]
            idle = re.search(CASES[family].idle, name) is not None
            assert idle or parameter.grad is not None, name
            gradient = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
            step, scale = parameter.detach() - saved, gradient.abs().max().item()  # a learning rate of 1
            assert (scale > 0) != idle, name
            torch.testing.assert_close(
                step, gradient, rtol=0, atol=1e-3 * scale + 1e-6, msg=lambda text, name=name: f"{name}: {text}"
            )
            compared += 1
    buffers = {_saved_name(name) for name, _ in model.named_buffers()}  # Florence-2's projector saves one
    assert compared == sum(".lora_A." not in name for name in trained.keys() - buffers)

    if not CASES[family].alone:
        _check_packed_attention(model, encoded)

    question = samples[-1].messages[:1]
    plain = tf.AutoModelForImageTextToText.from_pretrained(merged)
    messages = [{**question[0], "content": [_with_open_image(block) for block in question[0]["content"]]}]
    inputs = _plain_inputs(tf.AutoProcessor.from_pretrained(merged), messages, CASES[family])
    inputs = {name: value.to(plain.dtype) if _is_float(value) else value for name, value in inputs.items()}  # Llama 4's is bf16
    output = plain.generate(**inputs, max_new_tokens=6, do_sample=False, repetition_penalty=1.0)
    prompt = 0 if plain.config.is_encoder_decoder else inputs["input_ids"].shape[1]
    answer = processor.tokenizer.decode(output[0, prompt:], skip_special_tokens=True)
    answers = [json.loads(line)["prediction"] for line in (RunDirectory(run).answers("after")).read_text().splitlines()]
    assert answer.strip() == answers[-1]
    if shares_prompt(plain):
        _check_shared_prompts(*load_trained(merged), samples, CASES[family])
    for model in (run, merged) if family in FAST else (merged,):
        assert mmtune("chat", model, "--image", samples[-1].images[0], "--prompt", "What?", "--max-new-tokens", "3") == 0


def _check_packed_attention(model: Any, encoded: list[dict[str, torch.Tensor]]) -> None:
    """Samples of a packed row that are computed alone have the logits that they have under the mask of the row."""
    try:
        check_packable(model)
    except UserError:
        return
    inputs = packed_inputs(model, pack(encoded))
    inputs.pop("labels")
    with torch.no_grad():
        expected = model(**inputs).logits
        with attention_by_sample():
            logits = model(**inputs).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-5 * float(expected.abs().max()))


def _check_shared_prompts(model: Any, processor: Any, samples: list[Sample], case: FamilyCase) -> None:
    """Candidates that continue the cache of their prompt have the likelihoods of a plain forward pass."""
    questions = [replace(sample, choices=("yes", "the cat is on it")) for sample in samples]
    scores = score_choices(model, processor, questions, batch_size=2 if case.alone else 8)
    for question, question_scores in zip(questions, scores, strict=True):
        for encoded, score in zip(encode_choices(question, processor), question_scores, strict=True):
            loss = _reference_loss(model, [[encoded]], processor, case.lists).item()
            assert score == pytest.approx(-loss * int((encoded["labels"] != -100).sum()), rel=1e-4, abs=1e-4)


def _is_float(value: Any) -> bool:
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _plain_inputs(processor: Any, messages: list[dict[str, Any]], case: FamilyCase) -> Any:
    """The model's inputs for a question in plain transformers. BLIP-2's processor leaves the chat template to its tokenizer."""
    if processor.chat_template is None or case.flat_images:
        renders = processor.tokenizer if processor.chat_template is None else processor
        text = renders.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        images = [block["image"] for message in messages for block in message["content"] if block["type"] == "image"]
        return processor(images=images, text=[text], return_tensors="pt")
    return processor.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt", **case.plain_call
    )


def _saved_name(name: str) -> str:
    """The name of a tensor of a PEFT model in the file of its adapter."""
    return name.replace(".default", "").replace(".modules_to_save", "")


def _reference_loss(model: Any, batches: list[list[dict[str, Any]]], processor: Any, lists: tuple[str, ...]) -> torch.Tensor:
    """Cross entropy of the supervised tokens of all batches, from the logits of plain transformers."""
    total, tokens = torch.zeros(()), 0
    for encoded in batches:
        batch = collate(encoded, processor.tokenizer.pad_token_id)
        labels = batch.pop("labels")[:, 1:]
        batch |= {name: batch[name].tolist() for name in lists}
        logits = model(**batch).logits[:, :-1]
        total = total + torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), labels.flatten(), ignore_index=-100, reduction="sum"
        )
        tokens += int((labels != -100).sum())
    return total / tokens


def _with_open_image(block: dict[str, Any]) -> dict[str, Any]:
    return {"type": "image", "image": Image.open(block["image"])} if block["type"] == "image" else block


def _reference(base: Path, adapter: Path) -> Any:
    """The model at the start of the run in plain transformers and PEFT: LoRA with A from the adapter and B zero."""
    model = tf.AutoModelForImageTextToText.from_pretrained(base)
    config = LoraConfig.from_pretrained(str(adapter))
    fresh = LoraConfig(
        r=config.r,
        lora_alpha=config.lora_alpha,
        target_modules=config.target_modules,
        target_parameters=config.target_parameters,
        modules_to_save=config.modules_to_save,
        task_type="CAUSAL_LM",
    )
    tuned = get_peft_model(model, fresh)
    saved = load_file(adapter / "adapter_model.safetensors")
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if ".lora_A." in name:
                parameter.copy_(saved[name.replace(".default", "")])
    tuned.train()
    for module in tuned.modules():
        if isinstance(module, torch.nn.BatchNorm2d | torch.nn.BatchNorm3d):
            module.eval()  # frozen, with the statistics of the base
    return tuned


@pytest.mark.slow
@pytest.mark.parametrize("family", ["llava", "llava_onevision", "qwen3_vl", "internvl", "gemma3", "paligemma"])
def test_tower_full_and_quantized_tuning_train_and_merge(
    family: str, write: Write, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rehearsal, LoRA in the vision tower, full tuning, packing or its error, nf4 with its plan, evaluation of a run.

    One family for each way in which an image becomes tokens, and the two whose attention is not plainly causal.
    """
    assert mmtune("train", write(family, LORA), "--rehearse") == 0, capsys.readouterr()
    recipes = {
        "tower": write(family, f"vision: {{method: lora, r: 4, target_modules: all-linear}}, {LORA}"),
        "full": write(family, "vision: {method: full}, projector: {method: full}, language: {method: full}"),
        "nf4": write(family, LORA, model=", precision: nf4"),
    }
    for name, path in recipes.items():
        assert mmtune("train", path) == 0, (name, capsys.readouterr())
        dtype = () if name == "nf4" else ("--dtype", "fp32")
        merged = mmtune("merge", path.parent / "run", path.parent / "merged", "--samples", "2", *dtype)
        assert merged == 0, (name, capsys.readouterr())
    assert mmtune("plan", recipes["nf4"]) == 0, capsys.readouterr()
    assert mmtune("eval", recipes["tower"].parent / "run") == 0, capsys.readouterr()
    capsys.readouterr()
    packed = mmtune("train", write(family, LORA, data=", packing: true, max_tokens: 600"))
    errors = capsys.readouterr().err
    assert (packed, "packing is not supported" in errors) == ((2, True) if family_of(family).unpackable else (0, False)), errors


@pytest.mark.slow
def test_a_rehearsal_reports_its_placeholders(
    write: Write, bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    path = write("qwen2_5_vl", LORA)
    for name in ("Qwen/Qwen2.5-VL-3B-Instruct", "llava-hf/llava-1.5-7b-hf"):
        assert mmtune("train", path, f"model.base={name}", "--rehearse") == 0, capsys.readouterr()
        assert f"rehearsal: {name} is not on this machine; the tiny " in capsys.readouterr().out
    assert mmtune("train", path, f"model.base={bases('qwen2_5_vl')}", "--rehearse") == 0
    assert "stands in" not in capsys.readouterr().out
