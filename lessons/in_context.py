"""In-context learning: a model predicts better, the more of a text it has seen.

    python lessons/in_context.py                        # about ten seconds
    python lessons/in_context.py out/shakespeare_char   # with this trained model

The weights do not change while a text is read. What is learned from the text is in the keys and
values of its tokens. The model must learn that an end-of-text token ends the effect of a document.

Shapes: B = 32 sequences, T = 30 tokens, C = 64 channels, V = 27 tokens: 26 letters and end-of-text.
"""

import string
import sys
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

# --- Part 1: secret words ---

T = 30
END = 26  # the id of end-of-text; 0 ... 25 are the letters a ... z


def documents(B: int) -> Tensor:
    """(B, T + 1): windows of documents such as  q z v q z v q z v <end>."""
    words = torch.randint(26, (B, 4, 3))  # for each window, 4 documents in a row
    ends = torch.full((B, 4, 1), END)
    rows = torch.cat((words, words, words, ends), dim=2).flatten(1)  # (B, 40)
    starts = torch.randint(10, (B, 1))  # a window starts anywhere in a document
    columns = starts + torch.arange(T + 1)  # (B, 1) + (31,) -> (B, 31)
    return rows.gather(1, columns)


def train_on_documents(steps: int) -> torch.nn.Module:
    from model import GPT, GPTConfig

    torch.manual_seed(1337)
    model = GPT(GPTConfig(block_size=T, vocab_size=27, n_layer=2, n_head=4, n_embd=64, bias=False))
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.9, 0.99))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 1e-2 * min((step + 1) / 30, 1 - step / steps)
        windows = documents(32)
        loss = model(windows[:, :-1], windows[:, 1:])
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % 100 == 0:
            print(f"step {step + 1}: training loss {loss.item():.2f}")
    return model


@torch.no_grad()
def loss_of_each_token(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """(n, T + 1) -> (n, T): -ln p of each target."""
    logits = model(windows[:, :-1])  # (n, T, V)
    # cross_entropy() needs the classes in the second dimension: (n, V, T).
    return F.cross_entropy(logits.transpose(1, 2), windows[:, 1:], reduction="none")


def tokens_since(windows: Tensor, token: int) -> Tensor:
    """(n, T + 1) -> (n, T): how many tokens each input is after the last `token`; -1: none yet.

    token 26, inputs 7 26 3 4 26 -> -1 0 1 2 0
    """
    since = torch.full((len(windows), windows.size(1) - 1), -1)
    last = torch.full((len(windows),), -1)
    for t, ids in enumerate(windows[:, :-1].T):
        last = torch.where(ids == token, 0, torch.where(last >= 0, last + 1, -1))
        since[:, t] = last
    return since


def secret_words(steps: int = 400) -> list[float]:
    """Returns the mean loss of the 1st, 2nd, ... 10th token of a document."""
    print("Documents: a random word, three times, then the end (a dot). A small model is")
    print("trained on them for some seconds.")
    model = train_on_documents(steps)
    windows = documents(1000)
    losses = loss_of_each_token(model, windows)
    letters = string.ascii_lowercase + "."
    print("\nThen, for example:\n")
    print("  tokens" + "".join(f" {letters[i]}" for i in windows[0, 1:].tolist()))
    print("  loss  " + "".join(f" {round(loss)}" for loss in losses[0].tolist()))
    print("\nThe window starts inside a document, so the model has not seen its word. For a")
    print("new word the loss is about 3: the model can only guess, and a guess of one of 26")
    print("letters costs ln 26 = 3.26. Then the loss is small: the word is in the context.\n")

    since = tokens_since(windows, END)
    means = [float(losses[since == k].mean()) for k in range(10)]
    print("Mean of 1,000 sequences:")
    print("  token of the document" + "".join(f"{k + 1:5}" for k in range(10)))
    print("  loss                 " + "".join(f"{mean:5.2f}" for mean in means))
    print(f"\nThe 2nd letter costs {means[1]:.2f}, more than a guess, because the model copies too")
    print("early. It copies the letter two places before the current one. After the first")
    print("letter of a new word, this is the last letter of the old word. The model gives")
    print("it a probability of 0.2 to 0.3, and it is almost always wrong. With 800 steps of")
    print("training, the 2nd letter costs about 3.3.")
    print("\nThe weights cannot know these words: each document has a new one. After the end")
    print("of a document the loss is high again, although the context still has the old")
    print("word.")
    print("\nHow can a head copy? Three letters later the word begins again, so the next")
    print("letter stands two places before the current token. The query of a token looks")
    print("for this position, the key says the position, and the value says the letter.")
    print("Where the distance varies, two heads work together: one in an earlier block")
    print("tells each token which token precedes it; one in a later block looks for a")
    print("token whose predecessor equals the current token, and copies it.")
    return means


# --- Part 2: a trained model ---


def trained_model(folder: Path) -> None:
    from engine.checkpoint import load_model_and_tokenizer
    from data.files import shown_path
    from engine.run_folder import validation_split

    model, tokenizer = load_model_and_tokenizer(folder)
    T = model.config.block_size
    tokens = validation_split(folder, T, tokenizer)
    indices = torch.linspace(0, tokens.num_windows(T + 1) - 1, 200).long().numpy()
    windows = torch.from_numpy(tokens.windows(indices, T + 1))
    print(f"\nThe model in {shown_path(folder)}, on {len(windows)} windows of its validation text:")
    losses = torch.cat([loss_of_each_token(model, part) for part in windows.split(20)])
    before = torch.arange(1, T + 1)  # the first target has one token before it
    print_by_position(losses, before.expand_as(losses), "tokens before the target")
    if tokenizer.eos_token_id is not None and (windows == tokenizer.eos_token_id).any():
        since = tokens_since(windows, tokenizer.eos_token_id)
        print_by_position(losses, since, "tokens since end-of-text")
    print("\nThe weights are the same in each row. Where the loss falls from row to row, the")
    print("model has learned from its context.")


def print_by_position(losses: Tensor, position: Tensor, title: str) -> None:
    """Mean loss of the positions 0, 1, 2-3, 4-7, 8-15, ... with a bar."""
    print(f"\n  {title:24}  loss")
    edges = [0, 1]
    while edges[-1] <= int(position.max()):
        edges.append(2 * edges[-1])
    for start, end in pairwise(edges):
        group = losses[(position >= start) & (position < end)]
        if len(group):
            last = min(end - 1, int(position.max()))
            name = f"{start}" if start == last else f"{start} to {last}"
            mean = float(group.mean())
            print(f"  {name:24}  {mean:.2f}  {'#' * round(10 * mean)}")


def main(steps: int = 400, folder: str = "") -> None:
    from configurator import FolioError, wrap
    from engine.run_folder import newest_run

    secret_words(steps)
    try:
        trained_model(Path(folder) if folder else newest_run())
    except FolioError as error:
        print(f"\nThe second part shows a trained model on real text.\n{wrap(str(error))}")
    print("\nevaluate() in train.py takes the mean over all positions.")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of model.py
    torch.set_num_threads(1)  # two threads gain little, and are slower beside other programs
    main(folder=sys.argv[1] if len(sys.argv) > 1 else "")
