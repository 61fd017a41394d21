"""The run folder: how it is found, locked and prepared."""

import errno
import json
import os

import pytest

from configurator import FolioError
from engine import run_folder
from engine.checkpoint import WEIGHTS_FILE, save_model
from engine.log_file import COLUMNS, LOG_FILE
from engine.run_folder import (
    SETTINGS_FILE, describe_run, lock_run_folder, make_folder, move_old_run_aside, newest_run,
    remove_temporary_files, resolve_model_dir, resolve_out_dir,
)  # fmt: skip
from tests.test_checkpoint import random_model

RUN_SETTINGS = {"dataset": "x", "max_iters": 2000, "n_layer": 2, "init_from": "scratch"}


# --- Paths ---


def test_relative_out_dir_starts_at_the_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert resolve_out_dir("out/x") == run_folder.ROOT / "out" / "x"
    assert resolve_out_dir(tmp_path / "x") == tmp_path / "x"


@pytest.mark.parametrize("out_dir", ["", ".", "/", "a\0b", "~nosuchuser/x", "\ud800"], ids=repr)
def test_impossible_out_dir_is_refused(out_dir):
    with pytest.raises(FolioError):
        resolve_out_dir(out_dir)


def test_models_are_found_by_folder_or_by_name(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    monkeypatch.setattr(run_folder, "hub_model", lambda name: tmp_path / "hub" / name)
    (tmp_path / "out" / "shakespeare").mkdir(parents=True)
    (tmp_path / "out" / "shakespeare" / WEIGHTS_FILE).touch()
    assert resolve_model_dir("out/shakespeare") == tmp_path / "out" / "shakespeare"
    for name in ("gpt2", "gpt2-xl", "distilgpt2", "openai-community/gpt2", "owner/My_GPT.v2"):
        assert resolve_model_dir(name) == tmp_path / "hub" / name
    for source, message in (
        ("out/shakespere", "neither a folder.*did you mean out/shakespeare"),
        ("gpt3", "did you mean gpt2"),
        ("./gpt2", "neither a folder"),
        ("out", "out: a folder of models; name one of them, such as out/shakespeare"),
        (f"out/shakespeare/{WEIGHTS_FILE}", "a folder with a model in it is needed"),
    ):
        with pytest.raises(FolioError, match=message):
            resolve_model_dir(source)
    monkeypatch.setattr(run_folder, "ROOT", tmp_path / "fresh clone")
    with pytest.raises(FolioError, match="neither a folder"):
        resolve_model_dir("out/shakespeare")  # a run that does not exist yet, not owner and name


def test_a_model_is_looked_for_in_the_repository_then_here_then_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path / "repository")
    monkeypatch.setattr(run_folder, "hub_model", lambda name: tmp_path / "hub" / name)
    (tmp_path / "here" / "models" / "mine").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "here")
    assert resolve_model_dir("models/mine") == tmp_path / "here" / "models" / "mine"
    (tmp_path / "repository" / "models" / "mine").mkdir(parents=True)
    assert resolve_model_dir("models/mine") == tmp_path / "repository" / "models" / "mine"
    assert resolve_model_dir("owner/other") == tmp_path / "hub" / "owner" / "other"
    for name in ("owner/other", "gpt2"):
        with pytest.raises(FolioError, match=f"{name}: not a folder"):
            resolve_model_dir(name, on_hub=False)


def test_newest_run_is_the_one_whose_weights_were_saved_last(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    with pytest.raises(FolioError, match=r"python train\.py config/shakespeare_char\.py"):
        newest_run()
    for age, name in ((30, "old"), (10, "new"), (20, "middle")):
        folder = tmp_path / "out" / name
        folder.mkdir(parents=True)
        (folder / WEIGHTS_FILE).touch()
        os.utime(folder / WEIGHTS_FILE, (1e9 - age, 1e9 - age))
    assert newest_run().name == "new"


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a permission on Windows")
def test_only_files_of_weights_count_as_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(run_folder, "ROOT", tmp_path)
    (tmp_path / "out" / "folder" / WEIGHTS_FILE).mkdir(parents=True)
    (tmp_path / "out" / "link").mkdir()
    (tmp_path / "out" / "link" / WEIGHTS_FILE).symlink_to(tmp_path / "unmounted" / WEIGHTS_FILE)
    with pytest.raises(FolioError, match="no trained model"):
        newest_run()


def test_describe_run_gives_step_and_loss_and_whether_training_was_finished(tmp_path, monkeypatch):
    monkeypatch.setattr("data.files.ROOT", tmp_path)
    folder = tmp_path / "out" / "my_run"
    save_model(random_model(), folder)
    assert describe_run(str(folder)) == "out/my_run"
    save_model(random_model(), folder, step=1750, val_loss=-0.5)  # with another loss in model.py
    assert describe_run(folder) == "out/my_run, step 1,750, validation loss -0.5000"
    save_model(random_model(), folder, step=1750, val_loss=1.556)
    assert describe_run(folder) == "out/my_run, step 1,750, validation loss 1.5560"
    (folder / SETTINGS_FILE).write_text(json.dumps(RUN_SETTINGS))
    log_row = ",".join(["2000", "9000"] + ["1.5"] * (len(COLUMNS) - 2))
    (folder / LOG_FILE).write_text(f"{','.join(COLUMNS)}\n{log_row}\n")
    assert describe_run(folder) == "out/my_run, step 1,750 of 2,000, validation loss 1.5560"
    save_model(random_model(), folder, step=20)
    (folder / LOG_FILE).write_text(f"{','.join(COLUMNS)}\n{log_row.replace('2000', '20')}\n")
    assert describe_run(folder) == ("out/my_run, step 20 of 2,000, not evaluated")
    save_model(random_model(), folder, step=0)
    for source, expected in (("scratch", "its text is noise"), ("gpt2", "the weights of gpt2")):
        settings = json.dumps({**RUN_SETTINGS, "init_from": source})
        (folder / SETTINGS_FILE).write_text(settings)
        assert describe_run(folder).endswith(f", not trained yet: {expected}")
    assert describe_run(tmp_path / "nothing") == "nothing"


# --- Preparing the folder for a run ---


def prepare(folder):
    """As start_run_folder() does."""
    move_old_run_aside(str(folder))
    make_folder(folder)
    remove_temporary_files(str(folder))


def test_a_run_folder_is_locked_by_one_process_at_a_time(tmp_path):
    folder = tmp_path / "new" / "run"
    refused = pytest.raises(FolioError, match="another process")
    with lock_run_folder(str(folder)):
        prepare(folder)
        (folder / SETTINGS_FILE).write_text(json.dumps(RUN_SETTINGS))
        with refused, lock_run_folder(folder):
            pass
        prepare(folder)  # the old run is moved aside, the lock stays
        with refused, lock_run_folder(folder):
            pass
    with lock_run_folder(folder):
        pass


@pytest.mark.skipif(os.name == "nt", reason="fcntl is Unix's")
@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_disk_without_locks_is_named_and_used(tmp_path, capsys, monkeypatch, number):
    def flock(file, operation):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", flock)
    with lock_run_folder(tmp_path / "run"):
        output = " ".join(capsys.readouterr().out.split())  # without the ends of lines
        assert f"{tmp_path}: no file locks" in output
        assert not any(path.is_file() and path.stat().st_size for path in tmp_path.iterdir())


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a permission on Windows")
def test_symbolic_links_lead_to_the_lock_and_the_backup_of_the_real_folder(tmp_path):
    real, link = tmp_path / "real", tmp_path / "link"
    real.mkdir()
    (real / SETTINGS_FILE).write_text(json.dumps(RUN_SETTINGS))
    link.symlink_to(real)
    with (
        lock_run_folder(resolve_out_dir(real)),
        pytest.raises(FolioError, match="another process"),
        lock_run_folder(resolve_out_dir(link)),
    ):
        pass
    prepare(resolve_out_dir(link))
    assert link.is_symlink() and list(link.iterdir()) == []
    assert (tmp_path / "real.1" / SETTINGS_FILE).exists()


@pytest.mark.skipif(os.name == "nt", reason="symbolic links need a permission on Windows")
def test_the_lock_of_a_mount_point_is_inside(tmp_path, monkeypatch):
    """Two containers may mount one volume at different paths. A link stands for the second path."""
    (tmp_path / "volume").mkdir()
    (tmp_path / "elsewhere").symlink_to("volume")
    monkeypatch.setattr("os.path.ismount", lambda path: path.name in ("volume", "elsewhere"))
    with (
        lock_run_folder(tmp_path / "volume"),
        pytest.raises(FolioError, match="another process"),
        lock_run_folder(tmp_path / "elsewhere"),
    ):
        pass
    (tmp_path / "volume" / "lost+found").mkdir()
    prepare(tmp_path / "volume")  # empty, but for the lock and what Linux has put there
    (tmp_path / "volume" / SETTINGS_FILE).write_text(json.dumps(RUN_SETTINGS))
    with pytest.raises(FolioError, match=r"cannot be renamed; .*--out_dir=.*volume/run$"):
        prepare(tmp_path / "volume")
    assert not list(tmp_path.glob("volume.*"))


def test_an_old_run_is_moved_aside_and_other_files_are_never_moved(tmp_path, capsys):
    folder = tmp_path / "run"
    for n in (1, 2):
        folder.mkdir(exist_ok=True)
        (folder / SETTINGS_FILE).write_text(json.dumps({**RUN_SETTINGS, "max_iters": n}))
        prepare(folder)
        assert not (folder / SETTINGS_FILE).exists()
        backup = json.loads((tmp_path / f"run.{n}" / SETTINGS_FILE).read_text())
        assert backup["max_iters"] == n
        assert f"run.{n}" in capsys.readouterr().out
    for name, contents in (("diary.txt", "dear diary"), (SETTINGS_FILE, '{"editor.tabSize": 4}')):
        (folder / name).write_text(contents)
        with pytest.raises(FolioError, match=rf"not a run of Folio's \({name}\)"):
            prepare(folder)
        assert (folder / name).read_text() == contents
        (folder / name).unlink()


def test_a_folder_that_holds_another_run_is_not_moved_aside(tmp_path):
    """A process may train there: its lock would move with the folder."""
    for folder in (tmp_path / "run", tmp_path / "run" / "inside"):
        folder.mkdir()
        (folder / SETTINGS_FILE).write_text(json.dumps(RUN_SETTINGS))
    with pytest.raises(FolioError, match="holds the run inside"):
        prepare(tmp_path / "run")
    assert not (tmp_path / "run.1").exists()


def test_temporary_files_of_a_killed_run_are_removed_and_nothing_else(tmp_path):
    prepare(tmp_path / "run")
    snapshot = tmp_path / "run" / "step_000500"
    snapshot.mkdir()
    for folder in (tmp_path / "run", snapshot):
        for name in (".tmpAbCdEf", f".{WEIGHTS_FILE}.tmp", WEIGHTS_FILE, SETTINGS_FILE, ".notes"):
            (folder / name).write_text("half")
    remove_temporary_files(tmp_path / "run")
    kept = sorted([WEIGHTS_FILE, SETTINGS_FILE, ".notes"])
    assert sorted(path.name for path in snapshot.iterdir()) == kept
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == sorted([*kept, "step_000500"])


def test_a_run_killed_before_it_saved_its_settings_does_not_block_the_folder(tmp_path):
    (tmp_path / f".{SETTINGS_FILE}.tmp").write_text("{")
    prepare(tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_newest_run_has_evaluated_weights_if_there_are_any(tmp_path, monkeypatch):
    monkeypatch.setattr("engine.run_folder.ROOT", tmp_path)
    model = random_model()
    save_model(model, tmp_path / "out" / "stopped", step=3)
    assert newest_run() == tmp_path / "out" / "stopped"
    save_model(model, tmp_path / "out" / "finished", step=9, val_loss=1.5)
    os.utime(tmp_path / "out" / "finished" / "model.safetensors", (1e9, 1e9))  # older
    assert newest_run() == tmp_path / "out" / "finished"
