"""rich console that prints its own styles but escapes control characters in the text."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from rich.cells import cell_len
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment
from rich.table import Table

from mmtune.console.terminal_text import escape_controls, unescaped

LONG_WORD = 16
"""Longer words in a table, such as module paths, may be folded."""


class StyledConsole(Console):
    """rich's Console on standard output, with the text of every segment escaped.

    Args:
        settings: of rich's Console.
    """

    def __init__(self, **settings: Any) -> None:
        super().__init__(file=unescaped(sys.stdout), **settings)

    def print_table(self, table: Table) -> None:
        """Print a table without cutting numbers and names off. Cells use more lines, or the table is wider than the terminal.

        Args:
            table: columns that are justified to the right contain numbers.
        """
        is_narrow = self.measure(table, options=self.options.update(width=10_000)).maximum > self.width
        for column in table.columns:
            words = [word for cell in (column.header, *column.cells) for word in str(cell).split(" ")]
            longest = max(map(cell_len, words), default=0)
            is_figure = column.justify == "right"
            column.no_wrap = column.no_wrap or (is_figure and not any(" " in str(cell) for cell in column.cells))
            column.overflow, column.min_width = "fold", longest if is_figure or column.no_wrap else min(longest, LONG_WORD)
            if is_narrow:
                column.header = str(column.header).replace(" ", "\n")
        least = sum((column.min_width or 0) + len("│  ") for column in table.columns) + len("│")
        if least > self.width:  # otherwise rich leaves columns out
            table.width = least
        self.print(table, crop=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """rich's segments with escaped text."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(escape_controls(segment.text), segment.style)
