"""Train a GPT: read a stream of integers, learn to predict each from those before it.

    python train.py config/shakespeare_char.py                  # a minute or two on two CPU cores
    python train.py config/shakespeare_char.py --max_iters=500  # flags win over files
    python train.py config/shakespeare_char.py --init_from=resume
    python train.py --help                                      # every setting

The run's folder (config.json, model.safetensors, tokenizer.json, log.csv, loss.png, ...) opens in
sample.py and in transformers alike; resume.pt in it is what an interrupted run goes on from.
"""

import contextlib
import math
import sys
import textwrap
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from configurator import (
    Count, FolioError, Fraction, NonNegative, Range, SettingsError, Whole, given_settings, run_main,
)  # fmt: skip
from data.dataset import IGNORED, evaluation_batches, prefetch, seed_for, training_batch
from training.checkpoint import locked, run_folder, save_model, save_resume, save_tokenizer
from training.machine import Device, Precision, Switch, advice_when_out_of_memory
from training.optimizer import set_learning_rate
from training.report import Report, Update, banner, summary
from training.run import ADVICE, Run, begin, move_in, snapshot
from training.world import StopSignal, World


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
    batch_size: Count = 12  # sequences in a micro-batch: one pass forward and back
    block_size: Count = 64  # tokens of context, T
    gradient_accumulation_steps: Count = 1  # micro-batches per update, of the whole job

    # --- Model ---
    n_layer: Count = 4  # blocks: rounds of communication and computation
    n_head: Count = 4  # attention heads per block
    n_embd: Count = 128  # channels: the numbers that make up a node, C; a multiple of n_head
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


# --- The story ---


def main() -> None:
    with World() as world, contextlib.ExitStack() as stack:
        given = world.decide(lambda: given_settings(TrainConfig))
        if given.get("eval_only", TrainConfig.eval_only):
            evaluate_only(begin(TrainConfig, given, world))
            return
        folder = run_folder(given.get("out_dir", TrainConfig.out_dir))
        # Before anything is read: another job may be about to save there.
        world.decide(lambda: stack.enter_context(locked(folder)))
        run = begin(TrainConfig, given, world)
        world.decide(lambda: move_in(run))
        stop = stack.enter_context(StopSignal())
        train(run, stop)
        sys.exit(stop.status)


def train(run: Run, stop: StopSignal) -> None:
    """From the step the run stands at to max_iters updates, or until somebody wishes to stop."""
    config, world = run.config, run.world
    batches = training_batches(run)
    with Report(run) as report, advice_when_out_of_memory(ADVICE):
        report.say(banner(run))
        while True:
            if is_evaluation_due(run):
                evaluate_and_save(run, report)
            if run.step >= config.max_iters or stop.wished(world):
                break
            begun = time.perf_counter()
            latest = update(run, batches)
            run.seconds += time.perf_counter() - begun
            run.tokens += config.tokens_per_step
            run.step += 1
            report.updated(latest)
            if run.step % config.log_interval == 0 and not is_evaluation_due(run):
                report.log()
            if config.keep_every and run.step % config.keep_every == 0:
                save_copy(run)
        if run.evaluated_at != run.step and world.is_main:  # stopped between two evaluations
            save_resume(run.folder, snapshot(run))
        report.draw_curve()
        report.say(summary(run))


def is_evaluation_due(run: Run) -> bool:
    """Before the first update, every eval_interval, and after the last; once at each step."""
    at_interval = run.step % run.config.eval_interval == 0
    return (at_interval or run.step >= run.config.max_iters) and run.evaluated_at != run.step


def update(run: Run, batches: Iterator[tuple[torch.Tensor, torch.Tensor]]) -> Update:
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
        if config.dropout:  # which then depends on nothing but these three: no state to save
            torch.manual_seed(seed_for(config.seed, run.step, micro_batch))
        with world.autocast():
            batch_loss = run.runner(inputs, targets)[1]  # the logits need not be kept
        part = batch_loss / accumulation  # of the mean over all micro-batches, of all processes
        run.scaler.scale(part * world.size).backward()  # DDP averages where we want a sum
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
def evaluate(run: Run) -> tuple[float, float]:
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
            loss = run.runner(*world.send(inputs, targets))[1]
        length = byte_lengths[asked].sum()
        sums += torch.tensor([loss.item() * len(asked), len(asked), length], dtype=torch.float64)
    run.model.train()
    nats, tokens, bytes_of_text = world.total(sums).tolist()
    return nats / tokens, nats / math.log(2) / max(bytes_of_text, 1)


def evaluate_and_save(run: Run, report: Report) -> None:
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
    save_resume(run.folder, snapshot(run))
    report.refresh_curve()
    verdict = "the best so far" if best else f"the best was {run.best_val_loss:.4f}"
    measured = f"validation loss {val_loss:.4f} ({bits_per_byte:.3f} bits per byte)"
    report.say(f"\nstep {run.step:,}: {measured}, {verdict}\n{sample(run)}")


def save_copy(run: Run) -> None:
    """A folder step_000500 in the run's, to sample from later: --out_dir=out/.../step_000500."""
    if not run.world.is_main:
        return
    folder = run.folder / f"step_{run.step:06}"
    save_model(run.model, folder, run.dataset.tokenizer.end_of_text)
    save_tokenizer(run.dataset.tokenizer, folder)


def training_batches(run: Run) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
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


def stop_if_not_finite(loss: float, grad_norm: float, run: Run) -> None:
    """Leave before a loss or gradient that is no number touches the weights."""
    # In float16 a gradient may overflow: the scaler then skips the update and scales by less.
    # It gives up where no scale is small enough.
    scaler = run.scaler
    hopeful = math.isfinite(grad_norm) or (scaler.is_enabled() and scaler.get_scale() > 1e-3)
    if math.isfinite(loss) and hopeful:
        return

    def complain():
        raise FolioError(
            f"step {run.step}: the loss is {loss} and the gradient's norm {grad_norm}; stopped "
            "before the weights were changed. The last checkpoint in "
            f"{run.folder} is as it was. Try smaller --learning_rate and --muon_learning_rate"
        )

    run.world.decide(complain)


# --- A glimpse of the model ---


def sample(run: Run) -> str:
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


def evaluate_only(run: Run) -> None:
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
