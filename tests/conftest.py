"""Shared by the tests: tiny models, a tiny dataset, and a way to run the programs.

The fixtures import torch and Folio. The main process of pytest-xdist loads this file, too, but it
runs no tests: without torch it starts its workers seconds earlier.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

# One thread: these models are so small that more threads would only wait for one another, and the
# number of threads does not adapt to other programs. Set before torch is imported, and inherited by
# the processes that tests start.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest

import configurator

if TYPE_CHECKING:
    import torch

    from data.tokenizer import BPETokenizer
    from engine.metrics import MetricsLogger
    from model import GPT

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real texts and vocabularies, on machines that have them
# Tiny Shakespeare: there, or where the first preparation keeps it.
SHAKESPEARE_FILES = (
    SHARED / "tinyshakespeare" / "input.txt",
    ROOT / "data" / "shakespeare" / "input.txt",
)
SHAKESPEARE = next((path for path in SHAKESPEARE_FILES if path.exists()), SHAKESPEARE_FILES[0])
VOCAB_SIZE = 13

TINY_TEXT = (
    "twinkle, twinkle, little star,\nhow i wonder what you are!\nup above the world so high,\n"
)


def pytest_configure(config):
    # A shell lets a program that it starts in the background ignore Ctrl-C, and Folio leaves an
    # ignored signal ignored. The tests of Ctrl-C need what programs in the foreground get.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_addoption(parser):
    parser.addoption(
        "--nightly", action="store_true", help="more repetitions of the stress tests (minutes)"
    )


# Files whose tests share something that takes seconds: the fork server of tests/processes.py (and
# GPT-2's vocabulary), or the import of transformers' models.
GROUPS = {
    "processes": (
        "test_distributed", "test_fault_tolerance", "test_optimizer", "test_prepare_shakespeare",
        "test_prepare_text", "test_sample", "test_tokenizer", "test_train", "test_benchmarks",
        "test_cuda",
    ),
    "transformers": ("test_checkpoint", "test_gpt2", "test_hf_tokenizer"),
}  # fmt: skip
# Groups that take long come first, so that all workers end at about the same time.
LONGEST_FIRST = (
    "processes", "test_repository", "test_lessons", "test_explain", "transformers",
    "test_configurator", "test_inference", "test_model",
)  # fmt: skip


def group_of(nodeid: str) -> str:
    """'tests/test_gpt2.py::test_x' -> 'transformers'. A file that is in no group is a group."""
    file = Path(nodeid.partition("::")[0]).stem
    return next((group for group, files in GROUPS.items() if file in files), file)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {group: i for i, group in enumerate(LONGEST_FIRST)}
    items.sort(key=lambda item: order.get(group_of(item.nodeid), len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    """Each group runs in one worker. (With pytest 9.2, xdist 3.8 ignores its own xdist_group.)"""
    from xdist.scheduler import LoadScopeScheduling

    class GroupScheduling(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return group_of(nodeid)

    return GroupScheduling(config, log)


@pytest.fixture
def n_trials(request) -> Callable[[int, int], int]:
    """n_trials(4, 100): how often to repeat something, ordinarily and with --nightly."""
    is_nightly = request.config.getoption("--nightly")
    return lambda ordinary, nightly: nightly if is_nightly else ordinary


@pytest.fixture(autouse=True)
def fixed_seed():
    import torch

    torch.manual_seed(0)


@pytest.fixture
def model() -> GPT:
    """Two blocks, context 8, float64, with weights so large that every token matters."""
    import torch

    from model import GPT, GPTConfig

    config = GPTConfig(block_size=8, vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=16)
    model = GPT(config).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three sequences of eight token ids: (3, 8)."""
    import torch

    return torch.randint(VOCAB_SIZE, (3, 8))


@pytest.fixture
def data_folder(tmp_path, monkeypatch) -> Path:
    """A temporary folder in the place of data/, so that no test touches the real one."""
    from data import dataset

    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(dataset, "DATA_DIR", folder)
    return folder


@pytest.fixture
def tiny_dataset(tmp_path) -> Path:
    """The folder of a prepared character dataset of about 3,500 tokens."""
    return prepare_tiny_dataset(tmp_path / "tiny_dataset")


def prepare_tiny_dataset(folder: Path) -> Path:
    import numpy as np

    from data.prepare import split_text, write_dataset
    from data.tokenizer import CharTokenizer

    lines = TINY_TEXT.splitlines(keepends=True)
    rng = np.random.default_rng(0)
    text = "".join(lines[i] for i in rng.integers(len(lines), size=120))
    write_dataset(folder, CharTokenizer.from_text(text), split_text(text), {"source": "a rhyme"})
    return folder


@pytest.fixture
def tiny_flags(tiny_dataset, tmp_path) -> list[str]:
    """Flags for a training run of a second or two on the tiny dataset, into tmp_path/run."""
    return make_tiny_flags(tiny_dataset, tmp_path / "run")


def make_tiny_flags(dataset: Path, folder: Path) -> list[str]:
    return [
        f"--dataset={dataset}", f"--out_dir={folder}", "--device=cpu",
        "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4",
        "--max_iters=8", "--warmup_iters=2", "--eval_interval=4", "--log_interval=2",
        "--eval_tokens=64", "--sample_tokens=10", "--dtype=float32",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def gpt2() -> BPETokenizer:
    """GPT-2's own vocabulary, on machines that have it."""
    from data.tokenizer import BPETokenizer

    cache = SHARED / "tiktoken"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and not cache.is_dir():
        pytest.skip("GPT-2's vocabulary is not on this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", str(cache)))
        return BPETokenizer.gpt2()


def run_script(*args: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python ARGS...` as a user would, in a process of its own; its output is text."""
    return subprocess.run(
        [sys.executable, *map(str, args)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture
def call(monkeypatch, capsys) -> Callable[..., subprocess.CompletedProcess]:
    """Call a program's main() with these flags in this process, as its last line does.

    train.py draws loss.png only with loss_png=True, because that takes as long as a tiny run.
    """

    def call(
        program: ModuleType, *flags: str, loss_png: bool = False
    ) -> subprocess.CompletedProcess:
        argv = [f"{program.__name__}.py", *map(str, flags)]
        capsys.readouterr()
        with monkeypatch.context() as patch:
            patch.setattr(sys, "argv", argv)
            if not loss_png:
                patch.setattr("engine.metrics.plot_losses", lambda *_, **__: None)
            try:
                configurator.run_main(program.main)
                status = 0
            except SystemExit as exit_:
                status = exit_.code
        return subprocess.CompletedProcess(argv, status, *capsys.readouterr())

    return call


def assert_one_line_error(result: subprocess.CompletedProcess, *expected: str) -> None:
    """Exit status 2, one line on stderr, no traceback, and the words that the line must contain."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for words in expected:
        assert words in result.stderr


# --- Metrics ---


@pytest.fixture
def make_logger(tmp_path):
    """make_logger(step): a logger of a run that has done so many steps."""
    from engine.metrics import MetricsLogger
    from engine.run import TrainState
    from engine.train_config import TrainConfig

    def make(step: int = 0, **options) -> MetricsLogger:
        state = TrainState(step=step, tokens=step * 100, seconds=step * 0.5)
        return MetricsLogger(tmp_path, TrainConfig(max_iters=10), state, **options)

    return make


def make_step(
    logger: MetricsLogger, step: int, val_loss: float | None = None, train_loss: float | None = None
) -> None:
    """Log a step of 100 tokens and 0.5 seconds, as train.py does."""
    from engine.metrics import StepMetrics

    state = logger.state
    state.step, state.tokens, state.seconds = step, step * 100, step * 0.5
    logger.log_step(StepMetrics(train_loss or 3.0 / step, 1.0, 1e-3))
    if val_loss is not None and val_loss < state.best_val_loss:
        state.best_val_loss, state.best_step = val_loss, step
    logger.log_row(val_loss, None if val_loss is None else val_loss / math.log(2))
