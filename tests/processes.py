"""Start jobs of several processes quickly, to test distributed training.

Importing torch and train.py takes seconds, and every process of a job would do it again. Here a
fork server (see multiprocessing) imports them once, and each process is a fork of the server.

    job = start_job(run_train, *flags, n_processes=2)  # as a scheduler does: RANK, WORLD_SIZE
    result = job.wait()                                # .exit_codes, .stdout, .stderr
    result = run_torchrun(run_train, *flags, n_processes=2, max_restarts=1)
"""

import concurrent.futures
import faulthandler
import multiprocessing
import multiprocessing.forkserver
import os
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed.run
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

import configurator
import train
from engine import metrics
from tests.conftest import group_of

ROOT = Path(__file__).resolve().parent.parent
# The fork server imports these once; otherwise each process would import them: the functions that
# processes run, and what DistributedDataParallel and the optimizers import when first used.
PRELOADED = [
    "torch._dynamo",
    "tests.processes",
    *(f"tests.test_{name}" for name in (
        "distributed", "fault_tolerance", "optimizer", "prepare_shakespeare", "prepare_text",
        "sample", "train",
    )),
]  # fmt: skip


class Job:
    """Processes that run, and the files that they write their output to."""

    def __init__(self, processes: list[BaseProcess], folder: tempfile.TemporaryDirectory):
        self.processes, self.folder = processes, folder
        for process in processes:
            process.start()

    def wait(self, timeout: float = 60) -> SimpleNamespace:
        """Wait for all processes: .exit_codes (a list), .stdout and .stderr (of all together)."""
        deadline = time.monotonic() + timeout
        try:
            for process in self.processes:
                process.join(max(0, deadline - time.monotonic()))
            exit_codes = [process.exitcode for process in self.processes]
            if None in exit_codes:
                print_tracebacks(self.processes)
                raise TimeoutError(f"{exit_codes}\n{self.read('stdout')}\n{self.read('stderr')}")
            return SimpleNamespace(
                exit_codes=exit_codes, stdout=self.read("stdout"), stderr=self.read("stderr")
            )
        finally:
            for process in self.processes:
                process.kill()
            self.folder.cleanup()

    def read(self, stream: str) -> str:
        """The "stdout" or "stderr" of all processes so far."""
        return read(self.folder.name, stream)


def read(folder: str, stream: str) -> str:
    path = Path(folder, stream)
    return path.read_text(encoding="utf-8") if path.exists() else ""


def print_tracebacks(processes: Iterable[BaseProcess]) -> None:
    """Let processes that still run print on stderr where they are."""
    for process in processes:
        if process.is_alive():
            os.kill(process.pid, signal.SIGUSR1)
    time.sleep(1)


def start_job(fn: Callable[..., None], *args: object, n_processes: int, **environment: str) -> Job:
    """Run fn(*args) in n_processes processes with RANK, WORLD_SIZE and a common MASTER_PORT."""
    environment = {
        **environment, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
        "WORLD_SIZE": str(n_processes), "LOCAL_WORLD_SIZE": str(n_processes),
    }  # fmt: skip
    ranks = ({"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(n_processes))
    return start(*((fn, args, environment | rank) for rank in ranks))


def run_torchrun(
    fn: Callable[..., None],
    *args: object,
    n_processes: int,
    n_nodes: int = 1,
    max_restarts: int = 0,
    timeout: float = 60,
) -> SimpleNamespace:
    """Run fn(*args) under torchrun's agent, with n_processes processes on each of n_nodes nodes.

    An agent is what the command `torchrun` runs: it restarts processes that die. The agents of all
    "nodes" are threads of this process, so that they use its fork server. (An agent must not fork
    itself, because it has threads: the fork of a locked lock stays locked.)
    Returns .exit_codes (of the agents), .stdout and .stderr.
    """
    set_up_fork_server()
    endpoint = f"127.0.0.1:{free_port()}"
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(n_nodes) as pool:

        def run_agent(node: int) -> int:
            config = LaunchConfig(
                min_nodes=n_nodes,
                max_nodes=n_nodes,
                nproc_per_node=n_processes,
                run_id="test",
                rdzv_backend="c10d",
                rdzv_endpoint=endpoint,
                rdzv_configs={"is_host": node == 0},
                local_addr="127.0.0.1",
                max_restarts=max_restarts,
                monitor_interval=0.1,
                start_method="forkserver",
            )
            try:
                elastic_launch(config, run_call)(fn, args, None, folder)
                return 0
            except ChildFailedError:
                return 1

        agents = [pool.submit(run_agent, node) for node in range(n_nodes)]
        is_late = False
        while concurrent.futures.wait(agents, 1 if is_late else timeout).not_done:
            if not is_late:
                print_tracebacks(multiprocessing.active_children())
            is_late = True
            for process in multiprocessing.active_children():
                process.kill()
        stdout, stderr = read(folder, "stdout"), read(folder, "stderr")
        if is_late:
            raise TimeoutError(f"{stdout}\n{stderr}")
        exit_codes = [agent.result() for agent in agents]
        return SimpleNamespace(exit_codes=exit_codes, stdout=stdout, stderr=stderr)


def start_with_launcher(fn: Callable[..., None], *args: object, n_processes: int) -> Job:
    """Run fn(*args) in n_processes children of a process that can be killed, like torchrun."""
    environment = {"TORCHELASTIC_RUN_ID": "test", "MASTER_PORT": str(free_port())}
    return start((run_launcher, (fn, args, n_processes), environment))


def run_launcher(fn: Callable[..., None], args: tuple, n_processes: int) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(n_processes)}
    context = multiprocessing.get_context("fork")  # safe: this process has no threads yet
    for rank in range(n_processes):
        os.environ["RANK"] = str(rank)
        context.Process(target=fn, args=args).start()
    for process in multiprocessing.active_children():
        process.join()


def set_up_fork_server() -> None:
    test = os.environ.get("PYTEST_CURRENT_TEST", "")
    if "PYTEST_XDIST_WORKER" in os.environ and group_of(test) != "processes":
        # Each worker of pytest-xdist would start a fork server of its own, which takes seconds.
        raise RuntimeError(f'tests/conftest.py: the file is missing in GROUPS["processes"]: {test}')
    multiprocessing.set_forkserver_preload(PRELOADED)


def start(*calls: tuple[Callable[..., None], tuple, dict[str, str]]) -> Job:
    """Run each (fn, args, environment) in a process of its own."""
    set_up_fork_server()
    context = multiprocessing.get_context("forkserver")
    folder = tempfile.TemporaryDirectory()
    return Job(
        [
            context.Process(
                target=run_call, args=(fn, args, dict(os.environ) | environment, folder.name)
            )
            for fn, args, environment in calls
        ],
        folder,
    )


def run_call(fn: Callable[..., None], args: tuple, environment: dict | None, folder: str) -> None:
    """fn(*args) with this environment (None: the present one); the output goes to files."""
    if environment is not None:
        os.environ.clear()
        os.environ.update(environment)
    os.chdir(ROOT)
    for name in ("stdout", "stderr"):
        file = os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, getattr(sys, name).fileno())
    sys.stdout.reconfigure(line_buffering=True)  # so that a killed process leaves its output, too
    faulthandler.register(signal.SIGUSR1)
    torch.set_num_threads(1)
    fn(*args)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# --- What the processes run ---


def redirect(stream: str, descriptor: int) -> None:
    """Connect "stdin", "stdout" or "stderr" of this process to an open file."""
    number = ("stdin", "stdout", "stderr").index(stream)
    os.dup2(descriptor, number)
    setattr(sys, stream, os.fdopen(number, "w" if number else "r", closefd=False))


def run_torchrun_command(*args: str) -> None:
    """The command `torchrun ARGS`; the processes that it starts are forks of the server, too."""
    # Python would start another fork server here, although this process knows the address of ours.
    multiprocessing.forkserver._forkserver.ensure_running = lambda: None
    torch.distributed.run.main(["--start-method=forkserver", "--run-path", *args])


def run_train(*flags: str) -> None:
    """`python train.py FLAGS`, without loss.png, which would take longer than tiny runs."""
    metrics.plot_losses = lambda *args, **kwargs: None
    sys.argv = ["train.py", *flags]
    configurator.run_main(train.main)
