"""How long training takes to reach a loss: whole runs of train.py, and of a peer's, in turns.

    python -m tests.benchmarks.time_to_loss --recipes=shakespeare_quick,shakespeare_char
    python -m tests.benchmarks.time_to_loss --peer=../nanoGPT --picture=loss.png --json=loss.json

Each recipe runs once for every seed, the peer's CPU recipe between them. Seconds are of training
alone, evaluations left out. The loss is over the whole validation text, in windows of the model's
own context, side by side; the peer's model is measured in the same way. It wants tiny Shakespeare
in data/shakespeare_char (python prepare_shakespeare.py), and hands its integers to the peer.

Three seeds of the long recipe take half an hour or an hour: what is done stands in the JSON file
after each run, and the same command goes on. (Remove that file once a recipe has changed.)
"""

import csv
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

import torch

from configurator import Count, FolioError, Whole, configure, run_main
from data.dataset import IGNORED, Dataset, evaluation_batches, open_dataset
from tests.benchmarks.measuring import load_peer, names_in, report, write_figures

ROOT = Path(__file__).resolve().parent.parent.parent
DATASET = "shakespeare_char"
TITLE = "Loss over all of the validation text, nats per character"
# nanoGPT's README: its recipe for a CPU. It prints the loss and the clock of every tenth step.
PEER_INTERVAL = 250  # steps from one evaluation to the next
PEER_FLAGS = [
    "config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20",
    "--log_interval=10", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4",
    "--n_embd=128", "--dropout=0.0", "--always_save_checkpoint=True",
    f"--eval_interval={PEER_INTERVAL}",
]  # fmt: skip


@dataclass
class TimeConfig:
    # --- Runs ---
    recipes: str = "shakespeare_quick,shakespeare_char"  # files under config/, parted by commas
    seeds: Count = 3  # runs of each
    max_iters: Whole = 0  # steps of each run, beside a peer in units of 250; 0 is the recipe's own
    peer: str = ""  # a checkout of nanoGPT, to run its CPU recipe of 2000 iterations between ours
    # --- Telling ---
    json: str = ""  # a file to write the figures to
    picture: str = ""  # a .png: loss against seconds


@dataclass
class Curve:
    """What became of one run."""

    seconds: float  # of training
    loss: float  # over the whole validation text, at the end
    points: list[tuple[float, float]]  # (seconds, validation loss), on the way


def main() -> None:
    config = configure(TimeConfig)
    dataset = open_dataset(DATASET, 256)
    recipes = names_in(config.recipes)
    for recipe in recipes:
        if not (ROOT / "config" / f"{recipe}.py").exists():
            raise FolioError(f"--recipes={recipe}: there is no config/{recipe}.py")
    if config.peer:
        load_peer(config.peer)  # complains here, if at all
        if config.max_iters % PEER_INTERVAL:
            raise FolioError(
                f"--max_iters={config.max_iters}: nanoGPT keeps its weights every {PEER_INTERVAL} "
                "steps only; give a multiple of that"
            )
    runs = {name: [] for name in (*(["nanoGPT"] if config.peer else []), *recipes)}
    done = read_runs(config.json)
    with tempfile.TemporaryDirectory() as folder:
        for seed in range(1337, 1337 + config.seeds):
            for name, curves in runs.items():
                key = f"{name}, seed {seed}, {config.max_iters or 'all'} steps"
                if key not in done:
                    if name == "nanoGPT":
                        done[key] = run_peer(Path(config.peer).expanduser(), seed, config, dataset)
                    else:
                        done[key] = run_folio(name, seed, config, Path(folder))
                    write_figures(config.json, TITLE, [], runs=as_plain(done))
                curves.append(done[key])
                print(f"{key}: {done[key].loss:.4f} after {done[key].seconds:.1f} s", flush=True)
    first = next(iter(runs))
    base = median(c.seconds for c in runs[first])
    rows = [
        {
            "recipe": name,
            "seconds of training": [c.seconds for c in curves],
            f"beside {first}": median(c.seconds for c in curves) / base,
            "loss": f"{median(c.loss for c in curves):.3f}",
            "of each seed": ", ".join(f"{c.loss:.3f}" for c in curves),
        }
        for name, curves in runs.items()
    ]
    report(TITLE, rows, config.json, runs=as_plain(done))
    if config.picture:
        draw(runs, Path(config.picture))


def as_plain(done: dict[str, Curve]) -> dict[str, dict]:
    return {key: dataclasses.asdict(curve) for key, curve in done.items()}


def read_runs(path: str) -> dict[str, Curve]:
    """What as_plain() wrote of the runs that are done; {} where there is no such file."""
    if not path or not Path(path).exists():
        return {}
    runs = json.loads(Path(path).read_text(encoding="utf-8"))["runs"]
    return {key: Curve(**curve) for key, curve in runs.items()}


def run_folio(recipe: str, seed: int, config: TimeConfig, folder: Path) -> Curve:
    out = folder / recipe
    flags = [f"--max_iters={config.max_iters}"] if config.max_iters else []
    command = [
        sys.executable, "train.py", f"config/{recipe}.py", f"--seed={seed}", f"--out_dir={out}",
        f"--dataset={DATASET}", "--sample_tokens=0", "--init_from=scratch", *flags,
    ]  # fmt: skip
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    with open(out / "log.csv", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file))
    points = [(float(row["seconds"]), float(row["val_loss"])) for row in rows if row["val_loss"]]
    shutil.rmtree(out)
    return Curve(points[-1][0], points[-1][1], points)


def run_peer(peer: Path, seed: int, config: TimeConfig, dataset: Dataset) -> Curve:
    """nanoGPT's CPU recipe, on our integers; its loss measured as ours is."""
    there = peer / "data" / DATASET
    there.mkdir(parents=True, exist_ok=True)
    for split in ("train", "val"):
        shutil.copy(dataset.folder / f"{split}.bin", there)
    letters = dataset.tokenizer.characters
    meta = {
        "vocab_size": len(letters),
        "itos": dict(enumerate(letters)),
        "stoi": {letter: i for i, letter in enumerate(letters)},
    }
    (there / "meta.pkl").write_bytes(pickle.dumps(meta))
    steps = config.max_iters or 2000
    theirs = (peer / "train.py").read_text(encoding="utf-8")
    script = peer / "train_with_seed.py"
    script.write_text(theirs.replace("manual_seed(1337", f"manual_seed({seed}"), encoding="utf-8")
    flags = [
        *PEER_FLAGS,
        f"--max_iters={steps}",
        f"--lr_decay_iters={steps}",
        "--out_dir=out-timed",
    ]
    command = [sys.executable, script.name, *flags]
    try:
        told = subprocess.run(
            command, cwd=peer, check=True, stdout=subprocess.PIPE, encoding="utf-8"
        ).stdout
    finally:
        script.unlink()
    # A tenth step's clock includes an evaluation where there was one: those are left out.
    clocks = {
        int(i): float(ms) / 1e3 for i, ms in re.findall(r"iter (\d+): .*time ([\d.]+)ms", told)
    }
    usual = [s for i, s in clocks.items() if i and i % PEER_INTERVAL and i < steps]
    per_step = sum(usual) / len(usual)
    points = [
        (int(step) * per_step, float(loss))
        for step, loss in re.findall(r"step (\d+): .*val loss ([\d.]+)", told)
    ]
    saved = torch.load(peer / "out-timed" / "ckpt.pt", weights_only=True)
    module = load_peer(str(peer))
    model = module.GPT(module.GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    shutil.rmtree(peer / "out-timed")
    return Curve(steps * per_step, loss_of(model.eval(), dataset), points)


@torch.no_grad()
def loss_of(model: torch.nn.Module, dataset: Dataset) -> float:
    total, tokens = 0.0, 0
    for inputs, targets in evaluation_batches(dataset.val, 32, model.config.block_size):
        _, loss = model(inputs, targets)  # both leave out a target of -1
        asked = int((targets != IGNORED).sum())
        total, tokens = total + loss.item() * asked, tokens + asked
    return total / tokens


def draw(runs: dict[str, list[Curve]], path: Path) -> None:
    """Loss against seconds: the median run of each, on a logarithmic clock."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
    axes = figure.subplots()
    colours = itertools.cycle(["#8c8c8c", "#d1822b", "#1f4e8c", "#2c7a4b"])
    for (name, curves), colour in zip(runs.items(), colours, strict=False):
        middle = sorted(curves, key=lambda curve: curve.loss)[len(curves) // 2]
        points = [(max(seconds, 0.5), loss) for seconds, loss in middle.points if seconds]
        axes.plot(*zip(*points, strict=True), "o-", ms=3, color=colour, label=name)
        end = (points[-1][0], middle.loss)  # a peer's points on the way are its own estimates
        axes.plot(*end, "D", ms=5, color=colour)
        axes.annotate(
            f"{middle.loss:.3f}", end, xytext=(0, -6), textcoords="offset points", color=colour,
            ha="center", va="top",
        )  # fmt: skip
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda seconds, _: f"{seconds:g}")
    axes.set(xlabel="seconds of training", ylabel="validation loss (nats per character)")
    axes.set_ylim(axes.get_ylim()[0] - 0.1, 3.0)  # room for the last figure
    axes.grid(alpha=0.3, which="both")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(path, format="png")


if __name__ == "__main__":
    run_main(main)
