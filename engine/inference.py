"""Fast generation: what model.generate does, many times faster.

    inference = InferenceModel(model, device="cpu")   # the model itself is not changed
    for ids in inference.generate(idx, 500):          # idx (B, T) -> (B,) ids, one step at a time
        ...

model.generate computes the whole context again for each new token. Here a cache keeps the keys and
values of all earlier tokens, so each new token costs the computation of one token.

Why the cache is right: in the first block, the key and the value of a token depend on this token
and its position only. What attention adds to the token depends on earlier tokens, never on later
ones, because of the causal mask. So the input of the second block, and with it the keys and values
of the second block, depend on this token and earlier tokens only; and so on through all blocks.
A later token never changes a key or a value that has been computed, in any block.

Why the cache does not last forever: see crop_start().

On a CPU a new token attends to the filled part of the cache. On CUDA, starting an operation takes
longer than computing it. There a step attends to the whole cache with a mask, so that no shape
depends on the position: decode_step() and the choice of the token are recorded once, as a CUDA
graph, and replayed for each token. (lessons/README.md has a glossary.)

To understand the cache, read InferenceModel._generate(), KVCache, next_token_logits(), run_blocks()
and crop_start(). _make_decode(), decode_step() and capture_cuda_graph() are for CUDA.
"""

import functools
import platform
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import count
from typing import NamedTuple

import torch
import torch.nn as nn
import torch.nn.functional as F

from engine.changed_model import copy_model, is_gpt2
from engine.device import DTypeName, choose_dtype, has_bfloat16, is_intel_cpu, start_reading
from engine.hf_format import LAYER_NORM_EPS
from model import GPT, GPTConfig

SMALL_MODEL_PARAMETERS = 2_000_000  # the weights of a smaller model stay in the CPU's caches
FINISHED_CHECK_INTERVAL = 16  # steps between checks whether all rows are finished, on a GPU


class InferenceModel:
    """A model whose weights have been prepared for generation on one device.

    dtype: precision of the weights; "auto" is the fastest for this model on this device.
    batch_size: number of rows that generate() will get. The fastest way to store the weights
    depends on it. Each way adds numbers in its own order, so the logits differ in their last
    digits. This changes a token only where the choice between two tokens is almost a tie.
    static_cache: each step attends to the whole cache, so that no shape changes (see above); always
    on CUDA, and slower on a CPU.
    compile: compile decode_step() with torch.compile, for CUDA. The first token then takes longer.
    After more training of the model, build a new InferenceModel: some of the weights are copies.
    Raises FolioError if the device does not support dtype.
    """

    def __init__(
        self,
        model: GPT,
        device: torch.device | str = "cpu",
        dtype: DTypeName = "auto",
        batch_size: int = 1,
        *,
        static_cache: bool = False,
        compile: bool = False,
    ):
        self.config = model.config
        self.device = torch.device(device)
        # 16 bits per weight: half as many bytes to read from memory. The weights of a small model
        # stay in the CPU's own fast memory.
        small = self.device.type == "cpu" and is_small(model)
        self.dtype = choose_dtype("float32" if small and dtype == "auto" else dtype, self.device)
        packed = not small and packing_is_faster(self.device, self.dtype, batch_size)
        # If model.py was changed, for an experiment, the changed model computes the logits itself.
        self.changed_model = None if is_gpt2(model) else copy_model(model).eval()
        if self.changed_model is None:
            self.weights = prepare_weights(model, self.device, self.dtype, packed)
        self.static_cache = static_cache or compile or self.device.type == "cuda"
        self.decode_step = torch.compile(decode_step, dynamic=False) if compile else decode_step

    def generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int | None = None,
        *,
        temperature: float = 1.0,
        top_k: int | None = 0,
        top_p: float = 1.0,
        overlap: int | None = None,
        stop_tokens: Sequence[int] = (),
        generator: torch.Generator | None = None,
    ) -> Iterator[torch.Tensor]:
        """Continue each row of idx (B, T), yielding the next token of each row (B,) step by step.

        With overlap = block_size - 1 the tokens equal the tokens of model.generate.
        max_new_tokens: number of steps; None does not end.
        temperature, top_k, top_p: see sampling_probs().
        overlap: tokens that are kept when the context is full; default block_size // 2. With
        block_size 8 and overlap 4, the context grows to 8 tokens. When one more token follows, the
        oldest 4 tokens are dropped, and the context continues with 4 old tokens and the new one.
        stop_tokens: a row that samples one of these ids is finished and repeats this id until all
        rows are finished. Then generation ends (on a GPU up to 15 steps later).
        generator: makes the random numbers; on the device of the model (ComputeDevice.generator).
        The ids are made in inference mode: clone them before using them for training.
        Raises ValueError for invalid arguments, at this call.
        """
        vocab_size, block_size = self.config.vocab_size, self.config.block_size
        overlap = block_size // 2 if overlap is None else overlap
        if idx.dim() != 2 or idx.numel() == 0 or idx.is_floating_point():
            raise ValueError(
                "idx must be integers of shape (B, T), B and T at least 1, "
                f"not {idx.dtype} of shape {tuple(idx.shape)}"
            )
        if idx.min() < 0 or idx.max() >= vocab_size:
            raise ValueError(f"an id in idx is not in 0 ... {vocab_size - 1}")
        # A number such as 2.5 is not in a range either.
        if any(token not in range(vocab_size) for token in stop_tokens):
            raise ValueError(f"stop_tokens={stop_tokens}: ids are in 0 ... {vocab_size - 1}")
        if max_new_tokens is not None and (max_new_tokens < 0 or max_new_tokens % 1):
            raise ValueError(f"max_new_tokens={max_new_tokens} must be an integer of at least 0")
        if not 0 <= overlap < block_size:
            raise ValueError(
                f"overlap={overlap} must be in 0 ... block_size - 1 = {block_size - 1}"
            )
        if self.device.type == "cuda" and generator and generator.device.type != "cuda":
            # A recorded step would repeat the random numbers of the first one.
            raise ValueError(f"generator is on {generator.device}, the model on {self.device}")
        top_k = top_k or 0  # None: as in model.generate
        check_sampling_arguments(temperature, top_k, top_p)
        sample = functools.partial(
            sample_next_token,
            temperature=temperature, top_k=top_k, top_p=top_p, generator=generator,
        )  # fmt: skip
        stop = torch.tensor(stop_tokens, dtype=torch.long, device=self.device)
        idx = idx.to(self.device, torch.long)
        if self.changed_model is not None:
            return self._generate_without_cache(idx, max_new_tokens, stop, sample)
        return self._generate(idx, max_new_tokens, overlap, stop, sample, generator)

    @torch.inference_mode()
    def _generate_without_cache(
        self,
        idx: torch.Tensor,
        max_new_tokens: int | None,
        stop: torch.Tensor,
        sample: Callable[[torch.Tensor], torch.Tensor],
    ) -> Iterator[torch.Tensor]:
        """The steps of generate() for a changed model, without a cache.

        As in model.generate, a full context moves by one token; the setting overlap has no effect.
        """
        model = self.changed_model.to(self.device)
        finished = torch.zeros(len(idx), dtype=torch.bool, device=self.device)
        for _ in count() if max_new_tokens is None else range(max_new_tokens):
            idx = idx[:, -self.config.block_size :]
            logits = model(idx)[:, -1, : self.config.vocab_size]  # (B, V): without padding
            ids = sample(logits)  # (B,)
            if len(stop):
                ids = torch.where(finished, idx[:, -1], ids)  # repeat the stop token
                finished |= (ids[:, None] == stop).any(dim=1)
            yield ids
            if len(stop) and finished.all():
                return
            idx = torch.cat((idx, ids[:, None]), dim=1)

    @torch.inference_mode()
    def _generate(
        self,
        idx: torch.Tensor,
        max_new_tokens: int | None,
        overlap: int,
        stop: torch.Tensor,
        sample: Callable[[torch.Tensor], torch.Tensor],
        generator: torch.Generator | None,
    ) -> Iterator[torch.Tensor]:
        """The steps of generate(), which checks the arguments.

        A function with `yield` starts at the first next(). So the check is in another function.
        """
        B, block_size = len(idx), self.config.block_size
        context = idx[:, -block_size:]  # (B, T): there are no more positions
        max_length = block_size
        if max_new_tokens is not None and not self.static_cache:
            max_length = min(block_size, context.size(1) + max_new_tokens)
        cache = KVCache(self.config, B, max_length, self.device, self.dtype)
        decode = None  # made when the second token is computed
        parts = [context]  # the context, and each token that has been added to it
        new = context  # (B, T): tokens that are not in the cache yet
        if (context == context[:1]).all():
            new = context[:1]  # (1, T): all rows have the same prompt, which is computed once
        finished = torch.zeros(B, dtype=torch.bool, device=self.device)
        check_interval = 1 if self.device.type == "cpu" else FINISHED_CHECK_INTERVAL
        steps = count(1) if max_new_tokens is None else range(1, max_new_tokens + 1)
        for step in steps:
            # The prompt, and the context after a crop. On a CPU also a single new token.
            if cache.length == 0 or not self.static_cache:
                logits = next_token_logits(self.weights, new, cache)  # (B, V), or (1, V)
                ids = sample(logits.expand(B, -1))  # (B,)
            else:
                decode = decode or self._make_decode(cache, sample, generator)
                ids = decode(new)  # (B,)
            if len(stop):
                ids = torch.where(finished, new[:, -1], ids)  # repeat the stop token
                finished |= (ids[:, None] == stop).any(dim=1)
            yield ids  # the loop continues when the caller asks for the next ids
            if len(stop) and step % check_interval == 0 and finished.all():
                return
            new = ids[:, None]  # (B, 1)
            parts.append(new)
            length = context.size(1) + len(parts) - 1  # parts[0] is the context
            start = crop_start(length, block_size, overlap)
            if start > 0:
                context = new = torch.cat(parts, dim=1)[:, start:]  # (B, overlap + 1)
                parts = [context]
                cache.length = 0

    def _make_decode(
        self,
        cache: "KVCache",
        sample: Callable[[torch.Tensor], torch.Tensor],
        generator: torch.Generator | None,
    ) -> Callable[[torch.Tensor], torch.Tensor]:
        """A function: one new token for each row (B, 1) -> the next ids (B,). It fills the cache.

        sample: logits (B, V) -> ids (B,), with random numbers of `generator`.
        """
        # The places that are not filled yet have the weight 0, but their memory may hold NaN, and
        # 0 * NaN is NaN.
        for kv in cache.kv:
            kv[..., cache.length :, :].zero_()
        idx = torch.zeros(cache.kv[0].size(1), 1, dtype=torch.long, device=self.device)
        # The place of the next token. The capture writes keys and values of token 0 there; the
        # first call of decode() writes over them.
        position = torch.full((1,), cache.length, dtype=torch.long, device=self.device)

        def step() -> torch.Tensor:
            return sample(self.decode_step(self.weights, idx, cache.kv, position))

        if self.device.type == "cuda":
            step = capture_cuda_graph(step, capture_stream(self.device), generator)

        def decode(new: torch.Tensor) -> torch.Tensor:
            idx.copy_(new)
            position.fill_(cache.length)
            cache.length += 1
            return step()

        return decode


def is_small(model: GPT) -> bool:
    """Whether all weights fit into the caches of a CPU."""
    return sum(parameter.numel() for parameter in model.parameters()) < SMALL_MODEL_PARAMETERS


def read_ids(steps: Iterable[torch.Tensor], late: bool | None = None) -> Iterator[list[int]]:
    """The ids (B,) of each step of InferenceModel.generate as a list.

    late: read the ids of a step after the next step has been started; by default on CUDA. The GPU
    then computes the next step while the program decodes and prints the ids.
    """
    pending: deque[Callable[[], list[int]]] = deque()
    for ids in steps:
        pending.append(start_reading(ids))
        is_late = ids.device.type == "cuda" if late is None else late
        n_unread = 1 if is_late else 0  # so many results wait for the next step
        if len(pending) > n_unread:
            read = pending.popleft()
            yield read()
    for read in pending:
        yield read()


def crop_start(length: int, block_size: int, overlap: int) -> int:
    """Index of the first token that stays in a context of `length` tokens.

    crop_start(8, block_size=8, overlap=4) -> 0    the context fits: all tokens stay
    crop_start(9, block_size=8, overlap=4) -> 4    tokens 4 to 8 stay: four old ones and the new one
    crop_start(9, block_size=8, overlap=7) -> 1    tokens 1 to 8: the longest context that fits
    crop_start(9, block_size=8, overlap=0) -> 8    the new token alone

    There is no position embedding after block_size. When earlier tokens are dropped, the tokens
    that stay get new positions, so every cached key and value was computed for a wrong position
    and the context has to be encoded again. overlap = block_size - 1 does so for every token, as
    model.generate does. A smaller overlap does so once in block_size - overlap tokens; the price
    is a shorter context after each time.
    """
    return 0 if length <= block_size else length - overlap - 1


# --- One step: a function of weights, token ids and cache ---

Layer = Callable[[torch.Tensor], torch.Tensor]


class BlockWeights(NamedTuple):
    """The layers of one block, under the names of model.py."""

    ln_1: Layer
    c_attn: Layer
    attn_c_proj: Layer
    ln_2: Layer
    c_fc: Layer
    mlp_c_proj: Layer


class Weights(NamedTuple):
    """The weights of a model. A layer is a function (..., in) -> (..., out) with its weights."""

    wte: torch.Tensor  # (V, C) token embedding
    wpe: torch.Tensor  # (block_size, C) position embedding
    blocks: list[BlockWeights]
    ln_f: Layer
    lm_head: Layer


class KVCache:
    """The keys and values of all blocks for the tokens that have been computed.

    kv: for each block (2, B, n_head, max_length, head_dim); the 2 are keys and values.
    length: number of tokens in the cache. Set it to 0 to empty the cache.
    """

    def __init__(
        self,
        config: GPTConfig,
        batch_size: int,
        max_length: int,
        device: torch.device,
        dtype: torch.dtype,
    ):
        head_dim = config.n_embd // config.n_head
        shape = (2, batch_size, config.n_head, max_length, head_dim)
        self.kv = [torch.empty(shape, device=device, dtype=dtype) for _ in range(config.n_layer)]
        self.length = 0


def next_token_logits(weights: Weights, idx: torch.Tensor, cache: KVCache) -> torch.Tensor:
    """(B, T) new tokens -> (B, V): logits of the token after the last one.

    This is GPT.forward for the new tokens alone. Their keys and values are added to the cache.
    Either the cache is empty, or T is 1. With an empty cache B may be 1: the cache then gets the
    keys and values of this row in all its rows.
    """
    T = idx.size(1)
    start, end = cache.length, cache.length + T
    assert start == 0 or T == 1, "is_causal below is right for these cases only"

    def attend(i: int, qkv: torch.Tensor) -> torch.Tensor:
        # qkv: (3, B, n_head, T, head_dim). cache.kv[i]: (2, B, n_head, max_length, head_dim).
        # narrow(3, start, T) is [:, :, :, start : start + T].
        # The places of the new tokens. If qkv has one row (B = 1), copy_() repeats it in all rows.
        cache.kv[i].narrow(3, start, T).copy_(qkv[1:])
        q, k, v = qkv.unbind(0)
        if start > 0:
            k, v = cache.kv[i].narrow(3, 0, end).unbind(0)  # (B, n_head, end, head_dim)
        # A single new token attends to all tokens, so it needs no mask. (torch's causal mask
        # would let it attend to the first token only.)
        return F.scaled_dot_product_attention(q, k, v, is_causal=T > 1)

    x = F.embedding(idx, weights.wte) + weights.wpe[start:end]  # (B, T, C)
    logits = run_blocks(weights, x, cache.kv[0].size(2), attend)
    cache.length = end
    return logits


def decode_step(
    weights: Weights, idx: torch.Tensor, kv: list[torch.Tensor], position: torch.Tensor
) -> torch.Tensor:
    """(B, 1) new tokens -> (B, V): what next_token_logits() computes for T = 1.

    kv: of a KVCache. position: (1,), of the new tokens. Only numbers on the device change from
    token to token, and no shape. So the step is compiled once and recorded once.
    """
    places = torch.arange(kv[0].size(3), device=idx.device)  # (max_length,)
    mask = places <= position  # the filled places

    def attend(i: int, qkv: torch.Tensor) -> torch.Tensor:
        kv[i].index_copy_(3, position, qkv[1:])
        k, v = kv[i].unbind(0)  # (B, n_head, max_length, head_dim)
        return F.scaled_dot_product_attention(qkv[0], k, v, attn_mask=mask[None])

    x = F.embedding(idx, weights.wte) + F.embedding(position, weights.wpe)  # (B, 1, C)
    return run_blocks(weights, x, kv[0].size(2), attend)


def run_blocks(
    weights: Weights,
    x: torch.Tensor,
    n_head: int,
    attend: Callable[[int, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Embedded tokens (B, T, C) -> (B, V): logits of the token after the last one.

    attend(i, qkv): attention in block i. qkv: queries, keys and values of the new tokens,
    (3, B, n_head, T, head_dim). Returns (B, n_head, T, head_dim).
    """
    B, T, C = x.shape
    for i, block in enumerate(weights.blocks):
        # Attention
        qkv = block.c_attn(block.ln_1(x)).view(B, T, 3, n_head, C // n_head)
        y = attend(i, qkv.permute(2, 0, 3, 1, 4))  # qkv: now (3, B, n_head, T, head_dim)
        x = x + block.attn_c_proj(y.transpose(1, 2).reshape(B, T, C))
        # MLP
        x = x + block.mlp_c_proj(F.gelu(block.c_fc(block.ln_2(x)), approximate="tanh"))
    return weights.lm_head(weights.ln_f(x[:, -1]))  # (B, C) -> (B, V)


@functools.cache
def capture_stream(device: torch.device) -> torch.cuda.Stream:
    """The queue of work for the GPU in which steps are recorded.

    One for all graphs: cuBLAS, NVIDIA's library of matrix products, keeps memory for each stream.
    """
    return torch.cuda.Stream(device)


def capture_cuda_graph(
    step: Callable[[], torch.Tensor],
    stream: torch.cuda.Stream,
    generator: torch.Generator | None = None,
) -> Callable[[], torch.Tensor]:
    """Record step() as a CUDA graph; the function that is returned replays it with one command.

    A replay reads its inputs from the tensors that step() has read, which the caller keeps. It
    returns a copy of what it has computed. Starting some hundred kernels one by one would take
    longer than computing them for one token.
    generator: makes the random numbers of step(); on the GPU. Each replay draws new numbers. The
    recording leaves the state of this generator unchanged. With None, the global generator makes
    them, and its state changes.
    """
    state = None if generator is None else generator.get_state()
    with torch.cuda.device(stream.device):
        # Before the capture, everything is compiled and allocated.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        if generator is not None:
            generator.set_state(state)
            graph.register_generator_state(generator)
        # thread_local: meanwhile other threads may use the GPU. In training, one copies a batch,
        # and one of NCCL watches the processes.
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            result = step()

    def replay() -> torch.Tensor:
        graph.replay()
        return result.clone()  # the next replay overwrites `result`

    return replay


# --- Sampling ---

GREEDY_TEMPERATURE = 1e-6  # below this temperature the likeliest token is taken


def sampling_probs(
    logits: torch.Tensor, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> torch.Tensor:
    """Logits (B, V) -> the probabilities (B, V) with which the next token is sampled.

    For the logits 2, 1, 0, -1:
        temperature=0.5            0.86 0.12 0.02 0.00    likely tokens become likelier
        temperature=1              0.64 0.24 0.09 0.03
        temperature=2              0.46 0.28 0.17 0.10    likely tokens become less likely
        temperature=0              1    0    0    0       greedy: always the likeliest token
        temperature=1, top_k=2     0.73 0.27 0    0       only the k likeliest tokens; 0: all tokens
        temperature=1, top_p=0.8   0.73 0.27 0    0       the fewest likeliest tokens whose
                                                          probabilities add up to 0.8 or more

    top_p is nucleus sampling (Holtzman et al. 2020). The likeliest token is always kept.
    Raises ValueError if temperature or top_k is negative, or top_p is not in 0 ... 1.
    """
    check_sampling_arguments(temperature, top_k, top_p)
    if temperature < GREEDY_TEMPERATURE:
        return F.one_hot(logits.argmax(dim=-1), logits.size(-1)).float()
    probs, ids = candidates(logits, temperature, top_k, top_p)
    return probs if ids is None else torch.zeros_like(logits).float().scatter(1, ids, probs)


def sample_next_token(
    logits: torch.Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> torch.Tensor:
    """Logits (B, V) -> one id per row (B,), sampled with the probabilities of sampling_probs().

    Chooses among the candidates() as torch.multinomial(probs, 1, generator=generator) does, with
    the same random numbers, but without its checks, for which the CPU has to wait for a GPU. NaN in
    the logits is not noticed.
    """
    check_sampling_arguments(temperature, top_k, top_p)
    if temperature < GREEDY_TEMPERATURE:
        return logits.argmax(dim=-1)
    probs, ids = candidates(logits, temperature, top_k, top_p)
    device = probs.device if generator is None else generator.device  # MPS: a generator on the CPU
    noise = torch.empty(probs.shape, device=device).exponential_(generator=generator)
    # If each E_i has an exponential distribution of rate 1, then E_i / p_i has one of rate p_i. Of
    # several such numbers, number i is the smallest with probability p_i / (sum of all p) = p_i. So
    # p_i / E_i is the largest with probability p_i. torch.multinomial samples in this way, too;
    # lessons/sampling.py has a simpler way.
    choice = (probs / noise.to(probs.device)).argmax(dim=-1, keepdim=True)  # (B, 1)
    return (choice if ids is None else ids.gather(1, choice)).squeeze(1)


def candidates(
    logits: torch.Tensor, temperature: float, top_k: int, top_p: float
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (B, V) -> probabilities and ids, (B, k) each, of the tokens that may be sampled.

    The likeliest token comes first. Where all tokens may be sampled, k is V, and the ids are None:
    the candidates are in the order of the vocabulary.
    """
    logits, ids = logits.float() / temperature, None
    if 0 < top_k < logits.size(-1):
        logits, ids = logits.topk(top_k)  # (B, top_k) each
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probs = logits.softmax(dim=-1)
    if top_p < 1:
        # Probabilities          0.64 0.24 0.09 0.03
        # sum before each one    0    0.64 0.88 0.97    for top_p=0.8, the last two are removed
        remove = probs.cumsum(dim=-1) - probs >= top_p
        remove[:, 0] = False
        probs = probs.masked_fill(remove, 0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs, ids


def check_sampling_arguments(temperature: float, top_k: int, top_p: float) -> None:
    if not 0 <= temperature < float("inf"):  # NaN fails this comparison, too
        raise ValueError(f"temperature={temperature} must be a number of at least 0")
    if top_k < 0 or top_k % 1:
        raise ValueError(f"top_k={top_k} must be an integer of at least 0 (0: all tokens)")
    if not 0 <= top_p <= 1:
        raise ValueError(f"top_p={top_p} must be in 0 ... 1")


# --- Preparing the weights ---


def prepare_weights(
    model: GPT, device: torch.device, dtype: torch.dtype, packed: bool = False
) -> Weights:
    """The weights of a model on a device; the model is not changed.

    packed: store the matrices not row by row, but in the order in which oneDNN (a library for CPUs)
    reads them.
    """

    def prepare(parameter: torch.Tensor | None) -> torch.Tensor | None:
        return None if parameter is None else parameter.detach().to(device, dtype)

    def linear(layer: nn.Linear) -> Layer:
        return make_linear(prepare(layer.weight), prepare(layer.bias))

    def layer_norm(layer: nn.LayerNorm) -> Layer:
        shape, weight, bias = layer.normalized_shape, prepare(layer.weight), prepare(layer.bias)
        return lambda x: F.layer_norm(x, shape, weight, bias, LAYER_NORM_EPS)

    make_linear = packed_linear if packed else plain_linear
    wte = prepare(model.transformer.wte.weight)[: model.config.vocab_size]
    return Weights(
        wte=wte,
        wpe=prepare(model.transformer.wpe.weight),
        blocks=[
            BlockWeights(
                ln_1=layer_norm(block.ln_1),
                c_attn=linear(block.attn.c_attn),
                attn_c_proj=linear(block.attn.c_proj),
                ln_2=layer_norm(block.ln_2),
                c_fc=linear(block.mlp.c_fc),
                mlp_c_proj=linear(block.mlp.c_proj),
            )
            for block in model.transformer.h
        ],
        ln_f=layer_norm(model.transformer.ln_f),
        lm_head=make_linear(wte, None),
    )


def plain_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    return lambda x: F.linear(x, weight, bias)


def packed_linear(weight: torch.Tensor, bias: torch.Tensor | None) -> Layer:
    """A linear layer whose weight (out, in) is stored as oneDNN reads it; for CPUs.

    torch packs weights like this when it compiles a model. It has no public name for it.
    """
    linear = torch.ops.mkldnn._linear_pointwise
    weight = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x: linear(x, weight, bias, "none", [], "")


def packing_is_faster(device: torch.device, dtype: torch.dtype, batch_size: int) -> bool:
    """Whether a model of more than SMALL_MODEL_PARAMETERS generates faster with packed weights.

    For each token, all weights are read once. The weights of a large model come from memory, so
    what counts is the number of bytes and the order in which they lie. The measurements behind
    these rules, on an AMD EPYC and an Intel Xeon, are in tests/benchmarks/README.md: torch has two
    libraries of matrix products, MKL for plain weights and oneDNN for packed ones. On Intel CPUs
    MKL is faster in float32 for one or two rows; otherwise it takes up to twice as long as oneDNN.
    """
    if not packing_is_supported(device, dtype):
        return False
    return not (is_intel_cpu() and dtype == torch.float32 and batch_size <= 2)


def packing_is_supported(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is an x86 CPU, and this torch has oneDNN for it in this precision."""
    if device.type != "cpu" or platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    if dtype != torch.float32 and not (dtype == torch.bfloat16 and has_bfloat16(device)):
        return False
    private_ops = ("_linear_pointwise", "_reorder_linear_weight")
    return all(hasattr(torch.ops.mkldnn, name) for name in private_ops)
