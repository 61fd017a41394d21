"""From a text to a dataset's folder, and from a server to a file one can be sure of."""

import functools
import hashlib
import http.server
import json
import lzma
import shutil
import sys
import threading
import time

import numpy as np
import pytest

import prepare_shakespeare as prepare_shakespeare_script
import train
from configurator import FolioError
from data import dataset as dataset_module
from data import download as download_module
from data import prepare, shakespeare
from data.dataset import open_dataset
from data.download import DownloadError, download
from data.prepare import dataset_folder, read_text, split_text, write_dataset
from data.shakespeare import SHA256, prepare_shakespeare, understudy_notice
from data.tokenizer import CharTokenizer
from tests.conftest import REAL, ROOT, assert_one_line_error
from training import run as run_module

BODY = bytes(range(256)) * 1600  # 409,600 bytes
CUT = 200_000  # where a transfer breaks off
ARRIVED = 3 * 2**16  # the whole chunks before that
SHA = hashlib.sha256(BODY).hexdigest()


# --- Downloads ---


class Server(http.server.ThreadingHTTPServer):
    """A real server on loopback that misbehaves as told: one plan for each request."""

    def __init__(self, *plans):
        super().__init__(("127.0.0.1", 0), Handler)
        self.plans = list(plans)
        self.body = BODY
        self.requests = []  # the Range header of each
        self.daemon_threads = True
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/file"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        server = self.server
        server.requests.append(self.headers.get("Range"))
        plan = server.plans.pop(0) if len(server.plans) > 1 else server.plans[0]
        start = int((self.headers.get("Range") or "bytes=0-")[6:-1])
        if isinstance(plan, int):
            return self.send_error(plan)
        start = start if plan in ("ranges", "cut", "stall") else 0  # others know no ranges
        body = (
            b"<html>Please log in to this network</html>" if plan == "html" else server.body[start:]
        )
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(BODY) - 1}/{len(BODY)}")
        if plan != "cut without length":
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        whole = plan in ("ranges", "whole", "html")
        self.wfile.write(body if whole else body[: max(CUT - start, 0)])
        self.wfile.flush()
        if plan == "stall":
            time.sleep(3)

    def log_message(self, *_):
        pass


def fetch(server, path, **how):
    return download(server.url, path, size=len(BODY), sha256=SHA, pause=0.01, **how)


@pytest.mark.parametrize(
    "plans",
    [
        ["whole"],
        [500, "whole"],
        [503, 429, "whole"],
        ["cut", "ranges"],
        ["cut", "whole"],  # a server that knows no ranges sends it all again
        ["cut without length", "ranges"],
        ["cut", 416, "whole"],
        ["stall", "ranges"],
    ],
    ids=str,
)
def test_what_another_attempt_can_mend_is_mended(plans, tmp_path):
    server = Server(*plans)
    path = fetch(server, tmp_path / "file", silence=0.5)
    assert path.read_bytes() == BODY
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_broken_transfer_goes_on_where_it_broke_off(tmp_path):
    server = Server("cut", "ranges")
    fetch(server, tmp_path / "file")
    assert server.requests == [None, f"bytes={ARRIVED}-"]


@pytest.mark.parametrize(
    ("plans", "message"),
    [
        ([404], "404"),
        ([500], "500 .*4 times"),
        (["html"], "another file"),
        (["cut without length"], "ended after 200,000 of 409,600 bytes, 4 times"),
        (["cut"], "broke off .*4 times"),
    ],
    ids=str,
)
def test_what_no_attempt_can_mend_is_one_clear_line_and_leaves_nothing(plans, message, tmp_path):
    with pytest.raises(DownloadError, match=message):
        fetch(Server(*plans), tmp_path / "file")
    assert list(tmp_path.iterdir()) == []


def test_a_file_with_another_hash_is_refused(tmp_path):
    server = Server("whole")
    with pytest.raises(DownloadError, match="SHA-256"):
        download(server.url, tmp_path / "file", size=len(BODY), sha256="0" * 64, pause=0.01)
    assert list(tmp_path.iterdir()) == []
    assert len(server.requests) == 1


def test_a_machine_without_network_is_told_at_once(tmp_path):
    began = time.monotonic()
    with pytest.raises(DownloadError, match="no connection"):
        download("http://127.0.0.1:9/file", tmp_path / "file")
    assert time.monotonic() - began < 2


def test_a_large_file_may_go_on_in_a_later_call(tmp_path, monkeypatch):
    monkeypatch.setattr(download_module, "ATTEMPTS", 1)
    with pytest.raises(DownloadError):
        fetch(Server("cut"), tmp_path / "file", keep_partial=True)
    assert (tmp_path / "file.part").stat().st_size == ARRIVED
    server = Server("ranges")
    fetch(server, tmp_path / "file", keep_partial=True)
    assert server.requests == [f"bytes={ARRIVED}-"]


def test_the_beginning_of_another_file_is_not_built_upon(tmp_path):
    (tmp_path / "file.part").write_bytes(b"\0" * 5000)
    server = Server("ranges")
    assert fetch(server, tmp_path / "file").read_bytes() == BODY
    assert server.requests == ["bytes=5000-", None]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows knows no limit on a file's size")
def test_a_full_disk_is_one_clear_line(tmp_path):
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    server = Server("whole")
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(FolioError, match="File too large"):
            fetch(server, tmp_path / "file")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert list(tmp_path.iterdir()) == []


# --- Texts ---


def test_a_text_keeps_its_line_ends_and_loses_its_byte_order_mark(tmp_path):
    path = tmp_path / "text"
    path.write_bytes("\ufeffa\r\nb\x00👍\n".encode())
    assert read_text(path) == "a\r\nb\x00👍\n"


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"abc\xff", "offset 3 "), (b"", "no text"), (b" \n\n", "no text"), (None, "No such file")],
)
def test_what_is_no_text_is_refused_by_name(tmp_path, content, message):
    path = tmp_path / "text"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(FolioError, match=message):
        read_text(path)


def test_the_last_tenth_is_for_validation():
    assert split_text("abcdefghij") == {"train": ["abcdefghi"], "val": ["j"]}
    train, val = (len(part[0]) for part in split_text("x" * 1_115_394).values())
    assert (train, val) == (1_003_854, 111_540)


# --- Datasets ---


def prepared(folder, text, **origin):
    origin = {"source": "a test", "sha256": hashlib.sha256(text.encode()).hexdigest(), **origin}
    return write_dataset(folder, CharTokenizer.of(text), split_text(text), origin)


def test_a_vocabulary_beyond_sixteen_bits_is_stored_in_wider_numbers(tmp_path):
    points = [*range(32, 0xD800), *range(0xE000, 0x20000)]
    text = "".join(map(chr, points))
    meta = prepared(tmp_path / "wide", text)
    assert meta["dtype"] == "uint32"
    dataset = open_dataset(str(tmp_path / "wide"), 8)
    ids = dataset.val.windows(np.array([dataset.val.window_count(9) - 1]), 9)[0]
    assert dataset.tokenizer.decode(ids) == text[-9:]


def test_the_same_text_replaces_its_dataset_and_another_moves_it_aside(tmp_path, capsys):
    folder = tmp_path / "mine"
    prepared(folder, "to be or not to be\n" * 9)
    prepared(folder, "to be or not to be\n" * 9)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]
    prepared(folder, "that is the question\n" * 9)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["mine", "mine.1"]
    assert "mine.1" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["meta.json", "train.bin"])
def test_a_damaged_dataset_can_be_prepared_again(tmp_path, name):
    """As the errors that name the damage advise."""
    folder, text = tmp_path / "mine", "to be or not to be\n" * 9
    prepared(folder, text)
    (folder / name).write_text("[") if name == "meta.json" else (folder / name).unlink()
    prepared(folder, text)
    assert len(open_dataset(str(folder), 8).train) == 153


def test_a_text_is_known_by_its_tokens_where_nobody_told_its_hash(tmp_path):
    letters = CharTokenizer.of("abc")
    metas = [
        write_dataset(tmp_path / name, letters, {"train": [text], "val": ["ab"]}, {})
        for name, text in (("one", "abc"), ("same", "abc"), ("other", "abb"))
    ]
    assert metas[0] == metas[1] != metas[2]


def test_a_folder_that_is_no_dataset_is_never_moved(tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary").touch()
    with pytest.raises(FolioError, match="something else"):
        prepared(tmp_path / "mine", "to be or not to be\n" * 9)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_a_text_that_leaves_nothing_to_validate_with_is_too_short(tmp_path):
    with pytest.raises(FolioError, match="too short"):
        prepared(tmp_path / "mine", "ab")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["", ".", "..", "../x", "/tmp/x", "a/b", ".hidden"])
def test_a_dataset_cannot_be_written_elsewhere(name):
    with pytest.raises(FolioError, match="--dataset"):
        dataset_folder(name)


# --- Shakespeare ---


@pytest.fixture
def theatre(tmp_path, monkeypatch):
    """A data/ folder of its own, and no network."""
    for module in (prepare, shakespeare):
        monkeypatch.setattr(module, "DATA", tmp_path)
    monkeypatch.setattr(shakespeare, "URL", "http://127.0.0.1:9/input.txt")
    return tmp_path


def test_a_text_of_ones_own_is_prepared_from_a_file(theatre, tmp_path):
    (tmp_path / "mine.txt").write_text("to be or not to be\n" * 9)
    meta = prepare_shakespeare("char", "mine", tmp_path / "mine.txt")
    assert meta["source"].endswith("mine.txt")
    assert (meta["train_characters"], meta["val_characters"]) == (153, 18)
    assert understudy_notice(meta) == ""


def test_the_note_on_the_understudy_names_the_command_that_makes_this_dataset_anew(theatre):
    for tokenizer, command in (
        ("char", "python prepare_shakespeare.py"),
        ("bpe", "python prepare_shakespeare.py --tokenizer=bpe"),
    ):
        meta = prepare_shakespeare(tokenizer, f"shakespeare_{tokenizer}", vocab_size=300)
        assert understudy_notice(meta).splitlines()[-1].strip() == command


@pytest.mark.skipif(not REAL.exists(), reason="Shakespeare is not on this machine")
def test_tiny_shakespeare_has_65_symbols_and_is_known_by_his_hash(theatre):
    meta = prepare_shakespeare("char", "shakespeare_char", REAL)
    assert (meta["train_tokens"], meta["val_tokens"]) == (1_003_854, 111_540)
    assert (meta["vocab_size"], meta["sha256"]) == (65, SHA256)
    assert json.loads((theatre / "shakespeare_char" / "meta.json").read_text()) == meta


def test_a_mistake_in_preparing_is_one_line(tmp_path, call):
    prepare = functools.partial(call, prepare_shakespeare_script)
    assert_one_line_error(prepare(f"--input={tmp_path / 'none.txt'}"), "none.txt")
    assert_one_line_error(prepare("--tokenizer=words"), "char or gpt2 or bpe")
    (tmp_path / "text").write_text("to be or not to be\n" * 9)
    assert_one_line_error(prepare(f"--input={tmp_path / 'text'}", "--dataset=../x"), "--dataset")


# --- The understudy ---


@pytest.fixture
def trained_here(theatre, call, monkeypatch, tmp_path):
    """One update of a tiny model by train.py, on whatever plays in the theatre."""
    for module in (dataset_module, run_module):
        monkeypatch.setattr(module, "DATA", theatre)
    return lambda: call(
        train, f"--out_dir={tmp_path / 'run'}", "--device=cpu", "--max_iters=1", "--n_layer=1",
        "--n_head=1", "--n_embd=8", "--block_size=8", "--eval_tokens=64", "--sample_tokens=0",
    )  # fmt: skip


def test_without_a_network_the_understudy_goes_on_and_everybody_is_told(
    theatre, call, trained_here, monkeypatch
):
    monkeypatch.setattr(prepare_shakespeare_script, "DATA", theatre)
    prepared = call(prepare_shakespeare_script)
    assert prepared.returncode == 0, prepared.stderr
    assert "His understudy" in prepared.stdout
    meta = json.loads((theatre / "shakespeare_char" / "meta.json").read_text())
    assert meta["source"] == "the understudy"

    trained = trained_here()
    assert trained.returncode == 0, trained.stderr
    assert trained.stdout.count("His understudy") == 2  # before the first step and after the last


def test_train_py_prepares_shakespeare_by_itself(theatre, trained_here):
    assert trained_here().returncode == 0
    assert (theatre / "shakespeare_char" / "train.bin").exists()


def test_a_kept_text_that_is_not_shakespeares_is_fetched_again(theatre, monkeypatch):
    server = Server("whole")
    monkeypatch.setattr(shakespeare, "URL", server.url)
    server.body = b"the right text\n" * 99
    monkeypatch.setattr(shakespeare, "SIZE", len(server.body))
    monkeypatch.setattr(shakespeare, "SHA256", hashlib.sha256(server.body).hexdigest())
    (theatre / "shakespeare").mkdir()
    (theatre / "shakespeare" / "input.txt").write_text("half of the ri")
    meta = prepare_shakespeare("char", "shakespeare_char")
    assert meta["source"] == "tiny Shakespeare"
    assert (theatre / "shakespeare" / "input.txt").read_bytes() == server.body
    prepare_shakespeare("bpe", "shakespeare_bpe", vocab_size=262)
    assert len(server.requests) == 1  # the text is kept for the other tokenizers


@pytest.mark.skipif(not REAL.exists(), reason="Shakespeare is not on this machine")
def test_shakespeare_takes_his_place_back(theatre, monkeypatch):
    def on_stage():
        folders = sorted(path.name for path in theatre.glob("shakespeare_char*"))
        assert folders == ["shakespeare_char"]
        return json.loads((theatre / "shakespeare_char" / "meta.json").read_text())["source"]

    prepare_shakespeare("char", "shakespeare_char")
    assert on_stage() == "the understudy"
    prepare_shakespeare("char", "shakespeare_char", REAL)  # --input
    assert on_stage() == "tiny Shakespeare"
    prepare_shakespeare("char", "shakespeare_char")
    assert on_stage() == "tiny Shakespeare"  # who is there does not go for want of a network
    server = Server("whole")
    server.body = REAL.read_bytes()
    monkeypatch.setattr(shakespeare, "URL", server.url)
    for name in ("shakespeare", "shakespeare_char"):
        shutil.rmtree(theatre / name)
    assert prepare_shakespeare("char", "shakespeare_char")["sha256"] == SHA256
    assert on_stage() == "tiny Shakespeare"


def test_the_understudys_play_is_a_play():
    text = (ROOT / "data" / "understudy.txt").read_text(encoding="utf-8")
    assert len(text) >= 50 * 1024
    assert text.isascii()
    speeches = [speech.split("\n") for speech in text.rstrip("\n").split("\n\n")]
    for name, *lines in speeches:
        assert name.isupper() and name.endswith(":") and lines, name
    assert len({name for name, *_ in speeches}) >= 12
    lines = [line for _, *rest in speeches for line in rest]
    assert len(set(lines)) == len(lines)  # no filler
    assert len(lzma.compress(text.encode(), preset=9)) > 0.36 * len(text)
