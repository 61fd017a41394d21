"""How a run starts (from scratch, from the weights of a model, or resumed), and what it saves.

config = resolve_config(overrides)                # which settings, and where to start from
dataset = load_dataset(config)
check_init_from(config, dataset)                  # do the weights to start from fit the data?
model_config = make_model_config(config, dataset, device)
check_model_py(model_config, dataset)             # was model.py changed in a way that loses work?
move_old_run_aside(folder)                        # unless the run is resumed
model = build_model(config, model_config, device) # new weights, or weights of a model
state = resume(config, model, optimizer, ...)     # if resuming: continue where it stopped
start_run_folder(folder, config, dataset)         # settings.json and the tokenizer
save_best(...), save_run(...), save_snapshot(...) # the best weights, resume.pt, step_*
"""

import contextlib
import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from configurator import (
    FolioError, configure, first_line, format_value, print_or_discard, to_json, wrap,
)  # fmt: skip
from data.dataset import Dataset, known_start_id, open_dataset
from data.files import (
    backup_path, explain_os_error, fsync_file, join_names, shown_path, write_text,
)  # fmt: skip
from data.shakespeare import DATASETS, ensure_shakespeare
from data.tokenizer import BPETokenizer, CharTokenizer, load_tokenizer, save_tokenizer
from engine.changed_model import (
    check_layers_are_found, check_on_text, eval_mode, is_gpt2, random_model, uses_all_parameters,
)  # fmt: skip
from engine.checkpoint import (
    CHECKPOINT_FILE, WEIGHTS_FILE, check_change, check_saving, check_sizes, is_changed,
    load_checkpoint, load_model, padding_token, save_checkpoint, save_model, save_model_card,
)  # fmt: skip
from engine.device import ComputeDevice
from engine.distributed import Distributed, map_tensors
from engine.hf_format import (
    cast_weights, compare_tensors, find_weights, has_trained_biases, loadable_state_dict,
    read_config, read_weights, uninitialized_model,
)  # fmt: skip
from engine.log_file import LOG_FILE
from engine.optimizer import Optimizer
from engine.run_folder import (
    SETTINGS_FILE, describe_run, make_folder, move_old_run_aside, read_run_settings,
    remove_temporary_files, resolve_model_dir, resolve_out_dir, was_evaluated_on,
    weights_metadata,
)  # fmt: skip
from engine.train_config import TrainConfig
from model import GPT, GPTConfig

OUT_OF_MEMORY_HINT = (
    "halve --batch_size and double --gradient_accumulation_steps (the same number of tokens per "
    "step), or use --activation_checkpointing, or reduce --block_size or the model"
)


@dataclass
class TrainState:
    """How far a run is: what resuming restores beside weights and optimizer."""

    init_from: str = "scratch"  # or the model whose weights the run started from
    step: int = 0  # optimizer steps done
    tokens: int = 0  # tokens trained on
    seconds: float = 0.0  # time spent on training steps
    best_val_loss: float = math.inf  # nats per token
    best_step: int = -1  # the step of best_val_loss
    evaluations_since_best: int = 0  # without a better loss
    last_eval_step: int = -1  # the step of the latest evaluation
    last_checkpoint_step: int = -1  # the step of the latest checkpoint
    unlogged_losses: float = 0.0  # sum of training losses since the last row of log.csv
    unlogged_steps: int = 0  # steps since that row
    fixed_batch_loss: float = math.nan  # at the latest checkpoint: see train.py


def is_patience_exhausted(state: TrainState, config: TrainConfig) -> bool:
    """At an evaluation: whether the last `patience` ones have not improved the best loss."""
    is_evaluated = state.last_eval_step == state.step
    # With patience 0 the answer is always False: 0 < 0.
    return is_evaluated and 0 < config.patience <= state.evaluations_since_best


# --- Settings ---

ARCHITECTURE = ("n_layer", "n_head", "n_embd", "bias")  # settings that the weights determine
FROM_MODEL = (*ARCHITECTURE, "block_size")  # taken from a model that is finetuned
# If one of these changed, the weights or the optimizer's state would not fit, or losses could not
# be compared.
FIXED_ON_RESUME = (*ARCHITECTURE, "block_size", "pad_vocab_to", "optimizer", "eval_tokens")
SET_AT_EACH_START = ("init_from", "out_dir", "eval_only")  # no settings of the run itself


def resolve_config(
    overrides: dict[str, Any], restarted: bool = False, world_size: int = 1
) -> TrainConfig:
    """All settings of a run; `init_from` becomes "scratch", "resume", or the name of a model.

    overrides: the settings given in config files and flags.
    restarted: torchrun or SLURM has started this job before, so it continues if it can.
    Raises FolioError for settings that do not fit the run to resume, the model to finetune, or
    the number of processes.
    """
    folder = resolve_out_dir(overrides.get("out_dir", TrainConfig.out_dir))
    source = overrides.get("init_from", TrainConfig.init_from)
    restarted = restarted and not overrides.get("eval_only")
    if (folder / CHECKPOINT_FILE).exists() and (source == "auto" or restarted):
        if source == "auto" or is_run_from(folder, source):
            if restarted:
                print(f"this job was restarted: it continues the run in {shown_path(folder)}")
            source = "resume"
    elif source == "auto":
        if not overrides.get("eval_only"):
            print(f"no checkpoint in {shown_path(folder)}: training starts from scratch")
        source = "scratch"
    if source == "scratch":
        refuse_untrained_evaluation(folder, overrides)
        config = TrainConfig(**overrides)
    elif source == "resume":
        config = resume_config(folder, overrides)
    else:
        source_folder = resolve_model_dir(source)
        is_inside = folder in (source_folder, *source_folder.parents)
        if is_inside and not overrides.get("eval_only"):
            raise FolioError(
                f"--init_from={source}: this model is in the run folder itself; give the new run "
                "another --out_dir"
            )
        config = finetune_config(source_folder, overrides)
    check_divisible(config, world_size)
    if 0 < config.max_iters <= config.warmup_iters and not config.eval_only:
        print(
            f"WARNING  max_iters={config.max_iters} does not exceed warmup_iters="
            f"{config.warmup_iters}:\n         the learning rate only rises; lower --warmup_iters"
        )
    return dataclasses.replace(config, init_from=source)


def refuse_untrained_evaluation(folder: Path, overrides: dict[str, Any]) -> None:
    """FolioError for --eval_only without init_from if the folder holds a run."""
    is_unclear = overrides.get("eval_only") and "init_from" not in overrides
    if is_unclear and any((folder / name).exists() for name in (WEIGHTS_FILE, CHECKPOINT_FILE)):
        raise FolioError(
            f"--eval_only: which weights? --init_from={shown_path(folder)} evaluates the best ones "
            "of this run, --init_from=resume the latest ones, --init_from=scratch new ones"
        )


def resume_config(folder: Path, overrides: dict[str, Any]) -> TrainConfig:
    """The saved settings of a run, with the given changes, which are printed."""
    saved = saved_settings(folder)
    for name, new in overrides.items():
        old = saved.get(name, new)
        if new == old or name in SET_AT_EACH_START:
            continue
        if name in FIXED_ON_RESUME and not (name == "eval_tokens" and overrides.get("eval_only")):
            raise FolioError(
                f"--{name}={new}: resuming cannot change {name}, which is {old} in {folder}; "
                "use --init_from=scratch for a new run"
            )
        print(f"resuming with {name} = {new} (was {old})")
    moved = {"out_dir": overrides.get("out_dir", TrainConfig.out_dir)}  # the folder may have moved
    # []: no flags, because they are in overrides already. The saved settings are validated here.
    return configure(TrainConfig, [], defaults=saved | overrides | moved)


def is_run_from(folder: Path, source: str) -> bool:
    """Whether the run in `folder` may be that of a restarted job with --init_from=source.

    A job with the wrong tokenizer, for example, ends with an error. torchrun then restarts it. If
    the job finetunes gpt2, but the run in the folder has started from scratch, then the job has not
    made this run. A job from scratch has not made a run that finetunes a model either.
    """
    if source == "resume":
        return True
    return saved_settings(folder).get("init_from") == source


def saved_settings(folder: Path) -> dict[str, Any]:
    """The settings with which the state in resume.pt was trained.

    resume.pt holds the state and its settings in one file. So the settings belong to the state,
    even if a process was killed while it saved. settings.json is a copy for readers. If somebody
    has edited settings.json, or if writing it has failed, the differences are printed.
    """
    saved = load_checkpoint(folder, verify=False).get("settings")  # resume() verifies
    if not isinstance(saved, dict):
        path = folder / CHECKPOINT_FILE
        raise FolioError(f"{path}: damaged (its settings are {format_value(saved)})")
    shown = read_run_settings(folder) or {}
    for name, value in saved.items():
        if shown.get(name, value) != value and name not in SET_AT_EACH_START:
            print(
                f"{SETTINGS_FILE} has {name} = {shown[name]}, but {CHECKPOINT_FILE} {value}, which "
                "is used (flags change settings)"
            )
    return saved


def finetune_config(folder: Path, overrides: dict[str, Any]) -> TrainConfig:
    """The settings for finetuning the model in `folder`: the architecture comes from the model."""
    model_config = read_config(folder)
    # transformers trains biases that Folio has saved as 0: see load_model().
    without_biases = not model_config.bias and not is_changed(folder)
    if without_biases and has_trained_biases(read_weights(folder)):
        model_config = dataclasses.replace(model_config, bias=True)
    if (description := describe_run(folder)) != shown_path(folder):  # it is a run
        print(wrap(f"starting from {description}"))
    fixed = (*ARCHITECTURE, "pad_vocab_to") if is_changed(folder) else ARCHITECTURE
    actual = {name: getattr(model_config, name) for name in (*fixed, "block_size")}
    wrong = [name for name in fixed if overrides.get(name, actual[name]) != actual[name]]
    if overrides.get("block_size", 0) > actual["block_size"]:  # a shorter context is possible
        wrong.append("block_size")
    if wrong:
        given = ", ".join(f"{name}={overrides[name]}" for name in wrong)
        fix = " ".join(f"--{name}={actual[name]}" for name in wrong)
        raise FolioError(f"{given}: the model in {shown_path(folder)} has other sizes; use {fix}")
    config = TrainConfig(**actual | overrides)
    if config.optimizer == "muon" and not config.eval_only:
        # A learning rate that is too large destroys what the model has learned. A user who sets
        # only learning_rate may not know that Muon has a learning rate of its own.
        print(
            f"learning rates: {config.muon_learning_rate:g} (Muon: the matrices of the blocks), "
            f"{config.learning_rate:g} (AdamW)"
        )
    return config


def check_divisible(config: TrainConfig, world_size: int) -> None:
    """FolioError unless every process gets the same number of micro-batches."""
    steps = config.gradient_accumulation_steps
    if config.eval_only or steps % world_size == 0:
        return
    below, above = steps // world_size * world_size, math.ceil(steps / world_size) * world_size
    fitting = " or ".join(str(value) for value in (below, above) if value)
    raise FolioError(
        f"gradient_accumulation_steps={steps} must be divisible by the number of processes, "
        f"{world_size}; try --gradient_accumulation_steps={fitting}"
    )


# --- Dataset and model ---


def load_dataset(config: TrainConfig) -> Dataset:
    """The dataset of a run; Shakespeare is prepared first if it is not there."""
    if config.dataset in DATASETS:
        ensure_shakespeare(config.dataset)
    tokenizer = BPETokenizer.gpt2() if config.tokenizer == "gpt2" else None
    dataset = open_dataset(config.dataset, config.block_size, tokenizer)
    dataset.tokenizer.known_start_id = None  # this run decides: see check_init_from()
    return dataset


def check_init_from(config: TrainConfig, dataset: Dataset) -> int | None:
    """Raise FolioError if the model to start from cannot be trained with these settings and data.

    Returns the token that begins a text without a prompt, if that is not end-of-text
    (Tokenizer.known_start_id). If the run starts from a model, this is the token of the model.

    This comes before an older run is moved aside: a run that cannot start moves nothing. Whether
    the weights themselves are damaged is known when they are loaded.
    """
    if config.init_from == "scratch":
        return known_start_id(dataset)
    resumed = config.init_from == "resume"
    folder = resolve_out_dir(config.out_dir) if resumed else resolve_model_dir(config.init_from)
    if resumed and not (folder / "tokenizer.json").exists():
        # Only resume.pt was copied: resume() compares the datasets.
        is_finetuned = saved_settings(folder).get("init_from") != "scratch"
        return None if is_finetuned else known_start_id(dataset)
    source_tokenizer = load_tokenizer(folder)
    if not resumed:
        check_sizes(folder, read_config(folder), source_tokenizer.vocab_size, config.block_size)
        find_weights(folder)
    if source_tokenizer != dataset.tokenizer and resumed:
        trained_on = load_checkpoint(folder, verify=False).get("dataset")
        raise FolioError(wrong_dataset_message(config, dataset, trained_on))
    if source_tokenizer != dataset.tokenizer:
        model = shown_path(folder)
        reason = f"its tokenizer is not the tokenizer of the model in {model}; "
        advice = f"prepare the text with --tokenizer={model}, or use --init_from=scratch"
        trained_on = (read_run_settings(folder) or {}).get("dataset", config.dataset)
        if trained_on != config.dataset:
            advice = f"its dataset was --dataset={trained_on}; or {advice}"
        raise FolioError(f"--dataset={config.dataset}: {reason}{advice}")
    source = None if resumed or config.eval_only else read_run_settings(folder)
    names = ("dataset", "seed", "block_size")  # these determine the windows of a step
    is_same = source and all(source.get(name) == getattr(config, name) for name in names)
    # The dataset may have been prepared again, from another text: its validation tokens show this.
    if is_same and was_evaluated_on(folder, dataset):
        print(
            "This run draws the batches on which the weights were trained.\n"
            "--seed=NUMBER draws other batches."
        )
    return source_tokenizer.known_start_id


def wrong_dataset_message(
    config: TrainConfig, dataset: Dataset, trained_on: list[Any] | None
) -> str:
    """The error message for a run that cannot be resumed, because its dataset was another one.

    trained_on: fingerprint() of the dataset on which the run was trained.
    """
    folder = resolve_out_dir(config.out_dir)
    # data/NAME.1, data/NAME.2, ... are older datasets of this name.
    for number in range(int(backup_path(dataset.folder).suffix[1:]) - 1, 0, -1):
        old = f"{config.dataset}.{number}"
        with contextlib.suppress(FolioError):
            if fingerprint(open_dataset(old, config.block_size)) == trained_on:
                return f"{config.dataset} has been prepared again; continue on --dataset={old}"
    name, run = (read_run_settings(folder) or {}).get("dataset"), shown_path(folder)
    if name not in (None, config.dataset):
        return (
            f"--dataset={config.dataset}: {run} was trained on {name}, and a run continues on its "
            f"own dataset; to train its weights on {config.dataset}, use --init_from={run} with "
            f"another --out_dir, on a dataset that was prepared with --tokenizer={run}"
        )
    return (
        f"--dataset={config.dataset}: the dataset has changed since {run} was started; prepare the "
        "old text again (or move shards away that were added), or use --init_from=scratch"
    )


def make_model_config(config: TrainConfig, dataset: Dataset, device: ComputeDevice) -> GPTConfig:
    """The sizes of the model that is trained."""
    names = (*FROM_MODEL, "dropout", "pad_vocab_to", "activation_checkpointing")
    return GPTConfig(
        vocab_size=dataset.tokenizer.vocab_size,
        float32_attention=device.use_float32_attention(config.block_size),
        **{name: getattr(config, name) for name in names},
    )


def check_model_py(model_config: GPTConfig, dataset: Dataset) -> None:
    """Raise FolioError if model.py was changed so that a model could not be used after training.

    Such a model cannot be trained, saved, loaded or copied, or the programs would take it for a
    GPT-2. random_model() shows this before an older run is moved, and before hours of training.
    """
    model = random_model(model_config)
    check_layers_are_found(model)
    idx, output = torch.zeros(1, 1, dtype=torch.long), None
    with torch.no_grad(), contextlib.suppress(Exception):  # one token may be too short
        output = model(idx, idx)
    if isinstance(output, tuple):
        raise FolioError(
            "model.py: model(idx, targets) returns a tuple; let it return the loss alone, and "
            "model(idx) the logits alone"
        )
    if is_gpt2(model):
        check_on_text(model_config, dataset.train)
    else:
        check_saving(model)


def build_model(
    config: TrainConfig,
    model_config: GPTConfig,
    device: ComputeDevice,
    dist: Distributed | None = None,
) -> GPT:
    """The model on its device: with new weights, or with the weights of the model to finetune.

    Only the main process makes or reads weights; wrap_model() sends them to the other processes,
    whose parameters are uninitialized until then. When resuming, resume() loads the saved weights.
    dist: None means one process.
    """
    dist = dist or Distributed()

    def make_model() -> GPT:
        if config.init_from == "resume" or not dist.is_main:
            return uninitialized_model(model_config, device.torch_device)
        if config.init_from == "scratch":
            torch.manual_seed(config.seed)
            return GPT(model_config)  # on the CPU: so the weights do not depend on the device
        return load_model(resolve_model_dir(config.init_from), **dataclasses.asdict(model_config))

    model = dist.main_process_first(make_model)
    return cast_weights(model, device.param_dtype).to(device.torch_device).train()


def wrap_model(
    model: GPT, config: TrainConfig, device: ComputeDevice, dist: Distributed
) -> torch.nn.Module:
    """The model, compiled if the device uses torch.compile, with gradients averaged over processes.

    All processes receive the weights of the main process (DistributedDataParallel sends them).
    """
    wrapped = torch.compile(model) if device.compile else model
    if dist.world_size == 1:
        return wrapped
    with eval_mode(model):
        all_used = dist.run_on_main(uses_all_parameters, model)
    wrapped = dist.wrap_ddp(wrapped, device.torch_device, find_unused_parameters=not all_used)
    shape = (config.batch_size, config.block_size)

    def dummy_loss() -> torch.Tensor:
        inputs = torch.zeros(shape, dtype=torch.long, device=device.torch_device)
        with device.autocast():
            # A clone: for one tensor given twice, torch.compile would compile another program.
            return wrapped(inputs, inputs.clone())

    if not config.eval_only:
        dist.warm_up_ddp(wrapped, dummy_loss)
    return wrapped


def start_run_folder(folder: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Create the run folder; save settings and tokenizer.

    If the folder and its lock were deleted while another process trained here, that process makes
    the folder again (see save_run()). Then its run is moved aside.
    When resuming, changed settings are saved with the first checkpoint: until then, nothing has
    been trained with them.
    """
    if config.init_from != "resume":
        move_old_run_aside(folder)
    make_folder(folder)
    if not (folder / SETTINGS_FILE).exists():
        write_text(folder / SETTINGS_FILE, to_json(config))
    remove_temporary_files(folder)
    # A user may have added a chat template to tokenizer_config.json of a run that is resumed.
    files = (folder / "tokenizer.json", folder / "tokenizer_config.json")
    if not all(path.exists() for path in files):
        save_run_tokenizer(folder, config, dataset)


def save_run_tokenizer(folder: Path, config: TrainConfig, dataset: Dataset) -> None:
    """Save the dataset's tokenizer in a run folder."""
    tokenizer, settings = dataset.tokenizer, {"model_max_length": config.block_size}
    if isinstance(tokenizer, CharTokenizer) and tokenizer.eos_token_id is None:
        token = padding_token(dataset.train)
        if token is not None:
            settings["pad_token"] = tokenizer.decode([token])
    save_tokenizer(tokenizer, folder, **settings)


# --- Weights and checkpoints ---


def save_best(
    folder: Path,
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    bits_per_byte: float,
) -> None:
    """Save the weights that have the best validation loss so far, and the model card."""
    numbers = {"step": state.best_step, "val_loss": state.best_val_loss}
    checksum = dataset.val.checksum()
    with eval_mode(model):
        save_model(model, folder, dataset.tokenizer, val_checksum=checksum, **numbers)
    numbers |= {"bits_per_byte": bits_per_byte, "n_val_tokens": len(dataset.val)}
    numbers["tokens"] = state.tokens
    config = dataclasses.replace(config, init_from=state.init_from)  # not "resume"
    save_model_card(folder, config, dataset.meta, **numbers)


def save_snapshot(
    run_folder: Path, name: str, state: TrainState, dataset: Dataset, model: GPT
) -> None:
    """Save the weights as they are now in the folder `name` inside the run folder, with a copy of
    the tokenizer, to sample from: --out_dir=out/.../step_000500. name "": in the run folder itself.
    """
    with eval_mode(model):
        save_model(model, run_folder / name, dataset.tokenizer, step=state.step)
    if name:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            with explain_os_error(run_folder / file, "cannot be read"):
                write_text(run_folder / name / file, (run_folder / file).read_text("utf-8"))


def save_run(
    folder: Path,
    config: TrainConfig,
    state: TrainState,
    model: GPT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    dataset: Dataset,
) -> None:
    """Write resume.pt: all that saved_settings() and restore() need. Then write settings.json."""
    config = dataclasses.replace(config, init_from=state.init_from)  # not "resume"
    if not (folder / SETTINGS_FILE).exists():
        warning = (
            "was moved or deleted, with the best weights; the run continues in a new folder there"
        )
        with tqdm.external_write_mode():  # above the progress bar
            print_or_discard(wrap(f"WARNING  {folder} {warning}", indent=9))
        make_folder(folder)
        write_text(folder / SETTINGS_FILE, to_json(config))
        save_run_tokenizer(folder, config, dataset)
    parts = {
        "model": loadable_state_dict(model),
        "optimizer": optimizer.state_dict(),
        "scaler": scaler.state_dict(),
        "train_state": dataclasses.asdict(state),
        "dataset": fingerprint(dataset),
        "settings": dataclasses.asdict(config),
    }
    with contextlib.suppress(OSError):  # the log is not needed to continue
        fsync_file(folder / LOG_FILE)  # first: its rows up to this step must not be lost
    save_checkpoint(folder, parts)
    write_text(folder / SETTINGS_FILE, to_json(config))


def resume(
    config: TrainConfig,
    model: GPT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    dataset: Dataset,
    device: ComputeDevice,
    dist: Distributed,
) -> TrainState:
    """Continue from resume.pt in the run folder, as restore() describes.

    Only the main process reads the file. It sends the state of optimizer and scaler to the other
    processes; wrap_model() sends the weights.
    """
    folder = resolve_out_dir(config.out_dir)

    def restore_state() -> TrainState:
        state = restore(load_checkpoint(folder), config, model, optimizer, scaler, dataset)
        check_change(folder, model)
        if not config.eval_only:  # eval_only evaluates the weights of resume.pt
            adopt_best_weights(folder, state)
        return state

    state = dist.run_on_main(restore_state)
    parts = (optimizer, scaler)
    states = [part.state_dict() for part in parts] if dist.is_main else None
    states = dist.broadcast_tensors(states, device.torch_device)
    if not dist.is_main:
        for part, state_dict in zip(parts, states, strict=True):
            part.load_state_dict(state_dict)
    return state


def restore(
    saved: dict[str, Any],
    config: TrainConfig,
    model: GPT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    dataset: Dataset,
) -> TrainState:
    """Load a checkpoint into model, optimizer and scaler; return the state of the run.

    Learning rates and weight decay come from the settings, which may have changed.
    Raises FolioError if the dataset or the checkpoint is not that of this run.
    """
    folder, device = resolve_out_dir(config.out_dir), next(model.parameters()).device
    try:
        if saved["dataset"] != fingerprint(dataset):
            raise FolioError(wrong_dataset_message(config, dataset, saved["dataset"]))
        if problems := list(compare_tensors(saved["model"], model)):
            raise ValueError(join_names(problems, max_names=3))
        model.load_state_dict(saved["model"], strict=False)
        current_groups = [dict(group) for group in optimizer.param_groups]
        # Copies: `saved` is memory-mapped, and Windows cannot replace a file that is mapped.
        copies = map_tensors(saved["optimizer"], lambda tensor: tensor.to(device, copy=True))
        optimizer.load_state_dict(copies)
        check_optimizer_state(optimizer)
        # load_state_dict() brings back the old learning rates and weight decay: undo this.
        for group, current in zip(optimizer.param_groups, current_groups, strict=True):
            group.update({key: value for key, value in current.items() if key != "params"})
        if saved["scaler"]:  # empty unless the run was saved in float16
            scaler.load_state_dict(saved["scaler"])
        known = {field.name for field in dataclasses.fields(TrainState)}
        fields = {name: value for name, value in saved["train_state"].items() if name in known}
        state = TrainState(**fields)  # other versions of Folio may have other fields
        for field in dataclasses.fields(state):
            value = getattr(state, field.name)
            if type(value) is not type(field.default) or (field.name == "step" and value < 0):
                raise TypeError(f"{field.name} is {format_value(value)}")
        return state
    except (LookupError, RuntimeError, ValueError, TypeError, AttributeError) as error:
        reason = first_line(error)
        raise FolioError(
            f"{folder / CHECKPOINT_FILE}: does not fit this run ({reason}); to start from its "
            f"weights instead: --init_from={folder} and another --out_dir"
        ) from None


def adopt_best_weights(folder: Path, state: TrainState) -> None:
    """Let the state describe the best weights that are in the run folder.

    If the run was killed between saving these weights and its checkpoint, they are newer than the
    checkpoint. Raises FolioError if another program has replaced them: then their loss is unknown.
    """
    saved = weights_metadata(folder)
    if {"step", "val_loss"} <= saved.keys():
        state.best_step, state.best_val_loss = saved["step"], saved["val_loss"]
    elif (folder / WEIGHTS_FILE).exists() and "step" not in saved:
        raise FolioError(
            f"{folder / WEIGHTS_FILE}: another program has replaced the best weights of this run; "
            "move this file away"
        )
    else:  # no weights, or weights that were saved when training stopped, and not evaluated
        state.best_step, state.best_val_loss = -1, math.inf


def check_optimizer_state(optimizer: Optimizer) -> None:
    """Raises ValueError if a running mean does not have the shape of its parameter.

    torch's fused optimizers do not compare: they would read and write beyond the tensor's memory.
    """
    for part in getattr(optimizer, "optimizers", (optimizer,)):
        for parameter, values in part.state.items():
            for name, value in values.items():
                shape = torch.Size([]) if name == "step" else parameter.shape
                if value.shape != shape:
                    raise ValueError(f"{name} is {list(value.shape)} instead of {list(shape)}")


def fingerprint(dataset: Dataset) -> list[Any]:
    """What identifies a dataset: the SHA-256 of its text, if known, its sizes in tokens, and a
    checksum of the first and last tokens of each shard."""
    splits = (dataset.train, dataset.val)
    return [
        dataset.meta.get("sha256"), *map(len, splits), *(split.checksum() for split in splits),
    ]  # fmt: skip
