"""FLOPs of training, and the peak of GPUs."""

from types import SimpleNamespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from engine.flops import flops_per_token, peak_flops, peak_tokens_per_second
from model import GPT, GPTConfig


def test_peak_flops_are_found_by_device_name():
    for name, tflops in {
        "NVIDIA H100 80GB HBM3": 989, "NVIDIA H100 PCIe": 756, "NVIDIA H200": 989,
        "NVIDIA A100-SXM4-80GB": 312, "NVIDIA L40S": 362, "NVIDIA L4": 121, "Tesla T4": 65,
        "NVIDIA GeForce RTX 4090": 165, "NVIDIA H200 NVL": 835,
    }.items():  # fmt: skip
        assert peak_flops(name) == tflops * 1e12, name
    for name in (
        "", "NVIDIA A10", "NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4090 D",
        "NVIDIA T400", "NVIDIA A100-SXM4-40GB MIG 1g.5gb",
    ):  # fmt: skip
        assert peak_flops(name) is None, name


@pytest.mark.parametrize("bias", [False, True])
def test_flops_per_token_counts_all_matrix_products(bias):
    """Expected: counted by torch in a forward and backward pass, with attention as products."""
    config = GPTConfig(8, 13, n_layer=2, n_head=2, n_embd=16, bias=bias, pad_vocab_to=16)
    model, idx = GPT(config), torch.randint(13, (3, 8))
    with (
        FlopCounterMode(display=False) as counter,
        torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH),
    ):
        model(idx, idx).backward()
    assert flops_per_token(config) == counter.get_total_flops() / idx.numel()


def test_peak_tokens_per_second_is_flops_over_flops_per_token():
    config = GPTConfig()  # 124M
    gpu = SimpleNamespace(torch_device=torch.device("cuda"), name="NVIDIA H200")
    # 6 * (12 * 12 * 768² + 50257 * 768) + 12 * 12 * 768 * 1024 = 854,438,400 FLOPs per token
    expected = 8 * 989e12 / 854_438_400
    assert peak_tokens_per_second(config, gpu, 8) == pytest.approx(expected)
    cpu = SimpleNamespace(torch_device=torch.device("cpu"), name="")
    assert peak_tokens_per_second(config, cpu, 1) is None
