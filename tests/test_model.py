"""The Transformer: nodes of a graph that exchange messages, then think, each on its own.

The references here are loops over nodes and plain arithmetic, not another call of the same code.
"""

import ast
import dataclasses
import math
from itertools import islice

import pytest
import torch

from model import GPT, CausalSelfAttention, GPTConfig, KVCache, context_start, draw
from tests.conftest import ROOT, VOCABULARY


def logits_of(model, idx):
    return model(idx)[0]


# --- Communication ---


@torch.no_grad()
def message_loop(attention: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """Attention as a graph: every node asks, all nodes up to it answer, in plain loops.

    x is one graph, (T, C).
    """
    T, C = x.shape
    head_dim = C // attention.n_head
    heard = torch.zeros(T, C, dtype=x.dtype)
    qkv = x @ attention.c_attn.weight.T + attention.c_attn.bias  # (T, 3C)
    for head in range(attention.n_head):
        mine = slice(head * head_dim, (head + 1) * head_dim)
        query, key, value = (qkv[:, i * C : (i + 1) * C][:, mine] for i in range(3))
        for listener in range(T):
            speakers = range(listener + 1)  # an edge from each node before, and from itself
            interest = [float(query[listener] @ key[s]) / math.sqrt(head_dim) for s in speakers]
            total = sum(math.exp(i) for i in interest)
            for s in speakers:
                heard[listener, mine] += math.exp(interest[s]) / total * value[s]
    return heard @ attention.c_proj.weight.T + attention.c_proj.bias


def test_attention_equals_the_message_loop(model):
    attention, graph = model.transformer.h[0].attn, torch.randn(8, 16, dtype=torch.float64)
    torch.testing.assert_close(attention(graph[None])[0], message_loop(attention, graph))


def test_no_message_travels_back_in_time(model, tokens):
    rewritten = tokens.clone()
    rewritten[:, 5:] = (tokens[:, 5:] + 1) % VOCABULARY
    before, after = logits_of(model, tokens), logits_of(model, rewritten)
    torch.testing.assert_close(before[:, :5], after[:, :5])
    assert (before[:, 5:] - after[:, 5:]).abs().amax(dim=(0, 2)).min() > 1e-6


def test_every_node_hears_the_very_first(model, tokens):
    rewritten = tokens.clone()
    rewritten[:, 0] = (tokens[:, 0] + 1) % VOCABULARY
    change = (logits_of(model, tokens) - logits_of(model, rewritten)).abs().amax(dim=(0, 2))
    assert change.min() > 1e-6


def test_batch_rows_never_talk(model, tokens):
    alone = torch.cat([logits_of(model, row[None]) for row in tokens])
    torch.testing.assert_close(logits_of(model, tokens), alone)


def test_without_positions_attention_ignores_order(model, tokens):
    model.transformer.h = model.transformer.h[:1]  # in a second round, nodes know who came before
    shuffled = tokens.clone()
    shuffled[:, :7] = tokens[:, :7].flip(dims=[1])  # the last node hears the same, reordered
    last, last_of_shuffled = logits_of(model, tokens)[:, 7], logits_of(model, shuffled)[:, 7]
    assert not torch.allclose(last, last_of_shuffled)
    torch.nn.init.zeros_(model.transformer.wpe.weight)
    last, last_of_shuffled = logits_of(model, tokens)[:, 7], logits_of(model, shuffled)[:, 7]
    torch.testing.assert_close(last, last_of_shuffled)


# --- Other graphs: the encoder, and what lies between encoder and decoder ---


def attend(attention: CausalSelfAttention, listeners, speakers, edges) -> torch.Tensor:
    """Attention in a few lines of arithmetic, over any graph: (T, C), (S, C), (T, S) -> (T, C).

    edges[t, s] says whether node s of the speakers is heard by node t of the listeners.
    """
    C = listeners.size(-1)
    to_query, to_key, to_value = attention.c_attn.weight.split(C)
    query_bias, key_bias, value_bias = attention.c_attn.bias.split(C)
    heads = (-1, attention.n_head, C // attention.n_head)
    q = (listeners @ to_query.T + query_bias).view(heads).transpose(0, 1)  # (n_head, T, head_dim)
    k = (speakers @ to_key.T + key_bias).view(heads).transpose(0, 1)  # (n_head, S, head_dim)
    v = (speakers @ to_value.T + value_bias).view(heads).transpose(0, 1)
    affinity = q @ k.mT / math.sqrt(q.size(-1))  # (n_head, T, S): row listens to column
    weights = affinity.masked_fill(~edges, -math.inf).softmax(dim=-1)
    heard = (weights @ v).transpose(0, 1).reshape(-1, C)
    return heard @ attention.c_proj.weight.T + attention.c_proj.bias


def torchs_own(attention: CausalSelfAttention) -> torch.nn.MultiheadAttention:
    """torch's attention, of listeners to any speakers, with the weights of ours."""
    theirs = torch.nn.MultiheadAttention(16, attention.n_head, batch_first=True).double().eval()
    theirs.in_proj_weight, theirs.in_proj_bias = attention.c_attn.weight, attention.c_attn.bias
    theirs.out_proj.weight, theirs.out_proj.bias = attention.c_proj.weight, attention.c_proj.bias
    return theirs


@torch.no_grad()
def test_with_edges_from_the_past_alone_it_is_a_decoder(model):
    attention, x = model.transformer.h[0].attn, torch.randn(8, 16, dtype=torch.float64)
    past = torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(attend(attention, x, x, past), attention(x[None])[0])


@torch.no_grad()
def test_without_the_mask_it_is_an_encoder(model):
    """All nodes hear all others, as in BERT: good for understanding, useless for foretelling."""
    attention, x = model.transformer.h[0].attn, torch.randn(8, 16, dtype=torch.float64)
    everybody = torch.ones(8, 8, dtype=torch.bool)
    heard = attend(attention, x, x, everybody)
    torch.testing.assert_close(heard, torchs_own(attention)(x, x, x)[0])
    changed = x.clone()
    changed[7] += 1
    moved = (attend(attention, changed, changed, everybody) - heard).abs().amax(dim=1)
    assert moved.min() > 1e-6  # the last node reaches the first


@torch.no_grad()
def test_with_speakers_from_elsewhere_it_is_cross_attention(model):
    """A translation's nodes ask, the original's answer: so a decoder listens to an encoder."""
    attention = model.transformer.h[0].attn
    translation = torch.randn(5, 16, dtype=torch.float64)
    original = torch.randn(8, 16, dtype=torch.float64)
    heard = attend(attention, translation, original, torch.ones(5, 8, dtype=torch.bool))
    theirs = torchs_own(attention)(translation, original, original)[0]
    torch.testing.assert_close(heard, theirs)


# --- Computation ---


def test_the_mlp_thinks_about_each_node_alone(model):
    mlp, x = model.transformer.h[0].mlp, torch.randn(2, 8, 16, dtype=torch.float64)
    changed = x.clone()
    changed[:, 3] += 1
    difference = (mlp(x) - mlp(changed)).abs().amax(dim=(0, 2))
    assert difference[3] > 0
    assert difference[[0, 1, 2, 4, 5, 6, 7]].max() == 0


def test_gelu_is_the_published_tanh_form(model):
    mlp, x = model.transformer.h[0].mlp, torch.randn(5, 16, dtype=torch.float64)
    h = mlp.c_fc(x)
    h = h / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (h + 0.044715 * h**3)))
    torch.testing.assert_close(mlp(x), mlp.c_proj(h))


def test_both_phases_add_to_the_residual_stream(model):
    block, x = model.transformer.h[0], torch.randn(2, 8, 16, dtype=torch.float64)
    for projection in (block.attn.c_proj, block.mlp.c_proj):
        torch.nn.init.zeros_(projection.weight)
        torch.nn.init.zeros_(projection.bias)
    torch.testing.assert_close(block(x), x)


# --- The whole ---


def test_the_smallest_gpt2_has_124_million_parameters():
    with torch.device("meta"):
        model = GPT(GPTConfig())
    assert sum(parameter.numel() for parameter in model.parameters()) == 124_439_808
    assert "transformer.h.11.attn.c_attn.weight" in model.state_dict()


def test_the_start_is_that_of_the_gpt2_paper():
    model = GPT(GPTConfig(block_size=64, vocab_size=500, n_layer=8, n_head=2, n_embd=128))
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            assert (parameter == 0).all(), name
        elif ".ln_" in name:
            assert (parameter == 1).all(), name
        else:
            wanted = 0.02 / 4 if "c_proj" in name else 0.02  # sqrt(2 branches * 8 layers) = 4
            assert parameter.std().item() == pytest.approx(wanted, rel=0.05), name
            assert parameter.mean().item() == pytest.approx(0, abs=wanted / 20), name


def test_an_untrained_model_thinks_every_token_about_equally_likely():
    model = GPT(GPTConfig(block_size=16, vocab_size=1000, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(1000, (8, 17))
    _, loss = model(idx[:, :-1], idx[:, 1:])
    assert loss.item() == pytest.approx(math.log(1000), rel=0.01)


def test_the_loss_is_the_mean_surprise_at_the_targets(model, tokens):
    targets = tokens.roll(-1, dims=1)
    targets[0, 3] = -1  # not asked
    logits, loss = model(tokens, targets)
    surprise = [
        -math.log(torch.softmax(logits[b, t], dim=0)[targets[b, t]].item())
        for b in range(3)
        for t in range(8)
        if (b, t) != (0, 3)
    ]
    assert loss.item() == pytest.approx(sum(surprise) / 23, rel=1e-9)
    assert model(tokens)[1] is None


def test_the_head_is_the_embedding_read_backwards(model, tokens):
    nodes = model.nodes(tokens)
    torch.testing.assert_close(logits_of(model, tokens), nodes @ model.transformer.wte.weight.T)


def test_one_batch_can_be_memorised():
    model = GPT(GPTConfig(block_size=8, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=32))
    idx = torch.randint(VOCABULARY, (4, 9))
    idx[:, 0] = torch.arange(4)  # so that each row can be told from its first token on
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(150):
        _, loss = model(idx[:, :-1], idx[:, 1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.02


def test_dropout_is_for_training_only():
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8, dropout=0.5))
    idx = torch.randint(9, (2, 8))
    assert not torch.equal(logits_of(model, idx), logits_of(model, idx))
    model.eval()
    assert torch.equal(logits_of(model, idx), logits_of(model, idx))


def test_rows_that_pad_the_table_stay_silent(model, tokens):
    padded = GPT(dataclasses.replace(model.config, pad_vocab_to=8)).double().eval()
    assert padded.transformer.wte.weight.shape == (16, 16)
    loud = padded.transformer.wte.weight.data[VOCABULARY:]
    state = model.state_dict()
    state["transformer.wte.weight"] = torch.cat((state["transformer.wte.weight"], loud + 9))
    padded.load_state_dict(state)
    (logits, loss), (wanted_logits, wanted_loss) = padded(tokens, tokens), model(tokens, tokens)
    torch.testing.assert_close(logits, wanted_logits)
    torch.testing.assert_close(loss, wanted_loss)
    loss.backward()
    assert (padded.transformer.wte.weight.grad[VOCABULARY:] == 0).all()
    drawn = torch.stack(list(padded.generate(tokens, 50, temperature=9.0)))
    assert drawn.max() < VOCABULARY


def test_a_shape_that_cannot_be_shared_among_heads_is_refused():
    with pytest.raises(ValueError, match="n_embd=10"):
        GPTConfig(n_embd=10, n_head=4)


def test_more_tokens_than_positions_are_refused(model):
    with pytest.raises(ValueError, match="9 tokens"):
        model(torch.zeros(1, 9, dtype=torch.long))


# --- Writing ---


def written(model, idx, n, **how) -> torch.Tensor:
    how.setdefault("generator", torch.Generator().manual_seed(1))
    return torch.stack(list(model.generate(idx, n, **how)), dim=1)


@pytest.mark.parametrize("keep", [None, 0, 3, 7])
@pytest.mark.parametrize("prompt_length", [1, 8, 20])
def test_cached_and_plain_writing_agree_token_for_token(model, keep, prompt_length):
    prompt = torch.randint(VOCABULARY, (3, prompt_length))
    cached = written(model, prompt, 40, keep=keep)
    plain = written(model, prompt, 40, keep=keep, use_cache=False)
    assert cached.shape == (3, 40)  # far beyond the block size of 8
    assert torch.equal(cached, plain)
    assert len(set(cached.flatten().tolist())) > 5


def test_a_cached_node_is_what_it_would_be_without_a_cache(model, tokens):
    caches = [KVCache(3, 8) for _ in range(2)]
    first = model.nodes(tokens[:, :5], caches)
    rest = [model.nodes(tokens[:, i : i + 1], caches) for i in range(5, 8)]
    torch.testing.assert_close(torch.cat([first, *rest], dim=1), model.nodes(tokens))


def test_cropping_by_one_is_the_lectures_loop(model):
    idx = torch.randint(VOCABULARY, (2, 3))
    wanted = idx
    for _ in range(20):
        logits, _ = model(wanted[:, -8:])  # the last block_size tokens
        wanted = torch.cat((wanted, logits[:, -1:].argmax(dim=-1)), dim=1)
    assert torch.equal(written(model, idx, 20, temperature=0, keep=7), wanted[:, 3:])


@pytest.mark.parametrize("use_cache", [True, False])
def test_a_prompt_that_all_texts_share_is_read_once(model, monkeypatch, use_cache):
    prompt = torch.randint(VOCABULARY, (1, 5)).expand(3, -1)
    read, nodes = [], model.nodes
    monkeypatch.setattr(model, "nodes", lambda idx, *rest: read.append(idx) or nodes(idx, *rest))
    drawn = written(model, prompt, 30, use_cache=use_cache)
    assert [len(idx) for idx in read] == [1] + [3] * 29
    context, generator = prompt, torch.Generator().manual_seed(1)
    for i, ids in enumerate(drawn.T):
        context = context[:, context_start(context.size(1), 8, 4) :]
        assert torch.equal(draw(model(context)[0][:, -1], generator=generator), ids), i
        context = torch.cat((context, ids[:, None]), dim=1)
    assert len(set(map(tuple, drawn.tolist()))) == 3  # and each text went its own way


def test_a_context_that_outgrows_the_block_keeps_its_latest_tokens():
    assert context_start(8, block_size=8, keep=4) == 0
    assert context_start(9, block_size=8, keep=4) == 4  # tokens 4 to 8: four old ones, one new
    assert context_start(9, block_size=8, keep=7) == 1  # as long as can be
    assert context_start(9, block_size=8, keep=0) == 8  # the new one alone


def test_a_prompt_longer_than_the_block_is_cropped_to_its_end(model):
    prompt = torch.randint(VOCABULARY, (2, 30))
    assert torch.equal(written(model, prompt, 5), written(model, prompt[:, -8:], 5))


def test_a_text_begins_with_at_least_one_token(model):
    with pytest.raises(ValueError, match="no token to go on from"):
        next(model.generate(torch.zeros(2, 0, dtype=torch.long)))


def test_writing_can_go_on_forever(model):
    endless = model.generate(torch.zeros(1, 1, dtype=torch.long))
    assert len(list(islice(endless, 100))) == 100


def test_a_row_that_has_ended_waits_for_the_others(model):
    prompt = torch.arange(5)[:, None]
    free = written(model, prompt, 30)
    stop = int(free[0, 3])
    drawn = written(model, prompt, 30, stop_token=stop)
    for row, freely in zip(drawn.tolist(), free.tolist(), strict=True):
        assert stop in row
        end = row.index(stop)
        assert set(row[end:]) == {stop}
        assert row[: end + 1] == freely[: end + 1]
    assert (drawn[:, :-1] != stop).any(dim=0).all()  # it went on until the last row had ended


def test_greedy_writing_takes_the_likeliest(model, tokens):
    drawn = written(model, tokens, 1, temperature=0)
    assert torch.equal(drawn[:, 0], logits_of(model, tokens)[:, -1].argmax(dim=-1))


def test_draws_follow_the_softmax():
    logits = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
    drawn = draw(logits.expand(40000, 4), generator=torch.Generator().manual_seed(0))
    share = torch.bincount(drawn, minlength=4) / 40000
    torch.testing.assert_close(share, torch.softmax(logits[0], dim=0), atol=0.01, rtol=0)


def test_temperature_sharpens_and_flattens():
    logits = torch.tensor([[2.0, 1.0]]).expand(20000, 2)
    dice = torch.Generator().manual_seed(0)
    share = [draw(logits, t, generator=dice).float().mean().item() for t in (0.5, 1.0, 2.0)]
    wanted = [1 / (1 + math.exp(1 / t)) for t in (0.5, 1.0, 2.0)]  # of the second token
    assert share == pytest.approx(wanted, abs=0.01)
    assert all((draw(logits, t) == 0).all() for t in (1e-3, 1e-12, 1e-50))


def test_top_k_and_top_p_leave_out_the_unlikely():
    probabilities = torch.tensor([[0.1, 0.4, 0.2, 0.3]])
    logits = probabilities.log().expand(4000, 4)

    def candidates(**how):
        return set(draw(logits, generator=torch.Generator().manual_seed(0), **how).tolist())

    assert candidates() == candidates(top_k=4) == candidates(top_k=99) == {0, 1, 2, 3}
    assert candidates(top_k=2) == {1, 3}
    tied = torch.zeros(4000, 4)
    assert len(set(draw(tied, top_k=2).tolist())) == 2  # two, though all are as likely
    assert candidates(top_p=0.6) == {1, 3}  # 0.4 is short of 0.6, 0.4 + 0.3 is not
    assert candidates(top_p=0.8) == {1, 2, 3}
    assert candidates(top_p=0.0) == candidates(top_k=1) == {1}


def test_writing_disturbs_no_other_dice(model, tokens):
    before = torch.get_rng_state()
    written(model, tokens, 5)
    assert torch.equal(before, torch.get_rng_state())


def test_the_model_needs_torch_alone():
    source = ast.parse((ROOT / "model.py").read_text(encoding="utf-8"))
    names = {
        name.split(".")[0]
        for node in ast.walk(source)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in (
            [a.name for a in node.names] if isinstance(node, ast.Import) else [node.module]
        )
    }
    assert names == {"math", "collections", "dataclasses", "torch"}
