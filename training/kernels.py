"""Where torch has two ways to compute the same, the one that is faster on this machine.

model.py says what is computed; here it is told, of a finished model, how. Each choice is for a CPU,
and was measured on two, an AMD EPYC with AVX-512 and an Intel Xeon with AMX:
tests/benchmarks/README.md has the figures.
"""

import platform
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from model import GPT
from training.machine import choose_dtype, has_bfloat16, is_intel

SHORT = 192  # tokens of context for which bfloat16 does not pay in attention
SMALL = 2_000_000  # parameters that stay in a processor's caches from one token to the next


# --- To train ---


def attend_as_suits(model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Let attention alone compute in float32, where that is faster than what autocast would do.

    torch 2.13's attention in bfloat16 is made for long contexts. Below 192 tokens it takes a CPU
    one and a half to four times as long as attention in float32 does.
    """
    if device.type == "cpu" and dtype == torch.bfloat16 and model.config.block_size < SHORT:
        for block in model.transformer.h:
            block.attn.attend = attend_in_float32


def attend_in_float32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how: Any):
    """(B, n_head, T, head_dim) each -> the same shape: what each node hears, under autocast too."""
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how)


# --- To write ---


def ready_to_write(model: GPT, device: torch.device, dtype: str = "auto", texts: int = 1) -> GPT:
    """The same model, where, in which precision and in which layout it writes fastest.

    texts: how many it will write side by side.

    Every token that is written takes a reading of all weights. On a CPU, a small model's are in the
    caches: what counts is the number of calls, and in float32 none goes into converting. Those of
    a larger one come from memory each time anew: what counts is bytes, half as many in bfloat16,
    and that they are read in the order in which they lie there.

    From then on the model can write, and can no longer be trained, saved or moved.
    Raises FolioError if the device cannot do what dtype asks for.
    """
    small = sum(parameter.numel() for parameter in model.parameters()) < SMALL
    if device.type == "cpu" and small and dtype == "auto":
        dtype = "float32"
    chosen, _ = choose_dtype(dtype, device)
    model = model.to(device, chosen).eval()
    if not small and can_pack(device, chosen) and not mkl_is_good(chosen, texts):
        pack(model)
    keep_at_hand(model)
    return model.requires_grad_(False)


def can_pack(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether this is an x86 processor, torch has oneDNN for it, and oneDNN the precision."""
    x86 = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16(device))
    needed = ("_linear_pointwise", "_reorder_linear_weight")
    return x86 and known and all(hasattr(torch.ops.mkldnn, name) for name in needed)


def mkl_is_good(dtype: torch.dtype, texts: int) -> bool:
    """Whether what is not packed is read as fast as memory gives it.

    torch has two libraries of matrix products, both of Intel: MKL, for weights as they are, and
    oneDNN, for packed ones. On Intel's processors MKL is the faster one in float32, of one text
    or two; for four to ten, and for one on an AMD EPYC, it takes up to twice as long as oneDNN.
    """
    return is_intel() and dtype == torch.float32 and texts <= 2


def pack(model: GPT) -> None:
    """Lay out the weights as oneDNN reads them."""
    for block in model.transformer.h:
        for part, names in ((block.attn, ("c_attn", "c_proj")), (block.mlp, ("c_fc", "c_proj"))):
            for name in names:
                layer = getattr(part, name)
                delattr(part, name)  # torch lets nothing but a module take a module's name
                setattr(part, name, packed_linear(layer.weight, layer.bias))
    # The table is needed as it is, too: that is how tokens become nodes.
    model.logits = packed_linear(model.transformer.wte.weight[: model.config.vocab_size])


def packed_linear(
    weight: torch.Tensor, bias: torch.Tensor | None = None
) -> Callable[[torch.Tensor], torch.Tensor]:
    """A linear layer, (..., in) -> (..., out), for a few nodes at a time; weight: (out, in).

    torch packs weights like that when it compiles a model, and has no public name for it.
    """
    product = torch.ops.mkldnn._linear_pointwise
    weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach())
    bias = None if bias is None else bias.detach()
    return lambda x: product(x, weight, bias, "none", [], "")


def keep_at_hand(model: GPT) -> None:
    """Give each module what it consists of as ordinary attributes.

    torch keeps parameters and parts in tables of its own. Python asks for them last, by calling
    nn.Module.__getattr__, and first looks into vars(module). A small model that writes spends a
    fifth of its time on such calls.
    """
    for module in model.modules():
        vars(module).update(module._parameters | module._modules)
