"""What the benchmarks share: fair turns, medians, the machine's own limits, a peer's code.

Contestants take turns, A B C A B C, so that whatever else the machine does hits all of them alike;
what is reported is the median over the rounds and the spread between them.
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

import torch

from configurator import FolioError


def interleaved(contestants: dict[str, Callable[[], float]], rounds: int) -> dict[str, list[float]]:
    """Let each contestant measure itself once per round; its figures, in the order of rounds.

    A first round warms everything up and is not counted.
    """
    figures = {name: [] for name in contestants}
    for number in range(rounds + 1):
        print(f"round {number} of {rounds}" if number else "warming up", file=sys.stderr)
        for name, measure in contestants.items():
            figure = measure()
            if number:
                figures[name].append(figure)
    return figures


def rate(work: Callable[[], None], amount: float, seconds: float) -> Callable[[], float]:
    """A contestant that repeats `work` for about so many seconds: its amounts per second."""

    def measure() -> float:
        start, done = time.perf_counter(), 0
        while not done or time.perf_counter() - start < seconds:
            work()
            done += 1
        synchronise()
        return done * amount / (time.perf_counter() - start)

    return measure


def in_its_own_process(make: Callable[..., Callable[[], float]], *given) -> Callable[[], float]:
    """The contestant that make(*given) returns, where it shares nothing with the others.

    make: a function of a module, given: what can be pickled.
    """
    spawn = multiprocessing.get_context("spawn")
    here, there = spawn.Pipe()
    spawn.Process(target=take_turns, args=(there, make, given), daemon=True).start()

    def measure() -> float:
        here.send("your turn")
        return here.recv()

    return measure


def take_turns(pipe: Connection, make: Callable[..., Callable[[], float]], given: tuple) -> None:
    measure = make(*given)
    with contextlib.suppress(EOFError):  # the others have gone home
        while pipe.recv():
            pipe.send(measure())


def names_in(setting: str) -> list[str]:
    """'a, b' -> ['a', 'b']"""
    return [name.strip() for name in setting.split(",")]


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def matrix_product(size: int) -> tuple[Callable[[], None], float]:
    """A float32 product of two square matrices, and the floating point operations in it."""
    left, right = torch.randn(size, size), torch.randn(size, size)
    return lambda: torch.mm(left, right), 2 * size**3


def load_peer(path: str) -> ModuleType:
    """The module model.py of a nanoGPT checkout."""
    file = Path(path).expanduser() / "model.py"
    if not file.exists():
        raise FolioError(f"--peer={path}: there is no {file}; it wants a checkout of nanoGPT")
    spec = importlib.util.spec_from_file_location("peer_model", file)
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_model"] = module  # its dataclass looks itself up there
    spec.loader.exec_module(module)
    return module


# --- Telling ---


def report(title: str, rows: list[dict], path: str, **more) -> None:
    """Print rows of equal keys as a Markdown table, and write_figures() to path.

    A list of figures is shown as its median, with the least and the greatest behind it.
    """
    print(f"\n{title}\n")
    head = list(rows[0])
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for row in rows:
        print("| " + " | ".join(shown(row.get(key)) for key in head) + " |")
    write_figures(path, title, rows, **more)


def write_figures(path: str, title: str, rows: list[dict], **more) -> None:
    """Write all figures, and on which machine they were measured, as JSON; nothing without path."""
    if not path:
        return
    machine = {
        "torch": torch.__version__, "threads": torch.get_num_threads(), "device": device_name(),
    }  # fmt: skip
    figures = {"title": title, "machine": machine, "rows": rows, **more}
    Path(path).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")


def shown(value) -> str:
    if isinstance(value, list):
        least, greatest = number(min(value)), number(max(value))
        spread = f" ({least} to {greatest})" if len(value) > 1 else ""
        return number(median(value)) + spread
    return number(value) if isinstance(value, float) else "" if value is None else str(value)


def number(value: float) -> str:
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return "CPU"
    return next((line.split(": ", 1)[1] for line in lines if line.startswith("model name")), "CPU")
