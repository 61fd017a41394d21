"""Files from the Hugging Face hub, by plain HTTPS.

The environment may name another hub (HF_ENDPOINT) and a token to show it (HF_TOKEN).
"""

import os
import re
import time
from pathlib import Path

import requests

from data.download import ATTEMPTS, CONNECT_SECONDS, SILENCE_SECONDS, DownloadError, download

PAUSE = 1.0  # seconds before the second attempt; each further one waits twice as long


def hub_url(path: str) -> str:
    """'openai-community/gpt2/resolve/main/config.json' -> the address of that file."""
    return f"{os.environ.get('HF_ENDPOINT', 'https://huggingface.co').rstrip('/')}/{path}"


def hub_headers() -> dict[str, str]:
    token = os.environ.get("HF_TOKEN")
    return {"Authorization": f"Bearer {token}"} if token else {}


def fetch_small(url: str, path: Path) -> Path:
    """Fetch a file of a few megabytes at most; DownloadError if it cannot be had."""
    print(f"fetching {url}")
    return download(url, path, headers=hub_headers())


def fetch_large(url: str, path: Path, size: int | None = None, sha256: str | None = None) -> Path:
    """Fetch a large file; a transfer that broke off goes on next time.

    size, sha256: what is known of the file; where nothing is, the hub is asked what it promises.
    Raises DownloadError if it cannot be had, or is not what was promised.
    """
    print(f"fetching {url}")
    if sha256 is None:
        size, sha256 = promised(url)
    return download(url, path, size=size, sha256=sha256, headers=hub_headers(), keep_partial=True)


def promised(url: str) -> tuple[int | None, str | None]:
    """The size and SHA-256 that the hub's answer to a HEAD request names for a large file.

    The hub answers with a redirection to where the bytes are, and with X-Linked-Size and
    X-Linked-ETag, which for files in its large-file store is the SHA-256.
    """
    headers = {**hub_headers(), "Accept-Encoding": "identity"}
    for attempt in range(ATTEMPTS):
        try:
            answer = requests.head(url, headers=headers, timeout=(CONNECT_SECONDS, SILENCE_SECONDS))
        except requests.RequestException as error:
            raise DownloadError(f"{url}: no answer ({type(error).__name__})") from None
        busy = answer.status_code in (408, 429) or answer.status_code >= 500
        if not busy or answer.status_code == 501:
            break
        time.sleep(PAUSE * 2**attempt)
    # 405 and 501: a hub that makes no promises.
    if answer.status_code >= 400 and answer.status_code not in (405, 501):
        raise DownloadError(f"{url}: the server answered {answer.status_code} {answer.reason}")
    size = answer.headers.get("X-Linked-Size", "")
    etag = answer.headers.get("X-Linked-ETag", "").strip('"')
    sha256 = etag if re.fullmatch("[0-9a-f]{64}", etag) else None
    return int(size) if size.isdigit() else None, sha256
