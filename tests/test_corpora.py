"""The corpora that GPT-2 is trained on from scratch: fetched piece by piece, and sure of each."""

import hashlib
import http.server
import io
import threading
from typing import ClassVar

import numpy as np
import pytest

from configurator import FolioError
from data import dataset as dataset_module
from data import prepare as prepare_module
from data import prepare_fineweb, prepare_openwebtext
from data.dataset import SHARD_MAGIC, open_dataset
from data.prepare import split_text, write_dataset
from data.tokenizer import BPETokenizer
from tests.conftest import assert_one_line_error
from tests.test_tokenizer import toy_bpe


class Hub(http.server.BaseHTTPRequestHandler):
    """A hub on loopback: files by their path, in ranges if asked, promised in headers."""

    files: ClassVar = {}  # path -> bytes
    seen: ClassVar = []  # (method, path, range) of each request
    cut: ClassVar = {}  # path -> how often to break off in the middle
    busy: ClassVar = set()  # (method, path) of requests that are answered with 503

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        wanted = self.headers.get("Range")
        self.seen.append((self.command, self.path, wanted))
        data = self.files.get(self.path)
        if data is None or (self.command, self.path) in self.busy:
            return self.send_error(404 if data is None else 503)
        start = int(wanted[6:-1]) if wanted else 0
        self.send_response(206 if wanted else 200)
        if wanted:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("X-Linked-Size", str(len(data)))
        self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if body and self.cut.get(self.path):
            self.cut[self.path] -= 1
            self.wfile.write(data[start : start + (len(data) - start) // 2])
        elif body:
            self.wfile.write(data[start:])
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(data_folder, monkeypatch):
    """An empty hub, a data/ folder of our own, and a small vocabulary in the place of GPT-2's."""
    Hub.files, Hub.seen, Hub.cut, Hub.busy = {}, [], {}, set()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(prepare_module, "DATA", dataset_module.DATA)
    monkeypatch.setattr(BPETokenizer, "gpt2", toy_bpe)
    yield Hub
    server.shutdown()


# --- FineWeb ---


def shard(count: int, seed: int = 0) -> bytes:
    """As kjj0/fineweb10B-gpt2 has them: 256 int32 of header, then `count` tokens of two bytes."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, 1, count
    ids = np.random.default_rng(seed).integers(256, size=count, dtype="<u2")
    return header.tobytes() + ids.tobytes()


def fineweb(hub, shards: int) -> str:
    place = f"/{prepare_fineweb.SOURCE}/resolve/main/fineweb_"
    hub.files[f"{place}val_000000.bin"] = shard(500)
    for number in range(1, shards + 1):
        hub.files[f"{place}train_{number:06}.bin"] = shard(300_000, number)
    return place


def test_fineweb_comes_in_shards_that_train_as_they_are(hub, data_folder, call):
    fineweb(hub, 3)
    result = call(prepare_fineweb, "--shards=2")
    assert result.returncode == 0, result.stderr
    found = open_dataset("fineweb", block_size=8)
    assert len(found.train) == 600_000 and len(found.val) == 500
    assert found.meta["train_tokens"] == 600_000
    assert found.train.windows(np.array([0]), 5)[0].tolist() == (
        np.frombuffer(shard(300_000, 1)[1024:1034], dtype="<u2").tolist()
    )
    before = len(hub.seen)
    assert call(prepare_fineweb, "--shards=3").returncode == 0
    assert {path[-10:-4] for _, path, _ in hub.seen[before:]} == {"000003"}  # the others are there
    assert len(open_dataset("fineweb", block_size=8).train) == 900_000


def test_a_shard_that_broke_off_goes_on_where_it_broke_off(hub, data_folder, call, monkeypatch):
    place = fineweb(hub, 1)
    path = f"{place}train_000001.bin"
    monkeypatch.setattr("data.download.ATTEMPTS", 1)
    hub.cut[path] = 1
    assert_one_line_error(call(prepare_fineweb, "--shards=1"), "train_000001.bin")
    part = data_folder / "fineweb" / "train_000001.bin.part"
    arrived = part.stat().st_size
    assert 0 < arrived < len(hub.files[path])
    with pytest.raises(FolioError, match="prepare_fineweb --shards=100 goes on"):
        open_dataset("fineweb", block_size=8)  # half a corpus is no dataset
    assert_one_line_error(call(prepare_openwebtext, "--dataset=fineweb"), "another dataset")
    assert call(prepare_fineweb, "--shards=1").returncode == 0
    assert hub.seen[-1] == ("GET", path, f"bytes={arrived}-")
    assert (data_folder / "fineweb" / "train_000001.bin").read_bytes() == hub.files[path]


def test_a_hub_that_promises_nothing_for_once_is_asked_again_and_not_believed(
    hub, data_folder, call, monkeypatch
):
    monkeypatch.setattr("data.hub.PAUSE", 0)
    path = f"{fineweb(hub, 1)}train_000001.bin"
    hub.busy.add(("HEAD", path))
    assert_one_line_error(call(prepare_fineweb, "--shards=1"), "answered 503")
    assert hub.seen.count(("HEAD", path, None)) == 4
    assert not (data_folder / "fineweb" / "train_000001.bin").exists()


def test_shards_are_never_put_beside_another_dataset(hub, data_folder, call):
    fineweb(hub, 1)
    write_dataset(data_folder / "mine", toy_bpe(), split_text("low " * 99), {"source": "mine"})
    before = (data_folder / "mine" / "tokenizer.json").read_bytes()
    assert_one_line_error(call(prepare_fineweb, "--dataset=mine"), "another dataset")
    assert call(prepare_fineweb, "--shards=1").returncode == 0
    assert_one_line_error(call(prepare_openwebtext, "--dataset=fineweb"), "another dataset")
    assert (data_folder / "mine" / "tokenizer.json").read_bytes() == before


@pytest.mark.parametrize(
    ("sent", "complaint"),
    [
        (b"<html>a hundred tokens</html>" * 100, "no shard of tokens"),
        (shard(100)[:-2], "promises 100 tokens"),
    ],
)
def test_what_is_no_shard_is_refused(hub, data_folder, call, sent, complaint):
    place = fineweb(hub, 1)
    hub.files[f"{place}train_000001.bin"] = sent
    assert_one_line_error(call(prepare_fineweb, "--shards=1"), complaint)


# --- OpenWebText ---


def pages(count: int, seed: int) -> list[str]:
    words = ["low", "lower", "slow", "é", "🙂", "<|endoftext|>"]
    dice = np.random.default_rng(seed)
    return [" ".join(dice.choice(words, size=20)) for _ in range(count)]


def parquet(texts: list[str]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=100)
    return file.getvalue()


@pytest.fixture
def openwebtext(hub):
    place = f"/{prepare_openwebtext.SOURCE}"
    corpus = [pages(2500, seed) for seed in (1, 2)]
    hub.files[place] = b'["https://.../0.parquet", "https://.../1.parquet"]'
    for number, texts in enumerate(corpus):
        hub.files[f"{place}/{number}.parquet"] = parquet(texts)
    return corpus


def test_openwebtext_becomes_one_stream_with_an_end_after_each_page(openwebtext, data_folder, call):
    result = call(prepare_openwebtext)
    assert result.returncode == 0, result.stderr
    tokenizer = toy_bpe()
    for split, rest in (("train", slice(1, None)), ("val", slice(0, 1))):
        wanted = []
        for texts in openwebtext:
            kept = [t for i, t in enumerate(texts) if (i % 2000 == 0) == (split == "val")]
            assert kept[0] == texts[rest][0]
            for text in kept:
                wanted += [*tokenizer.encode(text), tokenizer.end_of_text]
        files = sorted((data_folder / "openwebtext").glob(f"{split}_*.bin"))
        assert np.concatenate([np.fromfile(f, "<u2") for f in files]).tolist() == wanted
    assert not list((data_folder / "openwebtext").glob("*.parquet*"))
    found = open_dataset("openwebtext", block_size=8)
    assert found.meta["train_tokens"] == len(found.train)


def test_a_preparation_that_was_stopped_goes_on_with_the_next_file(openwebtext, hub, call):
    assert call(prepare_openwebtext, "--shards=1").returncode == 0
    before = len(hub.seen)
    assert call(prepare_openwebtext).returncode == 0
    fetched = [path for _, path, _ in hub.seen[before:] if path.endswith(".parquet")]
    assert set(fetched) == {f"/{prepare_openwebtext.SOURCE}/1.parquet"}


def test_a_kill_after_the_last_write_leaves_nothing_behind(openwebtext, call, data_folder):
    assert call(prepare_openwebtext).returncode == 0
    (data_folder / "openwebtext" / "0.parquet").touch()  # not yet removed
    assert call(prepare_openwebtext).returncode == 0
    assert not list((data_folder / "openwebtext").glob("*.parquet*"))


def test_a_file_that_is_no_parquet_is_refused_and_removed(openwebtext, hub, call, data_folder):
    path = f"/{prepare_openwebtext.SOURCE}/0.parquet"
    hub.files[path] = hub.files[path][:-100]
    assert_one_line_error(call(prepare_openwebtext), "0.parquet: damaged, and removed")
    assert not list((data_folder / "openwebtext").glob("*.parquet*"))
    hub.files.clear()
    assert_one_line_error(call(prepare_openwebtext), "no list of files")
