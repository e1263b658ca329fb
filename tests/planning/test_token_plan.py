"""Token plans: equal to encoding, computed once, and computed again after any of their inputs changed."""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Callable, Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from family_processors import FAMILIES
from forked import forking, settle
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from torch import distributed

from mmtune.cli.main import entry_point
from mmtune.data.batching.bin_packing import pack_lengths, packing_efficiency
from mmtune.data.dataset import IndexedSamples
from mmtune.data.encoding.encode import encode_sample
from mmtune.data.encoding.over_length import fit_to_budget
from mmtune.data.message import RowError
from mmtune.data.sources import row_cache
from mmtune.data.sources.row_cache import RowCache, cache_directory, file_signatures
from mmtune.distributed.context import SINGLE_PROCESS, DistributedContext
from mmtune.planning.plan_cache import plan_key
from mmtune.planning.plan_report import histogram, plan_statistics
from mmtune.planning.token_plan import Plan, build_plan, predict_outcome
from mmtune.recipe.recipe import DataSection, Source
from mmtune.utils.errors import UserError

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's cache directory of the test's own."""
    monkeypatch.setattr("mmtune.utils.files.USER_CACHE", tmp_path / "cache")
    return tmp_path / "cache"


@pytest.fixture
def data(media: Path) -> Path:
    """Six rows beside their pictures: of one and of two images, without any, of two turns, faulty, with a large image."""
    Image.new("RGB", (400, 300), "navy").save(media / "large.png")
    turns = [("<image>\nwhat is it?", "a cat"), ("what?", "no"), ("<image>\n<image>\nwhich?", "the second", "sure?", "yes")]
    turns += [("<image>\nand this?", "a dog"), ("<image>\nwhat?", "it is lost"), ("<image>\nhow large?", "very")]
    images = ["a.png", None, ["a.png", "b.png"], "b.png", "missing.png", "large.png"]
    rows = []
    for spoken, image in zip(turns, images, strict=True):
        turns = [{"from": ("human", "gpt")[number % 2], "value": text} for number, text in enumerate(spoken)]
        rows.append({"conversations": turns} | ({"image": image} if image else {}))
    path = media / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def _sources(data: Path) -> list[Source]:
    return [Source(path=str(data), template="llava")]


def _plan(data: Path, processor: Any = None, supervise: Any = "all", **arguments: Any) -> Plan:
    processor = processor or FAMILIES["qwen2_vl"]()
    sources = _sources(data)
    cache = RowCache(cache_directory(sources), plan_key(sources, processor, supervise), "plan")
    return build_plan(IndexedSamples(sources), processor, supervise, cache=cache, **arguments)


def _same(plan: Plan, other: Plan) -> bool:
    columns = ("tokens", "media_tokens", "supervised", "images")
    return all(np.array_equal(getattr(plan, name), getattr(other, name)) for name in columns) and (
        {row: str(error) for row, error in plan.errors.items()} == {row: str(error) for row, error in other.errors.items()}
    )


# ---- what is counted


@pytest.mark.parametrize("supervise", ["all", "last"])
def test_a_plan_equals_encoding_and_lists_untrainable_rows(data: Path, supervise: Any) -> None:
    processor, samples = FAMILIES["qwen2_vl"](), IndexedSamples(_sources(data))
    plan = build_plan(samples, processor, supervise)
    assert list(plan.errors) == [4] and "no such file" in str(plan.errors[4])
    assert plan.errors[4].row == "rows.jsonl:5"
    for row in {*range(6)} - {4}:
        encoded = encode_sample(samples[row], processor, supervise=supervise)
        assert plan.tokens[row] == encoded["input_ids"].shape[1]
        assert plan.supervised[row] == int((encoded["labels"] != -100).sum())
        assert plan.images[row] == len(samples[row].images)
    assert [plan.tokens[4], plan.media_tokens[4], plan.supervised[4], plan.images[4]] == [0, 0, 0, 0]
    assert plan.media_tokens[1] == 0 < plan.media_tokens[0]


def test_several_processes_count_the_same(data: Path) -> None:
    rows = data.read_text(encoding="utf-8")
    data.write_text(rows * 25, encoding="utf-8")  # more than one chunk
    samples, processor = IndexedSamples(_sources(data)), FAMILIES["llava"]()
    state = torch.random.get_rng_state()
    assert _same(build_plan(samples, processor, processes=2), build_plan(samples, processor, processes=0))
    assert torch.equal(torch.random.get_rng_state(), state)  # the run's draws are its own


def test_a_processor_that_cannot_be_counted_stops_the_plan_in_any_process(data: Path) -> None:
    from transformers import ProcessorMixin

    class Silent(type(FAMILIES["llava"]())):  # type: ignore[misc]
        replace_image_token = ProcessorMixin.replace_image_token

    processor = copy.deepcopy(FAMILIES["llava"]())
    processor.__class__ = Silent
    for processes in (0, 1):
        with pytest.raises(
            UserError, match=r"^model: Silent has no `replace_image_token`, and its token ids do not show the text of an image"
        ):
            build_plan(IndexedSamples(_sources(data)), processor, processes=processes)


class Recorded(IndexedSamples):
    """Notes which rows are read."""

    def __getitem__(self, index: int) -> Any:
        self.read = sorted({*getattr(self, "read", ()), index})
        return super().__getitem__(index)


def _limited_plan(data: Path, dist: DistributedContext = SINGLE_PROCESS) -> list[Any]:
    """A plan with an over-length policy, as plain values; its number of counted rows, and those that this process has read."""
    processor, sources, samples = FAMILIES["qwen2_vl"](), _sources(data), Recorded(_sources(data))
    cache = RowCache(cache_directory(sources), plan_key(sources, processor, "all"), "plan")
    plan = build_plan(samples, processor, cache=cache, dist=dist)
    counts = [getattr(plan, name).tolist() for name in ("tokens", "media_tokens", "supervised", "images")]
    outcome = predict_outcome(plan, IndexedSamples(sources), processor, 40, "shrink_media", dist=dist)
    errors = {str(row): [error.row, str(error)] for row, error in plan.errors.items()}
    fitted = [outcome.lengths.tolist(), outcome.dropped, outcome.smaller_images, outcome.images_resized]
    return [[counts, errors, fitted], plan.counted, samples.read]


def _plan_in_process(rank: int, data: Path) -> None:
    settle(data.with_suffix(f".{rank}.log"))
    distributed.init_process_group("gloo", init_method=f"file://{data.parent / 'store'}", rank=rank, world_size=2)
    data.with_suffix(f".{rank}.json").write_text(json.dumps(_limited_plan(data, DistributedContext(rank, 2))))


@pytest.mark.slow
def test_the_processes_of_a_run_count_their_shares_and_have_the_plan_of_one(data: Path) -> None:
    """The second time they count the row that has an error and the one whose image has changed."""
    expected, *_ = _limited_plan(data)
    assert expected[2][2] > 0 and expected[1]  # rows are fitted, and one has an error
    [file] = (data.parent / ".mmtune").iterdir()
    alone = file.read_bytes()
    file.unlink()
    for counted, shares in ((6, [[0, 2, 4], [1, 3, 5]]), (2, [[4], [5]])):
        started = [forking.Process(target=_plan_in_process, args=(rank, data)) for rank in range(2)]
        for process in started:
            process.start()
        for process in started:
            process.join()
        results = [json.loads(data.with_suffix(f".{rank}.json").read_text()) for rank in range(2)]
        assert results == [[expected, counted, rows] for rows in shares]
        assert counted == 2 or file.read_bytes() == alone
        (data.parent / "store").unlink(missing_ok=True)
        os.utime(data.parent / "large.png", ns=(1, 1))


# ---- the cache


def test_a_second_plan_counts_only_faulty_rows_again(data: Path, own_cache: Path) -> None:
    first, second = _plan(data), _plan(data)
    assert (first.counted, second.counted) == (6, 1)
    assert _same(first, second)
    assert (
        first.cache_file == second.cache_file
        and first.cache_file is not None
        and first.cache_file.parent == data.parent / ".mmtune"
    )
    assert not own_cache.exists()
    assert len(list(first.cache_file.parent.iterdir())) == 1  # no leavings


def test_only_the_row_of_a_changed_image_is_counted_again(data: Path) -> None:
    first = _plan(data)
    Image.new("RGB", (300, 300), "red").save(data.parent / "b.png")
    second = _plan(data)
    assert second.counted == 2 + 1  # two rows have it, and one is at fault
    assert [row for row in range(6) if first.tokens[row] != second.tokens[row]] == [2, 3]
    assert _same(second, build_plan(IndexedSamples(_sources(data)), FAMILIES["qwen2_vl"]()))
    assert _plan(data).counted == 1


def test_a_changed_image_of_the_same_size_is_noticed(data: Path) -> None:
    picture = data.parent / "b.png"
    Image.new("RGB", (64, 320)).save(picture, format="BMP")
    size = picture.stat().st_size
    first = _plan(data)
    Image.new("RGB", (320, 64)).save(picture, format="BMP")
    os.utime(picture, ns=(1, 1))
    assert picture.stat().st_size == size
    assert _plan(data).counted == 2 + 1 < first.counted


def test_an_added_or_removed_image_is_noticed(data: Path) -> None:
    _plan(data)
    (data.parent / "large.png").rename(data.parent / "missing.png")
    plan = _plan(data)
    assert list(plan.errors) == [5] and plan.tokens[4] > 0
    assert _same(plan, build_plan(IndexedSamples(_sources(data)), FAMILIES["qwen2_vl"]()))
    assert _plan(data).counted == 1


def _other_rows(data: Path, processor: Any) -> Any:
    text = data.read_text(encoding="utf-8")
    data.write_text(text.replace("a cat", "a hat"), encoding="utf-8")


def _other_template(data: Path, processor: Any) -> Any:
    processor.chat_template = processor.chat_template.replace("<|im_end|>\n", "<|im_end|>\n\n")


def _other_pixels(data: Path, processor: Any) -> Any:
    processor.image_processor.size = type(processor.image_processor.size)(shortest_edge=3136, longest_edge=100_352)


def _other_tokens(data: Path, processor: Any) -> Any:
    processor.tokenizer.add_tokens(["what is"])


@pytest.mark.parametrize("change", [_other_rows, _other_template, _other_pixels, _other_tokens])
def test_every_input_of_a_plan_is_part_of_its_key(data: Path, change: Callable[[Path, Any], Any]) -> None:
    processor = copy.deepcopy(FAMILIES["qwen2_vl"]())
    assert (_plan(data, processor).counted, _plan(data, processor).counted) == (6, 1)
    fresh = copy.deepcopy(processor)
    change(data, fresh)
    plan = _plan(data, fresh)
    assert plan.counted == 6
    assert _same(plan, build_plan(IndexedSamples(_sources(data)), fresh))


def test_recipe_settings_are_part_of_the_key(data: Path) -> None:
    processor = FAMILIES["qwen2_vl"]()
    own = data.parent / "own.yaml"
    own.write_text("one", encoding="utf-8")
    keys = {
        plan_key(_sources(data), processor, "all"),
        plan_key(_sources(data), processor, "last"),
        plan_key([Source(path=str(data), template="llava", limit=3)], processor, "all"),
        plan_key([Source(path=str(data), template="messages")], processor, "all"),
        plan_key([Source(path=str(data), template=str(own))], processor, "all"),
    }
    own.write_text("two", encoding="utf-8")
    keys.add(plan_key([Source(path=str(data), template=str(own))], processor, "all"))
    assert len(keys) == 6
    os.utime(data, (1, 1))  # copied, or checked out again: the content is the same
    assert plan_key(_sources(data), processor, "all") in keys


def test_every_file_of_a_pattern_is_part_of_the_key(data: Path) -> None:
    processor = FAMILIES["qwen2_vl"]()
    source = Source(path=str(data.parent / "{rows,more}*.jsonl"), template="llava")
    (data.parent / "more1.jsonl").write_bytes(data.read_bytes())
    before = plan_key([source], processor, "all")
    assert cache_directory([source]) == data.parent
    (data.parent / "more1.jsonl").write_bytes(data.read_bytes() + b"{}\n")
    assert plan_key([source], processor, "all") != before


def test_large_files_are_compared_by_time_start_and_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small, large = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    source = Source(path=str(tmp_path / "*.jsonl"), template="llava")
    monkeypatch.setattr(row_cache, "READ", 3 * 16)  # the template is the third file

    def known(content: bytes, time: int) -> list[Any]:
        for path, holds in ((small, b"x" * 16), (large, content)):
            path.write_bytes(holds)
            os.utime(path, (time, time))
        result = file_signatures([source])
        assert len(result) == 3
        return [result[str(path)] for path in (small, large)]

    before = known(b"first, middle, last", 1)
    assert known(b"first, middle, last", 1) == before
    for content, time in ((b"first, middle, last", 2), (b"first, middle, LAST", 1), (b"FIRST, middle, last", 1)):
        assert known(content, time)[0] == before[0] and known(content, time)[1] != before[1]


@pytest.mark.parametrize("damage", ["cut", "flipped", "empty", "other"])
def test_a_damaged_plan_is_detected_and_computed_again(data: Path, damage: str) -> None:
    first = _plan(data)
    assert first.cache_file is not None
    damaged = bytearray(first.cache_file.read_bytes())
    whole = bytes(damaged)
    damaged[len(damaged) // 2] ^= 1
    first.cache_file.write_bytes({"cut": whole[:-9], "flipped": bytes(damaged), "empty": b"", "other": b"x" * 99}[damage])
    second = _plan(data)
    assert second.counted == 6 and _same(first, second)
    assert _plan(data).counted == 1


def test_a_directory_that_cannot_be_written_leaves_the_plan_in_the_users_cache(
    data: Path, own_cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (data.parent / ".mmtune").write_text("in the way")  # as root may write to any directory
    plan = _plan(data)
    assert plan.cache_file is not None and plan.cache_file.parent == own_cache / "plans"
    output = capsys.readouterr().out
    assert "cannot write the cache in" in output and f"plan: cached in {plan.cache_file.parent}" in output
    assert _plan(data).counted == 1


def test_a_plan_works_without_a_writable_cache(data: Path, own_cache: Path) -> None:
    for place in (data.parent / ".mmtune", own_cache):
        place.write_text("in the way")
    assert (_plan(data).cache_file, _plan(data).counted) == (None, 6)


def test_a_write_that_fails_half_way_leaves_the_old_plan(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = _plan(data)
    Image.new("RGB", (300, 300), "red").save(data.parent / "b.png")

    def full(self: Path, target: Path) -> Any:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(Path, "replace", full)
        assert _plan(data).cache_file is None
    assert first.cache_file is not None and [first.cache_file] == list(first.cache_file.parent.iterdir())
    assert _plan(data).counted == 3


# ---- the over-length policies


@pytest.mark.parametrize("policy", ["error", "drop_sample", "drop_media", "shrink_media"])
def test_planned_over_length_policies_equal_the_run(data: Path, policy: Any) -> None:
    processor, samples = FAMILIES["qwen2_vl"](), IndexedSamples(_sources(data))
    plan = build_plan(samples, processor)
    limit = int(np.sort(plan.tokens)[-2]) - 1  # two rows are longer
    outcome = predict_outcome(plan, samples, processor, limit, policy, processes=0)
    assert outcome.over_length == 2
    for row in {*range(6)} - {4}:
        try:
            fitted = fit_to_budget(samples[row], processor, limit, policy)
        except RowError:
            assert outcome.lengths[row] == 0 and row in outcome.dropped
        else:
            assert outcome.lengths[row] == encode_sample(fitted.sample, processor)["input_ids"].shape[1] <= limit
            assert row not in outcome.dropped
    if policy == "drop_media":
        assert (outcome.fewer_images, outcome.images_dropped, outcome.dropped) == (2, 2, [])
    if policy == "shrink_media":
        assert outcome.smaller_images + len(outcome.dropped) == 2 and outcome.smaller_images > 0
    assert predict_outcome(plan, samples, processor, None, policy).lengths.tolist() == plan.tokens.tolist()


# ---- packing


def _fewest(lengths: list[int], capacity: int) -> int:
    """Packs needed, by trying everything."""
    best = [len(lengths)]

    def place(left: list[int], rooms: list[int]) -> None:
        if len(rooms) >= best[0]:
            return
        if not left:
            best[0] = len(rooms)
            return
        for number in range(len(rooms)):
            if rooms[number] >= left[0]:
                place(left[1:], [*rooms[:number], rooms[number] - left[0], *rooms[number + 1 :]])
        place(left[1:], [*rooms, capacity - left[0]])

    place(sorted(lengths, reverse=True), [])
    return best[0]


@settings(max_examples=100, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 50), max_size=60), capacity=st.integers(50, 70))
def test_every_sample_is_in_one_pack_and_no_two_packs_can_be_joined(lengths: list[int], capacity: int) -> None:
    packs = pack_lengths(lengths, capacity)
    assert sorted(position for pack in packs for position in pack) == list(range(len(lengths)))
    filled = [sum(lengths[position] for position in pack) for pack in packs]
    assert all(0 < tokens <= capacity for tokens in filled)
    assert all(one + other > capacity for one, other in combinations(filled, 2))
    assert packs == pack_lengths(np.array(lengths, dtype=np.int32), capacity)
    assert packing_efficiency(lengths, packs, capacity) == pytest.approx(sum(lengths) / (len(packs) * capacity) if packs else 1)


@settings(max_examples=40, deadline=None, derandomize=True)
@given(lengths=st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_the_number_of_packs_is_close_to_the_minimum(lengths: list[int]) -> None:
    assert len(pack_lengths(lengths, 20)) <= 11 / 9 * _fewest(lengths, 20) + 6 / 9


@pytest.mark.parametrize("capacity", [2048, 4096])
def test_packs_of_lengths_like_llavas_are_full(capacity: int) -> None:
    random = np.random.default_rng(1)
    pictured = random.random(5000) < 0.95
    text = np.exp(random.normal(np.log(np.where(pictured, 120, 330)), 0.8)).astype(np.int64)
    lengths = np.clip(text + 576 * pictured, 20, capacity)
    packs = pack_lengths(lengths, capacity)
    assert sorted(position for pack in packs for position in pack) == list(range(5000))
    assert max(lengths[pack].sum() for pack in packs) <= capacity
    assert packing_efficiency(lengths, packs, capacity) >= 0.95


@pytest.mark.parametrize("lengths", [[0, 3], [21], [-1]])
def test_lengths_beyond_the_pack_size_are_rejected(lengths: list[int]) -> None:
    with pytest.raises(ValueError, match=r"expected lengths from 1 to 20 \(the capacity\)"):
        pack_lengths(lengths, 20)


# ---- the report


def test_a_histogram_has_every_row_once() -> None:
    bars = histogram(np.array([3, 99, 100, 101, 1190]), bars=12)
    assert bars[0] == (0, 99, 2) and bars[1] == (100, 199, 2) and bars[-1] == (1100, 1199, 1)
    assert len(bars) == 12 and sum(rows for *_, rows in bars) == 5
    assert histogram(np.zeros(0, dtype=np.int64)) == []


def test_plan_metrics_equal_those_of_the_rows(data: Path) -> None:
    processor, samples = FAMILIES["qwen2_vl"](), IndexedSamples(_sources(data))
    plan = build_plan(samples, processor)
    limit = int(plan.tokens.max()) - 1
    section = DataSection(train=tuple(_sources(data)), max_tokens=limit, over_length="drop_sample", packing=True)
    plan_outcome = predict_outcome(plan, samples, processor, limit, "drop_sample")
    statistics = plan_statistics(plan, plan_outcome, section)
    lengths = sorted(length for length in plan.tokens.tolist() if 0 < length <= limit)
    assert (statistics["rows"], statistics["rows_invalid"], statistics["rows_trained"]) == (6, 1, len(lengths))
    assert statistics["tokens"] == int(plan.tokens.sum())
    assert plan_statistics(plan, plan_outcome, section.model_copy(update={"packing": False}))["packing"] is None
    packing = statistics["packing"]
    assert packing["efficiency"] == pytest.approx(sum(lengths) / (packing["packs"] * limit), abs=1e-4)
    assert statistics["over_length"]["rows"] == statistics["over_length"]["rows_dropped"] == 6 - 1 - len(lengths)
    assert statistics["errors"] == [{"row": "rows.jsonl:5", "field": "image", "detail": plan.errors[4].detail}]
    json.dumps(statistics)


@pytest.fixture
def recipe_file(make_recipe: Callable[..., Any], tmp_path: Path) -> Iterator[str]:
    make_recipe()
    yield str(tmp_path / "recipe.yaml")


@pytest.mark.slow
def test_plan_prints_data_and_memory(recipe_file: str, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held_out = f"evaluate={{data: [{{path: {rows}, template: llava, limit: 5}}], batch_size: 2}}"
    evaluates = ["train.eval_strategy=steps", "train.eval_steps=1", held_out]
    assert entry_point(["plan", recipe_file, "--json", "data.max_tokens=300", *evaluates]) == 0
    captured = capsys.readouterr()
    plan = json.loads(captured.out)
    for words in ("supervised tokens", "largest batch", "Length of a row", "over length: 0 rows", "Peak memory of a step"):
        assert words in captured.err  # for people
    count = len(json.loads(rows.read_text(encoding="utf-8")))
    assert plan["data"]["rows"] == count and plan["data"]["rows_invalid"] == 0 and plan["data"]["steps"] == 3
    assert plan["data"]["image_tokens"] == 16 * plan["data"]["images"]
    assert sum(bar["rows"] for bar in plan["data"]["histogram"]) == count
    assert plan["peak"] > 0
    assert (plan["data"]["held_out"]["rows"], plan["data"]["held_out"]["batches"]) == (5, 3)


def test_a_plan_shows_only_what_the_run_does(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    few = ["data.train.0.limit=3", "train.per_device_train_batch_size=8"]
    assert entry_point(["plan", recipe_file, *few]) == 0
    shown = capsys.readouterr().out
    assert "packs" not in shown
    assert "memory of a batch of 3 rows: the data has fewer rows than train.per_device_train_batch_size: 8" in shown


def test_without_data_only_the_memory_is_printed_with_the_reason(recipe_file: str, capsys: pytest.CaptureFixture[str]) -> None:
    gone = "data.train=[{path: gone/rows.json, template: llava}]"
    assert entry_point(["plan", recipe_file, gone, "--tokens", "40"]) == 0
    shown = capsys.readouterr().out
    assert "memory only: no such file: gone/rows.json" in shown and "Peak memory of a step" in shown
    assert entry_point(["plan", recipe_file, gone]) == 2
    assert "give data.max_tokens in the recipe, or --tokens" in capsys.readouterr().err
