"""What a run leaves to look at: a log that can be trusted, a curve, and figures for people."""

import math
import os
from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from training.report import (
    COLUMNS, Report, Update, clock, flops_per_token, peak_flops, read_log, summary,
)  # fmt: skip


@pytest.fixture
def run(tmp_path):
    """As much of a run as a report looks at: it makes ten steps of 100 tokens, 0.5 s each."""
    config = SimpleNamespace(max_iters=10)
    world = SimpleNamespace(is_main=True, device=torch.device("cpu"), device_name="")
    return SimpleNamespace(
        folder=tmp_path, config=config, world=world, dataset=SimpleNamespace(meta={}), step=0,
        tokens=0, seconds=0.0, best_val_loss=math.inf,
    )  # fmt: skip


def told(report: Report, step: int, val_loss: float | None = None) -> None:
    report.run.step, report.run.tokens, report.run.seconds = step, step * 100, step * 0.5
    report.updated(Update(3.0 / step, 1.0, 1e-3))
    report.log(val_loss)


def test_a_row_says_how_things_stand_after_a_step(run, tmp_path):
    with Report(run) as report:
        report.log(4.0)
        told(report, 1)
        told(report, 5, val_loss=2.0)
    rows = read_log(tmp_path / "log.csv", 10)
    assert [row["step"] for row in rows] == [0, 1, 5]
    assert [row["val_loss"] for row in rows] == [4.0, None, 2.0]
    assert rows[0]["train_loss"] is None  # nothing has been trained yet
    assert rows[2]["train_loss"] == 0.6
    assert rows[2]["tokens_per_second"] == 200  # 400 tokens in 2 seconds since the row before
    assert tuple(rows[0]) == COLUMNS


def test_a_log_is_cut_back_to_the_step_that_goes_on(run, tmp_path):
    with Report(run) as report:
        for step in (1, 2, 3, 4):
            told(report, step)
    with open(tmp_path / "log.csv", "a") as file:
        file.write("5,500,2.")  # a row that a kill cut short
    run.step = 2
    with Report(run) as report:
        told(report, 3, val_loss=1.0)
    rows = read_log(tmp_path / "log.csv", 10)
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert rows[2]["val_loss"] == 1.0


def test_the_curve_is_drawn_from_the_rows(run, tmp_path, recwarn):
    with Report(run) as report:
        report.log(4.0)
        report.draw_curve()
        first = (tmp_path / "loss.png").read_bytes()
        told(report, 5, val_loss=0.0)  # nothing is left to learn
        report.draw_curve()
    assert (tmp_path / "loss.png").read_bytes() != first
    assert len(recwarn) == 0


def test_the_curve_is_drawn_anew_once_in_a_while(run, tmp_path):
    with Report(run) as report:
        report.log(4.0)
        report.refresh_curve()
        assert not (tmp_path / "loss.png").exists()
        report.drawn_at -= 10  # as if it had been ten seconds ago
        report.refresh_curve()
    assert (tmp_path / "loss.png").exists()


@pytest.mark.parametrize(
    ("used", "load", "noted"), [(1.1, 3.0, True), (1.9, 3.0, False), (1.1, 2.0, False)]
)
def test_a_run_whose_cores_others_use_is_told_once(run, capsys, monkeypatch, used, load, noted):
    clocks = {"monotonic": 0.0, "process_time": 0.0}
    for name in clocks:
        monkeypatch.setattr(f"time.{name}", lambda name=name: clocks[name])
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0, 0), raising=False)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("torch.get_num_threads", lambda: 2)
    with Report(run) as report:
        for step in range(1, 8):
            told(report, step)
            clocks["monotonic"] += 10
            clocks["process_time"] += 10 * used  # of 20 that two threads could have
    assert capsys.readouterr().out.count("OMP_NUM_THREADS=1") == noted


def test_a_silent_report_says_and_writes_nothing(run, tmp_path, capsys):
    run.world.is_main = False
    with Report(run) as report:
        report.say("hello")
        told(report, 5, val_loss=1.0)
        report.draw_curve()
    assert list(tmp_path.iterdir()) == []
    assert capsys.readouterr().out == ""


def test_the_next_command_writes_with_the_weights_of_this_run(run, tmp_path, monkeypatch):
    """sample.py by itself takes the newest."""
    for module in ("report", "checkpoint"):
        monkeypatch.setattr(f"training.{module}.HERE", tmp_path)
    for name, time in (("older", 1e9), ("newer", 2e9)):
        weights = tmp_path / "out" / name / "model.safetensors"
        weights.parent.mkdir(parents=True)
        weights.touch()
        os.utime(weights, (time, time))
    run.folder = tmp_path / "out" / "newer"
    assert "python sample.py\n" in summary(run)
    run.folder = tmp_path / "out" / "older"
    assert "python sample.py --out_dir=out/older\n" in summary(run)


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.2, "1:15"), (3675, "1:01:15")])
def test_time_is_told_as_on_a_clock(seconds, text):
    assert clock(seconds) == text


# --- Speed against what the machine could do ---


def test_a_gpus_peak_is_known_by_its_name():
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 65,
        "NVIDIA GeForce RTX 4090": 165,
    }.items():  # fmt: skip
        assert peak_flops(name) == tflops * 1e12, name
    for name in ("", "NVIDIA A10", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA T400"):
        assert peak_flops(name) is None, name


def test_the_cost_of_a_token_is_that_of_all_its_products(model):
    """Counted by torch itself in a forward and backward pass, attention written out."""
    idx = torch.randint(13, (3, 8))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx, idx)[1].backward()
    assert flops_per_token(model) == counter.get_total_flops() / idx.numel()


def test_utilisation_is_speed_over_speed_at_peak(run, capsys, monkeypatch):
    monkeypatch.setattr("training.report.QUIET_SECONDS", 0)
    monkeypatch.setattr("training.report.tokens_per_second_at_peak", lambda run: 400.0)
    with Report(run) as report:
        told(report, 1)
        told(report, 2)
    assert "200 tokens/s, 50% MFU" in capsys.readouterr().out
