"""Paths in a chat: parsing of arguments (shell words, dropped files, `file://` URIs) and their completion."""

from __future__ import annotations

import re
import shlex
from collections.abc import Collection, Iterable, Iterator
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from mmtune.data.media.media import EmbeddedMedia, MediaRules, resolve_media
from mmtune.data.media.media_names import is_windows_path
from mmtune.utils.errors import UserError
from mmtune.utils.files import expand_user

ANY_PATH = MediaRules(Path(), outside=True)
"""In a chat, an image may be any file on this machine."""


def image_paths(text: str) -> Iterator[tuple[str, Path | EmbeddedMedia]]:
    r"""The images in the argument of `/image`, each with its name as typed.

    Names are parsed as shell words: `'a b.png'`, `a\ b.png`, several per line. If the whole line is the path of an existing file,
    spaces included, it is that file. Backslashes may also separate folders.

    Raises:
        UserError: no name, an unclosed quote, or a name that is not an image file.
    """
    names = _names("/image", text)
    for name in names:
        try:
            yield name, resolve_image(name)
        except UserError as error:
            if len(names) == 1 or any(map(is_file, names)):
                raise
            raise UserError(f"{error}; put a path with spaces in quotes: /image 'my cat.png'") from error


def resolve_image(name: str) -> Path | EmbeddedMedia:
    """The image of a name: a path, a `file://` URI or a `data:` URI.

    Raises:
        UserError: a URL, or a name that is not a file.
    """
    if name.lower().startswith(("http://", "https://")):
        raise UserError(f"{name}: expected a local file, got a URL; download the file and give its path")
    try:
        return resolve_media(expand_user(name), ANY_PATH)
    except ValueError as error:
        raise UserError(str(error)) from error


def is_dropped_file(line: str) -> bool:
    """Whether a line is a single path, as file managers drop it into a terminal, and not a question or a command."""
    if line[:1].isspace() or "/" not in line:
        return False
    with suppress(UserError):
        names = _names("", line.strip())
        return len(names) == 1 and bool(resolve_image(names[0]))
    return False


def file_path(command: str, text: str) -> Path:
    """The path in the argument of a command that takes one file, which is parsed as that of `/image`.

    Raises:
        UserError: no name, several names, or an unclosed quote.
    """
    names = _names(command, text)
    if len(names) != 1:
        raise UserError(
            f"{command}: expected one file, got {len(names)}; put a path with spaces in quotes: {command} 'my chat.jsonl'"
        )
    return Path(expand_user(names[0]))


def _names(command: str, text: str) -> list[str]:
    if not text:
        raise UserError(f"{command}: expected a file: {command} FILE")
    if is_file(text):
        return [text]
    try:
        words = _words(text, escape="\\")
        if "\\" in text and not all(map(is_file, words)):
            folders = _words(text, escape="")  # a backslash between folders is not an escape
            if is_windows_path(text) or all(is_file(name.replace("\\", "/")) for name in folders):
                return folders
    except ValueError as error:
        raise UserError(f'{command} {text}: unclosed quote; put the path in quotes: {command} "it\'s.png"') from error
    return words


def _words(text: str, escape: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", escape
    return list(lexer)


def is_file(name: str) -> bool:
    """Whether a name is that of a file; False for one that cannot be a path."""
    with suppress(OSError, ValueError):  # for example a name that is too long, or has a null character
        return Path(expand_user(name)).is_file()
    return False


class CommandCompleter(Completer):
    """Completes commands, and the paths of those that take files, with spaces and quotes escaped.

    Args:
        commands: the chat commands; each starts with a slash.
        with_paths: those whose arguments are paths.
    """

    _LAST_WORD = re.compile(r"""(?:^|\s)(?P<word>'[^']*|"[^"]*|(?:\\.|[^\s\\'"])*)$""")

    def __init__(self, commands: Collection[str], with_paths: Collection[str]) -> None:
        self._commands = commands
        self._with_paths = with_paths
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if not space:
            yield from (Completion(f"{name} ", -len(text)) for name in self._commands if text and name.startswith(text))
        elif command in self._with_paths and (match := self._LAST_WORD.search(argument)):
            word = match["word"]
            is_quoted = word[:1] in ("'", '"')
            path = word[1:] if is_quoted else re.sub(r"\\(.)", r"\1", word)
            for completion in self._paths.get_completions(Document(path), complete_event):
                rest = completion.text + "/" * completion.display_text.endswith("/")
                yield Completion(rest if is_quoted else re.sub(r"([\s\\'\"])", r"\\\1", rest), display=completion.display)
