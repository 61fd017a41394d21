"""Send the metrics of a run to Weights & Biases and to TensorBoard, if the settings ask for it."""

import contextlib
import dataclasses
import functools
import importlib.util
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

from configurator import FolioError, first_line
from data.files import write_text
from engine.log_file import LogRow
from engine.train_config import TrainConfig

WANDB_ID_FILE = "wandb_id.txt"

Tracker = Callable[[LogRow, int], None]  # takes the values of a row of log.csv, and its step


@contextlib.contextmanager
def open_trackers(folder: Path, config: TrainConfig, first_step: int) -> Iterator[list[Tracker]]:
    """Start the trackers that the settings name. Raises FolioError if wandb refuses."""
    with contextlib.ExitStack() as stack:
        trackers: list[Tracker] = []
        if config.wandb_log:
            import wandb

            id_file = folder / WANDB_ID_FILE  # so that a resumed run continues its run on wandb
            if not id_file.exists():
                write_text(id_file, uuid.uuid4().hex)
            with explain_wandb_error():
                run = wandb.init(
                    project=config.wandb_project, name=config.wandb_run_name or folder.name,
                    id=id_file.read_text(encoding="utf-8").strip(), resume="allow",
                    config=dataclasses.asdict(config), dir=folder,
                    settings=wandb.Settings(console="off"),  # leave stdout alone
                )  # fmt: skip
            stack.enter_context(run)
            # The step as a value like all others: a resumed run may repeat steps, and with the
            # argument `step` of log(), wandb would ignore what is logged for them.
            run.define_metric("*", step_metric="step")
            trackers.append(lambda values, step: run.log({"step": step, **values}))
        if config.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # purge_step hides rows of a previous process that are repeated after resuming. The
            # writer is made with the first row: a process that fails before it hides nothing.
            @functools.cache
            def open_writer() -> SummaryWriter:
                writer = SummaryWriter(folder / "tensorboard", purge_step=first_step + 1)
                return stack.enter_context(writer)

            def write_scalars(values: LogRow, step: int) -> None:
                writer = open_writer()
                for name, value in values.items():
                    writer.add_scalar(name, value, step)
                writer.flush()

            trackers.append(write_scalars)
        yield trackers


@contextlib.contextmanager
def explain_wandb_error() -> Iterator[None]:
    """Turn wandb's errors inside the block (no account, no network) into a FolioError."""
    import wandb

    try:
        yield
    except wandb.Error as error:
        reason = first_line(error).rstrip(".")
        raise FolioError(f"--wandb_log: {reason}; or set WANDB_MODE=offline") from None


def check_trackers(config: TrainConfig) -> None:
    """Raise FolioError if the settings need a package that is not installed, or a wandb account."""
    for setting, package in (("wandb_log", "wandb"), ("tensorboard", "tensorboard")):
        if getattr(config, setting) and importlib.util.find_spec(package) is None:
            raise FolioError(f"--{setting}: {package} is not installed; run: pip install {package}")
    if config.wandb_log and not config.eval_only:
        import wandb

        with explain_wandb_error():
            wandb.login()
