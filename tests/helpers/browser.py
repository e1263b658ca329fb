"""Headless Chromium for tests of pages, with what went wrong in a page and what it requested from other hosts."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

PROGRAMS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
WIDE, NARROW = (1280, 900), (400, 800)


@contextmanager
def chromium() -> Iterator[Any]:
    """A started browser of playwright; the test is skipped on a machine without Chromium."""
    program = next((path for name in PROGRAMS if (path := shutil.which(name))), None)
    if program is None:
        pytest.skip("needs Chromium: apt install chromium")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class PageRecord:
    """What a page did.

    Attributes:
        errors: messages of the console's level `error`, and exceptions that nothing caught.
        dialogs: the texts of `alert` and its like, by which an injected script shows itself.
        external: URLs that were requested from another host than the page's own.
    """

    errors: list[str] = field(default_factory=list)
    dialogs: list[str] = field(default_factory=list)
    external: list[str] = field(default_factory=list)


@contextmanager
def opened_page(
    browser: Any, url: str, size: tuple[int, int] = WIDE, theme: str = "light", scale: float = 1
) -> Iterator[tuple[Any, PageRecord]]:
    """A page in a context of its own, and its record.

    Args:
        browser: of `chromium`.
        url: `http://` or `file://`.
        size: (width, height) of the window in pixels.
        theme: `light` or `dark`.
        scale: pixels of a screenshot for one of the page.
    """
    viewport = {"width": size[0], "height": size[1]}
    context = browser.new_context(viewport=viewport, color_scheme=theme, device_scale_factor=scale)
    page, record = context.new_page(), PageRecord()
    page.on("console", lambda message: record.errors.append(message.text) if message.type == "error" else None)
    page.on("pageerror", lambda error: record.errors.append(str(error)))
    page.on("dialog", lambda dialog: (record.dialogs.append(dialog.message), dialog.dismiss()))
    host = urlsplit(url).netloc

    def check_host(request: Any) -> None:
        parts = urlsplit(request.url)
        if parts.scheme not in ("data", "blob") and parts.netloc != host:
            record.external.append(request.url)

    page.on("request", check_host)
    try:
        page.goto(url)
        yield page, record
    finally:
        context.close()


def overflow(page: Any) -> int:
    """Pixels by which the page is wider than its window: it would scroll sideways."""
    return page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth")


def axe_violations(page: Any) -> list[str]:
    """The accessibility violations of impact `serious` or `critical` that axe-core reports, with their elements."""
    from axe_playwright_python.sync_playwright import Axe

    violations = Axe().run(page).response["violations"]
    return [
        f"{each['id']}: {node['html'][:200]}"
        for each in violations
        if each["impact"] in ("serious", "critical")
        for node in each["nodes"]
    ]
