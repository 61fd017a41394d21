"""What train.py prints before and after training: the banner and the summary."""

import contextlib
import itertools
import shutil
import textwrap
from pathlib import Path

import torch

from configurator import ROOT, for_terminal, wrap
from data.dataset import Dataset
from data.files import shell_command, shown_path
from data.prepare import plural
from data.shakespeare import replacement_warning
from engine.changed_model import CHANGED_MODEL_NOTE, eval_mode, is_gpt2
from engine.checkpoint import CHECKPOINT_FILE, WEIGHTS_FILE, measured_on
from engine.device import ComputeDevice
from engine.flops import flops_per_token
from engine.log_file import LOG_FILE, LogRow, evaluations, read_log
from engine.plot import PLOT_FILE
from engine.run import TrainState, is_patience_exhausted
from engine.run_folder import newest_run
from engine.train_config import TrainConfig
from model import GPT, GPTConfig


def banner(
    config: TrainConfig,
    state: TrainState,
    dataset: Dataset,
    model: GPT,
    device: ComputeDevice,
    folder: str | Path,
) -> str:
    """What train.py is going to do: data, model, weights, steps, device, folder."""
    train_tokens, vocab_size = len(dataset.train), dataset.tokenizer.vocab_size
    lines = [
        labeled(
            "data",
            f"{config.dataset}: {plural(train_tokens, 'training token')}, "
            f"{plural(len(dataset.val), 'validation token')}, vocabulary of {vocab_size:,}",
        ),
        labeled(
            "model",
            f"{sum(parameter.numel() for parameter in model.parameters()):,} parameters: "
            f"{plural(config.n_layer, 'layer')}, {plural(config.n_head, 'head')}, "
            f"{plural(config.n_embd, 'channel')}, context of {config.block_size}",
        ),
    ]
    if config.eval_only:
        lines.append("task     evaluation only: nothing is trained or saved")
    if config.init_from not in ("scratch", "resume"):
        lines.append(f"weights  {config.init_from}")
    elif config.eval_only:
        resumed = config.init_from == "resume"
        where = f"step {state.step:,} of {relative_path(folder)}" if resumed else "untrained"
        lines.append(f"weights  {where}")
    if not config.eval_only:
        lines.append(labeled("steps", describe_steps(config, state, train_tokens)))
    lines.append(labeled("device", device.description))
    with eval_mode(model):
        if not is_gpt2(model):
            note = f"{CHANGED_MODEL_NOTE}, and transformers cannot open this model"
            lines.append(labeled("note", note))
    if not config.eval_only and (note := long_run_note(config, state, model.config, device)):
        lines.append(labeled("note", note))
    if not config.eval_only:
        lines.append(f"folder   {relative_path(folder)}")
    if config.init_from != "resume":  # once for each run
        lines += filter(None, [replacement_warning(dataset.meta)])
    return "\n".join(lines)


# In training, for a rough estimate. Measured: 2e10 for shakespeare_char on an AMD EPYC; larger
# matrices are multiplied faster.
FLOPS_OF_A_CPU_THREAD = 3e10


def long_run_note(
    config: TrainConfig, state: TrainState, model_config: GPTConfig, device: ComputeDevice
) -> str:
    """How long a recipe that was made for GPUs will take on this CPU; "" if less than an hour."""
    if device.torch_device.type != "cpu":
        return ""
    tokens = (config.max_iters - state.step) * config.tokens_per_step
    flops = FLOPS_OF_A_CPU_THREAD * torch.get_num_threads()
    hours = tokens * flops_per_token(model_config) / flops / 3600
    if hours < 1:
        return ""
    duration = plural(round(hours), "hour") if hours < 48 else f"{hours / 24:,.0f} days"
    return f"on this CPU, this takes roughly {duration}; a GPU is much faster"


def describe_steps(config: TrainConfig, state: TrainState, train_tokens: int) -> str:
    """'2,000, each of 8 x 128 = 1,024 tokens: 2.0 epochs'"""
    steps = max(config.max_iters - state.step, 0)
    if steps == 0 and state.step > 0:
        return f"none left after step {state.step:,}; to train longer, raise --max_iters"
    sizes = [config.batch_size, config.block_size]
    if config.gradient_accumulation_steps > 1:
        sizes.insert(0, config.gradient_accumulation_steps)
    product = " x ".join(f"{size:,}" for size in sizes)
    resumed = f" left after step {state.step:,} of {config.max_iters:,}" if state.step else ""
    epochs = steps * config.tokens_per_step / train_tokens
    decimals = 1 if epochs >= 0.1 else 3
    return (
        f"{steps:,}{resumed}, each of {product} = {plural(config.tokens_per_step, 'token')}: "
        f"{epochs:,.{decimals}f} epochs"
    )


def summary(
    config: TrainConfig, state: TrainState, folder: str | Path, n_val_tokens: int = 0
) -> str:
    """What train.py did, and the command to continue with.

    n_val_tokens: of the dataset; 0 if unknown.
    """
    folder, measured = Path(folder), measured_on(config.eval_tokens, n_val_tokens)
    total = max(config.max_iters, state.step)
    is_evaluated = state.last_eval_step == state.step  # else none was due, or a signal came
    status = "done" if state.step == total and is_evaluated else "stopped"
    saved = "" if status == "done" else "; saved"
    if state.last_checkpoint_step != state.step:  # save_state() has refused
        saved = f"; not saved: {CHECKPOINT_FILE} is of step {state.last_checkpoint_step:,}"
    if is_patience_exhausted(state, config):
        count = plural(state.evaluations_since_best, "evaluation")
        saved += f"; {count} without improvement (patience)"
    reached = f"{state.step:,} of {plural(total, 'step')}, {format_duration(state.seconds)}"
    lines = [
        "\n" + labeled(status, f"{reached} of training{saved}"),
        labeled("best", describe_best(read_log(folder / LOG_FILE), state, measured)),
    ]
    if (folder / PLOT_FILE).exists():
        lines.append(f"curve    {relative_path(folder / PLOT_FILE)}")
    if (folder / WEIGHTS_FILE).exists() and state.step > 0:  # not random weights
        lines.append(f"next     {sample_command(folder)}")
    if state.step < config.max_iters or not is_evaluated:
        more_patience = " --patience=0" if is_patience_exhausted(state, config) else ""
        flags = f"--init_from=resume{more_patience}"
        label = "or" if lines[-1].startswith("next") else "next"
        lines.append(labeled(label, f"the same command with {flags}, to continue"))
    return "\n".join(lines)


def describe_best(rows: list[LogRow], state: TrainState, measured: str = "") -> str:
    """The best evaluation, and whether the model overfitted after it.

    measured: ' on the first 2,000 validation tokens', for example.
    """
    if state.best_step < 0:
        return "no evaluation of trained weights yet"
    text = f"validation loss {state.best_val_loss:.4f}"
    val_losses = {row["step"]: row for row in evaluations(rows)}
    best = val_losses.get(state.best_step)
    if best and best["val_loss"] != state.best_val_loss:
        best = None  # log.csv was replaced, or this step was repeated with other settings
    if best and best["bits_per_byte"] is not None:
        text += f" ({best['bits_per_byte']:.3f} bits per byte)"
    text += f"{measured} at step {state.best_step:,}"
    is_worse = 0 in val_losses and val_losses[0]["val_loss"] < state.best_val_loss
    if is_worse:
        text += f", worse than before training ({val_losses[0]['val_loss']:.4f})"
    last = val_losses[max(val_losses)] if val_losses else None
    # A difference below 1% may be chance.
    if best and last["val_loss"] > 1.01 * state.best_val_loss:
        text += f"; it rose to {last['val_loss']:.4f} at step {last['step']:,}"
        losses = [training_loss(rows, row["step"]) for row in (best, last)]
        if None not in losses and losses[1] < 0.97 * losses[0]:  # a small fall may be chance
            text += " while the training loss fell: overfitting"
    return f"{text}; try lower learning rates" if is_worse else text


def training_loss(rows: list[LogRow], step: int) -> float | None:
    """The mean training loss of the steps after the previous evaluation, up to `step`."""
    start = max((row["step"] for row in evaluations(rows) if row["step"] < step), default=-1)
    losses = [row["train_loss"] for row in rows if start < row["step"] <= step]
    losses = [loss for loss in losses if loss is not None]
    return sum(losses) / len(losses) if losses else None


def sample_command(folder: Path) -> str:
    """The command that samples from this run, as it can be typed in the working directory."""
    command = ["python", str(relative_path(ROOT / "sample.py"))]
    out_dir = shown_path(folder)
    is_default = out_dir == f"out/{folder.name}" and newest_run().resolve() == folder.resolve()
    if not is_default:  # sample.py uses the newest run by default
        command.append(f"--out_dir={out_dir}")
    return shell_command(*command)


# --- Formatting ---


def labeled(label: str, text: str) -> str:
    """'data     text', wrapped at the width of the terminal."""
    return wrap(f"{label:<9}{text}", indent=9)


def indented(text: str) -> str:
    """The lines of a text, indented by 4 columns and wrapped at the width of the terminal."""
    width = max(shutil.get_terminal_size().columns - 4, 10)  # 0 or less would be an error
    lines = [textwrap.wrap(line, width) or [""] for line in for_terminal(text).splitlines()]
    return textwrap.indent("\n".join(itertools.chain(*lines)), "    ")


def relative_path(path: str | Path) -> Path:
    """The path relative to the working directory if it is inside it."""
    path = Path(path)
    # OSError: the working directory was deleted. ValueError: the path is outside it.
    with contextlib.suppress(OSError, ValueError):
        return path.relative_to(Path.cwd())
    return path


def format_duration(seconds: float) -> str:
    """75.2 -> '1:15'; 3675 -> '1:01:15'."""
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
