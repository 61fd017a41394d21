"""Fault injection: killed processes, full disks, damaged and hostile files, lost terminals.

A few repetitions of each; `pytest --nightly` makes many. Programs run in forks of one process that
has imported torch already: see tests/processes.py.
"""

import contextlib
import ctypes
import io
import json
import mmap
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

import sample
import train
from configurator import FolioError, run_main
from data.files import atomic_write
from engine import checkpoint, metrics
from engine.checkpoint import CHECKPOINT_FILE, WEIGHTS_FILE, load_checkpoint, load_model
from engine.log_file import parse_log
from engine.run_folder import SETTINGS_FILE, remove_temporary_files
from tests.conftest import assert_one_line_error, make_tiny_flags, prepare_tiny_dataset
from tests.processes import Job, redirect, run_train, start
from tests.test_train import assert_same_state, read_log, without_times

# Windows has other signals and limits.
resource = pytest.importorskip("resource")


def start_process(fn, *args) -> Job:
    return start((fn, tuple(map(str, args)), {}))


def run_process(fn, *args) -> SimpleNamespace:
    result = start_process(fn, *args).wait()
    return SimpleNamespace(
        returncode=result.exit_codes[0], stdout=result.stdout, stderr=result.stderr
    )


def wait_for(condition, job: Job, timeout: float = 60):
    """Wait until condition() is true; fails if the job ends before. Returns condition()."""
    deadline = time.monotonic() + timeout
    while not (value := condition()):
        assert job.processes[0].is_alive() and time.monotonic() < deadline, job.read("stderr")
        time.sleep(0.01)
    return value


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory) -> SimpleNamespace:
    """A run of four steps that all tests of this file copy: .folder and .dataset."""
    base = tmp_path_factory.mktemp("fault_tolerance")
    dataset = prepare_tiny_dataset(base / "dataset")
    flags = make_tiny_flags(dataset, base / "run")
    assert run_process(run_train, *flags, "--max_iters=4").returncode == 0
    return SimpleNamespace(folder=base / "run", dataset=dataset)


@pytest.fixture
def flags(finished_run, tmp_path) -> list[str]:
    """Flags for a training run of eight steps into tmp_path/run."""
    return make_tiny_flags(finished_run.dataset, tmp_path / "run")


@pytest.fixture
def trained(finished_run, tmp_path) -> Path:
    """A run folder, stopped after four of the eight steps of `flags`."""
    return shutil.copytree(finished_run.folder, tmp_path / "run")


# --- Killed processes ---


def save_until_killed(folder: str, n_hits: str, *flags: str) -> None:
    """Start train.py again and again, and kill it at random moments, mostly while it saves.

    All weights of step n have the value n. Prints a line of JSON for each kill: what was
    interrupted, and what the files contain afterwards.
    """
    rng, n_interrupted = random.Random(1), 0
    while n_interrupted < int(n_hits):
        phase = Phase()
        pid = os.fork()
        if pid == 0:
            train_with_phases(phase, flags)
        last_phase = rng.randrange(60)  # an evaluation has up to 20 phases
        while phase.count <= last_phase:
            assert os.waitpid(pid, os.WNOHANG) == (0, 0), "train.py ended by itself"
            time.sleep(0.001)
        time.sleep(0.005 * rng.random())
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        n_interrupted += phase.name != "training"
        print(json.dumps({"interrupted": phase.name, **contents_of(Path(folder))}), flush=True)


class Phase:
    """What train.py is doing, and how many phases it has begun, since the first training step.

    In memory that it shares with its parent process.
    """

    def __init__(self):
        self.memory = mmap.mmap(-1, 64)
        self.count, self.name = 0, ""

    def begin(self, name: str) -> None:
        self.name = name
        if self.count or name == "training":
            self.count += 1

    @property
    def count(self) -> int:
        return int.from_bytes(self.memory[:4], "little")

    @count.setter
    def count(self, count: int) -> None:
        self.memory[:4] = count.to_bytes(4, "little")

    @property
    def name(self) -> str:
        return self.memory[4:].decode().strip()

    @name.setter
    def name(self, name: str) -> None:
        self.memory[4:] = name.encode().ljust(60)


def train_with_phases(phase: Phase, flags: tuple[str, ...]) -> None:
    """train.py with trivial steps and evaluations, which says what it is doing."""

    def announce(name, function):
        def wrapped(*args, **kwargs):
            before = phase.name
            phase.begin(name)
            try:
                return function(*args, **kwargs)
            finally:
                phase.name = before

        return wrapped

    def train_step(model, optimizer, scaler, batches, config, step, device, dist):
        phase.begin("training")
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.fill_(step + 1)
        dist.shutdown.sync()
        return metrics.StepMetrics(1.0, 1.0, 1.0)

    def evaluate(model, *args):
        step = round(next(model.parameters()).flatten()[0].item())
        return loss_of(step), 1.0

    train.train_step, train.evaluate = train_step, evaluate
    train.MetricsLogger.plot = train.MetricsLogger.maybe_plot = lambda self: None
    torch.save = announce("saving resume.pt", torch.save)
    safetensors = checkpoint.safetensors.torch
    safetensors.save_file = announce("saving model.safetensors", safetensors.save_file)
    checkpoint.write_json = announce("saving config.json", checkpoint.write_json)
    metrics.append_row = announce("appending to log.csv", metrics.append_row)
    os.fsync = announce("fsync", os.fsync)
    os.replace = announce("rename", os.replace)
    run_train(*flags)


def loss_of(step: float) -> float:
    """Every third evaluation is the best so far."""
    return 1e9 - step // 3


def contents_of(folder: Path) -> dict:
    """What the weights and the checkpoint contain; temporary files that the next start leaves."""
    state, weights = load_checkpoint(folder), []
    if state["train_state"]["best_step"] >= 0 or (folder / WEIGHTS_FILE).exists():
        weights = [p.unique().tolist() for p in load_model(folder).parameters()]
    resumed = [tensor.unique().tolist() for tensor in state["model"].values()]
    remove_temporary_files(folder)
    return {
        **state["train_state"], "weights": weights, "resumed": resumed,
        "temporary": [path.name for path in folder.glob(".*")],
    }  # fmt: skip


def test_a_kill_while_saving_leaves_consistent_files(flags, tmp_path, n_trials):
    n_hits = n_trials(8, 100)
    flags = [
        *flags, "--n_embd=128", "--n_layer=3", "--init_from=auto", "--max_iters=1000000000",
        "--eval_interval=1", "--sample_tokens=0",
    ]  # fmt: skip
    killer = start_process(save_until_killed, tmp_path / "run", n_hits, *flags)
    result = killer.wait(timeout=n_trials(300, 1800))
    assert result.exit_codes == [0], result.stderr
    kills = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("{")]
    interrupted = Counter(kill["interrupted"] for kill in kills)
    print(interrupted)  # pytest -s shows it
    assert sum(interrupted.values()) - interrupted["training"] == n_hits
    for kill in kills:
        assert not kill["temporary"], kill
        if kill["step"] == 0:  # the weights are random
            continue
        assert all(values == [kill["step"]] for values in kill["resumed"]), kill
        if kill["best_step"] < 0:
            continue
        (weights,) = kill["weights"][0]  # the step that model.safetensors is from
        assert all(values == [weights] for values in kill["weights"]), kill
        # They have the best loss that resume.pt knows, or they are newer and even better.
        assert loss_of(weights) <= kill["best_val_loss"], kill
        assert weights <= kill["step"] + 1, kill
    assert kills[-1]["step"] > n_hits and kills[-1]["best_step"] > 0  # the run made progress
    if n_hits > 50:
        assert len(interrupted) >= 5


def test_a_run_that_is_killed_repeatedly_ends_like_an_undisturbed_one(flags, tmp_path, n_trials):
    n_kills = n_trials(1, 20)
    flags = [
        *flags, f"--max_iters={100 * n_kills + 100}", "--dropout=0.2", "--eval_interval=20",
        "--sample_tokens=0", "--init_from=auto",
    ]  # fmt: skip
    reference, killed = tmp_path / "run", tmp_path / "killed"
    assert run_process(run_train, *flags).returncode == 0
    rng = random.Random(0)
    for _ in range(n_kills):
        before = saved_at(killed)
        job = start_process(run_train, *flags, f"--out_dir={killed}")
        wait_for(lambda before=before: saved_at(killed) > before, job)
        time.sleep(rng.random() * 0.1)
        job.processes[0].kill()
        assert job.wait().exit_codes == [-signal.SIGKILL]  # it had not finished
    result = run_process(run_train, *flags, f"--out_dir={killed}")
    assert result.returncode == 0, result.stderr
    assert_same_state(load_checkpoint(reference), load_checkpoint(killed))
    assert without_times(read_log(reference)) == without_times(read_log(killed))
    assert_same_state(load_file(reference / WEIGHTS_FILE), load_file(killed / WEIGHTS_FILE))


def saved_at(folder: Path) -> int:
    """When resume.pt was written, in nanoseconds; 0 if there is none."""
    path = folder / CHECKPOINT_FILE
    return path.stat().st_mtime_ns if path.exists() else 0


def saved_step(folder: Path) -> int:
    return load_checkpoint(folder)["train_state"]["step"]


def test_a_file_is_flushed_before_it_is_renamed_and_the_folder_afterwards(tmp_path, monkeypatch):
    calls = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        names = [p.name for p in (tmp_path, *tmp_path.iterdir()) if p.stat().st_ino == inode]
        calls.append(f"fsync {names[0]}")
        real_fsync(descriptor)

    def replace(source, target):
        calls.append(f"rename {source.name} {target.name}")
        assert source.read_text() == "new"
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with atomic_write(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert calls == [
        f"fsync {temporary.name}", f"rename {temporary.name} file", f"fsync {tmp_path.name}",
    ]  # fmt: skip


# --- Signals and terminals ---


def train_with_a_slow_step(*flags: str) -> None:
    def train_step(*args):
        print("in the slow step", flush=True)
        time.sleep(60)

    train.train_step = train_step
    run_train(*flags)


def test_a_second_ctrl_c_exits_at_once(flags):
    job = start_process(train_with_a_slow_step, *flags)
    wait_for(lambda: "in the slow step" in job.read("stdout"), job)
    os.kill(job.processes[0].pid, signal.SIGINT)
    wait_for(lambda: job.read("stderr"), job)
    time.sleep(0.5)  # longer than GracefulShutdown.MIN_INTERVAL
    assert job.processes[0].is_alive()
    start_time = time.monotonic()
    os.kill(job.processes[0].pid, signal.SIGINT)
    result = job.wait(timeout=20)
    assert time.monotonic() - start_time < 10
    assert result.exit_codes == [130]
    first, second = result.stderr.split("\n\n")  # and no traceback
    assert "finishing this step" in first and "exiting without saving" in second


def train_on_a_terminal(terminal: str, *flags: str) -> None:
    descriptor = os.open(terminal, os.O_RDWR)
    for stream in ("stdin", "stdout", "stderr"):
        redirect(stream, descriptor)
    os.close(descriptor)
    run_train(*flags)


@pytest.fixture
def terminal():
    """A terminal of 80 columns; .read() returns everything that was printed on it."""
    import pty
    import select
    import termios

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 80))
    terminal = SimpleNamespace(name=os.ttyname(slave), master=master, slave=slave, output="")

    def read():
        while select.select([master], [], [], 0)[0]:
            terminal.output += os.read(master, 4096).decode(errors="replace")
        return terminal.output

    terminal.read = read
    yield terminal
    for descriptor in (master, slave):
        with contextlib.suppress(OSError):
            os.close(descriptor)


PROGRESS_BAR = "% |"


def visible(output: str) -> list[str]:
    """The lines that a terminal shows: "\\r" begins a line again, and "\\x1b[K" clears the rest of
    the line."""
    lines, row, column = [""], 0, 0
    for text in re.split(r"(\r|\n|\x1b\[K)", output):
        match text:
            case "\r":
                column = 0
            case "\n":
                row += 1
                lines += [""] * (row == len(lines))
            case "\x1b[K":
                lines[row] = lines[row][:column]
            case _:
                before, after = lines[row][:column].ljust(column), lines[row][column + len(text) :]
                lines[row], column = before + text + after, column + len(text)
    return [line.rstrip() for line in lines]


def test_a_stopped_run_leaves_no_progress_bar_on_the_terminal(flags, terminal):
    flags = [*flags, "--max_iters=100000", "--log_interval=5"]
    job = start_process(train_on_a_terminal, terminal.name, *flags)
    wait_for(lambda: "steps, loss" in terminal.read(), job)
    assert PROGRESS_BAR in terminal.read()
    os.kill(job.processes[0].pid, signal.SIGINT)
    while job.processes[0].is_alive():
        terminal.read()  # a full terminal would block the program
        time.sleep(0.01)
    assert job.wait().exit_codes == [130]
    lines = visible(terminal.read())
    assert not any(PROGRESS_BAR in line for line in lines)
    assert all(len(line) <= 80 or "/run" in line for line in lines), lines  # paths may be long
    last_lines = "\n".join(line for line in lines if line)[-1000:]
    assert "--init_from=resume" in last_lines


def train_on_a_terminal_of_its_own(terminal: str, *flags: str) -> None:
    import fcntl
    import termios

    os.setsid()
    # Closing the terminal then sends SIGHUP.
    fcntl.ioctl(os.open(terminal, os.O_RDWR), termios.TIOCSCTTY, 0)
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these tests may run under nohup
    try:
        train_on_a_terminal(terminal, *flags)
    except SystemExit as exit_:
        # What Python does at the end of a program: if its last flush of stdout and stderr fails,
        # the exit status is 120. The end of a process of multiprocessing ignores such a failure.
        ctypes.pythonapi.Py_Exit(exit_.code)


def test_closing_the_terminal_saves_and_exits(flags, terminal, tmp_path):
    flags = [*flags, "--max_iters=100000", "--eval_interval=100000"]
    job = start_process(train_on_a_terminal_of_its_own, terminal.name, *flags)
    try:
        wait_for(lambda: "steps, loss" in terminal.read(), job)
        os.close(terminal.slave)
        os.close(terminal.master)
    finally:
        result = job.wait(timeout=30)
    assert result.exit_codes == [128 + signal.SIGHUP]
    assert saved_step(tmp_path / "run") > 0


def train_into_a_broken_pipe(*flags: str) -> None:
    """As `python train.py | tee log` after Ctrl-C: tee is gone before train.py prints again."""
    reader, writer = os.pipe()
    redirect("stdout", writer)
    real_train_step = train.train_step

    def train_step(*args):
        with contextlib.suppress(OSError):
            os.close(reader)
            os.kill(os.getpid(), signal.SIGINT)
        return real_train_step(*args)

    train.train_step = train_step
    run_train(*flags)


def test_a_closed_pipe_behind_stdout_does_not_prevent_saving(flags, tmp_path):
    result = run_process(train_into_a_broken_pipe, *flags)
    assert result.returncode == 130, result.stderr
    assert "Traceback" not in result.stderr
    assert saved_step(tmp_path / "run") == 1


# --- Full disks ---


def train_with_a_file_size_limit(size: str, *flags: str) -> None:
    """No file can grow beyond `size` bytes, as if the disk were full."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    stderr, sys.stderr = sys.stderr, io.StringIO()  # the files that record output have room
    sys.stdout = io.StringIO()
    resource.setrlimit(resource.RLIMIT_FSIZE, (int(size), limits[1]))
    try:
        run_train(*flags)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        stderr.write(sys.stderr.getvalue())


@pytest.mark.parametrize("size", [300, 5_000, 40_000])
def test_a_full_disk_is_a_one_line_error_and_keeps_the_old_files(flags, trained, size):
    before = {name: (trained / name).read_bytes() for name in (CHECKPOINT_FILE, WEIGHTS_FILE)}
    assert len(before[CHECKPOINT_FILE]) > 60_000
    result = run_process(train_with_a_file_size_limit, size, *flags, "--init_from=resume")
    assert_one_line_error(result, str(trained), "File too large")
    assert (trained / CHECKPOINT_FILE).read_bytes() == before[CHECKPOINT_FILE]
    load_model(trained)  # the old weights or, if only resume.pt was too large, the new best ones
    assert size > 5_000 or (trained / WEIGHTS_FILE).read_bytes() == before[WEIGHTS_FILE]
    assert not list(trained.glob(".*"))


NO_NAMESPACES = 77  # exit status of the two programs below, where the system allows no namespaces


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system that only this process sees (Linux; see unshare(2) and mount(2))."""
    libc = ctypes.CDLL(None, use_errno=True)
    if not getattr(mount, "has_namespace", False):
        user, group = os.getuid(), os.getgid()
        if libc.unshare(0x10000000 | 0x00020000):  # CLONE_NEWUSER | CLONE_NEWNS
            os._exit(NO_NAMESPACES)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        mount.has_namespace = True
    arguments = (word.encode() for word in (source, target, kind))
    if libc.mount(*arguments, flags, options.encode()):
        os._exit(NO_NAMESPACES)


def train_on_a_small_disk(disk: str, folder: str, *flags: str) -> None:
    """Train in a copy of the folder on a disk with 40 KB left; copy it back afterwards."""
    used = sum(-(-path.stat().st_size // 4096) * 4096 for path in Path(folder).iterdir())
    mount("none", disk, "tmpfs", 0, f"size={used + 40 * 1024}")
    shutil.copytree(folder, f"{disk}/run")
    shutil.rmtree(folder)
    try:
        run_train(*flags, f"--out_dir={disk}/run")
    finally:
        shutil.copytree(f"{disk}/run", folder)


@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux's")
def test_a_disk_that_fills_up_is_a_one_line_error_and_keeps_the_old_files(flags, trained, tmp_path):
    before = (trained / CHECKPOINT_FILE).read_bytes()
    assert len(before) > 60_000  # a second one does not fit
    (tmp_path / "disk").mkdir()
    result = run_process(
        train_on_a_small_disk, tmp_path / "disk", trained, *flags, "--init_from=resume"
    )
    if result.returncode == NO_NAMESPACES:
        pytest.skip("this system allows no mount namespaces")
    assert_one_line_error(result, "No space left", str(tmp_path / "disk" / "run"))
    assert (trained / CHECKPOINT_FILE).read_bytes() == before
    assert not list(trained.glob(".*"))


def train_in_a_read_only_folder(folder: str, *flags: str) -> None:
    mount(folder, folder, "", 4096)  # MS_BIND
    mount(folder, folder, "", 4096 | 32 | 1)  # MS_BIND | MS_REMOUNT | MS_RDONLY
    run_train(*flags)


@pytest.mark.skipif(sys.platform != "linux", reason="mount namespaces are Linux's")
def test_a_read_only_folder_is_a_one_line_error_and_is_left_unchanged(flags, trained):
    before = {path.name: path.read_bytes() for path in trained.iterdir()}
    result = run_process(train_in_a_read_only_folder, trained, *flags, "--init_from=resume")
    if result.returncode == NO_NAMESPACES:
        pytest.skip("this system allows no mount namespaces")
    assert_one_line_error(result, "Read-only file system", str(trained))
    assert {path.name: path.read_bytes() for path in trained.iterdir()} == before


def sample_to_a_full_disk(*flags: str) -> None:
    redirect("stdout", os.open("/dev/full", os.O_WRONLY))
    sys.argv = ["sample.py", *flags]
    run_main(sample.main)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="/dev/full is Linux's")
def test_text_that_cannot_be_printed_is_a_one_line_error(trained):
    result = run_process(sample_to_a_full_disk, f"--out_dir={trained}")
    result.stderr = "".join(re.findall(r".*No space left.*\n", result.stderr)) or result.stderr
    assert_one_line_error(result, "No space left")


# --- Damaged and hostile files ---


def assert_refused(call, folder: Path, flags: list[str], name: str) -> None:
    """train.py or sample.py refuses the folder because of its file `name`, in one line."""
    if name == CHECKPOINT_FILE:
        assert_one_line_error(call(train, *flags, "--init_from=resume"), name)
        return
    result = call(sample, f"--out_dir={folder}")
    error = result.stderr.splitlines(keepends=True)[-1]  # above it: which run is sampled
    assert_one_line_error(SimpleNamespace(returncode=result.returncode, stderr=error), str(folder))
    assert "Traceback" not in result.stderr and "memory" not in result.stderr


@pytest.mark.parametrize("name", [CHECKPOINT_FILE, WEIGHTS_FILE])
def test_a_flipped_bit_is_noticed_or_changes_nothing(trained, name, n_trials):
    path = trained / name
    original = path.read_bytes()
    rng = random.Random(0)
    load = load_model if name == WEIGHTS_FILE else load_checkpoint
    expected = load(trained)
    n_noticed = 0
    for _ in range(n_trials(30, 1000)):
        damaged = bytearray(original)
        damaged[rng.randrange(len(original))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            loaded = load(trained)
        except FolioError as error:
            assert str(trained) in str(error)
            n_noticed += 1
        else:  # a bit without meaning, such as one of the dates and the padding in a zip file
            assert_same(loaded, expected)
    assert n_noticed > n_trials(10, 300)


def assert_same(left, right):
    if isinstance(left, torch.nn.Module):
        left, right = left.state_dict(), right.state_dict()
    assert_same_state(left, right)


@pytest.mark.parametrize("name", [CHECKPOINT_FILE, WEIGHTS_FILE, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("damage", ["empty", "half", "last byte", "html", "text", "zeros"])
def test_an_incomplete_file_is_a_one_line_error(trained, flags, call, name, damage):
    path = trained / name
    original = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": original[: len(original) // 2],
            "last byte": original.rstrip()[:-1],
            "html": b"<html><body>Please log in</body></html>",
            "text": b"to be, or not to be",
            "zeros": bytes(len(original)),
        }[damage]
    )
    assert_refused(call, trained, flags, name)


@pytest.fixture
def little_memory(trained):
    """This process can allocate 200 MB more, but not a gigabyte."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux says how much memory a process has, and limits it")
    (used,) = re.findall(r"VmData:\s+(\d+) kB", status.read_text())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(used) * 1024 + 200 * 2**20, before[1]))
    try:
        with pytest.raises(RuntimeError, match="memory"):
            torch.ones(2**27)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


class HostilePickle:
    """Creates the file `marker` when it is unpickled without protection."""

    def __init__(self, marker: Path):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def test_a_hostile_pickle_is_not_executed(trained, flags, call, tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(HostilePickle(marker)))
    assert marker.exists()  # it works
    marker.unlink()
    (trained / CHECKPOINT_FILE).write_bytes(pickle.dumps(HostilePickle(marker)))
    assert_refused(call, trained, flags, CHECKPOINT_FILE)
    torch.save({"model": HostilePickle(marker)}, trained / CHECKPOINT_FILE)  # valid checksums
    with zipfile.ZipFile(trained / CHECKPOINT_FILE) as archive:
        assert archive.testzip() is None
    assert_refused(call, trained, flags, CHECKPOINT_FILE)
    assert not marker.exists()


@pytest.mark.parametrize("key", ["model", "optimizer", "train_state", "dataset"])
@pytest.mark.parametrize("value", [None, 3, {"step": "x"}, [[]], "removed"], ids=str)
def test_a_malformed_checkpoint_is_a_one_line_error(trained, flags, call, key, value):
    state = load_checkpoint(trained)
    state[key] = value
    if value == "removed":
        del state[key]
    (trained / CHECKPOINT_FILE).unlink()  # the loaded tensors are still read from this file
    torch.save(state, trained / CHECKPOINT_FILE)
    result = call(train, *flags, "--init_from=resume")
    assert_one_line_error(result, CHECKPOINT_FILE if key != "dataset" else "dataset")


def test_running_means_of_another_shape_are_a_one_line_error(trained, flags, call):
    """torch's fused AdamW would read and write beyond the end of their memory."""
    for name in ("exp_avg", "step"):
        state = load_checkpoint(trained)
        values = state["optimizer"]["AdamW"]["state"][0]
        values[name] = torch.zeros(1, 1)
        checkpoint.save_checkpoint(trained, state)
        result = call(train, *flags, "--init_from=resume")
        assert_one_line_error(result, CHECKPOINT_FILE, f"{name} is [1, 1] instead of")


def test_an_edited_n_head_is_not_used(trained, call):
    path = trained / SETTINGS_FILE
    path.write_text(json.dumps({**json.loads(path.read_text()), "n_head": 4}))
    result = call(train, f"--out_dir={trained}", "--init_from=resume", "--max_iters=9")
    assert "settings.json has n_head = 4, but resume.pt 2, which is used" in result.stdout
    assert result.returncode == 0 and load_model(trained).config.n_head == 2
    assert json.loads(path.read_text())["n_head"] == 2


@pytest.mark.parametrize("settings", [None, 3, [[]], {"step": "x"}, {"n_head": "x"}], ids=str)
def test_malformed_settings_in_a_checkpoint_are_a_one_line_error(trained, call, settings):
    checkpoint.save_checkpoint(trained, {**load_checkpoint(trained), "settings": settings})
    assert_one_line_error(call(train, f"--out_dir={trained}", "--init_from=resume"), "settings")


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (None, {"data_offsets": [0, 10**9]}), (None, {"data_offsets": [4, 0]}),
        (None, {"shape": [10**6, 10**6]}), (None, {"dtype": "F99"}), (10**11, {}), (2, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_lying_header_is_refused_before_memory_is_allocated(
    trained, flags, call, little_memory, length, header
):
    original = (trained / WEIGHTS_FILE).read_bytes()
    (size,) = struct.unpack("<Q", original[:8])
    contents = json.loads(original[8 : 8 + size])
    contents["transformer.wte.weight"] |= header
    text = json.dumps(contents).encode()
    new_header = struct.pack("<Q", length or len(text)) + text
    (trained / WEIGHTS_FILE).write_bytes(new_header + original[8 + size :])
    assert_refused(call, trained, flags, WEIGHTS_FILE)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 2**23, "n_head": 1}, {"n_positions": 2**23}, {"vocab_size": 2**23},
        {"n_layer": 999, "n_embd": 2**16}, {"n_embd": 10**30}, {"n_layer": 10**6},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_sizes_are_refused_before_memory_is_allocated(
    trained, flags, call, little_memory, sizes
):
    path = trained / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    assert_refused(call, trained, flags, "config.json")


def test_a_truncated_log_is_repaired_when_the_run_is_resumed(trained, flags, call):
    log = trained / "log.csv"
    before = read_log(trained)
    log.write_bytes(log.read_bytes()[:-20] + b"\xff")
    assert call(train, *flags, "--init_from=resume", "--max_iters=12").returncode == 0
    rows = read_log(trained)
    assert rows[: len(before) - 1] == before[:-1]  # no number that was cut in two
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 12


def test_a_log_whose_last_line_has_no_end_loses_no_row(trained):
    """As some editors and spreadsheets save it."""
    log = trained / "log.csv"
    before = parse_log(log)
    assert len(before[0]) == 3 and before[1]
    log.write_bytes(log.read_bytes().rstrip())
    assert parse_log(log) == before


# --- Folders ---


def test_a_run_folder_that_is_in_use_is_left_alone(flags, tmp_path, call):
    folder = tmp_path / "run"
    other_flags = ("--max_iters=1000000", "--eval_interval=1000000")
    job = start_process(run_train, *flags, *other_flags)
    try:
        wait_for((folder / CHECKPOINT_FILE).exists, job)
        before = (folder / SETTINGS_FILE).read_bytes()
        for init_from in ("scratch", "resume", "auto"):
            result = call(train, *flags, "--seed=7", f"--init_from={init_from}")
            assert_one_line_error(result, "another process is training here")
        assert (folder / SETTINGS_FILE).read_bytes() == before
        assert [path.name for path in tmp_path.glob("run*")] == ["run"]
        assert job.processes[0].is_alive()
    finally:
        job.processes[0].kill()
        job.wait()


def train_while_the_folder_is_deleted(folder: str, *flags: str) -> None:
    real_train_step = train.train_step

    def train_step(*args):
        if args[5] == 2:  # the step
            shutil.rmtree(folder, ignore_errors=True)
        return real_train_step(*args)

    train.train_step = train_step
    run_train(*flags)


def test_a_folder_that_is_deleted_or_renamed_while_training_is_made_again(flags, tmp_path, call):
    folder = tmp_path / "run"
    result = run_process(train_while_the_folder_is_deleted, folder, *flags)
    assert result.returncode == 0, result.stderr
    assert f"{folder} was moved or deleted" in " ".join(result.stdout.split())
    assert load_checkpoint(folder)["train_state"]["step"] == 8
    assert [row["step"] for row in read_log(folder)][-1] == "8"
    assert call(train, *flags, "--init_from=resume", "--max_iters=10").returncode == 0


@pytest.mark.skipif(not Path("/proc").exists(), reason="/proc is Linux's")
def test_a_folder_that_cannot_be_created_is_a_one_line_error(flags, call):
    """Not even the administrator can create a folder in /proc."""
    assert_one_line_error(call(train, *flags, "--out_dir=/proc/run"), "/proc")


# --- Network ---


def test_training_and_sampling_use_no_network(flags, tmp_path, call, monkeypatch):
    attempts = []

    def forbid(name):
        def refuse(self, *address):
            attempts.append((name, address))
            raise AssertionError(f"{name}{address}")

        return refuse

    for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbid(name))
    monkeypatch.setattr(socket, "getaddrinfo", forbid("getaddrinfo"))
    assert call(train, *flags).returncode == 0
    assert call(sample, f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=5").returncode == 0
    assert attempts == []
    with pytest.raises(AssertionError, match="getaddrinfo"):  # an attempt would have been noticed
        socket.create_connection(("127.0.0.1", 9))
