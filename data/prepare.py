"""From text to a dataset's folder: what all preparers share but for the source of the text."""

import hashlib
import itertools
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from configurator import FolioError
from data.bpe import train_bpe
from data.dataset import DATA, read_meta
from data.files import move_aside, write_json, write_text
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, tokenizer_text


def make_tokenizer(
    kind: str, texts: Iterable[str], vocab_size: int, parts_documents: bool = False
) -> Tokenizer:
    """The tokenizer called `kind` ("char", "gpt2" or "bpe"), made for these texts if need be."""
    if kind == "gpt2":
        return BPETokenizer.gpt2()
    if kind == "bpe":
        return train_bpe(texts, vocab_size)
    alphabet = set()
    for text in texts:
        alphabet.update(text)
    return CharTokenizer.of(alphabet, parts_documents)


def dataset_folder(name: str) -> Path:
    """data/NAME; FolioError if NAME would lead elsewhere."""
    if not name or name.startswith(".") or Path(name).name != name:
        raise FolioError(f"--dataset={name}: a dataset's name is that of one folder under {DATA}")
    return DATA / name


def write_dataset(
    folder: Path,
    tokenizer: Tokenizer,
    splits: dict[str, Iterable[str | None]],
    origin: dict[str, Any],
) -> dict[str, Any]:
    """Encode the texts of each split ("train", "val") into `folder`, and return its meta.json.

    splits: pieces of text, each encoded by itself; None puts an end-of-text token.
    origin: what meta.json says of the text's source ("source", "sha256", ...).
    The folder appears whole or not at all. One that is there already is replaced if it is the same
    or was a stand-in, and moved aside otherwise.
    Raises FolioError if a split holds no text, or a character the vocabulary lacks.
    """
    dtype = np.dtype("<u2" if tokenizer.vocab_size <= 2**16 else "<u4")
    fresh = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(fresh, ignore_errors=True)
    fresh.mkdir(parents=True)
    try:
        counts, sha256 = {}, hashlib.sha256()
        for split, texts in splits.items():
            path = fresh / f"{split}.bin"
            counts |= write_tokens(path, split, texts, tokenizer, dtype)
            with open(path, "rb") as file:
                hashlib.file_digest(file, lambda: sha256)
        # A text whose own hash is not known is known by that of its tokens.
        meta = {"sha256": sha256.hexdigest(), **origin, **counts, "dtype": dtype.name}
        meta["vocab_size"] = tokenizer.vocab_size
        write_text(fresh / "tokenizer.json", tokenizer_text(tokenizer))
        write_json(fresh / "meta.json", meta)
        move_into_place(fresh, folder, meta)
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return meta


def write_tokens(
    path: Path,
    split: str,
    texts: Iterable[str | None],
    tokenizer: Tokenizer,
    dtype: np.dtype,
) -> dict[str, int]:
    """Write the ids of the texts one after the other, and return how many of what there were."""
    tokens = characters = 0
    with open(path, "wb") as file:
        for text, ids in encoded(texts, tokenizer):
            # A number too large for its type would wrap into another token without a word.
            assert len(ids) == 0 or ids.max() <= np.iinfo(dtype).max
            file.write(ids.astype(dtype).tobytes())
            tokens += len(ids)
            characters += len(text or "")
        file.flush()
        os.fsync(file.fileno())
    if tokens < 2:
        raise FolioError(f"the text is too short: nothing is left for the {split} split")
    return {f"{split}_tokens": tokens, f"{split}_characters": characters}


def encoded(
    texts: Iterable[str | None], tokenizer: Tokenizer
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yields each text with its ids, in order, a few being encoded at a time: one by each core."""

    def encode(text):
        return text, np.array([tokenizer.end_of_text]) if text is None else tokenizer.encode(text)

    texts, few = iter(texts), 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as cores:
        while some := list(itertools.islice(texts, few)):
            yield from cores.map(encode, some)


def move_into_place(fresh: Path, folder: Path, meta: dict[str, Any]) -> None:
    """Rename fresh to folder. What is there moves aside, and goes if it is the same or stood in."""
    replaced = None
    if folder.exists():
        if not any((folder / name).exists() for name in SIGNS):
            raise FolioError(f"{folder}: there is something else at this place; rename --dataset")
        old = old_meta(folder)
        same = old == meta
        stood_in = old.get("stands_in_for") is not None and "stands_in_for" not in meta
        replaced = move_aside(folder)
        if not (same or stood_in):
            print(f"the dataset that was there is now {replaced}")
            replaced = None
    os.replace(fresh, folder)
    if replaced is not None:
        shutil.rmtree(replaced)


SIGNS = ("train.bin", "val.bin", "tokenizer.json", "meta.json")  # of a dataset, perhaps damaged


def old_meta(folder: Path) -> dict[str, Any]:
    """read_meta(), but {} where it is damaged: what is prepared anew need not be whole."""
    try:
        return read_meta(folder)
    except FolioError:
        return {}


def shards_folder(name: str, source: str) -> Path:
    """data/NAME, for shards of `source` to be added to; FolioError if another dataset is there."""
    folder = dataset_folder(name)
    if (folder / "train.bin").exists() or old_meta(folder).get("source", source) != source:
        raise FolioError(f"{folder}: holds another dataset; choose another --dataset")
    folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "meta.json").exists():
        write_json(folder / "meta.json", {"source": source})  # the rest when all is there
    return folder


def read_text(path: Path) -> str:
    """A file's text, its line ends as they are; FolioError if it is missing, empty or not UTF-8."""
    try:
        raw = path.read_bytes()
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise FolioError(
            f"{path}: not UTF-8 text (the byte at offset {error.start:,} belongs to no character)"
        ) from None
    except OSError as error:
        raise FolioError(f"{path}: cannot read this text: {error.strerror}") from None
    if not text.strip():
        raise FolioError(f"{path}: there is no text in this file")
    return text


def split_text(text: str, val_fraction: float = 0.1) -> dict[str, list[str]]:
    """The beginning to train on, the end to validate with: 'abcdefghij' -> 'abcdefghi', 'j'."""
    cut = int(len(text) * (1 - val_fraction))
    return {"train": [text[:cut]], "val": [text[cut:]]}
