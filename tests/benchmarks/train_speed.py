"""How fast a training step is, compared with the machine's limit and with nanoGPT.

    python -m tests.benchmarks.train_speed
    python -m tests.benchmarks.train_speed --peer=../nanoGPT --json=speed.json

All candidates train a model of the same size on the same random tokens, and make complete steps:
batch, forward, backward, clipping, optimizer. The limit is the speed of one large float32 matrix
product, measured in the same rounds. A candidate reaches the fraction of it that is its tokens per
second times its FLOPs per token (flops_per_token() in engine/flops.py), divided by the limit.
"""

import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from statistics import median

import numpy as np
import torch

from configurator import NonNegativeFloat, PositiveInt, configure, run_main
from data.dataset import ShardedTokens, prefetch
from engine.device import ComputeDevice, choose_device
from engine.distributed import Distributed
from engine.flops import flops_per_token
from engine.optimizer import make_optimizer
from engine.run import wrap_model
from engine.train_config import TrainConfig
from model import GPT, GPTConfig
from tests.benchmarks.measuring import (
    Candidate, in_subprocess, load_peer, matrix_product, report_results, run_interleaved,
    throughput,
)  # fmt: skip
from train import train_step, training_batches

VOCAB_SIZE = 65
NANOGPT = "nanoGPT, adamw, float32"


@dataclass
class TrainSpeedConfig:
    # --- Model ---
    n_layer: PositiveInt = 4  # blocks
    n_head: PositiveInt = 4  # attention heads per block
    n_embd: PositiveInt = 128  # channels
    block_size: PositiveInt = 64  # context length in tokens
    batch_size: PositiveInt = 12  # sequences per step
    # --- Measurement ---
    rounds: PositiveInt = 7  # measurements of each candidate
    seconds: NonNegativeFloat = 3.0  # per measurement
    matrix: PositiveInt = 1024  # rows of the matrices whose product is the limit
    peer: str = ""  # a checkout of nanoGPT, to measure its model and optimizer, too
    json: str = ""  # a file for the results


def main() -> None:
    config = configure(TrainSpeedConfig)
    if config.peer:
        load_peer(config.peer)  # raises its error, if any, before anything is measured
    # A memory-mapped file cannot be deleted on Windows.
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        results = run_interleaved(make_candidates(config, Path(folder)), config.rounds)
    limit = median(results.pop("limit"))
    base = median(results.get(NANOGPT) or results["Folio, adamw, float32"])
    flops = flops_per_token(model_config(config))
    rows = [
        {
            "step": name,
            "tokens/s": speeds,
            "ratio": median(speeds) / base,
            "of the limit": f"{median(speeds) * flops / limit:.0%}",
        }
        for name, speeds in results.items()
    ]
    title = (
        f"Training, {config.n_layer} layers, {config.n_embd} channels, context "
        f"{config.block_size}, batch {config.batch_size}; limit: {limit / 1e9:.0f} GFLOP/s "
        f"in float32"
    )
    report_results(title, rows, config.json)


def make_candidates(config: TrainSpeedConfig, folder: Path) -> dict[str, Candidate]:
    tokens = write_random_tokens(folder, VOCAB_SIZE)
    candidates = {}
    for optimizer, dtype in (("adamw", "float32"), ("muon", "float32"), ("muon", "bfloat16")):
        settings = TrainConfig(
            batch_size=config.batch_size, block_size=config.block_size, optimizer=optimizer,
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd, max_iters=10**9,
        )  # fmt: skip
        device = choose_device("cpu", dtype, compile=False)
        step = make_step(settings, model_config(config), tokens, device)
        candidates[f"Folio, {optimizer}, {dtype}"] = throughput(
            step, settings.tokens_per_step, config.seconds
        )
    if config.peer:
        # In its own process: Folio's process keeps freed memory, nanoGPT's does not.
        candidates[NANOGPT] = in_subprocess(peer_throughput, config)
    product, n_flops = matrix_product(config.matrix)
    candidates["limit"] = throughput(product, n_flops, config.seconds / 3)
    return candidates


def model_config(config: TrainSpeedConfig) -> GPTConfig:
    return GPTConfig(
        config.block_size, VOCAB_SIZE, config.n_layer, config.n_head, config.n_embd, bias=False
    )


# --- Folio's step; the benchmark gpu.py uses it, too ---


def random_tokens(vocab_size: int) -> np.ndarray:
    return np.random.default_rng(0).integers(vocab_size, size=2**20, dtype=np.uint16)


def write_random_tokens(folder: Path, vocab_size: int) -> ShardedTokens:
    random_tokens(vocab_size).tofile(folder / "train.bin")
    return ShardedTokens(folder, "train", {}, vocab_size)


def make_step(
    config: TrainConfig, shape: GPTConfig, tokens: ShardedTokens, device: ComputeDevice
) -> Callable[[], None]:
    """A function that makes one training step as train.py does, with a new model."""
    dist = Distributed()  # one process
    torch.manual_seed(0)
    shape.float32_attention = device.use_float32_attention(shape.block_size)
    model = GPT(shape).to(device.torch_device, device.param_dtype)
    wrapped_model = wrap_model(model, config, device, dist)
    optimizer, scaler = make_optimizer(model, config, device.dtype), device.grad_scaler()
    batches = prefetch(training_batches(tokens, config, 0, device, dist))

    def step() -> None:
        train_step(wrapped_model, optimizer, scaler, batches, config, 0, device, dist)

    return step


# --- nanoGPT's step ---


def peer_throughput(config: TrainSpeedConfig) -> Candidate:
    return throughput(peer_step(config), config.batch_size * config.block_size, config.seconds)


def peer_step(config: TrainSpeedConfig) -> Callable[[], None]:
    """One iteration as nanoGPT's train.py makes it, with nanoGPT's model and optimizer."""
    peer = load_peer(config.peer)
    model = peer.GPT(
        peer.GPTConfig(
            block_size=config.block_size, vocab_size=VOCAB_SIZE, n_layer=config.n_layer,
            n_head=config.n_head, n_embd=config.n_embd, dropout=0.0, bias=False,
        )
    )  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    tokens, T = random_tokens(VOCAB_SIZE), config.block_size

    def batch() -> tuple[torch.Tensor, torch.Tensor]:
        starts = torch.randint(len(tokens) - T, (config.batch_size,))
        windows = [torch.from_numpy(tokens[i : i + T + 1].astype(np.int64)) for i in starts]
        stacked = torch.stack(windows)
        return stacked[:, :-1].contiguous(), stacked[:, 1:].contiguous()

    def step() -> None:
        _, loss = model(*batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run_main(main)
