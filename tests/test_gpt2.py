"""GPT-2 exactly: the same logits, losses, texts and updates as Hugging Face's, and its weights."""

import hashlib
import http.server
import json
import threading
from typing import ClassVar

import pytest
import torch
import transformers

import sample
import train
from configurator import FolioError
from data import dataset as dataset_module
from data import gpt2 as gpt2_module
from data.download import DownloadError
from data.gpt2 import fetch_gpt2
from data.prepare import split_text, write_dataset
from data.tokenizer import load_tokenizer
from model import GPT, GPTConfig
from tests.conftest import assert_one_line_error
from tests.test_tokenizer import AWKWARD, printable_files, toy_bpe
from training.checkpoint import load_model, save_model, save_tokenizer

SHAPES = [
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "block_size": 4, "vocab_size": 11},
    {"n_layer": 3, "n_head": 4, "n_embd": 32, "block_size": 16, "vocab_size": 97},
    {"n_layer": 2, "n_head": 5, "n_embd": 40, "block_size": 24, "vocab_size": 50},
]


@pytest.fixture(params=SHAPES, ids=["small", "deep", "odd"])
def pair(request, tmp_path):
    """Random GPT-2 of transformers in float64, and ours, read from what theirs saved."""
    shape = dict(request.param)
    config = transformers.GPT2Config(
        n_positions=shape.pop("block_size"), **shape,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    return load_model(tmp_path / "theirs"), theirs


def tokens_for(model: GPT) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (3, model.config.block_size))


def test_logits_agree_with_transformers_in_both_directions(pair, tmp_path):
    ours, theirs = pair
    idx = tokens_for(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=1e-9, atol=1e-9)
        save_model(ours, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert again.dtype == torch.float64
        torch.testing.assert_close(ours(idx)[0], again(idx).logits, rtol=1e-9, atol=1e-9)
        ours.float(), theirs.float()
        torch.testing.assert_close(ours(idx)[0], theirs(idx).logits, rtol=2e-5, atol=2e-5)


def test_losses_agree_with_transformers(pair):
    ours, theirs = pair
    idx = tokens_for(ours)
    loss = ours(idx[:, :-1], idx[:, 1:])[1]
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss.double(), rtol=1e-6, atol=0)


def test_greedy_texts_agree_with_transformers(pair):
    ours, theirs = pair
    prompt = tokens_for(ours)[:, :2]
    n = ours.config.block_size - 2
    wanted = theirs.generate(prompt, max_new_tokens=n, do_sample=False, pad_token_id=0)[:, 2:]
    drawn = torch.stack(list(ours.generate(prompt, n, temperature=0)), dim=1)
    assert torch.equal(drawn, wanted)


def test_an_update_agrees_with_transformers(pair, tmp_path):
    ours, theirs = pair
    ours.train(), theirs.train()
    idx = tokens_for(ours)
    for model, loss in ((ours, ours(idx, idx.roll(-1, 1))[1]), (theirs, None)):
        if loss is None:
            logits = theirs(idx).logits
            loss = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1), idx.roll(-1, 1).flatten()
            )
        loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1).step()
    theirs.save_pretrained(tmp_path / "updated")
    wanted = load_model(tmp_path / "updated").state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-9, atol=1e-9, msg=name)


# --- A folder opens everywhere ---


@pytest.fixture
def run_folder(tmp_path):
    tokenizer = toy_bpe()
    model = GPT(GPTConfig(block_size=16, vocab_size=262, n_layer=1, n_head=1, n_embd=8))
    save_model(model, tmp_path / "run", tokenizer.end_of_text)
    save_tokenizer(tokenizer, tmp_path / "run")
    return tmp_path / "run"


def test_a_pipeline_writes_text_without_warnings(run_folder, recwarn, caplog):
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        write = transformers.pipeline("text-generation", model=str(run_folder))
        (result,) = write("low lower")
    finally:
        transformers.logging.disable_propagation()
    assert result["generated_text"].startswith("low lower")
    assert len(result["generated_text"]) > len("low lower")
    assert [record.getMessage() for record in caplog.records if record.levelname != "INFO"] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_auto_tokenizer_gives_our_ids_on_awkward_texts(run_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(run_folder)
    for text in (AWKWARD, "a\r\nb", "\t\t x", "e\u0301", "🙂" * 3, "<|endoftext|>", " low  lower"):
        ids = toy_bpe().encode(text).tolist()
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


def test_the_older_pair_of_tokenizer_files_is_read(tmp_path):
    tokenizer = toy_bpe()
    printable_files(tokenizer, tmp_path)
    assert load_tokenizer(tmp_path) == tokenizer
    theirs = transformers.GPT2TokenizerFast.from_pretrained(tmp_path)
    theirs.save_pretrained(tmp_path / "theirs")
    (tmp_path / "theirs" / "vocab.json").unlink(missing_ok=True)
    assert load_tokenizer(tmp_path / "theirs") == tokenizer


def test_a_tokenizer_that_cuts_otherwise_is_refused(run_folder):
    path = run_folder / "tokenizer.json"
    contents = json.loads(path.read_text(encoding="utf-8"))
    for change in (
        {"normalizer": {"type": "Lowercase"}},
        {"pre_tokenizer": {"type": "Whitespace"}},
        {"pre_tokenizer": {**contents["pre_tokenizer"], "add_prefix_space": True}},
        {"model": {**contents["model"], "merges": contents["model"]["merges"][::-1]}},
    ):
        path.write_text(json.dumps({**contents, **change}), encoding="utf-8")
        with pytest.raises(FolioError, match=r"tokenizer\.json"):
            load_tokenizer(run_folder)


# --- The hub ---


class Hub(http.server.SimpleHTTPRequestHandler):
    """Answers as the Hugging Face hub does: large files redirect, and are promised in headers."""

    seen: ClassVar = []  # (method, path, token) of each request
    folder: ClassVar = None  # whose files it serves
    tampered: ClassVar = None  # what it serves instead of the weights

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def answer(self, body):
        Hub.seen.append((self.command, self.path, self.headers.get("Authorization")))
        name = self.path.rsplit("/", 1)[-1]
        data = (self.folder / name).read_bytes()
        if name.endswith(".safetensors") and not self.path.startswith("/cdn/"):
            self.send_response(302)
            self.send_header("Location", f"/cdn/{name}")
            self.send_header("X-Linked-Size", str(len(data)))
            self.send_header("X-Linked-ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("Content-Length", "0")
            return self.end_headers()
        data = self.tampered or data if self.path.startswith("/cdn/") else data
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if body:
            self.wfile.write(data)
        return None

    def log_message(self, *_):
        pass


@pytest.fixture
def hub(run_folder, tmp_path, monkeypatch):
    """A hub on loopback that has the little model under every name, and a data/ folder of ours."""
    Hub.seen, Hub.folder, Hub.tampered = [], run_folder, None
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}/")
    monkeypatch.setenv("HF_TOKEN", "secret")
    for module in (dataset_module, gpt2_module):
        monkeypatch.setattr(module, "DATA", tmp_path / "data")
    yield Hub
    server.shutdown()


def test_weights_are_fetched_once_by_name(hub, run_folder):
    folder = fetch_gpt2("gpt2-medium")
    assert folder.name == "gpt2-medium"
    for name in ("config.json", "tokenizer.json", "model.safetensors"):
        assert (folder / name).read_bytes() == (run_folder / name).read_bytes()
    assert hub.seen[0] == (
        "GET", "/openai-community/gpt2-medium/resolve/main/config.json", "Bearer secret",
    )  # fmt: skip
    requests = len(hub.seen)
    fetch_gpt2("gpt2-medium")
    assert len(hub.seen) == requests


def test_weights_that_are_not_what_the_hub_promised_are_refused(hub, run_folder):
    weights = (run_folder / "model.safetensors").read_bytes()
    hub.tampered = weights[:-1] + b"?"
    with pytest.raises(DownloadError, match="SHA-256"):
        fetch_gpt2("gpt2-large")
    hub.tampered = None
    with pytest.raises(DownloadError, match="instead of 548,105,171"):
        fetch_gpt2("gpt2")  # whose size and hash are known beforehand


def test_published_weights_finetune_and_sample_by_name(hub, call, tmp_path):
    text = "low lower slower flow\n" * 60
    write_dataset(tmp_path / "mine", toy_bpe(), split_text(text), {"source": "mine"})
    flags = [
        "--init_from=gpt2-xl", f"--dataset={tmp_path / 'mine'}", f"--out_dir={tmp_path / 'tuned'}",
        "--block_size=8", "--dropout=0.1", "--max_iters=20", "--learning_rate=1e-2",
        "--device=cpu", "--sample_tokens=5",
    ]  # fmt: skip
    trained = call(train, *flags)
    assert trained.returncode == 0, trained.stderr
    assert "from the weights in gpt2-xl" in trained.stdout
    rows = (tmp_path / "tuned" / "log.csv").read_text().splitlines()
    assert float(rows[-1].split(",")[4]) < float(rows[1].split(",")[4]) - 0.1
    wrote = call(sample, "--init_from=gpt2-xl", "--start=low", "--max_new_tokens=5", "--device=cpu")
    assert wrote.returncode == 0, wrote.stderr
    assert wrote.stdout.startswith("low")


def test_another_vocabulary_is_refused_before_anything_is_trained(hub, call, rhyme, tmp_path):
    flags = ("--init_from=gpt2-xl", f"--dataset={rhyme}", f"--out_dir={tmp_path / 'tuned'}")
    assert_one_line_error(call(train, *flags, "--block_size=8"), "its tokenizer is not the one")
    assert_one_line_error(call(train, *flags, "--block_size=99"), "--block_size=99")
    assert_one_line_error(call(train, *flags, "--n_layer=5"), "n_layer=5")
    assert not (tmp_path / "tuned").exists()


def test_without_a_network_the_hub_is_named(call, tmp_path, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(gpt2_module, "DATA", tmp_path)
    assert_one_line_error(call(sample, "--init_from=gpt2"), "127.0.0.1:9", "no connection")


def test_gpt2s_own_vocabulary_is_read_in_all_its_formats(gpt2, tmp_path):
    printable_files(gpt2, tmp_path)
    assert load_tokenizer(tmp_path) == gpt2
    contents = gpt2.as_json()
    del contents["model"]["type"]  # the published file is older than the key
    contents["model"]["merges"] = [" ".join(pair) for pair in contents["model"]["merges"]]
    (tmp_path / "tokenizer.json").write_text(json.dumps(contents), encoding="utf-8")
    assert load_tokenizer(tmp_path) == gpt2
