"""Shared code of prepare_shakespeare.py and data/prepare_*.py: from text to a folder under data/.

The main function is write_dataset(): pieces of text -> token ids -> train.bin and val.bin.
lessons/stream.py shows the idea in its simplest form.
"""

import filecmp
import hashlib
import itertools
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import numpy as np

from configurator import ROOT, FolioError, did_you_mean
from data import dataset as dataset_module
from data.bpe import train_bpe
from data.dataset import memmap_shard, read_meta, token_dtype
from data.documents import normalize_newlines, read_pieces
from data.files import (
    explain_os_error,
    file_lock,
    join_names,
    rename_to_backup,
    shell_command,
    shown_path,
    user_path,
    write_json,
)
from data.hub import hub_tokenizer, is_hub_name
from data.tokenizer import BPETokenizer, CharTokenizer, Tokenizer, load_tokenizer, save_tokenizer

TOKENIZER_TYPES = ("char", "gpt2", "bpe")
DATASET_FILES = ("train.bin", "val.bin", "tokenizer.json", "meta.json")
EIGHT_GPUS = ("torchrun", "--standalone", "--nproc_per_node=8")
BLOCK_SIZE_RE = re.compile(r"^block_size = (\d+)", re.MULTILINE)

# --- The tokenizer and the split ---


def make_tokenizer(
    tokenizer_type: str, texts: Iterable[str], vocab_size: int, add_eos: bool = False
) -> Tokenizer:
    """The tokenizer of a new dataset.

    tokenizer_type: "char": the characters of texts; "gpt2"; "bpe": vocab_size tokens, learned from
        texts; or the folder of a run, a model or a dataset, or the name of a model on the hub,
        whose tokenizer is used unchanged.
    add_eos: add an end-of-text token to the characters (a BPE vocabulary always has one).
    Raises FolioError if the folder's vocabulary lacks a character of texts.
    """
    if tokenizer_type == "char":
        return CharTokenizer.from_text(itertools.chain.from_iterable(texts), add_eos)
    if tokenizer_type == "gpt2":
        return BPETokenizer.gpt2()
    if tokenizer_type == "bpe":
        return train_bpe(texts, vocab_size)
    tokenizer = load_tokenizer(tokenizer_folder(tokenizer_type))
    if isinstance(tokenizer, CharTokenizer):
        missing = sorted(set(itertools.chain.from_iterable(texts)) - set(tokenizer.characters))
        if missing:
            raise FolioError(
                f"--tokenizer={tokenizer_type}: its vocabulary lacks "
                f"{plural(len(missing), 'character')} of the text: "
                f"{join_names([*map(repr, missing)])}; replace them in the text, or use "
                "--tokenizer=gpt2"
            )
    return tokenizer


def check_tokenizer_type(tokenizer_type: str) -> None:
    """Raises FolioError unless it is "char", "gpt2", "bpe", a folder, or a model on the hub."""
    if tokenizer_type not in TOKENIZER_TYPES and not tokenizer_folder(tokenizer_type).is_dir():
        guess = did_you_mean(tokenizer_type, TOKENIZER_TYPES)
        raise FolioError(
            f"--tokenizer={tokenizer_type}: must be char, gpt2, bpe, or the folder of a run or "
            f"a model, or OWNER/NAME on the hub{guess}"
        )


def tokenizer_folder(tokenizer_type: str) -> Path:
    """The folder that holds the tokenizer. A model on the hub: its tokenizer is downloaded.

    A relative path is looked up in the current folder, then in the repository, where out/ is.
    """
    path = user_path(tokenizer_type)
    for folder in (path, ROOT / path):
        if folder.is_dir():
            return folder.resolve()
    return hub_tokenizer(tokenizer_type) if is_hub_name(tokenizer_type) else path


def read_text(path: str | Path) -> str:
    """A file's text, as read_pieces() reads it. FolioError if it is missing, empty or not UTF-8."""
    text = "".join(read_pieces(Path(path)))
    if not text.strip():
        raise FolioError(f"{path}: there is no text in this file")
    return text


def encode_prompt(start: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The prompt and its token ids, at least one: "" gives the token that starts a text.

    Raises FolioError for a file that cannot be read and for characters without a token.
    """
    if start.startswith("FILE:"):
        prompt = read_text(user_path(start.removeprefix("FILE:")))
    else:
        prompt = start.replace("\\n", "\n")  # a shell passes "\n" on as two characters
    prompt = normalize_newlines(prompt)  # as in the texts that the model has learned
    try:
        return prompt, tokenizer.encode_prompt(prompt).tolist()
    except FolioError as error:
        raise FolioError(f"prompt: {error}") from None


def split_text(text: str, val_fraction: float = 0.1) -> dict[str, list[str]]:
    """The end is for validation: 'abcdefghij' -> {"train": ['abcdefghi'], "val": ['j']}"""
    cut = int(len(text) * (1 - val_fraction))
    return {"train": [text[:cut]], "val": [text[cut:]]}


# --- The folder ---


def dataset_folder(name: str) -> Path:
    """data/NAME, or the folder to which this name is a link.

    Raises FolioError if NAME is missing or is not the name of one folder.
    """
    if not name:
        raise FolioError("--dataset=NAME is missing: the folder under data/ for the new dataset")
    if name.startswith(".") or Path(name).name != name or user_path(name).name != name:
        raise FolioError(
            f"--dataset={name}: must be the name of one folder under {dataset_module.DATA_DIR}"
        )
    return (dataset_module.DATA_DIR / name).resolve()


def dataset_lock(folder: str | Path) -> AbstractContextManager[None]:
    """One process at a time prepares data/NAME; every other process prints a line and waits."""
    folder = Path(folder)
    return file_lock(
        folder.with_name(f".{folder.name}.lock"),
        f"another process is preparing {folder}; waiting for it",
        wait=True,
    )


def write_dataset(
    folder: str | Path,
    tokenizer: Tokenizer,
    splits: dict[str, Iterable[str | None]],
    source_meta: dict[str, Any],
) -> dict[str, Any]:
    """Tokenize the texts of each split ("train", "val") into `folder`; returns its meta.json.

    splits: pieces of text, each encoded by itself; None is the end of a document.
    source_meta: what meta.json says about the text's source ("source", "sha256", ...).
    The folder appears complete or not at all. An existing dataset is renamed to folder.1, ...
    Raises FolioError if a split has no text, or a character that is not in the vocabulary.
    """
    folder = Path(folder)
    check_replaceable(folder)
    tmp_dir = folder.with_name(f".{folder.name}.tmp")
    with explain_os_error(tmp_dir, "cannot write this dataset"):
        shutil.rmtree(tmp_dir, ignore_errors=True)
        tmp_dir.mkdir(parents=True)
        try:
            save_tokenizer(tokenizer, tmp_dir)
            if load_tokenizer(tmp_dir) != tokenizer:
                raise FolioError("this tokenizer changes when it is saved; use another --tokenizer")
            counts, sha256 = {}, hashlib.sha256()
            for split, texts in splits.items():
                path = tmp_dir / f"{split}.bin"
                counts |= write_tokens(path, split, texts, tokenizer)
                with open(path, "rb") as file:
                    hashlib.file_digest(file, lambda: sha256)  # continues sha256 with this file
            # The SHA-256 of the tokens identifies a text whose own SHA-256 is not given.
            meta = {"sha256": sha256.hexdigest(), **source_meta, **counts}
            meta["vocab_size"] = tokenizer.vocab_size
            meta["dtype"] = token_dtype(tokenizer.vocab_size).name
            meta["tokenizer_sha256"] = hashlib.sha256(tokenizer.to_json().encode()).hexdigest()
            write_json(tmp_dir / "meta.json", meta)
            if equal_folders(folder, tmp_dir):
                print(f"{shown_path(folder)} already holds this dataset")
                return meta
            backup = rename_to_backup(folder) if folder.exists() else None
            os.replace(tmp_dir, folder)
        finally:
            shutil.rmtree(tmp_dir, ignore_errors=True)
    # Printed last: a closed or full stdout must not undo anything.
    if backup:
        print(f"renamed the existing dataset to {shown_path(backup)}")
    for split in splits:
        if changed := meta.get(f"{split}_changed_bytes"):
            print(
                f"WARNING  the tokens of the {split} split stand for {abs(changed):,} bytes "
                f"{'fewer' if changed < 0 else 'more'} than its text: the vocabulary lacks "
                "characters of the text, or the tokenizer changes case, spaces or accents, or "
                "recognizes special tokens in the text; so bits per byte are not comparable"
            )
    return meta


def equal_folders(folder: Path, other: Path) -> bool:
    """Whether all files of `other` are in `folder`, with equal contents, and no other shards."""
    names = [path.name for path in other.iterdir()]
    _, different, missing = filecmp.cmpfiles(other, folder, names, shallow=False)
    has_other_shards = any(path.name not in names for path in folder.glob("*.bin"))
    return not (different or missing or has_other_shards)


def write_tokens(
    path: str | Path, split: str, texts: Iterable[str | None], tokenizer: Tokenizer
) -> dict[str, int]:
    """Write the token ids of all texts to one file; returns the number of tokens and characters.

    If the tokens stand for another number of bytes than the texts have, the difference is returned,
    too.
    """
    tokens = characters = changed_bytes = 0
    byte_lengths = tokenizer.byte_lengths
    with open(path, "wb") as file:
        for text, ids in encode_in_order(texts, tokenizer):
            file.write(ids.astype(token_dtype(tokenizer.vocab_size)).tobytes())
            tokens += len(ids)
            characters += len(text or "")
            if text:
                difference = int(byte_lengths[ids].sum()) - len(text.encode())
                if difference != 1:  # 1: some tokenizers put a space before a text
                    changed_bytes += difference
        file.flush()
        os.fsync(file.fileno())
    if tokens < 2:
        raise FolioError(f"the text is too short: the {split} split has fewer than 2 tokens")
    counts = {f"{split}_tokens": tokens, f"{split}_characters": characters}
    if changed_bytes:
        counts[f"{split}_changed_bytes"] = changed_bytes
    return counts


def encode_in_order(
    texts: Iterable[str | None], tokenizer: Tokenizer
) -> Iterator[tuple[str | None, np.ndarray]]:
    """Yields each text with its token ids, in order; a few texts are encoded in parallel.

    The first text of a document begins with the tokenizer's prefix_ids, unless documents end with
    the same ids.
    """
    end_of_document, is_first = tokenizer.separator_ids, True
    prefix = tokenizer.prefix_ids
    if np.array_equal(prefix, end_of_document):
        prefix = prefix[:0]

    def encode(text: str | None) -> tuple[str | None, np.ndarray]:
        return text, end_of_document if text is None else tokenizer.encode(text)

    texts, batch_size = iter(texts), 4 * (os.cpu_count() or 1)
    with ThreadPoolExecutor() as pool:
        while batch := list(itertools.islice(texts, batch_size)):
            for text, ids in pool.map(encode, batch):
                if is_first and text is not None:
                    ids = np.concatenate((prefix, ids))
                yield text, ids
                is_first = text is None


def check_replaceable(folder: Path) -> None:
    """Raise FolioError if the folder is neither empty nor a dataset.

    Check this before hours of work.
    """
    is_empty = not folder.exists() or (folder.is_dir() and not any(folder.iterdir()))
    if not is_empty and not any((folder / name).exists() for name in DATASET_FILES):
        raise FolioError(
            f"{folder}: exists and is not a dataset; move it away, or choose another --dataset"
        )


def shards_folder(name: str, source: str) -> Path:
    """data/NAME for shards that are downloaded one by one. FolioError if it is another dataset."""
    folder = dataset_folder(name)
    other_source = read_meta(folder).get("source", source) != source
    if other_source or (folder / "train.bin").exists():
        raise FolioError(f"{folder}: holds another dataset; choose another --dataset")
    with explain_os_error(folder, "cannot create this folder"):
        folder.mkdir(parents=True, exist_ok=True)
    if not (folder / "meta.json").exists():
        write_json(folder / "meta.json", {"source": source})  # reserves the folder for this source
    return folder


def complete_shards(folder: str | Path, source: str) -> dict[str, Any]:
    """Complete a dataset of GPT-2's tokens whose shards are all there; returns its meta.json.

    All shards count, also shards of earlier downloads. Raises FolioError if one is damaged.
    """
    folder, tokenizer = Path(folder), BPETokenizer.gpt2()
    meta = read_meta(folder)  # may name the commit on the hub
    meta |= {"source": source, "vocab_size": tokenizer.vocab_size, "dtype": "uint16"}
    for split in ("train", "val"):
        shards = [memmap_shard(path, "<u2") for path in folder.glob(f"{split}_*.bin")]
        meta[f"{split}_tokens"] = sum(map(len, shards))
    write_json(folder / "meta.json", meta)
    save_tokenizer(tokenizer, folder)  # last, because a folder without it counts as incomplete
    return meta


# --- Output ---


def summary(folder: str | Path, meta: dict[str, Any], parts: str = "") -> str:
    """What a program prints about a new dataset: three lines, below 80 columns without the path.

    parts: "9 documents", for example.
    """
    parts = f"{parts}, " if parts else ""
    return (
        f"{shown_path(folder)}\n    {parts}vocabulary of {meta['vocab_size']:,} tokens\n"
        f"    {meta['train_tokens']:,} training tokens, {meta['val_tokens']:,} validation tokens"
    )


def plural(number: int, noun: str) -> str:
    """(1, "file") -> '1 file'; (2000, "file") -> '2,000 files'"""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def train_command(
    config_name: str,
    meta: dict[str, Any],
    flags: list[str],
    max_block_size: int | None = None,
    launcher: tuple[str, ...] = ("python",),
) -> str:
    """The command that trains on a new dataset, as it can be pasted in the current folder.

    It sets --block_size if that of the config file is larger than max_block_size, or too large for
    the text.
    config_name: "" for a command without a config file; its block size is max_block_size.
    launcher: EIGHT_GPUS, for example.
    """
    files, block_size = [ROOT / "train.py"], max_block_size or 0
    if config_name:
        files.append(ROOT / "config" / f"{config_name}.py")
        found = BLOCK_SIZE_RE.search(files[1].read_text(encoding="utf-8"))
        block_size = int(found[1]) if found else 0
    longest = min(meta["train_tokens"] - 1, meta["val_tokens"] - 1, max_block_size or 2**63)
    if block_size > longest:
        flags = [*flags, f"--block_size={longest}"]
    if Path.cwd() == ROOT:
        files = [file.relative_to(ROOT) for file in files]
    return shell_command(*launcher, *map(str, files), *flags)
