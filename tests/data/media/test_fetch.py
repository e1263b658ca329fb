"""Download of media by URL, against a local server on the loopback interface."""

from __future__ import annotations

import hashlib
import ipaddress
import socket
import socketserver
import ssl
import subprocess
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from mmtune.data.media import fetch
from mmtune.data.media.fetch import DEFAULT_LIMITS, fetch_media, is_public_address
from mmtune.data.media.media import MediaRules, resolve_media
from mmtune.data.media.media_names import redact_url

PICTURE = b"\x89PNG not looked into here"
SMALL = replace(DEFAULT_LIMITS, bytes=1000)


def loopback(address: Any) -> bool:
    return bool(address.is_loopback)


@pytest.fixture(autouse=True)
def only_loopback(monkeypatch: pytest.MonkeyPatch) -> None:
    """A refusal that fails reaches no real address."""
    connect = socket.socket.connect

    def guarded(self: socket.socket, address: Any) -> None:
        assert ipaddress.ip_address(address[0]).is_loopback, f"a test would have connected to {address}"
        connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", guarded)


class Site:
    """What a server answers on each path, and what it was asked."""

    def __init__(self) -> None:
        self.answers: dict[str, Callable[[BaseHTTPRequestHandler], None]] = {}
        self.asked: list[str] = []

    def says(self, path: str, status: int = 200, body: bytes = PICTURE, **headers: str) -> None:
        headers = {"Content-Type": "image/png", "Content-Length": str(len(body))} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }

        def answer(handler: BaseHTTPRequestHandler) -> None:
            handler.send_response(status)
            for name, value in headers.items():
                if value:
                    handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(body)

        self.answers[path] = answer


@pytest.fixture
def site() -> Iterator[Site]:
    site = Site()
    with Serving(site) as server:
        site.url = f"http://127.0.0.1:{server.server_address[1]}"  # type: ignore[attr-defined]
        yield site
        server.shutdown()


class Serving(socketserver.ThreadingTCPServer):
    allow_reuse_address = True
    daemon_threads = True

    def __init__(self, site: Site, context: ssl.SSLContext | None = None) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                site.asked.append(self.path)
                site.answers[self.path](self)

            def log_message(self, *args: Any) -> None:
                pass

        super().__init__(("127.0.0.1", 0), Handler)
        if context is not None:
            self.socket = context.wrap_socket(self.socket, server_side=True)
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def handle_error(self, *args: Any) -> None:
        pass  # a client that hangs up


def _fetch(site: Any, path: str, cache: Path, limits: fetch.FetchLimits = SMALL) -> Path:
    return fetch_media(site.url + path, cache, limits, loopback)


def test_an_image_is_fetched_once_and_kept_by_its_url(site: Site, tmp_path: Path) -> None:
    site.says("/a.png?size=1%20x&name=%C3%A9")
    cache = tmp_path / "not" / "there yet"
    path = _fetch(site, "/a.png?size=1%20x&name=é", cache)
    name = hashlib.sha256((site.url + "/a.png?size=1%20x&name=é").encode()).hexdigest()  # type: ignore[attr-defined]
    assert path == cache / name[:2] / name and path.read_bytes() == PICTURE
    assert _fetch(site, "/a.png?size=1%20x&name=é", cache) == path
    assert len(site.asked) == 1
    assert [file for file in cache.rglob("*") if file.is_file()] == [path]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ({"body": b"x" * 1001}, "expected at most 1000 bytes, got 1001"),
        ({"body": b"x" * 1001, "Content_Length": ""}, "expected at most 1000 bytes, got more"),
        ({"Content_Type": "text/html; charset=utf-8"}, "expected an image, got the content type 'text/html; charset=utf-8'"),
        ({"Content_Type": ""}, "expected an image, got the content type 'none'"),
        ({"Content_Encoding": "gzip"}, "expected the content encoding identity, got gzip"),
        ({"Content_Length": "500"}, f"expected 500 bytes, got {len(PICTURE)}"),
        ({"status": 404}, "expected status 200, got 404"),
        ({"status": 206}, "expected status 200, got 206"),
        ({"status": 302}, "expected status 200, got 302"),
    ],
)
def test_invalid_and_oversized_images_are_rejected_and_not_cached(
    site: Site, tmp_path: Path, answer: dict[str, Any], reason: str
) -> None:
    site.says("/a.png", **answer)
    with pytest.raises(ValueError, match=rf"^cannot fetch http://127\.0\.0\.1:\d+/a\.png: .*{reason}"):
        _fetch(site, "/a.png", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("kind", ["headers", "body", "silence"])
def test_a_slow_server_is_disconnected(site: Site, tmp_path: Path, kind: str) -> None:
    """The server never ends its response: if the client did not hang up, this test would not end."""
    given_up = threading.Event()
    begins = {
        "headers": b"HTTP/1.0 200 OK\r\nX-Slow: ",
        "body": b"HTTP/1.0 200 OK\r\nContent-Type: image/png\r\n\r\n",
        "silence": b"",
    }

    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.wfile.write(begins[kind])
        try:
            while not given_up.wait(0.02):
                handler.wfile.write(b"x" if kind != "silence" else b"")
        except OSError:
            given_up.set()

    site.answers["/slow"] = answer
    with pytest.raises(ValueError, match="timeout after"):
        _fetch(site, "/slow", tmp_path, replace(SMALL, seconds=0.3))
    given_up.set()


def test_redirects_are_followed_and_counted(site: Site, tmp_path: Path) -> None:
    site.says("/0", 301, b"", Location="1")
    site.says("/1", 308, b"", Location=f"{site.url}/2")  # type: ignore[attr-defined]
    site.says("/2")
    assert _fetch(site, "/0", tmp_path).read_bytes() == PICTURE
    assert site.asked == ["/0", "/1", "/2"]
    site.says("/round", 302, b"", Location="/round")
    with pytest.raises(ValueError, match="/round: expected at most 5 redirects, got more"):
        _fetch(site, "/round", tmp_path)
    assert site.asked.count("/round") == 6


@pytest.mark.parametrize(
    ("location", "reason"),
    [
        ("http://10.0.0.1/a.png", "expected a public address for 10.0.0.1, got 10.0.0.1"),
        ("//[::ffff:169.254.169.254]/latest/meta-data", "expected a public address"),
        ("file:///etc/passwd", "expected an http or https URL, got file"),
        ("ftp://127.0.0.1/a.png", "expected an http or https URL, got ftp"),
        ("http://a:b@127.0.0.1/a.png", "user name or password"),
        ("http://[::1/a.png", "cannot fetch .*: Invalid IPv6 URL"),
        ("http://127.0.0.1:x/a.png", "not a valid URL"),
    ],
)
def test_the_target_of_a_redirect_is_checked_like_the_url(site: Site, tmp_path: Path, location: str, reason: str) -> None:
    site.says("/a.png", 302, b"", Location=location)
    with pytest.raises(ValueError, match=reason):
        _fetch(site, "/a.png", tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


# -------------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1",
        "10.1.2.3",
        "172.16.0.1",
        "192.168.1.1",
        "169.254.169.254",
        "100.64.0.1",
        "0.0.0.0",
        "224.0.0.1",
        "240.0.0.1",
        "255.255.255.255",
        "192.0.2.1",
        "198.18.0.1",
        "::1",
        "::",
        "fe80::1",
        "fe80::1%eth0",
        "fc00::1",
        "fd12::1",
        "fec0::1",
        "ff02::1",
        "2001:db8::1",
        "::ffff:127.0.0.1",
        "::ffff:10.0.0.1",
        "64:ff9b::7f00:1",
        "2002:7f00:1::",
        "2002:a00:1::1",
        "192.0.0.192",
        "192.0.0.9",
        "192.88.99.1",
        "168.63.129.16",
        "100.100.100.200",
        "203.0.113.1",
        "2001::1",
        "2001:0:4136:e378:8000:63bf:3fff:fdd2",
        "2001:20::1",
        "3fff::1",
        "5f00::1",
        "4000::1",
        "100::1",
        "64:ff9b:1::808:808",
        "::8.8.8.8",
        "::ffff:192.0.0.192",
        "::ffff:168.63.129.16",
        "64:ff9b::a83f:8110",
        "2002:c000:c0::1",
    ],
)
def test_special_addresses_are_not_public(address: str) -> None:
    assert not is_public_address(ipaddress.ip_address(address))


@pytest.mark.parametrize(
    "address", ["8.8.8.8", "1.1.1.1", "2606:4700::1111", "::ffff:8.8.8.8", "64:ff9b::808:808", "2002:808:808::1"]
)
def test_a_public_address_is_public(address: str) -> None:
    assert is_public_address(ipaddress.ip_address(address))


def test_every_special_address_that_python_knows_is_special_here_too() -> None:
    """Python's lists are of one patch level; ours must hold at least what they hold, but for what other addresses carry."""
    for networks in (ipaddress._IPv4Constants, ipaddress._IPv6Constants):  # type: ignore[attr-defined]
        for network in networks._private_networks:
            assert not is_public_address(network[0]) and not is_public_address(network[-1]), network


@pytest.mark.parametrize("host", ["a\0b", "127.0.0.1\0.example.com", "a b", "a%00b", "a\x7f", "-", "a..b\0", "exa\u2028mple"])
def test_an_invalid_host_is_rejected_before_any_request(host: str, tmp_path: Path, no_network: list[Any]) -> None:
    with pytest.raises(ValueError, match=r"^cannot fetch http://.*: not a valid URL: "):
        fetch_media(f"http://{host}/a.png", tmp_path)
    assert no_network == []


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """What is looked up or connected to, which is refused."""
    asked: list[Any] = []

    def refuse(*arguments: Any, **options: Any) -> Any:
        asked.append(arguments)
        raise OSError("refused by the test")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)
    return asked


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("https://example.com/a.png", "https://example.com/a.png"),
        ("https://user:secret@example.com:81/a.png?sig=secret#secret", "https://example.com:81/a.png?..."),
        ("https://secret@example.com/a@b.png", "https://example.com/a@b.png"),
        ("https://example.com/a.png#secret", "https://example.com/a.png#..."),
        ("s3://key:secret@bucket/a.png?X-Amz-Signature=secret", "s3://bucket/a.png?..."),
        ("https://user:sec/ret@example.com/a.png", "https://..."),
        ("https://user:sec?ret@example.com/a.png", "https://..."),
        ("http://[::1]:80/a.png", "http://[::1]:80/a.png"),
        ("images/a.png?b", "images/a.png?b"),
    ],
)
def test_a_url_is_printed_without_its_secrets(url: str, shown: str, tmp_path: Path, media: Path, no_network: list[Any]) -> None:
    assert redact_url(url) == shown
    if "://" in url:
        for urls in (False, True):
            with pytest.raises(ValueError) as caught:
                resolve_media(url, MediaRules(media, urls=urls, cache=tmp_path))
            assert "secret" not in str(caught.value) and "sec/" not in str(caught.value)


@pytest.mark.parametrize("host", ["localhost", "127.0.0.1", "2130706433", "0x7f.1", "[::1]", "[::ffff:127.0.0.1]", "127.1"])
def test_requests_to_the_local_machine_are_rejected_in_every_spelling(site: Site, tmp_path: Path, host: str) -> None:
    site.says("/a.png")
    port = site.url.rpartition(":")[2]  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"expected a public address|cannot fetch .*(not known|resolution|No address)"):
        fetch_media(f"http://{host}:{port}/a.png", tmp_path)
    assert site.asked == []


def test_every_address_of_a_host_is_checked_and_the_checked_one_is_used(
    site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name whose server says a public address first, and another when asked again, as in DNS rebinding."""
    site.says("/a.png")
    port = int(site.url.rpartition(":")[2])  # type: ignore[attr-defined]
    named: list[list[str]] = [["93.184.216.34", "127.0.0.1"], ["127.0.0.1"], ["10.0.0.1"]]

    def lookup(host: str, port: int, **options: Any) -> list[Any]:
        assert host == "rebind.example"
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (address, port)) for address in named.pop(0)]

    monkeypatch.setattr(socket, "getaddrinfo", lookup)
    with pytest.raises(ValueError, match=r"expected a public address for rebind\.example, got 127\.0\.0\.1"):
        fetch_media(f"http://rebind.example:{port}/a.png", tmp_path)
    assert site.asked == []
    fetch_media(f"http://rebind.example:{port}/a.png", tmp_path, SMALL, loopback)
    assert site.asked == ["/a.png"] and named == [["10.0.0.1"]]  # looked up once: what was checked is what was asked


def test_an_untrusted_certificate_is_rejected(tmp_path: Path) -> None:
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes", "-days", "2"]
    command += ["-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(tmp_path / "key"), "-out", str(tmp_path / "cert")]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("no openssl command")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert", tmp_path / "key")
    site = Site()
    site.says("/a.png")
    with Serving(site, context) as server:
        url = f"https://127.0.0.1:{server.server_address[1]}/a.png"
        with pytest.raises(ValueError, match="certificate verify failed"):
            fetch_media(url, tmp_path / "cache", SMALL, loopback)
        assert site.asked == []
        trusting = ssl.create_default_context(cafile=str(tmp_path / "cert"))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(ssl, "create_default_context", lambda: trusting)
            assert fetch_media(url, tmp_path / "cache", SMALL, loopback).read_bytes() == PICTURE
        server.shutdown()


# ---------------------------------------------------------------------------------------------------------------- its use


def test_a_row_may_name_a_url_only_where_its_source_allows_it(
    site: Site, tmp_path: Path, media: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site.says("/a.png", body=(media / "a.png").read_bytes())
    url = f"{site.url}/a.png"  # type: ignore[attr-defined]
    with pytest.raises(ValueError, match=r"is a URL; set `allow_urls: true` in the source"):
        resolve_media(url, MediaRules(media, outside=True))
    rules = MediaRules(media, urls=True, cache=tmp_path / "cache")
    with pytest.raises(ValueError, match="expected a public address"):
        resolve_media(url, rules)
    assert site.asked == []
    path = fetch_media(url, tmp_path / "cache", DEFAULT_LIMITS, loopback)
    assert resolve_media(url, rules) == path


def test_a_rejected_connection_and_a_full_disk_are_errors_of_the_row(tmp_path: Path, site: Site) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(ValueError, match="the host is missing"):
        fetch_media("http:///a.png", tmp_path)
    with pytest.raises(ValueError, match="refused"):
        fetch_media(f"http://127.0.0.1:{port}/a.png", tmp_path, SMALL, loopback)
    site.says("/a.png")
    (tmp_path / "cache").write_text("a file where the folder goes")
    with pytest.raises(ValueError, match="cannot fetch"):
        _fetch(site, "/a.png", tmp_path / "cache")
