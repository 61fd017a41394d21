"""Train a GPT: read a stream of integers, learn to predict each from those before it.

    python train.py config/shakespeare_char.py                  # two minutes on two CPU cores
    python train.py config/shakespeare_char.py --max_iters=500  # flags win over files
    python train.py config/shakespeare_char.py --init_from=resume
    python train.py --help                                      # every setting

The run's folder (config.json, model.safetensors, tokenizer.json, log.csv, loss.png, ...) opens in
sample.py and in transformers alike; resume.pt in it is what an interrupted run goes on from.
"""

import contextlib
import dataclasses
import math
import sys
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import torch

from configurator import (
    Count, FolioError, Fraction, NonNegative, Range, SettingsError, Whole, as_json, configure,
    given_settings, read_settings, run_main,
)  # fmt: skip
from data.dataset import (
    DATA, IGNORED, Dataset, evaluation_batches, open_dataset, prefetch, seed_for, training_batch,
)  # fmt: skip
from data.shakespeare import DATASETS, prepare_shakespeare
from data.tokenizer import BPETokenizer, load_tokenizer
from model import GPT, GPTConfig
from training.checkpoint import (
    RESUME, SETTINGS, begun_by, load_model, load_resume, locked, make_room, model_folder,
    read_config, run_folder, save_model, save_resume, save_tokenizer, write_text,
)  # fmt: skip
from training.optimizer import Both, make_optimizer, set_learning_rate
from training.report import (
    Report, Stopwatch, Update, banner, summary, tokens_per_second_at_peak,
)  # fmt: skip
from training.world import (
    Device, Precision, StopSignal, Switch, World, advice_when_out_of_memory, is_restarted, job_name,
)  # fmt: skip


@dataclass
class TrainConfig:
    # --- The run ---
    out_dir: str = "out/gpt"  # the run's folder; a relative path starts at Folio's own folder
    init_from: str = "scratch"  # scratch; resume; auto: resume if possible; gpt2...; or a folder
    max_iters: Whole = 2000  # updates of the weights
    eval_interval: Count = 250  # steps between evaluations; each one saves a checkpoint
    eval_tokens: Whole = 0  # tokens an evaluation predicts, in whole windows; 0 means all
    eval_only: bool = False  # evaluate the model init_from names, then leave; writes nothing
    keep_every: Whole = 0  # steps between copies of the weights in step_* folders; 0 keeps none
    log_interval: Count = 10  # steps between rows of log.csv
    sample_tokens: Whole = 160  # tokens of text to show after each evaluation
    seed: Whole = 1337  # of the first weights, the batches and dropout

    # --- Data ---
    dataset: str = "shakespeare_char"  # a folder under data/
    tokenizer: Literal["own", "gpt2"] = "own"  # the dataset's own; gpt2 for nanoGPT's .bin files
    batch_size: Count = 12  # sequences per forward pass, on each process
    block_size: Count = 64  # tokens of context, T
    gradient_accumulation_steps: Count = 1  # forward passes per update, of the whole job

    # --- Model ---
    n_layer: Count = 4  # blocks: rounds of communication and computation
    n_head: Count = 4  # attention heads per block
    n_embd: Count = 128  # numbers that make up a node, C; a multiple of n_head
    dropout: Fraction = 0.0  # share of activations zeroed while training
    bias: bool = False  # biases in linear layers and layer norms, as GPT-2 has
    pad_vocab_to: Count = 1  # pad the embedding, in memory, to a multiple of this many rows

    # --- Optimizer ---
    optimizer: Literal["muon", "adamw"] = "muon"  # of the blocks' matrices; AdamW has the rest
    learning_rate: NonNegative = 5e-3  # AdamW's, at its peak
    muon_learning_rate: NonNegative = 0.02  # Muon's, at its peak
    warmup_iters: Whole = 100  # steps over which the learning rate climbs from zero
    weight_decay: NonNegative = 0.1  # pull of matrices towards zero, per unit of learning rate
    beta1: Annotated[float, Range(0, 0.9999)] = 0.9  # memory of the mean gradient
    beta2: Annotated[float, Range(0, 0.999999)] = 0.99  # memory of the mean squared gradient
    grad_clip: NonNegative = 1.0  # greatest norm of the gradient; 0 does not clip

    # --- Machine ---
    device: Device = "auto"  # where to compute; auto takes the fastest there is
    dtype: Precision = "auto"  # of matrix products; auto is bfloat16 where the device has it
    compile: Switch = "auto"  # fuse operations with torch.compile; auto does on CUDA

    instead: ClassVar = {  # nanoGPT's settings that have no counterpart, and what Folio does
        "lr_decay_iters": "the learning rate falls to zero at max_iters",
        "min_lr": "the learning rate falls to zero at max_iters",
        "decay_lr": "the learning rate always warms up, then falls to zero at max_iters",
        "eval_iters": "evaluation covers fixed windows; --eval_tokens limits them",
        "always_save_checkpoint": "resume.pt is always the latest, model.safetensors the best",
        "backend": "NCCL serves CUDA, gloo the CPU",
        "wandb_log": "log.csv and loss.png are in the run's folder",
        "wandb_project": "log.csv and loss.png are in the run's folder",
        "wandb_run_name": "log.csv and loss.png are in the run's folder",
    }

    def __post_init__(self):
        if self.n_embd % self.n_head:
            raise SettingsError(
                f"n_embd={self.n_embd} cannot be shared equally by n_head={self.n_head} heads; "
                f"try --n_embd={math.ceil(self.n_embd / self.n_head) * self.n_head}"
            )

    @property
    def tokens_per_step(self) -> int:
        return self.gradient_accumulation_steps * self.batch_size * self.block_size


@dataclass
class Training:
    """All that the loop works with; what stands from `step` on changes in it."""

    config: TrainConfig
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


# --- The story ---


def main() -> None:
    with World() as world, contextlib.ExitStack() as stack:
        given = world.decide(lambda: given_settings(TrainConfig))
        if given.get("eval_only", TrainConfig.eval_only):
            evaluate_only(begin(given, world))
            return
        folder = run_folder(given.get("out_dir", TrainConfig.out_dir))
        # Before anything is read: another job may be about to save there.
        world.decide(lambda: stack.enter_context(locked(folder)))
        run = begin(given, world)
        world.decide(lambda: move_in(run))
        stop = stack.enter_context(StopSignal())
        train(run, stop)
        sys.exit(stop.status)


def train(run: Training, stop: StopSignal) -> None:
    """From the step the run stands at to max_iters updates, or until somebody wishes to stop."""
    config, world = run.config, run.world
    batches = training_batches(run)
    with (
        Report(
            run.folder, run.step, config.max_iters, run.tokens, run.seconds,
            silent=not world.is_main, limit=tokens_per_second_at_peak(run),
        ) as report,
        advice_when_out_of_memory(ADVICE),
    ):  # fmt: skip
        report.say(banner(run))
        while True:
            if is_evaluation_due(run):
                evaluate_and_save(run, report)
            if run.step >= config.max_iters or stop.wished(world):
                break
            with Stopwatch() as watch:
                latest = update(run, batches)
            run.step += 1
            run.tokens += config.tokens_per_step
            run.seconds += watch.seconds
            report.updated(run.step, run.tokens, run.seconds, latest)
            if run.step % config.log_interval == 0 and not is_evaluation_due(run):
                report.log()
            if config.keep_every and run.step % config.keep_every == 0:
                save_copy(run)
        if run.evaluated_at != run.step:  # stopped between two evaluations
            save_progress(run)
        report.draw_curve()
        report.say(summary(run))


ADVICE = (
    "half the --batch_size with twice the --gradient_accumulation_steps (as many tokens per step), "
    "or a smaller --block_size or model"
)


def is_evaluation_due(run: Training) -> bool:
    """Before the first update, every eval_interval, and after the last; once at each step."""
    at_interval = run.step % run.config.eval_interval == 0
    return (at_interval or run.step >= run.config.max_iters) and run.evaluated_at != run.step


def update(run: Training, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Update:
    """Forward, backward, and one step of the optimizer against the gradient of the loss."""
    config, world = run.config, run.world
    share = learning_rate_share(run.step, config)
    set_learning_rate(run.optimizer, share)
    loss = 0.0
    accumulation = config.gradient_accumulation_steps
    for micro_batch in world.share(range(accumulation)):
        inputs, targets = next(batches)  # (B, T) each
        # Processes exchange gradients once, at the last of their micro-batches.
        world.hold_back(run.runner, micro_batch + world.size < accumulation)
        # Dropout then depends on nothing but these three, and needs no saved state.
        torch.manual_seed(seed_for(config.seed, run.step, micro_batch))
        with world.autocast():
            _, batch_loss = run.runner(inputs, targets)
        part = batch_loss / accumulation  # of the mean over all micro-batches, of all processes
        run.scaler.scale(part * world.size).backward()  # they average where we want the sum
        loss = loss + part.detach()
    run.scaler.unscale_(run.optimizer)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.model.parameters(), config.grad_clip or math.inf)
    loss, grad_norm = torch.stack((world.total(loss), grad_norm)).tolist()
    stop_if_not_finite(loss, grad_norm, run)
    run.scaler.step(run.optimizer)
    run.scaler.update()
    run.optimizer.zero_grad(set_to_none=True)
    return Update(loss, grad_norm, share * config.learning_rate)


def learning_rate_share(step: int, config: TrainConfig) -> float:
    """The share of the peak at which update number `step` is made: up to 1, then down to 0.

    max_iters=10, warmup_iters=2: 1/2, 1, 1, 7/8, 6/8, ..., 1/8
    """
    climb = (step + 1) / max(config.warmup_iters, 1)
    descent = (config.max_iters - step) / max(config.max_iters - config.warmup_iters, 1)
    return min(climb, 1.0, descent)


@torch.no_grad()
def evaluate(run: Training) -> tuple[float, float]:
    """How well the validation data (or its first eval_tokens) are predicted.

    Returns the mean loss in nats per token, and the bits per byte of the text these tokens stand
    for: the measure by which models with different vocabularies can be compared.
    """
    config, world = run.config, run.world
    run.model.eval()
    byte_lengths = torch.from_numpy(run.dataset.tokenizer.byte_lengths)
    sums = torch.zeros(3, dtype=torch.float64)  # of losses; of tokens; of their bytes
    batches = evaluation_batches(
        run.dataset.val, config.batch_size, config.block_size, config.eval_tokens
    )
    for inputs, targets in world.share(batches):
        asked = targets[targets != IGNORED]
        with world.autocast():
            _, loss = run.runner(*world.send(inputs, targets))
        length = byte_lengths[asked].sum()
        sums += torch.tensor([loss.item() * len(asked), len(asked), length], dtype=torch.float64)
    run.model.train()
    nats, tokens, bytes_of_text = world.total(sums).tolist()
    return nats / tokens, nats / math.log(2) / max(bytes_of_text, 1)


def evaluate_and_save(run: Training, report: Report) -> None:
    """Evaluate; keep the weights if they are the best so far, and what resuming needs; tell."""
    val_loss, bits_per_byte = evaluate(run)
    run.evaluated_at = run.step
    best = val_loss < run.best_val_loss
    if best:  # and a loss that is not a number never is
        run.best_val_loss = val_loss
    if not run.world.is_main:
        return
    if best:
        save_model(run.model, run.folder, run.dataset.tokenizer.end_of_text)
    report.log(val_loss, bits_per_byte)
    # Last, for it says that all this has been done: a kill before it has it done again.
    save_progress(run)
    report.refresh_curve()
    verdict = "the best so far" if best else f"the best was {run.best_val_loss:.4f}"
    measured = f"validation loss {val_loss:.4f} ({bits_per_byte:.3f} bits per byte)"
    report.say(f"\nstep {run.step:,}: {measured}, {verdict}\n{sample(run)}")


def save_progress(run: Training) -> None:
    if run.world.is_main:
        save_resume(run.folder, snapshot(run))


def save_copy(run: Training) -> None:
    """A folder step_000500 in the run's, to sample from later: --out_dir=out/.../step_000500."""
    if not run.world.is_main:
        return
    folder = run.folder / f"step_{run.step:06}"
    save_model(run.model, folder, run.dataset.tokenizer.end_of_text)
    save_tokenizer(run.dataset.tokenizer, folder)


# --- Before the first step ---


def plan(given: dict[str, Any], restarted: bool) -> TrainConfig:
    """All settings, `init_from` being decided: scratch, resume, or a trained model's folder."""
    folder = run_folder(given.get("out_dir", TrainConfig.out_dir))
    source = given.get("init_from", TrainConfig.init_from)
    # A job that was started before goes on with what it has, whatever it was told to begin from.
    goes_on = restarted and begun_by(folder) == job_name()
    if (source == "auto" or goes_on) and (folder / RESUME).exists():
        source = "resume"
    elif source == "auto":
        source = "scratch"
    if source == "scratch":
        config = TrainConfig(**given)
    elif source == "resume":
        config = plan_to_resume(folder, given)
    else:
        config = plan_to_finetune(model_folder(source), given)
    return dataclasses.replace(config, init_from=source)


SHAPE = ("n_layer", "n_head", "n_embd", "bias")  # of the model, whatever it was begun from
# What resuming must leave as it was, for the weights to fit and the losses to be comparable.
FIXED = (*SHAPE, "block_size", "pad_vocab_to", "optimizer", "dataset")


def plan_to_resume(folder: Path, given: dict[str, Any]) -> TrainConfig:
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
    here = {"out_dir": given.get("out_dir", TrainConfig.out_dir)}  # wherever it was begun
    return configure(TrainConfig, [], base=before | given | here)


def plan_to_finetune(folder: Path, given: dict[str, Any]) -> TrainConfig:
    """The architecture of the weights in `folder`, and the settings that are given."""
    found = read_config(folder)
    for name in SHAPE:
        asked, there = given.get(name, getattr(found, name)), getattr(found, name)
        if asked != there:
            raise FolioError(f"{name}={asked} does not fit {folder}, which has {there}")
    names = (*SHAPE, "block_size", "dropout")
    return TrainConfig(**{name: getattr(found, name) for name in names} | given)


def find_dataset(config: TrainConfig) -> Dataset:
    """The dataset, checked; Shakespeare is prepared if he is not there yet."""
    if config.dataset in DATASETS and not (DATA / config.dataset).exists():
        prepare_shakespeare(DATASETS[config.dataset], config.dataset)
    tokenizer = BPETokenizer.gpt2() if config.tokenizer == "gpt2" else None
    return open_dataset(config.dataset, config.block_size, tokenizer)


def begin(given: dict[str, Any], world: World) -> Training:
    """A model with its optimizer: fresh, from a folder of weights, or where a run stood."""
    # Of several nodes only the one that lost a process may know that this is a restart.
    restarted = bool(world.greatest(int(is_restarted())))
    config = world.decide(lambda: check_shares(plan(given, restarted), world.size))
    with advice_when_out_of_memory(ADVICE):
        run = world.after_main(lambda: assemble(config, world))
        run.runner = world.runner_for(run.model)
    return run


def check_shares(config: TrainConfig, processes: int) -> TrainConfig:
    """The same; FolioError if its micro-batches cannot be shared equally by the processes."""
    wanted = config.gradient_accumulation_steps
    if wanted % processes == 0:
        return config
    below, above = wanted // processes * processes, -(-wanted // processes) * processes
    fitting = " or ".join(str(value) for value in (below, above) if value)
    raise FolioError(
        f"gradient_accumulation_steps={wanted} cannot be shared equally by {processes} processes; "
        f"try {fitting}"
    )


def assemble(config: TrainConfig, world: World) -> Training:
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
    optimizer, scaler = make_optimizer(model, config, world.dtype), world.scaler()
    run = Training(config, folder, dataset, world, model, model, optimizer, scaler)
    if config.init_from == "resume":
        restore(run, load_resume(folder))
    return run


def move_in(run: Training) -> None:
    """Make the run's folder ready, and write into it what is known from the start."""
    make_room(run.folder, run.config.init_from == "resume", job_name())
    write_text(run.folder / SETTINGS, as_json(run.config))
    save_tokenizer(run.dataset.tokenizer, run.folder)


PROGRESS = ("step", "evaluated_at", "best_val_loss", "tokens", "seconds")


def snapshot(run: Training) -> dict:
    """All that continuing needs, in plain containers."""
    return {
        "model": run.model.state_dict(),
        "optimizer": run.optimizer.state_dict(),
        "scaler": run.scaler.state_dict(),
        "data": identity(run.dataset),
        "eval_tokens": run.config.eval_tokens,
        **{name: getattr(run, name) for name in PROGRESS},
    }


def identity(dataset: Dataset) -> list:
    """What tells a dataset from what it was before: its text, where that is known, and sizes."""
    return [dataset.meta.get("sha256"), len(dataset.train), len(dataset.val)]


def restore(run: Training, saved: dict) -> None:
    """Put the run where snapshot() found it; learning rates stay those of the settings."""
    if saved.get("data") != identity(run.dataset):
        raise FolioError(
            f"--dataset={run.config.dataset}: holds another text than when {run.folder} was begun; "
            "--init_from=scratch begins anew"
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


def training_batches(run: Training) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """This process's micro-batches on its device, the next one fetched while one is in use."""
    config, stream = run.config, run.dataset.train
    accumulation = config.gradient_accumulation_steps
    keys = (
        (step, micro_batch)
        for step in range(run.step, config.max_iters)
        for micro_batch in run.world.share(range(accumulation))
    )

    def fetch(key):
        batch = training_batch(stream, config.batch_size, config.block_size, config.seed, *key)
        return run.world.send(*batch)

    return prefetch(fetch, keys)


# --- When something is wrong ---


def stop_if_not_finite(loss: float, grad_norm: float, run: Training) -> None:
    """Leave before a loss or gradient that is no number touches the weights."""
    # In float16 a gradient may overflow: the scaler then skips the update and scales by less.
    # It gives up where no scale is small enough.
    scaler = run.scaler
    hopeful = math.isfinite(grad_norm) or (scaler.is_enabled() and scaler.get_scale() > 1e-3)
    if math.isfinite(loss) and hopeful:
        return
    run.world.decide(lambda: complain(loss, grad_norm, run))


def complain(loss: float, grad_norm: float, run: Training) -> None:
    raise FolioError(
        f"step {run.step}: the loss is {loss} and the gradient's norm {grad_norm}; stopped before "
        f"the weights were changed. The last checkpoint in {run.folder} is as it was. "
        "Try a smaller --learning_rate"
    )


# --- A glimpse of the model ---


def sample(run: Training) -> str:
    """A few lines of the model's own, indented; '' if none are asked for."""
    if run.config.sample_tokens == 0:
        return ""
    tokenizer = run.dataset.tokenizer
    start = torch.tensor([[tokenizer.opening]], device=run.world.device)
    with run.world.autocast():
        drawn = run.model.generate(
            start,
            run.config.sample_tokens,
            temperature=0.8,
            generator=run.world.generator(run.config.seed),
        )
        text = "".join(tokenizer.decode_stream(ids.item() for ids in drawn))
    run.model.train()
    return textwrap.indent(text.strip(), "    ")


def evaluate_only(run: Training) -> None:
    """Print the validation loss of the model as it is."""
    where = {"scratch": "untrained", "resume": f"step {run.step:,} of {run.folder}"}
    what = where.get(run.config.init_from, run.config.init_from)
    say = print if run.world.is_main else lambda text: None
    say(banner(run))
    with advice_when_out_of_memory(ADVICE):
        val_loss, bits_per_byte = evaluate(run)
    say(f"validation loss {val_loss:.4f} ({bits_per_byte:.3f} bits per byte), {what}")


if __name__ == "__main__":
    run_main(main)
