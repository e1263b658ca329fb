"""Warnings of libraries: known ones are not printed, others once on one line for all processes of a run."""

from __future__ import annotations

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType

import pytest
from transformers.utils import logging as transformers_logging

from mmtune.console.library_warnings import KNOWN, KnownWarning, WarningPrinter, print_warnings_once
from mmtune.data.processes import map_rows


@pytest.fixture
def printed(capfd: pytest.CaptureFixture[str]) -> Iterator[Callable[[], list[str]]]:
    """The lines of standard error, with warnings printed as in a command."""
    handlers, factory = logging.root.handlers[:], logging.getLogRecordFactory()
    logging.root.handlers[:] = [each for each in handlers if not isinstance(each, WarningPrinter)]
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        print_warnings_once()
        print_warnings_once()
        yield lambda: capfd.readouterr().err.splitlines()
    logging.root.handlers[:] = handlers
    logging.setLogRecordFactory(factory)


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[str, str], ModuleType]]:
    """Makes and imports a module of a library, which warns in its function `warn`."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def make(name: str, warns: str) -> ModuleType:
        folder = tmp_path.joinpath(*name.split("."))
        folder.mkdir(parents=True, exist_ok=True)
        source = folder / "__init__.py"
        source.write_text(f"import logging, warnings\n{warns}\n")
        module = ModuleType(name)
        exec(compile(source.read_text(), str(source), "exec"), vars(module))  # noqa: S102
        return module

    return make


def _emit(known: KnownWarning, library: Callable[[str, str], ModuleType]) -> None:
    text = f"before {known.text} after"
    if known.kind == "WARNING":
        logging.getLogger(f"{known.module}.sub").warning("%s", text)
        logging.getLogger(known.module).warning(text)
        return
    warns = f"class {known.kind}(UserWarning): pass\ndef warn(): warnings.warn({text!r}, {known.kind})"
    library(known.module, warns).warn()


def test_known_warnings_are_not_printed(printed: Callable[[], list[str]], library: Callable[[str, str], ModuleType]) -> None:
    for known in KNOWN:
        _emit(known, library)
    assert printed() == []


def test_an_unknown_warning_is_one_line_once(printed: Callable[[], list[str]], library: Callable[[str, str], ModuleType]) -> None:
    lib = library("somelib.sub", "def warn(n): warnings.warn(f'{n} rows\\n  were odd', FutureWarning, stacklevel=1)")
    for n in (3, 44):
        lib.warn(n)
    for _ in range(2):
        logging.getLogger("otherlib.sub").warning("careful with %s", "this")
    logging.getLogger("otherlib").error("that failed")
    logging.getLogger("otherlib").error("that failed")
    logging.getLogger("otherlib").setLevel(logging.DEBUG)
    logging.getLogger("otherlib").info("chatter")
    known = KNOWN[0]
    logging.getLogger(f"{known.module}x").warning(known.text)  # the words of one library are news in another
    assert printed() == [
        "warning: somelib: 3 rows were odd",
        "warning: otherlib: careful with this",
        "error: otherlib: that failed",
        "error: otherlib: that failed",
        f"warning: {known.module}x: {known.text}",
    ]


def test_the_log_level_of_a_recipe_is_that_of_transformers(printed: Callable[[], list[str]]) -> None:
    before = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_info()  # as the Trainer does for train.log_level: info
    try:
        logging.getLogger("transformers.trainer").info("Num examples = 40")
        logging.getLogger("transformers.trainer").debug("chatter")
    finally:
        transformers_logging.set_verbosity(before)
    assert printed() == ["info: transformers: Num examples = 40"]


def test_a_record_that_cannot_be_formatted_stops_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    record = logging.LogRecord("lib", logging.WARNING, "lib.py", 1, "use the new name", (FutureWarning,), None)
    WarningPrinter().handle(record)
    assert capsys.readouterr().err == "warning: lib: use the new name (<class 'FutureWarning'>,)\n"


def test_a_library_with_its_own_handler_prints_once(printed: Callable[[], list[str]], tmp_path: Path) -> None:
    logger = logging.getLogger("chattylib")
    logger.propagate = False
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.addHandler(file := logging.FileHandler(tmp_path / "log"))
    try:
        logging.getLogger("chattylib.sub").warning("once")
    finally:
        logger.removeHandler(file)
        file.close()
    assert printed() == ["warning: chattylib: once"]
    assert (tmp_path / "log").read_text() == "once\n"


def _warn(index: int) -> int:
    logging.getLogger("rowlib").warning("row %d is odd", index)
    return index


def test_workers_print_a_warning_once_together(printed: Callable[[], list[str]]) -> None:
    assert list(map_rows(_warn, range(200), 2, "rows")) == list(range(200))
    [line] = printed()
    assert line in ("warning: rowlib: row 0 is odd", "warning: rowlib: row 64 is odd")
