"""The chat page: its components, and what its buttons do with a conversation."""

from __future__ import annotations

import html
import re
import shutil
import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from threading import Lock
from typing import Any

import gradio as gr
from gradio.blocks import Block

from mmtune.chat.session import ChatSession
from mmtune.chat.web.answer_panels import ANSWER_PANELS
from mmtune.chat.web.model_turns import ModelTurns
from mmtune.chat.web.page_conversation import Draft, Notice, PageConversation
from mmtune.chat.web.transcript_html import history_html, writing_html
from mmtune.utils.errors import UserError, reason_of

MAX_CONVERSATIONS = 64
"""Conversations that the server keeps; of more, the oldest that no tab shows are deleted."""

UNSENT_S = 3600.0
"""Age at which uploaded files that were not sent are deleted, when a tab is opened."""

IMAGE_TYPES = ["image", ".dcm"]
SETTINGS = ("max_new_tokens", "temperature", "top_p", "seed")

EVENT: dict[str, Any] = {"api_visibility": "private", "concurrency_limit": None, "show_progress": "hidden"}
"""Settings of every event. Answers wait for each other in `ModelTurns`, which the stop button can end."""

TAB_ID = re.compile("[0-9a-f]{32}")
READ_TAB_ID = """() => {
  let id = sessionStorage.getItem("mmtune-chat");
  if (!id) {
    id = Array.from(crypto.getRandomValues(new Uint8Array(16)), (byte) => byte.toString(16).padStart(2, "0")).join("");
    sessionStorage.setItem("mmtune-chat", id);
  }
  const log = document.querySelector("#conversation");
  for (const [name, value] of [["role", "log"], ["tabindex", "0"], ["aria-label", "Conversation"]]) log.setAttribute(name, value);
  return [id];
}"""
"""The id of a tab, which it keeps when it is reloaded and which no other page knows."""

DOWNLOAD = """(path) => {
  if (!path) return;
  const link = document.createElement("a");
  link.href = "gradio_api/file=" + encodeURI(path);
  link.download = "";
  link.click();
}"""

Inputs = dict[Any, Any]
"""The values of components, by component."""

Run = Callable[[PageConversation, str, Mapping[str, Any]], Iterator[list[Any]]]
"""What a button does: takes the conversation, the system prompt and the settings, and yields the values of its outputs."""


class ChatPage:
    """The page and its conversations, one for each tab.

    Attributes:
        blocks: gradio's application.

    Args:
        new_session: makes the session of a new conversation.
        name: of the model, as the page shows it.
        folder: an empty folder, whose files the server may send to the page's users.
    """

    def __init__(self, new_session: Callable[[], ChatSession], name: str, folder: Path) -> None:
        self._new_session = new_session
        self._folder = folder
        self._turns = ModelTurns()
        self._lock = Lock()
        self._conversations: dict[str, PageConversation] = {}  # by tab id, the one opened last at the end
        self._tabs: dict[str, str] = {}  # tab id by gradio's session
        self._clicks: list[tuple[gr.Button, Callable[..., Any], Sequence[Any]]] = []  # of the panels
        self.blocks = self._build(name)

    def stop(self) -> None:
        """Stop all answers."""
        for conversation in [*self._conversations.values()]:
            conversation.stop()

    def close(self) -> None:
        """Stop all answers, wait until the model has stopped, and delete all files of the conversations."""
        for conversation in [*self._conversations.values()]:
            conversation.close()

    def on_click(self, button: gr.Button, run: Run, outputs: Sequence[Any]) -> None:
        """Run something when a button is clicked; its errors become the line under the conversation."""

        def handle(inputs: Inputs, request: gr.Request) -> Iterator[list[Any]]:
            conversation = self._conversation(request)
            unchanged = [gr.skip() for _ in outputs]
            with closing(self._reported(conversation, run(conversation, *self._settings_in(inputs)))) as results:
                for result in results:
                    yield [self._notice_of(conversation), self._send_or_stop(conversation), *(result or unchanged)]
            yield [self._notice_of(conversation), self._send_or_stop(conversation), *unchanged]

        self._clicks.append((button, handle, outputs))

    # ---- components

    def _build(self, name: str) -> gr.Blocks:
        with gr.Blocks(title=f"{name} \u00b7 mmtune chat", analytics_enabled=False) as blocks:
            gr.HTML(f"<h1>{html.escape(name)}</h1>", elem_id="title", padding=False)
            with gr.Row(equal_height=False):
                with gr.Column(scale=3, min_width=300):
                    self._add_conversation()
                    self._add_panels()
                with gr.Column(scale=1, min_width=260):
                    self._add_settings()
            self._add_events(blocks)
        return blocks

    def _add_conversation(self) -> None:
        with gr.Column(elem_id="conversation"), gr.Column():
            self._history = gr.HTML(padding=False)
            self._writing = gr.HTML(padding=False)
        self._notice = gr.HTML(elem_id="notice", padding=False)
        self._box = gr.MultimodalTextbox(
            label="Your question",
            show_label=False,
            placeholder="Your question",
            file_count="multiple",
            file_types=IMAGE_TYPES,
            max_plain_text_length=10**6,
            autofocus=True,
            elem_id="question",
            interactive=False,  # until the page has its conversation
        )
        with gr.Row(elem_id="actions"):
            small: dict[str, Any] = {"size": "sm", "min_width": 72, "scale": 0}
            self._retry = gr.Button("Retry", **small)
            self._undo = gr.Button("Undo", **small)
            self._reset = gr.Button("New chat", **small)
            self._save = gr.Button("Save", **small)
            self._load = gr.UploadButton("Load", file_types=[".jsonl"], **small)

    def _add_panels(self) -> None:
        self._panel_outputs: list[Any] = []
        session = self._new_session()
        with gr.Tabs():
            for panel in ANSWER_PANELS:
                if panel.applies(session):
                    with gr.Tab(panel.title):
                        self._panel_outputs += panel.build(self)

    def _add_settings(self) -> None:
        system = gr.Textbox(label="System prompt", lines=2, max_lines=12, placeholder="none, or that of the chat template")
        maximum = gr.Number(label="Maximum of new tokens", precision=0)
        temperature = gr.Number(label="Temperature", info="0 is greedy", step=0.1)
        top_p = gr.Number(label="Top p", step=0.05)
        seed = gr.Number(label="Seed", info="each retry uses the next one", precision=0)
        self._settings = [system, maximum, temperature, top_p, seed]

    def _add_events(self, blocks: gr.Blocks) -> None:
        tab_id = gr.Textbox(visible=False)
        self._unchanged = [gr.skip()] * (3 + len(self._panel_outputs))
        shown = [self._history, self._writing, self._box, self._notice, self._retry, self._undo, self._save, *self._panel_outputs]
        blocks.load(self._open, tab_id, [*shown, *self._settings], js=READ_TAB_ID, **EVENT)
        blocks.unload(self._leave)
        settings: set[Block] = {*self._settings}
        for button, handle, outputs in self._clicks:
            button.click(handle, settings, [self._notice, self._box, *outputs], **EVENT)
        self._box.submit(self._ask, {self._box, *settings}, shown, **EVENT)
        self._box.stop(self._stop, None, None, **EVENT)
        self._retry.click(self._answer_again, settings, shown, **EVENT)
        self._undo.click(self._take_back, None, shown, **EVENT)
        self._reset.click(self._start_again, None, shown, **EVENT)
        self._load.upload(self._load_chat, self._load, [*shown, *self._settings], **EVENT)
        path = gr.Textbox(visible=False)
        saved = self._save.click(self._save_chat, None, [path, self._notice], **EVENT)
        saved.success(None, path, js=DOWNLOAD)

    # ---- events

    def _open(self, tab_id: str, request: gr.Request) -> list[Any]:
        """Show the conversation of a tab: a new one, or that of a tab that was reloaded."""
        if not TAB_ID.fullmatch(tab_id or ""):
            raise gr.Error("The browser keeps no data of this page; allow session storage and reload.", print_exception=False)
        with self._lock:
            conversation = self._conversations.pop(tab_id, None)
            if conversation is None:
                conversation = PageConversation(self._new_session(), self._turns, self._folder / tab_id)
            self._conversations[tab_id] = conversation
            self._tabs[request.session_hash or ""] = tab_id
            self._drop_old()
        conversation.wait_until_stopped()  # an answer for the page before the reload
        if conversation.notice.is_error:  # of a request before the reload
            conversation.notice = Notice()
        return [*self._shown(conversation, with_draft=True), *self._settings_of(conversation)]

    def _leave(self, request: gr.Request) -> None:
        """A tab was closed, reloaded or lost: its answer stops, and its conversation stays for a reload."""
        with self._lock:
            tab_id = self._tabs.pop(request.session_hash or "", None)
            if tab_id is not None and tab_id not in self._tabs.values():
                self._conversations[tab_id].stop()

    def _ask(self, inputs: Inputs, request: gr.Request) -> Iterator[list[Any]]:
        conversation, box = self._conversation(request), inputs[self._box]
        files = [Path(file) for file in box["files"]]
        steps = conversation.ask(box["text"] or "", files, *self._settings_in(inputs))
        yield from self._streamed(conversation, steps, clears_box=True)

    def _answer_again(self, inputs: Inputs, request: gr.Request) -> Iterator[list[Any]]:
        conversation = self._conversation(request)
        yield from self._streamed(conversation, conversation.retry(*self._settings_in(inputs)))

    def _stop(self, request: gr.Request) -> None:
        self._conversation(request).stop()

    def _take_back(self, request: gr.Request) -> list[Any]:
        return self._changed(self._conversation(request), PageConversation.undo)

    def _start_again(self, request: gr.Request) -> list[Any]:
        return self._changed(self._conversation(request), PageConversation.reset)

    def _load_chat(self, file: str, request: gr.Request) -> list[Any]:
        conversation = self._conversation(request)
        shown = self._changed(conversation, lambda each: each.load(Path(file)))
        return [*shown, *self._settings_of(conversation)]

    def _save_chat(self, request: gr.Request) -> list[Any]:
        conversation = self._conversation(request)
        paths: list[Path] = []
        self._changed(conversation, lambda each: paths.append(each.save()))
        return [str(paths[0]) if paths else None, self._notice_of(conversation)]

    # ---- what the page shows

    def _conversation(self, request: gr.Request) -> PageConversation:
        with self._lock:
            tab_id = self._tabs.get(request.session_hash or "")
            if tab_id is None:
                raise gr.Error("The server was started again; reload the page.", print_exception=False)
            return self._conversations[tab_id]

    def _drop_old(self) -> None:
        """Delete the oldest conversations that no tab shows, and uploaded files that were not sent."""
        unused = [tab_id for tab_id in self._conversations if tab_id not in self._tabs.values()]
        for tab_id in unused[: max(0, len(self._conversations) - MAX_CONVERSATIONS)]:
            self._conversations.pop(tab_id).close()
        for path in self._folder.iterdir():
            if path.name not in self._conversations and time.time() - path.stat().st_mtime > UNSENT_S:
                shutil.rmtree(path, ignore_errors=True)

    def _streamed(self, conversation: PageConversation, steps: Iterator[None], clears_box: bool = False) -> Iterator[list[Any]]:
        is_opening = True
        with closing(self._reported(conversation, steps)) as changes:
            for _ in changes:
                has_ended = not conversation.is_busy
                with_draft = (is_opening and clears_box) or (has_ended and conversation.draft != Draft())
                yield self._shown(conversation, with_draft=with_draft, with_controls=is_opening or has_ended)
                is_opening = False
        yield self._shown(conversation, with_draft=conversation.draft != Draft() or is_opening)

    def _reported(self, conversation: PageConversation, steps: Iterator[Any]) -> Generator[Any]:
        """The steps; an error becomes the line under the conversation. A bug is one more step, and is then raised."""
        try:
            yield from steps
        except UserError as error:
            conversation.notice = Notice(str(error), is_error=True)
        except GeneratorExit:
            raise
        except BaseException as error:
            conversation.notice = Notice(f"failed: {reason_of(error)}; the server's terminal has the details", is_error=True)
            yield None
            raise

    def _changed(self, conversation: PageConversation, change: Callable[[PageConversation], None]) -> list[Any]:
        try:
            change(conversation)
        except UserError as error:
            conversation.notice = Notice(str(error), is_error=True)
        return self._shown(conversation, with_draft=conversation.draft != Draft())

    def _shown(self, conversation: PageConversation, with_draft: bool = False, with_controls: bool = True) -> list[Any]:
        """The values of the conversation's components.

        Args:
            with_draft: also the content of the input field, in which the user may have written meanwhile.
            with_controls: all components; otherwise only the answer that is being written, and the line under it.
        """
        draft = conversation.draft
        content: dict[str, Any] = {}
        if with_draft:
            content["value"] = {"text": draft.text, "files": [str(path) for path in draft.files]}
            conversation.draft = Draft()
        if not with_controls:
            return [gr.skip(), writing_html(conversation), gr.skip(), self._notice_of(conversation), *self._unchanged]
        box = self._send_or_stop(conversation, **content)
        can_change = gr.update(interactive=bool(conversation.session.state.messages) and not conversation.is_busy)
        texts = [history_html(conversation), writing_html(conversation)]
        return [*texts, box, self._notice_of(conversation), *[can_change] * 3, *[None] * len(self._panel_outputs)]

    def _send_or_stop(self, conversation: PageConversation, **content: Any) -> Any:
        """The input field with the button that is of use."""
        return gr.update(interactive=True, submit_btn=not conversation.is_busy, stop_btn=conversation.is_busy, **content)

    def _settings_in(self, inputs: Inputs) -> tuple[str, dict[str, Any]]:
        system, *values = (inputs[field] for field in self._settings)
        return system or "", dict(zip(SETTINGS, values, strict=True))

    def _settings_of(self, conversation: PageConversation) -> list[Any]:
        settings = conversation.session.settings
        return [conversation.session.state.system or "", *(getattr(settings, name) for name in SETTINGS)]

    def _notice_of(self, conversation: PageConversation) -> str:
        notice = conversation.notice
        if not notice.text:
            return ""
        role = 'role="alert" class="error"' if notice.is_error else 'role="status"'
        return f"<p {role}>{html.escape(notice.text)}</p>"
