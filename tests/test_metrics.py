"""MetricsLogger: log.csv, progress, warnings, loss.png."""

import dataclasses
import io
import math
import os
import shutil
import sys
from types import SimpleNamespace

import pytest

from configurator import FolioError
from engine import metrics
from engine.log_file import COLUMNS, parse_log, read_log, write_log
from engine.metrics import START_ID_FILE, StepMetrics, show_evaluation
from engine.plot import run_results
from engine.run import TrainState
from engine.train_config import TrainConfig
from tests.conftest import make_step

HEADER = ",".join(COLUMNS)
ROW = "2,200,1.0,1.5,,0.001,1.0,200,"  # of step 2, as make_step() logs it


# --- log.csv ---


def test_train_loss_is_the_mean_since_the_row_before_and_survives_a_restart(make_logger):
    with make_logger() as logger:
        for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
            logger.state.step = step
            logger.log_step(StepMetrics(loss, 1.0, 1e-3))
            if step == 2:
                logger.log_row()
    assert logger.rows[-1]["train_loss"] == 3.0
    saved = dataclasses.asdict(logger.state)
    with make_logger() as resumed:
        resumed.state = TrainState(**{**saved, "step": 4})
        resumed.log_step(StepMetrics(0.5, 1.0, 1e-3))
        resumed.log_row()
    assert resumed.rows[-1]["train_loss"] == 0.75


def test_log_rows_describe_the_state_after_a_step(make_logger, tmp_path):
    with make_logger() as logger:
        logger.log_row(4.0)
        make_step(logger, 1)
        make_step(logger, 5, val_loss=2.0)
    rows = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == [0, 1, 5]
    assert [row["val_loss"] for row in rows] == [4.0, None, 2.0]
    assert rows[0]["train_loss"] is None  # no step has been made
    assert rows[2]["train_loss"] == 0.6
    assert rows[2]["tokens_per_second"] == 200  # 400 tokens in 2 seconds since the row before
    assert tuple(rows[0]) == COLUMNS


def test_resuming_drops_rows_after_the_checkpoint(make_logger, tmp_path):
    with make_logger() as logger:
        for step in (1, 2, 3, 4):
            make_step(logger, step)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("5,500,2.")  # the process was killed while it wrote this row
    with make_logger(step=2) as logger:
        make_step(logger, 3, val_loss=1.0)
    rows = read_log(tmp_path / "log.csv")
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["val_loss"] == 1.0
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["log.csv", START_ID_FILE]  # nothing was damaged


def test_a_resume_that_fails_before_its_first_row_leaves_the_log_as_it_is(make_logger, tmp_path):
    with make_logger() as logger:
        for step in (1, 2, 3, 4):
            make_step(logger, step)
    before = (tmp_path / "log.csv").read_bytes()
    with pytest.raises(FolioError), make_logger(step=2) as logger:
        logger.log_step(StepMetrics(1.5, 1.0, 1e-3))
        raise FolioError("out of memory")
    assert (tmp_path / "log.csv").read_bytes() == before


def test_an_evaluation_after_resuming_completes_the_row_of_its_step(make_logger, tmp_path):
    with make_logger() as logger:
        make_step(logger, 2)
    with make_logger(step=2) as logger:
        logger.log_row(val_loss=1.25)
    (row,) = read_log(tmp_path / "log.csv")
    assert (row["train_loss"], row["val_loss"]) == (1.5, 1.25)


@pytest.mark.parametrize("is_resumed", [False, True])
def test_of_two_processes_that_see_no_lock_the_last_one_to_start_goes_on(
    make_logger, tmp_path, is_resumed
):
    """The lock file was deleted, or on a network disk each node has its own locks."""
    with pytest.raises(FolioError, match="another process has started"), make_logger() as first:
        make_step(first, 1)
        if not is_resumed:
            shutil.rmtree(tmp_path)
            make_step(first, 2)  # a row cannot be written, and training continues
            tmp_path.mkdir()
        with make_logger(step=1) as second:
            make_step(second, 2)
        before = (tmp_path / "log.csv").read_bytes()
        make_step(first, 3)
    assert (tmp_path / "log.csv").read_bytes() == before
    steps = [row["step"] for row in read_log(tmp_path / "log.csv")]
    assert steps == ([1, 2] if is_resumed else [2])


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_log_saved_by_a_spreadsheet_with_commas_is_read(make_logger, tmp_path, newline):
    text = f"\ufeff{HEADER}{newline}{ROW}{newline}"  # a byte order mark in front
    (tmp_path / "log.csv").write_bytes(text.encode())
    with make_logger(step=2) as logger:
        assert logger.rows[0]["train_loss"] == 1.5
    assert sorted(path.name for path in tmp_path.iterdir()) == ["log.csv", START_ID_FILE]


def test_a_log_that_a_spreadsheet_has_sorted_is_read_by_step(make_logger, tmp_path):
    row = ROW.replace("2,", "1,", 1)
    (tmp_path / "log.csv").write_text(f"{HEADER}\n{ROW}\n{row}\n")
    with make_logger(step=2) as logger:
        assert [row["step"] for row in logger.rows] == [1, 2]


@pytest.mark.parametrize(
    ("content", "kept_steps"),
    [
        (f"{HEADER}\n{ROW}\n".replace(",", ";").encode(), []),
        (f"{HEADER}\n{ROW}\n".replace(",", "\t").encode(), []),
        (f"{HEADER}\n{ROW}\n".encode("utf-16"), []),
        (f"{HEADER}\n1,{'9' * 200_000}\n{ROW}\n".encode(), [2]),  # too long for the csv module
        (f"{HEADER}\n\0\0\0\0\n{ROW}\n".encode(), [2]),
        (f"{HEADER}\n{ROW}\nmy own note\n".encode(), [2]),
        (f"{HEADER}\n1,100,,3.0,,,,,\n{ROW}\n".encode(), [2]),
    ],
    ids=["semicolons", "tabs", "utf-16", "huge field", "zeros", "note", "no seconds"],
)
def test_a_log_with_unreadable_lines_is_kept_under_another_name(
    make_logger, tmp_path, capsys, content, kept_steps
):
    (tmp_path / "log.csv").write_bytes(content)
    with make_logger(step=2) as logger:
        assert [row["step"] for row in logger.rows] == kept_steps
    assert (tmp_path / "log.csv.1").read_bytes() == content
    assert parse_log(tmp_path / "log.csv") == (logger.rows, True)
    assert "log.csv.1" in capsys.readouterr().out


def test_a_folder_in_the_place_of_the_log_is_kept_under_another_name(make_logger, tmp_path):
    (tmp_path / "log.csv").mkdir()
    with make_logger() as logger:
        make_step(logger, 1)
        make_step(logger, 2)
    assert (tmp_path / "log.csv.1").is_dir()
    assert parse_log(tmp_path / "log.csv") == (logger.rows, True)


def test_an_empty_or_missing_log_starts_silently(make_logger, tmp_path, capsys):
    (tmp_path / "log.csv").touch()
    with make_logger():
        pass
    assert read_log(tmp_path / "log.csv") == []
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("error", [PermissionError(13, "in use"), FolioError("log.csv: disk full")])
def test_a_row_that_cannot_be_written_is_written_later(
    make_logger, tmp_path, capsys, monkeypatch, error
):
    def fail(*_):
        raise error

    with make_logger() as logger:
        for name in ("append_row", "write_log"):
            monkeypatch.setattr(metrics, name, fail)
        make_step(logger, 1)
        make_step(logger, 2)
        monkeypatch.undo()
    assert [row["step"] for row in read_log(tmp_path / "log.csv")] == [1, 2]
    assert capsys.readouterr().out.count("WARNING") == 1


def test_rows_of_a_locked_log_are_kept_under_another_name(
    make_logger, tmp_path, capsys, monkeypatch
):
    """A spreadsheet on Windows locks log.csv until the run ends."""
    (tmp_path / "log.csv").write_text(f"{HEADER}\n{ROW}\n")

    def write_unless_locked(path, rows):
        if path.name == "log.csv":
            raise PermissionError(13, "in use")
        write_log(path, rows)

    monkeypatch.setattr(metrics, "write_log", write_unless_locked)
    with make_logger(step=2) as logger:
        make_step(logger, 3)
    assert [row["step"] for row in read_log(tmp_path / "log.csv.1")] == [2, 3]
    assert "the rows of log.csv are in log.csv.1" in capsys.readouterr().out


# --- Progress ---


def test_a_disabled_logger_prints_and_writes_nothing(make_logger, tmp_path, capsys):
    with make_logger(enabled=False) as logger:
        logger.print("hello")
        logger.warn_once("hello")
        make_step(logger, 5, val_loss=1.0)
        logger.plot()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def closed_pipe() -> int:
    read_end, write_end = os.pipe()
    os.close(read_end)
    return write_end


def closed_terminal() -> int:
    import pty

    master, slave = pty.openpty()
    os.close(master)
    return slave


def full_disk() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.skipif(sys.platform != "linux", reason="needs /dev/full")
@pytest.mark.parametrize("open_stdout", [closed_pipe, closed_terminal, full_disk])
def test_output_that_nobody_can_receive_is_discarded(make_logger, monkeypatch, open_stdout):
    with open(open_stdout(), "w") as broken, make_logger() as logger:
        monkeypatch.setattr(sys, "stdout", broken)
        logger.print("lost")
        logger.print("lost, too")
        broken.write("as at the end of the program")
        broken.flush()  # raises nothing


def test_a_line_of_progress_names_speed_time_left_and_mfu(make_logger, capsys, monkeypatch):
    monkeypatch.setattr(metrics, "MIN_SECONDS", 0)
    with make_logger(peak_tokens_per_second=400.0) as logger:
        make_step(logger, 1)
        make_step(logger, 2)
    last = capsys.readouterr().out.splitlines()[-1]
    assert last == "step 2 of 10: loss 1.500, 200 tokens/s, 50% MFU, 0:04 left"


def test_the_time_left_is_that_of_this_process_after_its_first_step(
    make_logger, capsys, monkeypatch
):
    """The first step may compile, and an earlier process may have been slower."""
    monkeypatch.setattr(metrics, "MIN_SECONDS", 0)
    with make_logger(step=4) as logger:
        for step, seconds in ((5, 100.0), (6, 100.5)):
            logger.state.step, logger.state.seconds = step, seconds
            logger.log_step(StepMetrics(1.5, 1.0, 1e-3))
            logger.log_row()
    assert capsys.readouterr().out.splitlines()[-1].endswith(", 0:02 left")  # 4 steps


def test_the_evaluation_line_compares_with_training_and_the_best(make_logger):
    lines = []
    with make_logger() as logger:
        logger.log_row(4.2036, 6.065)
        lines.append(logger.evaluation_line())
        for step, val_loss, train_loss in ((750, 1.6321, 1.5), (1000, 1.7712, 0.931)):
            make_step(logger, step, val_loss, train_loss)
            lines.append(logger.evaluation_line())
        make_step(logger, 1250, math.nan, 0.9)
        lines.append(logger.evaluation_line())
    assert lines == [
        "step 0: validation loss 4.2036 (before training)",
        "step 750: training loss 1.500, validation loss 1.6321 (best so far)",
        "step 1,000: training loss 0.931, validation loss 1.7712 (best 1.6321, step 750)",
        "step 1,250: training loss 0.900, validation loss nan (best 1.6321, step 750)",
    ]
    assert max(map(len, lines)) <= 80


def show_batches(
    monkeypatch,
    n_batches: int,
    is_terminal: bool = True,
    is_main: bool = True,
    is_piped: bool = False,
) -> tuple[list[int], str]:
    """The first batches of an evaluation of 1,000 tokens by two processes, and what stderr got."""
    stderr = io.StringIO()
    stderr.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stderr", stderr)
    monkeypatch.setattr(sys, "stdout", SimpleNamespace(isatty=lambda: not is_piped))
    config = TrainConfig(block_size=8)
    dist = SimpleNamespace(is_main=is_main, world_size=2)
    batches = []
    dataset = SimpleNamespace(val=range(1000))
    for batch in show_evaluation(iter(range(6)), 12, dataset, config, dist):
        batches.append(batch)
        if len(batches) == n_batches:  # as if a signal interrupted the evaluation
            break
    return batches, stderr.getvalue()


@pytest.mark.parametrize("n_batches", [7, 3])
def test_a_terminal_shows_the_progress_of_an_evaluation_until_it_ends(monkeypatch, n_batches):
    batches, shown = show_batches(monkeypatch, n_batches)
    assert batches == [0, 1, 2, 3, 4, 5][:n_batches]
    first, *_, last = shown.split("\r")[1:]
    assert first.startswith("evaluating |")
    assert " 0/6 batches" in first  # 1000 / 96 = 10.4, so 6 batches for one of two processes
    assert last == ""  # the line was cleared


def test_an_evaluation_is_silent_without_a_terminal_and_in_other_processes(monkeypatch):
    for options in ({"is_terminal": False}, {"is_main": False}, {"is_piped": True}):
        assert show_batches(monkeypatch, 6, **options) == ([0, 1, 2, 3, 4, 5], "")


def test_a_line_printed_during_an_evaluation_does_not_continue_its_bar(make_logger, monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr(sys, "stdout", terminal)
    monkeypatch.setattr(sys, "stderr", terminal)
    dataset, dist = SimpleNamespace(val=range(1000)), SimpleNamespace(world_size=1, is_main=True)
    with make_logger() as logger:
        for _ in show_evaluation(iter(range(2)), 12, dataset, logger.config, dist):
            logger.print("threads  1 instead of 2")
    # Both bars have been cleared: "\r" follows spaces.
    assert terminal.getvalue().count(" \rthreads  1 instead of 2\n") == 2, repr(terminal.getvalue())
    assert "\x1b[A" not in terminal.getvalue()  # the two bars share a line


def test_warnings_fit_the_terminal(make_logger, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "40")
    with make_logger() as logger:
        logger.warn_once("log.csv: write failed; training continues")
    assert capsys.readouterr().out.splitlines() == [
        "WARNING  log.csv: write failed; training", "         continues",
    ]  # fmt: skip


# --- loss.png ---


def test_loss_png_shows_the_rows(make_logger, tmp_path):
    with make_logger() as logger:
        logger.log_row(4.0)
        logger.plot()
        before = (tmp_path / "loss.png").read_bytes()
        make_step(logger, 5, val_loss=2.0)
        logger.plot()
    assert (tmp_path / "loss.png").read_bytes() != before
    assert before.startswith(b"\x89PNG")


def test_no_loss_png_without_a_loss(make_logger, tmp_path):
    with make_logger() as logger:
        logger.log_row()  # a signal interrupted the evaluation at step 0
        logger.plot()
    assert not (tmp_path / "loss.png").exists()


def test_a_loss_of_zero_is_a_loss(make_logger, tmp_path):
    """With a vocabulary of one token, every prediction is right."""
    with make_logger() as logger:
        logger.state.step = 5
        logger.log_row(val_loss=0.0, bits_per_byte=0.0)
        logger.plot()
    assert (tmp_path / "loss.png").exists()
    assert run_results(logger.rows)["its bits per byte"] == "0.0000"


def test_loss_png_is_not_plotted_at_every_evaluation(make_logger, tmp_path):
    with make_logger() as logger:
        logger.log_row(4.0)
        logger.maybe_plot()
        assert not (tmp_path / "loss.png").exists()
        logger.last_plot -= 40  # as if so many seconds had passed
        logger.maybe_plot()
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize("broken", ["import", "plot"])
def test_a_failing_plot_is_one_warning_and_training_continues(
    make_logger, capsys, monkeypatch, broken
):
    if broken == "import":
        monkeypatch.setitem(sys.modules, "matplotlib.style", None)  # import raises ImportError
    else:
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig", lambda *_, **__: 1 / 0
        )  # ZeroDivisionError
    with make_logger() as logger:
        make_step(logger, 1, val_loss=2.0)
        logger.plot()
        logger.plot()
    out = capsys.readouterr().out
    assert out.count("WARNING") == out.count("WARNING  no loss.png") == 1
