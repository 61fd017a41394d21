"""From a text to a dataset's folder."""

import errno
import hashlib
import os
import shlex
import threading

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers

from configurator import ROOT, FolioError
from data import dataset as dataset_module
from data import prepare
from data.dataset import open_dataset, read_meta
from data.prepare import (
    check_tokenizer_type,
    dataset_folder,
    dataset_lock,
    make_tokenizer,
    read_text,
    split_text,
    summary,
    train_command,
    write_dataset,
)
from data.tokenizer import CharTokenizer, load_tokenizer, save_tokenizer
from tests.test_documents import posix_only
from tests.test_hf_tokenizer import save
from tests.test_tokenizer import toy_bpe

LINE = "to be or not to be\n"

# --- Texts ---


def test_a_text_keeps_its_newlines_and_loses_its_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffa\r\nb👍\n".encode())
    assert read_text(str(path)) == "a\nb👍\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"abc\xff", r"offset 3\)"),
        (b"", "no text"),
        (b" \n\n", "no text"),
        (None, "cannot read .*No such file"),
    ],
)
def test_a_file_without_text_is_refused(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FolioError, match=message):
        read_text(path)


def test_the_last_tenth_is_for_validation():
    assert split_text("abcdefghij") == {"train": ["abcdefghi"], "val": ["j"]}
    train, val = (len(part[0]) for part in split_text("x" * 1_115_394).values())
    assert (train, val) == (1_003_854, 111_540)


# --- The tokenizer ---


def test_the_characters_of_all_texts_are_the_vocabulary():
    tokenizer = make_tokenizer("char", iter(["hello", "world"]), vocab_size=0)
    assert tokenizer == CharTokenizer("dehlorw")
    assert make_tokenizer("char", ["a"], 0, add_eos=True).eos_token_id == 1


def test_the_tokenizer_of_a_folder_is_used_unchanged(tmp_path):
    prepared(tmp_path / "first", LINE * 9)
    tokenizer = make_tokenizer(str(tmp_path / "first"), ["not to"], vocab_size=0)
    assert tokenizer == CharTokenizer.from_text(LINE)


def test_characters_that_the_folder_lacks_are_named(tmp_path):
    prepared(tmp_path / "first", LINE * 9)
    with pytest.raises(FolioError, match="lacks 2 characters of the text: 'x', 'é'; replace"):
        make_tokenizer(str(tmp_path / "first"), ["noté", "x"], vocab_size=0)


@pytest.mark.parametrize("name", ["words", "bqe", "a\0b"])
def test_an_unknown_tokenizer_is_refused(name):
    with pytest.raises(FolioError, match="not a valid path" if "\0" in name else "char, gpt2, bpe"):
        check_tokenizer_type(name)


# --- The folder ---


def prepared(folder, text, **source_meta):
    sha256 = hashlib.sha256(text.encode()).hexdigest()
    source_meta = {"source": "a test", "sha256": sha256, **source_meta}
    return write_dataset(folder, CharTokenizer.from_text(text), split_text(text), source_meta)


def test_a_vocabulary_of_more_than_16_bits_is_stored_as_uint32(tmp_path):
    code_points = [*range(32, 0xD800), *range(0xE000, 0x20000)]
    text = "".join(map(chr, code_points))
    meta = prepared(tmp_path / "wide", text)
    assert meta["dtype"] == "uint32"
    dataset = open_dataset(str(tmp_path / "wide"), 8)
    ids = dataset.val.windows(np.array([dataset.val.num_windows(9) - 1]), 9)[0]
    assert dataset.tokenizer.decode(ids) == text[-9:]


def test_none_is_the_end_of_a_document(tmp_path):
    def train_tokens(name, tokenizer):
        splits = {"train": ["low", None, "er", None], "val": ["lower low"]}
        write_dataset(tmp_path / name, tokenizer, splits, {})
        return np.fromfile(tmp_path / name / "train.bin", "<u2").tolist()

    bpe = toy_bpe()
    expected = [*bpe.encode("low"), bpe.eos_token_id, *bpe.encode("er"), bpe.eos_token_id]
    assert train_tokens("bpe", bpe) == expected
    # Characters without an end-of-text token: a newline, if there is one.
    assert train_tokens("newline", CharTokenizer("\n elorw")) == [3, 4, 6, 0, 2, 5, 0]
    assert train_tokens("none", CharTokenizer(" elorw")) == [2, 3, 5, 1, 4]


def test_an_existing_dataset_is_renamed(tmp_path, capsys):
    folder = tmp_path / "mine"
    for text in (LINE, "to be\n", "that is the question\n"):
        prepared(folder, text * 9)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "mine.1", "mine.2"]
    assert f"renamed the existing dataset to {folder}.2\n" in capsys.readouterr().out


def test_an_equal_dataset_is_kept_as_it_is(tmp_path, capsys):
    """A run on it, which remembers its path and its tokens, is not disturbed."""
    folder = tmp_path / "mine"
    prepared(folder, LINE * 9)
    prepared(folder, LINE * 9)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    assert "already holds this dataset" in capsys.readouterr().out
    (folder / "train_000001.bin").write_bytes(b"\0\0")  # a shard that was added
    prepared(folder, LINE * 9)
    assert (tmp_path / "mine.1" / "train_000001.bin").exists()
    assert not (folder / "train_000001.bin").exists()


def test_a_folder_that_is_no_dataset_is_refused_before_the_text_is_read(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "input.txt").write_text("my own text")
    texts = map(pytest.fail, ["the text was read"])
    with pytest.raises(FolioError, match="exists and is not a dataset"):
        write_dataset(tmp_path / "mine", CharTokenizer("ab"), {"train": texts}, {})


@posix_only
def test_a_dataset_may_be_a_link_to_a_folder_elsewhere(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset_module, "DATA_DIR", tmp_path / "data")
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mine").symlink_to(tmp_path / "disk" / "mine")
    for text in (LINE, LINE.upper()):
        prepared(dataset_folder("mine"), text * 9)
    assert (tmp_path / "data" / "mine").is_symlink()
    assert sorted(path.name for path in (tmp_path / "disk").iterdir()) == ["mine", "mine.1"]


def test_a_full_stdout_does_not_undo_the_preparation(tmp_path, monkeypatch):
    prepared(tmp_path / "mine", LINE * 9)

    def fail(*_) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("builtins.print", fail)
    with pytest.raises(OSError, match="No space left"):
        prepared(tmp_path / "mine", LINE * 10)
    assert read_meta(tmp_path / "mine")["train_tokens"] == 171  # 0.9 * 10 * 19 characters
    assert read_meta(tmp_path / "mine.1")["train_tokens"] == 153


@pytest.mark.parametrize("name", ["meta.json", "train.bin"])
def test_a_corrupt_dataset_can_be_prepared_again(tmp_path, name):
    folder = tmp_path / "mine"
    prepared(folder, LINE * 9)
    (folder / name).write_text("[") if name == "meta.json" else (folder / name).unlink()
    prepared(folder, LINE * 9)
    assert len(open_dataset(str(folder), 8).train) == 153


def test_a_text_without_a_hash_is_identified_by_its_tokens(tmp_path):
    metas = [
        write_dataset(tmp_path / name, CharTokenizer("abc"), {"train": [text], "val": ["ab"]}, {})
        for name, text in (("one", "abc"), ("same", "abc"), ("other", "abb"))
    ]
    assert metas[0] == metas[1] != metas[2]


def test_a_folder_that_is_no_dataset_is_never_renamed(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").touch()
    with pytest.raises(FolioError, match="is not a dataset"):
        prepared(tmp_path / "mine", LINE * 9)
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]


def test_an_empty_folder_may_become_a_dataset(tmp_path):
    (tmp_path / "mine").mkdir()
    prepared(tmp_path / "mine", LINE * 9)
    assert (tmp_path / "mine" / "train.bin").exists()


def test_a_tokenizer_that_cannot_be_saved_as_it_is_makes_no_dataset(tmp_path, monkeypatch):
    def save_another(_, folder):
        save_tokenizer(CharTokenizer.from_text("ab"), folder)

    monkeypatch.setattr(prepare, "save_tokenizer", save_another)
    with pytest.raises(FolioError, match="changes when it is saved"):
        prepared(tmp_path / "set", LINE * 9)
    assert not any(tmp_path.iterdir())


def test_a_vocabulary_that_lacks_characters_of_the_text_is_told(tmp_path, capsys):
    backend = tokenizers.Tokenizer(models.WordLevel({"to": 0, "be": 1, "?": 2}, unk_token="?"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = load_tokenizer(save(backend, tmp_path / "words"))
    write_dataset(tmp_path / "mine", tokenizer, {"train": [LINE * 9], "val": ["to be"]}, {})
    output = capsys.readouterr().out
    assert "tokens of the train split stand for " in output
    assert "bytes fewer than its text: the vocabulary lacks characters" in output
    assert "val split" not in output


def test_a_tokenizer_that_changes_the_text_is_told(tmp_path, capsys):
    """BERT's turns "Ä  B " (6 bytes) into a and b, each 2 bytes with the space between words."""
    vocab = {"a": 0, "b": 1, "[UNK]": 2}
    backend = tokenizers.Tokenizer(models.WordPiece(vocab, unk_token="[UNK]"))
    backend.normalizer = normalizers.BertNormalizer()
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece()
    tokenizer = load_tokenizer(save(backend, tmp_path / "pieces"))
    splits = {"train": ["a b " * 999], "val": ["Ä  B " * 999]}
    write_dataset(tmp_path / "mine", tokenizer, splits, {})
    output = capsys.readouterr().out
    assert "train split" not in output
    assert "tokens of the val split stand for 1,998 bytes fewer than its text" in output
    one_unknown_word = "a b " * 9999 + "señores "
    splits = {"train": [one_unknown_word], "val": ["a b "]}
    write_dataset(tmp_path / "other", tokenizer, splits, {})
    assert "tokens of the train split stand for 3 bytes fewer" in capsys.readouterr().out

    backend = tokenizers.Tokenizer(models.BPE({"a": 0, "b": 1}, []))  # it leaves out a "#"
    backend.decoder = decoders.Fuse()
    tokenizer = load_tokenizer(save(backend, tmp_path / "bytes"))
    splits = {"train": ["ab#", "ba", "b#"], "val": ["ab"]}
    write_dataset(tmp_path / "third", tokenizer, splits, {})
    assert "tokens of the train split stand for 2 bytes fewer" in capsys.readouterr().out


def test_a_text_that_leaves_nothing_for_validation_is_too_short(tmp_path):
    with pytest.raises(FolioError, match="too short"):
        prepared(tmp_path / "mine", "ab")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FolioError, match="cannot write this dataset"):
        prepared(tmp_path / "file" / "mine", LINE * 9)


@pytest.mark.parametrize("name", [".", "..", "../x", "/tmp/x", "a/b", ".hidden", "a\0b", "\ud83d"])
def test_a_dataset_cannot_be_written_elsewhere(name):
    with pytest.raises(FolioError, match=r"--dataset|not a valid path"):
        dataset_folder(name)


def test_a_missing_dataset_name_is_asked_for():
    with pytest.raises(FolioError, match="--dataset=NAME is missing"):
        dataset_folder("")


def test_a_second_preparation_of_a_dataset_waits_for_the_first(tmp_path, capsys):
    finished = threading.Event()

    def second():
        with dataset_lock(tmp_path / "mine"):
            finished.set()

    with dataset_lock(tmp_path / "mine"):
        thread = threading.Thread(target=second)
        thread.start()
        assert not finished.wait(0.3)
    thread.join()
    assert finished.is_set()
    assert capsys.readouterr().out.count("another process is preparing") == 1


# --- Output ---


def test_the_summary_fits_80_columns_whatever_the_numbers():
    meta = {"train_tokens": 9_035_582_198, "val_tokens": 99_434_897, "vocab_size": 250_257}
    path, *lines = summary("data/mine", meta, "12,345,678 documents").splitlines()
    assert path == "data/mine"
    assert max(map(len, lines)) <= 80
    assert "9,035,582,198 training tokens, 99,434,897 validation tokens" in lines[1]


# --- The next command ---


def test_the_training_command_works_in_this_folder_and_in_others(tmp_path, monkeypatch):
    meta = {"train_tokens": 9000, "val_tokens": 1000}
    flags = ["--dataset=my text", "--out_dir=out/my text"]
    monkeypatch.chdir(ROOT)
    here = train_command("shakespeare_char", meta, flags)
    assert here == "python train.py config/shakespeare_char.py '--dataset=my text' " + (
        "'--out_dir=out/my text'"
    )
    monkeypatch.chdir(tmp_path)
    _, program, config, *_ = shlex.split(train_command("shakespeare_char", meta, flags))
    assert program == str(ROOT / "train.py")
    assert config == str(ROOT / "config" / "shakespeare_char.py")


@pytest.mark.parametrize(("val_tokens", "block_size"), [(129, None), (128, 127), (20, 19)])
def test_the_training_command_shortens_the_context_for_short_texts(val_tokens, block_size):
    meta = {"train_tokens": 9000, "val_tokens": val_tokens}
    words = shlex.split(train_command("shakespeare_char", meta, []))  # block_size = 128
    assert words[3:] == ([] if block_size is None else [f"--block_size={block_size}"])
    assert prepare.plural(1, "file") == "1 file" and prepare.plural(2000, "file") == "2,000 files"
