"""What the lessons share: tiny models, a tiny dataset, and a way to run the scripts for real."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

import configurator
from data import dataset as dataset_module
from data.prepare import split_text, write_dataset
from data.tokenizer import BPETokenizer, CharTokenizer
from model import GPT, GPTConfig

ROOT = Path(__file__).resolve().parent.parent
SHARED = ROOT.parent / "shared"  # real texts and vocabularies, on machines that have them
# Tiny Shakespeare: there, or where the first preparation leaves him.
PLACES = (SHARED / "tinyshakespeare" / "input.txt", ROOT / "data" / "shakespeare" / "input.txt")
REAL = next((place for place in PLACES if place.exists()), PLACES[0])
VOCABULARY = 13

RHYME = "twinkle, twinkle, little star,\nhow i wonder what you are!\nup above the world so high,\n"


def pytest_addoption(parser):
    parser.addoption(
        "--nightly", action="store_true", help="repeat what is repeated many more times (minutes)"
    )


@pytest.fixture
def trials(request):
    """trials(4, 100): how often to repeat something, in the ordinary suite and with --nightly."""
    nightly = request.config.getoption("--nightly")
    return lambda ordinary, many: many if nightly else ordinary


@pytest.fixture(autouse=True)
def same_chance():
    torch.manual_seed(0)


@pytest.fixture
def model() -> GPT:
    """Two blocks, context 8, float64, with weights large enough for every token to matter."""
    shape = GPTConfig(block_size=8, vocab_size=VOCABULARY, n_layer=2, n_head=2, n_embd=16)
    model = GPT(shape).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.fixture
def tokens() -> torch.Tensor:
    """Three rows of eight tokens."""
    return torch.randint(VOCABULARY, (3, 8))


@pytest.fixture
def data_folder(tmp_path, monkeypatch) -> Path:
    """A folder to stand in for data/, so that no test touches the real one."""
    folder = tmp_path / "data"
    folder.mkdir()
    monkeypatch.setattr(dataset_module, "DATA", folder)
    return folder


@pytest.fixture
def rhyme(tmp_path) -> Path:
    """A prepared character dataset of about 3,500 tokens: the path of its folder."""
    return prepare_rhyme(tmp_path / "rhyme")


def prepare_rhyme(folder: Path) -> Path:
    lines = RHYME.splitlines(keepends=True)
    dice = np.random.default_rng(0)
    text = "".join(lines[i] for i in dice.integers(len(lines), size=120))
    write_dataset(folder, CharTokenizer.of(text), split_text(text), {"source": "rhyme"})
    return folder


@pytest.fixture
def tiny(rhyme, tmp_path) -> list[str]:
    """Flags for a training run of a second or two, on the rhyme, into tmp_path/run."""
    return tiny_flags(rhyme, tmp_path / "run")


def tiny_flags(dataset: Path, folder: Path) -> list[str]:
    return [
        f"--dataset={dataset}", f"--out_dir={folder}", "--device=cpu",
        "--n_layer=2", "--n_head=2", "--n_embd=16", "--block_size=8", "--batch_size=4",
        "--max_iters=8", "--warmup_iters=2", "--eval_interval=4", "--log_interval=2",
        "--eval_tokens=64", "--sample_tokens=10", "--dtype=float32",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def gpt2() -> BPETokenizer:
    """GPT-2's own vocabulary, on machines that have it."""
    cache = SHARED / "tiktoken"
    if "TIKTOKEN_CACHE_DIR" not in os.environ and not cache.is_dir():
        pytest.skip("GPT-2's vocabulary is not on this machine")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", os.environ.get("TIKTOKEN_CACHE_DIR", str(cache)))
        return BPETokenizer.gpt2()


def run_script(*words: str, cwd: Path = ROOT, **environment: str) -> subprocess.CompletedProcess:
    """Run `python WORDS...` as a user would, in a process of its own; its output is text."""
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        timeout=120,
    )


@pytest.fixture
def call(monkeypatch, capsys):
    """Call a script's main() with these flags, as its last line does, without a new process."""

    def call(script, *flags: str) -> subprocess.CompletedProcess:
        monkeypatch.setattr(sys, "argv", [f"{script.__name__}.py", *map(str, flags)])
        capsys.readouterr()
        try:
            configurator.run_main(script.main)
            status = 0
        except SystemExit as left:
            status = left.code
        return subprocess.CompletedProcess(sys.argv, status, *capsys.readouterr())

    return call


def assert_one_line_error(result: subprocess.CompletedProcess, *expected: str) -> None:
    """Exit status 2, one line on stderr, no traceback, and the words it must contain."""
    assert result.returncode == 2, result.stderr
    assert result.stderr.count("\n") == 1, result.stderr
    assert "Traceback" not in result.stderr
    for word in expected:
        assert word in result.stderr
