"""How the same numbers are computed faster, where this machine has two ways to them."""

import dataclasses

import pytest
import torch
import torch.nn as nn

import train
from configurator import configure
from model import GPT, GPTConfig
from training import kernels, machine
from training.kernels import attend_as_suits, attend_in_float32, can_pack, ready_to_write
from training.run import assemble
from training.world import World

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = GPTConfig(block_size=8, vocab_size=13, n_layer=2, n_head=2, n_embd=16)


@pytest.mark.parametrize(
    ("device", "dtype", "block_size", "suits"),
    [
        (CPU, torch.bfloat16, 8, True),
        (CPU, torch.bfloat16, 256, False),
        (CPU, torch.float16, 8, False),
        (CPU, torch.float32, 8, False),
        (CPU, torch.float64, 8, False),  # which would lose digits
        (GPU, torch.bfloat16, 8, False),
    ],
)
def test_attention_computes_in_float32_where_that_was_seen_to_be_faster(
    device, dtype, block_size, suits
):
    model = GPT(dataclasses.replace(TINY, block_size=block_size))
    attend_as_suits(model, device, dtype)
    assert [block.attn.attend is attend_in_float32 for block in model.transformer.h] == [suits] * 2


def test_attention_in_float32_says_what_autocast_rounds():
    q, k, v = torch.randn(3, 2, 2, 8, 4).bfloat16().unbind()
    with torch.autocast("cpu", torch.bfloat16):
        heard = attend_in_float32(q, k, v, is_causal=True)
    weights = q.double() @ k.double().mT / 2  # by hand: sqrt(head_dim) is 2
    weights = weights.masked_fill(torch.ones(8, 8).triu(1).bool(), -torch.inf).softmax(-1)
    torch.testing.assert_close(heard, (weights @ v.double()).float())


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "close"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_a_model_packed_for_writing_says_what_it_said(monkeypatch, dtype, close, bias):
    if not can_pack(CPU, getattr(torch, dtype)):
        pytest.skip(f"there is no oneDNN for this processor in {dtype}")
    monkeypatch.setattr(kernels, "SMALL", 0)
    model = GPT(dataclasses.replace(TINY, bias=bias, pad_vocab_to=8))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    idx = torch.randint(13, (3, 5))
    with torch.inference_mode():
        before = model.eval()(idx)[0]
        text = torch.stack(list(model.generate(idx, 20, temperature=0)))
        packed = ready_to_write(model, CPU, dtype, texts=3)
        after = packed(idx)[0]
        packed_text = torch.stack(list(packed.generate(idx, 20, temperature=0)))
    assert not any(isinstance(module, nn.Linear) for module in packed.modules())
    assert after.dtype == getattr(torch, dtype)
    torch.testing.assert_close(after.float(), before, rtol=close, atol=close)
    if dtype == "float32":
        assert packed_text.equal(text)


@pytest.mark.parametrize(("instructions", "fewest"), [({"avx512_bf16"}, 2), (set(), 4)])
def test_a_small_model_writes_in_float32_on_a_cpu_and_a_large_one_with_fewer_bytes(
    monkeypatch, instructions, fewest
):
    monkeypatch.setattr(machine, "processor_has", lambda what: what in instructions)
    monkeypatch.setattr(kernels, "can_pack", lambda device, dtype: False)

    def bytes_per_weight(dtype):
        return ready_to_write(GPT(TINY), CPU, dtype).transformer.wte.weight.element_size()

    assert (bytes_per_weight("auto"), bytes_per_weight("bfloat16")) == (4, 2)
    monkeypatch.setattr(kernels, "SMALL", 0)
    assert (bytes_per_weight("auto"), bytes_per_weight("float64")) == (fewest, 8)


def test_what_is_small_or_in_another_precision_is_not_packed(monkeypatch):
    assert type(ready_to_write(GPT(TINY), CPU).transformer.h[0].mlp.c_fc) is nn.Linear
    monkeypatch.setattr(kernels, "SMALL", 0)
    for dtype in ("float16", "float64"):
        assert type(ready_to_write(GPT(TINY), CPU, dtype).transformer.h[0].mlp.c_fc) is nn.Linear


@pytest.mark.parametrize(
    ("intel", "dtype", "texts", "packed"),
    [
        (True, "float32", 1, False),
        (True, "float32", 10, True),
        (True, "bfloat16", 1, True),
        (False, "float32", 1, True),
    ],
)
def test_what_mkl_reads_as_fast_as_it_can_be_read_is_left_to_it(
    monkeypatch, intel, dtype, texts, packed
):
    monkeypatch.setattr(kernels, "is_intel", lambda: intel)
    monkeypatch.setattr(kernels, "can_pack", lambda device, dtype: True)
    monkeypatch.setattr(kernels, "SMALL", 0)
    told = []
    monkeypatch.setattr(kernels, "pack", told.append)
    model = ready_to_write(GPT(TINY), CPU, dtype, texts)
    assert told == [model] * packed


def test_what_is_ready_to_write_refuses_to_be_trained():
    model = ready_to_write(GPT(TINY), CPU)
    _, loss = model(torch.zeros(1, 4, dtype=torch.long), torch.zeros(1, 4, dtype=torch.long))
    with pytest.raises(RuntimeError, match="does not require grad"):
        loss.backward()


def test_what_writes_finds_its_parts_without_torchs_help(monkeypatch):
    model = ready_to_write(GPT(TINY), CPU)
    asked = []
    monkeypatch.setattr(nn.Module, "__getattr__", lambda module, name: asked.append(name))
    assert len(list(model.generate(torch.zeros(1, 1, dtype=torch.long), 5))) == 5
    assert asked == []


def test_a_run_attends_as_suits_its_precision(tiny):
    for dtype, suits in (("bfloat16", True), ("float32", False)):
        given = configure(train.TrainConfig, [*tiny, f"--dtype={dtype}"])
        run = assemble(given, World())
        assert (run.model.transformer.h[0].attn.attend is attend_in_float32) == suits
