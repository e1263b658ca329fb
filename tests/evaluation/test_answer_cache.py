"""The cache of answers: what changes a key, what is read back, several writers, damage, size."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from mmtune.cli.main import entry_point
from mmtune.evaluation.predictions import answer_cache, answering
from mmtune.evaluation.predictions.answer_cache import AnswerCache, model_key, open_answer_cache, question_key
from mmtune.evaluation.predictions.prediction import Prediction
from mmtune.models.checkpoints import weights_hash
from mmtune.models.checkpoints.weights_hash import hash_checkpoints
from mmtune.utils import files

torch.set_num_threads(1)

FIRST = Prediction("yes \u2028 é", near_tie=True, answers=("yes", "no"), scores=(-1.2345678901234567, float("-inf")))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an empty cache."""
    monkeypatch.setattr(files, "USER_CACHE", tmp_path / "cache")
    return tmp_path / "cache" / "answers"


@pytest.fixture
def open_cache(untrained: tuple[Any, Any]) -> Callable[[], AnswerCache]:
    """A function that opens the cache of one model."""

    def opened() -> AnswerCache:
        answers = open_answer_cache(*untrained, "weights")
        assert answers is not None
        return answers

    return opened


def test_answers_are_read_back_unchanged(open_cache: Callable[[], AnswerCache]) -> None:
    one, other = open_cache(), open_cache()  # two processes at once
    one.add({"a": FIRST, "b": Prediction("b")})
    other.add({"b": Prediction("b"), "c": Prediction("c")})
    one.add({"d": Prediction("d")})
    assert one.get("c") is None and one.get("a") == FIRST and one.hits == 1
    later = open_cache()
    assert [later.get(key) for key in "abcd"] == [FIRST, *map(Prediction, "bcd")]
    assert len([*later.folder.glob("*.jsonl")]) == 2  # type: ignore[union-attr]


def test_a_damaged_entry_is_one_line_and_is_computed_again(
    open_cache: Callable[[], AnswerCache], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    open_cache().add({"a": FIRST, "b": Prediction("b"), "c": Prediction("c")})
    [file] = cache.glob("*/*.jsonl")
    content = file.read_bytes()
    file.write_bytes(content.replace(b'"text": "b"', b'"text": "B"')[:-20])  # a changed byte, and a line cut off by a kill
    later = open_cache()
    assert (later.get("a"), later.get("b"), later.get("c")) == (FIRST, None, None)
    assert capsys.readouterr().out == f"answer cache: 2 damaged entries in {file.parent}; computed again\n"


def test_the_least_recently_used_files_are_removed(
    open_cache: Callable[[], AnswerCache], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for age, name in ((300, "old"), (200, "used"), (100, "new")):
        path = cache / name / "x.jsonl"
        path.parent.mkdir(parents=True)
        path.write_bytes(b"x" * 100)
        os.utime(path, (1e9 - age, 1e9 - age))
    monkeypatch.setattr(answer_cache, "MAX_BYTES", 250)
    open_cache()
    assert sorted(path.parent.name for path in cache.glob("*/x.jsonl")) == ["new", "used"]


def test_a_cache_that_cannot_be_written_is_one_line(
    open_cache: Callable[[], AnswerCache], cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache.parent.mkdir()
    cache.write_text("a file in place of the folder")
    opened = open_cache()
    opened.add({"a": FIRST})
    opened.add({"b": FIRST})
    assert re.fullmatch(r"answer cache: cannot write in .*; answers are no longer cached\n", capsys.readouterr().out)


def test_the_key_of_a_question_depends_on_every_byte_and_setting() -> None:
    tensors = {"input_ids": torch.tensor([[1, 2]]), "pixel_values": torch.zeros(1, 3, 2, 2)}
    settings = {"max_new_tokens": 4, "temperature": 0.0}
    key = question_key([tensors], settings)
    assert key == question_key([{name: tensor.clone() for name, tensor in tensors.items()}], settings)
    pixels = tensors["pixel_values"].clone()
    pixels[0, 2, 1, 1] = 1e-7
    others = [
        [{**tensors, "pixel_values": pixels}],
        [{**tensors, "pixel_values": tensors["pixel_values"].view(1, 3, 4, 1)}],
        [{**tensors, "pixel_values": tensors["pixel_values"].to(torch.float64)}],
        [{**tensors, "input_ids": torch.tensor([[1, 3]])}],
        [{**tensors, "attention_mask": torch.tensor([[1, 1]])}],
        [tensors, tensors],
    ]
    keys = [question_key(other, settings) for other in others] + [question_key([tensors], {**settings, "max_new_tokens": 5})]
    assert len({key, *keys}) == 8


def test_the_key_of_a_model_depends_on_weights_dtype_attention_and_versions(
    untrained: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, processor = untrained
    keys = [model_key(model, processor, "weights"), model_key(model, processor, "other weights")]
    attention = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        keys.append(model_key(model, processor, "weights"))
    finally:
        model.set_attn_implementation(attention)
    assert model_key(model, processor, "weights") == keys[0]
    head = model.model.multi_modal_projector.linear_1
    weight = head.bias
    try:
        head.bias = torch.nn.Parameter(weight.data.to(torch.bfloat16), requires_grad=False)
        keys.append(model_key(model, processor, "weights"))
    finally:
        head.bias = weight
    for library in ("torch", "transformers", "mmtune"):
        versions = answer_cache.versions()
        monkeypatch.setattr(answer_cache, "versions", lambda versions=versions, library=library: {**versions, library: "0"})
        keys.append(model_key(model, processor, "weights"))
    assert len(set(keys)) == 7


def test_the_hash_of_weights_depends_on_their_content_and_reads_large_files_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "model"
    folder.mkdir()
    weights = folder / "model.safetensors"
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.zeros(8)}, weights)
    monkeypatch.setattr(weights_hash, "LARGE", weights.stat().st_size)
    read: list[str] = []
    sha256 = weights_hash.sha256
    monkeypatch.setattr(weights_hash, "sha256", lambda path: read.append(path.name) or sha256(path))
    first = hash_checkpoints([str(folder)])
    assert hash_checkpoints([str(folder)]) == first
    assert sorted(read) == ["config.json"] * 2 + ["model.safetensors"] * 2  # changed a moment ago: read again
    monkeypatch.setattr(weights_hash, "SETTLED_S", -1e9)
    read.clear()
    assert [hash_checkpoints([str(folder)]) for _ in range(3)] == [first] * 3
    assert read.count("model.safetensors") == 1 and read.count("config.json") == 3

    status = weights.stat()
    save_file({"w": torch.ones(8)}, weights)
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))  # of the same size and time
    assert hash_checkpoints([str(folder)]) != first
    assert hash_checkpoints([str(folder)], seed=1) != hash_checkpoints([str(folder)], seed=2)
    assert hash_checkpoints(["no/such-model"]) is None


# ---- a run, evaluated again


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, rows: Path, base: Path) -> Path:
    """A run of three steps with an evaluation of 6 rows."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "recipe.yaml").write_text(
        f"""
        model: {{base: {base}}}
        tune: {{projector: {{method: full}}, language: {{method: lora, r: 4, lora_alpha: 8}}}}
        data: {{train: [{{path: {rows}, template: llava}}]}}
        evaluate:
          {{data: [{{path: {rows}, template: llava, limit: 6}}], leakage: warn, max_new_tokens: 4, before: false, batch_size: 4}}
        train: {{max_steps: 2, learning_rate: 5e-3, per_device_train_batch_size: 4, use_cpu: true}}
        output_dir: {folder / "run"}
        """
    )
    assert entry_point(["train", str(folder / "recipe.yaml")]) == 0
    return folder


@pytest.fixture
def passes() -> Iterator[list[int]]:
    """The number of prompts of each generation."""
    counts: list[int] = []
    generate = answering.generate

    def counted(model: Any, processor: Any, batch: Any, *arguments: Any, **keywords: Any) -> Any:
        counts.append(len(batch["input_ids"]))
        return generate(model, processor, batch, *arguments, **keywords)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(answering, "generate", counted)
        yield counts


def _answers(run: Path, *arguments: str) -> list[dict[str, Any]]:
    assert entry_point(["eval", str(run), "--out", str(run.parent / "out.jsonl"), *arguments]) == 0
    return [json.loads(line) for line in (run.parent / "out.jsonl").read_text().splitlines()]


def test_an_evaluation_continues_where_it_stopped(
    run: Path, passes: list[int], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _answers(run / "run", "evaluate.cache=false")
    assert sum(passes) == 6 and not [*(files.USER_CACHE / "answers").glob("*/*")]
    passes.clear()

    generate = answering.generate

    def killed(*arguments: Any, **keywords: Any) -> Any:
        if passes:
            raise KeyboardInterrupt
        return generate(*arguments, **keywords)

    with monkeypatch.context() as patch:
        patch.setattr(answering, "generate", killed)
        assert entry_point(["eval", str(run / "run"), "--out", str(run / "out.jsonl")]) == 130
    assert passes == [4]
    passes.clear()
    assert _answers(run / "run") == expected
    assert passes == [2]
    assert "4 answers are from the cache" in capsys.readouterr().out
    assert _answers(run / "run", "evaluate.batch_size=1") == expected
    assert passes == [2]


def test_an_evaluation_after_training_gives_the_answers_of_the_run(
    run: Path, tmp_path: Path, passes: list[int], capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"output_dir={tmp_path / 'run'}"]
    assert entry_point(["train", str(run / "recipe.yaml"), *overrides]) == 0
    assert sum(passes) == 6
    passes.clear()
    answers = _answers(tmp_path / "run")
    assert passes == [] and "6 answers are from the cache" in capsys.readouterr().out
    assert answers == [json.loads(line) for line in (tmp_path / "run" / "answers_after.jsonl").read_text().splitlines()]
    assert _answers(tmp_path / "run", "evaluate.cache=false") == answers


def test_a_retrained_run_and_a_changed_image_get_no_old_answers(run: Path, rows: Path, passes: list[int]) -> None:
    first = _answers(run / "run")
    adapter = run / "run" / "adapter" / "adapter_model.safetensors"
    trained = adapter.read_bytes()
    save_file({name: -tensor for name, tensor in load_file(adapter).items()}, adapter)
    try:
        passes.clear()
        _answers(run / "run")
        assert sum(passes) == 6
    finally:
        adapter.write_bytes(trained)
    image = Path(first[0]["images"][0])
    content = image.read_bytes()
    try:
        Image.new("RGB", Image.open(image).size, "red").save(image)
        passes.clear()
        _answers(run / "run")
        assert passes == [1]
    finally:
        image.write_bytes(content)
    passes.clear()
    assert _answers(run / "run") == first and passes == []
