"""The chat page in headless Chromium, on the real server with an adapter on its base; and the server's address and password."""

from __future__ import annotations

import asyncio
import base64
import copy
import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
import torch
from browser import NARROW, PageRecord, axe_violations, opened_page, overflow
from peft import LoraConfig, get_peft_model
from PIL import Image

from mmtune.chat.session import ChatSession
from mmtune.chat.web.model_turns import ModelTurns
from mmtune.chat.web.page_conversation import PageConversation
from mmtune.chat.web.page_server import check_web, listen, read_password
from mmtune.cli.main import entry_point
from mmtune.models.checkpoints.checkpoint_files import save_checkpoint
from mmtune.models.checkpoints.trained_weights import locate_trained_weights
from mmtune.models.load import load_trained
from mmtune.utils.errors import UserError

pytest.importorskip("gradio", reason="needs the extra `web`")

TIMEOUT_S = 120.0
HOSTILE = (
    "<img src=x onerror=alert(1)><script>alert(2)</script> ![i](http://192.0.2.1/a.png) $$x$$ ${alert(3)} {{constructor}}\n"
    "   <b>bold</b> &lt; **stars**"
)


@dataclass(frozen=True)
class Server:
    """A running page.

    Attributes:
        process: the command.
        address: of the page.
        temporary: its folder for temporary files, which is empty without it.
    """

    process: subprocess.Popen[str]
    address: str
    temporary: Path


@pytest.fixture(scope="module")
def adapter(answering_llava: tuple[Any, Any], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A LoRA adapter on a base with endless answers, which differ with the adapter."""
    folder = tmp_path_factory.mktemp("page")
    model, processor = copy.deepcopy(answering_llava[0]), answering_llava[1]
    model.config.tie_word_embeddings = model.config.text_config.tie_word_embeddings = False  # otherwise its head is not saved
    save_checkpoint(model, processor, folder / "base")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tuned = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    tuned.peft_config["default"].base_model_name_or_path = str(folder / "base")
    tuned.save_pretrained(folder / "adapter")
    processor.save_pretrained(folder / "adapter")
    return folder / "adapter"


@pytest.fixture(scope="module")
def server(adapter: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    temporary = tmp_path_factory.mktemp("temporary")
    command = [sys.executable, "-m", "mmtune.cli.main", "chat", str(adapter), "--web", "--max-new-tokens", "1000000"]
    environment = {**os.environ, "TMPDIR": str(temporary)}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment) as process:
        try:
            assert process.stdout is not None and process.stderr is not None
            line = process.stdout.readline()
            assert line.startswith("chat page: http://127.0.0.1:"), line + process.stderr.read()
            yield Server(process, line.split()[2], temporary)
        finally:
            process.kill()


@contextmanager
def chat(browser: Any, server: Server, **settings: Any) -> Iterator[tuple[Any, PageRecord]]:
    """An open page that can be used; at the end, without an error, an injected script or a request to another host."""
    with opened_page(browser, server.address, **settings) as (page, record):
        page.locator("#question textarea:enabled").wait_for()
        yield page, record
        assert record == PageRecord()


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a<img src=x onerror=alert(4)>.png")
    return tmp_path / "a<img src=x onerror=alert(4)>.png"


def start(page: Any, question: str) -> None:
    """Ask a question, and wait until its answer is being written."""
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.locator("article.writing .text:not(:empty)").wait_for()


def ask(page: Any, question: str) -> str:
    """Ask a question, and wait for its answer of a few tokens."""
    page.get_by_label("Maximum of new tokens").fill("8")
    count = page.locator("article.assistant").count()
    page.fill("#question textarea", question)
    page.press("#question textarea", "Enter")
    page.locator("article.assistant:not(.writing)").nth(count).wait_for()
    return answer(page)


def answer(page: Any) -> str:
    text: str = page.locator("article.assistant .text").last.text_content()
    return text


def wait_for_notice(page: Any, text: str) -> None:
    page.locator("#notice p", has_text=text).wait_for()


@pytest.mark.slow
def test_an_answer_is_streamed_stopped_retried_and_taken_back(browser: Any, server: Server, image: Path) -> None:
    with chat(browser, server) as (page, _):
        page.set_input_files("#question input[type=file]", [image, image])
        page.locator("#question .thumbnail-item, #question img").nth(1).wait_for()
        start(page, HOSTILE)
        page.wait_for_function("document.querySelector('article.writing .text').textContent.length > 200")
        page.get_by_label("Stop").click()
        wait_for_notice(page, "stopped: the text so far stays in the conversation")
        stopped = answer(page)
        assert len(stopped) > 200 and page.locator("article.writing").count() == 0
        assert page.locator("article.user .text").text_content() == HOSTILE
        assert page.locator("article.user img").count() == 2
        assert "24" in page.locator("article.user figcaption").first.text_content()

        page.get_by_label("Maximum of new tokens").fill("8")
        page.get_by_role("button", name="Retry").click()
        page.wait_for_function(f"document.querySelector('article.assistant .text')?.textContent.length < {len(stopped)}")
        page.locator("#question .stop-button").wait_for(state="detached")
        assert stopped.startswith(answer(page).rstrip("\ufffd"))

        page.get_by_role("button", name="Undo").click()
        page.locator("#conversation .placeholder").wait_for()
        assert page.input_value("#question textarea") == HOSTILE
        page.locator("#question img").nth(1).wait_for()
        page.press("#question textarea", "Shift+Enter")
        page.keyboard.type("more")
        assert page.input_value("#question textarea") == f"{HOSTILE}\nmore"


@pytest.mark.slow
def test_base_and_tuned_answers_are_side_by_side_and_the_prompt_is_shown_as_tokens(
    browser: Any, server: Server, image: Path
) -> None:
    with chat(browser, server) as (page, _):
        page.set_input_files("#question input[type=file]", image)
        page.locator("#question img").first.wait_for()
        text = ask(page, "what?")
        page.get_by_role("button", name="Answer with base and tuned").click()
        base, tuned = (page.locator("[role=tabpanel] textarea").nth(number) for number in (0, 1))
        page.wait_for_function("text => document.querySelectorAll('[role=tabpanel] textarea')[1].value === text", arg=text)
        assert tuned.input_value() == text != base.input_value() != "" and answer(page) == text
        page.get_by_label("Maximum of new tokens").fill("1000000")
        page.get_by_role("button", name="Answer with base and tuned").click()
        page.get_by_label("Stop").click()
        wait_for_notice(page, "stopped: the conversation is as before")
        assert answer(page) == text

        page.get_by_role("tab", name="Prompt tokens").click()
        page.get_by_role("button", name="Show the prompt as tokens").click()
        frame = page.frame_locator("iframe.tokens")
        frame.locator(".token.media").first.wait_for()
        assert "what" in frame.locator(".tokens").text_content() and frame.locator("figure img").count() == 1
        assert str(server.temporary) not in frame.locator("body").text_content()


@pytest.mark.slow
def test_the_last_answer_is_explained_in_a_frame_that_reaches_nothing(browser: Any, server: Server, image: Path) -> None:
    with chat(browser, server) as (page, _):
        page.set_input_files("#question input[type=file]", [image])
        page.locator("#question .thumbnail-item, #question img").first.wait_for()
        text = ask(page, HOSTILE)
        page.get_by_role("tab", name="Why").click()
        page.get_by_role("button", name="Explain the last answer").click()
        frame = page.frame_locator("iframe[title=Explanation]")
        frame.locator(".overlay:visible").wait_for()
        tokens = "".join(frame.locator(".choice").all_text_contents()[1:]).replace("\u2423", " ")
        assert tokens.replace("\ufffd", "").split() == text.replace("\ufffd", "").split()  # half characters
        assert "onerror=alert(1)" in frame.locator(".words:visible").text_content()
        frame.locator("input[type=radio]").first.focus()
        page.keyboard.press("ArrowRight")
        assert frame.locator(".overlay:visible").get_attribute("data-view") == "1"
        assert frame.locator("body").evaluate("() => window.origin") == "null"
        page.get_by_role("button", name="Undo").click()
        page.locator("iframe[title=Explanation]").wait_for(state="detached")


@pytest.mark.slow
def test_a_mistake_is_a_message_and_the_question_stays(browser: Any, server: Server, image: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad.png"
    bad.write_bytes(image.read_bytes()[:500])
    with chat(browser, server) as (page, _):
        page.set_input_files("#question input[type=file]", [image, bad])
        page.locator("#question img").nth(1).wait_for()
        page.fill("#question textarea", "what?")
        page.press("#question textarea", "Enter")
        wait_for_notice(page, "cannot decode bad.png")
        assert page.input_value("#question textarea") == "what?"
        page.wait_for_function("document.querySelectorAll('#question .thumbnail-item').length === 1")

        page.get_by_label("Temperature").fill("-1")
        page.press("#question textarea", "Enter")
        wait_for_notice(page, "temperature -1: expected 0 (greedy) or a number from 0.01 to 100")
        assert page.input_value("#question textarea") == "what?"
        page.get_by_label("Temperature").fill("0.7")
        assert ask(page, "what?")
        assert page.locator("article.user img").count() == 1 and not page.locator("#notice p").count()


@pytest.mark.slow
def test_a_conversation_is_saved_loaded_and_kept_by_a_reload(browser: Any, server: Server, image: Path, tmp_path: Path) -> None:
    with chat(browser, server) as (page, _):
        page.set_input_files("#question input[type=file]", image)
        page.locator("#question img").first.wait_for()
        page.get_by_label("System prompt").fill("Be brief.")
        text = ask(page, "what?")
        with page.expect_download() as download:
            page.get_by_role("button", name="Save").click()
        row = json.loads(Path(download.value.path()).read_text("utf-8"))
        assert [message["role"] for message in row["messages"]] == ["system", "user", "assistant"]

        row["messages"][-1]["content"] = [{"type": "text", "text": f"{HOSTILE} [100, 200, 500, 600]"}]
        saved = tmp_path / "chat.jsonl"
        saved.write_text(json.dumps(row), "utf-8")
        page.get_by_role("button", name="New chat").click()
        page.locator("#conversation .placeholder").wait_for()
        page.set_input_files("#actions input[type=file]", saved)
        wait_for_notice(page, "loaded: chat.jsonl")
        assert answer(page) == f"{HOSTILE} [100, 200, 500, 600]" != text
        drawn = page.locator("article.assistant figcaption").text_content()
        assert drawn.startswith("1 box (read as thousandths of the image) drawn on ")
        shown = page.locator("article.assistant img").get_attribute("src")
        pixels = Image.open(io.BytesIO(httpx2.get(f"{server.address}/{shown}").content)).convert("RGB")
        assert pixels.size == (120, 72)  # three times as large, so that its pixels are sharp
        assert (229, 72, 77) in {pixels.getpixel((12, y)) for y in range(72)}

        page.reload()
        page.locator("article.assistant").wait_for()
        assert answer(page) == f"{HOSTILE} [100, 200, 500, 600]"
        assert page.get_by_label("System prompt").input_value() == "Be brief."


@pytest.mark.slow
def test_two_tabs_wait_for_each_other_and_a_closed_tab_stops_its_answer(browser: Any, server: Server) -> None:
    with chat(browser, server) as (second, _):
        with chat(browser, server) as (first, _):
            start(first, "one")
            second.fill("#question textarea", "two")
            second.press("#question textarea", "Enter")
            wait_for_notice(second, "waiting: the model writes 1 other answer first")
            assert second.locator("article.user .text").text_content() == "two"
        second.locator("article.writing .text:not(:empty)").wait_for()
        second.get_by_label("Stop").click()
        wait_for_notice(second, "stopped")


@pytest.mark.slow
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_a_narrow_page_does_not_scroll_sideways_and_is_accessible(browser: Any, server: Server, theme: str) -> None:
    with chat(browser, server, size=NARROW, theme=theme) as (page, _):
        ask(page, f"what? {'x' * 300}")
        assert overflow(page) <= 0
        assert axe_violations(page) == []
        page.locator("#question textarea").focus()
        for _ in range(3):
            page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.tagName") == "BUTTON"


@pytest.mark.slow
def test_no_file_of_the_server_but_uploads_can_be_read(browser: Any, server: Server, adapter: Path) -> None:
    with httpx2.Client(base_url=server.address) as client, chat(browser, server) as (page, _):
        private = next(server.temporary.glob("mmtune-chat-*"))
        assert private.stat().st_mode & 0o077 == 0
        uploaded = client.post("/gradio_api/upload", files={"files": ("a.txt", b"text")}).json()[0]
        assert client.get(f"/gradio_api/file={uploaded}").text == "text"
        for path in (
            "/etc/passwd",
            str(adapter / "adapter_config.json"),
            f"{private}/../../etc/passwd",
            "chat.md",
            "http://192.0.2.1/",
        ):
            assert client.get(f"/gradio_api/file={path}").status_code == 403, path
        (private / "link").symlink_to("/etc/passwd")
        assert client.get(f"/gradio_api/file={private}/link").status_code == 403
        (private / "link").unlink()

        # An event names a file of the server, or an address, in place of an uploaded one.
        with page.expect_request("**/queue/join*") as request:
            page.get_by_role("button", name="New chat").click()
        event = request.value.post_data_json
        for path in ("/etc/passwd", "http://192.0.2.1/a.png", f"{private}/../x"):
            file = {"path": path, "meta": {"_type": "gradio.FileData"}}
            answered = client.post("/gradio_api/queue/join", json={**event, "data": [{"text": "", "files": [file]}]})
            assert answered.status_code == 403, path
        assert client.post("/gradio_api/queue/join", content=b"[" * 10**5).status_code == 400
        assert client.post("/gradio_api/queue/join", content=b" " * (5 << 20)).status_code == 413
        assert client.post("/gradio_api/upload", content=iter([b"of unknown size"])).status_code == 413

        for path in ("/gradio_api/info", "/gradio_api/proxy=http://192.0.2.1/", "/monitoring", "/docs", "/gradio_api/vibe-code/"):
            assert client.get(path).status_code == 404, path
        assert client.get("/", headers={"host": "attacker.example"}).status_code == 421
        for host in ("localhost:8000", "127.0.0.2:7860", "[::1]"):
            assert client.get("/", headers={"host": host}).status_code == 200
        assert client.post("/gradio_api/upload", headers={"origin": "http://localhost:8888"}).status_code == 403
        assert "connect-src 'self'" in client.get("/").headers["content-security-policy"]


@pytest.mark.slow
def test_ctrl_c_ends_the_server_and_the_page_says_so(browser: Any, server: Server) -> None:
    with opened_page(browser, server.address) as (page, record):
        page.locator("#question textarea:enabled").wait_for()
        text = ask(page, "what?")
        page.get_by_label("Maximum of new tokens").fill("1000000")
        start(page, "and?")
        server.process.send_signal(signal.SIGINT)
        assert server.process.wait(TIMEOUT_S) == 130
        assert server.process.stderr is not None
        assert server.process.stderr.read().splitlines()[-1] == "interrupted"
        assert not list(server.temporary.glob("mmtune-chat-*"))
        page.get_by_text("The server does not answer").wait_for()
        assert page.locator("article.assistant .text").first.text_content() == text
        assert not record.dialogs and not record.external


def test_an_error_while_generating_keeps_the_conversation_and_the_question(
    answering_llava: tuple[Any, Any], image: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*args: Any, streamer: Any, **settings: Any) -> None:
        raise RuntimeError("device-side assert")

    conversation = PageConversation(ChatSession(*answering_llava), ModelTurns(), tmp_path / "files")
    values = {"max_new_tokens": 8, "temperature": 0, "top_p": 1, "seed": 0}
    list(conversation.ask("one", [], "", values))
    messages, content = conversation.session.state.messages, image.read_bytes()
    monkeypatch.setattr(answering_llava[0], "generate", fails)
    with pytest.raises(RuntimeError, match="device-side assert"):
        list(conversation.ask("two", [image], "", values))
    assert conversation.session.state.messages == messages and not conversation.is_busy
    assert conversation.draft.text == "two" and [file.read_bytes() for file in conversation.draft.files] == [content]
    assert not image.exists()  # the uploaded file
    monkeypatch.undo()
    list(conversation.ask("two", conversation.draft.files, "", values))
    assert len(conversation.session.state.messages) == 4 and len(conversation.session.state.images) == 1
    conversation.close()
    assert not (tmp_path / "files").exists()


def test_a_host_other_than_loopback_needs_a_password(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--host 0\.0\.0\.0: .*add --password-file FILE"):
        read_password("0.0.0.0", None)
    assert read_password("localhost", None) is read_password("::1", None) is None
    (tmp_path / "password").write_text("correct horse\nanother line\n")
    assert read_password("0.0.0.0", str(tmp_path / "password")) == "correct horse"
    (tmp_path / "short").write_text("secret\n")
    for name, reason in (("short", "at least 8 characters"), ("none", "No such file")):
        with pytest.raises(UserError, match=reason):
            read_password("0.0.0.0", str(tmp_path / name))


@pytest.mark.parametrize("action", ["compare", "explain"])
def test_what_is_stopped_while_it_waits_for_the_model_does_not_run_it(adapter: Path, tmp_path: Path, action: str) -> None:
    model, processor = load_trained(locate_trained_weights(adapter))
    turns, values = ModelTurns(), {"max_new_tokens": 2}
    conversation = PageConversation(ChatSession(model, processor), turns, tmp_path / "tab")
    assert [*conversation.ask("what?", [], "", values)]
    calls: list[Any] = []
    model.get_base_model().register_forward_pre_hook(lambda *call: calls.append(call))
    with turns.ticket():  # an answer of another conversation
        steps = conversation.compare("", values) if action == "compare" else conversation.explain()
        next(steps)
        conversation.stop()
        with suppress(UserError):
            assert not any(steps)
    assert not calls and not conversation.is_busy


def test_the_port_is_the_first_free_one_or_the_one_of_the_option(adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with closing(listen("127.0.0.1", None)) as first, closing(listen("127.0.0.1", None)) as second:
        port = first.getsockname()[1]
        assert 7860 <= port < second.getsockname()[1]
        assert entry_point(["chat", str(adapter), "--web", "--port", str(port)]) == 2
        assert f"--port {port}: another program uses it" in capsys.readouterr().err
    assert entry_point(["chat", str(adapter), "--port", "8000"]) == 2
    assert "--port belongs to --web" in capsys.readouterr().err
    with pytest.raises(UserError, match="from 1 to 65535"):
        listen("127.0.0.1", 0)
    check_web()


def test_with_a_password_every_request_needs_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastapi import FastAPI
    from fastapi.testclient import TestClient

    from mmtune.chat.web import request_checks

    monkeypatch.setattr(request_checks, "WRONG_PASSWORD_S", 0.01)
    app = FastAPI()
    app.get("/")(lambda: "page")
    client = TestClient(request_checks.RequestChecks(app, tmp_path, "correct horse"), base_url="http://machine.example:7860")
    assert client.get("/").status_code == client.get("/", auth=("", "wrong")).status_code == 401
    assert client.get("/", headers={"authorization": "Basic !"}).status_code == 401
    assert client.get("/gradio_api/heartbeat/x").status_code == 401
    assert "Basic" in client.get("/").headers["www-authenticate"]
    assert client.get("/", auth=("anyone", "correct horse")).json() == "page"
    assert client.get("/", auth=("", "correct horse"), headers={"origin": "http://machine.example"}).status_code == 403


def test_a_guess_beside_a_wrong_password_waits_for_its_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mmtune.chat.web import request_checks

    answered: list[str] = []

    async def page(scope: Any, receive: Any, send: Any) -> None:
        answered.append("page")

    monkeypatch.setattr(request_checks, "WRONG_PASSWORD_S", 0.05)
    checks = request_checks.RequestChecks(page, tmp_path, "correct horse")

    async def request(password: str, address: str) -> None:
        async def send(event: Any) -> None:
            answered.extend(["refused"] * (event["type"] == "http.response.start"))

        authorization = b"Basic " + base64.b64encode(f":{password}".encode())
        scope = {"type": "http", "method": "GET", "path": "/", "headers": [(b"authorization", authorization)]}
        await checks({**scope, "client": (address, 1)}, None, send)  # type: ignore[arg-type]

    async def requests() -> None:
        await asyncio.gather(request("wrong", "192.0.2.1"), request("correct horse", "192.0.2.1"))
        await asyncio.gather(request("wrong", "192.0.2.1"), request("correct horse", "192.0.2.2"))

    with ThreadPoolExecutor(1) as thread:  # playwright has a loop that runs in this one
        thread.submit(asyncio.run, requests()).result()
    assert answered == ["refused", "page", "page", "refused"]
