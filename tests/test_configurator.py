"""Settings: names people can type, values that are checked, files that are read but never run."""

import json
from dataclasses import dataclass
from typing import ClassVar, Literal

import pytest

import train
from configurator import (
    Count, Fraction, NonNegative, SettingsError, Whole, as_json, configure, read_settings,
)  # fmt: skip
from tests.conftest import assert_one_line_error, run_script


@dataclass
class Config:
    # --- Shape ---
    n_layer: Count = 4  # blocks, at 100% of their size
    dropout: Fraction = 0.0  # share of activations zeroed
    learning_rate: NonNegative = 1e-3  # at its peak
    max_iters: Whole = 100  # updates
    # --- Text ---
    start: str = ""  # the text to go on from
    device: Literal["auto", "cpu", "cuda"] = "auto"  # where to compute
    compile: Literal["auto", True, False] = "auto"  # fuse operations
    bias: bool = True  # biases in linear layers

    instead: ClassVar = {"min_lr": "the rate falls to zero"}


@pytest.fixture
def config_file(tmp_path):
    def write(text: str | bytes, name: str = "some.py") -> str:
        path = tmp_path / name
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return str(path)

    return write


@pytest.mark.parametrize(
    ("flags", "name", "value"),
    [
        (["--learning_rate=1"], "learning_rate", 1.0),
        (["--dropout=0"], "dropout", 0.0),
        (["--start=a=b"], "start", "a=b"),
        (["--start=123"], "start", "123"),
        (["--start=-x"], "start", "-x"),
        (["--start="], "start", ""),
        (["--start", "two words"], "start", "two words"),
        (["--compile"], "compile", True),
        (["--no-compile"], "compile", False),
        (["--compile=False"], "compile", False),
        (["--compile", "auto"], "compile", "auto"),
        (["--bias", "false"], "bias", False),
        (["--n_layer", "7"], "n_layer", 7),
        (["--n_layer=2", "--n_layer=3"], "n_layer", 3),
    ],
)
def test_a_flag_means_what_it_seems_to_mean(flags, name, value):
    found = getattr(configure(Config, flags), name)
    assert found == value
    assert type(found) is type(value)


def test_flags_win_over_files_and_later_files_over_earlier_ones(config_file):
    first = config_file("n_layer = 5\ndropout = 0.5\nmax_iters = 7\n", "first.py")
    second = config_file("n_layer = 6\ndropout = 0.6\n", "second.py")
    config = configure(Config, [first, "--n_layer=9", second])
    assert (config.n_layer, config.dropout, config.max_iters) == (9, 0.6, 7)


def test_a_switch_before_a_file_does_not_swallow_it(config_file):
    config = configure(Config, ["--compile", config_file("n_layer = 5")])
    assert (config.compile, config.n_layer) == (True, 5)


def test_a_config_file_may_calculate_and_use_what_it_named_above(config_file):
    path = config_file(
        '"""A docstring."""\n# a comment\nmax_iters = 5 * 8\nn_layer = max_iters // 3'
    )
    config = configure(Config, [path])
    assert (config.max_iters, config.n_layer) == (40, 13)


@pytest.mark.parametrize(
    "flag",
    [
        "--n_layer=six", "--n_layer=1.5", "--n_layer=", "--n_layer=0", "--max_iters=-1",
        "--dropout=1.5", "--dropout=-0.1", "--learning_rate=nan", "--learning_rate=inf",
        "--learning_rate=-1", "--compile=7", "--compile=1", "--bias=yes", "--device=toaster",
        "--n_layer=" + "9" * 30, "--n_layer=" + "9" * 5000,
    ],
)  # fmt: skip
def test_a_value_that_does_not_fit_is_refused_by_name(flag):
    name = flag[2:].partition("=")[0]
    with pytest.raises(SettingsError, match=name) as caught:
        configure(Config, [flag])
    assert len(str(caught.value)) < 300


def test_an_unknown_flag_is_told_what_it_might_have_meant():
    with pytest.raises(SettingsError, match="did you mean n_layer"):
        configure(Config, ["--n_layers=3"])
    with pytest.raises(SettingsError, match="did you mean cuda"):
        configure(Config, ["--device=cuda:0"])


def test_a_flag_has_two_dashes():
    for word in ("-n_layer=3", "---n_layer=3"):
        with pytest.raises(SettingsError, match="two dashes, --n_layer"):
            configure(Config, [word])


def test_names_are_not_abbreviated():
    with pytest.raises(SettingsError, match="n_la"):
        configure(Config, ["--n_la=3"])


def test_an_unknown_name_in_a_file_is_told_with_its_line(config_file):
    path = config_file("n_layer = 3\nlearning_rat = 1\n")
    with pytest.raises(SettingsError, match=r"some\.py:2: .*did you mean learning_rate"):
        configure(Config, [path])


def test_a_setting_from_nanogpt_is_told_what_happens_instead(config_file):
    for argv in (["--min_lr=1e-4"], [config_file("min_lr = 1e-4")]):
        with pytest.raises(SettingsError, match="the rate falls to zero"):
            configure(Config, argv)


NOT_SETTINGS = {
    "a call": "n_layer = int(3)",
    "an import": "import os",
    "an import from": "from os import path",
    "an attribute": "start = ''.upper",
    "a subscript": "start = 'abc'[0]",
    "a comprehension": "n_layer = [i for i in (1, 2)]",
    "an f-string": "start = f'{1}'",
    "a shift": "n_layer = 1 << 2",
    "a power": "n_layer = 2 ** 2",
    "a text times a number": 'start = "a" * 10**9',
    "a text times a small number": 'start = "a" * 3',
    "a bare expression": "3",
    "a second docstring": '"""one"""\n"""two"""',
    "a syntax error": "n_layer = ",
    "a name of nowhere": "n_layer = six",
    "two names at once": "n_layer = max_iters = 3",
    "a condition": "if True:\n    n_layer = 3",
    "a function": "def f():\n    pass",
    "a division by zero": "dropout = 1 / 0",
    "a fraction for a whole number": "n_layer = 4 / 2",
    "a number for a switch": "bias = 1",
    "None": "n_layer = None",
    "bytes": "start = b'a'",
    "a complex number": "dropout = 1j",
    "a growing number": "n_layer = 9999999999 * 9999999999 * 9999999999",
    "a deep nest": "n_layer = " + "-" * 5000 + "1",
    "many parentheses": "n_layer = " + "(" * 500 + "1" + ")" * 500,
    "a NUL": "n_layer = 3\0",
}


@pytest.mark.parametrize("kind", NOT_SETTINGS)
def test_whatever_is_no_setting_is_refused_with_its_line(kind, config_file):
    with pytest.raises(SettingsError, match=r"some\.py:\d"):
        configure(Config, [config_file(NOT_SETTINGS[kind])])


def test_config_files_never_execute(config_file, tmp_path):
    marker = tmp_path / "marker"
    for line in (f"open({str(marker)!r}, 'w')", f"start = open({str(marker)!r}, 'w')"):
        with pytest.raises(SettingsError):
            configure(Config, [config_file(line)])
    assert not marker.exists()


def test_a_config_file_that_cannot_be_read_is_named(config_file, tmp_path):
    for path in (tmp_path / "nowhere.py", tmp_path, config_file(b"start = '\xff'")):
        with pytest.raises(SettingsError, match=str(path)):
            configure(Config, [str(path)])


def test_help_tells_meaning_and_default_of_every_setting(capsys):
    with pytest.raises(SystemExit) as left:
        configure(Config, ["--help"])
    assert left.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "blocks, at 100% of their size (default: 4)" in text
    assert "the text to go on from (default: '')" in text
    assert "Shape:" in text


def test_settings_survive_the_way_through_settings_json(tmp_path):
    config = configure(Config, ["--start=é\n", "--compile", "--learning_rate=0.1"])
    path = tmp_path / "settings.json"
    path.write_text(as_json(config), encoding="utf-8")
    assert configure(Config, [], base=read_settings(path)) == config
    assert configure(Config, ["--n_layer=9"], base=read_settings(path)).n_layer == 9


def test_damaged_settings_are_refused(tmp_path):
    path = tmp_path / "settings.json"
    for text in ("", "[1]", '{"n_layer": '):
        path.write_text(text)
        with pytest.raises(SettingsError, match=r"settings\.json"):
            read_settings(path)
    for wrong in ({"n_layer": "four"}, {"no_such": 1}):
        with pytest.raises(SettingsError, match="saved settings"):
            configure(Config, [], base=json.loads(json.dumps(wrong)))


def test_a_users_mistake_ends_in_one_line_and_status_2(call):
    assert_one_line_error(
        run_script("train.py", "--n_layr=3"), "--n_layr=3", "did you mean n_layer"
    )
    assert_one_line_error(call(train, "--n_embd=30", "--n_head=4"), "n_embd=30", "--n_embd=32")
    assert_one_line_error(call(train, "--dtype=int3"), "--dtype=int3")
    assert_one_line_error(call(train, "no/such.py"), "no/such.py")
    assert_one_line_error(call(train, "--lr_decay_iters=9"), "falls to zero")
