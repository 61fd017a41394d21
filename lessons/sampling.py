"""From logits to the next token: temperature, top-k and top-p.

    python lessons/sampling.py                  # about two seconds; ten with a trained model

A model gives each possible next token a score: the logit. The softmax turns logits into
probabilities. Then one token is sampled: chosen at random, with these probabilities.

Shapes: the vocabulary of the example has V = 4 tokens.
"""

import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
TOKENS = ["the", "a", "his", "seven"]  # the vocabulary
LOGITS = torch.tensor([2.0, 1.0, 0.0, -1.0])  # what a model could say after "The king loves"


def probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> Tensor:
    """Logits (V,) -> the probabilities with which the next token is sampled (V,).

    top_k: keep the k likeliest tokens (0: keep all).
    top_p: keep the likeliest tokens until their total probability is at least top_p.
    """
    # Only differences of logits count. Without the subtraction, exp(100) would be inf in float32.
    exponentials = ((logits - logits.max()) / temperature).exp()
    probs = exponentials / exponentials.sum()  # the softmax
    order = probs.argsort(descending=True).tolist()  # the likeliest token first
    if top_k > 0:
        probs[order[top_k:]] = 0
        probs = probs / probs.sum()  # the sum is 1 again
    if top_p < 1:
        total = 0.0
        for token in order:
            p = float(probs[token])
            if total >= top_p:  # the likelier tokens are enough
                probs[token] = 0
            total += p
        probs = probs / probs.sum()
    return probs


def sample(probs: Tensor, u: float) -> int:
    """The token whose part of the line holds u, a random number between 0 and 1.

    0                          0.64      0.88  0.97 1       u = 0.7 falls in "a"
    |----------- the -----------|--- a ---|-his-|--|
    """
    ends = probs.cumsum(dim=0).tolist()  # 0.64, 0.88, 0.97, 1.00
    for token, end in enumerate(ends):
        if u < end:
            return token
    return len(ends) - 1  # rounding: the last end can be 0.9999999


def show_table() -> None:
    settings = [
        {}, {"temperature": 0.5}, {"temperature": 2}, {"top_k": 2}, {"top_p": 0.8},
        {"temperature": 2, "top_p": 0.8},
    ]  # fmt: skip
    print('The token after "The king loves":\n')
    print(f"{'':26}" + "".join(f"{token:>8}" for token in TOKENS))
    print(f"{'logit':26}" + "".join(f"{logit:8.0f}" for logit in LOGITS.tolist()))
    for setting in settings:
        name = ", ".join(f"{key} {value}" for key, value in setting.items()) or "softmax"
        cells = [f"{p:.2f}" if p else "-" for p in probabilities(LOGITS, **setting).tolist()]
        print(f"{name:26}" + "".join(f"{cell:>8}" for cell in cells))
    print("""
temperature 0.5   The likely token becomes likelier.
temperature 2     The likely token becomes less likely.
top_k 2           Two tokens are kept.
top_p 0.8         Two tokens are kept: 0.64 is below 0.8, 0.64 + 0.24 is not.
both              Three tokens are kept: 0.46 + 0.28 is still less than 0.8. So
                  top_p keeps few tokens where the model is sure, else many.""")


def show_samples(n: int = 10_000) -> list[int]:
    """How often each token is sampled."""
    counts = [0] * len(TOKENS)
    for u in torch.rand(n, generator=torch.Generator().manual_seed(1337)).tolist():
        counts[sample(probabilities(LOGITS), u)] += 1
    print(f"\n{n:,} samples (torch.multinomial gives the same frequencies, faster):")
    print("    " + ",  ".join(f"{t}: {c:,}" for t, c in zip(TOKENS, counts, strict=True)))
    return counts


def show_model() -> None:
    """One prompt, continued at several temperatures by the newest trained model."""
    from configurator import FolioError, wrap
    from engine.checkpoint import load_model_and_tokenizer
    from data.files import shown_path
    from engine.run_folder import newest_run

    print('\nThe newest trained model continues a text that begins with "ROMEO:".')
    folder = None
    try:
        folder = newest_run()
        model, tokenizer = load_model_and_tokenizer(folder)
        idx = torch.from_numpy(tokenizer.encode("\nROMEO:\n"))[None]  # (1, 8)
    except FolioError as error:
        print(wrap(str(error)))
        if folder is not None:
            print(f"So {shown_path(folder)} cannot continue this text. Train another model:")
            print("python train.py config/shakespeare_char.py")
        return
    print(f"The model is in {shown_path(folder)}:")
    for temperature in (0.2, 0.5, 1.0, 1.5):
        title = f"temperature {temperature}"
        print(f"\n{title}\n{'-' * len(title)}", end="")
        generator = torch.Generator().manual_seed(1337)
        ids = model.generate(idx, 200, temperature=temperature, generator=generator)
        print(tokenizer.decode(ids[0].tolist()))
    print("\nA low temperature repeats itself. A high temperature invents words.")


def main() -> None:
    show_table()
    show_samples()
    show_model()
    print("\nThe strong form: sampling_probs() in engine/inference.py.")


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))  # the folder of model.py
    torch.set_num_threads(1)  # two threads gain little, and are slower beside other programs
    main()
