"""Atomic file writes, file locks, and paths and commands as a user types them."""

import contextlib
import errno
import json
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import filelock

from configurator import ROOT, FolioError, format_value, wrap

T = TypeVar("T")

NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # a file system without file locks
NO_FSYNC = (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES)


@contextlib.contextmanager
def explain_os_error(path: str | Path, problem: str) -> Iterator[None]:
    """Turn an OSError inside the block into the one-line FolioError "path: problem (reason)"."""
    try:
        yield
    except OSError as error:
        raise FolioError(f"{path}: {problem} ({error.strerror or error})") from None


@contextlib.contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; at the end it replaces `path`.

    The data is on the disk (fsync) before the new name is. If the block fails, `path` is unchanged.
    Raises FolioError if the disk refuses; every other error passes unchanged.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with explain_os_error(path, "write failed; the old file, if any, is unchanged"):
            temporary.touch()
            mode = temporary.stat().st_mode
            yield temporary
            temporary.chmod(mode)  # safetensors sets mode 600
            fsync_file(temporary)
            os.replace(temporary, path)
        fsync_dir(path.parent)
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)


def fsync_file(path: str | Path) -> None:
    """Flush a file's contents to the disk: they survive a power failure."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def fsync_dir(folder: str | Path) -> None:
    """Flush a folder's file names to the disk, where the system supports it."""
    if sys.platform == "win32":  # a folder cannot be opened
        return
    try:
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        if error.errno not in NO_FSYNC:
            raise FolioError(f"{folder}: fsync failed ({error.strerror})") from None


def read_folder(folder: Path, read: Callable[[], T]) -> T:
    """Call read(); call it again if another process has replaced `folder` meanwhile.

    So all files that the result comes from belong to one folder.
    """

    def folder_id() -> tuple[int, int] | None:
        with contextlib.suppress(OSError):  # the folder does not exist
            status = folder.stat()
            return status.st_dev, status.st_ino
        return None

    while True:
        before = folder_id()
        try:
            result = read()
        except (FolioError, OSError):
            if folder_id() == before:
                raise
        else:
            if folder_id() == before:
                return result


def write_text(path: str | Path, text: str) -> None:
    with atomic_write(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, contents: dict[str, Any]) -> None:
    write_text(path, json.dumps(contents, indent=2) + "\n")


def backup_path(path: str | Path) -> Path:
    """The first free name of path.1, path.2, ..."""
    path, number = Path(path), 1
    while (backup := path.with_name(f"{path.name}.{number}")).exists():
        number += 1
    return backup


def rename_to_backup(path: str | Path) -> Path:
    """Rename a file or a folder to backup_path(path), and return the new path."""
    path, backup = Path(path), backup_path(path)
    with explain_os_error(path, f"cannot be renamed to {backup.name}"):
        return path.rename(backup)


@contextlib.contextmanager
def file_lock(path: str | Path, message: str, wait: bool = False) -> Iterator[None]:
    """Hold the lock file `path` inside the block. The system releases it if the process dies.

    If another process holds it: raises FolioError(message), or prints message and waits.
    """
    path = Path(path)
    # If the disk has no locks, do not make a "soft" lock (a file that exists): after SIGKILL it
    # would stay, and stop all later jobs.
    # mode: another user who may create files here can use the lock, if the umask allows it.
    lock = filelock.FileLock(path, mode=0o666, fallback_to_soft=False)
    advice = "use a folder inside a folder in which you may create files"
    with explain_os_error(path, f"cannot create this lock file; {advice}"):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except filelock.Timeout:  # another process holds it
            if not wait:
                raise FolioError(message) from None
            print(wrap(message), flush=True)
            lock.acquire()
        except (OSError, NotImplementedError) as error:
            if getattr(error, "errno", errno.ENOSYS) not in NO_LOCKS:
                raise
            notice = "no file locks on this disk; start only one process at a time"
            print(wrap(f"{path.parent}: {notice}"))
    try:
        yield
    finally:
        lock.release()


def user_path(text: str | Path) -> Path:
    """A path as a user types it: "~" is the home folder. FolioError if no file can have it."""
    try:
        path = Path(text).expanduser()
        valid = b"\0" not in os.fsencode(path)
    except (RuntimeError, UnicodeEncodeError):  # ~nosuchuser; half of a surrogate pair
        valid = False
    if not valid:
        raise FolioError(f"{format_value(str(text))}: not a valid path")
    return path


def shown_path(path: str | Path) -> str:
    """Relative to the repository if possible, with forward slashes: 'out/shakespeare_char'."""
    path = Path(path).resolve()
    if path.is_relative_to(ROOT):
        path = path.relative_to(ROOT)
    return path.as_posix()


def join_names(names: list[str], max_names: int = 10) -> str:
    """At most max_names of the names in a line: ["a", "b", "c"], 2 -> 'a, b and 1 more'"""
    more = f" and {len(names) - max_names:,} more" if len(names) > max_names else ""
    return ", ".join(names[:max_names]) + more


def shell_command(*words: str) -> str:
    """The words as one line for the user's shell: ("rm", "my file") -> "rm 'my file'"."""
    return subprocess.list2cmdline(words) if sys.platform == "win32" else shlex.join(words)
