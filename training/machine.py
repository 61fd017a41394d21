"""What a machine can do: its fastest device, the precision that is good at, whether compiling pays,
and how a model's weights have to lie in memory to be read fast.

"auto" takes the best there is; whoever asks for what there is not gets a FolioError.
"""

import contextlib
import os
import platform
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils._triton import has_triton

from configurator import FolioError
from model import GPT

Device = Literal["auto", "cuda", "mps", "cpu"]
Precision = Literal["auto", "float32", "bfloat16", "float16", "float64"]
Switch = Literal["auto", True, False]

SMALL = 2_000_000  # parameters that stay in a processor's caches from one token to the next


def choose_device(wanted: str) -> str:
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
    if wanted == "auto":
        return next((name for name, available in there.items() if available), "cpu")
    if not there.get(wanted, True):
        raise FolioError(f"--device={wanted}: torch {torch.__version__} finds none; --device=cpu")
    return wanted


def choose_dtype(wanted: str, device: torch.device) -> tuple[torch.dtype, str]:
    brain = has_bfloat16(device)
    if wanted == "auto":
        if brain:
            return torch.bfloat16, ""
        if device.type == "cuda":
            return torch.float16, " (this GPU has no fast bfloat16)"
        return torch.float32, ""
    refused = wanted == "bfloat16" and device.type == "cuda" and not brain
    if refused or (wanted == "float64" and device.type == "mps"):
        raise FolioError(f"--dtype={wanted}: this device cannot; --dtype=auto picks what it can")
    return getattr(torch, wanted), ""


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 as such, and fast, instead of emulating it.

    bfloat16 has float32's range, so that nothing overflows that would not there.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)  # since the A100
    if device.type != "cpu":
        return False
    # x86 has had it since about 2020 (AVX512_BF16) and 2023 (AMX).
    return processor_has("avx512_bf16") or processor_has("amx_tile")


def processor_has(instructions: str) -> bool:
    return getattr(torch.cpu, f"_is_{instructions}_supported", lambda: False)()  # private in torch


def choose_compile(wanted: str | bool, device: torch.device) -> tuple[bool, str]:
    missing = what_compiling_lacks(device)
    if wanted is True and missing:
        raise FolioError(f"--compile: {missing}; leave it at auto")
    if wanted != "auto":
        return wanted, ""
    if device.type != "cuda":
        return False, " (gains little on a CPU)" if device.type == "cpu" else ""
    return not missing, f" ({missing})" if missing else ""


def what_compiling_lacks(device: torch.device) -> str:
    """What torch.compile would not find on this machine, or ''."""
    if device.type == "cpu":
        names = (os.environ.get("CXX", "g++"), "c++", "clang++", "cl")
        return "" if any(map(shutil.which, names)) else "torch finds no C++ compiler (g++)"
    if device.type != "cuda":
        return ""
    if not has_triton():
        return "Triton is not installed, or does not know this GPU"
    if sys.platform == "win32":  # where Triton brings the rest
        return ""
    # Triton launches its kernels from a module in C, which it compiles.
    if not any(map(shutil.which, (os.environ.get("CC", "gcc"), "clang"))):
        return "Triton finds no C compiler (gcc)"
    headers = Path(sysconfig.get_path("include", "posix_prefix"), "Python.h")
    return "" if headers.exists() else "Triton finds no Python.h (python3-dev)"


# --- Training ---


def attend_as_suits(model: GPT, device: torch.device, dtype: torch.dtype) -> None:
    """Let attention alone compute in float32, where that is faster than what autocast would do.

    A CPU that multiplies bfloat16 in AVX-512 needs four times as long for its gradient there as in
    float32, at contexts of 64 and 128 (torch 2.13); at 256 and more it is a draw.
    """
    lower = dtype in (torch.bfloat16, torch.float16)
    if device.type == "cpu" and lower and not processor_has("amx_tile"):
        for block in model.transformer.h:
            block.attn.attend = attend_in_float32


def attend_in_float32(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, **how) -> torch.Tensor:
    with torch.autocast(q.device.type, enabled=False):
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), **how)


# --- Writing ---


def ready_to_write(model: GPT, device: torch.device, dtype: str = "auto") -> GPT:
    """The same model, where, in which precision and in which layout it writes fastest.

    Every token that is written takes a reading of all weights. On a CPU, a small model's are in the
    caches: what counts is the number of calls, and float32 needs the fewest. Those of a larger one
    come from memory each time anew: what counts is bytes, half as many in bfloat16, and that they
    are read in the order in which they lie there.
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
    """Whether torch has oneDNN for this processor, and oneDNN the precision."""
    ours = device.type == "cpu" and platform.machine().lower() in ("x86_64", "amd64")
    known = dtype == torch.float32 or (dtype == torch.bfloat16 and has_bfloat16(device))
    return ours and known and hasattr(torch.ops.mkldnn, "_linear_pointwise")


@torch.no_grad()
def pack(model: GPT) -> None:
    """Lay out the weights as oneDNN reads them; from then on the model can only be read from."""
    for block in model.transformer.h:
        for part in (block.attn, block.mlp):
            for name, layer in list(part.named_children()):
                setattr(part, name, Packed(layer.weight, layer.bias))
    # The table is needed as it is, too: that is how tokens become nodes.
    model.logits = Packed(model.transformer.wte.weight[: model.config.vocab_size]).forward


class Packed(nn.Module):
    """A linear layer that multiplies one node, or a few, about twice as fast as nn.Linear.

    torch packs weights like that when it compiles a model, and has no public name for it.
    """

    def __init__(self, weight: torch.Tensor, bias: torch.Tensor | None = None):
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 1)  # for one node
        self.bias = bias

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


@contextlib.contextmanager
def advice_when_out_of_memory(advice: str) -> Iterator[None]:
    """Within it, running out of memory becomes one line that says what to try."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        signs = ("out of memory", "allocate memory", "size calculation overflowed", "ALLOC_FAILED")
        if isinstance(error, RuntimeError) and not any(sign in str(error) for sign in signs):
            raise
        raise FolioError(f"out of memory: try {advice}") from None
