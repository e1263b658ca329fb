"""Engines that do not start, do not answer, or answer nonsense: one message each, and no process is left."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import psutil
import pytest

from mmtune.cli.main import entry_point
from mmtune.serving.engine_process import EngineProcess, check_port, free_port, running_engine
from mmtune.utils.errors import CheckFailed, UserError

SERVER = """
import http.server, subprocess, sys
port = int(sys.argv[sys.argv.index("--port") + 1])
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
print("child", child.pid, flush=True)

class Nonsense(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.answer()

    def do_POST(self):
        self.answer()

    def answer(self):
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(b'{"hello": "world"}')

http.server.HTTPServer(("127.0.0.1", port), Nonsense).serve_forever()
"""
"""Listens, and answers every request with JSON that no OpenAI-compatible engine gives. It has a child."""
ENDS = SERVER.replace(
    "def do_POST(self):", "def do_POST(self):\n        print('ValueError: head_dim=16', flush=True); import os; os._exit(1)"
)
"""Answers that it is healthy, and ends at the first question."""


class NothingThere(BaseHTTPRequestHandler):
    """A web server that is no engine."""

    def do_GET(self) -> None:
        self.send_error(404)

    def do_POST(self) -> None:
        self.send_error(404)

    def log_message(self, *_: object) -> None:
        pass


IGNORES_SIGNALS = "import signal\nfor number in (2, 15): signal.signal(number, signal.SIG_IGN)\n"


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    return tmp_path / "model"


def serve(model: Path, program: str, *arguments: str) -> int:
    file = model.parent / "engine.py"
    file.write_text(program)
    command = f"{sys.executable} {file}"
    return entry_point(["serve", str(model), "--engine-command", command, "--port", str(free_port()), *arguments])


def children() -> list[int]:
    """The processes that this one started, and theirs, that still run."""
    running = psutil.Process().children(recursive=True)
    return [process.pid for process in running if process.status() != psutil.STATUS_ZOMBIE]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("program", "message"),
    [
        (
            "import sys\nprint('CUDA is missing')\nsys.exit(3)",
            "the engine ended before it answered, with exit code 3; its last line: CUDA",
        ),
        (
            "print('INFO x')\nprint('(core) RuntimeError: no kernel')\nraise ValueError('it failed, see above')",
            "the engine ended before it answered, with exit code 1; its first error: RuntimeError: no kernel",
        ),
        (ENDS, "the engine ended at its first question, with exit code 1; its first error: ValueError: head_dim=16"),
        ("import os\nos.kill(os.getpid(), 9)", "the engine ended before it answered, by SIGKILL: another program"),
        ("import time\ntime.sleep(60)", "does not answer at http://127.0.0.1:"),
        (SERVER, "expected a chat completion with `choices` and `usage.prompt_tokens`, got "),
        (IGNORES_SIGNALS + SERVER, "expected a chat completion with `choices`"),
    ],
)
def test_an_engine_that_fails_is_reported_and_ended(
    model: Path, program: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.serving.engine_process.END_S", 0.5)
    before = children()
    assert serve(model, program, "--timeout", "3") == 1
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("engine: ", "warning: "))]
    assert len(lines) == 1 and lines[0].startswith("failed: ") and message in lines[0], lines
    assert children() == before


def test_a_port_that_is_taken_is_an_error_before_anything_starts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert entry_point(["serve", str(model), "--port", str(port)]) == 2
    assert f"--port {port}: another program uses it; give another one, such as --port " in capsys.readouterr().err
    for wrong in (0, 65536):
        with pytest.raises(UserError, match=f"--port {wrong}: expected a number from 1 to 65535"):
            check_port(wrong)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["serve"], "expected RUN_OR_MODEL, or --check URL --run RUN"),
        (["serve", "MODEL", "--engine", "vlm"], "--engine vlm: no such engine; did you mean 'vllm'?"),
        (
            ["serve", "MODEL", "--engine-command", "no-such-program serve"],
            "expected a program that can be executed, got 'no-such",
        ),
        (["serve", "MODEL", "--engine-command", "'"], "--engine-command ': No closing quotation"),
        (
            ["serve", "MODEL", "--", "--port", "1"],
            "--port: the port is an option of mmtune: --port N before --; leave it out after --",
        ),
        (["serve", "MODEL", "--", "--host=0.0.0.0"], "--host=0.0.0.0: an engine listens on 127.0.0.1 only"),
        (["serve", "MODEL", "--run", "x"], "--run belongs to --check URL"),
        (["serve", "MODEL", "--samples", "32"], "--samples belongs to --check URL"),
        (["serve", "--check", "http://127.0.0.1:1", "--run", "x", "--port", "8000"], "--port starts an engine; --check URL"),
        (["serve", "MODEL", "--timeout", "0"], "--timeout 0: expected a positive number of seconds"),
        (["serve", "MODEL", "--json"], "--json belongs to --check URL"),
        (["serve", "--check", "http://127.0.0.1:1/v1"], "--check URL needs --run RUN"),
        (
            ["serve", "--check", "localhost:8000", "--run", "x"],
            "expected the address of an engine, such as http://127.0.0.1:8000/v1",
        ),
        (["serve", "MODEL", "--check", "http://127.0.0.1:1", "--run", "x"], "leave out RUN_OR_MODEL"),
        (["serve", "--check", "http://127.0.0.1:1", "--run", "x", "--samples", "0"], "--samples 0: expected at least 1"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], message: str, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point([str(model) if word == "MODEL" else word for word in arguments]) == 2
    assert message in capsys.readouterr().err


def test_an_option_of_the_engine_needs_two_dashes_before_it(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        entry_point(["serve", "runs/photos", "--device", "cpu"])
    assert "unrecognized arguments: --device cpu" in (errors := capsys.readouterr().err)
    assert errors.endswith("; options of the engine come after --\n")


def test_an_address_without_an_api_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    with HTTPServer(("127.0.0.1", 0), NothingThere) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        address = f"http://127.0.0.1:{server.server_port}/v1/models"
        assert entry_point(["serve", "--check", address, "--run", "x"]) == 2
        server.shutdown()
    errors = capsys.readouterr().err
    assert f"{address}/v1/chat/completions: no such address there (HTTP 404: " in errors and "--model-name" not in errors


def test_no_engine_at_the_address_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    assert entry_point(["serve", "--check", f"{address}/v1", "--run", "x"]) == 1
    errors = capsys.readouterr().err
    assert errors.startswith(f"failed: {address}: no engine answers there: ") and errors.count("\n") == 1


def test_a_directory_that_transformers_takes_for_a_revision_is_an_error(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model.rename(model.with_name("a@b"))
    assert entry_point(["serve", str(model.with_name("a@b")), "--port", str(free_port())]) == 2
    assert "a@b: `transformers serve` reads what follows an @ as a revision; rename the directory" in capsys.readouterr().err


def test_vllm_that_is_not_installed_is_an_error(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    assert entry_point(["serve", str(model), "--engine", "vllm"]) == 2
    assert "no program `vllm` on the PATH. vLLM needs an environment of its own" in capsys.readouterr().err


def test_an_encoder_decoder_model_needs_another_engine(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (model / "config.json").write_text('{"model_type": "florence2"}')
    assert entry_point(["serve", str(model), "--port", str(free_port())]) == 2
    assert "returns the answers of encoder-decoder models (florence2) without their beginning" in capsys.readouterr().err


@pytest.mark.parametrize("missing", ["openai", "uvicorn"])
def test_libraries_that_are_not_installed_are_named(
    model: Path, missing: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    assert entry_point(["serve", str(model), "--port", str(free_port())]) == 2
    assert f"mmtune serve needs {missing}: pip install 'mmtune[serve]'" in capsys.readouterr().err


@pytest.mark.slow
def test_an_engine_ends_with_a_process_that_is_killed(tmp_path: Path) -> None:
    """`kill -9` of mmtune leaves no time to end the engine: the kernel does it."""
    file = tmp_path / "engine.py"
    file.write_text("import os, time\nprint(os.getpid(), flush=True)\ntime.sleep(600)")
    program = (
        "import sys, time\nfrom mmtune.serving.engine_process import EngineProcess\n"
        f"EngineProcess([sys.executable, {str(file)!r}], {{}}, 1)\ntime.sleep(600)"
    )
    started = subprocess.Popen([sys.executable, "-c", program], stderr=subprocess.PIPE, text=True)
    assert started.stderr is not None
    engine = int(started.stderr.readline().removeprefix("engine: "))
    started.kill()
    started.wait()
    until = time.monotonic() + 20
    while psutil.pid_exists(engine) and psutil.Process(engine).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < until
        time.sleep(0.05)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_during_the_end_does_not_leave_the_engine(
    number: signal.Signals, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mmtune.serving.engine_process.END_S", 0.5)
    file = tmp_path / "engine.py"
    file.write_text(f"{IGNORES_SIGNALS}import time\nprint('ready', flush=True)\ntime.sleep(600)")
    before = children()

    with pytest.raises(KeyboardInterrupt), running_engine([sys.executable, str(file)], {}, free_port()) as process:
        end = EngineProcess.end
        process.end = lambda: (os.kill(os.getpid(), number), end(process))[1]  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)
    assert children() == before


@pytest.mark.slow
@pytest.mark.parametrize("session", [False, True])
def test_workers_end_although_the_main_process_was_killed(tmp_path: Path, session: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also a worker in a session of its own, which no signal to the engine's group reaches."""
    monkeypatch.setattr("mmtune.serving.engine_process.END_S", 0.5)
    program = IGNORES_SIGNALS + "import time; time.sleep(600)"
    worker = f"subprocess.Popen([sys.executable, '-c', {program!r}], start_new_session={session})"
    file = tmp_path / "engine.py"
    file.write_text(f"import os, subprocess, sys, time\n{worker}\ntime.sleep(1)\nos.kill(os.getpid(), 9)")
    before = children()
    with pytest.raises(CheckFailed, match="by SIGKILL"), running_engine([sys.executable, str(file)], {}, free_port()) as process:
        process.wait()
    assert children() == before


def test_an_engine_that_ends_by_itself_is_reported_without_the_errors_of_requests() -> None:
    ended = pytest.raises(CheckFailed, match=r"the engine ended by itself, with exit code 0; its last line: end$")
    program = "print('ValueError: a wrong request'); print('end')"
    with ended, running_engine([sys.executable, "-c", program], {}, free_port()) as process:
        process.wait()
