"""The files of a run folder, which transformers and Folio read from each other."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch.utils._python_dispatch import TorchDispatchMode

from configurator import FolioError
from data.dataset import Dataset, ShardedTokens
from data.tokenizer import CharTokenizer, save_tokenizer
from engine import checkpoint
from engine.checkpoint import (
    CHECKPOINT_FILE, WEIGHTS_FILE, find_checkpoint, load_checkpoint, load_model,
    load_model_and_tokenizer, padding_token, read_config, save_checkpoint, save_model,
    save_model_card,
)  # fmt: skip
from engine.hf_format import uninitialized_model
from engine.run import restore, save_run, save_run_tokenizer
from engine.run_folder import SETTINGS_FILE, move_old_run_aside
from engine.train_config import TrainConfig
from model import GPT, GPTConfig
from tests.fuzzing import Count, fuzz_settings, mutations
from tests.test_tokenizer import AWKWARD_TEXT, toy_bpe
from tests.test_train import assert_same_state, batches_of, start_training, train_step

posix_only = pytest.mark.skipif(sys.platform == "win32", reason="limits the size of a file")
CONFIG = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)


def random_model(**changes) -> GPT:
    model = GPT(GPTConfig(**{**CONFIG.__dict__, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def edit_json(path, changes: dict) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def assert_close(ours, theirs):
    torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5)


# --- Saving and loading a model ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("pad_vocab_to", [1, 8])
def test_transformers_loads_a_saved_model_with_the_same_logits(
    tmp_path, tokens, bias, pad_vocab_to
):
    model = random_model(bias=bias, pad_vocab_to=pad_vocab_to)
    save_model(model, str(tmp_path))
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(theirs).__name__ == "GPT2LMHeadModel"
    assert theirs.config.n_ctx == theirs.config.n_positions == 8  # n_ctx: for other programs
    with torch.no_grad():
        assert_close(model(tokens), theirs(tokens).logits)
        expected = theirs.generate(tokens[:, :3], max_new_tokens=5, do_sample=False, pad_token_id=0)
    assert torch.equal(model.generate(tokens[:, :3], 5, top_k=1), expected)


def test_load_model_opens_what_transformers_saved(tmp_path, tokens):
    sizes = {"n_positions": 8, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16}
    theirs = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes)).eval()
    theirs.save_pretrained(tmp_path)
    with torch.no_grad():
        assert_close(load_model(str(tmp_path))(tokens), theirs(tokens).logits)


@pytest.mark.parametrize("bias", [True, False])
def test_a_saved_model_is_loaded_bit_by_bit_and_in_eval_mode(tmp_path, bias):
    model = random_model(bias=bias, pad_vocab_to=8, dropout=0.1)
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert not loaded.training
    assert loaded.config == GPTConfig(**{**model.config.__dict__, "pad_vocab_to": 1})
    padded = load_model(tmp_path, pad_vocab_to=8)
    for name, tensor in model.state_dict().items():
        rows = slice(13) if "wte" in name else slice(None)
        assert torch.equal(tensor[rows], loaded.state_dict()[name]), name
        assert torch.equal(tensor[rows], padded.state_dict()[name][rows]), name


def test_model_without_biases_gets_biases_if_transformers_trained_them(tmp_path, tokens):
    save_model(random_model(bias=False), tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        theirs.transformer.h[0].mlp.c_fc.bias.add_(1)
    theirs.save_pretrained(tmp_path)
    loaded = load_model(tmp_path)
    assert loaded.config.bias
    assert_close(loaded(tokens), theirs(tokens).logits)


def test_block_size_can_be_reduced_but_not_increased(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    cropped = load_model(tmp_path, block_size=4)
    torch.testing.assert_close(cropped(tokens[:, :4]), model(tokens[:, :4]))
    with pytest.raises(FolioError, match="block_size=9"):
        load_model(tmp_path, block_size=9)


def test_rows_of_the_embedding_that_have_no_token_take_no_part(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    loaded = load_model(tmp_path, vocab_size=10)
    assert_close(loaded(tokens % 10), model(tokens % 10)[..., :10])
    with pytest.raises(FolioError, match="tokenizer has 14 tokens, the model embeddings for 13"):
        load_model(tmp_path, vocab_size=14)
    save_model(random_model(vocab_size=2000), tmp_path)
    with pytest.raises(FolioError, match=r"tokenizer has 13 tokens, .* for 2,000"):
        load_model(tmp_path, vocab_size=13)  # no padding is as large: another tokenizer


def test_compiled_model_is_saved_as_the_model_itself(tmp_path):
    model = random_model()
    save_model(torch.compile(model), tmp_path)
    for name, tensor in load_model(tmp_path).state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_save_model_refuses_what_is_not_a_whole_gpt(tmp_path):
    save_model(random_model(), tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    changed = random_model()
    del changed.transformer.h[0].attn.c_attn.weight  # as packing the weights for a CPU does
    for model in (changed, torch.nn.Linear(2, 2), torch.compile(torch.nn.Linear(2, 2))):
        with pytest.raises(TypeError):
            save_model(model, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before


@posix_only
def test_if_the_disk_is_full_the_old_model_stays_as_it_was(tmp_path, tokens):
    import resource

    model = random_model()
    save_model(model, tmp_path)
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(FolioError, match="write failed"):
            save_model(random_model(n_embd=64), tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens))


# --- Tokenizer, padded batches, model card ---


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer.from_text(AWKWARD_TEXT), toy_bpe()], ids=["char", "bpe"]
)
def test_auto_tokenizer_gives_the_same_ids(tmp_path, tokenizer):
    save_model(random_model(vocab_size=tokenizer.vocab_size), tmp_path, tokenizer)
    save_tokenizer(tokenizer, tmp_path, model_max_length=8)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.model_max_length == 8
    assert len(theirs) == tokenizer.vocab_size
    ids = tokenizer.encode_prompt(AWKWARD_TEXT).tolist()  # with the end-of-text token, if there
    assert theirs(AWKWARD_TEXT)["input_ids"] == ids
    assert theirs.decode(ids) == AWKWARD_TEXT
    model, again = load_model_and_tokenizer(str(tmp_path))
    assert again == tokenizer and model.config.vocab_size == tokenizer.vocab_size


@pytest.mark.parametrize(
    "tokenizer", [CharTokenizer.from_text("low er"), toy_bpe()], ids=["char", "bpe"]
)
def test_padded_batches_work_in_transformers(tmp_path, tokenizer):
    model = random_model(vocab_size=tokenizer.vocab_size)
    save_model(model, tmp_path, tokenizer)
    pad = {"pad_token": tokenizer.decode([0])} if tokenizer.eos_token_id is None else {}
    save_tokenizer(tokenizer, tmp_path, **pad)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    batch = theirs(["low", "lower lo"], padding=True, return_tensors="pt")
    with torch.no_grad():
        gpt = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        logits = gpt(**batch).logits
        short = torch.from_numpy(tokenizer.encode("low"))[None]
        assert_close(logits[:1, : short.size(1)], model(short))
        theirs.padding_side = "left"
        batch = theirs(["low", "lower"], padding=True, return_tensors="pt")
        generated = gpt.generate(**batch, do_sample=False, max_new_tokens=2)
    assert torch.equal(generated[0, -2:], model.generate(short, 2, top_k=1)[0, -2:])


def test_padding_token_is_the_rarest_one_if_it_is_rare(tmp_path):
    ids = np.zeros(20_000, dtype="<u2")
    ids[:4] = 1, 1, 2, 2
    ids.tofile(tmp_path / "train.bin")
    assert padding_token(ShardedTokens(tmp_path, "train", {}, vocab_size=3)) == 1
    assert padding_token(ShardedTokens(tmp_path, "train", {}, vocab_size=4)) == 3
    ids[4:6] = 1, 2  # each 3 in 20,000
    ids.tofile(tmp_path / "train.bin")
    assert padding_token(ShardedTokens(tmp_path, "train", {}, vocab_size=3)) is None


def test_the_padding_token_is_rare_in_all_of_the_text(tmp_path):
    """For example, a text whose second half is in another alphabet."""
    np.repeat(np.arange(2, dtype="<u2"), (2**20, 2**15)).tofile(tmp_path / "train.bin")
    assert padding_token(ShardedTokens(tmp_path, "train", {}, vocab_size=2)) is None


def test_padding_token_refuses_ids_outside_the_vocabulary(tmp_path):
    ids = np.zeros(70_000, "<u2")
    ids[-1] = 9
    ids.tofile(tmp_path / "train.bin")
    tokens = ShardedTokens(tmp_path, "train", {}, vocab_size=4)
    with pytest.raises(FolioError, match="token id 9 is out of range"):
        padding_token(tokens)


@pytest.mark.parametrize(("counts", "pad"), [((20_000, 1, 2), "b"), ((7, 5, 8), None)])
def test_transformers_fills_up_batches_with_a_rare_character_only(tmp_path, counts, pad):
    """transformers leaves the padding token out of all text that it decodes."""
    np.repeat(np.arange(3, dtype="<u2"), counts).tofile(tmp_path / "train.bin")
    train = ShardedTokens(tmp_path, "train", {}, vocab_size=3)
    dataset = Dataset(tmp_path, CharTokenizer.from_text("abc"), {}, train=train, val=train)
    save_run_tokenizer(tmp_path, TrainConfig(block_size=8), dataset)
    save_model(GPT(GPTConfig(8, 3, 1, 1, 8)), tmp_path, dataset.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    assert (theirs.pad_token, theirs.model_max_length) == (pad, 8)
    gpt = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    generate = transformers.pipeline("text-generation", model=gpt, tokenizer=theirs, device="cpu")
    text = generate("abcab", max_new_tokens=2, do_sample=False)[0]["generated_text"]
    assert len(text) == 7 or pad
    ids = theirs("abcab")["input_ids"]
    assert theirs.decode(ids, skip_special_tokens=True) == ("aca" if pad else "abcab")


def test_model_card_names_data_settings_loss_and_how_to_load(tmp_path):
    config = TrainConfig(dataset="shakespeare_char", n_layer=4, n_embd=128, max_iters=2000)
    meta = {"source": "https://example.com/input.txt", "train_tokens": 1_003_854}
    (tmp_path / "my_run").mkdir()
    save_model_card(
        str(tmp_path / "my_run"), config, meta,
        step=1750, tokens=1_792_000, val_loss=1.556, bits_per_byte=2.2448,
    )  # fmt: skip
    card = (tmp_path / "my_run" / "README.md").read_text(encoding="utf-8")
    for words in (
        "pipeline_tag: text-generation", "# my_run", "https://example.com/input.txt", "1,003,854",
        "4 layers", "128 channels", "1,750 of 2,000 steps, 1,792,000 tokens, ", "1.5560",
        "2.245 bits per byte",
        "Muon (learning rate 0.02) and AdamW (learning rate 0.005)",
        f'load_model_and_tokenizer("{(tmp_path / "my_run").as_posix()}")', "from transformers",
    ):  # fmt: skip
        assert words in card
    assert "validation tokens" not in card


def test_model_card_says_that_not_all_validation_tokens_were_used(tmp_path):
    numbers = {"step": 1, "tokens": 8, "val_loss": 2, "bits_per_byte": 3, "n_val_tokens": 2001}
    save_model_card(tmp_path, TrainConfig(eval_tokens=2000), {}, **numbers)
    card = (tmp_path / "README.md").read_text(encoding="utf-8")
    assert "3.000 bits per byte on the first 2,000 validation tokens |" in card


def test_model_card_names_a_text_whose_file_name_is_not_utf8(tmp_path):
    numbers = {"step": 1, "tokens": 8, "val_loss": 2, "bits_per_byte": 3}
    save_model_card(tmp_path, TrainConfig(), {"source": "/caf\udce9.txt"}, **numbers)
    assert "from /caf?.txt" in (tmp_path / "README.md").read_text(encoding="utf-8")


def test_a_model_card_that_was_changed_by_hand_is_kept(tmp_path, capsys):
    numbers = {"tokens": 8, "val_loss": 2, "bits_per_byte": 3}
    config = TrainConfig(init_from="gpt2")
    card = tmp_path / "README.md"
    for step in (1, 2):
        save_model_card(tmp_path, config, {}, step=step, **numbers)
    assert [path.name for path in tmp_path.iterdir()] == ["README.md"]  # ours was replaced
    assert "finetuned from `gpt2`" in card.read_text()
    for changed in (card.read_text() + "my note\n", "# My model\n"):
        card.write_text(changed)
        save_model_card(tmp_path, config, {}, step=3, **numbers)
        kept = max(tmp_path.glob("README.md.*"))
        assert kept.read_text() == changed
        assert f"kept as {kept.name}" in capsys.readouterr().out
        assert "3 of 2,000 steps" in card.read_text()
    save_model_card(tmp_path, config, {}, step=2010, **numbers)  # resumed with smaller max_iters
    assert "2,010 of 2,010 steps" in card.read_text()


# --- Weights saved by other programs ---


def rewrite(folder, change, metadata=None):
    """Load the tensors of a folder, change their names or values, and save them again."""
    tensors = change(load_file(folder / WEIGHTS_FILE))
    save_file(tensors, folder / WEIGHTS_FILE, metadata)


def test_names_without_prefix_and_causal_masks_are_read(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    mask = {"h.0.attn.bias": torch.tril(torch.ones(8, 8))[None, None]}
    rewrite(
        tmp_path, lambda old: {k.removeprefix("transformer."): v for k, v in old.items()} | mask
    )
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize("prefix", ["_orig_mod.", "module.", "module._orig_mod."])
def test_prefixes_of_compiled_and_distributed_models_are_removed(tmp_path, tokens, prefix):
    model = random_model()
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda old: {prefix + name: tensor for name, tensor in old.items()})
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens))


def test_a_tied_matrix_is_read_under_either_name(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda old: old | {"lm_head.weight": old.pop("transformer.wte.weight")})
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens))
    rewrite(tmp_path, lambda old: old | {"transformer.wte.weight": old["lm_head.weight"] + 1})
    with pytest.raises(FolioError, match=r"lm_head\.weight differs .* no untied lm_head"):
        load_model(tmp_path)


def test_defaults_of_generation_that_a_user_added_are_kept(tmp_path):
    save_model(random_model(), tmp_path)
    edit_json(tmp_path / "generation_config.json", {"temperature": 0.7, "max_length": 99})
    save_model(random_model(), tmp_path)
    contents = json.loads((tmp_path / "generation_config.json").read_text())
    assert contents["temperature"] == 0.7
    assert contents["max_length"] == CONFIG.block_size  # of the model
    (tmp_path / "generation_config.json").write_text('{"temperature": 0.7,}')  # not valid JSON
    save_model(random_model(), tmp_path)  # a run must not end because of it
    assert "temperature" not in (tmp_path / "generation_config.json").read_text()


def test_a_loaded_model_does_not_change_if_its_file_does(tmp_path, tokens):
    save_model(random_model(), tmp_path / "new")
    save_model(random_model(), tmp_path / "live")
    model = load_model(tmp_path / "live")
    before = model(tokens)
    (tmp_path / "live" / WEIGHTS_FILE).write_bytes((tmp_path / "new" / WEIGHTS_FILE).read_bytes())
    assert torch.equal(model(tokens), before)


def test_weights_of_several_precisions_become_float32(tmp_path, tokens):
    model, positions = random_model(), "transformer.wpe.weight"
    save_model(model.double(), tmp_path)
    rewrite(tmp_path, lambda old: old | {positions: old[positions].float()})
    loaded = load_model(tmp_path)
    assert {parameter.dtype for parameter in loaded.parameters()} == {torch.float32}
    assert_close(loaded(tokens), model.float()(tokens))


@pytest.mark.parametrize("name", ["gelu_fast", "gelu_pytorch_tanh", "gelu_accurate"])
def test_all_names_of_the_tanh_gelu_are_accepted(tmp_path, tokens, name):
    model = random_model()
    save_model(model, tmp_path)
    edit_json(tmp_path / "config.json", {"activation_function": name})
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert_close(load_model(tmp_path)(tokens), theirs(tokens).logits)


def test_shards_are_read_and_a_missing_one_is_named(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    theirs.save_pretrained(tmp_path, max_shard_size="8KB")
    first, second, *_ = sorted(path.name for path in tmp_path.glob("model-*.safetensors"))
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens))
    (tmp_path / second).unlink()
    with pytest.raises(FolioError, match=f"{second}: cannot be read") as caught:
        load_model(tmp_path)
    assert first not in str(caught.value)


def test_shards_in_torch_format_are_read(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    (tmp_path / WEIGHTS_FILE).unlink()
    names = [f"pytorch_model-0000{i}-of-00002.bin" for i in (1, 2)]
    weight_map = {name: names[i % 2] for i, name in enumerate(weights)}
    for shard in names:
        torch.save({n: t for n, t in weights.items() if weight_map[n] == shard}, tmp_path / shard)
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens))


@pytest.mark.parametrize(
    "contents",
    ["{}", "[1]", '{"weight_map": [1]}', '{"weight_map": {"a": 1}}', "[" * 10**5, "{", "\xff"],
    ids=lambda contents: contents[:30],
)
def test_malformed_index_is_refused_by_name(tmp_path, contents):
    save_model(random_model(), tmp_path)
    (tmp_path / WEIGHTS_FILE).unlink()
    (tmp_path / f"{WEIGHTS_FILE}.index.json").write_text(contents, encoding="latin-1")
    with pytest.raises(FolioError, match=r"model\.safetensors\.index\.json"):
        load_model(tmp_path)


def test_an_uninitialized_model_has_the_shapes_and_draws_no_numbers():
    operations = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            operations.append(func.name())
            return func(*args, **(kwargs or {}))

    config = GPTConfig(8, 13, 2, 2, 16)
    with Recorder():
        model = uninitialized_model(config)
    assert operations and not any("normal_" in name or "uniform_" in name for name in operations)
    shapes = {name: p.shape for name, p in model.named_parameters()}
    assert shapes == {name: p.shape for name, p in GPT(config).named_parameters()}


def test_a_run_that_is_replaced_while_it_is_loaded_is_never_a_mixture(tmp_path, monkeypatch):
    run, other = tmp_path / "run", tmp_path / "other"
    for folder, letters in ((run, "abcdefghijklm"), (other, "ABCDEFGHIJKLM")):
        tokenizer = CharTokenizer(letters)
        save_model(random_model(), folder, tokenizer)
        save_tokenizer(tokenizer, folder)
    load_model = checkpoint.load_model

    def replace_and_load(*args, **kwargs):
        if other.exists():
            run.rename(tmp_path / "run.1")
            other.rename(run)
        return load_model(*args, **kwargs)

    monkeypatch.setattr(checkpoint, "load_model", replace_and_load)
    _, tokenizer = checkpoint.load_model_and_tokenizer(run)
    assert tokenizer == CharTokenizer("ABCDEFGHIJKLM")


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
def test_pytorch_model_bin_is_read_without_executing_it(tmp_path, tokens, legacy):
    model = random_model()
    save_model(model, tmp_path)
    weights = load_file(tmp_path / WEIGHTS_FILE)
    weights["lm_head.weight"] = weights["transformer.wte.weight"]
    (tmp_path / WEIGHTS_FILE).unlink()
    path = tmp_path / "pytorch_model.bin"
    torch.save(weights, path, _use_new_zipfile_serialization=not legacy)
    loaded = load_model(tmp_path)
    torch.testing.assert_close(loaded(tokens), model(tokens))
    if not legacy:  # another program saves its next weights into the file
        path.write_bytes(bytes(path.stat().st_size))
        torch.testing.assert_close(loaded(tokens), model(tokens))
    path.write_bytes(f"cposix\nsystem\n(S'touch {tmp_path / 'marker'}'\ntR.".encode())
    with pytest.raises(FolioError, match=r"pytorch_model\.bin: damaged"):
        load_model(tmp_path)
    assert not (tmp_path / "marker").exists()


def test_git_lfs_pointer_is_called_what_it_is(tmp_path):
    save_model(random_model(), tmp_path)
    (tmp_path / WEIGHTS_FILE).write_text(
        "version https://git-lfs.github.com/spec/v1\noid sha256:0123\nsize 548105171\n"
    )
    with pytest.raises(FolioError, match=r"model\.safetensors: a Git LFS pointer.*git lfs pull"):
        load_model(tmp_path)


def test_a_folder_without_weights_names_the_files_it_has(tmp_path):
    save_model(random_model(), tmp_path)
    (tmp_path / WEIGHTS_FILE).rename(tmp_path / "adapter_model.safetensors")
    with pytest.raises(FolioError, match=r"no weights .*it holds adapter_model\.safetensors"):
        load_model(tmp_path)


def test_a_cast_that_keeps_the_checksum_is_noticed_and_can_be_accepted(
    tmp_path, tokens, monkeypatch
):
    model = random_model()
    save_model(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS_FILE, "pt") as file:
        metadata = file.metadata()
    rewrite(tmp_path, lambda old: {name: t.half() for name, t in old.items()}, metadata)
    with pytest.raises(FolioError, match="folio_sha256") as caught:
        load_model(tmp_path)
    assert str(caught.value).count("\n") == 0
    code, path = re.search(
        r'To accept a change: python -c "(.*)" (\S+)$', str(caught.value)
    ).groups()
    monkeypatch.setattr(sys, "argv", ["-c", path])
    exec(code)
    torch.testing.assert_close(load_model(tmp_path)(tokens), model(tokens), rtol=0.02, atol=0.02)


def test_checksums_of_other_programs_are_ignored(tmp_path, tokens):
    model = random_model()
    save_model(model, tmp_path)
    rewrite(tmp_path, lambda old: old, {"format": "pt", "sha256": "of something else"})
    assert_close(load_model(tmp_path)(tokens), model(tokens))


def test_a_run_without_weights_is_told_from_a_folder_without_a_model(tmp_path):
    with pytest.raises(FolioError, match="no model found; train one"):
        load_model(tmp_path)
    (tmp_path / CHECKPOINT_FILE).touch()
    with pytest.raises(
        FolioError, match=r"no weights have been saved yet; .*: python train\.py --init_from"
    ):
        load_model(tmp_path)


def test_all_weights_that_do_not_fit_are_listed(tmp_path):
    save_model(random_model(), tmp_path)

    def change(tensors):
        tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][:5].clone()
        tensors["transformer.extra"] = torch.zeros(1)
        del tensors["transformer.ln_f.bias"]
        return tensors

    rewrite(tmp_path, change)
    with pytest.raises(FolioError) as caught:
        load_model(tmp_path)
    for problem in (
        "transformer.ln_f.bias is missing",
        "transformer.extra is unknown",
        "transformer.wpe.weight is [5, 16], not [8, 16]",
    ):
        assert problem in str(caught.value)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"}, {"activation_function": "relu"}, {"n_inner": 7},
        {"scale_attn_by_inverse_layer_idx": True}, {"add_cross_attention": True},
        {"num_attention_heads": 4}, {"num_hidden_layers": 1},
        {"n_embd": 10**12}, {"n_layer": 10**7}, {"n_layer": -1}, {"n_layer": 0}, {"n_head": 3},
        {"vocab_size": "13"}, {"vocab_size": True}, {"bias": "no"}, {"activation_function": []},
        {"tie_word_embeddings": False}, {"resid_pdrop": 7}, {"n_positions": None},
    ],
    ids=str,
)  # fmt: skip
def test_architecture_that_is_not_gpt2_is_refused(tmp_path, change):
    save_model(random_model(), tmp_path)
    edit_json(tmp_path / "config.json", change)
    with pytest.raises(FolioError, match=r"config\.json"):
        read_config(str(tmp_path))


def test_any_config_json_is_accepted_or_refused(tmp_path, n_trials):
    save_model(random_model(n_layer=1), tmp_path)
    path, count = tmp_path / "config.json", Count()

    @fuzz_settings(n_trials)
    @given(mutations(json.loads(path.read_text())))
    def check(contents):
        path.write_text(json.dumps(contents), encoding="utf-8")
        count.inputs += 1
        try:
            config = read_config(tmp_path)
        except FolioError as error:
            assert "config.json" in str(error)
        else:
            count.accepted += 1
            assert 0 < config.n_embd < 2**24 and config.n_embd % config.n_head == 0

    check()
    assert count.fraction_accepted() > 0.1


# --- Resuming ---


@pytest.mark.skipif(sys.platform != "linux", reason="reads the list of mapped files in /proc")
def test_a_checkpoint_is_memory_mapped_until_it_is_restored(tiny_flags, tmp_path):
    """Later it must not be: Windows could not replace the file by the next checkpoint."""
    run, restored = start_training(*tiny_flags), start_training(*tiny_flags, "--seed=2")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / SETTINGS_FILE).touch()
    train_step(run, batches_of(run))
    parts = (run.model, run.optimizer, run.scaler, run.dataset)
    save_run(tmp_path / "run", run.config, run.state, *parts)

    def is_mapped() -> bool:
        return CHECKPOINT_FILE in Path("/proc/self/maps").read_text()

    saved = load_checkpoint(tmp_path / "run")
    assert is_mapped()
    parts = (restored.model, restored.optimizer, restored.scaler, restored.dataset)
    restore(saved, restored.config, *parts)
    del saved
    assert not is_mapped()
    assert_same_state(restored.model.state_dict(), run.model.state_dict())
    left, right = restored.optimizer.state_dict(), run.optimizer.state_dict()
    assert left.keys() == right.keys() == {"AdamW", "Muon"}
    for name in left:
        assert_same_state(left[name]["state"], right[name]["state"])


# --- Damaged or missing files ---


def test_a_model_is_saved_and_loaded_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save_model(random_model(), "~/mine")
    assert load_model("~/mine").config == load_model(tmp_path / "mine").config


def test_sizes_that_the_weights_determine_cannot_be_replaced(tmp_path):
    """n_head changes no shape, but the result."""
    model = random_model()
    save_model(model, tmp_path)
    assert load_model(tmp_path, n_head=model.config.n_head, dropout=0.5).config.dropout == 0.5
    with pytest.raises(ValueError, match="n_head=1: the weights in"):
        load_model(tmp_path, n_head=1)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
def test_weights_that_are_not_finite_are_refused(tmp_path, number):
    model = random_model()
    save_model(model, tmp_path)
    before = (tmp_path / WEIGHTS_FILE).read_bytes()
    with torch.no_grad():
        model.transformer.ln_f.weight[0] = number
    with pytest.raises(FolioError, match="not saved: the weights contain NaN or infinity"):
        save_model(model, tmp_path)
    assert (tmp_path / WEIGHTS_FILE).read_bytes() == before
    name = "transformer.ln_f.weight"
    rewrite(tmp_path, lambda tensors: {**tensors, name: torch.full_like(tensors[name], number)})
    with pytest.raises(FolioError, match="NaN or infinity"):
        load_model(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 half", b"<html>", "half", "pickle"])
def test_damaged_checkpoint_is_refused_and_not_executed(tmp_path, damage):
    save_checkpoint(str(tmp_path), {"step": 3, "model": {"w": torch.ones(3)}})
    assert load_checkpoint(str(tmp_path))["step"] == 3
    path, marker = tmp_path / CHECKPOINT_FILE, tmp_path / "marker"
    if damage == "half":
        damage = path.read_bytes()[: path.stat().st_size // 2]
    elif damage == "pickle":
        damage = f"cposix\nsystem\n(S'touch {marker}'\ntR.".encode()
    path.write_bytes(damage)
    with pytest.raises(FolioError, match=r"resume\.pt: damaged"):
        load_checkpoint(tmp_path)
    assert not marker.exists()


@posix_only
def test_a_full_disk_is_one_line_and_leaves_the_old_checkpoint(tmp_path):
    import resource

    save_checkpoint(tmp_path, {"step": 3})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limit[1]))
    try:
        with pytest.raises(FolioError, match="File too large"):
            save_checkpoint(tmp_path, {"model": torch.zeros(100_000)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    assert [path.name for path in tmp_path.iterdir()] == [CHECKPOINT_FILE]
    assert load_checkpoint(tmp_path) == {"step": 3}


def test_an_error_of_the_gpu_is_not_taken_for_one_of_the_disk(tmp_path, monkeypatch):
    """It may surface while an OSError, which has nothing to do with it, is handled."""

    def fail(*_) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(torch, "save", fail)
    try:
        raise OSError("unrelated")
    except OSError:
        with pytest.raises(RuntimeError, match="CUDA error"):
            save_checkpoint(tmp_path, {})


def test_checkpoint_that_is_not_a_dict_is_refused(tmp_path):
    torch.save([1, 2, 3], tmp_path / CHECKPOINT_FILE)
    with pytest.raises(FolioError, match="holds a list"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("damage", [b"", b"\xff" * 99, b"<html>", b"half"])
def test_damaged_weights_are_refused(tmp_path, damage):
    save_model(random_model(), tmp_path)
    path = tmp_path / WEIGHTS_FILE
    path.write_bytes(path.read_bytes()[:999] if damage == b"half" else damage)
    with pytest.raises(FolioError, match="damaged weights"):
        load_model(tmp_path)
    path.unlink()
    with pytest.raises(FolioError, match="no weights"):
        load_model(tmp_path)


@pytest.mark.parametrize("name", [WEIGHTS_FILE, CHECKPOINT_FILE, "config.json"])
def test_unreadable_file_is_called_neither_missing_nor_damaged(tmp_path, name):
    save_model(random_model(), tmp_path)
    (tmp_path / name).unlink(missing_ok=True)
    (tmp_path / name).mkdir()  # a folder cannot be read, not even by an administrator
    with pytest.raises(FolioError, match=rf"{name}: cannot be read \(.*[Dd]irectory"):
        (load_checkpoint if name == CHECKPOINT_FILE else load_model)(tmp_path)


def test_missing_checkpoint_is_reported_with_the_way_to_go_on(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    with pytest.raises(FolioError, match="--init_from=scratch starts a new run"):
        find_checkpoint(str(folder))
    save_model(random_model(), folder)
    with pytest.raises(FolioError, match=f"--init_from={folder} --out_dir={folder}-2"):
        find_checkpoint(folder)
    (folder / "ckpt.pt").touch()
    for function in (find_checkpoint, move_old_run_aside):
        with pytest.raises(FolioError, match=r"ckpt\.pt: a checkpoint of nanoGPT"):
            function(folder)
