"""Release formats: several adapters, half precision, shards, quantized, an adapter next to its base; upload."""

from __future__ import annotations

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import C3AConfig, PeftModel, get_peft_model
from programs import run_program
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from mmtune.cli.main import entry_point
from mmtune.models.load import load_trained
from mmtune.models.quantize import prepare_quantized, quantization_config
from mmtune.recipe.recipe import Recipe
from mmtune.release import push as push_module
from mmtune.release.merge import ExportOptions, _check_merge, combine_adapters, merge, parity_samples, release_adapter
from mmtune.release.parity import answer_logits, collect_outputs, compare
from mmtune.release.push import push
from mmtune.train import train
from mmtune.utils.errors import CheckFailed, UserError
from mmtune.utils.manifest import check_manifest, write_manifest

Make = Callable[..., Recipe]

pytestmark = pytest.mark.slow


def trained(make_recipe: Make, path: Path, *overrides: str) -> Path:
    train(make_recipe(f"output_dir={path}", "train.max_steps=4", "train.disable_tqdm=true", *overrides), ["test"])
    return path


def test_combined_adapters_equal_pefts_weighted_adapter(make_recipe: Make, base: Path, tmp_path: Path) -> None:
    runs = [trained(make_recipe, tmp_path / name, f"train.seed={n}", "tune.projector=frozen") for n, name in enumerate("ab")]
    combine_adapters([(runs[0], 0.7), (runs[1], 0.3)], tmp_path / "out", count=3)
    peft = PeftModel.from_pretrained(AutoModelForImageTextToText.from_pretrained(str(base)), str(runs[0] / "adapter"), "a")
    peft.load_adapter(str(runs[1] / "adapter"), "b")
    peft.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type="cat")
    peft.set_adapter("sum")
    processor = AutoProcessor.from_pretrained(str(base))
    samples = parity_samples(make_recipe(), 3)
    ours = AutoModelForImageTextToText.from_pretrained(str(tmp_path / "out"))
    assert compare(answer_logits(peft, processor, samples), answer_logits(ours, processor, samples)).largest < 1e-5
    assert "0.7 x" in (tmp_path / "out" / "README.md").read_text()


def test_combining_one_adapter_of_weight_one_equals_the_merge(make_recipe: Make, tmp_path: Path) -> None:
    run = trained(make_recipe, tmp_path / "run")
    merge(run, tmp_path / "merged", count=2)
    combine_adapters([(run, 1.0)], tmp_path / "sum", count=2)
    merged, combined = (load_file(tmp_path / name / "model.safetensors") for name in ("merged", "sum"))
    assert merged.keys() == combined.keys()
    for name in merged:
        torch.testing.assert_close(combined[name], merged[name], atol=1e-6, rtol=0)


def test_adapters_that_cannot_be_combined(
    make_recipe: Make, base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = trained(make_recipe, tmp_path / "run")
    other = trained(make_recipe, tmp_path / "other", "model.base=builtin:tiny-llava")
    with pytest.raises(UserError, match="expected adapters with the same base, got different bases"):
        combine_adapters([(run, 1.0), (other, 1.0)], tmp_path / "out", count=2)
    with pytest.raises(UserError, match="expected a finite weight, got nan"):
        combine_adapters([(run, float("nan"))], tmp_path / "out", count=2)
    with pytest.raises(CheckFailed, match="the adapters change nothing, or their changes cancel out"):
        combine_adapters([(run, 1.0), (run, -1.0)], tmp_path / "out", count=2)
    assert entry_point(["merge", str(tmp_path / "out"), "--adapter", f"{run}:half"]) == 2
    assert "expected RUN:WEIGHT" in capsys.readouterr().err
    assert entry_point(["merge", str(run), str(tmp_path / "out"), "--adapter", f"{run}:1"]) == 2
    assert "expected RUN and OUT, or OUT and an --adapter" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapter_of_another_base_is_an_error(make_recipe: Make, tmp_path: Path) -> None:
    from mmtune.models.tiny.tiny_bases import BASES, write_tiny_base

    run = trained(make_recipe, tmp_path / "run")
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(write_tiny_base(BASES["llava"], tmp_path / "other_base"))
    (run / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"cannot load the adapter|its tensors do not match its base"):
        merge(run, tmp_path / "out", count=2)
    assert not (tmp_path / "out").exists()


def test_half_precision_in_shards_with_a_manifest(make_recipe: Make, tmp_path: Path) -> None:
    run = trained(make_recipe, tmp_path / "run")
    out = tmp_path / "out"
    assert merge(run, out, options=ExportOptions("bf16", "1MB"), count=2).merge_dtype == "bf16"
    shards = sorted(out.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert {t.dtype for shard in shards for t in load_file(shard).values()} == {torch.bfloat16}
    AutoModelForImageTextToText.from_pretrained(str(out))
    listed = json.loads((out / "manifest.json").read_text())["files"]
    assert set(listed) == {file.name for file in out.iterdir()} - {"manifest.json"}
    for name, entry in listed.items():
        content = (out / name).read_bytes()
        assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantized_release_of_a_run_on_a_quantized_base(make_recipe: Make, tmp_path: Path, kind: str) -> None:
    run = trained(make_recipe, tmp_path / "run", f"model.precision={kind}")
    parity = merge(run, tmp_path / "out", options=ExportOptions(quantize=kind), count=2)
    assert parity.merge_dtype == "bf16"
    assert parity.trained is not None
    assert 0 < parity.trained["max_logit_difference"] < 1
    assert parity.quantized is not None
    assert 0 < parity.quantized["mean_logit_difference"] < 1
    plain = AutoModelForImageTextToText.from_pretrained(str(tmp_path / f"out-{kind}"))
    assert plain.is_quantized
    layer = plain.model.language_model.layers[0].mlp.up_proj
    assert type(layer).__name__ == {"nf4": "Linear4bit", "int8": "Linear8bitLt"}[kind]
    assert type(plain.model.multi_modal_projector.linear_1) is torch.nn.Linear
    card = (tmp_path / f"out-{kind}" / "README.md").read_text()
    assert "The quantized release compared with this release: largest logit difference" in card
    assert "This release compared with the adapter on its quantized base, as trained: largest" in card


def test_a_quantized_release_does_not_replace_the_base(make_recipe: Make, base: Path, tmp_path: Path) -> None:
    shutil.copytree(base, tmp_path / "out-nf4")
    run = trained(make_recipe, tmp_path / "run", f"model.base={tmp_path / 'out-nf4'}")
    with pytest.raises(UserError, match="out-nf4, which is still needed"):
        merge(run, tmp_path / "out", options=ExportOptions(quantize="nf4"), overwrite=True, count=2)
    with pytest.raises(UserError, match="--max-shard-size abc: expected a size such as 5GB"):
        merge(run, tmp_path / "out", options=ExportOptions(max_shard_size="abc"), count=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out-nf4", "recipe.yaml", "run"]


@pytest.mark.parametrize("method", ["bottleneck", "prompt_tuning"])
def test_an_adapter_that_cannot_be_merged_is_released_next_to_its_base(
    make_recipe: Make, rows: Path, tmp_path: Path, method: str, capsys: pytest.CaptureFixture[str]
) -> None:
    base = Path(shutil.copytree(str(make_recipe().model.base), tmp_path / "base"))
    run = trained(make_recipe, tmp_path / "run", f"model.base={base}", f"tune.language={{method: {method}}}")
    assert entry_point(["merge", str(run), str(tmp_path / "out")]) == 2
    assert f"a {method} adapter cannot be merged into the base's weights; release it next to" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
    comparison = release_adapter(run, tmp_path / "out", count=2)
    assert comparison["same_answers"] == comparison["samples"] == 2
    card = (tmp_path / "out" / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", card, flags=re.DOTALL)
    assert ("import mmtune.methods.tuners" in code) == (method == "bottleneck")
    script = code + "\nprint(type(model).__name__, type(processor).__name__, model.peft_config['default'].peft_type)\n"
    moved = (tmp_path / "out").rename(tmp_path / "elsewhere")
    base.rename(base.with_name("gone"))  # the release must load without the original base
    try:
        output = run_program(script, cwd=moved)
    finally:
        base.with_name("gone").rename(base)
    assert "PeftModel" in output
    model, processor = load_trained(moved / "adapter")
    expected, _ = load_trained(run)
    samples = parity_samples(make_recipe(), 2)
    assert compare(answer_logits(model, processor, samples), answer_logits(expected, processor, samples)).largest == 0
    assert str(tmp_path) not in (moved / "adapter" / "adapter_config.json").read_text()
    with pytest.raises(UserError, match="needed"):
        release_adapter(run, run, overwrite=True)


def test_a_full_disk_leaves_the_existing_release(make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trained(make_recipe, tmp_path / "run")
    merge(run, tmp_path / "out", count=2)
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    save_pretrained = PreTrainedModel.save_pretrained

    def save_on_a_full_disk(self: PreTrainedModel, folder: Path, **kwargs: Any) -> None:
        save_pretrained(self, folder, **kwargs)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(PreTrainedModel, "save_pretrained", save_on_a_full_disk)
    with pytest.raises(UserError, match="No space left on device; nothing was changed"):
        merge(run, tmp_path / "out", overwrite=True, count=2)
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_a_wrong_merge_by_peft_is_detected(base: Path, make_recipe: Make) -> None:
    """PEFT merges C3A into an int8 base without an error, but the merged weights are wrong."""
    config = quantization_config(AutoConfig.from_pretrained(str(base)), "int8")
    model = AutoModelForImageTextToText.from_pretrained(str(base), quantization_config=config, device_map={"": "cpu"})
    prepare_quantized(model)
    tuned = get_peft_model(
        model, C3AConfig(block_size=32, target_modules=r".*language_model.*\.(q|v)_proj", task_type="CAUSAL_LM")
    )
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "c3a" in name:
                parameter.normal_(std=0.02)
    processor = AutoProcessor.from_pretrained(str(base))
    samples = parity_samples(make_recipe(), 2)
    adapter = collect_outputs(tuned, processor, samples, 4)
    with tuned.disable_adapter():
        base_logits = answer_logits(tuned, processor, samples)
    merged = collect_outputs(tuned.merge_and_unload(), processor, samples, 4)
    with pytest.raises(CheckFailed, match="differs from the adapter"):
        _check_merge(adapter, base_logits, merged)


def test_an_edited_model_card_is_pushed_but_no_other_changed_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    card, weights = tmp_path / "README.md", tmp_path / "model.safetensors"
    card.write_text("---\nlicense: mit\n---\n\n# A model\n")
    weights.write_text("weights")
    write_manifest(tmp_path, step=3)
    uploaded: list[dict[str, int]] = []

    class Api:
        def create_repo(self, name: str, **kwargs: Any) -> None:
            pass

        def upload_folder(self, **kwargs: Any) -> SimpleNamespace:
            uploaded.append(check_manifest(tmp_path))  # the files match the manifest at the upload
            return SimpleNamespace(commit_url="https://example.org/commit")

    monkeypatch.setattr(push_module, "HfApi", Api)
    for text, message in {
        "# no front matter": "README.md:1: expected YAML front matter",
        "---\nlicense: [mit\ntags: x\n---\n": r"README.md:\d: the front matter is not valid YAML",
        "---\n- a list\n---\n": "front matter: expected `key: value` lines, got a list",
    }.items():
        card.write_text(text)
        with pytest.raises(UserError, match=message):
            push(tmp_path, "me/model", upload=True)
    card.write_text("---\nlicense: apache-2.0\n---\n\n# A model, and what it is for\n")
    push(tmp_path, "me/model")
    assert uploaded == []
    push(tmp_path, "me/model", upload=True)
    assert len(uploaded) == 1
    assert "its entry in manifest.json is updated" in capsys.readouterr().out
    weights.write_text("other weights")
    with pytest.raises(CheckFailed, match=r"changed: model.safetensors"):
        push(tmp_path, "me/model", upload=True)


def test_push_is_a_dry_run_by_default_and_checks_the_manifest(
    make_recipe: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    merge(trained(make_recipe, tmp_path / "run"), out, count=2)
    calls: list[tuple[str, dict[str, Any]]] = []

    class Api:
        def create_repo(self, name: str, **kwargs: Any) -> None:
            calls.append((name, kwargs))

        def upload_folder(self, **kwargs: Any) -> SimpleNamespace:
            calls.append(("upload", kwargs))
            return SimpleNamespace(commit_url="https://example.org/commit")

    monkeypatch.setattr(push_module, "HfApi", Api)
    assert entry_point(["push", str(out), "me/model"]) == 0
    assert "dry run: nothing was uploaded" in capsys.readouterr().out
    assert calls == []
    result = push(out, "me/model", upload=True)
    assert result["uploaded"]
    assert [name for name, _ in calls] == ["me/model", "upload"]
    assert calls[0][1]["private"] is True
    with pytest.raises(UserError, match="expected a complete output of mmtune"):
        push(tmp_path / "run", "me/model")
    weights = load_file(out / "model.safetensors")
    save_file({name: tensor * 1.001 for name, tensor in weights.items()}, out / "model.safetensors", metadata={"format": "pt"})
    (out / "stray.txt").write_text("x")
    with pytest.raises(CheckFailed, match=r"not in the manifest: stray.txt; changed: model.safetensors"):
        push(out, "me/model", upload=True)
    assert len(calls) == 2
