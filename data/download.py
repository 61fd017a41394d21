"""Download one small file over HTTP: timeouts, retries, SHA-256 check.

Tiny Shakespeare is the only file that needs it. Everything on the Hugging Face hub: data/hub.py.
"""

import hashlib
from urllib.parse import urlsplit

import requests
from requests.adapters import HTTPAdapter
from urllib3.util import Retry

from configurator import FolioError, first_line

TIMEOUTS = (10.0, 30.0)  # seconds: to connect, and between two bytes
# Retries after a temporary failure of the server; without a connection, none.
RETRIES = Retry(
    total=2,
    connect=0,
    status_forcelist=(408, 429, 500, 502, 503, 504),
    backoff_factor=1,
    raise_on_status=False,
    respect_retry_after_header=False,  # a server may ask for hours
)


class DownloadError(FolioError):
    """A download failed."""


def download(url: str, sha256: str) -> bytes:
    """The file at `url`.

    sha256: the expected SHA-256, hexadecimal.
    Raises DownloadError if there is no connection, if all attempts fail, or if it is another file.
    """
    host = urlsplit(url).netloc
    with requests.Session() as session:
        session.mount(url, HTTPAdapter(max_retries=RETRIES))
        try:
            response = session.get(url, timeout=TIMEOUTS)
            response.raise_for_status()
        except requests.ConnectionError:
            raise DownloadError(f"no connection to {host}") from None
        except (OSError, ValueError) as error:  # HTTP 404, or a proxy that cannot be used
            raise DownloadError(f"{host}: {first_line(error)}") from None
    if hashlib.sha256(response.content).hexdigest() != sha256:
        raise DownloadError(f"{url}: wrong SHA-256; this is another file")
    return response.content
