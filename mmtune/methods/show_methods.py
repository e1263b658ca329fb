"""`mmtune methods`: what works with what, as it was measured."""

from __future__ import annotations

import re
from typing import Any

from rich.table import Table

from mmtune.console.styled_console import StyledConsole
from mmtune.methods.capability_table import PRECISIONS, ZERO_STAGES, capabilities, measured_method, nearest_that_works

LIBRARY_ERROR = re.compile(r"^\w+Error: .*", re.DOTALL)
"""A reason that is an exception as it was caught; `--json` gives it whole."""


def method_rows() -> list[dict[str, Any]]:
    """One row a method and variant: its default learning rate, and by precision whether it trains, also with gradient
    checkpointing and at ZeRO 1 to 3, and merges; each true or the reason why not."""
    rows = []
    for name, cells in capabilities().items():
        method = measured_method(name)
        about = method.variants[name].about if name in method.variants else method.about
        rows.append({"method": name, "about": about, "learning_rate": method.learning_rate, "precisions": cells})
    return rows


def print_methods() -> None:
    """Print the table, and below it each unsupported combination with its reason and the nearest that works."""
    table = Table(
        title="Methods: t trains, c with checkpointing, 123 at ZeRO stages, m merges",
        title_justify="left",
    )
    table.add_column("method", no_wrap=True)
    table.add_column("learning rate", justify="right")
    for precision in PRECISIONS:
        table.add_column(precision)
    unsupported = []
    for row in method_rows():
        cells = []
        for precision in PRECISIONS:
            cell = row["precisions"][precision]
            stages = "".join(str(stage) if cell[f"zero{stage}"] is True else "-" for stage in ZERO_STAGES)
            letters = {"t": cell["train"], "c": cell["checkpointing"], stages: True, "m": cell["merge"]}
            cells.append(" ".join(letter if works is True else "-" for letter, works in letters.items()))
            for what, works in cell.items():
                if works is not True and (what == "train" or cell["train"] is True):
                    why = LIBRARY_ERROR.sub("it ends in an error of a library", works)
                    unsupported.append((row["method"], precision, what, why))
        table.add_row(row["method"], f"{row['learning_rate']:g}", *cells)
    console = StyledConsole()
    console.print_table(table)
    grouped: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for method, precision, what, why in unsupported:
        nearest = nearest_that_works(method, what, precision)
        grouped.setdefault((method, why, nearest), {}).setdefault(what, []).append(precision)
    for (method, why, nearest), abilities in grouped.items():
        precisions = ", ".join(next(iter(abilities.values())))
        console.print(f"{method}, {precisions}: no {', '.join(abilities)}: {why}; {nearest}", markup=False, highlight=False)
    console.print("Measured on the CPU; ZeRO in two processes, without offload.", highlight=False)
    for row in method_rows():
        console.print(f"{row['method']}: {row['about']}", markup=False, highlight=False)
