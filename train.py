"""Train a GPT to predict the next token.

    python train.py config/shakespeare_char.py                  # a minute or two on two CPU cores
    python train.py config/shakespeare_char.py --max_iters=500  # flags override config files
    python train.py config/shakespeare_char.py --init_from=resume
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py
    python train.py --help                                      # every setting

The run folder opens in sample.py and in Hugging Face's transformers. An interrupted run continues
from resume.pt in it.
"""

import contextlib
import itertools
import math
import sys
import time
from collections.abc import Iterator

import data  # noqa: F401 - first: it says what to do if torch is missing
import torch
from tqdm import tqdm

from configurator import FolioError, parse_overrides, run_main, wrap
from data.dataset import IGNORE_INDEX, Dataset, ShardedTokens
from data.dataset import derive_seed, evaluation_batches, prefetch, training_batch
from engine.changed_model import eval_mode
from engine.checkpoint import WEIGHTS_FILE, measured_on
from engine.cpu_threads import ThreadAdapter
from engine.device import ComputeDevice, choose_device, explain_out_of_memory, is_out_of_memory
from engine.distributed import Distributed, is_restarted
from engine.flops import peak_tokens_per_second
from engine.inference import InferenceModel, read_ids
from engine.metrics import MetricsLogger, StepMetrics, show_evaluation, show_progress
from engine.optimizer import Optimizer, make_optimizer, set_lr_multiplier
from engine.report import banner, indented, summary
from engine.run import (
    OUT_OF_MEMORY_HINT, TrainState, build_model, check_init_from, check_model_py, fingerprint,
    is_patience_exhausted, load_dataset, make_model_config, resolve_config, resume, save_best,
    save_run, save_snapshot, start_run_folder, wrap_model,
)  # fmt: skip
from engine.run_folder import lock_run_folder, move_old_run_aside, resolve_out_dir
from engine.trackers import check_trackers
from engine.train_config import TrainConfig
from model import GPT

Batches = Iterator[tuple[torch.Tensor, torch.Tensor]]  # inputs and targets, (B, T) each

# --- The main program ---


def main() -> None:
    # With one process, dist.run_on_main(f, x) and dist.main_process_first(f, x) are f(x).
    # exit_stack: what enters it (the lock, the explanation of errors) ends when this block ends.
    with Distributed() as dist, contextlib.ExitStack() as exit_stack:
        # Settings, and the folder of the run
        overrides = dist.run_on_main(parse_overrides, TrainConfig)
        folder = resolve_out_dir(overrides.get("out_dir", TrainConfig.out_dir))
        if not overrides.get("eval_only"):
            # Lock before reading: another job may write there. The main process enters the lock.
            dist.run_on_main(exit_stack.enter_context, lock_run_folder(folder))
        # torchrun and SLURM restart a job that failed; it then resumes. Only the restarted node
        # sees this in its environment variables.
        restarted = bool(dist.all_reduce_max(int(is_restarted())))
        config = dist.run_on_main(resolve_config, overrides, restarted, dist.world_size)
        dist.run_on_main(check_trackers, config)  # wandb, TensorBoard

        # Device, dataset, model, optimizer
        exit_stack.enter_context(explain_out_of_memory(OUT_OF_MEMORY_HINT))
        device = dist.main_process_first(
            choose_device, config.device, config.dtype, config.compile,
            dist.local_rank, dist.world_size, config.num_threads,
        )  # fmt: skip
        dataset = dist.main_process_first(load_dataset, config)
        # Each node chooses its device, and may have a copy of the dataset on its own disk.
        dist.check_same(
            device=device.torch_device.type, dtype=device.dtype, dataset=fingerprint(dataset)
        )
        # The token that begins a text without a prompt, if that is not end-of-text.
        dataset.tokenizer.known_start_id = dist.run_on_main(check_init_from, config, dataset)
        model_config = make_model_config(config, dataset, device)
        dist.run_on_main(check_model_py, model_config, dataset)  # a reader may have changed it
        if config.init_from != "resume" and not config.eval_only:
            # Before the model is built. If this job fails later and is restarted, it resumes the
            # run in the folder: that must not be an older run.
            dist.run_on_main(move_old_run_aside, folder)
        model = build_model(config, model_config, device, dist)
        optimizer = make_optimizer(model, config, device.dtype, dist)
        scaler = device.grad_scaler()  # keeps small float16 gradients above 0

        # Resume, train
        state = TrainState(init_from=config.init_from)
        if config.init_from == "resume":
            state = resume(config, model, optimizer, scaler, dataset, device, dist)
        if config.eval_only:
            evaluate_only(config, state, dataset, model, device, dist)
        else:
            dist.run_on_main(start_run_folder, folder, config, dataset)
            with dist.shutdown:  # a signal, such as Ctrl-C, ends training after the current step
                train(config, state, dataset, model, optimizer, scaler, device, dist)
        sys.exit(dist.shutdown.exit_status)


def train(
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    device: ComputeDevice,
    dist: Distributed,
) -> None:
    """Train until max_iters, until patience is exhausted, or until a signal asks to stop."""
    folder = resolve_out_dir(config.out_dir)
    wrapped_model = wrap_model(model, config, device, dist)
    batches = prefetch(training_batches(dataset.train, config, state.step, device, dist))
    peak = peak_tokens_per_second(model.config, device, dist.world_size)
    with MetricsLogger(folder, config, state, dist.is_main, peak) as logger:
        threads = ThreadAdapter(device, config.num_threads, dist.world_size, logger.print)
        logger.print(banner(config, state, dataset, model, device, folder))
        is_resumed = config.init_from == "resume"
        if is_resumed and (change := describe_change(state, dataset, model, device)):
            logger.warn_once(change)
        while True:
            evaluation = None  # validation loss and bits per byte, if evaluated at this step
            if is_evaluation_due(state, config):
                evaluation = evaluate(wrapped_model, dataset, config, device, dist, threads)
                record_evaluation(evaluation, config, state, dataset, model, logger)
            # If the run is killed before this checkpoint, the resumed run repeats the evaluation.
            interval = config.checkpoint_interval or config.eval_interval
            # An evaluation changes the state (best_step, last_eval_step), so it has to be saved.
            is_saved = evaluation is None and state.last_checkpoint_step == state.step
            is_finished = state.step >= config.max_iters or is_patience_exhausted(state, config)
            if (is_due(interval, state, config) or is_finished) and not is_saved:
                save_state(config, state, dataset, model, optimizer, scaler, device, logger)
            interval = config.eval_interval * config.sample_interval
            if evaluation and config.sample_tokens and is_due(interval, state, config):
                show_sample(config, dataset, model, device, dist, logger)
            if is_finished or dist.shutdown.should_stop:
                break
            start_time = time.perf_counter()
            metrics = train_step(
                wrapped_model, optimizer, scaler, batches, config, state.step, device, dist
            )
            state.seconds += time.perf_counter() - start_time
            state.step += 1
            state.tokens += config.tokens_per_step
            logger.log_step(metrics)
            threads.after_step()  # fewer threads while other programs need the CPU
            # An evaluation logs a row of its own.
            if state.step % config.log_interval == 0 and not is_evaluation_due(state, config):
                logger.log_row()
            if config.snapshot_interval and state.step % config.snapshot_interval == 0:
                try_to_save_snapshot(f"step_{state.step:06}", state, dataset, model, logger)
        # best_step is -1 if no trained weights were evaluated: then keep the last weights.
        if state.best_step < 0 or not (folder / WEIGHTS_FILE).exists():
            try_to_save_snapshot("", state, dataset, model, logger)
        if state.last_checkpoint_step != state.step:
            save_state(config, state, dataset, model, optimizer, scaler, device, logger)
        logger.plot()
    logger.print(summary(config, state, folder, len(dataset.val)))  # the bar has been removed


def is_due(interval: int, state: TrainState, config: TrainConfig) -> bool:
    """Whether the step is a multiple of `interval`, or the last step."""
    return state.step % interval == 0 or state.step >= config.max_iters


def is_evaluation_due(state: TrainState, config: TrainConfig) -> bool:
    """Whether to evaluate at this step; False if this step has been evaluated already."""
    return is_due(config.eval_interval, state, config) and state.last_eval_step != state.step


# --- The training step ---


def train_step(
    model: torch.nn.Module,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    batches: Batches,
    config: TrainConfig,
    step: int,
    device: ComputeDevice,
    dist: Distributed,
) -> StepMetrics:
    """Update the weights once, with the mean gradient of all micro-batches.

    The four numbered lines are what every training step does. `dist` has an effect with several
    processes, or after a signal such as Ctrl-C; `scaler` in float16 only; and autocast has no
    effect in float32.

    Returns the metrics, equal in all processes. Raises FolioError if the loss or a gradient is NaN
    or infinite; the weights have not changed then. (In float16 an infinite gradient is normal: see
    check_finite().)
    """
    dist.broadcast_buffers(model)  # GPT-2 has none
    lr_multiplier = get_lr_multiplier(step, config)
    set_lr_multiplier(optimizer, lr_multiplier)
    mean_loss = 0.0
    # With 4 processes, process 1 takes micro-batches 1, 5, 9, ..., as in training_batches().
    micro_batches = dist.shard(range(config.gradient_accumulation_steps))
    for micro_batch in micro_batches:
        inputs, targets = next(batches)  # (B, T) each
        # Processes exchange gradients once per step, in the backward pass of the last micro-batch.
        dist.set_grad_sync(model, micro_batch == micro_batches[-1])
        # Dropout depends on these three numbers alone, so that resuming is exact.
        device.manual_seed(derive_seed(config.seed, step, micro_batch))
        with device.autocast():
            loss = model(inputs, targets)  # 1. forward
        # The gradient is the mean over the micro-batches of this process.
        # DistributedDataParallel then takes the mean over the processes.
        scaler.scale(loss / len(micro_batches)).backward()  # 2. backward
        mean_loss = mean_loss + loss.detach() / config.gradient_accumulation_steps
    scaler.unscale_(optimizer)  # float16: back to the true gradient, whose norm is clipped
    max_norm = config.grad_clip or math.inf
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), max_norm)  # 3. clip
    # Loss and signals of all processes, in one all-reduce.
    stop_flag = torch.full_like(mean_loss, dist.shutdown.is_requested())
    mean_loss, n_stopped = dist.all_reduce_sum(torch.stack((mean_loss, stop_flag)))
    # Here the CPU waits for the device (in float16 also in scaler.step()).
    loss, norm, n_stopped = torch.stack((mean_loss, grad_norm, n_stopped)).tolist()
    check_finite(loss, norm, step, config, scaler, dist)
    scaler.step(optimizer)  # 4. step: optimizer.step(), unless a float16 gradient overflowed
    scaler.update()
    # With several processes, each gradient stays in the memory from which DDP sends it.
    optimizer.zero_grad(set_to_none=dist.world_size == 1)
    if n_stopped > 0:  # a process has received a signal: all processes stop
        dist.shutdown.sync()  # and agree on the exit status
    return StepMetrics(loss, norm, lr_multiplier * config.learning_rate)


def get_lr_multiplier(step: int, config: TrainConfig) -> float:
    """The learning rate of a step relative to its peak: linear warmup, then linear decay.

    max_iters=10, warmup_iters=2: 1/2, 1, 1, 7/8, 6/8, ..., 1/8 (the step after the last one would
    have 0 or, with min_lr, min_lr / learning_rate)
    """
    warmup = (step + 1) / max(config.warmup_iters, 1)
    if not config.decay_lr:
        return min(warmup, 1.0)
    decay = (config.max_iters - step) / max(config.max_iters - config.warmup_iters, 1)
    floor = config.min_lr / config.learning_rate if config.min_lr else 0.0
    return min(warmup, 1.0, floor + (1 - floor) * decay)


def check_finite(
    loss: float,
    grad_norm: float,
    step: int,
    config: TrainConfig,
    scaler: torch.amp.GradScaler,
    dist: Distributed,
) -> None:
    """Raise FolioError if a loss or gradient is NaN or infinite.

    train_step() calls this before the optimizer changes the weights. In float16 a gradient may
    overflow: the scaler then skips the step and lowers its scale. If the scale is already tiny,
    lowering it does not help, so this is an error.
    """
    if math.isfinite(loss) and math.isfinite(grad_norm):
        return
    if math.isfinite(loss) and scaler.is_enabled() and scaler.get_scale() > 1e-3:
        return

    if not dist.is_main:
        sys.exit(0)  # all processes stop, and the main process prints the error
    raise FolioError(
        f"step {step}: the loss is {loss} and the gradient norm {grad_norm}; training stopped "
        "before this step changed the weights, and the last checkpoint is unchanged; lower "
        "--learning_rate and --muon_learning_rate, then use --init_from=resume (if this step "
        f"fails again, start from the best weights: --init_from={config.out_dir} "
        "--out_dir=NEW)"
    )


def training_batches(
    tokens: ShardedTokens,
    config: TrainConfig,
    first_step: int,
    device: ComputeDevice,
    dist: Distributed,
) -> Batches:
    """The micro-batches of this process, on its device, from first_step on."""
    for step in range(first_step, config.max_iters):
        for micro_batch in dist.shard(range(config.gradient_accumulation_steps)):
            inputs, targets = training_batch(
                tokens, config.batch_size, config.block_size, config.seed, step, micro_batch
            )
            yield device.to_device(inputs, targets)


# --- Evaluation ---


@torch.no_grad()
def evaluate(
    model: torch.nn.Module,
    dataset: Dataset,
    config: TrainConfig,
    device: ComputeDevice,
    dist: Distributed,
    threads: ThreadAdapter | None = None,
) -> tuple[float, float] | None:
    """Validation loss in nats per token, and in bits per byte; None if a signal interrupts it.

    Covers all validation tokens, or the first eval_tokens. Losses per token cannot be compared
    between vocabularies; bits per byte can: sum of losses / ln 2 / number of bytes of the text.
    """
    model.eval()
    dist.broadcast_buffers(model)  # GPT-2 has none
    byte_lengths = torch.from_numpy(dataset.tokenizer.byte_lengths)
    batch_size = device.eval_batch_size(config.batch_size, config.block_size)
    batches = evaluation_batches(
        dataset.val, batch_size, config.block_size, config.eval_tokens, dist.rank, dist.world_size
    )
    losses, token_counts, n_bytes = [], [], 0  # one loss and one count for each batch
    for inputs, targets in show_evaluation(prefetch(batches), batch_size, dataset, config, dist):
        if dist.shutdown.is_requested():
            break
        valid_targets = targets[targets != IGNORE_INDEX]
        token_counts.append(len(valid_targets))
        n_bytes += int(byte_lengths[valid_targets].sum())
        with device.autocast():
            losses.append(model(*device.to_device(inputs, targets)))
        if threads is not None:
            threads.after_step()
    model.train()
    if dist.shutdown.sync():
        return None
    # Only here does the CPU wait for the device. A loss is a mean: times its tokens, it is a sum.
    batch_losses = torch.stack(losses).tolist() if losses else []
    n_nats = sum(loss * n for loss, n in zip(batch_losses, token_counts, strict=True))
    sums = torch.tensor([n_nats, sum(token_counts), n_bytes], dtype=torch.float64)
    total_nats, total_tokens, total_bytes = dist.all_reduce_sum(sums).tolist()
    return total_nats / total_tokens, total_nats / math.log(2) / max(total_bytes, 1)


def record_evaluation(
    evaluation: tuple[float, float] | None,
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    logger: MetricsLogger,
) -> None:
    """Save the weights if they are the best so far; log and print the losses.

    The weights of step 0 are never the best. So if finetuning only makes the loss worse, the folder
    has the best of the finetuned weights.
    """
    if evaluation is None:  # a signal interrupted it; resuming repeats it
        logger.log_row()
        return
    val_loss, bits_per_byte = evaluation
    state.last_eval_step = state.step
    if state.step > 0 and val_loss < state.best_val_loss:  # NaN < x is False
        state.best_val_loss, state.best_step = val_loss, state.step
    if state.best_step == state.step:
        state.evaluations_since_best = 0
    elif state.step > max(state.best_step, 0):  # resume.pt may be older than the best weights
        state.evaluations_since_best += 1
    if not logger.enabled:
        return
    logger.check_folder()
    if (state.best_step, state.best_val_loss) == (state.step, val_loss):
        # These are the best weights so far. (They may be in the folder already, without a model
        # card: if the run was killed before it wrote the card, it repeats the evaluation. If the
        # loss is another one, because settings have changed, the weights in the folder stay.)
        save_best(logger.folder, config, state, dataset, model, bits_per_byte)
    logger.log_row(val_loss, bits_per_byte)
    logger.print(f"\n{logger.evaluation_line()}")
    logger.maybe_plot()


def evaluate_only(
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    device: ComputeDevice,
    dist: Distributed,
) -> None:
    """Print the validation loss of the model as it is."""
    folder = resolve_out_dir(config.out_dir)
    wrapped_model = wrap_model(model, config, device, dist)
    if dist.is_main:
        print(banner(config, state, dataset, model, device, folder), flush=True)
    threads = ThreadAdapter(device, config.num_threads, dist.world_size, tqdm.write)
    is_resumed = config.init_from == "resume"
    if dist.is_main and is_resumed and (change := describe_change(state, dataset, model, device)):
        print(wrap(f"WARNING  {change}", indent=9))
    evaluation = evaluate(wrapped_model, dataset, config, device, dist, threads)
    # None: torchrun was killed, which dist.shutdown.is_requested() notices. (A signal ends the
    # program at once here: main() catches signals around train() only.)
    if evaluation is not None and dist.is_main:
        val_loss, bits_per_byte = evaluation
        # Perplexity 10: as unsure as a choice between 10 equally likely tokens.
        perplexity = torch.tensor(val_loss).exp()  # math.exp() refuses numbers above 709
        measured = measured_on(config.eval_tokens, len(dataset.val))
        print(
            f"validation loss {val_loss:.4f} ({bits_per_byte:.3f} bits per byte, perplexity "
            f"{perplexity:,.2f}){measured}"
        )


# --- Checkpoints and samples ---


def save_state(
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    optimizer: Optimizer,
    scaler: torch.amp.GradScaler,
    device: ComputeDevice,
    logger: MetricsLogger,
) -> None:
    """Write resume.pt; keep the old one if the weights do not give a finite loss any more."""
    loss = fixed_batch_loss(dataset, model, device)  # equal in all processes
    if not math.isfinite(loss):
        logger.warn_once("the training loss is not finite any more: resume.pt is not overwritten")
        return
    state.fixed_batch_loss = loss
    state.last_checkpoint_step = state.step
    if logger.enabled:
        logger.check_folder()
        start_time = time.perf_counter()
        save_run(logger.folder, config, state, model, optimizer, scaler, dataset)
        logger.log_checkpoint(time.perf_counter() - start_time)


def try_to_save_snapshot(
    name: str, state: TrainState, dataset: Dataset, model: GPT, logger: MetricsLogger
) -> None:
    """Save the weights as they are now. If that fails, the run goes on: it needs only resume.pt.

    name: of a folder in the run folder; "": the run folder itself.
    """
    if not logger.enabled:
        return
    logger.check_folder()
    try:
        save_snapshot(logger.folder, name, state, dataset, model)
    except FolioError as error:
        logger.warn_once(f"{error}; the run goes on")


def describe_change(state: TrainState, dataset: Dataset, model: GPT, device: ComputeDevice) -> str:
    """A warning if the resumed model computes another loss than when it was saved; else ""."""
    loss, saved = fixed_batch_loss(dataset, model, device), state.fixed_batch_loss
    # 0.1%: more than the rounding of another device. NaN (a checkpoint without this loss): False.
    if not abs(loss - saved) > 0.001 * max(saved, 1):
        return ""
    return (
        f"the resumed model has a loss of {loss:.4f} on a fixed window, the saved model had "
        f"{saved:.4f}: has model.py been changed? Undo the change, or start a new run"
    )


@torch.no_grad()
def fixed_batch_loss(dataset: Dataset, model: GPT, device: ComputeDevice) -> float:
    """The loss of one window of the training text: the same window at each call.

    If this loss is NaN or infinite at a checkpoint, the weights have diverged. The training losses
    so far do not show this: each was computed before its step changed the weights. When a run is
    resumed, the loss shows whether the model is the model that was saved. It is computed without
    autocast, so it is almost equal on all devices.
    """
    block_size = model.config.block_size
    batch = training_batch(dataset.train, 1, block_size, seed=0, step=0, micro_batch=0)
    with eval_mode(model):
        return model(*device.to_device(*batch)).item()


def show_sample(
    config: TrainConfig,
    dataset: Dataset,
    model: GPT,
    device: ComputeDevice,
    dist: Distributed,
    logger: MetricsLogger,
) -> None:
    """Print sample_tokens tokens from the model; fewer if a signal comes."""
    if not logger.enabled:
        return
    start = torch.from_numpy(dataset.tokenizer.encode_prompt(""))[None]  # (1, T)
    generator = device.generator(config.seed)
    try:
        with eval_mode(model):
            steps = InferenceModel(model, device.torch_device).generate(
                start, config.sample_tokens, temperature=0.8, generator=generator
            )
            # read_ids() gives a list of ids for each step: [i], for one sample.
            ids = show_progress(read_ids(steps), config.sample_tokens, "sampling", "tokens")
            ids = itertools.takewhile(lambda _: not dist.shutdown.is_requested(), ids)
            text = "".join(dataset.tokenizer.decode_stream(i for (i,) in ids))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logger.warn_once("no memory for a sample (--sample_tokens=0: none); training continues")
    else:
        logger.print(indented(text.strip()))


if __name__ == "__main__":
    run_main(main)
