"""log.csv: one row for every `log_interval` steps and for every evaluation.

    step,tokens,seconds,train_loss,val_loss,learning_rate,grad_norm,tokens_per_second,bits_per_byte

A row describes the state after `step` steps. Losses are in nats per token. train_loss is the mean
over the steps since the row before. bits_per_byte is val_loss in bits per byte of
text, so it can be compared between tokenizers. learning_rate is AdamW's. seconds count training
only, not evaluation.
"""

import csv
import math
from pathlib import Path

from data.files import atomic_write

LOG_FILE = "log.csv"
COLUMNS = (
    "step", "tokens", "seconds", "train_loss", "val_loss",
    "learning_rate", "grad_norm", "tokens_per_second", "bits_per_byte",
)  # fmt: skip

LogRow = dict[str, int | float | None]  # column -> value; None where the column is empty


def read_log(path: str | Path) -> list[LogRow]:
    """Return the rows of log.csv; [] if there is no file."""
    return parse_log(path)[0]


def parse_log(path: str | Path) -> tuple[list[LogRow], bool]:
    """Return all rows of log.csv, sorted by step, and whether all of it could be read.

    A killed process may have written a part of the last line: it is ignored, unless it has all
    columns. (A spreadsheet may leave out the last line end, and may have sorted the rows.)
    """
    path = Path(path)
    if not path.exists():
        return [], True
    try:
        text = path.read_bytes().decode("utf-8-sig", errors="replace")  # Excel puts a BOM in front
    except OSError:  # a folder, for example
        return [], False
    header, *lines = text.splitlines() or [""]
    if lines and not text.endswith(("\n", "\r")) and lines[-1].count(",") + 1 < len(COLUMNS):
        lines.pop()
    if header.split(",") != list(COLUMNS):
        return [], text == ""
    # Fields are numbers, so splitting at commas is enough.
    rows = [dict(zip(COLUMNS, map(_to_number, line.split(",")), strict=False)) for line in lines]
    valid = [row for row in rows if len(row) == len(COLUMNS) and has_progress(row)]
    return sorted(valid, key=lambda row: row["step"]), len(valid) == len(rows)


def has_progress(row: LogRow) -> bool:
    """Whether the row says after how many steps, tokens and seconds it was written."""
    is_count = isinstance(row["step"], int) and isinstance(row["tokens"], int)
    return is_count and row["seconds"] is not None


def write_log(path: str | Path, rows: list[LogRow]) -> None:
    """Replace log.csv by these rows."""
    with (
        atomic_write(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def append_row(path: str | Path, row: LogRow) -> None:
    with open(path, "a", encoding="utf-8", newline="") as file:
        csv.DictWriter(file, COLUMNS, lineterminator="\n").writerow(row)


def evaluations(rows: list[LogRow]) -> list[LogRow]:
    """The rows of evaluations whose loss is a finite number."""
    return [row for row in rows if row["val_loss"] is not None and math.isfinite(row["val_loss"])]


def best_row(rows: list[LogRow]) -> LogRow | None:
    """The row with the lowest validation loss of trained weights, so not of step 0.

    The first one if several are equal; None without such a row.
    """
    trained = [row for row in evaluations(rows) if row["step"] > 0]
    return min(trained, key=lambda row: row["val_loss"], default=None)


def _to_number(text: str) -> int | float | None:
    for number_type in (int, float):
        try:
            return number_type(text)
        except ValueError:
            pass
    return None
