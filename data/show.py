"""Print one batch of a dataset: ids and characters of inputs and targets side by side.

python -m data.show shakespeare_char
python -m data.show shakespeare_bpe --block_size=16 --step=3
"""

from dataclasses import dataclass

import torch

from configurator import ConfigError, NonNegativeInt, PositiveInt, parse_inputs, run_main
from data.dataset import open_dataset, training_batch
from data.tokenizer import Tokenizer


@dataclass
class ShowConfig:
    # --- Batch ---
    batch_size: PositiveInt = 2  # number of windows (B)
    block_size: PositiveInt = 8  # tokens in a window, without the last target (T)
    seed: NonNegativeInt = 1337  # random seed
    step: NonNegativeInt = 0  # step of training whose batch is shown


def main() -> None:
    names, config = parse_inputs(ShowConfig)
    if len(names) != 1:
        raise ConfigError("give the name of one dataset: python -m data.show shakespeare_char")
    dataset = open_dataset(names[0], config.block_size)
    inputs, targets = training_batch(
        dataset.train, config.batch_size, config.block_size, config.seed, config.step, micro_batch=0
    )
    print(f"{dataset.folder.name}: inputs and targets, each {tuple(inputs.shape)}")
    for row in range(config.batch_size):
        print(f"\nwindow {row}\n{format_window(inputs[row], targets[row], dataset.tokenizer)}")


def format_window(inputs: torch.Tensor, targets: torch.Tensor, tokenizer: Tokenizer) -> str:
    """A table with one line for each of the T training examples, 80 columns wide at most.

    inputs, targets: (T,) token ids.
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
