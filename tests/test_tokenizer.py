"""Text becomes integers, by character or by byte pair encoding, and comes back unharmed."""

import json
import random

import pytest
import tiktoken
from tokenizers import Tokenizer as HuggingFaceTokenizer

from configurator import FolioError
from data.tokenizer import (
    BPETokenizer, CharTokenizer, byte_alphabet, load_tokenizer, tokenizer_text,
)  # fmt: skip
from tests.conftest import ROOT, assert_one_line_error, run_script

AWKWARD = "Zoë said: don't!\r\n\tnaïve e\u0301 — 12,345 👩‍👩‍👧 日本\x00   <|endoftext|>  \n\n "


def toy_bpe() -> BPETokenizer:
    """The 256 bytes, and the merges l+o, lo+w, space+low, e+r, low+er; then end-of-text."""
    merged = [b"lo", b"low", b" low", b"er", b"lower"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(merged)}
    return BPETokenizer(ranks, end_of_text=261)


def saved(tokenizer, folder):
    (folder / "tokenizer.json").write_text(tokenizer_text(tokenizer), encoding="utf-8")
    return folder


def printable_files(tokenizer, folder):
    """Write GPT-2's older pair of files, vocab.json and merges.txt."""
    model = tokenizer.as_json()["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    merges = "\n".join(" ".join(pair) for pair in model["merges"])
    (folder / "merges.txt").write_text(f"#version: 0.2\n{merges}\n", encoding="utf-8")


def test_a_character_is_a_place_in_the_alphabet():
    tokenizer = CharTokenizer.of("hello")
    assert tokenizer.vocab_size == 4  # e h l o
    assert tokenizer.encode("hole").tolist() == [1, 3, 2, 0]
    assert tokenizer.decode([1, 3, 2, 0]) == "hole"
    assert tokenizer.end_of_text is None


@pytest.mark.parametrize("tokenizer", [CharTokenizer.of(AWKWARD), toy_bpe()], ids=["char", "bpe"])
def test_what_is_encoded_comes_back_exactly(tokenizer):
    for text in (AWKWARD, "", AWKWARD[::-1]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text


def test_an_unknown_character_is_named_with_its_position():
    with pytest.raises(FolioError, match="'z' at position 2"):
        CharTokenizer.of("hello").encode("hez")
    with pytest.raises(FolioError, match="position 0"):
        CharTokenizer.of("hello").encode("\udc80")  # what a terminal may hand on


def test_merges_apply_in_the_order_in_which_they_were_learned():
    tokenizer = toy_bpe()
    assert [tokenizer.token_bytes(t) for t in tokenizer.encode("low lower")] == [
        b"low", b" low", b"er",
    ]  # fmt: skip
    assert tokenizer.merges == [
        (b"l", b"o"), (b"lo", b"w"), (b" ", b"low"), (b"e", b"r"), (b"low", b"er"),
    ]  # fmt: skip


def test_a_text_that_spells_end_of_text_is_only_text():
    tokenizer = toy_bpe()
    assert tokenizer.end_of_text == 261
    assert 261 not in tokenizer.encode("<|endoftext|>")


def test_a_character_split_over_tokens_appears_once_it_is_whole():
    pieces = list(toy_bpe().decode_stream("é👍".encode()))  # byte tokens are bytes
    assert pieces == ["", "é", "", "", "", "👍"]


@pytest.mark.parametrize("tokenizer", [CharTokenizer.of(AWKWARD), toy_bpe()], ids=["char", "bpe"])
def test_hugging_faces_library_reads_our_file_and_gives_the_same_ids(tokenizer, tmp_path):
    theirs = HuggingFaceTokenizer.from_file(str(saved(tokenizer, tmp_path) / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in (AWKWARD, "low lower lowest", AWKWARD[::-1]):
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(c for c in text if c in tokenizer.characters)
        ids = tokenizer.encode(text).tolist()
        assert theirs.encode(text).ids == ids
        assert theirs.decode(ids, skip_special_tokens=False) == text


def test_tokenizers_are_equal_when_their_ids_mean_the_same(tmp_path):
    assert CharTokenizer.of("abc") == CharTokenizer.of("cab")
    assert CharTokenizer.of("abc") != CharTokenizer.of("abd")  # of one size
    assert CharTokenizer.of("abc") != toy_bpe()
    for tokenizer in (CharTokenizer.of(AWKWARD), toy_bpe()):
        assert load_tokenizer(saved(tokenizer, tmp_path)) == tokenizer


def test_gpt2s_vocabulary_is_tiktokens_and_survives_the_disk(gpt2, tmp_path):
    assert (gpt2.vocab_size, gpt2.end_of_text) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    again = load_tokenizer(saved(gpt2, tmp_path))
    assert again == gpt2
    dice = random.Random(0)
    letters = [dice.randrange(dice.choice((128, 0xD800))) for _ in range(999)]
    anything = "".join(map(chr, letters))
    reference = tiktoken.Encoding(
        "reference", pat_str=tiktoken.get_encoding("gpt2")._pat_str, special_tokens={},
        mergeable_ranks=gpt2.ranks,
    )  # fmt: skip
    theirs = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    theirs.encode_special_tokens = True
    for text in (AWKWARD, anything):
        assert again.encode(text).tolist() == reference.encode_ordinary(text)
        assert again.encode(text).tolist() == theirs.encode(text).ids


def test_gpt2_spells_a_space_as_a_letter_that_prints():
    assert byte_alphabet()[ord(" ")] == "Ġ"
    assert byte_alphabet()[ord("\n")] == "Ċ"
    assert len(set(byte_alphabet())) == 256


def test_without_network_and_cache_gpt2s_vocabulary_names_the_variable_to_set(tmp_path):
    nobody = {"HTTPS_PROXY": "http://127.0.0.1:9", "https_proxy": "http://127.0.0.1:9"}
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 9)
    result = run_script(
        "prepare_shakespeare.py", f"--input={text}", "--tokenizer=gpt2", "--dataset=never_made",
        TIKTOKEN_CACHE_DIR=str(tmp_path), **nobody,
    )  # fmt: skip
    assert_one_line_error(result, "TIKTOKEN_CACHE_DIR")
    assert not (ROOT / "data" / "never_made").exists()


@pytest.mark.parametrize(
    "contents",
    [
        "", "[]", "{}", "null", '{"model": 3}', '{"model": {"type": "Unigram"}}',
        '{"model": {"type": "WordLevel", "vocab": {}}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2}}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 0, "bc": 1}}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}}}',
        '{"model": {"type": "BPE", "vocab": [1]}}',
    ],
)  # fmt: skip
def test_a_damaged_tokenizer_is_refused_by_name(contents, tmp_path):
    (tmp_path / "tokenizer.json").write_text(contents)
    with pytest.raises(FolioError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_the_file_says_what_hugging_face_expects(tmp_path):
    contents = json.loads(tokenizer_text(toy_bpe()))
    assert contents["model"]["merges"][0] == ["l", "o"]
    assert contents["added_tokens"][0]["content"] == "<|endoftext|>"
