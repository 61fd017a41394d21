"""data/bpe.py: training a byte pair encoding."""

import json
import time

import pytest
import tiktoken
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from configurator import FolioError
from data.bpe import BASE_TOKENS, SPLIT_RE, count_words, learn_merges, merge, train_bpe
from data.tokenizer import GPT2_SPLIT_PATTERN, encode_bytes, load_tokenizer, save_tokenizer
from engine.checkpoint import save_model
from model import GPT, GPTConfig
from tests.conftest import ROOT, SHAKESPEARE, TINY_TEXT

PLAY = (ROOT / "data" / "replacement.txt").read_text(encoding="utf-8")[:50_000]


def hugging_face_merges(text: str, count: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def test_example_of_the_paper():
    """Sennrich et al. 2016: low 5 times, lower 2, newest 6, widest 3 give es, est, lo, low."""
    word_counts = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    merges = learn_merges(word_counts, 4)
    assert merges == [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]


def test_text_is_split_into_words_as_gpt2_does():
    assert SPLIT_RE.findall("Hello, it's 42") == ["Hello", ",", " it", "'s", " 42"]
    assert count_words(["low low lower", " it's 42!"]) == {
        b"low": 1, b" low": 1, b" lower": 1, b" it": 1, b"'s": 1, b" 42": 1, b"!": 1,
    }  # fmt: skip


def test_only_the_most_frequent_words_count(monkeypatch):
    monkeypatch.setattr("data.bpe.MAX_WORDS", 2)
    assert count_words(["a b b c c c"]) == {b" b": 2, b" c": 3}


def test_half_of_a_surrogate_pair_is_refused_when_encoding():
    tokenizer = train_bpe(["low low \ud83d"], 259)
    with pytest.raises(FolioError, match="at position 4"):
        tokenizer.encode("low \ud83d")


def test_no_merge_crosses_the_border_of_a_word():
    for left, right in learn_merges(count_words([TINY_TEXT]), 200):
        assert b" " not in (left + right)[1:]


def test_overlapping_pairs_are_merged_from_the_left():
    assert merge([7, 8, 9, 7, 8], (7, 8), 300) == [300, 9, 300]
    assert merge([7, 7, 7], (7, 7), 300) == [300, 7]


@pytest.mark.parametrize(
    "text", [PLAY, TINY_TEXT * 3, "aaa aaaa aaaaa aa a " * 9, "日本 🙂🙂 é e\u0301\r\n\t" * 20]
)
def test_merges_equal_hugging_face(text):
    ours = [(encode_bytes(a), encode_bytes(b)) for a, b in learn_merges(count_words([text]), 700)]
    assert ours == hugging_face_merges(text, 700)
    assert len(ours) > 5


def test_vocabulary_is_the_bytes_then_the_merges_then_end_of_text():
    tokenizer = train_bpe([PLAY], 500)
    assert tokenizer.vocab_size == 500
    assert tokenizer.eos_token_id == 499
    assert [tokenizer.token_bytes(i) for i in range(256)] == BASE_TOKENS
    assert tokenizer.merges == learn_merges(count_words([PLAY]), 500 - 257)


def test_trained_tokenizer_gives_the_same_ids_in_tiktoken_and_transformers(tmp_path):
    tokenizer = train_bpe([PLAY], 600)
    save_tokenizer(tokenizer, tmp_path, model_max_length=4)
    save_model(
        GPT(GPTConfig(block_size=4, vocab_size=600, n_layer=1, n_head=1, n_embd=4)), tmp_path
    )
    auto_tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    encoding = tiktoken.Encoding(
        "test", pat_str=GPT2_SPLIT_PATTERN, special_tokens={},
        mergeable_ranks=tokenizer.mergeable_ranks,
    )  # fmt: skip
    assert load_tokenizer(tmp_path) == tokenizer
    for text in (PLAY[:5000], "héllo <|other|>\r\n 🙂"):  # end-of-text would be a token there
        ids = tokenizer.encode(text).tolist()
        assert ids == auto_tokenizer(text)["input_ids"] == encoding.encode_ordinary(text)
        assert auto_tokenizer.decode(ids) == text


def test_larger_vocabulary_makes_fewer_tokens():
    lengths = [len(train_bpe([PLAY], size).encode(PLAY)) for size in (257, 512, 1024)]
    assert lengths[0] == len(PLAY.encode())
    assert lengths[0] > 1.5 * lengths[1] > 1.5 * lengths[2]


def test_impossible_vocab_size_is_refused_with_the_nearest_possible_one():
    with pytest.raises(FolioError, match="at least --vocab_size=257"):
        train_bpe([PLAY], 256)
    with pytest.raises(FolioError, match="only 3 merges; use --vocab_size=260 or less"):
        train_bpe(["low low"], 300)


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Shakespeare is not on this machine")
def test_two_thousand_merges_of_shakespeare_equal_hugging_face_within_seconds():
    text = SHAKESPEARE.read_text(encoding="utf-8")[:500_000]
    start = time.process_time()
    merges = learn_merges(count_words([text]), 2048)
    assert time.process_time() - start < 5
    ours = [(encode_bytes(a), encode_bytes(b)) for a, b in merges]
    assert ours == hugging_face_merges(text, 2048)
