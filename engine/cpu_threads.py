"""Use fewer CPU threads while other programs compete for the cores.

    threads = ThreadAdapter(device, report=print)
    for batch in batches:
        train_step(...)
        threads.after_step()

torch's threads wait for one another after each operation, and keep their cores busy while they
wait. If one thread shares its core with another program, all threads wait for it, in every
operation: the program becomes many times slower. With one thread fewer it is much faster.
train.py calls after_step() after each training step and each batch of an evaluation, sample.py
after each piece of text. Small models generate text as fast with one thread as with two: for them,
sample.py calls use_one_thread().

torch.set_num_threads() is called only when it is needed. After any call, also with the same number,
attention in float32 takes longer. (torch then sets mkl_set_dynamic(false): MKL, Intel's library of
matrix products, may no longer use fewer threads than torch.)
"""

import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from engine.device import ComputeDevice


class ThreadAdapter:
    """Changes torch's number of threads when other programs start or stop using the cores.

    Call after_step() after each training step.

    The number of threads changes the order of sums, and so the last digits of all numbers. Runs
    are equal bit by bit only if the number of threads has not changed. It never changes if
    num_threads is not 0, if OMP_NUM_THREADS or MKL_NUM_THREADS is set, with several processes,
    with torch.compile, on GPUs, and on other systems than Linux: only Linux says how much of the
    CPU other programs use.
    """

    WINDOW_SECONDS = 0.5  # the CPU usage is measured in windows of at least this length
    REDUCE_AFTER, RESTORE_AFTER = 1.0, 10.0  # seconds for which all windows must agree

    def __init__(
        self,
        device: ComputeDevice,
        num_threads: int = 0,
        world_size: int = 1,
        report: Callable[[str], None] = lambda message: None,
    ):
        self.report = report  # is called with a message when the number of threads changes
        self.max_threads = torch.get_num_threads()
        is_fixed = num_threads or is_num_threads_set()
        is_cpu = device.torch_device.type == "cpu" and not device.compile
        self.enabled = is_cpu and not is_fixed and world_size == 1 and self.max_threads > 1
        self.enabled &= Path("/proc/stat").exists()  # Linux
        self.seconds = 0.0  # for which all windows have called for another number of threads
        if self.enabled:
            self.start = CpuUsage.now()

    def after_step(self) -> None:
        """Change the number of threads if needed, and report it."""
        if not self.enabled or time.monotonic() - self.start.wall < self.WINDOW_SECONDS:
            return
        now = CpuUsage.now()
        wall = now.wall - self.start.wall
        own = (now.own - self.start.own) / wall  # cores in use, such as 1.9 of 2
        other = (now.total - self.start.total) / wall - own
        self.start = now
        n_cores = len(os.sched_getaffinity(0))  # that this process may use
        threads = torch.get_num_threads()
        new = fitting_num_threads(threads, self.max_threads, n_cores, own, other)
        self.seconds = self.seconds + wall if new != threads else 0.0
        if self.seconds < (self.REDUCE_AFTER if new < threads else self.RESTORE_AFTER):
            return
        torch.set_num_threads(new)
        if new == self.max_threads:
            self.report(f"threads  {new} again: other programs leave the CPU free")
        else:
            self.report(
                f"threads  {new} instead of {self.max_threads}: other programs use the CPU "
                f"(--num_threads={self.max_threads} keeps {self.max_threads})"
            )


def use_one_thread() -> None:
    """Use one CPU thread, unless OMP_NUM_THREADS or MKL_NUM_THREADS is set."""
    if not is_num_threads_set():
        torch.set_num_threads(1)


def is_num_threads_set() -> bool:
    """Whether environment variables of OpenMP or MKL set the number of threads."""
    return bool({"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & os.environ.keys())


def fitting_num_threads(
    threads: int, max_threads: int, cores: int, own: float, other: float
) -> int:
    """How many threads torch should use, given what it and other programs get from the CPU.

    own, other: cores that this process and all others have used on average. For example, on two
    cores, two threads beside one busy program get 1.3 cores, the other program 0.7.
    """
    if other < 0.25:  # an idle desktop
        return max_threads
    if own > 0.9 * threads:  # all threads get their cores
        return threads
    # Other programs take whole cores; less than a quarter of a core is not counted.
    return max(1, min(threads, cores - math.ceil(other - 0.25)))


class CpuUsage(NamedTuple):
    """CPU seconds at one moment; the difference of two moments is what was used between them."""

    wall: float  # of a clock
    own: float  # used by all threads of this process
    total: float  # used by all programs on the cores of this process

    @staticmethod
    def now() -> "CpuUsage":
        return CpuUsage(time.monotonic(), time.process_time(), total_cpu_seconds())


def total_cpu_seconds() -> float:
    """CPU seconds that all programs have used on the cores of this process since Linux started.

    Reads lines such as "cpu0 user nice system idle iowait irq softirq ..." of /proc/stat (proc(5)),
    but not nice: programs that run with a low priority give way to this one.
    """
    fields = [line.split() for line in Path("/proc/stat").read_text().splitlines()]
    names = {f"cpu{number}" for number in os.sched_getaffinity(0)}
    ticks = sum(int(f[1]) + int(f[3]) + int(f[6]) + int(f[7]) for f in fields if f[0] in names)
    return ticks / os.sysconf("SC_CLK_TCK")
