"""Unread media: keys of a row, a turn or a block that refer to media which the data template does not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mmtune.data.media.media import EmbeddedMedia
from mmtune.data.media.media_names import DETAIL_KEYS, IMAGE_IN_BASE64, WRAPPERS
from mmtune.data.message import RowError

SUFFIXES: dict[str, tuple[str, ...]] = {
    "image": (
        *(".jpg", ".jpeg", ".jfif", ".png", ".gif", ".webp", ".bmp", ".tif", ".tiff", ".avif", ".heic", ".jp2"),
        *(".ppm", ".pgm", ".pbm"),
    ),
    "video": (".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg", ".wmv", ".flv"),
    "audio": (".wav", ".mp3", ".flac", ".ogg", ".opus", ".m4a", ".aac", ".wma"),
}
"""File extensions of media, by modality."""

_MODALITY_OF_SUFFIX = {suffix: modality for modality, suffixes in SUFFIXES.items() for suffix in suffixes}
_MEDIA_KEYS = re.compile(
    r"(image|img|picture|photo|video|audio)s?\d*(file|filename|filepath|path|name|url|uri|bytes|data|base64|b64|list)?s?\d*",
    re.IGNORECASE,
)
"""Names of keys that refer to media, without underscores."""

_IN_BLOCKS = ("path", "url", "bytes", "data", "file", "file_id", "source")
"""More keys of a typed block that can refer to its image, video or audio, besides `_MEDIA_KEYS`."""

_DATA_URI = re.compile(r"data:[\w.+/-]*[;,]", re.IGNORECASE)
_EMPTY_WORDS = ("", "none", "null", "nan", "false")
"""Texts that tools write for a missing value."""

_LONGEST_PATH = 2048


def modality_of_file(name: str) -> str | None:
    """`image`, `video` or `audio`, by the file extension; None for any other file."""
    return _MODALITY_OF_SUFFIX.get(PurePosixPath(name).suffix.lower())


def is_empty_value(value: Any) -> bool:
    """Whether a value is empty: null, an empty text or a word for null, or a list or object of only such values."""
    return all(
        leaf is None or (isinstance(leaf, str) and leaf.strip().lower() in _EMPTY_WORDS) or leaf == b""
        for _, leaf, _ in _leaves("", value)
    )


def holds_media(key: str, value: Any, provenance: bool = False) -> bool:
    """Whether a key refers to or contains media, by its name or the form of its value.

    Args:
        key: a key of a row, a turn or a block.
        value: its value; lists and objects are searched to any depth.
        provenance: whether a web address in a nested object with other keys counts as the source of media that are read, and
            not as media.
    """
    if isinstance(value, (bool, int, float)) or is_empty_value(value):
        return False
    return _is_media_name(key) or _looks_like_media(key, value, provenance)


def check_unread(
    row_id: str, where: str, fields: Mapping[str, Any], read: Collection[str], advice: str, provenance: bool = False
) -> None:
    """Check that all media of a row, a turn or a block are read.

    Args:
        row_id: the row's id.
        where: the part of the row: empty for the row itself, or for example `messages[0]`.
        fields: the row, the turn or the block.
        read: the keys that are read.
        advice: how to fix a key that is not read.
        provenance: as in `holds_media`; true if other media of the fields are read.

    Raises:
        RowError: a key refers to or contains media and is not read.
    """
    for key, value in fields.items():
        if key not in read and holds_media(str(key), value, provenance):
            detail = f"the key refers to media but is not read; {advice}"
            raise RowError(row_id, f"{where}.{key}" if where else str(key), detail, "media_unread")


def _is_media_name(key: str) -> bool:
    return _MEDIA_KEYS.fullmatch(key.replace("_", "").replace("-", "")) is not None


def _looks_like_media(key: str, value: Any, provenance: bool) -> bool:
    for name, leaf, context in _leaves(key, value):
        if isinstance(leaf, bool) or is_empty_value(leaf):
            continue
        if context == "block" and (name in _IN_BLOCKS or _is_media_name(name)):
            return True
        if isinstance(leaf, str):
            is_media = _is_media_text(leaf) and not (provenance and context == "metadata" and _is_web_address(leaf))
        elif isinstance(leaf, EmbeddedMedia):
            is_media = modality_of_file(leaf.name) is not None
        else:
            is_media = isinstance(leaf, (bytes, bytearray, memoryview))
        if is_media:
            return True
    return False


def _is_media_text(text: str) -> bool:
    """Whether a text is a `data:` URI, an image in base64, or the path or address of a media file."""
    if _DATA_URI.match(text) or IMAGE_IN_BASE64.match(text):
        return True
    if len(text) > _LONGEST_PATH or "\n" in text:
        return False
    path = _path_of(text)
    if modality_of_file(path) is None:
        return False
    if not re.search(r"\s", path):
        return True
    # A sentence can end with a file name, so a path with spaces needs a folder and no space before its extension.
    return "/" in path and "://" not in path and not PurePosixPath(path).stem[-1].isspace()


def _is_web_address(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _path_of(text: str) -> str:
    if _is_web_address(text):
        try:
            return urlsplit(text).path
        except ValueError:  # invalid brackets in the host
            return text
    return text.replace("\\", "/")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any, str]]:
    """The leaf values of nested lists and objects, each with its key and its context.

    The context is `block` in `{"type": "image", ...}` and in the `{"bytes", "path"}` of `datasets`, `metadata` in an object
    with other keys than those of a media reference, and else empty. The stack is explicit because a row can be nested deeper
    than Python's recursion limit.
    """
    stack = [(key, value, "")]
    while stack:
        name, item, context = stack.pop()
        if isinstance(item, dict):
            if context != "block":
                context = _context_of(item)
            stack.extend((str(inner), each, context) for inner, each in reversed(item.items()))
        elif isinstance(item, (list, tuple)):
            stack.extend((name, each, context) for each in reversed(item))
        else:
            yield name, item, context


def _context_of(item: Mapping[Any, Any]) -> str:
    block_type = item.get("type")
    if isinstance(block_type, str) and block_type.removeprefix("input_").removesuffix("_url") in SUFFIXES:
        return "block"
    if "bytes" in item and set(item) <= {"bytes", "path"} and isinstance(item["bytes"], (str, bytes, list, type(None))):
        return "block"
    return "" if set(item) <= {*WRAPPERS, *DETAIL_KEYS, "bytes"} else "metadata"
