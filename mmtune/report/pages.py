"""HTML pages in one file: rendered with styles and scripts inside, a policy against others, all text escaped."""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from jinja2 import Environment, PackageLoader
from PIL import Image

LOSSLESS_BYTES = 40_000
"""An embedded image whose PNG file is larger is a JPEG."""


def render_page(
    template: str, *, title: str, styles: Sequence[str] = (), scripts: Sequence[str] = (), policy: str = "", **values: Any
) -> str:
    """A page from one of the templates, which extends `page.html.jinja`; all text is escaped.

    The page's Content-Security-Policy allows its own styles and scripts by their hash and embedded images, and no request. So
    the templates have neither `style` attributes nor event handlers.

    Args:
        styles: files beside the template, after `page.css`.
        scripts: files beside the template, which run in this order at the end of the page.
        policy: further directives for a page of a server, such as `connect-src 'self'`.
        values: of the template.
    """
    environment = _environment()
    style, script = ("\n".join(map(_source, names)) for names in (("page.css", *styles), scripts))
    directives = [
        "default-src 'none'",
        "img-src data:",
        f"style-src {_hash(style)}",
        *([f"script-src {_hash(script)}"] if script else []),
        "base-uri 'none'",
        "form-action 'none'",
        *([policy] if policy else []),
    ]
    page = environment.get_template(template).render(
        **values, title=title, style=style, script=script, policy="; ".join(directives)
    )
    # A file name that is not UTF-8 has lone surrogates in Python, which no encoding has: they are shown as \udcXX.
    return page.encode("utf-8", "backslashreplace").decode("utf-8")


def data_uri(image: bytes, image_format: str) -> str:
    """The address of an image that is embedded in a page; `image_format` is png, jpeg or webp."""
    return f"data:image/{image_format};base64,{base64.b64encode(image).decode('ascii')}"


def embedded_image(image: Image.Image) -> str:
    """The address of an image, which is in RGB: lossless if that is small."""
    for image_format in ("png", "jpeg"):
        buffer = io.BytesIO()
        image.save(buffer, image_format, quality=85)
        if buffer.tell() <= LOSSLESS_BYTES:
            break
    return data_uri(buffer.getvalue(), image_format)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    return Environment(loader=PackageLoader("mmtune.report"), autoescape=True, trim_blocks=True, lstrip_blocks=True)


@lru_cache(maxsize=32)
def _source(name: str) -> str:
    """A style or a script, as it stands in the file."""
    environment = _environment()
    assert environment.loader is not None
    return environment.loader.get_source(environment, name)[0].strip()


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode('ascii')}'"
