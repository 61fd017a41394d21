"""Fewer CPU threads while other programs are busy."""

import os
import sys
import time
from types import SimpleNamespace

import pytest
import torch

from engine.cpu_threads import CpuUsage, ThreadAdapter, fitting_num_threads, use_one_thread
from engine.device import ComputeDevice


@pytest.mark.parametrize(
    ("threads", "max_threads", "cores", "own", "other", "expected"),
    [
        (2, 2, 2, 1.9, 0.1, 2),  # alone, but for an idle desktop
        (2, 2, 2, 1.3, 0.7, 1),  # beside one busy program
        (2, 2, 2, 1.0, 1.0, 1),  # beside two
        (1, 2, 2, 1.0, 1.0, 1),  # after the first change: the other program is still there
        (1, 2, 2, 1.0, 0.1, 2),  # and now it is gone
        (8, 8, 8, 7.2, 0.8, 7),
        (8, 8, 8, 5.0, 3.0, 5),
        (8, 8, 8, 0.5, 7.5, 1),
        (4, 4, 8, 4.0, 3.0, 4),  # enough cores for both
        (5, 8, 8, 4.0, 4.0, 4),  # a program more
        (5, 8, 8, 4.0, 1.0, 5),  # never more again, until the CPU is free
        (1, 1, 1, 0.5, 0.5, 1),
    ],
)
def test_number_of_threads_leaves_other_programs_their_cores(
    threads, max_threads, cores, own, other, expected
):
    assert fitting_num_threads(threads, max_threads, cores, own, other) == expected


@pytest.fixture
def fake_cpu(monkeypatch):
    """Two cores, two threads, and a clock: step(adapter, seconds, own, other)."""
    if sys.platform != "linux":
        pytest.skip("ThreadAdapter works on Linux only")
    state = SimpleNamespace(threads=2, usage=CpuUsage(0.0, 0.0, 0.0))
    for name in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: state.threads)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: setattr(state, "threads", n))
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(CpuUsage, "now", lambda: state.usage)
    monkeypatch.setattr(time, "monotonic", lambda: state.usage.wall)

    def step(adapter, seconds: float, own: float, other: float) -> None:
        wall, total_own, total = state.usage
        total += (own + other) * seconds
        state.usage = CpuUsage(wall + seconds, total_own + own * seconds, total)
        adapter.after_step()

    state.step = step
    return state


CPU_DEVICE = ComputeDevice(torch.device("cpu"), torch.float32, False, "")


def test_threads_are_reduced_within_ten_steps_and_restored_when_the_cpu_is_free(fake_cpu):
    lines = []
    adapter = ThreadAdapter(CPU_DEVICE, report=lines.append)
    for _ in range(10):
        fake_cpu.step(adapter, 0.15, own=1.3, other=0.7)
    assert fake_cpu.threads == 1
    assert lines == [
        "threads  1 instead of 2: other programs use the CPU (--num_threads=2 keeps 2)"
    ]
    for _ in range(9):
        fake_cpu.step(adapter, 5, own=1.0, other=1.0)
        fake_cpu.step(adapter, 5, own=1.0, other=0.1)
    assert fake_cpu.threads == 1 and len(lines) == 1
    for _ in range(25):
        fake_cpu.step(adapter, 0.6, own=1.0, other=0.1)
    assert fake_cpu.threads == 2
    assert lines[1:] == ["threads  2 again: other programs leave the CPU free"]


def test_one_slow_step_is_enough_to_reduce_the_threads(fake_cpu):
    """As the first step of a resumed run, beside several busy programs."""
    adapter = ThreadAdapter(CPU_DEVICE)
    fake_cpu.step(adapter, 7, own=1.0, other=1.0)
    assert fake_cpu.threads == 1


def test_short_disturbances_change_nothing(fake_cpu):
    adapter = ThreadAdapter(CPU_DEVICE)
    for _ in range(10):
        fake_cpu.step(adapter, 0.6, own=1.3, other=0.7)
        fake_cpu.step(adapter, 0.6, own=1.9, other=0.1)
    assert fake_cpu.threads == 2


@pytest.mark.parametrize(
    ("device", "options", "environment"),
    [
        (CPU_DEVICE, {"num_threads": 2}, {}),
        (CPU_DEVICE, {"world_size": 2}, {}),
        (CPU_DEVICE, {}, {"OMP_NUM_THREADS": "2"}),
        (CPU_DEVICE, {}, {"MKL_NUM_THREADS": "2"}),
        (ComputeDevice(torch.device("cuda"), torch.float32, False, ""), {}, {}),
    ],
)
def test_threads_that_are_set_are_never_changed(
    fake_cpu, monkeypatch, device, options, environment
):
    """Runs that are to be repeated bit by bit need the same number of threads all along."""
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    adapter = ThreadAdapter(device, **options)
    for _ in range(5):
        fake_cpu.step(adapter, 0.6, own=1.3, other=0.7)
    assert fake_cpu.threads == 2


@pytest.mark.skipif(sys.platform != "linux", reason="/proc/stat is Linux's")
def test_cpu_time_of_all_programs_contains_that_of_this_one():
    before = CpuUsage.now()
    while time.process_time() - before.own < 0.3:
        pass
    after = CpuUsage.now()
    assert after.total - before.total >= 0.9 * (after.own - before.own) - 0.05
    n_cores = len(os.sched_getaffinity(0))
    assert after.total - before.total <= n_cores * (after.wall - before.wall) + 0.1


def test_one_thread_is_used_unless_the_user_has_chosen_a_number(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    use_one_thread()
    assert chosen == []
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.delenv("MKL_NUM_THREADS", raising=False)
    use_one_thread()
    assert chosen == [1]
