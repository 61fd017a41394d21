"""GPT-2: the same logits, losses, updates and greedy text as transformers; weights by name."""

import logging
import shlex
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
import transformers

import sample
import train
from configurator import FolioError
from data import prepare_text
from data.prepare import split_text, write_dataset
from data.tokenizer import load_tokenizer, save_tokenizer
from engine.checkpoint import WEIGHTS_FILE, load_model, load_model_and_tokenizer, save_model
from engine.hf_format import hf_names, read_weights
from model import GPT, GPTConfig
from tests.conftest import assert_one_line_error
from tests.hub_server import HubServer, use_hub
from tests.test_tokenizer import AWKWARD_TEXT, toy_bpe

SIZES = [
    {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 4, "vocab_size": 11},
    {"n_layer": 3, "n_head": 4, "n_embd": 32, "n_positions": 16, "vocab_size": 97},
    {"n_layer": 2, "n_head": 5, "n_embd": 40, "n_positions": 24, "vocab_size": 50},
]


@pytest.fixture(params=SIZES, ids=["small", "deep", "odd"])
def pair(request, tmp_path):
    """transformers' GPT-2 with random weights in float64, and Folio's, loaded from its folder."""
    config = transformers.GPT2Config(
        **request.param,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    theirs = transformers.GPT2LMHeadModel(config).double()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "theirs")
    return load_model(tmp_path / "theirs"), theirs


def random_ids(model: GPT) -> torch.Tensor:
    return torch.randint(model.config.vocab_size, (3, model.config.block_size))


def test_logits_equal_transformers_in_both_directions(pair, tmp_path):
    ours, theirs = pair
    idx = random_ids(ours)
    with torch.no_grad():
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=1e-9, atol=1e-9)
        save_model(ours, tmp_path / "ours")
        again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
        assert again.dtype == torch.float64
        torch.testing.assert_close(ours(idx), again(idx).logits, rtol=1e-9, atol=1e-9)
        ours.float(), theirs.float()
        torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=2e-5, atol=2e-5)


def test_loss_equals_transformers(pair):
    ours, theirs = pair
    idx = random_ids(ours)
    loss = ours(idx[:, :-1], idx[:, 1:])
    torch.testing.assert_close(loss, theirs(idx, labels=idx).loss.double(), rtol=1e-6, atol=0)


def test_greedy_text_equals_transformers(pair):
    ours, theirs = pair
    prompt = random_ids(ours)[:, :2]
    n = ours.config.block_size - 2
    expected = theirs.generate(prompt, max_new_tokens=n, do_sample=False, pad_token_id=0)
    assert torch.equal(ours.generate(prompt, n, top_k=1), expected)


def test_an_update_equals_transformers(pair, tmp_path):
    ours, theirs = pair
    ours.train(), theirs.train()
    idx = random_ids(ours)
    targets = idx.roll(-1, 1)
    their_loss = F.cross_entropy(theirs(idx).logits.flatten(0, 1), targets.flatten())
    for model, loss in ((ours, ours(idx, targets)), (theirs, their_loss)):
        loss.backward()
        torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.1).step()
    theirs.save_pretrained(tmp_path / "updated")
    expected = load_model(tmp_path / "updated").state_dict()
    for name, tensor in ours.state_dict().items():
        torch.testing.assert_close(tensor, expected[name], rtol=1e-9, atol=1e-9, msg=name)


# --- Models and tokenizers that other programs saved ---


# In quotes: to evaluate these types takes seconds in every worker of pytest-xdist.
def their_model(vocab_size: int, **settings) -> "transformers.GPT2LMHeadModel":
    return transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=vocab_size, n_positions=16, n_embd=8, n_layer=2, n_head=2,
            bos_token_id=0, eos_token_id=0, **settings,
        )
    ).eval()  # fmt: skip


def their_tokenizer(folder: Path) -> "transformers.PreTrainedTokenizerFast":
    folder.mkdir(exist_ok=True)
    save_tokenizer(toy_bpe(), folder, model_max_length=16)
    return transformers.AutoTokenizer.from_pretrained(folder)


def save_with_added_tokens(folder: Path) -> None:
    tokenizer = their_tokenizer(folder)
    model = their_model(len(tokenizer))
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|user|>", "<|assistant|>"]})
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def save_with_padded_table(folder: Path) -> None:
    tokenizer = their_tokenizer(folder)
    their_model(len(tokenizer) + 47).save_pretrained(folder)


def save_head_only(folder: Path) -> None:
    model = their_model(len(their_tokenizer(folder)), activation_function="gelu_fast")
    model.save_pretrained(folder)
    (folder / WEIGHTS_FILE).unlink()
    safetensors.torch.save_model(model, str(folder / WEIGHTS_FILE), metadata={"format": "pt"})


def save_bin_only(folder: Path) -> None:
    model = their_model(len(their_tokenizer(folder)))
    model.save_pretrained(folder)
    (folder / WEIGHTS_FILE).unlink()
    torch.save(model.state_dict(), folder / "pytorch_model.bin")


@pytest.mark.parametrize(
    "save",
    [save_with_added_tokens, save_with_padded_table, save_head_only, save_bin_only],
)
def test_folders_of_other_programs_give_the_logits_and_ids_of_transformers(tmp_path, save):
    save(tmp_path)
    model, tokenizer = load_model_and_tokenizer(tmp_path)
    assert model.config.vocab_size == tokenizer.vocab_size
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode("lower <|assistant|> flow")
    assert ids.tolist() == theirs("lower <|assistant|> flow")["input_ids"]
    idx = torch.from_numpy(ids)[None, :16]
    with torch.no_grad():
        logits = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)(idx).logits
        expected = logits[..., : tokenizer.vocab_size]
        torch.testing.assert_close(model(idx), expected, rtol=2e-5, atol=2e-5)


def test_a_model_with_added_tokens_is_finetuned_on_a_new_text(call, data_folder, tmp_path):
    """By the commands that the programs print; and transformers opens the result."""
    save_with_added_tokens(tmp_path / "model")
    (tmp_path / "chat.txt").write_text("<|user|>lower<|assistant|>flow\n" * 60)
    prepared = call(
        prepare_text, tmp_path / "chat.txt", "--dataset=chat", f"--tokenizer={tmp_path / 'model'}"
    )
    assert prepared.returncode == 0, prepared.stderr
    _, _, *flags = shlex.split(prepared.stdout.partition("next:")[2])
    tuned = call(
        train, *flags, f"--out_dir={tmp_path / 'tuned'}", "--max_iters=1", "--warmup_iters=0",
        "--gradient_accumulation_steps=1", "--device=cpu", "--sample_tokens=0",
    )  # fmt: skip
    assert tuned.returncode == 0, tuned.stderr
    before, after = (
        transformers.AutoTokenizer.from_pretrained(tmp_path / name) for name in ("model", "tuned")
    )
    text = "<|user|>lower<|assistant|>"
    ids = after(text)["input_ids"]
    assert (
        ids == before(text)["input_ids"] == load_tokenizer(tmp_path / "model").encode(text).tolist()
    )
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "tuned")
    assert model.config.vocab_size == len(after) == len(before)


@pytest.mark.parametrize(
    "rename",
    [
        "model.{}".format,
        "module._orig_mod.{}".format,
        lambda name: name.replace(".attn.", "._checkpoint_wrapped_module.attn."),
        lambda name: name.replace("transformer.", "gpt.decoder."),  # a bare GPT2Model
    ],
)
def test_names_lose_what_other_programs_add_to_them(rename):
    model = their_model(11)
    names = [name for name, _ in model.named_parameters()]
    assert list(hf_names(map(rename, names)).values()) == names
    assert hf_names(["transformer.wpe.weight", "score.weight"])["score.weight"] == "score.weight"


def test_a_torch_file_with_more_than_weights_is_refused(tmp_path):
    torch.save({"state_dict": {}, "step": 3}, tmp_path / "pytorch_model.bin")
    with pytest.raises(FolioError, match="holds more than the weights"):
        read_weights(tmp_path)


# --- A run folder in transformers ---


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("gpt2") / "run"
    tokenizer = toy_bpe()
    model = GPT(GPTConfig(block_size=16, vocab_size=262, n_layer=1, n_head=1, n_embd=8))
    save_model(model, folder, tokenizer)
    save_tokenizer(tokenizer, folder, model_max_length=16)
    return folder


def test_pipeline_generates_text_without_warnings(run_folder, recwarn, caplog):
    transformers.logging.set_verbosity_warning()
    transformers.logging.enable_propagation()
    try:
        generate = transformers.pipeline("text-generation", model=str(run_folder))
        (result,) = generate("low lower")
    finally:
        transformers.logging.disable_propagation()
    assert result["generated_text"].startswith("low lower")
    assert len(result["generated_text"]) > len("low lower")
    assert [r.getMessage() for r in caplog.records if r.levelno > logging.INFO] == []
    assert [str(warning.message) for warning in recwarn] == []


def test_auto_tokenizer_gives_the_same_ids_on_awkward_texts(run_folder):
    theirs = transformers.AutoTokenizer.from_pretrained(run_folder)
    names = {theirs.bos_token, theirs.eos_token, theirs.unk_token, theirs.pad_token}
    assert names == {"<|endoftext|>"}  # as GPT-2's; CTranslate2 opens no model without unk_token
    assert len(theirs) == toy_bpe().vocab_size
    for text in (AWKWARD_TEXT, "a\r\nb", "\t\t x", "e\u0301", "🙂" * 3, "<|endoftext|>", " low  l"):
        ids = toy_bpe().encode_prompt(text).tolist()  # with the end-of-text token
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == text


# --- By name from the hub ---


@pytest.fixture
def hub(run_folder, tmp_path, monkeypatch):
    """A hub on this machine with two names for the model of run_folder, and an empty cache."""
    with HubServer() as server:
        server.use(monkeypatch, tmp_path / "cache")
        for repo in ("openai-community/gpt2-xl", "someone/My_GPT"):
            server.add_folder(repo, run_folder)
        yield server


def test_weights_are_finetuned_and_sampled_by_name(hub, call, tmp_path):
    text = "low lower slower flow\n" * 60
    write_dataset(tmp_path / "mine", toy_bpe(), split_text(text), {"source": "mine"})
    flags = [
        "--init_from=gpt2-xl", f"--dataset={tmp_path / 'mine'}", f"--out_dir={tmp_path / 'tuned'}",
        "--block_size=8", "--dropout=0.1", "--max_iters=20", "--learning_rate=1e-2",
        "--device=cpu", "--sample_tokens=5",
    ]  # fmt: skip
    trained = call(train, *flags)
    assert trained.returncode == 0, trained.stderr
    assert "gpt2-xl" in trained.stdout
    rows = (tmp_path / "tuned" / "log.csv").read_text().splitlines()
    val_losses = [float(row.split(",")[4]) for row in rows[1:] if row.split(",")[4]]
    assert val_losses[-1] < val_losses[0] - 0.1
    assert any(path.endswith(f"/{WEIGHTS_FILE}") for path in hub.paths("GET"))
    hub.requests.clear()
    flags = ("--start=low", "--max_new_tokens=5", "--device=cpu")
    sampled = call(sample, "--init_from=gpt2-xl", *flags)
    assert sampled.returncode == 0, sampled.stderr
    assert sampled.stdout.startswith("low")
    assert not any(path.endswith(f"/{WEIGHTS_FILE}") for path in hub.paths("GET"))  # cached
    sampled = call(sample, "--init_from=someone/My_GPT", *flags)
    assert sampled.returncode == 0, sampled.stderr


def test_another_vocabulary_or_size_is_refused_before_training(hub, call, tiny_dataset, tmp_path):
    flags = ("--init_from=gpt2-xl", f"--dataset={tiny_dataset}", f"--out_dir={tmp_path / 'tuned'}")
    call(train, *flags, "--block_size=8")  # downloads the model, with a progress bar
    assert_one_line_error(call(train, *flags, "--block_size=8"), "its tokenizer is not the")
    assert_one_line_error(call(train, *flags, "--block_size=99"), "block_size=99")
    assert_one_line_error(call(train, *flags, "--n_layer=5"), "n_layer=5")
    assert not (tmp_path / "tuned").exists()


def test_without_network_the_hub_and_the_way_out_are_named(call, tmp_path, monkeypatch):
    use_hub(monkeypatch, "http://127.0.0.1:9", tmp_path)
    result = call(sample, "--init_from=gpt2")
    assert_one_line_error(result, "127.0.0.1:9", "--init_from=FOLDER")
