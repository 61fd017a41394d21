"""Write text with a trained GPT, token by token.

    python sample.py                                     # from the newest run under out/
    python sample.py --start="JULIET:" --num_samples=3
    python sample.py --out_dir=out/shakespeare_char --start=FILE:prompt.txt
    python sample.py --init_from=gpt2 --start="The sea"  # with GPT-2's published weights
    python sample.py --forever                           # infinite Shakespeare; Ctrl-C ends it

Each token is drawn from the model's distribution over the next one and joins the context it was
drawn from; a context that outgrows the block size is cropped. All it takes is the run's folder.
"""

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import torch

from configurator import Count, FolioError, Fraction, NonNegative, Whole, configure, run_main
from data.prepare import read_text
from data.tokenizer import Tokenizer, load_tokenizer
from training.checkpoint import load_model, model_folder, newest_run
from training.kernels import ready_to_write
from training.machine import Device, Precision, advice_when_out_of_memory
from training.world import World


@dataclass
class SampleConfig:
    # --- What to write ---
    out_dir: str = ""  # the run's folder; empty takes the newest under out/
    init_from: str = ""  # instead of a run: gpt2, gpt2-medium, gpt2-large, gpt2-xl, or a folder
    start: str = "\n"  # the text to go on from; FILE:path reads it from a file
    num_samples: Count = 1  # texts, written side by side as one batch
    max_new_tokens: Whole = 500  # length of each
    forever: bool = False  # never end
    # --- How to draw ---
    temperature: NonNegative = 0.8  # below 1 plays safe, above 1 takes risks; 0 is greedy
    top_k: Whole = 200  # candidates for each token, the likeliest ones; 0 means all
    top_p: Fraction = 1.0  # only the likeliest tokens that together are this probable
    seed: Whole = 1337  # of the draws: the same command writes the same text
    # --- Machine ---
    device: Device = "auto"  # where to compute; auto takes the fastest there is
    dtype: Precision = "auto"  # of the weights; auto is what writes fastest with this model

    instead: ClassVar = {"compile": "writing is not compiled; its cache is what makes it fast"}

    def __post_init__(self):
        if self.init_from == "resume":  # nanoGPT's word for a run's own weights
            self.init_from = ""
        if self.forever and self.num_samples > 1:
            raise FolioError("--forever writes one text: it has no end after which others follow")


def main() -> None:
    config = configure(SampleConfig)
    source = config.init_from or config.out_dir
    folder = model_folder(source) if source else newest_run()
    world = World().settle(config.device)
    with advice_when_out_of_memory("a smaller model, or --device=cpu"):
        model = load_model(folder)
        model = ready_to_write(model, world.device, config.dtype, config.num_samples)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size != model.config.vocab_size:
        raise FolioError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size:,} tokens and its model "
            f"{model.config.vocab_size:,}: they do not belong together"
        )
    prompt, tokens = encode_prompt(config.start, tokenizer)
    idx = torch.tensor([tokens], device=world.device).expand(config.num_samples, -1)  # (B, T)
    drawn = model.generate(
        idx,
        None if config.forever else config.max_new_tokens,
        temperature=config.temperature,
        top_k=config.top_k,
        top_p=config.top_p,
        generator=world.generator(config.seed),
    )
    with advice_when_out_of_memory("fewer --num_samples, or --device=cpu"):
        write(prompt, drawn, tokenizer, config.num_samples)


def encode_prompt(start: str, tokenizer: Tokenizer) -> tuple[str, list[int]]:
    """The text to begin with and its ids; an empty text becomes what stands before every text."""
    text = read_text(Path(start.removeprefix("FILE:"))) if start.startswith("FILE:") else start
    try:
        return text, tokenizer.encode(text).tolist() or [tokenizer.opening]
    except FolioError as error:
        raise FolioError(f"--start: {error}") from None


def write(prompt: str, drawn: Iterator[torch.Tensor], tokenizer: Tokenizer, n: int) -> None:
    """Print the first text as it is drawn, then the others whole.

    drawn: (n,) ids at a time, one for each text.
    """
    others = [[] for _ in range(n - 1)]

    def first_of_each():
        for ids in drawn:
            first, *rest = ids.tolist()
            for tokens, token in zip(others, rest, strict=True):
                tokens.append(token)
            yield first

    try:
        show(prompt)
        for piece in tokenizer.decode_stream(first_of_each()):
            show(piece)
        for tokens in others:
            whole = "".join(tokenizer.decode_stream(tokens))
            show(f"\n---------------\n{prompt}{whole}")
    finally:
        show("\n")


def show(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


if __name__ == "__main__":
    run_main(main)
