"""What the user sees of a run, and what stays of it: progress, log.csv, the curve, speed.

log.csv has a row for every `log_interval` steps and for every evaluation:

    step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm,tokens_per_second,bits_per_byte

A row says how things stand after `step` updates. Losses are in nats per token, and bits_per_byte is
what val_loss comes to, whatever the vocabulary. train_loss is the last update's mean over all its
micro-batches; learning_rate is AdamW's; seconds are of training, evaluations left out.
"""

import csv
import errno
import math
import os
import shlex
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from data.files import replacing
from data.shakespeare import understudy_notice
from training.checkpoint import HERE, WEIGHTS, newest_run
from training.machine import note_on_company
from training.run import Run

try:
    from tqdm import tqdm
except ImportError:  # the bar is for the eyes only
    tqdm = None
try:
    import matplotlib
    from matplotlib.figure import Figure
except ImportError:  # so is the curve
    matplotlib = None

COLUMNS = (
    "step", "tokens", "seconds", "train_loss", "val_loss",
    "learning_rate", "grad_norm", "tokens_per_second", "bits_per_byte",
)  # fmt: skip


QUIET_SECONDS = 5  # between two drawings, or two plain lines of progress where there is no bar
NOTE_SECONDS = 20  # of training, before its share of the cores is looked at


@dataclass
class Update:
    """What one update of the weights was like."""

    loss: float  # nats per token, before the update
    grad_norm: float  # of the whole gradient, before clipping
    learning_rate: float


class Report:
    """Tells of a run while it goes on. Use as a context manager, so that the bar is put away.

    In a process that is not the main one it says and writes nothing.
    """

    def __init__(self, run: Run):
        self.run, self.silent = run, not run.world.is_main
        self.limit = tokens_per_second_at_peak(run)
        self.rows = [] if self.silent else read_log(run.folder / "log.csv", run.step)
        self.latest: Update | None = None
        self.measured_from: tuple[int, float] | None = None  # (tokens, seconds) of the last row
        self.began: tuple[float, float] | None = None  # by the clock, and by the processors'
        self.said_at = self.drawn_at = time.monotonic()
        self.bar = None

    def __enter__(self) -> "Report":
        if not self.silent:
            write_log(self.run.folder / "log.csv", self.rows)
        return self

    def __exit__(self, *_) -> None:
        if self.bar is not None:
            self.bar.close()

    def say(self, text: str) -> None:
        """Print, above the bar if there is one."""
        if self.silent:
            return
        if self.bar is not None:
            self.bar.clear()
        try:
            print(text, flush=True)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            # The terminal is gone, and what there is to save is not.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self.bar is not None:
            self.bar.refresh()

    def updated(self, latest: Update) -> None:
        """An update has been made, and the run counts it."""
        run, self.latest = self.run, latest
        if self.measured_from is None:
            # The first update also warms things up (and compiles): speed is measured after it.
            self.measured_from = (run.tokens, run.seconds)
            self.began = time.monotonic(), time.process_time()
            if tqdm and sys.stderr.isatty() and not self.silent:
                self.bar = tqdm(
                    total=run.config.max_iters, initial=run.step - 1, dynamic_ncols=True,
                    leave=False, bar_format="{percentage:3.0f}% |{bar}| {n_fmt}/{total_fmt} steps, "
                    "{remaining} left{postfix}",
                )  # fmt: skip
        if self.bar is not None:
            self.bar.update()

    def log(self, val_loss: float | None = None, bits_per_byte: float | None = None) -> None:
        """Write a row of log.csv, and show the progress."""
        if self.silent:
            return
        run, latest = self.run, self.latest
        tokens_before, seconds_before = self.measured_from or (run.tokens, run.seconds)
        elapsed = run.seconds - seconds_before
        speed = (run.tokens - tokens_before) / elapsed if elapsed > 0 else None
        row = {
            "step": run.step,
            "tokens": run.tokens,
            "seconds": round(run.seconds, 3),
            "train_loss": latest and latest.loss,
            "val_loss": val_loss,
            "learning_rate": latest and latest.learning_rate,
            "grad_norm": latest and latest.grad_norm,
            "tokens_per_second": speed and round(speed),
            "bits_per_byte": bits_per_byte,
        }
        if self.rows and self.rows[-1]["step"] == run.step:
            # Evaluated after a restart, at a step that was logged before: one row tells both.
            told = {column: figure for column, figure in row.items() if figure is not None}
            self.rows[-1] |= told
            write_log(run.folder / "log.csv", self.rows)
        else:
            append_row(run.folder / "log.csv", row)
            self.rows.append(row)
        if latest is None:
            return
        self.measured_from = (run.tokens, run.seconds)
        pace = f"loss {latest.loss:.3f}" + (f", {speed:,.0f} tokens/s" if speed else "")
        pace += f", {speed / self.limit:.0%} MFU" if speed and self.limit else ""
        if self.bar is not None:
            self.bar.set_postfix_str(pace)
        elif val_loss is None and time.monotonic() - self.said_at >= QUIET_SECONDS:
            self.said_at = time.monotonic()
            left = (run.config.max_iters - run.step) * run.seconds / run.step
            self.say(f"step {run.step:,} of {run.config.max_iters:,}: {pace}, {clock(left)} left")
        self.note()

    def note(self) -> None:
        """Say so, once, if other programs slow this one down."""
        if self.began is None or self.run.world.device.type != "cpu":
            return
        passed, used = time.monotonic() - self.began[0], time.process_time() - self.began[1]
        if passed > NOTE_SECONDS and (text := note_on_company(passed, used)):
            self.say(text)
            self.began = None

    def refresh_curve(self) -> None:
        """draw_curve(), unless that was done a moment ago: it takes as long as many small steps."""
        if time.monotonic() - self.drawn_at >= QUIET_SECONDS:
            self.draw_curve()

    def draw_curve(self) -> None:
        """Draw loss.png: both losses against steps."""
        if self.silent or matplotlib is None:
            return
        self.drawn_at = time.monotonic()
        figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
        axes = figure.subplots()
        train, val = self.points("train_loss"), self.points("val_loss")
        if train:
            axes.plot(*zip(*train, strict=True), color="#9db4cf", lw=1.2, label="training batch")
        if val:
            axes.plot(*zip(*val, strict=True), "o-", color="#1f4e8c", ms=4, label="validation")
            best = min(val, key=lambda point: point[1])
            axes.annotate(
                f"{best[1]:.3f}", best, xytext=(0, 8), textcoords="offset points", ha="center"
            )
        axes.set(xlabel="step", ylabel="loss (nats per token)")
        axes.set_title(self.run.folder.name, parse_math=False)
        axes.set_xlim(0, 1.03 * max(self.run.config.max_iters, 1))
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
        with replacing(self.run.folder / "loss.png") as temporary:
            figure.savefig(temporary, format="png")

    def points(self, column: str) -> list[tuple[int, float]]:
        """(step, figure) of each row that has one in this column."""
        return [(row["step"], row[column]) for row in self.rows if row[column] is not None]


# --- log.csv ---


def read_log(path: Path, last_step: int) -> list[dict]:
    """The rows up to last_step; later ones belong to work that was lost. [] without a file."""
    if not path.exists():
        return []
    text = path.read_bytes().decode("utf-8", errors="replace")
    lines = text[: text.rfind("\n") + 1].splitlines()  # the last row may have been cut short
    rows = [{k: to_number(v) for k, v in row.items()} for row in csv.DictReader(lines)]
    whole = [row for row in rows if set(row) == set(COLUMNS) and row["step"] is not None]
    return [row for row in whole if row["step"] <= last_step]


def to_number(text: str | None) -> float | int | None:
    try:
        return int(text)
    except (TypeError, ValueError):
        pass
    try:
        return float(text)
    except (TypeError, ValueError):
        return None


def write_log(path: Path, rows: list[dict]) -> None:
    with replacing(path) as temporary, open(temporary, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_row(path: Path, row: dict) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


# --- How fast it could be ---

# Dense bfloat16 products, in units of 1e12 operations a second, from NVIDIA's data sheets (without
# sparsity; the T4, which has no bfloat16: float16). A name that holds another stands before it.
PEAK_TFLOPS = {
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200": 989, "A100": 312,
    "L40S": 362, "RTX 4090 Laptop": None, "RTX 4090": 165, "L4": 121, "T4": 65,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """'NVIDIA H100 80GB HBM3' -> 989e12; None for a device that is not in the table."""
    words = f"{device_name} ".replace("-", " ")
    known = (tflops for name, tflops in PEAK_TFLOPS.items() if f"{name} " in words)
    tflops = next(known, None)
    return tflops and tflops * 1e12


def flops_per_token(model) -> int:
    """What training a GPT costs per token: 6 N + 12 L C T floating point operations.

    Each of the N weights that multiply takes part in a multiplication and an addition, forward once
    and backward twice. A node's query meets T keys and its weights T values, in each of L layers,
    as wide as C. That half of these pairs lie in the future is not deducted, as is the custom.
    Source: PaLM (Chowdhery et al. 2022), appendix B.
    """
    config = model.config
    weights = sum(p.numel() for p in model.parameters() if p.dim() == 2)
    weights -= model.transformer.wpe.weight.numel()  # looked up, not multiplied
    return 6 * weights + 12 * config.n_layer * config.n_embd * config.block_size


def tokens_per_second_at_peak(run: Run) -> float | None:
    """Of all processes' devices together; None where a device's peak is not known.

    Speed divided by this is the model FLOPs utilisation, MFU.
    """
    peak = peak_flops(run.world.device_name)
    return peak and run.world.size * peak / flops_per_token(run.model)


# --- Before the first step and after the last ---


def banner(run: Run) -> str:
    """What train.py is about to do with `run`: data, model, steps, machine, folder."""
    config, data = run.config, run.dataset
    per_step = config.tokens_per_step
    left = max(config.max_iters - run.step, 0)
    passes = left * per_step / len(data.train)
    parameters = sum(parameter.numel() for parameter in run.model.parameters())
    origin = {"resume": f", from step {run.step:,}", "scratch": ""}.get(
        config.init_from, f", from the weights in {config.init_from}"
    )
    lines = [
        f"data     {config.dataset}: {len(data.train):,} tokens, and {len(data.val):,} held out; "
        f"a vocabulary of {data.tokenizer.vocab_size:,}",
        f"model    {parameters:,} parameters: {config.n_layer} layers, {config.n_head} heads, "
        f"{config.n_embd} channels, context {config.block_size}{origin}",
        f"steps    {left:,} of {per_step:,} tokens: {passes:.1f} times through the data",
        f"machine  {run.world.why}",
        f"folder   {shown_path(run.folder)}",
    ]
    return "\n".join(lines + list(filter(None, [understudy_notice(data.meta)])))


def summary(run: Run) -> str:
    """What it did, and what to type next."""
    config = run.config
    total = max(config.max_iters, run.step)
    how_far = "done" if run.step == total else "stopped, and saved"
    best = f"{run.best_val_loss:.4f}" if run.best_val_loss < math.inf else "not measured"
    lines = [
        f"\n{how_far}: {run.step:,} of {total:,} steps, {clock(run.seconds)} of "
        f"training; best validation loss {best}"
    ]
    if (run.folder / "loss.png").exists():
        lines.append(f"curve    {shown_path(run.folder / 'loss.png')}")
    where = run.folder.relative_to(HERE) if run.folder.is_relative_to(HERE) else run.folder
    # sample.py by itself takes the newest weights under out/.
    newest = (run.folder / WEIGHTS).exists() and where.parent == Path("out")
    newest = newest and newest_run() == run.folder
    out_dir = "" if newest else f" --out_dir={shlex.quote(where.as_posix())}"
    lines.append(f"next     python sample.py{out_dir}")
    if run.step < config.max_iters:
        lines.append("or       the same command with --init_from=resume, to go on")
    return "\n".join(lines + list(filter(None, [understudy_notice(run.dataset.meta)])))


def shown_path(path: Path) -> Path:
    """A path as short as it can be typed from here."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


# --- Numbers for people ---


def clock(seconds: float) -> str:
    """75.2 -> '1:15'; 3675 -> '1:01:15'."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
