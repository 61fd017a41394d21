"""What the user sees of a training run: progress, log.csv, loss.png, the banner and the summary."""

import contextlib
import dataclasses
import functools
import importlib.util
import itertools
import math
import shutil
import sys
import textwrap
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from tqdm import tqdm

from configurator import ROOT, FolioError, first_line, for_terminal, print_or_discard, wrap
from data.dataset import Dataset
from data.files import rename_to_backup, shell_command, write_text
from data.prepare import plural
from data.shakespeare import replacement_warning
from engine.checkpoint import CHECKPOINT_FILE, WEIGHTS_FILE, measured_on
from engine.device import ComputeDevice
from engine.distributed import Distributed
from engine.log_file import (
    COLUMNS, LOG_FILE, LogRow, append_row, evaluations, parse_log, read_log, write_log,
)  # fmt: skip
from engine.plot import plot_losses
from engine.run import TrainState, is_patience_exhausted
from engine.run_folder import newest_run, shown_path
from engine.train_config import TrainConfig
from model import GPT, GPTConfig

PLOT_FILE = "loss.png"
WANDB_ID_FILE = "wandb_id.txt"
START_ID_FILE = "start_id.txt"
MIN_SECONDS = 5  # between two lines of progress where there is no bar
PLOT_SECONDS = 30  # between two plots: the first takes about a second (it imports matplotlib)


@dataclass
class StepMetrics:
    """Metrics of one optimizer step."""

    loss: float  # training loss before the step, in nats per token
    grad_norm: float  # norm of the whole gradient before clipping
    learning_rate: float  # AdamW's


class MetricsLogger:
    """Prints the progress of a run and writes log.csv and loss.png.

    A context manager, so that the progress bar is removed at the end. With enabled=False (all
    processes except the main one) it prints and writes nothing.

    peak_tokens_per_second: the speed at 100% MFU, if known.
    """

    def __init__(
        self,
        folder: str | Path,
        config: TrainConfig,
        state: TrainState,
        enabled: bool = True,
        peak_tokens_per_second: float | None = None,
    ):
        self.folder, self.config, self.state, self.enabled = Path(folder), config, state, enabled
        self.peak_tokens_per_second = peak_tokens_per_second
        self.rows: list[LogRow] = []
        self.has_new_rows = False
        self.log_is_complete = False  # whether log.csv has exactly these rows
        self.metrics: StepMetrics | None = None  # of the latest step
        self.start_step, self.start_tokens = state.step, state.tokens  # when this process started
        self.first_step: tuple[int, float] | None = None  # (step, seconds) after its first step
        self.last_logged: tuple[int, float] | None = None  # (tokens, seconds) of the last row
        self.last_print = self.last_plot = time.monotonic()
        self.bar: tqdm | None = None
        self.warnings: set[str] = set()
        self.trackers: list[Tracker] = []
        self.exit_stack = contextlib.ExitStack()

    def __enter__(self) -> "MetricsLogger":
        if self.enabled:
            self.start_id = uuid.uuid4().hex
            write_text(self.folder / START_ID_FILE, self.start_id)
            path = self.folder / LOG_FILE
            rows, all_valid = parse_log(path)
            if not all_valid:
                backup = rename_to_backup(path)
                self.warn_once(f"{LOG_FILE} could not be read completely; kept as {backup.name}")
                write_log(path, rows)
            # Later rows stay in log.csv until this process logs its first row: if it fails before,
            # nothing has changed.
            self.rows = [row for row in rows if row["step"] <= self.state.step]
            trackers = open_trackers(self.folder, self.config, self.state.step)
            self.trackers = self.exit_stack.enter_context(trackers)
        if self.enabled and is_terminal():
            self.bar = tqdm(
                total=self.config.max_iters, initial=self.state.step, dynamic_ncols=True,
                leave=False,
                # A short bar: the "^C" of a terminal does not begin a new line after it.
                bar_format="{percentage:3.0f}% |{bar:12}| {n_fmt}/{total_fmt} steps{postfix}",
            )  # fmt: skip
        return self

    def __exit__(self, *exception_info: Any) -> None:
        if self.bar is not None:
            self.bar.close()
        must_save = self.enabled and not self.log_is_complete
        if must_save and (self.has_new_rows or exception_info[0] is None):
            with contextlib.suppress(FolioError):  # log.csv of another process stays as it is
                self.check_folder()
                self._save_rows()
        self.exit_stack.__exit__(*exception_info)

    def check_folder(self) -> None:
        """Raise FolioError if another process has started a run in this folder.

        The lock prevents this, unless the lock file, or the folder around it, was deleted, moved or
        replaced, for example by a program that synchronizes folders; or unless the other process
        is on another node, and each node has its own locks (as some network file systems do). The
        process that has started last goes on.
        """
        if not self.enabled:
            return
        with contextlib.suppress(OSError):  # the folder was deleted or moved, and is made again
            start_id = (self.folder / START_ID_FILE).read_text(encoding="utf-8", errors="replace")
            if start_id != self.start_id:
                raise FolioError(
                    f"{self.folder}: was deleted or moved during this run, and another process has "
                    "started a run here; this run ends without saving"
                )

    def print(self, text: str) -> None:
        """Print above the progress bars. Output to a closed stream is discarded."""
        if not self.enabled:
            return
        with tqdm.external_write_mode():  # removes the bars, and draws them again
            print_or_discard(text)  # go on without a terminal: the run must be saved

    def warn_once(self, text: str) -> None:
        if text not in self.warnings:
            self.warnings.add(text)
            self.print(labeled("WARNING", text))

    def log_steps(self, metrics: list[StepMetrics]) -> None:
        """Record training steps; the state has been updated already."""
        if not metrics:
            return
        self.metrics = metrics[-1]
        for step in metrics:
            self.state.unlogged_losses += step.loss
            self.state.unlogged_steps += 1
        if self.last_logged is None:
            # The first step includes warming up (and compiling), so speed is measured after it.
            # Not state.tokens: on a GPU they include a step that is started but not read yet.
            tokens = self.start_tokens + len(metrics) * self.config.tokens_per_step
            self.last_logged = (tokens, self.state.seconds)
            self.first_step = (self.start_step + len(metrics), self.state.seconds)
            if self.enabled:
                self._rename_later_snapshots()
        if self.bar is not None:
            self.bar.update(self.state.step - self.bar.n)

    def log_checkpoint(self, seconds: float) -> None:
        """Print the size of resume.pt and the seconds it took, if more than one."""
        if seconds > 1:
            size = (self.folder / CHECKPOINT_FILE).stat().st_size
            self.print(f"    checkpoint of {size / 1e9:.1f} GB written in {seconds:.1f} s")

    # --- log.csv ---

    def log_row(self, val_loss: float | None = None, bits_per_byte: float | None = None) -> None:
        """Write a row of log.csv and show the progress."""
        if not self.enabled:
            return
        self.check_folder()
        self.has_new_rows = True
        row = self._new_row(val_loss, bits_per_byte)
        self.state.unlogged_losses, self.state.unlogged_steps = 0.0, 0
        if self.rows and self.rows[-1]["step"] == row["step"]:
            # After a restart a step may be evaluated that was logged before: keep one row.
            self.rows[-1] |= {name: value for name, value in row.items() if value is not None}
            self.log_is_complete = False
        else:
            self.rows.append(row)
        self._save_rows()
        self._track(row)
        if self.metrics is not None:
            self.last_logged = (self.state.tokens, self.state.seconds)
            self._show_progress(row["tokens_per_second"], is_evaluation=val_loss is not None)

    def _new_row(self, val_loss: float | None, bits_per_byte: float | None) -> LogRow:
        state, metrics = self.state, self.metrics
        tokens_before, seconds_before = self.last_logged or (state.tokens, state.seconds)
        elapsed = state.seconds - seconds_before
        return {
            "step": state.step,
            "tokens": state.tokens,
            "seconds": round(state.seconds, 3),
            "train_loss": (
                state.unlogged_losses / state.unlogged_steps if state.unlogged_steps else None
            ),
            "val_loss": val_loss,
            "learning_rate": metrics.learning_rate if metrics else None,
            "grad_norm": metrics.grad_norm if metrics else None,
            "tokens_per_second": (
                round((state.tokens - tokens_before) / elapsed) if elapsed > 0 else None
            ),
            "bits_per_byte": bits_per_byte,
        }

    def _save_rows(self) -> None:
        """Append the last row to log.csv. If that fails, the next call writes all rows."""
        path = self.folder / LOG_FILE
        try:
            if self.log_is_complete and path.exists():
                append_row(path, self.rows[-1])
            else:
                write_log(path, self.rows)
            self.log_is_complete = True
        except (OSError, FolioError) as error:  # for example a spreadsheet that locks the file
            self.log_is_complete = False
            self.warn_once(f"{first_line(error)}; training continues")

    def _rename_later_snapshots(self) -> None:
        """Rename the snapshots that are newer than the checkpoint from which this run goes on.

        A killed process has saved them. Training now repeats their steps, perhaps with other
        settings.
        """
        for path in sorted(self.folder.glob("step_*")):
            step = path.name.removeprefix("step_")
            if path.is_dir() and step.isdecimal() and int(step) > self.start_step:
                try:
                    backup = rename_to_backup(path)
                    self.print(f"{path.name} is newer than the checkpoint: now {backup.name}")
                except FolioError as error:
                    self.warn_once(str(error))

    def _track(self, row: LogRow) -> None:
        values = {name: row[name] for name in COLUMNS[1:] if row[name] is not None}
        for tracker in self.trackers:
            try:
                tracker(values, self.state.step)
            except Exception as error:  # such as a full disk: log.csv is enough to continue
                self.warn_once(first_line(error))

    # --- Progress ---

    def _show_progress(self, speed: float | None, is_evaluation: bool) -> None:
        state, max_iters = self.state, self.config.max_iters
        status = f"loss {self.metrics.loss:.3f}"
        if speed:
            status += f", {speed:,.0f} tokens/s"
            if self.peak_tokens_per_second:
                status += f", {speed / self.peak_tokens_per_second:.0%} MFU"
        # At the speed of this process: earlier ones may have had other hardware or batch sizes.
        steps, seconds = state.step - self.first_step[0], state.seconds - self.first_step[1]
        if steps > 0:
            status += f", {format_duration((max_iters - state.step) * seconds / steps)} left"
        if self.bar is not None:
            self.bar.set_postfix_str(status)
        elif not is_evaluation and time.monotonic() - self.last_print >= MIN_SECONDS:
            self.last_print = time.monotonic()
            self.print(f"step {state.step:,} of {max_iters:,}: {status}")

    def evaluation_line(self) -> str:
        """Describe the evaluation that was logged last.

        'step 1,000: training loss 0.931, validation loss 1.7712 (best 1.6321, step 750)'
        """
        row, state = self.rows[-1], self.state
        first = self.rows[0]["val_loss"] if self.rows[0]["step"] == 0 else None
        is_worse = first is not None and row["val_loss"] > first  # finetuning may do this
        text = f"step {row['step']:,}: "
        if row["train_loss"] is not None:
            text += f"training loss {row['train_loss']:.3f}, "
        text += f"validation loss {row['val_loss']:.4f}"
        if row["step"] == 0:
            text += " (before training)"
        elif (row["step"], row["val_loss"]) == (state.best_step, state.best_val_loss):
            text += " (best, but above step 0)" if is_worse else " (best so far)"
        elif state.best_step >= 0:  # else no loss has been a number
            text += f" (best {state.best_val_loss:.4f}, step {state.best_step:,})"
        return wrap(text, indent=4)

    # --- loss.png ---

    def maybe_plot(self) -> None:
        """plot(), unless the last plot is recent: plotting takes as long as many small steps."""
        if time.monotonic() - self.last_plot >= PLOT_SECONDS:
            self.plot()

    def plot(self) -> None:
        """Write loss.png. If that fails, a warning is printed once and training continues."""
        losses = [row[name] for row in self.rows for name in ("train_loss", "val_loss")]
        if not self.enabled or not any(losses):
            return
        self.last_plot = time.monotonic()
        if self.bar is not None:
            self.bar.set_postfix_str(f"drawing {PLOT_FILE}")
        config, name, path = self.config, self.folder.name, self.folder / PLOT_FILE
        title = (
            f"{name}: dataset {config.dataset}, {plural(config.n_layer, 'layer')}, "
            f"{config.n_embd} channels, context of {config.block_size}, {config.optimizer}"
        )
        try:
            plot_losses({name: self.rows}, path, title, x_max=config.max_iters)
        except Exception as error:  # matplotlib fails in many ways, and the picture is optional
            self.warn_once(f"no {PLOT_FILE}: {type(error).__name__}: {first_line(error)}")


Item = TypeVar("Item")


def show_evaluation(
    batches: Iterator[Item], dataset: Dataset, config: TrainConfig, dist: Distributed
) -> Iterator[Item]:
    """Yield the batches of an evaluation. On a terminal, a bar shows how many have been used."""
    n_tokens = min(len(dataset.val), config.eval_tokens or math.inf)
    n_batches = math.ceil(n_tokens / (config.batch_size * config.block_size * dist.world_size))
    yield from show_progress(batches, n_batches, "evaluating", "batches", dist.is_main)


def show_progress(
    items: Iterable[Item], total: int, activity: str, unit: str, enabled: bool = True
) -> Iterator[Item]:
    """Yield the items. On a terminal, a bar shows how many have been used."""
    yield from tqdm(
        items, total=total, disable=not (enabled and is_terminal()), leave=False,
        dynamic_ncols=True,
        bar_format=f"{activity} |{{bar:12}}| {{n_fmt}}/{{total_fmt}} {unit}, {{remaining}} left",
    )  # fmt: skip


def is_terminal() -> bool:
    """Whether progress bars can be shown: stdout and stderr must be terminals.

    With `| tee log.txt`, a line of stdout would reach the terminal late, in the middle of a bar.
    """
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))


# --- Weights & Biases and TensorBoard ---


Tracker = Callable[[LogRow, int], None]  # takes the values of a row of log.csv, and its step


@contextlib.contextmanager
def open_trackers(folder: Path, config: TrainConfig, first_step: int) -> Iterator[list[Tracker]]:
    """Start the trackers that the settings name. Raises FolioError if wandb refuses."""
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if config.wandb_log:
            import wandb

            id_file = folder / WANDB_ID_FILE  # so that a resumed run continues its run on wandb
            if not id_file.exists():
                write_text(id_file, uuid.uuid4().hex)
            with explain_wandb_error():
                run = wandb.init(
                    project=config.wandb_project, name=config.wandb_run_name or folder.name,
                    id=id_file.read_text(encoding="utf-8").strip(), resume="allow",
                    config=dataclasses.asdict(config), dir=folder,
                    settings=wandb.Settings(console="off"),  # leave stdout alone
                )  # fmt: skip
            stack.enter_context(run)
            # The step as a value like all others: a resumed run may repeat steps, and with the
            # argument `step` of log(), wandb would ignore what is logged for them.
            run.define_metric("*", step_metric="step")
            trackers.append(lambda values, step: run.log({"step": step, **values}))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides rows of a previous process that are repeated after resuming. The
            # writer is made with the first row: a process that fails before it hides nothing.
            @functools.cache
            def open_writer() -> SummaryWriter:
                writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
                return stack.enter_context(writer)

            def write_scalars(values: LogRow, step: int) -> None:
                writer = open_writer()
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            trackers.append(write_scalars)
        yield trackers


@contextlib.contextmanager
def explain_wandb_error() -> Iterator[None]:
    """Turn wandb's errors inside the block (no account, no network) into a FolioError."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        reason = first_line(error).rstrip(".")
        raise FolioError(f"--wandb_log: {reason}; or set WANDB_MODE=offline") from None


def check_trackers(config: TrainConfig) -> None:
    """Raise FolioError if the settings need a package that is not installed, or a wandb account."""
    for setting, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(config, setting) and importlib.util.find_spec(package) is None:
            raise FolioError(f"--{setting}: {package} is not installed; run: pip install {package}")
    if config.wandb_log and not config.eval_only:
        import wandb

        with explain_wandb_error():
            wandb.login()


# --- FLOPs and MFU ---

# TFLOPS in bfloat16, without sparsity, from NVIDIA's data sheets (T4: float16, it has no bfloat16).
# The first name found in the device's name counts, so longer names stand first. None: unknown.
PEAK_TFLOPS = {
    "MIG": None,  # a part of a GPU
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
    "L40S": 362, "RTX 4090 Laptop": None, "RTX 4090 D": None, "RTX 4090": 165, "L4": 121, "T4": 65,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Peak FLOPS of a GPU: 'NVIDIA H100 80GB HBM3' -> 989e12; None if it is not in the table."""
    words = f"{device_name} ".replace("-", " ")
    matches = (tflops for name, tflops in PEAK_TFLOPS.items() if f"{name} " in words)
    tflops = next(matches, None)
    return None if tflops is None else tflops * 1e12


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token: 6 N + 12 L C T.

    Each of the N weights of matrix products costs a multiplication and an addition, once in the
    forward pass and twice in the backward pass. In each of L layers, a query is multiplied with T
    keys and the attention weights with T values, each of C numbers: 2 products x 2 FLOPs x 3 passes
    = 12 C T. By convention, the half of these products that the causal mask hides is counted, too.
    Source: PaLM (Chowdhery et al. 2022), appendix B.
    """
    L, C, T = config.n_layer, config.n_embd, config.block_size
    weights = L * 12 * C**2  # attention 4 C², MLP 8 C²
    weights += config.padded_vocab_size * C  # the output layer
    return 6 * weights + 12 * L * C * T


def peak_tokens_per_second(
    model_config: GPTConfig, device: ComputeDevice, world_size: int
) -> float | None:
    """Training speed at the peak FLOPS of all GPUs together, or None if the peak is unknown.

    The actual speed divided by it is the model FLOPs utilization, MFU.
    """
    peak = peak_flops(device.name)
    return None if peak is None else world_size * peak / flops_per_token(model_config)


# --- Banner and summary ---


def banner(
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    device: ComputeDevice,
    folder: str | Path,
) -> str:
    """What train.py is going to do: data, model, weights, steps, device, folder."""
    train_tokens, vocab_size = len(dataset.train), dataset.tokenizer.vocab_size
    lines = [
        labeled(
            "data",
            f"{config.dataset}: {plural(train_tokens, 'training token')}, "
            f"{plural(len(dataset.val), 'validation token')}, vocabulary of {vocab_size:,}",
        ),
        labeled(
            "model",
            f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters: "
            f"{plural(config.n_layer, 'layer')}, {plural(config.n_head, 'head')}, "
            f"{plural(config.n_embd, 'channel')}, context of {config.block_size}",
        ),
    ]
    if config.init_from not in ("scratch", "resume"):
        lines.append(f"weights  {config.init_from}")
    elif config.eval_only:
        resumed = config.init_from == "resume"
        where = f"step {state.step:,} of {relative_path(folder)}" if resumed else "untrained"
        lines.append(f"weights  {where}")
    if not config.eval_only:
        lines.append(labeled("steps", describe_steps(config, state, train_tokens)))
    lines.append(labeled("device", device.description))
    if not config.eval_only and (note := long_run_note(config, state, model.config, device)):
        lines.append(labeled("note", note))
    if not config.eval_only:
        lines.append(f"folder   {relative_path(folder)}")
    if config.init_from != "resume":  # once for each run
        lines += filter(None, [replacement_warning(dataset.meta)])
    return "\n".join(lines)


# In training, for a rough estimate. Measured: 2e10 for shakespeare_char on an AMD EPYC; larger
# matrices are multiplied faster.
FLOPS_OF_A_CPU_THREAD = 3e10


def long_run_note(
    config: TrainConfig, state: TrainState, model_config: GPTConfig, device: ComputeDevice
) -> str:
    """How long a recipe that was made for GPUs will take on this CPU; "" if less than an hour."""
    if device.torch_device.type != "cpu":
        return ""
    tokens = (config.max_iters - state.step) * config.tokens_per_step
    flops = FLOPS_OF_A_CPU_THREAD * torch.get_num_threads()
    hours = tokens * flops_per_token(model_config) / flops / 3600
    if hours < 1:
        return ""
    duration = plural(round(hours), "hour") if hours < 48 else f"{hours / 24:,.0f} days"
    return f"this is work for a GPU: on this CPU it takes roughly {duration}"


def describe_steps(config: TrainConfig, state: TrainState, train_tokens: int) -> str:
    """'2,000, each of 8 x 128 = 1,024 tokens: 2.0 epochs'"""
    steps = max(config.max_iters - state.step, 0)
    if steps == 0 and state.step > 0:
        return f"none left after step {state.step:,}; to train longer, raise --max_iters"
    sizes = [config.batch_size, config.block_size]
    if config.gradient_accumulation_steps > 1:
        sizes.insert(0, config.gradient_accumulation_steps)
    product = " x ".join(f"{size:,}" for size in sizes)
    resumed = f" left after step {state.step:,} of {config.max_iters:,}" if state.step else ""
    epochs = steps * config.tokens_per_step / train_tokens
    decimals = 1 if epochs >= 0.1 else 3
    return (
        f"{steps:,}{resumed}, each of {product} = {plural(config.tokens_per_step, 'token')}: "
        f"{epochs:,.{decimals}f} epochs"
    )


def summary(
    config: TrainConfig, state: TrainState, folder: str | Path, n_val_tokens: int = 0
) -> str:
    """What train.py did, and the command to continue with.

    n_val_tokens: of the dataset; 0 if unknown.
    """
    folder, measured = Path(folder), measured_on(config.eval_tokens, n_val_tokens)
    total = max(config.max_iters, state.step)
    status = "done" if state.step == total else "stopped"
    saved = "" if status == "done" else "; saved"
    if state.last_checkpoint_step != state.step:  # save_state() has refused
        saved = f"; not saved: {CHECKPOINT_FILE} is of step {state.last_checkpoint_step:,}"
    if is_patience_exhausted(state, config):
        count = plural(state.evaluations_since_best, "evaluation")
        saved += f"; {count} without improvement (patience)"
    reached = f"{state.step:,} of {plural(total, 'step')}, {format_duration(state.seconds)}"
    lines = [
        "\n" + labeled(status, f"{reached} of training{saved}"),
        labeled("best", describe_best(read_log(folder / LOG_FILE), state, measured)),
    ]
    if (folder / PLOT_FILE).exists():
        lines.append(f"curve    {relative_path(folder / PLOT_FILE)}")
    if (folder / WEIGHTS_FILE).exists() and state.step > 0:  # not random weights
        lines.append(f"next     {sample_command(folder)}")
    if state.step < config.max_iters:
        more_patience = " --patience=0" if is_patience_exhausted(state, config) else ""
        flags = f"--init_from=resume{more_patience}"
        label = "or" if lines[-1].startswith("next") else "next"
        lines.append(labeled(label, f"the same command with {flags}, to continue"))
    return "\n".join(lines)


def describe_best(rows: list[LogRow], state: TrainState, measured: str = "") -> str:
    """The best evaluation, and whether the model overfitted after it.

    measured: ' on the first 2,000 validation tokens', for example.
    """
    if state.best_step < 0:
        return "no evaluation of trained weights yet"
    text = f"validation loss {state.best_val_loss:.4f}"
    val_losses = {row["step"]: row for row in evaluations(rows)}
    best = val_losses.get(state.best_step)
    if best and best["val_loss"] != state.best_val_loss:
        best = None  # log.csv was replaced, or this step was repeated with other settings
    if best and best["bits_per_byte"]:
        text += f" ({best['bits_per_byte']:.3f} bits per byte)"
    text += f"{measured} at step {state.best_step:,}"
    if 0 in val_losses and val_losses[0]["val_loss"] < state.best_val_loss:
        text += f", worse than before training ({val_losses[0]['val_loss']:.4f})"
    last = val_losses[max(val_losses)] if val_losses else None
    # A difference below 1% may be chance.
    if best and last["val_loss"] > 1.01 * state.best_val_loss:
        text += f"; it rose to {last['val_loss']:.4f} at step {last['step']:,}"
        train_losses = (best["train_loss"], last["train_loss"])
        if None not in train_losses and train_losses[1] < train_losses[0]:
            text += " while the training loss fell: overfitting"
    return text


def sample_command(folder: Path) -> str:
    """The command that samples from this run, as it can be typed in the working directory."""
    command = ["python", str(relative_path(ROOT / "sample.py"))]
    out_dir = shown_path(folder)
    is_default = out_dir == f"out/{folder.name}" and newest_run().resolve() == folder.resolve()
    if not is_default:  # sample.py uses the newest run by default
        command.append(f"--out_dir={out_dir}")
    return shell_command(*command)


# --- Formatting ---


def labeled(label: str, text: str) -> str:
    """'data     text', wrapped at the width of the terminal."""
    return wrap(f"{label:<9}{text}", indent=9)


def indented(text: str) -> str:
    """The lines of a text, indented by 4 columns and wrapped at the width of the terminal."""
    width = max(shutil.get_terminal_size().columns - 4, 10)  # 0 or less would be an error
    lines = [textwrap.wrap(line, width) or [""] for line in for_terminal(text).splitlines()]
    return textwrap.indent("\n".join(itertools.chain(*lines)), "    ")


def relative_path(path: str | Path) -> Path:
    """The path relative to the working directory if it is inside it."""
    path = Path(path)
    # OSError: the working directory was deleted. ValueError: the path is outside it.
    with contextlib.suppress(OSError, ValueError):
        return path.relative_to(Path.cwd())
    return path


def format_duration(seconds: float) -> str:
    """75.2 -> '1:15'; 3675 -> '1:01:15'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
