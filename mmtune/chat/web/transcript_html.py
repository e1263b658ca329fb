"""A conversation as HTML: questions and answers as plain text, their images, and the regions of answers drawn on them.

gradio's Chatbot component is not used: it shows HTML in texts also without Markdown, and has buttons that share images.
"""

from __future__ import annotations

import html
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from mmtune.chat.commands import EMPTY_ANSWER
from mmtune.chat.web.page_conversation import PageConversation
from mmtune.data.media.media import ImageView
from mmtune.data.message import Message, images_in, text_of

SPEAKERS = {"user": "You", "assistant": "Model"}
PLACEHOLDER = (
    '<p class="placeholder">Ask a question. Images can be attached, dropped or pasted. '
    "Enter sends, Shift+Enter breaks the line.</p>"
)


def history_html(conversation: PageConversation) -> str:
    """The messages of a conversation, without an answer that is being written."""
    writing = conversation.writing
    messages = conversation.session.state.messages if writing is None else writing.messages
    articles = [_article(conversation, messages[: index + 1]) for index in range(len(messages))]
    return "".join(articles) or PLACEHOLDER


def writing_html(conversation: PageConversation) -> str:
    """The answer that is being written; empty without one."""
    if conversation.writing is None:
        return ""
    return _message("assistant", conversation.writing.text, "", "writing")


def _article(conversation: PageConversation, messages: Sequence[Message]) -> str:
    """The last of some messages."""
    message, text = messages[-1], text_of(messages[-1])
    if message["role"] == "user":
        images = "".join(_figure(*conversation.images.original(view)) for view in images_in(message))
        return _message("user", text, images)
    view = _image_of_answer(messages)
    drawn = "" if view is None else _figure(*conversation.images.with_regions(view, text))
    if not text.strip():
        return _message("assistant", EMPTY_ANSWER, "", "empty")
    return _message("assistant", text, drawn)


def _message(role: str, text: str, figures: str, kind: str = "") -> str:
    shown = f'<div class="text">{html.escape(text)}</div>' if text or kind == "writing" else ""
    copy = '<button type="button" class="copy">Copy</button>' if text and not kind else ""
    figures = f'<div class="figures">{figures}</div>' if figures else ""
    heading = f'<h2 class="speaker">{SPEAKERS[role]}</h2>'
    # An answer has its text before the drawn image, a question its images before the text, as the prompt has them.
    content = f"{figures}{shown}" if role == "user" else f"{shown}{figures}"
    return f'<article class="{role} {kind}">{heading}{content}{copy}</article>'


def _image_of_answer(messages: Sequence[Message]) -> ImageView | None:
    """The only image of the last question, or of the conversation: with several, the answer does not say which one it means."""
    questions = messages[:-1][::-2]
    for images in (images_in(questions[0]), [view for question in questions for view in images_in(question)]):
        if images:
            return images[0] if len(images) == 1 else None
    return None


def _figure(path: Path | None, description: str) -> str:
    if path is None:
        return ""
    address, caption = f"gradio_api/file={quote(str(path))}", html.escape(description)
    link = f'<a href="{address}" target="_blank" rel="noopener"><img src="{address}" alt="{caption}"></a>'
    return f"<figure>{link}<figcaption>{caption}</figcaption></figure>"
