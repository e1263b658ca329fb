"""Tensors of a base that its class does not read are copied into every release, byte for byte."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from huggingface_hub import constants
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mmtune.cli.main import entry_point
from mmtune.models.checkpoints.unread_tensors import append_tensors, find_unread_tensors
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import CheckFailed
from mmtune.utils.manifest import check_manifest

EXTRA = {
    "mtp.layers.0.weight": torch.arange(6.0).reshape(2, 3),
    "mtp.fc.weight": torch.arange(8.0).to(torch.float8_e4m3fn),
    "model.layers.92.scale": torch.tensor(1.5, dtype=torch.bfloat16),
}


@pytest.fixture(scope="module")
def sharded_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built-in architecture in shards, with a second copy of its tied head and tensors that no module reads."""
    out = tmp_path_factory.mktemp("sharded") / "base"
    shutil.copytree(base, out)
    weights = load_file(out / "model.safetensors")
    (out / "model.safetensors").unlink()
    weights["language_model.lm_head.weight"] = weights["language_model.model.embed_tokens.weight"].clone()
    names = sorted(weights)
    shards = {"one.safetensors": names[:50], "two.safetensors": names[50:]}
    save_file({name: weights[name] for name in shards["one.safetensors"]} | EXTRA, out / "one.safetensors", {"format": "pt"})
    save_file({name: weights[name] for name in shards["two.safetensors"]}, out / "two.safetensors", {"format": "pt"})
    weight_map = {name: file for file, names in shards.items() for name in names} | dict.fromkeys(EXTRA, "one.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return out


def read(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint, by its index if it has one."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        return load_file(folder / "model.safetensors")
    content = json.loads(index.read_text())
    files = {name: load_file(folder / name) for name in set(content["weight_map"].values())}
    assert not (folder / "model.safetensors").exists()  # transformers would read this file alone
    assert sorted(name for tensors in files.values() for name in tensors) == sorted(content["weight_map"])
    tensors = {name: files[file][name] for name, file in content["weight_map"].items()}
    assert content["metadata"].get("total_size") in (None, sum(tensor.nbytes for tensor in tensors.values()))
    return tensors


def has_extra(folder: Path) -> bool:
    tensors = read(folder)
    for name, value in EXTRA.items():
        assert tensors[name].dtype == value.dtype and tensors[name].shape == value.shape
        assert torch.equal(tensors[name].reshape(-1).view(torch.uint8), value.reshape(-1).view(torch.uint8))
    _, report = AutoModelForImageTextToText.from_pretrained(folder, output_loading_info=True)
    assert not report["missing_keys"] and not report["mismatched_keys"]
    return set(report["unexpected_keys"]) == set(EXTRA)


def with_module_key_names(folder: Path, out: Path) -> Path:
    """A copy of a checkpoint with the key names of a model that was built in memory."""
    shutil.copytree(folder, out)
    for file in out.glob("*.safetensors"):
        tensors = {name.replace("vision_model.", ""): tensor for name, tensor in load_file(file).items()}
        save_file(tensors, file, {"format": "pt"})
    index = out / "model.safetensors.index.json"
    index.write_text(index.read_text().replace("vision_model.", ""))
    return out


def test_unread_tensors_are_found_by_their_keys(sharded_base: Path, tmp_path: Path) -> None:
    """Renamed keys and the second copy of a tied weight are read."""
    for source in (sharded_base, with_module_key_names(sharded_base, tmp_path / "older")):
        model, report = AutoModelForImageTextToText.from_pretrained(source, output_loading_info=True)
        assert find_unread_tensors(model, str(source)) == dict.fromkeys(EXTRA, source / "one.safetensors")
        assert set(report["unexpected_keys"]) == set(EXTRA)


def test_unread_tensors_of_a_cached_hub_base_are_found(
    sharded_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = tmp_path / "models--someone--odd"
    shutil.copytree(sharded_base, stored / "snapshots" / "abc")
    (stored / "refs").mkdir()
    (stored / "refs" / "main").write_text("abc")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    model = AutoModelForImageTextToText.from_pretrained("someone/odd")
    assert find_unread_tensors(model, "someone/odd") == dict.fromkeys(EXTRA, stored / "snapshots" / "abc" / "one.safetensors")


def test_tensors_that_transformers_drops_without_a_warning_are_found(tmp_path: Path) -> None:
    """Qwen3.5's multi-token-prediction head, which transformers does not report."""
    text = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2, "head_dim": 8}
    text |= {"num_key_value_heads": 1, "vocab_size": 64, "linear_num_key_heads": 1, "linear_num_value_heads": 1}
    text |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    eye = {"depth": 1, "hidden_size": 16, "num_heads": 2, "intermediate_size": 32, "out_hidden_size": 16}
    config = tf.Qwen3_5Config(text_config=text, vision_config=eye)
    tf.Qwen3_5ForConditionalGeneration(config).save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "model.safetensors"
    save_file(load_file(file) | {"mtp.norm.weight": torch.ones(16)}, file, {"format": "pt"})
    model, report = AutoModelForImageTextToText.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert not report["unexpected_keys"]
    assert find_unread_tensors(model, str(tmp_path / "base")) == {"mtp.norm.weight": file}
    model.save_pretrained(tmp_path / "out", max_shard_size="40KB")
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1
    append_tensors({"mtp.norm.weight": file}, tmp_path / "out")
    assert torch.equal(read(tmp_path / "out")["mtp.norm.weight"], torch.ones(16))


def test_a_duplicate_tensor_is_an_error(sharded_base: Path, tmp_path: Path) -> None:
    shutil.copytree(sharded_base, tmp_path / "out")
    with pytest.raises(CheckFailed, match="duplicate tensors"):
        append_tensors(dict.fromkeys(EXTRA, sharded_base / "one.safetensors"), tmp_path / "out")


@pytest.mark.slow
def test_a_merge_copies_unread_tensors(
    make_recipe: Callable[..., Recipe], sharded_base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe(f"model.base={sharded_base}")
    train(recipe, ["test"])
    run, out = recipe.output_dir, tmp_path / "out"
    command = ["merge", run, str(out), "--samples", "2", "--dtype", "bf16", "--quantize", "nf4", "--max-shard-size", "2MB"]
    assert entry_point(command) == 0
    line = "tensors that LlavaForConditionalGeneration does not read, copied from the base unchanged: 3 ("
    assert capsys.readouterr().out.count(line) == 1
    for folder in (out, tmp_path / "out-nf4"):
        assert has_extra(folder)
        check_manifest(folder)
        listed = json.loads((folder / "manifest.json").read_text())["copied_tensors"]
        assert listed["model.layers.92.scale"] == {"dtype": "bfloat16", "shape": []} and listed.keys() == EXTRA.keys()
        assert "`mtp.layers.0.weight`" in (folder / "README.md").read_text()
    assert RunDirectory(Path(run)).read_summary()["merge_copied_tensors"] == sorted(EXTRA)
    assert entry_point(["merge", "--adapter", f"{run}:0.5", str(tmp_path / "sum"), "--samples", "2"]) == 0
    assert has_extra(tmp_path / "sum")
    assert entry_point(["merge", run, str(tmp_path / "adapter_release"), "--keep-adapter", "--samples", "2"]) == 0
    assert has_extra(tmp_path / "adapter_release" / "base")


@pytest.mark.slow
def test_a_fully_tuned_model_has_the_unread_tensors(
    make_recipe: Callable[..., Recipe], sharded_base: Path, tmp_path: Path
) -> None:
    recipe = make_recipe(f"model.base={sharded_base}", "tune.language=full", "tune.vision=full", "train.learning_rate=1e-3")
    train(recipe, ["test"])
    assert has_extra(Path(recipe.output_dir) / "model")
    assert entry_point(["merge", recipe.output_dir, str(tmp_path / "out"), "--samples", "2"]) == 0
    assert has_extra(tmp_path / "out")


def test_a_checkpoint_without_unread_tensors_is_not_changed(base: Path, tmp_path: Path) -> None:
    model: Any = AutoModelForImageTextToText.from_pretrained(base)
    assert find_unread_tensors(model, str(base)) == {}
    shutil.copytree(base, tmp_path / "out")
    assert append_tensors({}, tmp_path / "out") == {}
    assert [file.name for file in (tmp_path / "out").glob("model*")] == ["model.safetensors"]
