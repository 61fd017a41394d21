"""Weights & Biases and TensorBoard."""

import contextlib
import time
from unittest.mock import Mock

import pytest

from configurator import FolioError
from engine.metrics import MetricsLogger
from engine.trackers import check_trackers
from engine.train_config import TrainConfig
from tests.conftest import make_step


def log_two_steps(logger: MetricsLogger) -> None:
    with logger:
        make_step(logger, logger.state.step + 1)
        make_step(logger, logger.state.step + 1, val_loss=2.125)


def test_wandb_gets_every_row_and_the_settings(make_logger, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    logger = make_logger()
    logger.config.wandb_log, logger.config.wandb_run_name = True, "my run"
    log_two_steps(logger)
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    expected = (b"my run", b"shakespeare_char", b"train_loss", b"val_loss", b"2.125")
    deadline = time.monotonic() + 30  # wandb's own process writes the file
    while not all(text in file.read_bytes() for text in expected):  # uncompressed messages
        assert time.monotonic() < deadline, file.read_bytes()
        time.sleep(0.1)


def test_a_resumed_run_continues_its_run_on_wandb(make_logger, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    started, logged = [], []

    class FakeRun(contextlib.nullcontext):
        define_metric = Mock()

        def log(self, values):  # with step=, wandb would ignore steps that are repeated
            logged.append(values)

    monkeypatch.setattr(wandb, "init", lambda **settings: started.append(settings) or FakeRun())
    for _ in range(2):
        logger = make_logger()
        logger.config.wandb_log = True
        log_two_steps(logger)
    FakeRun.define_metric.assert_called_with("*", step_metric="step")
    assert [values["step"] for values in logged] == [1, 2, 1, 2]
    first, second = (settings["id"] for settings in started)
    assert first == second != ""
    assert [settings["resume"] for settings in started] == ["allow", "allow"]


def test_wandb_without_an_account_is_a_one_line_error(make_logger, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail(**_):
        raise wandb.errors.UsageError("No API key configured.\nmore")

    monkeypatch.setattr(wandb, "init", fail)
    logger = make_logger()
    logger.config.wandb_log = True
    with pytest.raises(FolioError, match=r"--wandb_log: No API key configured; .*WANDB_MODE"):
        log_two_steps(logger)


def test_wandb_without_an_account_is_refused_before_the_run_starts(monkeypatch):
    wandb = pytest.importorskip("wandb")

    def fail():
        raise wandb.errors.UsageError("No API key configured.")

    monkeypatch.setattr(wandb, "login", fail)
    with pytest.raises(FolioError, match=r"--wandb_log: No API key configured; .*WANDB_MODE"):
        check_trackers(TrainConfig(wandb_log=True))


def test_tensorboard_gets_every_row_and_hides_repeated_steps(make_logger, tmp_path):
    module = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for step, fails in ((0, False), (1, False), (1, True)):  # the next processes resume at step 1
        logger = make_logger(step)
        logger.config.tensorboard = True
        with logger if fails else contextlib.nullcontext():
            pass  # a process that fails before its first step hides nothing
        if not fails:
            log_two_steps(logger)
    events = module.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    steps = [(event.step, event.value) for event in events.Scalars("train_loss")]
    assert steps == [(1, 3.0), (2, 1.5), (3, 1.0)]
    assert [event.value for event in events.Scalars("val_loss")] == [2.125]


def test_a_failing_tracker_is_one_warning_and_training_continues(make_logger, capsys):
    def fail(*_):
        raise OSError("no space left")

    with make_logger() as logger:
        logger.trackers = [fail]
        make_step(logger, 1)
        make_step(logger, 2)
        assert [row["step"] for row in logger.rows] == [1, 2]
    assert capsys.readouterr().out.count("no space left") == 1


@pytest.mark.parametrize(
    ("setting", "package"), [("wandb_log", "wandb"), ("tensorboard", "tensorboard")]
)
def test_a_package_that_is_not_installed_is_a_one_line_error(monkeypatch, setting, package):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    config = TrainConfig()
    check_trackers(config)
    setattr(config, setting, True)
    with pytest.raises(FolioError, match=f"--{setting}: {package} is not installed; .*pip install"):
        check_trackers(config)
