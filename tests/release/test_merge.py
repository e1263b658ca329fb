"""Merge: the release on disk equals the trained model, or nothing is written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from peft import PeftModel
from peft.tuners.lora import LoraLayer, LoraModel
from programs import run_program
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.encoding.encode import encode_sample
from mmtune.models.checkpoints.trained_weights import read_adapter_base
from mmtune.models.load import load_trained
from mmtune.recipe.recipe import Recipe
from mmtune.release.merge import (
    TOLERANCE,
    ExportOptions,
    Parity,
    _check_merge,
    _check_release,
    merge,
    parity_samples,
    release_adapter,
)
from mmtune.release.model_card import model_card
from mmtune.release.parity import ModelOutputs
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.manifest import check_manifest


@pytest.fixture(scope="module")
def trained(make_recipe_in: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    recipe = make_recipe_in(tmp_path_factory.mktemp("trained"), "train.max_steps=6")
    train(recipe, ["test"])
    return Path(recipe.output_dir)


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> RunDirectory:
    return RunDirectory(shutil.copytree(trained, tmp_path / "run"))


def change_adapter(run: RunDirectory, change: Callable[[torch.Tensor], torch.Tensor], only: str) -> None:
    file = run.adapter / "adapter_model.safetensors"
    save_file({key: change(value) if only in key else value for key, value in load_file(file).items()}, file)


def restore_projector(run: RunDirectory, base: Path | str) -> None:
    """Give the adapter the base's own projector."""
    original = load_file(Path(base) / "model.safetensors")
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    for key in tensors:
        if "multi_modal_projector" in key:
            tensors[key] = original["multi_modal_projector" + key.split("multi_modal_projector")[1]].float()
    save_file(tensors, file)


@pytest.mark.slow
def test_merged_weights_equal_pefts_merge(run: RunDirectory, base: Path, tmp_path: Path) -> None:
    parity = merge(run.path, tmp_path / "out", count=4)
    assert parity.merge_max_logit_difference < 1e-4
    assert parity.merge_same_answers == parity.merge_samples == 4
    assert parity.merge_difference_from_base > 1e-3
    reference = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(str(base)), str(run.adapter))
    expected = reference.merge_and_unload().state_dict()
    released = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "out")).state_dict()
    assert expected.keys() == released.keys()
    for name in expected:
        torch.testing.assert_close(released[name], expected[name], atol=0, rtol=0)


def test_a_release_has_all_its_files(run: RunDirectory, tmp_path: Path) -> None:
    merge(run.path, tmp_path / "out", count=2)
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"} <= names
    assert not [name for name in names if name.endswith((".bin", ".pt"))]
    card = (tmp_path / "out" / "README.md").read_text()
    assert "largest logit difference" in card
    assert run.recipe.read_text() in card
    recipe = _recipe(run)
    builtin = recipe.model_copy(update={"model": recipe.model.model_copy(update={"base": "builtin:tiny-llava"})})
    cards = (card, model_card(builtin, run.read_summary(), run))
    fronts = [yaml.safe_load(each.split("---\n")[1]) for each in cards]
    assert fronts[0]["library_name"] == "transformers"
    assert fronts[0]["base_model"] == recipe.model.base
    assert "base_model" not in fronts[1]
    assert run.read_summary()["merge_same_answers"] == 2
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]


@pytest.mark.slow
def test_the_merged_model_runs_without_mmtune(run: RunDirectory, tmp_path: Path) -> None:
    merge(run.path, tmp_path / "out", count=2)
    sample = parity_samples(_recipe(run), 1)[0]
    script = """
import importlib.abc, json, sys
class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "mmtune":
            raise ImportError(name)
sys.meta_path.insert(0, Refuse())
from PIL import Image
import torch
import yaml
from transformers import AutoModelForImageTextToText, AutoProcessor
model = AutoModelForImageTextToText.from_pretrained(sys.argv[1])
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image", "image": Image.open(sys.argv[2]).convert("RGB")}, {"type": "text", "text": sys.argv[3]}]
inputs = processor.apply_chat_template(
    [{"role": "user", "content": content}],
    add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt",
)
with torch.no_grad():
    output = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    logits = model(**inputs).logits[0, -1]
assert "mmtune" not in sys.modules
text = processor.decode(output[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True)
print(json.dumps({"text": text, "logits": logits.tolist()}))
"""
    question = sample.messages[0]["content"][-1]["text"]
    answer = json.loads(run_program(script, tmp_path / "out", sample.images[0], question, cwd=tmp_path))

    adapter = AutoModelForImageTextToText.from_pretrained(str(run.adapter))
    processor = AutoProcessor.from_pretrained(str(run.adapter))
    encoded = encode_sample(sample, processor)
    start = int((encoded["labels"] != -100).nonzero()[0, 1])
    prompt = {k: v[:, :start] if v.dim() == 2 else v for k, v in encoded.items() if k != "labels"}
    with torch.no_grad():
        logits = adapter(**prompt).logits[0, -1]
        output = adapter.generate(**prompt, max_new_tokens=8, do_sample=False)
    torch.testing.assert_close(torch.tensor(answer["logits"]), logits, atol=1e-4, rtol=0)
    assert answer["text"] == processor.decode(output[0, start:], skip_special_tokens=True)


def test_a_merge_that_changes_nothing_fails(run: RunDirectory, tmp_path: Path, base: Path) -> None:
    change_adapter(run, torch.zeros_like, only="lora_B")
    restore_projector(run, base)
    with pytest.raises(CheckFailed, match="equals the base"):
        merge(run.path, tmp_path / "out", count=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_wrong_merge_fails_and_leaves_the_existing_release(
    run: RunDirectory, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merge(run.path, tmp_path / "out", count=2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    merge_and_unload = LoraModel.merge_and_unload

    def merge_wrongly(self: LoraModel, *args: object, **kwargs: object) -> torch.nn.Module:
        merged = merge_and_unload(self, *args, **kwargs)
        with torch.no_grad():
            merged.get_output_embeddings().weight.mul_(1.01)
        return merged

    monkeypatch.setattr(LoraModel, "merge_and_unload", merge_wrongly)
    with pytest.raises(CheckFailed, match="differs from the adapter"):
        merge(run.path, tmp_path / "out", overwrite=True, count=2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    with pytest.raises(CheckFailed, match="differs from the adapter"):
        merge(run.path, tmp_path / "new", count=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "run"]


def test_an_incomplete_adapter_is_an_error(run: RunDirectory, tmp_path: Path) -> None:
    file = run.adapter / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({key: value for key, value in tensors.items() if "layers.3" not in key}, file)
    with pytest.raises(UserError, match=r"its tensors do not match its base: 14 missing \(.*layers\.3"):
        merge(run.path, tmp_path / "out", count=2)
    save_file({**tensors, "base_model.model.stray.lora_A.weight": torch.zeros(1)}, file)
    with pytest.raises(UserError, match=r"1 unexpected \("):
        load_trained(run.path)


def test_a_merge_never_replaces_its_inputs_or_other_folders(
    make_recipe: Callable[..., Recipe], base: Path, tmp_path: Path
) -> None:
    shutil.copytree(base, tmp_path / "models" / "base")
    recipe = make_recipe("train.max_steps=1", f"model.base={tmp_path / 'models' / 'base'}")
    train(recipe, ["test"])
    run = Path(recipe.output_dir)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter1.txt").write_text("it was a dark night")
    for out, reason in [
        (run, "contains .*run, which is still needed"),
        (tmp_path / "models" / "base", "contains .*base, which is still needed"),
        (tmp_path / "models", "contains .*base, which is still needed"),
        (tmp_path / "thesis", "expected an earlier output with config.json"),
    ]:
        before = sorted(path for path in tmp_path.rglob("*"))
        with pytest.raises(UserError, match=reason):
            merge(run, out, overwrite=True, count=2)
        assert sorted(path for path in tmp_path.rglob("*")) == before


@pytest.mark.slow
def test_a_bf16_release_is_merged_in_fp32_and_its_rounding_is_limited(
    make_recipe: Callable[..., Recipe], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = make_recipe("model.precision=bf16", "train.max_steps=6")
    train(recipe, ["test"])
    run = RunDirectory(Path(recipe.output_dir))
    parity = merge(run.path, tmp_path / "out", count=4)
    assert parity.merge_dtype == "bf16"
    assert parity.merge_unrounded_difference < 1e-4 < parity.merge_mean_logit_difference
    weights = load_file(tmp_path / "out" / "model.safetensors")
    assert {value.dtype for value in weights.values()} == {torch.bfloat16}

    merge_and_unload = LoraModel.merge_and_unload

    def merge_with_a_larger_scale(self: LoraModel, *args: object, **kwargs: object) -> torch.nn.Module:
        for module in self.modules():
            if isinstance(module, LoraLayer):
                module.scaling = {name: 1.3 * value for name, value in module.scaling.items()}
        return merge_and_unload(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(LoraModel, "merge_and_unload", merge_with_a_larger_scale)
        with pytest.raises(CheckFailed, match="differs from the adapter"):
            merge(run.path, tmp_path / "wrong", count=4)
    # An adapter as small as the rounding error of bf16 weights is lost by rounding.
    change_adapter(run, lambda tensor: tensor * 1e-3, only="lora_B")
    restore_projector(run, read_adapter_base(run.adapter))
    with pytest.raises(CheckFailed, match="rounding the merged model to bf16"):
        merge(run.path, tmp_path / "lost", count=4)
    assert not (tmp_path / "wrong").exists()
    assert not (tmp_path / "lost").exists()


def test_merge_user_errors_have_clear_messages(run: RunDirectory, tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(UserError, match="exists; give another path, or --overwrite"):
        merge(run.path, tmp_path / "taken", count=2)
    with pytest.raises(UserError, match=r"no such run or model: .*nowhere"):
        merge(tmp_path / "nowhere", tmp_path / "out")
    file = run.adapter / "adapter_model.safetensors"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    with pytest.raises(UserError, match="cannot load the adapter"):
        merge(run.path, tmp_path / "out", count=2)
    file.write_bytes(content)
    config = json.loads((run.adapter / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (run.adapter / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="its base"):
        merge(run.path, tmp_path / "out", count=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_run_that_tunes_the_projector_alone_is_merged(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("tune.language=frozen", "train.max_steps=6")
    train(recipe, ["test"])
    names = load_file(Path(recipe.output_dir) / "adapter" / "adapter_model.safetensors").keys()
    assert len(names) == 4
    assert all("multi_modal_projector" in name for name in names)
    assert merge(Path(recipe.output_dir), tmp_path / "out", count=2).merge_max_logit_difference < 1e-4


@pytest.mark.slow
def test_a_fully_tuned_run_is_released_unchanged(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("tune.language=full", "tune.vision=full", "train.max_steps=2", "train.learning_rate=1e-3")
    train(recipe, ["test"])
    run = Path(recipe.output_dir)
    with pytest.raises(UserError, match="the run trained the full model and has no adapter"):
        release_adapter(run, tmp_path / "adapter_release")
    parity = merge(run, tmp_path / "out", count=4, options=ExportOptions(dtype="bf16", max_shard_size="2MB"))
    assert parity.merge_unrounded_difference == 0 < parity.merge_max_logit_difference < parity.merge_difference_from_base
    assert "manifest.json" in check_manifest(tmp_path / "out")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    trained, released = load_file(run / "model" / "model.safetensors"), {}
    for shard in (tmp_path / "out").glob("*.safetensors"):
        released |= load_file(shard)
    assert trained.keys() == released.keys()
    assert all(torch.equal(trained[name].to(torch.bfloat16), released[name]) for name in trained)


def test_a_fully_tuned_run_that_equals_its_base_is_not_released(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    towers = ["tune.language=full", "tune.vision=full", "tune.projector=full"]
    recipe = make_recipe(*towers, "train.max_steps=1", "train.learning_rate=1e-30")
    train(recipe, ["test"])
    with pytest.raises(CheckFailed, match="equals the base"):
        merge(Path(recipe.output_dir), tmp_path / "out", count=4)
    assert not (tmp_path / "out").exists()


def _recipe(run: RunDirectory) -> Recipe:
    from mmtune.recipe.recipe import load_recipe

    return load_recipe(run.recipe)


def test_a_merge_with_equal_logits_and_different_answers_fails() -> None:
    """Answers are checked separately: a lost stop token or chat template does not change the logits."""
    tuned, base = [torch.tensor([[0.0, 1.0]])], [torch.tensor([[1.0, 0.0]])]
    _check_merge(ModelOutputs(tuned, ["7"]), base, ModelOutputs(tuned, ["7"]))
    with pytest.raises(CheckFailed, match="expected 2 identical greedy answers, got 1"):
        _check_merge(ModelOutputs(tuned, ["7", "8"]), base, ModelOutputs(tuned, ["7", "8 and on"]))
    parity = Parity(
        merge_samples=2,
        merge_dtype="fp32",
        merge_max_logit_difference=0.0,
        merge_mean_logit_difference=0.0,
        merge_kl=0.0,
        merge_same_answers=2,
        merge_unrounded_difference=0.0,
        merge_tolerance=TOLERANCE,
        merge_difference_from_base=1.0,
    )
    _check_release(parity, tuning_change=1.0)
    with pytest.raises(CheckFailed, match=r"reloaded from disk, differs from the adapter: .* 1 of 2 greedy answers identical"):
        _check_release(replace(parity, merge_same_answers=1), tuning_change=1.0)
