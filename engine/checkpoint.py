"""Checkpoints: a run folder is a Hugging Face model folder.

    config.json             the architecture, in the keys of transformers' GPT2Config
    model.safetensors       the best weights so far
    tokenizer.json          the tokenizer; tokenizer_config.json says how to open it
    generation_config.json  defaults for generating text with transformers
    README.md               a model card: data, settings, loss, how to load the model
    settings.json           every setting of the run
    resume.pt               everything that resuming needs, from the latest checkpoint
    log.csv, loss.png       the metrics and their plot

So `AutoModelForCausalLM.from_pretrained(folder)` opens a run of Folio's, and load_model() opens a
folder of GPT-2's weights by any other program.

That is enough for a first reading. The rest of this file is about what can go wrong.
"""

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

import data.tokenizer
from configurator import FolioError, did_you_mean
from data.dataset import ShardedTokens
from data.files import (
    atomic_write, explain_os_error, file_lock, rename_to_backup, shell_command, user_path,
    write_json, write_text,
)  # fmt: skip
from data.hub import GPT2_MODELS, hub_model
from data.tokenizer import CharTokenizer, Tokenizer, load_tokenizer
from engine.hf_format import (
    BIASES, SHA256_KEY, WEIGHTS_FILE, from_hf_state_dict, load_torch_file, read_config,
    read_weights, sha256_of, to_hf_config, to_hf_state_dict,
)  # fmt: skip
from engine.log_file import LOG_FILE, read_log
from engine.train_config import TrainConfig
from model import GPT, GPTConfig

REPO_ROOT = Path(__file__).resolve().parent.parent
CHECKPOINT_FILE, SETTINGS_FILE = "resume.pt", "settings.json"


# --- The model and its tokenizer ---


def save_model(
    model: torch.nn.Module,
    folder: str | Path,
    eos_token_id: int | None = None,
    *,
    step: int | None = None,
    val_loss: float | None = None,
) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    model: a GPT, which torch.compile() or DDP may have wrapped.
    eos_token_id: the id of the end-of-text token, if the vocabulary has one.
    step, val_loss: of these weights, for describe_run(); val_loss in nats per token.
    Raises TypeError if the model is not a GPT, FolioError if a file cannot be written.
    """
    model, folder = unwrap(model), Path(folder)
    make_folder(folder)
    tensors = to_hf_state_dict(model)
    dtype = str(model.transformer.wte.weight.dtype).removeprefix("torch.")
    special_token_ids = {
        "bos_token_id": eos_token_id, "eos_token_id": eos_token_id, "pad_token_id": eos_token_id,
    }  # fmt: skip
    write_json(
        folder / "config.json", {**to_hf_config(model.config), **special_token_ids, "dtype": dtype}
    )
    generation = {"do_sample": True, "max_length": model.config.block_size, "max_new_tokens": None}
    write_json(folder / "generation_config.json", {**special_token_ids, **generation})
    metadata = {"format": "pt", SHA256_KEY: sha256_of(tensors)}
    metadata |= {"step": str(step)} if step is not None else {}
    metadata |= {"val_loss": str(val_loss)} if val_loss is not None else {}
    with atomic_write(folder / WEIGHTS_FILE) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # wraps an OSError, for example of a full disk
            raise OSError(str(error)) from None


def unwrap(model: torch.nn.Module) -> GPT:
    """The GPT inside torch.compile()'s or DDP's wrapper; TypeError if it is not a plain GPT."""
    while not isinstance(model, GPT):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, torch.nn.Module):
            raise TypeError(f"a GPT is needed, not a {type(model).__name__}")
        model = inner
    # Two embeddings, and the weights (and biases) of six layers per block and of ln_f.
    expected = 2 + (6 * model.config.n_layer + 1) * (1 + model.config.bias)
    if len(list(model.parameters())) != expected:
        raise TypeError("parameters of this GPT have been removed or added; save the original GPT")
    return model


def load_model(
    folder: str | Path,
    *,
    vocab_size: int | None = None,
    block_size: int | None = None,
    dropout: float | None = None,
    pad_vocab_to: int = 1,
    float32_attention: bool = False,
) -> GPT:
    """Load a model from a run folder, or from any folder with GPT-2's weights; in eval mode.

    vocab_size: that of the tokenizer, if the folder's table of embeddings has rows of padding.
    block_size: at most the model's; positions beyond it are cut off.
    Raises FolioError if a file is missing or damaged, if the architecture is not GPT-2's, or if the
    weights do not match config.json.
    """
    saved_config, tensors = read_config(folder), read_weights(folder)
    if any(name.endswith(BIASES) and tensor.any() for name, tensor in tensors.items()):
        # transformers' GPT-2 always has biases. If it trained a model of ours that has none, they
        # are no longer zero.
        saved_config = dataclasses.replace(saved_config, bias=True)
    overrides = {"vocab_size": vocab_size, "block_size": block_size, "dropout": dropout}
    overrides = {name: value for name, value in overrides.items() if value is not None}
    overrides |= {"pad_vocab_to": pad_vocab_to, "float32_attention": float32_attention}
    config = dataclasses.replace(saved_config, **overrides)
    if config.block_size > saved_config.block_size:
        raise FolioError(
            f"block_size={config.block_size} exceeds that of the model in {folder}: "
            f"{saved_config.block_size}"
        )
    if not 0 <= saved_config.vocab_size - config.vocab_size <= MAX_UNUSED_ROWS:
        raise FolioError(
            f"{folder}: the tokenizer has {config.vocab_size:,} tokens, the model embeddings for "
            f"{saved_config.vocab_size:,}; they do not belong together"
        )
    state_dict = from_hf_state_dict(tensors, saved_config, folder)
    positions, rows = "transformer.wpe.weight", "transformer.wte.weight"
    state_dict[positions] = state_dict[positions][: config.block_size]
    state_dict[rows] = state_dict[rows][: config.vocab_size]
    with torch.device("meta"):  # shapes only, no memory: the weights are those of the state_dict
        model = GPT(config)
    n_padding = model.transformer.wte.weight.size(0) - config.vocab_size
    state_dict[rows] = torch.nn.functional.pad(state_dict[rows], (0, 0, 0, n_padding))
    model.load_state_dict(state_dict, assign=True)  # assign: parameters on "meta" have no memory
    return model.eval()


MAX_UNUSED_ROWS = 1023  # of a table of embeddings: some round its rows up to a multiple of 1024


def load_model_and_tokenizer(folder: str | Path) -> tuple[GPT, Tokenizer]:
    """Load both from one folder; FolioError if they do not belong together."""
    tokenizer = load_tokenizer(folder)
    return load_model(folder, vocab_size=tokenizer.vocab_size), tokenizer


def save_tokenizer(
    tokenizer: Tokenizer, folder: str | Path, block_size: int, pad_token_id: int | None = None
) -> None:
    """Write tokenizer.json and tokenizer_config.json.

    block_size: the model's context length in tokens.
    pad_token_id: with which transformers fills up a batch, if characters have no end-of-text token;
        see rarest_token().
    """
    make_folder(Path(folder))
    settings = {"model_max_length": block_size}
    is_char = isinstance(tokenizer, CharTokenizer) and tokenizer.eos_token_id is None
    if is_char and pad_token_id is not None:
        settings["pad_token"] = tokenizer.decode([pad_token_id])
    data.tokenizer.save_tokenizer(tokenizer, folder, **settings)


def rarest_token(tokens: ShardedTokens) -> int:
    """The token that is rarest in (the first million tokens of) a dataset.

    transformers needs a padding token, and leaves it out when it decodes generated text. A
    vocabulary of characters has none to spare, so the rarest one does the least damage.
    """
    return int(np.bincount(tokens.shards[0][: 2**20], minlength=tokens.vocab_size).argmin())


def save_model_card(
    folder: str | Path,
    config: TrainConfig,
    dataset_meta: dict[str, Any],
    *,
    step: int,
    val_loss: float,
    bits_per_byte: float,
) -> None:
    """Write README.md: where the model in this folder comes from, and how to load it."""
    folder = Path(folder)
    tokens = dataset_meta.get("train_tokens")
    source = str(dataset_meta.get("source", "")).replace("\n", " ")
    data = f"`{config.dataset}`" + (f", from {source}" if source else "")
    data += f", {tokens:,} training tokens" if isinstance(tokens, int) else ""
    write_text(
        folder / "README.md",
        MODEL_CARD.format(
            name=folder.name, folder=shown_path(folder), data=data, step=step, val_loss=val_loss,
            bits_per_byte=bits_per_byte, tokens_per_step=config.tokens_per_step, c=config,
        ),
    )  # fmt: skip


MODEL_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags: [gpt2, folio]
---

# {name}

A GPT-2, trained with Folio.

| | |
|---|---|
| data | {data} |
| model | {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, \
context of {c.block_size} tokens |
| training | {step:,} of {c.max_iters:,} steps of {tokens_per_step:,} tokens, {c.optimizer}, \
learning rate {c.learning_rate} |
| validation loss | {val_loss:.4f} nats per token, {bits_per_byte:.3f} bits per byte |

Every setting is in `settings.json`, the training log in `log.csv`.

## How to load it

With Folio, in its own folder:

```python
from engine.checkpoint import load_model_and_tokenizer

model, tokenizer = load_model_and_tokenizer("{folder}")
```

With transformers:

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{folder}")
```
"""


# --- Resuming ---


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> None:
    """Write resume.pt. state: state_dicts, numbers and strings in dicts and lists.

    Raises FolioError if it cannot be written, or if the run folder was deleted or moved meanwhile.
    """
    folder = Path(folder)
    if not (folder / SETTINGS_FILE).exists():
        raise FolioError(f"{folder}: {SETTINGS_FILE} has disappeared; was this run folder moved?")
    with atomic_write(folder / CHECKPOINT_FILE) as temporary, open(temporary, "wb") as file:
        torch.save(state, file)  # given a path, it would not name the reason of a failure


def load_checkpoint(folder: str | Path) -> dict[str, Any]:
    """What save_checkpoint() wrote, on the CPU. Nothing in the file is executed.

    Raises FolioError if there is no checkpoint, or if it is damaged.
    """
    path = find_checkpoint(folder)
    try:
        return load_torch_file(path)
    except FolioError as error:
        raise FolioError(f"{error}; {advice_to_use_weights(path.parent)}") from None


def find_checkpoint(folder: str | Path) -> Path:
    """The path of resume.pt. Raises FolioError, with the way to go on, if there is none."""
    path = Path(folder) / CHECKPOINT_FILE
    if path.exists():
        return path
    refuse_nanogpt_checkpoint(path.parent)
    raise FolioError(f"{path}: no checkpoint to resume from; {advice_to_use_weights(path.parent)}")


def advice_to_use_weights(folder: Path) -> str:
    if (folder / WEIGHTS_FILE).exists():
        where = shown_path(folder)
        flags = shell_command(f"--init_from={where}", f"--out_dir={where}-2")
        return f"to continue from the best weights: {flags}"
    return "--init_from=scratch starts a new run"


def refuse_nanogpt_checkpoint(folder: Path) -> None:
    if (folder / "ckpt.pt").exists():
        raise FolioError(
            f"{folder / 'ckpt.pt'}: a checkpoint of nanoGPT, which Folio does not read; to train "
            "a new model: --init_from=scratch and another --out_dir"
        )


def check_architecture(folder: str | Path, config: GPTConfig) -> None:
    """Raises FolioError if config.json in the run folder describes another architecture.

    Of a run that resumes, config is what its settings say. A changed n_head fits the weights just
    as well, and would give wrong numbers without an error.
    """
    if not (Path(folder) / "config.json").exists():
        return
    saved = read_config(folder)
    for name in ("n_layer", "n_head", "n_embd", "block_size", "vocab_size", "bias"):
        if getattr(saved, name) != getattr(config, name):
            raise FolioError(
                f"{folder}: {SETTINGS_FILE} has {name}={getattr(config, name)}, config.json "
                f"{getattr(saved, name)}; put the old value back into {SETTINGS_FILE}"
            )


# --- Which folder ---


def resolve_path(path: str | Path) -> Path:
    """An absolute path without symbolic links; a relative one is relative to the repository."""
    try:
        return (REPO_ROOT / user_path(path)).resolve()
    except (RuntimeError, OSError) as error:  # links in a circle
        raise FolioError(f"{path}: not a valid path ({error})") from None


def resolve_out_dir(out_dir: str | Path) -> Path:
    """The absolute path of a run folder; a relative one is relative to the repository.

    Symbolic links are followed: the lock, and moving an old run aside, act on the real folder.
    Raises FolioError if no run can be there.
    """
    folder = resolve_path(out_dir)
    if folder == REPO_ROOT or folder in REPO_ROOT.parents:
        raise FolioError(f"--out_dir={out_dir}: name a folder for the run, such as out/my_run")
    return folder


def resolve_model_dir(source: str | Path) -> Path:
    """A run folder, any other model folder, or the name of a model on the Hugging Face hub.

    "gpt2" and "openai-community/gpt2" are names. A name is downloaded if it is not in the cache.
    Raises FolioError if there is no such folder and no such model.
    """
    name = str(source)
    if name in GPT2_MODELS:
        return hub_model(name)
    folder = resolve_path(source)
    if folder.is_dir():
        return folder
    if folder.exists():
        raise FolioError(f"{source}: a file; a folder with a model in it is needed")
    if name == "distilgpt2" or is_hub_name(name):
        return hub_model(name)
    runs = [f"out/{path.parent.name}" for path in saved_weights()]
    guess = did_you_mean(name, ("scratch", "resume", "auto", *GPT2_MODELS, *runs))
    raise FolioError(f"{source}: neither a folder ({folder}) nor a model on the hub{guess}")


def is_hub_name(name: str) -> bool:
    """Whether it has the form owner/name, and is not a misspelled folder such as out/shakspere."""
    parts = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", name)
    return parts is not None and parts[1] != "out" and not (REPO_ROOT / parts[1]).exists()


def saved_weights() -> list[Path]:
    """The weights of all runs under out/, the oldest first."""
    paths = (REPO_ROOT / "out").glob(f"*/{WEIGHTS_FILE}")
    return sorted(paths, key=lambda path: path.stat().st_mtime)


def newest_run() -> Path:
    """The folder under out/ whose weights were saved last. Raises FolioError if there is none."""
    if paths := saved_weights():
        return paths[-1].parent
    raise FolioError(
        f"no trained model in {REPO_ROOT / 'out'}; train one: "
        "python train.py config/shakespeare_char.py"
    )


def describe_run(folder: str | Path) -> str:
    """Which weights a folder holds, in one line; only its path if they are not from a run.

    "out/shakespeare_char, step 1,750 of 2,000, validation loss 1.5560"
    """
    folder = Path(folder)
    description, settings = shown_path(folder), read_run_settings(folder)
    with contextlib.suppress(OSError, ValueError, KeyError, safetensors.SafetensorError):
        with safetensors.safe_open(folder / WEIGHTS_FILE, "pt") as file:
            metadata = file.metadata() or {}
        step, val_loss = int(metadata["step"]), metadata.get("val_loss")
        description += f", step {step:,}"
        if settings is not None:
            description += f" of {settings['max_iters']:,}"
            last_step = max((row["step"] for row in read_log(folder / LOG_FILE)), default=step)
            if last_step < settings["max_iters"]:
                description += f" (training stopped at step {last_step:,})"
        description += f", validation loss {float(val_loss):.4f}" if val_loss else ", not evaluated"
    return description


def shown_path(folder: Path) -> str:
    """Relative to the repository if possible, with forward slashes: 'out/shakespeare_char'."""
    folder = folder.resolve()
    if folder.is_relative_to(REPO_ROOT):
        folder = folder.relative_to(REPO_ROOT)
    return folder.as_posix()


# --- One run in one folder ---


@contextlib.contextmanager
def lock_run_folder(folder: str | Path) -> Iterator[None]:
    """Hold the run folder for this process; FolioError if another process trains there.

    The lock is on a file beside the folder, which stays there when an old run is moved aside. The
    operating system releases the lock when the process ends, for any reason.
    """
    folder = Path(folder)
    lock_file = folder.with_name(f".{folder.name}.lock")
    message = f"{folder}: another process is training here; choose another --out_dir"
    with file_lock(lock_file, message):
        yield


def prepare_out_dir(folder: str | Path, resume: bool) -> None:
    """Make the folder ready for a run. If resume is False, an old run in it is moved aside.

    Raises FolioError if the folder holds files that are not a run.
    """
    folder = Path(folder)
    make_folder(folder)
    with explain_os_error(folder, "cannot be made ready for a run"):
        # A run that was killed while it saved its settings has left a temporary file, and no run.
        existing = sorted(p.name for p in folder.iterdir() if not is_temporary(p.name))
        if existing and not resume:
            check_is_run(folder, existing)
            print(f"the previous run is now in {shown_path(rename_to_backup(folder))}")
            make_folder(folder)
        for path in (*folder.iterdir(), *folder.glob("step_*/*")):
            if is_temporary(path.name):
                path.unlink()


def check_is_run(folder: Path, filenames: list[str]) -> None:
    """Raises FolioError if these files in the folder are not a run of Folio's."""
    if read_run_settings(folder) is None:
        refuse_nanogpt_checkpoint(folder)
        raise FolioError(
            f"{folder}: holds files that are not a run of Folio's ({filenames[0]}); choose another "
            "--out_dir"
        )


def is_temporary(name: str) -> bool:
    """Whether the name is one of atomic_write() (.resume.pt.tmp) or safetensors (.tmpAbCdEf)."""
    return re.fullmatch(r"\..*\.tmp|\.tmp\w{6}", name) is not None


def read_run_settings(folder: Path) -> dict[str, Any] | None:
    """settings.json, if this folder holds a run of Folio's; other programs use that name, too."""
    try:
        settings = json.loads((folder / SETTINGS_FILE).read_text(encoding="utf-8"))
        is_run = {"dataset", "max_iters", "n_layer", "init_from"} <= settings.keys()
        return settings if is_run and type(settings["max_iters"]) is int else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def make_folder(folder: Path) -> None:
    with explain_os_error(folder, "this folder cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)
