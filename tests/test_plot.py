"""Loss curves, and the comparison of runs."""

import ast
from pathlib import Path

import matplotlib
import matplotlib.figure
import pytest

from configurator import to_json
from engine import metrics, plot
from engine.checkpoint import save_model
from engine.log_file import COLUMNS, LogRow, write_log
from engine.plot import loss_range, plot_losses, run_results
from engine.train_config import TrainConfig
from model import GPT, GPTConfig
from tests.conftest import assert_one_line_error


def make_row(step: int, train_loss: float | None, val_loss: float | None = None) -> LogRow:
    values = {"tokens": step * 100, "seconds": step / 2, "bits_per_byte": val_loss}
    row = {"step": step, "train_loss": train_loss, "val_loss": val_loss, **values}
    return dict.fromkeys(COLUMNS) | row


# Falls fast, then slowly; the validation loss rises after step 20.
LOSSES = {10: 2.5, 20: 1.5, 30: 1.4, 40: 1.2}
ROWS = [
    make_row(0, None, 4.2),
    make_row(5, 3.5),
    *(make_row(step, loss, max(loss + 0.1, 1.6)) for step, loss in LOSSES.items()),
]
ROWS[-1]["val_loss"] = 1.9


@pytest.fixture
def axes(monkeypatch):
    """Axes of each picture that was saved."""
    saved, savefig = [], matplotlib.figure.Figure.savefig

    def record(figure, *args, **kwargs):
        savefig(figure, *args, **kwargs)
        saved.append(figure.axes[0])

    monkeypatch.setattr(matplotlib.figure.Figure, "savefig", record)
    return saved


def test_both_losses_are_plotted_with_the_best_marked(axes, tmp_path, recwarn):
    plot_losses({"run": ROWS}, tmp_path / "loss.png", "a title", x_max=50)
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    train, val, best = axes[0].lines
    assert list(train.get_xydata()[1]) == [10, 2.5]
    assert list(val.get_xdata()) == [0, 10, 20, 30, 40]
    assert list(best.get_xdata()) == [20, 20]  # a vertical line where overfitting begins
    assert axes[0].texts[0].get_text() == "1.600"
    assert axes[0].get_title() == "a title"
    assert axes[0].get_xlim()[1] > 50
    assert len(recwarn) == 0


def test_a_single_training_loss_is_a_point(axes, tmp_path):
    plot_losses({"run": [make_row(0, None, 4.2), make_row(5, 3.5)]}, tmp_path / "a.png")
    plot_losses({"run": ROWS}, tmp_path / "b.png")
    markers = [lines.lines[0].get_marker() for lines in axes]
    assert markers == [".", "None"]


def test_step_0_does_not_set_the_scale(axes, tmp_path):
    plot_losses({"run": ROWS}, tmp_path / "loss.png")
    low, high = axes[0].get_ylim()
    assert 1.0 < low < 1.2 and 2.6 < high < 3.0  # the losses from the evaluation at step 10 on


@pytest.mark.parametrize(
    ("rows", "expected"),
    [
        (ROWS[:1], (4.2, 4.2)),  # nothing but step 0
        (ROWS[:2], (3.5, 4.2)),  # not evaluated since
        (ROWS[:3], (2.5, 3.5)),  # one evaluation would be a single point
        ([make_row(1, float("nan"), float("inf"))], (0, 0)),
        ([make_row(1, 0.0, 0.0)], (0, 0)),
    ],
)
def test_the_loss_range_of_short_runs(rows, expected):
    low, high = loss_range([rows])
    assert low < expected[0] <= expected[1] < high
    assert high - low < 1.5


def test_the_range_of_finetuning_has_its_first_loss():
    rows = [make_row(step, None, loss) for step, loss in ((0, 2.5), (50, 2.1), (100, 2.0))]
    low, high = loss_range([rows])
    assert low < 2.0 and 2.5 < high < 2.6


def test_a_run_stopped_at_step_0_does_not_set_the_scale_of_others():
    assert loss_range([ROWS, ROWS[:1]]) == loss_range([ROWS])


def test_the_number_of_a_run_stopped_at_step_0_does_not_touch_the_axis(axes, tmp_path):
    plot_losses({"run": ROWS[:1]}, tmp_path / "loss.png", x_max=2000)
    number = axes[0].texts[0].get_window_extent()
    assert number.x0 > axes[0].get_window_extent().x0


def test_any_folder_name_can_be_a_title_and_a_label(tmp_path, recwarn):
    names = ["$\\bad$", "100%", "_run", "\udc80\udcff", "文"]  # \udc80: not UTF-8
    plot_losses(dict.fromkeys(names, ROWS), tmp_path / "loss.png", title=" ".join(names))
    assert (tmp_path / "loss.png").exists()
    assert len(recwarn) == 0


def test_the_settings_of_matplotlib_do_not_matter(tmp_path):
    plot_losses({"run": ROWS}, tmp_path / "a.png")
    user = {
        "text.usetex": True,  # LaTeX may not be installed
        "backend": "module://no_such_module",  # as MPLBACKEND=... of a notebook
        "savefig.format": "svg",
        "figure.dpi": 3,
    }
    with matplotlib.rc_context(user):
        plot_losses({"run": ROWS}, tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


@pytest.mark.parametrize("module", [plot, metrics])
def test_matplotlib_is_imported_only_for_plotting(module):
    """A broken installation of matplotlib must not prevent training."""
    top_level = ast.parse(Path(module.__file__).read_text(encoding="utf-8")).body
    imports = [
        ast.unparse(node) for node in top_level if isinstance(node, ast.Import | ast.ImportFrom)
    ]
    assert imports
    assert not any("matplotlib" in line for line in imports)


# --- python -m engine.plot ---


@pytest.fixture
def runs(tmp_path):
    for name, settings, rows in (
        ("a", {"optimizer": "muon"}, ROWS),
        ("b", {"optimizer": "adamw", "max_iters": 9}, ROWS[:3]),
    ):
        folder = tmp_path / name
        folder.mkdir()
        config = TrainConfig(out_dir=name, **settings)
        (folder / "settings.json").write_text(to_json(config))
        write_log(folder / "log.csv", rows)
    return tmp_path


def test_runs_are_compared_in_a_table_and_a_picture(runs, call, axes):
    picture = runs / "both.png"
    result = call(plot, str(runs / "a"), str(runs / "b"), f"--picture={picture}", "--x=seconds")
    assert result.returncode == 0, result.stderr
    assert result.stdout.splitlines() == [
        "                      a       b",
        "max_iters             2000    9",
        "optimizer             muon    adamw",
        "best validation loss  1.6000  2.6000",
        "its bits per byte     1.6000  2.6000",
        "its step              20      10",
        "logged steps          40      10",
        "tokens                4,000   1,000",
        "seconds               20.0    5.0",
        "",
        f"plotting {picture}",
    ]
    assert picture.exists()
    assert axes[0].get_xlabel() == "seconds"
    assert [text.get_text().strip() for text in axes[0].get_legend().get_texts()] == [
        "a: 1.600",
        "b: 2.600",
    ]


def test_all_runs_are_in_the_legend_and_look_different(axes, tmp_path):
    plot_losses({f"_{i}": ROWS for i in range(8)}, tmp_path / "x.png")
    labels = [text.get_text() for text in axes[0].get_legend().get_texts()]
    assert labels == [f" _{i}: 1.600" for i in range(8)]
    assert not axes[0].texts  # numbers in the picture would cover each other
    curves = [line for line in axes[0].get_lines() if line.get_label() in labels]
    assert len({(curve.get_color(), curve.get_linestyle()) for curve in curves}) == 8


def test_the_table_shows_that_two_runs_have_different_vocabularies(runs, call):
    for name, size in (("a", 65), ("b", 60)):
        save_model(GPT(GPTConfig(8, size, n_layer=1, n_head=1, n_embd=8)), runs / name)
    result = call(plot, str(runs / "a"), str(runs / "b"), f"--picture={runs / 'x.png'}")
    assert "vocabulary            65      60" in result.stdout.splitlines()


@pytest.mark.parametrize(
    ("eval_tokens", "advice"),
    [
        ((0, 0), "evaluated on the same text"),
        ((0, 2000), "the same text, and eval_tokens is 0 in all runs"),
    ],
)
def test_bits_per_byte_are_compared_on_all_of_the_text_only(eval_tokens, advice):
    runs = [
        plot.LoggedRun({"vocabulary": 60 + i, "eval_tokens": n}, [])
        for i, n in enumerate(eval_tokens)
    ]
    assert plot.comparability(runs).endswith(advice)


@pytest.mark.parametrize(("size", "checksum"), [(65, 1), (60, 2), (65, 2)])
def test_losses_on_different_texts_are_not_compared(runs, call, size, checksum):
    for name, numbers in (("a", (65, 1)), ("b", (size, checksum))):
        model = GPT(GPTConfig(8, numbers[0], n_layer=1, n_head=1, n_embd=8))
        save_model(model, runs / name, val_checksum=numbers[1])
    output = call(plot, str(runs / "a"), str(runs / "b"), f"--picture={runs / 'x.png'}").stdout
    assert ("evaluated on different tokens" in output) == ((size, checksum) == (65, 2))


def test_runs_that_do_not_fit_the_terminal_are_below_one_another(runs, call, monkeypatch):
    monkeypatch.setenv("COLUMNS", "36")  # 20 and 2 for the names, 6 and 2 and 6 for the runs
    folders = [str(runs / "a"), str(runs / "b"), f"--picture={runs / 'x.png'}"]
    assert call(plot, *folders).stdout.splitlines()[0].split() == ["a", "b"]
    log = str(runs / "a" / "log.csv")  # stands for its run
    assert call(plot, log, *folders[1:]).stdout == call(plot, *folders).stdout
    monkeypatch.setenv("COLUMNS", "35")
    lines = call(plot, *folders).stdout.splitlines()
    assert lines[0].split() == ["a"]
    assert lines[3:5] == ["best validation loss  1.6000", "its bits per byte     1.6000"]
    assert lines[9:11] == ["", "                      b"]
    assert lines[13] == "best validation loss  2.6000"
    assert max(map(len, lines[:-1])) <= 35


def test_untrained_weights_are_not_the_best_of_a_run():
    rows = [make_row(0, None, 2.0), make_row(10, 1.9, 2.5), make_row(20, 1.8, 2.4)]
    assert run_results(rows)["best validation loss"] == "2.4000"
    results = run_results(rows[:1])
    assert (results["best validation loss"], results["its step"]) == ("none yet", "")


def test_runs_of_equal_names_are_distinguished_by_their_paths(runs, call, monkeypatch):
    (runs / "more").mkdir()
    (runs / "b").rename(runs / "more" / "a")
    monkeypatch.chdir(runs)
    first_line = call(plot, "a", "more/a").stdout.splitlines()[0]
    assert first_line.split() == ["a", "more/a"]


def test_files_beside_the_runs_are_no_runs(runs, call, monkeypatch):
    """The second time, out/* contains the picture of the first time."""
    monkeypatch.chdir(runs)
    (runs / "losses.png").touch()
    result = call(plot, "a", "b", "losses.png", "--picture=losses.png")
    assert result.stdout.splitlines()[0].split() == ["a", "b"]
    assert_one_line_error(call(plot, "losses.png"), "which runs?")
    (runs / "notes.txt").touch()
    assert_one_line_error(call(plot, "a", "notes.txt"), "notes.txt: no such folder")


def test_the_picture_has_the_format_of_its_name(runs, call):
    for name, start in (("a.png", b"\x89PNG"), ("a.pdf", b"%PDF"), ("a.svg", b"<?xml")):
        assert call(plot, str(runs / "a"), f"--picture={runs / name}").returncode == 0
        assert (runs / name).read_bytes().startswith(start)
    assert_one_line_error(call(plot, str(runs / "a"), "--picture=a.jpg"), "must end in .png")


def test_folders_that_are_no_runs_are_named_and_left_out(runs, call, tmp_path):
    (tmp_path / "notes").mkdir()
    folders = [str(runs / "a"), str(tmp_path / "notes"), str(runs / "b")]
    result = call(plot, *folders, f"--picture={tmp_path / 'a.png'}")
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"left out: {tmp_path / 'notes'}: log.csv is missing")
    assert "best validation loss  1.6000  2.6000" in result.stdout


def test_a_folder_without_a_log_is_a_one_line_error(runs, call, tmp_path):
    assert_one_line_error(call(plot, str(tmp_path)), str(tmp_path), "log.csv")
    assert_one_line_error(call(plot, str(tmp_path / "none")), "none: no such folder")
    assert_one_line_error(call(plot), "python -m engine.plot out/shakespeare_char")
    assert_one_line_error(call(plot, str(runs / "a"), "--x=time"), "seconds")
