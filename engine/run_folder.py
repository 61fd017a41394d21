"""The folder of a run: where it is, which process may write there, and what it holds.

    folder = resolve_out_dir("out/shakespeare_char")  # relative to the repository
    with lock_run_folder(folder):                     # no other process trains here
        move_old_run_aside(folder)                    # unless it is resumed

engine/checkpoint.py reads and writes the files in it.
"""

import contextlib
import math
import os
import re
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import safetensors

from configurator import ROOT, FolioError, did_you_mean, first_line, read_settings
from data.dataset import Dataset, OtherTokenizerError, ShardedTokens, open_dataset
from data.files import explain_os_error, file_lock, rename_to_backup, shown_path, user_path
from data.hub import GPT2_MODELS, hub_model, is_hub_name
from data.tokenizer import Tokenizer
from engine.hf_format import WEIGHTS_FILE
from engine.log_file import LOG_FILE, read_log

SETTINGS_FILE = "settings.json"
LOCK_FILE = ".lock"
# Files that are not part of a run. Linux makes lost+found on each disk, macOS makes .DS_Store.
NO_RUN_FILES = (LOCK_FILE, "lost+found", ".DS_Store")


# --- Paths ---


def resolve_path(path: str | Path) -> Path:
    """An absolute path without symbolic links; a relative one is relative to the repository."""
    try:
        return (ROOT / user_path(path)).resolve()
    except (RuntimeError, OSError) as error:  # links in a circle
        raise FolioError(f"{path}: not a valid path ({error})") from None


def resolve_out_dir(out_dir: str | Path) -> Path:
    """The absolute path of a run folder; a relative one is relative to the repository.

    Symbolic links are followed: the lock, and moving an old run aside, act on the real folder.
    Raises FolioError if no run can be there.
    """
    folder = resolve_path(out_dir)
    if folder in (ROOT, (ROOT / "out").resolve(), *ROOT.parents):
        raise FolioError(f"--out_dir={out_dir}: name a folder for the run, such as out/my_run")
    return folder


def resolve_model_dir(source: str | Path, on_hub: bool = True) -> Path:
    """The folder of a model.

    source: a run folder, any other folder of a model, or a model's name on the Hugging Face hub.
    A relative path starts at the repository or, if nothing is there, at the working directory.
    "gpt2" and "openai-community/gpt2" are names. A name is downloaded if it is not in the cache.
    on_hub: False: `source` is a folder.
    Raises FolioError if there is no such folder and no such model.
    """
    name = str(source)
    if on_hub and name in GPT2_MODELS:
        return hub_model(name)
    folder = resolve_path(source)
    if not folder.exists() and (here := user_path(source)).is_dir():
        folder = here.resolve()
    if folder.is_dir():
        models = sorted(path.parent for path in folder.glob(f"*/{WEIGHTS_FILE}"))
        if models and not any((folder / name).exists() for name in ("config.json", SETTINGS_FILE)):
            example = f"{source}/{models[-1].name}"
            raise FolioError(f"{source}: a folder of models; name one of them, such as {example}")
        return folder
    if folder.exists():
        raise FolioError(f"{source}: a file; a folder with a model in it is needed")
    if on_hub and is_hub_name(name):
        return hub_model(name)
    runs = [f"out/{path.parent.name}" for path in saved_weights()]
    guess = did_you_mean(name, ("scratch", "resume", "auto", *GPT2_MODELS, *runs))
    problem = f"neither a folder ({folder}) nor a model on the hub"
    if not on_hub:
        problem = f"not a folder ({folder})"
    raise FolioError(f"{source}: {problem}{guess}")


def chosen_model(init_from: str, out_dir: str) -> Path:
    """The folder of the model that sample.py and explain.py use; both empty: the newest run.

    Raises FolioError if both are given.
    """
    if init_from and out_dir:
        raise FolioError(f"--init_from={init_from} --out_dir={out_dir}: give one of them")
    if init_from:
        return resolve_model_dir(init_from)
    return resolve_model_dir(out_dir, on_hub=False) if out_dir else newest_run()


def saved_weights() -> list[Path]:
    """The weights of all runs under out/, the oldest first."""
    paths = (ROOT / "out").glob(f"*/{WEIGHTS_FILE}")
    files = [path for path in paths if path.is_file()]  # not a link to nowhere
    return sorted(files, key=lambda path: path.stat().st_mtime)


def newest_run() -> Path:
    """The folder under out/ whose weights were saved last. Raises FolioError if there is none.

    A run that was stopped before its weights were evaluated counts only if there is no other run.
    """
    folders = [path.parent for path in saved_weights()]
    if evaluated := [folder for folder in folders if not is_unevaluated(folder)]:
        return evaluated[-1]
    if folders:
        return folders[-1]
    raise FolioError(
        f"no trained model in {ROOT / 'out'}; train one: python train.py config/shakespeare_char.py"
    )


def is_unevaluated(folder: Path) -> bool:
    """Whether a run saved its weights without an evaluation, because it was stopped too early."""
    with contextlib.suppress(FolioError):
        metadata = weights_metadata(folder)
        return "step" in metadata and "val_loss" not in metadata
    return False


def describe_run(folder: str | Path) -> str:
    """Which weights a folder holds, in one line; only its path if they are not from a run.

    "out/shakespeare_char, step 1,750 of 2,000, validation loss 1.5560"
    """
    folder = Path(folder)
    description, settings = shown_path(folder), read_run_settings(folder)
    with contextlib.suppress(KeyError):
        metadata = weights_metadata(folder)
        step, val_loss = metadata["step"], metadata.get("val_loss")
        description += f", step {step:,}"
        if settings is not None:
            description += f" of {settings['max_iters']:,}"
            last_step = max([step, *(row["step"] for row in read_log(folder / LOG_FILE))])
            if step < last_step < settings["max_iters"]:
                description += f" (training has reached step {last_step:,})"
        source = settings["init_from"] if settings else "scratch"
        if val_loss is not None:
            description += f", validation loss {val_loss:.4f}"
        elif step > 0:  # a snapshot has no settings
            description += ", not evaluated" if settings else ", a snapshot"
        elif source in ("scratch", "auto", "resume"):
            description += ", not trained yet: its text is noise"
        else:
            description += f", not trained yet: the weights of {source}"
    return description


def weights_metadata(folder: str | Path) -> dict[str, int | float]:
    """The numbers that train.py keeps with the weights: step, val_loss, val_checksum.

    val_checksum: ShardedTokens.checksum() of the validation split on which val_loss was measured.
    fixed_ids_loss: of a changed model.py, when the weights were saved.

    A number that is missing or invalid (another program may have written it) is left out. {} if
    there are no weights. Raises FolioError if the file cannot be read.
    """
    path = Path(folder) / WEIGHTS_FILE
    metadata, numbers = {}, {}
    try:
        with safetensors.safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
    except FileNotFoundError:
        pass
    except (OSError, safetensors.SafetensorError) as error:
        raise FolioError(
            f"{path}: cannot be read ({first_line(error)}); repair it, or move it away"
        ) from None
    types = {"step": int, "val_loss": float, "val_checksum": int, "fixed_ids_loss": float}
    for name, number_type in types.items():
        with contextlib.suppress(KeyError, ValueError):
            number = number_type(metadata[name])
            # A changed model.py may have a loss below 0.
            if math.isfinite(number) and (number >= 0 or number_type is float):
                numbers[name] = number
    return numbers


def validation_split(folder: str | Path, block_size: int, tokenizer: Tokenizer) -> ShardedTokens:
    """The tokens on which the run in a folder was evaluated.

    Raises FolioError if the folder is not a run's, or if its dataset is missing or has changed.
    """
    folder = Path(folder)
    settings = read_run_settings(folder)
    if settings is None:
        raise FolioError(f"{folder}: has no settings.json of a run that train.py has trained")
    changed = FolioError(
        f"the dataset {settings['dataset']} has been prepared again since the run in {folder} was "
        "evaluated, so its validation text is another one"
    )
    try:
        dataset = open_dataset(settings["dataset"], block_size, tokenizer)
    except OtherTokenizerError:
        raise changed from None
    if not was_evaluated_on(folder, dataset):
        raise changed
    return dataset.val


def was_evaluated_on(folder: str | Path, dataset: Dataset) -> bool:
    """Whether the weights in a folder were evaluated on this dataset; True if that is unknown."""
    return weights_metadata(folder).get("val_checksum") in (None, dataset.val.checksum())


# --- Preparing the folder for a run ---


def lock_run_folder(folder: str | Path) -> AbstractContextManager[None]:
    """Hold the run folder for this process; FolioError if another process trains there.

    The lock is on a file beside the folder, which stays there when an old run is moved aside. The
    operating system releases the lock when the process ends, for any reason.
    If the folder is a disk of its own (mounted, for example in Docker), the lock file is inside: in
    another container this disk may have another path, with other files beside it.
    """
    message = (
        f"{folder}: another process is training here; choose another --out_dir "
        "(several processes that train one model are started by torchrun)"
    )
    return file_lock(lock_path(Path(folder)), message)


def lock_path(folder: Path) -> Path:
    """The lock file of a run folder."""
    is_mount = os.path.ismount(folder)
    return folder / LOCK_FILE if is_mount else folder.with_name(f".{folder.name}{LOCK_FILE}")


def remove_temporary_files(folder: str | Path) -> None:
    """Remove the temporary files that a killed process has left in a run folder."""
    folder = Path(folder)
    with explain_os_error(folder, "cannot be made ready for a run"):
        for path in (*folder.iterdir(), *folder.glob("step_*/*")):
            if is_temporary(path.name):
                path.unlink()


def move_old_run_aside(folder: str | Path) -> None:
    """Rename the folder if there is a run in it, and print its new name.

    Raises FolioError if the folder holds files that are not a run.
    """
    folder = Path(folder)
    if not folder.exists():
        return
    with explain_os_error(folder, "cannot be made ready for a run"):
        # A run that was killed while it saved its settings has left a temporary file, and no run.
        names = (path.name for path in folder.iterdir())
        existing = sorted(
            name for name in names if name not in NO_RUN_FILES and not is_temporary(name)
        )
        if existing and read_run_settings(folder) is None:
            refuse_nanogpt_checkpoint(folder)
            raise FolioError(
                f"{folder}: holds files that are not a run of Folio's ({existing[0]}); choose "
                "another --out_dir"
            )
        # A process may train in a folder inside, and its lock would move with it.
        for path in folder.iterdir():
            if read_run_settings(path) is not None:
                raise FolioError(f"{folder}: holds the run {path.name}; choose another --out_dir")
        if existing and os.path.ismount(folder):
            raise FolioError(
                f"{folder}: holds a run, and a mounted disk cannot be renamed; choose a folder on "
                f"it: --out_dir={folder / 'run'}"
            )
        if existing:
            print(f"the previous run is now in {shown_path(rename_to_backup(folder))}")


def is_temporary(name: str) -> bool:
    """Whether the name is one of atomic_write() (.resume.pt.tmp) or safetensors (.tmpAbCdEf)."""
    return re.fullmatch(r"\..*\.tmp|\.tmp\w{6}", name) is not None


def read_run_settings(folder: Path) -> dict[str, Any] | None:
    """settings.json, if this folder holds a run of Folio's; other programs use that name, too."""
    try:
        settings = read_settings(folder / SETTINGS_FILE)
    except FolioError:
        return None
    is_run = {"dataset", "max_iters", "n_layer", "init_from"} <= settings.keys()
    return settings if is_run and type(settings["max_iters"]) is int else None


def make_folder(folder: Path) -> None:
    with explain_os_error(folder, "this folder cannot be created"):
        folder.mkdir(parents=True, exist_ok=True)


def refuse_nanogpt_checkpoint(folder: Path) -> None:
    if (folder / "ckpt.pt").exists():
        raise FolioError(
            f"{folder / 'ckpt.pt'}: a checkpoint of nanoGPT, which Folio does not read; to train "
            "a new model: --init_from=scratch and another --out_dir"
        )
