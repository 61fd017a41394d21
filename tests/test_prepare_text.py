"""Your own text: documents, their split, the tokenizer, and the printed next command."""

import json
import runpy
import shlex
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers

import train
from configurator import run_main
from data import dataset as dataset_module
from data import documents, prepare_text
from data.dataset import open_dataset
from data.prepare import write_dataset
from data.prepare_text import join_pieces, sample_evenly, validation_cuts
from data.shakespeare import REPLACEMENT_TEXT
from data.tokenizer import CharTokenizer
from tests import processes
from tests.conftest import ROOT, TINY_TEXT, assert_one_line_error
from tests.hub_server import HubServer
from tests.test_tokenizer import toy_bpe

PLAY = REPLACEMENT_TEXT.read_text(encoding="utf-8")[:50_000]
END = "<|endoftext|>"


@pytest.fixture
def prepare(data_folder, call):
    """Run data.prepare_text with these arguments."""
    return lambda *args: call(prepare_text, *map(str, args))


def prepared_texts(dataset: str) -> dict[str, str]:
    """The text of each split, decoded."""
    opened = open_dataset(dataset, block_size=1)
    return {
        split: opened.tokenizer.decode(tokens.windows(np.array([0]), len(tokens))[0])
        for split, tokens in (("train", opened.train), ("val", opened.val))
    }


# --- Splits ---


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_the_end_of_a_single_document_is_for_validation(prepare, tmp_path, tokenizer):
    (tmp_path / "play.txt").write_text(PLAY)
    flags = ("--dataset=play", f"--tokenizer={tokenizer}", "--vocab_size=400")
    result = prepare(tmp_path / "play.txt", *flags)
    assert result.returncode == 0, result.stderr
    texts = prepared_texts("play")
    assert texts["train"] + texts["val"] == PLAY
    assert len(texts["train"]) == int(len(PLAY) * 0.9)


@pytest.mark.parametrize("tokenizer", ["char", "bpe"])
def test_every_tenth_of_many_documents_is_for_validation(prepare, tmp_path, tokenizer):
    documents = [f"{TINY_TEXT}number {i}" for i in range(20)]
    (tmp_path / "texts").mkdir()
    for i, text in enumerate(documents):
        (tmp_path / "texts" / f"{i:02}.txt").write_text(text)
    flags = ("--dataset=texts", f"--tokenizer={tokenizer}", "--vocab_size=300")
    result = prepare(tmp_path / "texts", *flags)
    assert result.returncode == 0, result.stderr
    assert "20 documents" in result.stdout
    texts = {split: text.split(END) for split, text in prepared_texts("texts").items()}
    assert texts["val"] == [documents[9], documents[19], ""]
    assert texts["train"] == [*documents[:9], *documents[10:19], ""]


@pytest.mark.parametrize(
    ("sizes", "cuts"),
    [
        ([10], [9]),
        ([1] * 20, [1] * 9 + [0] + [1] * 9 + [0]),
        ([9000, 1000, 10_000], [9000, 1000, 8000]),  # few documents: the last tenth of the text
        ([1000, 19_000], [1000, 17_000]),
        ([19_000, 1000], [18_000, 0]),
        ([1] * 9 + [991], [1] * 9 + [891]),  # the tenth document is nearly all of the text
        ([100] * 9 + [1] + [100] * 9 + [1], [100] * 9 + [1] + [100] * 7 + [20, 0, 0]),
    ],
)
def test_about_a_tenth_of_the_text_is_for_validation(sizes, cuts):
    assert validation_cuts(sizes, 0.1) == cuts


def test_a_cut_document_ends_in_the_validation_split(prepare, tmp_path):
    lines = [json.dumps({"text": text}) for text in ("abc" * 10, "de" * 10)]
    (tmp_path / "two.jsonl").write_text("\n".join(lines))
    assert prepare(tmp_path / "two.jsonl", "--dataset=two", "--val_fraction=0.2").returncode == 0
    assert prepared_texts("two") == {"train": "abc" * 10 + END + "de" * 5, "val": "de" * 5 + END}


@pytest.mark.parametrize(
    ("letters", "train", "val"),
    [
        ("abcdaedhf", "aa bb cc aa ee ff ", "dd hh "),  # the second d is in no split
        ("abcdefga", "aa bb cc ee ff gg aa ", "dd "),  # the eighth document is like the first
        ("abab", "aa b aa b", "b "),  # few documents: the last part of the text without copies
    ],
)
def test_equal_documents_are_never_in_both_splits(prepare, tmp_path, letters, train, val):
    """At --val_fraction=0.25, every fourth document is for validation."""
    lines = [json.dumps({"text": 2 * letter}) for letter in letters]
    (tmp_path / "a.jsonl").write_text("\n".join(lines))
    result = prepare(tmp_path / "a.jsonl", "--dataset=mine", "--val_fraction=0.25")
    assert result.returncode == 0, result.stderr
    words = f"equal to an earlier document: {len(letters) - len({*letters})} (no text is in both"
    assert words in result.stdout
    texts = {split: text.replace(END, " ") for split, text in prepared_texts("mine").items()}
    assert texts == {"train": train, "val": val}


def test_equal_documents_of_a_validation_file_are_counted_and_kept(prepare, tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "ab"}\n{"text": "cd"}')
    (tmp_path / "val.jsonl").write_text('{"text": "cd"}\n{"text": "ad"}')
    flags = (f"--val={tmp_path / 'val.jsonl'}", "--dataset=mine")
    result = prepare(tmp_path / "train.jsonl", *flags)
    assert "equal to an earlier document: 1 (all are kept, as --val is given)\n" in result.stdout
    assert prepared_texts("mine") == {"train": f"ab{END}cd{END}", "val": f"cd{END}ad{END}"}


def test_a_folder_with_a_copy_of_each_file_gives_each_text_once(prepare, tmp_path):
    (tmp_path / "texts").mkdir()
    for letter in "abcdefghij":
        for name in (f"{letter}.txt", f"{letter} (1).txt"):  # as a browser names a second download
            (tmp_path / "texts" / name).write_text(letter * 5)
    result = prepare(tmp_path / "texts", "--dataset=mine")
    assert "10 documents" in result.stdout
    train, val = (prepared_texts("mine")[split].split(END) for split in ("train", "val"))
    assert [*train, *val] == [*(letter * 5 for letter in "abcdefghi"), "", "j" * 5, ""]


def test_an_empty_document_leaves_no_end_of_text(prepare, tmp_path):
    lines = [json.dumps({"text": text}) for text in ("abcdefgh", "", "ij")]
    (tmp_path / "3.jsonl").write_text("\n".join(lines))
    assert prepare(tmp_path / "3.jsonl", "--dataset=three", "--val_fraction=0.5").returncode == 0
    assert prepared_texts("three") == {"train": "abcde", "val": f"fgh{END}ij{END}"}


def test_a_validation_file_can_be_given(prepare, tmp_path):
    (tmp_path / "train.txt").write_text("abc" * 10)
    (tmp_path / "val.txt").write_text("xyz" * 10)
    result = prepare(tmp_path / "train.txt", f"--val={tmp_path / 'val.txt'}", "--dataset=mine")
    assert result.returncode == 0, result.stderr
    assert prepared_texts("mine") == {"train": "abc" * 10, "val": "xyz" * 10}
    result = prepare(tmp_path / "train.txt", f"--val={tmp_path}", "--dataset=mine")
    assert_one_line_error(result, "--val=", "also given for training")
    (tmp_path / "copy.txt").write_text("abc" * 10)
    result = prepare(tmp_path / "train.txt", f"--val={tmp_path / 'copy.txt'}", "--dataset=mine")
    assert_one_line_error(result, "copy.txt is also given for training")


def test_documents_in_one_file_are_separated(prepare, tmp_path):
    (tmp_path / "a.txt").write_text("one two\n\nthree\n\n" + "four five six " * 3)
    flags = ("--document_separator=\\n\\n", "--dataset=mine", "--val_fraction=0.3")
    assert "3 documents" in prepare(tmp_path / "a.txt", *flags).stdout
    assert prepared_texts("mine")["train"].startswith(f"one two{END}three{END}four")


@pytest.mark.skipif(sys.platform == "win32", reason="needs POSIX")
def test_an_end_of_text_that_would_be_ordinary_text_is_told(prepare, tmp_path):
    path = tmp_path / "stories.txt"
    path.write_text(END.join([TINY_TEXT] * 4))
    text = " ".join(prepare(path, "--dataset=a").stdout.split())
    assert f"{END} occurs 3 times" in text and f"--document_separator='{END}'" in text
    assert "occurs" not in prepare(path, "--dataset=b", f"--document_separator={END}").stdout
    lines = tmp_path / "lines.jsonl"
    lines.write_text(json.dumps({"text": f"{TINY_TEXT}{END}"}) + "\n")
    output = prepare(lines, "--dataset=e").stdout
    assert f"{END} occurs 1 time," in output and "--document_separator" not in output
    note = "--document_separator=### divides no text into documents"
    assert note in prepare(path, "--dataset=c", "--document_separator=###").stdout
    assert "divides no" not in prepare(path, "--dataset=d", f"--document_separator={END}").stdout


# --- Tokenizers ---


def test_a_text_is_prepared_in_the_vocabulary_of_a_folder(prepare, tmp_path, data_folder):
    (tmp_path / "a.txt").write_text("lower low " * 50)
    write_dataset(tmp_path / "run", toy_bpe(), {"train": ["low low"], "val": ["low low"]}, {})
    result = prepare(tmp_path / "a.txt", "--dataset=mine", f"--tokenizer={tmp_path / 'run'}")
    assert result.returncode == 0, result.stderr
    assert open_dataset("mine", 8).tokenizer == toy_bpe()


def test_the_tokenizer_of_a_model_on_the_hub_is_used_by_name(
    prepare, tmp_path, data_folder, monkeypatch
):
    (tmp_path / "a.txt").write_text("lower low " * 50)
    model = {"tokenizer.json": toy_bpe().to_json().encode(), "model.safetensors": b"large"}
    model["config.json"] = b'{"model_type": "gpt2", "n_positions": 9}'
    with HubServer() as hub:
        hub.use(monkeypatch, tmp_path / "cache")
        hub.files["someone/My_GPT", "main"] = model
        result = prepare(tmp_path / "a.txt", "--dataset=mine", "--tokenizer=someone/My_GPT")
        assert result.returncode == 0, result.stderr
        assert {"--init_from=someone/My_GPT", "--block_size=9"} < {*next_command(result.stdout)}
        assert not any("safetensors" in path for path in hub.paths("GET"))
        unknown = prepare(tmp_path / "a.txt", "--dataset=mine", "--tokenizer=someone/else")
    assert open_dataset("mine", 8).tokenizer == toy_bpe()
    assert_one_line_error(unknown, "someone/else: not found on", "--tokenizer=FOLDER")


def test_documents_without_an_end_of_text_token_are_separated_by_newlines(prepare, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "low"}\n{"text": "lower low lower low"}\n')
    tokenizer = CharTokenizer("\n elorw")
    write_dataset(tmp_path / "run", tokenizer, {"train": ["low"], "val": ["low"]}, {})
    result = prepare(tmp_path / "a.jsonl", "--dataset=mine", f"--tokenizer={tmp_path / 'run'}")
    assert "newlines between documents: this vocabulary has no end-of-text" in result.stdout
    assert prepared_texts("mine")["train"].startswith("low\nlower")


def test_documents_are_encoded_whole_where_pieces_would_change_the_ids(
    prepare, tmp_path, data_folder, monkeypatch
):
    """A tokenizer by another program that merges across spaces: 'a b' is one token."""
    assert list(join_pieces(["a", "b", None, None, "c", "d"])) == ["ab", None, None, "cd"]
    vocab, merges = {"a": 0, "b": 1, " ": 2, " b": 3, "a b": 4}, [(" ", "b"), ("a", " b")]
    tokenizers.Tokenizer(tokenizers.models.BPE(vocab, merges)).save(
        str(tmp_path / "tokenizer.json")
    )
    monkeypatch.setattr(documents, "PIECE_BYTES", 4)
    (tmp_path / "a.txt").write_text("a b" * 20)
    flags = ("--dataset=mine", f"--tokenizer={tmp_path}", "--val_fraction=0.4")
    result = prepare(tmp_path / "a.txt", *flags)
    assert result.returncode == 0, result.stderr
    for name, tokens in (("train.bin", 12), ("val.bin", 8)):
        assert np.fromfile(data_folder / "mine" / name, "<u2").tolist() == [4] * tokens


@pytest.mark.parametrize(
    ("model", "flag"),
    [
        ({"model_type": "gpt2", "n_positions": 9}, "--init_from"),
        ({"model_type": "llama"}, "shakespeare_bpe"),
        ({"model_type": "gpt2", "n_positions": 9, "run": 1}, "--muon_learning_rate=2e-3"),
    ],
)
def test_the_next_command_finetunes_a_gpt2_and_no_other_model(prepare, tmp_path, model, flag):
    (tmp_path / "a.txt").write_text("lower low " * 50)
    (tmp_path / "tokenizer.json").write_text(toy_bpe().to_json(), encoding="utf-8")
    (tmp_path / "config.json").write_text(json.dumps(model))
    if "run" in model:
        (tmp_path / "settings.json").write_text("{}")
    result = prepare(tmp_path / "a.txt", "--dataset=mine", f"--tokenizer={tmp_path}")
    assert result.returncode == 0, result.stderr
    assert flag in result.stdout.partition("next:")[2]


def test_bpe_learns_the_same_from_a_text_and_from_its_lines(prepare, tmp_path, data_folder):
    """It learned from the first 100 documents only."""
    lines = PLAY.split("\n")
    (tmp_path / "play.txt").write_text(PLAY)
    (tmp_path / "play.jsonl").write_text("\n".join(json.dumps({"text": line}) for line in lines))
    tokens = {}
    for name in ("play.txt", "play.jsonl"):
        result = prepare(tmp_path / name, f"--dataset={name}", "--tokenizer=bpe")
        assert result.returncode == 0, result.stderr
        meta = json.loads((data_folder / name / "meta.json").read_text())
        tokens[name] = meta["train_tokens"] + meta["val_tokens"]
    tokens["play.jsonl"] -= len(lines)  # their end-of-text tokens
    assert tokens["play.jsonl"] < 1.02 * tokens["play.txt"]


@pytest.mark.parametrize("fraction", [0.05, 0.3, 1.0, 7.0])
def test_a_sample_is_spread_over_the_text(fraction):
    pieces = [f"{i:03}" * (1 + i % 3) for i in range(1000)]
    sample = list(sample_evenly(iter(pieces), fraction))
    size = sum(map(len, sample)) / sum(map(len, pieces))
    assert abs(size - min(fraction, 1)) < 0.01
    first_half = [piece for piece in sample if int(piece[:3]) < 500]
    assert 0.45 < len(first_half) / len(sample) < 0.55


# --- The same dataset again, and at the same time ---


def test_another_text_of_the_same_name_renames_the_first_dataset(prepare, tmp_path, data_folder):
    for name in ("first", "second"):
        (tmp_path / f"{name}.txt").write_text(TINY_TEXT * 9 + name)
        result = prepare(tmp_path / f"{name}.txt", "--dataset=mine")
    assert "mine.1" in result.stdout
    names = {path.name for path in data_folder.iterdir() if path.is_dir()}
    assert names == {"mine", "mine.1"}


def prepare_in_process(data_folder: Path, *args: str) -> None:
    dataset_module.DATA_DIR = data_folder
    sys.argv = ["prepare_text.py", *args]
    run_main(prepare_text.main)


def test_two_programs_that_prepare_the_same_dataset_do_not_mix_their_files(tmp_path, data_folder):
    paths = [tmp_path / f"{name}.txt" for name in ("a", "b", "c")]
    for path in paths:
        path.write_text(f"{PLAY[:5000]}{path.stem}" * (10 + ord(path.stem) % 10))
    calls = [(prepare_in_process, (data_folder, str(path), "--dataset=two"), {}) for path in paths]
    result = processes.start(*calls).wait()
    assert result.exit_codes == [0, 0, 0], result.stderr
    folders = [path for path in data_folder.iterdir() if path.is_dir()]
    assert {folder.name for folder in folders} == {"two", "two.1", "two.2"}
    for folder in folders:
        meta = json.loads((folder / "meta.json").read_text())
        assert (folder / "train.bin").stat().st_size == 2 * meta["train_tokens"]
        assert (folder / "val.bin").stat().st_size == 2 * meta["val_tokens"]


# --- Errors ---


def test_bad_input_is_one_line(prepare, tmp_path, data_folder):
    def refused(content: bytes, *flags: str):
        (tmp_path / "bad.txt").write_bytes(content)
        return prepare(tmp_path / "bad.txt", "--dataset=bad", *flags)

    assert_one_line_error(refused(b""), "no text")
    assert_one_line_error(refused(b"\x89PNG\xff\xfe"), "offset 0")
    assert_one_line_error(refused("UTF-16".encode("utf-16-le")), "contains NUL bytes")
    assert_one_line_error(refused(b"version https://git-lfs.github.com/spec/v1\n"), "git lfs pull")
    assert_one_line_error(refused(b"low low", "--tokenizer=bpe", "--vocab_size=99"), "257")
    assert_one_line_error(refused(b"low low", "--tokenizer=bpe", "--vocab_size=999"), "or less")
    assert_one_line_error(refused(b"low low", "--tokenizer=words"), "char, gpt2, bpe, or the fold")
    assert_one_line_error(refused(b"ab"), "too short")
    assert_one_line_error(prepare("--dataset=bad"), "which text?")
    assert_one_line_error(prepare("", "--dataset=bad"), "an argument is empty")
    assert_one_line_error(prepare(tmp_path / "bad.txt"), "--dataset=NAME is missing")
    assert_one_line_error(prepare(tmp_path / "bad.txt", "--dataset=x/y"), "--dataset=x/y")
    assert [path for path in data_folder.iterdir() if path.is_dir()] == []


# --- Commands ---


def next_command(stdout: str) -> list[str]:
    return shlex.split(stdout.partition("next:")[2])


@pytest.mark.parametrize(
    "text", ["a line of text\n" * 20, "no newline " * 200], ids=["short", "line"]
)
def test_the_printed_next_command_works(prepare, call, tmp_path, monkeypatch, text):
    """For a text shorter than the context of the config file, and for one without a newline."""
    (tmp_path / "a.txt").write_text(text)
    result = prepare(tmp_path / "a.txt", "--dataset=my text")
    _, program, *flags = next_command(result.stdout)
    assert program == "train.py"
    small = ["--n_layer=1", "--n_embd=16", "--max_iters=1", "--warmup_iters=0", "--device=cpu"]
    trained = call(train, *flags, f"--out_dir={tmp_path / 'run'}", *small)
    assert trained.returncode == 0, trained.stderr


def test_the_first_recipe_stops_when_it_overfits_a_small_text(prepare, call, tmp_path):
    """Letters at random: all that can be learned of them is the text itself."""
    text = "".join(np.random.default_rng(0).choice([*"abcdefgh\n"], size=600))
    (tmp_path / "a.txt").write_text(text)
    result = prepare(tmp_path / "a.txt", "--dataset=mine")
    small = ["--n_layer=1", "--n_embd=32", "--block_size=16", "--batch_size=16", "--device=cpu"]
    out_dir = f"--out_dir={tmp_path / 'run'}"
    evaluations = ["--eval_interval=20", "--sample_tokens=0"]
    trained = call(train, *next_command(result.stdout)[2:], *small, out_dir, *evaluations)
    assert trained.returncode == 0, trained.stderr
    assert "\nstopped " in trained.stdout and "overfitting" in trained.stdout
    rows = (tmp_path / "run" / "log.csv").read_text().splitlines()
    assert int(rows[-1].split(",")[0]) <= 200  # of 2,000 steps


@pytest.mark.parametrize("name", ["prepare_text", "prepare_fineweb", "prepare_openwebtext", "show"])
def test_a_program_can_be_started_as_a_file_from_another_folder(
    tmp_path, monkeypatch, capsys, name
):
    """As `python data/prepare_text.py` does it: sys.path begins with data/."""
    monkeypatch.chdir(tmp_path)
    paths = [path for path in sys.path if path and Path(path).resolve() != ROOT]
    monkeypatch.setattr(sys, "path", [str(ROOT / "data"), *paths])
    for module in list(sys.modules):
        if module.partition(".")[0] in ("data", "configurator"):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as exit_:
        runpy.run_path(str(ROOT / "data" / f"{name}.py"), run_name="__main__")
    assert exit_.value.code == 0
    assert f"usage: {name}.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "added"), [("a.txt", "more"), ("a.jsonl", '{"text": "more"}\n'), ("a.jsonl", "cut")]
)
def test_a_text_that_grows_while_it_is_read_is_refused(
    prepare, tmp_path, data_folder, monkeypatch, name, added
):
    (tmp_path / name).write_text('{"text": "one more"}\n' * 9)
    choose = prepare_text.choose_tokenizer

    def choose_and_add(*args):
        with open(tmp_path / name, "a") as file:
            file.write(added)
        return choose(*args)

    monkeypatch.setattr(prepare_text, "choose_tokenizer", choose_and_add)
    result = prepare(tmp_path / name, "--dataset=mine")
    assert_one_line_error(result, "a.jsonl:10: not" if added == "cut" else "the text has changed")


def test_a_text_that_is_rewritten_while_it_is_read_is_refused(
    prepare, tmp_path, data_folder, monkeypatch
):
    """With as many characters: training and validation split would be of two texts."""
    path, choose = tmp_path / "a.txt", prepare_text.choose_tokenizer
    path.write_text("abcdefghij" * 90)

    def choose_and_rewrite(*args):
        path.write_text("jihgfedcba" * 90)
        return choose(*args)

    monkeypatch.setattr(prepare_text, "choose_tokenizer", choose_and_rewrite)
    assert_one_line_error(prepare(path, "--dataset=mine"), "the text has changed")
