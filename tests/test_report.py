"""The banner before training and the summary after it."""

import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from engine.checkpoint import measured_on
from engine.metrics import MetricsLogger
from engine.report import (
    banner, describe_best, format_duration, indented, relative_path, summary,
)  # fmt: skip
from engine.run import TrainState
from engine.train_config import TrainConfig
from model import GPT, GPTConfig
from tests.conftest import make_step

RUN_FOLDER = Path("/runs/x")


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
        expected = f"note     on this CPU, this takes roughly {duration}; a GPU is much faster"
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
    for module in ("data.files", "engine.report", "engine.run_folder"):
        monkeypatch.setattr(f"{module}.ROOT", root)
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


def test_the_summary_says_that_the_last_evaluation_was_interrupted(tmp_path):
    state = TrainState(step=10, seconds=75.2, last_checkpoint_step=10, last_eval_step=5)
    assert summary(TrainConfig(max_iters=10), state, tmp_path).splitlines()[1::2] == [
        "stopped  10 of 10 steps, 1:15 of training; saved",
        "next     the same command with --init_from=resume, to continue",
    ]


def test_overfitting_is_recognized_in_the_mean_of_all_training_losses(make_logger):
    """Not in the few batches of two rows, which differ by chance."""
    with make_logger() as logger:
        for step, train_loss in enumerate((1.6, 1.6, 1.7, 1.6, 1.7, 1.6, 1.6, 1.55), start=1):
            make_step(logger, step, {4: 1.5, 8: 2.9}.get(step), train_loss)
    assert "overfitting" not in describe_best(logger.rows, logger.state)


def summary_after(logger: MetricsLogger, evaluations: list[tuple[int, float, float]]) -> str:
    with logger:
        for step, val_loss, train_loss in evaluations:
            make_step(logger, step, val_loss, train_loss)
    logger.state.last_checkpoint_step = logger.state.last_eval_step = logger.state.step
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
    assert text.endswith("at step 5, worse than before training (1.2000); try lower learning rates")


@pytest.mark.parametrize(
    ("val_loss", "train_loss", "ending"),
    [
        (2.9, 0.9, "it rose to 2.9000 at step 10 while the training loss fell: overfitting"),
        (2.9, 1.9, "at step 5; it rose to 2.9000 at step 10"),
        (2.9, 1.57, "at step 5; it rose to 2.9000 at step 10"),  # a fall that may be chance, too
        (1.51, 0.9, "at step 5"),  # worse by less than 1%, as it may be by chance
    ],
)
def test_the_summary_recognizes_overfitting(make_logger, val_loss, train_loss, ending):
    text = summary_after(make_logger(), [(5, 1.5, 1.6), (10, val_loss, train_loss)])
    assert text.endswith(ending)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3675, "1:01:15")])
def test_durations_are_formatted_like_a_clock(seconds, text):
    assert format_duration(seconds) == text


# --- Formatting ---


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
