"""Texts of one's own: files, folders, lines of JSON; documents, and what is held out of them."""

import json

import numpy as np
import pytest

from configurator import FolioError
from data import dataset as dataset_module
from data import prepare, prepare_text
from data.dataset import open_dataset
from data.prepare_text import is_held_out, last_cut, read_pieces
from tests.conftest import RHYME, ROOT, assert_one_line_error
from tests.test_tokenizer import toy_bpe

PLAY = (ROOT / "data" / "understudy.txt").read_text(encoding="utf-8")


@pytest.fixture
def prepared(tmp_path, monkeypatch, call):
    """What data.prepare_text does with these words; datasets go to tmp_path/data."""
    (tmp_path / "data").mkdir()
    for module in (dataset_module, prepare):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    return lambda *words: call(prepare_text, *map(str, words))


def text_of(stream, tokenizer) -> str:
    ids = stream.windows(np.array([0]), len(stream))[0]
    return tokenizer.decode(ids)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_one_document_is_cut_between_two_characters(prepared, tmp_path, tokenizer):
    (tmp_path / "play.txt").write_text(PLAY)
    result = prepared(
        tmp_path / "play.txt", "--dataset=play", f"--tokenizer={tokenizer}", "--vocab_size=400"
    )
    assert result.returncode == 0, result.stderr
    assert "python train.py" in result.stdout
    dataset = open_dataset("play", 8)
    train, val = (text_of(s, dataset.tokenizer) for s in (dataset.train, dataset.val))
    assert train + val == PLAY
    assert len(train) == int(len(PLAY) * 0.9)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_documents_are_parted_by_end_of_text_and_held_out_whole(prepared, tmp_path, tokenizer):
    (tmp_path / "texts" / "more").mkdir(parents=True)
    written = [f"{RHYME}number {i}" for i in range(20)]
    for i, text in enumerate(written):
        folder = tmp_path / "texts" / ("more" if i % 2 else "")
        (folder / f"{i:02}.txt").write_text(text)
    (tmp_path / "texts" / "picture.png").write_bytes(b"\x89PNG\0\0")
    (tmp_path / "texts" / ".hidden").write_text("secret")
    result = prepared(
        tmp_path / "texts", "--dataset=texts", f"--tokenizer={tokenizer}", "--vocab_size=300"
    )
    assert result.returncode == 0, result.stderr
    assert "1 binary" in result.stdout and "20 documents" in result.stdout
    dataset = open_dataset("texts", 8)
    parts = {}
    for name, stream in (("train", dataset.train), ("val", dataset.val)):
        assert stream.windows(np.array([len(stream) - 1]), 1).item() == (
            dataset.tokenizer.end_of_text
        )
        parts[name] = text_of(stream, dataset.tokenizer).split("<|endoftext|>")[:-1]
    assert len(parts["val"]) == 2
    assert sorted(parts["train"] + parts["val"]) == sorted(written)


def test_each_line_of_json_is_a_document(prepared, tmp_path):
    path = tmp_path / "chat.jsonl"
    texts = ["hi 🙂", "so long\nfarewell", "é", "bye " * 20]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    assert prepared(path, "--dataset=chat").returncode == 0
    dataset = open_dataset("chat", 4)
    train = text_of(dataset.train, dataset.tokenizer).split("<|endoftext|>")
    assert train == [*texts[:3], ""]
    assert_one_line_error(prepared(tmp_path, "--dataset=x/y"), "--dataset=x/y")
    path.write_text('{"text": "fine"}\n{"txet": "not"}\n')
    assert_one_line_error(prepared(path, "--dataset=bad"), "chat.jsonl:2")


def test_some_documents_are_held_out_and_always_one():
    assert [i for i in range(30) if is_held_out(i, 30, 0.1)] == [9, 19, 29]
    assert [i for i in range(3) if is_held_out(i, 3, 0.1)] == [2]


def test_reading_in_pieces_changes_neither_text_nor_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare_text, "PIECE", 997)
    text = PLAY[:20_000] + "日本 🙂🙂\r\n" * 300 + "\t  \n" * 400
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + text.encode())
    pieces = list(read_pieces(tmp_path / "text"))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    tokenizer = toy_bpe()
    ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
    assert ids.tolist() == tokenizer.encode(text).tolist()
    assert last_cut("a bc d") == 4
    assert last_cut("abc") == 3  # one enormous word has to be cut somewhere


def test_bad_input_is_one_clear_line(prepared, tmp_path):
    def refused(content: bytes, *flags: str):
        (tmp_path / "bad.txt").write_bytes(content)
        return prepared(tmp_path / "bad.txt", "--dataset=bad", *flags)

    assert_one_line_error(refused(b""), "no text")
    assert_one_line_error(refused(b"fine " * 300_000 + b"caf\xe9 au lait"), "offset 1,500,003")
    assert_one_line_error(refused(b"\x89PNG\xff\xfe\0"), "offset 0")
    assert_one_line_error(refused(b"low low", "--tokenizer=bpe", "--vocab_size=99"), "257")
    assert_one_line_error(refused(b"low low", "--tokenizer=bpe", "--vocab_size=999"), "at most")
    assert_one_line_error(refused(b"ab"), "too short")
    (tmp_path / "empty").mkdir()
    assert_one_line_error(prepared(tmp_path / "empty", "--dataset=bad"), "no text file")
    assert_one_line_error(prepared(tmp_path / "none", "--dataset=bad"), "none")
    assert_one_line_error(prepared("--dataset=bad"), "which text?")
    assert list((tmp_path / "data").iterdir()) == []


def test_a_dataset_of_that_name_moves_aside(prepared, tmp_path):
    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text(RHYME * 9 + name)
        result = prepared(tmp_path / f"{name}.txt", "--dataset=mine")
    assert "mine.1" in result.stdout
    assert sorted(p.name for p in (tmp_path / "data").iterdir()) == ["mine", "mine.1"]


def test_half_a_character_is_refused_with_its_line(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text('{"text": "whole"}\n{"text": "half \\ud83d"}\n')
    with pytest.raises(FolioError, match=r"texts.jsonl:2:"):
        list(prepare_text.lines_of_json(path))
