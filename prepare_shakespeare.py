"""Turn Shakespeare into the integers that train.py reads.

    python prepare_shakespeare.py                    # data/shakespeare_char: a token per character
    python prepare_shakespeare.py --tokenizer=gpt2   # data/shakespeare_gpt2: GPT-2's vocabulary
    python prepare_shakespeare.py --tokenizer=bpe    # data/shakespeare_bpe: merges of his own
    python prepare_shakespeare.py --input=his.txt    # from a file you have

The first nine tenths of the text are for training, the rest for validation. train.py runs this by
itself when it is asked for Shakespeare and finds none. For texts of your own: data/prepare_text.py.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from configurator import Count, configure, run_main
from data.dataset import DATA
from data.shakespeare import prepare_shakespeare, understudy_notice


@dataclass
class PrepareConfig:
    # --- Preparation ---
    input: str = ""  # a UTF-8 text file; empty fetches tiny Shakespeare
    tokenizer: Literal["char", "gpt2", "bpe"] = "char"  # characters; GPT-2's; or learned from him
    vocab_size: Count = 1024  # tokens of a vocabulary that is learned (bpe)
    dataset: str = ""  # the folder under data/ to write; empty means shakespeare_ + tokenizer


def main() -> None:
    config = configure(PrepareConfig)
    dataset = config.dataset or f"shakespeare_{config.tokenizer}"
    meta = prepare_shakespeare(
        config.tokenizer,
        dataset,
        Path(config.input) if config.input else None,
        config.vocab_size,
    )
    print(
        f"{DATA / dataset}: a vocabulary of {meta['vocab_size']:,}; "
        f"{meta['train_characters']:,} + {meta['val_characters']:,} characters became "
        f"{meta['train_tokens']:,} tokens to train on and {meta['val_tokens']:,} held out"
    )
    if notice := understudy_notice(meta):
        print(notice)


if __name__ == "__main__":
    run_main(main)
