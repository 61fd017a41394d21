"""Documents from text files, folders, .jsonl files."""

import errno
import itertools
import json
import os
import random
import sys

import numpy as np
import pytest

from configurator import FolioError
from data import documents
from data.documents import find_files, last_safe_cut, read_documents, read_pieces, split_documents
from tests.conftest import SHAKESPEARE
from tests.test_tokenizer import toy_bpe

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")


def texts_in(*paths, **options) -> list[str]:
    files = find_files(paths)
    return ["".join(document) for document in read_documents(files, **options)]


# --- Which files ---


def test_a_folder_gives_its_visible_text_files_sorted_and_names_the_others(tmp_path, capsys):
    for name in ("b.txt", "a/z.md", "a/no_suffix", ".hidden", ".git/config"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "picture.png").write_bytes(b"\x89PNG\0\0")
    assert texts_in(tmp_path) == ["a/no_suffix", "a/z.md", "b.txt"]
    assert capsys.readouterr().out == f"{tmp_path}: skipped 1 (not text files): picture.png\n"
    for i in range(11):
        (tmp_path / f"table{i:02}.csv").write_text("a,b\n")
    texts_in(tmp_path)
    out = capsys.readouterr().out
    assert "skipped 12 (not text files): picture.png, table00.csv, " in out
    assert out.endswith("table08.csv and 2 more\n")


@posix_only
def test_a_file_that_is_given_twice_or_linked_is_read_once(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.txt").symlink_to(tmp_path / "a.txt")
    os.link(tmp_path / "a.txt", tmp_path / "c.txt")
    assert texts_in(tmp_path / "a.txt", tmp_path, tmp_path / "a.txt") == ["a"]
    names = ", ".join(f"{tmp_path / name}.txt = {tmp_path / 'a.txt'}" for name in "abca")
    assert capsys.readouterr().out == f"skipped 4 (each text is read once): {names}\n"


def test_a_copy_of_a_file_is_skipped_and_named_but_no_empty_file(tmp_path, capsys):
    contents = {"a (1).txt": "one", "a.txt": "one", "b.txt": "two", "c/a.txt": "one"}
    (tmp_path / "c").mkdir()
    for name, content in {**contents, "d.txt": "", "e.txt": ""}.items():
        (tmp_path / name).write_text(content)
    assert texts_in(tmp_path) == ["one", "two"]
    copies, first = (tmp_path / "a.txt", tmp_path / "c" / "a.txt"), tmp_path / "a (1).txt"
    names = ", ".join(f"{copy} = {first}" for copy in copies)
    assert capsys.readouterr().out == f"skipped 2 (each text is read once): {names}\n"


@posix_only
def test_links_in_a_folder_that_are_not_followed_are_named(tmp_path, capsys):
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "a.txt").write_text("a")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "texts" / "folder").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "texts" / "lost.txt").symlink_to(tmp_path / "nothing")
    assert texts_in(tmp_path / "texts") == ["a"]
    assert "skipped 2 (not text files): folder, lost.txt\n" in capsys.readouterr().out


@posix_only
def test_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(FolioError, match="pipe: a pipe can be read only once"):
        texts_in(tmp_path / "pipe")


def test_nul_bytes_behind_the_beginning_of_a_text_are_refused(tmp_path):
    """An incomplete download, or a crash, may have filled the end of a file with zeros."""
    (tmp_path / "text").write_bytes(b"To be " * 9000 + bytes(1000))
    with pytest.raises(FolioError, match="text: contains NUL bytes"):
        texts_in(tmp_path / "text")


def test_an_unreadable_folder_is_named(tmp_path, monkeypatch):
    def refuse(path):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(FolioError, match=f"{tmp_path}: cannot read this folder .Permission denied"):
        find_files([tmp_path])


def test_a_missing_file_and_a_folder_without_texts_are_one_line(tmp_path):
    with pytest.raises(FolioError, match="none: no such file or folder"):
        texts_in(tmp_path / "none")
    with pytest.raises(FolioError, match="no text files found"):
        texts_in(tmp_path)


# --- Other formats ---


@pytest.mark.parametrize(
    ("name", "advice"),
    [
        ("table.csv", "pandas.read_csv('{}/table.csv', "), ("rows.JSON", "pandas.read_json('"),
        ("verse.ZIP", "unpack it: python -m zipfile -e {}/verse.ZIP {}/verse"),
        ("verse.txt.gz", "unpack it: gunzip --keep {}/verse.txt.gz"),
        ("verse.rtf", "save it as plain text"), ("page.HTML", "save it as plain text"),
    ],
)  # fmt: skip
def test_a_file_of_another_format_is_refused_with_advice(tmp_path, name, advice):
    (tmp_path / name).write_text("a verse")
    with pytest.raises(FolioError, match=f"{name}: not a text file; ") as caught:
        texts_in(tmp_path / name)
    assert advice.replace("{}", str(tmp_path)) in str(caught.value)


# --- Documents ---


@pytest.mark.parametrize("piece_bytes", [2**20, 1])
def test_line_ends_of_windows_become_newlines_and_such_a_copy_is_a_copy(
    tmp_path, monkeypatch, capsys, piece_bytes
):
    """As in prompts. Else the model would not know the newline of a prompt."""
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    (tmp_path / "a.txt").write_bytes(b"one\ntwo\n")
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n")
    assert texts_in(tmp_path) == ["one\ntwo\n"]
    assert "windows.txt" in capsys.readouterr().out
    (tmp_path / "b.jsonl").write_text('{"text": "one\\r\\ntwo"}\n')
    assert texts_in(tmp_path / "b.jsonl") == ["one\ntwo"]
    (tmp_path / "old_mac.txt").write_bytes(b"one\rtwo")
    assert texts_in(tmp_path / "old_mac.txt") == ["one\ntwo"]


@pytest.mark.parametrize("newline", ["\n", "\r\n"])
@pytest.mark.parametrize("name", ["chat.jsonl", "chat.ndjson", "CHAT.JSONL", "chat.jsonlines"])
def test_each_line_of_json_is_a_document(tmp_path, name, newline):
    texts = ["hi 🙂", "so long\nfarewell", "é\u2028"]
    lines = [json.dumps({"text": text}, ensure_ascii=False) for text in texts]
    content = "\ufeff" + lines[0] + newline + " \t" + newline + newline.join(lines[1:])
    (tmp_path / name).write_bytes(content.encode())
    assert texts_in(tmp_path / name) == texts


@pytest.mark.parametrize("name", ["part-00000", "c4.json"])
def test_a_first_line_of_json_tells_of_lines_of_json(tmp_path, name):
    (tmp_path / name).write_text('{"text": "a"}\n{"text": "b"}\n')
    assert texts_in(tmp_path / name) == ["a", "b"]
    book = "a line\n" * 200_000  # longer than a piece
    lines = f'\n{json.dumps({"text": book})}\n{{"text": "b"}}\n'
    (tmp_path / name).write_text(lines)
    assert texts_in(tmp_path / name) == [book, "b"]
    (tmp_path / "part-00001").write_text('{"text", he said.\n')
    assert texts_in(tmp_path / "part-00001") == ['{"text", he said.\n']


def test_json_files_in_a_folder_are_skipped_as_settings(tmp_path, capsys):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "info.json").write_text('{"source": "a book"}\n')
    assert texts_in(tmp_path) == ["a"]
    assert "skipped 1 (not text files): info.json" in capsys.readouterr().out


def test_the_key_of_the_text_can_be_given(tmp_path):
    (tmp_path / "a.jsonl").write_text('{"content": "yes", "text": "no"}\n')
    assert texts_in(tmp_path / "a.jsonl", json_key="content") == ["yes"]


@pytest.mark.parametrize(
    "line",
    [
        "plain text", '{"txet": "a"}', '["a"]', '{"text": 3}', '{"text": null}', '{"text": ["a"]}',
        '{"text": "cut', '{"text": "\\ud83d"}', "[" * 9999,
    ],
)  # fmt: skip
def test_a_line_without_a_text_is_named(tmp_path, line):
    (tmp_path / "a.jsonl").write_text('{"text": "fine"}\n' + line + "\n")
    with pytest.raises(FolioError, match=r"a\.jsonl:2: not a line like .*--json_key=KEY.*chat"):
        texts_in(tmp_path / "a.jsonl")


def test_a_line_that_is_not_utf8_is_called_so(tmp_path):
    (tmp_path / "a.jsonl").write_bytes('{"text": "café"}\n'.encode("latin-1"))
    with pytest.raises(FolioError, match=r"a\.jsonl: not UTF-8 text"):
        texts_in(tmp_path / "a.jsonl")


@pytest.mark.parametrize("separator", ["\n\n", "ab", "aa"])
def test_a_separator_is_found_wherever_the_pieces_are_cut(separator):
    rng = random.Random(0)
    for _ in range(300):
        text = "".join(rng.choices("ab\n", k=30))
        cuts = sorted(rng.sample(range(31), k=4))
        pieces = [text[i:j] for i, j in itertools.pairwise([0, *cuts, 30])]
        expected = [document for document in text.split(separator) if document.strip()]
        assert list(split_documents(pieces, separator)) == expected


@pytest.mark.parametrize("piece_bytes", [2**20, 7])
def test_a_separator_divides_a_file_into_documents(tmp_path, monkeypatch, piece_bytes):
    monkeypatch.setattr(documents, "PIECE_BYTES", piece_bytes)
    (tmp_path / "a.txt").write_text("one two<|end|>\n<|end|>three four\nfive<|end|>")
    assert texts_in(tmp_path / "a.txt", separator="<|end|>") == ["one two", "three four\nfive"]
    (tmp_path / "b.txt").write_text("one\ntwo\n\nthree\n\n\n\nfour")
    assert texts_in(tmp_path / "b.txt", separator="\n\n") == ["one\ntwo", "three", "four"]
    (tmp_path / "windows.txt").write_bytes(b"one\r\ntwo\r\n\r\nthree\r\n")
    assert texts_in(tmp_path / "windows.txt", separator="\n\n") == ["one\ntwo", "three\n"]


@pytest.mark.skipif(not SHAKESPEARE.exists(), reason="Shakespeare is not on this machine")
def test_reading_in_pieces_changes_neither_the_text_nor_its_token_ids(tmp_path, monkeypatch):
    monkeypatch.setattr(documents, "PIECE_BYTES", 997)
    play = SHAKESPEARE.read_text(encoding="utf-8")[:20_000]
    text = play + "日本 🙂🙂\r\n" * 300 + "\t  \n" * 400
    (tmp_path / "text").write_bytes(b"\xef\xbb\xbf" + text.encode())
    text = text.replace("\r\n", "\n")
    pieces = list(read_pieces(tmp_path / "text"))
    assert len(pieces) > 10
    assert "".join(pieces) == text
    tokenizer = toy_bpe()
    ids = np.concatenate([tokenizer.encode(piece) for piece in pieces])
    assert ids.tolist() == tokenizer.encode(text).tolist()


def test_a_cut_is_before_white_space():
    assert last_safe_cut("a bc d") == last_safe_cut("a bc  d") == 4
    assert (
        last_safe_cut("{} {}\x1e") == 2
    )  # U+001E is white space in Python, not in GPT-2's pattern
    assert last_safe_cut("abc") == 3  # one very long word must be cut somewhere


def test_invalid_utf8_is_named_with_its_offset_in_the_file(tmp_path):
    (tmp_path / "bad.txt").write_bytes(b"fine " * 300_000 + b"caf\xe9 au lait")
    with pytest.raises(FolioError, match=r"bad.txt: not UTF-8 text .*offset 1,500,003"):
        texts_in(tmp_path / "bad.txt")
