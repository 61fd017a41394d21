"""GPT on one page: a text, a vocabulary, batches, the model, training, and a new play.

    python lessons/gpt_in_one_page.py           # about half a minute on one CPU core

Shapes: B = 16 sequences in a batch, T = 32 tokens in a sequence, C = 96 channels (the numbers that
represent one token), V = 65 tokens in the vocabulary (60 with the replacement text); 4 heads of 24
channels.
"""

import math
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

B, T, C, N_HEAD, N_LAYER = 16, 32, 96, 4, 2
DATA = Path(__file__).resolve().parent.parent / "data"

# --- Data ---


def read_text() -> str:
    """Shakespeare if prepare_shakespeare.py has downloaded it, else the replacement text."""
    shakespeare, play = DATA / "shakespeare" / "input.txt", DATA / "replacement.txt"
    return (shakespeare if shakespeare.exists() else play).read_text(encoding="utf-8")


def random_batch(ids: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs (B, T) and targets (B, T). The target of a token is the token after it."""
    starts = torch.randint(len(ids) - T, (B,)).tolist()
    windows = torch.stack([ids[start : start + T + 1] for start in starts])  # (16, 33)
    return windows[:, :-1], windows[:, 1:]  # ids 5 9 2 -> inputs 5 9, targets 9 2


# --- Model ---


class Block(nn.Module):
    """Attention: tokens exchange information. Then the MLP: each token is processed alone."""

    def __init__(self):
        super().__init__()
        self.norm_1 = nn.LayerNorm(C, bias=False)
        self.query_key_value = nn.Linear(C, 3 * C, bias=False)
        self.attention_out = nn.Linear(C, C, bias=False)
        self.norm_2 = nn.LayerNorm(C, bias=False)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)  # 4: a convention
        self.mlp_out = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        # x + ...: the gradient has a direct way to the first block. The layer norms give each
        # vector mean 0 and variance 1, so that all inputs have one scale, however large x is.
        x = x + self.attention_out(self.attention(self.norm_1(x)))
        # GELU, a smooth max(0, x), is not linear. Without it, the two layers would be equal to one.
        # "tanh": GPT-2's approximation of GELU.
        return x + self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x)), approximate="tanh"))

    def attention(self, x: Tensor) -> Tensor:
        B, T, C = x.shape
        parts = self.query_key_value(x).split(C, dim=2)  # three times (16, 32, 96)
        # Cut the 96 channels into 4 heads of 24: (16, 4, 32, 24).
        q, k, v = (part.view(B, T, N_HEAD, C // N_HEAD).transpose(1, 2) for part in parts)
        # mT exchanges the last two dimensions: (16, 4, 32, 24) @ (16, 4, 24, 32).
        scores = q @ k.mT / math.sqrt(C // N_HEAD)  # (16, 4, 32, 32)
        future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)  # above the diagonal
        weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)  # each row sums to 1
        return (weights @ v).transpose(1, 2).reshape(B, T, C)  # concatenate heads: (16, 32, 96)


class GPT(nn.Module):
    def __init__(self, vocab_size: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, C)
        self.position_embedding = nn.Embedding(T, C)  # attention alone does not know the order
        self.blocks = nn.ModuleList(Block() for _ in range(N_LAYER))
        self.final_norm = nn.LayerNorm(C, bias=False)
        for parameter in self.parameters():
            if parameter.dim() == 2:  # all but the gains of the layer norms, which start at 1
                nn.init.normal_(parameter, std=0.02)  # small: the first logits are near 0

    def forward(self, idx: Tensor) -> Tensor:
        """Token ids (B, T) -> logits (B, T, V): for each token, a score for each next token."""
        x = self.token_embedding(idx) + self.position_embedding.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)  # (16, 32, 96) -> (16, 32, 96)
        # The output layer is the token embedding again: tokens that are similar as inputs are
        # similar as predictions, and no more parameters are needed. (16, 32, 96) -> (16, 32, 65)
        return self.final_norm(x) @ self.token_embedding.weight.T


# --- Training ---


def mean_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """The mean of -ln p(target): 0 if every target was certain, ln 65 = 4.17 for pure guessing."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())  # (512, 65) and (512,)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, ids: Tensor, steps: int) -> None:
    # An optimizer keeps its learning rate in groups of parameters. Here there is one group.
    peak, warmup = optimizer.param_groups[0]["lr"], steps // 20
    for step in range(steps):
        # Warmup, steps 0 to 49 of 1,000: 0.02, 0.04, ... 1. Then it falls from 1 to 0.001.
        multiplier = min((step + 1) / warmup, 1, (steps - step) / (steps - warmup))
        optimizer.param_groups[0]["lr"] = multiplier * peak
        inputs, targets = random_batch(ids)
        loss = mean_loss(model(inputs), targets)  # forward: how wrong is the model?
        loss.backward()  # backward: how does each parameter change the loss?
        # Clip: a gradient longer than 1 gets the length 1, so one unusual batch changes little.
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()  # step: change each parameter a little, so that the loss falls
        optimizer.zero_grad()  # backward() adds to the gradients: begin again at 0
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:4}: training loss {loss.item():.3f}")


# --- Generation ---


@torch.no_grad()
def generate(model: nn.Module, idx: Tensor, n_tokens: int) -> Tensor:
    """(1, t) -> (1, t + n_tokens)."""
    for _ in range(n_tokens):
        logits = model(idx[:, -T:])  # crop: the model knows T positions
        probs = logits[:, -1].softmax(dim=-1)  # (1, 65): the last position predicts what comes next
        next_token = torch.multinomial(probs, num_samples=1)  # (1, 1)
        idx = torch.cat((idx, next_token), dim=1)
    return idx


def main(steps: int = 1000) -> float:
    """Train, print a new play, and return the validation loss."""
    torch.manual_seed(1337)
    text = read_text()
    characters = sorted(set(text))  # the vocabulary
    id_of = {character: i for i, character in enumerate(characters)}
    ids = torch.tensor([id_of[character] for character in text])
    print(f"{len(ids):,} tokens; the vocabulary has {len(characters)} characters:")
    print(repr("".join(characters)))
    training_ids, validation_ids = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]

    model = GPT(len(characters))
    print(f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters")
    # AdamW: each parameter takes steps of about the same size, also where gradients are small.
    optimizer = torch.optim.AdamW(model.parameters(), 5e-3, betas=(0.9, 0.99), weight_decay=0.1)
    train(model, optimizer, training_ids, steps)

    with torch.no_grad():  # text that the model has not been trained on
        batches = [random_batch(validation_ids) for _ in range(100)]
        losses = [mean_loss(model(inputs), targets).item() for inputs, targets in batches]
    print(f"validation loss {sum(losses) / len(losses):.3f}\n")

    idx = generate(model, torch.tensor([[id_of["\n"]]]), 500)
    print("".join(characters[i] for i in idx[0].tolist()))
    print("\nThe strong forms: model.py, train.py, data/dataset.py, engine/inference.py.")
    print("Everything else in this repository is speed, safety and scale.")
    return sum(losses) / len(losses)


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads gain little, and are slower beside other programs
    main()
