"""Training, evaluation and generation keep their tensors on one device, tested without a GPU.

torch's meta device takes the place of the GPU: its tensors have shapes, but no numbers. An
operation that mixes the two devices is an error here, as it is on a GPU.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import train
from configurator import parse_overrides
from engine.device import ComputeDevice
from engine.distributed import Distributed
from engine.inference import InferenceModel
from engine.optimizer import make_optimizer
from engine.run import build_model, load_dataset, make_model_config, resolve_config
from engine.train_config import TrainConfig

GPU = torch.device("meta")
aten = torch.ops.aten
# .item(), int(), float() and `if tensor:`, in training and in inference mode
READ_ONE = (aten._local_scalar_dense.default, aten.item.default, aten.is_nonzero.default)


class FakeGPU(TorchDispatchMode):
    """Inside, mixing devices is an error, and what is read from the "GPU" is 1.

    reads: the names of the operations that waited for a number from the "GPU".
    """

    def __init__(self):
        super().__init__()
        self.reads: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        # A CPU tensor without dimensions is a number, which every device accepts.
        devices = {t.device.type for t in tensors if t.dim() > 0 or t.device == GPU}
        on_gpu = GPU.type in devices
        if func in READ_ONE and on_gpu:
            self.reads.append("item")
            return torch.ones((), dtype=tensors[0].dtype).item()
        if func is aten._to_copy.default and on_gpu and is_cpu(kwargs.get("device")):
            self.reads.append("to cpu")
            return torch.ones(tensors[0].shape, dtype=kwargs.get("dtype") or tensors[0].dtype)
        if len(devices) > 1 and func is not aten.copy_.default:
            raise RuntimeError(f"{func} mixes devices: {[(t.device, t.shape) for t in tensors]}")
        return func(*args, **kwargs)


def is_cpu(device) -> bool:
    return device is not None and torch.device(device).type == "cpu"


class AdamWForMeta(torch.optim.AdamW):
    """Not fused: torch's fused AdamW has no kernel for meta tensors."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs | {"fused": False})


@pytest.fixture
def run(tiny_flags, monkeypatch):
    """A run whose model, optimizer and batches are on the "GPU"."""
    monkeypatch.setattr(torch.optim, "AdamW", AdamWForMeta)

    class Run:
        config = resolve_config(parse_overrides(TrainConfig, tiny_flags))
        device = ComputeDevice(GPU, torch.float32, False, "")
        dist = Distributed()
        dataset = load_dataset(config)
        model = build_model(config, make_model_config(config, dataset, device), device)
        optimizer = make_optimizer(model, config, device.dtype)

    assert {p.device for p in Run.model.parameters()} == {GPU}
    return Run


def test_the_fake_gpu_refuses_to_mix_devices(run):
    """Otherwise the other tests here would prove nothing."""
    on_cpu = torch.zeros(2, 8, dtype=torch.long)
    with FakeGPU() as gpu:
        on_gpu = on_cpu.to(GPU)
        assert run.model(on_gpu, on_gpu).item() == 1
        with pytest.raises(RuntimeError, match="mixes devices"):
            run.model(on_cpu)
        with pytest.raises(RuntimeError, match="mixes devices"):
            run.model(on_gpu, on_cpu)
        with pytest.raises(RuntimeError, match="mixes devices"), torch.inference_mode():
            torch.nn.functional.linear(torch.ones(2, 3), torch.ones(3, 3, device=GPU))
        assert (torch.ones(3, device=GPU) * torch.tensor(2.0)).device == GPU
        assert torch.ones(3, device=GPU).tolist() == [1, 1, 1]
    assert gpu.reads == ["item", "to cpu"]


def test_a_training_step_reads_its_numbers_once(run):
    batches = train.training_batches(run.dataset.train, run.config, 0, run.device, run.dist)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    with FakeGPU() as gpu:
        metrics = train.train_step(
            run.model, run.optimizer, scaler, batches, run.config, 0, run.device, run.dist
        )
    assert (metrics.loss, metrics.grad_norm) == (1, 1)
    assert gpu.reads == ["to cpu"]  # loss and norm together


def test_an_evaluation_stays_on_the_device_and_reads_once(run):
    with FakeGPU() as gpu:
        loss, _ = train.evaluate(run.model, run.dataset, run.config, run.device, run.dist)
    assert loss == pytest.approx(1)  # of 8 batches: every batch has the loss 1
    assert gpu.reads == ["to cpu"]


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 3}, {"top_p": 0.5}, {"temperature": 0}, {"stop_tokens": [5]}]
)
def test_generation_stays_on_the_device(run, options):
    inference = InferenceModel(run.model, GPU, dtype="float32")
    with FakeGPU() as gpu:
        ids = list(inference.generate(torch.zeros(2, 3, dtype=torch.long), 20, **options))
    assert {i.device for i in ids} == {GPU}
    # Are the prompts of all rows equal? After 16 steps: are all rows finished?
    assert len(gpu.reads) <= 2


def test_the_simple_generate_stays_on_the_device(run):
    with FakeGPU():
        idx = run.model.generate(torch.zeros(2, 3, dtype=torch.long, device=GPU), 8, top_k=3)
    assert idx.shape == (2, 11) and idx.device == GPU
