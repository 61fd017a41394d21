"""GPT-2's published weights, from the Hugging Face hub.

folder = fetch_gpt2("gpt2-medium")    # data/weights/gpt2-medium, fetched if it is not there
"""

from pathlib import Path

from data.dataset import DATA
from data.hub import fetch_large, fetch_small, hub_url

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
WEIGHTS = "model.safetensors"


def fetch_gpt2(name: str) -> Path:
    """The folder with config.json, tokenizer.json and model.safetensors of the GPT-2 called name.

    Raises DownloadError if a file cannot be had; a transfer that broke off goes on next time.
    """
    folder = DATA / "weights" / name
    revision, size, sha256 = PUBLISHED[name]
    place = hub_url(f"openai-community/{name}/resolve/{revision}")
    for file in ("config.json", "tokenizer.json"):
        if not (folder / file).exists():
            fetch_small(f"{place}/{file}", folder / file)
    if not (folder / WEIGHTS).exists():  # last: a folder that has them is whole
        fetch_large(f"{place}/{WEIGHTS}", folder / WEIGHTS, size, sha256)
    return folder
