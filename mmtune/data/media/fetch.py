"""Fetching images from URLs: once, within limits, and never from a private network (protection from SSRF).

The URLs of a data set are untrusted and can point to services that only this machine can reach. So every address of a host name
is checked, and the connection goes to a checked address, which also prevents DNS rebinding. Proxies of the environment are not
used, because the addresses behind them cannot be checked.
"""

from __future__ import annotations

import hashlib
import http.client
import ipaddress
import re
import socket
import ssl
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, quote, urljoin, urlsplit

from mmtune.data.media.media_names import redact_url
from mmtune.data.validation.issues import DataIssueError
from mmtune.utils.files import replace_bytes

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_UNQUOTED = "/%:@!$&'()*+,;=~?[]"
_HOST = re.compile(r"[a-z0-9_]([a-z0-9_.-]{0,251}[a-z0-9_])?\.?|[0-9a-f.]*:[0-9a-f:.]*(%[a-z0-9_.-]+)?", re.IGNORECASE)
"""A DNS name, an IPv4 address in any notation, or an IPv6 address without brackets."""

_V4_PRIVATE = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # not from IANA: metadata and health service of a cloud, reachable only from its machines
    )
)
"""IANA's registry of special-purpose IPv4 addresses, and multicast. Python's lists differ between patch releases."""
_V6_GLOBAL = ipaddress.IPv6Network("2000::/3")
"""IANA's global unicast addresses; all others are special, reserved, local or multicast."""
_V6_PRIVATE = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")))
"""IANA's registry of special-purpose IPv6 addresses within `_V6_GLOBAL`."""
_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_6TO4 = ipaddress.IPv6Network("2002::/16")  # RFC 3056: an IPv4 address follows


@dataclass(frozen=True)
class FetchLimits:
    """Limits for fetching one URL.

    Attributes:
        bytes: maximum size of the body.
        connect_seconds: timeout of a connection to one address.
        seconds: timeout from the first connection to the last byte, including redirects.
        redirects: maximum number of redirects.
    """

    bytes: int = 64 * 2**20
    connect_seconds: float = 10.0
    seconds: float = 60.0
    redirects: int = 5


DEFAULT_LIMITS = FetchLimits()


def is_public_address(address: Address) -> bool:
    """Whether an address is on the public internet: not private, loopback, link-local, shared, multicast or reserved.

    An IPv6 address with an embedded IPv4 address (mapped, 6to4, NAT64) is public if that one is. Teredo addresses are not public,
    as in IANA's registry.
    """
    if isinstance(address, ipaddress.IPv4Address):
        return not any(address in network for network in _V4_PRIVATE)
    bits = int(address)  # without the zone of an address such as fe80::1%eth0
    plain = ipaddress.IPv6Address(bits)
    if plain in _V4_MAPPED or plain in _NAT64:
        return is_public_address(ipaddress.IPv4Address(bits & 0xFFFF_FFFF))
    if plain in _6TO4:
        return is_public_address(ipaddress.IPv4Address(bits >> 80 & 0xFFFF_FFFF))
    return plain in _V6_GLOBAL and not any(plain in network for network in _V6_PRIVATE)


def fetch_media(
    url: str, cache: Path, limits: FetchLimits = DEFAULT_LIMITS, allowed: Callable[[Address], bool] = is_public_address
) -> Path:
    """Fetch the image at a URL into the cache, unless the cache already has it, and return the file.

    Args:
        url: an http or https URL.
        cache: the cache directory. File names are the SHA-256 of the URL, and files are written atomically.
        limits: limits for the request.
        allowed: whether an address may be connected to.

    Raises:
        DataIssueError: another scheme, an address that is not allowed, too large, too slow, not an image, or an error of the
            server, the network or the disk.
    """
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    path = cache / name[:2] / name
    if path.is_file():
        return path
    deadline = time.monotonic() + limits.seconds
    current_url = url
    for _ in range(limits.redirects + 1):
        try:
            body, location = _get(current_url, limits, deadline, allowed)
            if location is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                replace_bytes(path, body)
                return path
            current_url = urljoin(current_url, location)
        except (OSError, http.client.HTTPException) as error:
            reason = (
                f"timeout after {limits.seconds:g} seconds"
                if time.monotonic() >= deadline
                else str(error) or type(error).__name__
            )
            raise DataIssueError("media_fetch", f"cannot fetch {_short_url(url)}: {reason}") from error
        except ValueError as error:
            raise DataIssueError("media_fetch", f"cannot fetch {_short_url(url)}: {error}") from error
    detail = f"expected at most {limits.redirects} redirects, got more"
    raise DataIssueError("media_fetch", f"cannot fetch {_short_url(url)}: {detail}")


class _FetchError(ValueError):
    """A request that is not allowed, or a response that is not an image within the limits."""


def _short_url(url: str) -> str:
    url = redact_url(url)
    return url if len(url) <= 200 else url[:200] + "..."


def _get(url: str, limits: FetchLimits, deadline: float, allowed: Callable[[Address], bool]) -> tuple[bytes, str | None]:
    """The body, or the target of a redirect."""
    parts, host, port = _parse_url(url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    wire = _connect(host, port, limits, deadline, allowed)
    if secure is not None:
        # The handshake waits for the server, so it starts after the timer.
        wire = secure.wrap_socket(wire, server_hostname=host, do_handshake_on_connect=False)
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = _PORTS[parts.scheme]  # omitted from the Host header
    connection.sock = wire
    timer = threading.Timer(max(0.0, deadline - time.monotonic()), _shut_down, [wire])
    timer.start()
    try:
        if isinstance(wire, ssl.SSLSocket):
            wire.do_handshake()
        target = quote(parts.path or "/", safe=_UNQUOTED) + (f"?{quote(parts.query, safe=_UNQUOTED)}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "mmtune", "Accept": "image/*", "Accept-Encoding": "identity"})
        with connection.getresponse() as response:
            return _read(response, limits, deadline)
    finally:
        timer.cancel()
        connection.close()
        wire.close()


def _parse_url(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:  # a port that is not a number, or an invalid host name (UnicodeError)
        raise _FetchError(f"not a valid URL: {error}") from error
    if parts.scheme not in _PORTS:
        raise _FetchError(f"expected an http or https URL, got {parts.scheme or 'none'}")
    if not host:
        raise _FetchError("not a valid URL: the host is missing")
    if not _HOST.fullmatch(host):
        raise _FetchError(f"not a valid URL: expected a host name, got {host[:100]!r}")
    if parts.username is not None or parts.password is not None:
        raise _FetchError("URLs with a user name or password are not allowed")
    return parts, host, port


def _connect(host: str, port: int, limits: FetchLimits, deadline: float, allowed: Callable[[Address], bool]) -> socket.socket:
    candidates = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, endpoint in candidates:
        address = ipaddress.ip_address(str(endpoint[0]))
        if not allowed(address):
            raise _FetchError(f"expected a public address for {host}, got {address}")
    last_error: OSError | None = None
    for family, socket_type, protocol, _, endpoint in candidates:
        connection = socket.socket(family, socket_type, protocol)
        try:
            connection.settimeout(max(0.001, min(limits.connect_seconds, deadline - time.monotonic())))
            connection.connect(endpoint)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            return connection
        except OSError as error:
            connection.close()
            last_error = error
    raise last_error or OSError(f"{host} has no address")


def _shut_down(wire: socket.socket) -> None:
    """Shut the socket down to end a blocking call of the other thread. A socket timeout would restart with every byte."""
    try:
        socket.socket.shutdown(wire, socket.SHUT_RDWR)
    except OSError:
        return  # already closed


def _read(response: http.client.HTTPResponse, limits: FetchLimits, deadline: float) -> tuple[bytes, str | None]:
    if time.monotonic() >= deadline:  # after a shutdown, truncated headers look like complete ones
        raise _FetchError(f"timeout after {limits.seconds:g} seconds")
    location = response.headers.get("Location")
    if response.status in _REDIRECTS and location:
        return b"", location
    if response.status != 200:
        raise _FetchError(f"expected status 200, got {response.status} {response.reason}")
    if response.headers.get_content_maintype() != "image" or "Content-Type" not in response.headers:
        raise _FetchError(f"expected an image, got the content type {response.headers.get('Content-Type', 'none')!r}")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _FetchError(f"expected the content encoding identity, got {response.headers['Content-Encoding']}")
    length = response.length
    if length is not None and length > limits.bytes:
        raise _FetchError(f"expected at most {limits.bytes} bytes, got {length}")
    body = bytearray()
    while chunk := response.read(2**16):
        body += chunk
        if len(body) > limits.bytes:
            raise _FetchError(f"expected at most {limits.bytes} bytes, got more")
    if time.monotonic() >= deadline:
        raise _FetchError(f"timeout after {limits.seconds:g} seconds")
    if length is not None and len(body) != length:
        raise _FetchError(f"expected {length} bytes, got {len(body)}")
    return bytes(body), None
