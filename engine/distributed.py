"""The processes of a training job: ranks, collectives, DDP, and stopping together.

    with Distributed() as dist:                       # one process: world size 1, nothing to set up
        config = dist.run_on_main(read_config)
        for micro_batch in dist.shard(range(8)): ...  # rank 1 of 4: micro-batches 1 and 5

torchrun starts one process per GPU (or per group of CPU cores) and tells each its rank. The same
code serves one process and many: with one process, every method here is trivial.

gloo connects the CPUs of all processes: it sends objects, such as settings. On GPUs, NCCL sends
tensors, such as gradients.

Several nodes: gloo listens at the address that the node's host name stands for. On some clusters
this is 127.0.0.1. There, set GLOO_SOCKET_IFNAME to the network interface between the nodes, for
example eth0 or ib0 (and NCCL_SOCKET_IFNAME, if NCCL picks a wrong one).
"""

import contextlib
import datetime
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as torch_dist
from torch.nn.parallel import DistributedDataParallel

from configurator import FolioError, first_line

T = TypeVar("T")

CONTROL_TIMEOUT = datetime.timedelta(hours=1)  # for objects: rank 0 may prepare a dataset first
TENSOR_TIMEOUT = datetime.timedelta(minutes=15)  # for tensors, such as gradients


class Distributed:
    """The process group of the job, as a context manager.

    rank: number of this process, from 0 to world_size - 1. local_rank: its number on this node.
    shutdown: which signals the processes have received, such as Ctrl-C.
    Raises FolioError if the processes cannot connect, or when another process has died. (NCCL
    notices a lost process after its timeout only; torchrun sends signals before that.)
    """

    def __init__(self):
        self.rank, self.world_size, self.local_rank = 0, 1, 0
        self.shutdown = GracefulShutdown(self)
        self._launcher_pid: int | None = None  # torchrun, the parent of this process
        self._tensor_groups: dict[torch.device, torch_dist.ProcessGroup] = {}

    def __enter__(self) -> "Distributed":
        if {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # set by torchrun
            if torch_dist.is_torchelastic_launched():  # torchelastic: the code of torchrun
                self._launcher_pid = os.getppid()
            store, self.rank, self.world_size = rendezvous()
            # SLURM's name, for processes that srun starts without torchrun.
            self.local_rank = int(os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID", 0)))
            try:
                torch_dist.init_process_group(
                    "gloo",
                    store=store,
                    rank=self.rank,
                    world_size=self.world_size,
                    timeout=CONTROL_TIMEOUT,
                )
            except RuntimeError as error:
                raise FolioError(
                    f"process {self.rank} of {self.world_size} cannot connect to the other "
                    f"processes ({first_line(error)}); with several nodes, set GLOO_SOCKET_IFNAME "
                    "to the network interface between them, for example eth0"
                ) from error
        return self

    def __exit__(self, kind, error, _) -> None:
        if not torch_dist.is_initialized():
            return
        # An expected end: close the connections. (After another error this might wait for a process
        # that still computes.)
        if error is None or isinstance(error, SystemExit | FolioError):
            torch_dist.destroy_process_group()
        elif isinstance(error, RuntimeError) and (  # of a collective
            isinstance(error, torch_dist.DistError) or "gloo" in str(error)
        ):
            raise FolioError(
                f"process {self.rank} of {self.world_size}: another process died (its own error "
                "is further up), or the connection failed; continue from the latest checkpoint "
                f"with --init_from=resume; the error here: {' '.join(str(error).split())}"
            ) from error

    @property
    def is_main(self) -> bool:
        """True for rank 0, the process that prepares data, writes files and prints."""
        return self.rank == 0

    def launcher_died(self) -> bool:
        """True if torchrun started this process and does not run any more (after kill -9)."""
        return self._launcher_pid is not None and os.getppid() != self._launcher_pid

    # --- Collectives: each must be called by all processes, in the same order ---

    def run_on_main(self, fn: Callable[..., T], *args: Any) -> T:
        """fn(*args), run by the main process, which sends the result to all.

        One process: just fn(*args).

        If fn raises, or exits, in the main process, the other processes exit silently.
        """
        if self.world_size == 1:
            return fn(*args)
        result, failed = None, True
        try:
            if self.is_main:
                result, failed = fn(*args), False
        finally:  # also if fn raises: all processes receive failed=True, then the error goes on
            payload = [result, failed]
            torch_dist.broadcast_object_list(payload)  # the payload of rank 0 arrives in all
        result, failed = payload
        if failed:
            raise SystemExit(0)  # the job's exit status is the main process's
        return result

    def main_process_first(self, fn: Callable[..., T], *args: Any) -> T:
        """fn(*args), run by the main process, then by all others. One process: just fn(*args).

        So data is downloaded once, and an error is printed once.
        """
        results = []
        self.run_on_main(lambda: results.append(fn(*args)))  # fn's result is not sent
        return results[0] if self.is_main else fn(*args)

    def check_same(self, **values: Any) -> None:
        """Raises FolioError if a value differs from the main process's value; all processes exit.

        check_same(dtype=torch.float16): the scaled gradients of float16, for example, cannot be
        averaged with the gradients of bfloat16.
        """
        expected = self.run_on_main(lambda: values)
        if not self.all_reduce_max(int(values != expected)):
            return
        different = [name for name, value in values.items() if value != expected[name]]
        if not different:
            raise SystemExit(0)  # the process with another value prints the error
        own, main = ({name: v[name] for name in different} for v in (values, expected))
        raise FolioError(
            f"process {self.rank} has {own}, but process 0 {main}; choose --device and --dtype "
            "that all nodes support (for example --dtype=float32), and copy the dataset to all "
            "nodes"
        )

    def broadcast_tensors(self, nested: Any, device: torch.device) -> Any:
        """Send nested dicts and lists from the main process to all processes.

        Returns them with all tensors on `device`. The other processes pass None. Each tensor is
        sent by itself, from device to device, so no process needs memory for a second copy.
        """
        if self.world_size == 1:
            return map_tensors(nested, lambda tensor: tensor.to(device))
        # First the containers, the numbers, and the shapes and dtypes of the tensors: a tensor on
        # the device "meta" has nothing else.
        received = self.run_on_main(lambda: map_tensors(nested, lambda tensor: tensor.to("meta")))

        def send(tensor: torch.Tensor) -> torch.Tensor:
            tensor = tensor.to(device) if self.is_main else torch.empty_like(tensor, device=device)
            torch_dist.broadcast(tensor, group_src=0, group=self._tensor_group(device))
            return tensor

        return map_tensors(nested if self.is_main else received, send)

    def all_reduce_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """Replace `tensor`, in place, by the sum of all processes' tensors; returns it."""
        if self.world_size > 1:
            torch_dist.all_reduce(tensor, group=self._tensor_group(tensor.device))
        return tensor

    def all_reduce_max(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world_size == 1:
            return number
        tensor = torch.tensor([number])
        torch_dist.all_reduce(tensor, torch_dist.ReduceOp.MAX)
        return int(tensor)

    def shard(self, items: Sequence[T]) -> Sequence[T]:
        """The items of this process: items[rank::world_size]. No communication."""
        return items[self.rank :: self.world_size]

    def _tensor_group(self, device: torch.device) -> torch_dist.ProcessGroup:
        """The processes, connected by NCCL if `device` is a GPU, else by gloo.

        Created when first needed, because only then it is known which device computes.
        """
        if device not in self._tensor_groups:
            torch_dist.barrier()  # waits up to CONTROL_TIMEOUT: other processes may still load data
            is_cuda = device.type == "cuda"
            if is_cuda:
                gpus: list[str] = [""] * self.world_size
                own_gpu = str(torch.cuda.get_device_properties(device).uuid)
                torch_dist.all_gather_object(gpus, own_gpu)
                self.run_on_main(check_one_process_per_gpu, gpus)
            nccl = is_cuda and torch_dist.is_nccl_available()
            self._tensor_groups[device] = torch_dist.new_group(
                backend="nccl" if nccl else "gloo",
                timeout=TENSOR_TIMEOUT,
                device_id=device if nccl else None,  # connects at once, so that errors come now
            )
        return self._tensor_groups[device]

    # --- DDP: every process has the whole model, and gradients are averaged ---

    def wrap_ddp(
        self, model: torch.nn.Module, device: torch.device, find_unused_parameters: bool = False
    ) -> torch.nn.Module:
        """The model in DistributedDataParallel; with one process, the model itself.

        After loss.backward(), each process has the mean of all processes' gradients. Compile the
        model before, not after: the methods below need the DDP module itself. (torch.compile then
        makes one graph for each bucket, a group of gradients that DDP sends together. So one bucket
        is sent while the backward pass computes the next: torch._dynamo.config.optimize_ddp.)
        """
        if self.world_size == 1:
            return model
        ddp = DistributedDataParallel(
            model,
            device_ids=[device] if device.type == "cuda" else None,
            process_group=self._tensor_group(device),
            gradient_as_bucket_view=True,  # gradients live in the buckets that are sent
            # Else DDP would wait for the gradients of unused parameters. (A parameter that an
            # earlier step has used gets zeros. With one process, such a parameter gets no gradient,
            # and the optimizer does not change it.)
            find_unused_parameters=find_unused_parameters,
        )
        # The constructor has sent the buffers (of a changed model.py) once. From now on,
        # broadcast_buffers() sends them, and not each forward pass: this would wait for a process
        # that has no batch to evaluate.
        ddp.broadcast_buffers = False
        return ddp

    def set_grad_sync(self, model: torch.nn.Module, enabled: bool) -> None:
        """Let the next forward and backward pass average gradients, or not (DDP's no_sync).

        model: what wrap_ddp returned. With one process there is nothing to do.
        """
        if self.world_size > 1:
            model.require_backward_grad_sync = enabled

    def broadcast_buffers(self, model: torch.nn.Module) -> None:
        """Give the main process's buffers to all: a changed model.py may have a BatchNorm in it."""
        if self.world_size > 1:
            for buffer in model.buffers():
                torch_dist.broadcast(buffer, group_src=0, group=self._tensor_group(buffer.device))

    def warm_up_ddp(self, model: torch.nn.Module, loss_fn: Callable[[], torch.Tensor]) -> None:
        """Run one forward and backward pass, and clear the gradients.

        DDP decides after its first backward pass in which order it sums gradients, so the first
        step would be rounded differently from all others. Without a warm-up, a resumed run would
        differ from an uninterrupted one in the last digit. With one process: nothing to do.
        """
        if self.world_size > 1:
            buffers = {name: buffer.clone() for name, buffer in model.named_buffers()}
            loss_fn().backward()
            model.zero_grad(set_to_none=False)  # gradients stay in DDP's buckets
            # If model.py was changed, the forward pass may have changed the statistics of a
            # BatchNorm, for example, or may have made a buffer.
            for name, buffer in model.named_buffers():
                if name in buffers and buffers[name].shape == buffer.shape:
                    buffer.copy_(buffers[name])


def map_tensors(nested: Any, fn: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """A copy of nested dicts and lists, in which fn(tensor) is in the place of each tensor."""
    if isinstance(nested, torch.Tensor):
        return fn(nested)
    if isinstance(nested, dict):
        return {key: map_tensors(value, fn) for key, value in nested.items()}
    if isinstance(nested, list | tuple):
        return type(nested)(map_tensors(value, fn) for value in nested)
    return nested


def check_one_process_per_gpu(gpus: Sequence[str]) -> None:
    """FolioError if two processes have chosen one GPU. gpus: the GPU of each process."""
    n_gpus = len(set(gpus))
    if n_gpus < len(gpus):
        raise FolioError(
            f"{len(gpus)} processes, but only {n_gpus} GPU{'' if n_gpus == 1 else 's'}; start one "
            f"process per GPU (--nproc_per_node={torch.cuda.device_count()}; without torchrun, set "
            "LOCAL_RANK), or use --device=cpu"
        )


# --- Rendezvous (how the processes find one another) and restarts ---


def rendezvous() -> tuple[torch_dist.Store, int, int]:
    """(store, rank, world_size), from the environment variables that torchrun sets.

    The store is where the processes exchange their addresses.
    """
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    try:
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # The store is in torchrun, and is older than this process. If torchrun was killed, this
            # fails at once. (A store in process 0 may be younger: then rendezvous() waits for it.)
            address_and_port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
            socket.create_connection(address_and_port).close()
        store, rank, world_size = next(torch_dist.rendezvous("env://", timeout=CONTROL_TIMEOUT))
        # When torchrun restarts processes, the store still has the addresses of dead processes, and
        # a new process would connect to them. So each attempt has its own part of the store.
        store = torch_dist.PrefixStore(name_this_attempt(store, rank, world_size), store)
        return store, rank, world_size
    except (ValueError, OSError, torch_dist.DistError) as error:
        if "EADDRINUSE" in str(error):
            raise FolioError(
                f"MASTER_PORT={os.environ['MASTER_PORT']}: another program uses this port; "
                "set MASTER_PORT to another number"
            ) from error
        raise FolioError(
            f"RANK and WORLD_SIZE are set, but connecting to {address} failed "
            f"({first_line(error)}); start torchrun (again, if it was killed), or unset RANK and "
            "WORLD_SIZE"
        ) from error


def name_this_attempt(store: torch_dist.Store, rank: int, world_size: int) -> str:
    """A name for this start of the job: the same in all processes, new after each restart.

    The counts of restarts cannot serve as a name: with several nodes they may differ.
    Example: process 1 writes "waiting 1" = a7, its random id, and waits for an answer. Process 0,
    whose id is c3, reads a7 and writes "a7" = c3: the name is c3. After a restart, process 1 has
    another id. So it never reads an old answer, which is under a7.
    """
    own_id = uuid.uuid4().hex
    if rank > 0:
        store.set(f"waiting {rank}", own_id)  # replaces the id of an earlier process
        name = store.get(own_id).decode()  # waits for the answer of rank 0
        store.add(name, 1)
        return name
    deadline = time.monotonic() + CONTROL_TIMEOUT.total_seconds()
    while store.add(own_id, 0) < world_size - 1:  # until all have received the name
        if time.monotonic() > deadline:
            raise TimeoutError("a process has not answered")
        for other in range(1, world_size):
            if store.check([f"waiting {other}"]):
                store.set(store.get(f"waiting {other}").decode(), own_id)
        time.sleep(0.02)
    return own_id


def is_restarted() -> bool:
    """True if torchrun or SLURM has started this job before.

    With several nodes, perhaps only the node that lost a process knows: take the maximum of all.
    """
    counts = (os.environ.get(f"{name}_RESTART_COUNT", "") for name in ("TORCHELASTIC", "SLURM"))
    return any(count.isdecimal() and int(count) > 0 for count in counts)


# --- Signals ---


class GracefulShutdown:
    """Turns the first signal into a request that the training loop can see.

    The signals are SIGINT, SIGTERM, SIGHUP, and those that schedulers can send before a time limit:
    SIGUSR1 (SLURM), SIGUSR2 and SIGXCPU (Grid Engine, LSF).

    with dist.shutdown:
        while not dist.shutdown.sync(): ...
    sys.exit(dist.shutdown.exit_status)

    exit_status: 128 + the signal's number, as in a shell (130 after SIGINT); 0 without a signal.
    A second SIGINT or SIGTERM raises KeyboardInterrupt at once, except under torchrun. Signals that
    this process ignores, because it was started by nohup or in the background, stay ignored.
    """

    # Seconds between two signals. A program that forwards signals may send one twice at once.
    MIN_INTERVAL = 0.3

    def __init__(self, dist: Distributed):
        self.dist, self.exit_status, self.first_signal_time = dist, 0, 0.0
        self.should_stop = False  # equal in all processes, after sync()

    def sync(self) -> bool:
        """True if any process has received a signal; the answer is equal in all processes."""
        status = self.dist.all_reduce_max(self.exit_status if self.is_requested() else 0)
        # A signal that arrived during the all-reduce is not in `status`: the next call sees it.
        self.exit_status = status or self.exit_status
        self.should_stop = status != 0
        # Here, because another process may notice the death of torchrun before this one does.
        if self.should_stop and self.dist.is_main and self.dist.launcher_died():
            print_stderr("torchrun has died: saving, then exiting")
        return self.should_stop

    def is_requested(self) -> bool:
        """Whether this process knows that it has to stop. No communication.

        A process whose torchrun was killed stops, with status 143: no program would read its
        result, and its lock would keep a restarted job out of the run folder.
        """
        if not self.exit_status and self.dist.launcher_died():
            self.exit_status = 128 + signal.SIGTERM
        return self.exit_status != 0

    def __enter__(self) -> "GracefulShutdown":
        self._previous_handlers = {}
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2", "SIGXCPU"):
            signum = getattr(signal, name, None)  # Windows has only the first two
            if signum is not None and signal.getsignal(signum) != signal.SIG_IGN:
                self._previous_handlers[signum] = signal.signal(signum, self._handle)
        return self

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        # A terminal that closes may send SIGHUP twice, and torchrun forwards the signals that its
        # processes have received already. (torchrun kills processes that need over 30 seconds.)
        can_force = (
            signum in (signal.SIGINT, signal.SIGTERM) and not torch_dist.is_torchelastic_launched()
        )
        seconds = time.monotonic() - self.first_signal_time
        if self.exit_status and can_force and seconds > self.MIN_INTERVAL:
            if self.dist.is_main:
                print_stderr("exiting without saving; steps after the last checkpoint are lost")
            raise KeyboardInterrupt
        if not self.exit_status and signum == signal.SIGINT and self.dist.is_main:
            again = "; press Ctrl-C again to exit without saving" if can_force else ""
            print_stderr(f"finishing this step, then saving{again}")
        if not self.exit_status:
            self.exit_status, self.first_signal_time = 128 + signum, time.monotonic()

    def __exit__(self, *_) -> None:
        for signum, handler in self._previous_handlers.items():
            signal.signal(signum, handler)


def print_stderr(message: str) -> None:
    """Print a line on stderr, from a signal handler too.

    The handler may interrupt a print in the middle, and Python's streams cannot be entered twice.
    """
    with contextlib.suppress(OSError, ValueError, AttributeError):  # stderr is closed, or None
        number = sys.stderr.fileno()
        # On a terminal, first erase the progress bar in this line.
        start = "\r\x1b[K" if os.isatty(number) else "\n"
        os.write(number, f"{start}{message}\n".encode())
