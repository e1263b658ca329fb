"""Training data of a run: mixtures with a loss per source, streams, token budgets, dropped and resized media."""

from __future__ import annotations

import json
import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from mmtune.data.batching.collate import collate
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory
from mmtune.train import train
from mmtune.utils.errors import UserError


def metrics(recipe: Recipe) -> list[dict[str, Any]]:
    lines = RunDirectory(Path(recipe.output_dir)).metrics.read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture
def two(rows: Path, tmp_path: Path) -> tuple[Path, Path]:
    """The twelve rows as two files of seven and five."""
    rows_json = json.loads(rows.read_text())
    for name, part in (("one.jsonl", rows_json[:7]), ("two.jsonl", rows_json[7:])):
        (tmp_path / name).write_text("\n".join(map(json.dumps, part)))
    return tmp_path / "one.jsonl", tmp_path / "two.jsonl"


def mixed(two: tuple[Path, Path], rows: Path, *settings: str) -> str:
    more = list(settings) or ["", ""]
    parts = [f"{{path: {p}, template: llava, media_root: {rows.parent}{s}}}" for p, s in zip(two, more, strict=True)]
    return f"data.train=[{', '.join(parts)}]"


def test_each_sources_loss_is_that_of_plain_transformers(
    make_recipe: Callable[..., Recipe], base: Path, rows: Path, two: tuple[Path, Path]
) -> None:
    recipe = make_recipe(
        mixed(two, rows), "train.max_steps=1", "train.per_device_train_batch_size=4", "train.gradient_accumulation_steps=3"
    )
    train(recipe, ["test"])
    record = metrics(recipe)[0]
    model = AutoModelForImageTextToText.from_pretrained(str(base))
    processor = AutoProcessor.from_pretrained(str(base))
    encoded = [encode_sample(sample, processor) for sample in IndexedSamples(recipe.data.train)]
    for name, part in (("one.jsonl", encoded[:7]), ("two.jsonl", encoded[7:])):
        with torch.no_grad():
            loss = model(**collate(part, processor.tokenizer.pad_token_id)).loss
        assert record[f"loss/{name}"] == pytest.approx(float(loss), abs=1e-5)
    assert record["loss/one.jsonl"] != pytest.approx(record["loss/two.jsonl"], abs=1e-3)


def test_a_single_source_has_no_separate_loss(make_recipe: Callable[..., Recipe]) -> None:
    recipe = make_recipe("train.max_steps=1")
    train(recipe, ["test"])
    assert not [name for name in metrics(recipe)[0] if name.startswith("loss/")]


def test_weights_set_the_length_of_an_epoch(make_recipe: Callable[..., Recipe], rows: Path, two: tuple[Path, Path]) -> None:
    recipe = make_recipe(
        mixed(two, rows, ", weight: 2.0", ", weight: 0.4"),
        "train={num_train_epochs: 2, per_device_train_batch_size: 4, use_cpu: true}",
    )
    train(recipe, ["test"])
    assert metrics(recipe)[-1]["step"] == 8  # 14 + 2 rows an epoch


@pytest.mark.slow
def test_a_stream_trains_as_the_rows_by_index_do(make_recipe: Callable[..., Recipe], rows: Path, two: tuple[Path, Path]) -> None:
    source = f"data.train=[{{path: {two[0]}, template: llava, media_root: {rows.parent}}}]"
    in_order = make_recipe(source, "train.train_sampling_strategy=sequential", "train.per_device_train_batch_size=2")
    assert train(in_order, ["test"])["rows"] == 7
    expected = [record["loss"] for record in metrics(in_order)]
    streamed = make_recipe(
        source, "data.stream=true", "train.train_sampling_strategy=sequential", "train.per_device_train_batch_size=2"
    )
    assert train(streamed, ["test"], overwrite=True)["rows"] == 6  # those that three steps take
    assert [record["loss"] for record in metrics(streamed)] == expected
    shuffled = make_recipe(source, "data.stream=true", "train.per_device_train_batch_size=2", "train.dataloader_num_workers=2")
    train(shuffled, ["test"], overwrite=True)
    assert [record["loss"] for record in metrics(shuffled)] != expected


def test_grouping_by_length_trains_on_steps_of_similar_rows(
    make_recipe: Callable[..., Recipe], rows: Path, base: Path, tmp_path: Path
) -> None:
    """The loss of each step is plain transformers' on two rows whose lengths are equal or neighbours."""
    written = json.loads(rows.read_text())[:8]
    for number, row in enumerate(written):
        row["conversations"][1]["value"] = "seven " * (1 + 3 * number)
    path = tmp_path / "sizes.json"
    path.write_text(json.dumps(written))
    recipe = make_recipe(
        f"data.train=[{{path: {path}, media_root: {rows.parent}, template: llava, weight: 8}}]",
        "train.train_sampling_strategy=group_by_length",
        "train.per_device_train_batch_size=2",
        "train.learning_rate=1e-12",
        "tune.projector.learning_rate=1e-12",
    )
    assert recipe.data.plan
    train(recipe, ["test"])
    model, processor = AutoModelForImageTextToText.from_pretrained(str(base)), AutoProcessor.from_pretrained(str(base))
    encoded = [encode_sample(sample, processor) for sample in IndexedSamples(recipe.data.train)]
    pairs = [(one, two) for one in range(8) for two in (one, one + 1) if two < 8]
    with torch.no_grad():
        expected = [float(model(**collate([encoded[i] for i in pair], processor.tokenizer.pad_token_id)).loss) for pair in pairs]
    assert all(min(abs(record["loss"] - loss) for loss in expected) < 1e-5 for record in metrics(recipe))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (("data.packing=true", "data.max_tokens=400"), "which sort rows by length"),
        (("data.stream=true",), "row lengths are unknown before training"),
    ],
    ids=["packing", "stream"],
)
def test_grouping_by_length_where_it_cannot_be(
    make_recipe: Callable[..., Recipe], settings: tuple[str, ...], message: str
) -> None:
    with pytest.raises(UserError, match=f"train.train_sampling_strategy=group_by_length: not supported with .*{message}"):
        make_recipe("train.train_sampling_strategy=group_by_length", *settings)


@pytest.mark.parametrize("policy", ["drop_media", "shrink_media"])
def test_dropped_media_and_dropped_rows_are_reported(make_recipe: Callable[..., Recipe], base: Path, policy: str) -> None:
    recipe = make_recipe()
    processor = AutoProcessor.from_pretrained(str(base))
    encoded = [encode_sample(sample, processor) for sample in IndexedSamples(recipe.data.train)]
    lengths = [each["input_ids"].shape[1] for each in encoded]
    limit = sorted(lengths)[6]
    recipe = make_recipe(
        f"data.over_length={policy}", f"data.max_tokens={limit}", "train.num_train_epochs=1", "train.max_steps=3"
    )
    figures = train(recipe, ["test"])
    report = json.loads(RunDirectory(Path(recipe.output_dir)).data_report.read_text())
    longer = {f"rows.json[{index}]" for index, length in enumerate(lengths) if length > limit}
    changed = {fault["row"] for fault in report["media_changed"]}
    assert changed == (longer if policy == "drop_media" else set())  # this family's images take as many tokens at any size
    assert {fault["row"] for fault in report["dropped_over_length"]} == longer - changed
    assert figures["dropped_over_length"] == len(longer - changed)


@pytest.mark.slow
def test_a_run_without_one_row_that_fits_stops(make_recipe: Callable[..., Recipe]) -> None:
    too_short = ("data.over_length=drop_sample", "data.max_tokens=4")
    with pytest.raises(UserError, match="no row can train"):
        train(make_recipe(*too_short, "train.max_steps=9"), ["test"])
    with pytest.raises(
        UserError, match="every sampled row was dropped or quarantined; data: 12 rows, 0 quarantined, 8 dropped as too long"
    ):
        train(make_recipe(*too_short, "train.max_steps=2"), ["test"], overwrite=True)
    slow = ("train.max_steps=40", "train.per_device_train_batch_size=1")
    with pytest.raises(UserError, match="no usable training sample in the first 10 steps"):
        train(make_recipe(*too_short, *slow), ["test"], overwrite=True)


TOKENS = "train={max_steps: 3, learning_rate: 5e-3, gradient_accumulation_steps: 2, logging_steps: 1, use_cpu: true, seed: 0}"


@pytest.mark.slow
def test_packed_and_padded_batches_of_one_budget_train_alike(make_recipe: Callable[..., Recipe], base: Path) -> None:
    """One step of all rows is the same sum, however they are put into batches."""
    whole = make_recipe("train.max_steps=2", "train.per_device_train_batch_size=12")
    train(whole, ["test"])
    expected = [record[name] for record in metrics(whole) for name in ("loss", "grad_norm")]
    longest = max(
        encode_sample(sample, AutoProcessor.from_pretrained(str(base)))["input_ids"].shape[1]
        for sample in IndexedSamples(whole.data.train)
    )
    for settings in ("data.packing=true", "data.packing=false"):
        recipe = make_recipe(
            TOKENS, settings, f"data.max_tokens={longest}", f"data.tokens_per_batch={longest * 6}", "train.max_steps=2"
        )
        train(recipe, ["test"], overwrite=True)
        values = [record[name] for record in metrics(recipe) for name in ("loss", "grad_norm")]
        assert values == pytest.approx(expected, abs=1e-5, rel=1e-5)


def test_a_planned_run_knows_its_faulty_and_long_rows_before_weights_load(
    make_recipe: Callable[..., Recipe], rows: Path, tmp_path: Path
) -> None:
    row_list = json.loads(rows.read_text())
    row_list[3]["image"] = "gone.png"
    row_list[5]["conversations"][1]["value"] = "seven " * 400
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text(json.dumps(row_list))
    at = (f"data.train.0.path={spoilt}", f"data.train.0.media_root={rows.parent}", "data.plan=true", "data.check_rows=0")
    (tmp_path / "empty_base").mkdir()
    limits = ("data.max_tokens=300", "data.over_length=drop_sample")
    with pytest.raises(UserError, match=r"1 of 12 rows cannot train.*\n  spoilt\.json\[3\]: image: no such file"):
        train(make_recipe(*at, *limits), ["test"])
    with pytest.raises(UserError, match=r"1 rows are too long, the first: spoilt\.json\[5\]"):
        train(make_recipe(*at, "data.max_tokens=300", "data.max_bad_fraction=0.5"), ["test"])
    recipe = make_recipe(*at, *limits, "data.max_bad_fraction=0.1", "train.per_device_train_batch_size=10")
    figures = train(recipe, ["test"])
    assert (figures["quarantined"], figures["dropped_over_length"]) == (1, 1)
    assert metrics(recipe)[0]["epoch"] == 1  # ten rows are left, and make one batch


def test_persistent_workers_end_with_the_training(make_recipe: Callable[..., Recipe]) -> None:
    """At the interpreter's exit, multiprocessing would wait for them: they ignore its signal."""
    train(make_recipe("train.dataloader_num_workers=1", "train.dataloader_persistent_workers=true"), ["test"])
    assert multiprocessing.active_children() == []


@pytest.mark.slow
def test_worker_processes_change_no_metric(make_recipe: Callable[..., Recipe]) -> None:
    """The same batches in the same order: losses, gradient norms and tokens are equal bit for bit."""
    results = []
    workers = ("num_workers=2", "prefetch_factor=3", "persistent_workers=true", "pin_memory=true")
    for settings in ((), tuple(f"train.dataloader_{setting}" for setting in workers)):
        recipe = make_recipe("train.max_steps=5", "train.per_device_train_batch_size=3", *settings)  # two epochs
        train(recipe, ["test"], overwrite=True)
        results.append([[record[name] for name in ("loss", "grad_norm", "tokens")] for record in metrics(recipe)])
    assert len(results[0]) == 5 and results[0] == results[1]
