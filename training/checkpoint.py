"""What a trained model is on disk: a run's folder, which is a Hugging Face model folder.

    config.json             the architecture, in the keys of transformers' GPT2Config
    model.safetensors       the best weights so far
    tokenizer.json          the tokenizer, and tokenizer_config.json: how to open it
    generation_config.json  how long a pipeline may write
    settings.json           every setting of the run
    resume.pt               all that continuing needs, of the latest checkpoint
    log.csv, loss.png       the record and its curve

So `AutoModelForCausalLM.from_pretrained(folder)` opens what Folio wrote, and load_model() opens a
folder of GPT-2's published weights as it opens a run's. There is no exporter and no importer.
"""

import contextlib
import dataclasses
import errno
import hashlib
import json
import pickle
import sys
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch

from configurator import FolioError, did_you_mean
from data.files import move_aside, replacing, write_json, write_text
from data.gpt2 import PUBLISHED, WEIGHTS, fetch_gpt2
from data.tokenizer import END_OF_TEXT, Tokenizer, tokenizer_text
from model import GPT, GPTConfig

HERE = Path(__file__).resolve().parent.parent
RESUME, SETTINGS = "resume.pt", "settings.json"


# --- The model and its tokenizer ---


def save_model(model: GPT, folder: Path, end_of_text: int | None = None) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    end_of_text: the id of the token that parts documents; None where there is none.
    """
    folder.mkdir(parents=True, exist_ok=True)
    tensors = to_published(model)
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")
    ends = {"bos_token_id": end_of_text, "eos_token_id": end_of_text, "pad_token_id": end_of_text}
    write_json(folder / "config.json", {**to_hugging_face(model.config), **ends, "dtype": dtype})
    write_json(
        folder / "generation_config.json",
        {**ends, "do_sample": True, "max_length": model.config.block_size, "max_new_tokens": None},
    )
    about = {"format": "pt", "sha256": digest(tensors)}
    with replacing(folder / WEIGHTS) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=about)
        except safetensors.SafetensorError as error:  # in which a full disk's error is wrapped
            raise OSError(str(error)) from None


def load_model(folder: Path, **changes: Any) -> GPT:
    """The model whose config.json and *.safetensors stand in `folder`: a run's, or published ones.

    changes: block_size (positions beyond it are cut), dropout, pad_vocab_to.
    Raises FolioError if a file is missing or damaged, if the architecture is not GPT-2's, or if the
    weights do not fit it; the message names those that do not.
    """
    shape = read_config(folder)
    config = dataclasses.replace(shape, **changes)
    if config.block_size > shape.block_size:
        raise FolioError(
            f"--block_size={config.block_size}: {folder} has positions for {shape.block_size} only"
        )
    published = read_tensors(folder)
    if any(name.endswith(BIASES) and tensor.any() for name, tensor in published.items()):
        # transformers knows no GPT-2 without biases: where it trained ours on, it has some now.
        shape, config = (dataclasses.replace(c, bias=True) for c in (shape, config))
    with torch.device("meta"):  # shapes only: the numbers come from the disk
        model = GPT(config)
    tensors = from_published(published, shape, folder)
    tensors["transformer.wpe.weight"] = tensors["transformer.wpe.weight"][: config.block_size]
    rows = tensors["transformer.wte.weight"]
    surplus = model.transformer.wte.weight.size(0) - len(rows)
    tensors["transformer.wte.weight"] = torch.nn.functional.pad(rows, (0, 0, 0, surplus))
    model.load_state_dict(tensors, assign=True)
    return model


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    write_text(folder / "tokenizer.json", tokenizer_text(tokenizer))
    special = {} if tokenizer.end_of_text is None else {"eos_token": END_OF_TEXT}
    write_json(
        folder / "tokenizer_config.json",
        {
            # Without the class, AutoTokenizer takes the model's name for the tokenizer's and
            # builds GPT-2's, even for characters.
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            "split_special_tokens": True,  # text is text, even one that spells a special token
            **special,
        },
    )


def to_hugging_face(config: GPTConfig) -> dict[str, Any]:
    """The architecture in the keys of transformers' GPT2Config."""
    return {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": config.vocab_size,
        "n_positions": config.block_size,
        "n_layer": config.n_layer,
        "n_head": config.n_head,
        "n_embd": config.n_embd,
        "activation_function": "gelu_new",
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "tie_word_embeddings": True,
        **dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), config.dropout),
        "bias": config.bias,  # ours: GPT2Config knows no model without, so they are written as 0
    }


# What GPT-2 is; a config.json may leave these out but not differ. From transformers' GPT2Config.
ONLY_GPT2 = {
    "model_type": ("gpt2",),
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "layer_norm_epsilon": (1e-5,),
    "tie_word_embeddings": (True,),
    "scale_attn_weights": (True,),
    "scale_attn_by_inverse_layer_idx": (False,),
    "add_cross_attention": (False,),
}


def read_config(folder: Path) -> GPTConfig:
    """The architecture that config.json describes; FolioError if it is not GPT-2's."""
    path = Path(folder) / "config.json"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
        sizes = {
            "block_size": found["n_positions"],
            **{key: found[key] for key in ("vocab_size", "n_layer", "n_head", "n_embd")},
        }
        dropout, bias = found.get("resid_pdrop", 0.1), found.get("bias", True)
        only = {**ONLY_GPT2, "n_inner": (None, 4 * found["n_embd"])}
        different = [key for key, good in only.items() if found.get(key, good[0]) not in good]
    except FileNotFoundError:
        raise FolioError(
            f"{path}: there is no model here; python train.py config/shakespeare_char.py makes one"
        ) from None
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise FolioError(f"{path}: not the description of a GPT-2 ({reason})") from None
    if different:
        what = ", ".join(f"{key}={found[key]!r}" for key in different)
        raise FolioError(f"{path}: not GPT-2's architecture ({what})")
    possible = all(type(size) is int and 0 < size < 2**24 for size in sizes.values())
    if not possible or sizes["n_layer"] > 1000:
        raise FolioError(f"{path}: no model has such sizes: {sizes}")
    if type(bias) is not bool or not isinstance(dropout, int | float) or not 0 <= dropout <= 1:
        raise FolioError(f"{path}: not the description of a GPT-2 ({bias=}, {dropout=})")
    try:
        return GPTConfig(**sizes, dropout=float(dropout), bias=bias)
    except ValueError as error:
        raise FolioError(f"{path}: {error}") from None


BIASES = ("c_attn.bias", "c_proj.bias", "c_fc.bias", "ln_1.bias", "ln_2.bias", "ln_f.bias")
# GPT-2 was published with the weights of its linear layers as (in, out); torch's are (out, in).
TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")


def to_published(model: GPT) -> dict[str, torch.Tensor]:
    """The weights under GPT-2's names, in its layout, without padding, with zeros for no biases."""
    tensors = {}
    for name, parameter in model.named_parameters():
        tensor = parameter.detach()
        if name == "transformer.wte.weight":
            tensor = tensor[: model.config.vocab_size]
        if name.endswith(TRANSPOSED):
            tensor = tensor.t()
        tensors[name] = tensor.cpu().contiguous()
        if not model.config.bias and ".wte." not in name and ".wpe." not in name:
            bias = name.replace("weight", "bias")
            tensors[bias] = torch.zeros(tensor.size(-1), dtype=tensor.dtype)
    return tensors


def from_published(
    tensors: dict[str, torch.Tensor], config: GPTConfig, folder: Path
) -> dict[str, torch.Tensor]:
    """The other way: GPT-2's published weights as a state_dict of GPT(config), checked."""
    ours = {}
    for name, tensor in tensors.items():
        if name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the causal mask: no weight
        if not name.startswith(("transformer.", "lm_head.")):
            name = f"transformer.{name}"
        if name.endswith(TRANSPOSED) and tensor.dim() == 2:
            tensor = tensor.t().contiguous()
        ours[name] = tensor if tensor.dtype == torch.float64 else tensor.float()
    head = ours.pop("lm_head.weight", None)
    if head is not None and not torch.equal(head, ours.get("transformer.wte.weight", head)):
        raise FolioError(f"{folder}: its head is not tied to its embedding: not GPT-2's")
    if not config.bias:
        ours = {
            name: tensor
            for name, tensor in ours.items()
            if not (name.endswith(".bias") and not tensor.any())
        }
    with torch.device("meta"):
        wanted = {name: p.shape for name, p in GPT(config).named_parameters()}
    problems = [f"{name} is missing" for name in wanted if name not in ours]
    problems += [f"{name} is unknown" for name in ours if name not in wanted]
    problems += [
        f"{name} is {list(ours[name].shape)} instead of {list(shape)}"
        for name, shape in wanted.items()
        if name in ours and ours[name].shape != shape
    ]
    if problems:
        more = f" and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise FolioError(
            f"{folder}: the weights do not fit config.json: {'; '.join(problems[:20])}{more}"
        )
    return ours


def read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of model.safetensors, or of the shards its index names."""
    paths = [folder / WEIGHTS]
    index = folder / f"{WEIGHTS}.index.json"
    try:
        if not paths[0].exists() and index.exists():
            names = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            paths = [folder / Path(name).name for name in sorted(set(names))]
        tensors = {}
        for path in paths:
            tensors |= read_checked(path)
        return tensors
    except FileNotFoundError:
        raise FolioError(f"{paths[0]}: there are no weights here (yet)") from None
    except (safetensors.SafetensorError, OSError, ValueError, KeyError, AttributeError) as error:
        raise FolioError(f"{folder}: damaged weights ({error})") from None


def read_checked(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of one file; ValueError if they are not those that were written, as it tells."""
    with safetensors.safe_open(path, "pt") as file:
        promised = (file.metadata() or {}).get("sha256")  # published weights say nothing
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    if promised is not None and digest(tensors) != promised:
        raise ValueError(f"{path.name} has changed since it was written")
    return tensors


def digest(tensors: dict[str, torch.Tensor]) -> str:
    """The SHA-256 over names, types, shapes and bytes, in the order of the names."""
    sha256 = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        sha256.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        flat = tensor.detach().contiguous().flatten()
        sha256.update(flat.view(torch.uint8).numpy())
    return sha256.hexdigest()


# --- Resuming ---


def save_resume(folder: Path, state: dict[str, Any]) -> None:
    """Write resume.pt: state_dicts, numbers and texts in plain containers."""
    with replacing(folder / RESUME) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # a file of Python's own tells why it cannot be written


DAMAGES = (
    zipfile.BadZipFile, pickle.UnpicklingError, RuntimeError, EOFError, OSError, ValueError,
    KeyError, NotImplementedError, zlib.error,
)  # fmt: skip


def load_resume(folder: Path) -> dict[str, Any]:
    """What save_resume() wrote, on the CPU; nothing in the file is ever executed."""
    path = folder / RESUME
    try:
        with zipfile.ZipFile(path) as archive:  # torch.load does not look at the checksums
            if (broken := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {broken} is wrong")
        state = torch.load(path, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError("it holds something else")
        return state
    except FileNotFoundError:
        raise FolioError(f"{path}: there is nothing to resume; --init_from=scratch") from None
    except DAMAGES as error:
        reason = str(error).partition("\n")[0]
        raise FolioError(
            f"{path}: damaged ({reason}); to go on from the best weights: --init_from={folder} "
            "and another --out_dir"
        ) from None


# --- The folder ---


def run_folder(out_dir: str) -> Path:
    """out_dir as a path; a relative one starts where Folio stands, not where it is called."""
    try:
        folder = HERE / Path(out_dir.replace("\0", "")).expanduser()
    except RuntimeError as error:
        raise FolioError(f"--out_dir={out_dir}: {error}") from None
    if not folder.name:
        raise FolioError(f"--out_dir={out_dir}: no folder for a run; name one in it")
    return folder


def model_folder(source: str) -> Path:
    """The folder of a model: that of a run, any other, or GPT-2's weights by name, fetched.

    Raises FolioError if it is neither a folder nor such a name.
    """
    if source in PUBLISHED:
        return fetch_gpt2(source)
    folder = run_folder(source)
    if not folder.is_dir():
        guess = did_you_mean(source, ("scratch", "resume", "auto", *PUBLISHED))
        raise FolioError(f"{source}: there is no such folder, and no such weights{guess}")
    return folder


def newest_run() -> Path:
    """The folder under out/ whose weights are the latest; FolioError where there is none."""
    found = sorted((HERE / "out").glob(f"*/{WEIGHTS}"), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FolioError(
            f"there is no trained model under {HERE / 'out'} yet: "
            "python train.py config/shakespeare_char.py"
        )
    return found[-1].parent


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Within it, the folder is this process's alone; FolioError if another one trains there.

    The operating system's lock is on a file beside the folder, so that it stays where it is when an
    old run moves aside, and goes when the process goes, however it goes.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(lock_of(folder), "a+b") as file:
        try:
            if sys.platform == "win32":
                import msvcrt

                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
            else:
                import fcntl

                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            raise FolioError(f"{folder}: another process is training here; use --out_dir") from None
        except OSError as error:
            if error.errno not in (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK):
                raise
            print(f"{folder.parent}: no locks on this disk, so let only one job train in {folder}")
        yield


def lock_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def begun_by(folder: Path) -> str:
    """The job that make_room() was told of when it last made this folder ready; "" if of none."""
    try:
        return lock_of(folder).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def make_room(folder: Path, continuing: bool, job: str = "") -> None:
    """Make the folder ready for a run. One that is there goes on, or moves aside.

    job: what all attempts at this run have in common, and no other run; begun_by() remembers it.
    Raises FolioError if what is there is no run.
    """
    folder.mkdir(exist_ok=True)
    there = [] if continuing else sorted(path.name for path in folder.iterdir())
    # The first file to be written is the settings: a kill may leave its beginning, and no run.
    there = [name for name in there if name != f".{SETTINGS}.tmp"]
    if there and SETTINGS not in there:
        raise FolioError(f"{folder}: holds files but no run ({there[0]}); use another --out_dir")
    if there:
        print(f"the run that was there is now {move_aside(folder)}")
        folder.mkdir()
    # Of a write that was killed: our temporary files, and safetensors' own.
    for pattern in (".*.tmp", ".tmp??????"):
        for temporary in (*folder.glob(pattern), *folder.glob(f"step_*/{pattern}")):
            temporary.unlink()
    if job or begun_by(folder):
        lock_of(folder).write_text(job, encoding="utf-8")
