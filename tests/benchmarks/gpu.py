"""What one GPU makes of training GPT-2 (124M): tokens per second, utilisation, memory.

    python -m tests.benchmarks.gpu                          # micro-batches of 16, 32 and 64
    python -m tests.benchmarks.gpu --profile=traces         # where the time goes, for a browser
    python -m tests.benchmarks.gpu --tiny                   # on any machine, to see that it runs

The step is train.py's own update(), compiled, in bfloat16, on random tokens; the first steps, in
which things are compiled and memory is laid out, are not counted. MFU is 6 N + 12 L C T operations
per token over the GPU's peak (training/report.py). A trace opens in chrome://tracing or Perfetto.
"""

import time
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import torch

from configurator import Count, FolioError, Whole, configure, run_main
from model import GPT, GPTConfig
from tests.benchmarks.measuring import names_in, report, synchronise
from tests.benchmarks.train_speed import RandomDataset
from train import TrainConfig, training_batches, update
from training.optimizer import make_optimizer
from training.report import tokens_per_second_at_peak
from training.run import Run
from training.world import World


@dataclass
class GpuConfig:
    # --- Work ---
    batch_sizes: str = "16,32,64"  # sequences per micro-batch, parted by commas
    optimizers: str = "adamw,muon"  # parted by commas
    tiny: bool = False  # a small model, for a machine without a GPU
    # --- Measurement ---
    steps: Count = 20  # that are counted
    warmup: Whole = 5  # steps before them
    json: str = ""  # a file to write the figures to
    profile: str = ""  # a folder for traces of three steps, one of each row


def main() -> None:
    config = configure(GpuConfig)
    if not (config.tiny or torch.cuda.is_available()):
        raise FolioError("there is no GPU: --tiny runs a small model on any machine")
    optimizers, sizes = names_in(config.optimizers), names_in(config.batch_sizes)
    if not set(optimizers) <= {"adamw", "muon"}:
        raise FolioError(f"--optimizers={config.optimizers}: there are adamw and muon")
    if not all(size.isdecimal() and int(size) for size in sizes):
        raise FolioError(f"--batch_sizes={config.batch_sizes}: numbers, parted by commas")
    rows = [measure(int(size), optimizer, config) for optimizer in optimizers for size in sizes]
    report("One step of GPT-2 (124M)" if not config.tiny else "Tiny", rows, config.json)


def measure(batch_size: int, optimizer: str, config: GpuConfig) -> dict:
    world = World().settle()
    torch.compiler.reset()  # or shapes seen before would make this one's code more general, slower
    shape = GPTConfig(pad_vocab_to=64)
    if config.tiny:
        shape = GPTConfig(16, 65, 2, 2, 32, pad_vocab_to=64)
    settings = TrainConfig(
        batch_size=batch_size, block_size=shape.block_size, optimizer=optimizer,
        n_layer=shape.n_layer, n_head=shape.n_head, n_embd=shape.n_embd, max_iters=10**9,
    )  # fmt: skip
    torch.manual_seed(0)
    model = GPT(shape).to(world.device, world.weights_dtype)
    made = make_optimizer(model, settings, world.dtype)
    run = Run(
        settings, Path(), RandomDataset(shape.vocab_size), world, model, world.runner_for(model),
        made, world.scaler(),
    )  # fmt: skip
    batches = training_batches(run)

    def step() -> float:
        begun = time.perf_counter()
        update(run, batches)
        synchronise()
        run.step += 1
        return time.perf_counter() - begun

    if world.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = [step() for _ in range(config.warmup + config.steps)][config.warmup :]
    if config.profile:
        profile(step, Path(config.profile) / f"{optimizer}_{batch_size}.json")
    speeds = [settings.tokens_per_step / s for s in seconds]
    peak = tokens_per_second_at_peak(run)
    memory = torch.cuda.max_memory_allocated() / 1e9 if world.device.type == "cuda" else None
    return {
        "optimizer": optimizer,
        "micro-batch": str(batch_size),
        "ms per step": 1e3 * median(seconds),
        "tokens/s": speeds,
        "MFU": f"{median(speeds) / peak:.1%}" if peak else "not known",
        "peak memory, GB": memory,
        "machine": world.why,
    }


def profile(step, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with torch.profiler.profile() as recording:
        for _ in range(3):
            step()
    recording.export_chrome_trace(str(path))
    key = "cuda_time_total" if torch.cuda.is_available() else "cpu_time_total"
    print(recording.key_averages().table(sort_by=key, row_limit=25))


if __name__ == "__main__":
    run_main(main)
