"""Where torch has two ways to compute the same, the one that is faster on this machine.

model.py says what is computed; here it is told, of a finished model, how. Each choice is for a CPU,
and was measured on one, an AMD EPYC with AVX-512: tests/benchmarks/README.md has the figures.
"""

import platform
from typing import Any

import torch
import torch.nn as nn
import torch.nn.functional as F

from model import GPT
from training.machine import choose_dtype, has_bfloat16, processor_has

SMALL = 2_000_000  # parameters that stay in a processor's caches from one token to the next


# --- To train ---


def attend_as_suits(model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Let attention alone compute in float32, where that is faster than what autocast would do.

    A CPU that multiplies bfloat16 in AVX-512 needs four times as long for attention's gradient
    there as in float32, at contexts of 64 and 128 (torch 2.13); at 256 it is a draw. AMX, which
    has instructions of its own for bfloat16, has not been measured and is left alone.
    """
    avx = processor_has("avx512_bf16") and not processor_has("amx_tile")
    if device.type == "cpu" and dtype == torch.bfloat16 and avx:
        for block in model.transformer.h:
            block.attn.attend = attend_in_float32


def attend_in_float32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any):
    """(B, n_head, T, head_dim) each -> the same shape: what each node hears, under autocast too."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how)


# --- To write ---


def ready_to_write(model: GPT, device: torch.device, dtype: str = "auto") -> GPT:
    """The same model, where, in which precision and in which layout it writes fastest.

    Every token that is written takes a reading of all weights. On a CPU, a small model's are in the
    caches: what counts is the number of calls, and float32 needs the fewest. Those of a larger one
    come from memory each time anew: what counts is bytes, half as many in bfloat16, and that they
    are read in the order in which they lie there.

    Raises FolioError if the device cannot do what dtype asks for.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    if device.type == "cpu" and small and dtype == "auto":
        dtype = "float32"
    chosen, _ = choose_dtype(dtype, device)
    model = model.to(device, chosen).eval()
    if not small and can_pack(device, chosen):
        pack(model)
    return model


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is an x86 processor, torch has oneDNN for it, and oneDNN the precision."""
    x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16(device))
    needed = ("_linear_pointwise", "_reorder_linear_weight")
    return x86 and known and all(hasattr(torch.ops.mkldnn, name) for name in needed)


def pack(model: GPT) -> None:
    """Lay out the weights as oneDNN reads them.

    From then on the model can write, and can no longer be trained, saved or moved.
    """
    for block in model.transformer.h:
        for part, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                layer = getattr(part, name)
                setattr(part, name, Packed(layer.weight, layer.bias))
    # The table is needed as it is, too: that is how tokens become nodes. And logits() is a method,
    # which a function can stand in for, but not a module.
    model.logits = Packed(model.transformer.wte.weight[: model.config.vocab_size]).forward


class Packed(nn.Module):
    """A linear layer for a few nodes at a time, for which torch's usual library, MKL, is slow.

    torch packs weights like that when it compiles a model, and has no public name for it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)  # for one node
        self.bias = None if bias is None else bias.detach()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")
