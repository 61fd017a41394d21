"""Download one small file over HTTP: timeouts, retries, size and SHA-256 check.

Tiny Shakespeare is the only file that needs it. Everything on the Hugging Face hub: data/hub.py.
"""

import hashlib
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests

from configurator import FolioError
from data.files import atomic_write

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds
MAX_ATTEMPTS = 3


class DownloadError(FolioError):
    """A download failed."""


class RetryableError(Exception):
    """One attempt failed; the next one may succeed."""


def download(
    url: str,
    path: str | Path,
    sha256: str,
    size: int,
    read_timeout: float = READ_TIMEOUT,
    backoff: float = 1.0,
) -> Path:
    """Download `url` to `path`, which appears complete or not at all. Returns path.

    sha256, size: expected SHA-256 (hexadecimal) and number of bytes.
    backoff: seconds before the second attempt; each further attempt waits twice as long.
    Raises DownloadError if there is no connection, if all attempts fail, or if it is another file.
    """
    path, host = Path(path), urlsplit(url).netloc
    for attempt in range(MAX_ATTEMPTS):
        try:
            contents = fetch(url, size, read_timeout)
            break
        except RetryableError as error:
            if attempt == MAX_ATTEMPTS - 1:
                raise DownloadError(f"{host}: {error} ({MAX_ATTEMPTS} attempts)") from None
            time.sleep(backoff * 2**attempt)
    if hashlib.sha256(contents).hexdigest() != sha256:
        raise DownloadError(f"{url}: wrong SHA-256; this is another file")
    with atomic_write(path) as temporary:
        temporary.write_bytes(contents)
    return path


def fetch(url: str, size: int, read_timeout: float) -> bytes:
    """One attempt: the `size` bytes at url. Raises RetryableError if another attempt may help."""
    # With compression, Content-Length would not be the file's size.
    headers, timeout = {"Accept-Encoding": "identity"}, (CONNECT_TIMEOUT, read_timeout)
    try:
        response = requests.get(url, headers=headers, stream=True, timeout=timeout)
    except requests.ConnectionError:
        raise DownloadError(f"no connection to {urlsplit(url).netloc}") from None
    except requests.Timeout:
        raise RetryableError("no response") from None
    with response:
        status = f"HTTP {response.status_code} {response.reason}"
        if response.status_code >= 500 or response.status_code in (408, 429):
            raise RetryableError(status)
        if response.status_code != 200:
            raise DownloadError(f"{url}: {status}")
        if response.headers.get("Content-Length", str(size)) != str(size):
            raise DownloadError(f"{url}: wrong size; this is another file")
        return read_body(response, size)


def read_body(response: requests.Response, size: int) -> bytes:
    received = b""
    try:
        for chunk in response.iter_content(2**16):
            received += chunk
            if len(received) > size:
                raise DownloadError(f"{response.url}: more than {size:,} bytes; another file")
    except requests.RequestException:
        raise RetryableError("the connection was lost") from None
    if len(received) < size:
        raise RetryableError(f"the download ended after {len(received):,} of {size:,} bytes")
    return received
