"""What is each part of a GPT for? Remove one part at a time, train, and compare.

    python lessons/ablations.py                 # about two minutes on one CPU core

Each line of the table is a tiny GPT, trained for 400 steps with the same batches. On Shakespeare
(another seed changes a loss by about 0.02):

    model                    training validation  generated (a line ends at /)
    all parts                    2.27       2.26  If there thesp, fut that minth ast
    without mask                 0.09       0.09  ///////////////////////////////S//
    without positions            2.38       2.37  I thare ald spllofor sto micthe st
    without residual stream      3.32       3.35  mcttae/ealmthp,hfeo  r-o m/Gtht /t
    without scale                2.31       2.29  I COUYVIND:/MERShet Proourththe st
    without layer norm           2.46       2.44  I torest thosp, fet that micurd st
    without warmup               2.60       2.57  I tthese thosp, feor s- bothth ast
    one head instead of four     2.28       2.26  matthest thowp, fut that minth ast
    without MLP                  2.57       2.54  Iatthese thos,, feor s-o miuth mer

To compare: a guess has a loss of ln 65 = 4.17. A table of the frequency of each character has 3.31
on the training text and 3.35 on the validation text. A table of the frequencies after each
character has 2.45 and 2.48 (1 is added to each count: the validation text has pairs of characters
that the training text lacks). "without MLP" is worse than this table.

Shapes: B = 16 sequences, T = 32 tokens, C = 64 channels, V = 65 tokens; 3 blocks, 4 heads of 16.
"""

import math
import textwrap
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

B, T, C, N_HEAD, N_LAYER = 16, 32, 64, 4, 3
STEPS, WARMUP, LEARNING_RATE = 400, 40, 1e-2

MODELS = {  # each model, and what happens without the part
    "all parts": "",
    "without mask": "Each token sees the next token and copies it. So the loss is almost 0, even "
    "on the validation text. But a new text has no next token yet: there is nothing to copy. A low "
    "loss does not prove that a model can do its task.",
    "without positions": "Attention sees a set of tokens without an order. Only the mask still "
    "gives a hint: the first token receives from one token, the last from 32.",
    "without residual stream": "Each sublayer replaces x, so the gradient has no direct way to the "
    "first block: soon it is 1,000 times as small there as in the last block. The model learns how "
    "frequent each character is, and nothing else.",
    "without scale": "The scores are not divided by sqrt(16) = 4. This tiny model can learn "
    "smaller weights. With longer queries it is worse: see attention.py, part 3.",
    "without layer norm": "At the start, the numbers in x are about 0.03: sums of two "
    "embeddings of size 0.02, and sqrt(2) * 0.02 = 0.03. Sublayers with such small inputs have "
    "small gradients: 0.001 times the gradients with layer norm. The model starts slowly.",
    "without warmup": "The first steps are large, and they follow noise: see the next lesson, "
    "optimizers.py, part 1. The model starts from a worse place.",
    "one head instead of four": "One head of 64 channels replaces four of 16. At this size it "
    'makes no difference. In "Attention Is All You Need", translation has a BLEU of 24.9 with one '
    "head and 25.8 with eight. (BLEU: agreement with translations by people, at most 100.)",
    "without MLP": "Tokens exchange information, but each token computes nothing from it. This "
    "model has also lost two thirds of the weights of its blocks.",
}


class Block(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.name = name
        self.norm_1 = make_norm(name)
        self.query_key_value = nn.Linear(C, 3 * C, bias=False)
        self.attention_out = nn.Linear(C, C, bias=False)
        self.norm_2 = make_norm(name)
        self.mlp_in = nn.Linear(C, 4 * C, bias=False)
        self.mlp_out = nn.Linear(4 * C, C, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        y = self.attention_out(self.attention(self.norm_1(x)))
        x = y if self.name == "without residual stream" else x + y
        if self.name == "without MLP":
            return x
        y = self.mlp_out(F.gelu(self.mlp_in(self.norm_2(x)), approximate="tanh"))
        return y if self.name == "without residual stream" else x + y

    def attention(self, x: Tensor) -> Tensor:
        B, T, C = x.shape  # (16, 32, 64)
        n_head = 1 if self.name == "one head instead of four" else N_HEAD
        parts = self.query_key_value(x).split(C, dim=2)  # three times (16, 32, 64)
        q, k, v = (part.view(B, T, n_head, C // n_head).transpose(1, 2) for part in parts)
        scores = q @ k.mT  # (16, 4, 32, 32)
        if self.name != "without scale":
            scores = scores / math.sqrt(C // n_head)
        if self.name != "without mask":
            future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
            scores = scores.masked_fill(future, -math.inf)
        return (scores.softmax(dim=-1) @ v).transpose(1, 2).reshape(B, T, C)


class GPT(nn.Module):
    def __init__(self, vocab_size: int, name: str):
        super().__init__()
        self.name = name
        self.token_embedding = nn.Embedding(vocab_size, C)
        self.position_embedding = nn.Embedding(T, C)
        self.blocks = nn.ModuleList(Block(name) for _ in range(N_LAYER))
        self.final_norm = make_norm(name)
        for parameter in self.parameters():
            if parameter.dim() == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, idx: Tensor) -> Tensor:
        """(B, T) -> (B, T, V)."""
        x = self.token_embedding(idx)
        if self.name != "without positions":
            x = x + self.position_embedding.weight[: idx.size(1)]
        for block in self.blocks:
            x = block(x)
        return self.final_norm(x) @ self.token_embedding.weight.T


def make_norm(name: str) -> nn.Module:
    return nn.Identity() if name == "without layer norm" else nn.LayerNorm(C, bias=False)


def train_and_test(ids: Tensor, name: str, steps: int) -> tuple[float, float, Tensor]:
    """Returns training loss, validation loss, and the ids of a generated text (1, 35)."""
    torch.manual_seed(1337)  # the same batches for each model
    training_ids, validation_ids = ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]
    model = GPT(int(ids.max()) + 1, name)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, betas=(0.9, 0.99))
    warmup = 1 if name == "without warmup" else WARMUP
    recent_losses = []
    for step in range(steps):
        lr = LEARNING_RATE * min((step + 1) / warmup, 1 - step / steps)
        optimizer.param_groups[0]["lr"] = lr
        loss = loss_of_random_batch(model, training_ids)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), max_norm=1.0)
        optimizer.step()
        recent_losses = [*recent_losses[-49:], loss.item()]  # the last 50 losses
    with torch.no_grad():
        # 400 // 4 = 100 batches: their mean has a random error of less than 0.01.
        losses = [loss_of_random_batch(model, validation_ids).item() for _ in range(steps // 4)]
        idx = torch.zeros(1, 1, dtype=torch.long)  # id 0 is the end of a line
        for _ in range(34):
            probs = model(idx[:, -T:])[:, -1].softmax(dim=-1)
            idx = torch.cat((idx, torch.multinomial(probs, num_samples=1)), dim=1)
    return sum(recent_losses) / len(recent_losses), sum(losses) / len(losses), idx


def loss_of_random_batch(model: GPT, ids: Tensor) -> Tensor:
    starts = torch.randint(len(ids) - T, (B,)).tolist()
    windows = torch.stack([ids[start : start + T + 1] for start in starts])  # (16, 33)
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def read_text() -> str:
    """Shakespeare if prepare_shakespeare.py has downloaded it, else the replacement text."""
    data = Path(__file__).resolve().parent.parent / "data"
    shakespeare = data / "shakespeare" / "input.txt"
    path = shakespeare if shakespeare.exists() else data / "replacement.txt"
    return path.read_text(encoding="utf-8")


def main(steps: int = STEPS) -> dict[str, float]:
    """Returns the validation loss of each model."""
    text = read_text()
    characters = sorted(set(text))
    ids = torch.tensor([characters.index(character) for character in text])
    print("This takes about two minutes. Each model prints a line.\n")
    print(f"{'model':24} {'training':>8} {'validation':>10}  generated (a line ends at /)")
    results = {}
    for name in MODELS:
        training_loss, results[name], idx = train_and_test(ids, name, steps)
        generated = "".join(characters[i] for i in idx[0, 1:].tolist()).replace("\n", "/")
        row = f"{name:24} {training_loss:8.2f} {results[name]:10.2f}  {generated}"
        print(row, flush=True)
    print()
    for name, explanation in MODELS.items():
        if explanation:
            print(textwrap.fill(f"{name}: {explanation}", width=80, subsequent_indent="    "))
    print("\nThe strong form: model.py has all these parts.")
    return results


if __name__ == "__main__":
    torch.set_num_threads(1)  # two threads gain little, and are slower beside other programs
    main()
