"""How fast text is generated, compared with the limit of the machine and with nanoGPT.

    python -m tests.benchmarks.sample_speed --sizes=small,medium
    python -m tests.benchmarks.sample_speed --peer=../nanoGPT --json=sampling.json
    python -m tests.benchmarks.sample_speed --device=cuda --dtype=bfloat16 --compile

All candidates generate the same number of tokens with random weights of the same shape. The limit
is one matrix-vector product per weight of the model, by the same kernels and in the same rounds;
the remaining time of a token goes into attention and the overhead of many small operations. The
last two columns are of Folio only: ten samples in one batch, in tokens per second of all ten
together, and this rate divided by the rate of one sample.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median
from typing import Any

import torch

from configurator import FolioError, PositiveInt, configure, run_main
from engine.device import DeviceName, DTypeName, choose_device
from engine.inference import InferenceModel, capture_cuda_graph, capture_stream
from model import GPT, GPTConfig
from tests.benchmarks.measuring import (
    Candidate,
    in_subprocess,
    load_peer,
    report_results,
    run_interleaved,
    split_csv,
    throughput,
)

# name: layers, heads, channels, context, vocabulary, tokens to generate, tokens of the prompt
SIZES = {
    "tiny": (1, 2, 16, 16, 65, 8, 1),
    "small": (4, 4, 128, 64, 65, 500, 1),
    "medium": (6, 6, 384, 256, 65, 500, 1),
    "124M": (12, 12, 768, 1024, 50257, 160, 1),
    "124M, 900 tokens in": (12, 12, 768, 1024, 50257, 30, 900),
}


@dataclass
class SampleSpeedConfig:
    # --- Models ---
    sizes: str = "small,medium,124M,124M 900 tokens in"  # names, separated by commas
    dtype: DTypeName = "float32"  # precision of the weights; auto: as in sample.py
    device: DeviceName = "cpu"  # where to generate
    compile: bool = False  # compile Folio's step of one token
    # --- Measurement ---
    rounds: PositiveInt = 3  # measurements per candidate
    peer: str = ""  # a checkout of nanoGPT, whose generate() is measured, too
    json: str = ""  # file for all results


def main() -> None:
    config = configure(SampleSpeedConfig)
    names = {name.replace(",", ""): name for name in SIZES}
    sizes = split_csv(config.sizes)
    for size in sizes:
        if size not in names:
            raise FolioError(f"--sizes={size}: must be one or several of {', '.join(names)}")
    if config.peer:
        load_peer(config.peer)  # raises its errors here, before anything is measured
    rows = [measure(names[size], config) for size in sizes]
    report_results(f"Sampling, {config.dtype}, tokens per second", rows, config.json)


def measure(name: str, config: SampleSpeedConfig) -> dict[str, Any]:
    layers, heads, channels, context, vocabulary, n_tokens, prompt_length = SIZES[name]
    # As sample.py: on a CPU, freed memory stays with the process.
    device = choose_device(config.device, config.dtype).torch_device
    model = GPT(GPTConfig(context, vocabulary, layers, heads, channels))
    one, ten = (
        InferenceModel(model, device, config.dtype, batch_size=n, compile=config.compile)
        for n in (1, 10)
    )
    prompt = torch.randint(vocabulary, (1, prompt_length))

    def generate(inference: InferenceModel, n_samples: int) -> None:
        for _ in inference.generate(prompt.expand(n_samples, -1), n_tokens):
            pass

    candidates = {
        "Folio": throughput(lambda: generate(one, 1), n_tokens, 0),
        "limit": throughput(matrix_vector_products(one), 1, 0.5),
        "ten samples": throughput(lambda: generate(ten, 10), 10 * n_tokens, 0),
    }
    if config.peer:
        # In our process freed memory stays with the process, which nanoGPT does not arrange.
        candidates["nanoGPT"] = in_subprocess(peer_candidate, config.peer, name, device, one.dtype)
    results = run_interleaved(candidates, config.rounds)
    row = {"size": name, "Folio": results["Folio"]}
    if config.peer:
        row["nanoGPT"] = results["nanoGPT"]
        row["ratio"] = median(results["Folio"]) / median(results["nanoGPT"])
    return row | {
        "limit": results["limit"],
        "of the limit": f"{median(results['Folio']) / median(results['limit']):.0%}",
        "ten samples": results["ten samples"],
        "ten / one": median(results["ten samples"]) / median(results["Folio"]),
    }


def matrix_vector_products(inference: InferenceModel) -> Callable[[], torch.Tensor]:
    """Multiplies each weight matrix of a model by one vector, with the model's own layers.

    On CUDA recorded as a graph, as the step of one token is.
    """
    C, weights = inference.config.n_embd, inference.weights
    narrow, wide = (
        torch.randn(1, n, device=inference.device, dtype=inference.dtype) for n in (C, 4 * C)
    )
    products = [partial(weights.lm_head, narrow)]
    for block in weights.blocks:
        products += [partial(block.c_attn, narrow), partial(block.attn_c_proj, narrow)]
        products += [partial(block.c_fc, narrow), partial(block.mlp_c_proj, wide)]

    @torch.inference_mode()
    def multiply() -> torch.Tensor:
        return [product() for product in products][-1]

    if inference.device.type != "cuda":
        return multiply
    return capture_cuda_graph(multiply, capture_stream(inference.device))


def peer_candidate(path: str, name: str, device: torch.device, dtype: torch.dtype) -> Candidate:
    layers, heads, channels, context, vocabulary, n_tokens, prompt_length = SIZES[name]
    peer = load_peer(path)
    model = peer.GPT(
        peer.GPTConfig(
            block_size=context, vocab_size=vocabulary, n_layer=layers, n_head=heads,
            n_embd=channels, dropout=0.0, bias=True,
        )
    )  # fmt: skip
    model.to(device, dtype).eval()
    prompt = torch.randint(vocabulary, (1, prompt_length), device=device)
    return throughput(lambda: model.generate(prompt, n_tokens), n_tokens, 0)


if __name__ == "__main__":
    run_main(main)
