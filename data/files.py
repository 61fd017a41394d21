"""Files that are there whole or not at all: written beside their place, flushed and renamed."""

import contextlib
import errno
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configurator import FolioError


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yields a temporary path beside `path`; what is written there takes its place at the end."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        temporary.touch()
        mode = temporary.stat().st_mode
        yield temporary
        temporary.chmod(mode)  # safetensors makes files that only their owner can read
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())  # the bytes are on the disk before the name is
        os.replace(temporary, path)
        flush_folder(path.parent)
    except (OSError, RuntimeError) as error:
        # torch wraps what the operating system told it.
        told = error.__context__ if isinstance(error.__context__, OSError) else error
        reason = getattr(told, "strerror", None) or str(told).partition("\n")[0]
        raise FolioError(f"{path}: cannot be written ({reason}); what was there is kept") from None
    finally:
        temporary.unlink(missing_ok=True)


def flush_folder(folder: Path) -> None:
    """The names in it are on the disk, too, where the system and the disk can promise that."""
    if sys.platform == "win32":  # where a folder cannot be opened
        return
    try:
        directory = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
    except OSError as error:
        # Network disks often cannot; and a folder may be one to write to and not to read.
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP, errno.EACCES):
            raise FolioError(f"{folder}: written, but not surely ({error.strerror})") from None


def write_text(path: Path, text: str) -> None:
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, contents: dict[str, Any]) -> None:
    write_text(path, json.dumps(contents, indent=2) + "\n")


def move_aside(folder: Path) -> Path:
    """Rename `folder` to the first free of folder.1, folder.2, ... and return that name."""
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    return folder.rename(aside)
