"""Unread media: keys of a row, a turn or a block that name or hold media which the sample would lack."""

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
"""Endings of media files, by kind."""

_KIND_OF = {suffix: kind for kind, suffixes in SUFFIXES.items() for suffix in suffixes}
_NAMES = re.compile(
    r"(image|img|picture|photo|video|audio)s?\d*(file|filename|filepath|path|name|url|uri|bytes|data|base64|b64|list)?s?\d*",
    re.IGNORECASE,
)
"""Keys that name media, underscores left out."""

_IN_BLOCKS = ("path", "url", "bytes", "data", "file", "file_id", "source")
"""Keys of a typed block that hold its medium, besides those of `_NAMES`."""

_DATA_URI = re.compile(r"data:[\w.+/-]*[;,]", re.IGNORECASE)
_EMPTY_WORDS = ("", "none", "null", "nan", "false")
"""Texts that tools write for a value that is missing."""

_LONGEST_PATH = 2048


def modality_of_file(name: str) -> str | None:
    """`image`, `video` or `audio`, by the ending of a file's name; None for any other."""
    return _KIND_OF.get(PurePosixPath(name).suffix.lower())


def is_empty_value(value: Any) -> bool:
    """Whether a value holds nothing: null, an empty text or a word for null, or lists and objects of these alone."""
    return all(
        leaf is None or (isinstance(leaf, str) and leaf.strip().lower() in _EMPTY_WORDS) or leaf == b""
        for _, leaf, _ in _leaves("", value)
    )


def holds_media(key: str, value: Any, provenance: bool = False) -> bool:
    """Whether a key with its value names or holds media, by the key's name or the look of the value.

    Args:
        key: of a row, a turn or a block.
        value: of the key; lists and objects are searched to any depth.
        provenance: whether a web address beside other keys of an object inside of the value says where media come from, and
            is none itself.
    """
    if isinstance(value, (bool, int, float)) or is_empty_value(value):
        return False
    return _is_media_name(key) or _looks_like_media(key, value, provenance)


def unread_media(fields: Mapping[str, Any], read: Collection[str], provenance: bool = False) -> Iterator[str]:
    """The keys that are not read and name or hold media, as `holds_media`."""
    return (str(key) for key, value in fields.items() if key not in read and holds_media(str(key), value, provenance))


def check_unread(
    row_id: str, where: str, fields: Mapping[str, Any], read: Collection[str], advice: str, provenance: bool = False
) -> None:
    """Refuse media that nothing reads.

    Args:
        row_id: of the row.
        where: the part of the row that holds the fields: empty for the row itself, or such as `messages[0]`.
        fields: the row, a turn or a block.
        read: the keys that are read.
        advice: what to do about a key that is not.
        provenance: as `holds_media`; true where other media of the fields are read.

    Raises:
        RowError: for media that nothing reads.
    """
    for key in unread_media(fields, read, provenance):
        detail = f"names or holds media and is not read; {advice}"
        raise RowError(row_id, f"{where}.{key}" if where else key, detail, "media_unread")


def _is_media_name(key: str) -> bool:
    return _NAMES.fullmatch(key.replace("_", "").replace("-", "")) is not None


def _looks_like_media(key: str, value: Any, provenance: bool) -> bool:
    for name, leaf, place in _leaves(key, value):
        if isinstance(leaf, bool) or is_empty_value(leaf):
            continue
        if place == "block" and (name in _IN_BLOCKS or _is_media_name(name)):
            return True
        if isinstance(leaf, str):
            is_media = _is_media_text(leaf) and not (provenance and place == "metadata" and _is_web_address(leaf))
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
    # A sentence may end in the name of a file: a path with spaces has a folder, and no space before its ending.
    return "/" in path and "://" not in path and not PurePosixPath(path).stem[-1].isspace()


def _is_web_address(text: str) -> bool:
    return text[:8].lower().startswith(("http://", "https://"))


def _path_of(text: str) -> str:
    if _is_web_address(text):
        try:
            return urlsplit(text).path
        except ValueError:  # brackets that hold no address
            return text
    return text.replace("\\", "/")


def _leaves(key: str, value: Any) -> Iterator[tuple[str, Any, str]]:
    """The values inside of lists and objects, each with the key that it stands under and its place.

    The place is `block` in `{"type": "image", ...}` and in the `{"bytes", "path"}` of `datasets`, `metadata` in an object with
    keys besides those that name a medium, and else empty. The stack is explicit: a row may nest deeper than Python recurses.
    """
    stack = [(key, value, "")]
    while stack:
        name, item, place = stack.pop()
        if isinstance(item, dict):
            if place != "block":
                place = _place(item)
            stack.extend((str(inner), each, place) for inner, each in reversed(item.items()))
        elif isinstance(item, (list, tuple)):
            stack.extend((name, each, place) for each in reversed(item))
        else:
            yield name, item, place


def _place(item: Mapping[Any, Any]) -> str:
    kind = item.get("type")
    if isinstance(kind, str) and kind.removeprefix("input_").removesuffix("_url") in SUFFIXES:
        return "block"
    if "bytes" in item and set(item) <= {"bytes", "path"} and isinstance(item["bytes"], (str, bytes, list, type(None))):
        return "block"
    return "" if set(item) <= {*WRAPPERS, *DETAIL_KEYS, "bytes"} else "metadata"
