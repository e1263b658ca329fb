"""Images as a person names them in a conversation: shell words, dropped files, `file://` URIs; and their completion."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document

from mmtune.data.media.media import EmbeddedMedia, MediaRules, resolve_media
from mmtune.data.media.media_names import is_windows_path
from mmtune.utils.errors import UserError
from mmtune.utils.files import expand_user

ANY_PATH = MediaRules(Path(), outside=True)
"""A person at the terminal may show any file of the machine."""


def image_paths(text: str) -> Iterator[tuple[str, Path | EmbeddedMedia]]:
    r"""The images that a line names, each with the name as it was given.

    Names are read as a shell reads words: `'a b.png'`, `a\ b.png`, several in a line. A line that is the path of a file is that
    file, with its spaces. Backslashes may also separate folders.

    Raises:
        UserError: no name, a quote that is not closed, or a name that no image can be found by.
    """
    names = _names(text)
    for name in names:
        try:
            yield name, resolve_image(name)
        except UserError as error:
            if len(names) == 1 or any(map(_is_file, names)):
                raise
            raise UserError(f"{error}; a path with spaces is written in quotes: /image 'my cat.png'") from error


def resolve_image(name: str) -> Path | EmbeddedMedia:
    """The image of one name: a path, a `file://` or a `data:` URI.

    Raises:
        UserError: a name that no image can be found by.
    """
    if name.lower().startswith(("http://", "https://")):
        raise UserError(f"{name}: a URL; download the file and give its path")
    try:
        return resolve_media(expand_user(name), ANY_PATH)
    except ValueError as error:
        raise UserError(str(error)) from error


def _names(text: str) -> list[str]:
    if not text:
        raise UserError("/image FILE ...: name an image file")
    if _is_file(text):
        return [text]
    try:
        words = _words(text, escape="\\")
        if "\\" in text and not all(map(_is_file, words)):
            folders = _words(text, escape="")  # a backslash between folders is not an escape
            if is_windows_path(text) or all(_is_file(name.replace("\\", "/")) for name in folders):
                return folders
    except ValueError as error:
        raise UserError(f'/image {text}: a quote is not closed; write the path in quotes, as in /image "it\'s.png"') from error
    return words


def _words(text: str, escape: str) -> list[str]:
    lexer = shlex.shlex(text, posix=True, punctuation_chars=False)
    lexer.whitespace_split, lexer.commenters, lexer.escape = True, "", escape
    return list(lexer)


def _is_file(name: str) -> bool:
    with suppress(OSError):  # too long a name, for one
        return Path(expand_user(name)).is_file()
    return False


class ImagePathCompleter(Completer):
    """Completes commands, and after `/image` paths, with spaces and quotes escaped.

    Args:
        commands: each begins with a slash.
    """

    _LAST_WORD = re.compile(r"""(?:^|\s)(?P<word>'[^']*|"[^"]*|(?:\\.|[^\s\\'"])*)$""")

    def __init__(self, commands: Sequence[str]) -> None:
        self._commands = commands
        self._paths = PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        text = document.text_before_cursor
        command, space, argument = text.partition(" ")
        if not space:
            yield from (Completion(f"{name} ", -len(text)) for name in self._commands if text and name.startswith(text))
        elif command == "/image" and (found := self._LAST_WORD.search(argument)):
            word = found["word"]
            is_quoted = word[:1] in ("'", '"')
            path = word[1:] if is_quoted else re.sub(r"\\(.)", r"\1", word)
            for each in self._paths.get_completions(Document(path), complete_event):
                rest = each.text + "/" * each.display_text.endswith("/")
                yield Completion(rest if is_quoted else re.sub(r"([\s\\'\"])", r"\\\1", rest), display=each.display)
