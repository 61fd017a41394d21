"""What a machine can do: its fastest device, the precision that is good at, whether compiling pays.

"auto" takes the best there is; whoever asks for what there is not gets a FolioError.
"""

import contextlib
import ctypes
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
from torch.utils._triton import has_triton

from configurator import FolioError

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Switch = Literal["auto", True, False]


def choose_device(wanted: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next((name for name, available in there.items() if available), "cpu")
    if not there.get(wanted, True):
        raise FolioError(f"--device={wanted}: torch {torch.__version__} finds none; --device=cpu")
    return wanted


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    brain = has_bfloat16(device)
    if wanted == "auto":
        if brain:
            return torch.bfloat16, ""
        if device.type == "cuda":
            return torch.float16, " (this GPU has no fast bfloat16)"
        return torch.float32, ""
    refused = wanted == "bfloat16" and device.type == "cuda" and not brain
    if refused or (wanted == "float64" and device.type == "mps"):
        raise FolioError(f"--dtype={wanted}: this device cannot; --dtype=auto picks what it can")
    return getattr(torch, wanted), ""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 as such, and fast, instead of emulating it.

    bfloat16 has float32's range, so that nothing overflows that would not there.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)  # since the A100
    if device.type != "cpu":
        return False
    # x86 has had it since about 2020 (AVX512_BF16) and 2023 (AMX).
    return processor_has("avx512_bf16") or processor_has("amx_tile")


def processor_has(instructions: str) -> bool:
    return getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)()  # private in torch


def is_intel() -> bool:
    """Whether this is a processor of Intel's; False where torch cannot tell."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return "Intel" in known.get("cpu_name", "")


def choose_compile(wanted: str | bool, device: torch.device) -> tuple[bool, str]:
    missing = what_compiling_lacks(device)
    if wanted is True and missing:
        raise FolioError(f"--compile: {missing}; leave it at auto")
    if wanted != "auto":
        return wanted, ""
    if device.type != "cuda":
        return False, " (gains little on a CPU)" if device.type == "cpu" else ""
    return not missing, f" ({missing})" if missing else ""


def what_compiling_lacks(device: torch.device) -> str:
    """What torch.compile would not find on this machine, or ''."""
    if device.type == "cpu":
        names = (os.environ.get("CXX", "g++"), "c++", "clang++", "cl")
        return "" if any(map(shutil.which, names)) else "torch finds no C++ compiler (g++)"
    if device.type != "cuda":
        return ""
    if not has_triton():
        return "Triton is not installed, or does not know this GPU"
    if sys.platform == "win32":  # where Triton brings the rest
        return ""
    # Triton launches its kernels from a module in C, which it compiles.
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "Triton finds no C compiler (gcc)"
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if headers.exists() else "Triton finds no Python.h (python3-dev)"


def keep_freed_memory() -> None:
    """Have what one step frees stay with the process, for the next one to use as it is.

    A step, or a token that is written, allocates as much as the one before it has freed. Linux's C
    library gives large pieces back, and Linux clears each page of what it hands out anew: a tenth
    of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # which musl, Alpine's C library, has not
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # unused memory is given back from so many bytes on
        mallopt(M_MMAP_THRESHOLD, 2**25)  # so large a piece, whenever it is freed: the most allowed


def note_on_company(passed: float, used: float) -> str:
    """What to try where other programs keep torch from its cores; '' where they do not.

    passed: seconds; used: those that processors have given to this process meanwhile.

    Torch's threads meet after each operation, and who waits does so busily. One of them that has
    to share its core with another program thus holds up all, at every step.
    """
    threads = torch.get_num_threads()
    # More wish to run than there are cores; Windows does not say.
    crowded = hasattr(os, "getloadavg") and os.getloadavg()[0] > (os.cpu_count() or 1) + 0.5
    if threads == 1 or not crowded or used > 0.8 * threads * passed:
        return ""
    return (
        f"NOTE     other programs use the cores of torch's {threads} threads, which wait for one\n"
        f"         another. OMP_NUM_THREADS={threads - 1} before the command may be much faster"
    )


@contextlib.contextmanager
def advice_when_out_of_memory(advice: str) -> Iterator[None]:
    """Within it, running out of memory becomes one line that says what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "allocate memory", "size calculation overflowed", "ALLOC_FAILED")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        raise FolioError(f"out of memory: try {advice}") from None
