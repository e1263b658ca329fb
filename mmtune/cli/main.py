"""The command line, `mmtune VERB`.

Exit codes: 0 success, 1 a check failed, 2 invalid input, 130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from contextlib import nullcontext, redirect_stdout
from difflib import get_close_matches
from typing import Any, NoReturn

from mmtune import __version__
from mmtune.cli.answer_verbs import add_answer_verbs
from mmtune.cli.comparison_verb import add_comparison_verb
from mmtune.cli.data_verbs import add_data_verbs
from mmtune.cli.evaluation_verbs import add_evaluation_verbs
from mmtune.cli.explain_verb import add_explain_verb
from mmtune.cli.recipe_verbs import add_recipe_verbs
from mmtune.cli.run_verbs import add_run_verbs
from mmtune.cli.serve_verb import add_export_verbs, add_serve_verb
from mmtune.console.library_output import rank_prefix
from mmtune.console.signals import exit_on_signals
from mmtune.console.terminal_text import escape_output, supports_unicode
from mmtune.distributed.launch_errors import leaves_bugs, print_error, print_lost_peer
from mmtune.utils.errors import CheckFailed, Stopped, UserError, missing_library
from mmtune.utils.files import expand_user

PATHS = (
    "recipe",
    "model",
    "out",
    "release",
    "folder",
    "dest",
    "data",
    "html",
    "media_root",
    "image",
    "adapter",
    "resume",
    "trained",
)
"""Arguments that are paths. A leading `~` is expanded here too, because a shell does not expand `--out=~/x`."""


@leaves_bugs()
@escape_output
@exit_on_signals
def entry_point(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code. A UserError is printed as one message; a bug keeps its traceback."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    parsed = _parse(words)
    parsed.command_line = ["mmtune", *words]
    run: Callable[[argparse.Namespace], Any] = parsed.run
    try:
        _check_utf8(words)
        if getattr(parsed, "json", False):
            # Only the JSON goes to standard output. The other processes of a launch print nothing there.
            with nullcontext() if rank_prefix() else redirect_stdout(sys.stderr):
                result = run(parsed)
            _print_json(result)
        else:
            run(parsed)
    except UserError as error:
        print_error(f"error: {error}")
        return 2
    except ImportError as error:
        if (reason := missing_library(error)) is None:
            raise
        print_error(f"error: a required library is missing: {reason}")
        return 2
    except CheckFailed as error:
        if error.result is not None and getattr(parsed, "json", False):
            _print_json(error.result)
        print_error(f"failed: {error}")
        return 1
    except Stopped as error:
        print_error(f"stopped: {error}")
        return error.exit_code
    except RuntimeError as error:
        from mmtune.distributed.context import is_lost_peer

        if not is_lost_peer(error):
            raise
        print_lost_peer()
        return 1
    except KeyboardInterrupt:
        print_error("interrupted")
        return 130
    return 0


def _print_json(result: Any) -> None:
    print(json.dumps(result, indent=2, ensure_ascii=not supports_unicode(sys.stdout)))


def _check_utf8(arguments: Sequence[str]) -> None:
    """Reject a path whose bytes are not UTF-8, because a report could not contain it."""
    for argument in arguments:
        shown = argument.encode("utf-8", "backslashreplace").decode()
        if shown != argument.encode("utf-8", "surrogateescape").decode("utf-8", "replace"):
            raise UserError(f"{shown}: the argument is not valid UTF-8; rename the file")


def _parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse the arguments. Overrides may also follow an option, which argparse does not support for positional arguments."""
    parser = _parser()
    end = arguments.index("--") if arguments[:1] == ["serve"] and "--" in arguments else len(arguments)
    parsed, rest = parser.parse_known_args(arguments[:end])
    if arguments[end + 1 :]:
        parsed.engine_options = list(arguments[end + 1 :])
    overrides = getattr(parsed, "overrides", None)
    unknown = [argument for argument in rest if overrides is None or argument.startswith("-") or "=" not in argument]
    if unknown:
        hint = (overrides is not None and _as_override(unknown)) or _near_option(parsed.parser, unknown)
        if hasattr(parsed, "engine_options"):
            hint += "; options of the engine come after --"
        parsed.parser.error(f"unrecognized arguments: {' '.join(unknown)}{hint}")
    if rest:
        parsed.overrides = [*parsed.overrides, *rest]
    for name, value in vars(parsed).items():
        if name in PATHS and isinstance(value, (str, list)):
            setattr(parsed, name, [*map(expand_user, value)] if isinstance(value, list) else expand_user(value))
    return parsed


def _as_override(unknown: Sequence[str]) -> str:
    """A hint for a recipe's key that was given as an option."""
    from mmtune.recipe.unknown_keys import key_of_option

    name, equals, value = unknown[0].removeprefix("--").partition("=")
    value = value if equals else unknown[1] if len(unknown) > 1 and not unknown[1].startswith("-") else "VALUE"
    key = key_of_option(name) if unknown[0].startswith("--") else None
    return f"; give keys of the recipe without dashes: {key}={value}" if key else ""


def _near_option(parser: argparse.ArgumentParser, unknown: Sequence[str]) -> str:
    """A hint for a misspelt or abbreviated option."""
    name = unknown[0].partition("=")[0]
    options = re.findall(r"--[\w-]+", parser.format_usage())
    close = [option for option in options if len(name) > 3 and option.startswith(name)] or get_close_matches(name, options, n=1)
    return f"; did you mean '{close[0]}'?" if close else ""


def _near_choice(message: str) -> str:
    """A hint for a misspelt verb or choice, from argparse's message."""
    match = re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message)
    close = get_close_matches(match[1], re.findall(r"[\w-]+", match[2]), n=1) if match else []
    return f"; did you mean '{close[0]}'?" if close else ""


class _Parser(argparse.ArgumentParser):
    """argparse's parser without abbreviated options."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        """Print the usage and exit with 2, like argparse, but once for all processes of a launch; without a verb, the help."""
        if message.endswith("required: VERB"):
            print_error(self.format_help().rstrip())
            raise SystemExit(2)
        print_error(f"{self.format_usage()}{self.prog}: error: {message}{_near_choice(message)}")
        raise SystemExit(2)


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="mmtune", description="Parameter-efficient multimodal instruction tuning.")
    parser.add_argument("--version", action="version", version=f"mmtune {__version__}")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    add_run_verbs(verbs, _verb)
    add_evaluation_verbs(verbs, _verb)
    add_answer_verbs(verbs, _verb)
    add_explain_verb(verbs, _verb)
    add_comparison_verb(verbs, _verb)
    add_serve_verb(verbs, _verb)
    add_export_verbs(
        verbs.add_parser("export", help="convert a model").add_subparsers(required=True, metavar="VERB"),
        _verb,
    )
    add_recipe_verbs(verbs, _verb)
    add_data_verbs(
        verbs.add_parser("data", help="validate and show data sets").add_subparsers(required=True, metavar="VERB"), _verb
    )
    return parser


def _verb(verbs: Any, name: str, run: Callable[[argparse.Namespace], Any], about: str) -> argparse.ArgumentParser:
    verb: argparse.ArgumentParser = verbs.add_parser(name, help=about, description=about)
    verb.set_defaults(run=run, parser=verb)
    verb.add_argument("--json", action="store_true", help="print the result as JSON on standard output")
    return verb


if __name__ == "__main__":
    sys.exit(entry_point())
