"""How many FLOPs (multiplications and additions) training needs, and how many a GPU can do: MFU.

MFU, the model FLOPs utilization, is the speed of training divided by peak_tokens_per_second().
"""

from engine.device import ComputeDevice
from model import GPTConfig

# TFLOPS in bfloat16, without sparsity, from NVIDIA's data sheets (T4: float16, it has no bfloat16).
# The first name found in the device's name counts, so longer names stand first. None: unknown.
PEAK_TFLOPS = {
    "MIG": None,  # a part of a GPU
    "H100 PCIe": 756, "H100 NVL": 835, "H100": 989, "H200 NVL": 835, "H200": 989, "A100": 312,
    "L40S": 362, "RTX 4090 Laptop": None, "RTX 4090 D": None, "RTX 4090": 165, "L4": 121, "T4": 65,
}  # fmt: skip


def peak_flops(device_name: str) -> float | None:
    """Peak FLOPS of a GPU: 'NVIDIA H100 80GB HBM3' -> 989e12; None if it is not in the table."""
    words = f"{device_name} ".replace("-", " ")
    matches = (tflops for name, tflops in PEAK_TFLOPS.items() if f"{name} " in words)
    tflops = next(matches, None)
    return None if tflops is None else tflops * 1e12


def flops_per_token(config: GPTConfig) -> int:
    """Training FLOPs per token: 6 N + 12 L C T.

    Each of the N weights of matrix products costs a multiplication and an addition, once in the
    forward pass and twice in the backward pass. In each of L layers, a query is multiplied with T
    keys and the attention weights with T values, each of C numbers: 2 products x 2 FLOPs x 3 passes
    = 12 C T. By convention, the half of these products that the causal mask hides is counted, too.
    Source: PaLM (Chowdhery et al. 2022), appendix B.
    """
    L, C, T = config.n_layer, config.n_embd, config.block_size
    weights = L * 12 * C**2  # attention 4 C², MLP 8 C²
    weights += config.padded_vocab_size * C  # the output layer
    return 6 * weights + 12 * L * C * T


def peak_tokens_per_second(
    model_config: GPTConfig, device: ComputeDevice, world_size: int
) -> float | None:
    """Training speed at the peak FLOPS of all GPUs together, or None if the peak is unknown.

    The actual speed divided by it is the model FLOPs utilization, MFU.
    """
    peak = peak_flops(device.name)
    return None if peak is None else world_size * peak / flops_per_token(model_config)
