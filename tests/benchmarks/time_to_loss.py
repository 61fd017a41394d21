"""How long training takes to reach a loss: complete runs of train.py, and of nanoGPT's.

    python -m tests.benchmarks.time_to_loss --recipes=shakespeare_quick,shakespeare_char
    python -m tests.benchmarks.time_to_loss --peer=../nanoGPT --picture=loss.png --json=loss.json

    python -m tests.benchmarks.time_to_loss --recipes=shakespeare_gpu --target=1.5    # on a GPU

Each recipe runs once for every seed, interleaved with nanoGPT's recipe for this machine, CPU or
GPU. Seconds count training only: neither evaluation nor torch.compile. The loss is over all
validation text, in windows of the model's context, side by side; nanoGPT's model is measured in the
same way at the end. Needs tiny Shakespeare in data/shakespeare_char (python
prepare_shakespeare.py), which nanoGPT is given, too.

Three seeds of the long recipe take half an hour to an hour. Each finished run is saved in the JSON
file; the same command makes the missing runs. (Delete the file after changing a recipe.)
"""

import dataclasses
import itertools
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from configurator import (
    FolioError, NonNegativeFloat, NonNegativeInt, PositiveInt, configure, run_main,
)  # fmt: skip
from data.dataset import IGNORE_INDEX, Dataset, evaluation_batches, open_dataset
from data.shakespeare import replacement_warning
from engine.log_file import LOG_FILE, evaluations, read_log
from tests.benchmarks.measuring import load_peer, report_results, save_results, split_csv

ROOT = Path(__file__).resolve().parent.parent.parent
DATASET = "shakespeare_char"
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TITLE = "Loss over all validation text, nats per character"
NANOGPT = "nanoGPT"
PEER_INTERVAL = 250  # steps between evaluations
PEER_FLAGS = [
    "config/train_shakespeare_char.py", "--log_interval=10", "--always_save_checkpoint=True",
    f"--eval_interval={PEER_INTERVAL}", "--out_dir=out-timed",
]  # fmt: skip
PEER_STEPS = 2000 if DEVICE == "cpu" else 5000
# The recipe for a CPU in nanoGPT's README. On a GPU its config file is the recipe.
PEER_CPU_FLAGS = [
    "--device=cpu", "--compile=False", "--eval_iters=20", "--block_size=64", "--batch_size=12",
    "--n_layer=4", "--n_head=4", "--n_embd=128", "--dropout=0.0",
]  # fmt: skip


@dataclass
class TimeToLossConfig:
    # --- Runs ---
    recipes: str = "shakespeare_quick,shakespeare_char"  # files in config/, separated by commas
    seeds: PositiveInt = 3  # runs of each recipe
    max_iters: NonNegativeInt = 0  # steps of each run; with --peer a multiple of 250; 0: recipe's
    peer: str = ""  # a checkout of nanoGPT, to run its recipe, too
    target: NonNegativeFloat = 0.0  # also show the seconds to this validation loss; 0: do not
    # --- Results ---
    json: str = ""  # a file for the results
    picture: str = ""  # a .png for the loss against seconds


@dataclass
class RunResult:
    seconds: float  # of training
    loss: float  # over all validation text, at the end
    points: list[tuple[float, float]]  # (seconds, validation loss) during the run


Results = dict[str, list[RunResult]]  # name of a recipe, or "nanoGPT" -> a result for each seed


def main() -> None:
    config = configure(TimeToLossConfig)
    dataset = open_dataset(DATASET, 256)
    if warning := replacement_warning(dataset.meta):
        print(warning)
    check(config)
    names = ([NANOGPT] if config.peer else []) + split_csv(config.recipes)
    results = run_all(names, config, dataset)
    first = names[0]
    base = median(result.seconds for result in results[first])
    rows = [
        {
            "recipe": name,
            "seconds of training": [result.seconds for result in runs],
            f"relative to {first}": median(result.seconds for result in runs) / base,
            "loss": f"{median(result.loss for result in runs):.3f}",
            "per seed": ", ".join(f"{result.loss:.3f}" for result in runs),
            "lowest": f"{median(min(loss for _, loss in run.points) for run in runs):.3f}",
        }
        for name, runs in results.items()
    ]
    if config.target:
        for row, runs in zip(rows, results.values(), strict=True):
            row[f"seconds to {config.target:g}"] = seconds_to(config.target, runs)
    report_results(TITLE, rows, config.json, runs=read_saved_runs(config.json))
    if config.picture:
        plot(results, Path(config.picture))


def seconds_to(target: float, runs: list[RunResult]) -> str:
    """Median seconds of training until an evaluation gives at most this loss; "never" if none."""
    reached = [next((s for s, loss in run.points if loss <= target), math.inf) for run in runs]
    seconds = median(reached)
    return "never" if seconds == math.inf else f"{seconds:.1f}"


def check(config: TimeToLossConfig) -> None:
    """Raise FolioError for settings with which a run would fail, before the first run."""
    for recipe in split_csv(config.recipes):
        if not (ROOT / "config" / f"{recipe}.py").exists():
            raise FolioError(f"--recipes={recipe}: config/{recipe}.py not found")
    if config.peer:
        load_peer(config.peer)
        if config.max_iters % PEER_INTERVAL:
            raise FolioError(
                f"--max_iters={config.max_iters}: must be a multiple of {PEER_INTERVAL}, because "
                f"nanoGPT saves its weights every {PEER_INTERVAL} steps"
            )


def run_all(names: list[str], config: TimeToLossConfig, dataset: Dataset) -> Results:
    """Make the runs that are not in the JSON file yet; save the results after each run."""
    saved = read_saved_runs(config.json)
    results = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1337, 1337 + config.seeds):
            for name in names:
                key = f"{name}, seed {seed}, {config.max_iters or 'all'} steps"
                if key not in saved:
                    if name == NANOGPT:
                        result = run_peer(Path(config.peer).expanduser(), seed, config, dataset)
                    else:
                        result = run_folio(name, seed, config, Path(folder))
                    saved[key] = dataclasses.asdict(result)
                    save_results(config.json, TITLE, [], runs=saved)
                result = RunResult(**saved[key])
                results[name].append(result)
                print(f"{key}: {result.loss:.4f} after {result.seconds:.1f} s", flush=True)
    return results


def read_saved_runs(path: str) -> dict[str, dict[str, Any]]:
    """The finished runs in the JSON file: key -> fields of a RunResult."""
    if not path or not Path(path).exists():
        return {}
    return json.loads(Path(path).read_text(encoding="utf-8"))["runs"]


def run_folio(recipe: str, seed: int, config: TimeToLossConfig, folder: Path) -> RunResult:
    out_dir = folder / recipe
    flags = [f"--max_iters={config.max_iters}"] if config.max_iters else []
    command = [
        sys.executable, "train.py", f"config/{recipe}.py", f"--seed={seed}", f"--out_dir={out_dir}",
        f"--dataset={DATASET}", "--sample_tokens=0", "--init_from=scratch", *flags,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    log = read_log(out_dir / LOG_FILE)
    rows = evaluations(log)
    shutil.rmtree(out_dir)
    # The first steps include torch.compile: the speed is that between the rows after step 0.
    first, last = log[min(1, len(log) - 2)], log[-1]
    per_step = (last["seconds"] - first["seconds"]) / (last["step"] - first["step"])
    points = [(row["step"] * per_step, row["val_loss"]) for row in rows]
    return RunResult(*points[-1], points)


def run_peer(peer: Path, seed: int, config: TimeToLossConfig, dataset: Dataset) -> RunResult:
    """nanoGPT's recipe on our dataset; the loss is measured as ours is."""
    write_peer_dataset(peer / "data" / DATASET, dataset)
    steps = config.max_iters or PEER_STEPS
    source = (peer / "train.py").read_text(encoding="utf-8")
    script = peer / "train_with_seed.py"
    script.write_text(source.replace("manual_seed(1337", f"manual_seed({seed}"), encoding="utf-8")
    flags = [*PEER_FLAGS, f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
    flags += PEER_CPU_FLAGS if DEVICE == "cpu" else []
    try:
        lines = timed_lines([sys.executable, "-u", script.name, *flags], peer)
    finally:
        script.unlink()
    # Every tenth step prints a line when it is done. There is no evaluation, and no torch.compile,
    # between steps 10 and 240, 260 and 490, and so on.
    printed = {
        int(match[1]): seconds
        for seconds, line in lines
        if (match := re.match(r"iter (\d+):", line))
    }
    spans = [(step, step + PEER_INTERVAL - 20) for step in range(10, steps, PEER_INTERVAL)]
    seconds = sum(printed[end] - printed[start] for start, end in spans)
    per_step = seconds / sum(end - start for start, end in spans)
    points = [
        (int(match[1]) * per_step, float(match[2]))
        for _, line in lines
        if (match := re.match(r"step (\d+): .*val loss ([\d.]+)", line))
    ]
    checkpoint = torch.load(peer / "out-timed" / "ckpt.pt", DEVICE, weights_only=True)
    module = load_peer(peer)
    model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
    prefix = "_orig_mod."  # of names in a compiled model
    model.load_state_dict({k.removeprefix(prefix): v for k, v in checkpoint["model"].items()})
    shutil.rmtree(peer / "out-timed")
    return RunResult(steps * per_step, peer_loss(model.eval().to(DEVICE), dataset), points)


def timed_lines(command: list[str], folder: Path) -> list[tuple[float, str]]:
    """Run a command; return each line that it prints, with the second at which it came."""
    start = time.perf_counter()
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, encoding="utf-8") as process:
        lines = [(time.perf_counter() - start, line) for line in process.stdout]
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return lines


def write_peer_dataset(folder: Path, dataset: Dataset) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        shutil.copy(dataset.folder / f"{split}.bin", folder)
    characters = dataset.tokenizer.characters
    meta = {
        "vocab_size": len(characters),
        "itos": dict(enumerate(characters)),
        "stoi": {character: i for i, character in enumerate(characters)},
    }
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


@torch.no_grad()
def peer_loss(model: torch.nn.Module, dataset: Dataset) -> float:
    """Mean loss over all validation tokens, in nats."""
    total, tokens = 0.0, 0
    for inputs, targets in evaluation_batches(dataset.val, 32, model.config.block_size):
        _, loss = model(inputs.to(DEVICE), targets.to(DEVICE))  # nanoGPT ignores targets of -1, too
        valid = int((targets != IGNORE_INDEX).sum())
        total, tokens = total + loss.item() * valid, tokens + valid
    return total / tokens


def plot(results: Results, path: Path) -> None:
    """Loss against seconds, on a logarithmic axis: the run with the median loss of each recipe."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    colors = itertools.cycle(["#8c8c8c", "#d1822b", "#1f4e8c", "#2c7a4b"])
    for (name, runs), color in zip(results.items(), colors, strict=False):
        run = sorted(runs, key=lambda result: result.loss)[len(runs) // 2]
        points = [(max(seconds, 0.5), loss) for seconds, loss in run.points if seconds]
        axes.plot(*zip(*points, strict=True), "o-", ms=3, color=color, label=name)
        end = (points[-1][0], run.loss)  # nanoGPT's other points are its own estimates
        axes.plot(*end, "D", ms=5, color=color)
        axes.annotate(
            f"{run.loss:.3f}", end, xytext=(0, -6), textcoords="offset points", color=color,
            ha="center", va="top",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats per character)")
    axes.set_ylim(axes.get_ylim()[0] - 0.1, 3.0)  # room for the last number
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    run_main(main)
