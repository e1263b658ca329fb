"""Panels under the conversation: what a page shows about the last answer. Each is one tab."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import gradio as gr

from mmtune.chat.session import ChatSession
from mmtune.chat.web.page_conversation import PageConversation
from mmtune.chat.web.shown_images import file_name
from mmtune.report.explanations.explanation_page import explanation_html
from mmtune.report.pages import render_page
from mmtune.report.sample_page import sample_values

if TYPE_CHECKING:
    from mmtune.chat.web.page import ChatPage

COMPARED = ("base", "tuned")
"""The names of the answers of `ChatSession.compare`."""


@dataclass(frozen=True)
class AnswerPanel:
    """One panel.

    Attributes:
        title: of its tab.
        build: adds its components and events to the page; returns its outputs, which are set to None when the conversation
            changes.
        applies: whether it is useful for a session's model.
    """

    title: str
    build: Callable[[ChatPage], Sequence[Any]]
    applies: Callable[[ChatSession], bool] = lambda session: True


def _build_comparison(page: ChatPage) -> Sequence[Any]:
    with gr.Row():
        start = gr.Button("Answer with base and tuned", size="sm", min_width=240, scale=0)
    with gr.Row():
        outputs = [
            gr.Textbox(label=name, lines=4, max_lines=20, interactive=False, buttons=["copy"], min_width=240) for name in COMPARED
        ]

    def compare(conversation: PageConversation, system: str, values: Mapping[str, Any]) -> Iterator[list[Any]]:
        for answers in conversation.compare(system, values):
            yield [answers.get(name) for name in COMPARED]

    page.on_click(start, compare, outputs)
    return outputs


def _build_prompt_tokens(page: ChatPage) -> Sequence[Any]:
    with gr.Row():
        start = gr.Button("Show the prompt as tokens", size="sm", min_width=240, scale=0)
    output = gr.HTML(padding=False)

    def show(conversation: PageConversation, system: str, values: Mapping[str, Any]) -> Iterator[list[Any]]:
        view = conversation.view_prompt()
        shown = sample_values(view)
        for image, media in zip(shown["images"], view.sample.images, strict=True):
            image["name"] = file_name(media)  # without folders of the server
        document = render_page("sample.html.jinja", styles=("tokens.css",), title=view.sample.id, **shown)
        yield [_frame("Prompt as tokens", document)]

    page.on_click(start, show, [output])
    return [output]


def _build_explanation(page: ChatPage) -> Sequence[Any]:
    with gr.Row():
        start = gr.Button("Explain the last answer", size="sm", min_width=240, scale=0)
    output = gr.HTML(padding=False)

    def show(conversation: PageConversation, system: str, values: Mapping[str, Any]) -> Iterator[list[Any]]:
        for result in conversation.explain():
            if result is None:
                yield [None]
                continue
            yield [_frame("Explanation", explanation_html(*result, "What the last answer rests on"), "allow-scripts")]

    page.on_click(start, show, [output])
    return [output]


def _frame(title: str, document: str, sandbox: str = "") -> str:
    """A page in a frame with its own origin and content policy: texts of the conversation and scripts stay inside.

    Args:
        sandbox: what the frame may do.
    """
    return f'<iframe class="tokens" title="{title}" sandbox="{sandbox}" srcdoc="{html.escape(document)}"></iframe>'


ANSWER_PANELS = (
    AnswerPanel("Base and tuned", _build_comparison, lambda session: session.is_adapter),
    AnswerPanel("Prompt tokens", _build_prompt_tokens),
    AnswerPanel("Why", _build_explanation),
)
"""The panels, in the order of their tabs."""
