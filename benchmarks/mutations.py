"""Mutation testing: draw changes of the package at random, and count how many the test suite catches.

    python benchmarks/mutations.py --seed 0 --count 50

Each mutation is one small change of one expression or statement: a comparison, a boolean or arithmetic operator, a condition, a
constant, a returned value, or a call that is left out (the classical operators of mutation testing: DeMillo, Lipton and Sayward
1978, "Hints on test data selection"). Mutations are drawn uniformly over all places of the package. A copy of the repository is
changed, never the checkout. The tests that mirror the changed file run first, then the rest of the fast suite, then slow tests.

A mutation that survives is printed as a diff. It is either a missing test or an equivalent program; a person decides.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TIMEOUT_S = 1800
COMPARISONS: dict[type[ast.cmpop], str] = {
    ast.Lt: "<=",
    ast.LtE: "<",
    ast.Gt: ">=",
    ast.GtE: ">",
    ast.Eq: "!=",
    ast.NotEq: "==",
    ast.Is: "is not",
    ast.IsNot: "is",
    ast.In: "not in",
    ast.NotIn: "in",
}
ARITHMETIC: dict[type[ast.operator], str] = {
    ast.Add: "-",
    ast.Sub: "+",
    ast.Mult: "+",
    ast.Div: "*",
    ast.FloorDiv: "*",
    ast.Mod: "*",
    ast.BitOr: "&",
    ast.BitAnd: "|",
}


@dataclass(frozen=True)
class Mutation:
    """A replacement of one piece of a file.

    Attributes:
        file: of the package, relative to the repository.
        line: its first line, from 1.
        start, end: offsets in the file's bytes.
        text: what stands there instead.
        what: the kind of change.
    """

    file: str
    line: int
    start: int
    end: int
    text: str
    what: str

    def apply(self, source: bytes) -> bytes:
        """The changed source."""
        return source[: self.start] + self.text.encode() + source[self.end :]


def mutations_of(file: str, source: bytes) -> Iterator[Mutation]:
    """All mutations of one file. Annotations, docstrings, `TYPE_CHECKING` blocks and texts of messages are left alone."""
    lines = source.splitlines(keepends=True)
    starts = [0]
    for line in lines:
        starts.append(starts[-1] + len(line))

    def segment(node: ast.expr | ast.stmt) -> tuple[int, int]:
        assert node.end_lineno is not None and node.end_col_offset is not None
        return starts[node.lineno - 1] + node.col_offset, starts[node.end_lineno - 1] + node.end_col_offset

    def replace(node: ast.expr | ast.stmt, text: str, what: str) -> Mutation:
        return Mutation(file, node.lineno, *segment(node), text, what)

    def code(node: ast.expr | ast.stmt) -> str:
        start, end = segment(node)
        return source[start:end].decode()

    for node in executed(ast.parse(source)):
        match node:
            case ast.Compare(left=left, ops=[operator], comparators=[right]) if type(operator) in COMPARISONS:
                yield replace(node, f"(({code(left)}) {COMPARISONS[type(operator)]} ({code(right)}))", "comparison")
            case ast.BoolOp(op=operator, values=[first, *rest]):
                word = " or " if isinstance(operator, ast.And) else " and "
                yield replace(node, "(" + word.join(f"({code(value)})" for value in [first, *rest]) + ")", "boolean operator")
            case ast.UnaryOp(op=ast.Not(), operand=operand):
                yield replace(node, f"({code(operand)})", "not")
            case ast.BinOp(left=left, op=operator, right=right) if type(operator) in ARITHMETIC:
                yield replace(node, f"(({code(left)}) {ARITHMETIC[type(operator)]} ({code(right)}))", "arithmetic operator")
            case ast.If(test=test) | ast.IfExp(test=test) | ast.While(test=test):
                yield replace(test, f"(not ({code(test)}))", "condition")
            case ast.Constant(value=bool(value)):
                yield replace(node, str(not value), "constant")
            case ast.Constant(value=int(value) | float(value)):
                yield replace(node, f"({value} + 1)", "constant")
            case ast.Return(value=ast.expr() as value) if not (isinstance(value, ast.Constant) and value.value is None):
                yield replace(value, "None", "returned value")
            case ast.Expr(value=ast.Call()):
                yield replace(node, "pass", "call left out")


def executed(tree: ast.AST) -> Iterator[ast.AST]:
    """The nodes that run: no annotations, no `TYPE_CHECKING` blocks, no texts."""
    for name, value in ast.iter_fields(tree):
        if name in ("annotation", "returns"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr):
                continue
            if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                continue
            yield child
            yield from executed(child)


def draw(count: int, seed: int) -> list[Mutation]:
    """Mutations drawn uniformly, without replacement, from all of the package's files."""
    files = sorted((ROOT / "mmtune").rglob("*.py"))
    every = [each for file in files for each in mutations_of(file.relative_to(ROOT).as_posix(), file.read_bytes())]
    print(f"{len(every):,} possible mutations in {len(files)} files; drawing {count} with seed {seed}", flush=True)
    return random.Random(seed).sample(every, count)


def mirrored(file: str) -> list[str]:
    """The tests of a file, by the folder that mirrors its own: that folder, or the nearest above it with tests."""
    folder = ROOT / "tests" / Path(file).relative_to("mmtune").parent
    while not any(folder.glob("test_*.py")) and folder != ROOT / "tests":
        folder = folder.parent
    name = folder / f"test_{Path(file).stem}.py"
    first = [name] if name.is_file() else []
    return [str(path.relative_to(ROOT)) for path in [*first, folder]]


def caught_by(copy: Path, mutation: Mutation, processes: int) -> str | None:
    """The first stage of tests that fails on the changed copy, with the failed test; None when all pass."""
    source = (ROOT / mutation.file).read_bytes()
    changed = mutation.apply(source)
    compile(changed, mutation.file, "exec")
    (copy / mutation.file).write_bytes(changed)
    try:
        return first_failure(copy, mutation.file, processes)
    finally:
        (copy / mutation.file).write_bytes(source)


def first_failure(copy: Path, file: str, processes: int) -> str | None:
    """The first stage of the tests of a file that fails, with the failed test; None when all pass."""
    parallel = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
    fast, slow = ["-m", "not slow and not gpu"], ["-m", "slow and not gpu"]
    *own, folder = mirrored(file)
    top = folder == "tests"  # of the files at the package's top, which have no folder of their own
    stages = [
        *([("its own tests", [*own, *fast])] if own else []),
        *([] if top else [("its folder", [folder, *fast])]),
        ("the fast suite", ["tests", *fast, *parallel, "--ignore", "tests/test_wheel.py"]),
        ("slow tests", ["tests/test_quickstart.py" if top else folder, "tests/training", "tests/families", *slow, *parallel]),
    ]
    environment = {**os.environ, "PYTHONPATH": str(copy), "OMP_NUM_THREADS": "1"}
    for stage, selection in stages:
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "--no-header", *selection]
        try:
            done = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True, timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return f"{stage}: no end within {TIMEOUT_S} s"
        if done.returncode not in (0, 5):  # 5: no test was selected
            failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
            return f"{stage}: {failed[0].removeprefix('FAILED ')[:120] if failed else done.stdout[-300:]}"
    return None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=50)
    parser.add_argument("--skip", type=int, default=0, help="leave out the first of the mutations drawn")
    parser.add_argument("--processes", type=int, default=2, help="pytest processes of the fast suite")
    arguments = parser.parse_args()
    drawn = draw(arguments.count, arguments.seed)
    survivors = 0
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "mmtune"
        shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".venv", "runs", ".*_cache", "__pycache__"))
        if failure := first_failure(copy, "mmtune/training/trainer.py", arguments.processes):
            sys.exit(f"the unchanged package fails: {failure}")
        for number, mutation in enumerate(drawn):
            if number < arguments.skip:
                continue
            start = time.perf_counter()
            stage = caught_by(copy, mutation, arguments.processes)
            seconds = time.perf_counter() - start
            print(
                f"{number + 1:3} {mutation.file}:{mutation.line} {mutation.what}: {stage or 'SURVIVES'} ({seconds:.0f} s)",
                flush=True,
            )
            if stage is None:
                survivors += 1
                source = (ROOT / mutation.file).read_bytes()
                lines = (each.decode().splitlines() for each in (source, mutation.apply(source)))
                print("\n".join(difflib.unified_diff(*lines, lineterm="", n=2)), flush=True)
    tried = len(drawn) - arguments.skip
    print(f"{tried - survivors} of {tried} mutations caught, {survivors} survive", flush=True)


if __name__ == "__main__":
    main()
