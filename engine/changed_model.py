"""Whether model.py still computes GPT-2: a reader may have changed it, for an experiment.

A changed model can be trained, and it can generate text. But engine/inference.py, transformers and
config.json know GPT-2 only. So all programs and save_model() ask is_gpt2(model).
"""

import contextlib
import copy
import dataclasses
import functools
import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F

from configurator import FolioError, first_line
from data.dataset import ShardedTokens, training_batch
from engine.hf_format import LAYER_NORM_EPS, gpt2_shapes, uninitialized_model
from model import GPT, GPTConfig

CHANGED_MODEL_NOTE = (
    "model.py has been changed and does not compute GPT-2: text is generated without a cache"
)
MAX_TOKENS = 1024  # in each row of the compared texts (GPT-2's context), and in the vocabulary


@torch.no_grad()
def is_gpt2(model: GPT, idx: torch.Tensor | None = None) -> bool:
    """Whether this model is a GPT-2: it has GPT-2's parameters, and its logits are gpt2_logits().

    idx: texts (B, T) on which to compare the logits; None: two rows of 8 tokens.

    False if model.py was changed in one of these, or if this model has hooks or other layers.
    Another initialization or another loss leaves it a GPT-2.
    Compares the logits of a small model in a long context (see small_model_is_gpt2), then of this
    model, in its own precision. If this model gives no numbers to compare (on the device meta, in
    16 bits without autocast, NaN), the shapes and the small model decide.
    """
    config, parameter = model.config, next(model.parameters())
    if not model_py_is_gpt2(config):
        return False
    shapes = {name: tuple(weight.shape) for name, weight in model.named_parameters()}
    if shapes != gpt2_shapes(config):  # for example, one block that is used several times
        return False
    if parameter.is_meta:  # the weights have shapes, but no numbers
        return True
    if model.training:
        # A copy in eval mode, without dropout: another thread may be training the model itself.
        model = copy_model(model, share_weights=True).eval()
    if idx is None:
        n_tokens = min(config.block_size, config.vocab_size, 8)
        # Two rows: a change may mix rows. -1 becomes V - 1, usually end-of-text: a change may treat
        # this id in a special way, for example by a mask between documents.
        row = torch.tensor([0, -1, 1, 2, -2, 3, 4, 5][:n_tokens], device=parameter.device)
        idx = torch.stack((row, row.flip(0))) % config.vocab_size  # (2, T)
    # gpt2_logits() comes first: the forward pass of a changed model may change its parameters.
    expected = gpt2_logits(model, idx)  # (B, T, V)
    if not expected.isfinite().all():  # numbers that are too large for 16 bits, or NaN
        return True
    try:
        logits = model(idx)
    except RuntimeError:  # with float32_attention, weights of 16 bits need autocast
        return True
    if logits.shape != expected.shape or not logits.isfinite().all():  # -inf: a forbidden token
        return False
    # Numbers of 16 bits, and of float32 on a GPU (TF32), have large rounding errors.
    is_exact = parameter.is_cpu and parameter.dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if is_exact else 0.05
    return bool((logits - expected).abs().max() <= tolerance * expected.abs().max())


def model_py_is_gpt2(config: GPTConfig) -> bool:
    """Whether model.py computes GPT-2 with these sizes.

    The answer depends on them: an attention window that is longer than the context has no effect.
    """
    # At most the depth and the context of gpt2-xl. Comparing takes about eight seconds on one core
    # for gpt2-xl, and one second for GPT-2 small.
    n_layer, block_size = min(config.n_layer, 48), min(config.block_size, MAX_TOKENS)
    vocab_size = min(config.vocab_size, MAX_TOKENS)
    return small_model_is_gpt2(n_layer, config.n_head, block_size, vocab_size, config.bias)


@contextlib.contextmanager
def eval_mode(model: GPT) -> Iterator[None]:
    """Inside the block, the model is in eval mode; no other thread may use it meanwhile.

    copy_model(model).eval() is not always enough: a function inside a changed model, such as
    lambda x: F.dropout(x, 0.1, self.training), is not copied, and asks the original model.
    """
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def copy_model(model: GPT, share_weights: bool = False) -> GPT:
    """A copy of the model.

    share_weights: the copy uses the weights of the model itself.
    Raises FolioError if a changed model has an attribute that cannot be copied, such as a lock.
    """
    # If an object's id is in this dict, deepcopy() takes the dict's value and makes no copy.
    known = {id(weight): weight for weight in model.parameters()} if share_weights else {}
    # A module may keep a result of its last forward pass: self.att = attention_weights(q, k).
    # deepcopy() refuses a tensor that is the result of a computation with gradients.
    for module in model.modules():
        for value in vars(module).values():
            values = value.values() if isinstance(value, dict) else value
            for tensor in values if isinstance(value, dict | list | tuple) else [value]:
                if isinstance(tensor, torch.Tensor) and tensor.grad_fn is not None:
                    known[id(tensor)] = tensor.detach()
    try:
        return copy.deepcopy(model, known)
    except (RuntimeError, TypeError) as error:  # for example a lock
        raise FolioError(
            f"model.py: this model cannot be copied ({first_line(error)}); Folio copies a model to "
            "generate text with it: let its attributes be modules, parameters, buffers and numbers"
        ) from error


def fixed_ids_loss(model: GPT) -> float:
    """The loss of a fixed row of token ids, in eval mode; NaN if the model cannot compute it.

    With the same weights, a model.py that computes other logits usually gives another loss.
    """
    T, device = min(model.config.block_size, MAX_TOKENS), next(model.parameters()).device
    ids = 7 * torch.arange(T + 1, device=device) % model.config.vocab_size  # 0, 7, 14, ...
    try:
        if model.training:
            model = copy_model(model, share_weights=True).eval()
        with torch.no_grad():
            return model(ids[None, :-1], ids[None, 1:]).item()
    except Exception:  # a changed model.py may not work with this length
        return math.nan


def uses_all_parameters(model: GPT) -> bool:
    """Whether every training step gives each parameter a gradient; False if this is not a GPT-2.

    A model that is a GPT-2 in eval mode may skip blocks at random in training. A small model tries
    it: if each block is skipped once in 50 times, 400 passes through a block almost always show it.
    """
    if not is_gpt2(model):
        return False
    n_layer, n_head = min(model.config.n_layer, 48), model.config.n_head
    config = GPTConfig(
        block_size=8, vocab_size=11, n_layer=n_layer, n_head=n_head, n_embd=2 * n_head,
        dropout=model.config.dropout, bias=model.config.bias,
    )  # fmt: skip
    with torch.device("cpu"), torch.random.fork_rng(devices=[]):
        small_model, idx = GPT(config), torch.arange(8)[None]
        parameters = list(small_model.parameters())
        gradients = (
            torch.autograd.grad(small_model(idx, idx), parameters, allow_unused=True)
            for _ in range(math.ceil(400 / n_layer))
        )
        return all(gradient is not None for step in gradients for gradient in step)


@functools.cache  # model.py does not change while a program runs
def small_model_is_gpt2(
    n_layer: int, n_head: int, block_size: int, vocab_size: int, bias: bool
) -> bool:
    """Whether model.py computes the logits of GPT-2, as gpt2_logits() does.

    Compares the logits of a small (narrow) model with random weights, on texts that contain each
    token: a change may concern one token only, for example a mask between lines.
    """
    config = GPTConfig(block_size, vocab_size, n_layer, n_head, n_embd=2 * n_head, bias=bias)
    try:
        # cpu: torch's default device may be another one. fork_rng: training draws its own numbers.
        with torch.no_grad(), torch.device("cpu"), torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = GPT(config).double().eval()  # float64: small rounding errors
            for parameter in model.parameters():
                parameter.normal_()
            # Each token once, tokens twice in a row, and a few tokens in a random order.
            pairs = torch.randperm(min(vocab_size, 256)).repeat_interleave(2)
            few = torch.randint(min(vocab_size, 11), (256,))
            ids = torch.cat((torch.randperm(vocab_size), pairs, few))
            n_rows = math.ceil(len(ids) / block_size)
            idx = ids[torch.arange(n_rows * block_size) % len(ids)].view(n_rows, block_size)
            # gpt2_logits() comes first: the forward pass may change the parameters.
            expected = gpt2_logits(model, idx)
            # A model may count its passes in training, and its logits may depend on the count.
            model.train()(idx[:1, :8], idx[:1, :8])
            return torch.allclose(model.eval()(idx), expected, rtol=1e-9)
    except Exception:  # a changed model.py may lack a layer, or not work in these sizes
        return False


def gpt2_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """(B, T) -> (B, T, V): GPT-2's logits, from a model's sizes and parameters alone.

    Nothing of model.py is called. So it makes no difference whether model.py was changed.
    """
    (B, T), n_head = idx.shape, model.config.n_head
    weights = {name.removeprefix("transformer."): p for name, p in model.named_parameters()}

    def linear(x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

    def layer_norm(x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        return F.layer_norm(x, x.shape[-1:], weight, bias, LAYER_NORM_EPS)

    x = weights["wte.weight"][idx] + weights["wpe.weight"][:T]  # (B, T, C)
    for i in range(model.config.n_layer):
        qkv = linear(layer_norm(x, f"h.{i}.ln_1"), f"h.{i}.attn.c_attn")  # (B, T, 3C)
        q, k, v = qkv.view(B, T, 3, n_head, -1).permute(2, 0, 3, 1, 4)  # (B, n_head, T, head_dim)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + linear(y.transpose(1, 2).flatten(2), f"h.{i}.attn.c_proj")
        hidden = linear(layer_norm(x, f"h.{i}.ln_2"), f"h.{i}.mlp.c_fc")  # (B, T, 4C)
        x = x + linear(F.gelu(hidden, approximate="tanh"), f"h.{i}.mlp.c_proj")
    return F.linear(layer_norm(x, "ln_f"), weights["wte.weight"][: model.config.vocab_size])


# --- Checks of a changed model.py, before training ---


def random_model(config: GPTConfig) -> GPT:
    """A GPT with random weights, to try on the CPU what model.py computes; in eval mode.

    Its matrices and biases are larger than a new model's, so that each part has an effect.
    It has at most 4 blocks: trying a deep model would take minutes, and memory for several copies.
    """
    config = dataclasses.replace(config, n_layer=min(config.n_layer, 4))
    with torch.no_grad(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = uninitialized_model(config).eval()
        for parameter in model.parameters():
            parameter.normal_(std=0.2)
    return model


def check_layers_are_found(model: GPT) -> None:
    """FolioError for layers in a Python list or dict: torch neither trains nor saves them."""
    known = {*model.modules(), *model.parameters()}
    for module in model.modules():
        for name, value in vars(module).items():
            if not isinstance(value, list | tuple | dict):
                continue
            values = value.values() if isinstance(value, dict) else value
            layers = [v for v in values if isinstance(v, torch.nn.Module | torch.nn.Parameter)]
            if not known.issuperset(layers):
                raise FolioError(
                    f"model.py: {type(module).__name__}.{name} is a {type(value).__name__} of "
                    "layers, which are neither trained nor saved; use nn.ModuleList, ModuleDict, "
                    "ParameterList or ParameterDict"
                )


def check_on_text(config: GPTConfig, tokens: ShardedTokens) -> None:
    """Raise FolioError if model.py has a change that only the training text shows.

    tokens: of the training text. The function compares at most 16,384 of them, in a narrow model.
    is_gpt2() compares the model with GPT-2 on invented texts. A mask may begin at certain words,
    for example, and the invented texts need not contain these words. So all programs would take
    such a model for a GPT-2, unless it has a parameter that GPT-2 does not have.
    """
    n_tokens = min(16_384, max(2**26 // config.vocab_size, 8))  # the logits need memory
    T = min(config.block_size, n_tokens)
    windows, _ = training_batch(tokens, n_tokens // T, T, seed=0, step=0, micro_batch=0)
    model = random_model(dataclasses.replace(config, n_embd=2 * config.n_head))
    if is_gpt2(model) and not is_gpt2(model, windows):
        raise FolioError(
            "model.py: this change has an effect on the training text, but not on the texts with "
            "which all programs look for a change; mark the model by a parameter in GPT.__init__: "
            "self.mark = nn.Parameter(torch.zeros(1), requires_grad=False)"
        )
