"""configurator.py: flags, config files, validation, help texts, and the errors of users."""

import io
import json
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

import prepare_shakespeare
import train
from configurator import (
    FolioError, NonNegativeFloat, NonNegativeInt, PositiveInt, Probability, configure,
    did_you_mean, parse_inputs, parse_overrides, read_settings, run_main, settings_of, to_json,
)  # fmt: skip
from engine.train_config import TrainConfig
from tests.conftest import ROOT, assert_one_line_error, run_script
from tests.fuzzing import Count, fuzz_settings


@dataclass
class Config:
    # --- Shape ---
    n_layer: PositiveInt = 4  # blocks, at 100% of their size
    dropout: Probability = 0.0  # probability of zeroing an activation
    learning_rate: NonNegativeFloat = 1e-3  # peak learning rate
    max_iters: NonNegativeInt = 100  # optimizer steps
    # --- Text ---
    start: str = "# 1"  # the prompt
    out_dir: str = (
        "out/a_folder_with_a_long_name"  # the run folder
    )  # fmt: skip
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    compile: Literal["auto", True, False] = "auto"  # use torch.compile
    bias: bool = True  # use biases in linear layers

    replaced_settings: ClassVar[dict[str, str]] = {  # settings of other programs
        "min_lr": "the learning rate falls to zero",
        "lr_decay_iters": "the learning rate falls to zero",
        "eval_iters": "use --eval_tokens",
    }


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | bytes, name: str = "some.py") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


# --- Flags ---


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--dropout=0"], "dropout", 0.0),
        (["--start=a=b"], "start", "a=b"),
        (["--start=123"], "start", "123"),
        (["--start=-x"], "start", "-x"),
        (["--start=--"], "start", "--"),
        (["--start="], "start", ""),
        (["--start", "two words"], "start", "two words"),
        (["--start", "-x"], "start", "-x"),
        (["--compile"], "compile", True),
        (["--no-compile"], "compile", False),
        (["--compile=False"], "compile", False),
        (["--compile", "auto"], "compile", "auto"),
        (["--bias", "false"], "bias", False),
        (["--n_layer", "7"], "n_layer", 7),
        (["--n_layer=2", "--n_layer=3"], "n_layer", 3),
    ],
)
def test_flag_values_and_types(flags, name, value):
    result = getattr(configure(Config, flags), name)
    assert result == value
    assert type(result) is type(value)


def test_flags_override_files_and_later_files_override_earlier_ones(config_file):
    first = config_file("n_layer = 5\ndropout = 0.5\nmax_iters = 7\n", "first.py")
    second = config_file("n_layer = 6\ndropout = 0.6\n", "second.py")
    config = configure(Config, [first, "--n_layer=9", second])
    assert (config.n_layer, config.dropout, config.max_iters) == (9, 0.6, 7)


def test_a_switch_before_a_file_does_not_take_the_file_as_its_value(config_file):
    config = configure(Config, ["--compile", config_file("n_layer = 5")])
    assert (config.compile, config.n_layer) == (True, 5)


@pytest.mark.parametrize(
    "flag",
    [
        "--n_layer=six", "--n_layer=1.5", "--n_layer=", "--n_layer=0", "--max_iters=-1",
        "--dropout=1.5", "--dropout=-0.1", "--learning_rate=nan", "--learning_rate=inf",
        "--learning_rate=-1", "--compile=7", "--compile=1", "--bias=yes", "--device=toaster",
        "--n_layer=" + "9" * 30, "--n_layer=" + "9" * 5000, "--no-n_layer", "--n_layer",
        "--no-device",
    ],
)  # fmt: skip
def test_an_invalid_value_is_rejected_with_the_name_of_its_setting(flag):
    name = flag.removeprefix("--").removeprefix("no-").partition("=")[0]
    with pytest.raises(FolioError, match=f"--{name} ") as caught:
        configure(Config, [flag])
    assert len(str(caught.value)) < 300


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--n_layer=0"], "--n_layer must be an integer of at least 1, not 0"),
        (["--dropout=2"], "--dropout must be a number from 0 to 1, not 2.0"),
        (["--bias=yes"], "--bias must be True or False, not 'yes'"),
        (["--dropout=1e30"], "--dropout must be a number from 0 to 1, not 1e+30 (too large)"),
        (["--n_layer", "=", "3"], "--n_layer = ...: write --n_layer=... without spaces"),
        (["--n_layer", "--bias"], "--n_layer needs a value: --n_layer=..."),
        (["-n_layer=3"], "-n_layer=3: a flag begins with two dashes: --n_layer=3"),
        (["--start=a\0"], "--start must be a string without NUL or surrogates, not 'a\\x00'"),
        (["--start=\udcff"], "--start must be a string without NUL or surrogates, not '\\udcff'"),
        (["--n_layers=3"], "unknown setting: --n_layers (did you mean n_layer?)"),
        (["--n_la=3"], "unknown setting: --n_la (did you mean n_layer?)"),  # no abbreviations
        (["---n_layer=3"], "unknown setting: ---n_layer (did you mean n_layer?)"),
        (["--xyz"], "unknown setting: --xyz (--help lists all settings)"),
        (["--lr=3"], "unknown setting: --lr (did you mean learning_rate?)"),
        (["--prompt=a"], "unknown setting: --prompt (did you mean start?)"),
        (["--text=a"], "unknown setting: --text (did you mean start?)"),
        (["--config=a.py"], "unknown setting: --config (give the file alone: config/FILE.py)"),
        (["--min_lr=1e-4"], "unknown setting: --min_lr (the learning rate falls to zero)"),
    ],
)  # fmt: skip
def test_messages_about_flags(flags, message):
    with pytest.raises(FolioError) as caught:
        configure(Config, flags)
    assert str(caught.value) == message


def test_similar_and_equivalent_choices_are_suggested():
    with pytest.raises(FolioError, match=r"auto, cpu or cuda, not 'cuda:0'; did you mean cuda\?"):
        configure(Config, ["--device=cuda:0"])
    with pytest.raises(FolioError, match=r"did you mean cuda\?"):
        configure(Config, ["--device=gpu"])
    assert did_you_mean("gpu", ["cpu", "mps"]) == ""
    assert did_you_mean("resume", ["init_from"]) == "; did you mean init_from=resume?"
    assert did_you_mean("n_layers", ["n_layer", "n_head"]) == "; did you mean n_layer?"


# --- Config files ---


def test_a_config_file_may_calculate_and_use_names_assigned_above(config_file):
    path = config_file(
        '"""A docstring."""\n# a comment\nmax_iters = 5 * 8\nn_layer = max_iters // 3'
    )
    config = configure(Config, [path])
    assert (config.max_iters, config.n_layer) == (40, 13)


def test_an_unknown_name_in_a_file_is_reported_with_its_line(config_file):
    path = config_file("n_layer = 3\nlearning_rat = 1\n")
    with pytest.raises(FolioError, match=r"some\.py:2: unknown setting: learning_rat .did you"):
        configure(Config, [path])


def test_all_unknown_names_of_a_file_are_reported_in_one_error(config_file):
    path = config_file("min_lr = 1\nn_layer = 3\neval_iters = 9\nlr_decay_iters = 5\n")
    with pytest.raises(FolioError) as caught:
        configure(Config, [path])
    assert str(caught.value) == (
        f"{path}:1: unknown settings: min_lr, lr_decay_iters "
        "(the learning rate falls to zero); eval_iters (use --eval_tokens)"
    )


def test_a_config_file_of_nanogpt_gives_one_error_with_all_its_unknown_settings(config_file):
    """The settings of nanoGPT's config/train_shakespeare_char.py, with other values."""
    settings = {
        "out_dir": "out", "eval_interval": 5, "eval_iters": 5, "log_interval": 5,
        "always_save_checkpoint": False, "wandb_log": False, "wandb_project": "a",
        "wandb_run_name": "b", "dataset": "c", "gradient_accumulation_steps": 1, "batch_size": 5,
        "block_size": 5, "n_layer": 5, "n_head": 5, "n_embd": 5, "dropout": 0.5,
        "learning_rate": 5e-3, "max_iters": 5, "lr_decay_iters": 5, "min_lr": 5e-4, "beta2": 0.5,
        "warmup_iters": 5,
    }  # fmt: skip
    unknown = settings.keys() - settings_of(TrainConfig)
    assert unknown >= {"eval_iters", "always_save_checkpoint", "lr_decay_iters"}
    path = config_file("".join(f"{name} = {value!r}\n" for name, value in settings.items()))
    with pytest.raises(FolioError) as caught:
        configure(TrainConfig, [path])
    message = str(caught.value)
    assert message.startswith(f"{path}:3: unknown settings: ")
    assert {name for name in settings if re.search(rf"\b{name}\b", message)} >= unknown
    for name in unknown:
        assert TrainConfig.replaced_settings[name] in message


INVALID_LINES = {
    "a call": "n_layer = int(3)",
    "an import": "import os",
    "an import from": "from os import path",
    "an attribute": "start = ''.upper",
    "a subscript": "start = 'abc'[0]",
    "a comprehension": "n_layer = [i for i in (1, 2)]",
    "an f-string": "start = f'{1}'",
    "a shift": "n_layer = 1 << 2",
    "a power": "n_layer = 2 ** 2",
    "a string times a large number": 'start = "a" * 10**9',
    "a string times a small number": 'start = "a" * 3',
    "a sum of strings": 'start = "a" + "b"',
    "a bare expression": "3",
    "a second docstring": '"""one"""\n"""two"""',
    "a syntax error": "n_layer = ",
    "an undefined name": "n_layer = six",
    "two names at once": "n_layer = max_iters = 3",
    "a condition": "if True:\n    n_layer = 3",
    "a function": "def f():\n    pass",
    "a division by zero": "dropout = 1 / 0",
    "a float for an integer": "n_layer = 4 / 2",
    "a number for a switch": "bias = 1",
    "None": "n_layer = None",
    "bytes": "start = b'a'",
    "a complex number": "dropout = 1j",
    "a number that grows": "n_layer = 9999999999 * 9999999999 * 9999999999",
    "deep nesting": "n_layer = " + "-" * 5000 + "1",
    "many parentheses": "n_layer = " + "(" * 500 + "1" + ")" * 500,
    "a NUL": "n_layer = 3\0",
    "a NUL in a string": r"start = 'a\0'",
    "half a character": r"start = '\ud800'",
}


@pytest.mark.parametrize("kind", INVALID_LINES)
def test_a_line_that_is_no_setting_is_rejected_with_its_number(kind, config_file):
    with pytest.raises(FolioError, match=r"some\.py:\d"):
        configure(Config, [config_file(INVALID_LINES[kind])])


def test_arithmetic_on_strings_is_rejected_with_the_true_reason(config_file):
    with pytest.raises(FolioError, match=r"some\.py:1: \+ - \* / // are for numbers, not 'out'"):
        configure(Config, [config_file("start = 'out' + '/x'")])


def test_config_files_are_never_executed(config_file, tmp_path):
    marker = tmp_path / "marker"
    for line in (f"open({str(marker)!r}, 'w')", f"start = open({str(marker)!r}, 'w')"):
        with pytest.raises(FolioError):
            configure(Config, [config_file(line)])
    assert not marker.exists()


def test_an_unreadable_config_file_is_named(config_file, tmp_path):
    for path in (tmp_path / "missing.py", tmp_path, config_file(b"start = '\xff'")):
        with pytest.raises(FolioError, match=str(path)):
            configure(Config, [str(path)])


def test_config_files_are_found_from_the_working_directory_then_from_folio(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = "config/shakespeare_quick.py"
    assert configure(TrainConfig, [quick]).out_dir == "out/shakespeare_quick"
    Path("config").mkdir()
    Path(quick).write_text("out_dir = 'mine'\n")
    assert configure(TrainConfig, [quick]).out_dir == "mine"
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert configure(TrainConfig, [f"~/{quick}"]).out_dir == "mine"


@pytest.mark.parametrize(
    ("word", "advice"),
    [
        ("shakespeare_quick", "; did you mean config/shakespeare_quick.py?"),
        ("config/train_shakespeare_char.py", "; did you mean config/shakespeare_char.py?"),
        ("max_iters=5", "; a flag begins with two dashes: --max_iters=5"),
        ("zzz", "; see the folder config/"),
    ],
)
def test_a_missing_config_file_comes_with_advice(word, advice):
    with pytest.raises(FolioError) as caught:
        configure(TrainConfig, [word])
    assert str(caught.value) == f"there is no config file '{word}'{advice}"


def test_a_folder_in_the_place_of_a_config_file_is_taken_for_a_run(tmp_path):
    with pytest.raises(FolioError, match="a folder, not a config file; did you mean --out_dir="):
        parse_overrides(TrainConfig, [str(tmp_path)])


def test_a_prompt_without_its_flag_comes_with_advice():
    with pytest.raises(FolioError, match=r"a prompt is given by --start='to be'$"):
        configure(Config, ["to be"])


def test_a_text_in_the_place_of_a_config_file_comes_with_advice():
    text = str(ROOT / "data" / "replacement.txt")
    for cls, advice in (
        (TrainConfig, f"python -m data.prepare_text {text} --dataset=NAME"),
        (Config, f"--start=FILE:{text}"),
        (prepare_shakespeare.PrepareConfig, f"--input_file={text}"),
    ):
        with pytest.raises(FolioError, match="a text, not a config file") as caught:
            configure(cls, [text])
        assert str(caught.value).endswith(f"try {advice}")


# --- Other entry points ---


def test_parse_overrides_returns_only_what_was_given(config_file):
    argv = [config_file("n_layer = 5\ndropout = 0"), "--n_layer=4"]
    assert parse_overrides(Config, argv) == {"n_layer": 4, "dropout": 0.0}


def test_parse_inputs_takes_positional_arguments_as_inputs():
    files, config = parse_inputs(Config, ["a.txt", "--n_layer=5", "b c.txt"])
    assert files == [Path("a.txt"), Path("b c.txt")]
    assert config == Config(n_layer=5)
    assert parse_inputs(Config, []) == ([], Config())
    assert parse_inputs(Config, ["~/a.txt"])[0] == [Path.home() / "a.txt"]


def test_settings_survive_a_round_trip_through_json(tmp_path):
    config = configure(Config, ["--start=é\n", "--compile", "--learning_rate=0.1"])
    path = tmp_path / "settings.json"
    path.write_text(to_json(config), encoding="utf-8")
    assert configure(Config, [], defaults=read_settings(path)) == config
    assert configure(Config, ["--n_layer=9"], defaults=read_settings(str(path))).n_layer == 9


def test_damaged_settings_are_rejected(tmp_path):
    path = tmp_path / "settings.json"
    for text in ("", "[1]", '{"n_layer": ', "[" * 10**5):
        path.write_text(text)
        with pytest.raises(FolioError, match=r"settings\.json"):
            read_settings(path)
    with pytest.raises(FolioError, match="missing"):
        read_settings(tmp_path / "missing.json")
    for wrong in ({"n_layer": "four"}, {"unknown_name": 1}):
        with pytest.raises(FolioError, match="saved settings"):
            configure(Config, [], defaults=json.loads(json.dumps(wrong)))


# --- Help ---


def test_help_shows_meaning_and_default_of_every_setting(capsys):
    with pytest.raises(SystemExit) as exit_:
        configure(Config, ["--help"])
    assert exit_.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "Shape: --n_layer INT blocks, at 100% of their size (default: 4)" in text
    assert "Text: --start STR the prompt (default: '# 1')" in text
    assert "--out_dir STR the run folder (default: 'out/a_folder_with_a_long_name')" in text
    assert "--compile {auto,True,False} use torch.compile (default: 'auto')" in text


@pytest.mark.parametrize("columns", [1, 20, 80, 200])
def test_help_of_train_py_fits_the_terminal_if_it_has_60_columns(capsys, monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    with pytest.raises(SystemExit):
        configure(TrainConfig, ["--help"])
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= min(max(columns, 60), 100)
    assert sum(line.startswith("  --") for line in lines) == len(settings_of(TrainConfig))


def test_every_setting_of_train_py_has_a_help_text_and_a_section():
    for setting in settings_of(TrainConfig).values():
        assert setting.help, setting.name
        assert setting.section != "Settings", setting.name


# --- Errors of programs ---


def make_program(error: BaseException) -> SimpleNamespace:
    """Something like a module whose main() raises the error."""

    def main():
        raise error

    return SimpleNamespace(__name__="program", main=main)


def test_an_error_of_the_user_is_one_line_and_status_2(call):
    result = call(make_program(FolioError("no such file:\n a.txt")))
    assert_one_line_error(result, "program.py: no such file: a.txt\n")


LONG_PATH, COMMAND = "/a/path/that/is/longer/than/forty/columns", "python train.py config/x.py"


@pytest.mark.parametrize(
    ("message", "lines"),
    [
        (
            f"{LONG_PATH}: no model was found here; train one: {COMMAND}",
            ["program.py:", f"{LONG_PATH}:", "no model was found here; train one:", COMMAND],
        ),
        (f"`{COMMAND}` comes first", ["program.py:", f"`{COMMAND}` comes", "first"]),
    ],
)
def test_on_a_terminal_an_error_is_wrapped_but_paths_and_commands_stay_whole(
    call, monkeypatch, message, lines
):
    monkeypatch.setenv("COLUMNS", "40")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    assert call(make_program(FolioError(message))).stderr.splitlines() == lines


def test_ctrl_c_exits_with_status_130(call):
    assert call(make_program(KeyboardInterrupt())).returncode == 130


@pytest.mark.parametrize("error", [OSError(2, "No such file", "ptxas"), RuntimeError("CUDA")])
def test_unexpected_errors_keep_their_traceback(call, error):
    with pytest.raises(type(error)):
        call(make_program(error))


@pytest.mark.parametrize("length", [10**6, 1])
def test_a_closed_stdout_ends_the_program_silently(length):
    code = f"from configurator import run_main\nrun_main(lambda: print('a' * {length}))"
    program = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()
    assert program.stderr.read() == b""
    program.stderr.close()
    assert program.wait(timeout=60) == 141


def test_run_main_works_with_and_without_stdout(capsys, monkeypatch):
    run_main(lambda: print("fine"))
    assert capsys.readouterr().out == "fine\n"
    monkeypatch.setattr(sys, "stdout", None)  # as after `python train.py >&-`
    run_main(lambda: print("fine"))


@pytest.mark.parametrize(
    ("is_terminal", "out", "err"),
    [(False, "日é".encode(), "日é".encode()), (True, b"?\xe9", b"\\u65e5\xe9")],
)
def test_files_and_pipes_get_utf8_whatever_the_encoding_of_the_terminal_is(
    monkeypatch, is_terminal, out, err
):
    """On Windows, a file or a pipe would have the encoding cp1252."""
    streams = {name: io.TextIOWrapper(io.BytesIO(), "cp1252") for name in ("stdout", "stderr")}
    for name, stream in streams.items():
        stream.isatty = lambda: is_terminal
        monkeypatch.setattr(sys, name, stream)
    run_main(lambda: [print("日é", end="", file=stream) for stream in streams.values()])
    assert [stream.buffer.getvalue() for stream in streams.values()] == [out, err]


def test_mistakes_in_the_settings_of_train_py_are_one_line(call):
    assert_one_line_error(run_script("train.py", "--n_layr=3"), "--n_layr (did you mean n_layer?)")
    assert_one_line_error(call(train, "--n_embd=30", "--n_head=4"), "n_embd=30", "--n_embd=32")
    assert_one_line_error(call(train, "--dtype=int3"), "--dtype must be", "'int3'")
    assert_one_line_error(call(train, "missing/file.py"), "missing/file.py")
    assert_one_line_error(call(train, "--lr_decay_iters=9"), "--lr_decay_iters", "max_iters")


# --- Random files and flags ---

NAMES = sorted(settings_of(TrainConfig))
values = st.one_of(
    st.integers(-10, 10**20), st.floats(), st.booleans(), st.text(max_size=20),
    st.sampled_from(["auto", "muon", "cpu", "gpt2", "float32", 1, 8, 0.5, True]),
)  # fmt: skip
likely_settings = st.one_of(
    st.tuples(st.sampled_from(["max_iters", "batch_size", "n_layer"]), st.integers(1, 99)),
    st.tuples(st.sampled_from(["learning_rate", "dropout"]), st.floats(0, 1)),
    st.tuples(st.sampled_from(NAMES), values),
)
CODE = (
    "open({0!r}, 'w')",
    "__import__('os').system('touch {0}')",
    "[x for x in (1,)]",
    "1 if 1 else 2",
)


def read_back(config: TrainConfig, path: Path) -> TrainConfig:
    """The same settings after writing and reading settings.json."""
    path.write_text(to_json(config), encoding="utf-8")
    return configure(TrainConfig, [], defaults=read_settings(path))


def test_any_config_file_is_accepted_or_refused_and_never_executed(tmp_path, n_trials):
    marker, file, count = tmp_path / "marker", tmp_path / "config.py", Count()
    code = st.sampled_from([line.format(str(marker)) for line in CODE])
    assignment = likely_settings.map(lambda pair: f"{pair[0]} = {pair[1]!r}")
    line = st.one_of(
        assignment,
        assignment,
        st.tuples(st.sampled_from(NAMES), code).map(lambda pair: f"{pair[0]} = {pair[1]}"),
        st.text(max_size=40),
    )

    @fuzz_settings(n_trials)
    @given(st.lists(line, max_size=3))
    def check(lines):
        file.write_text("\n".join(lines), encoding="utf-8", errors="surrogatepass")
        count.inputs += 1
        try:
            config = configure(TrainConfig, [str(file)])
        except FolioError as error:
            assert str(error)
        else:
            count.accepted += 1
            assert config == read_back(config, tmp_path / "settings.json")
        assert not marker.exists()

    check()
    assert count.fraction_accepted() > 0.1


def test_any_flags_are_accepted_or_refused(tmp_path, n_trials):
    count = Count()
    likely_flag = likely_settings.map(lambda pair: f"--{pair[0]}={pair[1]}")
    flag = st.one_of(
        likely_flag,
        likely_flag,
        st.sampled_from([f"--{name}" for name in NAMES] + ["--no-bias", "--compile", "-h1", "--"]),
        st.text(max_size=20).filter(lambda text: text not in ("-h", "--help")),
    )

    @fuzz_settings(n_trials)
    @given(st.lists(flag, max_size=3))
    def check(flags):
        count.inputs += 1
        try:
            config = configure(TrainConfig, flags)
        except FolioError as error:
            assert str(error)
        else:
            count.accepted += 1
            assert config == read_back(config, tmp_path / "settings.json")

    check()
    assert count.fraction_accepted() > 0.1
