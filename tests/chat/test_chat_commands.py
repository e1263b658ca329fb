"""Chat commands: each leaves the conversation that plain transformers is asked with, and an error leaves it as it was."""

from __future__ import annotations

import base64
import copy
import io
import itertools
import json
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from PIL import Image
from plain_answers import plain_answer

from mmtune.chat.answer_settings import AnswerSettings
from mmtune.chat.commands import COMMANDS, command_help
from mmtune.chat.image_paths import resolve_image
from mmtune.chat.session import ChatSession
from mmtune.chat.terminal import run_chat
from mmtune.cli.main import entry_point
from mmtune.data.media.media import EmbeddedMedia
from mmtune.models.load import load_trained
from mmtune.utils.errors import UserError

torch.set_num_threads(1)

NEW = 8
SAMPLED = {"do_sample": True, "temperature": 50.0, "top_p": 0.9, "top_k": 0}


@pytest.fixture
def session(answering_llava: tuple[Any, Any]) -> ChatSession:
    return ChatSession(*answering_llava, AnswerSettings(NEW))


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / "chats" / "a.png", tmp_path / "elsewhere" / "b c.png"]
    for number, path in enumerate(paths):
        path.parent.mkdir()
        pixels = np.random.default_rng(number).integers(0, 256, (24, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path)
    return paths


@pytest.fixture
def plain(answering_llava: tuple[Any, Any]) -> Callable[..., str]:
    def answer(text: str, images: list[Path] | None = None, seed: int | None = None) -> str:
        settings = {}
        if seed is not None:
            torch.manual_seed(seed)
            settings = SAMPLED
        return plain_answer(*answering_llava, text, images or [], max_new_tokens=NEW, **settings)

    return answer


@pytest.fixture
def chat(session: ChatSession, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Types lines, and returns what was printed after the line about the commands."""

    def type_lines(*lines: str) -> str:
        monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
        run_chat(session)
        return capsys.readouterr().out.partition("\n")[2]

    return type_lines


def _prompt(*turns: str) -> str:
    roles = itertools.cycle(("<|user|>", "<|assistant|>"))
    return "".join(f"{role}{turn}<|end|>" for role, turn in zip(roles, turns, strict=False)) + "<|assistant|>"


def test_a_system_prompt_is_shown_set_and_removed(chat: Callable[..., str], plain: Callable[..., str]) -> None:
    with_system = plain(f"<|system|>Be brief.<|end|>{_prompt('so?')}")
    without = plain(_prompt("so?"))
    assert with_system != without
    printed = chat("/system", "/system  Be brief. ", "so?", "/reset", "so?", "/reset", '/system ""', "so?")
    reset = "(new conversation; the system prompt stays)\n"
    system = "(system prompt: Be brief.)\n"
    assert printed == f"(no system prompt)\n{system}{with_system}\n{reset}{with_system}\n{reset}(no system prompt)\n{without}\n"


def test_the_option_system_sets_the_system_prompt(capsys: pytest.CaptureFixture[str]) -> None:
    command = ["chat", "builtin:tiny-llava", "--prompt", "Which digit?", "--max-new-tokens", "3", "--json", "--system"]
    assert entry_point([*command, " "]) == 2
    assert capsys.readouterr().err == "error: --system: expected a text, got an empty one\n"
    model, processor = load_trained(Path("builtin:tiny-llava"))
    prompt = f"<|system|>7 7 7 7<|end|>{_prompt('Which digit?')}"
    answer = plain_answer(model, processor, prompt, [], max_new_tokens=3)
    assert answer != plain_answer(model, processor, _prompt("Which digit?"), [], max_new_tokens=3)
    assert entry_point([*command, "7 7 7 7"]) == 0
    assert json.loads(capsys.readouterr().out)["answer"] == answer


def test_a_command_without_a_question_or_with_a_line_that_fails_exits_with_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert entry_point(["chat", "builtin:tiny-llava", "--prompt", " "]) == 2
    assert capsys.readouterr().err == "error: --prompt: expected a text, got an empty one\n"
    for lines, code in (("/image none.png\n/undo\n/images\n", 2), ("/images\n", 0)):
        monkeypatch.setattr("sys.stdin", io.StringIO(lines))
        assert entry_point(["chat", "builtin:tiny-llava"]) == code
        printed = capsys.readouterr()
        assert printed.out.endswith("(no images)\n") and ("error: 2 lines of standard input failed" in printed.err) == (code == 2)


@pytest.mark.parametrize("template", ["{{ raise_exception('no system prompts') }}", ""])
def test_a_system_prompt_that_the_chat_template_does_not_write_is_an_error(
    answering_llava: tuple[Any, Any], template: str
) -> None:
    processor = copy.deepcopy(answering_llava[1])
    turn = "{% if message.role == 'system' %}" + template + "{% elif message.role == 'assistant' %}"
    processor.chat_template = processor.chat_template.replace("{%- if message.role == 'assistant' -%}", turn, 1)
    session = ChatSession(answering_llava[0], processor, AnswerSettings(NEW))
    with pytest.raises(UserError, match="no system prompts" if template else "the model's chat template leaves it out"):
        session.set_system("Be brief.")
    assert session.state.system is None


def test_sampled_answers_are_those_of_plain_transformers_with_the_seed(
    chat: Callable[..., str], plain: Callable[..., str]
) -> None:
    greedy, first, second, other = (plain(_prompt("so?"), seed=seed) for seed in (None, 5, 6, 9))
    assert len({greedy, first, second, other}) == 4
    chat("/set temperature 50", "/set top_p 0.9", "/set seed 5")
    assert chat("so?", "/retry", "/reset", "so?") == f"{first}\n{second}\n(new conversation)\n{first}\n"
    settings = "(temperature 50, top_p 0.9, seed {}, max_new_tokens 8)\n"
    assert chat("/set seed 9", "/retry", "/set seed 5", "/retry", "/retry") == (
        f"{settings.format(9)}{other}\n{settings.format(5)}{first}\n{second}\n"
    )
    assert chat("/edit so?", "/retry") == f"{first}\n{second}\n"
    shown = "(temperature 0 (greedy: top_p and seed have no effect), top_p 0.9, seed 5, max_new_tokens 8)\n"
    assert chat("/set temperature 0", "/set", "/retry", "/retry") == f"{shown}{shown}{greedy}\n{greedy}\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/set temprature 1", "unknown setting 'temprature'; did you mean 'temperature'?"),
        ("/set temperature", "/set temperature: expected a name and a value, such as /set temperature 0.7"),
        ("/set temperature warm", "temperature: expected a number, got 'warm'"),
        ("/set temperature nan", "temperature nan: expected 0 (greedy) or a number from 0.01 to 100"),
        ("/set temperature -1", "temperature -1: expected 0 (greedy) or a number from 0.01 to 100"),
        ("/set top_p 0", "top_p 0: expected a number above 0, and at most 1"),
        ("/set seed 1.5", "seed: expected an integer, got '1.5'"),
        ("/set seed -1", "seed -1: expected an integer from 0 to 4294967295"),
        ("/set max_new_tokens 0", "max_new_tokens 0: expected at least 1"),
        ("/detach", "/detach: no image is attached to your next question"),
        ("/undo", "the conversation has no question yet; ask one first"),
        ("/retry", "the conversation has no question yet; ask one first"),
        ("/edit so", "the conversation has no question yet; ask one first"),
        ("/save x.jsonl", "the conversation has no question yet; ask one first"),
        (
            "/compare",
            "/compare: expected an adapter on its base, got a full model; chat with an adapter's run, not with a merged model",
        ),
        ("/reset now", "/reset: expected no argument, got 'now'"),
        ("/load a b", "/load: expected one file, got 2; put a path with spaces in quotes: /load 'my chat.jsonl'"),
        ("/Retry", "unknown command /Retry; did you mean /retry? (a question that begins with / needs a space before it)"),
        ("/bye", "unknown command /bye; did you mean /exit? (a question that begins with / needs a space before it)"),
        ("/xyzzy", "unknown command /xyzzy; /help lists the commands (a question that begins with / needs a space before it)"),
    ],
)
def test_an_error_of_a_command_is_one_line(line: str, error: str, session: ChatSession, chat: Callable[..., str]) -> None:
    state, settings = session.state, session.settings
    assert chat(line) == f"({error})\n"
    assert (session.state, session.settings) == (state, settings)


@pytest.mark.parametrize("command", ["", "/load ", "/save ", "/image "])
@pytest.mark.parametrize("name", ["/" + "x" * 300, "/" + "x" * 300 + "/c.jsonl", "a\0b/c.jsonl"])
def test_a_name_that_cannot_be_a_path_is_one_line(command: str, name: str, chat: Callable[..., str]) -> None:
    printed = chat("so?", command + name) if command or name.startswith("/") else "()"
    assert printed.splitlines()[-1].startswith("(") and printed.splitlines()[-1].endswith(")")


def test_a_question_may_begin_with_a_slash(chat: Callable[..., str], plain: Callable[..., str], images: list[Path]) -> None:
    assert chat(" /usr/bin?") == plain(_prompt("/usr/bin?")) + "\n"
    assert f"an image is attached with /image {images[0]} (" in chat(f"{images[0]} what?")


def test_a_dropped_file_is_not_a_question(session: ChatSession, chat: Callable[..., str], images: list[Path]) -> None:
    path = images[1]
    for line in (f"'{path}'", str(path).replace(" ", r"\ "), str(path), path.as_uri()):
        assert chat(line) == f"(expected a question, got a file; /image {line} attaches it)\n"
        assert chat(f"/image {line}", "/detach").endswith("(detached 1 image)\n")
    assert session.state.messages == ()
    chat(f" {path}", f"what is in {images[0]}?", "/nowhere/a.png or 'b.png'")
    assert len(session.state.messages) == 4


def test_help_lists_every_command(chat: Callable[..., str]) -> None:
    assert chat("/help").splitlines() == command_help()
    assert [line.split()[0].rstrip(":") for line in command_help()] == list(COMMANDS)


def test_undo_attaches_the_images_of_the_question_again(
    session: ChatSession, chat: Callable[..., str], plain: Callable[..., str], images: list[Path]
) -> None:
    first, second = images
    chat("/set max_new_tokens 8", "so?", f"/image {first}", "what?", f"/image '{second}'")
    printed = chat("/undo", "/images", "and these?")
    answer = plain(_prompt("so?", plain(_prompt("so?")), "<image>\n<image>\nand these?"), images)
    assert printed == (
        "(removed the question 'what?' and its answer; 2 images attached to your next question)\n"
        f"attached to your next question: {first}, 40 x 24\nattached to your next question: {second}, 40 x 24\n{answer}\n"
    )
    assert chat(f"/image {first} {first}", "/detach", "/images").endswith(
        f"(detached 2 images)\nquestion 2: {first}, 40 x 24\nquestion 2: {second}, 40 x 24\n"
    )
    chat("/undo", "/undo")
    assert session.state.messages == () and len(session.state.attached) == 2


def test_retry_and_edit_ask_with_the_images_of_the_last_question(
    chat: Callable[..., str], plain: Callable[..., str], images: list[Path]
) -> None:
    first, second = images
    answer, edited = plain(_prompt("<image>\nwhat?"), [first]), plain(_prompt("<image>\nwho?"), [first])
    chat(f"/image {first}", "what?", f"/image '{second}'")
    assert chat("/retry", "/edit who?") == f"{answer}\n{edited}\n"
    assert chat("/edit") == "(/edit: expected the new text of the last question: /edit NEW TEXT)\n"
    after = plain(_prompt("<image>\nwho?", edited, "<image>\nand this?"), images)
    assert chat("and this?") == f"{after}\n"


@pytest.mark.parametrize("again", [ChatSession.retry, lambda session: session.edit("who?")])
def test_a_stopped_repeat_replaces_the_answer_only_by_text_that_was_shown(
    again: Callable[[ChatSession], Any], session: ChatSession, images: list[Path]
) -> None:
    session.attach(images[0])
    list(session.ask("what?"))
    session.attach(images[1])
    state = session.state
    with closing(again(session)):
        pass
    assert session.state is state
    with closing(again(session)) as chunks:
        shown = "".join(itertools.islice((chunk for chunk in chunks if chunk), 2))
    assert session.state.messages[-1]["content"] == [{"type": "text", "text": shown}]
    assert len(session.state.messages) == 2 and session.state.attached == state.attached


@pytest.mark.parametrize("start", [lambda session: session.ask("so?"), ChatSession.retry, lambda session: session.edit("who?")])
def test_ctrl_c_before_the_first_token_leaves_the_conversation(
    start: Callable[[ChatSession], Any], session: ChatSession, images: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    list(session.ask("what?"))
    session.attach(images[0])
    state = session.state

    def interrupted(*arguments: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mmtune.chat.session.encode_prompt", interrupted)
    with pytest.raises(KeyboardInterrupt):
        list(start(session))
    assert session.state is state


def test_ctrl_c_while_an_answer_is_computed_keeps_the_text_that_was_shown(session: ChatSession) -> None:
    chunks = session.ask("what?")
    shown = next(chunk for chunk in chunks if chunk)
    with pytest.raises(KeyboardInterrupt):
        chunks.throw(KeyboardInterrupt)
    assert session.state.messages[-1]["content"] == [{"type": "text", "text": shown}]


@pytest.mark.parametrize(
    ("failure", "shown"),
    [
        (RuntimeError("a bug"), (RuntimeError, "^a bug$")),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), (UserError, "CUDA out of memory; shorten the")),
    ],
)
def test_a_failure_of_a_repeat_leaves_the_conversation(
    failure: Exception, shown: tuple[Any, str], session: ChatSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    list(session.ask("what?"))
    state = session.state

    def fails(*args: Any, streamer: Any, **settings: Any) -> None:
        streamer.put(torch.tensor([1]))
        raise failure

    monkeypatch.setattr(session._model, "generate", fails)
    with pytest.raises(shown[0], match=shown[1]):
        list(session.retry())
    assert session.state is state


def test_tokens_are_those_of_the_processor(
    session: ChatSession, answering_llava: tuple[Any, Any], chat: Callable[..., str], images: list[Path]
) -> None:
    _, processor = answering_llava
    answer = chat("/system Be brief.", f"/image {images[0]}", "what?").splitlines()[-1]
    text = f"<|system|>Be brief.<|end|>{_prompt(f'<image>{chr(10)}what?', answer, '<image>' + chr(10))}"
    ids = processor(text=text, images=[Image.open(path) for path in images])["input_ids"][0]
    image = ids.count(processor.image_token_id)
    expected = (
        f"{len(ids)} tokens: {len(ids) - image} text tokens, {image} image tokens (2 images); the model's maximum is 512, with"
    )
    assert f"(the prompt so far: {expected} your question and the answer)" in chat(f"/image '{images[1]}'", "/tokens")


def test_a_prompt_longer_than_the_models_maximum_is_reported(
    session: ChatSession, chat: Callable[..., str], monkeypatch: pytest.MonkeyPatch
) -> None:
    maximum = session._model.config.get_text_config().max_position_embeddings
    assert "the model's maximum" not in chat("what?")
    assert chat("x " * maximum).endswith(
        f"(the prompt had {session.prompt_tokens:,} tokens, more than the model's maximum of {maximum:,}: do not rely on the "
        "answer; /undo or /reset shortens the conversation)\n"
    )
    assert session.prompt_tokens > maximum
    assert "more than the model's maximum" not in chat("/undo", "/retry")


# --------------------------------------------------------------------------------------------------------------- files


def test_a_saved_conversation_trains_and_continues_where_it_was(
    answering_llava: tuple[Any, Any],
    session: ChatSession,
    chat: Callable[..., str],
    plain: Callable[..., str],
    images: list[Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "chats" / "my chat.jsonl"
    chat("/system Be brief.", f"/image {images[0]} '{images[1]}'", "what?", "and <image>?", f"/image {images[0]}")
    session.state.messages[1]["content"][0]["text"] = " yes\n"
    printed = chat(f"/save '{out}'")
    assert printed == f"(saved: {out}: a system prompt, 2 questions, 2 images; without the 1 attached image)\n"
    row = json.loads(out.read_text())
    assert row["id"] == "my chat" and [message["role"] for message in row["messages"]] == ["system", *["user", "assistant"] * 2]
    first, second, text = row["messages"][1]["content"]
    assert first == {"type": "image", "image": "a.png"} and text == {"type": "text", "text": "what?"}
    assert second["image"].startswith("data:image;base64,") and row["messages"][2]["content"] == "yes"
    assert entry_point(["data", "check", str(out), "--template", "messages", "--decode"]) == 0
    capsys.readouterr()

    session.state.messages[1]["content"][0]["text"] = "yes"
    state = session.state
    expected = "".join(session.ask("sure?"))
    images[1].unlink()
    other = ChatSession(*answering_llava, AnswerSettings(NEW))
    other.load(out)
    assert other.state.attached == () and other.state.system == "Be brief."
    other.attach(images[0])
    assert "".join(other.ask("sure?")) == expected
    names = [view.image.name for _, view in other.state.images if isinstance(view.image, EmbeddedMedia)]
    assert names == [str(images[0]), "data: URI", str(images[0])]

    again = out.with_name("again.jsonl")
    other.undo()
    other.save(again)
    assert json.loads(again.read_text())["messages"] == row["messages"]
    assert len(state.messages) == 4


def test_only_a_file_that_this_chat_wrote_is_replaced(
    answering_llava: tuple[Any, Any], session: ChatSession, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, link = tmp_path / "chat.jsonl", tmp_path / "link.jsonl"
    link.symlink_to(tmp_path / "nowhere.jsonl")
    list(session.ask("what?"))
    session.save(out)
    list(session.ask("sure?"))
    session.save(out)
    assert len(json.loads(out.read_text())["messages"]) == 4
    other = ChatSession(*answering_llava, AnswerSettings(NEW))
    other.load(out)
    for path in (out, link):
        with pytest.raises(UserError, match=r"\.jsonl: exists, and was not written by this chat; give another name"):
            other.save(path)
    out.write_text("edited")
    with pytest.raises(UserError, match="exists, and was not written by this chat"):
        session.save(out)
    assert out.read_text() == "edited" and link.is_symlink() and not link.exists()
    (tmp_path / "folder.jsonl").mkdir()
    for name, error in (
        ("chat.txt", "expected a file name that ends in .jsonl"),
        ("none/chat.jsonl", "no such folder: "),
        ("folder.jsonl", "exists, and was not written by this chat"),
        (f"{'x' * 300}.jsonl", "File name too long"),
    ):
        with pytest.raises(UserError, match=error):
            session.save(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["chat.jsonl", "folder.jsonl", "link.jsonl"]


def test_an_image_stays_as_it_was_attached_when_its_file_is_deleted_or_replaced(
    session: ChatSession, chat: Callable[..., str], plain: Callable[..., str], images: list[Path], tmp_path: Path
) -> None:
    files = [tmp_path / "deleted.png", tmp_path / "replaced.png", tmp_path / "present.png"]
    for file, image in zip(files, [*images, images[0]], strict=True):
        file.write_bytes(image.read_bytes())
    answer = plain(_prompt("<image>\n<image>\n<image>\nwhat?"), [*images, images[0]])
    assert chat(f"/image {' '.join(map(str, files))}", "what?").endswith(f"\n{answer}\n")
    files[0].unlink()
    Image.new("RGB", (64, 64)).save(files[1])
    assert chat("/retry") == f"{answer}\n"
    assert chat("/images") == "".join(f"question 1: {file}, 40 x 24\n" for file in files)
    session.save(tmp_path / "chat.jsonl")
    saved = json.loads((tmp_path / "chat.jsonl").read_text())["messages"][0]["content"]
    assert saved[2]["image"] == "present.png"
    for block, image in zip(saved, images, strict=False):
        assert base64.b64decode(block["image"].removeprefix("data:image;base64,")) == image.read_bytes()
    session.load(tmp_path / "chat.jsonl")
    files[2].unlink()
    assert chat("/retry") == f"{answer}\n"
    session.save(tmp_path / "again.jsonl")


def test_a_conversation_that_cannot_train_or_is_not_whole_is_not_saved(session: ChatSession, tmp_path: Path) -> None:
    session.set_value("max_new_tokens", "1000000")
    with closing(session.ask("what?")) as chunks:
        next(chunk for chunk in chunks if chunk)
    session.state.messages[-1]["content"][0]["text"] = " \n"
    with pytest.raises(UserError, match=r"a\.jsonl: messages\[1\]: the answer is empty"):
        session.save(tmp_path / "a.jsonl")
    assert not (tmp_path / "a.jsonl").exists()


ANSWER = {"role": "assistant", "content": "yes"}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}


def _asked(*blocks: Any) -> list[Any]:
    return [{"role": "user", "content": [*blocks, {"type": "text", "text": "what?"}]}, ANSWER]


@pytest.mark.parametrize(
    ("content", "error"),
    [
        (b"", "has no rows"),
        ([{"image": "a.png", "conversations": []}], "row in the form of the template `messages`, got the keys image, conv"),
        (b"\x00\xff\x93", "expected UTF-8 text"),
        (b'{"messages": [', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON|levels of nested lists"),
        ([{"messages": _asked()}, {"messages": _asked()}], "expected a file of one row, got 2"),
        ([[1]], "expected an object, got list|not valid JSON"),
        ([{"messages": []}], "expected a list of turns"),
        ([{"messages": [{"role": "user", "content": "what?"}]}], "expected an answer as the last turn|no supervised token"),
        ([{"messages": [ANSWER]}], "expected turns that alternate"),
        ([{"messages": [{"role": "root", "content": "x"}, ANSWER]}], "unknown role 'root'"),
        (
            [{"messages": _asked({"type": "image", "image": "../elsewhere/b c.png"})}],
            "is outside media_root .*; copy the file into this folder$",
        ),
        (
            [{"messages": _asked({"type": "image", "image": "/etc/passwd"})}],
            "is outside media_root .*; copy the file into this folder$",
        ),
        ([{"messages": _asked({"type": "image", "image": "http://127.0.0.1:9/a.png"})}], "is a URL; download it into"),
        ([{"messages": _asked({"type": "image", "image": "none.png"})}], "no such file"),
        ([{"messages": _asked({"type": "image", "image": "data:image;base64,AAAA"})}], "cannot open image"),
        ([{"messages": _asked({"type": "image", "image": "hostile.jsonl"})}], "cannot open image"),
        ([{"messages": _asked({"type": "video", "video": "a.png"})}], "got video, which is not supported"),
        ([{"messages": [*_asked(), {"role": "user", "content": "\ud800"}, ANSWER]}], "not valid Unicode"),
        (
            [{"messages": [{"role": "system", "content": [{"type": "image", "image": "a.png"}]}, *_asked()]}],
            "images in a system prompt are not supported",
        ),
        ([{"messages": [_asked()[0], CALL, {"role": "tool", "content": "1"}, ANSWER]}], "tool calls are not supported"),
    ],
)
def test_a_file_that_is_not_a_conversation_leaves_the_present_one(
    content: Any, error: str, session: ChatSession, images: list[Path], tmp_path: Path
) -> None:
    path = tmp_path / "chats" / "hostile.jsonl"
    path.write_bytes(content if isinstance(content, bytes) else "".join(json.dumps(row) + "\n" for row in content).encode())
    session.set_system("Be brief.")
    session.attach(images[0])
    list(session.ask("what?"))
    state = session.state
    with pytest.raises(UserError, match=error) as caught:
        session.load(path)
    assert session.state is state and "\n" not in str(caught.value) and len(str(caught.value)) < 600


@pytest.mark.parametrize(
    ("name", "error"), [("chats", "expected a file"), ("x.jsonl", "no such file"), ("a.png", r"expected a \.json")]
)
def test_a_path_that_is_no_conversation_is_an_error(name: str, error: str, session: ChatSession, images: list[Path]) -> None:
    folder = images[0].parent.parent
    with pytest.raises(UserError, match=error):
        session.load(images[0] if name == "a.png" else folder / name)


# ------------------------------------------------------------------------------------------------------------- compare


@pytest.mark.parametrize("method", ["lora", "prompt"])
@pytest.mark.parametrize("seed", [None, 5])
def test_compare_gives_the_answers_of_base_and_tuned_model(
    method: str,
    seed: int | None,
    answering_llava: tuple[Any, Any],
    plain: Callable[..., str],
    images: list[Path],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    base, processor = answering_llava
    configs = {
        "lora": LoraConfig(
            target_modules=["q_proj", "v_proj"], modules_to_save=["multi_modal_projector"], init_lora_weights=False
        ),
        "prompt": PromptTuningConfig(
            task_type="CAUSAL_LM",
            modules_to_save=["multi_modal_projector"],
            num_virtual_tokens=2,
            token_dim=base.config.text_config.hidden_size,
            num_layers=2,
            num_attention_heads=2,
            num_transformer_submodules=1,
        ),
    }
    torch.manual_seed(0)
    tuned = get_peft_model(copy.deepcopy(base), configs[method]).eval()
    for name, parameter in tuned.named_parameters():
        if "modules_to_save" in name:
            parameter.data *= -1
    session = ChatSession(tuned, processor, AnswerSettings(NEW))
    if seed is not None:
        for name, value in (("temperature", "50"), ("top_p", "0.9"), ("seed", str(seed))):
            session.set_value(name, value)
    session.attach(resolve_image(str(images[0])))
    answer = "".join(session.ask("what?"))
    state = session.state
    monkeypatch.setattr("sys.stdin", io.StringIO("/compare\n/retry\n"))
    run_chat(session)
    printed = capsys.readouterr().out.partition("\n")[2]
    of_base = plain(_prompt("<image>\nwhat?"), [images[0]], seed)
    assert printed.startswith(f"(base:)\n{of_base}\n(tuned:)\n{answer}\n") and of_base != answer
    assert session.state.messages[:-1] == state.messages[:-1]
    if seed is None:
        assert printed.endswith(f"\n{answer}\n")  # the adapter is on again
