"""Fetch one file over HTTP and be sure of it: timeouts, retries, resuming, size and SHA-256.

The file arrives beside its place as NAME.part and is renamed once it is whole and proven, so a
file that is there is right.
"""

import hashlib
import os
import socket
import time
from pathlib import Path

import requests

from configurator import FolioError

try:
    from tqdm import tqdm
except ImportError:  # the bar is for the eyes only
    tqdm = None

NOBODY_THERE = (socket.gaierror, ConnectionRefusedError)  # no such name; no server
CONNECT_SECONDS, SILENCE_SECONDS, ATTEMPTS = 10, 30, 4


class DownloadError(FolioError):
    """The file could not be had; the message says why."""


class Interrupted(Exception):
    """The transfer broke off in a way that another attempt may mend."""


def download(
    url: str,
    path: Path,
    *,
    sha256: str | None = None,
    size: int | None = None,
    headers: dict[str, str] | None = None,
    keep_partial: bool = False,
    silence: float = SILENCE_SECONDS,
    pause: float = 1.0,
) -> Path:
    """Fetch `url` into the file `path`, and return `path`.

    size: its length in bytes; sha256: its hash, in hexadecimal; each is checked where given.
    keep_partial: leave what has arrived for a later call to go on from (for large files).
    silence: seconds without a byte after which the server counts as stalled.
    pause: seconds before the second attempt; each further one waits twice as long.
    Raises DownloadError if the server cannot be reached, keeps failing, or sends something else.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    old = part.stat().st_size if part.exists() else 0
    try:
        fetch_with_retries(url, part, size, headers or {}, silence, pause)
        try:
            verify(url, part, size, sha256)
        except DownloadError:
            part.unlink()
            if not old:
                raise
            # What lay there may have been the beginning of another file: once more, from nothing.
            fetch_with_retries(url, part, size, headers or {}, silence, pause)
            keep_partial = False
            verify(url, part, size, sha256)
        with open(part, "rb+") as file:
            os.fsync(file.fileno())  # the bytes are on the disk before the name is
        os.replace(part, path)
    except OSError as error:
        keep_partial = False
        raise FolioError(f"{path}: {error.strerror or error}") from None
    finally:
        if not keep_partial:
            part.unlink(missing_ok=True)
    return path


def fetch_with_retries(url, part, size, headers, silence, pause):
    for attempt in range(1, ATTEMPTS + 1):
        try:
            return fetch_rest(url, part, size, headers, silence)
        except Interrupted as error:
            if attempt == ATTEMPTS:
                raise DownloadError(f"{url}: {error}, {ATTEMPTS} times") from None
            time.sleep(pause * 2 ** (attempt - 1))
    raise AssertionError("unreachable")


def fetch_rest(url, part, size, headers, silence):
    """Append to `part` what it lacks. Raises Interrupted where trying again may help."""
    have = part.stat().st_size if part.exists() else 0
    if size is not None and have >= size:
        return
    # Compressed in transit, a range or a length would not be that of the file.
    headers = {**headers, "Accept-Encoding": "identity"}
    if have:
        headers["Range"] = f"bytes={have}-"
    arrived = have
    try:
        with requests.get(
            url, headers=headers, stream=True, timeout=(CONNECT_SECONDS, silence)
        ) as response:
            arrived = have = check_answer(response, url, part, have)
            length = response.headers.get("Content-Length", "")
            total = have + int(length) if length.isdigit() else None
            if size is not None and total is not None and total != size:
                raise DownloadError(f"{url}: {total:,} bytes instead of {size:,}: another file")
            with open(part, "ab" if have else "wb") as file, progress(part, have, total) as bar:
                for chunk in response.iter_content(2**16):
                    file.write(chunk)
                    arrived += len(chunk)
                    bar.update(len(chunk))
                    if size is not None and arrived > size:
                        raise DownloadError(f"{url}: more than its {size:,} bytes: another file")
    except requests.RequestException as error:
        # Nobody there: no use to insist. Broken off or silent on the way: try again.
        cause = root_cause(error)
        reason = getattr(cause, "strerror", None) or type(cause).__name__
        if isinstance(error, requests.ConnectTimeout) or isinstance(cause, NOBODY_THERE):
            raise DownloadError(f"{url}: no connection ({reason})") from None
        raise Interrupted(f"the transfer broke off ({reason})") from None
    if arrived < (size or total or 0):
        raise Interrupted(f"the transfer ended after {arrived:,} of {size or total:,} bytes")


def check_answer(response, url, part, have) -> int:
    """The byte at which the body that now follows begins."""
    status = response.status_code
    if status == 206 and response.headers.get("Content-Range", "").startswith(f"bytes {have}-"):
        return have
    if status in (206, 416):  # the server's idea of the file is not ours: begin again
        part.unlink(missing_ok=True)
        raise Interrupted("the server would not go on where the transfer broke off")
    if status >= 500 or status in (408, 429):
        raise Interrupted(f"the server answered {status} {response.reason}")
    if status != 200:
        raise DownloadError(f"{url}: the server answered {status} {response.reason}")
    return 0


def verify(url, part, size, sha256):
    found = part.stat().st_size
    if size is not None and found != size:
        raise DownloadError(f"{url}: {found:,} bytes instead of {size:,}: another file")
    if sha256 is not None and hash_file(part) != sha256:
        raise DownloadError(f"{url}: its SHA-256 is not {sha256}: another file")


def hash_file(path: Path) -> str:
    """The SHA-256 of a file's bytes, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def root_cause(error: BaseException) -> BaseException:
    """What lies at the bottom of a chain of exceptions, such as a ConnectionRefusedError."""
    while True:
        wrapped = [arg for arg in (*error.args, getattr(error, "reason", None)) if is_error(arg)]
        inner = error.__cause__ or error.__context__ or (wrapped[0] if wrapped else None)
        if inner is None:
            return error
        error = inner


def is_error(thing) -> bool:
    return isinstance(thing, BaseException)


class progress:
    """A bar for files that take a while, on a terminal; otherwise nothing."""

    def __init__(self, part: Path, have: int, total: int | None):
        self.bar = tqdm and tqdm(
            desc=part.name.removesuffix(".part"), initial=have, total=total, unit="B",
            unit_scale=True, delay=1, disable=None, leave=False,
        )  # fmt: skip

    def __enter__(self):
        return self

    def update(self, count: int) -> None:
        if self.bar is not None:
            self.bar.update(count)

    def __exit__(self, *_):
        if self.bar is not None:
            self.bar.close()
