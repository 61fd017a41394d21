"""GPT-2's published weights, from the Hugging Face hub, by plain HTTPS.

    folder = fetch_gpt2("gpt2-medium")    # data/weights/gpt2-medium, fetched if it is not there

The environment may name another hub (HF_ENDPOINT) and a token to show it (HF_TOKEN).
"""

import os
import re
from pathlib import Path

import requests

from data.dataset import DATA
from data.download import CONNECT_SECONDS, SILENCE_SECONDS, DownloadError, download

# name -> the revision of openai-community/NAME, and the size and SHA-256 of its weights; the larger
# ones' are asked of the hub.
PUBLISHED = {
    "gpt2": (
        "607a30d783dfa663caf39e06633721c8d4cfcd7e",
        548_105_171,
        "248dfc3911869ec493c76e65bf2fcf7f615828b0254c12b473182f0f81d3a707",
    ),
    "gpt2-medium": ("main", None, None),
    "gpt2-large": ("main", None, None),
    "gpt2-xl": ("main", None, None),
}
FILES = ("config.json", "tokenizer.json", "model.safetensors")  # the weights last


def fetch_gpt2(name: str) -> Path:
    """The folder with config.json, tokenizer.json and model.safetensors of the GPT-2 called name.

    Raises DownloadError if a file cannot be had; a transfer that broke off goes on next time.
    """
    folder = DATA / "weights" / name
    revision, size, sha256 = PUBLISHED[name]
    hub = os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/")
    token = os.environ.get("HF_TOKEN")
    headers = {"Authorization": f"Bearer {token}"} if token else {}
    for file in FILES:
        if (folder / file).exists():
            continue
        url = f"{hub}/openai-community/{name}/resolve/{revision}/{file}"
        print(f"fetching {url}")
        is_weights = file == FILES[-1]
        if is_weights and sha256 is None:
            size, sha256 = promised(url, headers)
        download(
            url, folder / file, headers=headers, keep_partial=is_weights,
            size=size if is_weights else None, sha256=sha256 if is_weights else None,
        )  # fmt: skip
    return folder


def promised(url: str, headers: dict[str, str]) -> tuple[int | None, str | None]:
    """The size and SHA-256 that the hub's answer to a HEAD request names for a large file.

    The hub answers with a redirection to where the bytes are, and with X-Linked-Size and
    X-Linked-ETag, which for files in its large-file store is the SHA-256.
    """
    try:
        answer = requests.head(
            url,
            headers={**headers, "Accept-Encoding": "identity"},
            timeout=(CONNECT_SECONDS, SILENCE_SECONDS),
        )
    except requests.RequestException as error:
        raise DownloadError(f"{url}: no answer ({type(error).__name__})") from None
    size = answer.headers.get("X-Linked-Size", "")
    etag = answer.headers.get("X-Linked-ETag", "").strip('"')
    return int(size) if size.isdigit() else None, etag if re.fullmatch(
        "[0-9a-f]{64}", etag
    ) else None
