"""Media that a row names or holds under a key that nothing reads: they would be missing from the sample without a word."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping
from pathlib import PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from mmtune.data.media import Embedded
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

_BASE64 = ("/9j/", "iVBORw0KGgo", "R0lGOD", "UklGR")
"""How JPEG, PNG, GIF and WebP files begin in base64."""

_LONGEST_PATH = 2048


def kind_of_name(name: str) -> str | None:
    """`image`, `video` or `audio`, by the ending of a file's name; None for any other."""
    return _KIND_OF.get(PurePosixPath(name).suffix.lower())


def holds_media(key: str, value: Any) -> bool:
    """Whether a key with its value names or holds media, by the key's name or the look of the value."""
    if value is None or isinstance(value, (bool, int, float)) or (isinstance(value, (str, bytes, list, dict)) and not value):
        return False
    return _NAMES.fullmatch(key.replace("_", "").replace("-", "")) is not None or _looks_like_media(value)


def _looks_like_media(value: Any) -> bool:
    if isinstance(value, str):
        if value[:5].lower() == "data:" or (len(value) > 100 and value.startswith(_BASE64)):
            return True
        return len(value) <= _LONGEST_PATH and "\n" not in value and kind_of_name(_path_of(value)) is not None
    if isinstance(value, Embedded):
        return kind_of_name(value.name) is not None
    if isinstance(value, dict):
        return bool(value.get("bytes")) or (set(value) <= {"bytes", "path", "url"} and any(value.values()))
    if isinstance(value, list):
        return any(map(_looks_like_media, value))
    return isinstance(value, (bytes, bytearray, memoryview))


def _path_of(text: str) -> str:
    if text[:8].lower().startswith(("http://", "https://")):
        try:
            return urlsplit(text).path
        except ValueError:  # brackets that hold no address
            return text
    return text.replace("\\", "/")


def unread_media(fields: Mapping[str, Any], read: Collection[str]) -> Iterator[str]:
    """The keys that are not read and name or hold media."""
    return (str(key) for key, value in fields.items() if key not in read and holds_media(str(key), value))


def check_unread(row_id: str, where: str, fields: Mapping[str, Any], read: Collection[str], advice: str) -> None:
    """
    Args:
        row_id: of the row.
        where: the part of the row that holds the fields: empty for the row itself, or such as `messages[0]`.
        fields: the row, a turn or a block.
        read: the keys that are read.
        advice: what to do about a key that is not.

    Raises:
        RowError: for media that nothing reads.
    """
    for key in unread_media(fields, read):
        told = f"names or holds media and is not read; {advice}"
        raise RowError(row_id, f"{where}.{key}" if where else key, told, "media_unread")
