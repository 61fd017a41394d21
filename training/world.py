"""Who am I among how many, on which device, in which precision.

A single process is a world of one: the ordinary case, not a branch. The training story asks its
world to share work, to add up numbers and to agree on stopping, and never asks how many there are.
"""

import contextlib
import itertools
import signal
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from types import FrameType
from typing import Literal

import torch
from torch.utils._triton import has_triton

from configurator import FolioError

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Switch = Literal["auto", True, False]


@dataclass
class World:
    """One process among `size`, its device, and how it computes there."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights stay in float32 (float64 in float64)
    compile: bool  # whether torch.compile fuses the model's operations
    why: str  # the choice and its reasons, in one line
    rank: int = 0
    size: int = 1

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prepares, writes and prints."""
        return self.rank == 0

    def share(self, work: Iterable) -> Iterable:
        """This process's part of the work: every size-th item, beginning with its rank's."""
        return itertools.islice(work, self.rank, None, self.size)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of `numbers`, element by element, over all processes."""
        return numbers

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move the model to the device; what is returned runs it, compiled where that pays."""
        model.to(self.device, torch.float64 if self.dtype == torch.float64 else torch.float32)
        return torch.compile(model) if self.compile else model

    def send(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copy a batch to the device, without waiting for the copy where that can be done."""
        if self.device.type == "cuda":  # only from pinned memory can the GPU fetch by itself
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Within it, matrix products run in `dtype`; sums that need it stay in float32."""
        if self.dtype in (torch.float32, torch.float64):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients from vanishing in float16; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def generator(self, seed: int) -> torch.Generator:
        """A source of chance of its own, so that drawing samples disturbs nothing else."""
        # Apple's GPUs have drawn wrongly from some distributions: their dice stay on the CPU.
        where = "cpu" if self.device.type == "mps" else self.device
        return torch.Generator(where).manual_seed(seed)


def open_world(device: str = "auto", dtype: str = "auto", compile: str | bool = "auto") -> World:
    """The world this process lives in, "auto" having been decided by what the machine can do.

    Raises FolioError if the machine cannot do what is asked for.
    """
    place = torch.device(choose_device(device))
    precision, why_precision = choose_dtype(dtype, place)
    compiling, why_compile = choose_compile(compile, place)
    if place.type == "cuda":
        name = torch.cuda.get_device_name()
    else:
        name = f"{torch.get_num_threads()} threads" if place.type == "cpu" else "Apple GPU"
    precision_name = str(precision).removeprefix("torch.")
    how = f"{'compiled' if compiling else 'not compiled'}{why_compile}"
    why = f"{place.type} ({name}), {precision_name}{why_precision}, {how}"
    return World(place, precision, compiling, why)


def choose_device(wanted: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next((name for name, available in there.items() if available), "cpu")
    if not there.get(wanted, True):
        raise FolioError(f"--device={wanted}: torch {torch.__version__} finds none; --device=cpu")
    return wanted


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    # bfloat16 has float32's range and needs no scaler; before compute capability 8.0 (A100) it is
    # emulated and slow.
    brain = device.type != "cuda" or torch.cuda.get_device_capability() >= (8, 0)
    if wanted == "auto":
        if device.type != "cuda":
            return torch.float32, ""
        if brain:
            return torch.bfloat16, ""
        return torch.float16, " (this GPU has no fast bfloat16)"
    if (wanted == "bfloat16" and not brain) or (wanted == "float64" and device.type == "mps"):
        raise FolioError(f"--dtype={wanted}: this device cannot; --dtype=auto picks what it can")
    return getattr(torch, wanted), ""


def choose_compile(wanted: str | bool, device: torch.device) -> tuple[bool, str]:
    if wanted != "auto":
        return bool(wanted), ""
    if device.type != "cuda":
        return False, " (gains nothing at this size)" if device.type == "cpu" else ""
    return (True, "") if has_triton() else (False, " (Triton is not installed)")


@contextlib.contextmanager
def advice_when_out_of_memory(advice: str) -> Iterator[None]:
    """Within it, running out of memory becomes one line that says what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "allocate memory", "size calculation overflowed")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        raise FolioError(f"out of memory: try {advice}") from None


class StopSignal:
    """Within it, the first SIGINT or SIGTERM is a wish to stop, and the second one stops.

    with StopSignal() as stop:
        while not stop.wished: ...

    `stop.status` is then the exit status that shells expect: 130 or 143; 0 if nobody wished.
    """

    def __init__(self):
        self.status = 0

    @property
    def wished(self) -> bool:
        return self.status != 0

    def __enter__(self):
        self.before = {s: signal.getsignal(s) for s in (signal.SIGINT, signal.SIGTERM)}
        for number in self.before:
            signal.signal(number, self.wish)
        return self

    def wish(self, number: int, frame: FrameType | None) -> None:
        if self.wished:
            raise KeyboardInterrupt
        self.status = 128 + number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
