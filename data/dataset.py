"""Datasets: files of token ids, cut into windows that become the inputs and targets of a batch.

    dataset = open_dataset("shakespeare_char", block_size=128)
    inputs, targets = training_batch(dataset.train, 8, 128, seed=1, step=0, micro_batch=0)

A window of T + 1 tokens holds T training examples, because at each position the model has to
predict the next token. The window 5 9 2 (T = 2) holds two examples:

    5 -> 9              inputs   5 9
    5 9 -> 2            targets  9 2

`python -m data.show shakespeare_char` prints a batch of a dataset in this form.
"""

import hashlib
import mmap
import os
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch

from configurator import FolioError, did_you_mean, format_value
from data.files import explain_os_error, read_folder, user_path
from data.tokenizer import Tokenizer, load_tokenizer, read_json

DATA_DIR = Path(__file__).resolve().parent
IGNORE_INDEX = -1  # a target with this value does not count in the loss


# --- Batches ---


def inputs_and_targets(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Shift by one: windows (B, T + 1) -> inputs and targets, each (B, T).

    [[5, 9, 2]] -> [[5, 9]], [[9, 2]]: the examples 5 -> 9 and 5 9 -> 2.
    """
    # Contiguous: each of the two is one block of memory, which is copied to a GPU in one piece.
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def training_batch(
    tokens: "ShardedTokens",
    batch_size: int,
    block_size: int,
    seed: int,
    step: int,
    micro_batch: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows: inputs and targets, each (B, T), int64.

    Windows are drawn independently: in one epoch, some tokens come twice and others never.
    The batch is a function of (seed, step, micro_batch) only. So a resumed run sees the batches of
    an uninterrupted one, and the number of processes does not change them.
    """
    rng = np.random.default_rng([seed, step, micro_batch])
    indices = rng.integers(tokens.num_windows(block_size + 1), size=batch_size)  # (B,)
    windows = tokens.windows(indices, block_size + 1)  # (B, T + 1)
    return inputs_and_targets(torch.from_numpy(windows))


def evaluation_batches(
    tokens: "ShardedTokens",
    batch_size: int,
    block_size: int,
    max_tokens: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fixed windows: inputs and targets, each (B, T), int64.

    Each token of a file is predicted once, except the first one. A target is IGNORE_INDEX if the
    window before has predicted it (see evaluation_windows()), or if its row only fills up the last
    batch.
    max_tokens: predict the first max_tokens tokens, and the other tokens of the last window. 0
    means all.
    rank, world_size: batch number i belongs to rank i % world_size; only these batches are built.
    """
    indices, num_repeated = evaluation_windows(tokens.lengths, block_size)
    if max_tokens:
        num_predicted = np.cumsum(block_size - num_repeated)  # up to the end of each window
        num_windows = int(np.searchsorted(num_predicted, max_tokens)) + 1
        indices, num_repeated = indices[:num_windows], num_repeated[:num_windows]
    for start in range(rank * batch_size, len(indices), world_size * batch_size):
        rows = indices[start : start + batch_size]
        num_ignored = num_repeated[start : start + batch_size]
        # All batches have the same shape, because torch.compile compiles again for each shape.
        missing = batch_size - len(rows)
        rows = np.pad(rows, (0, missing), mode="edge")  # (B,)
        num_ignored = np.pad(num_ignored, (0, missing), constant_values=block_size)  # (B,)
        windows = tokens.windows(rows, block_size + 1)  # (B, T + 1)
        inputs, targets = inputs_and_targets(torch.from_numpy(windows))
        ignored = torch.arange(block_size) < torch.from_numpy(num_ignored)[:, None]  # (B, T)
        yield inputs, targets.masked_fill(ignored, IGNORE_INDEX)


def evaluation_windows(lengths: np.ndarray, block_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Windows side by side, in all shards: their indices, and how many targets each one repeats.

    Example: 10 tokens, block_size 4. The windows of 4 + 1 tokens start at tokens 0, 4 and 5. The
    last one starts at 5, not at 8, because it has to be complete. Its first 3 targets (tokens 6, 7
    and 8) were already predicted in the window before: it repeats 3.
    lengths: number of tokens in each shard (file). Shards of block_size tokens or less hold no
    window. Windows are counted through all shards: 10 tokens have 10 - 4 = 6 windows of 4 + 1
    tokens, with the indices 0 to 5, and the next shard begins with index 6.
    """
    indices, num_repeated, first_index = [], [], 0
    for length in lengths:
        if length > block_size:
            # No window starts at the last token, which no token follows: length - 1.
            planned = np.arange(0, length - 1, block_size)  # 0, 4, 8
            starts = np.minimum(planned, length - 1 - block_size)  # 0, 4, 5
            indices.append(first_index + starts)
            num_repeated.append(planned - starts)  # 0, 0, 3
            first_index += length - block_size  # the number of windows in this shard
    return np.concatenate(indices), np.concatenate(num_repeated)


Item = TypeVar("Item")


def prefetch(items: Iterator[Item]) -> Iterator[Item]:
    """Yields the items. For speed, a thread computes the next item while one is in use."""
    end = object()  # next(items, end) returns it after the last item
    with ThreadPoolExecutor(max_workers=1) as thread:
        future = thread.submit(next, items, end)
        while (item := future.result()) is not end:
            future = thread.submit(next, items, end)  # the item after this one
            yield item


def derive_seed(*numbers: int) -> int:
    """One seed for torch from several numbers: (seed, step, micro_batch) -> 0 ... 2**63 - 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


# --- The files of token ids ---
#
# train.bin and val.bin hold token ids as little-endian uint16, or uint32 if the vocabulary is
# larger than 65,536. A split may have several files, called shards: train_000001.bin,
# train_000002.bin, and so on. GPT-2-tokenized FineWeb (web pages) has shards with a header of 256
# int32; no other dataset of Folio has this header.
#
# The files are memory-mapped: do not change or shorten them while a program reads them. If a mapped
# file becomes shorter, the system kills the program (bus error). A new file may replace an old one.

SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
LARGE_BYTES = 2**26  # of larger splits, memory pages are released: see release_pages()
CHECKED_IDS = 2**16  # ids of each shard that are checked at the start; each batch is checked, too


def token_dtype(vocab_size: int) -> np.dtype:
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardedTokens:
    """The tokens of all shards of one split, "train" or "val".

    Raises FolioError if a file is missing, unreadable, empty, or of a wrong size, if meta.json
    states another number of tokens, or if an id is outside the vocabulary.
    """

    def __init__(self, folder: str | Path, split: str, meta: dict[str, Any], vocab_size: int):
        folder = Path(folder)
        self.name = f"{folder / split}*.bin"  # train.bin, or train_000001.bin, ...
        self.vocab_size = vocab_size
        dtype = np.dtype(meta.get("dtype", token_dtype(vocab_size))).newbyteorder("<")
        whole = folder / f"{split}.bin"
        shards = folder.glob(f"{split}_*.bin")
        numbered = [path for path in shards if path.stem.removeprefix(f"{split}_").isdecimal()]
        paths = [whole] if whole.exists() else sorted(numbered)
        if not paths:
            raise FolioError(f"{self.name}: not found; prepare the dataset again")
        self.shards = [memmap_shard(path, dtype) for path in paths]
        if f"{split}_tokens" not in meta:
            for path, shard in zip(paths, self.shards, strict=True):
                check_dtype(path, shard)
        self.lengths = np.array([len(shard) for shard in self.shards])
        self.is_large = sum(shard.nbytes for shard in self.shards) > LARGE_BYTES
        # A preparation may be adding shards just now; then meta.json states fewer tokens.
        stated = meta.get(f"{split}_tokens", len(self))
        may_grow = paths != [whole]
        if type(stated) is not int or stated > len(self) or (stated < len(self) and not may_grow):
            raise FolioError(
                f"{self.name}: {len(self):,} tokens, but meta.json states "
                f"{format_value(stated)}; prepare the dataset again"
            )
        for shard in self.shards:
            self.check_ids(shard[:CHECKED_IDS])

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def checksum(self) -> int:
        """CRC-32 of the first and last CHECKED_IDS ids of each shard."""
        crc = 0
        for shard in self.shards:
            for ids in (shard[:CHECKED_IDS], shard[-CHECKED_IDS:]):
                crc = zlib.crc32(ids.tobytes(), crc)
        return crc

    def num_windows(self, length: int) -> int:
        """Number of windows of `length` tokens: 10 tokens hold 10 - 3 + 1 = 8 windows of 3."""
        return int((self.lengths - length + 1).clip(min=0).sum())

    def windows(self, indices: np.ndarray, length: int) -> np.ndarray:
        """The windows with these indices: (n,) -> (n, length), int64. No window crosses shards.

        With a single shard, an index is the position of a window's first token, and the windows are
        shard[index : index + length]. With several shards, the count goes on in the next shard:
        shards of 10 and 6 tokens have the windows of 3 tokens 0 to 7 and 8 to 11.
        """
        # The index of the first window of each shard, and the number of windows: 0, 8, 12.
        first_index = np.cumsum([0, *(self.lengths - length + 1).clip(min=0)])
        shard_of = np.searchsorted(first_index, indices, side="right") - 1  # (n,)
        starts = indices - first_index[shard_of]  # (n,) positions within the shards
        windows = np.empty((len(indices), length), dtype=np.int64)
        for shard in np.unique(shard_of):
            rows = shard_of == shard
            windows[rows] = self.shards[shard][starts[rows, None] + np.arange(length)]
            if self.is_large:
                release_pages(self.shards[shard])
        self.check_ids(windows)
        return windows

    def check_ids(self, ids: np.ndarray) -> None:
        """Raise FolioError if an id is outside the vocabulary."""
        if ids.max() >= self.vocab_size:
            raise FolioError(
                f"{self.name}: token id {ids.max()} is out of range (vocabulary size "
                f"{self.vocab_size:,}); prepare the dataset again"
            )


def memmap_shard(path: str | Path, dtype: np.dtype | str) -> np.ndarray:
    """The ids in a shard, as a memory-mapped array: parts of the file are read when indexed.

    dtype: of the ids in a shard without a header; a header means uint16.
    Raises FolioError if the file is unreadable, or its size does not match its header or dtype.
    """
    path, dtype = Path(path), np.dtype(dtype)
    with explain_os_error(path, "cannot be read"):
        size, offset = path.stat().st_size, 0
        if has_header(path):
            dtype, offset = np.dtype("<u2"), HEADER_BYTES
            count = int(np.fromfile(path, dtype="<i4", count=3)[2])
            if size != HEADER_BYTES + 2 * count:
                raise FolioError(
                    f"{path}: the header states {count:,} tokens, but the file has "
                    f"{(size - HEADER_BYTES) // 2:,}; delete the file and download it again"
                )
        if size == offset:
            raise FolioError(f"{path}: empty; prepare the dataset again")
        if size % dtype.itemsize:
            raise FolioError(
                f"{path}: {size:,} bytes are not a multiple of the size of {dtype.name}; "
                "prepare the dataset again"
            )
        # asarray() makes no copy. Indexing a plain array takes less time than indexing a memmap.
        return np.asarray(np.memmap(path, dtype=dtype, mode="r", offset=offset))


def release_pages(ids: np.ndarray) -> None:
    """Take the pages of a shard out of this process's memory; they stay in the system's cache.

    Otherwise each process would seem to use as much memory as all shards that it has read, and
    systems that add up the memory of processes, such as SLURM, could end the job.
    ids: from memmap_shard().
    """
    mapped = ids.base.base  # np.asarray() has wrapped an np.memmap, which has wrapped an mmap
    if hasattr(mapped, "madvise"):  # not on Windows
        mapped.madvise(mmap.MADV_DONTNEED)


def check_dtype(path: Path, ids: np.ndarray) -> None:
    """Raise FolioError if the ids of a shard seem to have twice as many bytes as expected, or more.

    Read as uint16, an id of 32 bits is a small number and a zero. This check is for folders whose
    meta.json does not state the number of tokens.
    """
    is_npy = np.fromfile(path, dtype="u1", count=6).tobytes() == b"\x93NUMPY"
    even, odd = ids[:1000:2], ids[1:1000:2]
    if is_npy or (len(odd) >= 32 and even.any() and not odd.any()):
        raise FolioError(
            f"{path}: seems to be a .npy file, or to hold ids of over {8 * ids.itemsize} bits; "
            'write them as uint16, or as uint32 with {"dtype": "uint32"} in meta.json'
        )


def has_header(path: str | Path) -> bool:
    """Whether a shard begins with 20240520, 1 and a count, as GPT-2-tokenized FineWeb's do."""
    start = np.fromfile(path, dtype="<i4", count=3)
    return len(start) == 3 and tuple(start[:2]) == (SHARD_MAGIC, SHARD_VERSION)


# --- The folder of a dataset ---


@dataclass
class Dataset:
    """A prepared dataset: the folder data/NAME/ with its tokens, tokenizer.json and meta.json."""

    folder: Path
    tokenizer: Tokenizer
    meta: dict[str, Any]  # source of the text, dtype and number of tokens
    train: ShardedTokens
    val: ShardedTokens


PREPARE_COMMANDS = {
    "shakespeare_char": "python prepare_shakespeare.py",
    "shakespeare_bpe": "python prepare_shakespeare.py --tokenizer=bpe",
    "shakespeare_gpt2": "python prepare_shakespeare.py --tokenizer=gpt2",
    "fineweb": "python -m data.prepare_fineweb --shards=100",
    "openwebtext": "python -m data.prepare_openwebtext",
}


def open_dataset(name: str | Path, block_size: int, tokenizer: Tokenizer | None = None) -> Dataset:
    """Open data/NAME/ and check it.

    tokenizer: for folders without tokenizer.json (nanoGPT's).
    Raises FolioError if a file is missing, unreadable or damaged, if a split is shorter than one
    window of block_size + 1 tokens, or if an id is outside the vocabulary.
    """
    folder = DATA_DIR / user_path(name)
    return read_folder(folder, lambda: read_dataset(folder, str(name), block_size, tokenizer))


def read_dataset(folder: Path, name: str, block_size: int, tokenizer: Tokenizer | None) -> Dataset:
    """Open the folder. open_dataset() calls this again if another process replaces the folder."""
    tokenizer = find_tokenizer(folder, name, tokenizer)
    meta = read_meta(folder)
    check_tokenizer(folder / "tokenizer.json", meta)
    train = ShardedTokens(folder, "train", meta, tokenizer.vocab_size)
    val = ShardedTokens(folder, "val", meta, tokenizer.vocab_size)
    shortest = min(int(tokens.lengths.max()) for tokens in (train, val))
    for tokens in (train, val):
        if tokens.lengths.max() <= block_size:
            raise FolioError(
                f"{tokens.name}: only {int(tokens.lengths.max()):,} tokens, but a window needs "
                f"block_size + 1 = {block_size + 1:,}; use more text, or try "
                f"--block_size={max(shortest - 1, 1)}"
            )
        if unused := int((tokens.lengths <= block_size).sum()):
            print(
                f"{tokens.name}: unused shards: {unused} of {len(tokens.shards)}; "
                f"a window needs block_size + 1 = {block_size + 1:,} tokens"
            )
    return Dataset(folder, tokenizer, meta, train, val)


def known_start_id(dataset: Dataset) -> int | None:
    """Tokenizer.known_start_id for a model that is trained from scratch on this dataset.

    None if the model will know tokenizer.start_token_id; else the newline or, if the model will not
    know it, the most frequent token. The model will know a token that occurs 10 times, or at least
    once in 1,000 tokens, in the first shard of the training split (of a large shard, in its first
    16 million tokens).
    """
    tokenizer, ids = dataset.tokenizer, dataset.train.shards[0][: 2**24]
    if len(tokenizer.prefix_ids):
        return None  # these tokens begin each prompt
    counts = np.bincount(ids, minlength=tokenizer.vocab_size)
    for token_id in (tokenizer.start_token_id, *tokenizer.newline_ids[:1]):
        if counts[token_id] >= min(10, len(ids) / 1000):
            return None if token_id == tokenizer.start_token_id else int(token_id)
    return int(counts.argmax())


class OtherTokenizerError(FolioError):
    """A dataset does not have the tokenizer that is expected."""


def find_tokenizer(folder: Path, name: str, given: Tokenizer | None) -> Tokenizer:
    """The dataset's own tokenizer or, in a folder without tokenizer.json, the given one."""
    if not name:
        raise FolioError("--dataset is empty; give the name of a folder in data/")
    with explain_os_error(folder, "cannot be read"):
        if not folder.is_dir():
            raise FolioError(f"dataset {name!r} not found in {DATA_DIR}{dataset_hint(name)}")
        files = os.listdir(folder)
    if "tokenizer.json" in files:
        own = load_tokenizer(folder)
        if given not in (None, own):
            raise OtherTokenizerError(f"{folder}: has a tokenizer of its own; omit --tokenizer")
        return own
    if name in PREPARE_COMMANDS and "train.bin" not in files:
        raise FolioError(f"{folder}: incomplete; continue with {PREPARE_COMMANDS[name]}")
    if "meta.pkl" in files:
        raise FolioError(
            f"{folder / 'meta.pkl'}: nanoGPT's vocabulary of characters; it is a pickle, which can "
            "run any code, so Folio does not open it; prepare the text again: "
            "python -m data.prepare_text FILE --dataset=NAME"
        )
    if given is None and not any(file.endswith(".bin") for file in files):
        raise FolioError(f"{folder}: not a dataset{dataset_hint(name)}")
    if given is None:
        raise FolioError(
            f"{folder}: tokenizer.json not found; prepare the dataset again, or use "
            "--tokenizer=gpt2 if the ids are GPT-2's"
        )
    return given


def check_tokenizer(path: Path, meta: dict[str, Any]) -> None:
    """Raises FolioError if meta.json describes another tokenizer.json than the file `path`."""
    if path.exists() and "tokenizer_sha256" in meta:
        text = path.read_text(encoding="utf-8")
        if hashlib.sha256(text.encode()).hexdigest() != meta["tokenizer_sha256"]:
            raise FolioError(
                f"{path}: not the tokenizer of this dataset (meta.json states another SHA-256); "
                "prepare the dataset again"
            )


def dataset_hint(name: str) -> str:
    """What to do about a dataset that does not exist, to be appended to the message."""
    if name in PREPARE_COMMANDS:
        return f"; prepare it with {PREPARE_COMMANDS[name]}"
    available = sorted(path.parent.name for path in DATA_DIR.glob("[!.]*/tokenizer.json"))
    names = f"; available: {', '.join(available)}" if available else ""
    names += "; python -m data.prepare_text makes a dataset of a text"
    return did_you_mean(name.removesuffix(".txt"), available) or names


def read_meta(folder: str | Path) -> dict[str, Any]:
    """The contents of meta.json; empty if it does not exist, as in nanoGPT's folders.

    Raises FolioError if it is unreadable or damaged.
    """
    path = Path(folder) / "meta.json"
    meta = read_json(path)
    is_valid_dtype = meta.get("dtype", "uint16") in ("uint16", "uint32")
    if not is_valid_dtype or not isinstance(meta.get("sha256", ""), str):
        raise FolioError(
            f"{path}: damaged (dtype must be uint16 or uint32, sha256 a string); "
            "prepare the dataset again"
        )
    return meta
