"""A run's folder is a Hugging Face folder: what Folio writes, transformers opens, and back."""

import errno
import json
import os
import stat
import sys

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from configurator import FolioError
from data.files import replacing, write_text
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from tests.test_tokenizer import AWKWARD, toy_bpe
from training.checkpoint import (
    RESUME, SETTINGS, WEIGHTS, load_model, load_resume, locked, make_room, newest_run, read_config,
    save_model, save_resume, save_tokenizer,
)  # fmt: skip

SHAPE = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)


def random_model(**changes) -> GPT:
    model = GPT(GPTConfig(**{**SHAPE.__dict__, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


# --- In and out ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pad_vocab_to", [1, 8])
def test_transformers_opens_our_folder_and_agrees(tmp_path, tokens, bias, pad_vocab_to):
    model = random_model(bias=bias, pad_vocab_to=pad_vocab_to)
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    with torch.no_grad():
        torch.testing.assert_close(model(tokens)[0], theirs(tokens).logits, rtol=2e-5, atol=2e-5)
        wanted = theirs.generate(tokens[:, :3], max_new_tokens=5, do_sample=False, pad_token_id=0)
    drawn = torch.stack(list(model.generate(tokens[:, :3], 5, temperature=0)), dim=1)
    assert torch.equal(drawn, wanted[:, 3:])


def test_what_transformers_wrote_we_open_and_agree(tmp_path, tokens):
    shape = {"n_positions": 8, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**shape)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        ours = load_model(tmp_path, dropout=0.0)(tokens)[0]
        torch.testing.assert_close(ours, theirs(tokens).logits, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("tokenizer", [CharTokenizer.of(AWKWARD), toy_bpe()], ids=["char", "bpe"])
def test_auto_tokenizer_gives_our_ids(tmp_path, tokenizer):
    save_tokenizer(tokenizer, tmp_path)
    save_model(random_model(vocab_size=tokenizer.vocab_size), tmp_path, tokenizer.end_of_text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = tokenizer.encode(AWKWARD).tolist()
    assert theirs(AWKWARD)["input_ids"] == ids
    assert theirs.decode(ids) == AWKWARD


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_model_comes_back_bit_by_bit(tmp_path, bias):
    model = random_model(bias=bias, pad_vocab_to=8, dropout=0.1)
    save_model(model, tmp_path)
    again = load_model(tmp_path)
    assert again.config == GPTConfig(**{**model.config.__dict__, "pad_vocab_to": 1})
    padded = load_model(tmp_path, pad_vocab_to=8)
    for name, tensor in model.state_dict().items():
        rows = slice(13) if "wte" in name else slice(None)
        assert torch.equal(tensor[rows], again.state_dict()[name]), name
        assert torch.equal(tensor[rows], padded.state_dict()[name][rows]), name


def test_a_model_without_biases_that_others_gave_some_has_them(tmp_path, tokens):
    save_model(random_model(bias=False), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias.add_(1)
    theirs.save_pretrained(tmp_path)
    again = load_model(tmp_path)
    assert again.config.bias
    torch.testing.assert_close(again(tokens)[0], theirs(tokens).logits, rtol=2e-5, atol=2e-5)


def test_positions_can_be_cropped_but_not_invented(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    short = load_model(tmp_path, block_size=4)
    torch.testing.assert_close(short(tokens[:, :4])[0], model(tokens[:, :4])[0])
    with pytest.raises(FolioError, match="block_size=9"):
        load_model(tmp_path, block_size=9)


def test_published_weights_come_without_prefix_and_with_masks(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    published = {
        name.removeprefix("transformer."): tensor
        for name, tensor in load_file(tmp_path / WEIGHTS).items()
    }
    published["h.0.attn.bias"] = torch.tril(torch.ones(8, 8))[None, None]
    save_file(published, tmp_path / WEIGHTS)
    torch.testing.assert_close(load_model(tmp_path)(tokens)[0], model(tokens)[0])


def test_sharded_weights_are_read_through_their_index(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS).unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    torch.testing.assert_close(load_model(tmp_path)(tokens)[0], model(tokens)[0])


def test_everything_that_does_not_fit_is_told_at_once(tmp_path):
    save_model(random_model(), tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5].clone()
    tensors["transformer.extra"] = torch.zeros(1)
    del tensors["transformer.ln_f.bias"]
    save_file(tensors, tmp_path / WEIGHTS)
    with pytest.raises(FolioError) as caught:
        load_model(tmp_path)
    for problem in (
        "transformer.ln_f.bias is missing",
        "transformer.extra is unknown",
        "transformer.wpe.weight is [5, 16] instead of [8, 16]",
    ):
        assert problem in str(caught.value)


def test_a_head_of_its_own_is_not_gpt2s(tmp_path):
    model = random_model()
    save_model(model, tmp_path)
    tensors = load_file(tmp_path / WEIGHTS)
    save_file(
        {**tensors, "lm_head.weight": tensors["transformer.wte.weight"] + 1}, tmp_path / WEIGHTS
    )
    with pytest.raises(FolioError, match="not tied"):
        load_model(tmp_path)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 7},
        {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True},
        {"n_embd": 10**12}, {"n_layer": 10**7}, {"n_layer": -1}, {"n_head": 3},
        {"vocab_size": "13"}, {"bias": "no"},
        {"tie_word_embeddings": False}, {"resid_pdrop": 7}, {"n_positions": None},
    ],
    ids=str,
)  # fmt: skip
def test_an_architecture_that_is_not_gpt2s_is_refused(tmp_path, change):
    save_model(random_model(), tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(FolioError, match=r"config\.json"):
        read_config(tmp_path)


# --- Files that are there whole or not at all ---


def test_a_write_that_fails_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    with pytest.raises(FolioError, match="cannot be written"), replacing(path) as temporary:
        temporary.write_text("half of the n")
        raise OSError(28, "No space left on device")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows flushes no folders")
def test_a_disk_that_cannot_flush_a_folder_serves_too(tmp_path, monkeypatch):
    real = os.fsync

    def fsync(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "Invalid argument")  # as some network disks have it
        real(descriptor)

    monkeypatch.setattr(os, "fsync", fsync)
    write_text(tmp_path / "file", "new")
    assert (tmp_path / "file").read_text() == "new"


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half", b"<html>", "half", "pickle"])
def test_a_damaged_checkpoint_is_refused_and_never_run(tmp_path, damage):
    save_resume(tmp_path, {"step": 3, "model": {"w": torch.ones(3)}})
    assert load_resume(tmp_path)["step"] == 3
    path, marker = tmp_path / RESUME, tmp_path / "marker"
    if damage == "half":
        damage = path.read_bytes()[: path.stat().st_size // 2]
    elif damage == "pickle":
        damage = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    path.write_bytes(damage)
    with pytest.raises(FolioError, match=r"resume\.pt: damaged"):
        load_resume(tmp_path)
    assert not marker.exists()


@pytest.mark.parametrize("damage", [b"", b"\xff" * 99, b"<html>", b"half"])
def test_damaged_weights_are_refused(tmp_path, damage):
    save_model(random_model(), tmp_path)
    path = tmp_path / WEIGHTS
    path.write_bytes(path.read_bytes()[:999] if damage == b"half" else damage)
    with pytest.raises(FolioError, match="damaged weights"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(FolioError, match="no weights"):
        load_model(tmp_path)


# --- The folder belongs to one run ---


def test_a_folder_is_held_by_one_run_at_a_time(tmp_path):
    folder = tmp_path / "run"
    refused = pytest.raises(FolioError, match="another process")
    with locked(folder):
        make_room(folder, continuing=False)
        (folder / SETTINGS).touch()
        with refused, locked(folder):
            pass
        make_room(folder, continuing=False)  # the old run moves aside, the lock stays
        with refused, locked(folder):
            pass
    with locked(folder):
        pass


def test_an_old_run_moves_aside_and_a_stranger_is_never_moved(tmp_path, capsys):
    folder = tmp_path / "run"
    for n in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / SETTINGS).write_text(f"run {n}")
        make_room(folder, continuing=False)
        assert not (folder / SETTINGS).exists()
        assert (tmp_path / f"run.{n}" / SETTINGS).read_text() == f"run {n}"
        assert f"run.{n}" in capsys.readouterr().out
    (folder / "diary.txt").write_text("dear diary")
    with pytest.raises(FolioError, match=r"diary\.txt"):
        make_room(folder, continuing=False)
    assert (folder / "diary.txt").read_text() == "dear diary"


def test_a_run_killed_while_it_wrote_its_first_file_does_not_keep_the_folder(tmp_path):
    (tmp_path / f".{SETTINGS}.tmp").write_text("{")
    make_room(tmp_path, continuing=False)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform == "win32", reason="fcntl is not of Windows")
def test_a_disk_without_locks_is_told_of_and_used(tmp_path, capsys, monkeypatch):
    def unknown(file, how):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr("fcntl.flock", unknown)
    with locked(tmp_path / "run"):
        assert "no locks" in capsys.readouterr().out


def test_continuing_leaves_everything_but_what_a_kill_left_half_written(tmp_path):
    (tmp_path / SETTINGS).write_text("mine")
    (tmp_path / f".{RESUME}.tmp").write_text("half")
    make_room(tmp_path, continuing=True)
    assert [p.name for p in tmp_path.iterdir()] == [SETTINGS]


def test_the_newest_run_is_the_one_whose_weights_are_latest(tmp_path, monkeypatch):
    monkeypatch.setattr("training.checkpoint.HERE", tmp_path)
    with pytest.raises(FolioError, match=r"python train\.py config/shakespeare_char\.py"):
        newest_run()
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / WEIGHTS).touch()
        os.utime(folder / WEIGHTS, (1e9 - age, 1e9 - age))
    assert newest_run().name == "new"


def test_a_checkpoint_that_holds_something_else_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / RESUME)
    with pytest.raises(FolioError, match="something else"):
        load_resume(tmp_path)


def test_what_a_kill_left_of_a_copy_of_the_weights_goes_too(tmp_path):
    (tmp_path / SETTINGS).write_text("{}")
    (tmp_path / "step_000500").mkdir()
    for name in (".tmpAbCdEf", f".{WEIGHTS}.tmp", WEIGHTS):
        (tmp_path / "step_000500" / name).write_text("half")
    make_room(tmp_path, continuing=True)
    assert [path.name for path in (tmp_path / "step_000500").iterdir()] == [WEIGHTS]
