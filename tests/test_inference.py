"""Fast generation: agreement with model.generate, the cache, sampling, prepared weights."""

import copy
import dataclasses
import math
from functools import partial
from itertools import islice

import pytest
import torch

from engine import device as device_module
from engine import inference as inference_module
from engine.inference import (
    InferenceModel,
    KVCache,
    crop_start,
    next_token_logits,
    packing_is_faster,
    packing_is_supported,
    read_ids,
    sample_next_token,
    sampling_probs,
)
from model import GPT, GPTConfig
from tests.conftest import VOCAB_SIZE
from tests.test_device_placement import GPU as FAKE_GPU
from tests.test_device_placement import FakeGPU

CPU, GPU = torch.device("cpu"), torch.device("cuda")
TINY = GPTConfig(block_size=8, vocab_size=VOCAB_SIZE, n_layer=2, n_head=2, n_embd=16)


@pytest.fixture
def inference(model, request) -> InferenceModel:
    return InferenceModel(model, dtype="float64", static_cache=getattr(request, "param", False))


# Computed as on a CPU, and as on CUDA
both_caches = pytest.mark.parametrize(
    "inference", [False, True], indirect=True, ids=["growing", "static"]
)


def seeded(seed: int = 1) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def generate(inference: InferenceModel, idx: torch.Tensor, n: int, **options) -> torch.Tensor:
    """(B, T) -> the n new tokens of each row: (B, n)."""
    options.setdefault("generator", seeded())
    return torch.stack(list(inference.generate(idx, n, **options)), dim=1)


# --- The same tokens as the simple form ---


@both_caches
@pytest.mark.parametrize("prompt_length", [1, 5, 8, 20])
@pytest.mark.parametrize(
    "options",
    [{}, {"temperature": 0.8}, {"temperature": 2.0, "top_k": 3}, {"top_k": 1}, {"top_k": 99}],
)
def test_generates_the_tokens_of_model_generate(model, inference, options, prompt_length):
    idx = torch.randint(VOCAB_SIZE, (3, prompt_length))
    n = 40  # far beyond block_size, which is 8
    expected = model.generate(idx, n, generator=seeded(), **options)[:, prompt_length:]
    assert torch.equal(generate(inference, idx, n, overlap=7, **options), expected)
    if options != {"top_k": 1}:
        assert len(set(expected.flatten().tolist())) > 2


@both_caches
def test_generates_the_tokens_of_model_generate_for_rows_with_one_prompt(model, inference):
    idx = torch.randint(VOCAB_SIZE, (1, 5)).expand(3, -1)
    expected = model.generate(idx, 40, generator=seeded())[:, 5:]
    assert torch.equal(generate(inference, idx, 40, overlap=7), expected)
    assert len(set(map(tuple, expected.tolist()))) == 3  # the rows become different


@both_caches
@pytest.mark.parametrize("overlap", [None, 0, 3, 7])
@pytest.mark.parametrize("prompt_length", [1, 8, 20])
def test_the_cache_changes_no_token(model, inference, overlap, prompt_length):
    """The expected tokens come from the whole model, on the whole context, for each token."""
    idx = context = torch.randint(VOCAB_SIZE, (3, prompt_length))
    generator, expected = seeded(), []
    context = context[:, -8:]
    for _ in range(40):
        if context.size(1) > 8:
            context = context[:, -(4 if overlap is None else overlap) - 1 :]
        probs = model(context)[:, -1].float().softmax(-1)
        expected.append(torch.multinomial(probs, 1, generator=generator))
        context = torch.cat((context, expected[-1]), dim=1)
    expected = torch.cat(expected, dim=1)
    assert torch.equal(generate(inference, idx, 40, overlap=overlap), expected)


def test_a_step_with_the_cache_gives_the_logits_of_the_model(model, inference, tokens):
    cache = KVCache(model.config, batch_size=3, max_length=8, device=CPU, dtype=torch.float64)
    logits = [next_token_logits(inference.weights, tokens[:, :5], cache)]
    for t in range(5, 8):
        logits.append(next_token_logits(inference.weights, tokens[:, t : t + 1], cache))
    torch.testing.assert_close(torch.stack(logits, dim=1), model(tokens)[:, 4:])


@both_caches
def test_places_of_the_cache_without_a_token_are_never_used(inference, tokens, monkeypatch):
    class CacheOfNaN(KVCache):
        def __init__(self, *args):
            super().__init__(*args)
            for kv in self.kv:
                kv.fill_(math.nan)

    expected = generate(inference, tokens[:, :3], 20)
    monkeypatch.setattr(inference_module, "KVCache", CacheOfNaN)
    assert torch.equal(generate(inference, tokens[:, :3], 20), expected)


def test_greedy_generation_takes_the_likeliest_token(model, inference, tokens):
    ids = generate(inference, tokens, 1, temperature=0)
    assert torch.equal(ids[:, 0], model(tokens)[:, -1].argmax(dim=-1))
    expected = model.generate(tokens, 20, top_k=1)[:, 8:]
    assert torch.equal(generate(inference, tokens, 20, temperature=0, overlap=7), expected)


def test_padding_rows_of_the_embedding_are_never_sampled(model, tokens):
    padded = GPT(dataclasses.replace(model.config, pad_vocab_to=8)).double().eval()
    state = model.state_dict()
    padding = 9 + padded.transformer.wte.weight[VOCAB_SIZE:]  # would be likely
    state["transformer.wte.weight"] = torch.cat((state["transformer.wte.weight"], padding))
    padded.load_state_dict(state)
    ids = generate(InferenceModel(padded, dtype="float64"), tokens, 50, temperature=2.0)
    expected = generate(InferenceModel(model, dtype="float64"), tokens, 50, temperature=2.0)
    assert torch.equal(ids, expected)


# --- The context ---


def test_a_full_context_keeps_its_latest_tokens():
    assert crop_start(8, block_size=8, overlap=4) == 0  # it fits
    assert crop_start(9, block_size=8, overlap=4) == 4  # tokens 4 to 8: four old ones, one new
    assert crop_start(9, block_size=8, overlap=7) == 1  # the longest context that fits
    assert crop_start(9, block_size=8, overlap=0) == 8  # the new token alone


def test_a_prompt_longer_than_the_block_size_is_cropped_to_its_end(inference):
    idx = torch.randint(VOCAB_SIZE, (2, 30))
    assert torch.equal(generate(inference, idx, 5), generate(inference, idx[:, -8:], 5))


@pytest.fixture
def steps(monkeypatch) -> list[tuple[tuple[int, ...], int]]:
    """For each step: the shape of the token ids that were computed, and the size of the cache."""
    steps = []

    def record(weights, idx, cache):
        steps.append((tuple(idx.shape), cache.kv[0].size(3)))
        return next_token_logits(weights, idx, cache)

    monkeypatch.setattr(inference_module, "next_token_logits", record)
    return steps


def test_a_prompt_that_all_rows_share_is_computed_once(inference, steps):
    idx = torch.randint(VOCAB_SIZE, (1, 5)).expand(3, -1)
    generate(inference, idx, 10)
    # After 3 more tokens the context of 8 is full; then 4 old tokens and the new one are encoded.
    assert [shape for shape, _ in steps] == [
        (1, 5),
        *3 * [(3, 1)],
        (3, 5),
        *3 * [(3, 1)],
        (3, 5),
        (3, 1),
    ]
    steps.clear()
    generate(inference, torch.arange(6).view(3, 2), 2)
    assert [shape for shape, _ in steps] == [(3, 2), (3, 1)]  # different prompts


def test_the_cache_is_no_longer_than_needed(inference, steps):
    generate(inference, torch.zeros(1, 2, dtype=torch.long), 3)
    generate(inference, torch.zeros(1, 2, dtype=torch.long), 30)
    assert {size for _, size in steps[:3]} == {5}
    assert {size for _, size in steps[3:]} == {8}


# --- One step, compiled once, without waiting for the GPU ---


def test_the_step_is_compiled_once_for_all_positions_and_prompts(model, monkeypatch):
    graphs = []

    def backend(graph, example_inputs):
        graphs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend, fullgraph=True))
    inference = InferenceModel(model, dtype="float64", compile=True)
    expected = InferenceModel(model, dtype="float64")
    for prompt_length, n in ((1, 4), (5, 30), (20, 9)):
        idx = torch.randint(VOCAB_SIZE, (3, prompt_length))
        assert torch.equal(generate(inference, idx, n), generate(expected, idx, n))
    assert len(graphs) == 1


def test_no_step_waits_for_the_gpu(model):
    inference = InferenceModel(model.to(FAKE_GPU), FAKE_GPU, "float32", static_cache=True)
    with FakeGPU() as gpu:
        ids = list(inference.generate(torch.zeros(2, 3, dtype=torch.long), 12, top_k=3))
    assert {i.device for i in ids} == {FAKE_GPU}
    assert gpu.reads == ["item"]  # before the first step: are the prompts of all rows equal?


@pytest.mark.parametrize(
    ("late", "expected"),
    [(True, "compute compute read compute read read"), (None, 3 * "compute read ")],
)
def test_ids_are_read_while_the_next_step_runs(late, expected):
    events = []

    def steps():
        for i in range(3):
            events.append("compute")
            yield torch.tensor([i, 10 + i])

    ids = []
    for step in read_ids(steps(), late):
        ids.append(step)
        events.append("read")
    assert ids == [[0, 10], [1, 11], [2, 12]]
    assert events == expected.split()


# --- Beginning and end ---


def test_generation_without_max_new_tokens_does_not_end(inference):
    endless = inference.generate(torch.zeros(1, 1, dtype=torch.long))
    assert len(list(islice(endless, 100))) == 100


def test_no_new_tokens(inference):
    assert list(inference.generate(torch.zeros(1, 1, dtype=torch.long), 0)) == []


def test_a_finished_row_repeats_its_stop_token_until_all_rows_are_finished(inference):
    idx = torch.arange(5)[:, None]
    free = generate(inference, idx, 60)
    stop_tokens = [int(free[0, 4]), int(free[1, 3])]
    assert len(set(stop_tokens)) == 2
    ids = generate(inference, idx, 60, stop_tokens=stop_tokens)
    lengths = []
    for row, free_row in zip(ids.tolist(), free.tolist(), strict=True):
        end = next(i for i, token in enumerate(free_row) if token in stop_tokens)
        assert row[: end + 1] == free_row[: end + 1]
        assert set(row[end:]) == {free_row[end]}
        lengths.append(end + 1)
    assert len(set(lengths)) > 1
    assert ids.size(1) == max(lengths)


@pytest.mark.parametrize(
    ("idx", "options", "message"),
    [
        (torch.zeros(2, 0, dtype=torch.long), {}, "at least 1"),
        (torch.zeros(0, 2, dtype=torch.long), {}, "at least 1"),
        (torch.zeros(3, dtype=torch.long), {}, r"\(3,\)"),
        (torch.zeros(2, 3), {}, "float32"),
        (torch.tensor([[0, VOCAB_SIZE]]), {}, "0 ... 12"),
        (torch.tensor([[-1]]), {}, "0 ... 12"),
        (None, {"max_new_tokens": -1}, "max_new_tokens=-1"),
        (None, {"temperature": -0.5}, "temperature=-0.5"),
        (None, {"temperature": math.nan}, "temperature=nan"),
        (None, {"temperature": math.inf}, "temperature=inf"),
        (None, {"top_k": -1}, "top_k=-1"),
        (None, {"top_p": -0.1}, "top_p=-0.1"),
        (None, {"top_p": 1.1}, "top_p=1.1"),
        (None, {"top_p": math.nan}, "top_p=nan"),
        (None, {"overlap": 8}, "overlap=8"),
        (None, {"overlap": -1}, "overlap=-1"),
        (None, {"stop_tokens": [3, 13]}, r"stop_tokens=\[3, 13\]"),
        (None, {"stop_tokens": [-1]}, "stop_tokens"),
        (None, {"stop_tokens": [2.5]}, "stop_tokens"),
        (None, {"top_k": 2.5}, "top_k=2.5"),
        (None, {"max_new_tokens": 2.5}, "max_new_tokens=2.5"),
    ],
)
def test_invalid_arguments_are_refused_at_the_call(inference, idx, options, message):
    idx = torch.zeros(1, 1, dtype=torch.long) if idx is None else idx
    with pytest.raises(ValueError, match=message):
        inference.generate(idx, **options)  # without asking for a token


# --- Sampling ---

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])


@pytest.mark.parametrize(
    ("options", "expected"),  # e^2, e, 1 and 1/e, divided by their sum; and so on
    [
        ({}, [0.644, 0.237, 0.087, 0.032]),
        ({"temperature": 0.5}, [0.865, 0.117, 0.016, 0.002]),
        ({"temperature": 2}, [0.455, 0.276, 0.167, 0.102]),
        ({"temperature": 0}, [1, 0, 0, 0]),
        ({"temperature": 1e-50}, [1, 0, 0, 0]),
        ({"top_k": 2}, [0.731, 0.269, 0, 0]),
        ({"top_k": 1}, [1, 0, 0, 0]),
        ({"top_k": 4}, [0.644, 0.237, 0.087, 0.032]),
        ({"top_k": 99}, [0.644, 0.237, 0.087, 0.032]),
        ({"top_p": 0.6}, [1, 0, 0, 0]),  # 0.644 reaches it
        ({"top_p": 0.8}, [0.731, 0.269, 0, 0]),  # 0.644 does not, 0.644 + 0.237 does
        ({"top_p": 0.95}, [0.665, 0.245, 0.090, 0]),
        ({"top_p": 0}, [1, 0, 0, 0]),
        ({"top_k": 3, "top_p": 0.8}, [0.731, 0.269, 0, 0]),
        ({"temperature": 2, "top_k": 2, "top_p": 0.6}, [1, 0, 0, 0]),  # 0.455 / 0.731 = 0.62
    ],
)
def test_sampling_probs(options, expected):
    order = torch.tensor([2, 0, 3, 1])  # not sorted by probability
    probs = sampling_probs(LOGITS[:, order].expand(2, -1), **options)
    expected = torch.tensor(expected, dtype=torch.float32)[order].expand(2, -1)
    torch.testing.assert_close(probs, expected, atol=0.0006, rtol=0)


@pytest.mark.parametrize("options", [{}, {"top_k": 2}, {"top_p": 0.9}, {"temperature": 0.5}])
def test_tokens_are_sampled_as_often_as_sampling_probs_says(options):
    n = 40_000
    ids = sample_next_token(LOGITS.expand(n, 4), generator=seeded(), **options)
    frequencies = torch.bincount(ids, minlength=4) / n
    expected = sampling_probs(LOGITS, **options)[0]
    torch.testing.assert_close(frequencies, expected, atol=0.01, rtol=0)
    assert (frequencies[expected == 0] == 0).all()


@pytest.mark.parametrize(
    "options", [{}, {"top_k": 50}, {"top_p": 0.7}, {"top_k": 50, "top_p": 0.7}]
)
def test_sampling_gives_the_ids_of_torch_multinomial(options):
    logits, ours, theirs = 3 * torch.randn(7, 1000), seeded(), seeded()
    ids = logits.sort(descending=True).indices[:, : options.get("top_k")]
    if not options:
        ids = torch.arange(1000).expand(7, -1)
    probs = sampling_probs(logits, **options).gather(1, ids)
    for _ in range(5):
        choice = torch.multinomial(probs, 1, generator=theirs)
        expected = ids.gather(1, choice)[:, 0]
        assert torch.equal(sample_next_token(logits, generator=ours, **options), expected)


def test_top_k_keeps_k_tokens_even_if_others_are_as_likely(model, tokens):
    assert len(set(sample_next_token(torch.zeros(4000, 4), top_k=2).tolist())) == 2
    with torch.no_grad():
        model.transformer.wte.weight.zero_()  # all tokens are equally likely
    expected = model.generate(tokens, 20, top_k=2, generator=seeded())[:, 8:]
    assert len(expected.unique()) == 2
    assert torch.equal(generate(InferenceModel(model), tokens, 20, top_k=2), expected)


def test_generation_with_a_generator_does_not_touch_the_global_one(inference, tokens):
    before = torch.get_rng_state()
    generate(inference, tokens, 5, top_k=3)
    assert torch.equal(before, torch.get_rng_state())


# --- The model ---


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
@pytest.mark.parametrize("packed", [False, True])
def test_the_model_is_not_changed(monkeypatch, tokens, dtype, packed):
    if packed:
        monkeypatch.setattr(inference_module, "SMALL_MODEL_PARAMETERS", 0)
    model = GPT(dataclasses.replace(TINY, dropout=0.5))
    before, modules = copy.deepcopy(model.state_dict()), list(model.named_modules())
    inference = InferenceModel(model, dtype=dtype)
    list(inference.generate(tokens, 5))
    assert inference.dtype == getattr(torch, dtype)
    assert list(model.named_modules()) == modules
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert model.training
    model(tokens, tokens).backward()
    assert all(p.grad is not None and p.dtype == torch.float32 for p in model.parameters())


def test_dropout_is_never_active():
    model = GPT(dataclasses.replace(TINY, dropout=0.5)).train()
    idx = torch.zeros(1, 1, dtype=torch.long)
    expected = model.eval().generate(idx, 20, generator=seeded())[:, 1:]
    assert torch.equal(generate(InferenceModel(model.train()), idx, 20, overlap=7), expected)


def test_generation_keeps_nothing_for_gradients(inference, tokens):
    (ids,) = inference.generate(tokens, 1)
    assert ids.is_inference()
    weights = [inference.weights.wte, inference.weights.wpe]
    assert not any(weight.requires_grad for weight in weights)


# --- Prepared weights ---


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 1e-5), ("bfloat16", 0.03)])
def test_packed_weights_give_the_logits_of_the_model(monkeypatch, tokens, dtype, tolerance, bias):
    if not packing_is_supported(CPU, getattr(torch, dtype)):
        pytest.skip(f"torch has no packed weights for this processor in {dtype}")
    monkeypatch.setattr(inference_module, "SMALL_MODEL_PARAMETERS", 0)
    model = GPT(dataclasses.replace(TINY, bias=bias, pad_vocab_to=8)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
        expected = model(tokens)[:, -1]
    packed = []
    real = inference_module.packed_linear
    monkeypatch.setattr(
        inference_module, "packed_linear", lambda w, b: packed.append(w.shape) or real(w, b)
    )
    inference = InferenceModel(model, dtype=dtype, batch_size=3)
    assert len(packed) == 2 * 4 + 1  # four matrices per block, and the output layer
    cache = KVCache(model.config, 3, 8, CPU, inference.dtype)
    with torch.inference_mode():
        logits = next_token_logits(inference.weights, tokens, cache)
    assert logits.dtype == getattr(torch, dtype)
    torch.testing.assert_close(logits.float(), expected, rtol=tolerance, atol=tolerance)
    if dtype == "float32":
        ids = generate(inference, tokens, 20, temperature=0, overlap=7)
        assert torch.equal(ids, model.generate(tokens, 20, top_k=1)[:, 8:])


@pytest.mark.parametrize(
    ("instructions", "fast_dtype"), [({"avx512_bf16"}, torch.bfloat16), (set(), torch.float32)]
)
def test_auto_is_float32_for_small_models_and_the_fastest_dtype_for_others(
    monkeypatch, instructions, fast_dtype
):
    monkeypatch.setattr(device_module, "cpu_supports", lambda name: name in instructions)
    monkeypatch.setattr(inference_module, "packing_is_supported", lambda device, dtype: False)

    def dtype_of(requested):
        inference = InferenceModel(GPT(TINY), dtype=requested)
        assert inference.weights.wte.dtype == inference.dtype
        return inference.dtype

    assert (dtype_of("auto"), dtype_of("bfloat16")) == (torch.float32, torch.bfloat16)
    monkeypatch.setattr(inference_module, "SMALL_MODEL_PARAMETERS", 0)
    assert (dtype_of("auto"), dtype_of("float64")) == (fast_dtype, torch.float64)


@pytest.mark.parametrize(
    ("is_intel", "dtype", "batch_size", "packed"),
    [
        (True, torch.float32, 1, False),  # MKL is faster
        (True, torch.float32, 10, True),
        (True, torch.bfloat16, 1, True),
        (False, torch.float32, 1, True),
    ],
)
def test_weights_are_packed_where_that_is_faster(monkeypatch, is_intel, dtype, batch_size, packed):
    monkeypatch.setattr(inference_module, "is_intel_cpu", lambda: is_intel)
    monkeypatch.setattr(inference_module, "packing_is_supported", lambda device, dtype: True)
    assert packing_is_faster(CPU, dtype, batch_size) == packed


def test_small_models_and_other_dtypes_are_not_packed(monkeypatch):
    def fail(weight, bias):
        raise AssertionError("packed")

    monkeypatch.setattr(inference_module, "packed_linear", fail)
    monkeypatch.setattr(inference_module, "packing_is_faster", lambda *_: True)
    InferenceModel(GPT(TINY))
    assert not packing_is_supported(CPU, torch.float16)
    assert not packing_is_supported(CPU, torch.float64)
    assert not packing_is_supported(GPU, torch.float32)


def test_without_the_private_functions_of_torch_weights_are_not_packed(monkeypatch):
    monkeypatch.setattr(torch.ops, "mkldnn", object())
    assert not packing_is_supported(CPU, torch.float32)
