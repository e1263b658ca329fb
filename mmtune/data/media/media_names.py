"""Names of media in rows: paths, Windows paths, URIs, and the objects that data sets wrap them in."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote

from mmtune.data.validation.issues import DataIssueError

MAX_DATA_URI = 32 * 2**20
"""Longest `data:` URI that is decoded, in characters."""

WRAPPERS = ("path", "url", "image_url", "image")
"""Keys of an object that names a medium, one at a time: `{"url": ...}`, `{"image_url": {"url": ...}}`."""
DETAIL_KEYS = ("type", "detail")
"""Keys that OpenAI's format has beside them, which say nothing of where the medium is."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+(:[A-Za-z][A-Za-z0-9+.-]+)*)://")
IMAGE_IN_BASE64 = re.compile(r"\s*(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA.GZ0eXBh|AAAADGpQ)[A-Za-z0-9+/=\s]{40}")
"""How JPEG, PNG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000 files begin in base64."""
_URL = re.compile(r"([a-z][a-z0-9+.:-]*:/{2,})([^/?#]*)([^?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(?:[^@]*@)?((?:[^@:]|:(?=[^\]]*\]))*(?::\d*)?)")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def is_utf8(name: str) -> bool:
    """Whether a name can be written: Python stands lone surrogates in for bytes that are not UTF-8."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def redact_url(url: str) -> str:
    """A URL for messages and reports: without its user name and password, and its query and fragment, which may hold a signature.

    Any other text is returned as it is.
    """
    parts = _URL.match(url)
    if parts is None:
        return url
    scheme, authority, path, query = parts.groups()
    host = _AUTHORITY.fullmatch(authority)
    if host is None:  # a password with a slash or a question mark in it, which ends the authority
        return f"{scheme}..."
    return f"{scheme}{host[1]}{path}{query[:1]}{'...' if query else ''}"


def unwrap_media(value: Any) -> Any:
    """The medium that an object names: the value of its one key, or of one key in there. Any other value is returned as it is.

    `{"type": "base64", "media_type": ..., "data": ...}`, as in Anthropic's blocks, becomes a `data:` URI.

    Raises:
        ValueError: an object that is none of the forms that are read, or names several media.
    """
    while isinstance(value, dict) and value.get("bytes") is None:
        if value.get("type") == "base64" and isinstance(value.get("data"), str) and set(value) <= {"type", "media_type", "data"}:
            return f"data:{value.get('media_type') or 'image'};base64,{value['data']}"
        named = [key for key in WRAPPERS if value.get(key) is not None]
        if len(named) != 1 or not set(value) <= {*WRAPPERS, *DETAIL_KEYS, "bytes"}:
            forms = '{"path": ...}, {"bytes": ...}, {"url": ...} or {"image_url": {"url": ...}}'
            raise DataIssueError("media_path", f"expected the path of an image or its bytes, or {forms}; got {_kind(value)}")
        value = value[named[0]]
    return value


def _kind(value: dict[Any, Any]) -> str:
    return f"an object with {', '.join(map(str, value)) or 'nothing'}"[:200]


def decode_data_uri(uri: str) -> bytes:
    """The bytes of a `data:` URI (RFC 2397) of an image in base64; `data:image;base64,` without a format will do.

    Raises:
        ValueError: one that is too long, of something else, or not in base64.
    """
    if len(uri) > MAX_DATA_URI:
        raise DataIssueError("media_path", f"a data: URI of {len(uri)} characters, more than {MAX_DATA_URI}")
    head, comma, body = uri.partition(",")
    kind, *parameters = head[5:].lower().split(";")
    if not comma or kind.partition("/")[0] != "image" or parameters[-1:] != ["base64"]:
        raise DataIssueError("media_path", f"'{uri[:60]}' is not a data: URI of an image in base64 (data:image/png;base64,...)")
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters outside of ASCII
        raise DataIssueError("media_path", f"'{uri[:60]}' is not valid base64: {error}") from error


def file_uri_to_path(uri: str) -> str:
    """The path of a `file:` URI (RFC 8089), percent-encoding resolved.

    Raises:
        ValueError: one that names another host, or no path.
    """
    rest = uri[5:]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            shown = f"'{redact_url(uri)[:100]}' names the host '{host.rpartition('@')[2][:60]}'"
            detail = f"{shown}; a file of this machine is file:///PATH, with three slashes"
            raise DataIssueError("media_path", detail)
        rest = f"/{path}"
    path = unquote(rest)
    return path[1:] if _WINDOWS.match(path[1:]) else path  # file:///C:/data/a.png


def check_uri_scheme(name: str) -> None:
    """Refuse a URI of a scheme that is not read.

    Raises:
        ValueError: a URI whose scheme is not read, naming the scheme.
    """
    if scheme := _SCHEME.match(name):
        detail = f"'{redact_url(name)[:100]}' is a {scheme[1]}:// URI, which is not read; download the file and give its path"
        raise DataIssueError("media_path", f"{detail} (read are paths, file:// and data: URIs, and http and https where allowed)")


def check_not_bare_base64(name: str) -> None:
    """Refuse an image in base64 without its `data:` head, which reads like a path.

    Raises:
        ValueError: such a name.
    """
    if IMAGE_IN_BASE64.match(name):
        detail = f"'{name[:40]}...' is an image in base64 whose head is missing"
        raise DataIssueError("media_path", f"{detail}: write data:image;base64, before it")


def is_windows_path(name: str) -> bool:
    """Whether a path begins with a drive or a server, as Windows writes them."""
    return _WINDOWS.match(name) is not None


def windows_hint(name: str, instead: str) -> str:
    """What to say of a Windows path that no file has; nothing of another path.

    Args:
        instead: how to write it.
    """
    return f"; it is a Windows path: write it {instead}" if is_windows_path(name) or "\\" in name else ""
