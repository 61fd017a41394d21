"""FineWeb and OpenWebText, downloaded from a hub on loopback."""

import io
import json
import shlex

import numpy as np
import pytest

from configurator import FolioError
from data import prepare_fineweb, prepare_openwebtext
from data.dataset import SHARD_MAGIC, open_dataset
from data.prepare import split_text, write_dataset
from data.tokenizer import BPETokenizer
from tests.conftest import assert_one_line_error
from tests.hub_server import HubServer
from tests.test_tokenizer import toy_bpe


@pytest.fixture
def hub(data_folder, monkeypatch, tmp_path):
    """An empty hub, an empty data/ folder, and a small vocabulary in the place of GPT-2's."""
    monkeypatch.setattr(BPETokenizer, "gpt2", toy_bpe)
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        yield server


def downloads(hub) -> set[str]:
    return {path.rpartition("/")[2] for path in hub.paths("GET") if path.startswith("/cdn/")}


# --- FineWeb ---


def shard(num_tokens: int, seed: int = 0) -> bytes:
    """As kjj0/fineweb10B-gpt2 has them: 256 int32 of header, then uint16 tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = SHARD_MAGIC, 1, num_tokens
    ids = np.random.default_rng(seed).integers(256, size=num_tokens, dtype="<u2")
    return header.tobytes() + ids.tobytes()


@pytest.fixture
def fineweb(hub) -> dict[str, bytes]:
    """The files of FineWeb on the hub: 3 training shards."""
    files = {f"fineweb_train_{i:06}.bin": shard(300_000, seed=i) for i in (1, 2, 3)}
    hub.files["datasets/kjj0/fineweb10B-gpt2", "main"] = {
        "fineweb_val_000000.bin": shard(500), **files
    }  # fmt: skip
    return hub.files["datasets/kjj0/fineweb10B-gpt2", "main"]


def test_fineweb_shards_are_downloaded_once_and_can_be_opened(hub, fineweb, data_folder, call):
    result = call(prepare_fineweb, "--shards=2")
    assert result.returncode == 0, result.stderr
    assert "600,000 training tokens, 500 validation tokens" in result.stdout
    dataset = open_dataset("fineweb", block_size=8)
    assert len(dataset.train) == 600_000 and len(dataset.val) == 500
    expected = np.frombuffer(fineweb["fineweb_train_000001.bin"][1024:1034], dtype="<u2")
    assert dataset.train.windows(np.array([0]), 5)[0].tolist() == expected.tolist()
    hub.requests.clear()
    assert call(prepare_fineweb, "--shards=3").returncode == 0
    assert downloads(hub) == {"fineweb_train_000003.bin"}
    assert len(open_dataset("fineweb", block_size=8).train) == 900_000
    names = {path.name for path in (data_folder / "fineweb").iterdir()}
    assert {name for name in names if not name.endswith(".bin")} == {
        "meta.json", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    hub.requests.clear()
    assert call(prepare_fineweb, "--shards=3").returncode == 0
    assert hub.requests == []  # nothing is missing: no network is needed


def test_the_printed_command_trains_on_the_dataset_that_was_made(hub, fineweb, call):
    result = call(prepare_fineweb, "--shards=1", "--dataset=my web")
    command = shlex.split(result.stdout.partition("next:")[2])
    assert command[:3] == ["torchrun", "--standalone", "--nproc_per_node=8"]
    assert command[3].endswith("train.py") and command[4].endswith("train_gpt2.py")
    assert command[5:] == ["--dataset=my web", "--block_size=499"]  # 500 validation tokens


def test_a_failed_download_leaves_an_incomplete_dataset_and_the_same_command_continues(
    hub, fineweb, call
):
    missing = fineweb.pop("fineweb_train_000002.bin")
    assert_one_line_error(call(prepare_fineweb, "--shards=2"), "train_000002.bin: not found")
    with pytest.raises(FolioError, match="prepare_fineweb"):
        open_dataset("fineweb", block_size=8)
    fineweb["fineweb_train_000002.bin"] = missing
    hub.requests.clear()
    assert call(prepare_fineweb, "--shards=2").returncode == 0
    assert downloads(hub) == {"fineweb_train_000002.bin"}


def test_shards_are_never_put_beside_another_dataset(hub, fineweb, data_folder, call):
    pytest.importorskip("pyarrow")
    write_dataset(data_folder / "mine", toy_bpe(), split_text("low " * 99), {"source": "mine"})
    before = (data_folder / "mine" / "tokenizer.json").read_bytes()
    assert_one_line_error(call(prepare_fineweb, "--dataset=mine"), "another dataset")
    assert call(prepare_fineweb, "--shards=1").returncode == 0
    assert_one_line_error(call(prepare_openwebtext, "--dataset=fineweb"), "another dataset")
    assert (data_folder / "mine" / "tokenizer.json").read_bytes() == before


def test_an_incomplete_shard_is_refused(fineweb, call):
    fineweb["fineweb_train_000001.bin"] = shard(1000)[:-2]
    assert_one_line_error(
        call(prepare_fineweb, "--shards=1"), "train_000001.bin", "delete the file"
    )


def test_a_refusal_of_the_hub_is_one_line(hub, call):
    hub.gated.add("datasets/kjj0/fineweb10B-gpt2")
    assert_one_line_error(call(prepare_fineweb), "kjj0/fineweb10B-gpt2: restricted")


# --- OpenWebText ---


def documents(count: int, seed: int) -> list[str]:
    words = ["low", "lower", "slow", "é", "🙂", "<|endoftext|>"]
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(words, size=20)) for _ in range(count)]


def parquet(texts: list[str]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow")
    pytest.importorskip("pyarrow.parquet")
    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), file, row_group_size=100)
    return file.getvalue()


def add_openwebtext(hub, revision: str) -> list[list[str]]:
    """Put two files on the hub; returns their documents."""
    corpus = [documents(2500, seed) for seed in (1, 2)]
    repo = "datasets/Skylion007/openwebtext"
    hub.files[repo, "main"] = {"README.md": b"a dataset"}
    hub.files[repo, revision] = {
        f"plain_text/train-{i:05}-of-00002.parquet": parquet(texts)
        for i, texts in enumerate(corpus)
    }
    return corpus


@pytest.fixture
def openwebtext(hub) -> list[list[str]]:
    return add_openwebtext(hub, "main")


@pytest.mark.parametrize("revision", ["main", "refs/convert/parquet"])
def test_openwebtext_has_an_end_of_text_token_after_each_document(hub, revision, data_folder, call):
    corpus = add_openwebtext(hub, revision)
    result = call(prepare_openwebtext)
    assert result.returncode == 0, result.stderr
    tokenizer, folder = toy_bpe(), data_folder / "openwebtext"
    for split in ("train", "val"):
        expected = []
        for texts in corpus:
            for i, text in enumerate(texts):
                if (i % 2000 == 0) == (split == "val"):
                    expected += [*tokenizer.encode(text), tokenizer.eos_token_id]
        files = sorted(folder.glob(f"{split}_*.bin"))
        assert np.concatenate([np.fromfile(file, "<u2") for file in files]).tolist() == expected
    assert not list(folder.rglob("*.parquet"))
    dataset = open_dataset("openwebtext", block_size=8)
    assert dataset.meta["train_tokens"] == len(dataset.train)


def test_the_same_command_continues_with_the_next_file(openwebtext, hub, call, data_folder):
    """Also if the dataset on the hub has got another first file meanwhile."""
    assert call(prepare_openwebtext, "--shards=1").returncode == 0
    commit = json.loads((data_folder / "openwebtext" / "meta.json").read_text())["commit"]
    repo = "datasets/Skylion007/openwebtext"
    hub.files[repo, commit] = dict(hub.files[repo, "main"])
    hub.files[repo, "main"]["plain_text/a.parquet"] = b"new"
    for _ in range(2):
        hub.requests.clear()
        assert call(prepare_openwebtext).returncode == 0
        assert downloads(hub) <= {"train-00001-of-00002.parquet"}
    assert len(list((data_folder / "openwebtext").glob("train_*.bin"))) == 2


def test_a_kill_after_the_last_shard_leaves_no_downloads(openwebtext, call, data_folder):
    assert call(prepare_openwebtext).returncode == 0
    leftover = data_folder / "openwebtext" / "downloads"
    leftover.mkdir()
    (leftover / "0.parquet").touch()
    assert call(prepare_openwebtext).returncode == 0
    assert not leftover.exists()


def test_a_hub_without_the_dataset_is_one_line(openwebtext, hub, call):
    hub.files.clear()
    assert_one_line_error(call(prepare_openwebtext), "Skylion007/openwebtext: not found")
