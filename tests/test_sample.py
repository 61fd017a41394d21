"""Writing: the same seed writes the same text, as it is drawn, from a run's folder alone."""

import signal
import subprocess
import sys

import pytest
import torch

import sample
from data.tokenizer import CharTokenizer
from model import GPT, GPTConfig
from sample import encode_prompt, write
from tests.conftest import ROOT, assert_one_line_error
from tests.test_tokenizer import toy_bpe
from training.checkpoint import save_model, save_tokenizer

LETTERS = CharTokenizer.of("\nabcdefgh")


@pytest.fixture
def folder(tmp_path):
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=8, vocab_size=9, n_layer=1, n_head=1, n_embd=8))
    save_model(model, tmp_path / "run")
    save_tokenizer(LETTERS, tmp_path / "run")
    return tmp_path / "run"


@pytest.fixture
def written(call):
    """What sample.py does, given a folder and flags."""
    return lambda folder, *flags: call(sample, f"--out_dir={folder}", "--device=cpu", *flags)


def test_a_prompt_goes_on_for_as_long_as_asked_far_beyond_the_block(written, folder):
    result = written(folder, "--start=abc", "--max_new_tokens=50")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc")
    assert len(result.stdout) == 3 + 50 + 1  # and the line's end
    assert set(result.stdout) <= set(LETTERS.characters)


def test_the_same_seed_writes_the_same_text(written, folder):
    texts = [written(folder, "--max_new_tokens=40", f"--seed={seed}").stdout for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_the_precision_asked_for_is_the_one_it_writes_in(written, folder, monkeypatch):
    made, real = [], sample.ready_to_write

    def ready(*how):
        made.append(real(*how))
        return made[0]

    monkeypatch.setattr(sample, "ready_to_write", ready)
    assert written(folder, "--dtype=float64", "--max_new_tokens=1").returncode == 0
    assert made[0].transformer.wte.weight.dtype == torch.float64


def test_several_samples_begin_alike_and_go_on_differently(written, folder):
    result = written(folder, "--start=ab", "--num_samples=3", "--max_new_tokens=30")
    texts = result.stdout.rstrip("\n").split("\n---------------\n")
    assert len(texts) == 3
    assert all(text.startswith("ab") for text in texts)
    assert len(set(texts)) == 3


def test_the_prompt_may_come_from_a_file(written, folder, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("hagge")
    result = written(folder, f"--start=FILE:{prompt}", "--max_new_tokens=3")
    assert result.stdout.startswith("hagge")
    assert_one_line_error(written(folder, f"--start=FILE:{tmp_path}/none"), "none")


def test_a_tokenizer_and_a_model_that_do_not_belong_together_are_refused(written, folder):
    save_tokenizer(CharTokenizer.of("ab"), folder)
    assert_one_line_error(written(folder, "--start=a"), "do not belong together")


def test_an_empty_prompt_begins_where_texts_begin():
    assert encode_prompt("", LETTERS) == ("", [0])  # a line's end
    assert encode_prompt("", toy_bpe()) == ("", [261])  # end-of-text
    assert encode_prompt("", CharTokenizer.of("xyz")) == ("", [0])


def test_what_cannot_be_sampled_from_is_said_in_one_line(written, folder, tmp_path):
    assert_one_line_error(written(folder, "--start=abz"), "'z'", "position 2")
    assert_one_line_error(written(tmp_path / "nowhere"), "nowhere")
    assert_one_line_error(written(tmp_path), "no model here", "python train.py")
    assert_one_line_error(written(folder, "--forever", "--num_samples=2"), "--forever")
    assert_one_line_error(written(folder, "--temperature=-1"), "temperature")


def test_nanogpts_word_for_a_runs_own_weights_is_understood(written, folder):
    assert written(folder, "--init_from=resume").returncode == 0


def test_text_appears_as_it_is_drawn(capsys):
    tokenizer = toy_bpe()
    seen = []

    def drawn():
        for token in "né".encode():
            yield torch.tensor([token, token])
            seen.append(capsys.readouterr().out)

    write("A", drawn(), tokenizer, 2)
    assert seen == ["An", "", "é"]  # half a letter is never shown
    assert capsys.readouterr().out == "\n---------------\nAné\n"


def writing_forever(folder) -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "sample.py", f"--out_dir={folder}", "--forever"],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGINT between processes")
def test_forever_ends_with_ctrl_c_and_no_traceback(folder):
    process = writing_forever(folder)
    assert len(process.stdout.read(2000)) == 2000
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=30)
    assert process.returncode == 130
    assert err == ""


@pytest.mark.skipif(sys.platform == "win32", reason="a pipe of the shell")
def test_a_reader_who_has_read_enough_hears_no_complaint(folder):
    process = writing_forever(folder)
    process.stdout.read(100)
    process.stdout.close()
    assert process.stderr.read() == ""
    assert process.wait(timeout=30) != 0
