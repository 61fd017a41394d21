"""Attention on four words: nodes that send messages, then the same with matrices.

    python lessons/attention.py                 # about two seconds

Each node has a query (what it looks for), a key (what it is) and a value (what it passes on). A
node compares its query with the keys of the senders. The better a key fits, the more the node
receives of that sender's value.

A GPT learns the matrices that make queries, keys and values. Here they are chosen by hand, so that
you can check most numbers with a pocket calculator.

Shapes: T = 4 words receive, C = 5 channels describe a word, a query has d = 2 numbers. In part 6,
S = 6 words of another sentence send.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

# --- 1. Nodes and messages ---


@dataclass
class Node:
    query: Tensor  # what it looks for
    key: Tensor  # what it is
    value: Tensor  # what it passes on

    def scores(self, senders: list[Node]) -> list[float]:
        """How well each sender's key fits this node's query: dot product / sqrt(length)."""
        return [float(self.query @ s.key) / math.sqrt(len(self.query)) for s in senders]

    def receive(self, senders: list[Node]) -> tuple[Tensor, list[float]]:
        """The message, which is a weighted mean of the senders' values; and the weights."""
        exponentials = [math.exp(score) for score in self.scores(senders)]
        weights = [e / sum(exponentials) for e in exponentials]  # softmax: their sum is 1
        message = sum(w * s.value for w, s in zip(weights, senders, strict=True))
        return message, weights


WORDS = ["the", "cat", "sat", "down"]
CHANNELS = ["article", "noun", "verb", "adverb", "animal"]
# fmt: off
#     article noun verb adverb animal
X = torch.tensor([
    [1.0, 0.0, 0.0, 0.0, 0.0],  # the
    [0.0, 1.0, 0.0, 0.0, 1.0],  # cat: a noun, and an animal
    [0.0, 0.0, 1.0, 0.0, 0.0],  # sat
    [0.0, 0.0, 0.0, 1.0, 0.0],  # down
])
W_QUERY = torch.tensor([
    [4.0, 0.0, 4.0, 0.0, 0.0],  # articles and verbs look for a noun
    [0.0, 4.0, 0.0, 4.0, 0.0],  # nouns and adverbs look for a verb
])
W_KEY = torch.tensor([
    [0.0, 1.0, 0.0, 0.0, 0.0],  # I am a noun
    [0.0, 0.0, 1.0, 0.0, 0.0],  # I am a verb
])
W_VALUE = torch.tensor([
    [0.0, 0.0, 0.0, 0.0, 1.0],  # I pass on: an animal
    [0.0, 0.0, 1.0, 0.0, 0.0],  # I pass on: a verb
])
W_OUT = torch.tensor([  # the two numbers of a message -> five channels
    [0.0, 0.0],
    [0.0, 0.0],
    [0.0, 1.0],  # "a verb" is added to the channel verb
    [0.0, 0.0],
    [1.0, 0.0],  # "an animal" is added to the channel animal
])
# fmt: on


def nodes_and_messages() -> Tensor:
    """The loops of the lecture. Returns the messages (4, 2)."""
    title("1. Nodes and messages")
    nodes = [Node(W_QUERY @ x, W_KEY @ x, W_VALUE @ x) for x in X]
    print("            query: looks for    key: is       value: passes on")
    print("            noun verb           noun verb     animal verb")
    for word, node in zip(WORDS, nodes, strict=True):
        q, k, v = (f"{a:4.0f} {b:4.0f}" for a, b in (node.query, node.key, node.value))
        print(f"    {word:8}{q}           {k}     {v}")

    senders = [nodes[: t + 1] for t in range(4)]  # a node receives from itself and from the past
    print("\nScores: query . key / sqrt(2). A row receives, a column sends. Dot: the future.")
    print_table([node.scores(senders[t]) for t, node in enumerate(nodes)])

    received = [node.receive(senders[t]) for t, node in enumerate(nodes)]
    print("\nWeights: the softmax of each row. The sum of a row is 1.")
    print_table([weights for _, weights in received])
    print('"sat" looks for a noun and finds "cat". "down" looks for a verb and finds "sat".')
    print('"cat" looks for a verb, but no verb has come yet: its weights are equal.')

    messages = torch.stack([message for message, _ in received])
    print("\nEach message is added to the node that receives it (the residual stream):")
    print(" " * 9 + "".join(f"{name:>9}" for name in CHANNELS))
    for word, row in zip(WORDS, (X + messages @ W_OUT.T).tolist(), strict=True):
        print(f"    {word:5}" + "".join(f"{number:9.2f}" for number in row))
    print('"sat" is still a verb, and now it knows that an animal sat. This is attention.')
    print('("cat" has 1.50 because a node receives from itself, too.)')
    return messages


# --- 2. The same with matrices ---


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """q (..., T, d), k (..., S, d), v (..., S, d) -> messages (..., T, d), weights (..., T, S).

    "..." are dimensions in front, for example batch and head.
    mask (T, S): True where row t receives from column s. None: each row receives from all columns.
    """
    # mT exchanges the last two dimensions: (4, 2) @ (2, 4) -> (4, 4).
    scores = q @ k.mT / math.sqrt(q.size(-1))
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf)  # exp(-inf) = 0
    weights = scores.softmax(dim=-1)
    return weights @ v, weights  # (4, 4) @ (4, 2) -> (4, 2)


Q, K, V = X @ W_QUERY.T, X @ W_KEY.T, X @ W_VALUE.T  # (4, 2) each
PAST = torch.ones(4, 4, dtype=torch.bool).tril()  # the diagonal, and below it


def with_matrices(messages: Tensor) -> None:
    title("2. The same with matrices")
    print("    q, k, v = X @ W_QUERY.T, X @ W_KEY.T, X @ W_VALUE.T     # (4, 2) each")
    print("    scores = q @ k.T / sqrt(2)                              # (4, 4)")
    print("    scores = scores.masked_fill(future, -inf)               # exp(-inf) = 0")
    print("    weights = scores.softmax(dim=-1)                        # (4, 4)")
    print("    messages = weights @ v                                  # (4, 2)")
    print("Equal to the loops:", torch.allclose(attend(Q, K, V, PAST)[0], messages))


# --- 3. Why the scores are divided ---


def why_divide() -> None:
    title("3. Why are scores divided by sqrt(d)?")
    print("A query and 8 keys of d random numbers: the largest of 8 weights, mean of 500")
    print("       d   divided   not divided")
    random = torch.Generator().manual_seed(0)
    for d in (2, 16, 128, 1024):
        queries = torch.randn(500, 1, d, generator=random)
        keys = torch.randn(500, 8, d, generator=random)
        scores = queries @ keys.mT  # (500, 1, 8)
        largest = [s.softmax(dim=-1).amax(dim=-1).mean() for s in (scores / math.sqrt(d), scores)]
        print(f"    {d:4} {largest[0]:9.2f} {largest[1]:13.2f}")
    print("A dot product is a sum of d terms. Here each term is the product of two random")
    print("numbers with mean 0 and variance 1. So each term has variance 1, and the sum has")
    print("variance d: its size is about sqrt(d). Without the division, one weight is")
    print("almost 1: the node receives from one sender only. A weight w changes with its")
    print("score by w (1 - w), which is almost 0 if w is near 0 or 1. So the gradient is")
    print("almost 0, and the node can hardly learn to look elsewhere.")


# --- 4. Several heads ---

W_QUERY_2, W_KEY_2 = torch.zeros(2, 5), torch.zeros(2, 5)
W_QUERY_2[0, CHANNELS.index("noun")] = 4  # a noun looks for an article
W_KEY_2[0, CHANNELS.index("article")] = 1  # I am an article


def several_heads() -> None:
    title("4. Several heads are several tables")
    print("A second head has its own matrices. In this head, a noun looks for its article.")
    _, first = attend(Q, K, V, PAST)
    _, second = attend(X @ W_QUERY_2.T, X @ W_KEY_2.T, V, PAST)
    tables = [table([row[: t + 1] for t, row in enumerate(w.tolist())]) for w in (first, second)]
    for left, right in zip(*tables, strict=True):
        print(left + right[2:])
    print('"cat" finds "the". The other words look for nothing in this head (query 0): they')
    print("receive the mean of all words so far. A GPT puts the messages of all heads side")
    print("by side, and a matrix mixes them: 128 channels are, for example, 4 heads of 32.")


# --- 5. An encoder ---


def encoder() -> None:
    title("5. The mask removed: an encoder, as in BERT")
    print_table(attend(Q, K, V)[1].tolist())
    print('Now "the" finds its noun and "cat" finds its verb, though these come later. This')
    print("helps to understand a whole text. It cannot learn to predict the next word: each")
    print("node sees the answer.")


# --- 6. Cross-attention ---

GERMAN = ["die", "Katze", "hat", "sich", "hin", "gesetzt"]  # the cat has itself down sat
# fmt: off
#     article noun verb adverb animal
X_GERMAN = torch.tensor([
    [1.0, 0.0, 0.0, 0.0, 0.0],  # die
    [0.0, 1.0, 0.0, 0.0, 1.0],  # Katze
    [0.0, 0.0, 1.0, 0.0, 0.0],  # hat
    [0.0, 0.0, 0.0, 0.0, 0.0],  # sich: none of these
    [0.0, 0.0, 0.0, 1.0, 0.0],  # hin
    [0.0, 0.0, 1.0, 0.0, 0.0],  # gesetzt
])
# fmt: on


def cross_attention() -> Tensor:
    """Returns the weights (4, 6)."""
    title("6. Cross-attention: keys and values come from another sentence")
    print("A translator has read 6 German words and has written 4 English words. The German")
    print("words give the 6 keys and values. The English words give the 4 queries.")
    print("Each English word (row) looks for German words (columns) of its own kind.")
    # The words themselves are queries, keys and values: 5 numbers each. Times 8: large scores, so
    # that the weights differ clearly.
    _, weights = attend(8 * X, X_GERMAN, X_GERMAN)  # (4, 5), (6, 5), (6, 5) -> (4, 6)
    print_table(weights.tolist(), GERMAN)
    print('"sat" finds both parts of the German verb: "hat" and "gesetzt". There is no')
    print("mask: the whole German sentence is known. The order of its words has no effect.")
    return weights


# --- 7. Three kinds of Transformers ---

PICTURE = """\
GPT: decoder     BERT: encoder     translation (T5): encoder, and decoder

text so far      whole text         6 German words           4 English words
     |                |                    |                        |
 attention        attention            attention                attention
 to the past      to all               to all                   to the past
     |                |                    |       .------> cross-attention
     |                |                    |       |       (4 queries from here)
     |                |                    |       |                |
    MLP              MLP                  MLP      |               MLP
     |                |                    |       |                |
     |                |                6 vectors --'                |
     |                |             (6 keys, 6 values)              |
 next word       one vector                                     next word
                  per word

Each column shows one block. A model is a stack of blocks. All blocks of the
encoder run first. Each block of the decoder makes keys and values from the
vectors of the encoder's last block, with its own W_KEY and W_VALUE.
In a GPT, x = x + attention(layer_norm(x)) and x = x + mlp(layer_norm(x)).
(BERT normalizes after the sum: x = layer_norm(x + attention(x)).)"""

# --- 8. Equal to model.py ---


def message_loop(attention: torch.nn.Module, x: Tensor) -> Tensor:
    """What CausalSelfAttention in model.py computes, as nodes in loops: (T, C) -> (T, C)."""
    T, C = x.shape
    d = C // attention.n_head
    # One linear layer makes the queries, keys and values of all heads: (T, C) each.
    queries, keys, values = attention.c_attn(x).split(C, dim=1)
    messages = torch.zeros(T, C, dtype=x.dtype)
    for head in range(attention.n_head):
        own = slice(head * d, (head + 1) * d)  # the channels of this head
        nodes = [Node(queries[t, own], keys[t, own], values[t, own]) for t in range(T)]
        for t in range(T):
            messages[t, own], _ = nodes[t].receive(nodes[: t + 1])
    return attention.c_proj(messages)  # a linear layer mixes the heads


@torch.no_grad()
def equal_to_model() -> bool:
    from model import CausalSelfAttention, GPTConfig

    attention = CausalSelfAttention(GPTConfig(n_embd=12, n_head=3))  # random weights
    x = torch.randn(1, 7, 12)  # (B, T, C)
    return torch.allclose(attention(x)[0], message_loop(attention, x[0]), atol=1e-6)


# --- Printing ---


def table(rows: list[list[float]], columns: list[str] = WORDS) -> list[str]:
    lines = [" " * 8 + "".join(f"{word:>8}" for word in columns)]
    for word, row in zip(WORDS, rows, strict=True):
        cells = [f"{number:.2f}" for number in row] + ["."] * (len(columns) - len(row))
        lines.append(f"    {word:4}" + "".join(f"{cell:>8}" for cell in cells))
    return lines


def print_table(rows: list[list[float]], columns: list[str] = WORDS) -> None:
    print("\n".join(table(rows, columns)))


def title(text: str) -> None:
    print(f"\n{text}\n{'-' * len(text)}")


def main() -> None:
    with_matrices(nodes_and_messages())
    why_divide()
    several_heads()
    encoder()
    cross_attention()
    title("7. Three kinds of Transformers")
    print(PICTURE)
    title("8. The strong form")
    print("CausalSelfAttention in model.py computes all nodes, heads and sequences at once.")
    print("Equal to a loop over nodes:", equal_to_model())


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the folder of model.py
    main()
