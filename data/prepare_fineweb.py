"""Download FineWeb in GPT-2's tokens, the web text of config/train_gpt2.py.

    python -m data.prepare_fineweb               # data/fineweb: 10 shards, a billion tokens, 2 GB
    python -m data.prepare_fineweb --shards=100  # ten billion tokens, 20 GB: for train_gpt2.py

The shards are already tokenized, 100 million tokens each: the dataset kjj0/fineweb10B-gpt2 on the
Hugging Face hub. Finished shards are kept, so after a failure, give the command again.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: python data/prepare_fineweb.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

import os
import shutil
from dataclasses import dataclass
from typing import Annotated

from configurator import Range, configure, run_main
from data.files import explain_os_error
from data.hub import hub_file, hub_files
from data.prepare import (
    EIGHT_GPUS,
    complete_shards,
    dataset_folder,
    dataset_lock,
    shards_folder,
    summary,
    train_command,
)

REPO_ID = "kjj0/fineweb10B-gpt2"
SOURCE = f"datasets/{REPO_ID}"


@dataclass
class FineWebConfig:
    # --- Preparation ---
    shards: Annotated[int, Range(1, 103)] = 10  # training shards, 100 million tokens (200 MB) each
    dataset: str = "fineweb"  # folder under data/


def main() -> None:
    config = configure(FineWebConfig)
    with dataset_lock(dataset_folder(config.dataset)):
        folder = shards_folder(config.dataset, SOURCE)
        names = ["val_000000.bin"]
        names += [f"train_{number:06}.bin" for number in range(1, config.shards + 1)]
        missing = [name for name in names if not (folder / name).exists()]
        commit = hub_files(REPO_ID)[0] if missing else ""
        for i, name in enumerate(missing, start=1):
            print(f"downloading shard {i} of {len(missing)}: {name}", flush=True)
            path = hub_file(REPO_ID, f"fineweb_{name}", commit, folder / "downloads")
            with explain_os_error(folder / name, "cannot write this shard"):
                os.replace(path, folder / name)
        shutil.rmtree(folder / "downloads", ignore_errors=True)
        meta = complete_shards(folder, SOURCE)
    print(summary(folder, meta))
    flags = [] if config.dataset == FineWebConfig.dataset else [f"--dataset={config.dataset}"]
    command = train_command("train_gpt2", meta, flags, launcher=EIGHT_GPUS)
    print(f"    (config/train_gpt2.py reads 10,000,000,000 tokens)\nnext:\n    {command}")


if __name__ == "__main__":
    run_main(main)
