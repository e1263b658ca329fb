"""The feature cache: training from stored features equals training that runs the vision tower, and nothing stale is read."""

from __future__ import annotations

import errno
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from family_cases import CASES
from launched import launch
from PIL import Image
from safetensors.torch import load_file
from transformers import TrainingArguments

from mmtune.cli.main import entry_point
from mmtune.data.dataset import IndexedSamples, SampleEncoder
from mmtune.data.encoding import feature_store
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.models.load import ResolvedBase, load_base, resolve_model
from mmtune.models.tiny.tiny_bases import write_tiny_base
from mmtune.objectives.sft import SupervisedTuning
from mmtune.recipe.objective_section import SftSection
from mmtune.recipe.recipe import Recipe, load_recipe
from mmtune.training.cached_features.feature_cache import FeatureCache, open_feature_cache
from mmtune.tuning.apply import tune_model
from mmtune.tuning.strategy_support import check_method
from mmtune.utils.errors import UserError

SIZES = [(90, 70), (40, 120), (64, 64), (200, 60)]
TOLERANCE = 1e-6
"""Of losses and gradients in fp32: a tower alone with the images of one sample rounds otherwise than with those of a batch."""
FROZEN_PROJECTOR = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl")
"""Families whose projector is a part of the vision tower."""
SLOW = [pytest.param(family, marks=pytest.mark.slow) for family in ("idefics3", "qwen3_vl", "llava_onevision")]
FAMILIES = ["llava", "llava_next", "internvl", "qwen2_5_vl", *SLOW]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Rows with one image, two and none."""
    random = np.random.default_rng(0)
    for number, (width, height) in enumerate(SIZES):
        Image.fromarray(random.integers(0, 256, size=(height, width, 3), dtype=np.uint8)).save(tmp_path / f"{number}.png")
    conversations = [
        (["0.png"], "<image>What is it?", "a red cat"),
        ([], "Is it text?", "yes, it is"),
        (["1.png", "2.png"], "<image><image>Which?", "the first one"),
        (["3.png"], "<image>Where is the bird?", "on the mat"),
    ]
    content = [
        {"images": images, "messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]}
        for images, question, answer in conversations
    ]
    (tmp_path / "rows.json").write_text(json.dumps(content), encoding="utf-8")
    return tmp_path / "rows.json"


class Tuned:
    """A tiny model of a family with LoRA and, where it is a part of its own, a trained projector."""

    def __init__(self, pictures: Path, family: str, *overrides: str) -> None:
        base = pictures.parent / family
        if not base.exists():
            write_tiny_base(CASES[family].base, base)
        projector = "frozen" if family in FROZEN_PROJECTOR else "full"
        path = pictures.parent / "recipe.yaml"
        template = CASES[family].base.required_template
        path.write_text(
            f"""
            model: {{base: {base}{f", chat_template: {template}" if template else ""}}}
            tune: {{language: {{method: lora, r: 4}}, projector: {projector}}}
            data: {{train: [{{path: {pictures}, template: messages}}], cache_features: {pictures.parent / "features"}}}
            output_dir: {pictures.parent / "run"}
            """,
            encoding="utf-8",
        )
        self.recipe = load_recipe(path, overrides)
        model, self.processor = load_base(resolve_model(self.recipe.model), 0)
        torch.manual_seed(0)
        self.model = tune_model(model, self.recipe.tune, 1e-3).model.train()
        with torch.no_grad():  # LoRA's B starts at zero and would leave A without a gradient
            for name, parameter in self.model.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.1)
        self.objective = SupervisedTuning(SftSection())
        self.encoder = SampleEncoder(self.processor, self.recipe.data)
        self.samples = IndexedSamples(self.recipe.data.train)

    def open(self) -> FeatureCache:
        arguments = TrainingArguments(output_dir=self.recipe.output_dir, use_cpu=True, report_to="none")
        inputs: Any = SimpleNamespace(recipe=self.recipe, arguments=arguments, dist=SINGLE_PROCESS, objective=self.objective)
        cache = open_feature_cache(inputs, self.model, self.processor)
        assert cache is not None
        self.encoder.features = cache.store
        return cache

    def batch(self, numbers: range = range(4)) -> dict[str, Any]:
        rows: Any = [self.encoder(lambda number=number: self.samples[number]) for number in numbers]
        assert not [row for row in rows if isinstance(row, UserError)]
        batch = self.objective.collator(self.processor, self.recipe.data.packing)(rows)
        return {name: value for name, value in batch.items() if name not in ("rows", "sizes", "faults")}

    def step(self, batch: dict[str, Any], cache: FeatureCache | None = None) -> dict[str, torch.Tensor]:
        """The loss and the gradients of a batch."""
        self.model.zero_grad()
        features = batch.pop("vision_features", [])
        inputs = self.objective.model_inputs(self.model, batch)
        if cache is None:
            loss = self.objective.compute_loss(self.model, inputs, 20).loss
        else:
            with cache.features_of(features):
                loss = self.objective.compute_loss(self.model, inputs, 20).loss
        loss.backward()
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        assert any("lora" in name for name in gradients)
        return {"loss": loss.detach(), **gradients}


def assert_close(actual: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(
            actual[name], expected[name], atol=TOLERANCE, rtol=1e-5, msg=lambda t, name=name: f"{name}: {t}"
        )


def stored(cache: FeatureCache) -> list[Path]:
    return sorted(cache.store.folder.rglob("*.safetensors"))


def forbidden(*_: Any, **__: Any) -> Any:
    raise AssertionError("must not run")


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_and_gradients_equal_those_of_the_tower(family: str, pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = Tuned(pictures, family)
    expected = tuned.step(tuned.batch())
    cache = tuned.open()
    tuned.step(tuned.batch(range(2)), cache)
    assert len(stored(cache)) == 1
    assert_close(tuned.step(tuned.batch(), cache), expected)  # one row from the store, two computed
    assert len(stored(cache)) == 3
    monkeypatch.setattr("mmtune.data.encoding.encode.open_images", forbidden)
    for tower in cache._towers.modules:
        monkeypatch.setattr(tower, "forward", forbidden)
    assert_close(tuned.step(tuned.batch(), cache), expected)


def test_packed_rows_and_half_precision(pictures: Path) -> None:
    tuned = Tuned(
        pictures, "smolvlm", "data.packing=true", "data.tokens_per_batch=4000", "data.max_tokens=4000", "model.precision=bf16"
    )
    tuned.model.eval()
    with torch.autocast("cpu", torch.bfloat16):
        expected = tuned.step(tuned.batch())
        cache = tuned.open()
        for _ in range(2):
            actual = tuned.step(tuned.batch(), cache)
            torch.testing.assert_close(actual["loss"], expected["loss"], rtol=1e-2, atol=0)
    assert {tensor.dtype for tensor in load_file(stored(cache)[0]).values() if tensor.is_floating_point()} == {torch.bfloat16}


def test_a_changed_image_processor_or_tower_is_another_entry(pictures: Path) -> None:
    tuned = Tuned(pictures, "llava")
    cache = tuned.open()
    tuned.step(tuned.batch(), cache)
    assert all("features" in entry for entry in tuned.batch()["vision_features"])
    Image.new("RGB", (90, 70), "red").save(pictures.parent / "0.png")
    assert ["features" in entry for entry in tuned.batch()["vision_features"]] == [False, True, True]
    changed = Tuned(pictures, "llava")
    changed.processor.image_processor.image_mean = [0.1, 0.2, 0.3]
    assert changed.open().store.folder == cache.store.folder
    assert not any("features" in entry for entry in changed.batch()["vision_features"])
    with torch.no_grad():
        next(changed.model.get_base_model().model.vision_tower.parameters()).view(-1)[0] += 1e-3
    assert changed.open().store.folder != cache.store.folder
    assert Tuned(pictures, "llava", "model.precision=bf16").open().store.folder != cache.store.folder


def test_a_damaged_file_is_written_again(pictures: Path) -> None:
    tuned = Tuned(pictures, "llava")
    cache = tuned.open()
    expected = tuned.step(tuned.batch(), cache)
    first, second, _ = stored(cache)
    first.write_bytes(first.read_bytes()[:100])
    second.write_bytes(b"")
    assert_close(tuned.step(tuned.batch(), cache), expected)
    assert all("features" in entry for entry in tuned.batch()["vision_features"])


def test_a_full_disk_is_a_warning(pictures: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    tuned = Tuned(pictures, "llava")
    expected = tuned.step(tuned.batch())
    cache = tuned.open()
    writes = []

    def full(path: Path, data: bytes) -> None:
        writes.append(path)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(feature_store, "replace_bytes", full)
    capsys.readouterr()
    assert_close(tuned.step(tuned.batch(), cache), expected)
    assert_close(tuned.step(tuned.batch(), cache), expected)
    assert len(writes) == 1
    assert capsys.readouterr().out.count("No space left on device; training continues") == 1


@pytest.mark.parametrize(
    ("family", "overrides", "message"),
    [
        ("qwen2_5_vl", ["tune.projector=full"], "set tune.projector: frozen"),
        ("gemma4_unified", [], "has no vision tower"),
        ("mllama", [], "do not join those of its samples"),
    ],
)
def test_towers_that_cannot_be_cached(family: str, overrides: list[str], message: str, pictures: Path) -> None:
    with pytest.raises(UserError, match=message):
        Tuned(pictures, family, *overrides).open()


def test_a_tower_with_dropout_is_an_error(pictures: Path) -> None:
    tuned = Tuned(pictures, "llava")
    for module in tuned.model.get_base_model().model.vision_tower.modules():
        if hasattr(module, "dropout"):
            module.dropout = 0.5
    with pytest.raises(UserError, match=r"data\.cache_features: the features of an image in training mode.* differ"):
        tuned.open()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("tune.vision=lora", r"data\.cache_features=x: needs a frozen vision tower, got tune\.vision: lora"),
        ("data.train.0.augment={flip: 0.5}", r"augment=\{flip: 0\.5\}: random changes are not supported"),
        ("objective={type: distillation, teacher: x}", r"data\.cache_features=x: not supported with objective\.teacher"),
        ("train.torch_compile=true", r"data\.cache_features=x: not supported with train\.torch_compile"),
    ],
)
def test_combinations_that_a_recipe_excludes(override: str, message: str, make_recipe: Callable[..., Recipe]) -> None:
    assert make_recipe("data.cache_features=x", "data.train.0.augment={resize: 64}").data.cache_features == "x"
    with pytest.raises(UserError, match=message):
        make_recipe("data.cache_features=x", override)


@pytest.mark.parametrize("change", [{"zero_stage": 3}, {"fsdp": True}])
def test_sharded_towers_are_an_error(change: dict[str, Any], make_recipe: Callable[..., Recipe]) -> None:
    recipe, base = make_recipe("data.cache_features=x"), cast(ResolvedBase, SimpleNamespace(config=None, model_type="llava"))
    with pytest.raises(UserError, match=r"data\.cache_features: (ZeRO-3|FSDP2) gathers"):
        check_method(recipe, base, TrainingArguments(use_cpu=True), replace(SINGLE_PROCESS, **change), None)


def losses(run: Path) -> list[dict[str, float]]:
    lines = map(json.loads, (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return [{name: line[name] for name in ("loss", "eval_loss", "grad_norm") if name in line} for line in lines]


def write_run(folder: Path, name: str, recipe: Recipe, **data: str) -> Path:
    """A recipe file that differs in its run directory and in keys of `data`."""
    values = recipe.model_dump(mode="json", exclude_none=True)
    values["output_dir"] = str(folder / name)
    values["data"] |= data
    path = folder / f"{name}.yaml"
    path.write_text(json.dumps(values), encoding="utf-8")
    return path


def assert_same_losses(actual: Path, expected: Path) -> None:
    assert len(losses(actual)) == len(losses(expected)) > 3
    for line, reference in zip(losses(actual), losses(expected), strict=True):
        assert line == pytest.approx(reference, abs=1e-5)


@pytest.mark.slow
def test_a_run_with_data_loader_workers_and_held_out_rows(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The first epoch stores, the second reads; the plan predicts the size on disk."""
    recipe = make_recipe(
        "train.max_steps=-1",
        "train.num_train_epochs=2",
        "train.dataloader_num_workers=1",
        "train.eval_strategy=epoch",
        "data.train.0.held_out=0.25",
        "evaluate={before: false, max_new_tokens: 1}",
    )
    features = str(tmp_path / "features")
    plain = write_run(tmp_path, "plain", recipe)
    cached = write_run(tmp_path, "cached", recipe, cache_features=features)
    assert entry_point(["plan", str(cached)]) == 0
    printed = capsys.readouterr().out
    for path in (plain, cached):
        assert entry_point(["train", str(path)]) == 0, capsys.readouterr()
    assert_same_losses(tmp_path / "cached", tmp_path / "plain")
    files = list(Path(features).rglob("*.safetensors"))
    size = load_file(files[0])["features.0"].nbytes
    assert f"feature cache: at most about {9 * size / 1e6:.1f} MB in {features}, for the images of 9 rows" in printed


@pytest.mark.slow
def test_processes_share_a_cache(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = make_recipe("train.max_steps=4", "train.per_device_train_batch_size=2")  # an epoch has three steps
    plain = write_run(tmp_path, "plain", recipe)
    cached = write_run(tmp_path, "cached", recipe, cache_features=str(tmp_path / "features"))
    assert launch([(path, "ddp") for path in (plain, cached)], tmp_path) == [True, True]
    assert_same_losses(tmp_path / "cached", tmp_path / "plain")
