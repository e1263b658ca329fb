"""The program `mmtune`, also as `python -m mmtune`: the command line, with Ctrl-C answered while it is imported.

What is imported above `main` is what the interpreter has loaded by then: Ctrl-C meanwhile would print a traceback.
"""

from __future__ import annotations

import sys
from types import TracebackType


def main() -> int:
    """Run the command line; returns its exit code."""
    sys.excepthook = _print_escaped
    try:
        from mmtune.cli.main import entry_point

        return entry_point()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_escaped(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print the traceback of a bug; its message may quote data."""
    import traceback

    from mmtune.console.terminal_text import escape_controls

    print(escape_controls("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
