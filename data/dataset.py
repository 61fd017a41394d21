"""From token ids on disk to batches: one long stream, cut into windows of T + 1 tokens.

A dataset is a folder `data/NAME/`: `train*.bin` and `val*.bin` hold token ids as little-endian
uint16 (uint32 where the vocabulary needs it), `tokenizer.json` says what the ids mean, `meta.json`
where they came from. Shards are raw, or begin with the header of 256 int32 that GPT-2-tokenised
FineWeb has.

A window of T + 1 tokens holds T examples, for every token is asked to name its successor. Which
windows make a batch depends on (seed, step, micro-batch) and on nothing else: not on evaluations,
not on restarts, not on how many processes share the work.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configurator import FolioError, did_you_mean
from data.tokenizer import Tokenizer, load_tokenizer

DATA = Path(__file__).resolve().parent
SHARD_MAGIC, SHARD_VERSION, HEADER_BYTES = 20240520, 1, 256 * 4
IGNORED = -1  # a target that is not asked for; torch's cross entropy is told to leave it out
CHECKED_AT_OPENING = 2**25  # tokens of each shard; every batch is checked again when it is drawn


@dataclass
class Dataset:
    """What `data/NAME/` holds: the two streams, their tokenizer, and where they came from."""

    folder: Path
    tokenizer: Tokenizer
    meta: dict[str, Any]
    train: "TokenStream"
    val: "TokenStream"


def open_dataset(name: str, block_size: int, tokenizer: Tokenizer | None = None) -> Dataset:
    """Map the dataset's files into memory and check them.

    tokenizer: what the ids mean, of a folder that does not say so itself, as nanoGPT's do not.
    Raises FolioError if a file is missing, empty, odd-sized or cut short, if a stream is shorter
    than one window of block_size + 1 tokens, or holds an id outside the vocabulary.
    """
    folder = DATA / name
    if not folder.is_dir():
        raise FolioError(f"there is no dataset {name!r} in {DATA}{hint_for(name)}")
    if (folder / "tokenizer.json").exists():
        tokenizer = load_tokenizer(folder)
    elif name in FETCHED_BY and not (folder / "train.bin").exists():
        raise FolioError(f"{folder}: not yet whole; {FETCHED_BY[name]} goes on with it")
    elif tokenizer is None:
        raise FolioError(
            f"{folder}: there is no tokenizer.json to say what its ids mean; prepare it again, "
            "or, if they are GPT-2's, --tokenizer=gpt2"
        )
    meta = read_meta(folder)
    streams = [TokenStream(folder, split, meta, tokenizer.vocab_size) for split in ("train", "val")]
    for stream in streams:
        stream.check(block_size)
    return Dataset(folder, tokenizer, meta, *streams)


FETCHED_BY = {
    "fineweb": "python -m data.prepare_fineweb --shards=100",
    "openwebtext": "python -m data.prepare_openwebtext",
}


def hint_for(name: str) -> str:
    if name in FETCHED_BY:
        return f"; {FETCHED_BY[name]} fetches it"
    there = [path.parent.name for path in DATA.glob("*/tokenizer.json")]
    names = f"; there are: {', '.join(sorted(there))}" if there else ""
    return did_you_mean(name, there) or names


def read_meta(folder: Path) -> dict[str, Any]:
    """meta.json's contents; an empty dict where there is none, as in nanoGPT's folders."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise FolioError(f"{path}: damaged ({error}); prepare the dataset again") from None
    if not isinstance(meta, dict) or meta.get("dtype", "uint16") not in ("uint16", "uint32"):
        raise FolioError(f"{path}: damaged (dtype must be uint16 or uint32); prepare it again")
    return meta


# --- One long stream of integers ---


class TokenStream:
    """All shards of one split, as one stream in which no window crosses from shard to shard."""

    def __init__(self, folder: Path, split: str, meta: dict[str, Any], vocab_size: int):
        self.name = f"{folder / split}*.bin"
        self.vocab_size = vocab_size
        usual = "uint16" if vocab_size <= 2**16 else "uint32"
        dtype = np.dtype(meta.get("dtype", usual)).newbyteorder("<")
        paths = sorted(folder.glob(f"{split}*.bin"))
        if not paths:
            raise FolioError(f"{self.name}: there is no such file; prepare the dataset again")
        self.shards = [map_shard(path, dtype) for path in paths]
        self.lengths = np.array([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.lengths.sum())

    def check(self, block_size: int) -> None:
        if self.lengths.max() <= block_size:
            raise FolioError(
                f"{self.name}: {int(self.lengths.max()):,} tokens are too few for a window of "
                f"block_size + 1 = {block_size + 1:,}; take more text or a smaller --block_size"
            )
        for shard in self.shards:
            for start in range(0, min(len(shard), CHECKED_AT_OPENING), 2**22):
                self.check_ids(shard[start : start + 2**22])

    def check_ids(self, ids: np.ndarray) -> None:
        if ids.max() >= self.vocab_size:
            raise FolioError(
                f"{self.name}: holds the token {ids.max()}, but its tokenizer has only "
                f"{self.vocab_size:,} (0 to {self.vocab_size - 1:,}); prepare the dataset again"
            )

    def window_count(self, length: int) -> int:
        """How many windows of `length` tokens there are, one starting at each token that can."""
        return int((self.lengths - length + 1).clip(min=0).sum())

    def windows(self, numbers: np.ndarray, length: int) -> np.ndarray:
        """The windows of these numbers, counted through all shards: (n,) -> (n, length) int64."""
        first_number = np.cumsum([0, *(self.lengths - length + 1).clip(min=0)])
        shard_of = np.searchsorted(first_number, numbers, side="right") - 1
        starts = numbers - first_number[shard_of]
        windows = np.empty((len(numbers), length), dtype=np.int64)
        for shard in np.unique(shard_of):
            here = shard_of == shard
            windows[here] = self.shards[shard][starts[here, None] + np.arange(length)]
        self.check_ids(windows)
        return windows


def map_shard(path: Path, dtype: np.dtype | str) -> np.ndarray:
    """The ids in a shard, mapped and not read: the operating system fetches what is touched.

    Raises FolioError if the file's size is not what its header, or its kind of numbers, asks for.
    """
    size, dtype = path.stat().st_size, np.dtype(dtype)
    if size == 0:
        raise FolioError(f"{path}: empty; prepare the dataset again")
    if has_header(path):
        count = int(np.fromfile(path, dtype="<i4", count=3)[2])
        if size != HEADER_BYTES + 2 * count:
            raise FolioError(
                f"{path}: its header promises {count:,} tokens, and its size is that of "
                f"{(size - HEADER_BYTES) // 2:,}; remove the file and fetch it again"
            )
        return np.asarray(np.memmap(path, dtype="<u2", mode="r", offset=HEADER_BYTES))
    if size % dtype.itemsize:
        raise FolioError(
            f"{path}: {size:,} bytes are no whole number of {dtype.name}; prepare it again"
        )
    return np.asarray(np.memmap(path, dtype=dtype, mode="r"))


def has_header(path: Path) -> bool:
    """Whether a shard begins with 20240520, 1 and a count, as GPT-2-tokenised FineWeb's do."""
    beginning = np.fromfile(path, dtype="<i4", count=3)
    return len(beginning) == 3 and tuple(beginning[:2]) == (SHARD_MAGIC, SHARD_VERSION)


# --- Batches ---


def inputs_and_targets(windows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Every token is asked to name its successor: [[5, 9, 2]] -> [[5, 9]], [[9, 2]]."""
    return windows[:, :-1].contiguous(), windows[:, 1:].contiguous()


def training_batch(
    stream: TokenStream, batch_size: int, block_size: int, seed: int, step: int, micro_batch: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Random windows, a function of (seed, step, micro_batch): inputs and targets, each (B, T)."""
    dice = np.random.default_rng([seed, step, micro_batch])
    numbers = dice.integers(stream.window_count(block_size + 1), size=batch_size)
    return inputs_and_targets(torch.from_numpy(stream.windows(numbers, block_size + 1)))


def evaluation_batches(
    stream: TokenStream, batch_size: int, block_size: int, at_most: int = 0
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Fixed windows side by side, so that each token is predicted once; (B, T) pairs of tensors.

    A shard's last window reaches back to be whole, and what it repeats is not asked for again.
    Rows that fill the last batch ask for nothing. at_most: tokens to predict; 0 means all.
    """
    numbers, repeated, first_number = [], [], 0
    for length in stream.lengths:
        starts = np.arange(0, length - 1, block_size)
        last = max(length - 1 - block_size, 0)
        if length > block_size:
            numbers.append(first_number + np.minimum(starts, last))
            repeated.append(starts - np.minimum(starts, last))
            first_number += length - block_size
    numbers, repeated = np.concatenate(numbers), np.concatenate(repeated)
    if at_most:
        wanted = -(-at_most // block_size)  # rounded up to whole windows
        numbers, repeated = numbers[:wanted], repeated[:wanted]
    places = np.arange(block_size)
    for i in range(0, len(numbers), batch_size):
        rows, skip = numbers[i : i + batch_size], repeated[i : i + batch_size]
        filling = batch_size - len(rows)  # every batch has one shape, for the compiler's sake
        rows, skip = np.pad(rows, (0, filling), mode="edge"), np.pad(skip, (0, filling))
        skip[len(rows) - filling :] = block_size
        inputs, targets = inputs_and_targets(torch.from_numpy(stream.windows(rows, block_size + 1)))
        yield inputs, targets.masked_fill(torch.from_numpy(places < skip[:, None]), IGNORED)


def prefetch(fetch: Callable[[Any], Any], keys: Iterable[Any]) -> Iterator[Any]:
    """Yields fetch(key) for each key, the next one being fetched while this one is in use."""
    with ThreadPoolExecutor(max_workers=1) as worker:
        upcoming = None
        for key in keys:
            arrived, upcoming = upcoming, worker.submit(fetch, key)
            if arrived is not None:
                yield arrived.result()
        if upcoming is not None:
            yield upcoming.result()


def seed_for(*numbers: int) -> int:
    """One seed for torch from several numbers: (seed, step, micro_batch) -> 0 ... 2**63 - 1."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)
