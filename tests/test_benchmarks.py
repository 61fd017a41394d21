"""The benchmarks run, at a tiny size, so that they work when they are needed."""

import functools
import json
import math
import mmap
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import train
from data.prepare import split_text, write_dataset
from data.tokenizer import CharTokenizer
from engine.train_config import TrainConfig
from tests.benchmarks import (
    busy_cores, gpu, memory, sample_speed, startup, time_to_loss, train_speed,
)  # fmt: skip
from tests.benchmarks.measuring import format_cell, in_subprocess, run_interleaved, throughput
from tests.conftest import ROOT, TINY_TEXT, assert_one_line_error
from tests.processes import run_train, start_job


def test_candidates_run_interleaved_and_the_first_round_is_not_counted():
    order = []
    results = run_interleaved(
        {name: lambda name=name: order.append(name) or len(order) for name in "AB"}, rounds=2
    )
    assert order == ["A", "B"] * 3
    assert results == {"A": [3, 5], "B": [4, 6]}
    assert format_cell([3.0, 1.0, 2.0]) == "2 (1 to 3)"


def test_throughput_is_work_per_second(monkeypatch):
    clock = iter(range(100))
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))  # each call takes a second
    assert throughput(lambda: None, amount=10, seconds=3)() == 30 / 4


def test_a_candidate_in_a_subprocess_is_called_like_the_others():
    results = run_interleaved({"A": in_subprocess(functools.partial, os.getpid)}, rounds=2)["A"]
    assert len(results) == 2 and len(set(results)) == 1  # one process for all rounds
    assert results[0] != os.getpid()


def test_train_speed_compares_with_the_limit(call, tmp_path):
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


def test_busy_cores_compares_with_the_best_fixed_number_of_threads(call, tmp_path, monkeypatch):
    seconds = {"auto": 3.0, "all": 8.0, "one": 2.0}
    monkeypatch.setattr(busy_cores, "measure_sampling", lambda name, way: seconds[way])
    result = call(
        busy_cores, "--train=", "--sample=tiny", "--busy=0,1", "--ways=auto,all,one",
        f"--json={tmp_path / 'busy.json'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "busy.json").read_text())["rows"]
    assert [row["other programs"] for row in rows] == [0, 1]
    assert all(row["auto / best fixed"] == 1.5 and row["all"] == [8.0] * 3 for row in rows)


@pytest.mark.skipif(not Path("/proc").exists(), reason="/proc is Linux's")
def test_busy_loops_run_until_the_measurement_ends():
    def children() -> str:
        return Path(f"/proc/self/task/{os.getpid()}/children").read_text()

    before = children()
    with busy_cores.busy_loops(2):
        assert len(children().split()) == len(before.split()) + 2
    assert children() == before


def test_busy_cores_measures_a_model_of_the_given_size(capsys):
    busy_cores.sample("1/16/8:12", num_threads=1)  # longer than the context
    assert float(capsys.readouterr().out) > 0


def test_sample_speed_compares_one_sample_and_ten(call, tmp_path):
    result = call(sample_speed, "--sizes=tiny", "--rounds=1", f"--json={tmp_path / 'a.json'}")
    assert result.returncode == 0, result.stderr
    (row,) = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert row["Folio"][0] > 0 and row["ten samples"][0] > 0
    assert_one_line_error(call(sample_speed, "--sizes=huge"), "tiny, small")
    assert_one_line_error(call(sample_speed, "--sizes=tiny", "--peer=/nowhere"), "nanoGPT")


def test_gpu_measures_a_step_on_any_machine(call, tmp_path):
    result = call(
        gpu, "--tiny", "--batch_sizes=2", "--optimizers=adamw, muon", "--steps=2", "--warmup=1",
        f"--profile={tmp_path / 'traces'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "| adamw | 2 |" in result.stdout and "| muon | 2 |" in result.stdout
    traces = sorted(path.name for path in (tmp_path / "traces").iterdir())
    assert traces == ["adamw_2.json", "muon_2.json"]


def test_gpu_refuses_wrong_settings_in_one_line(call):
    if not torch.cuda.is_available():
        assert_one_line_error(call(gpu), "--tiny")
    assert_one_line_error(call(gpu, "--tiny", "--optimizers=adam"), "adamw, muon")
    assert_one_line_error(call(gpu, "--tiny", "--batch_sizes=2,x"), "separated by commas")


@pytest.mark.skipif(sys.platform == "win32", reason="a dataset's path has a drive there")
def test_time_to_loss_continues_after_the_runs_in_its_json_file(call, tmp_path, monkeypatch):
    text = TINY_TEXT * 40
    tokenizer = CharTokenizer.from_text(text)
    write_dataset(tmp_path / "tiny", tokenizer, split_text(text), {"source": "a rhyme"})
    monkeypatch.setattr(time_to_loss, "DATASET", str(tmp_path / "tiny"))
    saved = {"seconds": 4.0, "loss": 1.0, "points": [[4.0, 1.0]]}
    (tmp_path / "loss.json").write_text(
        json.dumps({"runs": {"shakespeare_quick, seed 1337, 1 steps": saved}})
    )

    def run_in_this_process(command: list[str], **_) -> None:
        assert call(train, *command[2:]).returncode == 0  # without "python train.py"

    monkeypatch.setattr(time_to_loss.subprocess, "run", run_in_this_process)
    monkeypatch.chdir(ROOT)
    result = call(
        time_to_loss, "--recipes=shakespeare_quick", "--seeds=2", "--max_iters=1",
        f"--json={tmp_path / 'loss.json'}", f"--picture={tmp_path / 'loss.png'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    results = json.loads((tmp_path / "loss.json").read_text())
    (row,) = results["rows"]
    assert row["recipe"] == "shakespeare_quick" and row["seconds of training"][0] == 4.0
    (new_run,) = (run for key, run in results["runs"].items() if "seed 1338" in key)
    # Untrained, the loss is about ln(vocabulary); one step changes it a little.
    assert new_run["loss"] == pytest.approx(math.log(tokenizer.vocab_size), abs=0.3)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_time_to_loss_refuses_wrong_settings_in_one_line(call, tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setattr(time_to_loss, "DATASET", str(tiny_dataset))
    assert_one_line_error(
        call(time_to_loss, "--recipes=shakespeare_quik"), "config/shakespeare_quik"
    )
    assert_one_line_error(call(time_to_loss, "--peer=/nowhere"), "a checkout of nanoGPT")
    (tmp_path / "model.py").touch()
    assert_one_line_error(
        call(time_to_loss, f"--peer={tmp_path}", "--max_iters=600"), "a multiple of 250"
    )


@pytest.mark.skipif(sys.platform != "linux", reason="for Linux only")
def test_startup_measures_a_new_and_a_resumed_run(call, tmp_path, monkeypatch):
    def start_without_torchrun(n_processes: int, *flags: str) -> SimpleNamespace:
        job = start_job(run_train, *flags, n_processes=n_processes)
        return SimpleNamespace(
            poll=lambda: job.processes[0].exitcode,
            terminate=lambda: [process.terminate() for process in job.processes],
            communicate=lambda: ("", job.wait().stderr),
        )

    monkeypatch.setattr(startup, "start_torchrun", start_without_torchrun)
    result = call(
        startup, "--processes=2", "--shards=3", "--tokens_per_shard=262144",
        f"--json={tmp_path / 'startup.json'}",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "startup.json").read_text())["rows"]
    assert [row["start"] for row in rows] == ["from scratch", "resumed", "imports alone"]
    for row in rows[:2]:
        assert 0 < row["MiB read"] <= row["MiB read, main process"] <= 4 * 262144 * 2 / 2**20


@pytest.mark.skipif(sys.platform != "linux", reason="for Linux only")
def test_startup_counts_what_is_in_memory_of_mapped_files(tmp_path):
    size = 64 * mmap.PAGESIZE
    for name in ("train_000000", "train_000001"):
        (tmp_path / f"{name}.bin").write_bytes(bytes(size))
    with (
        open(tmp_path / "train_000000.bin", "rb") as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped,
    ):
        assert startup.resident_sizes(tmp_path) == [0]
        assert sum(mapped[:: mmap.PAGESIZE]) == 0  # one byte of each page
        assert startup.resident_sizes(tmp_path) == [size]
    assert startup.resident_sizes(tmp_path) == []


def test_memory_counts_each_storage_while_it_exists():
    with memory.MemoryCounter() as counter:
        a = torch.zeros(1000)  # 4,000 bytes
        view = a.view(10, 100)[1:]
        b = view + 1  # 900 numbers: 3,600 bytes
        del a, view
        c = torch.zeros(500, dtype=torch.int64)  # 4,000 bytes
        assert counter.current == b.nbytes + c.nbytes == 7600
    assert counter.peak == 7600


@pytest.mark.parametrize("grad_accum_steps", [1, 2])
def test_memory_of_a_step_agrees_with_arithmetic_by_hand(grad_accum_steps):
    B, T, C, V, L, H = 2, 8, 16, 4096, 2, 2
    config = TrainConfig(
        batch_size=B, block_size=T, n_layer=L, n_head=H, n_embd=C, optimizer="adamw",
        dtype="float32", gradient_accumulation_steps=grad_accum_steps,
    )  # fmt: skip
    prediction = memory.predict(config, V)
    parameters = V * C + T * C + L * (12 * C * C + 2 * C) + C
    assert prediction["weights"] == 4 * parameters
    assert prediction["optimizer"] == pytest.approx(8 * parameters, rel=1e-3)  # two averages
    # Numbers saved for the backward pass, per token. In a block: x (C) and its norm (C); q, k, v
    # (3C), the output of attention (C) and a sum for each head; x (C) and its norm (C); the MLP
    # before and after GELU (4C each); mean and standard deviation for each of both norms.
    block = 16 * C + H + 4
    activations = L * block + 2 * C + 2  # the last norm, too
    # The vocabulary is so large that the peak is at the logits: their log-softmax, the gradient
    # of the loss with respect to it, and the gradient with respect to the logits.
    others = B * T * (4 * (activations + 3 * V) + 2 * 8)  # inputs and targets are int64
    others += 4 * parameters if grad_accum_steps == 2 else 0  # gradients of the first micro-batch
    assert prediction["others"] == pytest.approx(others, rel=1e-3)


def test_memory_is_predicted_for_a_config_file(call):
    result = call(
        memory, str(ROOT / "config" / "train_gpt2.py"), "--n_layer=1", "--batch_size=1",
        "--block_size=8", "--n_embd=12", "--dataset=not_prepared",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert "vocabulary 50,257, micro-batch 1" in result.stdout
