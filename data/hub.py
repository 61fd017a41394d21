"""Models and datasets from the Hugging Face hub, through the library huggingface_hub.

    hub_model("gpt2-medium")           # a folder with config.json, tokenizer files and weights
    hub_model("distilgpt2")            # any model on the hub, by its name
    hub_tokenizer("distilgpt2")        # the same folder, but no weights are downloaded
    commit, names = hub_files("kjj0/fineweb10B-gpt2")  # a dataset
    hub_file("kjj0/fineweb10B-gpt2", names[0], commit, local_dir="downloads")

Files are kept in the hub's own cache (~/.cache/huggingface), which transformers uses, too. The
variables HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as in every program of the hub.

What is checked: huggingface_hub compares the size of each downloaded file with the size that the
hub states. It does not compare a SHA-256; only data/download.py does.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import huggingface_hub
from huggingface_hub import constants, errors
from huggingface_hub.utils import tqdm

from configurator import ROOT, first_line
from data.download import DownloadError

GPT2_MODELS = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")
CONFIG_FILES = ["config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
CONFIG_FILES += ["added_tokens.json", "vocab.json", "merges.txt", "vocab.txt", "*.model"]
SAFETENSORS = ["model.safetensors", "model.safetensors.index.json", "model-*.safetensors"]
PYTORCH_BINS = ["pytorch_model.bin", "pytorch_model.bin.index.json", "pytorch_model-*.bin"]


def is_hub_name(name: str) -> bool:
    """Whether it is "gpt2-medium", "distilgpt2" or OWNER/NAME, and not a misspelled folder.

    "out/shakspere" and "data/mine" are folders, because OWNER is a folder of this repository.
    """
    if name in (*GPT2_MODELS, "distilgpt2"):
        return True
    parts = re.fullmatch(r"(\w[\w.-]*)/\w[\w.-]*", name)
    return parts is not None and parts[1] != "out" and not (ROOT / parts[1]).exists()


def hub_tokenizer(name: str) -> Path:
    """The folder with config.json and the tokenizer files of a model on the hub.

    Raises DownloadError if the model does not exist or cannot be downloaded.
    """
    repo_id = f"openai-community/{name}" if name in GPT2_MODELS else name
    with explain_hub_errors(repo_id, "; a folder that you have: --tokenizer=FOLDER"):
        return download_files(repo_id, CONFIG_FILES)


def hub_model(name: str) -> Path:
    """The folder with config.json, tokenizer files and weights of a model on the hub.

    name: "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" or OWNER/NAME.
    Downloads the newest version; without a connection, uses the version in the cache.
    Raises DownloadError if the model does not exist or cannot be downloaded.
    """
    repo_id = f"openai-community/{name}" if name in GPT2_MODELS else name
    with explain_hub_errors(repo_id, "; a model folder that you have: --init_from=FOLDER"):
        if not has_cached_weights(repo_id) and has_cached_weights(name):
            repo_id = name  # transformers caches gpt2 under both names
        for weights in (SAFETENSORS, PYTORCH_BINS):
            folder = download_files(repo_id, CONFIG_FILES + weights)
            if any((folder / weight).exists() for weight in weights):
                return folder
        raise OSError(
            f"no weights (.safetensors or .bin), neither here nor on {constants.ENDPOINT}"
        )


def download_files(repo_id: str, names: list[str]) -> Path:
    """The folder in the cache with those files of a model that exist on the hub."""
    return Path(
        huggingface_hub.snapshot_download(
            repo_id, allow_patterns=names, tqdm_class=DelayedProgressBar
        )
    )


class DelayedProgressBar(tqdm):
    """A progress bar that appears after a second, so not for files in the cache."""

    def __init__(self, *args: Any, **kwargs: Any):
        super().__init__(*args, **{"delay": 1, **kwargs})


def has_cached_weights(repo_id: str) -> bool:
    names = (SAFETENSORS[0], PYTORCH_BINS[0])
    cached = [huggingface_hub.try_to_load_from_cache(repo_id, name) for name in names]
    return any(isinstance(path, str) for path in cached)


def hub_files(repo_id: str, revision: str = "main") -> tuple[str, list[str]]:
    """The commit of a dataset's revision, and the names of its files, sorted.

    Raises DownloadError if there is no such dataset or no connection.
    """
    with explain_hub_errors(repo_id):
        info = huggingface_hub.HfApi().dataset_info(repo_id, revision=revision)
    return info.sha, sorted(file.rfilename for file in info.siblings)


def hub_file(repo_id: str, filename: str, revision: str, local_dir: str | Path) -> Path:
    """Download one file of a dataset into the folder local_dir; returns its path.

    Raises DownloadError if the file does not exist or cannot be downloaded.
    """
    with explain_hub_errors(f"{repo_id}/{filename}"):
        return Path(
            huggingface_hub.hf_hub_download(
                repo_id, filename, repo_type="dataset", revision=revision, local_dir=local_dir
            )
        )


@contextmanager
def explain_hub_errors(what: str, advice: str = "") -> Iterator[None]:
    """Turn an error of huggingface_hub inside the block into a DownloadError of one line."""
    try:
        yield
    # HTTPError: the base class of the errors of huggingface_hub's HTTP library.
    # ImportError: a SOCKS proxy needs a package that is not installed.
    except (
        errors.HTTPError, errors.EntryNotFoundError, ImportError, OSError, ValueError,
    ) as error:  # fmt: skip
        raise DownloadError(f"{what}: {describe(error)}{advice}") from None


def describe(error: BaseException) -> str:
    """An error of huggingface_hub in one line."""
    hub = constants.ENDPOINT
    match error:
        case errors.OfflineModeIsEnabled():
            return "not in the cache, and HF_HUB_OFFLINE is set"
        case errors.LocalEntryNotFoundError() if error.__cause__ is not None:
            return describe(error.__cause__)
        case errors.GatedRepoError():
            return f"restricted: accept its terms on {hub} and set HF_TOKEN"
        case errors.RepositoryNotFoundError():
            return f"not found on {hub} (if it is private, set HF_TOKEN)"
        case errors.EntryNotFoundError() | errors.RevisionNotFoundError():
            return f"not found on {hub}"
        case errors.HfHubHTTPError():
            return f"HTTP {error.response.status_code} from {hub}"
    if isinstance(error, errors.HTTPError):
        return f"no connection to {hub} ({first_line(error)})"
    return getattr(error, "strerror", None) or first_line(error)
