"""Shared by the benchmarks: interleaved runs, medians, tables, and nanoGPT's code.

Candidates run interleaved, A B C A B C, so that other programs on the machine slow all of them
down alike. A result is the median over the rounds, with its minimum and maximum.
"""

import contextlib
import importlib.util
import json
import multiprocessing
import sys
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from types import ModuleType
from typing import Any

import torch

from configurator import FolioError

Candidate = Callable[[], float]  # measures once


def run_interleaved(candidates: dict[str, Candidate], rounds: int) -> dict[str, list[float]]:
    """Run each candidate once per round; return its results, in the order of the rounds.

    A first round for warming up is not counted.
    """
    results = {name: [] for name in candidates}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warming up", file=sys.stderr)
        for name, measure in candidates.items():
            result = measure()
            if number:
                results[name].append(result)
    return results


def throughput(work: Callable[[], None], amount: float, seconds: float) -> Candidate:
    """A candidate that repeats `work` for about that many seconds: amounts of work per second."""

    def measure() -> float:
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < seconds:
            work()
            done += 1
        synchronize()
        return done * amount / (time.perf_counter() - start)

    return measure


def in_subprocess(make: Callable[..., Candidate], *args: Any) -> Candidate:
    """The candidate that make(*args) returns, in a process of its own.

    make: a function at the top level of a module; args: picklable.
    """
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe()
    context.Process(target=worker_loop, args=(theirs, make, args), daemon=True).start()

    def measure() -> float:
        ours.send(True)
        return ours.recv()

    return measure


def worker_loop(pipe: Connection, make: Callable[..., Candidate], args: tuple) -> None:
    measure = make(*args)
    with contextlib.suppress(EOFError):  # the parent process has ended
        while pipe.recv():
            pipe.send(measure())


def split_csv(setting: str) -> list[str]:
    """'a, b' -> ['a', 'b']"""
    return [name.strip() for name in setting.split(",")]


def synchronize() -> None:
    """Wait until the GPU, if there is one, has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_product(size: int) -> tuple[Callable[[], None], float]:
    """A float32 product of two square matrices, and its number of floating point operations."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return lambda: torch.mm(left, right), 2 * size**3


def load_peer(path: str | Path) -> ModuleType:
    """The module model.py of a nanoGPT checkout."""
    file = Path(path).expanduser() / "model.py"
    if not file.exists():
        raise FolioError(f"--peer={path}: {file} not found; give a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("peer_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_model"] = module  # its dataclass looks up its own module
    spec.loader.exec_module(module)
    return module


# --- Results ---


def report_results(title: str, rows: list[dict[str, Any]], path: str, **more: Any) -> None:
    """Print rows with equal keys as a Markdown table, and save them with save_results().

    A list of results is printed as its median, followed by minimum and maximum.
    """
    print(f"\n{title}\n")
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |\n|" + " --- |" * len(columns))
    for row in rows:
        print("| " + " | ".join(format_cell(row.get(key)) for key in columns) + " |")
    save_results(path, title, rows, **more)


def save_results(path: str, title: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Write all results, and the machine they were measured on, as JSON; nothing without path."""
    if not path:
        return
    machine = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "device": device_name(),
    }  # fmt: skip
    results = {"title": title, "machine": machine, "rows": rows, **more}
    Path(path).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


def format_cell(value: Any) -> str:
    """[3.0, 1.0, 2.0] -> '2 (1 to 3)'; 1234.5 -> '1,234'; None -> ''."""
    if isinstance(value, list):
        low, high = format_number(min(value)), format_number(max(value))
        return format_number(median(value)) + (f" ({low} to {high})" if len(value) > 1 else "")
    if isinstance(value, float):
        return format_number(value)
    return "" if value is None else str(value)


def format_number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def device_name() -> str:
    """The name of the GPU, else of the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "CPU")
