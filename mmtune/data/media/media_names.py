"""Media references in rows: paths, Windows paths, URIs, and the objects that contain them."""

from __future__ import annotations

import base64
import binascii
import re
from typing import Any
from urllib.parse import unquote

from mmtune.data.validation.issues import DataIssueError

MAX_DATA_URI = 32 * 2**20
"""Maximum length of a `data:` URI in characters."""

WRAPPERS = ("path", "url", "image_url", "image")
"""Keys of an object with one media reference: `{"url": ...}`, `{"image_url": {"url": ...}}`."""
DETAIL_KEYS = ("type", "detail")
"""More keys of such an object in OpenAI's format, which are ignored."""

_SCHEME = re.compile(r"([A-Za-z][A-Za-z0-9+.-]+(:[A-Za-z][A-Za-z0-9+.-]+)*)://")
IMAGE_IN_BASE64 = re.compile(r"\s*(/9j/|iVBORw0KGgo|R0lGOD|UklGR|SUkqA|TU0AK|Qk[0-3]|AAAA.GZ0eXBh|AAAADGpQ)[A-Za-z0-9+/=\s]{40}")
"""The first characters of JPEG, PNG, GIF, WebP, TIFF, BMP, AVIF and JPEG 2000 files in base64."""
_URL = re.compile(r"([a-z][a-z0-9+.:-]*:/{2,})([^/?#]*)([^?#]*)(.*)", re.IGNORECASE | re.DOTALL)
_AUTHORITY = re.compile(r"(?:[^@]*@)?((?:[^@:]|:(?=[^\]]*\]))*(?::\d*)?)")
_WINDOWS = re.compile(r"[A-Za-z]:[\\/]|\\\\")


def is_utf8(name: str) -> bool:
    """Whether a name is valid UTF-8: Python represents other bytes as lone surrogates."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def redact_url(url: str) -> str:
    """A URL for messages and reports, without user name, password, query and fragment (which can contain a signature).

    Any other text is returned unchanged.
    """
    parts = _URL.match(url)
    if parts is None:
        return url
    scheme, authority, path, query = parts.groups()
    host = _AUTHORITY.fullmatch(authority)
    if host is None:  # a password with a slash or a question mark, which ends the authority
        return f"{scheme}..."
    return f"{scheme}{host[1]}{path}{query[:1]}{'...' if query else ''}"


def unwrap_media(value: Any) -> Any:
    """The media reference in an object: the value of its single key, at any depth. Any other value is returned unchanged.

    `{"type": "base64", "media_type": ..., "data": ...}`, as in Anthropic's blocks, becomes a `data:` URI.

    Raises:
        DataIssueError: an object of another form, or with several references.
    """
    while isinstance(value, dict) and value.get("bytes") is None:
        if value.get("type") == "base64" and isinstance(value.get("data"), str) and set(value) <= {"type", "media_type", "data"}:
            return f"data:{value.get('media_type') or 'image'};base64,{value['data']}"
        used = [key for key in WRAPPERS if value.get(key) is not None]
        if len(used) != 1 or not set(value) <= {*WRAPPERS, *DETAIL_KEYS, "bytes"}:
            forms = '{"path": ...}, {"bytes": ...}, {"url": ...} or {"image_url": {"url": ...}}'
            raise DataIssueError("media_path", f"expected the path of an image or its bytes, or {forms}; got {_describe(value)}")
        value = value[used[0]]
    return value


def _describe(value: dict[Any, Any]) -> str:
    return f"an object with {', '.join(map(str, value)) or 'no keys'}"[:200]


def decode_data_uri(uri: str) -> bytes:
    """The bytes of a `data:` URI (RFC 2397) with an image in base64; the image format may be omitted: `data:image;base64,`.

    Raises:
        DataIssueError: the URI is too long, not of an image, or not valid base64.
    """
    if len(uri) > MAX_DATA_URI:
        raise DataIssueError("media_path", f"expected a data: URI of at most {MAX_DATA_URI} characters, got {len(uri)}")
    head, comma, body = uri.partition(",")
    media_type, *parameters = head[5:].lower().split(";")
    if not comma or media_type.partition("/")[0] != "image" or parameters[-1:] != ["base64"]:
        raise DataIssueError("media_path", f"expected an image in base64 (data:image/png;base64,...), got '{uri[:60]}'")
    try:
        return base64.b64decode("".join(unquote(body).split()), validate=True)
    except (binascii.Error, ValueError) as error:  # ValueError: characters that are not ASCII
        raise DataIssueError("media_path", f"'{uri[:60]}' is not valid base64: {error}") from error


def file_uri_to_path(uri: str) -> str:
    """The path of a `file:` URI (RFC 8089), with percent-encoding decoded.

    Raises:
        DataIssueError: the URI has another host, or no path.
    """
    rest = uri[5:]
    if rest.startswith("//"):
        host, slash, path = rest[2:].partition("/")
        if host.lower() not in ("", "localhost") or not slash:
            host_name = host.rpartition("@")[2][:60]
            detail = f"expected file:///PATH with three slashes, got '{redact_url(uri)[:100]}' with the host '{host_name}'"
            raise DataIssueError("media_path", detail)
        rest = f"/{path}"
    path = unquote(rest)
    return path[1:] if _WINDOWS.match(path[1:]) else path  # file:///C:/data/a.png


def check_uri_scheme(name: str) -> None:
    """Check that a path is not a URI with an unsupported scheme.

    Raises:
        DataIssueError: the URI scheme is not supported.
    """
    if scheme := _SCHEME.match(name):
        detail = f"'{redact_url(name)[:100]}': {scheme[1]}:// URIs are not supported; download the file and give its path"
        supported = "supported: paths, file:// and data: URIs, and http and https URLs if allowed"
        raise DataIssueError("media_path", f"{detail} ({supported})")


def check_not_bare_base64(name: str) -> None:
    """Check that a path is not an image in base64 without the `data:` prefix.

    Raises:
        DataIssueError: it is.
    """
    if IMAGE_IN_BASE64.match(name):
        detail = f"'{name[:40]}...' is an image in base64 without its prefix"
        raise DataIssueError("media_path", f"{detail}; write data:image;base64, before it")


def is_windows_path(name: str) -> bool:
    """Whether a path starts with a drive or a server name, as on Windows."""
    return _WINDOWS.match(name) is not None


def windows_hint(name: str, instead: str) -> str:
    """A hint for a Windows path that does not exist; empty for other paths.

    Args:
        name: the path.
        instead: how to write it instead.
    """
    return f"; this is a Windows path; write it {instead}" if is_windows_path(name) or "\\" in name else ""
