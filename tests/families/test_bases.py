"""Bases with faulty files on the command line: faults are corrected and reported, or are the same error for every command."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import transformers as tf
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtune.builtin import TINY_LLAVA
from mmtune.cli.main import entry_point

MARKED = "{% for m in messages %}OPENS{% for c in m.content %}{% if c.type == 'image' %}<image>\n{% elif m.role == 'assistant' %}"
WITHOUT_END = MARKED.replace("OPENS", "{{ m.role | upper }}: ") + (
    "{% generation %}{{ c.text }} {% endgeneration %}{% else %}{{ c.text }} {% endif %}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
END_BEHIND_MARK = MARKED.replace("OPENS", "<|{{ m.role }}|>") + (
    "{% generation %}{{ c.text }}{% endgeneration %}{% else %}{{ c.text }}{% endif %}{% endfor %}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
CHANGES: dict[str, dict[str, Any]] = {
    "sampling": {"generation_config.json": {"temperature": 0.9, "top_p": 0.6, "eos_token_id": None}},
    "returns_several": {"generation_config.json": {"num_return_sequences": 2, "pad_token_id": -1, "max_length": 9}},
    "sampling_in_config": {"generation_config.json": None, "config.json": {"temperature": 0.9, "top_p": 0.6}},
    "stops_beyond": {"generation_config.json": {"eos_token_id": [1, 999999]}},
    "no_object": {"generation_config.json": "[1]"},
    "no_json": {"config.json": "{"},
    "invalid_patch": {"processor_config.json": {"patch_size": "x"}},
    "llama_config": {"config.json": json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]})},
    "penalty": {"generation_config.json": {"repetition_penalty": 3.0, "suppress_tokens": [260], "max_length": 9}},
    "beams": {"generation_config.json": {"num_beams": 4}},
    "lacks_extra_tokens": {"processor_config.json": {"num_additional_image_tokens": None, "patch_size": None}},
    "counts_too_few": {"processor_config.json": {"num_additional_image_tokens": 0}},
    "without_end": {"chat_template.jinja": WITHOUT_END},
    "end_behind_mark": {"chat_template.jinja": END_BEHIND_MARK},
    "dated": {"chat_template.jinja": "{{ strftime_now('%Y') }}" + END_BEHIND_MARK},
    "pads_with_images": {"tokenizer_config.json": {"pad_token": "<image>"}},
    "pads_with_ends": {"tokenizer_config.json": {"pad_token": "<|end|>"}},
}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Path]]:
    """A function that returns a folder with a changed built-in checkpoint, rows, and a recipe, by the name of the change."""
    folder = tmp_path_factory.mktemp("bases")
    Image.new("RGB", (48, 40), "teal").save(folder / "a.png")
    answers = ("yes", "no", "two", "one")
    row = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": ""}]
    rows = [{"image": "a.png", "conversations": [row[0], {**row[1], "value": answer}]} for answer in answers]
    (folder / "rows.json").write_text(json.dumps(rows))

    def make(name: str) -> Path:
        out = folder / name
        if not out.exists():
            out.mkdir()
            (out / "base").mkdir()
            for file in TINY_LLAVA.iterdir():
                (out / "base" / file.name).symlink_to(file)
            for file, change in CHANGES[name].items():
                path = out / "base" / file
                text = path.read_text()
                path.unlink()
                if change is None:
                    continue
                if isinstance(change, str):
                    path.write_text(change)
                else:
                    content = {key: value for key, value in {**json.loads(text), **change}.items() if value is not None}
                    path.write_text(json.dumps(content))
            source = f"{{path: {folder / 'rows.json'}, template: llava}}"
            (out / "recipe.yaml").write_text(
                f"model: {{base: {out / 'base'}}}\ntune: {{language: {{method: lora, r: 2}}}}\ndata: {{train: [{source}]}}\n"
                f"evaluate: {{data: [{source}], leakage: warn, max_new_tokens: 6}}\noutput_dir: {out / 'run'}\n"
                "train: {max_steps: 1, learning_rate: 1e-3, per_device_train_batch_size: 2, use_cpu: true}\n"
            )
        return out

    yield make
    shutil.rmtree(folder)


def _verbs(case: Path) -> dict[str, list[str]]:
    """Every command that reads a base, with its arguments."""
    recipe, base = str(case / "recipe.yaml"), str(case / "base")
    return {
        "check": ["data", "check", recipe, "--processes", "1"],
        "show": ["data", "show", recipe],
        "plan": ["plan", recipe],
        "train": ["train", recipe],
        "eval": ["eval", base, "--recipe", recipe, "--out", str(case / "answers.jsonl")],
        "chat": ["chat", base, "--prompt", "What is it?", "--image", str(case.parent / "a.png"), "--max-new-tokens", "6"],
    }


@pytest.mark.parametrize(
    ("name", "error"),
    [
        (
            "without_end",
            "the model's chat template cannot be used: on a question with an image, expected an end-of-turn token after an "
            "answer, got ' '; the model would not learn to end its answer; set model.chat_template: vicuna_v1",
        ),
        (
            "counts_too_few",
            "for an image of 640 x 480 pixels the processor writes 15 image tokens (id 5), the model gives 16 image features; "
            "in the processor's files num_additional_image_tokens: expected 1, got 0",
        ),
    ],
)
def test_a_faulty_base_is_the_same_error_for_every_command(
    bases: Callable[[str], Path], name: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = bases(name)
    for verb, command in _verbs(case).items():
        assert entry_point(command) == 2, verb
        assert error in capsys.readouterr().err, verb
    assert not (case / "run").exists()


@pytest.mark.parametrize(
    ("name", "line"),
    [
        ("sampling", "dropped because transformers does not save a model with it: temperature 0.9, top_p 0.6"),
        (
            "returns_several",
            "transformers does not save a model with it: num_return_sequences 2; because the model has no such token: "
            "pad_token_id -1",
        ),
        (
            "sampling_in_config",
            "config.json: dropped because transformers does not save a model with it: temperature 0.9, top",
        ),
        ("stops_beyond", "generation_config.json: dropped because the model has no such token: eos_token_id 999999\n"),
        ("lacks_extra_tokens", "keys missing in the processor's files set from config.json: patch_size: 8, num_additional"),
        ("pads_with_images", "pad_token set to '<|pad|>': '<image>' is the image token"),
        ("pads_with_ends", "pad_token set to '<|pad|>': '<|end|>' ends a turn"),
    ],
)
def test_a_corrected_fault_is_reported_and_does_not_change_the_answer(
    bases: Callable[[str], Path], name: str, line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = _verbs(bases(name))["chat"]
    assert entry_point(["chat", "builtin:tiny-llava", *chat[2:]]) == 0
    answer = capsys.readouterr().out
    assert entry_point(chat) == 0
    first, *rest = capsys.readouterr().out.splitlines(keepends=True)
    assert line in first and "".join(rest) == answer


@pytest.mark.parametrize(
    ("name", "verb", "error"),
    [
        ("no_object", "chat", "{base}: generation_config.json: expected a JSON object, got [1]"),
        ("no_json", "chat", "{base}: config.json is not valid JSON: Expecting property name"),
        ("no_json", "check", "{recipe}:1: model.base: {base}: config.json is not valid JSON: Expecting property name"),
        ("invalid_patch", "chat", "{base}: the model cannot process an image of 640 x 480 pixels from its processor: "),
        ("invalid_patch", "check", "{recipe}:1: model.base: {base}: the model cannot process an image of 640 x 480 pixels"),
        ("llama_config", "chat", "{base}: model_type 'llama' is not supported as a base"),
        ("without_end", "chat", "{base}: the model's chat template cannot be used"),
    ],
)
def test_an_error_about_a_base_starts_with_its_name_in_the_recipe(
    bases: Callable[[str], Path], name: str, verb: str, error: str, capsys: pytest.CaptureFixture[str]
) -> None:
    case = bases(name)
    assert entry_point(_verbs(case)[verb]) == 2
    assert "error: " + error.format(base=case / "base", recipe=case / "recipe.yaml") in capsys.readouterr().err


def test_a_model_with_a_missing_weight_is_an_error(
    bases: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for file in TINY_LLAVA.iterdir():
        (tmp_path / file.name).symlink_to(file)
    weights = load_file(TINY_LLAVA / "model.safetensors")
    del weights[next(name for name in weights if "multi_modal_projector" in name)]
    (tmp_path / "model.safetensors").unlink()
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    verbs = _verbs(bases("beams"))
    assert entry_point(["chat", str(tmp_path), *verbs["chat"][2:]]) == 2
    assert f"error: {tmp_path}: its weights do not match LlavaForConditionalGeneration: missing " in capsys.readouterr().err


@pytest.mark.slow
def test_a_planned_run_reports_a_corrected_fault_once_and_keeps_its_template(
    bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    case = bases("pads_with_images")
    assert entry_point([*_verbs(case)["train"], "data.plan=true"]) == 0
    assert capsys.readouterr().out.count("pad_token set to") == 1
    run, recipe = str(case / "run"), str(case / "recipe.yaml")
    message = f"error: {run}/adapter: it was trained with another chat template than vicuna_v1; omit the chat template"
    for command in (
        ["eval", run, "model.chat_template=vicuna_v1"],
        ["chat", run, "--chat-template", "vicuna_v1", "--prompt", "x"],
    ):
        assert entry_point(command) == 2
        assert message in capsys.readouterr().err
    assert entry_point(["eval", run, "--recipe", recipe, "model.chat_template=vicuna_v1"]) == 2
    assert message in capsys.readouterr().err
    assert entry_point(["eval", run]) == 0


@pytest.mark.parametrize("name", ["penalty", "beams", "end_behind_mark"])
def test_answers_do_not_depend_on_the_generation_config_of_a_base(
    bases: Callable[[str], Path], name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat, evaluate = _verbs(bases(name))["chat"], _verbs(bases(name))["eval"]
    outputs = []
    for model in ("builtin:tiny-llava", chat[1]):
        assert entry_point(["chat", model, *chat[2:]]) == 0
        assert entry_point(["eval", model, *evaluate[2:], "evaluate.cache=false"]) == 0
        outputs.append(capsys.readouterr().out)
    assert outputs[0] == outputs[1]


def test_a_chat_template_can_be_given_on_the_command_line(
    bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    verbs = _verbs(bases("without_end"))
    assert entry_point([*verbs["chat"], "--chat-template", "vicuna_v1"]) == 0
    assert entry_point([*verbs["eval"], "model.chat_template=vicuna_v1"]) == 0
    capsys.readouterr()
    assert entry_point([*verbs["show"], "model.chat_template=vicuna_v1", "--prompt"]) == 0
    assert capsys.readouterr().out.rstrip().endswith("ASSISTANT:")


def test_the_end_token_after_the_generation_block_is_supervised(
    bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    assert entry_point([*_verbs(bases("end_behind_mark"))["show"], "--json"]) == 0
    tokens = json.loads(capsys.readouterr().out)["tokens"]
    assert [token["text"] for token in tokens if token["kind"] == "supervised"][-1] == "<|end|>"


def test_a_template_that_writes_the_date_is_reported(bases: Callable[[str], Path], capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point([*_verbs(bases("dated"))["show"], "--prompt"]) == 0
    assert "chat template: it writes the current date (strftime_now)" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize("name", ["sampling", "penalty"])
def test_a_release_has_no_penalty_of_its_base_and_states_the_settings_of_its_answers(
    bases: Callable[[str], Path], name: str
) -> None:
    case = bases(name)
    assert entry_point(_verbs(case)["train"]) == 0
    assert entry_point(["merge", str(case / "run"), str(case / "out")]) == 0
    summary = json.loads((case / "run" / "summary.json").read_text())
    used = {"do_sample": False, "num_beams": 1, "max_new_tokens": 6, "eos_token_id": [1], "pad_token_id": 0, "bos_token_id": None}
    assert summary["generation"] == used
    unused = CHANGES["penalty"]["generation_config.json"] if name == "penalty" else {}
    assert summary["generation_not_used"] == unused
    for folder in (case / "run" / "adapter", case / "out"):
        released = tf.GenerationConfig.from_pretrained(folder)
        released.validate(strict=True)
        settings = unused if folder.name == "adapter" else {}  # an engine would apply the penalty, and evaluation did not
        assert released.eos_token_id == [1] and settings.items() <= released.to_diff_dict().items()
        assert (released.repetition_penalty == 3.0) == bool(settings)
    for file in (case / "run" / "report.html", case / "out" / "README.md"):
        text = file.read_text()
        assert "Answers are generated greedily: at most 6 new tokens, stop token 1, padding token 0." in text
        assert ("repetition_penalty 3.0" in text) == (name == "penalty")
