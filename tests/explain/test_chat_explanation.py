"""Explanations of the last answer of a chat."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mmtune.chat.answer_settings import AnswerSettings
from mmtune.chat.session import ChatSession
from mmtune.chat.web.model_turns import ModelTurns
from mmtune.chat.web.page_conversation import PageConversation
from mmtune.data.message import Sample, text_message, text_of
from mmtune.explain.explanation_methods import explain
from mmtune.utils.errors import UserError


@pytest.fixture
def session(answering_llava: tuple[Any, Any], tmp_path: Path) -> ChatSession:
    """A chat of two questions, the first about an image."""
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)).save(tmp_path / "a.png")
    session = ChatSession(*answering_llava, AnswerSettings(4))
    session.set_system("Be brief.")
    session.attach(tmp_path / "a.png")
    for question in ("what is it?", "sure?"):
        assert "".join(session.ask(question)).strip()
    return session


def test_the_last_answer_is_explained_with_the_conversation_before_it(
    session: ChatSession, answering_llava: tuple[Any, Any]
) -> None:
    explanation, images = session.explain()
    answer = text_of(session.state.messages[-1]).strip()
    messages = [text_message("system", "Be brief."), *session.state.messages[:-1], text_message("assistant", answer)]
    assert explanation.to_dict() == explain(*answering_llava, Sample("chat", messages)).to_dict()
    assert explanation.answer == answer
    assert {"brief.", "what", "sure?"} <= {word.text for word in explanation.words}
    assert len(images) == len(explanation.images) == 1


def test_a_chat_without_an_answer_has_nothing_to_explain(answering_llava: tuple[Any, Any]) -> None:
    with pytest.raises(UserError, match="the conversation has no question yet"):
        ChatSession(*answering_llava).explain()


def test_the_page_explains_between_answers_and_stops(session: ChatSession, tmp_path: Path) -> None:
    conversation = PageConversation(session, ModelTurns(), tmp_path / "files")
    *waiting, result = conversation.explain()
    assert set(waiting) == {None}
    assert result is not None
    assert result[0].to_dict() == session.explain()[0].to_dict()
    steps = conversation.explain()
    next(steps)
    with pytest.raises(UserError, match="an answer is being written"):
        conversation.undo()
    conversation.stop()
    with pytest.raises(UserError, match="stopped: the answer is not explained"):
        next(steps)
    conversation.undo()
