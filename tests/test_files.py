"""Atomic writes, locks, and paths as a user types them."""

import errno
import os
import subprocess
import sys
import threading
import time

import pytest

from configurator import FolioError
from data.files import (
    atomic_write,
    explain_os_error,
    file_lock,
    fsync_dir,
    join_names,
    rename_to_backup,
    shell_command,
    user_path,
    write_json,
    write_text,
)
from tests.conftest import ROOT

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")

# --- Writing ---


def test_a_file_is_replaced_and_no_temporary_file_remains(tmp_path):
    write_text(tmp_path / "file", "old")
    write_text(str(tmp_path / "file"), "näw")
    assert (tmp_path / "file").read_bytes() == "näw".encode()
    write_json(tmp_path / "json", {"a": 1})
    assert (tmp_path / "json").read_text() == '{\n  "a": 1\n}\n'
    assert {path.name for path in tmp_path.iterdir()} == {"file", "json"}


@pytest.mark.parametrize(
    "error", [ValueError("bad"), RuntimeError("CUDA error"), KeyboardInterrupt()]
)
def test_the_old_file_stays_if_writing_fails_and_the_error_is_unchanged(tmp_path, error):
    write_text(tmp_path / "file", "old")
    with pytest.raises(type(error)) as raised, atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("half of the ne")
        raise error
    assert raised.value is error
    assert (tmp_path / "file").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_os_error_is_one_line_with_the_path_and_the_reason(tmp_path):
    with (
        pytest.raises(FolioError, match=r"file: write failed; .* \(No space left on device\)$"),
        atomic_write(tmp_path / "file"),
    ):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    with pytest.raises(FolioError, match="No such file or directory"):
        write_text(tmp_path / "missing" / "file", "x")


@posix_only
def test_a_new_file_has_ordinary_permissions(tmp_path):
    """safetensors makes files that only their owner can read."""
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("x")
        temporary.chmod(0o600)
    (tmp_path / "ordinary").touch()
    assert (tmp_path / "file").stat().st_mode == (tmp_path / "ordinary").stat().st_mode


def test_a_backup_takes_the_first_free_number(tmp_path):
    for expected in ("run.1", "run.2"):
        (tmp_path / "run").mkdir()
        assert rename_to_backup(tmp_path / "run") == tmp_path / expected
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run.1", "run.2"]


@posix_only
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_disk_that_cannot_flush_a_folder_is_accepted_and_a_broken_one_is_not(
    tmp_path, monkeypatch, code
):
    def fail(_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "fsync", fail)
    if code == errno.EINVAL:  # network disks
        fsync_dir(tmp_path)
    else:
        with pytest.raises(FolioError, match="fsync failed"):
            fsync_dir(tmp_path)


def test_an_os_error_without_a_reason_keeps_its_message():
    with (
        pytest.raises(FolioError, match=r"^x: cannot read \(odd\)$"),
        explain_os_error("x", "cannot read"),
    ):
        raise OSError("odd")


# --- Locks ---

HOLD_LOCK = """
import sys, time
from data.files import file_lock
with file_lock(sys.argv[1], "taken"):
    print("locked", flush=True)
    sys.stdin.read()
"""


@pytest.fixture
def holder(tmp_path):
    """Another process that holds the lock tmp_path/lock until its input is closed."""
    command = [sys.executable, "-c", HOLD_LOCK, str(tmp_path / "lock")]
    process = subprocess.Popen(
        command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "locked\n"
    yield process
    process.kill()
    process.wait()


def test_a_lock_of_another_process_is_refused_or_waited_for(tmp_path, holder, capsys):
    path = tmp_path / "lock"
    with pytest.raises(FolioError, match=r"^in use$"), file_lock(path, "in use"):
        pass
    start = time.monotonic()
    threading.Timer(0.3, holder.stdin.close).start()
    with file_lock(path, "waiting", wait=True):
        assert time.monotonic() - start > 0.25
    assert capsys.readouterr().out == "waiting\n"


def test_a_killed_process_leaves_no_lock(tmp_path, holder):
    holder.kill()
    holder.wait()
    with file_lock(tmp_path / "lock", "in use"):
        pass


# --- Paths and commands ---


def test_many_names_are_shortened():
    assert join_names(["a", "b"]) == "a, b"
    assert join_names([f"{i}" for i in range(2013)]).endswith("8, 9 and 2,003 more")


def test_the_home_folder_is_expanded(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert user_path("~/texts") == tmp_path / "texts"
    assert user_path("a/~b").as_posix() == "a/~b"


@pytest.mark.parametrize("text", ["a\0b", "half \ud83d", "~nosuchuser/x"])
def test_a_path_that_no_file_can_have_is_refused(text):
    with pytest.raises(FolioError, match="not a valid path"):
        user_path(text)


@posix_only
def test_a_command_is_quoted_for_the_shell():
    words = ["printf", "%s", "it's a $HOME"]
    assert subprocess.check_output(shell_command(*words), shell=True, text=True) == words[2]
