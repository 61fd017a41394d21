"""sample.py: prompts, streaming, where samples end, and what a user may get wrong."""

import builtins
import io
import contextlib
import os
import signal
import sys
import time
from types import SimpleNamespace

import pytest
import torch

import sample
from configurator import FolioError, run_main
from data.prepare import encode_prompt
from data.tokenizer import BPETokenizer, CharTokenizer, save_tokenizer
from engine.checkpoint import save_model
from engine.inference import InferenceModel
from model import GPT, GPTConfig
from sample import print_samples, until_stop
from tests.conftest import ROOT, assert_one_line_error
from tests.processes import redirect, start

LETTERS = CharTokenizer.from_text("\nabcdefgh")
BYTES = BPETokenizer({bytes([i]): i for i in range(256)}, eos_token_id=256)


def save_run(folder, tokenizer):
    torch.manual_seed(0)
    config = GPTConfig(block_size=8, vocab_size=tokenizer.vocab_size, n_layer=1, n_head=1, n_embd=8)
    save_model(GPT(config), folder, tokenizer)
    save_tokenizer(tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_run(tmp_path_factory.mktemp("sample") / "run", LETTERS)


@pytest.fixture
def run_sample(call):
    """run_sample(folder, *flags): what sample.py prints."""
    return lambda folder, *flags: call(sample, f"--out_dir={folder}", "--device=cpu", *flags)


def scripted(monkeypatch, *rows: str, tokenizer=LETTERS) -> list[int]:
    """Let the model "generate" these rows, one character per step; returns the steps taken."""
    steps = []

    def generate(self, idx, max_new_tokens, **options):
        assert len(idx) == len(rows)
        for step, letters in enumerate(zip(*rows, strict=True), start=1):
            steps.append(step)
            yield torch.tensor([int(tokenizer.encode(letter)[0]) for letter in letters])

    monkeypatch.setattr(InferenceModel, "generate", generate)
    return steps


# --- What is printed ---


def test_a_sample_is_prompt_and_continuation_far_beyond_the_block_size(run_sample, folder):
    result = run_sample(folder, "--start=abc", "--max_new_tokens=50")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith("abc")
    assert len(result.stdout) == 3 + 50 + 1  # and the newline at the end
    assert set(result.stdout) <= set("\nabcdefgh")


def test_stderr_says_which_weights_are_used(run_sample, folder):
    result = run_sample(folder, "--max_new_tokens=1")
    assert result.stderr.split() == sample.describe_run(folder).split()
    assert folder.name in result.stderr


def test_the_line_about_the_weights_fits_the_terminal(monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    text = "out/" + 90 * "a" + ", step 100 of 20,000 (training has reached step 200), loss 2.1"
    assert sample.wrap(text).splitlines() == [
        "out/" + 90 * "a" + ",",
        "step 100 of 20,000 (training has reached step 200), loss 2.1",
    ]


def test_config_files_of_train_py_are_refused_with_the_way_to_their_run(call):
    result = call(sample, ROOT / "config" / "shakespeare_quick.py")
    assert_one_line_error(result, "max_iters", "to sample from a run: --out_dir=out/RUN")


def test_the_seed_decides_the_sample(run_sample, folder):
    texts = [run_sample(folder, "--max_new_tokens=40", f"--seed={s}").stdout for s in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_temperature_0_takes_the_likeliest_tokens(run_sample, folder):
    texts = [run_sample(folder, "--temperature=0", f"--seed={seed}").stdout for seed in (1, 2)]
    assert texts[0] == texts[1]


def test_several_samples_continue_one_prompt_differently(run_sample, folder):
    result = run_sample(folder, "--start=ab", "--num_samples=3", "--max_new_tokens=30")
    texts = result.stdout.removesuffix("\n").split("\n---------------\n")
    assert len(texts) == 3
    assert all(text.startswith("ab") and len(text) == 32 for text in texts)
    assert len(set(texts)) == 3


def test_dtype_is_that_of_the_weights(run_sample, folder, monkeypatch):
    dtypes, generate = [], InferenceModel.generate

    def record(self, *args, **options):
        dtypes.append(self.weights.wte.dtype)
        return generate(self, *args, **options)

    monkeypatch.setattr(InferenceModel, "generate", record)
    assert run_sample(folder, "--dtype=float64", "--max_new_tokens=1").returncode == 0
    assert dtypes == [torch.float64]


def test_text_is_printed_while_it_is_generated(capsys):
    printed = []

    def bytes_of_a_word():
        for token in "né".encode():
            yield token
            printed.append(capsys.readouterr().out)

    print_samples("A", [BYTES.decode_stream(bytes_of_a_word()), ["B"]])
    assert printed == ["An", "", "é"]  # the first byte of é alone is no character
    assert capsys.readouterr().out == "\n---------------\nAB\n"


def test_the_threads_adapt_to_other_programs_after_each_token(run_sample, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(sample.ThreadAdapter, "after_step", lambda self: calls.append(1))
    result = run_sample(folder, "--start=ab", "--max_new_tokens=20")
    assert len(calls) >= 20 and result.returncode == 0


def test_one_sample_from_a_small_model_uses_one_thread(run_sample, folder, monkeypatch):
    calls = []
    monkeypatch.setattr(sample, "use_one_thread", lambda: calls.append(1))
    run_sample(folder, "--start=ab", "--max_new_tokens=2", "--num_samples=2")
    assert calls == []
    run_sample(folder, "--start=ab", "--max_new_tokens=2")
    assert calls == [1]
    monkeypatch.setattr(sample, "is_small", lambda model: False)
    run_sample(folder, "--start=ab", "--max_new_tokens=2")
    assert calls == [1]


# --- The prompt ---


def test_the_prompt_may_be_a_file(run_sample, folder, tmp_path):
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("head")
    result = run_sample(folder, f"--start=FILE:{prompt}", "--max_new_tokens=3")
    assert result.stdout.startswith("head") and len(result.stdout) == 4 + 3 + 1
    assert_one_line_error(run_sample(folder, f"--start=FILE:{tmp_path}/none"), "none")
    prompt.write_text("")
    assert_one_line_error(run_sample(folder, f"--start=FILE:{prompt}"), "prompt.txt")


def test_line_ends_of_windows_become_newlines(tmp_path):
    (tmp_path / "prompt.txt").write_bytes(b"ab\r\ncd\r\n")
    assert encode_prompt(f"FILE:{tmp_path}/prompt.txt", LETTERS)[0] == "ab\ncd\n"
    assert encode_prompt("ab\r\ncd", LETTERS)[0] == "ab\ncd"


def test_backslash_n_is_a_newline():
    assert encode_prompt("a\\nb", LETTERS) == ("a\nb", [1, 0, 2])


def test_an_empty_prompt_is_the_token_that_starts_a_text():
    assert encode_prompt("", LETTERS) == ("", [0])  # the newline
    assert encode_prompt("", BYTES) == ("", [256])  # end-of-text
    assert encode_prompt("", CharTokenizer.from_text("xyz")) == ("", [0])


def test_end_of_text_in_a_prompt_is_the_token():
    assert encode_prompt("<|endoftext|>", BYTES)[1] == [256]
    assert encode_prompt("a<|endoftext|>b", BYTES)[1] == [97, 256, 98]
    with_end = CharTokenizer("\nab", add_eos=True)
    assert encode_prompt("ab<|endoftext|>", with_end)[1] == [1, 2, 3]
    assert len(BYTES.encode("<|endoftext|>")) == 13  # in other text it is no token
    with pytest.raises(FolioError, match="not in the vocabulary"):
        encode_prompt("a<|endoftext|>", CharTokenizer("\nab"))


def test_the_default_prompt_works_with_a_vocabulary_without_newline(run_sample, tmp_path):
    run = save_run(tmp_path / "run", CharTokenizer.from_text("abc"))
    result = run_sample(run, "--max_new_tokens=9")
    assert result.returncode == 0, result.stderr
    assert len(result.stdout) == 9 + 1


@pytest.mark.parametrize(("is_terminal", "separator"), [(True, ""), (False, "---------------\n")])
def test_interactive_reads_prompts_until_the_end_of_input(
    run_sample, folder, monkeypatch, is_terminal, separator
):
    lines = iter(["ab", "xyz", "cd\\n"])

    def read_line(prompt):
        assert prompt == ("prompt: " if is_terminal else "")
        for line in lines:
            return line
        raise EOFError

    monkeypatch.setattr(builtins, "input", read_line)
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: is_terminal))
    result = run_sample(folder, "--interactive", "--max_new_tokens=4")
    assert result.returncode == 0, result.stderr
    first, second = result.stdout[:7], result.stdout[7:]
    assert first.startswith("ab") and first.endswith("\n")
    assert second.startswith(separator + "cd\n")
    # After Ctrl-D in a terminal, the next output begins on a new line.
    assert len(second) == len(separator) + 3 + 4 + 1 + is_terminal
    assert "'x'" in result.stderr and "Traceback" not in result.stderr  # the second prompt
    assert ("Ctrl-D" in result.stderr) == is_terminal


def test_a_prompt_that_is_not_utf8_is_refused_and_the_next_one_is_read(
    run_sample, folder, monkeypatch
):
    text = b"a\xff\n" + "é\n".encode() + b"ab\n"
    lines = io.TextIOWrapper(io.BytesIO(text), encoding="cp1252")  # as for a pipe on Windows
    monkeypatch.setattr(sys, "stdin", lines)
    result = run_sample(folder, "--interactive", "--max_new_tokens=2")
    assert result.returncode == 0 and "udcff" in result.stderr and "'é'" in result.stderr
    assert result.stdout.startswith("ab")


def test_interactive_without_standard_input_is_a_one_line_error(run_sample, folder, monkeypatch):
    monkeypatch.setattr(sys, "stdin", None)  # as Python does for `sample.py --interactive <&-`
    result = run_sample(folder, "--interactive")
    assert result.returncode == 2 and "standard input is closed" in result.stderr


# --- The end of a sample ---


@pytest.mark.parametrize(
    ("pieces", "expected"),
    [
        (["ab", "cd"], "abcd"),
        (["ab\n\ncd"], "ab"),
        (["ab\n", "\ncd"], "ab"),
        (["ab\n", "cd\n", "", "\n", "ef"], "ab\ncd"),
        (["ab\n"], "ab\n"),  # the beginning of the stop text, but no more
        (["\n\n"], ""),
        ([], ""),
    ],
)
def test_a_sample_ends_before_the_stop_text(pieces, expected):
    assert "".join(until_stop(pieces, "\n\n")) == expected


def test_stop_text_that_begins_like_itself():
    assert "".join(until_stop("aaab", "aab")) == "a"
    assert "".join(until_stop("abcabd", "abd")) == "abc"


def test_text_is_not_kept_back_longer_than_needed():
    assert list(until_stop(["a", "\n", "b", "\n"], "\n\n")) == ["a", "", "\nb", "", "\n"]
    assert list(until_stop(["a", "b"], ""))[:2] == ["a", "b"]


def test_generation_ends_when_all_samples_have_ended(run_sample, folder, monkeypatch):
    steps = scripted(monkeypatch, "ab\n\nccccc", "abcdef\n\nh")
    result = run_sample(folder, "--start=a", "--num_samples=2", "--stop=\\n\\n")
    assert result.stdout == "aab\n---------------\naabcdef\n"
    assert max(steps) == 8  # not 9


def test_a_sample_ends_at_end_of_text(run_sample, tmp_path, monkeypatch):
    run = save_run(tmp_path / "run", BYTES)
    stop_tokens = []

    def generate(self, idx, max_new_tokens, **options):
        stop_tokens.append(options["stop_tokens"])
        yield from (torch.tensor([i]) for i in (*b"one", 256, *b"two"))

    monkeypatch.setattr(InferenceModel, "generate", generate)
    assert run_sample(run, "--start=a ").stdout == "a one\n"
    assert run_sample(run, "--start=a ", "--forever").stdout == "a one<|endoftext|>two\n"
    assert stop_tokens == [(256,), ()]


def test_without_end_of_text_in_the_vocabulary_no_token_ends_a_sample(
    run_sample, folder, monkeypatch
):
    scripted(monkeypatch, "abcdefgh")
    assert run_sample(folder).stdout == "abcdefgh\n"


# --- Errors ---


def test_errors_are_one_line(run_sample, folder, tmp_path):
    assert_one_line_error(run_sample(folder, "--start=abz"), "prompt", "'z'")
    assert_one_line_error(run_sample(tmp_path / "nowhere"), "nowhere")
    assert_one_line_error(run_sample(tmp_path), str(tmp_path.name))
    assert_one_line_error(run_sample(folder, "--forever", "--num_samples=2"), "--forever")
    assert_one_line_error(run_sample(folder, "--forever", "--interactive"), "--forever")
    assert_one_line_error(run_sample(folder, "--forever", "--stop=b"), "--forever", "--stop")
    assert_one_line_error(run_sample(folder, "--interactive", "--start=a"), "--start")
    assert_one_line_error(run_sample(folder, "--temperature=-1"), "temperature")
    assert_one_line_error(run_sample(folder, "--num_samples=1000000000"), "from 1 to 1000")
    assert_one_line_error(run_sample(folder, "--num_samples=0"), "num_samples")
    assert_one_line_error(run_sample(folder, "--compile"), "compile", "CUDA")
    assert_one_line_error(run_sample(folder, "--init_from=gpt2"), "--out_dir", "give one of them")


def test_a_tokenizer_of_another_vocabulary_is_refused(run_sample, tmp_path):
    run = save_run(tmp_path / "run", LETTERS)
    save_tokenizer(CharTokenizer.from_text("abcdefghijklmn"), run)
    assert_one_line_error(run_sample(run, "--start=a"), "14", "9")


def test_nanogpts_name_for_the_weights_in_out_dir_is_accepted(run_sample, folder):
    assert run_sample(folder, "--init_from=resume").returncode == 0


# --- In a terminal ---


@pytest.mark.parametrize("is_terminal", [True, False])
def test_control_characters_are_not_sent_to_a_terminal(monkeypatch, is_terminal):
    output = io.StringIO()
    output.isatty = lambda: is_terminal
    monkeypatch.setattr(sys, "stdout", output)
    sample.print_samples("a\n", [["b\x1b", "c"]])
    assert output.getvalue() == ("a\nb�c\n" if is_terminal else "a\nb\x1bc\n")


def sample_forever(folder) -> None:
    sys.argv = ["sample.py", f"--out_dir={folder}", "--forever"]
    run_main(sample.main)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX signals")
def test_ctrl_c_ends_forever_without_a_traceback(folder):
    job = start((sample_forever, (folder,), {}))
    try:
        while len(job.read("stdout")) < 2000:
            assert job.processes[0].is_alive(), job.read("stderr")
            time.sleep(0.05)
        os.kill(job.processes[0].pid, signal.SIGINT)
    finally:
        result = job.wait(timeout=20)  # kills a process that does not end
    assert result.exit_codes == [130]
    assert result.stdout.endswith("\n")  # what the shell prints is on a new line
    assert result.stderr.split() == sample.describe_run(folder).split()


def sample_into_a_pipe(pipe, folder) -> None:
    redirect("stdout", os.open(pipe, os.O_WRONLY))
    sample_forever(folder)


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_closed_pipe_ends_forever_without_a_traceback(folder, tmp_path):
    """As in `python sample.py --forever | head -c 2000`."""
    os.mkfifo(tmp_path / "pipe")
    reader, n_bytes = os.open(tmp_path / "pipe", os.O_RDONLY | os.O_NONBLOCK), 0
    job = start((sample_into_a_pipe, (tmp_path / "pipe", folder), {}))
    try:
        while n_bytes < 2000:
            assert job.processes[0].is_alive(), job.read("stderr")
            with contextlib.suppress(BlockingIOError):  # nothing was printed since
                n_bytes += len(os.read(reader, 2000))
            time.sleep(0.01)
    finally:
        os.close(reader)
        result = job.wait(timeout=20)  # kills a process that does not end
    assert result.exit_codes == [141]
    assert result.stderr.split() == sample.describe_run(folder).split()


def test_a_standard_output_that_is_closed_from_the_start_is_no_traceback(folder, monkeypatch):
    monkeypatch.setattr(sys, "stdout", None)  # as Python does for `sample.py >&-`
    monkeypatch.setattr(sys, "argv", ["sample.py", f"--out_dir={folder}", "--max_new_tokens=9"])
    run_main(sample.main)
