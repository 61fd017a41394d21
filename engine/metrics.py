"""The progress of a training run: on the terminal, in log.csv and in loss.png."""

import contextlib
import math
import os
import sys
import time
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from tqdm import tqdm

from configurator import FolioError, first_line, print_or_discard, wrap
from data.dataset import Dataset
from data.files import backup_path, rename_to_backup, write_text
from data.prepare import plural
from engine.checkpoint import CHECKPOINT_FILE
from engine.distributed import Distributed
from engine.log_file import COLUMNS, LOG_FILE, LogRow, append_row, parse_log, write_log
from engine.plot import PLOT_FILE, plot_losses
from engine.report import format_duration, labeled
from engine.run import TrainState
from engine.trackers import Tracker, open_trackers
from engine.train_config import TrainConfig

START_ID_FILE = "start_id.txt"
MIN_SECONDS = 5  # between two lines of progress where there is no bar
STATUS_SECONDS = 2  # if a step takes longer, the bar shows loss and time left after each step
# The line of a terminal may hold the end of a longer bar. (Older terminals of Windows do not know
# this code.)
CLEAR_REST_OF_LINE = "" if os.name == "nt" else "\x1b[K"
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
        self.start_step = state.step  # when this process started
        self.first_step: tuple[int, float] | None = None  # (step, seconds) after its first step
        self.last_logged: tuple[int, float] | None = None  # (tokens, seconds) of the last row
        self.last_print = self.last_plot = self.last_status = time.monotonic()
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
            # Rows of steps after the checkpoint stay in log.csv until this process logs its first
            # row. If it fails before, log.csv has not changed.
            self.rows = [row for row in rows if row["step"] <= self.state.step]
            trackers = open_trackers(self.folder, self.config, self.state.step)
            self.trackers = self.exit_stack.enter_context(trackers)
        if self.enabled and is_terminal():
            self.bar = tqdm(
                total=self.config.max_iters, initial=self.state.step, dynamic_ncols=True,
                leave=False,
                # A short bar: the "^C" of a terminal does not begin a new line after it.
                bar_format="{percentage:3.0f}% |{bar:12}| {n_fmt}/{total_fmt} steps{postfix}"
                + CLEAR_REST_OF_LINE,
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
                if not self.log_is_complete:  # a spreadsheet may still lock the file
                    backup = backup_path(self.folder / LOG_FILE)
                    write_log(backup, self.rows)
                    self.print(labeled("WARNING", f"the rows of {LOG_FILE} are in {backup.name}"))
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
                    f"{self.folder}: another process has started a run here (the folder or its "
                    "lock file was deleted or moved, or each node has its own locks); this run "
                    "ends without saving"
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

    def log_step(self, metrics: StepMetrics) -> None:
        """Record a training step; the state has been updated already."""
        self.metrics = metrics
        self.state.unlogged_losses += metrics.loss
        self.state.unlogged_steps += 1
        if self.last_logged is None:
            # The first step includes warming up (and compiling), so speed is measured after it.
            self.last_logged = (self.state.tokens, self.state.seconds)
            self.first_step = (self.state.step, self.state.seconds)
            if self.enabled:
                self._rename_later_snapshots()
        if self.bar is not None:
            self.bar.update(self.state.step - self.bar.n)
            if time.monotonic() - self.last_status >= STATUS_SECONDS:  # steps are slow
                self._show_progress(self._new_row()["tokens_per_second"])

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

    def _new_row(self, val_loss: float | None = None, bits_per_byte: float | None = None) -> LogRow:
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

    def _show_progress(self, speed: float | None, is_evaluation: bool = False) -> None:
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
        self.last_status = time.monotonic()
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
        if not self.enabled or losses.count(None) == len(losses):
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
    batches: Iterator[Item],
    batch_size: int,
    dataset: Dataset,
    config: TrainConfig,
    dist: Distributed,
) -> Iterator[Item]:
    """Yield the batches of an evaluation. On a terminal, a bar shows how many have been used."""
    n_tokens = min(len(dataset.val), config.eval_tokens or math.inf)
    n_batches = math.ceil(n_tokens / (batch_size * config.block_size * dist.world_size))
    yield from show_progress(batches, n_batches, "evaluating", "batches", dist.is_main)


def show_progress(
    items: Iterable[Item], total: int, activity: str, unit: str, enabled: bool = True
) -> Iterator[Item]:
    """Yield the items. On a terminal, a bar shows how many have been used.

    position=0 draws the bar in the line of the bar of training steps. The message about a signal
    comes at any moment, and could destroy a bar in a second line.
    """
    form = f"{activity} |{{bar:12}}| {{n_fmt}}/{{total_fmt}} {unit}, {{remaining}} left"
    yield from tqdm(
        items, total=total, disable=not (enabled and is_terminal()), leave=False,
        dynamic_ncols=True, position=0, bar_format=form + CLEAR_REST_OF_LINE,
    )  # fmt: skip


def is_terminal() -> bool:
    """Whether progress bars can be shown: stdout and stderr must be terminals.

    With `| tee log.txt`, a line of stdout would reach the terminal late, in the middle of a bar.
    """
    return all(stream is not None and stream.isatty() for stream in (sys.stdout, sys.stderr))
