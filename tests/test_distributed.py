"""Many processes: they share the work and the numbers, and stop, die and start again together.

Each lesson that needs a world of several makes one: torchrun starts them on this machine.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import train
from configurator import FolioError
from tests.conftest import ROOT, prepare_rhyme, tiny_flags
from tests.test_train import assert_same_state, log_of, stop_after, without_clock
from training.checkpoint import RESUME, WEIGHTS, load_resume
from training.run import check_shares
from training.world import World, is_restarted, job_name

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="torchrun there has no gloo store")

MORE = ("--dropout=0.2", "--max_iters=20")
SHARED_WORK = ("--gradient_accumulation_steps=4", *MORE)

# train.py, but for what becomes of process 1 in the middle of an update.
MISHAP = """
import os, signal, sys, time, train

attempt = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
if attempt and os.environ["RANK"] == "1":
    time.sleep(1)  # the other one comes first, and might find the address of the dead

real = train.update

def update(run, batches):
    if run.world.rank == 1 and {steps}.get(attempt) == run.step:
        os.kill(os.getpid(), signal.{signal})
    return real(run, batches)

train.update = update
train.run_main(train.main)
"""


def start(script: Path, *flags: str, restarts: int = 0, processes: int = 2) -> subprocess.Popen:
    """`torchrun --standalone --nproc_per_node=PROCESSES SCRIPT FLAGS`, in a group of its own."""
    return subprocess.Popen(
        [
            sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}", f"--max-restarts={restarts}", str(script), *flags,
        ],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )  # fmt: skip


def run_job(script: Path, *flags: str, **how: int) -> subprocess.CompletedProcess:
    job = start(script, *flags, **how)
    try:
        told, complained = job.communicate(timeout=120)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    return subprocess.CompletedProcess(job.args, job.returncode, told, complained)


@pytest.fixture
def one(call, tiny, tmp_path):
    """Train in one process with these flags; the folder of the run."""

    def trained(*flags: str) -> Path:
        folder = tmp_path / "one"
        result = call(train, *tiny, *SHARED_WORK, *flags, f"--out_dir={folder}")
        assert result.returncode == 0, result.stderr
        return folder

    return trained


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Train in several processes, once for all lessons; the folder of the run.

    What was told on the way stands in its told.txt.
    """
    home, done = tmp_path_factory.mktemp("undisturbed"), {}
    rhyme = prepare_rhyme(home / "rhyme")

    def trained(*flags: str, processes: int) -> Path:
        key = (*flags, processes)
        if key not in done:
            done[key] = home / str(len(done))
            whole = [*tiny_flags(rhyme, done[key]), *flags]
            job = run_job(ROOT / "train.py", *whole, processes=processes)
            assert job.returncode == 0, job.stderr
            (done[key] / "told.txt").write_text(job.stdout, encoding="utf-8")
        return done[key]

    return trained


def mishap(tmp_path: Path, signal_name: str, *steps: int) -> Path:
    """A script in which process 1 gets the signal at the first of steps; restarted, at the next."""
    script = tmp_path / "mishap.py"
    script.write_text(MISHAP.format(steps=dict(enumerate(steps)), signal=signal_name))
    return script


# --- The same numbers ---


@pytest.mark.parametrize(
    ("dtype", "optimizer", "tolerance"), [("float64", "muon", 1e-9), ("float32", "adamw", 1e-4)]
)
def test_two_processes_train_as_one_does(one, undisturbed, dtype, optimizer, tolerance):
    flags = (f"--dtype={dtype}", f"--optimizer={optimizer}")
    alone, together = one(*flags), undisturbed(*SHARED_WORK, *flags, processes=2)
    told = (together / "told.txt").read_text(encoding="utf-8")
    assert "2 processes" in told
    assert told.count("step 20: validation loss") == 1  # one of them speaks
    left, right = log_of(alone), log_of(together)
    assert len(left) == len(right) == 11
    for a, b in zip(without_clock(left), without_clock(right), strict=True):
        for column in a:
            if a[column]:
                assert float(b[column]) == pytest.approx(float(a[column]), rel=tolerance), column
    weights = [load_resume(folder)["model"] for folder in (alone, together)]
    for name in weights[0]:
        torch.testing.assert_close(*(w[name] for w in weights), rtol=tolerance, atol=tolerance)


def test_gradients_travel_once_per_update(tiny, tmp_path):
    """Four micro-batches, two in each process: only the last backward pass sends anything."""
    script = tmp_path / "count.py"
    script.write_text(
        "import torch.distributed as dist, train\n"
        "from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook\n"
        "real, sent = train.begin, []\n"
        "def hook(group, bucket):\n"
        "    sent.append(bucket.is_last())\n"
        "    return allreduce_hook(group, bucket)\n"
        "def begin(cls, given, world):\n"
        "    run = real(cls, given, world)\n"
        "    run.runner.register_comm_hook(dist.group.WORLD, hook)\n"
        "    return run\n"
        "train.begin = begin\n"
        "try:\n"
        "    train.run_main(train.main)\n"
        "finally:\n"
        "    print('updates sent:', sum(sent))\n"
    )
    job = run_job(script, *tiny, "--gradient_accumulation_steps=4")
    assert job.returncode == 0, job.stderr
    assert job.stdout.count("updates sent: 8\n") == 2  # max_iters, in each of the two


def test_micro_batches_that_cannot_be_shared_are_refused_once(tiny):
    job = run_job(ROOT / "train.py", *tiny, "--gradient_accumulation_steps=3")
    assert job.returncode != 0
    assert job.stderr.count("train.py: gradient_accumulation_steps=3 cannot be shared") == 1
    assert "by 2 processes; try 2 or 4" in job.stderr
    with pytest.raises(FolioError, match=r"try 8$"):
        check_shares(train.TrainConfig(gradient_accumulation_steps=5), 8)
    only = train.TrainConfig(gradient_accumulation_steps=5, eval_only=True)
    assert check_shares(only, 8) is only  # an evaluation can always be shared


def test_half_of_what_torchrun_tells_is_an_error_for_people(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # as some schedulers set it, for each process
    with World() as world:
        assert world.size == 1
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(FolioError, match=r"RANK and WORLD_SIZE are set.*MASTER_ADDR"), World():
        pass


# --- Stopping, dying, going on ---


def test_a_wish_to_stop_is_shared_and_resuming_goes_on_bit_by_bit(tiny, tmp_path, undisturbed):
    """Among three, for the sum of three numbers, unlike that of two, depends on their order."""
    more, how = ["--gradient_accumulation_steps=6", *MORE], {"processes": 3}
    flags = [*tiny, *more]
    whole, part = undisturbed(*more, **how), tmp_path / "run"
    stopped = run_job(mishap(tmp_path, "SIGTERM", 6), *flags, **how)
    assert "exitcode  : 143" in stopped.stderr  # one was asked, and all left
    assert "stopped, and saved: 7 of 20 steps" in stopped.stdout
    resumed = run_job(ROOT / "train.py", *flags, "--init_from=resume", **how)
    assert resumed.returncode == 0, resumed.stderr
    assert_same_state(load_resume(whole), load_resume(part))
    assert_same_state(load_file(whole / WEIGHTS), load_file(part / WEIGHTS))
    assert without_clock(log_of(whole)) == without_clock(log_of(part))


def test_a_job_that_loses_a_process_starts_again_and_ends_as_if_nothing_had_happened(
    tiny, tmp_path, undisturbed
):
    """At step 0, right after the first checkpoint, and again at 9, one after that of step 8."""
    flags = [*SHARED_WORK, "--dtype=float64", "--optimizer=muon"]
    whole, hurt = undisturbed(*flags, processes=2), tmp_path / "run"
    job = run_job(mishap(tmp_path, "SIGKILL", 0, 9), *tiny, *flags, restarts=3)
    assert job.returncode == 0, job.stderr
    assert "Signal 9 (SIGKILL)" in job.stderr or "exitcode: -9" in job.stderr
    assert "from step 0" in job.stdout and "from step 8" in job.stdout
    assert without_clock(log_of(whole)) == without_clock(log_of(hurt))
    assert_same_state(load_resume(whole), load_resume(hurt))


def test_a_process_lost_before_the_first_checkpoint_costs_nothing_either(tiny, tmp_path, call):
    """What an older run left in the folder is not mistaken for this job's."""
    flags = [*tiny, "--gradient_accumulation_steps=2"]
    assert call(train, *flags, "--seed=7").returncode == 0  # the older run, of another seed
    script = tmp_path / "early.py"
    script.write_text(
        "import os, signal, train\n"
        "real = train.begin\n"
        "def begin(cls, given, world):\n"
        "    if world.rank == 1 and os.environ['TORCHELASTIC_RESTART_COUNT'] == '0':\n"
        "        os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return real(cls, given, world)\n"
        "train.begin = begin\n"
        "train.run_main(train.main)\n"
    )
    job = run_job(script, *flags, restarts=3)
    assert job.returncode == 0, job.stderr
    assert "the run that was there is now" in job.stdout
    assert load_resume(tmp_path / "run")["step"] == 8
    assert load_resume(tmp_path / "run.1")["step"] == 8
    logs = [log_of(tmp_path / name) for name in ("run", "run.1")]
    assert without_clock(logs[0]) != without_clock(logs[1])


def test_sigterm_to_the_whole_job_saves_and_leaves(tiny, tmp_path):
    job = start(ROOT / "train.py", *tiny, "--gradient_accumulation_steps=2", "--max_iters=1000000")
    log = tmp_path / "run" / "log.csv"
    try:
        deadline = time.monotonic() + 60
        while not (log.exists() and log.read_text().count("\n") > 4):
            assert time.monotonic() < deadline and job.poll() is None
            time.sleep(0.1)
        job.send_signal(signal.SIGTERM)
        told, complained = job.communicate(timeout=30)
    finally:
        if job.poll() is None:
            os.killpg(job.pid, signal.SIGKILL)
    assert job.returncode != 0 and "SIGKILL" not in complained
    assert "stopped, and saved" in told
    assert load_resume(tmp_path / "run")["step"] >= 4
    assert not list((tmp_path / "run").glob(".*"))


def test_a_restarted_job_knows_itself_again(monkeypatch):
    for name in ("TORCHELASTIC_RUN_ID", "SLURM_JOB_ID", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    assert job_name() == "" and not is_restarted()
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert job_name() == "SLURM_JOB_ID=17" and not is_restarted()
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert is_restarted()
    monkeypatch.delenv("SLURM_JOB_ID")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")  # what torchrun says of a nameless job
    assert job_name() == f"TORCHELASTIC_RUN_ID=process {os.getppid()}"


def test_a_requeued_job_resumes_whatever_it_was_told_to_begin_from(
    tiny, tmp_path, call, monkeypatch
):
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    stop_after(4, tiny)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = call(train, *tiny)
    assert again.returncode == 0, again.stderr
    assert "from step 4" in again.stdout
    monkeypatch.setenv("SLURM_JOB_ID", "18")  # another job, itself restarted, begins anew
    other = call(train, *tiny)
    assert "the run that was there is now" in other.stdout
    assert (tmp_path / "run.1" / RESUME).exists()


def test_a_requeued_job_of_several_runs_makes_each_of_them(tiny, tmp_path, call, monkeypatch):
    """A script that trains with one seed after the other, in one folder, from its beginning."""
    monkeypatch.setenv("SLURM_JOB_ID", "17")
    assert call(train, *tiny, "--seed=1").returncode == 0
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    for flags in (["--seed=2"], []):
        other = call(train, *tiny, *flags)
        assert "the run that was there is now" in other.stdout, flags
    assert load_resume(tmp_path / "run")["step"] == 8
