"""A rich console whose own styles reach the terminal, and control characters of the text in it do not."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from mmtune.terminal_text import escape_controls, unescaped


class StyledConsole(Console):
    """rich's Console on standard output, with the text of every segment escaped.

    Args:
        settings: rich's.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(file=unescaped(sys.stdout), **settings)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's segments, their text escaped."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)
