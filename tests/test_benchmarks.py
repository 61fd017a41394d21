"""The benchmarks run: at a tiny size, so that they are ready when somebody wants to measure."""

import itertools
import json
import os
import sys

import pytest
import torch

from data.prepare import split_text, write_dataset
from data.tokenizer import CharTokenizer
from tests.benchmarks import gpu, sample_speed, time_to_loss, train_speed
from tests.benchmarks.measuring import in_its_own_process, interleaved, rate, shown
from tests.conftest import RHYME, assert_one_line_error


def test_contestants_take_turns_and_the_first_round_does_not_count():
    order = []
    figures = interleaved(
        {name: lambda name=name: order.append(name) or len(order) for name in "AB"}, rounds=2
    )
    assert order == ["A", "B"] * 3
    assert figures == {"A": [3, 5], "B": [4, 6]}
    assert shown([3.0, 1.0, 2.0]) == "2 (1 to 3)"


def test_a_rate_is_work_per_second(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))  # each look takes a second
    assert rate(lambda: None, amount=10, seconds=3)() == 30 / 4


def counter(start):
    """Makes a contestant whose figures tell its turns and its process."""
    turns = itertools.count(1)
    return lambda: (next(turns), start, os.getpid())


def test_a_contestant_in_its_own_process_takes_its_turns_like_the_others():
    figures = interleaved({"A": in_its_own_process(counter, 7)}, rounds=2)["A"]
    (_, _, process), _ = figures
    assert process != os.getpid()
    assert figures == [(2, 7, process), (3, 7, process)]


def test_the_speed_of_training_is_measured(call, tmp_path):
    result = call(
        train_speed, "--n_layer=1", "--n_head=2", "--n_embd=16", "--block_size=8",
        "--batch_size=2", "--rounds=1", "--seconds=0.01", "--matrix=32",
        f"--json={tmp_path / 'speed.json'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "speed.json").read_text())["rows"]
    assert [row["step"].split(",")[0] for row in rows] == ["Folio"] * 3
    assert all(row["tokens/s"][0] > 0 for row in rows)
    assert rows[0]["ratio"] == 1


def test_the_speed_of_sampling_is_measured(call, tmp_path):
    result = call(sample_speed, "--sizes=tiny", "--rounds=1", f"--json={tmp_path / 'a.json'}")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["Folio"][0] > 0 and row["ten at once"][0] > 0
    assert_one_line_error(call(sample_speed, "--sizes=huge"), "there are tiny, small")
    assert_one_line_error(call(sample_speed, "--sizes=tiny", "--peer=/nowhere"), "nanoGPT")


def test_a_step_on_a_gpu_is_measured_on_any_machine(call, tmp_path):
    result = call(
        gpu, "--tiny", "--batch_sizes=2", "--optimizers=adamw, muon", "--steps=2", "--warmup=1",
        f"--profile={tmp_path / 'traces'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| adamw | 2 |" in result.stdout and "| muon | 2 |" in result.stdout
    traces = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert traces == ["adamw_2.json", "muon_2.json"]
    if not torch.cuda.is_available():
        assert_one_line_error(call(gpu), "--tiny")
    assert_one_line_error(call(gpu, "--tiny", "--optimizers=adam"), "there are adamw and muon")
    assert_one_line_error(call(gpu, "--tiny", "--batch_sizes=2,x"), "numbers, parted by commas")


@pytest.mark.skipif(sys.platform == "win32", reason="the copy is not made there")
def test_the_time_to_a_loss_is_measured(call, tmp_path, monkeypatch):
    # Whole runs of train.py, in a process of their own, on a dataset at a path of our own.
    text = RHYME * 60
    write_dataset(tmp_path / "rhyme", CharTokenizer.of(text), split_text(text), {"source": "rhyme"})
    monkeypatch.setattr(time_to_loss, "DATASET", str(tmp_path / "rhyme"))
    result = call(
        time_to_loss, "--recipes=shakespeare_quick", "--seeds=2", "--max_iters=2",
        f"--json={tmp_path / 'loss.json'}", f"--picture={tmp_path / 'loss.png'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "loss.json").read_text())["rows"]
    assert row["recipe"] == "shakespeare_quick" and len(row["seconds of training"]) == 2
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert_one_line_error(
        call(time_to_loss, "--recipes=shakespeare_quik"), "config/shakespeare_quik"
    )
    assert_one_line_error(call(time_to_loss, "--peer=/nowhere"), "a checkout of nanoGPT")
    (tmp_path / "model.py").touch()
    assert_one_line_error(
        call(time_to_loss, f"--peer={tmp_path}", "--max_iters=600"), "a multiple of that"
    )
