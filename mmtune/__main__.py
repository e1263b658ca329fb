"""Entry point of `mmtune` and `python -m mmtune`, which also handles Ctrl-C while the command line is imported.

Only modules that the interpreter has loaded already are imported at the top: Ctrl-C during an import prints a traceback.
"""

from __future__ import annotations

import sys
from types import TracebackType


def main() -> int:
    """Run the command line and return its exit code."""
    sys.excepthook = _print_escaped
    try:
        from mmtune.cli.main import entry_point

        return entry_point()
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130


def _print_escaped(kind: type[BaseException], error: BaseException, where: TracebackType | None) -> None:
    """Print the traceback of a bug with control characters escaped, because its message may contain data."""
    import traceback

    from mmtune.console.terminal_text import escape_controls

    print(escape_controls("".join(traceback.format_exception(kind, error, where))), end="", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
