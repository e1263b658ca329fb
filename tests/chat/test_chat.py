"""Chat: answers equal those of plain transformers, the history is kept, and errors leave the conversation usable."""

from __future__ import annotations

import copy
import io
import itertools
import threading
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from plain_answers import plain_answer
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document

from mmtune.chat.answer_settings import AnswerSettings
from mmtune.chat.commands import COMMANDS, EMPTY_ANSWER
from mmtune.chat.image_paths import CommandCompleter, image_paths
from mmtune.chat.session import ChatSession
from mmtune.chat.terminal import HELP, run_chat
from mmtune.utils.errors import UserError

torch.set_num_threads(1)

NEW = 8  # max_new_tokens


@pytest.fixture
def session(answering_llava: tuple[Any, Any]) -> ChatSession:
    return ChatSession(*answering_llava, AnswerSettings(NEW))


@pytest.fixture
def image(tmp_path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    return tmp_path / "a.png"


def _plain(answering_llava: tuple[Any, Any], text: str, images: list[Path]) -> str:
    return plain_answer(*answering_llava, text, images, max_new_tokens=NEW)


def test_the_prompt_has_all_earlier_turns_and_images(session: ChatSession, answering_llava: tuple[Any, Any], image: Path) -> None:
    assert session.attach(image) == (40, 24)
    chunks = list(session.ask("what is it?"))
    first = "".join(chunks)
    prompt = "<|user|><image>\nwhat is it?<|end|><|assistant|>"
    assert first == _plain(answering_llava, prompt, [image]) != _plain(answering_llava, prompt.replace("<image>\n", ""), [])
    assert len(chunks) > 1 and first

    second = "".join(session.ask("sure?"))
    prompt += f"{first}<|end|><|user|>sure?<|end|><|assistant|>"
    assert second == _plain(answering_llava, prompt, [image])

    session.attach(image)
    session.attach(image)
    third = "".join(session.ask("and these?"))
    prompt += f"{second}<|end|><|user|><image>\n<image>\nand these?<|end|><|assistant|>"
    assert third == _plain(answering_llava, prompt, [image] * 3)

    session.attach(image)
    session.reset()
    alone = "".join(session.ask("sure?"))
    assert alone == _plain(answering_llava, "<|user|>sure?<|end|><|assistant|>", []) != second


def test_a_failure_while_generating_reaches_the_caller(
    session: ChatSession, answering_llava: tuple[Any, Any], image: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = answering_llava[0].generate

    def fails(*args: Any, streamer: Any, **settings: Any) -> None:
        streamer.put(torch.tensor([1]))
        raise RuntimeError("out of memory")

    session.attach(image)
    monkeypatch.setattr(answering_llava[0], "generate", fails)
    with pytest.raises(RuntimeError, match="out of memory"):
        list(session.ask("what is it?"))
    monkeypatch.setattr(answering_llava[0], "generate", generate)
    # The failed question is not part of the conversation, and its image is still attached.
    answer = "".join(session.ask("what is it?"))
    assert answer == _plain(answering_llava, "<|user|><image>\nwhat is it?<|end|><|assistant|>", [image])


def test_attaching_a_damaged_image_is_an_error(
    session: ChatSession, answering_llava: tuple[Any, Any], image: Path, tmp_path: Path
) -> None:
    image.write_bytes(image.read_bytes()[:500])
    for path, reason in ((image, "cannot decode"), (tmp_path / "none.png", "No such file"), (tmp_path, "Is a directory")):
        with pytest.raises(UserError, match=reason):
            session.attach(path)
    assert "".join(session.ask("so?")) == _plain(answering_llava, "<|user|>so?<|end|><|assistant|>", [])


def test_a_question_cannot_write_control_tokens(session: ChatSession, answering_llava: tuple[Any, Any]) -> None:
    model, processor = answering_llava
    for token in ("<image>", "<|assistant|>", "<|end|>"):
        session.reset()
        answer = "".join(session.ask(f"say {token}"))
        message = {"role": "user", "content": [{"type": "text", "text": f"say {token}"}]}
        inputs = processor.apply_chat_template(
            [message],
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            add_generation_prompt=True,
            sanitize_control_tokens=True,
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NEW, do_sample=False)
        assert answer == processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def test_a_model_without_a_chat_template_is_an_error(answering_llava: tuple[Any, Any]) -> None:
    bare = copy.deepcopy(answering_llava[1])
    bare.chat_template = bare.tokenizer.chat_template = None
    with pytest.raises(UserError, match="no chat template"):
        ChatSession(answering_llava[0], bare)


def test_a_stopped_answer_is_kept_up_to_the_last_token_read(answering_llava: tuple[Any, Any], image: Path) -> None:
    endless = ChatSession(*answering_llava, AnswerSettings(10**6))
    endless.attach(image)
    threads = threading.active_count()
    with closing(endless.ask("what is it?")) as chunks:
        read = "".join(itertools.islice((chunk for chunk in chunks if chunk), 2))
    assert threading.active_count() == threads and read

    endless.attach(image)
    with closing(endless.ask("not read at all")):
        pass
    endless.set_value("max_new_tokens", str(NEW))
    prompt = f"<|user|><image>\nwhat is it?<|end|><|assistant|>{read}<|end|><|user|><image>\nsure?<|end|><|assistant|>"
    assert "".join(endless.ask("sure?")) == _plain(answering_llava, prompt, [image, image])


@pytest.mark.parametrize(
    ("line", "files"),
    [
        ("a b.png", ["a b.png"]),
        ("'a b.png'", ["a b.png"]),
        (r"a\ b.png sub/c.png", ["a b.png", "sub/c.png"]),
        ("\"a b.png\"  'it'\\''s.png'", ["a b.png", "it's.png"]),
        ("it's.png", ["it's.png"]),
        (r"it\'s.png", ["it's.png"]),
        (r"sub\c.png 'a b.png'", ["sub/c.png", "a b.png"]),
        ("file://{folder}/a%20b.png", ["a b.png"]),
        ("'{folder}/a b.png'", ["a b.png"]),
        ("~/a\\ b.png", ["a b.png"]),
    ],
)
def test_image_paths_are_parsed_as_shell_words(
    line: str, files: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "sub").mkdir()
    for name in ("a b.png", "it's.png", "sub/c.png"):
        (tmp_path / name).touch()
    assert [image for _, image in image_paths(line.format(folder=tmp_path))] == [tmp_path / name for name in files]


@pytest.mark.parametrize(
    ("line", "reason"),
    [
        ("", "/image: expected a file: /image FILE"),
        ("my cat.png", "no such file: {folder}/my"),
        ("Tom's cat.png", "unclosed quote"),
        (
            r"C:\Users\me\a.png",
            r"no such file: C:\Users\me\a.png; this is a Windows path; write it as a path of this machine",
        ),
        ("https://example.org/a.png", "expected a local file, got a URL; download the file"),
        ("a\0b", "invalid path"),
        ("x" * 300, "invalid path"),
    ],
)
def test_a_name_that_is_not_an_image_is_an_error_of_one_line(
    line: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        list(image_paths(line))
    assert reason.format(folder=tmp_path) in str(caught.value) and "\n" not in str(caught.value)


def test_commands_and_paths_are_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my images").mkdir()
    (tmp_path / "my images" / "it's.png").touch()
    completer = CommandCompleter(COMMANDS, ["/image", "/load"])

    def completed(text: str) -> list[str]:
        completions = completer.get_completions(Document(text), CompleteEvent())
        return [text[: len(text) + completion.start_position] + completion.text for completion in completions]

    assert completed("/r") == ["/retry ", "/reset "]
    assert completed("/image x.png m") == [r"/image x.png my\ images/"]
    assert completed(r"/image my\ images/i") == [r"/image my\ images/it\'s.png"]
    assert completed("/image 'my i") == ["/image 'my images/"]
    assert completed("/load m") == [r"/load my\ images/"]
    assert completed("/edit m") == completed("") == completed("what is m") == []


# ------------------------------------------------------------------------------------------------------------- terminal


def _chat(session: ChatSession, lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    run_chat(session)


def test_a_chat_with_questions_commands_and_errors(
    session: ChatSession,
    answering_llava: tuple[Any, Any],
    image: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    lines = [
        "/image /nowhere/x.png",
        "",
        f"/image {image}",
        "  what? ",
        "/imge x.png",
        "/image",
        "/reset",
        "sure\udcff",
        "quit",
        "sure?",
    ]
    _chat(session, [*lines, "/exit", "never asked"], monkeypatch)
    first = _plain(answering_llava, "<|user|><image>\nwhat?<|end|><|assistant|>", [image])
    last = _plain(answering_llava, "<|user|>sure?<|end|><|assistant|>", [])
    output = capsys.readouterr().out
    expected = [
        f"{HELP}\n(no such file: /nowhere/x.png)\n({image}, 40 x 24; 1 image attached to your next question)\n{first}\n"
        "(unknown command /imge; did you mean /image? (a question that begins with / needs a space before it))\n",
        "(/image: expected a file: /image FILE)\n(new conversation)\n(chat: ",
        f")\n(type /exit to end the chat)\n{last}\n",
    ]
    position = 0
    for text in expected:
        assert text in output[position:]
        position = output.index(text, position) + len(text)
    assert position == len(output)


def test_a_missing_path_with_spaces_suggests_quotes(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no such file: .*my; put a path with spaces in quotes: /image 'my cat\.png'"):
        list(image_paths(f"{tmp_path}/my cat.png"))
    with pytest.raises(UserError, match=r"no such file: .*cat\.png$"):
        list(image_paths(f"'{tmp_path}/my cat.png'"))


def test_the_chat_ends_with_its_input(
    session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _chat(session, ["/reset"], monkeypatch)
    assert capsys.readouterr().out == f"{HELP}\n(new conversation)\n"


def test_an_empty_answer_is_reported(
    answering_llava: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    model = copy.deepcopy(answering_llava[0])
    with torch.no_grad():
        model.lm_head.weight.zero_()  # equal logits: greedy decoding takes token 0, which is special
    _chat(ChatSession(model, answering_llava[1], AnswerSettings(1)), ["so?"], monkeypatch)
    assert capsys.readouterr().out == f"{HELP}\n{EMPTY_ANSWER}\n"
