"""MetricsLogger: log.csv, progress, warnings; the banner and the summary; FLOPs and MFU."""

import contextlib
import dataclasses
import io
import math
import os
import shutil
import sys
import time
from unittest.mock import Mock
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from configurator import FolioError
from engine import metrics
from engine.checkpoint import measured_on
from engine.log_file import COLUMNS, parse_log
from engine.metrics import (
    START_ID_FILE, MetricsLogger, StepMetrics, banner, describe_best, flops_per_token,
    format_duration, indented, peak_flops, read_log, relative_path, show_evaluation, summary,
)  # fmt: skip
from engine.run import TrainState
from engine.train_config import TrainConfig
from model import GPT, GPTConfig

RUN_FOLDER = Path("/runs/x")
HEADER = ",".join(COLUMNS)
ROW = "2,200,1.0,1.5,,0.001,1.0,200,"  # of step 2, as make_step() logs it


@pytest.fixture
def make_logger(tmp_path):
    """make_logger(step): a logger of a run that has done so many steps."""

    def make(step: int = 0, **options) -> MetricsLogger:
        state = TrainState(step=step, tokens=step * 100, seconds=step * 0.5)
        return MetricsLogger(tmp_path, TrainConfig(max_iters=10), state, **options)

    return make


def make_step(
    logger: MetricsLogger, step: int, val_loss: float | None = None, train_loss: float | None = None
) -> None:
    """Log a step of 100 tokens and 0.5 seconds, as train.py does."""
    state = logger.state
    state.step, state.tokens, state.seconds = step, step * 100, step * 0.5
    logger.log_steps([StepMetrics(train_loss or 3.0 / step, 1.0, 1e-3)])
    if val_loss is not None and val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = val_loss, step
    logger.log_row(val_loss, None if val_loss is None else val_loss / math.log(2))


# --- log.csv ---


def test_the_speed_counts_the_steps_whose_time_it_counts(make_logger):
    """As on a GPU: the second step has been started, but not read, when the first one is logged."""
    with make_logger() as logger:
        config, state = logger.config, logger.state
        config.batch_size, config.block_size = 10, 10  # 100 tokens per step
        metrics = StepMetrics(3.0, 1.0, 1e-3)
        state.step, state.tokens, state.seconds = 2, 200, 0.5
        logger.log_steps([metrics])
        state.step, state.tokens, state.seconds = 3, 300, 1.5
        logger.log_steps([metrics, metrics])
        logger.log_row()
    assert logger.rows[-1]["tokens_per_second"] == 200  # steps 2 and 3, in one second


def test_train_loss_is_the_mean_since_the_row_before_and_survives_a_restart(make_logger):
    with make_logger() as logger:
        for step, loss in ((1, 4.0), (2, 2.0), (3, 1.0)):
            logger.state.step = step
            logger.log_steps([StepMetrics(loss, 1.0, 1e-3)])
            if step == 2:
                logger.log_row()
    assert logger.rows[-1]["train_loss"] == 3.0
    saved = dataclasses.asdict(logger.state)
    with make_logger() as resumed:
        resumed.state = TrainState(**{**saved, "step": 4})
        resumed.log_steps([StepMetrics(0.5, 1.0, 1e-3)])
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
        logger.log_steps([StepMetrics(1.5, 1.0, 1e-3)])
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
        for logger.state.step, logger.state.seconds in ((5, 100.0), (6, 100.5)):
            logger.log_steps([StepMetrics(1.5, 1.0, 1e-3)])
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
    config = TrainConfig(batch_size=12, block_size=8)
    dist = SimpleNamespace(is_main=is_main, world_size=2)
    batches = []
    for batch in show_evaluation(iter(range(6)), SimpleNamespace(val=range(1000)), config, dist):
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
        for _ in show_evaluation(iter(range(2)), dataset, logger.config, dist):
            logger.print("threads  1 instead of 2")
    # "\x1b[A": from the (cleared) line of the second bar to the line of the first one
    line = "\r\x1b[Athreads  1 instead of 2\n"
    assert terminal.getvalue().count(line) == 2, repr(terminal.getvalue())


def test_lines_of_a_sample_fit_the_terminal_and_empty_lines_stay(monkeypatch):
    monkeypatch.setenv("COLUMNS", "20")
    assert indented("ROMEO:\nwho is here at night\n\nso late?") == (
        "    ROMEO:\n    who is here at\n    night\n\n    so late?"
    )


def test_a_sample_with_control_characters_does_not_reach_the_terminal():
    assert indented("a\x1bc\x08\x9bd\te\nf") == "    a�c��d  e\n    f"


@pytest.mark.parametrize("columns", ["1", "4"])
def test_a_sample_is_shown_on_the_narrowest_terminal(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", columns)
    assert indented("to be, or\nnot to be") == "    to be, or\n    not to be"


@pytest.mark.skipif(os.name == "nt", reason="Windows does not delete the working directory")
def test_a_path_is_shown_after_the_working_directory_was_deleted(tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert relative_path(tmp_path / "here" / "run") == Path("run")
    (tmp_path / "here").rmdir()
    assert relative_path(tmp_path / "run") == tmp_path / "run"


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


# --- Banner and summary ---


def make_banner(state: TrainState, notice: dict | None = None, **settings) -> list[str]:
    config = TrainConfig(**settings)
    dataset = SimpleNamespace(
        train=range(1_003_854), val=range(111_540), meta=notice or {},
        tokenizer=SimpleNamespace(vocab_size=65),
    )  # fmt: skip
    device = SimpleNamespace(
        description="cpu (1 thread), float32", torch_device=torch.device("cpu")
    )
    model = GPT(GPTConfig(config.block_size, 65, config.n_layer, config.n_head, config.n_embd))
    return banner(config, state, dataset, model, device, RUN_FOLDER).splitlines()


def test_the_banner_says_what_will_be_trained():
    lines = make_banner(
        TrainState(), batch_size=8, block_size=128, gradient_accumulation_steps=2, n_layer=1,
        max_iters=2000,
    )  # fmt: skip
    assert lines == [
        "data     shakespeare_char: 1,003,854 training tokens, 111,540 validation tokens,",
        "         vocabulary of 65",
        "model    223,232 parameters: 1 layer, 4 heads, 128 channels, context of 128",
        "steps    2,000, each of 2 x 8 x 128 = 2,048 tokens: 4.1 epochs",
        "device   cpu (1 thread), float32",
        f"folder   {RUN_FOLDER}",
    ]
    assert max(map(len, lines)) <= 80


def test_the_banner_says_how_long_a_recipe_for_a_gpu_takes_on_a_cpu(monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    # 768 tokens per step, 6 (786,432 + 8,320) + 393,216 FLOPs per token, 3e10 FLOPS per thread
    for max_iters, duration in (
        (60_000, "1 hour"), (1_000_000, "18 hours"), (10_000_000, "8 days"),
    ):  # fmt: skip
        lines = make_banner(TrainState(), max_iters=max_iters)
        expected = f"note     this is work for a GPU: on this CPU it takes roughly {duration}"
        assert expected in lines
    assert not any(line.startswith("note") for line in make_banner(TrainState(), max_iters=2000))


def test_the_banner_names_the_replacement_text_once_for_each_run():
    meta = {"replacement_for": "shakespeare"}
    text = " ".join(make_banner(TrainState(), notice=meta))
    assert "WARNING  Shakespeare could not be downloaded" in text
    resumed = make_banner(TrainState(step=2), notice=meta, init_from="resume")
    assert "WARNING" not in " ".join(resumed)


def test_the_banner_of_a_resumed_run_counts_the_steps_left():
    steps = "steps 500 left after step 1,500 of 2,000, each of 8 x 64 = 512 tokens: 0.3 epochs"
    lines = make_banner(TrainState(step=1500), init_from="resume", batch_size=8)
    assert steps in " ".join(" ".join(lines).split())
    lines = make_banner(TrainState(step=2000), init_from="resume")
    assert "steps    none left after step 2,000; to train longer, raise --max_iters" in lines


def test_the_banner_names_the_weights_that_are_finetuned_or_evaluated():
    assert "weights  gpt2" in make_banner(TrainState(), init_from="gpt2")
    lines = make_banner(TrainState(step=93), init_from="resume", eval_only=True)
    assert f"weights  step 93 of {RUN_FOLDER}" in lines
    assert not any(line.startswith(("steps", "folder")) for line in lines)
    assert "weights  untrained" in make_banner(TrainState(), eval_only=True)


def test_the_banner_warns_about_the_replacement_text():
    lines = make_banner(TrainState(), {"replacement_for": "tiny Shakespeare", "tokenizer": "char"})
    assert any("prepare_shakespeare.py" in line for line in lines)
    assert max(map(len, lines)) <= 80


@pytest.fixture
def run_folders(tmp_path, monkeypatch) -> Path:
    """A repository with the runs out/older and out/newer, as the working directory."""
    root = tmp_path / "a copy"
    for module in ("metrics", "run_folder"):
        monkeypatch.setattr(f"engine.{module}.ROOT", root)
    for name, modified in (("older", 1e9), ("newer", 2e9)):
        weights = root / "out" / name / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        os.utime(weights, (modified, modified))
    monkeypatch.chdir(root)
    return root / "out"


def next_command(folder: Path) -> str:
    state = TrainState(step=2000, best_step=2000)
    lines = summary(TrainConfig(), state, folder).splitlines()
    return next(line for line in lines if line.startswith("next"))


def test_the_next_command_samples_from_this_run(run_folders):
    """sample.py uses the newest run by default."""
    assert next_command(run_folders / "newer") == "next     python sample.py"
    assert next_command(run_folders / "older") == "next     python sample.py --out_dir=out/older"


def test_untrained_weights_are_not_offered_for_sampling(run_folders):
    text = summary(TrainConfig(), TrainState(step=0), run_folders / "newer")
    assert "sample.py" not in text
    assert text.endswith("next     the same command with --init_from=resume, to continue")
    assert "next     python sample.py" in summary(
        TrainConfig(), TrainState(step=3), run_folders / "newer"
    )


@pytest.mark.skipif(sys.platform == "win32", reason="its shells quote in another way")
def test_the_next_command_is_quoted_and_works_from_any_folder(run_folders, tmp_path, monkeypatch):
    monkeypatch.chdir(run_folders)
    assert next_command(run_folders / "newer") == f"next     python '{tmp_path}/a copy/sample.py'"
    monkeypatch.chdir(tmp_path)
    assert next_command(run_folders / "newer") == "next     python 'a copy/sample.py'"
    run = tmp_path / "it's mine"
    run.mkdir()
    (run / "model.safetensors").touch()
    quoted = f"'--out_dir={tmp_path}/it'\"'\"'s mine'"
    assert next_command(run) == f"next     python 'a copy/sample.py' {quoted}"


def test_the_summary_of_a_stopped_run_says_how_to_continue(tmp_path):
    config = TrainConfig(max_iters=10)
    state = TrainState(step=4, seconds=75.2, last_checkpoint_step=4)
    assert summary(config, state, tmp_path).splitlines() == [
        "",
        "stopped  4 of 10 steps, 1:15 of training; saved",
        "best     no evaluation of trained weights yet",
        "next     the same command with --init_from=resume, to continue",
    ]


def summary_after(logger: MetricsLogger, evaluations: list[tuple[int, float, float]]) -> str:
    with logger:
        for step, val_loss, train_loss in evaluations:
            make_step(logger, step, val_loss, train_loss)
    logger.state.last_checkpoint_step = logger.state.step
    return " ".join(summary(logger.config, logger.state, logger.folder).split())


def test_the_summary_names_the_step_of_the_best_weights(make_logger):
    text = summary_after(make_logger(), [(5, 2.0, 2.0), (10, 1.5, 1.6)])
    assert "done 10 of 10 steps, 0:05 of training best validation loss 1.5000 " in text
    assert text.endswith("(2.164 bits per byte) at step 10")  # 1.5 / ln 2


def test_the_summary_says_that_not_all_validation_tokens_were_used():
    state = TrainState(best_step=5, best_val_loss=1.5)
    text = "validation loss 1.5000{} at step 5"
    for eval_tokens, n_val_tokens, note in (
        (2000, 2001, " on the first 2,000 validation tokens"), (2000, 2000, ""), (0, 2001, ""),
    ):  # fmt: skip
        measured = measured_on(eval_tokens, n_val_tokens)
        assert describe_best([], state, measured) == text.format(note)


def test_finetuning_that_makes_the_loss_worse_is_named(make_logger):
    with make_logger() as logger:
        logger.log_row(1.2, 1.7)
        make_step(logger, 5, 1.4, 1.3)
        assert logger.evaluation_line().endswith("(best, but above step 0)")
    text = describe_best(logger.rows, logger.state)
    assert text.endswith("at step 5, worse than before training (1.2000)")


@pytest.mark.parametrize(
    ("val_loss", "train_loss", "ending"),
    [
        (2.9, 0.9, "it rose to 2.9000 at step 10 while the training loss fell: overfitting"),
        (2.9, 1.9, "at step 5; it rose to 2.9000 at step 10"),
        (1.51, 0.9, "at step 5"),  # worse by less than 1%, as it may be by chance
    ],
)
def test_the_summary_recognizes_overfitting(make_logger, val_loss, train_loss, ending):
    text = summary_after(make_logger(), [(5, 1.5, 1.6), (10, val_loss, train_loss)])
    assert text.endswith(ending)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3675, "1:01:15")])
def test_durations_are_formatted_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


# --- FLOPs and MFU ---


def test_peak_flops_are_found_by_device_name():
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 65,
        "NVIDIA GeForce RTX 4090": 165, "NVIDIA H200 NVL": 835,
    }.items():  # fmt: skip
        assert peak_flops(name) == tflops * 1e12, name
    for name in (
        "", "NVIDIA A10", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA T400", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):  # fmt: skip
        assert peak_flops(name) is None, name


@pytest.mark.parametrize("bias", [False, True])
def test_flops_per_token_counts_all_matrix_products(bias):
    """Expected: counted by torch in a forward and backward pass, with attention as products."""
    config = GPTConfig(8, 13, n_layer=2, n_head=2, n_embd=16, bias=bias, pad_vocab_to=16)
    model, idx = GPT(config), torch.randint(13, (3, 8))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx, idx).backward()
    assert flops_per_token(config) == counter.get_total_flops() / idx.numel()


def test_peak_tokens_per_second_is_flops_over_flops_per_token():
    config = GPTConfig()  # 124M
    gpu = SimpleNamespace(torch_device=torch.device("cuda"), name="NVIDIA H200")
    # 6 * (12 * 12 * 768² + 50257 * 768) + 12 * 12 * 768 * 1024 = 854,438,400 FLOPs per token
    expected = 8 * 989e12 / 854_438_400
    assert metrics.peak_tokens_per_second(config, gpu, 8) == pytest.approx(expected)
    cpu = SimpleNamespace(torch_device=torch.device("cpu"), name="")
    assert metrics.peak_tokens_per_second(config, cpu, 1) is None


# --- wandb and TensorBoard ---


def log_two_steps(logger: MetricsLogger) -> None:
    with logger:
        make_step(logger, logger.state.step + 1)
        make_step(logger, logger.state.step + 1, val_loss=2.125)


def test_wandb_gets_every_row_and_the_settings(make_logger, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make_logger()
    logger.config.wandb_log, logger.config.wandb_run_name = True, "my run"
    log_two_steps(logger)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    expected = (b"my run", b"shakespeare_char", b"train_loss", b"val_loss", b"2.125")
    deadline = time.monotonic() + 30  # wandb's own process writes the file
    while not all(text in file.read_bytes() for text in expected):  # uncompressed messages
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.1)


def test_a_resumed_run_continues_its_run_on_wandb(make_logger, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    started, logged = [], []

    class FakeRun(contextlib.nullcontext):
        define_metric = Mock()

        def log(self, values):  # with step=, wandb would ignore steps that are repeated
            logged.append(values)

    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings) or FakeRun())
    for _ in range(2):
        logger = make_logger()
        logger.config.wandb_log = True
        log_two_steps(logger)
    FakeRun.define_metric.assert_called_with("*", step_metric="step")
    assert [values["step"] for values in logged] == [1, 2, 1, 2]
    first, second = (settings["id"] for settings in started)
    assert first == second != ""
    assert [settings["resume"] for settings in started] == ["allow", "allow"]


def test_wandb_without_an_account_is_a_one_line_error(make_logger, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail(**_):
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", fail)
    logger = make_logger()
    logger.config.wandb_log = True
    with pytest.raises(FolioError, match=r"--wandb_log: No API key configured; .*WANDB_MODE"):
        log_two_steps(logger)


def test_wandb_without_an_account_is_refused_before_the_run_starts(monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", fail)
    with pytest.raises(FolioError, match=r"--wandb_log: No API key configured; .*WANDB_MODE"):
        metrics.check_trackers(TrainConfig(wandb_log=True))


def test_tensorboard_gets_every_row_and_hides_repeated_steps(make_logger, tmp_path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, fails in ((0, False), (1, False), (1, True)):  # the next processes resume at step 1
        logger = make_logger(step)
        logger.config.tensorboard = True
        with logger if fails else contextlib.nullcontext():
            pass  # a process that fails before its first step hides nothing
        if not fails:
            log_two_steps(logger)
    events = module.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    steps = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert steps == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert [event.value for event in events.Scalars("val_loss")] == [2.125]


def test_a_failing_tracker_is_one_warning_and_training_continues(make_logger, capsys):
    def fail(*_):
        raise OSError("no space left")

    with make_logger() as logger:
        logger.trackers = [fail]
        make_step(logger, 1)
        make_step(logger, 2)
        assert [row["step"] for row in logger.rows] == [1, 2]
    assert capsys.readouterr().out.count("no space left") == 1


@pytest.mark.parametrize(
    ("setting", "package"), [("wandb_log", "wandb"), ("tensorboard", "tensorboard")]
)
def test_a_package_that_is_not_installed_is_a_one_line_error(monkeypatch, setting, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainConfig()
    metrics.check_trackers(config)
    setattr(config, setting, True)
    with pytest.raises(FolioError, match=f"--{setting}: {package} is not installed; .*pip install"):
        metrics.check_trackers(config)
