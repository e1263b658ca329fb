"""Media at URLs: fetched once, within limits, and never from inside the network that this machine stands in.

A data set is somebody else's text. Its URLs may point at services that only this machine can reach, so every address that a name
stands for is checked, and the connection goes to the address that was checked: a name that says something else when it is asked
again changes nothing. Proxies that the environment names are not used, because nothing can be checked behind them.
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
"""A name as DNS has it, an IPv4 address in any spelling, or an IPv6 address without its brackets."""

_V4_PRIVATE = tuple(
    ipaddress.IPv4Network(network)
    for network in (
        *("0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24"),
        *("192.0.2.0/24", "192.31.196.0/24", "192.52.193.0/24", "192.88.99.0/24", "192.168.0.0/16", "192.175.48.0/24"),
        *("198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24", "224.0.0.0/4", "240.0.0.0/4"),
        "168.63.129.16/32",  # not IANA's: the metadata and health service of a cloud, reachable from its machines alone
    )
)
"""IANA's registry of special-purpose IPv4 addresses, and multicast. Python's own lists differ from patch to patch."""
_V6_GLOBAL = ipaddress.IPv6Network("2000::/3")
"""What IANA gives out as global unicast addresses; all others are special, reserved, local or multicast."""
_V6_PRIVATE = tuple(map(ipaddress.IPv6Network, ("2001::/23", "2001:db8::/32", "2620:4f:8000::/48", "3fff::/20")))
"""IANA's registry of special-purpose IPv6 addresses, as far as they lie within `_V6_GLOBAL`."""
_V4_MAPPED = ipaddress.IPv6Network("::ffff:0:0/96")
_NAT64 = ipaddress.IPv6Network("64:ff9b::/96")  # RFC 6052: the last 32 bits are an IPv4 address
_6TO4 = ipaddress.IPv6Network("2002::/16")  # RFC 3056: an IPv4 address follows


@dataclass(frozen=True)
class FetchLimits:
    """What one URL may take.

    Attributes:
        bytes: the largest body.
        connect_seconds: for a connection to one address.
        seconds: from the first connection to the last byte, redirects included.
        redirects: how many are followed.
    """

    bytes: int = 64 * 2**20
    connect_seconds: float = 10.0
    seconds: float = 60.0
    redirects: int = 5


DEFAULT_LIMITS = FetchLimits()


def is_public_address(address: Address) -> bool:
    """Whether an address is one of the open internet: not private, loopback, link-local, shared, multicast or reserved.

    An IPv6 address that carries an IPv4 one (mapped, 6to4, NAT64) is what it carries. Teredo's are not public, as IANA has it.
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
    """The image at a URL, as a file in the cache; fetched if it is not there.

    Args:
        url: http or https.
        cache: the directory; a file's name in it is the SHA-256 of its URL, and it is written whole or not at all.
        limits: what it may take.
        allowed: which addresses may be connected to.

    Raises:
        ValueError: with the reason: another scheme, an address that is not allowed, too large, too slow, no image, an error of
            the server, of the network or of the disk.
    """
    name = hashlib.sha256(url.encode("utf-8", "surrogatepass")).hexdigest()
    kept = cache / name[:2] / name
    if kept.is_file():
        return kept
    deadline = time.monotonic() + limits.seconds
    asked = url
    for _ in range(limits.redirects + 1):
        try:
            body, location = _get(asked, limits, deadline, allowed)
            if location is None:
                kept.parent.mkdir(parents=True, exist_ok=True)
                replace_bytes(kept, body)
                return kept
            asked = urljoin(asked, location)
        except (OSError, http.client.HTTPException) as error:
            reason = "took too long" if time.monotonic() >= deadline else str(error) or type(error).__name__
            raise DataIssueError("media_fetch", f"cannot fetch {_shown(url)}: {reason}") from error
        except ValueError as refused:
            raise DataIssueError("media_fetch", f"cannot fetch {_shown(url)}: {refused}") from refused
    raise DataIssueError("media_fetch", f"cannot fetch {_shown(url)}: more than {limits.redirects} redirects")


class _Refused(ValueError):
    pass


def _shown(url: str) -> str:
    url = redact_url(url)
    return url if len(url) <= 200 else url[:200] + "..."


def _get(url: str, limits: FetchLimits, deadline: float, allowed: Callable[[Address], bool]) -> tuple[bytes, str | None]:
    """The body, or where a redirect leads."""
    parts, host, port = _parsed(url)
    secure = ssl.create_default_context() if parts.scheme == "https" else None
    wire = _connected(host, port, limits, deadline, allowed)
    if secure is not None:
        # The handshake waits for the server, so it comes when the timer runs.
        wire = secure.wrap_socket(wire, server_hostname=host, do_handshake_on_connect=False)
    connection = http.client.HTTPConnection(host, port)
    connection.default_port = _PORTS[parts.scheme]  # the Host header leaves it out
    connection.sock = wire
    overdue = threading.Timer(max(0.0, deadline - time.monotonic()), _hang_up, [wire])
    overdue.start()
    try:
        if isinstance(wire, ssl.SSLSocket):
            wire.do_handshake()
        target = quote(parts.path or "/", safe=_UNQUOTED) + (f"?{quote(parts.query, safe=_UNQUOTED)}" if parts.query else "")
        connection.request("GET", target, headers={"User-Agent": "mmtune", "Accept": "image/*", "Accept-Encoding": "identity"})
        with connection.getresponse() as response:
            return _read(response, limits, deadline)
    finally:
        overdue.cancel()
        connection.close()
        wire.close()


def _parsed(url: str) -> tuple[SplitResult, str, int]:
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").encode("idna").decode("ascii")
        port = parts.port or _PORTS.get(parts.scheme, 0)
    except ValueError as error:  # a port that is no number; a name that is none (UnicodeError)
        raise _Refused(f"not a valid URL: {error}") from error
    if parts.scheme not in _PORTS:
        raise _Refused(f"only http and https are fetched, not {parts.scheme or 'this'}")
    if not host:
        raise _Refused("not a valid URL: it names no host")
    if not _HOST.fullmatch(host):
        raise _Refused(f"not a valid URL: {host[:100]!r} is not a host name")
    if parts.username is not None or parts.password is not None:
        raise _Refused("a URL with a user name or password is not fetched")
    return parts, host, port


def _connected(host: str, port: int, limits: FetchLimits, deadline: float, allowed: Callable[[Address], bool]) -> socket.socket:
    found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    for *_, where in found:
        address = ipaddress.ip_address(str(where[0]))
        if not allowed(address):
            raise _Refused(f"{host} is {address}, and only public addresses are fetched from")
    failed: OSError | None = None
    for family, kind, protocol, _, where in found:
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(max(0.001, min(limits.connect_seconds, deadline - time.monotonic())))
            connection.connect(where)
            connection.settimeout(max(0.001, deadline - time.monotonic()))
            return connection
        except OSError as error:
            connection.close()
            failed = error
    raise failed or OSError(f"{host} has no address")


def _hang_up(wire: socket.socket) -> None:
    """End every wait of the other thread. A socket's own timeout would begin again with every byte that drips in."""
    try:
        socket.socket.shutdown(wire, socket.SHUT_RDWR)
    except OSError:
        return  # it was over already


def _read(response: http.client.HTTPResponse, limits: FetchLimits, deadline: float) -> tuple[bytes, str | None]:
    if time.monotonic() >= deadline:  # and hung up on: headers cut short look like headers that end
        raise _Refused("took too long")
    location = response.headers.get("Location")
    if response.status in _REDIRECTS and location:
        return b"", location
    if response.status != 200:
        raise _Refused(f"the server says {response.status} {response.reason}")
    if response.headers.get_content_maintype() != "image" or "Content-Type" not in response.headers:
        raise _Refused(f"it is {response.headers.get('Content-Type', 'of no type')!r}, not an image")
    if response.headers.get("Content-Encoding", "identity").lower() != "identity":
        raise _Refused(f"it comes compressed ({response.headers['Content-Encoding']}), which was not asked for")
    told = response.length
    if told is not None and told > limits.bytes:
        raise _Refused(f"{told} bytes, more than {limits.bytes}")
    body = bytearray()
    while chunk := response.read(2**16):
        body += chunk
        if len(body) > limits.bytes:
            raise _Refused(f"more than {limits.bytes} bytes")
    if time.monotonic() >= deadline:
        raise _Refused("took too long")
    if told is not None and len(body) != told:
        raise _Refused(f"{len(body)} of {told} bytes came")
    return bytes(body), None
