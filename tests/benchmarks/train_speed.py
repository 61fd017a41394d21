"""How fast a step of training is, beside the machine's own limit and beside a peer.

    python -m tests.benchmarks.train_speed
    python -m tests.benchmarks.train_speed --peer=../nanoGPT --json=speed.json

All train the same shape on the same random text, a whole step each time: batch, forward, backward,
clipping, update. The limit is what one large float32 matrix product reaches, measured in
the same rounds; a model's share of it is its tokens per second times 6 N + 12 L C T (see
training/report.py) over that.
"""

from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from configurator import Count, NonNegative, configure, run_main
from data.dataset import DATA, TokenStream
from model import GPT, GPTConfig
from tests.benchmarks.measuring import (
    in_its_own_process, interleaved, load_peer, matrix_product, rate, report,
)  # fmt: skip
from train import TrainConfig, training_batches, update
from training.kernels import attend_as_suits
from training.optimizer import make_optimizer
from training.report import flops_per_token
from training.run import Run
from training.world import World

VOCABULARY = 65


@dataclass
class SpeedConfig:
    # --- Shape ---
    n_layer: Count = 4  # blocks
    n_head: Count = 4  # attention heads per block
    n_embd: Count = 128  # channels
    block_size: Count = 64  # tokens of context
    batch_size: Count = 12  # sequences per step
    # --- Measurement ---
    rounds: Count = 7  # turns of each contestant
    seconds: NonNegative = 3.0  # of each turn
    matrix: Count = 1024  # rows of the matrices whose product is the machine's limit
    peer: str = ""  # a checkout of nanoGPT, to run the same work with its model and optimizer
    json: str = ""  # a file to write the figures to


def main() -> None:
    config = configure(SpeedConfig)
    tokens = config.batch_size * config.block_size
    contestants = {
        f"Folio, {optimizer}, {dtype}": rate(
            folio_step(config, optimizer, dtype), tokens, config.seconds
        )
        for optimizer, dtype in (("adamw", "float32"), ("muon", "float32"), ("muon", "bfloat16"))
    }
    if config.peer:
        load_peer(config.peer)  # complains here, if at all
        # Memory that is freed is kept in our process, but not in nanoGPT's.
        contestants["nanoGPT, adamw, float32"] = in_its_own_process(peer_rate, config)
    product, operations = matrix_product(config.matrix)
    contestants["limit"] = rate(product, operations, config.seconds / 3)
    figures = interleaved(contestants, config.rounds)
    limit = figures.pop("limit")
    base = figures.get("nanoGPT, adamw, float32") or figures["Folio, adamw, float32"]
    per_token = flops_per_token(GPT(shape_of(config)))
    rows = [
        {
            "step": name,
            "tokens/s": speeds,
            "ratio": median(speeds) / median(base),
            "share of the limit": f"{median(speeds) * per_token / median(limit):.0%}",
        }
        for name, speeds in figures.items()
    ]
    title = (
        f"Training, {config.n_layer} layers, {config.n_embd} channels, context "
        f"{config.block_size}, batch {config.batch_size}; limit: {median(limit) / 1e9:.0f} GFLOP/s "
        f"in float32"
    )
    report(title, rows, config.json)


def shape_of(config: SpeedConfig) -> GPTConfig:
    return GPTConfig(
        config.block_size, VOCABULARY, config.n_layer, config.n_head, config.n_embd, bias=False
    )


def random_text(vocabulary: int = VOCABULARY) -> np.ndarray:
    return np.random.default_rng(0).integers(vocabulary, size=2**20, dtype=np.uint16)


def folio_step(config: SpeedConfig, optimizer: str, dtype: str):
    """train.py's own update(), on a text that is in memory."""
    world = World().settle("cpu", dtype, False)
    settings = TrainConfig(
        batch_size=config.batch_size, block_size=config.block_size, optimizer=optimizer,
        max_iters=10**9, n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
    )  # fmt: skip
    model = GPT(shape_of(config))
    attend_as_suits(model, world.device, world.dtype)
    dataset = RandomDataset()
    made = make_optimizer(model, settings, world.dtype)
    run = Run(settings, DATA, dataset, world, model, model, made, world.scaler())
    batches = training_batches(run)

    def step():
        update(run, batches)
        run.step += 1

    return step


class RandomDataset:
    """As much of a Dataset as a step asks for."""

    def __init__(self, vocabulary: int = VOCABULARY):
        self.train = TokenStream.__new__(TokenStream)
        self.train.name, self.train.vocab_size = "random text", vocabulary
        self.train.shards = [random_text(vocabulary)]
        self.train.lengths = np.array([len(self.train.shards[0])])


def peer_rate(config: SpeedConfig):
    return rate(peer_step(config), config.batch_size * config.block_size, config.seconds)


def peer_step(config: SpeedConfig):
    """One iteration as nanoGPT's train.py makes it, with nanoGPT's model and optimizer."""
    peer = load_peer(config.peer)
    model = peer.GPT(
        peer.GPTConfig(
            block_size=config.block_size, vocab_size=VOCABULARY, n_layer=config.n_layer,
            n_head=config.n_head, n_embd=config.n_embd, dropout=0.0, bias=False,
        )
    )  # fmt: skip
    optimizer = model.configure_optimizers(0.1, 1e-3, (0.9, 0.99), "cpu")
    text, T = random_text(), config.block_size

    def batch():
        starts = torch.randint(len(text) - T, (config.batch_size,))
        windows = [torch.from_numpy(text[i : i + T + 1].astype(np.int64)) for i in starts]
        whole = torch.stack(windows)
        return whole[:, :-1].contiguous(), whole[:, 1:].contiguous()

    def step():
        _, loss = model(*batch())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


if __name__ == "__main__":
    run_main(main)
