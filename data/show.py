"""Print the beginning of a training batch: ids and characters of inputs and targets.

    python -m data.show shakespeare_char
    python -m data.show shakespeare_bpe --batch_size=16 --block_size=64 --step=3 --rows=1

It is a batch of train.py if seed, batch_size and block_size have the values of the run. The
defaults are the values of config/shakespeare_char.py.
"""

import sys
from pathlib import Path

if not __package__:  # started as a file: python data/show.py
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dataclasses import dataclass
from typing import Literal

import torch

from configurator import FolioError, NonNegativeInt, PositiveInt, parse_inputs, run_main
from data.dataset import open_dataset, training_batch
from data.tokenizer import BPETokenizer, Tokenizer


@dataclass
class ShowConfig:
    # --- Batch ---
    batch_size: PositiveInt = 8  # rows of the batch (B)
    block_size: PositiveInt = 128  # input tokens in a row (T)
    tokenizer: Literal["dataset", "gpt2"] = "dataset"  # gpt2: for a dataset without one
    seed: NonNegativeInt = 1337  # random seed
    step: NonNegativeInt = 0  # step of training to which the batch belongs
    rows: PositiveInt = 2  # rows to print
    tokens: PositiveInt = 8  # tokens of each row to print


def main() -> None:
    names, config = parse_inputs(ShowConfig)
    if len(names) != 1:
        raise FolioError("give the name of one dataset: python -m data.show shakespeare_char")
    tokenizer = BPETokenizer.gpt2() if config.tokenizer == "gpt2" else None
    dataset = open_dataset(names[0], config.block_size, tokenizer)
    inputs, targets = training_batch(
        dataset.train, config.batch_size, config.block_size, config.seed, config.step, micro_batch=0
    )
    rows, tokens = min(config.rows, len(inputs)), min(config.tokens, inputs.size(1))
    print(
        f"{dataset.folder.name}: inputs and targets, each {tuple(inputs.shape)}\n"
        f"the first {rows} of {len(inputs)} rows, the first {tokens} of {inputs.size(1)} tokens"
    )
    for row in range(rows):
        window = format_window(inputs[row, :tokens], targets[row, :tokens], dataset.tokenizer)
        print(f"\nrow {row}\n{window}")


def format_window(inputs: torch.Tensor, targets: torch.Tensor, tokenizer: Tokenizer) -> str:
    """A table with one line for each training example, 80 columns wide at most.

    inputs, targets: token ids, of equal length.
    """
    lines = ["  t  input            target           context -> target"]
    for t in range(len(inputs)):
        input_text = clip(repr(tokenizer.decode(inputs[t : t + 1])), 10)
        target_text = clip(repr(tokenizer.decode(targets[t : t + 1])), 10)
        context = clip(repr(tokenizer.decode(inputs[: t + 1])), 27)
        lines.append(
            f"{t:3} {inputs[t]:6} {input_text:10}{targets[t]:6} {target_text:10} "
            f"{context} -> {target_text}"
        )
    return "\n".join(lines)


def clip(text: str, width: int) -> str:
    """The end of a text that is too wide: ("'to be or'", 8) -> "...e or'"."""
    return text if len(text) <= width else "..." + text[3 - width :]


if __name__ == "__main__":
    run_main(main)
