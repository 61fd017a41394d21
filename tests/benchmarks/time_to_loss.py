"""How long training takes to reach a loss: complete runs of train.py, and of nanoGPT's.

    python -m tests.benchmarks.time_to_loss --recipes=shakespeare_quick,shakespeare_char
    python -m tests.benchmarks.time_to_loss --peer=../nanoGPT --picture=loss.png --json=loss.json

Each recipe runs once for every seed, interleaved with nanoGPT's recipe for a CPU. Seconds count
training only, not evaluation. The loss is over all validation text, in windows of the model's
context, side by side; nanoGPT's model is measured in the same way. Needs tiny Shakespeare in
data/shakespeare_char (python prepare_shakespeare.py), which nanoGPT is given, too.

Three seeds of the long recipe take half an hour to an hour. Each finished run is saved in the JSON
file; the same command makes the missing runs. (Delete the file after changing a recipe.)
"""

import dataclasses
import itertools
import json
import pickle
import re
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch

from configurator import FolioError, NonNegativeInt, PositiveInt, configure, run_main
from data.dataset import IGNORE_INDEX, Dataset, evaluation_batches, open_dataset
from engine.log_file import LOG_FILE, evaluations, read_log
from tests.benchmarks.measuring import load_peer, report_results, save_results, split_csv

ROOT = Path(__file__).resolve().parent.parent.parent
DATASET = "shakespeare_char"
TITLE = "Loss over all validation text, nats per character"
NANOGPT = "nanoGPT"
# The recipe for a CPU in nanoGPT's README. It prints the loss and the time of every tenth step.
PEER_INTERVAL = 250  # steps between evaluations
PEER_FLAGS = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=10", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
    "--n_embd=128", "--dropout=0.0", "--always_save_checkpoint=True", "--out_dir=out-timed",
    f"--eval_interval={PEER_INTERVAL}",
]  # fmt: skip


@dataclass
class TimeToLossConfig:
    # --- Runs ---
    recipes: str = "shakespeare_quick,shakespeare_char"  # files in config/, separated by commas
    seeds: PositiveInt = 3  # runs of each recipe
    max_iters: NonNegativeInt = 0  # steps of each run; with --peer a multiple of 250; 0: recipe's
    peer: str = ""  # a checkout of nanoGPT, to run its CPU recipe of 2000 steps, too
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
        }
        for name, runs in results.items()
    ]
    report_results(TITLE, rows, config.json, runs=read_saved_runs(config.json))
    if config.picture:
        plot(results, Path(config.picture))


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
    rows = evaluations(read_log(out_dir / LOG_FILE))
    shutil.rmtree(out_dir)
    points = [(row["seconds"], row["val_loss"]) for row in rows]
    return RunResult(*points[-1], points)


def run_peer(peer: Path, seed: int, config: TimeToLossConfig, dataset: Dataset) -> RunResult:
    """nanoGPT's CPU recipe on our dataset; the loss is measured as ours is."""
    write_peer_dataset(peer / "data" / DATASET, dataset)
    steps = config.max_iters or 2000
    source = (peer / "train.py").read_text(encoding="utf-8")
    script = peer / "train_with_seed.py"
    script.write_text(source.replace("manual_seed(1337", f"manual_seed({seed}"), encoding="utf-8")
    flags = [*PEER_FLAGS, f"--max_iters={steps}", f"--lr_decay_iters={steps}"]
    try:
        output = subprocess.run(
            [sys.executable, script.name, *flags], cwd=peer, check=True, stdout=subprocess.PIPE,
            encoding="utf-8",
        ).stdout  # fmt: skip
    finally:
        script.unlink()
    # Steps with an evaluation are left out: their time includes it.
    times = {
        int(step): float(ms) / 1e3
        for step, ms in re.findall(r"iter (\d+): .*time ([\d.]+)ms", output)
    }
    training = [s for step, s in times.items() if step and step % PEER_INTERVAL and step < steps]
    per_step = sum(training) / len(training)
    points = [
        (int(step) * per_step, float(loss))
        for step, loss in re.findall(r"step (\d+): .*val loss ([\d.]+)", output)
    ]
    checkpoint = torch.load(peer / "out-timed" / "ckpt.pt", weights_only=True)
    module = load_peer(peer)
    model = module.GPT(module.GPTConfig(**checkpoint["model_args"]))
    model.load_state_dict(checkpoint["model"])
    shutil.rmtree(peer / "out-timed")
    return RunResult(steps * per_step, peer_loss(model.eval(), dataset), points)


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
        _, loss = model(inputs, targets)  # nanoGPT ignores targets of -1, too
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
