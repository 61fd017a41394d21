"""How fast training and sampling are while other programs use the cores.

    python -m tests.benchmarks.busy_cores
    python -m tests.benchmarks.busy_cores --busy=0,1 --train= --sample=4/128/64

For each number of other programs (endless loops in Python) it measures each way to use the cores:

    auto       Folio's default: fewer threads while other programs use the cores
    all        a fixed number of threads, one for each core (--num_threads)
    one        one thread
    passive    all threads, and OMP_WAIT_POLICY=PASSIVE: a thread that waits for another one sleeps

Results are seconds, so less is better. The first second or two of a run go by before Folio uses
fewer threads, so short runs show the smallest gain. Needs tiny Shakespeare, prepared in
data/shakespeare_char (python prepare_shakespeare.py).
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from configurator import PositiveInt, configure, run_main
from data.dataset import open_dataset
from engine.cpu_threads import ThreadAdapter, use_one_thread
from engine.device import choose_device
from engine.inference import InferenceModel, is_small, read_ids
from engine.log_file import LOG_FILE, read_log
from model import GPT, GPTConfig
from tests.benchmarks.measuring import report_results, split_csv

ROOT = Path(__file__).resolve().parent.parent.parent


@dataclass
class BusyCoresConfig:
    busy: str = "0,1,2"  # numbers of other programs
    train: str = "shakespeare_quick:120,shakespeare_char:40,shakespeare_long:10"  # recipe:steps
    sample: str = "4/128/64:2000,6/384/256:400,12/768/1024:60"  # layers/channels/context:tokens
    ways: str = "auto,all,one,passive"  # ways to use the cores
    rounds: PositiveInt = 3  # measurements of each cell of the table
    json: str = ""  # a file for the results


def main() -> None:
    config = configure(BusyCoresConfig)
    if config.train:
        open_dataset("shakespeare_char", 256)  # raises its error before anything is measured
    ways = split_csv(config.ways)
    cells: dict[tuple[str, int], dict[str, list[float]]] = {}
    work = [(measure_training, name) for name in split_csv(config.train) if name]
    work += [(measure_sampling, name) for name in split_csv(config.sample) if name]
    for number in range(config.rounds):
        for measure, name in work:
            for n_busy in map(int, split_csv(config.busy)):
                cell = cells.setdefault((name, n_busy), {way: [] for way in ways})
                for way in ways:
                    with busy_loops(n_busy):
                        cell[way].append(measure(name, way))
                    print(number + 1, name, n_busy, way, cell[way][-1], file=sys.stderr)
    rows = []
    for (name, n_busy), cell in cells.items():
        row = {"work": name, "other programs": n_busy, **cell}
        if "auto" in ways and len(ways) > 1:
            best = min(median(cell[way]) for way in ways if way != "auto")
            row["auto / best fixed"] = median(cell["auto"]) / best
        rows.append(row)
    report_results("Seconds beside other programs", rows, config.json)


@contextlib.contextmanager
def busy_loops(count: int) -> Iterator[None]:
    """While this context is open, so many other programs each keep a core busy."""
    loop = [sys.executable, "-c", "while True: pass"]
    processes = [subprocess.Popen(loop) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def settings_of(way: str) -> tuple[int, dict[str, str]]:
    """The number of threads (0: automatic) and the environment variables of a way."""
    n_cores = len(os.sched_getaffinity(0))
    return {
        "auto": (0, {}),
        "all": (n_cores, {}),
        "one": (1, {}),
        "passive": (n_cores, {"OMP_WAIT_POLICY": "PASSIVE"}),
    }[way]


def measure_training(name: str, way: str) -> float:
    """Seconds of training steps of a run of train.py; name: "shakespeare_quick:120"."""
    recipe, steps = name.split(":")
    num_threads, variables = settings_of(way)
    with tempfile.TemporaryDirectory() as folder:
        command = [
            sys.executable, "train.py", f"config/{recipe}.py", f"--out_dir={folder}/run",
            f"--max_iters={steps}", f"--eval_interval={steps}", "--warmup_iters=2",
            "--eval_tokens=2000", "--sample_tokens=0", f"--num_threads={num_threads}",
        ]  # fmt: skip
        subprocess.run(
            command, cwd=ROOT, check=True, env=os.environ | variables, stdout=subprocess.DEVNULL
        )
        return read_log(Path(folder) / "run" / LOG_FILE)[-1]["seconds"]


def measure_sampling(name: str, way: str) -> float:
    """Seconds that generating takes in a new process; name: "4/128/64:2000"."""
    num_threads, variables = settings_of(way)
    code = f"from tests.benchmarks.busy_cores import sample; sample({name!r}, {num_threads})"
    output = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, env=os.environ | variables,
        stdout=subprocess.PIPE, encoding="utf-8",
    ).stdout  # fmt: skip
    return float(output)


def sample(name: str, num_threads: int) -> None:
    """Print the seconds in which a model with random weights generates so many tokens."""
    size, n_tokens = name.split(":")
    n_layer, n_embd, block_size = map(int, size.split("/"))
    device = choose_device("cpu", "float32", num_threads=num_threads)
    vocab_size = 50257 if n_embd >= 768 else 65
    model = GPT(
        GPTConfig(
            n_layer=n_layer, n_head=4, n_embd=n_embd, block_size=block_size, vocab_size=vocab_size
        )
    )
    if num_threads == 0 and is_small(model):
        use_one_thread()  # as sample.py does
    inference = InferenceModel(model, device.torch_device, "float32")
    threads = ThreadAdapter(device, num_threads)
    prompt = torch.zeros((1, 1), dtype=torch.long)
    start = time.perf_counter()
    for _ in read_ids(inference.generate(prompt, int(n_tokens), temperature=0.8)):
        threads.after_step()
    print(time.perf_counter() - start)


if __name__ == "__main__":
    run_main(main)
