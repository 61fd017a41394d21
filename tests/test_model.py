"""The Transformer, compared with loops, arithmetic by hand, and torch's own attention.

The fixtures `model` and `tokens` come from conftest.py: a GPT of 2 blocks with context 8, and 3
sequences of 8 tokens. lessons/attention.py has attention as loops over nodes; tests/test_lessons.py
compares it with model.py.
"""

import ast
import dataclasses
import math

import pytest
import torch

from model import GPT, CausalSelfAttention, GPTConfig, attention_weights
from tests.conftest import ROOT, VOCAB_SIZE


def largest_change_per_position(before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """(B, T, V) twice -> (T,): the largest difference over batch and vocabulary."""
    return (before - after).abs().amax(dim=(0, 2))


# --- Attention ---


def test_attention_weights_are_those_of_the_formula():
    q = torch.tensor([[1.0, 0.0, 1.0, 0.0], [0.0, 2.0, 0.0, 0.0]]).view(1, 1, 2, 4)
    k = torch.tensor([[1.0, 1.0, 1.0, 0.0], [0.0, 1.0, 0.0, 0.0]]).view(1, 1, 2, 4)
    # q k^T = [[2, 0], [2, 2]]; divided by sqrt(4): [[1, 0], [1, 1]]
    e = math.e
    full = torch.tensor([[e / (e + 1), 1 / (e + 1)], [0.5, 0.5]])
    torch.testing.assert_close(attention_weights(q, k, causal=False)[0, 0], full)
    causal = torch.tensor([[1.0, 0.0], [0.5, 0.5]])  # position 0 attends to itself alone
    torch.testing.assert_close(attention_weights(q, k)[0, 0], causal)


def attention_from_weights(attention: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """CausalSelfAttention.forward with the table of attention weights: (B, T, C) -> (B, T, C)."""
    q, k, v = attention.qkv(x)
    y = attention_weights(q, k) @ v  # (B, n_head, T, head_dim)
    return attention.c_proj(y.transpose(1, 2).flatten(2))


def test_attention_equals_weights_times_values(model):
    attention = model.transformer.h[0].attn
    x = torch.randn(3, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(x), attention_from_weights(attention, x))


def torch_attention(attention: CausalSelfAttention) -> torch.nn.MultiheadAttention:
    """torch's own attention with the same weights."""
    other = torch.nn.MultiheadAttention(16, attention.n_head, batch_first=True).double().eval()
    other.in_proj_weight, other.in_proj_bias = attention.c_attn.weight, attention.c_attn.bias
    other.out_proj.weight, other.out_proj.bias = attention.c_proj.weight, attention.c_proj.bias
    return other


@torch.no_grad()
def test_attention_equals_that_of_torch(model):
    attention = model.transformer.h[0].attn
    x = torch.randn(3, 8, 16, dtype=torch.float64)
    future = torch.ones(8, 8, dtype=torch.bool).triu(1)
    expected, weights = torch_attention(attention)(
        x, x, x, attn_mask=future, average_attn_weights=False
    )
    torch.testing.assert_close(attention(x), expected)
    q, k, _ = attention.qkv(x)
    torch.testing.assert_close(attention_weights(q, k), weights)


@torch.no_grad()
def test_without_the_mask_attention_is_that_of_an_encoder(model):
    """As in BERT, every position attends to every other: the last one changes the first."""
    attention = model.transformer.h[0].attn
    x = torch.randn(3, 8, 16, dtype=torch.float64)
    _, expected = torch_attention(attention)(x, x, x, average_attn_weights=False)
    q, k, _ = attention.qkv(x)
    weights = attention_weights(q, k, causal=False)
    torch.testing.assert_close(weights, expected)
    assert (weights > 0).all()


@torch.no_grad()
def test_queries_and_keys_of_different_sequences_give_cross_attention(model):
    """The queries of a decoder's 5 tokens and the keys of an encoder's 8: a table of 5 x 8."""
    attention = model.transformer.h[0].attn
    decoder = torch.randn(1, 5, 16, dtype=torch.float64)
    encoder = torch.randn(1, 8, 16, dtype=torch.float64)
    _, expected = torch_attention(attention)(decoder, encoder, encoder, average_attn_weights=False)
    (q, _, _), (_, k, _) = attention.qkv(decoder), attention.qkv(encoder)
    weights = attention_weights(q, k, causal=False)
    assert weights.shape == (1, 2, 5, 8)
    torch.testing.assert_close(weights, expected)


def test_attention_in_float32_is_not_rounded_by_autocast(model):
    config = dataclasses.replace(model.config, float32_attention=True)
    attention = CausalSelfAttention(config)
    seen = []
    attention.c_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    x = torch.randn(1, 8, 16)
    with torch.autocast("cpu", torch.bfloat16):
        q, k, v = (part.double() for part in attention.qkv(x))  # these are rounded
        attention(x)
    expected = (attention_weights(q, k) @ v).transpose(1, 2).flatten(2)
    torch.testing.assert_close(seen[0], expected.float(), rtol=1e-6, atol=1e-6)


# --- What the whole model can see ---


def test_attention_is_causal(model, tokens):
    changed = tokens.clone()
    changed[:, 5:] = (tokens[:, 5:] + 1) % VOCAB_SIZE
    before, after = model(tokens), model(changed)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert largest_change_per_position(before, after)[5:].min() > 1e-6  # at every position from 5


def test_every_position_sees_the_first(model, tokens):
    changed = tokens.clone()
    changed[:, 0] = (tokens[:, 0] + 1) % VOCAB_SIZE
    assert largest_change_per_position(model(tokens), model(changed)).min() > 1e-6


def test_sequences_of_a_batch_are_independent(model, tokens):
    one_by_one = torch.cat([model(sequence[None]) for sequence in tokens])
    torch.testing.assert_close(model(tokens), one_by_one)


def test_without_position_embeddings_one_block_ignores_order(model, tokens):
    """One block only: after it, each token has seen a different number of tokens (the mask).

    A second block can tell the order from that, even without position embeddings.
    """
    model.transformer.h = model.transformer.h[:1]
    reordered = tokens.clone()
    reordered[:, :7] = tokens[:, :7].flip(dims=[1])  # the last position sees the same set
    assert not torch.allclose(model(tokens)[:, 7], model(reordered)[:, 7])
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    torch.testing.assert_close(model(tokens)[:, 7], model(reordered)[:, 7])


# --- MLP and block ---


def test_the_mlp_processes_each_token_alone(model):
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 8, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] += 1
    difference = largest_change_per_position(mlp(x), mlp(changed))
    assert difference[3] > 0
    assert difference[[0, 1, 2, 4, 5, 6, 7]].max() == 0


def test_gelu_is_the_tanh_form_of_gpt2(model):
    mlp, x = model.transformer.h[0].mlp, torch.randn(5, 16, dtype=torch.float64)
    h = mlp.c_fc(x)
    h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.c_proj(h))


def test_layer_norm_gives_mean_0_and_variance_1():
    block = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=64)).transformer.h
    y = block[0].ln_1(3 + 5 * torch.randn(2, 8, 64))
    torch.testing.assert_close(y.mean(-1), torch.zeros(2, 8), rtol=0, atol=1e-5)
    torch.testing.assert_close(y.var(-1, correction=0), torch.ones(2, 8), rtol=0, atol=1e-3)


def test_attention_and_mlp_add_to_the_residual_stream(model):
    block, x = model.transformer.h[0], torch.randn(2, 8, 16, dtype=torch.float64)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    torch.testing.assert_close(block(x), x)


# --- The whole model ---


def test_gpt2_small_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert "transformer.h.11.attn.c_attn.weight" in model.state_dict()


def test_weights_are_initialized_as_in_the_gpt2_paper():
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=2, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            expected = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(expected, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=expected / 20), name


def test_other_parameters_and_buffers_keep_the_values_of_their_own():
    """Of a changed model: a gate that begins at 0, nanoGPT's mask with the name "bias"."""

    class ChangedGPT(GPT):
        def init_weights(self):
            for block in self.transformer.h:
                block.gate = torch.nn.Parameter(torch.full((1,), 0.5))
                block.table = torch.nn.Parameter(torch.full((2, 3, 4), 0.5))
                block.attn.register_buffer("bias", torch.full((4, 4), 0.5))
            super().init_weights()

    model = ChangedGPT(GPTConfig(block_size=4, vocab_size=5, n_layer=1, n_head=1, n_embd=8))
    block = model.transformer.h[0]
    assert all((tensor == 0.5).all() for tensor in (block.gate, block.table, block.attn.bias))


def test_an_untrained_model_gives_every_token_about_the_same_probability():
    model = GPT(GPTConfig(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(1000, (8, 17))
    assert model(idx[:, :-1], idx[:, 1:]).item() == pytest.approx(math.log(1000), rel=0.01)


def test_the_loss_is_the_mean_cross_entropy_of_the_targets(model, tokens):
    targets = tokens.roll(-1, dims=1)
    targets[0, 3] = -1  # does not count
    logits, loss = model(tokens), model(tokens, targets)
    losses = [
        -math.log(torch.softmax(logits[b, t], dim=0)[targets[b, t]].item())
        for b in range(3)
        for t in range(8)
        if (b, t) != (0, 3)
    ]
    assert loss.item() == pytest.approx(sum(losses) / 23, rel=1e-9)
    assert logits.shape == (3, 8, VOCAB_SIZE) and loss.shape == ()


def test_lm_head_is_tied_to_the_embedding(model, tokens):
    hidden_states = model.hidden_states(tokens)
    torch.testing.assert_close(model(tokens), hidden_states @ model.transformer.wte.weight.T)


def test_one_batch_can_be_memorized():
    model = GPT(GPTConfig(block_size=8, vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(VOCAB_SIZE, (4, 9))
    idx[:, 0] = torch.arange(4)  # the first token tells which sequence follows
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_dropout_acts_at_gpt2s_four_places():
    """On the embeddings, the attention weights, and what attention and MLP add to the stream."""
    config = GPTConfig(block_size=64, vocab_size=9, n_layer=1, n_head=2, n_embd=64, dropout=0.25)
    model, zeros = GPT(config), {}
    block = model.transformer.h[0]

    def count_zeros(name):
        return lambda module, *tensors: zeros.update(
            {name: (tensors[-1] == 0).float().mean().item()}
        )

    block.register_forward_pre_hook(lambda module, x: count_zeros("embeddings")(module, *x))
    block.attn.register_forward_hook(count_zeros("attention"))
    block.mlp.register_forward_hook(count_zeros("mlp"))
    messages = []
    block.attn.c_proj.register_forward_pre_hook(lambda module, x: messages.extend(x))
    with torch.no_grad():  # equal scores, and all values 1: each message is the sum of the weights
        block.attn.c_attn.weight.zero_()
        block.attn.c_attn.bias.fill_(1)
    idx = torch.randint(9, (8, 64))
    model.train()(idx)
    assert zeros == pytest.approx(dict.fromkeys(("embeddings", "attention", "mlp"), 0.25), abs=0.02)
    sums = messages[0][:, -1].flatten()  # of 64 weights of 1/64, each kept with probability 0.75
    assert sums.mean().item() == pytest.approx(1, abs=0.1) and sums.std() > 0.02
    model.eval()(idx)
    assert set(zeros.values()) == {0.0} and (messages[1] - 1).abs().max() < 1e-6


def test_dropout_is_active_in_training_only():
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8, dropout=0.5))
    idx = torch.randint(9, (2, 8))
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_padded_rows_of_the_vocabulary_take_no_part(model, tokens):
    padded = GPT(dataclasses.replace(model.config, pad_vocab_to=8)).double().eval()
    assert padded.transformer.wte.weight.shape == (16, 16)
    padding = padded.transformer.wte.weight.data[VOCAB_SIZE:]
    weights = model.state_dict()
    weights["transformer.wte.weight"] = torch.cat((weights["transformer.wte.weight"], padding + 9))
    padded.load_state_dict(weights)
    torch.testing.assert_close(padded(tokens), model(tokens))
    loss = padded(tokens, tokens)
    torch.testing.assert_close(loss, model(tokens, tokens))
    loss.backward()
    assert (padded.transformer.wte.weight.grad[VOCAB_SIZE:] == 0).all()
    assert padded.generate(tokens, 50, temperature=9.0).max() < VOCAB_SIZE


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"n_embd": 10, "n_head": 4}, "n_embd=10 must be divisible by n_head=4"),
        ({"n_layer": 0}, "n_layer=0 must be at least 1"),
        ({"n_head": 0}, "n_head=0 must be at least 1"),
        ({"vocab_size": -1}, "vocab_size=-1 must be at least 1"),
        ({"dropout": 2.0}, "dropout=2.0 must be from 0 to 1"),
    ],
)
def test_impossible_sizes_are_refused(wrong, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**wrong)


def test_more_tokens_than_block_size_are_refused(model):
    with pytest.raises(ValueError, match="sequence length 9 exceeds block_size 8"):
        model(torch.zeros(1, 9, dtype=torch.long))


def test_targets_of_another_shape_are_refused(model):
    idx = torch.zeros(2, 3, dtype=torch.long)
    with pytest.raises(ValueError, match=r"targets \[3, 2\] for idx \[2, 3\]"):
        model(idx, idx.T)


def test_the_model_exports_with_a_dynamic_sequence_length(tokens):
    model = GPT(GPTConfig(block_size=8, vocab_size=VOCAB_SIZE, n_layer=1, n_head=2, n_embd=20))
    length = torch.export.Dim("T", min=2, max=8)
    exported = torch.export.export(model, (tokens[:1, :5],), dynamic_shapes=({1: length},))
    for T in (2, 5, 8):
        torch.testing.assert_close(exported.module()(tokens[:1, :T]), model(tokens[:1, :T]))


# --- Generation ---


def test_generate_appends_the_likeliest_token_of_the_cropped_context(model):
    idx = torch.randint(VOCAB_SIZE, (2, 3))
    expected = idx
    for _ in range(20):  # past block_size = 8
        logits = model(expected[:, -8:])
        expected = torch.cat((expected, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(model.generate(idx, 20, top_k=1), expected)


def test_generated_tokens_follow_the_probabilities_of_the_model(model, tokens):
    probs = model(tokens[:1])[0, -1].softmax(-1)
    idx = model.generate(tokens[:1].expand(20_000, -1), 1)
    frequencies = torch.bincount(idx[:, -1], minlength=VOCAB_SIZE) / 20_000
    torch.testing.assert_close(frequencies.double(), probs, atol=0.02, rtol=0)


def test_temperature_divides_the_logits(model, tokens):
    """A temperature of 0.5 squares the probabilities (and scales their sum to 1)."""
    probs = model(tokens[:1])[0, -1].softmax(-1) ** 2
    idx = model.generate(tokens[:1].expand(20_000, -1), 1, temperature=0.5)
    frequencies = torch.bincount(idx[:, -1], minlength=VOCAB_SIZE) / 20_000
    torch.testing.assert_close(frequencies.double(), probs / probs.sum(), atol=0.02, rtol=0)


def test_top_k_samples_among_the_k_likeliest(model, tokens):
    likeliest = model(tokens[:1])[0, -1].topk(3).indices
    idx = model.generate(tokens[:1].expand(2_000, -1), 1, top_k=3)
    assert set(idx[:, -1].tolist()) == set(likeliest.tolist())
    assert model.generate(tokens, 2, top_k=99).shape == (3, 10)  # more than there are tokens: all


@pytest.mark.parametrize("temperature", [0, -1, math.nan])
def test_a_temperature_must_be_above_0(model, tokens, temperature):
    with pytest.raises(ValueError, match="temperature"):
        model.generate(tokens, 1, temperature=temperature)


def test_a_generator_makes_generation_repeatable(model, tokens):
    before = torch.get_rng_state()
    first, second = (
        model.generate(tokens, 9, generator=torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first, second)
    assert torch.equal(torch.get_rng_state(), before)  # the global generator is not used
    assert not torch.equal(model.generate(tokens, 9), model.generate(tokens, 9))


def test_the_model_imports_only_torch():
    source = ast.parse((ROOT / "model.py").read_text(encoding="utf-8"))
    names = set()
    for node in ast.walk(source):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names == {"math", "dataclasses", "torch"}
