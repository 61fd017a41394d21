"""Tiny Shakespeare: 40,000 lines from Shakespeare's plays (1.1 MB).

A replacement text is used when Shakespeare cannot be downloaded: short plays in verse (150 KB),
written for this repository and laid out like Shakespeare's. So the first command works without a
network. Losses on it are not comparable. The next preparation with a network uses Shakespeare.
"""

import hashlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from configurator import FolioError
from data.download import DownloadError, download
from data.documents import format_advice, is_jsonl
from data.files import atomic_write, explain_os_error, file_lock, rename_to_backup, shell_command
from data.prepare import (
    TOKENIZER_TYPES,
    dataset_folder,
    dataset_lock,
    make_tokenizer,
    read_text,
    split_text,
    write_dataset,
)

# Collected by Andrej Karpathy for char-rnn (2015).
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"
SHAKESPEARE = "tiny Shakespeare"
REPLACEMENT_TEXT = Path(__file__).with_name("replacement.txt")
DATASETS = {f"shakespeare_{tokenizer}": tokenizer for tokenizer in TOKENIZER_TYPES}


def prepare_shakespeare(
    tokenizer_type: str,
    dataset: str,
    input_file: str | Path | None = None,
    vocab_size: int = 1024,
) -> dict[str, Any]:
    """Write data/DATASET/ from input_file or from tiny Shakespeare; returns its meta.json.

    tokenizer_type: "char": one token per character; "gpt2": GPT-2's byte pair encoding; "bpe":
        vocab_size tokens learned from the text; or the folder of a run or a model.
    Raises FolioError if the file cannot be read or is not plain text, or if GPT-2's vocabulary
    cannot be downloaded.
    """
    folder = dataset_folder(dataset)
    if input_file:
        refuse_other_formats(Path(input_file))
    with dataset_lock(folder):
        return write_shakespeare(folder, tokenizer_type, input_file, vocab_size)


def refuse_other_formats(path: Path) -> None:
    """Raises FolioError for tables and archives, whose braces and commas would become the text."""
    if is_jsonl(path) or format_advice(path):
        raise FolioError(f"{path}: not a text file; use `python -m data.prepare_text`")


def ensure_shakespeare(dataset: str) -> None:
    """Prepare data/shakespeare_char, _gpt2 or _bpe if it does not exist.

    If several processes start at the same time, one prepares the dataset; every other one waits.
    """
    folder = dataset_folder(dataset)
    if not folder.exists():
        with dataset_lock(folder):
            if not folder.exists():
                write_shakespeare(folder, DATASETS[dataset])


def write_shakespeare(
    folder: Path,
    tokenizer_type: str,
    input_file: str | Path | None = None,
    vocab_size: int = 1024,
) -> dict[str, Any]:
    """prepare_shakespeare() for a process that holds the dataset's lock."""
    if input_file:
        text, source_meta = read_text(input_file), {"source": str(Path(input_file).resolve())}
    else:
        text, source_meta = load_shakespeare()
    raw = text.encode()
    source_meta["sha256"] = hashlib.sha256(raw).hexdigest()
    if source_meta["sha256"] == SHA256:
        source_meta["source"] = SHAKESPEARE
        cache_shakespeare(raw)
    splits = split_text(text, val_fraction=0.1)
    # Characters come from all of the text; BPE learns from the training split only.
    texts = splits["train"] if tokenizer_type == "bpe" else [text]
    tokenizer = make_tokenizer(tokenizer_type, texts, vocab_size)
    return write_dataset(folder, tokenizer, splits, {**source_meta, "tokenizer": tokenizer_type})


def load_shakespeare() -> tuple[str, dict[str, Any]]:
    """The text and its source: from the cache, else downloaded, else the replacement text."""
    path = cached_text_path()
    with cache_lock(path):
        if is_shakespeare(path):
            return read_text(path), {"source": SHAKESPEARE}
        print(f"downloading tiny Shakespeare to {path}")
        try:
            downloaded = download(URL, path.with_name(f".{path.name}.download"), SHA256)
            keep_other_text(path)
            downloaded.replace(path)
            return read_text(path), {"source": SHAKESPEARE}
        except DownloadError as error:
            if not REPLACEMENT_TEXT.exists():
                raise FolioError(f"{error}; --input_file=FILE uses a text you have") from None
            print(f"download failed: {error}")
            source_meta = {"source": "the replacement text", "replacement_for": SHAKESPEARE}
            return read_text(REPLACEMENT_TEXT), source_meta


def cached_text_path() -> Path:
    """Where the downloaded text is kept for the other tokenizers."""
    return dataset_folder("shakespeare") / "input.txt"


def is_shakespeare(path: Path) -> bool:
    with explain_os_error(path, "cannot read this text"):
        return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == SHA256


def cache_shakespeare(raw: bytes) -> None:
    path = cached_text_path()
    with cache_lock(path):
        if not is_shakespeare(path):
            keep_other_text(path)
            with atomic_write(path) as temporary:
                temporary.write_bytes(raw)


def keep_other_text(path: Path) -> None:
    """Rename a text of the user that stands in the place of the cache."""
    if path.exists():
        with explain_os_error(path, "cannot be renamed"):
            print(f"renamed the other text {path} to {rename_to_backup(path)}")


def cache_lock(path: Path) -> AbstractContextManager[None]:
    """One process at a time downloads or writes the text; every other process waits."""
    message = f"another process is writing {path}; waiting for it"
    return file_lock(path.with_name(f".{path.name}.lock"), message, wait=True)


def replacement_warning(meta: dict[str, Any]) -> str:
    """What to print about a dataset made from the replacement text; "" for all other datasets.

    meta: the dataset's meta.json.
    """
    if "replacement_for" not in meta:
        return ""
    tokenizer_type = meta.get("tokenizer", "char")
    flags = [] if tokenizer_type == "char" else [f"--tokenizer={tokenizer_type}"]
    return (
        "WARNING  Shakespeare could not be downloaded. A replacement text is used: short\n"
        "         plays in verse. So losses are not comparable. To use Shakespeare,\n"
        "         with a network or with --input_file=FILE (then train again):\n"
        f"         {shell_command('python', 'prepare_shakespeare.py', *flags)}"
    )
