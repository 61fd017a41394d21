"""GPT-2: a stack of blocks in which tokens take turns to talk to one another and to think alone.

    model = GPT(GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384))
    logits, loss = model(idx, targets)              # train: (B, T) ids in, (B, T, V) logits out
    for ids in model.generate(idx, 500): ...        # write: (B,) ids, as they are drawn

The tokens of a context are the nodes of a directed graph, with an edge to each node from itself
and from all before it. Attention is the phase in which they communicate along these edges; the MLP
is the phase in which each computes on its own. A batch is B such graphs side by side, which never
exchange a word; and because no node sees its future, one context of T tokens holds T examples:
predict the second token from the first, the third from the first two, and so on.

Shapes: B graphs, T nodes in each, C = n_embd numbers per node, V = vocab_size.
The architecture and the parameters' names are those of GPT-2 (Radford et al. 2019); this file
needs torch alone, reads no file and prints nothing.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F


@dataclass
class GPTConfig:
    """The shape of a GPT; the defaults are the smallest GPT-2's, of 124,439,808 parameters."""

    block_size: int = 1024  # the longest context, in tokens
    vocab_size: int = 50257  # the tokenizer's
    n_layer: int = 12  # blocks, one on top of the other
    n_head: int = 12  # conversations going on at once in each attention
    n_embd: int = 768  # numbers that make up a node
    dropout: float = 0.0  # share of activations zeroed while training
    bias: bool = True  # biases in the linear layers and layer norms
    pad_vocab_to: int = 1  # make the table's rows a multiple of this; the surplus stays silent

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise ValueError(
                f"n_embd={self.n_embd} cannot be shared equally by n_head={self.n_head} heads"
            )


# --- Communicate: self-attention ---


class CausalSelfAttention(nn.Module):
    """Each node looks for what it needs (query), says what it has (key) and gives it (value)."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head = config.n_head
        self.dropout = config.dropout
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)
        self.attend = F.scaled_dot_product_attention  # training/kernels.py may know a faster one

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        """(B, T, C) -> (B, T, C): softmax(query · key / sqrt(head_dim)) weighs the values.

        With a cache, the T nodes also listen to those it holds, and are added to it.
        """
        B, T, C = x.shape
        parts = self.c_attn(x).view(B, T, 3, self.n_head, C // self.n_head).unbind(2)
        q, k, v = (part.transpose(1, 2) for part in parts)  # (B, n_head, T, head_dim) each
        if cache is not None:
            k, v = cache.extend(k, v)  # (B, n_head, nodes so far, head_dim) each
        # The mask keeps every node from hearing its future. A single new node has none; and with
        # torch's mask, which begins at the first key, it would hear the first node alone.
        dropout = self.dropout if self.training else 0.0
        y = self.attend(q, k, v, is_causal=T > 1, dropout_p=dropout)  # (B, n_head, T, head_dim)
        y = y.transpose(1, 2).reshape(B, T, C)  # what the heads heard, side by side again
        y = self.c_proj(y)
        return F.dropout(y, self.dropout) if self.training else y  # no call, while writing


# --- Compute: the multilayer perceptron ---


class MLP(nn.Module):
    """Each node thinks over what it has heard, by itself."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C), with 4C numbers in between."""
        x = self.c_proj(F.gelu(self.c_fc(x), approximate="tanh"))
        return F.dropout(x, self.dropout) if self.training else x


class Block(nn.Module):
    """One round of communication and one of computation."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor, cache: "KVCache | None" = None) -> torch.Tensor:
        # Both phases add to x and replace nothing: along this residual stream gradients flow
        # from the loss to the embeddings undiminished. The norms stand before the phases
        # ("pre-norm") so as to leave the stream itself alone.
        x = x + self.attn(self.ln_1(x), cache)  # communicate: nodes exchange messages
        x = x + self.mlp(self.ln_2(x))  # compute: each node thinks alone
        return x


# --- The whole ---


class GPT(nn.Module):
    """Token ids in; for every position, a score for each token that might come next out."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        rows = math.ceil(config.vocab_size / config.pad_vocab_to) * config.pad_vocab_to
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(rows, config.n_embd),  # what a token means
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # where it stands
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),
            }
        )
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The start of GPT (Radford et al. 2018), with the one change of GPT-2's paper.

        | parameters                           | start                      | source |
        |--------------------------------------|----------------------------|--------|
        | embeddings and linear weights        | normal, std 0.02           | GPT    |
        | the two projections into the stream  | normal, 0.02 / sqrt(2 L)   | GPT-2  |
        | biases                               | 0                          | GPT    |
        | layer norms                          | 1                          | GPT    |
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                # Two branches per block add into one residual stream: shrinking each by the
                # square root of their number keeps the stream's variance independent of depth.
                shrink = math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(parameter, std=0.02 / shrink)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)

    def forward(
        self, idx: torch.Tensor, targets: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """idx (B, T) -> logits (B, T, V), and the mean cross entropy in nats against targets.

        targets: (B, T) ids, each the successor of the one at its place in idx; -1 is left out.
        """
        logits = self.logits(self.nodes(idx))
        loss = None
        if targets is not None:
            loss = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)
        return logits[..., : self.config.vocab_size], loss

    def nodes(self, idx: torch.Tensor, caches: "list[KVCache] | None" = None) -> torch.Tensor:
        """idx (B, T) -> (B, T, C): the nodes after all rounds, each ready to name its successor."""
        start = caches[0].length if caches else 0
        end = start + idx.size(1)
        if end > self.config.block_size:
            raise ValueError(f"{end} tokens do not fit a context of {self.config.block_size}")
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[start:end]
        if self.training:
            x = F.dropout(x, self.config.dropout)
        for i, block in enumerate(self.transformer.h):
            x = block(x, caches[i] if caches else None)
        return self.transformer.ln_f(x)

    def logits(self, x: torch.Tensor) -> torch.Tensor:
        """(..., C) -> (..., rows of the table): how well each token would follow.

        The table that turned tokens into nodes turns nodes into tokens again ("tied" weights):
        a token's score is the dot product of the node and that token's row.
        """
        logits = F.linear(x, self.transformer.wte.weight)
        if logits.size(-1) > self.config.vocab_size:
            logits[..., self.config.vocab_size :] = -math.inf  # rows that are no tokens
        return logits

    # --- Writing ---

    @torch.inference_mode()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int = 0,
        top_p: float = 1.0,
        keep: int | None = None,
        stop_token: int | None = None,
        generator: torch.Generator | None = None,
        use_cache: bool = True,
    ) -> Iterator[torch.Tensor]:
        """Continue each row of idx (B, T), yielding (B,) ids as they are drawn.

        Puts the model into evaluation mode: dropout is for training. Nothing is kept for
        gradients: ids that are to be trained on want to be cloned.
        max_new_tokens: how many; None never ends.
        temperature, top_k, top_p: see draw().
        keep: tokens of a full context that go on into the next; None is half of block_size.
        stop_token: ends a row, which then repeats it until every row has ended.
        use_cache: False reads the whole context for every token: the same, but for rounding,
        only slower.
        Raises ValueError if T is 0, or keep not below block_size.
        """
        block_size = self.config.block_size
        keep = block_size // 2 if keep is None else keep
        if not 0 <= keep < block_size:
            raise ValueError(f"keep={keep} is not in 0 ... {block_size - 1}")
        if idx.size(1) == 0:
            raise ValueError("there is no token to go on from")
        self.eval()
        rows = len(idx)
        context = idx[:, -block_size:]  # (B, T)
        if (context == context[:1]).all():
            context = context[:1]  # (1, T): read once, however many texts go on from it
        caches = None
        ended = torch.zeros(rows, dtype=torch.bool, device=idx.device)
        drawn = 0
        while max_new_tokens is None or drawn < max_new_tokens:
            start = context_start(context.size(1), block_size, keep)
            if start > 0 or caches is None:
                context = context[:, start:]
                caches = [KVCache(rows, block_size) for _ in self.transformer.h]
            unread = context[:, caches[0].length :]  # all of it, then one token at a time
            x = self.nodes(unread, caches if use_cache else None)
            logits = self.logits(x[:, -1])[:, : self.config.vocab_size].expand(rows, -1)  # (B, V)
            ids = draw(logits, temperature, top_k, top_p, generator)  # (B,)
            if stop_token is not None:
                ids = ids.masked_fill(ended, stop_token)
                ended |= ids == stop_token
            yield ids
            if stop_token is not None and ended.all():
                return
            context = torch.cat((context.expand(rows, -1), ids[:, None]), dim=1)  # (B, T + 1)
            drawn += 1


def context_start(length: int, block_size: int, keep: int) -> int:
    """Where the context starts, of `length` tokens: at the first while they fit the block size.

    One token too many, and it starts anew with the `keep` latest and the new one. It has to: there
    is no position embedding past block_size, and once the start moves, every key in the cache was
    computed for the wrong position. keep = block_size - 1 moves it by one token at a time, which
    always leaves the longest possible context but encodes all of it for every token. A smaller
    `keep` jumps further: the cache serves for block_size - keep tokens before the next jump, at the
    price of a context that is shorter just after one.
    """
    return 0 if length <= block_size else length - keep - 1


class KVCache:
    """One block's keys and values of all nodes read so far: a node never changes what it said.

    They depend on earlier tokens alone, so a new token can listen to them without their being
    computed again, and writing costs one node's work per token instead of the whole context's.
    """

    def __init__(self, rows: int, block_size: int):
        self.rows, self.block_size = rows, block_size
        self.length = 0  # nodes held, of each row
        self.k = self.v = None  # (rows, n_head, block_size, head_dim) each, allocated once

    def extend(self, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Add T nodes' keys and values (B, n_head, T, head_dim); return those of all nodes.

        B is rows, or 1: what is the same in all rows.
        """
        _, n_head, T, head_dim = k.shape
        assert T == 1 or self.length == 0, "the causal mask is that of a context read at once"
        if self.k is None:
            self.k = k.new_empty(self.rows, n_head, self.block_size, head_dim)
            self.v = torch.empty_like(self.k)
        self.k.narrow(2, self.length, T).copy_(k)
        self.v.narrow(2, self.length, T).copy_(v)
        self.length += T
        if self.length == T:  # nothing was held before
            return k, v
        return self.k.narrow(2, 0, self.length), self.v.narrow(2, 0, self.length)


def draw(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Logits (B, V) -> one id per row (B,), drawn from their softmax.

    temperature: below 1 sharpens the distribution, above 1 flattens it; 0 takes the likeliest.
    top_k: only the k likeliest tokens are candidates; 0 means all.
    top_p: only the likeliest tokens that together reach this probability (nucleus sampling,
    Holtzman et al. 2020); 1 means all.
    Logits that are no numbers (NaN) are not looked for: they draw id 0.
    """
    if temperature < 1e-6:  # as good as 0
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    candidates = None
    if 0 < top_k < logits.size(-1):
        logits, candidates = logits.topk(top_k)  # (B, top_k) each
    probs = F.softmax(logits, dim=-1)
    if top_p < 1:
        descending, order = probs.sort(dim=-1, descending=True)
        # Out goes whoever comes after top_p has been reached; the first always stays.
        late = descending.cumsum(dim=-1) - descending >= top_p
        late[:, 0] = False
        probs = probs.masked_fill(late.scatter(1, order, late), 0.0)
    if generator is not None:
        probs = probs.to(generator.device)  # the draw is made where the dice are
    # A race: clocks with waits of 1 on average, drawn from the exponential distribution, ring after
    # waits / p, and with probability p each is the first. That is how torch.multinomial draws,
    # too, but it looks for negative numbers first, and waits for a GPU.
    waits = torch.empty_like(probs).exponential_(generator=generator)
    first = (probs / waits).argmax(dim=-1).to(logits.device)  # (B,)
    return first if candidates is None else candidates.gather(1, first[:, None]).squeeze(1)
