"""Training GPT-2 (124M) on one GPU: tokens per second, MFU, memory.

    python -m tests.benchmarks.gpu                          # micro-batches of 16, 32 and 64
    python -m tests.benchmarks.gpu --profile=traces         # where the time goes
    python -m tests.benchmarks.gpu --tiny                   # a small model, on any machine

The step is train.py's train_step(), compiled, in bfloat16, on random tokens. The first steps, which
compile and allocate memory, are not counted. MFU is explained in engine/flops.py. A trace opens
in chrome://tracing or https://ui.perfetto.dev.
"""

import gc
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.autograd import DeviceType

from configurator import FolioError, NonNegativeInt, PositiveInt, configure, run_main
from data.dataset import ShardedTokens
from engine.device import AutoBool, choose_device
from engine.flops import peak_tokens_per_second
from engine.train_config import TrainConfig
from model import GPTConfig
from tests.benchmarks.measuring import report_results, split_csv, synchronize
from tests.benchmarks.train_speed import make_step, write_random_tokens


@dataclass
class GpuConfig:
    # --- Work ---
    batch_sizes: str = "16,32,64"  # sequences per micro-batch, separated by commas
    optimizers: str = "adamw,muon"  # separated by commas
    compile: AutoBool = "auto"  # as in train.py
    tiny: bool = False  # a small model, for a machine without a GPU
    # --- Measurement ---
    steps: PositiveInt = 20  # counted steps
    warmup: NonNegativeInt = 5  # steps before them
    json: str = ""  # a file for the results
    profile: str = ""  # a folder for traces of three steps, one for each row


def main() -> None:
    config = configure(GpuConfig)
    if not (config.tiny or torch.cuda.is_available()):
        raise FolioError("no GPU found; --tiny measures a small model on any machine")
    optimizers, sizes = split_csv(config.optimizers), split_csv(config.batch_sizes)
    if not set(optimizers) <= {"adamw", "muon"}:
        raise FolioError(f"--optimizers={config.optimizers}: give adamw, muon or adamw,muon")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise FolioError(f"--batch_sizes={config.batch_sizes}: give numbers, separated by commas")
    vocab_size = 65 if config.tiny else GPTConfig().vocab_size
    # A memory-mapped file cannot be deleted on Windows.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        tokens = write_random_tokens(Path(folder), vocab_size)
        rows = [
            measure(int(size), optimizer, tokens, config)
            for optimizer in optimizers
            for size in sizes
        ]
    report_results("Tiny" if config.tiny else "One step of GPT-2 (124M)", rows, config.json)


def measure(
    batch_size: int, optimizer: str, tokens: ShardedTokens, config: GpuConfig
) -> dict[str, Any]:
    device = choose_device(compile=config.compile)
    on_cuda = device.torch_device.type == "cuda"
    gc.collect()  # the model of the row before, whose memory would be counted
    torch.compiler.reset()  # code compiled for several shapes would be more general, and slower
    shape = GPTConfig(pad_vocab_to=64)
    if config.tiny:
        shape = GPTConfig(16, tokens.vocab_size, 2, 2, 32, pad_vocab_to=64)
    settings = TrainConfig(
        batch_size=batch_size, block_size=shape.block_size, optimizer=optimizer,
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, max_iters=10**9,
    )  # fmt: skip
    step = make_step(settings, shape, tokens, device)

    def timed_step() -> float:
        start = time.perf_counter()
        step()
        synchronize()
        return time.perf_counter() - start

    if on_cuda:
        torch.cuda.reset_peak_memory_stats()
    seconds = [timed_step() for _ in range(config.warmup + config.steps)][config.warmup :]
    if config.profile:
        profile(timed_step, Path(config.profile) / f"{optimizer}_{batch_size}.json")
    speeds = [settings.tokens_per_step / s for s in seconds]
    peak = peak_tokens_per_second(shape, device, world_size=1)
    return {
        "optimizer": optimizer,
        "micro-batch": str(batch_size),
        "ms per step": 1e3 * median(seconds),
        "tokens/s": speeds,
        "MFU": f"{median(speeds) / peak:.1%}" if peak else "unknown",
        "peak memory, GiB": torch.cuda.max_memory_allocated() / 2**30 if on_cuda else None,
        "device": device.description,
    }


def profile(step: Callable[[], float], path: Path) -> None:
    """Write a trace of three steps to `path`, and print the kernels that take longest."""
    path.parent.mkdir(parents=True, exist_ok=True)
    n_steps = 3
    with torch.profiler.profile() as recording:
        for _ in range(n_steps):
            step()
    recording.export_chrome_trace(str(path))
    # On a GPU only kernels count, because the operations that start kernels have the same times in
    # the list. Annotations do not count: an optimizer's step is one, and contains its kernels.
    on_cuda = torch.cuda.is_available()
    device_type = DeviceType.CUDA if on_cuda else DeviceType.CPU
    # "self": without the operations that an operation calls
    times = [
        (event.self_device_time_total if on_cuda else event.self_cpu_time_total, event)
        for event in recording.key_averages()
        if event.device_type == device_type and not event.is_user_annotation
    ]
    total = sum(microseconds for microseconds, _ in times)
    print(f"\nms per step, share, calls per step, name; together {total / n_steps / 1e3:.1f} ms")
    for microseconds, event in sorted(times, key=lambda item: -item[0])[:25]:
        print(
            f"{microseconds / n_steps / 1e3:8.2f} {microseconds / total:6.1%} "
            f"{event.count / n_steps:6.0f}  {event.key[:100]}"
        )


if __name__ == "__main__":
    run_main(main)
