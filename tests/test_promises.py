"""Nothing is lost, nothing is run, nothing hangs: each promise, with the harm really done.

What is worth repeating is repeated a few times here, and many times with `pytest --nightly`.
"""

import json
import os
import pickle
import random
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
import zipfile
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import sample
import train
from configurator import FolioError
from data.files import replacing
from tests.conftest import ROOT, assert_one_line_error, run_script
from tests.test_train import assert_same_state, log_of, without_clock
from training.checkpoint import RESUME, SETTINGS, WEIGHTS, load_model, load_resume

# Not under Windows, which has other signals and other limits.
resource = pytest.importorskip("resource")


# --- Killed ---

# Saves checkpoints for ever in a child process and kills it at a random moment, again and again.
# What the child was doing then stands in memory that both share.
KILLER = """
import json, mmap, os, random, signal, sys, time
from pathlib import Path
import torch
torch.set_num_threads(1)
import train
from configurator import given_settings
from training import checkpoint, report
from training.run import restore
from training.world import World

folder, trials, flags = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3:]
phase = mmap.mmap(-1, 64)

def saying(name, function):
    def wrapped(*args, **kwargs):
        before, phase[:] = phase[:], name.encode().ljust(64)
        try:
            return function(*args, **kwargs)
        finally:
            phase[:] = before
    return wrapped

def save_for_ever(first):
    run = train.begin(train.TrainConfig, given_settings(train.TrainConfig, flags), World())
    train.move_in(run) if first else checkpoint.make_room(folder, continuing=True)
    if not first:
        restore(run, checkpoint.load_resume(folder))
    train.evaluate = lambda run: (-float(run.step // 3), 1.0)  # each third one is the best so far
    checkpoint.torch.save = saying("writing resume.pt", torch.save)
    checkpoint.safetensors.torch.save_file = saying(
        "writing model.safetensors", checkpoint.safetensors.torch.save_file)
    checkpoint.write_json = saying("writing json", checkpoint.write_json)
    report.append_row = saying("writing a row", report.append_row)
    os.fsync = saying("flushing", os.fsync)
    os.replace = saying("renaming", os.replace)
    log = report.Report(run)
    log.refresh_curve = saying("between", lambda: None)
    log.say = lambda text: None
    with log:
        while True:
            run.step += 1
            with torch.no_grad():
                for parameter in run.model.parameters():
                    parameter.fill_(run.step)
            phase[:] = b"between".ljust(64)
            train.evaluate_and_save(run, log)

dice, first, hits = random.Random(int(os.environ["DICE"])), True, 0
while hits < trials:
    phase[:] = b"starting".ljust(64)
    child = os.fork()
    if child == 0:
        save_for_ever(first)
    while phase[:8] == b"starting" or not (folder / "resume.pt").exists():
        time.sleep(0.001)
    time.sleep(dice.random() * 0.1)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    doing = phase[:].decode().strip()
    state = checkpoint.load_resume(folder)
    found = list(checkpoint.load_model(folder).parameters())
    weights = {int(p.view(-1)[0]) for p in found}
    whole = all(bool((p == p.view(-1)[0]).all()) for p in found)
    kept = {int(p.view(-1)[0]) for p in state["model"].values()}
    checkpoint.make_room(folder, continuing=True)
    stray = [p.name for p in folder.glob(".*")]
    print(json.dumps({
        "doing": doing, "step": state["step"], "best": state["best_val_loss"],
        "weights": sorted(weights), "whole": whole, "kept": sorted(kept), "stray": stray,
    }), flush=True)
    hits += doing not in ("between", "starting")
    first = False
"""


def test_a_kill_while_saving_leaves_files_that_are_whole_and_belong_together(
    tiny, tmp_path, trials
):
    wanted = trials(8, 100)
    folder = tmp_path / "run"
    flags = [*tiny, "--n_embd=128", "--n_layer=3", "--init_from=scratch"]
    killer = run_script("-c", KILLER, folder, wanted, *flags, DICE="1")
    assert killer.returncode == 0, killer.stderr
    kills = [json.loads(line) for line in killer.stdout.splitlines() if line.startswith("{")]
    hits = [kill for kill in kills if kill["doing"] not in ("between", "starting")]
    assert len(hits) == wanted
    for kill in kills:
        (weights,), (kept,) = kill["weights"], kill["kept"]
        assert kill["whole"] and kill["step"] == kept, kill
        # The weights of the best loss on record are there, or newer ones that are better still.
        assert -(weights // 3) <= kill["best"], kill
        assert weights <= kept + 1, kill
        assert not kill["stray"], kill
    print(Counter(kill["doing"] for kill in kills))  # pytest -s shows what they hit
    if wanted > 50:  # every phase was hit
        assert len({kill["doing"] for kill in hits}) >= 4


def test_a_run_that_is_killed_again_and_again_ends_as_if_it_had_not_been(tiny, tmp_path, trials):
    kills = trials(1, 20)
    flags = [
        *tiny, f"--max_iters={150 * kills + 150}", "--dropout=0.2", "--eval_interval=20",
        "--sample_tokens=0", "--init_from=auto",
    ]  # fmt: skip
    whole, hurt = tmp_path / "run", tmp_path / "hurt"
    assert run_script("train.py", *flags).returncode == 0
    dice = random.Random(0)
    for _ in range(kills):
        before = step_of(hurt)
        running = subprocess.Popen(
            [sys.executable, "train.py", *flags, f"--out_dir={hurt}"],
            cwd=ROOT, stdout=subprocess.DEVNULL,
        )  # fmt: skip
        while step_of(hurt) <= before:
            assert running.poll() is None
            time.sleep(0.01)
        time.sleep(dice.random() * 0.2)
        running.kill()
        assert running.wait() == -signal.SIGKILL  # it was still at work
    last = run_script("train.py", *flags, f"--out_dir={hurt}")
    assert last.returncode == 0, last.stderr
    assert_same_state(load_resume(whole), load_resume(hurt))
    assert without_clock(log_of(whole)) == without_clock(log_of(hurt))
    assert_same_state(load_file(whole / WEIGHTS), load_file(hurt / WEIGHTS))


def step_of(folder: Path) -> int:
    return load_resume(folder)["step"] if (folder / RESUME).exists() else -1


def test_a_file_is_flushed_before_it_takes_its_name_and_the_folder_after(tmp_path, monkeypatch):
    done = []
    real_fsync, real_replace = os.fsync, os.replace

    def fsync(descriptor):
        inode = os.fstat(descriptor).st_ino
        names = [p.name for p in (tmp_path, *tmp_path.iterdir()) if p.stat().st_ino == inode]
        done.append(f"flush {names[0]}")
        real_fsync(descriptor)

    def replace(source, target):
        done.append(f"rename {source.name} {target.name}")
        assert source.read_text() == "new"
        real_replace(source, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    with replacing(tmp_path / "file") as temporary:
        temporary.write_text("new")
    assert done == ["flush .file.tmp", "rename .file.tmp file", f"flush {tmp_path.name}"]


# --- Interrupted ---


def test_a_second_ctrl_c_leaves_at_once(tiny, tmp_path):
    """The first one waits for the end of the step, which here takes a minute."""
    script = (
        "import time, train\n"
        "def update(run, batches):\n"
        "    print('updating', flush=True)\n"
        "    time.sleep(60)\n"
        "train.update = update\n"
        "train.run_main(train.main)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", script, *tiny],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert "updating\n" in iter(running.stdout.readline, "")
    running.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert running.poll() is None
    asked = time.monotonic()
    running.send_signal(signal.SIGINT)
    _, complained = running.communicate(timeout=20)
    assert time.monotonic() - asked < 10
    assert running.returncode == 130
    assert complained == ""


def test_a_terminal_is_left_clean(tiny):
    """On a real terminal: the bar is wiped, and what is told after it has its own lines."""
    import pty
    import select
    import termios

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    running = subprocess.Popen(
        [sys.executable, "train.py", *tiny, "--max_iters=100000", "--log_interval=5"],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
    )  # fmt: skip
    os.close(slave)
    seen, deadline = "", time.monotonic() + 60
    try:
        while running.poll() is None or select.select([master], [], [], 0)[0]:
            assert time.monotonic() < deadline, seen[-500:]
            if select.select([master], [], [], 0.1)[0]:
                seen += os.read(master, 4096).decode(errors="replace")
            if "steps, " in seen and "^" not in seen:
                running.send_signal(signal.SIGINT)
                seen += "^"
    except OSError:  # the other end is closed
        pass
    finally:
        running.kill()
    assert running.wait() == 130
    lines = [on_screen(line) for line in seen.split("\n")]
    assert not any("%|" in line for line in lines)  # no bar has stayed
    told = [line for line in lines if line]
    assert told[-1] == "or       the same command with --init_from=resume, to go on"
    assert told[-4].startswith("stopped, and saved")


def test_a_terminal_that_closes_loses_nothing(tiny, tmp_path):
    import fcntl
    import pty
    import termios

    def on_a_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)
        signal.signal(signal.SIGHUP, signal.SIG_DFL)  # these lessons may themselves run in nohup

    master, slave = pty.openpty()
    termios.tcsetwinsize(slave, (24, 100))
    running = subprocess.Popen(
        [sys.executable, "train.py", *tiny, "--max_iters=100000", "--eval_interval=100000"],
        cwd=ROOT, stdin=slave, stdout=slave, stderr=slave, start_new_session=True,
        preexec_fn=on_a_terminal,
    )  # fmt: skip
    os.close(slave)
    try:
        seen, deadline = "", time.monotonic() + 60
        while "steps, " not in seen:
            assert time.monotonic() < deadline, seen[-500:]
            seen += os.read(master, 4096).decode(errors="replace")
        os.close(master)
        assert running.wait(timeout=30) == 129  # 128 + SIGHUP
    finally:
        running.kill()
    assert load_resume(tmp_path / "run")["step"] > 0


def on_screen(line: str) -> str:
    """What a terminal shows of a line in which carriage returns overwrite: 'abc\\rX' -> 'Xbc'."""
    shown = ""
    for piece in line.replace("\x1b[A", "").split("\r"):
        shown = piece + shown[len(piece) :]
    return shown.rstrip()


# --- No room ---


def limited(size: int):
    """For Popen: no file may grow beyond `size` bytes, as on a disk that is full."""

    def limit():
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))

    return limit


@pytest.mark.parametrize("size", [300, 5_000, 40_000])
def test_a_full_disk_is_one_line_and_the_old_files_stay(tiny, tmp_path, call, size):
    assert call(train, *tiny, "--max_iters=4").returncode == 0
    folder = tmp_path / "run"
    before = {name: (folder / name).read_bytes() for name in (RESUME, WEIGHTS)}
    full = subprocess.run(
        [sys.executable, "train.py", *tiny, "--init_from=resume"],
        cwd=ROOT, capture_output=True, text=True, preexec_fn=limited(size),
    )  # fmt: skip
    assert_one_line_error(full, str(folder))
    assert (folder / RESUME).read_bytes() == before[RESUME]
    load_model(folder)  # what was there, or, where only they fit, the new best weights
    assert size > 5_000 or (folder / WEIGHTS).read_bytes() == before[WEIGHTS]
    assert not list(folder.glob(".*"))


# Whoever may make a namespace of his own may mount a small disk there, which nobody else sees.
ON_A_SMALL_DISK = """
disk=$1; after=$2; shift 2
size=$(($(du -sk "$after" | cut -f1) + 40))  # room for 40 KB more
mount -t tmpfs -o "size=${size}k" none "$disk" && cp -r "$after" "$disk/run" && rm -r "$after"
"$@"
status=$?
cp -r "$disk/run" "$after"
exit $status
"""
NAMESPACE = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", ON_A_SMALL_DISK, "sh"]


def test_a_small_disk_that_fills_up_is_one_line_and_the_old_files_stay(tiny, tmp_path, call):
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE[:4], "true"]).returncode:
        pytest.skip("no namespaces here")
    folder, disk = tmp_path / "run", tmp_path / "disk"
    disk.mkdir()
    assert call(train, *tiny, "--max_iters=4").returncode == 0
    before = (folder / RESUME).read_bytes()
    assert len(before) > 60_000  # there will be no room for a second one
    resume = [sys.executable, "train.py", *tiny, "--init_from=resume", f"--out_dir={disk / 'run'}"]
    full = subprocess.run(
        [*NAMESPACE, disk, folder, *resume], cwd=ROOT, capture_output=True, text=True
    )
    assert_one_line_error(full, "No space left", str(disk / "run"))
    assert (folder / RESUME).read_bytes() == before
    assert not list(folder.glob(".*"))


def test_a_text_that_cannot_be_printed_is_one_line(tiny, tmp_path, call):
    assert call(train, *tiny).returncode == 0
    with open("/dev/full", "w") as full:
        result = subprocess.run(
            [sys.executable, "sample.py", f"--out_dir={tmp_path / 'run'}"],
            cwd=ROOT, stdout=full, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
    result.stdout = ""
    assert_one_line_error(result, "No space left")


# --- Damaged ---


@pytest.fixture
def trained(tiny, tmp_path, call):
    assert call(train, *tiny).returncode == 0
    return tmp_path / "run"


def refused(call, folder: Path, tiny: list[str], name: str) -> None:
    """train.py and sample.py refuse the folder for its file `name`, in one line each."""
    if name == RESUME:
        assert_one_line_error(call(train, *tiny, "--init_from=resume"), name)
        return
    result = call(sample, f"--out_dir={folder}")
    assert_one_line_error(result, str(folder))
    assert "memory" not in result.stderr


@pytest.mark.parametrize("name", [RESUME, WEIGHTS])
def test_a_flipped_bit_anywhere_is_noticed(trained, name, trials):
    path = trained / name
    good = path.read_bytes()
    dice = random.Random(0)
    load = load_model if name == WEIGHTS else load_resume
    noticed = 0
    for _ in range(trials(30, 1000)):
        place, bit = dice.randrange(len(good)), dice.randrange(8)
        damaged = bytearray(good)
        damaged[place] ^= 1 << bit
        path.write_bytes(damaged)
        try:
            again = load(trained)
        except FolioError as error:
            assert name in str(error) or str(trained) in str(error)
            noticed += 1
        else:  # a bit that carries nothing, such as a zip's dates and padding
            path.write_bytes(good)
            assert_same(again, load(trained))
    assert noticed > trials(10, 300)


def assert_same(left, right):
    if isinstance(left, dict):
        assert_same_state(left, right)
    else:
        for a, b in zip(left.parameters(), right.parameters(), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("name", [RESUME, WEIGHTS, "config.json", "tokenizer.json"])
@pytest.mark.parametrize("harm", ["empty", "half", "one short", "html", "text", "zeros"])
def test_a_file_that_is_not_whole_is_refused_in_one_line(trained, tiny, call, name, harm):
    path = trained / name
    good = path.read_bytes()
    path.write_bytes(
        {
            "empty": b"",
            "half": good[: len(good) // 2],
            "one short": good.rstrip()[:-1],
            "html": b"<html><body>Please log in</body></html>",
            "text": b"to be, or not to be",
            "zeros": bytes(len(good)),
        }[harm]
    )
    refused(call, trained, tiny, name)


@pytest.fixture
def little_memory(trained):
    """Lets this process allocate 200 MB more, and not a gigabyte."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("only Linux tells how much memory a process holds, and limits it")
    (held,) = re.findall(r"VmData:\s+(\d+) kB", status.read_text())
    before = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(held) * 1024 + 200 * 2**20, before[1]))
    try:
        with pytest.raises(RuntimeError, match="memory"):
            torch.ones(2**27)
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, before)


class Marker:
    """A pickle of this runs a command when it is loaded in the usual way."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def test_a_pickle_that_would_run_something_does_not(trained, tiny, call, tmp_path):
    marker = tmp_path / "marker"
    pickle.loads(pickle.dumps(Marker(marker)))
    assert marker.exists()  # it is a real one
    marker.unlink()
    (trained / RESUME).write_bytes(pickle.dumps(Marker(marker)))
    refused(call, trained, tiny, RESUME)
    torch.save({"model": Marker(marker)}, trained / RESUME)  # with right checksums
    with zipfile.ZipFile(trained / RESUME) as archive:
        assert archive.testzip() is None
    refused(call, trained, tiny, RESUME)
    assert not marker.exists()


@pytest.mark.parametrize(
    ("length", "header"),
    [
        (None, {"data_offsets": [0, 10**9]}), (None, {"data_offsets": [4, 0]}),
        (None, {"shape": [10**6, 10**6]}), (None, {"dtype": "F99"}), (10**11, {}), (2, {}),
    ],
    ids=str,
)  # fmt: skip
def test_a_header_that_lies_is_refused_before_anything_is_allocated(
    trained, tiny, call, little_memory, length, header
):
    raw = (trained / WEIGHTS).read_bytes()
    (size,) = struct.unpack("<Q", raw[:8])
    contents = json.loads(raw[8 : 8 + size])
    contents["transformer.wte.weight"] |= header
    text = json.dumps(contents).encode()
    (trained / WEIGHTS).write_bytes(struct.pack("<Q", length or len(text)) + text + raw[8 + size :])
    refused(call, trained, tiny, WEIGHTS)


@pytest.mark.parametrize(
    "sizes",
    [
        {"n_embd": 2**23, "n_head": 1}, {"n_positions": 2**23}, {"vocab_size": 2**23},
        {"n_layer": 999, "n_embd": 2**16}, {"n_embd": 10**30}, {"n_layer": 10**6},
    ],
    ids=str,
)  # fmt: skip
def test_absurd_sizes_are_refused_and_not_allocated(trained, tiny, call, little_memory, sizes):
    path = trained / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **sizes}))
    refused(call, trained, tiny, "config.json")


def test_weights_that_others_saved_have_no_checksum_and_are_read(trained):
    with safe_open(trained / WEIGHTS, "pt") as file:
        assert re.fullmatch("[0-9a-f]{64}", file.metadata()["sha256"])
    before = load_model(trained)
    import transformers

    theirs = transformers.AutoModelForCausalLM.from_pretrained(trained)
    theirs.save_pretrained(trained)
    with safe_open(trained / WEIGHTS, "pt") as file:
        assert "sha256" not in file.metadata()
    assert_same(before, load_model(trained))


def test_a_log_that_was_cut_short_is_mended(trained, tiny, call):
    log = trained / "log.csv"
    before = log_of(trained)
    log.write_bytes(log.read_bytes()[:-20] + b"\xff")
    assert call(train, *tiny, "--init_from=resume", "--max_iters=12").returncode == 0
    rows = log_of(trained)
    assert rows[: len(before) - 1] == before[:-1]  # no number that was cut in two
    steps = [int(row["step"]) for row in rows]
    assert steps == sorted(set(steps)) and steps[-1] == 12


# --- Folders ---


def test_a_folder_in_use_is_left_alone(tiny, tmp_path, call):
    folder = tmp_path / "run"
    holder = subprocess.Popen(
        [sys.executable, "train.py", *tiny, "--max_iters=1000000", "--eval_interval=1000000"],
        cwd=ROOT, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    try:
        assert "folder" in iter(lambda: holder.stdout.readline()[:6], "")
        before = (folder / SETTINGS).read_bytes()
        for how in ("scratch", "resume", "auto"):
            other = call(train, *tiny, "--seed=7", f"--init_from={how}")
            assert_one_line_error(other, "another process is training here")
        assert (folder / SETTINGS).read_bytes() == before
        assert [path.name for path in tmp_path.glob("run*")] == ["run"]
        assert holder.poll() is None
    finally:
        holder.kill()
        holder.wait()


def test_a_folder_that_vanishes_while_training_is_one_line(tiny, tmp_path):
    script = (
        "import shutil, train\n"
        "real = train.update\n"
        "def update(run, batches):\n"
        "    shutil.rmtree(run.folder, ignore_errors=True)\n"
        "    return real(run, batches)\n"
        "train.update = update\n"
        "train.run_main(train.main)\n"
    )
    assert_one_line_error(run_script("-c", script, *tiny), str(tmp_path / "run"))


def test_a_place_that_cannot_be_written_is_one_line(tiny, call):
    """/proc is a folder in which nobody may make another, not even the administrator."""
    assert_one_line_error(call(train, *tiny, "--out_dir=/proc/run"), "/proc")


def test_a_folder_that_is_read_only_is_one_line_and_stays_as_it_is(tiny, tmp_path, call):
    if shutil.which("unshare") is None or subprocess.run([*NAMESPACE[:4], "true"]).returncode:
        pytest.skip("no namespaces here")
    assert call(train, *tiny, "--max_iters=4").returncode == 0
    folder = tmp_path / "run"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    read_only = 'mount --bind "$1" "$1" && mount -o remount,ro,bind "$1" && shift && "$@"'
    resume = [sys.executable, "train.py", *tiny, "--init_from=resume"]
    result = subprocess.run(
        [*NAMESPACE[:4], "sh", "-c", read_only, "sh", folder, *resume],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert_one_line_error(result, "Read-only file system", str(folder))
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


# --- Only what was asked for ---


def test_training_and_sampling_speak_to_nobody(tiny, tmp_path, call, monkeypatch):
    spoken = []

    def forbidden(name):
        def refuse(self, *address):
            spoken.append((name, address))
            raise AssertionError(f"{name}{address}")

        return refuse

    for name in ("connect", "connect_ex", "bind", "listen", "sendto"):
        monkeypatch.setattr(socket.socket, name, forbidden(name))
    monkeypatch.setattr(socket, "getaddrinfo", forbidden("getaddrinfo"))
    assert call(train, *tiny).returncode == 0
    assert call(sample, f"--out_dir={tmp_path / 'run'}", "--max_new_tokens=5").returncode == 0
    assert spoken == []
    with pytest.raises(AssertionError, match="getaddrinfo"):  # it would have been noticed
        socket.create_connection(("127.0.0.1", 9))
