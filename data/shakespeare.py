"""Tiny Shakespeare, the corpus everybody starts with: 40,000 lines from the plays.

Where it cannot be fetched, the understudy goes on in his place: a play in verse written for this
repository, shorter but laid out alike, so that the first command works without a network. Whoever
uses the dataset is told, and the next preparation with a network brings Shakespeare back.
"""

import hashlib
from pathlib import Path
from typing import Any

from configurator import FolioError
from data.dataset import DATA
from data.download import DownloadError, download, hash_file
from data.files import replacing
from data.prepare import dataset_folder, make_tokenizer, read_text, split_text, write_dataset

# Collected by Andrej Karpathy for char-rnn (2015).
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SIZE = 1_115_394  # bytes
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE = "tiny Shakespeare"
UNDERSTUDY = DATA / "understudy.txt"
TOKENIZERS = ("char", "gpt2", "bpe")
DATASETS = {f"shakespeare_{tokenizer}": tokenizer for tokenizer in TOKENIZERS}


def prepare_shakespeare(
    tokenizer: str, dataset: str, input_file: Path | None = None, vocab_size: int = 1024
) -> dict:
    """Write `data/DATASET/` from the text in input_file, or from tiny Shakespeare; its meta.json.

    tokenizer: "char", one token per character; "gpt2", GPT-2's byte pair encoding; or "bpe", one of
    vocab_size tokens learned from the text.
    Raises FolioError if the file cannot be read, or GPT-2's vocabulary cannot be had.
    """
    folder = dataset_folder(dataset)
    if input_file:
        text, origin = read_text(input_file), {"source": str(input_file.resolve())}
    else:
        text, origin = find_shakespeare()
    raw = text.encode()
    origin["sha256"] = hashlib.sha256(raw).hexdigest()
    if origin["sha256"] == SHA256:  # Shakespeare is himself, whichever way he came, and stays
        origin["source"] = SHAKESPEARE
        if not (kept_at().exists() and hash_file(kept_at()) == SHA256):
            kept_at().parent.mkdir(exist_ok=True)
            with replacing(kept_at()) as temporary:
                temporary.write_bytes(raw)
    splits = split_text(text, val_fraction=0.1)
    # An alphabet may come from all of the text; merges are learned, from what is for learning.
    learn_from = [text] if tokenizer == "char" else splits["train"]
    encoder = make_tokenizer(tokenizer, learn_from, vocab_size)
    return write_dataset(folder, encoder, splits, {**origin, "tokenizer": tokenizer})


def kept_at() -> Path:
    """Where his text stays once it is there, for the other tokenizers."""
    return DATA / "shakespeare" / "input.txt"


def find_shakespeare() -> tuple[str, dict[str, Any]]:
    """Tiny Shakespeare from the disk, else from the network, else the understudy's play."""
    path = kept_at()
    try:
        if not (path.exists() and hash_file(path) == SHA256):
            print(f"fetching tiny Shakespeare from {URL}")
            download(URL, path, sha256=SHA256, size=SIZE)
        return read_text(path), {"source": SHAKESPEARE}
    except DownloadError as error:
        if not UNDERSTUDY.exists():
            raise FolioError(f"{error}; --input=FILE takes a text you have") from None
        print(f"could not: {error}")
        return read_text(UNDERSTUDY), {"source": "the understudy", "stands_in_for": SHAKESPEARE}


def understudy_notice(meta: dict[str, Any]) -> str:
    """What to tell whoever uses the dataset: '' unless the understudy went on."""
    if "stands_in_for" not in meta:
        return ""
    tokenizer = meta.get("tokenizer", "char")
    how = "" if tokenizer == "char" else f" --tokenizer={tokenizer}"
    return (
        "NOTE     Shakespeare could not be fetched. His understudy, a shorter play, stands in, so\n"
        "         that losses are not comparable. With a network, or his text as --input=FILE:\n"
        f"         python prepare_shakespeare.py{how}"
    )
