"""Choose the device, the dtype and whether to compile; move tensors to the device.

    device = choose_device("auto")            # cuda, else mps, else cpu
    inputs, targets = device.to_device(inputs, targets)
    with device.autocast():                   # matrix products in device.dtype
        loss = model(inputs, targets)

"auto" picks the best that this machine supports; requests for anything that it does not support
raise FolioError.
"""

import contextlib
import ctypes
import importlib.util
import math
import os
import shutil
import sys
import sysconfig
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from configurator import FolioError

DeviceName = Literal["auto", "cuda", "mps", "cpu"]
DTypeName = Literal["auto", "float32", "bfloat16", "float16", "float64"]
AutoBool = Literal["auto", True, False]

# torch's attention in bfloat16 is made for long contexts. On CPUs, below this many tokens, it takes
# 1.5 to 4 times as long as attention in float32 (torch 2.13; AMD EPYC and Intel Xeon).
MIN_BFLOAT16_ATTENTION = 192


@dataclass(frozen=True)
class ComputeDevice:
    """Where and how to compute.

    dtype: of matrix products under autocast(). description: one line for the banner, for example
    "cpu (2 threads), float32, torch.compile off (little gain on a CPU)".
    """

    torch_device: torch.device
    dtype: torch.dtype
    compile: bool
    description: str

    @property
    def param_dtype(self) -> torch.dtype:
        """The dtype of weights and gradients in training: float32, or float64 if dtype is."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    @property
    def name(self) -> str:
        """The name of the GPU, such as "NVIDIA H100 80GB HBM3"; "" without CUDA."""
        if self.torch_device.type != "cuda":
            return ""
        return torch.cuda.get_device_name(self.torch_device)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Inside, matrix products run in `dtype`; sums that need more precision stay float32."""
        if self.dtype == self.param_dtype:
            return contextlib.nullcontext()
        return torch.autocast(self.torch_device.type, self.dtype)

    def manual_seed(self, seed: int) -> None:
        """Seed the global generators of the CPU and of this device, from which dropout draws.

        torch.manual_seed() would also seed the generators of all other devices. On a machine with
        an H100, that took 0.8 ms in every step.
        """
        torch.default_generator.manual_seed(seed)  # the CPU's
        if self.torch_device.type == "cuda":
            torch.cuda.manual_seed(seed)
        elif self.torch_device.type == "mps":
            torch.mps.manual_seed(seed)

    def grad_scaler(self) -> torch.amp.GradScaler:
        """Scales the loss so that small gradients do not become 0 in float16; else does nothing."""
        return torch.amp.GradScaler(self.torch_device.type, enabled=self.dtype == torch.float16)

    def to_device(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copies on the device. On CUDA the copy runs in the background; any thread may call."""
        if self.torch_device.type != "cuda":
            # Never non_blocking: the copy to an Apple GPU could read memory that is already freed.
            return tuple(tensor.to(self.torch_device) for tensor in tensors)
        # prefetch() calls this in another thread. There torch would use GPU 0, and memory on it.
        with torch.cuda.device(self.torch_device):
            # Only from pinned memory can the GPU copy without the CPU.
            return tuple(
                tensor.pin_memory().to(self.torch_device, non_blocking=True) for tensor in tensors
            )

    def eval_batch_size(self, batch_size: int, block_size: int) -> int:
        """Sequences in a batch of an evaluation, at most batch_size.

        On a CPU, a batch has at most 4,096 tokens, so that the progress bar moves.
        """
        if self.torch_device.type != "cpu":
            return batch_size
        return max(1, min(batch_size, 4096 // block_size))

    def generator(self, seed: int) -> torch.Generator:
        """A random generator for sampling, apart from the global one, so training is not changed.

        It is on the device, but for MPS on the CPU: torch sampled wrongly on some Apple GPUs.
        """
        on_cpu = self.torch_device.type == "mps"
        return torch.Generator("cpu" if on_cpu else self.torch_device).manual_seed(seed)

    def use_float32_attention(self, block_size: int) -> bool:
        """True if attention in float32 is faster here: on CPUs, for a short context."""
        is_bfloat16_cpu = self.torch_device.type == "cpu" and self.dtype == torch.bfloat16
        return is_bfloat16_cpu and block_size < MIN_BFLOAT16_ATTENTION


def choose_device(
    device: DeviceName = "auto",
    dtype: DTypeName = "auto",
    compile: AutoBool = "auto",
    local_rank: int = 0,
    world_size: int = 1,
    num_threads: int = 0,
) -> ComputeDevice:
    """Choose device, dtype and compile, and prepare this process for them.

    With CUDA, this process's GPU becomes the current one; with dtype=float32, matrix products use
    TF32.
    On a Linux CPU, freed memory stays with the process.
    local_rank: number of this process on its node; it chooses the GPU. world_size: number of
    processes in the job.
    num_threads: CPU threads; 0: OMP_NUM_THREADS, or the number of cores that may be used.
    Raises FolioError if this machine does not support a request.
    """
    torch_device = find_device(device, local_rank, world_size)
    chosen_dtype = choose_dtype(dtype, torch_device)
    chosen_compile, compile_note = choose_compile(compile, torch_device)
    name, dtype_note = "Apple GPU", ""
    if torch_device.type == "cuda":
        torch.cuda.set_device(torch_device)
        name = torch.cuda.get_device_name(torch_device)
        if chosen_dtype == torch.float16 and dtype == "auto":
            dtype_note = " (this GPU has no fast bfloat16)"
        elif chosen_dtype == torch.float32:
            torch.set_float32_matmul_precision("high")  # up to 8 times as fast since Ampere
            dtype_note = " (TF32 in matrix products)"
    elif torch_device.type == "cpu":
        keep_freed_memory()
        is_default = not num_threads and "OMP_NUM_THREADS" not in os.environ
        if is_default and cpu_quota() < torch.get_num_threads():
            # In a container, torch starts a thread for each core of the whole machine.
            num_threads = max(int(cpu_quota()), 1)
        if num_threads:
            torch.set_num_threads(num_threads)
        threads = torch.get_num_threads()
        name = "1 thread" if threads == 1 else f"{threads} threads"

    processes = f"{world_size} processes, each on " if world_size > 1 else ""
    dtype_name = str(chosen_dtype).removeprefix("torch.")
    on_or_off = "on" if chosen_compile else "off"
    description = (
        f"{processes}{torch_device.type} ({name}), {dtype_name}{dtype_note}, "
        f"torch.compile {on_or_off}{compile_note}"
    )
    return ComputeDevice(torch_device, chosen_dtype, chosen_compile, description)


def find_device(requested: DeviceName, local_rank: int = 0, world_size: int = 1) -> torch.device:
    """The device of this process. Raises FolioError if it is not available."""
    available = {
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available() and world_size == 1,
        "cpu": True,
    }
    if requested == "mps" and world_size > 1:  # torch has no collectives for MPS
        raise FolioError("--device=mps does not work with several processes; use --device=cpu")
    if requested == "auto":
        requested = next(name for name, is_available in available.items() if is_available)
    if not available[requested]:
        raise FolioError(
            f"--device={requested}: not available (torch {torch.__version__}); use --device=cpu"
        )
    if requested != "cuda":
        return torch.device(requested)
    n_gpus = torch.cuda.device_count()
    if n_gpus == 1:  # the only one on the node, or the only one that SLURM shows to each process
        return torch.device("cuda", 0)
    if local_rank >= n_gpus:
        raise FolioError(f"only {n_gpus} GPUs on this node; use --nproc_per_node={n_gpus}")
    return torch.device("cuda", local_rank)


# --- dtype ---


def choose_dtype(requested: DTypeName, torch_device: torch.device) -> torch.dtype:
    """auto: bfloat16 where it is fast, else float16 on CUDA, else float32.

    Raises FolioError if the device does not support the requested dtype.
    """
    has_bf16, device_type = has_bfloat16(torch_device), torch_device.type
    if requested == "auto":
        if has_bf16:
            return torch.bfloat16
        return torch.float16 if device_type == "cuda" else torch.float32
    if (requested == "bfloat16" and device_type == "cuda" and not has_bf16) or (
        requested == "float64" and device_type == "mps"
    ):
        raise FolioError(f"--dtype={requested}: not supported on this device; use --dtype=auto")
    return getattr(torch, requested)


def has_bfloat16(torch_device: torch.device) -> bool:
    """True if the device has instructions for matrix products in bfloat16.

    bfloat16 has the exponent range of float32, so the loss need not be scaled.
    """
    if torch_device.type == "cuda":
        return torch.cuda.get_device_capability(torch_device) >= (8, 0)  # Ampere or newer
    if torch_device.type != "cpu":
        return False
    # x86 processors have them since about 2020 (AVX512_BF16) and 2023 (AMX).
    return cpu_supports("avx512_bf16") or cpu_supports("amx_tile")


def cpu_supports(instructions: str) -> bool:
    """True if the CPU has these instructions; False where torch cannot say."""
    function = getattr(torch.cpu, f"_is_{instructions}_supported", None)  # private torch API
    return function is not None and function()


def cpu_quota(file: str | Path = "/sys/fs/cgroup/cpu.max") -> float:
    """Cores that this container may use, such as 2.0 with `docker run --cpus=2`; else infinity.

    file: Linux writes "200000 100000" there for 200 ms of CPU time in each 100 ms, and "max 100000"
    for no limit.
    """
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path(file).read_text().split()
        return int(quota) / int(period)
    return math.inf


def is_intel_cpu() -> bool:
    """True on Intel CPUs; False where torch cannot say."""
    get_capabilities = getattr(torch.cpu, "get_capabilities", dict)  # not in every torch
    return "Intel" in get_capabilities().get("cpu_name", "")


# --- torch.compile ---


def choose_compile(requested: AutoBool, torch_device: torch.device) -> tuple[bool, str]:
    """(compile, note): auto compiles on CUDA if everything needed for it is installed.

    The note, such as " (no C compiler found (gcc))", explains a decision of auto; it may be "".
    Raises FolioError if compiling is requested and something for it is missing.
    """
    missing = missing_for_compile(torch_device)
    if requested is True and missing:
        raise FolioError(f"--compile: {missing}; use --compile=auto")
    if requested != "auto":
        return requested, ""
    if torch_device.type != "cuda":
        return False, " (little gain on a CPU)" if torch_device.type == "cpu" else ""
    return not missing, f" ({missing})" if missing else ""


def missing_for_compile(torch_device: torch.device) -> str:
    """What torch.compile needs for this device and does not find, or ""."""
    if torch_device.type == "cpu":
        compilers = (os.environ.get("CXX", "g++"), "c++", "clang++", "cl")
        return "" if any(map(shutil.which, compilers)) else "no C++ compiler found (g++)"
    if torch_device.type != "cuda":
        return ""
    has_triton = importlib.util.find_spec("triton") is not None
    if not has_triton or torch.cuda.get_device_capability(torch_device) < (7, 0):
        return "Triton is missing or does not support this GPU"
    if sys.platform == "win32":  # Triton for Windows includes a compiler
        return ""
    # Triton starts its kernels by a module in C, which it compiles.
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "no C compiler found (gcc)"
    header = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if header.exists() else "Python.h not found (install python3-dev)"


# --- Memory ---


def keep_freed_memory() -> None:
    """Let freed memory stay with this process, on Linux with glibc.

    Each training step allocates what the step before has freed. By default, glibc returns large
    blocks to Linux, and Linux clears every page that it hands out again: 10% of a step on a CPU.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:  # other C libraries, such as musl, do not have it
        M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
        mallopt(M_TRIM_THRESHOLD, 2**31 - 1)  # bytes of free memory above which it is returned
        mallopt(M_MMAP_THRESHOLD, 2**25)  # larger blocks (in bytes) are returned at once


def start_reading(tensor: torch.Tensor) -> Callable[[], list]:
    """Start to copy a tensor to the CPU. The function that is returned waits, and returns a list.

    On CUDA it waits for this copy only, not for work that has been started after this call.
    """
    if tensor.device.type != "cuda":
        return tensor.tolist
    on_cpu = tensor.to("cpu", non_blocking=True)  # into pinned memory
    copied = torch.cuda.Event()
    copied.record(torch.cuda.current_stream(tensor.device))

    def read() -> list:
        copied.synchronize()
        return on_cpu.tolist()

    return read


@contextlib.contextmanager
def explain_out_of_memory(hint: str) -> Iterator[None]:
    """Inside, running out of memory raises FolioError("out of memory; HINT")."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise FolioError(f"out of memory; {hint}") from error


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    messages = (  # the allocators of the CPU and of Apple GPUs raise a plain RuntimeError
        "DefaultCPUAllocator: can't allocate memory",
        "DefaultCPUAllocator: not enough memory",
        "MPS backend out of memory",
        "Storage size calculation overflowed",
    )
    return any(message in str(error) for message in messages)
