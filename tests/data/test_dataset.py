"""The data set of a run: rows of several sources, faults counted once, and batches without the faulty rows."""

from __future__ import annotations

import json
import pickle
import re
import resource
from pathlib import Path
from typing import Any

import pytest
import torch

from mmtune.data.batching.collate import Collator
from mmtune.data.data_report import DataReport, RowIssue, StopRunError
from mmtune.data.dataset import IndexedSamples, SampleEncoder, TrainingSet, check_rows, iterate_rows
from mmtune.data.encoding.encode import OverLength
from mmtune.data.message import RowError, text_of
from mmtune.data.processes import worker_failure
from mmtune.recipe.recipe import DataSection, Source
from mmtune.utils.errors import UserError


def _rows(folder: Path, count: int, name: str = "r.jsonl", bad: tuple[int, ...] = (), image: str | None = None) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for number in range(count):
        turns = [{"from": "human", "value": f"{folder.name} {number}"}, {"from": "gpt", "value": "" if number in bad else "yes"}]
        if image:
            turns[0]["value"] += "<image>"
        rows.append({"conversations": turns, **({"image": image} if image else {})})
    lines = list(map(json.dumps, rows))
    (folder / name).write_text("\n".join(lines) if name.endswith("l") else f"[{','.join(lines)}]", encoding="utf-8")
    return folder / name


def _source(path: Path, **settings: Any) -> Source:
    return Source(path=str(path), template="llava", **settings)


def _section(**settings: Any) -> DataSection:
    return DataSection(train=(_source(Path("r.jsonl")),), **settings)


def test_samples_run_through_the_sources_in_order(tmp_path: Path) -> None:
    sources = [
        _source(_rows(tmp_path / "one", 5, "a.jsonl"), limit=3),
        _source(_rows(tmp_path / "two", 1, "b.json")),
        _source(_rows(tmp_path / "three", 4, "c.json"), limit=9),
    ]
    samples = IndexedSamples(sources)
    ids = ["a.jsonl:1", "a.jsonl:2", "a.jsonl:3", "b.json[0]", "c.json[0]", "c.json[1]", "c.json[2]", "c.json[3]"]
    asked = ["one 0", "one 1", "one 2", "two 0", "three 0", "three 1", "three 2", "three 3"]
    assert len(samples) == 8
    assert [sample.id for sample in iterate_rows(samples)] == [sample.id for sample in samples] == ids
    assert [text_of(samples[index].messages[0]) for index in range(8)] == asked
    assert [samples[-index].id for index in range(1, 9)] == ids[::-1]
    for index in (8, -9):
        with pytest.raises(IndexError):
            samples[index]


def test_files_of_one_name_keep_their_ids_apart(tmp_path: Path) -> None:
    paths = [_rows(tmp_path / "one", 2, bad=(1,)), _rows(tmp_path / "two", 2, bad=(1,)), _rows(tmp_path / "two", 1, "x.json")]
    samples = IndexedSamples([_source(path) for path in paths])
    report = DataReport(rows=5)
    check_rows(samples, report, limit=5)
    assert [fault.row for fault in report.quarantined] == [f"{paths[0]}:2", f"{paths[1]}:2"]
    assert samples[4].id == "x.json[0]"
    assert samples.names == [str(paths[0]), str(paths[1]), "x.json"]
    assert IndexedSamples([_source(paths[0])] * 2).names == ["r.jsonl", "r.jsonl (2)"]


def test_media_paths_are_relative_to_the_rows_or_to_media_root(tmp_path: Path, media: Path) -> None:
    (tmp_path / "rows").mkdir()
    (tmp_path / "rows" / "a.png").write_bytes((media / "b.png").read_bytes())
    rows = _rows(tmp_path / "rows", 1, image="a.png")
    assert IndexedSamples([_source(rows)])[0].images == [tmp_path / "rows" / "a.png"]
    assert IndexedSamples([_source(rows, media_root=str(media))])[0].images == [media / "a.png"]


# --------------------------------------------------------------------------------------------------------------- faults


def test_a_row_counts_once_over_epochs() -> None:
    report = DataReport(rows=10)
    for _epoch in range(3):
        report.add(RowError("r:1", "image", "gone"))
        report.add(OverLength("r:2", "messages", "9 tokens"))
        report.add(RowError("r:3", "image", "gone"))
    report.add(RowError("r:1", "messages", "another fault of the same row"))
    assert report.quarantined == [RowIssue("r:1", "image", "gone"), RowIssue("r:3", "image", "gone")]
    assert report.dropped_over_length == [RowIssue("r:2", "messages", "9 tokens")]


def test_faults_are_listed_by_kind_with_their_number() -> None:
    report = DataReport(rows=20)
    for number in range(12):
        report.add(RowError(f"r:{number}", "image", f"no such file: {number}.png", "media_missing"))
    report.add(RowError("r:12", "messages[1]", "the answer is empty", "answer_empty"))
    with pytest.raises(UserError) as error:
        report.stop_past(0.1)
    assert str(error.value).splitlines()[1:] == [
        "  r:0: image: no such file: 0.png",
        "    and 11 more (media_missing): r:1, r:2, ...; add the file, or correct the path or media_root",
        "  r:12: messages[1]: the answer is empty",
    ]


def test_a_run_without_usable_rows_stops_at_any_limit() -> None:
    report = DataReport(rows=2)
    report.add(RowError("r:1", "image", "gone"))
    report.stop_past(1.0)
    report.add(OverLength("r:2", "messages", "long"))
    with pytest.raises(UserError, match="no row can train"):
        report.stop_past(1.0)


def test_the_report_is_json(tmp_path: Path) -> None:
    report = DataReport(rows=10, checked=4)
    report.add(RowError("r:1", "image", "kein Bild: é\udce9.png"))  # a file name that is not UTF-8
    report.write(tmp_path / "report.json")
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8")) == {
        "rows": 10,
        "checked": 4,
        "streamed": False,
        "held_out": {},
        "dropped_over_length": [],
        "media_changed": [],
        "skipped_steps": [],
        "quarantined": [{"row": "r:1", "field": "image", "detail": "kein Bild: é\udce9.png", "issue": "row_unusable"}],
    }


@pytest.mark.parametrize(
    ("bad", "rows", "bound", "stops"),
    [(0, 10, 0.0, False), (1, 10, 0.0, True), (1, 10, 0.1, False), (2, 10, 0.1, True), (8, 10, 1.0, False), (1, 11, 0.1, False)],
)
def test_the_run_stops_past_the_bound_and_not_at_it(bad: int, rows: int, bound: float, stops: bool) -> None:
    report = DataReport(rows=rows)
    for number in range(bad):
        report.add(RowError(f"r:{number}", "image", "gone"))
    report.add(OverLength("r:99", "messages", "long"))  # the recipe asked for these to be dropped
    if not stops:
        report.stop_past(bound)
        return
    with pytest.raises(
        UserError, match=rf"{bad} of {rows} rows cannot train, .*max_bad_fraction: {bound:g}.*\n  r:0: image: gone"
    ):
        report.stop_past(bound)


@pytest.mark.parametrize(("limit", "seen"), [(0, []), (1, [0]), (3, [0, 3, 6]), (10, list(range(10))), (99, list(range(10)))])
def test_checked_rows_are_spread(tmp_path: Path, limit: int, seen: list[int]) -> None:
    samples = IndexedSamples([_source(_rows(tmp_path, 10, bad=tuple(range(10))))])
    report = DataReport(rows=10)
    check_rows(samples, report, limit)
    assert report.checked == len(seen)
    assert [fault.row for fault in report.quarantined] == [f"r.jsonl:{number + 1}" for number in seen]


def test_checking_reads_headers_and_decodes_nothing(tmp_path: Path, media: Path) -> None:
    (media / "cut.png").write_bytes((media / "a.png").read_bytes()[:60])
    (media / "text.png").write_text("not an image")
    for name, faults in (("a.png", 0), ("cut.png", 2), ("text.png", 2), ("none.png", 2)):
        report = DataReport(rows=2)
        samples = IndexedSamples([_source(_rows(tmp_path / "rows", 2, image=name), media_root=str(media))])
        check_rows(samples, report, limit=2)
        assert len(report.quarantined) == faults
        assert all(fault.field == "image" and name in fault.detail for fault in report.quarantined)


# ---------------------------------------------------------------------------------------------------------- training set


def test_long_samples_stop_the_run_or_are_dropped(tmp_path: Path, untrained: tuple[Any, Any]) -> None:
    samples = IndexedSamples([_source(_rows(tmp_path, 1))])
    dropped = TrainingSet(samples, SampleEncoder(untrained[1], _section(max_tokens=4, over_length="drop_sample")))[0]
    report = DataReport(rows=1)
    assert isinstance(dropped, OverLength)
    report.add(dropped)
    assert [fault.row for fault in report.dropped_over_length] == ["r.jsonl:1"] and not report.quarantined
    stops = TrainingSet(samples, SampleEncoder(untrained[1], _section(max_tokens=4)))[0]
    with pytest.raises(UserError, match=r"r\.jsonl:1: messages: \d+ tokens, more than data.max_tokens: 4 .*drop_sample"):
        report.add(stops)  # whatever max_bad_fraction allows


@pytest.mark.parametrize("kind", [RowError, OverLength, StopRunError])
def test_errors_travel_between_processes(kind: type[RowError]) -> None:
    back = pickle.loads(pickle.dumps(kind("r:1", "image", "gone")))  # noqa: S301
    assert type(back) is kind
    assert (back.row, back.field, back.detail, str(back)) == ("r:1", "image", "gone", "r:1: image: gone")


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_returns_faulty_rows_with_their_batch(tmp_path: Path, untrained: tuple[Any, Any], workers: int) -> None:
    processor = untrained[1]
    dataset = TrainingSet(IndexedSamples([_source(_rows(tmp_path, 6, bad=(1, 4, 5)))]), SampleEncoder(processor, _section()))
    collator = Collator(processor.tokenizer.pad_token_id)
    loader = torch.utils.data.DataLoader(dataset, batch_size=2, collate_fn=collator, num_workers=workers)
    batches = list(loader)
    assert [[fault.row for fault in batch["faults"]] for batch in batches] == [
        ["r.jsonl:2"],
        [],
        ["r.jsonl:5", "r.jsonl:6"],
    ]
    assert all(type(fault) is RowError for batch in batches for fault in batch["faults"])
    assert [len(batch["input_ids"]) if "input_ids" in batch else 0 for batch in batches] == [1, 2, 0]
    first = dataset[0]
    assert isinstance(first, dict) and torch.equal(batches[0]["labels"], first["labels"])


class _Big(torch.utils.data.Dataset[Any]):
    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.zeros(1_000_000)


def _little_shared_memory(worker: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))


def test_shared_memory_that_is_too_small_is_named() -> None:
    loader = torch.utils.data.DataLoader(_Big(), num_workers=1, worker_init_fn=_little_shared_memory)
    with pytest.raises(RuntimeError) as caught:
        list(loader)
    message = str(worker_failure(caught.value))
    assert (
        re.match(r"unable to \w+ file .*: the shared memory \(/dev/shm\)", message)
        and "train.dataloader_num_workers: 0" in message
    )
    killed = "DataLoader worker (pid 7) is killed by signal: Bus error. It is possible that workers are out of shared memory"
    assert "/dev/shm" in str(worker_failure(RuntimeError(killed)))
    assert worker_failure(RuntimeError("The size of tensor a (2) must match the size of tensor b (3)")) is None
