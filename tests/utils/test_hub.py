"""Local paths, hub ids and an unreachable hub: no repeated requests and no waiting."""

from __future__ import annotations

import shutil
import socket
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import datasets
import pytest
from huggingface_hub import constants

from mmtune.builtin import tiny_checkpoint as tiny
from mmtune.cli.main import entry_point
from mmtune.data.sources.source import open_rows, stream_rows
from mmtune.models.load import load_trained
from mmtune.recipe.recipe import check_files, load_recipe
from mmtune.utils.errors import UserError
from mmtune.utils.files import nearest_path
from mmtune.utils.hub import hub_revision, is_local_name, locate_checkpoint, unreachable_reason


def use_hub(monkeypatch: pytest.MonkeyPatch, port: int) -> None:
    """What HF_ENDPOINT does where it is set before the hub's client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{port}")
    template = f"http://127.0.0.1:{port}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def unused_port() -> int:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return int(server.getsockname()[1])


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache of the hub."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    return tmp_path / "hub"


@pytest.fixture
def no_hub(unused_port: int, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A hub that refuses every connection, a cache that is empty, and an empty working directory. A retry fails the test."""
    use_hub(monkeypatch, unused_port)
    monkeypatch.setattr("time.sleep", lambda seconds: pytest.fail(f"waits {seconds} s before it tries again"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    return cache


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, cache: Path) -> Iterator[list[str]]:
    """A server that knows a private model, a gated one and one without files; gives the paths that were asked for."""
    asked: list[str] = []
    codes = {"private": "RepoNotFound", "gated": "GatedRepo", "empty": "EntryNotFound"}

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            asked.append(self.path)
            name = self.path.split("/")[2]
            self.send_response({"gated": 403, "down": 503}.get(name, 404))
            if name in codes:
                self.send_header("X-Error-Code", codes[name])
                self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    use_hub(monkeypatch, server.server_port)
    yield asked
    server.shutdown()
    server.server_close()


def into_cache(cache: Path, name: str) -> Path:
    """Lay the built-in model into a cache as the hub's client does."""
    folder = cache / f"models--{name.replace('/', '--')}"
    shutil.copytree(tiny.TINY_LLAVA, folder / "snapshots" / "abc")
    (folder / "refs").mkdir()
    (folder / "refs" / "main").write_text("abc")
    return folder / "snapshots" / "abc"


def test_paths_and_hub_ids_are_distinguished_by_form(no_hub: Path) -> None:
    Path("runs", "quickstart").mkdir(parents=True)
    for local in ("./x", "/x", "~/x", "a/b/c", "x", "runs/quickstar", "run/quickstart", "owner/rows.json"):
        assert is_local_name(local), local
    for hub_id in ("owner/name", "Qwen/Qwen2.5-VL-3B-Instruct"):
        assert not is_local_name(hub_id), hub_id
    into_cache(no_hub, "runs/cached")
    assert not is_local_name("runs/cached")  # the hub's owner has the name of a folder, and the model is here


def test_a_run_records_the_commit_of_a_cached_base(no_hub: Path, tmp_path: Path) -> None:
    snapshot = into_cache(no_hub, "someone/model")
    assert hub_revision("someone/model") == hub_revision(str(snapshot)) == "abc"
    assert [hub_revision(name) for name in (None, str(tmp_path), "someone/other", "not there")] == [None] * 4


def test_the_nearest_path_is_followed_part_by_part(tmp_path: Path) -> None:
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "quickstart.yaml").touch()
    assert nearest_path(tmp_path / "recipe" / "quickstart.yml") == tmp_path / "recipes" / "quickstart.yaml"
    assert nearest_path(tmp_path / "recipes" / "other") is None


@pytest.mark.parametrize("verb", [["chat"], ["eval"], ["report"], ["merge"], ["push"], ["data", "check"]])
def test_a_mistyped_run_names_the_nearest_one(verb: list[str], no_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("runs", "quickstart").mkdir(parents=True)
    out = {"merge": ["out"], "push": ["owner/name"]}.get(verb[0], [])
    assert entry_point([*verb, "runs/quickstar", *out]) == 2
    output = capsys.readouterr().err
    assert "did you mean 'runs/quickstart'?" in output
    assert "hub" not in output.replace("not as a hub id", "")


def test_every_path_of_a_recipe_names_the_nearest(no_hub: Path) -> None:
    for folder in ("models/tiny", "data", "pictures"):
        Path(folder).mkdir(parents=True)
    for file in ("data/rows.json", "own.yaml", "zero.json", "own.jinja"):
        Path(file).write_text("[]")
    Path("recipe.yaml").write_text(
        "model: {base: models/tinny, chat_template: own.jinj.jinja}\n"
        "data: {train: [{path: data/row.json, template: owns.yaml, media_root: picture}, {path: data/rows, template: llava}]}\n"
        "train: {deepspeed: zeros.json}\noutput_dir: run\n"
    )
    with pytest.raises(UserError) as error:
        check_files(load_recipe("recipe.yaml"))
    for near in ("models/tiny", "own.jinja", "data/rows.json", "own.yaml", "pictures", "zero.json"):
        assert f"did you mean '{near}'?" in str(error.value)
    assert str(error.value).count("did you mean 'data/rows.json'?") == 2
    assert "recipe.yaml:1: model.base: " in str(error.value)


def test_without_a_network_the_message_names_the_next_step(no_hub: Path) -> None:
    with pytest.raises(UserError) as error:
        locate_checkpoint("owner/name")
    message = str(error.value)
    assert all(
        part in message for part in ("owner/name", constants.ENDPOINT, str(no_hub), "HF_HUB_OFFLINE", "HF_ENDPOINT", "path")
    )


def test_without_a_network_a_cached_model_loads(no_hub: Path, capsys: pytest.CaptureFixture[str]) -> None:
    snapshot = into_cache(no_hub, "owner/name")
    model, processor = load_trained(Path("owner/name"))
    assert model.config.model_type == "llava" and processor.chat_template
    assert locate_checkpoint("owner/name") == str(snapshot)
    assert capsys.readouterr().out.count("owner/name: loaded from the local cache") == 1


@pytest.mark.parametrize("verb", ["train", "plan", "data check"])
def test_without_a_network_a_recipe_of_a_hub_id_fails_at_once(
    verb: str, no_hub: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("rows.json").write_text('[{"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]')
    Path("recipe.yaml").write_text(
        "model: {base: owner/name}\ndata: {train: [{path: rows.json, template: llava}]}\noutput_dir: run\n"
    )
    code = entry_point([*verb.split(), "recipe.yaml"])
    printed = capsys.readouterr()
    assert (code, "owner/name" in printed.out + printed.err) == (0 if verb == "data check" else 2, True)
    assert ("; --rehearse or model.base=builtin:tiny-llava tries the recipe without a download" in printed.err) == (
        verb == "train"
    )
    assert not Path("run").exists()


def test_without_a_network_a_data_set_fails_at_once(no_hub: Path) -> None:
    for read in (open_rows, lambda name: list(stream_rows(name))):
        with pytest.raises(UserError, match="owner/rows") as error:
            read("owner/rows@config:train")
        assert "cannot be reached" in str(error.value) and "HF_ENDPOINT" in str(error.value)


def test_without_a_network_a_prepared_data_set_is_read_from_the_cache(
    no_hub: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", no_hub / "datasets")
    Path("a.json").write_text('[{"a": 1}, {"a": 2}]')
    datasets.load_dataset("json", data_files={"train": "a.json"}, split="train")  # prepared as one of the hub is
    (no_hub / "datasets" / "owner___rows").mkdir()
    prepared = next((no_hub / "datasets" / "json").iterdir()).rename(no_hub / "datasets" / "owner___rows" / "default")
    for file in prepared.rglob("json-train.arrow"):
        file.rename(file.with_name("rows-train.arrow"))
    assert [row for _, row in open_rows("owner/rows")] == [{"a": 1}, {"a": 2}]
    assert [read()[1] for read in stream_rows("owner/rows")] == [{"a": 1}, {"a": 2}]
    assert "owner/rows: read from the local cache: the hub" in capsys.readouterr().out
    with pytest.raises(UserError, match="it is not in the local cache"):
        open_rows("owner/rows:test")


@pytest.mark.parametrize(
    ("name", "message"),
    [("private", "has no model owner/private, or it is private"), ("gated", "is gated"), ("empty", "has no config.json")],
)
def test_errors_of_the_hub_are_reported(name: str, message: str, hub: list[str]) -> None:
    with pytest.raises(UserError, match=message):
        locate_checkpoint(f"owner/{name}")
    assert hub == [f"/owner/{name}/resolve/main/config.json"]


def test_a_hub_that_is_down_counts_as_unreachable(hub: list[str]) -> None:
    assert "answers 503" in str(unreachable_reason("owner/down"))
    assert len(hub) == 1
