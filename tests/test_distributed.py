"""Several processes: collectives, the same numbers as one process, signals, losses, restarts.

The jobs run on this machine, connected by gloo. See tests/processes.py.
"""

import datetime
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

import train
from configurator import FolioError, run_main
from data import dataset as dataset_module
from engine import device as device_module
from engine import distributed as distributed_module
from engine import run as run_module
from engine.checkpoint import WEIGHTS_FILE, load_checkpoint
from engine.distributed import Distributed, GracefulShutdown, is_restarted
from engine.run_folder import lock_run_folder
from model import GPT, CausalSelfAttention, GPTConfig
from tests.conftest import ROOT, make_tiny_flags, prepare_tiny_dataset
from tests.processes import (
    free_port, run_torchrun, run_torchrun_command, run_train, start, start_job,
    start_with_launcher,
)  # fmt: skip
from tests.test_train import assert_same_state, read_log, without_times

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="gloo and fork are for Unix here")

TRAIN_FLAGS = ("--gradient_accumulation_steps=6", "--dropout=0.2", "--max_iters=12")
TWO_PROCESSES = (*TRAIN_FLAGS, "--dtype=float32", "--optimizer=adamw")
THREE_PROCESSES = (*TRAIN_FLAGS, "--dtype=float64", "--optimizer=muon")


# --- One process ---


def test_one_process_needs_no_process_group():
    with Distributed() as dist:
        assert (dist.rank, dist.world_size, dist.local_rank, dist.is_main) == (0, 1, 0, True)
        assert dist.run_on_main(lambda: "settings") == "settings"
        assert dist.main_process_first(lambda: "dataset") == "dataset"
        assert dist.broadcast_tensors({"step": 3}, torch.device("cpu")) == {"step": 3}
        assert dist.all_reduce_max(7) == 7
        numbers = torch.tensor([1.0, 2.0])
        assert dist.all_reduce_sum(numbers) is numbers and numbers.tolist() == [1, 2]
        model = torch.nn.Linear(2, 2)
        assert dist.wrap_ddp(model, torch.device("cpu")) is model
        dist.set_grad_sync(model, False)
        dist.warm_up_ddp(model, lambda: pytest.fail("one process has nothing to warm up"))
        assert not torch.distributed.is_initialized()


def test_shard_takes_every_nth_item():
    dist = Distributed()
    assert list(dist.shard(range(5))) == [0, 1, 2, 3, 4]
    dist.rank, dist.world_size = 1, 3
    assert list(dist.shard(range(8))) == [1, 4, 7]
    assert dist.shard(["a", "b", "c", "d", "e"]) == ["b", "e"]


def test_world_size_alone_does_not_start_a_process_group(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")  # some schedulers set it for each process
    with Distributed() as dist:
        assert dist.world_size == 1


def test_rank_without_an_address_is_a_one_line_error(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with (
        pytest.raises(FolioError, match=r"RANK and WORLD_SIZE are set.*MASTER_ADDR"),
        Distributed(),
    ):
        pass


def test_port_in_use_is_a_one_line_error(monkeypatch):
    with socket.socket() as other_program:
        other_program.bind(("127.0.0.1", 0))
        other_program.listen()
        port = other_program.getsockname()[1]
        environment = {"RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        with pytest.raises(FolioError, match=f"MASTER_PORT={port}: another program"), Distributed():
            pass


def test_processes_do_not_wait_for_a_torchrun_that_was_killed_while_they_started(monkeypatch):
    monkeypatch.setattr(distributed_module, "CONTROL_TIMEOUT", datetime.timedelta(seconds=5))
    environment = {
        "RANK": 0, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": free_port(),
        "TORCHELASTIC_RUN_ID": "test", "TORCHELASTIC_USE_AGENT_STORE": True,
    }  # fmt: skip
    for name, value in environment.items():
        monkeypatch.setenv(name, str(value))
    start_time = time.monotonic()
    with pytest.raises(FolioError, match=r"torchrun \(again, if it was killed\)"), Distributed():
        pass
    assert time.monotonic() - start_time < 2


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, False),
        ({"SLURM_RESTART_COUNT": "0", "TORCHELASTIC_RESTART_COUNT": "0"}, False),
        ({"SLURM_RESTART_COUNT": "1"}, True),
        ({"TORCHELASTIC_RESTART_COUNT": "2"}, True),
        ({"SLURM_RESTART_COUNT": "abc"}, False),
        ({"SLURM_RESTART_COUNT": ""}, False),
    ],
)
def test_restart_counts_of_torchrun_and_slurm_are_read(monkeypatch, environment, expected):
    for name in ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"):
        monkeypatch.delenv(name, raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert is_restarted() is expected


def test_each_attempt_at_a_job_has_its_own_name():
    """Also if ids of processes that died are still in the store."""
    store, names = torch.distributed.HashStore(), []
    for _ in range(2):
        with ThreadPoolExecutor() as pool:
            name_of = partial(distributed_module.name_this_attempt, store, world_size=3)
            of_attempt = set(pool.map(name_of, (2, 0, 1), timeout=30))
        assert len(of_attempt) == 1
        names += of_attempt
    assert len(set(names)) == 2


def test_a_process_that_never_answers_does_not_keep_the_others_waiting(monkeypatch):
    monkeypatch.setattr(distributed_module, "CONTROL_TIMEOUT", datetime.timedelta(seconds=0.1))
    store = torch.distributed.HashStore()
    with pytest.raises(TimeoutError, match="has not answered"):
        distributed_module.name_this_attempt(store, rank=0, world_size=2)


def choose_gpus(uuids: list[str]) -> None:
    """Each process pretends to have chosen one of these GPUs."""
    uuid = uuids[int(os.environ["RANK"])]
    torch.cuda.get_device_properties = lambda device: SimpleNamespace(uuid=uuid)

    def main():
        with Distributed() as dist:
            dist._tensor_group(torch.device("cuda:0"))

    run_main(main)


def test_processes_that_share_a_gpu_are_refused_in_one_line():
    """For example --nproc_per_node=3 on a node with two GPUs of which each process sees one."""
    result = start_job(choose_gpus, ["GPU-0", "GPU-1", "GPU-0"], n_processes=3).wait()
    assert result.exit_codes == [2, 0, 0]
    assert "3 processes, but only 2 GPUs; start one process per GPU" in result.stderr
    assert result.stderr.count("\n") == 1


# --- Signals in one process ---


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_first_signal_requests_a_stop_and_the_second_exits(signum, status, monkeypatch):
    monkeypatch.setattr(GracefulShutdown, "MIN_INTERVAL", 0)
    before = signal.getsignal(signum)
    with GracefulShutdown(Distributed()) as shutdown:
        assert not shutdown.sync()
        os.kill(os.getpid(), signum)
        assert shutdown.sync() and shutdown.exit_status == status
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signum)
    assert signal.getsignal(signum) is before


def test_a_signal_that_arrives_twice_at_once_counts_once():
    """A program that forwards signals, and the terminal, may each send it."""
    with GracefulShutdown(Distributed()) as shutdown:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
        assert shutdown.sync() and shutdown.exit_status == 143


def test_first_ctrl_c_says_what_happens_next(capfd):
    with GracefulShutdown(Distributed()):
        os.kill(os.getpid(), signal.SIGINT)
        expected = "finishing this step, then saving; press Ctrl-C again to exit without saving\n"
        assert capfd.readouterr().err.lstrip() == expected
    with GracefulShutdown(Distributed()):
        os.kill(os.getpid(), signal.SIGTERM)
        assert capfd.readouterr().err == ""


def test_ctrl_c_with_a_closed_terminal_still_stops_cleanly(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    with GracefulShutdown(Distributed()) as shutdown:
        os.kill(os.getpid(), signal.SIGINT)
        assert shutdown.sync()


@pytest.mark.parametrize("name", ["SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"])
def test_a_closed_terminal_and_slurms_warning_request_a_stop_however_often_they_arrive(name):
    signum = getattr(signal, name)
    before = signal.signal(signum, signal.SIG_DFL)
    try:
        with GracefulShutdown(Distributed()) as shutdown:
            os.kill(os.getpid(), signum)
            os.kill(os.getpid(), signum)
            assert shutdown.sync() and shutdown.exit_status == 128 + signum
    finally:
        signal.signal(signum, before)


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"])
def test_signals_that_the_parent_ignored_stay_ignored(name):
    """nohup ignores SIGHUP; a shell ignores SIGINT in background jobs of a script."""
    signum = getattr(signal, name)
    before = signal.signal(signum, signal.SIG_IGN)
    try:
        with GracefulShutdown(Distributed()) as shutdown:
            os.kill(os.getpid(), signum)
            assert not shutdown.sync()
        assert signal.getsignal(signum) == signal.SIG_IGN
    finally:
        signal.signal(signum, before)


def test_signal_during_the_all_reduce_counts_at_the_next_step(monkeypatch):
    dist = Distributed()
    with GracefulShutdown(dist) as shutdown:

        def all_reduce_max(status):
            os.kill(os.getpid(), signal.SIGTERM)
            return status

        monkeypatch.setattr(dist, "all_reduce_max", all_reduce_max)
        assert not shutdown.sync()  # the other processes do not know yet
        monkeypatch.setattr(dist, "all_reduce_max", lambda status: status)
        assert shutdown.sync()
        assert shutdown.exit_status == 143


def test_main_process_says_that_torchrun_died_if_another_process_noticed_first(monkeypatch, capfd):
    dist = Distributed()

    def all_reduce_max(status):
        assert status == 0  # this process has not noticed yet
        monkeypatch.setattr(dist, "launcher_died", lambda: True)
        return 143

    monkeypatch.setattr(dist, "all_reduce_max", all_reduce_max)
    with GracefulShutdown(dist) as shutdown:
        assert shutdown.sync() and shutdown.exit_status == 143
    assert capfd.readouterr().err.count("torchrun has died: saving, then exiting") == 1


# --- Collectives ---


def print_collectives() -> None:
    with Distributed() as dist:
        events = []
        time.sleep(0.05 * (dist.world_size - dist.rank))  # the main process is the last to come
        chosen = dist.run_on_main(lambda: events.append("chose") or dist.rank + 10)
        # The same clock in all processes.
        turn = dist.main_process_first(
            lambda: (time.monotonic(), time.sleep(0.1), time.monotonic())
        )
        torch.distributed.barrier()
        tensors = {"a": [torch.tensor(1.5), "b"], 2: torch.arange(3)} if dist.is_main else None
        received = dist.broadcast_tensors(tensors, torch.device("cpu"))
        results = {
            "rank": dist.rank,
            "local_rank": dist.local_rank,
            "chosen": chosen,
            "events": events,
            "received": repr(received),
            "start": turn[0],
            "end": turn[2],
            "sum": dist.all_reduce_sum(torch.tensor([1.0, dist.rank])).tolist(),
            "max": dist.all_reduce_max(7 * dist.rank),
            "shard": list(dist.shard(range(7))),
        }
        sys.stdout.write(json.dumps(results) + "\n")  # in one piece: three processes write here
        sys.stdout.flush()


def test_collectives_of_three_processes():
    result = start_job(print_collectives, n_processes=3).wait()
    assert result.exit_codes == [0, 0, 0], result.stderr
    ranks = sorted(
        (json.loads(line) for line in result.stdout.splitlines()), key=lambda r: r["rank"]
    )
    assert [r["rank"] for r in ranks] == [r["local_rank"] for r in ranks] == [0, 1, 2]
    assert [r["chosen"] for r in ranks] == [10, 10, 10]
    assert [r["events"] for r in ranks] == [["chose"], [], []]
    assert {r["received"] for r in ranks} == {"{'a': [tensor(1.5000), 'b'], 2: tensor([0, 1, 2])}"}
    assert ranks[0]["end"] <= min(ranks[1]["start"], ranks[2]["start"])
    assert [r["sum"] for r in ranks] == [[3, 3]] * 3
    assert [r["max"] for r in ranks] == [14, 14, 14]
    assert [r["shard"] for r in ranks] == [[0, 3, 6], [1, 4], [2, 5]]


def fail_on_main() -> None:
    def main():
        with Distributed() as dist:
            dist.main_process_first(lambda: read_missing_dataset(dist.rank))

    run_main(main)


def read_missing_dataset(rank: int) -> None:
    raise FolioError(f"rank {rank}: no such dataset")


def test_error_of_the_main_process_is_printed_once():
    result = start_job(fail_on_main, n_processes=2).wait()
    assert result.exit_codes == [2, 0]
    assert result.stderr.count("no such dataset") == result.stderr.count("\n") == 1


def print_exchanges() -> None:
    """Run two training steps of 4 micro-batches, and count what the processes send."""
    with Distributed() as dist:
        model = GPT(GPTConfig(block_size=8, vocab_size=13, n_layer=1, n_head=1, n_embd=8))
        ddp_model = dist.wrap_ddp(model, torch.device("cpu"))
        sent = []

        def counting_hook(group, bucket):
            sent.append(bucket.is_last())
            return allreduce_hook(group, bucket)

        ddp_model.register_comm_hook(torch.distributed.group.WORLD, counting_hook)
        config = train.TrainConfig(gradient_accumulation_steps=4, max_iters=2)
        device = train.choose_device("cpu", "float32")
        optimizer = train.make_optimizer(model, config, device.dtype)
        idx = torch.arange(8).view(1, 8)
        all_reduce, calls = torch.distributed.all_reduce, []
        torch.distributed.all_reduce = lambda *args, **kwargs: (
            calls.append(1) or all_reduce(*args, **kwargs)
        )
        for step in range(2):
            batches = iter([(idx, idx + 1)] * 2)
            parts = (batches, config, step, device, dist)
            train.train_step(ddp_model, optimizer, device.grad_scaler(), *parts)
        print(f"{len(calls)} exchanges, {sum(sent)} of them of gradients", flush=True)


def test_a_step_has_one_exchange_of_gradients_and_one_of_numbers():
    """Of two micro-batches in each process, only the last backward pass sends gradients. Loss and
    signals travel together."""
    result = start_job(print_exchanges, n_processes=2).wait()
    assert result.exit_codes == [0, 0], result.stderr
    # The two processes may write between each other's text and the end of its line.
    assert result.stdout.count("4 exchanges, 2 of them of gradients") == 2


# --- The same numbers ---


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return prepare_tiny_dataset(tmp_path_factory.mktemp("data") / "tiny_dataset")


@pytest.fixture(scope="module")
def reference(dataset, tmp_path_factory) -> dict[tuple, tuple[Path, str]]:
    """Uninterrupted runs, trained once for all tests: (flags, processes) -> (folder, stdout)."""
    home, jobs = tmp_path_factory.mktemp("reference"), {}
    for flags, n_processes in ((TWO_PROCESSES, 2), (THREE_PROCESSES, 3)):
        for n in (1, n_processes):
            folder = home / f"{n_processes}_{n}"
            job = start_job(run_train, *make_tiny_flags(dataset, folder), *flags, n_processes=n)
            jobs[flags, n] = folder, job
    runs = {}
    for key, (folder, job) in jobs.items():
        result = job.wait()
        assert set(result.exit_codes) == {0}, result.stderr
        runs[key] = folder, result.stdout
    return runs


@pytest.mark.parametrize(
    ("flags", "n_processes", "tolerance"),
    [(TWO_PROCESSES, 2, 1e-4), (THREE_PROCESSES, 3, 1e-9)],
    ids=["two-float32-adamw", "three-float64-muon"],
)
def test_several_processes_train_like_one(reference, flags, n_processes, tolerance):
    (one, _), (several, stdout) = reference[flags, 1], reference[flags, n_processes]
    assert f"{n_processes} processes" in stdout
    assert stdout.count("done     12 of 12 steps") == 1  # only the main process prints
    assert_same_numbers(one, several, tolerance)


def assert_same_numbers(one: Path, several: Path, tolerance: float) -> None:
    """All numbers in the logs, and all weights, are equal within a relative tolerance."""
    logs = [without_times(read_log(folder)) for folder in (one, several)]
    assert len(logs[0]) == len(logs[1]) == 7
    for expected, actual in zip(*logs, strict=True):
        for column in expected:
            if expected[column]:
                number = float(expected[column])
                assert float(actual[column]) == pytest.approx(number, rel=tolerance), column
    weights = [load_checkpoint(folder)["model"] for folder in (one, several)]
    assert weights[0].keys() == weights[1].keys()
    for name in weights[0]:
        torch.testing.assert_close(*(w[name] for w in weights), rtol=tolerance, atol=tolerance)


def assert_same_run(left: Path, right: Path) -> None:
    """Checkpoint, weights and log are equal, bit by bit, but for the times."""
    assert_same_state(load_checkpoint(left), load_checkpoint(right))
    assert_same_state(load_file(left / WEIGHTS_FILE), load_file(right / WEIGHTS_FILE))
    assert without_times(read_log(left)) == without_times(read_log(right))


def saved_step(folder: Path) -> int:
    return load_checkpoint(folder)["train_state"]["step"]


def test_indivisible_micro_batches_are_refused_once(tiny_flags):
    flags = (*tiny_flags, "--gradient_accumulation_steps=3")
    result = start_job(run_train, *flags, n_processes=2).wait()
    assert result.exit_codes == [2, 0]
    assert result.stderr.count("gradient_accumulation_steps=3") == 1
    assert result.stderr.count("\n") == 1


# --- Signals, lost processes, restarts ---


def run_train_with_faults(faults: dict[int, tuple[int, int]], *flags: str) -> None:
    """`python train.py FLAGS`, in which process 1 gets signals.

    faults: {attempt: (step, signum)}; step -1 is before the run folder is created.
    """
    attempt = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))
    if attempt and os.environ["RANK"] == "1":
        time.sleep(0.5)  # process 0 comes first, and could find the address of the dead process 1
    fault_step, signum = faults.get(attempt, (None, None))
    train_step, build_model = train.train_step, train.build_model

    def raise_signal(dist_rank: int, step: int) -> None:
        if dist_rank == 1 and step == fault_step:
            os.kill(os.getpid(), signum)

    def train_step_with_fault(*args):
        *_, step, _, dist = args
        raise_signal(dist.rank, step)
        return train_step(*args)

    def build_model_with_fault(*args):
        raise_signal(int(os.environ["RANK"]), -1)
        return build_model(*args)

    train.train_step, train.build_model = train_step_with_fault, build_model_with_fault
    run_train(*flags)


def run_train_reading_on_main(*flags: str) -> None:
    """`python train.py FLAGS`, in which only the main process may read or make weights."""
    if os.environ["RANK"] != "0":
        # Calling one of these would be an error.
        run_module.load_checkpoint = run_module.load_model = run_module.GPT = None
    run_train(*flags)


def test_signal_to_one_process_stops_all_and_resume_is_exact(reference, dataset, tmp_path):
    """With three processes: unlike a sum of two numbers, a sum of three depends on their order."""
    flags = (*make_tiny_flags(dataset, tmp_path / "run"), *THREE_PROCESSES)
    faults = {0: (6, signal.SIGTERM)}
    stopped = start_job(run_train_with_faults, faults, *flags, n_processes=3).wait()
    assert stopped.exit_codes == [143, 143, 143], stopped.stderr
    assert saved_step(tmp_path / "run") == 7  # the step was finished
    flags += ("--init_from=resume",)
    resumed = start_job(run_train_reading_on_main, *flags, n_processes=3).wait()
    assert resumed.exit_codes == [0, 0, 0], resumed.stderr
    assert_same_run(reference[THREE_PROCESSES, 3][0], tmp_path / "run")


def run_train_in_data_folder(folder: Path, *flags: str) -> None:
    """Each process has a data folder of its own, as nodes with disks of their own."""
    dataset_module.DATA_DIR = folder / os.environ["RANK"]
    run_train(*flags)


def test_processes_with_different_datasets_are_refused(dataset, tmp_path):
    for rank in ("0", "1"):
        shutil.copytree(dataset, tmp_path / rank / "text")
    tokens = np.fromfile(tmp_path / "1" / "text" / "train.bin", dtype="<u2")
    tokens[::-1].tofile(tmp_path / "1" / "text" / "train.bin")
    flags = (*make_tiny_flags("text", tmp_path / "run"), *TWO_PROCESSES)
    result = start_job(run_train_in_data_folder, tmp_path, *flags, n_processes=2).wait()
    assert result.exit_codes == [0, 2], result.stderr
    assert result.stderr.count("\n") == 1
    assert "process 1 has {'dataset': " in result.stderr and "copy the dataset to" in result.stderr
    assert not (tmp_path / "run" / "resume.pt").exists()


def run_train_with_buffer(*flags: str) -> None:
    """As if model.py was changed: attention has nanoGPT's mask."""
    init = CausalSelfAttention.__init__

    def with_mask(self, config):
        init(self, config)
        self.register_buffer("mask", torch.ones(config.block_size, config.block_size).tril())

    CausalSelfAttention.__init__ = with_mask  # in a process of its own
    run_train(*flags)


def test_a_process_without_a_batch_to_evaluate_does_not_wait_for_buffers(dataset, tmp_path):
    flags = (*make_tiny_flags(dataset, tmp_path / "run"), *TWO_PROCESSES, "--eval_tokens=8")
    result = start_job(run_train_with_buffer, *flags, n_processes=2).wait()
    assert result.exit_codes == [0, 0], result.stderr


def run_train_with_rotations(*flags: str) -> None:
    """As if model.py was changed: complex numbers rotate queries and keys, and wpe is not used."""
    init, qkv = CausalSelfAttention.__init__, CausalSelfAttention.qkv

    def with_rotations(self, config):
        init(self, config)
        angles = torch.arange(config.block_size)[:, None] / torch.tensor([1.0, 10.0])
        rotations = torch.polar(torch.ones_like(angles), angles)
        self.register_buffer("rotations", rotations, persistent=False)

    def rotated(self, x):
        q, k, v = qkv(self, x)
        q, k = (torch.view_as_complex(t.unflatten(-1, (-1, 2)).contiguous()) for t in (q, k))
        q, k = (torch.view_as_real(t * self.rotations[: x.size(1)]).flatten(-2) for t in (q, k))
        return q, k, v

    def hidden_states(self, idx):
        x = self.transformer.wte(idx)
        for block in self.transformer.h:
            x = block(x)
        return self.transformer.ln_f(x)

    CausalSelfAttention.__init__, CausalSelfAttention.qkv = with_rotations, rotated
    GPT.hidden_states = hidden_states
    run_train(*flags)


def test_two_processes_train_a_model_with_unused_parameters_and_complex_buffers(dataset, tmp_path):
    logs = []
    for n_processes in (1, 2):
        flags = (*make_tiny_flags(dataset, tmp_path / str(n_processes)), *TWO_PROCESSES)
        flags += ("--n_embd=8", "--n_head=2", "--sample_tokens=5")
        result = start_job(run_train_with_rotations, *flags, n_processes=n_processes).wait()
        assert set(result.exit_codes) == {0}, result.stderr
        assert "complex" not in result.stderr
        log = read_log(tmp_path / str(n_processes))
        logs.append([float(row["val_loss"]) for row in log if row["val_loss"]])
    assert logs[1] == pytest.approx(logs[0], rel=1e-5) and len(logs[0]) > 1


class BatchNorm(torch.nn.BatchNorm1d):
    """In place of layer norm: its running means are buffers, and change what training computes."""

    def __init__(self, n_embd: int, bias: bool):
        super().__init__(n_embd)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x.flatten(0, -2)).view_as(x) - self.running_mean


def run_train_with_batch_norm(*flags: str) -> None:
    torch.nn.LayerNorm = BatchNorm  # in a process of its own
    run_train(*flags)


def test_statistics_of_a_changed_model_survive_resuming(dataset, tmp_path):
    losses = {}
    for name, stops in (("whole", [8]), ("resumed", [3, 8])):  # no evaluation is due at step 3
        flags = (*make_tiny_flags(dataset, tmp_path / name), *TWO_PROCESSES, "--decay_lr=False")
        for stop in stops:
            more = (f"--max_iters={stop}", "--eval_interval=4", "--init_from=auto")
            result = start_job(run_train_with_batch_norm, *flags, *more, n_processes=2).wait()
            assert result.exit_codes == [0, 0], result.stderr
        rows = [row for row in read_log(tmp_path / name) if row["step"] in ("0", "4", "8")]
        losses[name] = [row["val_loss"] for row in rows]
    assert losses["whole"] == losses["resumed"] and len(losses["whole"]) == 3


def run_train_on_devices(devices: list[tuple[str, str]], *flags: str) -> None:
    """Each process finds another device and dtype, as on nodes with different GPUs."""
    name, dtype = devices[int(os.environ["RANK"])]
    device_module.find_device = lambda *_: torch.device(name)
    device_module.choose_dtype = lambda *_: getattr(torch, dtype)
    run_train(*flags)


def test_processes_with_different_devices_or_dtypes_are_refused(dataset, tmp_path):
    """Else a process that scales its loss (float16) would decide the averaged gradient."""
    devices = [("cpu", "bfloat16"), ("cpu", "float16"), ("meta", "bfloat16")]
    flags = (*make_tiny_flags(dataset, tmp_path / "run"), *TRAIN_FLAGS)
    result = start_job(run_train_on_devices, devices, *flags, n_processes=3).wait()
    assert result.exit_codes == [0, 2, 2], result.stderr
    assert result.stderr.count("\n") == 2
    for words in (
        "process 1 has {'dtype': torch.float16}, but process 0 {'dtype': torch.bfloat16}; choose",
        "process 2 has {'device': 'meta'}, but process 0 {'device': 'cpu'}; choose --device and",
    ):
        assert words in result.stderr
    assert not (tmp_path / "run").exists()


def test_lost_process_ends_the_job_with_one_line(dataset, tmp_path):
    flags = (*make_tiny_flags(dataset, tmp_path / "run"), *TWO_PROCESSES)
    faults = {0: (6, signal.SIGKILL)}
    result = start_job(run_train_with_faults, faults, *flags, n_processes=2).wait()
    assert result.exit_codes == [2, -signal.SIGKILL]
    assert "process 0 of 2: another process died" in result.stderr
    assert "Traceback" not in result.stderr


def test_restarted_job_ends_like_an_undisturbed_one(reference, dataset, tmp_path):
    """Process 1 is killed before the first checkpoint, right after it, and after that of step 8.

    An older run in the folder is not resumed, although no new one is there at the first restart.
    """
    flags = (*make_tiny_flags(dataset, tmp_path / "run"), *TWO_PROCESSES)
    shutil.copytree(reference[TWO_PROCESSES, 2][0], tmp_path / "run")
    faults = {attempt: (step, signal.SIGKILL) for attempt, step in enumerate((-1, 0, 9))}
    result = run_torchrun(run_train_with_faults, faults, *flags, n_processes=2, max_restarts=3)
    assert result.exit_codes == [0], result.stderr
    assert result.stdout.count("step 0:") == 1, result.stdout  # then resumed from its checkpoint
    assert result.stdout.count("4 left after step 8 of 12") == 1
    assert_same_run(reference[TWO_PROCESSES, 2][0], tmp_path / "run")
    assert (tmp_path / "run.1" / WEIGHTS_FILE).exists()


@pytest.fixture
def nightly(request) -> None:
    if not request.config.getoption("--nightly"):
        pytest.skip("takes half a minute: --nightly")


def test_eight_processes_stop_resume_and_restart_exactly(nightly, dataset, tmp_path):
    flags = (*THREE_PROCESSES, "--gradient_accumulation_steps=8")

    def flags_for(name: str) -> list[str]:
        return [*make_tiny_flags(dataset, tmp_path / name), *flags]

    one = start_job(run_train, *flags_for("one"), n_processes=1).wait()
    whole = start_job(run_train, *flags_for("whole"), n_processes=8).wait(100)
    assert {*one.exit_codes, *whole.exit_codes} == {0}, whole.stderr
    assert_same_numbers(tmp_path / "one", tmp_path / "whole", 1e-9)
    faults = {0: (6, signal.SIGTERM)}
    stopped = start_job(run_train_with_faults, faults, *flags_for("stopped"), n_processes=8).wait(
        120
    )
    assert set(stopped.exit_codes) == {143}, stopped.stderr
    resumed = start_job(run_train, *flags_for("stopped"), "--init_from=resume", n_processes=8).wait(
        120
    )
    assert set(resumed.exit_codes) == {0}, resumed.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")
    faults = {0: (9, signal.SIGKILL)}
    restarted = run_torchrun(
        run_train_with_faults,
        faults,
        *flags_for("killed"),
        n_processes=8,
        max_restarts=1,
        timeout=100,
    )
    assert restarted.exit_codes == [0], restarted.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def test_compiled_processes_train_like_one_and_resume_exactly(nightly, dataset, tmp_path):
    """As on eight GPUs: torch.compile, DDP with several buckets, and activation checkpointing."""
    # 9 MB of gradients, in several buckets. No dropout: torch.compile draws other random numbers.
    flags = (*TWO_PROCESSES, "--n_layer=3", "--n_embd=256", "--dropout=0")
    compiled = ("--compile=True", "--activation_checkpointing")

    def flags_for(name: str) -> list[str]:
        return [*make_tiny_flags(dataset, tmp_path / name), *flags]

    one = start_job(run_train, *flags_for("one"), n_processes=1).wait()
    whole = start_job(run_train, *flags_for("whole"), *compiled, n_processes=2).wait(150)
    assert {*one.exit_codes, *whole.exit_codes} == {0}, whole.stderr
    assert_same_numbers(tmp_path / "one", tmp_path / "whole", 1e-3)
    arguments = ({0: (6, signal.SIGTERM)}, *flags_for("stopped"), *compiled)
    stopped = start_job(run_train_with_faults, *arguments, n_processes=2).wait(150)
    assert set(stopped.exit_codes) == {143}, stopped.stderr
    arguments = (*flags_for("stopped"), *compiled, "--init_from=resume")
    resumed = start_job(run_train, *arguments, n_processes=2).wait(150)
    assert set(resumed.exit_codes) == {0}, resumed.stderr
    assert_same_run(tmp_path / "whole", tmp_path / "stopped")


def test_two_nodes_train_like_one_process_and_restart_exactly(nightly, dataset, tmp_path):
    """Two agents of torchrun, each with two processes, that meet at a port of 127.0.0.1."""
    flags = (*THREE_PROCESSES, "--gradient_accumulation_steps=4")

    def flags_for(name: str) -> list[str]:
        return [*make_tiny_flags(dataset, tmp_path / name), *flags]

    one = start_job(run_train, *flags_for("one"), n_processes=1).wait()
    whole = run_torchrun(run_train, *flags_for("whole"), n_processes=2, n_nodes=2)
    assert {*one.exit_codes, *whole.exit_codes} == {0}, whole.stderr
    assert "4 processes" in whole.stdout
    assert_same_numbers(tmp_path / "one", tmp_path / "whole", 1e-9)
    faults = {0: (9, signal.SIGKILL)}
    killed = run_torchrun(
        run_train_with_faults, faults, *flags_for("killed"),
        n_processes=2, n_nodes=2, max_restarts=2,
    )  # fmt: skip
    assert killed.exit_codes == [0, 0], killed.stderr
    assert "4 left after step 8 of 12" in killed.stdout
    assert_same_run(tmp_path / "whole", tmp_path / "killed")


def wait_for_rows(folder: Path, n_rows: int, is_running) -> None:
    """Wait until the log of a run has n_rows rows below its header."""
    log, deadline = folder / "log.csv", time.monotonic() + 60
    while not (log.exists() and log.read_text().count("\n") > n_rows):
        assert time.monotonic() < deadline and is_running()
        time.sleep(0.05)


ENDLESS = ("--gradient_accumulation_steps=2", "--max_iters=1000000", "--eval_interval=1000000")


def assert_saved(folder: Path) -> None:
    """The run was stopped and saved in the middle, and has removed its temporary files."""
    assert saved_step(folder) >= 4
    assert not list(folder.glob(".*"))


def test_sigterm_to_torchrun_saves_and_exits(tiny_flags, tmp_path):
    command = (
        "--standalone", "--nproc_per_node=2", f"--log-dir={tmp_path / 'output'}", "--redirects=3",
        str(ROOT / "train.py"), *tiny_flags, *ENDLESS,
    )  # fmt: skip
    job = start((run_torchrun_command, command, {}))
    try:
        wait_for_rows(tmp_path / "run", 3, job.processes[0].is_alive)
    finally:
        job.processes[0].terminate()
        result = job.wait()
    stdout, stderr = (
        [path.read_text() for path in sorted(tmp_path.glob(f"output/*/attempt_0/*/{name}.log"))]
        for name in ("stdout", "stderr")
    )
    assert result.exit_codes != [0] and "SIGKILL" not in result.stderr
    assert "stopped" in stdout[0] and stdout[1] == ""
    assert stderr == ["", ""]
    assert_saved(tmp_path / "run")


def test_sigterm_to_the_command_torchrun_saves_and_exits(nightly, tiny_flags, tmp_path):
    """With new processes: `torchrun --standalone --nproc_per_node=2 train.py`."""
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(ROOT / "train.py"), *tiny_flags, *ENDLESS,
    ]  # fmt: skip
    torchrun = subprocess.Popen(
        command,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        wait_for_rows(tmp_path / "run", 3, lambda: torchrun.poll() is None)
        torchrun.terminate()
        stdout, stderr = torchrun.communicate(timeout=60)
    finally:
        if torchrun.poll() is None:
            os.killpg(torchrun.pid, signal.SIGKILL)
    assert torchrun.returncode != 0 and "SIGKILL" not in stderr
    assert "stopped" in stdout
    assert_saved(tmp_path / "run")


def test_training_stops_and_saves_when_torchrun_is_killed(tiny_flags, tmp_path):
    """Else it would train on, and its lock would keep a restarted job out of the folder."""
    job = start_with_launcher(run_train, *tiny_flags, *ENDLESS, n_processes=2)
    wait_for_rows(tmp_path / "run", 3, job.processes[0].is_alive)
    job.processes[0].kill()
    wait_for_lock(tmp_path / "run")
    assert_saved(tmp_path / "run")
    stderr = job.wait().stderr
    assert stderr.count("torchrun has died: saving, then exiting") == 1


def wait_for_lock(folder: Path) -> None:
    """Wait until no process uses the run folder."""
    deadline = time.monotonic() + 60
    while True:
        try:
            with lock_run_folder(folder):
                return
        except FolioError:
            assert time.monotonic() < deadline
            time.sleep(0.05)
