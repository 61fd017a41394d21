"""Fetch OpenWebText, an open copy of the corpus GPT-2 was trained on, and turn it into its tokens.

    pip install -e ".[openwebtext]"            # pyarrow, which reads the files it comes in
    python -m data.prepare_openwebtext         # data/openwebtext: about 9 billion tokens, 17 GB
    python -m data.prepare_openwebtext --shards=4

It comes in some eighty files of a hundred thousand pages each. One after the other is fetched,
turned into a shard of tokens with an end-of-text token after each page, and removed; every 2000th
page is held out for validation. What is done is kept, so a preparation that was stopped goes on.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import requests

from configurator import FolioError, Whole, configure, run_main
from data.download import CONNECT_SECONDS, SILENCE_SECONDS, DownloadError
from data.files import write_json, write_text
from data.hub import fetch_large, hub_headers, hub_url
from data.prepare import shards_folder, write_tokens
from data.tokenizer import BPETokenizer, tokenizer_text

SOURCE = "api/datasets/Skylion007/openwebtext/parquet/plain_text/train"
HELD_OUT = 2000  # every n-th page is for validation
PAGES = 256  # read at a time


@dataclass
class OpenWebTextConfig:
    # --- Preparation ---
    shards: Whole = 0  # how many of the corpus's files, from the first on; 0 means all
    dataset: str = "openwebtext"  # the folder under data/ to write


def main() -> None:
    config = configure(OpenWebTextConfig)
    try:
        import pyarrow  # noqa: F401
    except ImportError:
        raise FolioError('its files are read by pyarrow: pip install -e ".[openwebtext]"') from None
    folder = shards_folder(config.dataset, SOURCE)
    tokenizer = BPETokenizer.gpt2()
    total = count_files()
    wanted = min(config.shards or total, total)
    for number in range(wanted):
        prepare_file(folder, number, tokenizer)
        print(f"{number + 1} of {wanted} files are ready")
    counts = {
        f"{split}_tokens": sum(path.stat().st_size // 2 for path in folder.glob(f"{split}_*.bin"))
        for split in ("train", "val")
    }
    meta = {"source": SOURCE, "vocab_size": tokenizer.vocab_size, "dtype": "uint16", **counts}
    write_json(folder / "meta.json", meta)
    # Last: a first fetch that broke off is no dataset yet.
    write_text(folder / "tokenizer.json", tokenizer_text(tokenizer))
    print(
        f"{folder}: {meta['train_tokens']:,} tokens to train on and {meta['val_tokens']:,} held "
        f"out\nnext: torchrun --standalone --nproc_per_node=8 train.py "
        f"config/train_gpt2.py --dataset={config.dataset}"
    )


def count_files() -> int:
    """Of how many files the hub says the corpus consists; DownloadError if it does not say."""
    url = hub_url(SOURCE)
    try:
        answer = requests.get(
            url, headers=hub_headers(), timeout=(CONNECT_SECONDS, SILENCE_SECONDS)
        )
        answer.raise_for_status()
        return len(answer.json())
    except (requests.RequestException, ValueError) as error:
        raise DownloadError(f"{url}: no list of files ({type(error).__name__})") from None


def prepare_file(folder: Path, number: int, tokenizer: BPETokenizer) -> None:
    """Make train_NNNN.bin and val_NNNN.bin of the corpus's file of that number, if need be."""
    splits = {split: folder / f"{split}_{number:04}.bin" for split in ("val", "train")}
    parquet = folder / f"{number}.parquet"
    if splits["train"].exists():  # written last
        parquet.unlink(missing_ok=True)
        return
    source = fetch_large(hub_url(f"{SOURCE}/{number}.parquet"), parquet)
    for split, path in splits.items():
        fresh = path.with_name(f".{path.name}.tmp")
        write_tokens(fresh, split, part(pages(source), split), tokenizer, np.dtype("<u2"))
        os.replace(fresh, path)
    source.unlink()


def part(pages: Iterator[str], split: str) -> Iterator[str | None]:
    """The pages of one split, "train" or "val", with None after each."""
    for number, page in enumerate(pages):
        if (number % HELD_OUT == 0) == (split == "val"):
            yield page
            yield None


def pages(path: Path) -> Iterator[str]:
    """The pages in a parquet file, read a few at a time; FolioError if it is damaged."""
    import pyarrow
    import pyarrow.parquet

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=PAGES, columns=["text"]):
                yield from batch.column("text").to_pylist()
    except (pyarrow.ArrowException, KeyError) as error:
        path.unlink()
        reason = str(error).partition("\n")[0]
        raise FolioError(f"{path}: damaged, and removed ({reason}); try again") from None


if __name__ == "__main__":
    run_main(main)
