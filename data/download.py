"""Download one small file over HTTP: timeouts, retries, SHA-256 check.

Tiny Shakespeare is the only file that needs it. Everything on the Hugging Face hub: data/hub.py.
"""

import hashlib
import time
from pathlib import Path
from urllib.parse import urlsplit

import requests

from configurator import FolioError, first_line
from data.files import atomic_write

CONNECT_TIMEOUT, READ_TIMEOUT = 10.0, 30.0  # seconds
MAX_ATTEMPTS = 3


class DownloadError(FolioError):
    """A download failed."""


def download(
    url: str,
    path: str | Path,
    sha256: str,
    read_timeout: float = READ_TIMEOUT,
    backoff: float = 1.0,
) -> Path:
    """Download `url` to `path`, which appears complete or not at all. Returns path.

    sha256: the expected SHA-256, hexadecimal.
    backoff: seconds before the second attempt; each further attempt waits twice as long.
    Raises DownloadError if there is no connection, if all attempts fail, or if it is another file.
    """
    path, host = Path(path), urlsplit(url).netloc
    for attempt in range(MAX_ATTEMPTS):
        if attempt > 0:
            time.sleep(backoff * 2 ** (attempt - 1))
        try:
            response = requests.get(url, timeout=(CONNECT_TIMEOUT, read_timeout))
        except requests.ConnectionError:
            raise DownloadError(f"no connection to {host}") from None
        except requests.Timeout:
            reason = "no response"
        except requests.exceptions.ChunkedEncodingError:  # half of the file
            reason = "the connection was lost"
        except (OSError, ValueError) as error:  # for example a proxy that requests cannot use
            raise DownloadError(f"{host}: {first_line(error)}") from None
        else:
            reason = f"HTTP {response.status_code} {response.reason}"
            if response.ok:
                break
            if response.status_code < 500 and response.status_code not in (408, 429):
                raise DownloadError(f"{url}: {reason}")
    else:
        raise DownloadError(f"{host}: {reason} ({MAX_ATTEMPTS} attempts)")
    if hashlib.sha256(response.content).hexdigest() != sha256:
        raise DownloadError(f"{url}: wrong SHA-256; this is another file")
    with atomic_write(path) as temporary:
        temporary.write_bytes(response.content)
    return path
