"""Checkpoint files: atomic writing, and strict loading of projectors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from mmtune.models.assemble import assemble, load_projector, save_checkpoint
from mmtune.models.checkpoints.checkpoint_files import check_weights_loaded, safetensors_files
from mmtune.utils.errors import UserError


def test_an_existing_directory_is_replaced_with_overwrite_only(llava: tuple[Any, Any], tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "keep").write_text("mine")
    with pytest.raises(UserError, match="out exists"):
        save_checkpoint(*llava, out)
    assert (out / "keep").read_text() == "mine"
    with pytest.raises(UserError, match=r"out: expected an earlier output with config\.json"):
        save_checkpoint(*llava, out, overwrite=True)
    assert (out / "keep").read_text() == "mine"
    (out / "config.json").write_text("{}")  # now it is an earlier checkpoint
    save_checkpoint(*llava, out, overwrite=True)
    assert not (out / "keep").exists() and (out / "config.json").is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def _other_model(tiny_checkpoints: Path) -> Any:
    return assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"), seed=9)[0]


def test_a_projector_is_read_from_an_adapter_a_run_and_a_checkpoint(
    tiny_checkpoints: Path, llava: tuple[Any, Any], tmp_path: Path
) -> None:
    source = _other_model(tiny_checkpoints)
    expected = {key: value.clone() for key, value in source.model.multi_modal_projector.state_dict().items()}
    save_checkpoint(source, llava[1], tmp_path / "full")
    lora = LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj", modules_to_save=["multi_modal_projector"])
    get_peft_model(source, lora).save_pretrained(tmp_path / "run" / "adapter")
    prefix = "base_model.model.model.multi_modal_projector"
    assert f"{prefix}.linear_1.weight" in load_file(tmp_path / "run" / "adapter" / "adapter_model.safetensors")
    (tmp_path / "older").mkdir()  # key names of a PEFT wrapper's state_dict
    older = {f"{prefix}.modules_to_save.default.{key}": value for key, value in expected.items()}
    older |= {f"{prefix}.original_module.{key}": torch.zeros_like(value) for key, value in expected.items()}
    save_file(older, tmp_path / "older" / "adapter_model.safetensors")
    for path in (tmp_path / "full", tmp_path / "run", tmp_path / "run" / "adapter", tmp_path / "older"):
        model, _ = assemble(str(tiny_checkpoints / "clip"), str(tiny_checkpoints / "llama"))
        load_projector(model, path)
        got = model.model.multi_modal_projector.state_dict()
        assert got.keys() == expected.keys() and all(torch.equal(got[key], expected[key]) for key in got)


def test_a_projector_that_does_not_match_is_an_error_with_the_tensor(
    tiny_checkpoints: Path, llava: tuple[Any, Any], tmp_path: Path
) -> None:
    model, _ = llava
    before = {key: value.clone() for key, value in model.state_dict().items()}
    good = {
        f"model.multi_modal_projector.{key}": value
        for key, value in _other_model(tiny_checkpoints).model.multi_modal_projector.state_dict().items()
    }
    first = "model.multi_modal_projector.linear_1.weight"
    for change, message in (
        ({first: None}, f"missing {first}"),
        (
            {"model.multi_modal_projector.linear_3.bias": torch.zeros(1)},
            "unexpected model.multi_modal_projector.linear_3.bias",
        ),
        ({first: torch.zeros(3, 3)}, rf"{first}: expected shape \(32, 32\), got \(3, 3\)"),
        (dict.fromkeys(good), "expected projector weights"),
    ):
        tensors = {key: value for key, value in {**good, "other": torch.zeros(1), **change}.items() if value is not None}
        save_file(tensors, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=message):
            load_projector(model, tmp_path)
    with pytest.raises(UserError, match="expected a directory"):
        load_projector(model, tmp_path / "nowhere")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"expected adapter_model\.safetensors, .* found none"):
        load_projector(model, tmp_path)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "weight_map: expected an object"),
        ('{"weight_map": []}', "weight_map: expected an object"),
        ('{"weight_map": {"a": 1}}', "weight_map: expected an object"),
        ("[" * 100_000, "is not valid JSON"),
        ('{"weight_map": ' + "9" * 5000 + "}", "is not valid JSON"),
    ],
    ids=["nothing", "a list", "a number", "brackets", "digits"],
)
def test_an_invalid_index_is_an_error(tmp_path: Path, text: str, reason: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text, encoding="utf-8")
    with pytest.raises(UserError, match=rf"model\.safetensors\.index\.json.*{reason}"):
        safetensors_files(tmp_path)


@pytest.mark.parametrize("name", ["../other/model.safetensors", "/model.safetensors", ".."])
def test_an_index_that_names_a_file_in_another_folder_is_an_error(tmp_path: Path, name: str) -> None:
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "model-1.safetensors", "b": name}}), encoding="utf-8")
    with pytest.raises(UserError, match="expected file names in the same folder, got"):
        safetensors_files(tmp_path)


def test_weights_that_do_not_match_are_an_error_by_name(llava: tuple[Any, Any]) -> None:
    report = {
        "missing_keys": {*(f"layer.{number}" for number in range(6)), "pooler.dense.weight"},
        "mismatched_keys": [("head", (2, 3), (4, 3))],
    }
    with pytest.raises(UserError) as caught:
        check_weights_loaded("base", llava[0], report)
    assert str(caught.value) == (
        f"base: its weights do not match {type(llava[0]).__name__}: missing layer.0, layer.1, layer.2, layer.3 and 2 more; "
        "head: expected shape (4, 3), got (2, 3)"
    )
