"""Tiny Shakespeare, and the replacement text that is used when it cannot be downloaded."""

import functools
import hashlib
import json
import lzma
import shutil
from pathlib import Path

import filelock
import pytest

import prepare_shakespeare as program
import train
from data import dataset as dataset_module
from data import shakespeare
from data.shakespeare import (
    REPLACEMENT_TEXT,
    SHA256,
    ensure_shakespeare,
    prepare_shakespeare,
    replacement_warning,
)
from tests import processes
from tests.conftest import SHAKESPEARE, assert_one_line_error
from tests.test_download import Server

needs_shakespeare = pytest.mark.skipif(
    not SHAKESPEARE.exists(), reason="Shakespeare is not on this machine"
)
LINE = "to be or not to be\n"


@pytest.fixture(autouse=True)
def no_network(data_folder, monkeypatch):
    """Each test has an empty data/ folder, and no network."""
    monkeypatch.setattr(shakespeare, "URL", "http://127.0.0.1:9/input.txt")


@pytest.fixture
def server(monkeypatch) -> Server:
    """A server with a short text that counts as Shakespeare."""
    server = Server("whole")
    server.body = b"the right text\n" * 99
    monkeypatch.setattr(shakespeare, "URL", server.url)
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(server.body).hexdigest())
    return server


def source_of(data_folder) -> str:
    return json.loads((data_folder / "shakespeare_char" / "meta.json").read_text())["source"]


# --- Shakespeare ---


@needs_shakespeare
def test_shakespeare_has_65_characters_and_a_known_hash(data_folder):
    meta = prepare_shakespeare("char", "shakespeare_char", SHAKESPEARE)
    assert (meta["train_tokens"], meta["val_tokens"]) == (1_003_854, 111_540)
    assert (meta["vocab_size"], meta["sha256"]) == (65, SHA256)
    assert json.loads((data_folder / "shakespeare_char" / "meta.json").read_text()) == meta
    assert (data_folder / "shakespeare" / "input.txt").read_bytes() == SHAKESPEARE.read_bytes()


def test_the_text_is_downloaded_once_for_all_tokenizers(data_folder, server):
    (data_folder / "shakespeare").mkdir()
    (data_folder / "shakespeare" / "input.txt").write_text("a text of the user")  # is renamed
    assert prepare_shakespeare("char", "shakespeare_char")["source"] == "tiny Shakespeare"
    kept = data_folder / "shakespeare" / "input.txt.1"
    assert kept.read_text() == "a text of the user"
    assert (data_folder / "shakespeare" / "input.txt").read_bytes() == server.body
    prepare_shakespeare("bpe", "shakespeare_bpe", vocab_size=262)
    assert server.num_requests == 1


def test_another_text_is_prepared_from_a_file(tmp_path):
    (tmp_path / "mine.txt").write_text(LINE * 9)
    meta = prepare_shakespeare("char", "mine", str(tmp_path / "mine.txt"))
    assert meta["source"].endswith("mine.txt")
    assert (meta["train_characters"], meta["val_characters"]) == (153, 18)
    assert replacement_warning(meta) == ""


def test_a_text_is_prepared_in_the_vocabulary_of_a_folder(data_folder, tmp_path, call):
    (tmp_path / "mine.txt").write_text(LINE * 9)
    prepare_shakespeare("char", "first", tmp_path / "mine.txt")
    (tmp_path / "short.txt").write_text("not to be" * 9)
    flags = (f"--input_file={tmp_path / 'short.txt'}", f"--tokenizer={data_folder / 'first'}")
    result = call(program, *flags)
    assert result.returncode == 0, result.stderr
    names = ("first", "shakespeare_first")
    first, second = ((data_folder / name / "tokenizer.json").read_bytes() for name in names)
    assert first == second


def test_a_home_folder_in_the_input_file_is_expanded(tmp_path, call, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    (tmp_path / "mine.txt").write_text(LINE * 9)
    result = call(program, "--input_file=~/mine.txt", "--dataset=mine")
    assert result.returncode == 0, result.stderr
    assert (
        "vocabulary of 8 tokens\n    153 training tokens, 18 validation tokens\n" in result.stdout
    )


def test_a_mistake_is_one_line(tmp_path, call):
    prepare = functools.partial(call, program)
    assert_one_line_error(prepare(f"--input_file={tmp_path / 'none.txt'}"), "none.txt")
    assert_one_line_error(prepare("--tokenizer=words"), "char, gpt2, bpe, or the folder")
    assert_one_line_error(prepare("--input=x.txt"), "input_file")
    (tmp_path / "text").write_text(LINE * 9)
    assert_one_line_error(prepare(f"--input_file={tmp_path / 'text'}", "--dataset=../x"), "../x")
    for name in ("chat.jsonl", "table.csv", "text.txt.gz"):
        (tmp_path / name).write_text('{"text": "braces are no prose"}')
        refused = prepare(f"--input_file={tmp_path / name}", "--dataset=mine")
        assert_one_line_error(refused, f"{name}: not a text file", "data.prepare_text")


# --- Several starts at once ---


def start_with_fresh_data(data_folder: Path, url: str, body: bytes) -> None:
    """What train.py does first, in another process."""
    dataset_module.DATA_DIR = data_folder
    shakespeare.URL = url
    shakespeare.SHA256 = hashlib.sha256(body).hexdigest()
    ensure_shakespeare("shakespeare_char")


def test_several_starts_in_a_fresh_clone_download_and_prepare_once(data_folder, server):
    server.pause = 0.5  # seconds before the answer: all processes have started by then
    arguments = (data_folder, server.url, server.body)
    result = processes.start(*[(start_with_fresh_data, arguments, {})] * 3).wait()
    assert result.exit_codes == [0, 0, 0], result.stderr
    assert server.num_requests == 1
    assert result.stdout.count("downloading tiny Shakespeare") == 1
    assert result.stdout.count("another process is preparing") == 2
    assert source_of(data_folder) == "tiny Shakespeare"


def test_one_process_at_a_time_writes_the_text_for_other_tokenizers(
    data_folder, server, tmp_path, monkeypatch
):
    (tmp_path / "mine.txt").write_bytes(server.body)
    cached, atomic_write = data_folder / "shakespeare" / "input.txt", shakespeare.atomic_write

    def write_and_try_the_lock(path: Path):
        with pytest.raises(filelock.Timeout):
            filelock.FileLock(cached.with_name(".input.txt.lock")).acquire(timeout=0)
        return atomic_write(path)

    monkeypatch.setattr(shakespeare, "atomic_write", write_and_try_the_lock)
    prepare_shakespeare("char", "mine", tmp_path / "mine.txt")
    assert cached.read_bytes() == server.body


def test_an_existing_dataset_is_not_prepared_again(data_folder):
    (data_folder / "shakespeare_char").mkdir()
    ensure_shakespeare("shakespeare_char")
    assert list((data_folder / "shakespeare_char").iterdir()) == []


# --- The replacement text ---


def test_without_a_network_the_replacement_text_is_used_and_named(data_folder, call):
    result = call(program)
    assert result.returncode == 0, result.stderr
    assert "download failed: no connection to 127.0.0.1:9" in result.stdout
    assert "WARNING  Shakespeare could not be downloaded" in result.stdout
    assert source_of(data_folder) == "the replacement text"


def test_train_py_prepares_shakespeare_if_it_is_missing_and_prints_the_warning(
    data_folder, call, tmp_path
):
    result = call(
        train, f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--max_iters=1", "--n_layer=1",
        "--warmup_iters=0", "--n_head=1", "--n_embd=8", "--block_size=8", "--eval_tokens=64",
        "--sample_tokens=0",
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("A replacement text is used") == 1
    assert (data_folder / "shakespeare_char" / "train.bin").exists()


@needs_shakespeare
def test_shakespeare_takes_the_place_of_the_replacement_text(data_folder, monkeypatch):
    prepare_shakespeare("char", "shakespeare_char")
    assert source_of(data_folder) == "the replacement text"
    prepare_shakespeare("char", "shakespeare_char", SHAKESPEARE)
    assert source_of(data_folder) == "tiny Shakespeare"
    prepare_shakespeare("char", "shakespeare_char")  # without a network, from the cache
    assert source_of(data_folder) == "tiny Shakespeare"
    for name in ("shakespeare", "shakespeare_char"):
        shutil.rmtree(data_folder / name)
    server = Server("whole")
    server.body = SHAKESPEARE.read_bytes()
    monkeypatch.setattr(shakespeare, "URL", server.url)
    assert prepare_shakespeare("char", "shakespeare_char")["sha256"] == SHA256
    assert source_of(data_folder) == "tiny Shakespeare"


def test_the_warning_fits_80_columns_and_names_the_command_for_this_dataset():
    for tokenizer, command in (
        ("char", "python prepare_shakespeare.py"),
        ("bpe", "python prepare_shakespeare.py --tokenizer=bpe"),
    ):
        meta = prepare_shakespeare(tokenizer, f"shakespeare_{tokenizer}", vocab_size=300)
        lines = replacement_warning(meta).splitlines()
        assert lines[-1].strip() == command
        assert max(map(len, lines)) <= 80
    warning = replacement_warning({**meta, "tokenizer": "out/my run"})
    assert warning.endswith("python prepare_shakespeare.py '--tokenizer=out/my run'")


def test_the_replacement_text_is_a_play_without_repetition():
    text = REPLACEMENT_TEXT.read_text(encoding="utf-8")
    assert len(text) >= 150 * 1024
    assert text.isascii()
    speeches = [speech.split("\n") for speech in text.rstrip("\n").split("\n\n")]
    for name, *lines in speeches:
        assert name.isupper() and name.endswith(":") and lines, name
    assert len({name for name, *_ in speeches}) >= 60
    lines = [line for _, *rest in speeches for line in rest]
    assert len(set(lines)) == len(lines)
    assert len(lzma.compress(text.encode(), preset=9)) > 0.33 * len(text)  # Shakespeare: 0.36
