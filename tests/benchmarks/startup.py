"""How long a job of several processes takes to start and to restart, and how much data it reads.

    python -m tests.benchmarks.startup
    python -m tests.benchmarks.startup --processes=8 --shards=20 --tokens_per_shard=5_000_000

torchrun trains a tiny model on shards of random tokens. After the first step it gets SIGTERM, which
saves a checkpoint, and the run is resumed. Only Linux says how much of a file a process has read.

    seconds   from the command to the end of the first step ("imports alone": of --help)
    MiB read  how much of the shards one process has read (Rss of the mapped files: pages of 4 KiB
              that were needed, and up to 15 pages around each); the main process reads most
"""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from configurator import FolioError, PositiveInt, configure, run_main
from data.files import write_json
from data.tokenizer import CharTokenizer, save_tokenizer
from engine.log_file import LOG_FILE, read_log
from tests.benchmarks.measuring import report_results

ROOT = Path(__file__).resolve().parent.parent.parent
VOCABULARY = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class StartupConfig:
    processes: PositiveInt = 8  # of one job
    shards: PositiveInt = 20  # files of training tokens
    tokens_per_shard: PositiveInt = 5_000_000  # two bytes each
    json: str = ""  # a file for the results


def main() -> None:
    config = configure(StartupConfig)
    if sys.platform != "linux":
        raise FolioError("this benchmark needs Linux: it reads /proc/PID/smaps")
    with tempfile.TemporaryDirectory() as folder:
        dataset = Path(folder) / "dataset"
        size = write_random_shards(dataset, config.shards, config.tokens_per_shard)
        run_folder = Path(folder) / "run"
        rows = [
            {"start": "from scratch", **measure_start(config, dataset, run_folder, "scratch")},
            {"start": "resumed", **measure_start(config, dataset, run_folder, "resume")},
            {"start": "imports alone", "seconds": measure_imports(config.processes)},
        ]
    title = (
        f"Start of {config.processes} processes, {config.shards} shards, together "
        f"{size / 2**20:,.0f} MiB"
    )
    report_results(title, rows, config.json)


def write_random_shards(folder: Path, n_shards: int, n_tokens: int) -> int:
    """Write a dataset of random characters; returns the bytes of all its shards."""
    folder.mkdir()
    tokenizer, rng = CharTokenizer.from_text(VOCABULARY), np.random.default_rng(0)
    save_tokenizer(tokenizer, folder)
    write_json(folder / "meta.json", {"train_tokens": n_shards * n_tokens, "val_tokens": n_tokens})
    for name in ("val", *(f"train_{number:06}" for number in range(n_shards))):
        ids = rng.integers(tokenizer.vocab_size, size=n_tokens, dtype=np.uint16)
        ids.tofile(folder / f"{name}.bin")
    return sum(path.stat().st_size for path in folder.glob("*.bin"))


def start_torchrun(n_processes: int, *flags: str) -> subprocess.Popen:
    """`torchrun --standalone --nproc_per_node=N train.py FLAGS`, with one thread per process."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += [f"--nproc_per_node={n_processes}", "train.py", *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def measure_imports(n_processes: int) -> float:
    start_time = time.perf_counter()
    start_torchrun(n_processes, "--help").communicate()
    return time.perf_counter() - start_time


def measure_start(
    config: StartupConfig, dataset: Path, run_folder: Path, init_from: str
) -> dict[str, Any]:
    """A row of the table: a run that is stopped after its first step."""
    previous_step = last_step(run_folder)
    drop_from_cache(dataset)
    start_time = time.perf_counter()
    job = start_torchrun(
        config.processes, f"--dataset={dataset}", f"--out_dir={run_folder}",
        f"--init_from={init_from}", f"--gradient_accumulation_steps={config.processes}",
        "--device=cpu", "--n_layer=1", "--n_head=1", "--n_embd=8", "--block_size=64",
        "--batch_size=1", "--max_iters=1000000", "--eval_interval=1000000", "--eval_tokens=64",
        "--log_interval=1", "--sample_tokens=0",
    )  # fmt: skip
    while last_step(run_folder) <= previous_step and job.poll() is None:
        time.sleep(0.01)
    seconds = time.perf_counter() - start_time
    sizes = [size / 2**20 for size in resident_sizes(dataset)]
    job.terminate()
    _, errors = job.communicate()
    if not sizes:
        raise FolioError(f"train.py ended before its first step: {errors}")
    return {"seconds": seconds, "MiB read": median(sizes), "MiB read, main process": max(sizes)}


def drop_from_cache(folder: Path) -> None:
    """Let Linux forget what it has in memory of the shards, as after a start of the machine."""
    for path in folder.glob("*.bin"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def last_step(run_folder: Path) -> int:
    """The step of the last row of the log; 0 without a log."""
    return max((row["step"] for row in read_log(run_folder / LOG_FILE)), default=0)


def resident_sizes(folder: Path) -> list[int]:
    """Bytes that are in memory of the memory-mapped files of a folder, for each process."""
    sizes = []
    for maps in Path("/proc").glob("[0-9]*/maps"):
        with contextlib.suppress(OSError):  # the process has ended, or belongs to another user
            if f"{folder}/" in maps.read_text():
                # "... PATH", and a few lines further down: "Rss:   28 kB"
                pattern = rf"{re.escape(str(folder))}/.*\n(?:\w+: .*\n)*?Rss: +(\d+) kB"
                kib = re.findall(pattern, maps.with_name("smaps").read_text())
                sizes.append(1024 * sum(map(int, kib)))
    return sizes


if __name__ == "__main__":
    run_main(main)
