"""The choice of device, dtype and torch.compile, and the transfer of tensors to the device."""

import ast
import contextlib
import dataclasses
import math
import platform
import sys
import threading
from pathlib import Path

import pytest
import torch

from configurator import FolioError
from engine import device as device_module
from engine.device import (
    ComputeDevice,
    choose_compile,
    choose_device,
    choose_dtype,
    cpu_quota,
    explain_out_of_memory,
    find_device,
    has_bfloat16,
)

CPU, CUDA, MPS = (torch.device(name) for name in ("cpu", "cuda", "mps"))


@pytest.fixture
def fake_machine(monkeypatch, tmp_path):
    """Let torch and the system report another machine; this one may have no GPU."""
    (tmp_path / "Python.h").touch()

    def fake(
        n_gpus=0, mps=False, capability=(9, 0), triton=True, compiler=True, headers=tmp_path
    ) -> None:
        monkeypatch.setattr("shutil.which", lambda name: name if compiler else None)
        monkeypatch.setattr("sysconfig.get_path", lambda *_: str(headers))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: n_gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: n_gpus)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device=None: "NVIDIA Test")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: capability)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: name if triton else None)

    return fake


@pytest.fixture
def cuda_settings(monkeypatch) -> dict:
    """What choose_device() sets for the process: the current GPU, the precision of matmuls."""
    settings = {}
    monkeypatch.setattr(torch.cuda, "set_device", lambda gpu: settings.update(current=gpu))
    monkeypatch.setattr(
        torch, "set_float32_matmul_precision", lambda name: settings.update(precision=name)
    )
    return settings


# --- Device ---


def test_auto_prefers_cuda_then_mps_then_cpu(fake_machine):
    for n_gpus, mps, expected in ((1, False, "cuda"), (1, True, "cuda"), (0, True, "mps")):
        fake_machine(n_gpus=n_gpus, mps=mps)
        assert find_device("auto").type == expected
        assert find_device("cpu") == CPU
    fake_machine()
    assert find_device("auto") == CPU


def test_unavailable_device_is_refused(fake_machine):
    fake_machine()
    for name in ("cuda", "mps"):
        with pytest.raises(FolioError, match=f"--device={name}: not available.*--device=cpu"):
            choose_device(name)


def test_each_local_rank_takes_its_own_gpu(fake_machine, cuda_settings):
    fake_machine(n_gpus=4)
    device = choose_device(local_rank=3, world_size=8)
    assert device.torch_device == torch.device("cuda:3") == cuda_settings["current"]
    assert device.description.startswith("8 processes, each on cuda (NVIDIA Test)")
    with pytest.raises(FolioError, match="only 4 GPUs on this node; use --nproc_per_node=4"):
        choose_device(local_rank=4, world_size=8)


def test_process_that_sees_one_gpu_takes_it(fake_machine, cuda_settings):
    """SLURM's --gpus-per-task=1 shows each process a GPU of its own, which has number 0 there."""
    fake_machine(n_gpus=1)
    assert choose_device(local_rank=3, world_size=4).torch_device == torch.device("cuda:0")


def test_several_processes_on_a_mac_use_the_cpu(fake_machine):
    fake_machine(mps=True)
    assert choose_device(world_size=2).torch_device == CPU
    with pytest.raises(FolioError, match="--device=mps does not work with several processes"):
        choose_device("mps", world_size=2)


def test_description_names_device_dtype_and_compile(fake_machine, cuda_settings, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    assert choose_device("cpu", "float32").description == (
        "cpu (2 threads), float32, torch.compile off (little gain on a CPU)"
    )
    monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    assert choose_device("cpu", "bfloat16", world_size=2).description.startswith(
        "2 processes, each on cpu (1 thread), bfloat16, "
    )
    fake_machine(n_gpus=1)
    assert choose_device().description == "cuda (NVIDIA Test), bfloat16, torch.compile on"
    fake_machine(n_gpus=1, capability=(7, 5), triton=False)
    assert choose_device().description == (
        "cuda (NVIDIA Test), float16 (this GPU has no fast bfloat16), "
        "torch.compile off (Triton is missing or does not support this GPU)"
    )


def test_float32_on_cuda_uses_tf32_and_says_so(fake_machine, cuda_settings):
    fake_machine(n_gpus=1)
    choose_device(dtype="bfloat16")
    choose_device(dtype="float64")
    choose_device("cpu", "float32")
    assert "precision" not in cuda_settings
    device = choose_device(dtype="float32")
    assert cuda_settings["precision"] == "high"
    assert "float32 (TF32 in matrix products)" in device.description


def test_no_module_imports_private_torch_modules():
    """They may change in any torch version. Inside a function, the import can be guarded."""
    for path in Path(device_module.__file__).parent.glob("*.py"):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.Import):
                modules = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                modules = [f"{node.module}.{alias.name}" for alias in node.names]
            else:
                modules = []
            assert not [name for name in modules if name.startswith("torch") and "._" in name], path


# --- dtype ---


def test_auto_picks_the_dtype_that_is_fast(fake_machine, monkeypatch):
    fake_machine(n_gpus=1, capability=(8, 0))
    assert choose_dtype("auto", CUDA) == torch.bfloat16
    assert choose_dtype("auto", MPS) == torch.float32
    for supported, expected in (
        ({"avx512_bf16"}, torch.bfloat16),
        ({"amx_tile"}, torch.bfloat16),
        (set(), torch.float32),
    ):
        monkeypatch.setattr(device_module, "cpu_supports", supported.__contains__)
        assert choose_dtype("auto", CPU) == expected
    fake_machine(n_gpus=1, capability=(7, 5))
    assert choose_dtype("auto", CUDA) == torch.float16


def test_unsupported_dtype_is_refused(fake_machine):
    fake_machine(n_gpus=1, capability=(7, 5))
    with pytest.raises(FolioError, match="--dtype=bfloat16: not supported"):
        choose_dtype("bfloat16", CUDA)
    with pytest.raises(FolioError, match="--dtype=float64: not supported"):
        choose_dtype("float64", MPS)


def test_torch_without_cpu_queries_means_no_bfloat16(monkeypatch):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, name, raising=False)
    assert has_bfloat16(CPU) is False


@pytest.mark.parametrize(
    ("torch_device", "dtype", "block_size", "expected"),
    [
        (CPU, torch.bfloat16, 8, True),
        (CPU, torch.bfloat16, 256, False),
        (CPU, torch.float16, 8, False),
        (CPU, torch.float32, 8, False),
        (CPU, torch.float64, 8, False),  # float32 would lose digits
        (CUDA, torch.bfloat16, 8, False),
    ],
)
def test_attention_is_float32_only_on_cpus_with_a_short_context(
    torch_device, dtype, block_size, expected
):
    device = ComputeDevice(torch_device, dtype, False, "")
    assert device.use_float32_attention(block_size) is expected


def test_autocast_and_grad_scaler_follow_the_dtype():
    a = torch.ones(2, 2)
    for name, product, params, scaled in (
        ("float32", torch.float32, torch.float32, False),
        ("bfloat16", torch.bfloat16, torch.float32, False),
        ("float16", torch.float16, torch.float32, True),
        ("float64", torch.float64, torch.float64, False),
    ):
        device = choose_device("cpu", name)
        with device.autocast():
            assert (a.to(device.param_dtype) @ a.to(device.param_dtype)).dtype == product
        assert device.param_dtype == params
        assert device.grad_scaler().is_enabled() is scaled


# --- torch.compile ---


def test_auto_compiles_on_cuda_only(fake_machine):
    fake_machine(n_gpus=1)
    assert choose_compile("auto", CUDA) == (True, "")
    assert choose_compile("auto", CPU)[0] is choose_compile("auto", MPS)[0] is False
    assert choose_compile(True, CPU)[0] is True
    assert choose_compile(False, CUDA)[0] is False


@pytest.mark.skipif(sys.platform == "win32", reason="Triton for Windows includes a compiler")
@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ({"triton": False}, "Triton is missing"),
        ({"capability": (6, 1)}, "Triton is missing or does not support this GPU"),
        ({"compiler": False}, "no C compiler"),
        ({"headers": "/nowhere"}, "Python.h not found"),
    ],
)
def test_compiling_on_cuda_needs_triton_a_compiler_and_headers(fake_machine, missing, message):
    fake_machine(n_gpus=1, **missing)
    compile, note = choose_compile("auto", CUDA)
    assert compile is False and message in note
    with pytest.raises(FolioError, match=f"--compile: {message}"):
        choose_compile(True, CUDA)


def test_compiling_on_a_cpu_needs_a_compiler(fake_machine):
    fake_machine(compiler=False)
    with pytest.raises(FolioError, match="--compile: no C\\+\\+ compiler"):
        choose_compile(True, CPU)


# --- Transfers and random numbers ---


class RecordedTensor:
    """Stands for a CPU tensor; records how it is copied."""

    def __init__(self, log: list):
        self.log = log

    def pin_memory(self):
        self.log.append("pin")
        return self

    def to(self, device, non_blocking=False):
        self.log.append((str(device), non_blocking))
        return self


@pytest.mark.parametrize("name", ["cpu", "mps"])
def test_copies_are_blocking_except_on_cuda(name):
    """A background copy to an Apple GPU can read memory that is already freed."""
    log = []
    ComputeDevice(torch.device(name), torch.float32, False, "").to_device(RecordedTensor(log))
    assert log == [(name, False)]


def test_copies_to_cuda_are_pinned_on_the_gpu_of_the_process(monkeypatch):
    """Also in a thread, whose current GPU is number 0: pinning would claim memory on it."""
    log = []

    @contextlib.contextmanager
    def current(device):
        log.append(f"current {device}")
        yield
        log.append("restored")

    monkeypatch.setattr(torch.cuda, "device", current)
    device = ComputeDevice(torch.device("cuda:3"), torch.float32, False, "")
    thread = threading.Thread(target=device.to_device, args=(RecordedTensor(log),))
    thread.start()
    thread.join()
    assert log == ["current cuda:3", "pin", ("cuda:3", True), "restored"]


def test_generator_does_not_change_the_global_one():
    device = choose_device("cpu")
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    first = torch.rand(3, generator=device.generator(5))
    assert torch.rand(3, generator=device.generator(5)).equal(first)
    assert torch.rand(3).equal(expected)
    mps = ComputeDevice(MPS, torch.float32, False, "")
    assert mps.generator(5).device == CPU


# --- Memory and CPU ---


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries differ")
def test_freed_memory_is_used_again_without_page_faults():
    import resource  # not on Windows

    choose_device("cpu")

    def step():
        activations = [torch.ones(2**21) for _ in range(24)]  # 192 MiB, on 49,152 pages
        while activations:  # as in the backward pass, the last one first
            activations.pop()

    faults = []
    for _ in range(15):  # the tests before this one may have left gaps in the memory
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        step()
        faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    assert min(faults[5:]) < 200


@pytest.mark.parametrize(
    ("contents", "expected"),
    [("200000 100000\n", 2.0), ("50000 100000\n", 0.5), ("max 100000\n", math.inf), ("", math.inf)],
)
def test_the_quota_of_a_container_is_read(tmp_path, contents, expected):
    assert cpu_quota(tmp_path / "missing") == math.inf
    (tmp_path / "cpu.max").write_text(contents)
    assert cpu_quota(tmp_path / "cpu.max") == expected


@pytest.mark.parametrize(("quota", "threads"), [(2.5, 2), (0.5, 1), (64.0, None), (math.inf, None)])
def test_a_container_gets_no_more_threads_than_its_cores(monkeypatch, quota, threads):
    chosen = []
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    monkeypatch.setattr(device_module, "cpu_quota", lambda: quota)
    choose_device("cpu")
    choose_device("cpu", num_threads=3)
    monkeypatch.setenv("OMP_NUM_THREADS", "64")
    choose_device("cpu")
    assert chosen == ([3] if threads is None else [threads, 3])


def test_num_threads_sets_the_threads_of_torch(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    choose_device("cpu")
    assert chosen == []
    choose_device("cpu", num_threads=3)
    assert chosen == [3]


def test_out_of_memory_errors_explain_what_to_try():
    for error in (
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried ..."),
        RuntimeError("[enforce fail] DefaultCPUAllocator: not enough memory: you tried ..."),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ):
        with (
            pytest.raises(FolioError, match=r"^out of memory; halve --batch_size") as caught,
            explain_out_of_memory("halve --batch_size"),
        ):
            raise error
        assert caught.value.__cause__ is error  # a debugger still shows where it happened


def test_impossible_cpu_allocations_are_explained():
    for shape in ((2**50,), (2**62, 2**10)):
        with pytest.raises(FolioError, match="out of memory"), explain_out_of_memory("..."):
            torch.empty(shape)


def test_other_errors_keep_their_traceback():
    for text in ("a bug", "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate"):
        with pytest.raises(RuntimeError, match=text), explain_out_of_memory("..."):
            raise RuntimeError(text)


def test_evaluations_on_a_cpu_have_small_batches():
    """So the progress bar moves. On a GPU, a batch is as large as in training."""
    cpu = choose_device("cpu")
    gpu = dataclasses.replace(cpu, torch_device=torch.device("cuda"))
    for batch_size, block_size, expected in ((12, 64, 12), (64, 256, 16), (8, 8192, 1)):
        assert cpu.eval_batch_size(batch_size, block_size) == expected
        assert gpu.eval_batch_size(batch_size, block_size) == batch_size
