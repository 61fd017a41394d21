"""Training and generation on an NVIDIA GPU give the CPU's numbers. Skipped where there is none."""

import dataclasses
import math
import os
import signal

import pytest
import torch

import train
from configurator import FolioError
from data.dataset import prefetch, training_batch
from engine.checkpoint import load_checkpoint
from engine.device import choose_device, explain_out_of_memory, has_bfloat16
from engine.inference import InferenceModel, sample_next_token
from model import GPT
from tests.conftest import make_tiny_flags
from tests.processes import run_train, start_job
from tests.test_train import batches_of, evaluate, read_log, start_training, train_step

DEVICE = "cuda"
pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU"),
]


@pytest.fixture(autouse=True)
def full_precision(monkeypatch):
    """No TF32: float32 is to be compared with the CPU's."""
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda precision: None)


@pytest.fixture
def gpu_flags(tiny_flags) -> list[str]:
    """tiny_flags, but on the GPU, in float32 and without torch.compile."""
    return [*tiny_flags, f"--device={DEVICE}", "--compile=False"]


def losses(n_steps: int, *flags: str) -> list[float]:
    """The training losses of the first steps, and then the validation loss."""
    run = start_training(*flags)
    batches = batches_of(run)
    metrics = [train_step(run, batches, step) for step in range(n_steps)]
    numbers = [number for m in metrics for number in (m.loss, m.grad_norm)]
    return [*numbers, evaluate(run)[0]]


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_losses_and_gradients_are_the_cpus(tiny_flags, gpu_flags, optimizer):
    flag = f"--optimizer={optimizer}"
    expected = losses(6, *tiny_flags, flag)
    assert losses(6, *gpu_flags, flag) == pytest.approx(expected, rel=1e-3)


def test_bfloat16_is_close_to_float32(gpu_flags):
    if not has_bfloat16(torch.device(DEVICE)):
        pytest.skip("this GPU has no bfloat16")
    expected = losses(6, *gpu_flags)
    assert losses(6, *gpu_flags, "--dtype=bfloat16") == pytest.approx(expected, rel=0.05)


def test_compiled_model_gives_the_same_losses(gpu_flags):
    if not choose_device(DEVICE).compile:
        pytest.skip("torch.compile is not available here")
    expected = losses(6, *gpu_flags)
    assert losses(6, *gpu_flags, "--compile=True") == pytest.approx(expected, rel=1e-3)


def test_float16_scales_the_loss_and_skips_steps_that_overflow(gpu_flags):
    run = start_training(*gpu_flags, "--dtype=float16")
    assert run.scaler.is_enabled()
    batches = batches_of(run)
    train_step(run, batches)
    before = [p.detach().clone() for p in run.model.parameters()]
    run.scaler.update(2.0**60)  # the next gradients overflow
    metrics = train_step(run, batches, 1)
    assert not math.isfinite(metrics.grad_norm)
    assert all(map(torch.equal, before, run.model.parameters()))
    assert run.scaler.get_scale() == 2.0**59
    run.scaler.update(2.0**10)
    train_step(run, batches, 2)
    assert not any(map(torch.equal, before, run.model.parameters()))


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_resumed_run_continues_with_the_same_numbers(gpu_flags, tmp_path, call, monkeypatch, dtype):
    flags = [*gpu_flags, f"--dtype={dtype}", "--dropout=0.2"]
    assert call(train, *flags, f"--out_dir={tmp_path / 'whole'}").returncode == 0
    step_function = train.train_step

    def train_step_with_signal(*args):
        if args[5] == 4:  # the step
            os.kill(os.getpid(), signal.SIGTERM)
        return step_function(*args)

    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", train_step_with_signal)
        assert call(train, *flags).returncode == 143
    assert load_checkpoint(tmp_path / "run")["train_state"]["step"] == 5  # step 4 had the signal
    assert call(train, *flags, "--init_from=resume").returncode == 0
    whole, resumed = (read_log(tmp_path / name)[-1] for name in ("whole", "run"))
    for column in ("train_loss", "val_loss"):
        assert float(resumed[column]) == pytest.approx(float(whole[column]), rel=1e-4), column


@pytest.mark.parametrize("compile", [False, True])
def test_greedy_samples_are_the_cpus(tiny_flags, compile):
    if compile and not choose_device(DEVICE).compile:
        pytest.skip("torch.compile is not available here")
    model = start_training(*tiny_flags).model.eval()
    idx = torch.randint(model.config.vocab_size, (2, 5))
    on_cpu = InferenceModel(model, "cpu", "float32")
    on_gpu = InferenceModel(model, DEVICE, "float32", compile=compile)
    samples = [torch.stack(list(m.generate(idx, 20, top_k=1))) for m in (on_cpu, on_gpu)]
    assert samples[1].device.type == DEVICE
    assert torch.equal(samples[0], samples[1].cpu())


def test_the_unchanged_model_is_not_called_changed(tiny_flags):
    """TF32 and 16 bits round the logits of model.py and of engine/inference.py differently."""
    choose_device(DEVICE, "float32")  # switches TF32 on
    model = start_training(*tiny_flags).model.to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        assert InferenceModel(model.to(dtype), DEVICE).changed_model is None


def test_samples_depend_on_the_seed_alone(tiny_flags):
    model = start_training(*tiny_flags).model.eval()
    device = choose_device(DEVICE)
    inference = InferenceModel(model, device.torch_device)
    start = torch.zeros(1, 1, dtype=torch.long)
    samples = []
    for seed in (1, 1, 2):
        ids = inference.generate(start, 40, generator=device.generator(seed))
        samples.append([int(i) for i in ids])
        torch.rand(3, device=DEVICE)  # the global generator moves on
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize("options", [{}, {"top_k": 3, "temperature": 0.8}, {"top_p": 0.9}])
def test_recorded_steps_take_the_random_numbers_of_single_operations(tiny_flags, options):
    model = start_training(*tiny_flags).model.eval().to(DEVICE)
    device, block_size = choose_device(DEVICE), model.config.block_size
    inference = InferenceModel(model, DEVICE, "float32")
    idx = torch.randint(model.config.vocab_size, (2, 3), device=DEVICE)
    generator, expected_generator = device.generator(5), device.generator(5)
    steps = inference.generate(
        idx, 2 * block_size, overlap=block_size - 1, generator=generator, **options
    )
    ids = torch.stack(list(steps), dim=1)
    with torch.inference_mode():
        for _ in range(2 * block_size):
            logits = model(idx[:, -block_size:])[:, -1]
            new = sample_next_token(logits, generator=expected_generator, **options)
            idx = torch.cat((idx, new[:, None]), dim=1)
    assert torch.equal(ids, idx[:, 3:])
    assert len(ids.unique()) > 3  # not one token again and again
    assert torch.equal(generator.get_state(), expected_generator.get_state())


def test_a_generator_on_the_cpu_is_refused(tiny_flags):
    model = start_training(*tiny_flags).model.eval()
    inference = InferenceModel(model, DEVICE)
    with pytest.raises(ValueError, match="generator is on cpu"):
        inference.generate(torch.zeros(1, 1, dtype=torch.long), 4, generator=torch.Generator())


def test_padded_vocabulary_gives_the_loss_of_the_unpadded_one(gpu_flags):
    """Compiled, as in training, and in bfloat16."""
    model = start_training(*gpu_flags).model
    padded = GPT(dataclasses.replace(model.config, pad_vocab_to=64)).to(DEVICE)
    weights = model.state_dict()
    rows = padded.transformer.wte.weight.detach().clone()
    rows[: model.config.vocab_size] = weights["transformer.wte.weight"]
    padded.load_state_dict(weights | {"transformer.wte.weight": rows})
    idx = torch.randint(model.config.vocab_size, (4, model.config.block_size), device=DEVICE)
    losses = []
    for m in (model, padded):
        with torch.autocast(DEVICE, torch.bfloat16):
            loss = torch.compile(m)(idx, idx.clone())
        loss.backward()
        losses.append(loss.item())
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    gradient = padded.transformer.wte.weight.grad
    assert (gradient[model.config.vocab_size :] == 0).all()
    expected = model.transformer.wte.weight.grad
    torch.testing.assert_close(gradient[: len(expected)], expected, rtol=0.02, atol=1e-3)


def test_prefetched_batches_are_the_cpus(gpu_flags):
    """Pinned and copied in another thread, while the GPU computes."""
    run = start_training(*gpu_flags)
    config = run.config
    busy = torch.randn(2048, 2048, device=DEVICE)
    for step, (inputs, targets) in enumerate(prefetch(batches_of(run))):
        busy = busy @ busy / 2048
        expected = training_batch(
            run.dataset.train, config.batch_size, config.block_size, config.seed, step, 0
        )
        assert inputs.device == targets.device == run.device.torch_device
        assert torch.equal(inputs.cpu(), expected[0]) and torch.equal(targets.cpu(), expected[1])
    assert step == config.max_iters - 1


def test_manual_seed_seeds_this_gpu_and_the_cpu():
    device = choose_device(DEVICE)
    for where in (DEVICE, "cpu"):
        numbers = []
        for seed in (1, 1, 2):
            device.manual_seed(seed)
            numbers.append(torch.rand(4, device=where))
        assert torch.equal(numbers[0], numbers[1]) and not torch.equal(numbers[1], numbers[2])


def test_description_names_the_gpu():
    device = choose_device(DEVICE, "float32")
    assert device.name == torch.cuda.get_device_name() != ""
    assert device.name in device.description and "TF32" in device.description


def test_too_large_a_batch_is_explained():
    with pytest.raises(FolioError, match="out of memory"), explain_out_of_memory("..."):
        torch.empty(2**45, device=DEVICE)


def test_two_processes_on_one_gpu_are_refused(tiny_dataset, tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    flags = make_tiny_flags(tiny_dataset, tmp_path / "run")
    flags += [f"--device={DEVICE}", "--compile=False", "--gradient_accumulation_steps=2"]
    result = start_job(run_train, *flags, n_processes=2).wait()
    assert result.exit_codes == [2, 0], result.stderr
    assert result.stderr.count("but only 1 GPU") == 1
    assert "2 processes, but only 1 GPU" in result.stderr


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_train_like_one(tiny_dataset, tmp_path):
    logs = []
    for n_processes in (1, 2):
        folder = tmp_path / str(n_processes)
        flags = make_tiny_flags(tiny_dataset, folder)
        flags += [f"--device={DEVICE}", "--dtype=float64", "--gradient_accumulation_steps=2"]
        result = start_job(run_train, *flags, n_processes=n_processes).wait()
        assert set(result.exit_codes) == {0}, result.stderr
        logs.append([float(row["train_loss"]) for row in read_log(folder) if row["train_loss"]])
    assert logs[1] == pytest.approx(logs[0], rel=1e-9)
