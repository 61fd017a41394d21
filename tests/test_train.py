"""The training program: exact numbers, exact resuming, nothing lost."""

import bisect
import contextlib
import csv
import itertools
import json
import math
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file

import explain
import train
from configurator import FolioError, parse_overrides
from data.dataset import open_dataset, training_batch
from data.prepare import split_text, write_dataset
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, save_tokenizer
from engine import checkpoint
from engine import run as run_module
from engine.checkpoint import (
    CHECKPOINT_FILE, WEIGHTS_FILE, load_checkpoint, load_model, save_model,
)  # fmt: skip
from engine.device import choose_device
from engine.distributed import Distributed
from engine.metrics import START_ID_FILE, StepMetrics
from engine.optimizer import make_optimizer
from engine.run import (
    TrainState, build_model, check_divisible, load_dataset, make_model_config, resolve_config,
)  # fmt: skip
from engine.run_folder import (
    SETTINGS_FILE, lock_run_folder, validation_split, weights_metadata,
)  # fmt: skip
from engine.train_config import TrainConfig
from model import GPT
from tests import processes
from tests.conftest import assert_one_line_error
from tests.processes import start
from tests.test_hf_tokenizer import END, byte_level, save
from tests.test_tokenizer import toy_bpe


@pytest.fixture
def run_train(call):
    """Run train.py's main() with these flags, successfully; returns what it printed."""

    def run(*flags: str) -> str:
        result = call(train, *flags)
        assert result.returncode == 0, result.stderr
        return result.stdout

    return run


def start_training(*flags: str) -> SimpleNamespace:
    """The parts that train.main() makes before the loop, for a run from scratch."""
    run = SimpleNamespace(state=TrainState(), dist=Distributed())
    run.config = resolve_config(parse_overrides(TrainConfig, list(flags)))
    run.device = choose_device(run.config.device, run.config.dtype, run.config.compile)
    run.dataset = load_dataset(run.config)
    run.model = build_model(
        run.config, make_model_config(run.config, run.dataset, run.device), run.device
    )
    run.optimizer = make_optimizer(run.model, run.config, run.device.dtype)
    run.scaler = run.device.grad_scaler()
    return run


def batches_of(run: SimpleNamespace) -> train.Batches:
    return train.training_batches(run.dataset.train, run.config, 0, run.device, run.dist)


def train_step(run: SimpleNamespace, batches: train.Batches, step: int = 0) -> StepMetrics:
    return train.train_step(
        run.model, run.optimizer, run.scaler, batches, run.config, step, run.device, run.dist
    )


def evaluate(run: SimpleNamespace) -> tuple[float, float]:
    return train.evaluate(run.model, run.dataset, run.config, run.device, run.dist)


def read_log(folder: Path) -> list[dict[str, str]]:
    with open(folder / "log.csv", newline="") as file:
        return list(csv.DictReader(file))


def without_times(rows) -> list[dict[str, str]]:
    return [{k: v for k, v in row.items() if "second" not in k} for row in rows]


def assert_same_state(left: dict, right: dict) -> None:
    assert left.keys() == right.keys()
    for key in left.keys() - {"seconds", "settings"}:
        if isinstance(left[key], dict):
            assert_same_state(left[key], right[key])
        elif isinstance(left[key], torch.Tensor):
            assert torch.equal(left[key], right[key]), key
        else:
            assert left[key] == right[key], key


# --- The learning rate ---


def test_the_learning_rate_warms_up_then_decays_to_zero():
    config = TrainConfig(max_iters=10, warmup_iters=2)
    multipliers = [train.get_lr_multiplier(step, config) for step in range(10)]
    assert multipliers == [0.5, 1.0, 1.0, 7 / 8, 6 / 8, 5 / 8, 4 / 8, 3 / 8, 2 / 8, 1 / 8]
    assert train.get_lr_multiplier(0, TrainConfig(max_iters=1, warmup_iters=0)) == 1
    assert train.get_lr_multiplier(0, TrainConfig(max_iters=1, warmup_iters=5)) == 1 / 5


def test_the_learning_rate_can_stay_constant_or_decay_to_a_minimum():
    constant = TrainConfig(max_iters=10, warmup_iters=2, decay_lr=False)
    assert [train.get_lr_multiplier(s, constant) for s in (0, 1, 5, 9)] == [0.5, 1, 1, 1]
    config = TrainConfig(max_iters=10, warmup_iters=2, learning_rate=0.5, min_lr=0.1)
    # From 1 at step 2 in a straight line to 0.1 / 0.5 = 0.2 at step 10: 0.6 in the middle.
    assert train.get_lr_multiplier(6, config) == pytest.approx(0.6)
    assert train.get_lr_multiplier(10, config) == pytest.approx(0.2)
    with pytest.raises(FolioError, match=r"min_lr=0.2 must not exceed learning_rate=0.1"):
        TrainConfig(learning_rate=0.1, min_lr=0.2)


def test_heads_that_do_not_divide_the_channels_are_refused_with_sizes_that_fit():
    with pytest.raises(FolioError, match="n_head=3; try --n_head=2 or --n_embd=129"):
        TrainConfig(n_embd=128, n_head=3)


# --- One run ---


def test_a_run_takes_max_iters_steps_and_writes_its_folder(tiny_flags, tmp_path, call):
    result = call(train, *tiny_flags, loss_png=True)
    assert result.returncode == 0, result.stderr
    folder = tmp_path / "run"
    assert {path.name for path in folder.iterdir()} == {
        "README.md", "config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "generation_config.json", "settings.json", "resume.pt", "log.csv", "loss.png",
        "start_id.txt",
    }  # fmt: skip
    rows = read_log(folder)
    assert list(rows[0]) == [
        "step", "tokens", "seconds", "train_loss", "val_loss", "learning_rate", "grad_norm",
        "tokens_per_second", "bits_per_byte",
    ]  # fmt: skip
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6, 8]
    assert [int(row["tokens"]) for row in rows] == [32 * s for s in (0, 2, 4, 6, 8)]
    assert [bool(row["val_loss"]) for row in rows] == [True, False, True, False, True]
    assert load_checkpoint(folder)["train_state"]["step"] == 8
    assert "8 of 8 steps" in result.stdout
    assert "python sample.py" in result.stdout
    assert (folder / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_the_folder_keeps_the_weights_of_the_lowest_validation_loss(
    tiny_flags, tmp_path, run_train, monkeypatch
):
    losses, seen = iter([0.5, 1.0, 2.0]), []

    def evaluate(model, *_):
        seen.append({name: p.detach().clone() for name, p in model.named_parameters()})
        return next(losses), 1.0

    monkeypatch.setattr(train, "evaluate", evaluate)
    run_train(*tiny_flags)
    state = load_checkpoint(tmp_path / "run")["train_state"]
    # Step 0 had the lowest loss, but weights that were not trained are never the best.
    assert (state["best_val_loss"], state["best_step"]) == (1.0, 4)
    for name, kept in load_model(tmp_path / "run").named_parameters():
        assert torch.equal(kept, seen[1][name]), name
        assert not torch.equal(kept, seen[2][name]), name


def test_the_validation_loss_counts_every_token_once(tiny_flags):
    run = start_training(*tiny_flags, "--eval_tokens=0", "--dtype=float64")
    tokens, T = run.dataset.val, run.config.block_size
    total, count = 0.0, 0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, T):
            first = min(start, len(tokens) - 1 - T)  # the last window overlaps the one before
            window = torch.from_numpy(tokens.windows(np.array([first]), T + 1))
            logits = run.model(window[:, :-1])
            losses = -torch.log_softmax(logits[0], dim=-1)[torch.arange(T), window[0, 1:]]
            total += losses[start - first :].sum().item()
            count += T - (start - first)
    assert count == len(tokens) - 1
    loss, bits_per_byte = evaluate(run)
    assert loss == pytest.approx(total / count, rel=1e-12)
    assert bits_per_byte == pytest.approx(loss / math.log(2), rel=1e-12)  # a character is one byte


def test_bits_per_byte_count_the_bytes_of_the_predicted_tokens(tiny_flags, tmp_path):
    text = "low lower é 🙂\n" * 90  # with tokens of one byte, of several, and of none
    splits = {"train": [text, None], "val": [text, None]}
    write_dataset(tmp_path / "bpe", toy_bpe(), splits, {"source": "a test"})
    run = start_training(*tiny_flags, f"--dataset={tmp_path / 'bpe'}", "--eval_tokens=0")
    loss, bits_per_byte = evaluate(run)
    ids = toy_bpe().encode(text)
    predicted = text.encode()[len(toy_bpe().token_bytes(int(ids[0]))) :]  # all but the first token
    nats = loss * len(ids)  # the end-of-text token is predicted too
    assert bits_per_byte == pytest.approx(nats / math.log(2) / len(predicted), rel=1e-9)


def test_micro_batches_are_averaged(tiny_flags):
    run = start_training(*tiny_flags, "--dtype=float64", "--gradient_accumulation_steps=3")
    batches = list(itertools.islice(batches_of(run), 3))
    mean = sum(run.model(*batch) for batch in batches) / 3
    mean.backward()
    norm = math.sqrt(sum(p.grad.square().sum().item() for p in run.model.parameters()))
    run.model.zero_grad()
    metrics = train_step(run, iter(batches))
    assert metrics.loss == pytest.approx(mean.item(), rel=1e-12)
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-9)


def test_each_step_starts_without_the_gradients_of_the_last(tiny_flags):
    """With a learning rate of 0, the same batch has the same gradient twice."""
    rates = ("--learning_rate=0", "--muon_learning_rate=0", "--dtype=float64")
    run = start_training(*tiny_flags, *rates)
    batch = next(batches_of(run))
    first, second = (train_step(run, iter([batch])) for _ in range(2))
    assert second.grad_norm == first.grad_norm


def test_random_numbers_depend_on_the_step_alone_also_without_dropout(tiny_flags):
    """A changed model.py may draw some."""
    losses = []
    for seed, step in ((1, 3), (2, 3), (2, 4)):
        run = start_training(*tiny_flags, "--dropout=0")
        run.model.transformer.ln_f.register_forward_hook(
            lambda module, args, output: torch.nn.functional.dropout(output, 0.5)
        )
        batches = itertools.repeat(next(batches_of(run)))
        torch.manual_seed(seed)
        losses.append(train_step(run, batches, step).loss)
    assert losses[0] == losses[1] != losses[2]


def test_evaluation_uses_no_dropout(tiny_flags):
    run = start_training(*tiny_flags, "--dropout=0.5", "--dtype=float64")
    without = start_training(*tiny_flags, "--dropout=0", "--dtype=float64")
    assert evaluate(run) == evaluate(run) == evaluate(without)
    assert run.model.training  # training continues with dropout


def test_training_equals_the_simplest_loop(tiny_flags, tmp_path, run_train):
    """Forward, backward, clip, step: with AdamW in float64, the same weights after 8 steps."""
    flags = (*tiny_flags, "--optimizer=adamw", "--dtype=float64", "--weight_decay=0")
    run_train(*flags, "--gradient_accumulation_steps=2")
    run = start_training(*flags)
    model, config = run.model, run.config
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99), weight_decay=0)
    for step in range(8):
        optimizer.param_groups[0]["lr"] = 5e-3 * min((step + 1) / 2, (8 - step) / 6, 1)
        optimizer.zero_grad()
        for micro_batch in range(2):
            batch = training_batch(
                run.dataset.train, config.batch_size, config.block_size, 1337, step, micro_batch
            )
            loss = model(*batch) / 2
            loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    trained = load_checkpoint(tmp_path / "run")["model"]
    for name, parameter in model.state_dict().items():
        torch.testing.assert_close(parameter, trained[name], rtol=1e-9, atol=1e-12)


# --- Resuming ---


EVERYTHING = ("--dropout=0.2", "--gradient_accumulation_steps=2")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    """Runs of tiny_flags with EVERYTHING, one for each optimizer, made once for all tests."""
    from tests.conftest import make_tiny_flags, prepare_tiny_dataset

    home = tmp_path_factory.mktemp("uninterrupted")
    dataset = prepare_tiny_dataset(home / "tiny_dataset")

    def run(optimizer: str) -> tuple[list[str], Path]:
        folder = home / optimizer
        flags = [*make_tiny_flags(dataset, folder), *EVERYTHING, f"--optimizer={optimizer}"]
        if not folder.exists():
            result = start((processes.run_train, flags, {})).wait()
            assert result.exit_codes == [0], result.stderr
        return flags, folder

    return run


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_by_bit(
    uninterrupted, tmp_path, run_train, optimizer
):
    flags, reference = uninterrupted(optimizer)
    interrupted = tmp_path / "interrupted"
    flags = [*flags, f"--out_dir={interrupted}"]
    stop_after(3, flags)
    assert load_checkpoint(interrupted)["train_state"]["step"] == 3
    run_train(*flags, "--init_from=resume")
    assert_same_state(load_checkpoint(reference), load_checkpoint(interrupted))
    assert_same_state(load_file(reference / WEIGHTS_FILE), load_file(interrupted / WEIGHTS_FILE))
    assert without_times(read_log(reference)) == without_times(read_log(interrupted))


def stop_after(n_steps: int, flags: list[str]) -> None:
    """Run train.py, and send it SIGTERM during training step number `n_steps`."""
    stopped = start((train_with_sigterm, (n_steps, flags), {})).wait()
    assert stopped.exit_codes == [143], stopped.stderr
    assert "stopped" in stopped.stdout
    assert "--init_from=resume" in stopped.stdout


def train_with_sigterm(n_steps: int, flags: list[str]) -> None:
    train_step, steps = train.train_step, itertools.count(1)

    def train_step_with_sigterm(*args):
        if next(steps) == n_steps:
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    train.train_step = train_step_with_sigterm  # in a process of its own
    processes.run_train(*flags)


def test_evaluations_and_samples_do_not_change_training(uninterrupted, tmp_path, run_train):
    flags, reference = uninterrupted("muon")
    run_train(
        *flags, f"--out_dir={tmp_path / 'other'}", "--eval_interval=3", "--sample_tokens=0",
        "--log_interval=1", "--eval_tokens=8",
    )  # fmt: skip
    left, right = load_checkpoint(reference), load_checkpoint(tmp_path / "other")
    assert_same_state(left["model"], right["model"])
    assert_same_state(left["optimizer"], right["optimizer"])


def test_another_seed_gives_other_weights_and_batches(tiny_flags):
    runs = [start_training(*tiny_flags, f"--seed={seed}") for seed in (1, 1, 2)]
    first, same, other = (run.model.transformer.wte.weight for run in runs)
    assert torch.equal(first, same) and not torch.equal(first, other)
    first, same, other = (next(batches_of(run))[0] for run in runs)
    assert torch.equal(first, same) and not torch.equal(first, other)


def test_auto_resumes_a_run_or_starts_one(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags, "--init_from=auto", "--max_iters=4")
    output = run_train(*tiny_flags, "--init_from=auto", "--max_iters=6")
    assert "resuming with max_iters = 6 (was 4)" in output
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 6


def test_resuming_uses_the_saved_settings(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    run_train(f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=9")
    settings = json.loads((tmp_path / "run" / SETTINGS_FILE).read_text())
    assert (settings["n_embd"], settings["max_iters"]) == (16, 9)


@pytest.mark.parametrize("damage", [None, '{"n_layer": 2,'])
def test_a_run_resumes_without_its_settings_json(tiny_flags, tmp_path, run_train, damage):
    run_train(*tiny_flags, "--max_iters=4", "--weight_decay=0.3")
    path = tmp_path / "run" / SETTINGS_FILE
    path.write_text(damage) if damage else path.unlink()
    flags = (f"--out_dir={tmp_path / 'run'}", "--init_from=resume", "--max_iters=8")
    assert "moved or deleted" not in run_train(*flags)
    assert json.loads(path.read_text())["weight_decay"] == 0.3


def test_a_resume_that_fails_before_its_first_step_leaves_the_settings_unchanged(
    tiny_flags, tmp_path, run_train, call, monkeypatch
):
    run_train(*tiny_flags, "--max_iters=4")
    settings = (tmp_path / "run" / SETTINGS_FILE).read_text()

    def out_of_memory(*_):
        raise torch.OutOfMemoryError

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", out_of_memory)
        result = call(train, *tiny_flags, "--init_from=resume", "--max_iters=8", "--batch_size=9")
    assert_one_line_error(result, "out of memory")
    assert (tmp_path / "run" / SETTINGS_FILE).read_text() == settings


@pytest.mark.parametrize(("fails", "used"), [("save_checkpoint", 0.1), ("write_text", 5.0)])
def test_the_settings_of_a_resumed_run_are_those_of_its_checkpoint(
    tiny_flags, tmp_path, run_train, call, monkeypatch, fails, used
):
    """Also if a resume with other settings was killed, or the disk full, while it saved."""
    run_train(*tiny_flags, "--max_iters=4", "--weight_decay=0.1")

    def disk_full(*_):
        raise FolioError("the disk is full")

    flags = (f"--out_dir={tmp_path / 'run'}", "--init_from=resume")
    with monkeypatch.context() as patch:
        patch.setattr(run_module, fails, disk_full)
        result = call(train, *flags, "--max_iters=8", "--weight_decay=5")
        assert_one_line_error(result, "the disk is full")
    output = run_train(*flags, "--max_iters=12")
    notice = "settings.json has weight_decay = 0.1, but resume.pt 5.0, which is used"
    assert (notice in output) == (used == 5)
    assert json.loads((tmp_path / "run" / SETTINGS_FILE).read_text())["weight_decay"] == used
    assert load_checkpoint(tmp_path / "run")["settings"]["weight_decay"] == used


def test_resuming_with_other_rates_trains_with_them(tiny_flags, tmp_path, run_train):
    """Loading the optimizer's state must not bring back the rates of the checkpoint."""
    run_train(*tiny_flags, "--max_iters=4")
    rates = ("--learning_rate=1e-3", "--muon_learning_rate=5e-3", "--weight_decay=0.7")
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=8", *rates)
    parts = load_checkpoint(tmp_path / "run")["optimizer"]
    groups = [group for name in ("Muon", "AdamW") for group in parts[name]["param_groups"]]
    assert [group["initial_lr"] for group in groups] == [5e-3, 1e-3, 1e-3]
    assert [group["weight_decay"] for group in groups] == [0.7, 0.7, 0]


def test_resuming_refuses_another_architecture(tiny_flags, run_train, call):
    run_train(*tiny_flags)
    for flag in ("--n_layer=3", "--block_size=16", "--bias"):
        result = call(train, *tiny_flags, flag, "--init_from=resume")
        assert_one_line_error(result, flag.partition("=")[0], "cannot change")


def test_resuming_a_finished_run_changes_nothing(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    before = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()
    output = run_train(*tiny_flags, "--init_from=resume")
    assert "8 of 8 steps" in output
    assert (tmp_path / "run" / CHECKPOINT_FILE).read_bytes() == before


def test_a_run_from_scratch_moves_an_older_run_aside(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    output = run_train(*tiny_flags)
    assert "run.1" in output
    assert (tmp_path / "run.1" / WEIGHTS_FILE).exists()


def test_a_restarted_job_resumes_although_it_says_scratch(tiny_flags, tmp_path, call, monkeypatch):
    stop_after(4, tiny_flags)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    result = call(train, *tiny_flags)
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "run.1").exists()
    rows = read_log(tmp_path / "run")
    assert [int(row["step"]) for row in rows] == [0, 2, 4, 6, 8]


def test_a_restarted_finetuning_job_resumes_its_own_run_only(
    tiny_flags, tmp_path, run_train, call, monkeypatch
):
    """It may have been refused when it started first, while an older run was in its folder."""
    run_train(*tiny_flags)
    for name in ("weights", "tuned"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    flags = [f"--init_from={tmp_path / 'weights'}", f"--out_dir={tmp_path / 'tuned'}"]
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "starting from" in run_train(*tiny_flags, *flags, "--max_iters=4")
    assert (tmp_path / "tuned.1").exists()
    assert "resuming with max_iters = 6" in run_train(*tiny_flags, *flags, "--max_iters=6")
    assert "resuming with max_iters = 8" in run_train(*tiny_flags, *flags, "--max_iters=8")
    assert not (tmp_path / "tuned.2").exists()
    settings = json.loads((tmp_path / "tuned" / "settings.json").read_text())
    assert settings["init_from"] == str(tmp_path / "weights")


def test_a_restarted_job_from_scratch_does_not_continue_a_finetuned_run(
    tiny_flags, tmp_path, run_train, monkeypatch
):
    run_train(*tiny_flags)
    flags = (*tiny_flags, f"--out_dir={tmp_path / 'tuned'}")
    run_train(*flags, f"--init_from={tmp_path / 'run'}")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert "the previous run is now in" in run_train(*flags, "--max_iters=6")
    assert "resuming with max_iters = 8" in run_train(*flags, "--max_iters=8")


def test_resuming_in_a_new_run_without_checkpoint_names_the_run_that_was_moved_aside(
    tiny_flags, tmp_path, run_train, call, monkeypatch
):
    """--init_from=resume was forgotten, and the new run was stopped at once."""
    run_train(*tiny_flags)
    with monkeypatch.context() as patch:
        patch.setattr(train, "build_model", lambda *_: sys.exit(130))
        call(train, *tiny_flags)
    result = call(train, *tiny_flags, "--init_from=resume")
    where = f"--init_from=resume --out_dir={tmp_path / 'run.1'}"
    assert_one_line_error(result, "no checkpoint to resume from", where)


def test_resuming_drops_log_rows_after_the_checkpoint(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    log = tmp_path / "run" / "log.csv"
    complete = log.read_text()
    log.write_text(complete + "9,288,1,1.0,,1e-3,1.0,100,\n10,32")  # written before a kill
    run_train(*tiny_flags, "--init_from=resume")
    assert without_times(read_log(tmp_path / "run")) == without_times(
        csv.DictReader(complete.splitlines())
    )


def test_resuming_refuses_another_text_under_the_same_name(tiny_flags, tmp_path, run_train, call):
    for text in ("to be or not to be\n", "not to be or to be\n"):
        splits = {"train": [text * 9], "val": [text]}
        write_dataset(tmp_path / "mine", CharTokenizer.from_text(text), splits, {"source": "test"})
        flags = [*tiny_flags, f"--dataset={tmp_path / 'mine'}"]
        if text.startswith("to"):
            run_train(*flags)
    assert_one_line_error(
        call(train, *flags, "--init_from=resume"), "continue on --dataset=", "mine.1"
    )


def test_resuming_refuses_a_dataset_with_more_shards(tiny_flags, tiny_dataset, run_train, call):
    """Windows are numbered through all shards: with one shard more, all batches change."""
    (tiny_dataset / "train.bin").rename(tiny_dataset / "train_0.bin")
    run_train(*tiny_flags, "--max_iters=4")
    shutil.copy(tiny_dataset / "train_0.bin", tiny_dataset / "train_1.bin")
    assert_one_line_error(call(train, *tiny_flags, "--init_from=resume"), "has changed since")


def test_a_run_continues_with_its_dataset_under_another_name(
    tiny_flags, tmp_path, tiny_dataset, run_train, call
):
    run_train(*tiny_flags, "--max_iters=4")
    tiny_dataset.rename(tmp_path / "renamed")
    flags = (*tiny_flags, "--init_from=resume", "--max_iters=8")
    assert_one_line_error(call(train, *flags), "not found")
    run_train(*flags, f"--dataset={tmp_path / 'renamed'}")
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 8


def test_snapshots_after_the_checkpoint_are_renamed_when_training_goes_on(
    tiny_flags, tmp_path, run_train
):
    run_train(*tiny_flags, "--max_iters=4", "--snapshot_interval=2")
    folder = tmp_path / "run"
    old = (folder / "step_000004" / WEIGHTS_FILE).read_bytes()
    shutil.copytree(folder / "step_000004", folder / "step_000006")  # of a try that was killed
    flags = ("--init_from=resume", "--max_iters=8")
    assert "step_000006.1" in run_train(*tiny_flags, *flags, "--snapshot_interval=3")
    names = sorted(path.name for path in folder.glob("step_*"))
    assert names == ["step_000002", "step_000004", "step_000006", "step_000006.1"]
    assert (folder / "step_000006.1" / WEIGHTS_FILE).read_bytes() == old
    assert (folder / "step_000006" / WEIGHTS_FILE).read_bytes() != old


def test_training_continues_without_a_snapshot_that_cannot_be_written(
    tiny_flags, tmp_path, run_train
):
    run_train(*tiny_flags, "--max_iters=4")
    (tmp_path / "run" / "step_000005").touch()  # a file where a folder is needed
    flags = ("--init_from=resume", "--max_iters=8", "--snapshot_interval=1")
    output = " ".join(run_train(*tiny_flags, *flags).split())
    assert "step_000005: this folder cannot be created" in output
    assert "the run goes on" in output
    folders = sorted(path.parent.name for path in (tmp_path / "run").glob("step_*/*.safetensors"))
    assert folders == ["step_000006", "step_000007", "step_000008"]
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 8


def test_resuming_refuses_other_tokens_of_the_same_number(
    tiny_flags, tiny_dataset, run_train, call
):
    run_train(*tiny_flags, "--max_iters=4")
    tokens = np.fromfile(tiny_dataset / "train.bin", dtype="<u2")
    tokens[::-1].tofile(tiny_dataset / "train.bin")
    assert_one_line_error(call(train, *tiny_flags, "--init_from=resume"), "has changed since")


def test_a_validation_loss_that_is_nan_does_not_prevent_saving(
    tiny_flags, tmp_path, call, monkeypatch
):
    """In float16, one window of the validation text may overflow."""
    step_function = train.train_step

    def train_step_with_signal(*args):
        if args[5] == 4:  # the fifth step
            os.kill(os.getpid(), signal.SIGTERM)
        return step_function(*args)

    monkeypatch.setattr(train, "train_step", train_step_with_signal)
    monkeypatch.setattr(train, "evaluate", lambda *_: (math.nan, math.nan))
    result = call(train, *tiny_flags)
    assert result.returncode == 143
    assert "stopped  5 of 8 steps, 0:00 of training; saved\n" in result.stdout
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 5


def test_weights_that_a_step_has_destroyed_never_replace_the_checkpoint(
    tiny_flags, tmp_path, call, run_train, monkeypatch
):
    step_function = train.train_step

    def train_step_that_diverges(model, *args):
        metrics = step_function(model, *args)
        if args[4] == 5:  # the sixth step; its loss, before it, is finite
            with torch.no_grad():
                model.transformer.ln_f.weight.mul_(math.inf)
        return metrics

    monkeypatch.setattr(train, "train_step", train_step_that_diverges)
    flags = (*tiny_flags, "--checkpoint_interval=1")
    assert_one_line_error(call(train, *flags), "step 6: the loss is nan")
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 5
    output = run_train(*flags, "--max_iters=6")
    assert "done     6 of 6 steps" in output and "; not saved: resume.pt is of step 5" in output
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 5


def test_best_weights_that_are_newer_than_the_checkpoint_are_kept(tiny_flags, tmp_path, run_train):
    """As after a kill between the two. They would lose to the older, higher loss."""
    run_train(*tiny_flags, "--max_iters=4")
    folder = tmp_path / "run"
    save_model(load_model(folder), folder, step=8, val_loss=0.5)
    before = (folder / WEIGHTS_FILE).read_bytes()
    output = run_train(*tiny_flags, "--init_from=resume")
    assert "(best 0.5000, step 8)" in output  # step 8 is evaluated again: another loss
    words = " ".join(output.split())  # and this is no overfitting:
    assert "best validation loss 0.5000 on the first 64 validation tokens at step 8 next" in words
    assert (folder / WEIGHTS_FILE).read_bytes() == before


@pytest.mark.parametrize(
    "intervals",  # what comes next: a row of log.csv, an evaluation, a checkpoint
    [["--log_interval=2"], ["--log_interval=9"], ["--log_interval=9", "--checkpoint_interval=2"]],
)
def test_a_run_whose_folder_was_deleted_does_not_write_into_the_run_of_another_process(
    tiny_flags, tmp_path, call, monkeypatch, intervals
):
    """`rm -rf out` deletes the lock file, too: then another process can start a run there."""
    folder, train_step = tmp_path / "home" / "run", train.train_step
    with contextlib.ExitStack() as other_process:

        def delete_folder(*args):
            shutil.rmtree(folder.parent)
            other_process.enter_context(lock_run_folder(folder))
            folder.mkdir()
            (folder / START_ID_FILE).write_text("of another process")
            monkeypatch.setattr(train, "train_step", train_step)
            return train_step(*args)

        monkeypatch.setattr(train, "train_step", delete_folder)
        result = call(train, *tiny_flags, f"--out_dir={folder}", *intervals)
    assert_one_line_error(result, "another process has started a run here")
    assert [path.name for path in folder.iterdir()] == [START_ID_FILE]


def test_a_kill_between_weights_and_model_card_leaves_no_old_card(
    tiny_flags, tmp_path, call, run_train, monkeypatch
):
    def killed_at_the_end(*args, step, **numbers):
        if step == 8:
            raise SystemExit
        checkpoint.save_model_card(*args, step=step, **numbers)

    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_model_card", killed_at_the_end)
        call(train, *tiny_flags)
    card = tmp_path / "run" / "README.md"
    assert "8 of 8 steps" not in card.read_text()
    run_train(*tiny_flags, "--init_from=resume")
    assert "8 of 8 steps" in card.read_text()


def test_an_older_run_is_moved_aside_before_the_model_is_built_but_not_for_a_typo(
    tiny_flags, tmp_path, run_train, call, monkeypatch
):
    """Else a restarted job would resume the older run."""
    run_train(*tiny_flags)
    assert call(train, *tiny_flags, "--dataset=typo").returncode == 2
    assert (tmp_path / "run" / WEIGHTS_FILE).exists()
    monkeypatch.setattr(train, "build_model", lambda *_: 1 / 0)
    for number, source in ((1, "scratch"), (2, str(tmp_path / "run.1"))):
        with pytest.raises(ZeroDivisionError):
            call(train, *tiny_flags, f"--init_from={source}")
        assert (tmp_path / f"run.{number}" / WEIGHTS_FILE).exists()
        shutil.copytree(tmp_path / "run.1", tmp_path / "run", dirs_exist_ok=True)


@pytest.mark.parametrize("name", ["run", "run/step_000004"])
def test_finetuning_a_model_into_its_own_folder_is_refused(
    tiny_flags, tmp_path, run_train, call, name
):
    run_train(*tiny_flags, "--snapshot_interval=4")
    result = call(train, *tiny_flags, f"--init_from={tmp_path / name}")
    assert_one_line_error(result, "--init_from=", "is in the run folder itself", "--out_dir")
    assert (tmp_path / name / WEIGHTS_FILE).exists()


def test_a_run_that_another_process_has_made_in_the_meantime_is_moved_aside(
    tiny_flags, tmp_path, run_train, monkeypatch
):
    """That process has lost its lock: its folder was moved aside, and it goes on in a new one."""
    run_train(*tiny_flags)
    build_model = train.build_model

    def build_while_the_other_process_saves(*args):
        shutil.copytree(tmp_path / "run.1", tmp_path / "run")
        return build_model(*args)

    monkeypatch.setattr(train, "build_model", build_while_the_other_process_saves)
    run_train(*tiny_flags, "--seed=2")
    for name, seed in (("run.1", 1337), ("run.2", 1337), ("run", 2)):
        assert load_checkpoint(tmp_path / name)["settings"]["seed"] == seed


def test_a_run_that_was_moved_continues_where_it_is_now(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags, "--max_iters=4")
    (tmp_path / "run").rename(tmp_path / "moved")
    run_train(*tiny_flags, "--init_from=resume", f"--out_dir={tmp_path / 'moved'}")
    assert load_checkpoint(tmp_path / "moved")["train_state"]["step"] == 8
    assert not (tmp_path / "run").exists()


def test_resuming_with_other_eval_tokens_is_refused_but_measuring_is_not(
    tiny_flags, tmp_path, run_train, call
):
    """Losses on different windows cannot be compared: the best weights could be lost."""
    run_train(*tiny_flags)
    files = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    flags = (*tiny_flags, "--init_from=resume", "--eval_tokens=128", "--max_iters=12")
    assert_one_line_error(call(train, *flags), "resuming cannot change eval_tokens, which is 64")
    run = start_training(*tiny_flags, "--eval_tokens=128")
    run.model.load_state_dict(load_checkpoint(tmp_path / "run")["model"])
    expected = f"validation loss {evaluate(run)[0]:.4f} "
    assert expected in run_train(*flags, "--eval_only")
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == files


def test_a_run_resumes_after_its_folder_was_moved_and_no_later_weights_were_better(
    tiny_flags, tmp_path, run_train, call, monkeypatch
):
    """Then the folder has the last weights, which were not evaluated."""
    train_step = train.train_step

    def move_folder_and_stop(*args):
        if args[5] == 5:
            (tmp_path / "run").rename(tmp_path / "moved")
            os.kill(os.getpid(), signal.SIGTERM)
        return train_step(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", move_folder_and_stop)
        assert call(train, *tiny_flags).returncode == 143
    assert weights_metadata(tmp_path / "run") == {"step": 6}
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=12")
    assert weights_metadata(tmp_path / "run").keys() == {"step", "val_loss", "val_checksum"}


@pytest.mark.parametrize("numbers", [{}, {"step": "abc", "val_loss": "low"}, {"val_loss": "nan"}])
def test_best_weights_of_another_program_are_not_overwritten_when_the_run_resumes(
    tiny_flags, tmp_path, run_train, call, numbers
):
    """Their loss is unknown. Without them, the next evaluation saves weights."""
    run_train(*tiny_flags, "--max_iters=4")
    weights = tmp_path / "run" / WEIGHTS_FILE
    save_model(load_model(tmp_path / "run"), tmp_path / "run", **numbers)
    before = weights.read_bytes()
    result = call(train, *tiny_flags, "--init_from=resume", "--max_iters=8")
    assert_one_line_error(result, WEIGHTS_FILE, "another program", "move this file away")
    assert weights.read_bytes() == before
    weights.unlink()
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=8")
    assert weights_metadata(tmp_path / "run")["step"] == 8


def test_best_weights_that_cannot_be_read_are_not_overwritten_when_the_run_resumes(
    tiny_flags, tmp_path, run_train, call
):
    run_train(*tiny_flags, "--max_iters=4")
    weights = tmp_path / "run" / WEIGHTS_FILE
    weights.write_bytes(b"unreadable")
    result = call(train, *tiny_flags, "--init_from=resume", "--max_iters=8")
    assert_one_line_error(result, WEIGHTS_FILE, "cannot be read", "move it away")
    assert weights.read_bytes() == b"unreadable"
    weights.unlink()
    assert "8 of 8 steps" in run_train(*tiny_flags, "--init_from=resume", "--max_iters=8")


def test_resuming_may_change_the_dtype(tiny_flags, run_train):
    run_train(*tiny_flags, "--max_iters=2")
    output = run_train(*tiny_flags, "--max_iters=4", "--init_from=resume", "--dtype=float16")
    assert "resuming with dtype = float16" in output


# --- Learning ---


def test_a_markov_text_is_learned_to_its_entropy(tmp_path, run_train):
    """Each letter depends only on the one before it, so the best possible loss is known."""
    rng = np.random.default_rng(0)
    n = 6
    transition = rng.dirichlet(np.full(n, 0.2), size=n)  # row: probabilities of the next letter
    cumulative = [row.cumsum().tolist() for row in transition]
    letters, letter = [], 0
    for u in rng.random(60_000):
        letter = min(bisect.bisect_left(cumulative[letter], u), n - 1)
        letters.append("abcdef"[letter])
    frequency = np.linalg.matrix_power(transition, 200)[0]  # of each letter, in the long run
    entropy = -(frequency[:, None] * transition * np.log(transition)).sum()  # nats per letter

    text = "".join(letters)
    tokenizer = CharTokenizer.from_text(text)
    write_dataset(tmp_path / "markov", tokenizer, split_text(text), {"source": "random"})
    run_train(
        f"--dataset={tmp_path / 'markov'}", f"--out_dir={tmp_path / 'run'}", "--device=cpu",
        "--n_layer=1", "--n_head=2", "--n_embd=32", "--block_size=16", "--batch_size=32",
        "--max_iters=250", "--eval_interval=250", "--learning_rate=1e-2", "--sample_tokens=0",
    )  # fmt: skip
    first, last = (float(row["val_loss"]) for row in read_log(tmp_path / "run") if row["val_loss"])
    assert first == pytest.approx(math.log(n), rel=0.05)  # at first, all letters are equally likely
    assert last == pytest.approx(entropy, rel=0.03)
    assert entropy < 0.75 * math.log(n)


def test_patience_stops_after_evaluations_without_improvement(
    tiny_flags, tmp_path, run_train, monkeypatch
):
    losses = iter([4.0, 3.0, 2.0, 2.5, 2.6, 2.7])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), 1.0))
    flags = [*tiny_flags, "--max_iters=100", "--eval_interval=2", "--patience=2"]
    output = " ".join(run_train(*flags).split())  # without the ends of lines
    state = load_checkpoint(tmp_path / "run")["train_state"]
    assert (state["step"], state["best_step"]) == (8, 4)  # evaluated at 0, 2, 4, 6, 8
    assert "8 of 100 steps" in output and "2 evaluations without improvement (patience)" in output
    assert "--init_from=resume --patience=0, to continue" in output
    run_train(*flags, "--init_from=resume")  # as if it was killed before it could exit
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 8
    run_train(*flags, "--init_from=resume", "--patience=3")
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 10


def test_patience_counts_evaluations_also_if_their_interval_has_changed(
    tiny_flags, tmp_path, run_train, monkeypatch
):
    losses = iter([4.0, 2.0, 2.5, 2.6, 2.7])  # at steps 0, 8, 16, 17, 18
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), 1.0))
    flags = [*tiny_flags, "--patience=3"]
    run_train(*flags, "--max_iters=16", "--eval_interval=8")
    output = run_train(*flags, "--init_from=resume", "--max_iters=99", "--eval_interval=1")
    assert "18 of 99 steps" in output
    assert "3 evaluations without improvement" in " ".join(output.split())


def test_patience_after_a_kill_does_not_count_evaluations_before_the_best_one(
    tiny_flags, tmp_path, run_train, monkeypatch
):
    """The best weights are of step 8, and the checkpoint, from which it goes on, of step 2."""
    losses = iter([4.0, 3.0, 2.5, 2.2, 2.0, 2.5, 2.2, 2.0, 2.1, 2.2])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), 1.0))
    flags = [*tiny_flags, "--eval_interval=2", "--checkpoint_interval=100", "--patience=2"]
    run_train(*flags, "--max_iters=2")
    checkpoint_bytes = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()
    run_train(*flags, "--init_from=resume", "--max_iters=8")
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(checkpoint_bytes)
    run_train(*flags, "--init_from=resume", "--max_iters=99")
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 12


def test_an_evaluation_that_exhausts_patience_right_after_resuming_is_saved(
    tiny_flags, tmp_path, call, monkeypatch
):
    losses = iter([4.0, 2.0, 2.5, None, 2.6])  # a signal interrupts the first evaluation at step 6

    def evaluate(model, dataset, config, device, dist, threads):
        if (loss := next(losses)) is None:
            os.kill(os.getpid(), signal.SIGTERM)
            dist.shutdown.sync()
            return None
        return loss, 1.0

    monkeypatch.setattr(train, "evaluate", evaluate)
    flags = [*tiny_flags, "--max_iters=99", "--eval_interval=2", "--patience=2"]
    assert call(train, *flags, "--checkpoint_interval=4").returncode == 143
    assert call(train, *flags, "--init_from=resume").returncode == 0
    state = load_checkpoint(tmp_path / "run")["train_state"]
    assert (state["step"], state["last_eval_step"], state["evaluations_since_best"]) == (6, 6, 2)


# --- Finetuning and evaluation ---


def test_finetuning_uses_the_architecture_of_the_weights(
    tiny_flags, tmp_path, run_train, tiny_dataset
):
    run_train(*tiny_flags)
    output = run_train(
        f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'tuned'}",
        f"--dataset={tiny_dataset}", "--max_iters=1", "--block_size=4", "--dropout=0.1",
        "--device=cpu",
    )  # fmt: skip
    assert str(tmp_path / "run") in output
    assert "batches" not in output  # block_size is another one
    assert "learning rates: 0.02 (Muon: the matrices of the blocks), 0.005 (AdamW)" in output
    tuned = load_model(tmp_path / "tuned").config
    assert (tuned.n_embd, tuned.block_size, tuned.dropout) == (16, 4, 0.1)


def test_a_run_resumes_from_resume_pt_alone(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags, "--max_iters=4")
    kept = (tmp_path / "run" / CHECKPOINT_FILE).read_bytes()
    tokenizer = (tmp_path / "run" / "tokenizer_config.json").read_text()
    shutil.rmtree(tmp_path / "run")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / CHECKPOINT_FILE).write_bytes(kept)
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=8")
    assert (tmp_path / "run" / "tokenizer_config.json").read_text() == tokenizer
    (tmp_path / "run" / "tokenizer_config.json").unlink()
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=9")
    assert (tmp_path / "run" / "tokenizer_config.json").read_text() == tokenizer


def test_a_resumed_run_keeps_a_chat_template(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    path = tmp_path / "run" / "tokenizer_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "chat_template": "mine"}))
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=8")
    assert json.loads(path.read_text())["chat_template"] == "mine"


def test_training_continues_without_memory_for_a_sample(tiny_flags, tmp_path, call, monkeypatch):
    def no_memory(*args):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(train, "InferenceModel", no_memory)
    result = call(train, *tiny_flags, "--sample_tokens=5")
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("WARNING  no memory for a sample (--sample_tokens=0: none)") == 1
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] > 0


def test_finetuning_takes_no_dropout_from_the_model(tiny_flags, tmp_path, run_train):
    """As in nanoGPT. GPT-2's config.json has 0.1."""
    run_train(*tiny_flags, "--dropout=0.5", "--max_iters=0")
    run_train(*tiny_flags, f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'tuned'}")
    assert json.loads((tmp_path / "tuned" / SETTINGS_FILE).read_text())["dropout"] == 0


def test_finetuning_on_the_batches_of_the_first_training_is_told(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    flags = (*tiny_flags, f"--init_from={tmp_path / 'run'}", "--max_iters=1")
    note = "This run draws the batches on which the weights were trained."
    assert note in run_train(*flags, f"--out_dir={tmp_path / 'a'}")
    assert note not in run_train(*flags, f"--out_dir={tmp_path / 'b'}", "--seed=2")


def test_the_validation_text_of_a_run_is_not_that_of_another_preparation(
    tiny_flags, tiny_dataset, tmp_path, run_train, call
):
    run_train(*tiny_flags)
    tokenizer = load_tokenizer(tmp_path / "run")
    before = open_dataset(tiny_dataset, 8).val
    assert validation_split(tmp_path / "run", 8, tokenizer).checksum() == before.checksum()
    text = "".join(tokenizer.characters) * 50
    write_dataset(tiny_dataset, tokenizer, split_text(text), {"source": "another"})
    with pytest.raises(FolioError, match="has been prepared again since the run in"):
        validation_split(tmp_path / "run", 8, tokenizer)
    result = call(explain, f"--out_dir={tmp_path / 'run'}", f"--output={tmp_path / 'page.html'}")
    assert_one_line_error(result, "give a text with --start", "has been prepared again")
    flags = (f"--init_from={tmp_path / 'run'}", f"--out_dir={tmp_path / 'tuned'}", "--max_iters=1")
    assert "This run draws the batches" not in run_train(*tiny_flags, *flags)


def test_resuming_names_the_old_dataset_if_it_was_prepared_again(
    tiny_flags, tiny_dataset, run_train, call
):
    run_train(*tiny_flags)
    text = "another text " * 99
    splits = split_text(text)
    write_dataset(tiny_dataset, CharTokenizer.from_text(text), splits, {"source": "another"})
    result = call(train, *tiny_flags, "--init_from=resume")
    assert_one_line_error(result, "has been prepared again; continue on --dataset=", ".1")
    old = f"--dataset={tiny_dataset}.1"
    assert "done" in run_train(*tiny_flags, "--init_from=resume", "--max_iters=12", old)


def test_resuming_refuses_another_dataset_and_says_how_to_train_on_it(
    tiny_flags, tiny_dataset, tmp_path, run_train, call
):
    run_train(*tiny_flags)
    write_dataset(
        tmp_path / "b", CharTokenizer.from_text("abc "), split_text("abc " * 99), {"source": "b"}
    )
    flags = ("--init_from=resume", f"--dataset={tmp_path / 'b'}")
    result = call(train, *tiny_flags, *flags)
    assert_one_line_error(result, f"was trained on {tiny_dataset}", "use --init_from=")


def test_finetuning_refuses_a_dataset_with_another_tokenizer(tiny_flags, tmp_path, run_train, call):
    run_train(*tiny_flags)
    text = "".join(map(chr, range(40, 64))) * 20  # as many characters, but others
    tokenizer = CharTokenizer.from_text(text)
    write_dataset(tmp_path / "b", tokenizer, split_text(text), {"source": "b"})
    result = call(
        train, f"--init_from={tmp_path / 'run'}", f"--dataset={tmp_path / 'b'}",
        f"--out_dir={tmp_path / 'tuned'}",
    )  # fmt: skip
    assert_one_line_error(result, "its tokenizer is not the tokenizer of the model")
    assert not (tmp_path / "tuned").exists()


def test_finetuning_that_is_refused_leaves_the_older_run_in_its_place(
    tiny_flags, tmp_path, run_train, call
):
    run_train(*tiny_flags)
    for name in ("a", "no_weights"):
        shutil.copytree(tmp_path / "run", tmp_path / name)
    (tmp_path / "no_weights" / WEIGHTS_FILE).unlink()
    text = "".join(map(chr, range(40, 64))) * 20
    write_dataset(tmp_path / "b", CharTokenizer.from_text(text), split_text(text), {"source": "b"})
    for source, flag, message in (
        ("a", f"--dataset={tmp_path / 'b'}", "its tokenizer is not"),
        ("a", "--block_size=16", "has other sizes; use --block_size=8"),
        ("no_weights", "--max_iters=4", "there are no weights"),
    ):
        result = call(train, *tiny_flags, f"--init_from={tmp_path / source}", flag)
        assert_one_line_error(result, message)
        assert (tmp_path / "run" / CHECKPOINT_FILE).exists() and not (tmp_path / "run.1").exists()


def test_eval_only_prints_the_loss_and_writes_nothing(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags)
    folder = tmp_path / "run"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    output = run_train(*tiny_flags, "--eval_only", "--init_from=resume")
    val_loss = float(read_log(folder)[-1]["val_loss"])
    assert f"validation loss {val_loss:.4f}" in output
    assert f"perplexity {2.718281828**val_loss:,.2f}" in output
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    output = run_train(*tiny_flags, "--eval_only", "--init_from=resume", "--eval_tokens=8")
    assert output.endswith(") on the first 8 validation tokens\n")
    run_train(*tiny_flags, "--eval_only", f"--out_dir={tmp_path / 'none'}")
    assert not (tmp_path / "none").exists()


def test_eval_only_asks_which_weights_if_the_folder_holds_a_run(tiny_flags, run_train, call):
    run_train(*tiny_flags)
    assert_one_line_error(call(train, *tiny_flags, "--eval_only"), "which weights?", "=resume")
    assert "untrained" in run_train(*tiny_flags, "--eval_only", "--init_from=scratch")


def test_only_the_main_process_prints(tiny_flags, capsys):
    run = start_training(*tiny_flags, "--eval_only")
    run.dist.rank = 1
    train.evaluate_only(run.config, run.state, run.dataset, run.model, run.device, run.dist)
    assert capsys.readouterr().out == ""


def test_resolve_config_decides_where_the_weights_come_from(tiny_flags, tmp_path, capsys):
    def init_from(flag):
        return resolve_config(parse_overrides(TrainConfig, [*tiny_flags, flag])).init_from

    assert init_from("--init_from=auto") == "scratch"
    assert "no checkpoint" in capsys.readouterr().out
    with pytest.raises(FolioError, match=r"resume.pt: no checkpoint to resume from; .*scratch"):
        init_from("--init_from=resume")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "resume.pt").touch()
    with pytest.raises(FolioError, match=rf"name the run: --out_dir={tmp_path / 'other'}$"):
        init_from("--init_from=resume")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SETTINGS_FILE).touch()  # this run was killed in its first step
    with pytest.raises(FolioError, match="stopped before its first checkpoint"):
        init_from("--init_from=resume")
    (tmp_path / "run" / SETTINGS_FILE).unlink()
    for name in ("a", "b", "c", "rum"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "resume.pt").touch()
    with pytest.raises(FolioError, match=rf"name the run: --out_dir={tmp_path / 'rum'}$"):
        init_from("--init_from=resume")
    with pytest.raises(FolioError, match=r"config.json"):
        init_from(f"--init_from={tmp_path}")
    with pytest.raises(FolioError, match=r"resum.*did you mean resume\?"):
        init_from("--init_from=resum")


def test_micro_batches_must_be_divisible_by_the_number_of_processes():
    with pytest.raises(FolioError, match=r"the number of processes, 2; try .*=2 or 4$"):
        check_divisible(TrainConfig(gradient_accumulation_steps=3), 2)
    with pytest.raises(FolioError, match=r"try --gradient_accumulation_steps=8$"):
        check_divisible(TrainConfig(gradient_accumulation_steps=5), 8)
    check_divisible(TrainConfig(gradient_accumulation_steps=5, eval_only=True), 8)


# --- Stopping ---


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_ctrl_c_finishes_the_step_saves_and_exits(tiny_flags, tmp_path):
    flags = [*tiny_flags, "--max_iters=1000000", "--eval_interval=1000000"]
    job = start((processes.run_train, flags, {}))
    log = tmp_path / "run" / "log.csv"
    deadline = time.monotonic() + 60
    try:
        while not (log.exists() and log.read_text().count("\n") > 3):
            assert time.monotonic() < deadline and job.processes[0].is_alive()
            time.sleep(0.05)
        os.kill(job.processes[0].pid, signal.SIGINT)
    finally:
        result = job.wait(timeout=20)  # kills a process that does not end
    assert result.exit_codes == [130]
    assert "Traceback" not in result.stderr
    assert "stopped" in result.stdout
    step = load_checkpoint(tmp_path / "run")["train_state"]["step"]
    assert step > 0
    # Stopped before any trained weights were evaluated: the current weights are kept, not step 0's.
    weights = load_model(tmp_path / "run").transformer.wte.weight
    assert torch.equal(
        weights, load_checkpoint(tmp_path / "run")["model"]["transformer.wte.weight"]
    )


def test_a_signal_interrupts_a_long_evaluation_and_resuming_repeats_it(
    uninterrupted, tmp_path, run_train
):
    """torchrun kills a job 30 seconds after SIGTERM: an evaluation must not take them all."""
    flags, reference = uninterrupted("muon")
    flags = [*flags, f"--out_dir={tmp_path / 'run'}"]
    stopped = start((train_with_sigterm_in_evaluation, (2, flags), {})).wait()
    assert stopped.exit_codes == [143], stopped.stderr
    state = load_checkpoint(tmp_path / "run")["train_state"]
    assert (state["step"], state["last_eval_step"]) == (4, 0)
    run_train(*flags, "--init_from=resume")
    assert_same_state(load_checkpoint(reference), load_checkpoint(tmp_path / "run"))
    assert without_times(read_log(reference)) == without_times(read_log(tmp_path / "run"))


def test_an_interrupted_last_evaluation_is_repeated_and_saved(tiny_flags, tmp_path, run_train):
    flags = [*tiny_flags, "--max_iters=4", "--eval_interval=4", "--batch_size=1"]
    stopped = start((train_with_sigterm_in_evaluation, (2, flags), {})).wait()
    assert stopped.exit_codes == [143], stopped.stderr
    assert "stopped  4 of 4 steps" in stopped.stdout
    for _ in range(2):  # the second time, nothing is left to do
        run_train(*flags, "--init_from=resume")
        state = load_checkpoint(tmp_path / "run")["train_state"]
        assert (state["step"], state["last_eval_step"], state["best_step"]) == (4, 4, 4)


def train_with_sigterm_in_evaluation(number: int, flags: list[str]) -> None:
    evaluation_batches, evaluations = train.evaluation_batches, itertools.count(1)

    def batches_with_sigterm(*args):
        is_target = next(evaluations) == number
        for i, batch in enumerate(evaluation_batches(*args)):
            if is_target and i == 1:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch

    train.evaluation_batches = batches_with_sigterm  # in a process of its own
    processes.run_train(*flags)


def test_a_nan_loss_stops_before_the_weights_change(tiny_flags):
    run = start_training(*tiny_flags)
    with torch.no_grad():
        run.model.transformer.ln_f.weight[0] = math.nan
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(FolioError, match=r"step 0: the loss is nan"):
        train_step(run, batches_of(run))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter.nan_to_num(), before[name].nan_to_num()), name


def test_an_infinite_gradient_stops_before_the_weights_change(tiny_flags):
    run = start_training(*tiny_flags)
    run.model.transformer.ln_f.weight.register_hook(lambda grad: grad * math.inf)
    before = {name: p.clone() for name, p in run.model.named_parameters()}
    with pytest.raises(FolioError, match=r"step 0: the loss is \d.*gradient norm (inf|nan)"):
        train_step(run, batches_of(run))
    for name, parameter in run.model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_a_nan_evaluation_is_not_the_best(tiny_flags, tmp_path, run_train, monkeypatch):
    losses = iter([4.0, math.nan, 3.0])
    monkeypatch.setattr(train, "evaluate", lambda *_: (next(losses), 1.0))
    run_train(*tiny_flags)
    checkpoint = load_checkpoint(tmp_path / "run")
    assert checkpoint["train_state"]["best_val_loss"] == 3.0
    assert_same_state(checkpoint["model"], load_model(tmp_path / "run").state_dict())


def test_the_checkpoint_is_written_after_weights_and_log(tiny_flags, run_train, monkeypatch):
    written = []

    def recorded(name, function):
        return lambda *args, **kwargs: (written.append(name), function(*args, **kwargs))[1]

    for module, name in ((run_module, "save_model"), (train, "save_run")):
        monkeypatch.setattr(module, name, recorded(name, getattr(module, name)))
    log_row = train.MetricsLogger.log_row
    monkeypatch.setattr(train.MetricsLogger, "log_row", recorded("log_row", log_row))
    run_train(*tiny_flags, "--max_iters=2", "--log_interval=99")
    assert written == ["log_row", "save_run", "save_model", "log_row", "save_run"]


def test_a_signal_ends_a_long_sample(tiny_flags, tmp_path, call, monkeypatch):
    """torchrun kills a job 30 seconds after SIGTERM: a sample must not take them all."""
    shown = []

    def ids_with_signal(steps):
        for number, ids in enumerate(train_read_ids(steps)):
            if number == 5:
                os.kill(os.getpid(), signal.SIGTERM)
            shown.append(ids)
            yield ids

    train_read_ids = train.read_ids
    monkeypatch.setattr(train, "read_ids", ids_with_signal)
    flags = (*tiny_flags, "--sample_tokens=1000", "--checkpoint_interval=100")
    assert call(train, *flags).returncode == 143
    assert len(shown) == 6
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 1


def test_a_stopped_run_is_evaluated_when_it_ends_there(tiny_flags, tmp_path, run_train):
    stop_after(4, [*tiny_flags, "--eval_interval=100"])
    before = read_log(tmp_path / "run")
    run_train(*tiny_flags, "--init_from=resume", "--max_iters=4")
    *first, last = read_log(tmp_path / "run")
    assert [row["step"] for row in (*first, last)] == [row["step"] for row in before]
    assert float(last.pop("val_loss")) > 0 and float(last.pop("bits_per_byte")) > 0
    assert last.items() <= before[-1].items()  # no training step was added


# --- Precision ---


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float64"])
def test_every_dtype_trains(tiny_flags, dtype, optimizer):
    run = start_training(*tiny_flags, f"--dtype={dtype}", f"--optimizer={optimizer}")
    before, _ = evaluate(run)
    batches = batches_of(run)
    for step in range(8):
        train_step(run, batches, step)
    assert evaluate(run)[0] < before - 0.05
    expected = torch.float64 if dtype == "float64" else torch.float32
    assert {p.dtype for p in run.model.parameters()} == {expected}


def test_short_contexts_use_float32_attention_in_bfloat16_on_a_cpu(tiny_flags):
    for dtype, expected in (("bfloat16", True), ("float32", False)):
        run = start_training(*tiny_flags, f"--dtype={dtype}")
        assert run.model.transformer.h[0].attn.float32_attention == expected


# --- Each part of a training step ---


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_every_group_follows_the_schedule_from_its_own_peak(tiny_flags, optimizer):
    run = start_training(*tiny_flags, f"--optimizer={optimizer}", "--learning_rate=4e-3")
    batches = batches_of(run)
    for step in range(8):
        metrics = train_step(run, batches, step)
        multiplier = train.get_lr_multiplier(step, run.config)
        assert metrics.learning_rate == multiplier * 4e-3
        for group in run.optimizer.param_groups:
            peak = 0.02 if "momentum" in group else 4e-3
            assert group["lr"] == pytest.approx(multiplier * peak)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_the_gradient_is_clipped(tiny_flags, monkeypatch, dtype):
    run = start_training(*tiny_flags, "--grad_clip=0.01", f"--dtype={dtype}", "--optimizer=adamw")
    norms, step = [], run.optimizer.step

    def recorded_step(*args, **kwargs):
        squares = [p.grad.square().sum() for p in run.model.parameters()]
        norms.append(torch.stack(squares).sum().sqrt().item())
        return step(*args, **kwargs)

    monkeypatch.setattr(run.optimizer, "step", recorded_step)
    metrics = train_step(run, batches_of(run))
    assert 0.1 < metrics.grad_norm < 100  # reported unscaled and before clipping
    assert norms == [pytest.approx(0.01, rel=1e-2)]


def test_float16_stops_when_no_loss_scale_is_small_enough(tiny_flags):
    run = start_training(*tiny_flags, "--dtype=float16")
    run.model.transformer.ln_f.weight.register_hook(lambda grad: grad * math.inf)
    batches = itertools.cycle([next(batches_of(run))])
    with pytest.raises(FolioError, match="gradient norm"):
        for step in range(60):
            train_step(run, batches, step)
    assert 10 < step < 60  # it tried smaller scales first


# --- The files ---


def test_checkpoints_can_be_rarer_or_more_frequent_than_evaluations(
    tiny_flags, run_train, monkeypatch
):
    saved, save_run = [], train.save_run

    def recorded(folder, config, state, *args):
        saved.append(state.step)
        save_run(folder, config, state, *args)

    monkeypatch.setattr(train, "save_run", recorded)
    for interval, steps in ((0, [0, 4, 8]), (3, [0, 3, 6, 8]), (8, [0, 8]), (16, [0, 8])):
        saved.clear()
        run_train(*tiny_flags, f"--checkpoint_interval={interval}")
        assert saved == steps


@pytest.mark.parametrize("interval", [3, 100])
def test_resuming_is_exact_with_checkpoints_between_evaluations(
    uninterrupted, tmp_path, call, run_train, monkeypatch, interval
):
    """A run killed after step 7: resumed from step 6, or from the start."""
    flags, reference = uninterrupted("muon")
    flags = [*flags, f"--out_dir={tmp_path / 'run'}", f"--checkpoint_interval={interval}"]
    steps, step_function = itertools.count(), train.train_step

    def train_step_until_killed(*args):
        if next(steps) == 7:
            raise KeyboardInterrupt
        return step_function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step_until_killed)
        assert call(train, *flags).returncode == 130
    run_train(*flags, "--init_from=resume")
    assert_same_state(load_checkpoint(reference), load_checkpoint(tmp_path / "run"))
    assert without_times(read_log(reference)) == without_times(read_log(tmp_path / "run"))


def test_a_slow_checkpoint_says_what_it_costs(tiny_flags, run_train, monkeypatch):
    clock = itertools.count(step=2.0)  # two seconds pass between two looks at the clock
    monkeypatch.setattr(train.time, "perf_counter", lambda: next(clock))
    assert "checkpoint of 0.0 GB written in 2.0 s" in run_train(*tiny_flags)


def test_the_threads_adapt_during_an_evaluation(tiny_flags):
    run, calls = start_training(*tiny_flags), []
    threads = SimpleNamespace(after_step=lambda: calls.append(1))
    parts = (run.model, run.dataset, run.config, run.device, run.dist)
    train.evaluate(*parts, threads=threads)
    assert len(calls) == 64 / (4 * 8)  # eval_tokens / (batch_size * block_size)


def test_samples_can_be_rarer_than_evaluations(tiny_flags, run_train, monkeypatch):
    shown, show = [], train.InferenceModel
    monkeypatch.setattr(train, "InferenceModel", lambda *args: shown.append(1) or show(*args))
    flags = [*tiny_flags, "--eval_interval=1"]  # evaluations at steps 0 to 8
    for interval, number in ((1, 9), (4, 3), (5, 3), (100, 2)):
        shown.clear()
        run_train(*flags, f"--sample_interval={interval}")
        assert len(shown) == number


def test_activation_checkpointing_changes_no_number(uninterrupted, tmp_path, run_train):
    """Dropout, too, is equal when a block's forward pass is computed again."""
    flags, reference = uninterrupted("muon")
    run_train(*flags, f"--out_dir={tmp_path / 'run'}", "--activation_checkpointing")
    assert_same_state(load_checkpoint(reference), load_checkpoint(tmp_path / "run"))


def test_snapshots_of_the_weights_can_be_kept(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags, "--snapshot_interval=3")
    folders = sorted(path.name for path in (tmp_path / "run").glob("step_*"))
    assert folders == ["step_000003", "step_000006"]
    early, late = (load_model(tmp_path / "run" / name) for name in folders)
    assert not torch.equal(early.transformer.wte.weight, late.transformer.wte.weight)


def test_the_last_step_is_logged_once(tiny_flags, tmp_path, run_train):
    run_train(*tiny_flags, "--max_iters=10")  # a multiple of log_interval, not of eval_interval
    steps = [int(row["step"]) for row in read_log(tmp_path / "run")]
    assert steps == [0, 2, 4, 6, 8, 10]


@pytest.mark.parametrize(
    ("text", "documents", "start"),
    [("low\n", 20, "<|endoftext|>"), ("low\n", 1, "\n"), ("lower ", 1, " low")],
)
def test_the_folder_tells_how_a_text_begins_and_ends(
    text, documents, start, tiny_flags, tmp_path, call
):
    """A model that has seen (almost) no end-of-text does not begin with it: nor with a newline."""
    splits = {"train": [text * 999, None] * documents, "val": ["low " * 99]}
    write_dataset(tmp_path / "bpe", toy_bpe(), splits, {"source": "a test"})
    flags = [*tiny_flags, f"--dataset={tmp_path / 'bpe'}", "--max_iters=0"]
    assert call(train, *flags).returncode == 0
    tokenizer = load_tokenizer(tmp_path / "run")
    assert tokenizer.decode([tokenizer.start_token_id]) == start
    assert tokenizer.encode_prompt("").tolist() == [tokenizer.start_token_id]
    for name in ("config.json", "generation_config.json"):
        contents = json.loads((tmp_path / "run" / name).read_text())
        assert contents["bos_token_id"] == tokenizer.start_token_id
        assert contents["eos_token_id"] == 261
    assert contents["max_length"] == 8
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "run")
    assert theirs.bos_token_id == (261 if documents > 1 else None)


def test_a_text_begins_with_a_known_token_also_with_a_foreign_tokenizer(tiny_flags, tmp_path, call):
    names = dict.fromkeys(("bos_token", "eos_token"), END)
    tokenizer = load_tokenizer(save(byte_level(use_regex=False), tmp_path / "theirs", **names))
    splits = {"train": ["star\n" * 999, None], "val": ["star " * 99]}
    write_dataset(tmp_path / "foreign", tokenizer, splits, {"source": "a test"})
    flags = [*tiny_flags, f"--dataset={tmp_path / 'foreign'}", "--max_iters=0"]
    assert call(train, *flags).returncode == 0
    opened = load_tokenizer(tmp_path / "run")
    assert opened.decode([opened.start_token_id]) == "\n"
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert tokenizer.decode([config["bos_token_id"], config["eos_token_id"]]) == f"\n{END}"


def test_finetuning_and_resuming_keep_the_token_that_begins_a_text(tiny_flags, tmp_path, run_train):
    """The model knows its end-of-text from other texts, although the new text has none."""
    folders = {True: tmp_path / "many", False: tmp_path / "one"}
    for has_ends, folder in folders.items():
        splits = {"train": ["low\n", None if has_ends else "lo"] * 999, "val": ["low " * 99]}
        write_dataset(folder, toy_bpe(), splits, {"source": "a test"})
    run_train(*tiny_flags, f"--dataset={folders[True]}", "--max_iters=2")
    one, tuned = f"--dataset={folders[False]}", f"--out_dir={tmp_path / 'tuned'}"
    run_train(*tiny_flags, one, tuned, f"--init_from={tmp_path / 'run'}", "--max_iters=2")
    run_train(*tiny_flags, one, tuned, "--init_from=resume", "--max_iters=4")
    assert load_tokenizer(tmp_path / "tuned").start_token_id == 261
    run_train(*tiny_flags, one, f"--out_dir={tmp_path / 'new'}", "--max_iters=2")
    run_train(
        *tiny_flags, one, f"--out_dir={tmp_path / 'new'}", "--init_from=resume", "--max_iters=4"
    )
    tokenizer = load_tokenizer(tmp_path / "new")
    assert tokenizer.decode([tokenizer.start_token_id]) == "\n"
    assert json.loads((tmp_path / "new" / "config.json").read_text())["bos_token_id"] == ord("\n")
    many, again = f"--dataset={folders[True]}", f"--out_dir={tmp_path / 'again'}"
    run_train(*tiny_flags, many, again, f"--init_from={tmp_path / 'new'}", "--max_iters=2")
    tokenizer = load_tokenizer(tmp_path / "again")
    assert tokenizer.decode([tokenizer.start_token_id]) == "\n"


def test_the_bos_token_id_of_another_program_does_not_matter(tmp_path):
    """transformers writes 50256 into each GPT-2's config.json, whatever the vocabulary is."""
    save_tokenizer(toy_bpe(), tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "bos_token_id": 100}')
    assert load_tokenizer(tmp_path).start_token_id == 261


def test_nanogpts_bin_files_can_be_used_as_they_are(gpt2, tmp_path, run_train, monkeypatch):
    monkeypatch.setattr(BPETokenizer, "gpt2", lambda: gpt2)
    folder = tmp_path / "openwebtext"
    folder.mkdir()
    ids = gpt2.encode("All the world's a stage, and all the men and women merely players.\n" * 40)
    for name in ("train.bin", "val.bin"):  # as nanoGPT writes them: no tokenizer.json, no meta.json
        ids.astype(np.uint16).tofile(folder / name)
    output = run_train(
        f"--dataset={folder}", f"--out_dir={tmp_path / 'run'}", "--n_layer=1", "--n_head=1",
        "--n_embd=8", "--max_iters=1", "--block_size=8", "--sample_tokens=3", "--device=cpu",
        "--tokenizer=gpt2",
    )  # fmt: skip
    assert "50,257" in output


def test_the_root_of_the_disk_is_no_run_folder(tiny_flags, call):
    assert_one_line_error(call(train, *tiny_flags, "--out_dir=/"), "--out_dir=/")
    assert_one_line_error(call(train, *tiny_flags, "--out_dir=out"), "out/my_run")


def test_a_missing_corpus_is_named_with_its_download_command(tiny_flags, call, data_folder):
    result = call(train, *tiny_flags, "--dataset=fineweb")
    assert_one_line_error(result, "python -m data.prepare_fineweb --shards=100")


def test_the_model_is_on_its_device_in_training_mode(tiny_flags):
    run = start_training(*tiny_flags)
    assert isinstance(run.model, GPT) and run.model.training
