"""data/hf_tokenizer.py: tokenizers of models from elsewhere give the ids of transformers."""

import contextlib
import json
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from tokenizers import (
    AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors,
    trainers,
)  # fmt: skip
from transformers import AutoTokenizer, BertTokenizer, GPT2Tokenizer, PreTrainedTokenizerFast

from configurator import FolioError
from data.hf_tokenizer import HFTokenizer
from data.dataset import open_dataset
from data.prepare import write_dataset
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, save_tokenizer
from tests.conftest import TINY_TEXT
from tests.fuzzing import Count, fuzz_settings, mutations
from tests.test_tokenizer import toy_bpe

END = "<|endoftext|>"
CORPUS = [
    TINY_TEXT,
    "The star's light; 42 naïve sailors wonder: what is it?\n",
    "日本 é e\u0301 🙂\n",
]
TEXTS = [
    "twinkle, how i wonder", "  The STAR's\n\nlight \t 421 ", "", " ", "日本 naïve é e\u0301 🙂🙂",
    "<|user|> hi <|assistant|>there<|pad|> <s> up </s><pad>", "star<|user|>\r\nhigh   \n",
    "\u00a0x\u2003y don't I'll [MASK] <unk> tick", TINY_TEXT,
]  # fmt: skip
BYTE_ALPHABET = pre_tokenizers.ByteLevel.alphabet()


# --- Folders as other programs write them ---


def train(tokenizer: Tokenizer, trainer) -> Tokenizer:
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def byte_level(special=(END,), **options) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})
    tokenizer.decoder = decoders.ByteLevel()
    return train(tokenizer, trainers.BpeTrainer(
        vocab_size=350, initial_alphabet=BYTE_ALPHABET, special_tokens=list(special),
        show_progress=False,
    ))  # fmt: skip


def word_piece() -> Tokenizer:
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    return train(tokenizer, trainers.WordPieceTrainer(
        vocab_size=120, special_tokens=special, show_progress=False
    ))  # fmt: skip


def unigram() -> Tokenizer:
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.normalizer = normalizers.NFKC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    return train(tokenizer, trainers.UnigramTrainer(
        vocab_size=90, special_tokens=["<unk>", "<s>", "</s>"], unk_token="<unk>",
        show_progress=False,
    ))  # fmt: skip


def byte_fallback() -> Tokenizer:
    """As Llama 2's: unknown characters become tokens of single bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    tokenizer.decoder = decoders.Sequence([
        decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    return train(tokenizer, trainers.BpeTrainer(
        vocab_size=330, special_tokens=special, show_progress=False
    ))  # fmt: skip


def split_regex() -> Tokenizer:
    """As Llama 3's: words by a pattern of its own, then bytes."""
    tokenizer = byte_level()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(r"\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])  # fmt: skip
    return tokenizer


def with_suffix() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.decoder = decoders.BPEDecoder()
    return train(tokenizer, trainers.BpeTrainer(
        vocab_size=150, special_tokens=["<unk>"], end_of_word_suffix="</w>", show_progress=False
    ))  # fmt: skip


def word_level() -> Tokenizer:
    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return train(tokenizer, trainers.WordLevelTrainer(
        special_tokens=["<unk>", END], show_progress=False
    ))  # fmt: skip


def with_added_tokens() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.add_special_tokens(["<|user|>", AddedToken("<|assistant|>", rstrip=True)])
    tokenizer.add_tokens([AddedToken("star", single_word=True), AddedToken("high", lstrip=True)])
    return tokenizer


def with_normalized_token() -> Tokenizer:
    """Decoding its id gives "[eos]": the normalizer changes the token, too."""
    tokenizer = byte_level()
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.add_special_tokens([AddedToken("[EOS]", normalized=True)])
    return tokenizer


def with_ordinary_end_of_text() -> Tokenizer:
    tokenizer = word_piece()
    tokenizer.add_tokens([AddedToken(END)])
    return tokenizer


def with_template() -> Tokenizer:
    tokenizer = byte_level(["<s>", "<pad>", "</s>"])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 2)]
    )
    return tokenizer


def with_end_of_text_first() -> Tokenizer:
    tokenizer = byte_level()
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{END} $A", special_tokens=[(END, 0)]
    )
    return tokenizer


def with_truncation() -> Tokenizer:
    tokenizer = with_added_tokens()
    tokenizer.enable_truncation(3)
    tokenizer.enable_padding(length=32)
    return tokenizer


def with_unreachable_merge() -> Tokenizer:
    """The merges x+y, y+z, x+yz: "xyz" becomes xy, z. By the ranks alone it would become xyz."""
    model = json.loads(byte_level().to_str())["model"]
    size = len(model["vocab"])
    vocab = model["vocab"] | {"qx": size, "xz": size + 1, "qxz": size + 2}
    merges = [*model["merges"], ("q", "x"), ("x", "z"), ("q", "xz")]
    tokenizer = byte_level()
    tokenizer.model = models.BPE(vocab, [tuple(pair) for pair in merges])
    return tokenizer


def gpt2_class(**options) -> GPT2Tokenizer:
    model = json.loads(byte_level().to_str())["model"]
    return GPT2Tokenizer(
        vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]], **options
    )


def bert_class(**options) -> BertTokenizer:
    vocab = word_piece().get_vocab()
    return BertTokenizer(vocab=dict(sorted(vocab.items(), key=lambda item: item[1])), **options)


def save(tokenizer: Tokenizer | PreTrainedTokenizerFast, folder: Path, **config) -> Path:
    """Write the folder with transformers; config: entries for tokenizer_config.json."""
    if isinstance(tokenizer, Tokenizer):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer)
    tokenizer.save_pretrained(folder)
    edit(folder / "tokenizer_config.json", lambda contents: contents.update(config))
    (folder / "config.json").write_text('{"model_type": "gpt2"}')
    return folder


def edit(path: Path, change: Callable[[dict], object]) -> None:
    contents = json.loads(path.read_text(encoding="utf-8"))
    change(contents)
    path.write_text(json.dumps(contents), encoding="utf-8")


SENTENCE = {"bos_token": "<s>", "eos_token": "</s>"}
KINDS = {
    "special tokens first": (lambda: byte_level(["<s>", "<pad>", "</s>"]), SENTENCE),
    "added tokens": (with_added_tokens, {"eos_token": END}),
    "added tokens as text": (with_added_tokens, {"split_special_tokens": True}),
    "token of the config only": (byte_level, {"pad_token": "<|pad|>"}),
    "no regex": (lambda: byte_level(use_regex=False), {"eos_token": END}),
    "prefix space": (lambda: byte_level(add_prefix_space=True), {}),
    "regex of its own": (split_regex, {}),
    "end of word suffix": (with_suffix, {"unk_token": "<unk>"}),
    "unreachable merge": (with_unreachable_merge, {}),
    "normalized token": (with_normalized_token, {"eos_token": "[EOS]"}),
    "ordinary end-of-text": (
        with_ordinary_end_of_text,
        {"unk_token": "[UNK]", "split_special_tokens": True},
    ),
    "template": (with_template, SENTENCE),
    "end-of-text first": (with_end_of_text_first, {"eos_token": END}),
    "truncation and padding": (with_truncation, {}),
    "byte fallback": (byte_fallback, SENTENCE),
    "word pieces": (word_piece, {"unk_token": "[UNK]"}),
    "unigram": (unigram, SENTENCE),
    "words": (word_level, {"unk_token": "<unk>", "eos_token": END}),
    "GPT-2's class": (lambda: gpt2_class(pad_token="<|pad|>"), {}),
    "GPT-2's class, prefix space": (lambda: gpt2_class(add_prefix_space=True), {}),
    "BERT's class": (bert_class, {}),
    "BERT's class, cased": (lambda: bert_class(do_lower_case=False), {}),
}


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory) -> Path:
    """A folder of each kind."""
    make, config = KINDS[request.param]
    return save(make(), tmp_path_factory.mktemp("tokenizer"), **config)


# --- The ids ---


def test_ids_equal_transformers(folder):
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert isinstance(tokenizer, HFTokenizer)
    assert tokenizer.vocab_size == len(theirs)
    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ids.dtype == np.int64
        assert ids.tolist() == theirs(text, add_special_tokens=False)["input_ids"], text
        assert tokenizer.decode(ids) == theirs.decode(ids)
        assert "".join(tokenizer.decode_stream(ids)) == tokenizer.decode(ids)
        for n in range(1, len(ids)):  # the tokens of a prompt, and of its continuation
            prompt, whole = tokenizer.decode(ids[:n]), tokenizer.decode(ids)
            if whole.startswith(prompt):  # else a character is cut into two
                continuation = "".join(tokenizer.decode_stream(ids[n:], ids[:n]))
                assert prompt + continuation == whole


def test_saved_tokenizer_is_equal_here_and_in_transformers(folder, tmp_path):
    tokenizer = load_tokenizer(folder)
    save_tokenizer(tokenizer, tmp_path, model_max_length=8)
    assert load_tokenizer(tmp_path) == tokenizer
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 8
    for text in TEXTS:
        assert (
            theirs(text, add_special_tokens=False)["input_ids"] == tokenizer.encode(text).tolist()
        )
    assert load_tokenizer(tmp_path).eos_token_id == tokenizer.eos_token_id


def test_special_token_ids_are_those_of_transformers(folder):
    ids, theirs = load_tokenizer(folder).special_token_ids, AutoTokenizer.from_pretrained(folder)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        expected = getattr(theirs, name)  # None: our end-of-text token takes its place, if any
        assert ids[name] == (load_tokenizer(folder).eos_token_id if expected is None else expected)


def test_prompt_has_the_tokens_that_transformers_puts_before_a_text(folder):
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = theirs("how high")["input_ids"]
    prompt = tokenizer.encode_prompt("how high").tolist()
    assert prompt == ids[: len(prompt)]
    assert set(ids[len(prompt) :]) <= {theirs.eos_token_id, theirs.sep_token_id}
    assert tokenizer.encode_prompt("").tolist() == [tokenizer.start_token_id]


@pytest.mark.parametrize(
    ("make", "config", "start", "end"),
    [
        (with_template, SENTENCE, "<s>", "</s>"),
        (unigram, SENTENCE, "<s>", "</s>"),
        (bert_class, {}, "[CLS]", None),
        (with_added_tokens, {"eos_token": END}, END, END),
    ],
)
def test_start_and_end_tokens(make, config, start, end, tmp_path):
    tokenizer = load_tokenizer(save(make(), tmp_path, **config))
    assert tokenizer.decode([tokenizer.start_token_id]) == start
    assert tokenizer.special_tokens.get("eos_token") == end
    assert end is None or tokenizer.decode([tokenizer.eos_token_id]) == end


def test_tokenizers_with_different_added_tokens_are_not_equal(tmp_path):
    one = load_tokenizer(save(with_added_tokens(), tmp_path / "one"))
    other = with_added_tokens()
    other.add_tokens(["how"])
    assert one != load_tokenizer(save(other, tmp_path / "other"))


def test_byte_lengths_add_up_to_the_bytes_of_a_text(tmp_path):
    text = "twinkle twinkle little star how i wonder"
    tokenizer = load_tokenizer(save(byte_level(use_regex=False), tmp_path / "bytes"))
    assert tokenizer.byte_lengths[tokenizer.encode("star, naïve 🙂")].sum() == 6 + 7 + 4
    assert tokenizer.byte_lengths[tokenizer.eos_token_id] == 0
    # Each word has its space: also the first word or, with a suffix, the last word.
    for make in (word_piece, unigram, byte_fallback, with_suffix):
        tokenizer = load_tokenizer(save(make(), tmp_path / make.__name__))
        assert tokenizer.byte_lengths[tokenizer.encode(text)].sum() == len(text) + 1


@pytest.mark.parametrize(
    ("make", "config", "expected"),
    [
        (with_template, SENTENCE, "<s>how high</s><s>star</s>"),
        (bert_class, {}, "[CLS] how high [CLS] star"),
        (with_end_of_text_first, {"eos_token": END}, f"how high{END}star{END}"),
        (byte_level, {}, f"how high{END}star{END}"),
    ],
)
def test_documents_begin_as_prompts_do(make, config, expected, tmp_path):
    """So a model that was trained on them knows the first token of a prompt."""
    tokenizer = load_tokenizer(save(make(), tmp_path / "tokenizer", **config))
    splits = {"train": ["how ", "high", None, "star", None], "val": ["star" * 20]}
    write_dataset(tmp_path / "dataset", tokenizer, splits, {})
    tokens = open_dataset(tmp_path / "dataset", 1).train.shards[0]
    assert tokenizer.decode(tokens) == expected
    assert not tokenizer.byte_lengths[tokenizer.prefix_ids].any()


def test_text_that_cannot_be_encoded_is_refused(tmp_path):
    tokenizer = word_level()
    tokenizer.model = models.WordLevel({"star": 0})
    tokenizer = load_tokenizer(save(tokenizer, tmp_path))
    for text in ("moon", "\ud83d"):
        with pytest.raises(FolioError, match="the text cannot be encoded"):
            tokenizer.encode(text)
    assert tokenizer.encode_prompt("star").tolist() == [0]


# --- GPT-2's kind stays with tiktoken ---


@pytest.mark.parametrize("make", [byte_level, gpt2_class], ids=["generic class", "GPT-2's class"])
def test_plain_byte_level_bpe_is_a_bpe_tokenizer(make, tmp_path):
    tokenizer = load_tokenizer(save(make(), tmp_path))
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(tokenizer, BPETokenizer)
    assert tokenizer.eos_token_id == 0
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == theirs(text)["input_ids"]


def test_token_that_no_merge_makes_is_left_to_hugging_face(tmp_path):
    save(byte_level(), tmp_path)
    edit(
        tmp_path / "tokenizer.json",
        lambda contents: contents["model"]["vocab"].update({"Ġxyzzy": 350}),
    )
    tokenizer = load_tokenizer(tmp_path)
    assert isinstance(tokenizer, HFTokenizer)
    assert 350 not in tokenizer.encode("a xyzzy")


def write_vocab_and_merges(folder: Path) -> None:
    folder.mkdir()
    model = json.loads(byte_level().to_str())["model"]
    (folder / "vocab.json").write_text(json.dumps(model["vocab"]), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in model["merges"]), ""]
    (folder / "merges.txt").write_text("\n".join(lines), encoding="utf-8")
    (folder / "config.json").write_text('{"model_type": "gpt2"}')


def test_vocab_json_and_merges_txt_are_read(tmp_path):
    write_vocab_and_merges(tmp_path / "old")
    expected = load_tokenizer(save(byte_level(), tmp_path / "new"))
    assert load_tokenizer(tmp_path / "old") == expected


def test_added_tokens_json_is_read(tmp_path):
    write_vocab_and_merges(tmp_path / "old")
    (tmp_path / "old/added_tokens.json").write_text('{"<|user|>": 350, "<|pad|>": 351}')
    (tmp_path / "old/special_tokens_map.json").write_text('{"eos_token": "<|pad|>"}')
    tokenizer = load_tokenizer(tmp_path / "old")
    theirs = AutoTokenizer.from_pretrained(tmp_path / "old")
    for text in TEXTS:
        assert tokenizer.encode(text).tolist() == theirs(text)["input_ids"]
    assert tokenizer.eos_token_id == theirs.eos_token_id


@pytest.mark.parametrize(
    "config", [{}, {"do_lower_case": False, "strip_accents": True, "tokenize_chinese_chars": False}]
)
def test_vocab_txt_of_berts_class_is_read(tmp_path, config):
    """The files of a Chinese GPT-2, uer/gpt2-chinese-cluecorpussmall."""
    save(bert_class(), tmp_path / "new")
    vocab = load_tokenizer(tmp_path / "new")._backend.get_vocab()
    old = tmp_path / "old"
    old.mkdir()
    (old / "vocab.txt").write_text("\n".join([*sorted(vocab, key=vocab.get), ""]), encoding="utf-8")
    (old / "config.json").write_text('{"model_type": "gpt2", "tokenizer_class": "BertTokenizer"}')
    (old / "tokenizer_config.json").write_text(json.dumps(config))
    tokenizer, theirs = load_tokenizer(old), AutoTokenizer.from_pretrained(old)
    for text in TEXTS:
        assert (
            tokenizer.encode(text).tolist() == theirs(text, add_special_tokens=False)["input_ids"]
        )
    assert tokenizer.decode(tokenizer.encode_prompt("star")[:1]) == "[CLS]"


# --- Folders that only transformers understands ---


def assert_equals_transformers(folder: Path) -> None:
    tokenizer, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.vocab_size == len(theirs)
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).tolist() == expected


@pytest.mark.parametrize(
    ("make", "config"),
    [
        (unigram, {"tokenizer_class": "LlamaTokenizer"}),
        (lambda: byte_level(use_regex=False), {"tokenizer_class": "GPT2Tokenizer"}),
        (lambda: byte_level(use_regex=False), {"tokenizer_class": None}),
        (bert_class, {"do_lower_case": False}),
        (with_added_tokens, {"pad_token": "star", "split_special_tokens": True}),
        (lambda: byte_level(add_prefix_space=True), {"add_prefix_space": False}),
        (byte_level, {"add_prefix_space": True}),
        (
            with_added_tokens,
            {"added_tokens_decoder": {"350": {"content": "<|user|>", "lstrip": True}}},
        ),
        (byte_level, {"extra_special_tokens": ["<b>"]}),
        (byte_level, {"additional_special_tokens": ["<b>"]}),
    ],
)
def test_tokenizer_config_json_is_understood_as_by_transformers(make, config, tmp_path):
    """In each folder, transformers does not take tokenizer.json as it is."""
    assert_equals_transformers(save(make(), tmp_path, **config))


@pytest.mark.parametrize(
    ("make", "model_type"),
    [
        (byte_level, "gpt_neo"),
        (lambda: byte_level(use_regex=False), "gpt_neo"),
        (lambda: byte_level(use_regex=False), "gpt_neox"),
        (bert_class, "bert"),
        (bert_class, "distilbert"),
        (word_piece, "bert"),
        (byte_fallback, "llama"),
        (split_regex, "llama"),
        (unigram, "xlm-roberta"),
    ],
)
def test_class_that_model_type_implies_is_used(make, model_type, tmp_path):
    save(make(), tmp_path, tokenizer_class=None)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    assert_equals_transformers(tmp_path)


def test_padding_token_that_transformers_adds_is_in_the_vocabulary(tmp_path):
    tokenizer = byte_level()
    save(tokenizer, tmp_path)
    size = tokenizer.get_vocab_size()
    tokenizer.enable_padding(pad_token="[NEW]")
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    assert load_tokenizer(tmp_path).vocab_size == size + 1
    assert_equals_transformers(tmp_path)


# --- Refusals ---


def test_without_transformers_the_command_that_installs_it_is_named(tmp_path, monkeypatch):
    save(word_piece(), tmp_path)
    monkeypatch.setitem(sys.modules, "transformers", None)  # import raises ImportError
    with pytest.raises(FolioError, match="pip install transformers"):
        load_tokenizer(tmp_path)


def test_our_own_kinds_need_no_transformers(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    for tokenizer in (CharTokenizer.from_text("ab\n"), toy_bpe()):
        save_tokenizer(tokenizer, tmp_path)
        (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
        assert load_tokenizer(tmp_path) == tokenizer


@pytest.mark.parametrize("model_type", ["gpt2", "evil"])
def test_code_in_a_folder_is_not_executed(model_type, tmp_path):
    save(byte_level(use_regex=False), tmp_path)
    config = {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    edit(tmp_path / "tokenizer_config.json", lambda contents: contents.update(config))
    (tmp_path / "config.json").write_text(json.dumps({"model_type": model_type}))
    marker = tmp_path / "executed"
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    with contextlib.suppress(FolioError):
        load_tokenizer(tmp_path)
    assert not marker.exists()
    with contextlib.suppress(AttributeError):
        AutoTokenizer.from_pretrained(tmp_path, trust_remote_code=True)
    assert marker.exists()  # the marker works


def test_random_merges_are_refused(tmp_path):
    save(byte_level(), tmp_path)
    edit(tmp_path / "tokenizer.json", lambda contents: contents["model"].update(dropout=0.1))
    with pytest.raises(FolioError, match="the ids of a text are random"):
        load_tokenizer(tmp_path)


def test_sparse_ids_are_refused(tmp_path):
    save(word_level(), tmp_path)
    edit(tmp_path / "tokenizer.json", lambda contents: contents["model"]["vocab"].update(x=2**31))
    with pytest.raises(FolioError, match="ids up to 2,147,483,648"):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer.json", "tokenizer_config.json"])
def test_any_mutated_file_is_understood_or_refused(name, tmp_path, n_trials):
    save(with_added_tokens(), tmp_path, eos_token=END)
    count = Count()

    @fuzz_settings(n_trials)
    @given(mutations(json.loads((tmp_path / name).read_text(encoding="utf-8"))))
    def check(contents):
        (tmp_path / name).write_text(json.dumps(contents), encoding="utf-8")
        count.inputs += 1
        try:
            tokenizer = load_tokenizer(tmp_path)
        except FolioError as error:
            assert "tokenizer" in str(error)
        else:
            count.accepted += 1
            assert isinstance(tokenizer.decode(tokenizer.encode("star<|user|>")), str)

    check()
    assert count.fraction_accepted() > 0.05
