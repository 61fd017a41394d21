"""How fast text is written, beside the machine's own limit and beside a peer.

    python -m tests.benchmarks.sample_speed --sizes=small,medium
    python -m tests.benchmarks.sample_speed --peer=../nanoGPT --json=sampling.json

Each writes the same number of tokens with random weights of the same shape. The limit is one
matrix-vector product for each weight of the model, by the same kernels and in the same rounds: what
is left of the time goes into attention and into calling small operations. The last columns are
Folio's alone: ten texts written as one batch, in tokens per second of all ten together, and how
many times the rate of one that is.
"""

from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
import torch.nn.functional as F

from configurator import Count, FolioError, configure, run_main
from model import GPT, GPTConfig
from tests.benchmarks.measuring import (
    in_its_own_process,
    interleaved,
    load_peer,
    names_in,
    rate,
    report,
)
from training.kernels import packed_linear, ready_to_write
from training.machine import Precision
from training.world import World

# name -> layers, heads, channels, context, vocabulary, tokens to write, tokens of the prompt
SIZES = {
    "tiny": (1, 2, 16, 16, 65, 8, 1),
    "small": (4, 4, 128, 64, 65, 500, 1),
    "medium": (6, 6, 384, 256, 65, 500, 1),
    "124M": (12, 12, 768, 1024, 50257, 160, 1),
    "124M, 900 tokens in": (12, 12, 768, 1024, 50257, 30, 900),
}


@dataclass
class SampleSpeedConfig:
    # --- What to write ---
    sizes: str = "small,medium,124M,124M 900 tokens in"  # names, parted by commas
    dtype: Precision = "float32"  # of the weights; auto is what sample.py would take
    # --- Measurement ---
    rounds: Count = 3  # turns of each contestant
    peer: str = ""  # a checkout of nanoGPT, to write as much with its generate()
    json: str = ""  # a file to write the figures to


def main() -> None:
    config = configure(SampleSpeedConfig)
    names = {name.replace(",", ""): name for name in SIZES}
    wanted = names_in(config.sizes)
    for size in wanted:
        if size not in names:
            raise FolioError(f"--sizes={size}: there are {', '.join(names)}")
    if config.peer:
        load_peer(config.peer)  # complains here, if at all
    rows = [measure(names[size], config) for size in wanted]
    report(f"Sampling, {config.dtype}, tokens per second", rows, config.json)


def measure(name: str, config: SampleSpeedConfig) -> dict:
    layers, heads, channels, context, vocabulary, tokens, prompt = SIZES[name]
    shape = GPTConfig(context, vocabulary, layers, heads, channels, bias=True)
    device = World().settle("cpu").device
    # Laid out for one text and for ten.
    one, ten = (ready_to_write(GPT(shape), device, config.dtype, texts) for texts in (1, 10))
    dtype = one.transformer.wte.weight.dtype
    start = torch.randint(vocabulary, (1, prompt))

    def write(model, texts):
        for _ in model.generate(start.expand(texts, -1), tokens):
            pass

    contestants = {
        "Folio": rate(lambda: write(one, 1), tokens, 0),
        "limit": rate(vector_products(one, dtype), 1, 0.5),
        "ten at once": rate(lambda: write(ten, 10), 10 * tokens, 0),
    }
    if config.peer:
        # Memory that is freed is kept in our process, but not in nanoGPT's.
        contestants["nanoGPT"] = in_its_own_process(peer_rate, config.peer, name, dtype)
    figures = interleaved(contestants, config.rounds)
    row = {"size": name, "Folio": figures["Folio"]}
    if config.peer:
        row["nanoGPT"] = figures["nanoGPT"]
        row["ratio"] = median(figures["Folio"]) / median(figures["nanoGPT"])
    return row | {
        "limit": figures["limit"],
        "share of the limit": f"{median(figures['Folio']) / median(figures['limit']):.0%}",
        "ten at once": figures["ten at once"],
        "ten times": median(figures["ten at once"]) / median(figures["Folio"]),
    }


def vector_products(model: GPT, dtype: torch.dtype):
    """One product of each weight matrix with one vector, made as the model makes it."""
    plain = GPT(model.config).to(dtype)
    matrices = [p for n, p in plain.named_parameters() if p.dim() == 2 and "wpe" not in n]
    vectors = [torch.randn(1, p.size(1), dtype=dtype) for p in matrices]
    if isinstance(model.transformer.h[0].mlp.c_fc, torch.nn.Linear):
        products = [partial(F.linear, weight=matrix) for matrix in matrices]
    else:
        products = [packed_linear(matrix) for matrix in matrices]

    @torch.inference_mode()
    def multiply():
        for product, vector in zip(products, vectors, strict=True):
            product(vector)

    return multiply


def peer_rate(path: str, name: str, dtype: torch.dtype):
    layers, heads, channels, context, vocabulary, tokens, prompt = SIZES[name]
    peer = load_peer(path)
    model = peer.GPT(
        peer.GPTConfig(
            block_size=context, vocab_size=vocabulary, n_layer=layers, n_head=heads,
            n_embd=channels, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    model.to(dtype).eval()
    start = torch.randint(vocabulary, (1, prompt))
    return rate(lambda: model.generate(start, tokens), tokens, 0)


if __name__ == "__main__":
    run_main(main)
