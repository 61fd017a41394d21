"""A model.py that was changed for an experiment: text, files and messages are of that model."""

import dataclasses
import functools
import json
import math
import threading

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file
from torch import nn

import explain
import sample
import train
from configurator import FolioError
from data.tokenizer import CharTokenizer
from engine.checkpoint import is_changed, load_model, load_model_and_tokenizer, save_model
from engine.changed_model import is_gpt2, small_model_is_gpt2, uses_all_parameters
from engine.hf_format import to_hf_state_dict
from engine.inference import InferenceModel
from engine.log_file import read_log
from engine.run_folder import describe_run, weights_metadata
from model import GPT, MLP, Block, CausalSelfAttention, GPTConfig, attention_weights
from tests.conftest import assert_one_line_error
from tests.test_train import start_training

GELU_OF_GPT2, LAYER_NORM_INIT = MLP.forward, nn.LayerNorm.__init__
ATTENTION_INIT, LM_HEAD = CausalSelfAttention.__init__, GPT.lm_head
GPT_INIT, MLP_INIT, FORWARD = GPT.__init__, MLP.__init__, GPT.forward
INIT_WEIGHTS = GPT.init_weights
FULL_ATTENTION = CausalSelfAttention.forward
CONFIG = GPTConfig(block_size=32, vocab_size=5, n_layer=2, n_head=2, n_embd=16)


def relu_squared(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.c_proj(torch.relu(self.c_fc(x)).square())


def exact_gelu(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.c_proj(nn.functional.gelu(self.c_fc(x)))


def no_mask(self: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    q, k, v = self.qkv(x)
    y = nn.functional.scaled_dot_product_attention(q, k, v)
    return self.c_proj(y.transpose(1, 2).reshape(x.shape))


def window(self: CausalSelfAttention, x: torch.Tensor, size: int = 16) -> torch.Tensor:
    q, k, v = self.qkv(x)
    distance = torch.arange(x.size(1))[:, None] - torch.arange(x.size(1))
    mask = (distance >= 0) & (distance < size)  # each token attends to the last `size` tokens
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    return self.c_proj(y.transpose(1, 2).reshape(x.shape))


@pytest.fixture
def change(monkeypatch):
    """change(MLP, "forward", function) changes the model until the test ends."""
    small_model_is_gpt2.cache_clear()

    def change_model(cls: type, name: str, function) -> None:
        monkeypatch.setattr(cls, name, function)
        small_model_is_gpt2.cache_clear()

    yield change_model
    monkeypatch.undo()
    small_model_is_gpt2.cache_clear()


@pytest.fixture
def learned_scale(change):
    """The scores of attention get a learned factor."""
    init, qkv = CausalSelfAttention.__init__, CausalSelfAttention.qkv

    def with_scale(self, config):
        init(self, config)
        self.scale = nn.Parameter(torch.ones(1))

    def scaled(self, x):
        q, k, v = qkv(self, x)
        return q * self.scale, k, v

    change(CausalSelfAttention, "__init__", with_scale)
    change(CausalSelfAttention, "qkv", scaled)


def random_model(config: GPTConfig = CONFIG) -> GPT:
    torch.manual_seed(0)
    model = GPT(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model


def test_the_model_as_it_is_computes_gpt2(change):
    numbers = torch.get_rng_state()
    assert small_model_is_gpt2(n_layer=2, n_head=2, block_size=32, vocab_size=5, bias=True)
    assert torch.equal(numbers, torch.get_rng_state())  # training draws its own


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("changes", [{}, {"bias": False, "pad_vocab_to": 8}, {"block_size": 1}])
def test_the_unchanged_model_is_not_called_changed(dtype, changes):
    model = random_model(dataclasses.replace(CONFIG, **changes)).to(dtype)
    assert InferenceModel(model).changed_model is None
    assert InferenceModel(model.train()).changed_model is None and model.training


def test_a_model_that_cannot_be_compared_is_not_called_changed(tmp_path):
    needs_autocast = random_model(dataclasses.replace(CONFIG, float32_attention=True)).bfloat16()
    overflows = random_model().half()
    with torch.no_grad():
        overflows.transformer.wte.weight.fill_(60_000)
    for model in (needs_autocast.train(), overflows):
        mode = model.training
        save_model(model, tmp_path)
        assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "gpt2"
        assert model.training == mode


@pytest.mark.parametrize(
    ("cls", "function"),
    [
        (MLP, relu_squared),
        (MLP, exact_gelu),
        (CausalSelfAttention, no_mask),
        (CausalSelfAttention, window),
    ],
)
def test_a_changed_model_generates_its_own_text(change, cls, function):
    change(cls, "forward", function)
    model, idx = random_model().train(), torch.tensor([[0, 1, 2], [3, 4, 0]])
    steps = InferenceModel(model).generate(idx, 40, temperature=0)
    expected = model.eval().generate(idx, 40, top_k=1)[:, 3:]
    assert torch.equal(torch.stack(list(steps), dim=1), expected)


def test_a_missing_mask_is_noticed_in_a_single_block(change):
    """The last position sees all tokens, with and without a mask; an earlier one does not."""
    change(CausalSelfAttention, "forward", no_mask)
    assert not is_gpt2(random_model(dataclasses.replace(CONFIG, n_layer=1)))


@pytest.mark.parametrize("change_model", ["one block three times", "weight_norm"])
def test_parameters_of_other_names_are_no_gpt2(change_model, tmp_path):
    """The logits equal GPT-2's logits, but transformers does not find the weights in the file."""
    model = random_model()
    if change_model == "weight_norm":
        for block in model.transformer.h:
            nn.utils.parametrizations.weight_norm(block.mlp.c_fc)
    else:
        model.transformer.h = nn.ModuleList([model.transformer.h[0]] * CONFIG.n_layer)
    assert not is_gpt2(model)


def test_a_window_that_is_almost_as_long_as_gpt2s_context_is_noticed(change, tmp_path, capsys):
    model = random_model(GPTConfig(block_size=1024, vocab_size=5, n_layer=1, n_head=2, n_embd=16))
    assert is_gpt2(model)
    change(CausalSelfAttention, "forward", functools.partialmethod(window, size=900))
    assert not is_gpt2(model)
    save_model(model, tmp_path)
    change(CausalSelfAttention, "forward", functools.partialmethod(window, size=300))
    load_model(tmp_path)
    assert "was saved with another model.py" in " ".join(capsys.readouterr().err.split())


def test_a_model_with_a_window_can_be_loaded_with_a_context_that_is_shorter(change, tmp_path):
    change(CausalSelfAttention, "forward", window)
    model, idx = random_model(), torch.tensor([[0, 1, 2]])
    save_model(model, tmp_path)
    shorter = load_model(tmp_path, block_size=8)
    assert is_gpt2(shorter)  # in 8 tokens, a window of 16 has no effect
    torch.testing.assert_close(shorter(idx), model(idx))
    change(CausalSelfAttention, "forward", FULL_ATTENTION)
    with pytest.raises(FolioError, match="make the change again"):
        load_model(tmp_path, block_size=8)


def test_a_window_in_the_fourth_layer_is_noticed(change):
    """It needs a late layer and a long context."""

    def forward(self: GPT, idx: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
        for i, block in enumerate(self.transformer.h):
            x = x + (window if i == 3 else FULL_ATTENTION)(block.attn, block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.transformer.ln_f(x)

    change(GPT, "hidden_states", forward)
    config = dataclasses.replace(CONFIG, n_layer=4)
    assert not is_gpt2(random_model(config))
    assert is_gpt2(random_model(CONFIG))  # three layers


def test_an_untied_output_layer_with_padding_can_be_loaded(change, tmp_path):
    init = GPT.__init__

    def with_head(self, config):
        init(self, config)
        self.head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)

    change(GPT, "__init__", with_head)
    change(GPT, "lm_head", lambda self, x: self.head(x)[..., : self.config.vocab_size])
    model = random_model(dataclasses.replace(CONFIG, pad_vocab_to=8))
    save_model(model, tmp_path)
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(load_model(tmp_path)(idx), model(idx))


def test_weights_of_other_sizes_are_refused_in_one_line(change, tmp_path):
    init = CausalSelfAttention.__init__

    def with_table(self, config):
        init(self, config)
        self.relative = nn.Parameter(torch.zeros(config.block_size))

    change(CausalSelfAttention, "__init__", with_table)
    save_model(random_model(), tmp_path)
    with pytest.raises(FolioError, match=r"relative is \[32\], not \[8\]\); use block_size=32"):
        load_model(tmp_path, block_size=8)


def test_a_python_list_of_layers_is_refused_before_an_old_run_is_moved(
    change, tiny_flags, tmp_path, call
):
    init = MLP.__init__

    def with_gates(self, config):
        init(self, config)
        self.known = [self.c_fc]  # another name for a layer is no mistake
        self._gates = [nn.Linear(config.n_embd, config.n_embd)]

    assert call(train, *tiny_flags).returncode == 0
    change(MLP, "__init__", with_gates)
    assert_one_line_error(call(train, *tiny_flags), "MLP._gates is a list of layers", "ModuleList")
    assert (tmp_path / "run").exists() and not (tmp_path / "run.1").exists()


@pytest.mark.parametrize("separator", [(198,), (510,), (198, 198)])
def test_a_mask_between_documents_is_noticed(change, separator):
    """With a condition on GPT-2's newline, on the last token (end-of-text), or on an empty line."""

    def forward(self: GPT, idx: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
        is_end = idx == separator[-1]
        if len(separator) == 2:
            previous = nn.functional.pad(idx, (1, 0))[:, :-1]
            is_end = is_end & (previous == separator[0])
        document = is_end.cumsum(1)
        is_open = (document[:, :, None] == document[:, None, :]).tril()[:, None]
        for block in self.transformer.h:
            q, k, v = block.attn.qkv(block.ln_1(x))
            y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=is_open)
            x = x + block.attn.c_proj(y.transpose(1, 2).reshape(x.shape))
            x = x + block.mlp(block.ln_2(x))
        return self.transformer.ln_f(x)

    change(GPT, "hidden_states", forward)
    assert not is_gpt2(random_model(dataclasses.replace(CONFIG, vocab_size=511)))


class ReLUMLP(MLP):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.c_proj(torch.relu(self.c_fc(x)))


def test_a_model_with_hooks_or_other_layers_generates_its_own_text():
    """As in a notebook: model.py is unchanged."""
    hooked, relu, idx = random_model(), random_model(), torch.tensor([[0, 1, 2]])
    hooked.transformer.h[0].mlp.register_forward_hook(lambda *args: torch.zeros(()))
    relu.transformer.h[0].mlp.__class__ = ReLUMLP
    for model in (hooked, relu, relu.train()):
        steps = InferenceModel(model).generate(idx, 40, temperature=0)
        expected = model.generate(idx, 40, top_k=1)[0, 3:]
        assert torch.equal(torch.cat(list(steps)), expected)


def test_a_model_with_other_layers_is_not_saved_as_gpt2(tmp_path):
    model = random_model()
    model.transformer.h[0].mlp.__class__ = ReLUMLP
    save_model(model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "folio-changed"


def small_eps(self: nn.LayerNorm, n_embd: int, bias: bool) -> None:
    LAYER_NORM_INIT(self, n_embd, eps=1e-6, bias=bias)


def half_after_three_blocks(self: GPT, idx: torch.Tensor) -> torch.Tensor:
    x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
    for i, block in enumerate(self.transformer.h):
        x = block(x if i < 3 else x * 0.5)
    return self.transformer.ln_f(x)


def narrow_mlp(self: MLP, config: GPTConfig) -> None:
    nn.Module.__init__(self)
    self.dropout = config.dropout
    self.c_fc = nn.Linear(config.n_embd, 2 * config.n_embd)
    self.c_proj = nn.Linear(2 * config.n_embd, config.n_embd)


@pytest.mark.parametrize(
    ("cls", "name", "function"),
    [
        (nn.LayerNorm, "__init__", small_eps),
        (GPT, "hidden_states", half_after_three_blocks),
        (MLP, "__init__", narrow_mlp),
    ],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_small_and_late_changes_are_noticed_and_the_model_can_be_loaded(
    change, cls, name, function, dropout, tmp_path
):
    change(cls, name, function)
    model = random_model(dataclasses.replace(CONFIG, n_layer=4, dropout=dropout))
    model.train()
    assert not is_gpt2(model) and model.training
    save_model(model, tmp_path, CharTokenizer("abcd\n"))
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "folio-changed"
    idx = torch.tensor([[0, 1, 2]])
    assert torch.equal(load_model(tmp_path)(idx), model.eval()(idx))


def test_comparing_does_not_change_the_mode_of_a_model(monkeypatch):
    """Another thread may train this model at the same time."""
    models = [random_model(dataclasses.replace(CONFIG, dropout=p)).train() for p in (0.0, 0.2)]
    assert all(map(is_gpt2, models))
    train, changed = GPT.train, []  # GPT.eval() calls train(False)
    monkeypatch.setattr(GPT, "train", lambda self, mode: changed.append(self) or train(self, mode))
    assert all(map(is_gpt2, models))
    assert not any(model is other for model in models for other in changed)


def bias_in_attention(self: CausalSelfAttention, config: GPTConfig) -> None:
    ATTENTION_INIT(self, config)
    self.c_attn = nn.Linear(config.n_embd, 3 * config.n_embd)


def test_a_bias_in_one_layer_is_loaded_again(change, tiny_flags, tmp_path, call):
    change(CausalSelfAttention, "__init__", bias_in_attention)
    assert call(train, *tiny_flags).returncode == 0
    assert is_changed(tmp_path / "run")
    model = load_model(tmp_path / "run")
    assert model.transformer.h[0].attn.c_attn.bias.abs().max() > 0
    assert (
        call(train, f"--init_from={tmp_path / 'run'}", "--eval_only", *tiny_flags[:1]).returncode
        == 0
    )


def with_lock(self: CausalSelfAttention, config: GPTConfig) -> None:
    ATTENTION_INIT(self, config)
    self.lock = threading.Lock()


def test_a_model_that_cannot_be_copied_is_refused_with_a_way_out(change, tiny_flags, call):
    change(CausalSelfAttention, "__init__", with_lock)
    change(MLP, "forward", relu_squared)
    with pytest.raises(FolioError, match=r"cannot be copied .*let its attributes be modules"):
        InferenceModel(random_model(CONFIG))
    assert_one_line_error(call(train, *tiny_flags), "cannot be copied")


# --- Changes of all kinds: the trained weights can be loaded, and the run resumed ---


class BiasBeforeWeight(nn.Module):
    """The layer norm of many lectures."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__()
        self.bias, self.weight = nn.Parameter(torch.zeros(n_embd)), nn.Parameter(torch.ones(n_embd))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], self.weight, self.bias)


def convolution(self: MLP, config: GPTConfig) -> None:
    """c_fc has a weight of three dimensions."""
    MLP_INIT(self, config)
    self.c_fc = nn.Conv1d(config.n_embd, 4 * config.n_embd, 1)


def convolved(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.c_proj(nn.functional.gelu(self.c_fc(x.mT).mT))


CAUSAL = torch.ones(64, 64, dtype=torch.bool).tril()


def common_mask(self: CausalSelfAttention, config: GPTConfig) -> None:
    """The buffers of all blocks are parts of one tensor."""
    ATTENTION_INIT(self, config)
    self.register_buffer("mask", CAUSAL[: config.block_size, : config.block_size].contiguous())
    self.register_buffer("first_rows", CAUSAL[: config.block_size])


def output_layer_first(self: GPT, config: GPTConfig) -> None:
    """The output layer gives the tied weight its name."""
    GPT_INIT(self, config)
    transformer = self.transformer
    del self.transformer
    self.head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
    self.transformer = transformer
    self.transformer.wte.weight = self.head.weight


def normalized_embedding(self: GPT, config: GPTConfig) -> None:
    GPT_INIT(self, config)
    nn.utils.parametrizations.weight_norm(self.transformer.wte)


def dropout_in_a_function(self: MLP, config: GPTConfig) -> None:
    """copy.deepcopy() does not copy the function: it asks the original model for its mode."""
    MLP_INIT(self, config)
    self.drop = lambda x: nn.functional.dropout(x, 0.3, self.training)


def with_the_function(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.drop(GELU_OF_GPT2(self, x))


def keeps_its_weights(self: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """A result of the forward pass, with its gradient function, becomes an attribute."""
    q, k, v = self.qkv(x)
    self.table, self.tables = attention_weights(q, k), [attention_weights(q, k)]
    return self.c_proj((self.table @ v).transpose(1, 2).reshape(x.shape))


def mask_of_the_first_pass(self: CausalSelfAttention, x: torch.Tensor) -> torch.Tensor:
    """A new model does not have this buffer."""
    T = x.size(1)
    if not hasattr(self, "mask") or len(self.mask) < T:
        mask = torch.ones(T, T, dtype=torch.bool, device=x.device).tril().triu(-2)
        self.register_buffer("mask", mask)
    q, k, v = self.qkv(x)
    y = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=self.mask[:T, :T])
    return self.c_proj(y.transpose(1, 2).reshape(x.shape))


def frozen_biases(self: CausalSelfAttention, config: GPTConfig) -> None:
    """Biases that stay 0 belong to the model."""
    bias_in_attention(self, config)
    self.c_attn.bias.requires_grad_(False)


def more_rows(self: GPT, config: GPTConfig) -> None:
    """A learned first token, in a row of its own; positions count from 2, as in OPT."""
    GPT_INIT(self, config)
    self.transformer.wte = nn.Embedding(config.padded_vocab_size + 1, config.n_embd)
    self.transformer.wpe = nn.Embedding(config.block_size + 2, config.n_embd)


def uses_more_rows(self: GPT, idx: torch.Tensor) -> torch.Tensor:
    positions = torch.arange(idx.size(1), device=idx.device) + 2
    x = (
        self.transformer.wte(idx)
        + self.transformer.wpe(positions)
        + self.transformer.wte.weight[-1]
    )
    for block in self.transformer.h:
        x = block(x)
    return self.transformer.ln_f(x)


class Residual(nn.Module):
    """The word "module" is also the name of DDP's wrapper."""

    def __init__(self, norm: nn.Module, module: nn.Module):
        super().__init__()
        self.norm, self.module = norm, module

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.module(self.norm(x))


def residual_block(self: Block, config: GPTConfig) -> None:
    nn.Module.__init__(self)
    self.attn = Residual(nn.LayerNorm(config.n_embd), CausalSelfAttention(config))
    self.mlp = Residual(nn.LayerNorm(config.n_embd), MLP(config))


def other_names(self: GPT, config: GPTConfig) -> None:
    """Names that look like GPT-2's, in other places."""
    GPT_INIT(self, config)
    self.transformer.line_wpe = nn.Embedding(config.block_size, config.n_embd)
    self.ln_f = nn.LayerNorm(config.n_embd)
    self.h = nn.ModuleList([nn.Linear(config.n_embd, config.n_embd)])
    del self.transformer.wte
    self.wte = nn.Embedding(config.padded_vocab_size, config.n_embd)


def uses_other_names(self: GPT, idx: torch.Tensor) -> torch.Tensor:
    x = self.wte(idx) + self.transformer.wpe(torch.arange(idx.size(1)))
    x = x + self.transformer.line_wpe(torch.arange(idx.size(1)))
    for block in (*self.transformer.h, *self.h):
        x = block(x)
    return self.transformer.ln_f(self.ln_f(x))


def extra_state(self: MLP, state: dict[str, int]) -> None:
    """torch keeps what get_extra_state() returns in the state_dict."""
    assert state == {"calls": 1}


def counted_steps(self: MLP, config: GPTConfig) -> None:
    MLP_INIT(self, config)
    self.register_buffer("steps", torch.zeros(()))


def changes_after_some_steps(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """A new model is a GPT-2, a trained model is not."""
    self.steps += self.training
    return GELU_OF_GPT2(self, x) if self.steps < 4 else relu_squared(self, x)


def number_of_a_tensor(self: MLP, config: GPTConfig) -> None:
    """On the device "meta", tensors have no numbers."""
    MLP_INIT(self, config)
    self.dropout = torch.linspace(0, 0.2, 3)[1].item()


@pytest.mark.parametrize(
    "changes",
    [
        [(nn, "LayerNorm", BiasBeforeWeight)],
        [(MLP, "__init__", convolution), (MLP, "forward", convolved)],
        [(CausalSelfAttention, "__init__", common_mask)],
        [(GPT, "__init__", output_layer_first)],
        [(GPT, "__init__", normalized_embedding)],
        [(MLP, "__init__", dropout_in_a_function), (MLP, "forward", with_the_function)],
        [(CausalSelfAttention, "forward", keeps_its_weights), (MLP, "forward", relu_squared)],
        [(CausalSelfAttention, "forward", mask_of_the_first_pass)],
        [(CausalSelfAttention, "__init__", frozen_biases)],
        [(MLP, "get_extra_state", lambda _: {"calls": 1}), (MLP, "set_extra_state", extra_state)],
        [(MLP, "__init__", number_of_a_tensor), (MLP, "forward", relu_squared)],
        [(MLP, "__init__", counted_steps), (MLP, "forward", changes_after_some_steps)],
        [(GPT, "__init__", more_rows), (GPT, "hidden_states", uses_more_rows)],
        [(Block, "__init__", residual_block), (Block, "forward", lambda s, x: s.mlp(s.attn(x)))],
        [
            (GPT, "lm_head", lambda self, x, *_, **__: x @ self.wte.weight.T),
            (GPT, "__init__", other_names),
            (GPT, "hidden_states", uses_other_names),
        ],
    ],
    ids=lambda changes: changes[-1][-1].__name__.strip("<>"),
)
def test_a_changed_model_is_trained_saved_loaded_and_resumed(
    change, changes, tiny_flags, tmp_path, call
):
    for each in changes:
        change(*each)
    flags = (*tiny_flags, "--snapshot_interval=3", "--sample_tokens=3", "--decay_lr=False")
    flags = (*flags, "--pad_vocab_to=8")  # rows of padding
    whole = call(train, *flags, "--max_iters=8")
    assert whole.returncode == 0 and "WARNING" not in whole.stdout, whole.stderr + whole.stdout
    log = read_log(tmp_path / "run" / "log.csv")
    for folder in ("run", "run/step_000003"):
        model = load_model(tmp_path / folder)
        assert all(weight.abs().max() > 0 for weight in model.parameters() if weight.requires_grad)
    loss = call(train, *tiny_flags[:1], f"--init_from={tmp_path / 'run'}", "--eval_only").stdout
    assert f"validation loss {weights_metadata(tmp_path / 'run')['val_loss']:.4f}" in loss
    for more in ("--init_from=scratch", "--init_from=resume"):
        steps = 5 if more == "--init_from=scratch" else 8
        resumed = call(train, *flags, more, f"--max_iters={steps}")
        assert resumed.returncode == 0 and "WARNING" not in resumed.stdout, resumed.stderr
    assert read_log(tmp_path / "run" / "log.csv")[-1]["val_loss"] == log[-1]["val_loss"]
    assert call(sample, f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=3").returncode == 0


def complex_angles(self: MLP, config: GPTConfig) -> None:
    MLP_INIT(self, config)
    self.register_buffer("angles", torch.zeros(3, dtype=torch.complex128))


def random_constant(self: MLP, config: GPTConfig) -> None:
    MLP_INIT(self, config)
    self.scale = torch.rand(4 * config.n_embd)


def scaled(self: MLP, x: torch.Tensor) -> torch.Tensor:
    return self.c_proj(self.scale * nn.functional.relu(self.c_fc(x)))


def counts_training_steps(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """The number is lost when the model is saved."""
    self.steps = getattr(self, "steps", 0) + self.training
    return GELU_OF_GPT2(self, x) / (1 + self.steps)


def normalizes_its_weights(self: MLP, x: torch.Tensor) -> torch.Tensor:
    """A model that changes its parameters in each forward pass, also without training."""
    with torch.no_grad():
        self.c_fc.weight.copy_(nn.functional.normalize(self.c_fc.weight, dim=1))
    return GELU_OF_GPT2(self, x)


def limited_embedding(self: GPT, config: GPTConfig) -> None:
    """torch shortens the rows that a forward pass reads."""
    GPT_INIT(self, config)
    self.transformer.wte.max_norm = 0.1


def loss_and_logits(self: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None):
    logits = FORWARD(self, idx)
    return logits, None if targets is None else FORWARD(self, idx, targets)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ([(MLP, "__init__", complex_angles), (MLP, "forward", relu_squared)], "KeyError"),
        (
            [(MLP, "__init__", random_constant), (MLP, "forward", scaled)],
            "a saved and loaded model computes another loss",
        ),
        (
            [(MLP, "forward", counts_training_steps)],
            "a saved and loaded model computes another loss",
        ),
        ([(MLP, "forward", normalizes_its_weights)], "the forward pass changes parameters"),
        ([(GPT, "__init__", limited_embedding)], "the forward pass changes parameters"),
        ([(GPT, "forward", loss_and_logits)], "let it return the loss alone"),
    ],
)
def test_a_model_that_could_not_be_used_after_training_is_refused_before(
    change, changes, message, tiny_flags, tmp_path, call
):
    for each in changes:
        change(*each)
    result = call(train, *tiny_flags)
    assert_one_line_error(result, "model.py: ", message)
    assert not (tmp_path / "run").exists()


def without_some_tokens(self: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None):
    """The model returns no logits for ids from 20 on: it never generates these tokens."""
    output = FORWARD(self, idx, targets)
    return output if targets is not None else output[..., :20]


def forbids_tokens(self: GPT, idx: torch.Tensor, targets: torch.Tensor | None = None):
    output = FORWARD(self, idx, targets)
    if targets is None:
        output[..., 20:] = -math.inf
    return output


@pytest.mark.parametrize("forward", [without_some_tokens, forbids_tokens])
def test_tokens_that_a_changed_model_forbids_are_not_generated(change, forward):
    model = random_model(dataclasses.replace(CONFIG, vocab_size=23))
    assert is_gpt2(model)
    change(GPT, "forward", forward)
    assert not is_gpt2(model)
    ids = torch.cat(list(InferenceModel(model).generate(torch.tensor([[0]]), 99, temperature=9.0)))
    assert ids.max() == 19


# --- Other changes of the same model.py ---


def test_a_change_that_only_the_training_text_shows_needs_a_mark(
    change, tiny_flags, tiny_dataset, tmp_path, call
):
    """The mask begins after four certain tokens in a row."""
    pattern = np.fromfile(tiny_dataset / "train.bin", "<u2")[100:104].tolist()

    def masked(self: GPT, idx: torch.Tensor) -> torch.Tensor:
        rows = nn.functional.pad(idx, (3, 0), value=-1).unfold(1, 4, 1)  # (B, T, 4)
        is_end = (rows == torch.tensor(pattern)).all(-1)
        x = self.transformer.wte(idx) + self.transformer.wpe.weight[: idx.size(1)]
        end = is_end.cumsum(1).clip(max=1)[..., None]
        for block in self.transformer.h:
            x = x + (1 - end) * block.attn(block.ln_1(x))
            x = x + block.mlp(block.ln_2(x))
        return self.transformer.ln_f(x)

    def without_effect(self: GPT) -> None:
        """A new model adds 0 to the residual stream: no mask has an effect on it yet."""
        INIT_WEIGHTS(self)
        for block in self.transformer.h:
            nn.init.zeros_(block.attn.c_proj.weight)
            nn.init.zeros_(block.mlp.c_proj.weight)

    change(GPT, "hidden_states", masked)
    change(GPT, "init_weights", without_effect)
    assert_one_line_error(call(train, *tiny_flags), "mark the model by a parameter")

    def marked(self: GPT, config: GPTConfig) -> None:
        GPT_INIT(self, config)
        self.mark = nn.Parameter(torch.zeros(1), requires_grad=False)

    change(GPT, "__init__", marked)
    result = call(train, *tiny_flags, "--sample_tokens=3")
    assert result.returncode == 0 and "model.py has been changed" in result.stdout
    assert is_changed(tmp_path / "run") and not is_gpt2(load_model(tmp_path / "run"))


def softcap(limit: float):
    """GPT.lm_head with logits between -limit and limit."""
    return lambda *args, **options: limit * torch.tanh(LM_HEAD(*args, **options) / limit)


@pytest.mark.parametrize("pad_vocab_to", [1, 64])
def test_weights_of_another_change_are_loaded_with_a_warning(
    change, pad_vocab_to, tiny_flags, tmp_path, call, capsys
):
    change(GPT, "lm_head", softcap(3.0))
    assert call(train, *tiny_flags, f"--pad_vocab_to={pad_vocab_to}").returncode == 0
    load_model(tmp_path / "run")
    assert capsys.readouterr().err == ""
    change(GPT, "lm_head", softcap(0.1))
    load_model(tmp_path / "run")
    assert "was saved with another model.py" in " ".join(capsys.readouterr().err.split())


def test_a_change_that_acts_in_training_only_leaves_a_gpt2(change, tiny_flags, tmp_path, call):
    """Dropout with a number of its own, which --dropout does not change."""
    forward = MLP.forward
    change(
        MLP, "forward", lambda self, x: nn.functional.dropout(forward(self, x), 0.2, self.training)
    )
    result = call(train, *tiny_flags)
    assert result.returncode == 0 and "model.py has been changed" not in result.stdout
    model = load_model(tmp_path / "run")  # it was saved in training mode
    assert is_gpt2(model) and is_gpt2(model.train()) and uses_all_parameters(model)


@pytest.mark.parametrize("dropout", [0.0, 0.1])
def test_blocks_that_are_skipped_at_random_are_noticed(change, dropout):
    forward = Block.forward

    def skip(self, x):
        is_skipped = self.training and torch.rand(()) < (self.mlp.dropout or 0.02)
        return x if is_skipped else forward(self, x)

    model = random_model(dataclasses.replace(CONFIG, dropout=dropout))
    assert uses_all_parameters(model)
    change(Block, "forward", skip)
    assert is_gpt2(model) and not uses_all_parameters(model)


def test_the_default_device_of_torch_does_not_matter(change):
    with torch.device("meta"):
        assert small_model_is_gpt2(n_layer=2, n_head=2, block_size=32, vocab_size=5, bias=True)


def test_generation_of_a_changed_model_ends_at_stop_tokens(change):
    change(MLP, "forward", relu_squared)
    idx = torch.tensor([[0, 1]])
    ids = torch.cat(list(InferenceModel(random_model()).generate(idx, 9, temperature=0))).tolist()
    stop = ids[3]
    steps = InferenceModel(random_model()).generate(idx, 9, temperature=0, stop_tokens=[stop])
    assert torch.cat(list(steps)).tolist() == ids[: ids.index(stop) + 1]


def test_transformers_refuses_a_changed_model_and_folio_needs_the_change(change, tmp_path):
    model, idx = random_model(), torch.tensor([[0, 1, 2]])
    change(MLP, "forward", relu_squared)
    save_model(model, tmp_path, CharTokenizer("abcd\n"))
    assert torch.equal(load_model(tmp_path)(idx), model(idx))
    with pytest.raises(ValueError, match="folio-changed"):
        transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    change(MLP, "forward", GELU_OF_GPT2)
    with pytest.raises(FolioError, match=r"was trained with a changed model\.py"):
        load_model(tmp_path)


def test_weights_that_an_earlier_version_saved_in_gpt2s_layout_can_be_loaded(change, tmp_path):
    change(MLP, "forward", relu_squared)
    model, idx = random_model(dataclasses.replace(CONFIG, pad_vocab_to=8)), torch.tensor([[0, 1]])
    save_model(model, tmp_path)
    save_file(to_hf_state_dict(model), tmp_path / "model.safetensors")
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**settings, "layout": None}))
    assert torch.equal(load_model(tmp_path)(idx), model(idx))


def test_a_changed_model_that_was_saved_in_16_bits_is_loaded_in_32(change, tmp_path, capsys):
    change(MLP, "forward", relu_squared)
    save_model(random_model().bfloat16(), tmp_path)
    assert load_model(tmp_path).transformer.wte.weight.dtype == torch.float32


def test_a_model_with_new_parameters_is_trained_saved_and_loaded(
    learned_scale, tiny_flags, tmp_path, call
):
    result = call(train, *tiny_flags, "--sample_tokens=5")
    assert result.returncode == 0, result.stderr
    assert "note     model.py has been changed" in result.stdout
    card = (tmp_path / "run" / "README.md").read_text()
    assert "A GPT with a changed model.py, trained" in card and "transformers" not in card
    model, _ = load_model_and_tokenizer(tmp_path / "run")
    scales = [block.attn.scale.item() for block in model.transformer.h]
    assert all(scale != 1 for scale in scales)  # they have been trained and saved
    assert call(train, *tiny_flags, "--init_from=resume", "--max_iters=8").returncode == 0
    result = call(sample, f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=5")
    assert result.returncode == 0
    assert "model.py has been changed" in " ".join(result.stderr.split())
    assert "this model was saved with a changed model.py" in " ".join(result.stderr.split())


def test_complex_numbers_of_a_changed_model_stay_complex(change, tiny_flags, tmp_path):
    init = GPT.__init__

    def with_rotation(self, config):
        init(self, config)
        self.register_buffer("rotation", torch.tensor([3 + 4j]), persistent=False)

    change(GPT, "__init__", with_rotation)
    trained = start_training(*tiny_flags).model
    save_model(trained, tmp_path / "model")
    for model in (trained, load_model(tmp_path / "model")):
        assert model.rotation.item() == 3 + 4j


def rotary(persistent: bool | None):
    """__init__ and qkv of CausalSelfAttention with rotary position embeddings (Su et al. 2021).

    persistent: of the buffers; None: the tables are plain attributes.
    """
    init, qkv = CausalSelfAttention.__init__, CausalSelfAttention.qkv

    def with_tables(self, config):
        init(self, config)
        head_dim = config.n_embd // config.n_head
        frequencies = 10_000.0 ** -(torch.arange(0, head_dim, 2) / head_dim)
        angles = torch.outer(torch.arange(config.block_size), frequencies)
        for name, table in (("cos", angles.cos()), ("sin", angles.sin())):
            if persistent is None:
                setattr(self, name, table)
            else:
                self.register_buffer(name, table, persistent=persistent)
        if persistent:  # as nanoGPT's; not finite
            future = torch.full((config.block_size, config.block_size), -torch.inf).triu(1)
            self.register_buffer("bias", future)
        ones = nn.init.constant_(torch.empty(2, 2), 1.0)
        self.register_buffer("ones", ones, persistent=False)

    def rotated(self, x):
        def rotate(x):
            (a, b), T = x.chunk(2, dim=-1), x.size(2)
            cos, sin = self.cos[:T], self.sin[:T]
            return torch.cat((a * cos - b * sin, a * sin + b * cos), dim=-1)

        q, k, v = qkv(self, x)
        return rotate(q), rotate(k), v * self.ones[0, 0]

    return with_tables, rotated


@pytest.mark.parametrize("persistent", [True, False, None])
def test_constants_of_a_changed_model_are_right_after_loading_and_resuming(
    change, persistent, tiny_flags, tmp_path, call
):
    init, qkv = rotary(persistent)
    change(CausalSelfAttention, "__init__", init)
    change(CausalSelfAttention, "qkv", qkv)
    reference = call(train, *tiny_flags, f"--out_dir={tmp_path / 'reference'}")
    assert reference.returncode == 0, reference.stderr
    call(train, *tiny_flags, "--max_iters=4")
    result = call(train, *tiny_flags, "--init_from=resume", "--max_iters=8")
    assert "has model.py been changed" not in " ".join(result.stdout.split())
    result = call(train, *tiny_flags, "--init_from=resume", "--eval_only")
    evaluated = call(train, *tiny_flags, f"--init_from={tmp_path / 'run'}", "--eval_only")
    loss = describe_run(tmp_path / "run").rpartition(" ")[2]
    assert f"validation loss {loss}" in evaluated.stdout
    assert f"validation loss {loss}" in result.stdout
    model, _ = load_model_and_tokenizer(tmp_path / "run")
    angle = torch.tensor(3.0)  # of position 3 and the first frequency
    assert torch.equal(model.transformer.h[1].attn.cos[3, 0], angle.cos())
    shorter = load_model(tmp_path / "run", block_size=4)
    idx = torch.tensor([[0, 1, 2]])
    torch.testing.assert_close(shorter(idx), model(idx))


def test_weights_are_loaded_although_a_mask_was_added_to_the_model(
    change, tiny_flags, tmp_path, call
):
    assert call(train, *tiny_flags, "--max_iters=4").returncode == 0
    init = CausalSelfAttention.__init__

    def with_mask(self, config):
        init(self, config)
        self.register_buffer("mask", torch.ones(config.block_size, config.block_size).tril())

    change(CausalSelfAttention, "__init__", with_mask)
    model, _ = load_model_and_tokenizer(tmp_path / "run")
    assert model.transformer.h[0].attn.mask.sum() == 36  # 1 + 2 + ... + 8
    result = call(train, *tiny_flags, "--init_from=resume", "--max_iters=8")
    assert result.returncode == 0, result.stderr


def test_a_tied_output_layer_under_a_name_of_its_own_stays_tied(change, tmp_path):
    """As in nanoGPT."""
    init = GPT.__init__

    def with_head(self, config):
        init(self, config)
        self.head = nn.Linear(config.n_embd, config.padded_vocab_size, bias=False)
        self.head.weight = self.transformer.wte.weight

    change(GPT, "__init__", with_head)
    change(GPT, "lm_head", lambda self, x: self.head(x))
    model, idx = random_model(), torch.tensor([[0, 1, 2]])
    save_model(model, tmp_path)
    loaded = load_model(tmp_path)
    assert torch.equal(loaded(idx), model(idx))
    assert loaded.head.weight is loaded.transformer.wte.weight


def test_resuming_notices_that_the_model_has_changed(change, tiny_flags, tmp_path, call):
    note = "has model.py been changed?"
    assert call(train, *tiny_flags, "--dropout=0.2").returncode == 0
    flags = (*tiny_flags, "--init_from=resume")
    assert note not in " ".join(call(train, *flags, "--max_iters=8").stdout.split())
    change(MLP, "forward", lambda self, x: x.flip(-1))
    for more in ("--eval_only", "--max_iters=12"):
        assert note in " ".join(call(train, *flags, more).stdout.split())


def test_a_small_change_is_noticed_too(change, tiny_flags, tmp_path, call):
    change(
        nn.LayerNorm, "__init__", lambda *args, **kwargs: LAYER_NORM_INIT(*args, **kwargs, eps=0.01)
    )
    assert call(train, *tiny_flags).returncode == 0
    change(
        nn.LayerNorm, "__init__", lambda *args, **kwargs: LAYER_NORM_INIT(*args, **kwargs, eps=0.0)
    )
    output = " ".join(call(train, *tiny_flags, "--init_from=resume", "--eval_only").stdout.split())
    assert "has model.py been changed" in output


def test_resuming_a_changed_model_needs_the_change(change, tiny_flags, tmp_path, call):
    change(MLP, "forward", relu_squared)
    assert call(train, *tiny_flags).returncode == 0
    change(MLP, "forward", GELU_OF_GPT2)
    for more in ("--max_iters=12", "--eval_only"):
        result = call(train, *tiny_flags, "--init_from=resume", more)
        assert_one_line_error(result, "was trained with a changed model.py")


def test_the_page_says_that_it_shows_gpt2(change, tiny_flags, tmp_path, call):
    change(MLP, "forward", relu_squared)
    assert call(train, *tiny_flags).returncode == 0
    flags = (f"--out_dir={tmp_path / 'run'}", f"--output={tmp_path / 'page.html'}")
    result = call(explain, *flags)
    assert result.returncode == 0, result.stderr
    assert "model.py has been changed" in " ".join(result.stdout.split())


def test_the_page_shows_the_layers_and_the_loss_of_the_changed_model(change):
    def scaled_embedding(self: GPT, idx: torch.Tensor) -> torch.Tensor:
        """As in Gemma, and without positions."""
        x = 4 * self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    change(GPT, "hidden_states", scaled_embedding)
    model, ids = random_model(), torch.tensor([0, 1, 2, 3])
    page = explain.explain(model, ids)
    loss = model(ids[None, :-1], ids[None, 1:]).item()
    assert page["layers"][-1]["mean_loss"] == pytest.approx(loss, rel=1e-5)
    assert sum(page["losses"]) / 3 == pytest.approx(loss, rel=1e-5)
    embedded = model.lm_head(model.transformer.ln_f(4 * model.transformer.wte(ids[:-1])))
    first_loss = nn.functional.cross_entropy(embedded, ids[1:]).item()
    assert page["layers"][0]["mean_loss"] == pytest.approx(first_loss, rel=1e-5)


def test_the_page_refuses_a_model_whose_blocks_are_used_otherwise(change):
    def twice(self: GPT, idx: torch.Tensor) -> torch.Tensor:
        x = self.transformer.wte(idx)
        for block in [*self.transformer.h, *self.transformer.h]:
            x = block(x)
        return self.transformer.ln_f(x)

    change(GPT, "hidden_states", twice)
    with pytest.raises(FolioError, match=r"the page needs a model that gives x .* to each block"):
        explain.explain(random_model(), torch.tensor([0, 1, 2]))
