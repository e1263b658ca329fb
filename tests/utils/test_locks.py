"""Write locks of directories; symbolic links, mount points, file modes and leftovers of killed processes."""

from __future__ import annotations

import os
import signal
import socket
import stat
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from mmtune.cli.main import entry_point
from mmtune.distributed.context import SINGLE_PROCESS
from mmtune.models.checkpoints.trained_weights import find_trained_weights
from mmtune.recipe.recipe import Recipe
from mmtune.run_directory import RunDirectory, git_commit, new_run
from mmtune.utils.errors import UserError
from mmtune.utils.files import check_links, check_replaceable, replace_text, replaced_directory, resolve_link
from mmtune.utils.locks import lock_file, lock_holder, locked


@contextmanager
def held_elsewhere(directory: Path) -> Iterator[int]:
    """Another process, whose number is yielded, holds a directory's lock meanwhile."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        with locked(directory):
            os.write(writer, b"x")
            signal.pause()
        os._exit(0)
    os.read(reader, 1)
    try:
        yield child
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        os.close(reader)
        os.close(writer)


def test_a_lock_is_released_with_its_process_and_its_file_removed(tmp_path: Path) -> None:
    run = tmp_path / "deep" / "run"
    with held_elsewhere(run) as holder:
        in_use = pytest.raises(UserError, match=rf"in use by process {holder} on {socket.gethostname()}")
        with in_use, locked(run):
            pass
        run.mkdir()
        (run / "recipe.yaml").touch()
        unfinished = rf"run is not finished: process {holder} on .* works on it; wait until it ends, or for a checkpoint"
        for read in (lambda: find_trained_weights(run), RunDirectory(run).read_summary):
            with pytest.raises(UserError, match=unfinished):
                read()
        assert lock_holder(run)
    assert lock_file(run).exists() and lock_holder(run) is None  # the process was killed
    with locked(run) as is_locked:
        assert is_locked
    assert not lock_file(run).exists()
    with locked(tmp_path / "new" / "run"):
        pass
    assert not (tmp_path / "new").exists()


def test_a_holder_that_has_not_left_its_name_is_another_process(tmp_path: Path) -> None:
    with held_elsewhere(tmp_path / "run"):
        lock_file(tmp_path / "run").write_text("")
        with pytest.raises(UserError, match="in use by another process; wait"), locked(tmp_path / "run"):
            pass


def test_permission_errors_are_not_reported_as_another_writer() -> None:
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to other users
        (folder := Path(name)).chmod(0o755)
        lock_file(folder / "left").write_text("process 1 on elsewhere", encoding="utf-8")
        lock_file(folder / "left").chmod(0o444)
        (folder / "closed").mkdir(mode=0o000)
        folder.chmod(0o555)
        child = os.fork()
        if child == 0:
            if os.geteuid() == 0:
                os.setuid(65534)
            with (
                locked(folder / "left") as left,
                locked(folder / "new") as new,
                locked(folder / "closed" / "deep" / "run") as deep,
            ):
                os._exit(int(left or new or deep))
            os._exit(2)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
        folder.chmod(0o755)


@pytest.mark.parametrize("option", ["--overwrite", "--resume"])
def test_a_second_start_names_the_process_that_trains(
    make_recipe: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str], option: str
) -> None:
    make_recipe()
    with held_elsewhere(tmp_path / "run") as holder:
        (tmp_path / "link").symlink_to(tmp_path / "run")
        for output_dir in (tmp_path / "run", tmp_path / "link"):
            assert entry_point(["train", str(tmp_path / "recipe.yaml"), option, f"output_dir={output_dir}"]) == 2
            assert f"in use by process {holder}" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_two_writers_of_one_destination(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with held_elsewhere(tmp_path / "out") as holder:
        with pytest.raises(UserError, match=f"in use by process {holder}"), replaced_directory(tmp_path / "out", True, "mark"):
            pass
        assert entry_point(["data", "digits", str(tmp_path / "out")]) == 2
    assert list(tmp_path.iterdir()) == [lock_file(tmp_path / "out")]


def test_leftovers_of_a_killed_process_are_removed_and_other_files_stay(tmp_path: Path) -> None:
    for name in (".out.abcdefgh.partial", ".out.b.abcdefgh.partial", ".out.notes"):
        (tmp_path / name / "new").mkdir(parents=True)
    killed_between_the_renamings = tmp_path / ".other.abcdefgh.partial"
    (killed_between_the_renamings / "old").mkdir(parents=True)
    (killed_between_the_renamings / "old" / "mark").write_text("earlier", encoding="utf-8")
    with replaced_directory(tmp_path / "out", False, "mark") as fresh:
        (fresh / "mark").touch()
    with pytest.raises(UserError, match="exists"), replaced_directory(tmp_path / "other", False, "mark"):
        pass
    assert (tmp_path / "other" / "mark").read_text(encoding="utf-8") == "earlier"
    assert sorted(path.name for path in tmp_path.iterdir()) == [".out.b.abcdefgh.partial", ".out.notes", "other", "out"]


def test_digits_are_not_written_through_a_link_to_a_folder_in_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "digits").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "digits")
    with held_elsewhere(tmp_path / "digits"):
        assert entry_point(["data", "digits", str(tmp_path / "link")]) == 2
    assert f"{tmp_path / 'digits'} is in use" in capsys.readouterr().err


def test_the_target_of_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    link = tmp_path / "out"
    link.symlink_to(tmp_path / "disk" / "release")
    for content in ("first", "second"):
        with replaced_directory(link, True, "mark") as fresh:
            (fresh / "mark").write_text(content, encoding="utf-8")
        assert link.is_symlink()
        assert (tmp_path / "disk" / "release" / "mark").read_text(encoding="utf-8") == content
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "out"]
    assert [path.name for path in (tmp_path / "disk").iterdir()] == ["release"]


@pytest.mark.parametrize(
    ("target", "message"), [("gone/release", "gone does not exist"), ("out", "is a symbolic link to itself")]
)
def test_a_dangling_link_is_rejected_at_once(tmp_path: Path, target: str, message: str) -> None:
    (tmp_path / "out").symlink_to(tmp_path / target)
    with pytest.raises(UserError, match=message):
        check_replaceable(tmp_path / "out", True, "mark")
    with pytest.raises(UserError, match=message), replaced_directory(tmp_path / "out", True, "mark"):
        pass
    assert (tmp_path / "out").is_symlink()


def test_a_mount_point_is_rejected_at_once() -> None:
    with pytest.raises(UserError, match="/proc is a mount point, which cannot be replaced"):
        check_replaceable(Path("/proc"), True, "version")


def test_a_relative_directory_has_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert lock_file(Path()) == tmp_path.parent / f".{tmp_path.name}.lock"
    assert resolve_link(Path("run")) == Path("run")
    assert resolve_link(Path()) == tmp_path


def test_a_run_behind_a_link_is_replaced_there(make_recipe: Callable[..., Recipe], tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "run").symlink_to(tmp_path / "disk")
    recipe = make_recipe()
    for _ in range(2):
        with new_run(recipe, ["test"], True, SINGLE_PROCESS) as run:
            assert run.path == tmp_path / "disk"
    assert (tmp_path / "run").is_symlink()
    assert (tmp_path / "run" / "recipe.yaml").is_file()
    with pytest.raises(ZeroDivisionError), new_run(recipe, ["test"], True, SINGLE_PROCESS):
        raise ZeroDivisionError
    assert (tmp_path / "run" / "recipe.yaml").is_file()


@pytest.mark.parametrize(("umask", "expected"), [(0o022, 0o644), (0o077, 0o600), (0o002, 0o664)])
def test_files_have_the_modes_of_the_umask(base: Path, tmp_path: Path, umask: int, expected: int) -> None:
    from mmtune.models.load import load_trained

    model, processor = load_trained(base)
    before = os.umask(umask)
    try:
        with replaced_directory(tmp_path / "out", False, "config.json") as fresh:
            model.save_pretrained(fresh)
            processor.save_pretrained(fresh)
        replace_text(tmp_path / "out" / "summary.json", "{}")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "out").iterdir()}
    assert "model.safetensors" in modes
    assert set(modes.values()) == {expected}


def test_links_out_of_a_folder_are_not_copied_into_a_release(tmp_path: Path) -> None:
    snapshot, blobs = tmp_path / "snapshots" / "1", tmp_path / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    (blobs / "weights").touch()
    (tmp_path / "secret").touch()
    (snapshot / "config.json").touch()
    (snapshot / "model.safetensors").symlink_to("../../blobs/weights")
    (snapshot / "same.json").symlink_to("config.json")
    check_links(snapshot)
    (snapshot / "notes.txt").symlink_to(tmp_path / "secret")
    with pytest.raises(UserError, match=r"notes\.txt: a link to a file outside the folder"):
        check_links(snapshot)


# ---- the commit of the working directory


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository with one commit, whose configuration names programs that leave a file behind."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    (tmp_path / "a.txt").write_text("a", encoding="utf-8")
    (tmp_path / ".gitattributes").write_text("*.txt filter=own=er\n", encoding="utf-8")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b.c"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "one"]):
        subprocess.run([*git, *command], check=True)
    for kind in ("clean", "smudge", "process"):
        subprocess.run(["git", "config", f"filter.own=er.{kind}", f"touch {tmp_path}/../ran-{tmp_path.name}; cat"], check=True)
    subprocess.run(["git", "config", "core.fsmonitor", f"touch {tmp_path}/../ran-{tmp_path.name}"], check=True)
    return tmp_path


def test_the_commit_is_recorded_and_no_program_of_the_repository_runs(repository: Path) -> None:
    head = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    assert git_commit() == head
    os.utime(repository / "a.txt", (0, 0))  # git reads the content again, through its filters
    assert git_commit() == head
    (repository / "a.txt").write_text("b", encoding="utf-8")
    assert git_commit() == f"{head}+changes"
    assert not (repository.parent / f"ran-{repository.name}").exists()


def test_git_settings_of_the_environment_are_unchanged(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("COUNT", "1"), ("KEY_0", "status.showUntrackedFiles"), ("VALUE_0", "no")):
        monkeypatch.setenv(f"GIT_CONFIG_{name}", value)
    (repository / "untracked.txt").touch()
    commit = git_commit()
    assert commit is not None and "+" not in commit
    assert not (repository.parent / f"ran-{repository.name}").exists()


def test_outside_a_repository_there_is_no_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert git_commit() is None


# ---- records that somebody changed


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"trainable_parameters": "x"}', "[" * 100_000], ids=range(5))
def test_a_summary_that_was_changed_is_one_message(tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (tmp_path / "recipe.yaml").touch()
    (tmp_path / "summary.json").write_text(text, encoding="utf-8")
    assert entry_point(["report", str(tmp_path)]) == 2
    assert "summary.json: damaged or edited" in capsys.readouterr().err
