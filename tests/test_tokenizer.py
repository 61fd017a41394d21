"""data/tokenizer.py: text to ids and back, and the file tokenizer.json."""

import json
import random

import numpy as np
import pytest
import tiktoken
import transformers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer as HuggingFaceTokenizer

import prepare_shakespeare
from configurator import FolioError
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, save_tokenizer
from data.tokenizer_base import bytes_to_unicode
from tests.conftest import assert_one_line_error
from tests.fuzzing import Count, fuzz_settings, mutations

AWKWARD_TEXT = "Zoë said: don't!\r\n\tnaïve e\u0301 — 12,345 👩‍👩‍👧 日本\x00   <|endoftext|>  \n\n "


def toy_bpe() -> BPETokenizer:
    """The 256 bytes, and the merges l+o, lo+w, space+low, e+r, low+er; then end-of-text."""
    merged = [b"lo", b"low", b" low", b"er", b"lower"]
    ranks = {bytes([byte]): byte for byte in range(256)}
    ranks |= {token: 256 + i for i, token in enumerate(merged)}
    return BPETokenizer(ranks, eos_token_id=261)


def save(tokenizer, folder):
    (folder / "tokenizer.json").write_text(tokenizer.to_json(), encoding="utf-8")
    return folder


both_tokenizers = pytest.mark.parametrize(
    "tokenizer", [CharTokenizer.from_text(AWKWARD_TEXT), toy_bpe()], ids=["char", "bpe"]
)


# --- Characters ---


def test_char_ids_are_indices_into_the_sorted_characters():
    tokenizer = CharTokenizer.from_text("hello")
    assert tokenizer.vocab_size == 4  # e h l o
    assert tokenizer.encode("hole").tolist() == [1, 3, 2, 0]
    assert tokenizer.decode([1, 3, 2, 0]) == "hole"
    assert tokenizer.eos_token_id is None


def test_add_eos_appends_an_end_of_text_token():
    tokenizer = CharTokenizer.from_text("hello", add_eos=True)
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (5, 4)
    assert tokenizer.decode([1, 4]) == "h<|endoftext|>"
    assert tokenizer.byte_lengths.tolist() == [1, 1, 1, 1, 0]


def test_char_encode_names_an_unknown_character_and_its_position():
    with pytest.raises(FolioError, match="'z' at position 2"):
        CharTokenizer.from_text("hello").encode("hez")
    with pytest.raises(FolioError, match="position 0"):
        CharTokenizer.from_text("hello").encode("\udc80")  # half a character, from a terminal


def test_char_vocabulary_with_half_of_a_surrogate_pair_is_refused():
    with pytest.raises(FolioError, match=r"'\\ud83d'"):
        CharTokenizer.from_text("a\ud83d")


def test_char_vocabulary_with_a_character_twice_is_refused():
    with pytest.raises(ValueError, match="twice"):
        CharTokenizer("aba")


# --- BPE ---


def test_bpe_merges_in_the_order_of_the_ids():
    tokenizer = toy_bpe()
    assert [tokenizer.token_bytes(i) for i in tokenizer.encode("low lower")] == [
        b"low", b" low", b"er",
    ]  # fmt: skip


def test_bpe_merges_are_recovered_from_the_ranks():
    assert toy_bpe().merges == [
        (b"l", b"o"), (b"lo", b"w"), (b" ", b"low"), (b"e", b"r"), (b"low", b"er"),
    ]  # fmt: skip


def test_encode_never_makes_an_end_of_text_token():
    tokenizer = toy_bpe()
    assert tokenizer.eos_token_id == 261
    assert 261 not in tokenizer.encode("<|endoftext|>")


def test_gpt2_ids_equal_tiktoken_and_hugging_face(gpt2, tmp_path):
    assert (gpt2.vocab_size, gpt2.eos_token_id) == (50257, 50256)
    assert gpt2.encode("Hello world").tolist() == [15496, 995]
    reloaded = load_tokenizer(save(gpt2, tmp_path))
    assert reloaded == gpt2
    rng = random.Random(0)
    random_text = "".join(chr(rng.randrange(rng.choice((128, 0xD800)))) for _ in range(999))
    reference = tiktoken.Encoding(
        "reference", pat_str=tiktoken.get_encoding("gpt2")._pat_str, special_tokens={},
        mergeable_ranks=gpt2.mergeable_ranks,
    )  # fmt: skip
    hugging_face = HuggingFaceTokenizer.from_file(str(tmp_path / "tokenizer.json"))
    hugging_face.encode_special_tokens = True
    for text in (AWKWARD_TEXT, random_text):
        assert reloaded.encode(text).tolist() == reference.encode_ordinary(text)
        assert reloaded.encode(text).tolist() == hugging_face.encode(text).ids


def test_gpt2_without_network_and_cache_names_the_variable_to_set(
    tmp_path, data_folder, monkeypatch, call
):
    monkeypatch.setattr("tiktoken.registry.ENCODINGS", {})
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")  # nothing listens there
    monkeypatch.setenv("https_proxy", "http://127.0.0.1:9")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be\n" * 9)
    result = call(
        prepare_shakespeare, f"--input_file={text}", "--tokenizer=gpt2", "--dataset=never_made"
    )
    assert_one_line_error(result, "TIKTOKEN_CACHE_DIR")
    assert not (data_folder / "never_made").exists()


# --- All tokenizers ---


@both_tokenizers
def test_decode_is_the_inverse_of_encode(tokenizer):
    for text in (AWKWARD_TEXT, "", AWKWARD_TEXT[::-1]):
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert "".join(tokenizer.decode_stream(tokenizer.encode(text))) == text


def test_any_text_is_restored_from_its_ids(n_trials):
    bpe = toy_bpe()

    @fuzz_settings(n_trials)
    @given(st.text())
    def check(text):
        assert bpe.decode(bpe.encode(text)) == text
        assert "".join(bpe.decode_stream(bpe.encode(text))) == text
        if text:
            characters = CharTokenizer.from_text(text)
            assert characters.decode(characters.encode(text)) == text

    check()


@both_tokenizers
def test_encode_returns_int64(tokenizer):
    assert tokenizer.encode("said").dtype == tokenizer.encode("").dtype == np.int64


@both_tokenizers
def test_ids_out_of_range_are_refused(tokenizer):
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(ValueError, match=f"token id {token_id} is out of range"):
            tokenizer.decode([token_id])
        with pytest.raises(ValueError, match=f"token id {token_id} is out of range"):
            tokenizer.token_bytes(token_id)


def test_decode_stream_yields_a_character_when_it_is_complete():
    pieces = list(toy_bpe().decode_stream("é👍".encode()))  # the ids of bytes are the bytes
    assert pieces == ["", "é", "", "", "", "👍"]


def test_decode_stream_shows_an_incomplete_last_character():
    assert list(toy_bpe().decode_stream("é👍".encode()[:-1])) == ["", "é", "", "", "", "\ufffd"]


def test_start_token_is_end_of_text_or_a_newline_or_token_0():
    assert toy_bpe().start_token_id == 261
    assert CharTokenizer("ab\n").start_token_id == 2
    assert CharTokenizer("ab").start_token_id == 0


def test_tokenizers_are_equal_if_they_give_the_same_ids(tmp_path):
    assert CharTokenizer.from_text("abc") == CharTokenizer.from_text("cab")
    assert CharTokenizer.from_text("abc") != CharTokenizer.from_text("abd")  # of the same size
    assert CharTokenizer.from_text("abc") != toy_bpe()
    for tokenizer in (CharTokenizer.from_text(AWKWARD_TEXT, add_eos=True), toy_bpe()):
        assert load_tokenizer(save(tokenizer, tmp_path)) == tokenizer


# --- The file tokenizer.json ---


@both_tokenizers
def test_hugging_face_opens_our_file_and_gives_the_same_ids(tokenizer, tmp_path):
    path = save(tokenizer, tmp_path) / "tokenizer.json"
    hugging_face = HuggingFaceTokenizer.from_file(str(path))
    hugging_face.encode_special_tokens = True
    for text in (AWKWARD_TEXT, "low lower lowest", AWKWARD_TEXT[::-1]):
        if isinstance(tokenizer, CharTokenizer):
            text = "".join(c for c in text if c in tokenizer.characters)
        ids = tokenizer.encode(text).tolist()
        assert hugging_face.encode(text).ids == ids
        assert hugging_face.decode(ids, skip_special_tokens=False) == text


def test_file_has_merges_as_pairs_and_end_of_text_as_added_token():
    contents = json.loads(toy_bpe().to_json())
    assert contents["model"]["merges"][0] == ["l", "o"]
    assert contents["added_tokens"][0]["content"] == "<|endoftext|>"


def test_char_file_is_recognized_if_entries_without_effect_are_missing(tmp_path):
    """Other versions of `tokenizers` may write more or fewer entries."""
    tokenizer = CharTokenizer.from_text("hello", add_eos=True)
    contents = json.loads(tokenizer.to_json())
    del contents["truncation"], contents["padding"], contents["post_processor"]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    assert load_tokenizer(tmp_path) == tokenizer


def test_characters_are_recognized_without_tokenizer_config_json(tmp_path):
    """With the config.json of a model, in which model_type is gpt2."""
    save_tokenizer(CharTokenizer("\n abc"), tmp_path)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    assert load_tokenizer(tmp_path) == CharTokenizer("\n abc")


@pytest.mark.parametrize(
    ("add_eos", "pad_token"), [(False, None), (False, "b"), (True, None)]
)  # with end-of-text, that is the padding token
def test_characters_that_transformers_saved_again_are_still_our_tokenizer(
    tmp_path, add_eos, pad_token
):
    tokenizer = CharTokenizer.from_text("abc\n ", add_eos)
    settings = {"pad_token": pad_token} if pad_token else {}
    save_tokenizer(tokenizer, tmp_path, **settings)
    transformers.AutoTokenizer.from_pretrained(tmp_path).save_pretrained(tmp_path / "again")
    assert "post_processor" in (tmp_path / "again" / "tokenizer.json").read_text()
    assert load_tokenizer(tmp_path / "again") == tokenizer
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "again")
    assert theirs("abba c\n")["input_ids"] == tokenizer.encode("abba c\n").tolist()


def test_a_character_that_is_a_token_apart_makes_another_tokenizer(tmp_path):
    """Where special tokens are recognized in a text, " b" is one token with lstrip."""
    tokenizer = CharTokenizer.from_text("ab ")
    save_tokenizer(tokenizer, tmp_path, split_special_tokens=False)
    contents = tokenizer.to_dict()
    flags = {"single_word": False, "lstrip": True, "rstrip": False, "normalized": False}
    contents["added_tokens"] = [{"id": 2, "content": "b", "special": True, **flags}]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents))
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs("a b")["input_ids"] == load_tokenizer(tmp_path).encode("a b").tolist() == [1, 2]


def test_gpt2_spells_a_space_as_a_printable_letter():
    assert bytes_to_unicode()[ord(" ")] == "Ġ"
    assert bytes_to_unicode()[ord("\n")] == "Ċ"
    assert len(set(bytes_to_unicode())) == 256


def test_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(FolioError, match="tokenizer not found"):
        load_tokenizer(str(tmp_path))


@pytest.mark.parametrize(
    "contents",
    [
        "", "[]", "{}", "null", '{"model": 3}', '{"model": {"type": "Unigram"}}',
        '{"model": {"type": "WordLevel", "vocab": {}}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 0, "b": 2}}}',
        '{"model": {"type": "WordLevel", "vocab": {"a": 0, "bc": 1}}}',
        '{"model": {"type": "BPE", "vocab": {"a": 0}}}',
        '{"model": {"type": "BPE", "vocab": [1]}}',
        "[" * 100_000, '{"model":' * 100_000, b"\xff\xfe", '{"model": "\\ud800"}',
    ],
)  # fmt: skip
def test_damaged_file_is_refused_by_name(contents, tmp_path):
    contents = contents if isinstance(contents, bytes) else contents.encode()
    (tmp_path / "tokenizer.json").write_bytes(contents)
    with pytest.raises(FolioError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)


def test_unreadable_file_is_not_called_missing(tmp_path):
    (tmp_path / "tokenizer.json").mkdir()
    with pytest.raises(FolioError, match="cannot be read"):
        load_tokenizer(tmp_path)


@both_tokenizers
def test_any_mutated_file_is_understood_or_refused(tokenizer, tmp_path, n_trials):
    count = Count()

    @fuzz_settings(n_trials)
    @given(mutations(json.loads(tokenizer.to_json())))
    def check(contents):
        (tmp_path / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
        count.inputs += 1
        try:
            found = load_tokenizer(tmp_path)
        except FolioError as error:
            assert "tokenizer.json" in str(error)
        else:
            count.accepted += 1
            assert isinstance(found.decode(range(min(found.vocab_size, 50))), str)

    check()
    # No file is tried twice, and few changes are harmless: with more trials, the fraction falls.
    assert count.accepted > 6
