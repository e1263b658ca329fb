"""Tables that a benchmark writes into a page of docs/, between two marks."""

from __future__ import annotations

from pathlib import Path


def write_table(page: Path, script: str, rows: str, end: str = "<!-- end of the table -->") -> None:
    """Replace the table of a script in a page.

    Args:
        script: the file name in the mark before the table.
        rows: the lines of the table, each with its line break.
        end: the mark after the table.
    """
    before, mark, rest = page.read_text(encoding="utf-8").partition(f"<!-- {script} writes this table -->\n")
    _, end_mark, after = rest.partition(end)
    assert mark and end_mark, f"{page} lacks the marks"
    page.write_text(f"{before}{mark}{rows}{end_mark}{after}", encoding="utf-8")
