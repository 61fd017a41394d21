"""Hugging Face's format of GPT-2: config.json and weights, converted to and from model.py's GPT.

    config = read_config(folder)                                # config.json -> GPTConfig
    state_dict = from_hf_state_dict(read_weights(folder), config, folder)   # -> for GPT(config)

The parameter names are the same in both. Three things differ: Hugging Face stores the matrices of
linear layers as (in, out), torch as (out, in); its GPT-2 always has biases; and its table of
embeddings has no rows of padding.
"""

import hashlib
import json
import re
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
import torch.nn as nn
from torch.overrides import TorchFunctionMode

from configurator import FolioError, first_line
from data.files import join_names, shell_command
from model import GPT, GPTConfig

WEIGHTS_FILE = "model.safetensors"
TORCH_WEIGHTS_FILE = "pytorch_model.bin"  # what transformers wrote before safetensors existed
LAYER_NORM_EPS = 1e-5  # GPT-2's, and the default of nn.LayerNorm
SHA256_KEY = "folio_sha256"  # in the metadata of model.safetensors
CHANGED_MODEL_TYPE = "folio-changed"  # model_type if model.py was changed: transformers refuses it


# --- config.json ---


def to_hf_config(config: GPTConfig) -> dict[str, Any]:
    """The architecture in the keys of transformers' GPT2Config."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_ctx": config.block_size,  # for other programs, such as llama.cpp's converter
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": LAYER_NORM_EPS,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bias": config.bias,  # Folio's own key: GPT2Config always has biases; ours are saved as 0
    }


# The values that make a model GPT-2. A config.json may leave these keys out, but not differ.
# The first value of each is the default of transformers' GPT2Config.
REQUIRED_GPT2_VALUES = {
    "model_type": ("gpt2", CHANGED_MODEL_TYPE),  # a changed model has GPT-2's settings, too
    "activation_function": (  # all names of the tanh approximation of GELU
        "gelu_new", "gelu_fast", "gelu_pytorch_tanh", "gelu_python_tanh", "gelu_accurate",
    ),
    "layer_norm_epsilon": (LAYER_NORM_EPS,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}  # fmt: skip


def read_config(folder: str | Path) -> GPTConfig:
    """Read and check config.json. Raises FolioError if it does not describe a GPT-2."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sizes = {
            "block_size": found["n_positions"],
            **{key: found[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
            "pad_vocab_to": found.get("pad_vocab_to", 1),  # of a changed model.py: see save_model()
        }
        dropout, bias = found.get("resid_pdrop", 0.1), found.get("bias", True)
        required = {
            **REQUIRED_GPT2_VALUES,
            "n_inner": (None, 4 * found["n_embd"]),
            # Other names for the sizes. transformers uses these if config.json has both names.
            "num_hidden_layers": (found["n_layer"],),
            "num_attention_heads": (found["n_head"],),
            "hidden_size": (found["n_embd"],),
            "max_position_embeddings": (found["n_positions"],),
        }
        mismatched = [
            key for key, allowed in required.items() if found.get(key, allowed[0]) not in allowed
        ]
    except FileNotFoundError:
        raise FolioError(
            f"{path}: no model found; train one: python train.py config/shakespeare_char.py"
        ) from None
    except OSError as error:
        raise FolioError(f"{path}: cannot be read ({error.strerror})") from None
    except KeyError as error:
        raise FolioError(f"{path}: invalid GPT-2 config ({error} is missing)") from None
    except (ValueError, TypeError, AttributeError, RecursionError) as error:
        raise FolioError(f"{path}: invalid GPT-2 config ({error})") from None
    if mismatched:
        values = ", ".join(f"{key}={found[key]!r}" for key in mismatched)
        raise FolioError(f"{path}: unsupported architecture ({values}); Folio runs GPT-2 only")
    are_integers = all(type(size) is int and size < 2**24 for size in sizes.values())
    if not are_integers or sizes["n_layer"] > 1000:  # building so many blocks would take minutes
        raise FolioError(f"{path}: implausible sizes: {sizes}")
    if type(bias) is not bool or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise FolioError(f"{path}: invalid GPT-2 config ({bias=}, resid_pdrop={dropout!r})")
    try:
        return GPTConfig(**sizes, dropout=float(dropout), bias=bias)
    except ValueError as error:
        raise FolioError(f"{path}: {error}") from None


# --- Names and layout of the weights ---

BIASES = ("c_attn.bias", "c_proj.bias", "c_fc.bias", "ln_1.bias", "ln_2.bias", "ln_f.bias")
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")
MASKS = (".attn.bias", ".attn.masked_bias")  # the causal mask, which old files store: no weight
# What torch.compile, DDP, FSDP and activation checkpointing add to the names of what they wrap.
WRAPPERS = re.compile(r"\b(_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\.")


def to_hf_state_dict(model: GPT) -> dict[str, torch.Tensor]:
    """The weights of a GPT-2 as Hugging Face stores them, on the CPU."""
    tensors = {}
    # Buffers are left out: if a changed model.py has buffers and still computes GPT-2, a new model
    # makes its own.
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name == "transformer.wte.weight":
            tensor = tensor[: model.config.vocab_size]  # without the rows of padding
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.cpu().contiguous()
        bias = f"{name.removesuffix('weight')}bias"
        if not model.config.bias and bias.endswith(BIASES):
            tensors[bias] = torch.zeros(tensor.size(-1), dtype=tensor.dtype)
    return tensors


def gpt2_shapes(config: GPTConfig) -> dict[str, tuple[int, ...]]:
    """The name and the shape of each parameter of GPT-2; without biases if config.bias is False.

    They are GPT-2's parameters even if model.py was changed.
    """
    C = config.n_embd
    shapes = {
        "wte.weight": (config.padded_vocab_size, C),
        "wpe.weight": (config.block_size, C),
        "ln_f.weight": (C,),
    }
    for i in range(config.n_layer):
        shapes |= {
            f"h.{i}.ln_1.weight": (C,),
            f"h.{i}.attn.c_attn.weight": (3 * C, C),
            f"h.{i}.attn.c_proj.weight": (C, C),
            f"h.{i}.ln_2.weight": (C,),
            f"h.{i}.mlp.c_fc.weight": (4 * C, C),
            f"h.{i}.mlp.c_proj.weight": (C, 4 * C),
        }
    if config.bias:
        with_bias = [name for name in shapes if name not in ("wte.weight", "wpe.weight")]
        shapes |= {f"{name.removesuffix('weight')}bias": shapes[name][:1] for name in with_bias}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def stored_tensors(model: GPT) -> dict[str, torch.Tensor]:
    """What loadable_state_dict() returns, with each parameter under one name.

    state_dict() has a parameter twice if a changed model uses it under two names.
    """
    names = {*dict(model.named_parameters()), *dict(model.named_buffers())}
    return {name: tensor for name, tensor in loadable_state_dict(model).items() if name in names}


def loadable_state_dict(model: GPT) -> dict[str, torch.Tensor]:
    """The state_dict, with those buffers only that a new model can load.

    GPT-2 has no buffers. A changed model may make one, such as a mask, in its first forward pass.
    A new model does not know this buffer before its own first forward pass.
    """
    state_dict, buffers = model.state_dict(), dict(model.named_buffers())
    if not buffers:
        return state_dict
    known = meta_model(model.config).state_dict()
    return {
        name: tensor
        for name, tensor in state_dict.items()
        if name not in buffers or (name in known and known[name].shape == tensor.shape)
    }


def from_hf_state_dict(
    tensors: dict[str, torch.Tensor], config: GPTConfig, folder: str | Path
) -> dict[str, torch.Tensor]:
    """Hugging Face's tensors of a GPT-2 -> the state_dict of GPT(config).

    The weights become float64 if all of them are, else float32.
    `folder` is named in error messages.
    Raises FolioError that lists the weights that are missing, unknown, or of a wrong shape.
    """
    model, state_dict = meta_model(config), {}
    for stored_name, name in hf_names(tensors).items():
        tensor = tensors[stored_name]
        if name.endswith(MASKS) and name not in model.state_dict():
            continue
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        state_dict[name] = tensor
    state_dict = with_one_dtype(state_dict)
    # False only if model.py was changed, and has an output layer of its own:
    is_tied = "lm_head.weight" not in dict(model.named_parameters())
    lm_head = state_dict.pop("lm_head.weight", None) if is_tied else None
    if lm_head is not None:  # a file may store the tied matrix under either name, or both
        embedding = state_dict.setdefault("transformer.wte.weight", lm_head)
        if not torch.equal(lm_head, embedding):
            raise FolioError(
                f"{folder}: lm_head.weight differs from transformer.wte.weight; in GPT-2 they are "
                "one matrix (tied), and Folio has no untied lm_head"
            )
    if not config.bias:
        for name in [name for name in state_dict if name.endswith(BIASES)]:
            if not state_dict[name].any():
                del state_dict[name]
    # Earlier versions of Folio saved a changed model in this layout, without its rows of padding.
    rows = "transformer.wte.weight"
    n_padding = config.padded_vocab_size - config.vocab_size
    if n_padding and rows in state_dict and len(state_dict[rows]) == config.vocab_size:
        state_dict[rows] = nn.functional.pad(state_dict[rows], (0, 0, 0, n_padding))
    if problems := list(compare_tensors(state_dict, model)):
        raise FolioError(f"{folder}: the weights do not match config.json: {join_names(problems)}")
    return state_dict


def with_one_dtype(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors, with floating-point numbers in float64 if all of them are, else in float32."""
    floats = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    is_float64 = all(tensor.dtype == torch.float64 for tensor in floats.values())
    dtype = torch.float64 if is_float64 else torch.float32
    return tensors | {name: tensor.to(dtype) for name, tensor in floats.items()}


def compare_tensors(found: dict[str, torch.Tensor], model: GPT) -> Iterator[str]:
    """Yield what does not fit the model in names and shapes: "transformer.extra is unknown".

    A buffer may be missing: if model.py was changed, the model has a value of its own. (What
    get_extra_state() of a changed model gives is no tensor, and is not compared.)
    """
    found = {name: value for name, value in found.items() if isinstance(value, torch.Tensor)}
    known, required = model.state_dict(), dict(model.named_parameters())
    for name in sorted(found.keys() | required.keys()):
        if name not in found:
            yield f"{name} is missing"
        elif name not in known:
            yield f"{name} is unknown"
        elif found[name].shape != known[name].shape:
            yield f"{name} is {list(found[name].shape)}, not {list(known[name].shape)}"


def has_trained_biases(tensors: dict[str, torch.Tensor]) -> bool:
    """Whether a bias is not 0.

    transformers' GPT-2 always has biases, so a model without biases is saved with zeros. If
    transformers has trained it, they are not zero any more, and the model needs them.
    """
    return any(name.endswith(BIASES) and tensor.any() for name, tensor in tensors.items())


def hf_names(stored_names: Iterable[str]) -> dict[str, str]:
    """The names of weights in a file, and what Hugging Face's GPT-2 calls these weights.

    "_orig_mod.transformer.wpe.weight", "model.wpe.weight", "wpe.weight": transformer.wpe.weight
    """
    names = {stored: WRAPPERS.sub("", stored) for stored in stored_names}
    # Every GPT-2 has this weight. What precedes its name is a prefix of all names.
    positions = next((name for name in names.values() if name.endswith("wpe.weight")), "")
    prefix = positions.removesuffix("wpe.weight").removesuffix("transformer.")
    names = {stored: name.removeprefix(prefix) for stored, name in names.items()}
    bare = ("wte.", "wpe.", "h.", "ln_f.")  # of a GPT2Model without lm_head
    return {
        stored: f"transformer.{name}" if name.startswith(bare) else name
        for stored, name in names.items()
    }


class NoInitialization(TorchFunctionMode):
    """Inside, linear layers and embeddings draw no random numbers.

    Drawing them takes time, and for tensors on "meta" it would import torch's compiler.
    """

    SKIPPED = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in self.SKIPPED:
            return kwargs["tensor"]  # torch passes all arguments of nn.init functions by name here
        return func(*args, **(kwargs or {}))


def uninitialized_model(config: GPTConfig, device: torch.device | str = "cpu") -> GPT:
    """A GPT whose matrices have shapes, but no meaningful numbers.

    If model.py was changed, the model may also have constants, such as a mask. These constants
    have their values, except on the device "meta", where no tensor has values.
    """
    with torch.device(device), torch.random.fork_rng(devices=[]), NoInitialization():
        return GPT(config)


def meta_model(config: GPTConfig) -> GPT:
    """A GPT on the device "meta", with which names and shapes are compared.

    It takes no memory, also if a file states absurd sizes. (A changed model.py may need the numbers
    of a tensor to build a model. Then the model is on the CPU, and takes memory.)
    """
    try:
        return uninitialized_model(config, "meta")
    except Exception:  # for example "Tensor.item() cannot be called on meta tensors"
        return uninitialized_model(config)


def cast_weights(model: GPT, dtype: torch.dtype) -> GPT:
    """The model with its floating-point numbers in `dtype`: float32 or float64.

    model.to(dtype) would also convert complex numbers, which a changed model.py may have, and drop
    their imaginary parts.
    """
    return model.double() if dtype == torch.float64 else model.float()


# --- Files of weights ---


def read_weights(folder: str | Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors or pytorch_model.bin, in one file or in shards.

    Nothing in a file is executed. Raises FolioError with the cause if the weights cannot be read.
    """
    tensors = {}
    for path in find_weights(folder):
        is_torch = path.suffix == Path(TORCH_WEIGHTS_FILE).suffix
        # mmap=False: the tensors are copies.
        tensors |= load_torch_file(path, mmap=False) if is_torch else load_safetensors(path)
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors.values()):
        raise FolioError(f"{folder}: the file of weights holds more than the weights of a model")
    return tensors


def find_weights(folder: str | Path) -> list[Path]:
    """The files that read_weights() reads. Raises FolioError if there are none."""
    folder = Path(folder)
    for name in (WEIGHTS_FILE, TORCH_WEIGHTS_FILE):
        if (folder / name).exists():
            return [folder / name]
        index = folder / f"{name}.index.json"
        if index.exists():
            return shards_of(index)
    suffixes = (".bin", ".h5", ".msgpack", ".safetensors")
    others = [path.name for path in folder.iterdir() if path.suffix in suffixes]
    found = f"; it holds {', '.join(sorted(others))}" if others else ""
    raise FolioError(f"{folder}: there are no weights ({WEIGHTS_FILE}) here{found}")


def shards_of(index: Path) -> list[Path]:
    """The files that model.safetensors.index.json names; FolioError if one cannot be read."""
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = [index.parent / Path(name).name for name in sorted(set(weight_map.values()))]
    except OSError as error:
        raise FolioError(f"{index}: cannot be read ({error.strerror})") from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FolioError(f"{index}: damaged, or not an index of weights ({reason})") from None
    for shard in shards:
        check_readable(shard)
    return shards


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    """Load one file, and check the SHA-256 in its metadata if Folio wrote it."""
    check_readable(path)
    try:
        with safetensors.safe_open(path, "pt") as file:
            expected_sha256 = (file.metadata() or {}).get(SHA256_KEY)
            # A copy: the tensor is a part of the file, into which another program may write.
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (safetensors.SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise FolioError(f"{path}: damaged weights ({error})") from None
    if expected_sha256 is not None and sha256_of(tensors) != expected_sha256:
        code = (
            "import sys; from safetensors.torch import load_file, save_file; "
            "save_file(load_file(sys.argv[1]), sys.argv[1], {'format': 'pt'})"
        )
        raise FolioError(
            f"{path}: damaged weights, or changed by another program (they do not match the "
            f'{SHA256_KEY} in the file). To accept a change: python -c "{code}" '
            + shell_command(str(path))
        )
    return tensors


def sha256_of(tensors: dict[str, torch.Tensor]) -> str:
    """The SHA-256 over names, types, shapes and bytes, in the order of the names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().flatten()
        sha256.update(flat.view(torch.uint8).numpy())
    return sha256.hexdigest()


def load_torch_file(path: Path, mmap: bool = True, verify: bool = True) -> dict[str, Any]:
    """Load a dict that torch.save() wrote, on the CPU. Nothing in the file is executed.

    mmap: the tensors are parts of the file, memory-mapped. Copy tensors that are needed for longer:
    they change when a program writes into the file.
    verify: compare the checksums of the file, which reads all of it.
    Raises FolioError if the file cannot be read, is damaged, or holds anything but plain data.
    """
    check_readable(path)
    try:
        is_zip = zipfile.is_zipfile(path)  # else of a very old torch, which is not memory-mapped
        if is_zip and verify:  # torch.load does not verify the checksums of a zip file
            with zipfile.ZipFile(path) as archive:
                if (damaged := archive.testzip()) is not None:
                    raise ValueError(f"the checksum of {damaged} is wrong")
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap and is_zip)
    except MemoryError:
        raise
    except Exception as error:  # of the unpickler: the file is damaged, or is not plain data
        reason = first_line(error)
        raise FolioError(f"{path}: damaged, or not only weights and numbers ({reason})") from None
    if not isinstance(loaded, dict):
        raise FolioError(f"{path}: damaged (it holds a {type(loaded).__name__}, not a dict)")
    return loaded


def check_readable(path: Path) -> None:
    """Raises FolioError if the file cannot be opened, or is only a pointer to the real one."""
    try:
        with open(path, "rb") as file:
            beginning = file.read(64)
    except OSError as error:
        raise FolioError(f"{path}: cannot be read ({error.strerror})") from None
    if beginning.startswith(b"version https://git-lfs"):
        raise FolioError(
            f"{path}: a Git LFS pointer, not the file itself; run `git lfs pull` in {path.parent}"
        )
