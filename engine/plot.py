"""Plot the loss curves of several runs in one picture, and compare the runs in a table.

    python -m engine.plot out/a out/b                         # writes out/losses.png
    python -m engine.plot out/a out/b --x=seconds --picture=seconds.png

Training uses plot_losses() for loss.png. matplotlib is imported only where something is plotted.
"""

import contextlib
import itertools
import math
import shutil
import textwrap
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

if not __package__:  # started as a file: python engine/plot.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from configurator import FolioError, parse_inputs, run_main
from data.files import atomic_write, user_path
from engine.hf_format import read_config
from engine.log_file import LOG_FILE, LogRow, best_row, evaluations, read_log
from engine.run_folder import read_run_settings, weights_metadata

PLOT_FILE = "loss.png"  # in each run folder
# Losses of runs can be compared if these are equal.
MUST_BE_EQUAL = ("vocabulary", "checksum of val.bin", "eval_tokens")
XAxis = Literal["step", "tokens", "seconds"]
FORMATS = (".png", ".pdf", ".svg")
COLORS = ("#1f4e8c", "#d1822b", "#2c7a4b", "#8c8c8c", "#a8324a", "#7a5ba6")


@dataclass
class PlotConfig:
    picture: str = "out/losses.png"  # the picture to write: .png, .pdf or .svg
    x: XAxis = "step"  # horizontal axis


@dataclass
class LoggedRun:
    """A run folder as far as it can be compared with others."""

    settings: dict[str, Any]
    rows: list[LogRow]


def main() -> None:
    inputs, config = parse_inputs(PlotConfig)
    is_log = [path.name == LOG_FILE and path.is_file() for path in inputs]
    inputs = [path.parent if log else path for path, log in zip(inputs, is_log, strict=True)]
    # out/* may contain pictures, and pages of explain.py.
    folders = [path for path in inputs if path.suffix not in (*FORMATS, ".html")]
    if not folders:
        raise FolioError("which runs? for example: python -m engine.plot out/shakespeare_char")
    names = [folder.resolve().name for folder in folders]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in folders]
    runs, problems = {}, []
    for name, folder in zip(names, folders, strict=True):
        try:
            runs[name] = read_run(folder)
        except FolioError as error:
            if not folder.is_dir():
                raise
            problems.append(error)
    if not runs:
        raise problems[0]
    for problem in problems:
        print(f"left out: {problem}")
    print(comparison_table(runs, shutil.get_terminal_size().columns))
    if note := comparability(list(runs.values())):
        print(f"\n{note}")
    picture = user_path(config.picture)
    if picture.suffix not in FORMATS:
        raise FolioError(f"--picture={config.picture}: must end in {', '.join(FORMATS)}")
    picture.parent.mkdir(parents=True, exist_ok=True)
    title = names[0]
    if len(runs) > 1:
        title = "validation loss and its lowest value (training loss: pale)"
    if note:
        title = "these losses cannot be compared"
    print(f"\nplotting {picture}", flush=True)
    plot_losses({name: run.rows for name, run in runs.items()}, picture, title, config.x)


def read_run(folder: str | Path) -> LoggedRun:
    """Read the settings and log.csv of a run. Raises FolioError if the folder has no log."""
    folder = Path(folder)
    if not folder.is_dir():
        raise FolioError(f"{folder}: no such folder; give folders of runs, such as out/my_run")
    rows = read_log(folder / LOG_FILE)
    if not rows:
        raise FolioError(f"{folder}: {LOG_FILE} is missing or has no rows; give folders of runs")
    settings = read_run_settings(folder) or {}
    with contextlib.suppress(FolioError):  # no weights yet
        # Datasets of one name may hold other texts. The losses of different vocabularies, or on
        # different texts, cannot be compared.
        settings["vocabulary"] = read_config(folder).vocab_size
        checksum = weights_metadata(folder).get("val_checksum")  # None: not evaluated
        settings["checksum of val.bin"] = "" if checksum is None else f"{checksum:08x}"
    return LoggedRun(settings, rows)


def comparability(runs: list[LoggedRun]) -> str:
    """Why the losses of these runs cannot be compared; "" if they can."""
    found = {name: {run.settings.get(name) for run in runs} - {None, ""} for name in MUST_BE_EQUAL}
    if len(found["vocabulary"]) > 1:
        # The first 10,000 tokens are more text with one tokenizer than with another.
        is_limited = any(found["eval_tokens"] - {0})
        condition = ", and eval_tokens is 0 in all runs" if is_limited else ""
        return (
            "losses of different vocabularies cannot be compared; bits per byte can, if the\n"
            f"runs were evaluated on the same text{condition}"
        )
    if len(found["checksum of val.bin"]) > 1:
        return (
            "the runs were evaluated on different tokens, of another text or by another\n"
            "tokenizer: their losses cannot be compared"
        )
    if len(found["eval_tokens"]) > 1:
        return "eval_tokens differ: the losses are of different windows, and cannot be compared"
    return ""


# --- Table ---


def comparison_table(runs: dict[str, LoggedRun], width: int) -> str:
    """A column for each run; a row for each setting that differs, then for each result.

    Runs that do not fit into `width` columns follow in another table.
    """
    lines = [["", *runs]]
    settings = [run.settings for run in runs.values()]
    for name in dict.fromkeys(itertools.chain.from_iterable(settings)):
        values = [str(values.get(name, "")) for values in settings]
        is_restart = name == "init_from" and {*values} <= {"scratch", "auto", "resume"}
        is_shown = name not in ("out_dir", "checksum of val.bin") and not is_restart
        if is_shown and len(set(values)) > 1:
            lines.append([name, *values])
    results = [run_results(run.rows) for run in runs.values()]
    lines += [[name, *(result[name] for result in results)] for name in results[0]]
    names, *columns = zip(*lines, strict=True)
    tables = [[names]]
    for column in columns:
        wider = [*tables[-1], column]
        fits = max(map(len, format_table(wider))) <= width
        if fits or tables[-1] == [names]:
            tables[-1] = wider
        else:
            tables.append([names, column])
    return "\n\n".join("\n".join(format_table(table)) for table in tables)


def format_table(columns: list[tuple[str, ...]]) -> list[str]:
    """The lines of a table. Each column is as wide as its widest cell."""
    padded = [[cell.ljust(max(map(len, column))) for cell in column] for column in columns]
    return ["  ".join(line).rstrip() for line in zip(*padded, strict=True)]


def run_results(rows: list[LogRow]) -> dict[str, str]:
    """The best evaluation of a run, and its length."""
    best, last = best_row(rows) or {}, rows[-1]
    bits_per_byte = best.get("bits_per_byte")
    return {
        "best validation loss": f"{best['val_loss']:.4f}" if best else "none yet",
        "its bits per byte": "" if bits_per_byte is None else f"{bits_per_byte:.4f}",
        "its step": f"{best['step']:,}" if best else "",
        "logged steps": f"{last['step']:,}",
        "tokens": f"{last['tokens']:,}",
        "seconds": f"{last['seconds']:,.1f}",
    }


# --- Picture ---


def plot_losses(
    runs: dict[str, list[LogRow]],
    path: str | Path,
    title: str = "",
    x: XAxis = "step",
    x_max: float | None = None,
) -> None:
    """Write a picture of the training loss (pale) and the validation loss of each run.

    runs: name -> rows of log.csv. x_max: where the horizontal axis ends at least.
    Raises FolioError if the picture cannot be written, and whatever matplotlib raises.
    """
    import matplotlib.style
    from matplotlib.figure import Figure

    with warnings.catch_warnings(), matplotlib.style.context("default"):
        warnings.simplefilter("ignore")  # for example about a letter that the font lacks
        figure = Figure(figsize=(7, 4.2), dpi=130, layout="constrained")
        axes = figure.subplots()
        looks = itertools.cycle(itertools.product(("-", "--", ":"), COLORS))
        for (name, rows), (line, color) in zip(runs.items(), looks, strict=False):
            # matplotlib hides labels that begin with "_".
            label = f" {printable(name)}" if len(runs) > 1 else ""
            plot_run(axes, label, rows, x, color, line)
        ends = [row[x] for rows in runs.values() for row in rows]
        end = max([*ends, x_max or 0, 1])
        axes.set_xlim(-0.04 * end, 1.1 * end)  # a number at step 0 does not touch the axis
        axes.set_ylim(*loss_range(list(runs.values())))
        axes.set(xlabel=x, ylabel="loss (nats per token)")
        title = textwrap.fill(printable(title), 95)  # as much as fits into a line
        axes.set_title(title, fontsize=9, parse_math=False)
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
        for text in axes.legend(frameon=False).get_texts():
            text.set_parse_math(False)  # "$" in a name is no formula
        with atomic_write(path) as temporary:
            figure.savefig(temporary, format=Path(path).suffix[1:])


def plot_run(
    axes: Any, name: str, rows: list[LogRow], x: XAxis, color: str, line: str = "-"
) -> None:
    """Both curves of a run, with its best validation loss as a number.

    name: of the run, for the legend; "" if the picture shows one run only.
    """
    train = [(row[x], row["train_loss"]) for row in rows if row["train_loss"] is not None]
    val = [(row[x], row["val_loss"]) for row in evaluations(rows)]
    if train:
        label = None if name else "training"
        marker = "." if len(train) == 1 else ""  # one point makes no line
        axes.plot(
            *zip(*train, strict=True), marker + line, color=color, alpha=0.4, lw=1.2, label=label
        )
    if val:
        best = min(val, key=lambda point: point[1])
        label = f"{name}: {best[1]:.3f}" if name else "validation"
        axes.plot(*zip(*val, strict=True), f"o{line}", color=color, ms=4, label=label)
        if best != val[-1]:  # after this step, the validation loss is higher
            axes.axvline(best[0], color=color, lw=0.8, ls=":")
        if name:  # the numbers of several curves would cover each other
            return
        # Behind the end of the curve there is room; elsewhere, the number stands above the curve,
        # to the right of the dotted line.
        place = {"xytext": (6, 0), "va": "center"}
        if best != val[-1]:
            place = {"xytext": (4, 8)}
        axes.annotate(f"{best[1]:.3f}", best, textcoords="offset points", color=color, **place)


def loss_range(logs: list[list[LogRow]]) -> tuple[float, float]:
    """The range of the vertical axis: all losses after the first fifth of each run, or after its
    first evaluation of trained weights if that is earlier. A run whose only evaluation is that of
    step 0 counts only if no run has a later evaluation.

    Earlier losses fall so fast that later losses would have a narrow strip of the picture. If a
    run started near its best loss, because it finetuned trained weights, all its losses count.
    """
    losses = []
    trained = [rows for rows in logs if any(row["step"] for row in evaluations(rows))]
    for rows in trained or logs:
        evaluated = [row["step"] for row in evaluations(rows) if row["step"] > 0]
        start = min(rows[-1]["step"] / 5, evaluated[0]) if evaluated else 0
        val_losses = [row["val_loss"] for row in evaluations(rows)]
        if val_losses and val_losses[0] < 1.5 * min(val_losses):
            start = 0
        late = [row for row in rows if row["step"] >= start]
        losses += [row[name] for row in late for name in ("train_loss", "val_loss")]
    losses = [loss for loss in losses if loss is not None and math.isfinite(loss)] or [0.0]
    margin = 0.08 * (max(losses) - min(losses)) or 0.1
    return min(losses) - margin, max(losses) + margin


def printable(text: str) -> str:
    """The text with "?" for bytes of a file name that are not UTF-8."""
    return text.encode("utf-8", errors="replace").decode()


if __name__ == "__main__":
    run_main(main)
