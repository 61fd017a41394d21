"""GPT-2: a decoder-only Transformer, and the simplest way to generate text with it.

    model = GPT(GPTConfig(block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128))
    loss = model(idx, targets)              # (B, T) token ids and their successors -> one number
    logits = model(idx)                     # (B, T) -> (B, T, V): scores for the next token
    idx = model.generate(idx, 500)          # (B, T) -> (B, T + 500)

A GPT is a stack of blocks. In each block, all tokens first exchange information (self-attention),
then each token is processed alone (MLP).

Attention is communication between the nodes of a directed graph. The nodes are the tokens of a
context, and a node receives messages from itself and from all earlier nodes:

                 sender
                 0  1  2  3
    receiver 0   x  .  .  .        The table of attention weights has this shape. A dot is a
             1   x  x  .  .        weight of 0: a node never sees its future. So each of the
             2   x  x  x  .        T positions is a training example: predict token 1 from
             3   x  x  x  x        token 0, token 2 from tokens 0 and 1, and so on.

The B sequences of a batch are independent graphs.

Shapes: B = batch size, T = sequence length, C = n_embd, V = vocab_size. The numbers in the comments
are for B=8, T=64, C=128, V=65 and 4 heads. Architecture and parameter names equal GPT-2's
(Radford et al. 2019).
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint


@dataclass
class GPTConfig:
    """Hyperparameters of the model. The defaults describe GPT-2 small (124,439,808 parameters).

    Raises ValueError for sizes that no model can have.
    """

    block_size: int = 1024  # maximum sequence length
    vocab_size: int = 50257  # number of tokens in the tokenizer's vocabulary
    n_layer: int = 12  # number of blocks
    n_head: int = 12  # attention heads per block
    n_embd: int = 768  # channels: the length of the vector that represents a token
    dropout: float = 0.0  # probability of zeroing an activation during training
    bias: bool = True  # use biases in the linear layers and layer norms
    pad_vocab_to: int = 1  # number of rows of wte: a multiple of this (GPU speed)
    float32_attention: bool = False  # attention in float32 under autocast: faster on some CPUs
    activation_checkpointing: bool = False  # in training, store only each block's input (memory)

    def __post_init__(self):
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd", "pad_vocab_to"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        if self.n_embd % self.n_head:
            raise ValueError(f"n_embd={self.n_embd} must be divisible by n_head={self.n_head}")
        if not 0 <= self.dropout <= 1:
            raise ValueError(f"dropout={self.dropout} must be from 0 to 1")

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the token embedding wte: vocab_size, rounded up to a multiple of pad_vocab_to."""
        return math.ceil(self.vocab_size / self.pad_vocab_to) * self.pad_vocab_to


# --- Attention: tokens exchange information ---


def attention_weights(q: torch.Tensor, k: torch.Tensor, causal: bool = True) -> torch.Tensor:
    """The attention table of each head: softmax(q k^T / sqrt(head_dim)); each row sums to 1.

    The simple form: CausalSelfAttention computes attention_weights(q, k) @ v by a faster function.

    q: queries (B, n_head, T, head_dim). k: keys (B, n_head, S, head_dim); in a GPT, S = T.
    Returns (B, n_head, T, S): how much position t of the queries attends to position s of the keys.
    causal: position t attends to positions 0 ... t only.
    Source: "Attention Is All You Need" (Vaswani et al. 2017), section 3.2.1.
    """
    # A query and a key that point in the same direction have a large dot product.
    scores = q @ k.mT  # (8, 4, 64, 32) @ (8, 4, 32, 64) -> (8, 4, 64, 64)
    # The dot product of two vectors of head_dim independent numbers with mean 0 and variance 1 has
    # variance head_dim. Without this division, one weight would be almost 1 and all others almost
    # 0. The gradient of the softmax would then be almost 0, too.
    scores = scores / math.sqrt(q.size(-1))
    if causal:
        future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(diagonal=1)
        scores = scores.masked_fill(future, -math.inf)  # exp(-inf) = 0: no weight on the future
    return scores.softmax(dim=-1)


class CausalSelfAttention(nn.Module):
    """Multi-head self-attention.

    Each token emits three vectors: a query (what it looks for), a key (what it is), and a
    value (what it passes on). There are n_head heads. Each head is an attention graph with its own
    queries, keys and values, which have head_dim = C / n_head channels.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.n_head, self.dropout = config.n_head, config.dropout
        self.float32_attention = config.float32_attention
        self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.qkv(x)  # each (B, n_head, T, head_dim)
        # The same as F.dropout(attention_weights(q, k), dropout) @ v, without storing the (T, T)
        # table of each head.
        dropout = self.dropout if self.training else 0.0
        if self.float32_attention:  # a question of speed: see engine/device.py
            with torch.autocast(x.device.type, enabled=False):
                q, k, v = q.float(), k.float(), v.float()
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        else:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=dropout)
        y = y.transpose(1, 2).reshape(B, T, C)  # (8, 4, 64, 32) -> (8, 64, 128): concatenate heads
        return F.dropout(self.c_proj(y), self.dropout, self.training)

    def qkv(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """(B, T, C) -> queries, keys and values, each (B, n_head, T, head_dim)."""
        B, T, C = x.shape
        qkv = self.c_attn(x)  # (B, T, 3C): (8, 64, 384)
        qkv = qkv.view(B, T, 3, self.n_head, C // self.n_head)  # (8, 64, 3, 4, 32)
        q, k, v = (part.transpose(1, 2) for part in qkv.unbind(2))  # each (8, 4, 64, 32)
        return q, k, v


# --- MLP: each token is processed alone ---


class MLP(nn.Module):
    """Two linear layers with GELU between them, applied to each token alone.

    Without the nonlinearity the two layers would be equal to one. GELU is a smooth ReLU.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.dropout = config.dropout
        self.c_fc = nn.Linear(config.n_embd, 4 * config.n_embd, bias=config.bias)
        self.c_proj = nn.Linear(4 * config.n_embd, config.n_embd, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        x = F.gelu(self.c_fc(x), approximate="tanh")  # (B, T, 4C): (8, 64, 512)
        return F.dropout(self.c_proj(x), self.dropout, self.training)


class Block(nn.Module):
    """Self-attention, then the MLP, each added to the residual stream x."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        # Layer norm shifts and scales the C numbers of each token to mean 0 and variance 1, then
        # applies a learned gain (and bias). So each sublayer gets inputs of one scale, however
        # large the residual stream has become; deep stacks train badly without it.
        self.ln_1 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = nn.LayerNorm(config.n_embd, bias=config.bias)
        self.mlp = MLP(config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(B, T, C) -> (B, T, C)."""
        # Each sublayer adds to x and never replaces it. Along these sums the gradient flows from
        # the loss to the embeddings without shrinking. The norms stand before the sublayers
        # ("pre-norm"), so no block normalizes x itself.
        x = x + self.attn(self.ln_1(x))  # tokens exchange information
        x = x + self.mlp(self.ln_2(x))  # each token is processed alone
        return x


# --- The whole model ---


class GPT(nn.Module):
    """Takes token ids; returns, for each position, a score (logit) for each possible next token."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(  # the names are OpenAI's
            {
                "wte": nn.Embedding(config.padded_vocab_size, config.n_embd),  # token embedding
                "wpe": nn.Embedding(config.block_size, config.n_embd),  # position embedding
                "h": nn.ModuleList(Block(config) for _ in range(config.n_layer)),
                "ln_f": nn.LayerNorm(config.n_embd, bias=config.bias),  # final layer norm
            }
        )
        self.init_weights()

    def forward(self, idx: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """idx: (B, T) token ids -> logits (B, T, V); with targets: the loss alone.

        targets: (B, T) ids, at each position the token that follows; -1 is left out of the mean.
        The loss is the mean cross-entropy, -ln p(target), in nats (natural logarithms).
        """
        x = self.hidden_states(idx)
        if targets is None:
            return self.lm_head(x)
        if targets.shape != idx.shape:  # flatten() would hide different shapes
            raise ValueError(f"targets {list(targets.shape)} for idx {list(idx.shape)}")
        logits = self.lm_head(x, cut_padding=False)
        # (B, T, V) -> (B*T, V) against (B*T,): (512, 65) against (512,)
        return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1)

    def hidden_states(self, idx: torch.Tensor) -> torch.Tensor:
        """(B, T) -> (B, T, C): the residual stream after all blocks and the final layer norm.

        Raises ValueError if T is larger than block_size.
        """
        T = idx.size(1)
        if self.config.block_size < T:
            raise ValueError(f"sequence length {T} exceeds block_size {self.config.block_size}")
        # Attention sees a set of vectors without an order. So each position has a learned vector,
        # which is added to the token's: (B, T, C) + (T, C).
        positions = torch.arange(T, device=idx.device)
        x = self.transformer.wte(idx) + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.dropout, self.training)
        for block in self.transformer.h:
            if self.training and self.config.activation_checkpointing:
                # Less memory, more time: the backward pass computes the block's forward pass again.
                x = checkpoint(block, x, use_reentrant=False)
            else:
                x = block(x)
        return self.transformer.ln_f(x)

    def lm_head(self, x: torch.Tensor, cut_padding: bool = True) -> torch.Tensor:
        """(..., C) -> (..., V): logits.

        The output layer is the token embedding again ("tied weights"): a logit is the dot product
        of a hidden state and the embedding of a token. So it has no weight of its own.
        cut_padding: False returns (..., padded_vocab_size), with -inf where there is no token: its
        probability is 0, and the loss is equal. With pad_vocab_to=64, each row of the logits
        starts at a multiple of 128 bytes (64 numbers of 16 bits): a GPU computes the loss faster.
        """
        logits = F.linear(x, self.transformer.wte.weight)
        V = self.config.vocab_size
        if cut_padding or logits.size(-1) == V:
            return logits[..., :V]
        ids = torch.arange(logits.size(-1), device=x.device)
        return logits.masked_fill_(ids >= V, -math.inf)

    def init_weights(self) -> None:
        """Initialize as GPT (Radford et al. 2018) and GPT-2 (Radford et al. 2019) do.

        | parameters                                  | initialization                  | source |
        |---------------------------------------------|---------------------------------|--------|
        | embeddings, weights of linear layers        | normal, std 0.02                | GPT    |
        | c_proj, which add to the residual stream    | normal, std 0.02/sqrt(2 n_layer)| GPT-2  |
        | biases of linear layers                     | 0                               | GPT    |
        | layer norms (by nn.LayerNorm): gain, bias   | 1, 0                            | GPT    |

        (OpenAI's code starts position embeddings with std 0.01, the library transformers with
        0.02.)
        """
        for name, module in self.named_modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                # Each block adds twice to the residual stream. Dividing by the square root of the
                # number of additions keeps its variance independent of the depth.
                scale = math.sqrt(2 * self.config.n_layer) if "c_proj" in name else 1
                nn.init.normal_(module.weight, std=0.02 / scale)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    @torch.no_grad()
    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int,
        temperature: float = 1.0,
        top_k: int | None = None,
        generator: torch.Generator | None = None,
    ) -> torch.Tensor:
        """Continue each row of idx, (B, T) -> (B, T + max_new_tokens), one token at a time.

        temperature: below 1 the likely tokens become likelier, above 1 less likely. ValueError
            unless it is above 0.
        top_k: sample among the k likeliest tokens only; top_k=1 is greedy, 0 or None takes all.
        Call model.eval() first if the model was trained with dropout.
        engine/inference.py is the fast form. It keeps the keys and values of earlier tokens. With
        its setting overlap = block_size - 1 it gives the same tokens as this function.
        """
        if not temperature > 0:
            raise ValueError(f"temperature={temperature} must be above 0")
        k = min(top_k or self.config.vocab_size, self.config.vocab_size)
        for _ in range(max_new_tokens):
            context = idx[:, -self.config.block_size :]  # crop: there are no later positions
            logits = self(context)[:, -1].float() / temperature  # (B, V): only the last position
            if k < self.config.vocab_size:
                logits, ids = logits.topk(k)  # (B, k) each: the k likeliest tokens
            probs = logits.softmax(dim=-1)
            next_token = torch.multinomial(probs, num_samples=1, generator=generator)  # (B, 1)
            if k < self.config.vocab_size:
                next_token = ids.gather(1, next_token)  # from the number in the list of k to the id
            idx = torch.cat((idx, next_token), dim=1)  # (B, T + 1)
        return idx
