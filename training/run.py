"""A run: all that the loop works with, how it begins, and how it is put down and taken up again.

    run = begin(TrainConfig, given, world)    # fresh, from trained weights, or where a run stood
    move_in(run)                              # its folder is ready
    save_resume(run.folder, snapshot(run))    # from which a later begin() goes on

`cls`, where it is an argument, is the dataclass of train.py's settings, and `given` those of them
that files and flags name.
"""

import dataclasses
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from configurator import FolioError, as_json, configure, read_settings
from data.dataset import DATA, Dataset, open_dataset
from data.files import write_text
from data.shakespeare import DATASETS, prepare_shakespeare
from data.tokenizer import BPETokenizer, load_tokenizer
from model import GPT, GPTConfig
from training.checkpoint import (
    RESUME, SETTINGS, begun_by, load_model, load_resume, make_room, model_folder, read_config,
    run_folder, save_tokenizer,
)  # fmt: skip
from training.kernels import attend_as_suits
from training.machine import advice_when_out_of_memory
from training.optimizer import Both, make_optimizer
from training.world import World, is_restarted, job_name


@dataclass
class Run:
    """All that the loop works with; what stands from `step` on changes in it."""

    config: Any  # train.py's settings
    folder: Path
    dataset: Dataset
    world: World
    model: GPT
    runner: torch.nn.Module  # what runs the model in this world: compiled, or the model itself
    optimizer: torch.optim.Optimizer | Both
    scaler: torch.amp.GradScaler
    step: int = 0  # updates made
    evaluated_at: int = -1  # the step of the latest evaluation
    best_val_loss: float = math.inf
    tokens: int = 0  # read in training
    seconds: float = 0.0  # spent on training


def begin(cls: type, given: dict[str, Any], world: World) -> Run:
    """A model with its optimizer: fresh, from a folder of weights, or where a run stood."""
    # Of several nodes only the one that lost a process may know that this is a restart.
    restarted = bool(world.greatest(int(is_restarted())))
    config = world.decide(lambda: check_shares(plan(cls, given, restarted), world.size))
    with advice_when_out_of_memory(ADVICE):
        run = world.after_main(lambda: assemble(config, world))
        world.greatest(0)  # all are here: from now on nobody keeps the others waiting for long
        run.runner = world.runner_for(run.model)
        if not config.eval_only:
            world.rehearse(run.runner, config.batch_size, config.block_size)
    return run


ADVICE = (
    "half the --batch_size with twice the --gradient_accumulation_steps (as many tokens per step), "
    "or a smaller --block_size or model"
)

# --- What to begin from ---


def plan(cls: type, given: dict[str, Any], restarted: bool) -> Any:
    """All settings, `init_from` being decided: scratch, resume, or a trained model's folder."""
    folder = run_folder(given.get("out_dir", cls.out_dir))
    source = given.get("init_from", cls.init_from)
    # A job that was started before goes on with what it has, whatever it was told to begin from.
    same_job = restarted and begun_by(folder) == job_name()
    goes_on = same_job and was_begun_with(cls, folder, given, source)
    if (source == "auto" or goes_on) and (folder / RESUME).exists():
        source = "resume"
    elif source == "auto":
        source = "scratch"
    if source == "scratch":
        config = cls(**given)
    elif source == "resume":
        config = plan_to_resume(cls, folder, given)
    else:
        config = plan_to_finetune(cls, model_folder(source), given)
    return dataclasses.replace(config, init_from=source)


def was_begun_with(cls: type, folder: Path, given: dict[str, Any], source: str) -> bool:
    """Whether the run there has these settings: one job may make several, one after another."""
    if not (folder / SETTINGS).exists():
        return False
    before = read_settings(folder / SETTINGS)
    wanted = {field.name: field.default for field in dataclasses.fields(cls)} | given
    # What was not given then came from the weights it began with.
    unknown = set() if source == "scratch" else set(OF_WEIGHTS) - given.keys()
    names = wanted.keys() - unknown - {"init_from"}
    return all(before.get(name) == wanted[name] for name in names)


SHAPE = ("n_layer", "n_head", "n_embd", "bias")  # of the model, whatever it was begun from
OF_WEIGHTS = (*SHAPE, "block_size", "dropout")  # what a folder of weights says by itself
# What resuming must leave as it was, for the weights to fit and the losses to be comparable.
FIXED = (*SHAPE, "block_size", "pad_vocab_to", "optimizer", "dataset")


def plan_to_resume(cls: type, folder: Path, given: dict[str, Any]) -> Any:
    """The settings the run was begun with, then those that are given; what changes is told."""
    if not (folder / RESUME).exists():
        raise FolioError(f"{folder}: there is no run to resume; --init_from=scratch begins one")
    before = read_settings(folder / SETTINGS)
    for name, new in given.items():
        old = before.get(name, new)
        if new == old or name in ("init_from", "out_dir", "eval_only"):
            continue
        if name in FIXED:
            raise FolioError(
                f"--{name}={new}: this run has {name}={old}, which resuming cannot change; "
                "--init_from=scratch begins anew"
            )
        print(f"resuming with {name} = {new}, until now {old}")
    here = {"out_dir": given.get("out_dir", cls.out_dir)}  # wherever it was begun
    return configure(cls, [], base=before | given | here)


def plan_to_finetune(cls: type, folder: Path, given: dict[str, Any]) -> Any:
    """The architecture of the weights in `folder`, and the settings that are given."""
    found = read_config(folder)
    for name in SHAPE:
        asked, there = given.get(name, getattr(found, name)), getattr(found, name)
        if asked != there:
            raise FolioError(f"{name}={asked} does not fit {folder}, which has {there}")
    return cls(**{name: getattr(found, name) for name in OF_WEIGHTS} | given)


def check_shares(config: Any, processes: int) -> Any:
    """The same; FolioError if its micro-batches cannot be shared equally by the processes."""
    wanted = config.gradient_accumulation_steps
    if wanted % processes == 0 or config.eval_only:
        return config
    below, above = wanted // processes * processes, -(-wanted // processes) * processes
    fitting = " or ".join(str(value) for value in (below, above) if value)
    raise FolioError(
        f"gradient_accumulation_steps={wanted} cannot be shared equally by {processes} processes; "
        f"try {fitting}"
    )


# --- Putting it together ---


def assemble(config: Any, world: World) -> Run:
    """Dataset, model and optimizer, as they are at the start or were at the latest checkpoint."""
    world.settle(config.device, config.dtype, config.compile)
    dataset, folder = find_dataset(config), run_folder(config.out_dir)
    torch.manual_seed(config.seed)
    adapt = {name: getattr(config, name) for name in ("block_size", "dropout", "pad_vocab_to")}
    if config.init_from in ("scratch", "resume"):
        shape = {name: getattr(config, name) for name in SHAPE}
        model = GPT(GPTConfig(vocab_size=dataset.tokenizer.vocab_size, **shape, **adapt))
        owner = folder
    else:
        owner = model_folder(config.init_from)
        model = load_model(owner, **adapt)
        config = dataclasses.replace(config, bias=model.config.bias)
    if config.init_from != "scratch" and (
        load_tokenizer(owner) != dataset.tokenizer
        or model.config.vocab_size != dataset.tokenizer.vocab_size
    ):
        raise FolioError(
            f"--dataset={config.dataset}: its tokenizer is not the one the model in {owner} reads"
        )
    model.to(world.device, world.weights_dtype)
    attend_as_suits(model, world.device, world.dtype)
    optimizer, scaler = make_optimizer(model, config, world.dtype), world.scaler()
    run = Run(config, folder, dataset, world, model, model, optimizer, scaler)
    if config.init_from == "resume":
        restore(run, load_resume(folder))
    return run


def find_dataset(config: Any) -> Dataset:
    """The dataset, checked; Shakespeare is prepared if he is not there yet."""
    if config.dataset in DATASETS and not (DATA / config.dataset).exists():
        prepare_shakespeare(DATASETS[config.dataset], config.dataset)
    tokenizer = BPETokenizer.gpt2() if config.tokenizer == "gpt2" else None
    return open_dataset(config.dataset, config.block_size, tokenizer)


def move_in(run: Run) -> None:
    """Make the run's folder ready, and write into it what is known from the start."""
    make_room(run.folder, run.config.init_from == "resume", job_name())
    write_text(run.folder / SETTINGS, as_json(run.config))
    save_tokenizer(run.dataset.tokenizer, run.folder)


# --- Down and up again ---

PROGRESS = ("step", "evaluated_at", "best_val_loss", "tokens", "seconds")


def snapshot(run: Run) -> dict:
    """All that continuing needs, in plain containers."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "data": identity(run.dataset),
        "eval_tokens": run.config.eval_tokens,
        **{name: getattr(run, name) for name in PROGRESS},
    }


def restore(run: Run, saved: dict) -> None:
    """Put the run where snapshot() found it; learning rates stay those of the settings."""
    before, now = saved.get("data"), identity(run.dataset)
    if before != now:
        raise FolioError(
            f"--dataset={run.config.dataset}: not the text with which {run.folder} was begun "
            f"(SHA-256, tokens to train on, held out: {before}, now {now}); put that back "
            "(shards that came later can be moved away), or --init_from=scratch begins anew"
        )
    try:
        run.model.load_state_dict(saved["model"])
        groups = [dict(group) for group in run.optimizer.param_groups]
        run.optimizer.load_state_dict(saved["optimizer"])
        for group, wanted in zip(run.optimizer.param_groups, groups, strict=True):
            group.update({key: value for key, value in wanted.items() if key != "params"})
        if saved["scaler"]:  # empty where the precision needed none
            run.scaler.load_state_dict(saved["scaler"])
        for name in PROGRESS:
            setattr(run, name, saved[name])
        if saved["eval_tokens"] != run.config.eval_tokens:
            run.best_val_loss = math.inf  # of other windows: nothing to compare with
    except (KeyError, RuntimeError, ValueError, TypeError) as error:
        reason = str(error).partition("\n")[0]
        raise FolioError(f"{run.folder / RESUME}: does not fit this run ({reason})") from None


def identity(dataset: Dataset) -> list:
    """What tells a dataset from another: its text's SHA-256, where known, and its sizes."""
    return [dataset.meta.get("sha256"), len(dataset.train), len(dataset.val)]
