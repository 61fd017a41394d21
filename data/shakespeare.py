"""Tiny Shakespeare: 40,000 lines from Shakespeare's plays (1.1 MB).

A replacement text is used when Shakespeare cannot be downloaded: short plays in verse (150 KB),
written for this repository and laid out like Shakespeare's. So the first command works without a
network. Losses on it are not comparable. The next preparation with a network uses Shakespeare.
"""

import hashlib
from pathlib import Path
from typing import Any

from configurator import FolioError
from data.download import DownloadError, download
from data.documents import format_advice, is_jsonl
from data.files import (
    atomic_write, explain_os_error, rename_to_backup, shell_command, shown_path,
)  # fmt: skip
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
    # The braces of .jsonl or the commas of .csv would become a part of the text.
    if input_file and (is_jsonl(Path(input_file)) or format_advice(Path(input_file))):
        raise FolioError(f"{input_file}: not a text file; use `python -m data.prepare_text`")
    with dataset_lock(folder):
        return write_shakespeare(folder, tokenizer_type, input_file, vocab_size)


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
    cache = dataset_folder("shakespeare") / "input.txt"
    # Another process may prepare Shakespeare with another tokenizer.
    with dataset_lock(cache):
        text, source_meta = load_text(cache, input_file)
    source_meta["sha256"] = hashlib.sha256(text.encode()).hexdigest()
    splits = split_text(text, val_fraction=0.1)
    # Characters come from all of the text; BPE learns from the training split only.
    texts = splits["train"] if tokenizer_type == "bpe" else [text]
    tokenizer = make_tokenizer(tokenizer_type, texts, vocab_size)
    return write_dataset(folder, tokenizer, splits, {**source_meta, "tokenizer": tokenizer_type})


def load_text(cache: Path, input_file: str | Path | None) -> tuple[str, dict[str, Any]]:
    """The text and its source: a file, or Shakespeare, or the replacement text.

    cache: where Shakespeare is kept for the other tokenizers and for lessons/.
    """
    if input_file:
        text = read_text(input_file)
        if not is_shakespeare(text.encode()):
            return text, {"source": str(Path(input_file).resolve())}
    elif is_shakespeare_file(cache):
        return read_text(cache), {"source": SHAKESPEARE}
    else:
        print(f"downloading tiny Shakespeare to {shown_path(cache)}")
        try:
            text = download(URL, SHA256).decode()
        except DownloadError as error:
            print(f"download failed: {error}")
            source_meta = {"source": "the replacement text", "replacement_for": SHAKESPEARE}
            return read_text(REPLACEMENT_TEXT), source_meta
    if not is_shakespeare_file(cache):
        if cache.exists():
            backup = rename_to_backup(cache)
            print(f"renamed the other text {shown_path(cache)} to {shown_path(backup)}")
        with atomic_write(cache) as temporary:
            temporary.write_bytes(text.encode())
    return text, {"source": SHAKESPEARE}


def is_shakespeare_file(path: Path) -> bool:
    with explain_os_error(path, "cannot be read"):
        return path.is_file() and is_shakespeare(path.read_bytes())


def is_shakespeare(raw: bytes) -> bool:
    return hashlib.sha256(raw).hexdigest() == SHA256


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
