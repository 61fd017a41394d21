"""Fetch FineWeb, a sample of the web in GPT-2's tokens: what GPT-2 is trained on from scratch.

    python -m data.prepare_fineweb               # data/fineweb: 10 shards, a billion tokens, 2 GB
    python -m data.prepare_fineweb --shards=100  # ten billion, 20 GB: all that train_gpt2 reads

Nothing is tokenised here: the shards are published ready for use, 100 million tokens in each, as
the dataset kjj0/fineweb10B-gpt2. What is there already is kept, so a fetch that broke off, or one
for more shards, goes on where the last one ended.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from configurator import FolioError, Range, configure, run_main
from data.dataset import has_header, map_shard
from data.files import write_json, write_text
from data.hub import fetch_large, hub_url
from data.prepare import shards_folder
from data.tokenizer import BPETokenizer, tokenizer_text

SOURCE = "datasets/kjj0/fineweb10B-gpt2"


@dataclass
class FineWebConfig:
    # --- Preparation ---
    shards: Annotated[int, Range(1, 103)] = 10  # to train on, 100 million tokens (200 MB) each
    dataset: str = "fineweb"  # the folder under data/ to write


def main() -> None:
    config = configure(FineWebConfig)
    folder = shards_folder(config.dataset, SOURCE)
    tokenizer = BPETokenizer.gpt2()
    fetch_shard("fineweb_val_000000.bin", folder / "val_000000.bin")
    for number in range(1, config.shards + 1):
        name = f"train_{number:06}.bin"
        fetch_shard(f"fineweb_{name}", folder / name)
    meta = {
        "source": SOURCE, "vocab_size": tokenizer.vocab_size, "dtype": "uint16",
        "val_tokens": count_tokens(folder, "val"), "train_tokens": count_tokens(folder, "train"),
    }  # fmt: skip
    write_json(folder / "meta.json", meta)
    # Last: a first fetch that broke off is no dataset yet.
    write_text(folder / "tokenizer.json", tokenizer_text(tokenizer))
    print(
        f"{folder}: {meta['train_tokens']:,} tokens to train on and {meta['val_tokens']:,} held "
        "out\nnext: torchrun --standalone --nproc_per_node=8 train.py "
        "config/train_gpt2.py (reads 10,000,000,000)"
    )


def fetch_shard(name: str, path: Path) -> None:
    """Fetch the shard to `path` if it is not there.

    Raises FolioError if it cannot be had, does not begin with the header of such a shard, or is not
    of the size that its header asks for.
    """
    if not path.exists():
        fetch_large(hub_url(f"{SOURCE}/resolve/main/{name}"), path)
        if not has_header(path):
            path.unlink()
            raise FolioError(f"{name}: what was sent is no shard of tokens; try again later")
    map_shard(path, "<u2")


def count_tokens(folder: Path, split: str) -> int:
    """In all shards of a split, those of earlier fetches among them."""
    return sum(len(map_shard(path, "<u2")) for path in folder.glob(f"{split}_*.bin"))


if __name__ == "__main__":
    run_main(main)
