"""Download and tokenize OpenWebText, an open copy of the text that GPT-2 was trained on.

    pip install -e ".[openwebtext]"            # pyarrow, which reads parquet files
    python -m data.prepare_openwebtext         # data/openwebtext: about 9 billion tokens, 18 GB
    python -m data.prepare_openwebtext --shards=4

The dataset Skylion007/openwebtext on the Hugging Face hub has about 80 parquet files of 100,000
documents. Each becomes one shard of GPT-2's tokens, with end-of-text after each document. Every
2000th document is for validation. Finished shards are kept, so after a failure, give the command
again.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: python data/prepare_openwebtext.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass

from configurator import FolioError, NonNegativeInt, configure, run_main
from data.dataset import read_meta
from data.download import DownloadError
from data.files import explain_os_error, write_json
from data.hub import hub_file, hub_files
from data.prepare import (
    EIGHT_GPUS,
    complete_shards,
    dataset_folder,
    dataset_lock,
    plural,
    shards_folder,
    summary,
    train_command,
    write_tokens,
)
from data.tokenizer import BPETokenizer

REPO_ID = "Skylion007/openwebtext"
SOURCE = f"datasets/{REPO_ID}"
VAL_EVERY = 2000  # documents
ROWS_PER_BATCH = 256  # documents read at a time


@dataclass
class OpenWebTextConfig:
    # --- Preparation ---
    shards: NonNegativeInt = 0  # number of the dataset's files, from the first; 0: all
    dataset: str = "openwebtext"  # folder under data/


def main() -> None:
    config = configure(OpenWebTextConfig)
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise FolioError('pyarrow is required: pip install -e ".[openwebtext]"') from None
    with dataset_lock(dataset_folder(config.dataset)):
        folder = shards_folder(config.dataset, SOURCE)
        tokenizer = BPETokenizer.gpt2()
        meta = read_meta(folder)
        commit, filenames = list_parquet_files(meta.get("commit"))
        write_json(folder / "meta.json", {**meta, "commit": commit})
        filenames = filenames[: config.shards or None]
        for number, filename in enumerate(filenames):
            if not shard_path(folder, "train", number).exists():  # written after "val"
                print(f"downloading file {number + 1} of {len(filenames)}: {filename}", flush=True)
                prepare_file(folder, number, filename, commit, tokenizer)
        shutil.rmtree(folder / "downloads", ignore_errors=True)
        meta = complete_shards(folder, SOURCE)
    print(summary(folder, meta, plural(len(filenames), "file")))
    flags = [f"--dataset={config.dataset}"]
    print(f"next:\n    {train_command('train_gpt2', meta, flags, launcher=EIGHT_GPUS)}")


def list_parquet_files(first_commit: str | None) -> tuple[str, list[str]]:
    """The commit of the dataset, and its parquet files in order.

    The hub keeps parquet copies of datasets of other formats in the revision refs/convert/parquet.
    first_commit: with which this preparation began. Another commit may have other files, so that
        file number 7 would not follow file number 6.
    """
    for revision in (first_commit,) if first_commit else ("main", "refs/convert/parquet"):
        commit, names = hub_files(REPO_ID, revision)
        if files := [name for name in names if name.endswith(".parquet")]:
            return commit, files
    raise DownloadError(f"{REPO_ID}: the repository has no parquet files")


def shard_path(folder: Path, split: str, number: int) -> Path:
    return folder / f"{split}_{number:04}.bin"


def prepare_file(
    folder: Path, number: int, filename: str, commit: str, tokenizer: BPETokenizer
) -> None:
    """Write val_NNNN.bin and train_NNNN.bin from one parquet file, and delete that file."""
    parquet = hub_file(REPO_ID, filename, commit, folder / "downloads")
    for split in ("val", "train"):
        path = shard_path(folder, split, number)
        temporary = path.with_name(f".{path.name}.tmp")
        with explain_os_error(path, "cannot write this shard"):
            texts = iter_split(read_documents(parquet), split)
            write_tokens(temporary, split, texts, tokenizer)
            os.replace(temporary, path)
    parquet.unlink()


def iter_split(documents: Iterator[str], split: str) -> Iterator[str | None]:
    """The documents of one split, "train" or "val", with None after each."""
    for number, document in enumerate(documents):
        if (number % VAL_EVERY == 0) == (split == "val"):
            yield document
            yield None


def read_documents(path: Path) -> Iterator[str]:
    """The documents of a parquet file."""
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size=ROWS_PER_BATCH, columns=["text"]):
            yield from batch.column("text").to_pylist()


if __name__ == "__main__":
    run_main(main)
