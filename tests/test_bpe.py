"""Byte pair encoding, learned: count the pairs, merge the commonest, again."""

import json
import time

import pytest
import tiktoken
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, trainers

from configurator import FolioError
from data.bpe import BYTES, count_words, learn_merges, merge, train_bpe
from data.tokenizer import GPT2_WORDS, load_tokenizer, printable
from model import GPT, GPTConfig
from tests.conftest import REAL, RHYME, ROOT
from training.checkpoint import save_model, save_tokenizer

PLAY = (ROOT / "data" / "understudy.txt").read_text(encoding="utf-8")


def merges_of_hugging_face(text: str, count: int) -> list[tuple[str, str]]:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=256 + count, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator([text], trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]


def test_the_textbooks_example_comes_out_as_in_the_textbook():
    """Sennrich et al. 2016: low 5 times, lower 2, newest 6, widest 3 give es, est, lo, low."""
    words = {b"low": 5, b"lower": 2, b"newest": 6, b"widest": 3}
    assert learn_merges(words, 4) == [(b"e", b"s"), (b"es", b"t"), (b"l", b"o"), (b"lo", b"w")]


def test_words_are_cut_as_gpt2_cuts_them_and_no_merge_crosses_them():
    assert count_words(["low low lower", " it's 42!"]) == {
        b"low": 1, b" low": 1, b" lower": 1, b" it": 1, b"'s": 1, b" 42": 1, b"!": 1,
    }  # fmt: skip
    for left, right in learn_merges(count_words([RHYME]), 200):
        assert b" " not in (left + right)[1:]


def test_a_pair_that_overlaps_itself_is_merged_from_the_left():
    assert merge([7, 8, 9, 7, 8], (7, 8), 300) == [300, 9, 300]
    assert merge([7, 7, 7], (7, 7), 300) == [300, 7]


@pytest.mark.parametrize(
    "text", [PLAY, RHYME * 3, "aaa aaaa aaaaa aa a " * 9, "日本 🙂🙂 é e\u0301\r\n\t" * 20]
)
def test_the_merges_are_hugging_faces(text):
    wanted = merges_of_hugging_face(text, 700)
    ours = [(printable(a), printable(b)) for a, b in learn_merges(count_words([text]), 700)]
    assert ours == wanted
    assert len(ours) > 5


def test_the_vocabulary_begins_with_the_bytes_and_ends_with_end_of_text():
    tokenizer = train_bpe([PLAY], 500)
    assert tokenizer.vocab_size == 500
    assert tokenizer.end_of_text == 499
    assert [tokenizer.token_bytes(i) for i in range(256)] == BYTES
    assert tokenizer.merges == learn_merges(count_words([PLAY]), 500 - 257)


def test_what_was_learned_runs_in_tiktoken_and_in_transformers(tmp_path):
    tokenizer = train_bpe([PLAY], 600)
    save_tokenizer(tokenizer, tmp_path)
    save_model(
        GPT(GPTConfig(block_size=4, vocab_size=600, n_layer=1, n_head=1, n_embd=4)), tmp_path
    )
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    plain = tiktoken.Encoding(
        "test", pat_str=GPT2_WORDS, mergeable_ranks=tokenizer.ranks, special_tokens={}
    )
    assert load_tokenizer(tmp_path) == tokenizer
    for text in (PLAY[:5000], "héllo <|endoftext|>\r\n 🙂"):
        ids = tokenizer.encode(text).tolist()
        assert ids == theirs(text)["input_ids"] == plain.encode_ordinary(text)
        assert theirs.decode(ids) == text


def test_a_larger_vocabulary_makes_a_shorter_text():
    lengths = [len(train_bpe([PLAY], size).encode(PLAY)) for size in (257, 512, 1024)]
    assert lengths[0] == len(PLAY)
    assert lengths[0] > 1.5 * lengths[1] > 1.5 * lengths[2]


def test_a_vocabulary_that_cannot_be_is_refused_with_what_could_be():
    with pytest.raises(FolioError, match="at least 257"):
        train_bpe([PLAY], 256)
    with pytest.raises(FolioError, match="only 3 merges; at most --vocab_size=260"):
        train_bpe(["low low"], 300)


@pytest.mark.skipif(not REAL.exists(), reason="Shakespeare is not on this machine")
def test_four_thousand_merges_on_shakespeare_take_seconds():
    text = REAL.read_text(encoding="utf-8")
    began = time.process_time()
    merges = learn_merges(count_words([text]), 4096)
    assert time.process_time() - began < 10
    assert [(printable(a), printable(b)) for a, b in merges] == merges_of_hugging_face(text, 4096)
