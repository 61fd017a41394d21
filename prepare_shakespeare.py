"""Tokenize tiny Shakespeare.

    python prepare_shakespeare.py                    # data/shakespeare_char: a token per character
    python prepare_shakespeare.py --tokenizer=gpt2   # data/shakespeare_gpt2: GPT-2's vocabulary
    python prepare_shakespeare.py --tokenizer=bpe    # data/shakespeare_bpe: learned from the text
    python prepare_shakespeare.py --input_file=FILE  # a text file that you have

The first nine tenths of the text are for training, the last tenth for validation. train.py runs
this automatically if the dataset is missing. For other texts: data/prepare_text.py.
"""

from dataclasses import dataclass
from typing import ClassVar

from configurator import PositiveInt, configure, run_main
from data.files import user_path
from data.prepare import check_tokenizer_type, dataset_folder, summary
from data.shakespeare import prepare_shakespeare, replacement_warning


@dataclass
class PrepareConfig:
    # --- Preparation ---
    input_file: str = ""  # a UTF-8 text file; empty: download tiny Shakespeare
    tokenizer: str = "char"  # char, gpt2, bpe (learned from the text), or the folder of a run
    vocab_size: PositiveInt = 1024  # vocabulary size of bpe
    dataset: str = ""  # folder under data/; empty: shakespeare_ and the tokenizer's name

    replaced_settings: ClassVar[dict[str, str]] = {"input": "it is called input_file"}


def main() -> None:
    config = configure(PrepareConfig)
    check_tokenizer_type(config.tokenizer)
    dataset = config.dataset or f"shakespeare_{user_path(config.tokenizer).resolve().name}"
    input_file = user_path(config.input_file) if config.input_file else None
    meta = prepare_shakespeare(config.tokenizer, dataset, input_file, config.vocab_size)
    print(summary(dataset_folder(dataset), meta))
    if warning := replacement_warning(meta):
        print(warning)


if __name__ == "__main__":
    run_main(main)
