"""lessons/: each program runs, and what it claims is true of the other modules."""

import json
import math
import re
import runpy
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import tiktoken
import torch
import transformers

import data.bpe
import engine.checkpoint
import engine.run_folder
import train
from configurator import FolioError
from data.dataset import training_batch
from data.files import shown_path
from data.prepare import write_dataset
from data.tokenizer import GPT2_SPLIT_PATTERN, CharTokenizer, save_tokenizer
from engine.checkpoint import load_checkpoint, save_model
from engine.inference import sampling_probs
from engine.optimizer import Muon, orthogonalize
from lessons import (
    ablations,
    attention,
    bpe,
    gpt_in_one_page,
    in_context,
    optimizers,
    sampling,
    shapes,
    stream,
)
from model import GPT, CausalSelfAttention, GPTConfig
from tests.conftest import ROOT, SHAKESPEARE, run_script
from tests.test_train import start_training

PLAY = (ROOT / "data" / "replacement.txt").read_text(encoding="utf-8")[:50_000]
SYLLABUS = (ROOT / "lessons" / "README.md").read_text(encoding="utf-8")
LESSONS = sorted(path for path in (ROOT / "lessons").glob("*.py") if path.stem != "__init__")


@pytest.fixture(autouse=True)
def replacement_text(monkeypatch):
    """All machines run the lessons on one text."""
    for lesson in (ablations, bpe, gpt_in_one_page):
        monkeypatch.setattr(lesson, "read_text", lambda: PLAY)


@pytest.fixture
def printed(capsys):
    """What a lesson printed; no line may be wider than a terminal of 80 columns."""

    def read() -> str:
        output = capsys.readouterr().out
        assert max(map(len, output.splitlines())) <= 80
        assert output.isascii()  # a terminal of Windows may not print anything else
        return output

    return read


@pytest.mark.parametrize("path", LESSONS, ids=lambda path: path.stem)
def test_each_lesson_finds_the_repository_when_started_as_a_file(path):
    """python lessons/x.py puts lessons/ into sys.path, not the repository."""
    source = path.read_text(encoding="utf-8")
    imports_folio = any(f"from {name}" in source for name in ("model", "engine", "data", "lessons"))
    start = source[source.index('if __name__ == "__main__":') :]
    assert imports_folio == ("sys.path.insert(0, " in start)
    assert f"python lessons/{path.name}" in source


def test_a_lesson_runs_as_a_file_from_any_folder_and_as_a_module(tmp_path, capsys):
    as_file = run_script(ROOT / "lessons" / "attention.py", cwd=tmp_path)
    assert as_file.returncode == 0, as_file.stderr
    assert as_file.stderr == ""
    with pytest.warns(RuntimeWarning, match=r"lessons\.attention"):  # it is imported above, too
        runpy.run_module("lessons.attention", run_name="__main__")
    assert as_file.stdout == capsys.readouterr().out


def test_each_lesson_is_in_the_syllabus():
    for path in LESSONS:
        assert f"[{path.name}]({path.name})" in SYLLABUS


def test_no_word_is_twice_in_the_glossary():
    rows = SYLLABUS.split("## Glossary")[1].split("|---|---|\n")[1].splitlines()
    words = Counter(word.strip() for row in rows for word in re.split("[,()]", row.split("|")[1]))
    words.pop("", None)
    assert len(words) > 80
    assert words.most_common(1)[0][1] == 1


def test_each_exercise_changes_code_that_occurs_once_in_the_one_page():
    source = Path(gpt_in_one_page.__file__).read_text(encoding="utf-8")
    rows = re.findall(r"^\| \d+ \| `(.+?)` \| `.+?` \|", SYLLABUS, flags=re.MULTILINE)
    assert len(rows) == 10
    for code in rows:
        assert source.count(code) == 1, code


# --- attention.py ---


@torch.no_grad()
def test_attention_prints_what_it_claims(printed):
    attention.main()
    output = printed()
    assert "Equal to the loops: True" in output
    assert "Equal to a loop over nodes: True" in output
    assert "sat     0.05    0.89    0.05       ." in output


def test_messages_equal_arithmetic_by_hand():
    messages = attention.nodes_and_messages()
    e = math.exp(4 / math.sqrt(2))
    by_hand = [[0, 0], [1 / 2, 0], [e / (e + 2), 1 / (e + 2)], [1 / (e + 3), e / (e + 3)]]
    torch.testing.assert_close(messages, torch.tensor(by_hand))  # (animal, verb)


def test_the_order_of_the_words_does_not_change_a_message(monkeypatch):
    message = attention.nodes_and_messages()[3]
    monkeypatch.setattr(attention, "X", attention.X[[1, 0, 2, 3]])  # "the" and "cat" exchanged
    torch.testing.assert_close(attention.nodes_and_messages()[3], message)


@torch.no_grad()
def test_message_loop_equals_attention_of_the_model(model):
    layer, x = model.transformer.h[0].attn, torch.randn(8, 16, dtype=torch.float64)
    torch.testing.assert_close(layer(x[None])[0], attention.message_loop(layer, x))


def attend_with(layer: CausalSelfAttention, receivers, senders, mask=None) -> torch.Tensor:
    """attention.attend() with the weights of a layer of model.py: (T, C), (S, C) -> (T, C)."""
    C = receivers.size(1)
    weights, biases = layer.c_attn.weight.split(C), layer.c_attn.bias.split(C)
    q, k, v = (
        (x @ weight.T + bias).view(-1, layer.n_head, C // layer.n_head).transpose(0, 1)
        for x, weight, bias in zip((receivers, senders, senders), weights, biases, strict=True)
    )
    y, _ = attention.attend(q, k, v, mask)
    return layer.c_proj(y.transpose(0, 1).flatten(1))


def torch_attention(layer: CausalSelfAttention, receivers, senders) -> torch.Tensor:
    """torch's own attention without a mask, with the weights of a layer of model.py."""
    other = torch.nn.MultiheadAttention(16, layer.n_head, batch_first=True).double()
    other.in_proj_weight, other.in_proj_bias = layer.c_attn.weight, layer.c_attn.bias
    other.out_proj.weight, other.out_proj.bias = layer.c_proj.weight, layer.c_proj.bias
    return other(receivers, senders, senders)[0]


def test_attend_with_the_mask_is_a_decoder(model):
    layer, x = model.transformer.h[0].attn, torch.randn(8, 16, dtype=torch.float64)
    past = torch.ones(8, 8, dtype=torch.bool).tril()
    torch.testing.assert_close(attend_with(layer, x, x, past), layer(x[None])[0])


def test_attend_without_the_mask_is_an_encoder(model):
    layer, x = model.transformer.h[0].attn, torch.randn(8, 16, dtype=torch.float64)
    y = attend_with(layer, x, x)
    torch.testing.assert_close(y, torch_attention(layer, x, x))
    changed = x.clone()
    changed[7] += 1
    change = (attend_with(layer, changed, changed) - y).abs().amax(dim=1)
    assert change.min() > 1e-6  # the last token has an effect on all tokens, also the first


def test_attend_with_other_senders_is_cross_attention(model):
    layer = model.transformer.h[0].attn
    receivers = torch.randn(5, 16, dtype=torch.float64)
    senders = torch.randn(8, 16, dtype=torch.float64)
    expected = torch_attention(layer, receivers, senders)
    torch.testing.assert_close(attend_with(layer, receivers, senders), expected)


def test_cross_attention_finds_the_words_of_the_same_kind(printed):
    weights = attention.cross_attention()
    assert weights.shape == (4, 6)
    assert weights[:2].argmax(dim=1).tolist() == [0, 1]  # the: die; cat: Katze
    assert sorted(weights[2].topk(2).indices.tolist()) == [2, 5]  # sat: hat, gesetzt
    assert weights[3].argmax() == 4  # down: hin


def test_bert_normalizes_after_the_sum_as_the_picture_says():
    config = transformers.BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2)
    layer = transformers.BertModel(config).eval().encoder.layer[0].attention.output
    x, attended = torch.randn(5, 16), torch.randn(5, 16)
    expected = torch.nn.functional.layer_norm(x + layer.dense(attended), (16,), eps=1e-12)
    torch.testing.assert_close(layer(attended, x), expected)
    assert "BERT normalizes after the sum: x = layer_norm(x + attention(x))" in attention.PICTURE


# --- gpt_in_one_page.py ---


def page_and_model() -> tuple[gpt_in_one_page.GPT, GPT]:
    """The GPT of the lesson and that of model.py with the same weights."""
    page, one = gpt_in_one_page.GPT(vocab_size=65), gpt_in_one_page
    model = GPT(GPTConfig(one.T, 65, one.N_LAYER, one.N_HEAD, one.C, bias=False))
    with torch.no_grad():
        for ours, theirs in zip(model.parameters(), page.parameters(), strict=True):
            theirs.add_(0.1 * torch.randn_like(theirs))
            ours.copy_(theirs)  # both have the same order
    return page, model


@torch.no_grad()
def test_one_page_has_the_logits_and_the_loss_of_the_model():
    page, model = page_and_model()
    idx = torch.randint(65, (3, 33))
    inputs, targets = idx[:, :-1], idx[:, 1:]
    torch.testing.assert_close(page(inputs), model(inputs), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(page(inputs[:, :5]), model(inputs[:, :5]), rtol=1e-4, atol=1e-4)
    loss = gpt_in_one_page.mean_loss(page(inputs), targets)
    torch.testing.assert_close(loss, model(inputs, targets))


def test_one_page_generates_the_tokens_of_the_model():
    page, model = page_and_model()
    idx = torch.randint(65, (1, 3))
    torch.manual_seed(1)
    ours = gpt_in_one_page.generate(page, idx, 50)  # beyond the context of 32
    torch.manual_seed(1)
    assert torch.equal(ours, model.generate(idx, 50))


def test_one_page_trains_as_train_py_does(tiny_flags, tmp_path, call, monkeypatch):
    """With AdamW in float64 and the same batches: the same weights after 20 steps."""
    flags = (*tiny_flags, "--optimizer=adamw", "--dtype=float64", "--weight_decay=0")
    flags = (*flags, "--max_iters=20", "--warmup_iters=1", "--eval_interval=20")
    assert call(train, *flags).returncode == 0
    run = start_training(*flags)
    batches = iter([training_batch(run.dataset.train, 4, 8, 1337, step, 0) for step in range(20)])
    monkeypatch.setattr(gpt_in_one_page, "random_batch", lambda ids: next(batches))
    peak, betas = run.config.learning_rate, (run.config.beta1, run.config.beta2)
    optimizer = torch.optim.AdamW(run.model.parameters(), peak, betas, weight_decay=0)
    gpt_in_one_page.train(run.model, optimizer, torch.empty(0), steps=20)
    trained = load_checkpoint(tmp_path / "run")["model"]
    for name, parameter in run.model.state_dict().items():
        torch.testing.assert_close(parameter, trained[name], rtol=1e-9, atol=1e-12)


def test_one_page_trains_and_generates(capsys):
    val_loss = gpt_in_one_page.main(steps=40)
    assert val_loss < 3.0  # a guess: ln 60 = 4.1
    output = capsys.readouterr().out
    assert f"validation loss {val_loss:.3f}" in output
    sentence = "Everything else in this repository is speed, safety and scale.\n"
    assert output.endswith(sentence)


# --- shapes.py ---


def test_shapes_walks_through_the_model(printed):
    shapes.main()
    output = printed()
    assert "Equal to model(inputs, targets) in model.py: True" in output
    assert "812,288    124,439,808" in output


def test_counted_parameters_are_those_of_the_model():
    small = GPTConfig(block_size=128, vocab_size=65, n_layer=4, n_head=4, n_embd=128, bias=False)
    for counts, config in zip(shapes.show_parameters(), (small, GPTConfig()), strict=True):
        with torch.device("meta"):
            model = GPT(config)
        assert counts["total"] == sum(parameter.numel() for parameter in model.parameters())
        block = sum(parameter.numel() for parameter in model.transformer.h[0].parameters())
        assert counts["one block (the sum)"] == block


# --- sampling.py ---


def test_probabilities_equal_arithmetic_by_hand():
    def by_hand(*logits: float) -> torch.Tensor:
        exponentials = [math.exp(logit) for logit in logits] + [0.0] * (4 - len(logits))
        return torch.tensor([e / sum(exponentials) for e in exponentials])

    logits, probabilities = sampling.LOGITS, sampling.probabilities
    torch.testing.assert_close(probabilities(logits), by_hand(2, 1, 0, -1))
    torch.testing.assert_close(probabilities(logits, temperature=0.5), by_hand(4, 2, 0, -2))
    torch.testing.assert_close(probabilities(logits, temperature=2), by_hand(1, 0.5, 0, -0.5))
    torch.testing.assert_close(probabilities(logits, top_k=2), by_hand(2, 1))
    torch.testing.assert_close(probabilities(logits, top_p=0.8), by_hand(2, 1))
    torch.testing.assert_close(probabilities(logits, 2, top_p=0.8), by_hand(1, 0.5, 0))
    torch.testing.assert_close(probabilities(logits + 100), by_hand(2, 1, 0, -1))
    assert probabilities(logits, temperature=0.001).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize("top_p", [1.0, 0.9, 0.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 99])
def test_probabilities_equal_those_of_the_strong_form(top_k, top_p):
    for logits in torch.randn(20, 30):
        ours = sampling.probabilities(logits, 0.7, top_k, top_p)
        torch.testing.assert_close(ours, sampling_probs(logits[None], 0.7, top_k, top_p)[0])


def test_sample_finds_the_part_of_the_line():
    probs = torch.tensor([0.5, 0.25, 0.25])
    numbers = (0.0, 0.49, 0.51, 0.74, 0.76, 0.999999)
    assert [sampling.sample(probs, u) for u in numbers] == [0, 0, 1, 1, 2, 2]


def test_sampled_frequencies_are_the_probabilities(printed):
    counts = torch.tensor(sampling.show_samples(10_000))
    probs = sampling.probabilities(sampling.LOGITS)
    deviation = (10_000 * probs * (1 - probs)).sqrt()
    assert ((counts - 10_000 * probs).abs() < 4 * deviation).all()


# --- stream.py ---


def test_stream_prints_what_it_claims(printed):
    stream.main()
    text = printed()
    assert "inputs  (2, 4): " in text
    assert "Equal files and batches: True" in text


def test_the_ids_of_the_stream_equal_counting_by_hand(tmp_path):
    vocabulary = stream.make_vocabulary(["ab", "c"])  # a 0, b 1, c 2, end-of-text 3
    ids = stream.make_stream(["ab", "c"], vocabulary)
    assert ids.tolist() == [0, 1, 3, 2, 3]
    assert stream.decode(ids.tolist(), vocabulary) == "ab<|endoftext|>c<|endoftext|>"
    stream.write_file(tmp_path / "ids.bin", np.array([258, 5]))
    assert (tmp_path / "ids.bin").read_bytes() == bytes([2, 1, 5, 0])  # 258 = 2 + 1 x 256


def test_all_windows_of_the_stream_can_be_in_a_batch(tmp_path):
    stream.write_file(tmp_path / "ids.bin", np.arange(7))  # 0 ... 6: T + 1 = 5 fit 3 times
    rng, seen = np.random.default_rng(1), set()
    for _ in range(50):
        inputs, targets = stream.random_batch(tmp_path / "ids.bin", rng)
        assert np.array_equal(targets, inputs + 1)  # the token after each token
        seen |= set(inputs[:, 0].tolist())
    assert seen == {0, 1, 2}


# --- bpe.py ---


def test_bpe_prints_what_it_claims(printed):
    bpe.main(num_merges=40)
    output = printed()
    assert """ -> "We", "'ll", " go", ",", " 2", " of", " us\"""" in output
    assert "Equal merges and ids: True" in output
    assert "e                 b'e'             [68]" in output  # from "!", byte 33, on: 101 - 33
    assert "Decoded: What light through yonder window?" in output


def test_merges_of_the_paper():
    """Sennrich et al. 2016: low 5 times, lower 2, newest 6, widest 3 give es, est, lo, low."""
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    merges = bpe.learn_merges({bpe.bytes_to_ids(word): n for word, n in words.items()}, 4)
    assert bpe.token_bytes(merges)[256:] == [b"es", b"est", b"lo", b"low"]


def test_bpe_learns_the_merges_of_the_strong_form_and_encodes_as_tiktoken():
    merges = bpe.learn_merges(bpe.count_words(PLAY), 200)
    tokens = bpe.token_bytes(merges)
    pairs = [(tokens[left], tokens[right]) for left, right in merges]
    assert pairs == data.bpe.learn_merges(data.bpe.count_words([PLAY]), 200)
    ranks = {token: i for i, token in enumerate(tokens)}
    encoding = tiktoken.Encoding(
        "test", pat_str=GPT2_SPLIT_PATTERN, mergeable_ranks=ranks, special_tokens={}
    )
    for text in (PLAY[:20_000], "It's 42 o'clock;\r\n\n  we'll see\t... \u732b "):
        ids = bpe.encode(text, merges)
        assert ids == encoding.encode_ordinary(text)
        assert bpe.decode(ids, merges) == text


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Shakespeare is not on this machine")
def test_words_of_shakespeare_are_those_of_gpt2():
    text = SHAKESPEARE.read_text(encoding="utf-8")
    words = Counter(word.encode() for word in bpe.WORD.findall(text))
    assert words == data.bpe.count_words([text])


# --- optimizers.py ---


def test_optimizers_prints_what_it_claims(printed, monkeypatch):
    monkeypatch.setattr(optimizers, "compare", lambda: None)  # its test is below
    optimizers.main()
    output = printed()
    assert "AdamW is equal to torch's: True" in output
    assert "singular values 3.86, 0.26" in output
    assert "gradients     1000   and  -0.001\n" in output
    assert "steps         -0.1   and   0.1\n" in output  # against the gradients


def test_orthogonalize_equals_arithmetic_by_hand():
    result = optimizers.orthogonalize(torch.tensor([[3.0, 1.0], [2.0, 1.0]]))
    torch.testing.assert_close(result, torch.tensor([[4.0, -1.0], [1.0, 4.0]]) / math.sqrt(17))


def test_an_orthogonalized_tall_matrix_has_smaller_numbers():
    """The example of muon(): 0.5 in a 4 x 4 matrix, 0.25 in 16 x 4."""
    for rows, size in ((4, 0.5), (16, 0.25)):
        numbers = optimizers.orthogonalize(torch.randn(rows, 4))
        torch.testing.assert_close(numbers.square().mean().sqrt(), torch.tensor(size))


@pytest.mark.parametrize("shape", [(7, 4), (4, 7), (6, 6)])
def test_orthogonalize_with_svd_is_close_to_that_of_the_strong_form(shape):
    matrix = torch.randn(shape, dtype=torch.float64)
    difference = optimizers.orthogonalize(matrix) - orthogonalize(matrix[None])[0]
    assert torch.linalg.svdvals(difference).max() < 0.2  # all singular values are in 0.8 ... 1.2


@pytest.mark.parametrize("shape", [(28, 7), (4, 7)])  # 28 x 7: twice as large steps
def test_muon_is_close_to_the_strong_form_for_several_steps(shape):
    ours, state = torch.randn(shape), {}
    theirs = ours.clone().requires_grad_()
    optimizer = Muon([theirs], lr=0.1, weight_decay=0.2)
    for _ in range(5):
        theirs.grad = torch.randn(shape)
        before, ours = ours, optimizers.muon(ours, theirs.grad, state, 0.1, weight_decay=0.2)
        optimizer.step()
        step = torch.linalg.svdvals(ours - before).max()
        assert torch.linalg.svdvals(ours - theirs.detach()).max() < 0.3 * step
        ours = theirs.detach().clone()


def test_adamw_equals_torch():
    assert optimizers.equal_to_torch(steps=50)


def test_muon_learns_the_short_directions(printed):
    results = optimizers.compare()
    assert "SGD: the gradient of a short direction is tiny" in printed()
    left = {name: result[3] for name, result in results.items()}  # in the shortest direction
    assert min(left["sgd"], left["normalized"]) > 0.8 > left["adamw"] > 0.5 > 0.3 > left["muon"]
    assert all(result[0] < 0.05 for result in results.values())
    loss = {name: float(result[-1]) for name, result in results.items()}
    assert loss["normalized"] > loss["sgd"] > 3 * loss["muon"]


def test_muon_is_not_better_than_normalized_if_each_step_sees_all_examples():
    solution, inputs, _ = optimizers.problem()

    def loss(optimizer, lr: float) -> float:
        w, state = torch.zeros(7, 4), {}
        for step in range(300):
            gradient = (w - solution) @ inputs @ inputs.T
            w = optimizer(w, gradient, state, lr * (1 - step / 300))
        return float(((w - solution) @ inputs).square().sum() / 2)

    normalized, muon = (
        min(loss(optimizer, lr) for lr in (0.03, 0.1, 0.3))
        for optimizer in (optimizers.normalized, optimizers.muon)
    )
    assert normalized < 2 * muon < 1e-6


# --- ablations.py ---


def test_ablations_runs(printed):
    losses = ablations.main(steps=4)
    assert list(losses) == list(ablations.MODELS)
    output = printed()
    for name in losses:
        assert f"\n{name:24}" in "\n" + output
        assert f"\n    {name:24}" in ablations.__doc__  # the measured table


@torch.no_grad()
def test_ablated_models_lack_the_part_and_nothing_else():
    T, C, n_head, n_layer = ablations.T, ablations.C, ablations.N_HEAD, ablations.N_LAYER
    model = GPT(GPTConfig(T, 65, n_layer, n_head, C, bias=False))
    for parameter in model.parameters():
        parameter.add_(0.1 * torch.randn_like(parameter))
    idx = torch.randint(65, (2, 9))
    changed = idx.clone()
    changed[:, 8] = (idx[:, 8] + 1) % 65  # the last token
    equal_to_model, sees_the_future = [], []
    for name in ablations.MODELS:
        ablated = ablations.GPT(65, name)
        matrices = [parameter for parameter in ablated.parameters() if parameter.dim() == 2]
        sources = [parameter for parameter in model.parameters() if parameter.dim() == 2]
        gains = [parameter for parameter in ablated.parameters() if parameter.dim() == 1]
        gain_sources = [parameter for parameter in model.parameters() if parameter.dim() == 1]
        for ours, theirs in zip(matrices, sources, strict=True):
            ours.copy_(theirs)
        for ours, theirs in zip(gains, gain_sources, strict=name != "without layer norm"):
            ours.copy_(theirs)
        logits = ablated(idx)
        if torch.allclose(logits, model(idx), atol=1e-3):
            equal_to_model.append(name)
        if not torch.allclose(ablated(changed)[:, :8], logits[:, :8], atol=1e-3):
            sees_the_future.append(name)
    assert equal_to_model == ["all parts", "without warmup"]  # warmup belongs to training
    assert sees_the_future == ["without mask"]


# --- in_context.py ---


def test_secret_words_can_be_read_but_not_guessed(printed):
    losses = in_context.secret_words(steps=100)
    assert min(losses[:3]) > 0.95 * math.log(26)  # no model can predict them
    assert max(losses[3:9]) < 1
    assert re.search(r"loss +\d \d \d", printed())


def test_documents_repeat_a_word_of_three_letters():
    row = "".join("abcdefghijklmnopqrstuvwxyz."[i] for i in in_context.documents(1)[0].tolist())
    assert len(row) == in_context.T + 1
    whole = row.split(".")[1:-1]
    assert len(whole) >= 2
    assert all(word == 3 * word[:3] for word in whole)


def test_tokens_since_the_end_of_a_document():
    windows = torch.tensor([[5, 26, 7, 8, 26, 9], [1, 2, 3, 4, 5, 26]])  # the last is a target only
    expected = [[-1, 0, 1, 2, 0], [-1, -1, -1, -1, -1]]
    assert in_context.tokens_since(windows, 26).tolist() == expected


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run of random weights on a dataset with documents, as the newest run."""
    documents = [piece for line in PLAY.splitlines(keepends=True) for piece in (line, None)]
    tokenizer = CharTokenizer.from_text(PLAY, add_eos=True)
    splits = {"train": documents[:1500], "val": documents[1500:]}
    write_dataset(tmp_path / "lines", tokenizer, splits, {"source": "test"})
    folder = tmp_path / "run"
    model = GPT(GPTConfig(block_size=24, vocab_size=tokenizer.vocab_size, n_layer=1, n_embd=12))
    save_model(model, folder, tokenizer)
    save_tokenizer(tokenizer, folder, model_max_length=24)
    settings = {"dataset": str(tmp_path / "lines"), "max_iters": 0, "n_layer": 1, "init_from": ""}
    (folder / "settings.json").write_text(json.dumps(settings), encoding="utf-8")
    monkeypatch.setattr(engine.run_folder, "newest_run", lambda: folder)
    return folder


def test_loss_by_position_of_a_trained_run(run_folder, capsys):
    in_context.trained_model(run_folder)
    output = capsys.readouterr().out
    before, since_end = output.split("tokens since end-of-text")
    names_before = ["1", "2 to 3", "4 to 7", "8 to 15", "16 to 24"]  # the first input is read
    names_since = ["0", "1", "2 to 3", "4 to 7", "8 to 15"]
    for table, expected in ((before, names_before), (since_end, names_since)):
        rows = [line.rsplit(maxsplit=2) for line in table.splitlines() if "#" in line]
        names = [name.strip() for name, _, _ in rows]
        assert names[:5] == expected
        assert all(3.9 < float(loss) < 4.4 for _, loss, _ in rows)  # a guess: ln 61 = 4.1


def test_sampling_continues_a_prompt_with_the_newest_run(run_folder, capsys):
    sampling.show_model()
    output = capsys.readouterr().out
    assert output.count("\nROMEO:\n") == 4
    assert "temperature 1.5" in output


def test_lessons_say_so_if_there_is_no_run(monkeypatch, capsys):
    def no_run() -> Path:
        raise FolioError("no trained model")

    monkeypatch.setattr(engine.run_folder, "newest_run", no_run)
    sampling.show_model()
    assert "no trained model" in capsys.readouterr().out
    in_context.main(steps=1)
    assert "no trained model" in capsys.readouterr().out


def test_sampling_says_that_a_model_of_other_characters_cannot_continue_the_text(
    run_folder, monkeypatch, capsys
):
    monkeypatch.setattr(
        engine.checkpoint, "load_model_and_tokenizer", lambda _: (None, CharTokenizer("0123=+\n"))
    )
    sampling.show_model()
    output = " ".join(capsys.readouterr().out.split())
    assert "the character 'R' at position 1 is not in the vocabulary" in output
    assert f"So {shown_path(run_folder)} cannot continue this text" in output
    assert output.endswith("python train.py config/shakespeare_char.py")
