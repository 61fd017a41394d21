"""Models and files from the Hugging Face hub, with a real server on loopback."""

import os
import subprocess
import sys

import huggingface_hub
import pytest
from huggingface_hub import constants

from data.download import DownloadError
from data.hub import hub_file, hub_files, hub_model, is_hub_name
from tests.conftest import ROOT
from tests.hub_server import HubServer, use_hub

MODEL = {
    "config.json": b'{"model_type": "gpt2"}',
    "tokenizer.json": b"{}",
    "model.safetensors": bytes(range(256)) * 1000,
    "README.md": b"not needed",
    "onnx/config.json": b"not needed",
    "pytorch_model.bin": b"not needed beside safetensors",
}


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub with the model openai-community/gpt2, and an empty cache."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        server.files["openai-community/gpt2", "main"] = dict(MODEL)
        yield server


def names_in(folder) -> set[str]:
    return {path.name for path in folder.rglob("*") if path.is_file()}


# --- Models ---


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("distilgpt2", True), ("gpt2-xl", True), ("someone/My_GPT", True), ("words", False),
        ("out/shakspere", False), ("data/mine", False), ("a/b/c", False), ("../x", False),
        ("/tmp/x", False), ("~/x", False),
    ],
)  # fmt: skip
def test_names_are_told_from_misspelled_folders(name, expected):
    assert is_hub_name(name) == expected


@pytest.mark.parametrize("name", ["gpt2", "openai-community/gpt2"])
def test_a_model_is_downloaded_once_with_the_files_that_are_needed(hub, name):
    folder = hub_model(name)
    assert names_in(folder) == {"config.json", "tokenizer.json", "model.safetensors"}
    for file in names_in(folder):
        assert (folder / file).read_bytes() == MODEL[file]
    hub.requests.clear()
    assert hub_model(name) == folder
    assert not any("/resolve/" in path for path in hub.paths("GET"))


def test_weights_that_transformers_has_cached_are_found_without_a_connection(
    hub, monkeypatch, tmp_path
):
    hub.files["gpt2", "main"] = dict(MODEL)
    for file in ("config.json", "model.safetensors"):  # as from_pretrained("gpt2") does
        huggingface_hub.hf_hub_download("gpt2", file)
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    folder = hub_model("gpt2")
    assert (folder / "model.safetensors").read_bytes() == MODEL["model.safetensors"]


def test_a_new_version_on_the_hub_replaces_the_cached_one(hub):
    old = hub_model("gpt2")
    hub.files["openai-community/gpt2", "main"]["config.json"] = b'{"n_layer": 1}'
    new = hub_model("gpt2")
    assert new != old
    assert (new / "config.json").read_bytes() == b'{"n_layer": 1}'


def test_sharded_weights_are_downloaded(hub):
    shards = {f"model-0000{i}-of-00002.safetensors": bytes([i]) * 2000 for i in (1, 2)}
    files = {"config.json": b"{}", "model.safetensors.index.json": b"{}", **shards}
    hub.files["someone/large", "main"] = files
    assert names_in(hub_model("someone/large")) == set(files)


def test_pytorch_weights_are_downloaded_where_there_are_no_safetensors(hub):
    files = {
        "config.json": b"{}",
        "vocab.json": b"{}",
        "merges.txt": b"",
        "pytorch_model.bin": b"x",
    }
    hub.files["someone/old", "main"] = {**files, "tf_model.h5": b"not needed"}
    assert names_in(hub_model("someone/old")) == set(files)


def test_the_token_is_sent_to_the_hub_and_not_to_other_hosts(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "secret")
    hub_model("gpt2")
    tokens = {path.startswith("/cdn/"): token for _, path, token in hub.requests}
    assert tokens == {False: "Bearer secret", True: None}


def test_hf_endpoint_and_hf_home_work(hub, tmp_path):
    code = "from data.hub import hub_model; print(hub_model('gpt2'))"
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(tmp_path / "home")}
    command = [sys.executable, "-c", code]
    folder = subprocess.check_output(command, cwd=ROOT, env=environment, text=True).strip()
    assert folder.startswith(str(tmp_path / "home"))


def test_a_cached_model_is_found_in_offline_mode(hub, monkeypatch):
    folder = hub_model("gpt2")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)  # what HF_HUB_OFFLINE=1 sets
    hub.requests.clear()
    assert hub_model("gpt2") == folder
    assert hub.requests == []


# --- Errors ---


def assert_one_line(error: pytest.ExceptionInfo, *expected: str) -> None:
    message = str(error.value)
    assert "\n" not in message
    for words in expected:
        assert words in message


def test_an_unknown_model_is_one_line_that_names_the_hub(hub):
    with pytest.raises(DownloadError) as error:
        hub_model("someone/nothing")
    assert_one_line(error, "someone/nothing", "not found on http://127", "HF_TOKEN", "=FOLDER")


def test_a_gated_model_is_one_line_that_says_how_to_get_access(hub):
    hub.gated.add("openai-community/gpt2")
    with pytest.raises(DownloadError) as error:
        hub_model("gpt2")
    assert_one_line(error, "accept its terms", "HF_TOKEN")


def test_a_name_that_cannot_be_a_repository_is_one_line(hub):
    with pytest.raises(DownloadError) as error:
        hub_model("a/b/c")
    assert_one_line(error, "a/b/c", "=FOLDER")


def test_a_repository_without_weights_is_one_line(hub):
    hub.files["someone/empty", "main"] = {"config.json": b"{}"}
    with pytest.raises(DownloadError) as error:
        hub_model("someone/empty")
    assert_one_line(error, "someone/empty", "no weights")


def test_without_a_connection_the_hub_is_named(monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    with pytest.raises(DownloadError) as error:
        hub_model("gpt2")
    assert_one_line(error, "openai-community/gpt2", "no connection to http://127.0.0.1:9")


def test_offline_mode_is_named(monkeypatch, tmp_path):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path / "cache")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(DownloadError) as error:
        hub_model("gpt2")
    assert_one_line(error, "not in the cache", "HF_HUB_OFFLINE is set")


def test_weights_of_another_size_than_the_hub_announced_are_refused(hub):
    hub.replaced["model.safetensors"] = MODEL["model.safetensors"][:-1]
    with pytest.raises(DownloadError) as error:
        hub_model("gpt2")
    assert_one_line(error, "openai-community/gpt2", "Consistency check failed")


def test_a_proxy_that_cannot_be_used_is_one_line(monkeypatch):
    def needs_another_package(*_, **__) -> None:
        raise ImportError("Using SOCKS proxy, but the 'socksio' package is not installed.")

    monkeypatch.setattr("huggingface_hub.snapshot_download", needs_another_package)
    with pytest.raises(DownloadError) as error:
        hub_model("gpt2")
    assert_one_line(error, "openai-community/gpt2: Using SOCKS proxy", "socksio")


# --- Single files ---


def test_the_files_of_a_dataset_are_listed_and_downloaded_at_one_commit(hub, tmp_path):
    hub.files["datasets/someone/corpus", "main"] = {"b.bin": b"b" * 2000, "a.bin": b"a"}
    commit, names = hub_files("someone/corpus")
    assert len(commit) == 40 and names == ["a.bin", "b.bin"]
    path = hub_file("someone/corpus", "b.bin", commit, tmp_path / "here")
    assert path == tmp_path / "here" / "b.bin"
    assert path.read_bytes() == b"b" * 2000


def test_an_interrupted_download_is_resumed(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 1000)
    hub.files["datasets/someone/corpus", "main"] = {"b.bin": MODEL["model.safetensors"]}
    hub.interruptions = 1
    path = hub_file("someone/corpus", "b.bin", "main", tmp_path)
    assert path.read_bytes() == MODEL["model.safetensors"]
    assert hub.ranges == [None, "bytes=128000-"]


def test_a_missing_file_is_one_line(hub, tmp_path):
    hub.files["datasets/someone/corpus", "main"] = {"b.bin": b"b"}
    with pytest.raises(DownloadError) as error:
        hub_file("someone/corpus", "nothing.bin", "main", tmp_path)
    assert_one_line(error, "someone/corpus/nothing.bin", "not found on http://127")
