"""The shapes of one batch on its way through GPT, and where the parameters are.

    python lessons/shapes.py                    # about two seconds

The batch has B = 8 sequences of T = 50 tokens. The model has V = 65 tokens in the vocabulary,
C = 128 channels, 4 heads of 32 channels, 3 blocks, and a context of up to 64 tokens. So each number
in a shape has one meaning. (The model of config/shakespeare_char.py has 4 blocks and 128 tokens.)

The names are GPT-2's: wte (token embedding), wpe (position embedding), h (blocks), ln (layer norm),
c_attn (makes q, k, v), c_fc (into the MLP), c_proj (out of an attention, or out of an MLP).
"""

import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor


def show(name: str, tensor: Tensor, comment: str = "") -> None:
    print(f"  {name:14}{tuple(tensor.shape)!s:17}{comment}".rstrip())


def show_examples() -> None:
    print("\nA window of T + 1 tokens holds T examples. With T = 4:")
    text = "To be"
    for t in range(1, len(text)):
        print(f"  after {text[:t]!r:8} comes {text[t]!r}")


@torch.no_grad()
def walk(model: torch.nn.Module, windows: Tensor) -> Tensor:
    """What model(inputs, targets) does, line by line. windows: (8, 51). Returns the loss."""
    parts, T = model.transformer, windows.size(1) - 1

    print("\nThe data")
    show("windows", windows, "B sequences of T + 1 token ids")
    inputs, targets = windows[:, :-1], windows[:, 1:]
    show("inputs", inputs)
    show("targets", targets, "for each input, the id that comes after it")

    print("\nToken ids become vectors")
    tokens, positions = parts.wte(inputs), parts.wpe.weight[:T]
    show("tokens", tokens, "for each id, a row of wte (65, 128)")
    show("positions", positions, "the first T rows of wpe (64, 128)")
    x = tokens + positions
    show("x", x, "each sequence has the same positions added")

    x = walk_attention(parts.h[0], x)
    x = walk_mlp(parts.h[0], x)

    print("\nThe other blocks, and the output")
    for block in parts.h[1:]:
        x = block(x)
    x = parts.ln_f(x)
    show("x", x, "after 3 blocks and the last layer norm")
    logits = x @ parts.wte.weight.T
    show("logits", logits, "for each token, a score for each next token")
    logits, targets = logits.flatten(0, 1), targets.flatten()
    show("flat logits", logits, "8 x 50 = 400 predictions")
    show("flat targets", targets)
    loss = F.cross_entropy(logits, targets)
    show("loss", loss, f"one number: {loss:.2f} (a pure guess: ln 65 = {math.log(65):.2f})")
    return loss


def walk_attention(block: torch.nn.Module, x: Tensor) -> Tensor:
    print("\nThe first block: attention")
    B, T, C = x.shape
    n_head, head_dim = block.attn.n_head, C // block.attn.n_head
    normed = block.ln_1(x)
    show("normed", normed, "each vector gets mean 0 and variance 1")
    qkv = block.attn.c_attn(normed)
    show("q, k, v", qkv, "one matrix product gives all: 3 x 128 = 384")
    q, k, v = (p.view(B, T, n_head, head_dim).transpose(1, 2) for p in qkv.split(C, dim=2))
    show("q", q, "the 128 channels cut into 4 heads of 32")
    show("k", k)
    show("v", v)
    scores = q @ k.mT / math.sqrt(head_dim)
    show("scores", scores, "8 x 4 tables; each has 50 rows and 50 columns")
    future = torch.ones(T, T, dtype=torch.bool).triu(diagonal=1)
    weights = scores.masked_fill(future, -math.inf).softmax(dim=-1)
    show("weights", weights, "0 above the diagonal; each row sums to 1")
    messages = weights @ v
    show("messages", messages)
    joined = messages.transpose(1, 2).reshape(B, T, C)
    show("joined", joined, "4 heads side by side: 4 x 32 = 128")
    x = x + block.attn.c_proj(joined)
    show("x", x, "x + c_proj(joined)")
    return x


def walk_mlp(block: torch.nn.Module, x: Tensor) -> Tensor:
    print("\nThe first block: MLP")
    hidden = F.gelu(block.mlp.c_fc(block.ln_2(x)), approximate="tanh")
    show("hidden", hidden, "4 x 128 (4: a convention); each token alone")
    x = x + block.mlp.c_proj(hidden)
    show("x", x, "x + c_proj(hidden). No block changes the shape.")
    return x


def count_parameters(V: int, T: int, C: int, n_layer: int, bias: bool) -> dict[str, int]:
    """Parameters of each part, added up by hand. T: the longest context."""
    b = int(bias)
    block = {
        "layer norm 1": C + b * C,
        "c_attn: queries, keys, values": C * 3 * C + b * 3 * C,
        "c_proj: joins the heads": C * C + b * C,
        "layer norm 2": C + b * C,
        "c_fc: into the MLP": C * 4 * C + b * 4 * C,
        "c_proj: out of the MLP": 4 * C * C + b * C,
    }
    return {
        "wte: token embedding": V * C,
        "wpe: position embedding": T * C,
        **block,
        "one block (the sum)": sum(block.values()),
        "all blocks": n_layer * sum(block.values()),
        "last layer norm": C + b * C,
        "total": V * C + T * C + n_layer * sum(block.values()) + C + b * C,
    }


def show_parameters() -> list[dict[str, int]]:
    columns = [
        count_parameters(V=65, T=128, C=128, n_layer=4, bias=False),
        count_parameters(V=50257, T=1024, C=768, n_layer=12, bias=True),
    ]
    print("\nParameters")
    print(f"  {'':31}{'shakespeare_char':>18}{'GPT-2':>15}")
    for i, (name, ours) in enumerate(columns[0].items()):
        indent = "  " if 2 <= i < 8 else ""  # the parts of a block
        print(f"  {indent + name:31}{ours:18,}{columns[1][name]:15,}")
    print("\nAll blocks: 4 of 128 channels, and 12 of 768 channels with biases.")
    print(f"A block has about (3 + 1 + 4 + 4) C^2 parameters: 12 x 128 x 128 = {12 * 128**2:,}.")
    print("The output layer has no parameters of its own: it is wte again.")
    return columns


def main() -> None:
    from model import GPT, GPTConfig

    torch.manual_seed(1337)
    config = GPTConfig(block_size=64, vocab_size=65, n_layer=3, n_head=4, n_embd=128, bias=False)
    model = GPT(config)
    print("B = 8 sequences, T = 50 tokens, C = 128 channels, 4 heads of 32, V = 65 tokens")
    show_examples()
    windows = torch.randint(65, (8, 51))  # (B, T + 1); real text has the same shape
    loss = walk(model, windows)
    equal = torch.allclose(loss, model(windows[:, :-1], windows[:, 1:]))
    print(f"Equal to model(inputs, targets) in model.py: {equal}")
    show_parameters()
    print("\nThe strong form: model.py. A real batch, after python prepare_shakespeare.py:")
    print("python -m data.show shakespeare_char")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of model.py
    main()
