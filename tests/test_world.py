"""Where the work is done: the device, the precision and the compiler that a machine offers."""

import os
import platform
import signal
import sys

import pytest
import torch

from configurator import FolioError
from training import machine as machine_module
from training.machine import (
    advice_when_out_of_memory, choose_compile, choose_device, choose_dtype,
)  # fmt: skip
from training.world import StopSignal, World

CPU, GPU, APPLE = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def machine(monkeypatch, tmp_path):
    """Pretend to be another machine; this one may have no GPU to ask."""
    (tmp_path / "Python.h").touch()

    def pretend(
        cuda=False, mps=False, capability=(9, 0), triton=True, compiler=True, headers=tmp_path
    ):
        monkeypatch.setattr("shutil.which", lambda name: name if compiler else None)
        monkeypatch.setattr("sysconfig.get_path", lambda *_: str(headers))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
        monkeypatch.setattr(machine_module, "has_triton", lambda: triton)

    return pretend


def test_auto_takes_the_fastest_device_there_is(machine):
    for there, wanted in (
        ({"cuda": True}, "cuda"), ({"mps": True}, "mps"), ({"cuda": True, "mps": True}, "cuda"),
        ({}, "cpu"),
    ):  # fmt: skip
        machine(**there)
        assert choose_device("auto") == wanted
        assert choose_device("cpu") == "cpu"


def test_a_device_that_is_not_there_is_refused(machine):
    machine()
    for name in ("cuda", "mps"):
        with pytest.raises(FolioError, match=f"--device={name}"):
            choose_device(name)


def test_each_process_of_a_node_takes_a_gpu_of_its_own(machine, monkeypatch):
    machine(cuda=True)
    taken = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", taken.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert World().settle().device == torch.device("cuda:3") == taken[0]
    monkeypatch.setenv("LOCAL_RANK", "4")
    with pytest.raises(FolioError, match="has 4 GPUs: --nproc_per_node=4"):
        World().settle()


def test_auto_takes_the_precision_the_device_is_good_at(machine, monkeypatch):
    machine(cuda=True, capability=(8, 0))
    assert choose_dtype("auto", GPU)[0] == torch.bfloat16
    assert choose_dtype("auto", APPLE)[0] == torch.float32
    for has, wanted in ((True, torch.bfloat16), (False, torch.float32)):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda has=has: has)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
        assert choose_dtype("auto", CPU)[0] == wanted
    machine(cuda=True, capability=(7, 5))
    assert choose_dtype("auto", GPU)[0] == torch.float16
    with pytest.raises(FolioError, match="--dtype=bfloat16"):
        choose_dtype("bfloat16", GPU)
    with pytest.raises(FolioError, match="--dtype=float64"):
        choose_dtype("float64", APPLE)


def test_auto_compiles_where_that_can_be_done_and_pays(machine):
    machine(cuda=True)
    assert choose_compile("auto", GPU)[0] is True
    assert choose_compile("auto", CPU)[0] is choose_compile("auto", APPLE)[0] is False
    assert choose_compile(True, CPU)[0] is True


@pytest.mark.skipif(sys.platform == "win32", reason="there Triton brings what it needs")
@pytest.mark.parametrize(
    ("without", "why"),
    [
        ({"triton": False}, "Triton is not installed"),
        ({"compiler": False}, "no C compiler"),
        ({"headers": "/nowhere"}, "no Python.h"),
    ],
)
def test_compiling_for_a_gpu_wants_triton_and_what_triton_wants(machine, without, why):
    machine(cuda=True, **without)
    chosen, told = choose_compile("auto", GPU)
    assert chosen is False and why in told
    with pytest.raises(FolioError, match=why):
        choose_compile(True, GPU)


def test_compiling_for_a_cpu_wants_a_compiler(machine):
    machine(compiler=False)
    with pytest.raises(FolioError, match="--compile"):
        choose_compile(True, CPU)


def test_processes_meet_on_the_cpu_where_the_gpu_is_apples(machine):
    machine(mps=True)
    world = World()
    world.size = 2
    assert world.settle().device == CPU
    with pytest.raises(FolioError, match="--device=mps"):
        world.settle("mps")


def test_a_world_tells_what_it_chose_and_why():
    world = World().settle("cpu", "float32")
    assert world.why.startswith("cpu (")
    assert "float32" in world.why and "not compiled" in world.why
    assert "bfloat16" in World().settle("cpu", "bfloat16").why


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries manage otherwise")
def test_memory_that_one_step_frees_is_the_next_ones_as_it_is():
    import resource  # which Windows has not

    World().settle("cpu")

    def step():
        activations = [torch.ones(2**21) for _ in range(24)]  # 192 MiB, on 49,152 pages
        while activations:  # backward, the latest first
            activations.pop()

    for _ in range(3):
        step()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        step()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before < 1000


def test_in_a_world_of_one_all_work_is_ones_own():
    world = World().settle("cpu")
    assert list(world.share(range(5))) == [0, 1, 2, 3, 4]
    world.rank, world.size = 1, 3
    assert list(world.share(range(8))) == [1, 4, 7]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows delivers signals otherwise")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_the_first_signal_is_a_wish_and_the_second_an_order(number, status):
    before = signal.getsignal(number)
    with StopSignal() as stop:
        assert not stop.wished(World())
        os.kill(os.getpid(), number)
        assert stop.wished(World()) and stop.status == status
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), number)
    assert signal.getsignal(number) is before


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGHUP")
def test_a_terminal_that_closes_is_a_wish_however_often_it_says_so():
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    try:
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.wished(World()) and stop.status == 129
        signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
        with StopSignal() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not stop.wished(World())
    finally:
        signal.signal(signal.SIGHUP, before)


def test_running_out_of_memory_says_what_to_try():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("you can't allocate memory"),
        RuntimeError("MPS backend out of memory"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"),
        MemoryError(),
    ):
        with (
            pytest.raises(FolioError, match="--batch_size"),
            advice_when_out_of_memory("--batch_size"),
        ):
            raise error
    with pytest.raises(RuntimeError, match="a bug"), advice_when_out_of_memory("--batch_size"):
        raise RuntimeError("a bug")


def test_a_signal_that_comes_while_processes_agree_counts_at_the_next_step(monkeypatch):
    world = World()
    with StopSignal() as stop:

        def agree(status):
            os.kill(os.getpid(), signal.SIGTERM)
            return status

        monkeypatch.setattr(world, "greatest", agree)
        assert not stop.wished(world)  # not yet known to all
        monkeypatch.setattr(world, "greatest", lambda status: status)
        assert stop.wished(world)
        assert stop.status == 143
