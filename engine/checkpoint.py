"""Checkpoints: a run folder is a Hugging Face model folder.

    config.json             the architecture, in the keys of transformers' GPT2Config
    model.safetensors       the best weights so far
    tokenizer.json          the tokenizer; tokenizer_config.json says how to open it
    generation_config.json  defaults for generating text with transformers
    README.md               a model card: data, settings, loss, how to load the model
    settings.json           every setting of the run, for readers
    resume.pt               everything that resuming needs, from the latest checkpoint
    log.csv, loss.png       the metrics and their plot
    start_id.txt            a random id of the process that trains here

So `AutoModelForCausalLM.from_pretrained(folder)` opens a run (unless model.py was changed), and
load_model() opens a GPT-2 that any other program has saved.

engine/run_folder.py finds, locks and prepares the folder.
"""

import contextlib
import dataclasses
import difflib
import glob
import hashlib
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch

from configurator import FolioError, first_line, print_or_discard, wrap
from data.dataset import ShardedTokens
from data.files import (
    atomic_write, explain_os_error, join_names, read_folder, rename_to_backup, shell_command,
    shown_path, user_path, write_json, write_text,
)  # fmt: skip
from data.tokenizer import Tokenizer, load_tokenizer, read_json
from engine.changed_model import copy_model, fixed_ids_loss, is_gpt2, model_py_is_gpt2
from engine.hf_format import (
    CHANGED_MODEL_TYPE, SHA256_KEY, WEIGHTS_FILE, cast_weights, compare_tensors, from_hf_state_dict,
    has_trained_biases, load_torch_file, meta_model, read_config,
    read_weights, sha256_of, stored_tensors, to_hf_config, to_hf_state_dict, uninitialized_model,
    with_one_dtype,
)  # fmt: skip
from engine.run_folder import (
    SETTINGS_FILE, make_folder, refuse_nanogpt_checkpoint, weights_metadata,
)  # fmt: skip
from engine.train_config import TrainConfig
from model import GPT, GPTConfig

CHECKPOINT_FILE = "resume.pt"
MAKE_THE_CHANGE_AGAIN = "was trained with a changed model.py; make the change again"
OWN_LAYOUT = "state_dict"  # a changed model is saved with the names and shapes of model.py
MAX_UNUSED_ROWS = 1023  # of embeddings: some models round their number up to a multiple of 1024


# --- The model and its tokenizer ---


def save_model(
    model: torch.nn.Module,
    folder: str | Path,
    tokenizer: Tokenizer | None = None,
    **numbers: float,
) -> None:
    """Write config.json, generation_config.json and model.safetensors.

    model: a GPT, which torch.compile() or DDP may have wrapped.
    tokenizer: its special tokens, such as end-of-text, are named in the two JSON files.
    numbers: about these weights, for weights_metadata(): step, val_loss (nats per token), ...
    Raises TypeError if the model is not a GPT, FolioError if a weight is NaN or infinite or if a
    file cannot be written. Then model.safetensors is unchanged.
    """
    model, folder = unwrap(model), user_path(folder)
    # transformers cannot open a changed model, so its tensors keep their names and shapes. A clone:
    # safetensors refuses two tensors in one memory.
    changed = not is_gpt2(model)
    tensors = to_hf_state_dict(model) if not changed else {
        name: tensor.cpu().clone(memory_format=torch.contiguous_format)
        for name, tensor in stored_tensors(model).items()
    }  # fmt: skip
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FolioError(f"{folder}: not saved: the weights contain NaN or infinity")
    make_folder(folder)
    dtype = str(next(model.parameters()).dtype).removeprefix("torch.")
    no_ids = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    special_token_ids = no_ids if tokenizer is None else tokenizer.special_token_ids
    config = {**to_hf_config(model.config), **special_token_ids, "dtype": dtype}
    if changed:  # its embeddings are saved with their rows of padding
        config |= {"model_type": CHANGED_MODEL_TYPE, "pad_vocab_to": model.config.pad_vocab_to}
        config["layout"] = OWN_LAYOUT
        numbers["fixed_ids_loss"] = fixed_ids_loss(model)
    # Without max_length, a pipeline of transformers would generate 256 tokens, more than some
    # contexts hold. max_new_tokens is None, because it would take precedence over max_length.
    generation = {"do_sample": True, "max_length": model.config.block_size, "max_new_tokens": None}
    metadata = {"format": "pt", SHA256_KEY: sha256_of(tensors)}
    metadata |= {name: str(number) for name, number in numbers.items()}
    with atomic_write(folder / WEIGHTS_FILE) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, metadata=metadata)
        except safetensors.SafetensorError as error:  # wraps an OSError, for example of a full disk
            raise OSError(str(error)) from None
        # The disk is not full: now replace all files, which belong together.
        write_json(folder / "config.json", config)
        path = folder / "generation_config.json"
        with contextlib.suppress(FolioError):  # a damaged file is replaced
            # A user may have added defaults, such as a temperature.
            generation = {**read_json(path), **generation}
        write_json(path, {**generation, **special_token_ids})


def unwrap(model: torch.nn.Module) -> GPT:
    """The GPT inside torch.compile()'s or DDP's wrapper; TypeError if it is not a plain GPT."""
    while not isinstance(model, GPT):
        inner = getattr(model, "_orig_mod", getattr(model, "module", None))
        if not isinstance(inner, torch.nn.Module):
            raise TypeError(f"a GPT is needed, not a {type(model).__name__}")
        model = inner
    expected = dict(meta_model(model.config).named_parameters())
    if dict(model.named_parameters()).keys() != expected.keys():
        raise TypeError("parameters of this GPT have been removed or added; save the original GPT")
    return model


def load_model(folder: str | Path, **overrides: Any) -> GPT:
    """Load a model from a run folder, or from any folder with GPT-2's weights; in eval mode.

    overrides: fields of GPTConfig that replace the folder's, such as dropout=0.1.
        vocab_size: that of the tokenizer, if the folder's table of embeddings has rows of padding.
        block_size: at most the model's; positions beyond it are cut off.
    Raises FolioError if a file is missing or damaged, if the architecture is not GPT-2's, if the
    weights do not match config.json, or if the model was trained with a changed model.py and this
    model.py is GPT-2; ValueError if n_layer, n_head, n_embd or bias in overrides is not that of the
    weights.
    """
    folder = user_path(folder)
    if (folder / CHECKPOINT_FILE).exists() and not (folder / "config.json").exists():
        flags = ("--init_from=resume", f"--out_dir={shown_path(folder)}")
        command = shell_command("python", "train.py", *flags)
        raise FolioError(
            f"{folder}: no weights have been saved yet; if this run is not being trained: {command}"
        )
    saved_config, tensors = read_config(folder), read_weights(folder)
    # transformers' GPT-2 always has biases: Folio saves zeros if a model has none. If transformers
    # has trained them, they are needed. (A changed model.py may have a bias in one layer only.)
    if has_trained_biases(tensors) and not is_changed(folder):
        saved_config = dataclasses.replace(saved_config, bias=True)
    config = dataclasses.replace(saved_config, **overrides)
    for name in ("n_layer", "n_head", "n_embd", "bias"):
        saved, given = getattr(saved_config, name), getattr(config, name)
        if given != saved:
            raise ValueError(f"{name}={given}: the weights in {folder} have {name}={saved}")
    check_sizes(folder, saved_config, config.vocab_size, config.block_size)
    state_dict = to_state_dict(tensors, saved_config, folder)
    try:
        model = model_with_weights(config, resize_embeddings(state_dict, saved_config, config))
    except ValueError as error:
        sizes = f"block_size={saved_config.block_size}, pad_vocab_to={saved_config.pad_vocab_to}"
        raise FolioError(f"{folder}: the weights do not fit ({error}); use {sizes}") from None
    if not all(parameter.isfinite().all() for parameter in model.parameters()):
        raise FolioError(
            f"{folder}: the weights contain NaN or infinity; train again with lower learning rates"
        )
    check_change(folder, model)
    names = ("block_size", "vocab_size", "pad_vocab_to")
    has_saved_sizes = all(getattr(config, n) == getattr(saved_config, n) for n in names)
    if is_changed(folder) and has_saved_sizes:
        warn_of_another_change(folder, model)
    return model


def warn_of_another_change(folder: Path, model: GPT) -> None:
    """Print a warning if model.py was changed again since the model in `folder` was saved."""
    saved, loss = weights_metadata(folder).get("fixed_ids_loss"), fixed_ids_loss(model)
    # 0.1%: more than rounding. NaN (the loss cannot be computed): False.
    if saved is not None and abs(loss - saved) > 0.001 * max(saved, 1):
        warning = (
            f"WARNING  {shown_path(folder)} was saved with another model.py: its loss on fixed "
            f"token ids was {saved:.4f}, and with this model.py it is {loss:.4f}"
        )
        print(wrap(warning, indent=9), file=sys.stderr)


def to_state_dict(
    tensors: dict[str, torch.Tensor], config: GPTConfig, folder: Path
) -> dict[str, torch.Tensor]:
    """The tensors that save_model(), or another program, has saved in `folder` -> a state_dict.

    Raises FolioError if they do not fit model.py.
    """
    if read_json(folder / "config.json").get("layout") != OWN_LAYOUT:
        return from_hf_state_dict(tensors, config, folder)
    state_dict = with_one_dtype(tensors)
    if problems := list(compare_tensors(state_dict, meta_model(config))):
        problem = join_names(problems, max_names=3)
        raise FolioError(f"{shown_path(folder)}: {MAKE_THE_CHANGE_AGAIN} ({problem})")
    return state_dict


def resize_embeddings(
    state_dict: dict[str, torch.Tensor], saved: GPTConfig, config: GPTConfig
) -> dict[str, torch.Tensor]:
    """The weights of a model of other sizes: without the last positions and unused tokens, and
    with rows of zeros as padding. (Other embeddings, of a changed model.py, stay as they are.)
    """
    positions, rows = "transformer.wpe.weight", "transformer.wte.weight"
    resized = dict(state_dict)
    if config.block_size < saved.block_size and positions in resized:
        resized[positions] = resized[positions][: config.block_size]
    if config.padded_vocab_size != saved.padded_vocab_size and rows in resized:
        n_padding = config.padded_vocab_size - config.vocab_size
        embeddings = resized[rows][: config.vocab_size]
        resized[rows] = torch.nn.functional.pad(embeddings, (0, 0, 0, n_padding))
    return resized


def model_with_weights(config: GPTConfig, state_dict: dict[str, torch.Tensor]) -> GPT:
    """A model of the sizes in `config`, in eval mode, with these weights.

    ValueError if a shape does not fit: a changed model.py may have parameters whose shapes depend
    on block_size or pad_vocab_to.
    """
    dtype = next(tensor.dtype for tensor in state_dict.values() if tensor.is_floating_point())
    model = cast_weights(uninitialized_model(config), dtype).eval()
    # A buffer of a changed model.py, such as a mask, may have another size: the model has its own.
    own, buffers = model.state_dict(), dict(model.named_buffers())
    for name in buffers.keys() & state_dict.keys():
        if own[name].shape != state_dict[name].shape:
            del state_dict[name]
    if problems := list(compare_tensors(state_dict, model)):
        raise ValueError(join_names(problems, max_names=3))
    # assign=True takes the loaded tensors without a copy. But if a changed model.py has two names
    # for one tensor, they would become two tensors: then the numbers are copied. strict=False: the
    # names have been compared.
    has_aliases = own.keys() != stored_tensors(model).keys()
    model.load_state_dict(state_dict, strict=False, assign=not has_aliases)
    return model


def is_changed(folder: str | Path) -> bool:
    """Whether the model in `folder` was saved with a changed model.py."""
    return read_json(Path(folder) / "config.json").get("model_type") == CHANGED_MODEL_TYPE


def check_change(folder: str | Path, model: GPT) -> None:
    """Raise FolioError if the model in `folder` was trained with a changed model.py, but this
    model is a GPT-2.
    """
    # In the saved sizes, too: with a shorter block_size, the change may have no effect.
    if is_changed(folder) and is_gpt2(model) and model_py_is_gpt2(read_config(folder)):
        raise FolioError(f"{shown_path(folder)}: {MAKE_THE_CHANGE_AGAIN}")


def check_saving(model: GPT) -> None:
    """For a changed model.py: raise FolioError unless weights can be saved and loaded again.

    So the user learns of the problem before the training. model: from random_model().
    """
    print("model.py has been changed: checking that its weights can be saved", flush=True)
    config = model.config
    copy_model(model)  # a changed model is copied to generate text
    sums = [parameter.sum().item() for parameter in model.parameters()]
    idx = torch.zeros(1, config.block_size, dtype=torch.long)
    with contextlib.suppress(Exception), torch.no_grad():  # for example, the model needs a GPU
        model.train()(idx, idx)  # it may change a counter, which has to be saved, too
    model.eval()
    losses = [fixed_ids_loss(model), fixed_ids_loss(model)]
    if sums != [parameter.sum().item() for parameter in model.parameters()]:
        raise FolioError(
            "model.py: the forward pass changes parameters, so resuming would not be exact; "
            "compute the changed numbers where they are used, and do not store them"
        )
    try:
        with tempfile.TemporaryDirectory() as folder:
            save_model(model, folder)
            state_dict = to_state_dict(read_weights(folder), read_config(folder), Path(folder))
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)  # random_model() takes seed 0: with seed 1, constants differ
            losses.append(fixed_ids_loss(model_with_weights(config, state_dict)))
    except Exception as error:  # safetensors, for example, refuses some types of numbers
        raise FolioError(
            "model.py: the weights of this model cannot be saved and loaded again "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    # If a loss is NaN, or if each forward pass draws random numbers, the losses prove nothing.
    if losses[0] == losses[1] and abs(losses[0] - losses[2]) > 1e-5 * max(losses[0], 1):
        raise FolioError(
            "model.py: a saved and loaded model computes another loss; register random constants, "
            "and numbers that training changes, as buffers (self.register_buffer): buffers are "
            "saved with the weights"
        )


def check_sizes(folder: str | Path, saved: GPTConfig, vocab_size: int, block_size: int) -> None:
    """Raise FolioError if the model in `folder` cannot have these sizes."""
    if block_size > saved.block_size:
        raise FolioError(
            f"block_size={block_size} exceeds that of the model in {folder}: {saved.block_size}"
        )
    if not 0 <= saved.vocab_size - vocab_size <= MAX_UNUSED_ROWS:
        raise FolioError(
            f"{folder}: the tokenizer has {vocab_size:,} tokens, the model embeddings for "
            f"{saved.vocab_size:,}; they do not belong together"
        )


def load_model_and_tokenizer(folder: str | Path) -> tuple[GPT, Tokenizer]:
    """Load both from one folder; FolioError if they do not belong together."""

    def read() -> tuple[GPT, Tokenizer]:
        tokenizer = load_tokenizer(folder)
        return load_model(folder, vocab_size=tokenizer.vocab_size), tokenizer

    return read_folder(user_path(folder), read)


def padding_token(tokens: ShardedTokens) -> int | None:
    """The rarest token of a dataset; None if all are frequent.

    transformers fills up a batch of unequal texts with a padding token, and leaves this token out
    of all text that it decodes. A vocabulary of characters has none to spare, so a character that
    is rarer than 1 in 10,000 does the least damage. Without one, transformers pads no batch.
    """
    counts = np.zeros(tokens.vocab_size, np.int64)
    for shard in tokens.shards:
        for start in range(0, len(shard), 2**20):
            ids = shard[start : start + 2**20]
            tokens.check_ids(ids)
            counts += np.bincount(ids, minlength=tokens.vocab_size)
    rarest = int(counts.argmin())
    return rarest if counts[rarest] * 10_000 <= len(tokens) else None


def save_model_card(
    folder: str | Path,
    config: TrainConfig,
    dataset_meta: dict[str, Any],
    *,
    step: int,
    tokens: int,
    val_loss: float,
    bits_per_byte: float,
    n_val_tokens: int = 0,
) -> None:
    """Write README.md: where the model in this folder comes from, and how to load it.

    tokens: on which the model was trained. n_val_tokens: of the dataset; 0 if unknown.
    A README.md that a person has written or changed is renamed to README.md.1, ...
    """
    folder = Path(folder)
    n_train = dataset_meta.get("train_tokens")
    source = str(dataset_meta.get("source", "")).replace("\n", " ")
    source = source.encode(errors="replace").decode()  # a file name may not be UTF-8
    data = f"`{config.dataset}`" + (f", from {source}" if source else "")
    data += f", {n_train:,} training tokens" if isinstance(n_train, int) else ""
    is_finetuned = config.init_from not in ("scratch", "resume")
    start = f", finetuned from `{config.init_from}`" if is_finetuned else ""
    optimizer = f"AdamW (learning rate {config.learning_rate:g})"
    if config.optimizer == "muon":
        optimizer = f"Muon (learning rate {config.muon_learning_rate:g}) and {optimizer}"
    changed = is_changed(folder)
    card = (MODEL_CARD + (WITH_THE_CHANGE if changed else WITH_TRANSFORMERS)).format(
        kind="A GPT with a changed model.py" if changed else "A GPT-2",
        tag="folio" if changed else "gpt2, folio",
        library="folio" if changed else "transformers",
        name=folder.name, folder=shown_path(folder), data=data, step=step, tokens=tokens,
        val_loss=val_loss, bits_per_byte=bits_per_byte, c=config, start=start,
        measured=measured_on(config.eval_tokens, n_val_tokens), optimizer=optimizer,
        total=max(config.max_iters, step),
    )  # fmt: skip
    path = folder / "README.md"
    if path.exists():
        with explain_os_error(path, "cannot be read"):
            old = path.read_bytes().decode(errors="replace")
        if old != with_checksum(old.rpartition(CHECKSUM_NOTE)[0]):
            kept = rename_to_backup(path).name
            print_or_discard(
                f"{path}: was changed, or is of an earlier version of Folio; kept as {kept}"
            )
    write_text(path, with_checksum(card))


CHECKSUM_NOTE = "\n<!-- Folio replaces this file unless it was changed. SHA-256 of the text above: "


def with_checksum(card: str) -> str:
    """The model card with a last line, which a web page does not show."""
    return f"{card}{CHECKSUM_NOTE}{hashlib.sha256(card.encode()).hexdigest()} -->\n"


def measured_on(eval_tokens: int, n_val_tokens: int) -> str:
    """(2000, 35000) -> ' on the first 2,000 validation tokens'; '' if all have been used."""
    is_limited = 0 < eval_tokens < n_val_tokens
    return f" on the first {eval_tokens:,} validation tokens" if is_limited else ""


MODEL_CARD = """\
---
library_name: {library}
pipeline_tag: text-generation
tags: [{tag}]
---

# {name}

{kind}, trained with Folio.

| | |
|---|---|
| data | {data} |
| model | {c.n_layer} layers, {c.n_head} heads, {c.n_embd} channels, \
context of {c.block_size} tokens |
| training | {step:,} of {total:,} steps, {tokens:,} tokens, {optimizer}{start} |
| validation loss | {val_loss:.4f} nats per token, {bits_per_byte:.3f} bits per byte{measured} |

Every setting is in `settings.json`, the training log in `log.csv`.

## How to load it

With Folio, in its own folder:

```python
from engine.checkpoint import load_model_and_tokenizer

model, tokenizer = load_model_and_tokenizer("{folder}")
```
"""
WITH_TRANSFORMERS = """
With transformers:

```python
from transformers import pipeline

generate = pipeline("text-generation", model="{folder}")
```
"""
WITH_THE_CHANGE = """
This needs the changed model.py with which the model was trained. Folio's own model.py computes
other logits.
"""


# --- Resuming ---


def save_checkpoint(folder: str | Path, state: dict[str, Any]) -> None:
    """Write resume.pt. state: state_dicts, numbers and strings in dicts and lists.

    Raises FolioError if it cannot be written.
    """
    with atomic_write(Path(folder) / CHECKPOINT_FILE) as temporary, open(temporary, "wb") as file:
        try:
            torch.save(state, file)  # given a path, its error does not say that the disk is full
        except RuntimeError as error:
            # The RuntimeError hides an OSError of `file`. All other errors, such as CUDA's, keep
            # their traceback.
            cause = error.__context__
            if "inline_container" in str(error) and isinstance(cause, OSError):
                raise cause from None
            raise


def load_checkpoint(folder: str | Path, verify: bool = True) -> dict[str, Any]:
    """What save_checkpoint() wrote, on the CPU. Nothing in the file is executed.

    verify: compare the checksums of the file, which reads all of it.
    Raises FolioError if there is no checkpoint, or if it is damaged.
    """
    path = find_checkpoint(folder)
    try:
        return load_torch_file(path, verify=verify)
    except FolioError as error:
        raise FolioError(f"{error}; {advice_without_checkpoint(path)}") from None


def find_checkpoint(folder: str | Path) -> Path:
    """The path of resume.pt. Raises FolioError, with the way to go on, if there is none."""
    path = Path(folder) / CHECKPOINT_FILE
    if path.exists():
        return path
    refuse_nanogpt_checkpoint(path.parent)
    raise FolioError(f"{path}: no checkpoint to resume from; {advice_without_checkpoint(path)}")


def advice_without_checkpoint(path: Path) -> str:
    folder = path.parent
    pattern = f"{glob.escape(folder.name)}.[0-9]*/{CHECKPOINT_FILE}"
    if moved := sorted(folder.parent.glob(pattern), key=lambda found: found.stat().st_mtime):
        where = shown_path(moved[-1].parent)
        flags = shell_command("--init_from=resume", f"--out_dir={where}")
        return f"an earlier run was moved to {where}; to continue it: {flags}"
    if (folder / WEIGHTS_FILE).exists():
        where = shown_path(folder)
        flags = shell_command(f"--init_from={where}", f"--out_dir={where}-2")
        return f"to continue from the best weights: {flags}"
    if (folder / SETTINGS_FILE).exists():
        return "it stopped before its first checkpoint; --init_from=scratch starts it again"
    checkpoints = list(folder.parent.glob(f"*/{CHECKPOINT_FILE}"))
    checkpoints.sort(key=lambda found: found.stat().st_mtime, reverse=True)  # the newest first
    if beside := [found.parent.name for found in checkpoints]:
        similar = difflib.get_close_matches(folder.name, beside, n=1) or beside
        flags = [shell_command(f"--out_dir={shown_path(folder.with_name(n))}") for n in similar]
        return f"name the run: {join_names(flags, max_names=3)}"
    return "--init_from=scratch starts a new run"
