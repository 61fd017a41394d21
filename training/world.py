"""Who am I among how many, on which device, in which precision.

A single process is a world of one: the ordinary case, not a branch. The training story asks its
world to share work, to add up numbers and to agree on stopping; how many there are it has to know
only where gradients are averaged.
"""

import contextlib
import datetime
import itertools
import os
import signal
from collections.abc import Callable, Iterable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from configurator import FolioError
from training.machine import choose_compile, choose_device, choose_dtype, keep_freed_memory

PATIENCE = datetime.timedelta(hours=1)  # for the main process to prepare a dataset, for instance
HANG = datetime.timedelta(minutes=15)  # an exchange of gradients that takes longer hangs


class World:
    """One process among `size`, and, once settle() has chosen them, its device and precision.

    with World() as world: ... joins the others if torchrun has started this process, and parts
    from them at the end.
    """

    def __init__(self):
        self.rank, self.size = 0, 1
        self.device = torch.device("cpu")
        self.dtype = torch.float32  # of matrix products; training keeps weights_dtype
        self.compile = False  # whether torch.compile fuses the model's operations
        self.why = ""  # the choice and its reasons, in one line
        # The processes again, with PATIENCE: for when one keeps the others waiting.
        self.talk = None

    def __enter__(self) -> "World":
        if {"RANK", "WORLD_SIZE"} <= os.environ.keys():  # torchrun tells each process who it is
            nccl = torch.cuda.is_available() and dist.is_nccl_available()
            backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
            store, self.rank, self.size = meeting_point()
            dist.init_process_group(
                backend, store=store, rank=self.rank, world_size=self.size, timeout=HANG
            )
            self.talk = dist.new_group(backend="gloo", timeout=PATIENCE)
        return self

    def __exit__(self, kind, error, _) -> None:
        if not dist.is_initialized():
            return
        if error is None or isinstance(error, SystemExit):
            dist.destroy_process_group()
        elif isinstance(error, RuntimeError) and is_loss_of_a_process(error):
            raise FolioError(
                f"process {self.rank} of {self.size} has lost another one; what the run needs to "
                "go on is in its latest checkpoint: --init_from=resume"
            ) from None

    def settle(self, device: str = "auto", dtype: str = "auto", compile: str | bool = "auto"):
        """Choose device, precision and compiler, "auto" being the best the machine can do; self.

        Raises FolioError if the machine cannot do what is asked for.
        """
        place = choose_device(device)
        if place == "mps" and self.size > 1:  # whose processes torch cannot join
            if device == "mps":
                raise FolioError("--device=mps: works without torchrun only; --device=cpu with it")
            place = "cpu"
        self.device = torch.device(place)
        if place == "cuda":  # a node's processes take a GPU each
            number, there = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
            if number >= there:
                raise FolioError(f"this node has {there} GPUs: --nproc_per_node={there}")
            self.device = torch.device("cuda", number)
            torch.cuda.set_device(self.device)
        if place == "cpu":
            keep_freed_memory()
        self.dtype, why_precision = choose_dtype(dtype, self.device)
        self.compile, why_compile = choose_compile(compile, self.device)
        names = {"cuda": self.device_name, "mps": "Apple GPU"}
        name = names.get(self.device.type, f"{torch.get_num_threads()} threads")
        many = f"{self.size} processes, each on " if self.size > 1 else ""
        how = f"{'compiled' if self.compile else 'not compiled'}{why_compile}"
        precision = str(self.dtype).removeprefix("torch.")
        self.why = f"{many}{self.device.type} ({name}), {precision}{why_precision}, {how}"
        return self

    @property
    def device_name(self) -> str:
        """The GPU's, such as "NVIDIA H100 80GB HBM3"; "" without CUDA."""
        return torch.cuda.get_device_name() if self.device.type == "cuda" else ""

    # --- Among many ---

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that prepares, writes and prints."""
        return self.rank == 0

    def decide(self, choose: Callable[[], Any]) -> Any:
        """What choose() returns on the main process, told to all.

        If the main process gives up in it, with an error or an exit, the others leave silently.
        """
        if self.size == 1:
            return choose()
        answer = [None, True]
        try:
            if self.is_main:
                answer = [choose(), False]
        finally:
            dist.broadcast_object_list(answer, group=self.talk)
        result, gave_up = answer
        if gave_up:
            raise SystemExit(0)  # the main process's exit status is the job's
        return result

    def after_main(self, act: Callable[[], Any]) -> Any:
        """What act() returns, in each process, the main one having been through it first.

        So one process fetches or prepares what all will find, and one complains.
        """
        results = []
        self.decide(lambda: results.append(act()))
        return results[0] if results else act()

    def share(self, work: Iterable) -> Iterable:
        """This process's part of the work: every size-th item, beginning with its rank's."""
        return itertools.islice(work, self.rank, None, self.size)

    def total(self, numbers: torch.Tensor) -> torch.Tensor:
        """The sum of `numbers`, element by element, over all processes."""
        if self.size > 1:
            dist.all_reduce(numbers)
        return numbers

    def greatest(self, number: int) -> int:
        """The greatest of all processes' numbers."""
        if self.size == 1:
            return number
        numbers = torch.tensor([number])
        dist.all_reduce(numbers, dist.ReduceOp.MAX, group=self.talk)
        return int(numbers)

    # --- On the device ---

    @property
    def weights_dtype(self) -> torch.dtype:
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def runner_for(self, model: torch.nn.Module) -> torch.nn.Module:
        """What runs the model: itself, compiled where that pays.

        In a world of many, its backward pass leaves in each process the mean of all processes'
        gradients, unless they are held back.
        """
        runner = torch.compile(model) if self.compile else model
        if self.size > 1:
            devices = [self.device] if self.device.type == "cuda" else None
            runner = DistributedDataParallel(runner, devices, gradient_as_bucket_view=True)
        return runner

    def rehearse(self, runner: torch.nn.Module, batch_size: int, block_size: int) -> None:
        """One pass of runner_for()'s model forward and backward, for nothing, in a world of many.

        After the first backward pass torch settles in which order gradients are sent, and so in
        which order three or more of them are added. Without a rehearsal the first step after every
        start would add in another order, and a resumed run would differ in the last digit.
        """
        if isinstance(runner, DistributedDataParallel):
            inputs = torch.zeros(batch_size, block_size, dtype=torch.long, device=self.device)
            targets = inputs.clone()  # torch.compile would remember if the two were one
            with self.autocast():
                loss = runner(inputs, targets)[1]
            loss.backward()
            runner.zero_grad(set_to_none=True)

    def hold_back(self, runner: torch.nn.Module, held: bool) -> None:
        """Whether the next passes of runner_for()'s model keep their gradients to this process.

        To be said before the forward pass, in which torch prepares what the backward one sends.
        """
        if isinstance(runner, DistributedDataParallel):
            runner.require_backward_grad_sync = not held

    def send(self, *tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Copy a batch to the device, without waiting for the copy where that can be done."""
        if self.device.type == "cuda":  # only from pinned memory can the GPU fetch by itself
            tensors = tuple(tensor.pin_memory() for tensor in tensors)
        return tuple(tensor.to(self.device, non_blocking=True) for tensor in tensors)

    def autocast(self) -> contextlib.AbstractContextManager:
        """Within it, matrix products run in `dtype`; sums that need it stay in float32."""
        if self.dtype in (torch.float32, torch.float64):
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Keeps small gradients from vanishing in float16; does nothing in other precisions."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)

    def generator(self, seed: int) -> torch.Generator:
        """A source of chance of its own, so that drawing samples disturbs nothing else."""
        # Apple's GPUs have drawn wrongly from some distributions: their dice stay on the CPU.
        where = "cpu" if self.device.type == "mps" else self.device
        return torch.Generator(where).manual_seed(seed)


# --- Among many: how processes meet, and what becomes of one that is restarted ---


def meeting_point() -> tuple[dist.Store, int, int]:
    """Where the processes find one another, this one's rank, and their number."""
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=PATIENCE))
    except ValueError as error:
        raise FolioError(
            f"RANK and WORLD_SIZE are set, as torchrun does it, but then: {error}; unset them, or "
            "start with torchrun"
        ) from None
    if os.environ.get("LOCAL_WORLD_SIZE") == str(size):
        # torchrun, restarting the processes of a node, keeps its store, and in it the addresses of
        # the dead, which whoever comes first would take for those of the living: each attempt gets
        # a corner of its own. (Across nodes the count may differ.)
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT')}", store)
    return store, rank, size


def is_loss_of_a_process(error: RuntimeError) -> bool:
    """Whether this is what torch says when a process it talks to is gone."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def job_name() -> str:
    """The same for each attempt at one job of torchrun's or SLURM's, another for each job."""
    if job := os.environ.get("SLURM_JOB_ID"):
        return f"SLURM_JOB_ID={job}"
    job = os.environ.get("TORCHELASTIC_RUN_ID", "")
    if job == "none":  # torchrun was given no name: take the one of its process
        job = f"process {os.getppid()}"
    return job and f"TORCHELASTIC_RUN_ID={job}"


def is_restarted() -> bool:
    """Whether torchrun or SLURM has started this job before."""
    counts = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
    return any(int(os.environ.get(count) or 0) > 0 for count in counts)


# --- Stopping together ---


class StopSignal:
    """Within it, the first SIGINT or SIGTERM is a wish to stop, and the second one stops.

    with StopSignal() as stop:
        while not stop.wished(world): ...

    A closed terminal's SIGHUP is such a wish, too. `stop.status` is then the exit status that
    shells expect: 130, 143 or 129; 0 if nobody wished.
    """

    def __init__(self):
        self.status = 0

    def wished(self, world: World) -> bool:
        """Whether any process of the world was asked to stop: all learn of it at the same step."""
        agreed = world.greatest(self.status)
        # A signal that came while they agreed is not in it, and counts at the next step.
        self.status = agreed or self.status
        return agreed != 0

    def __enter__(self):
        numbers = [signal.SIGINT, signal.SIGTERM]
        # Windows has no SIGHUP, and nohup has it ignored.
        if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            numbers.append(signal.SIGHUP)
        self.before = {number: signal.getsignal(number) for number in numbers}
        for number in numbers:
            signal.signal(number, self.wish)
        return self

    def wish(self, number: int, frame: FrameType | None) -> None:
        # A closing terminal may tell a process twice, and torchrun passes on what its processes
        # have heard themselves; it is the one that kills those who take more than 30 seconds.
        insists = number in (signal.SIGINT, signal.SIGTERM) and not dist.is_torchelastic_launched()
        if self.status and insists:
            raise KeyboardInterrupt
        self.status = self.status or 128 + number

    def __exit__(self, *_):
        for number, handler in self.before.items():
            signal.signal(number, handler)
