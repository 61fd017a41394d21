"""Predict the peak memory of a training step on a GPU. Needs no GPU, and no memory.

    python -m tests.benchmarks.memory config/train_gpt2.py
    python -m tests.benchmarks.memory config/train_gpt2.py --batch_size=64

Two training steps run on fake tensors, which have a shape and a dtype but no data. The bytes of all
tensors that exist at one time are added up. Weights are float32; matrix products use bfloat16
autocast unless --dtype is float32. Not counted: what torch.compile saves, CUDA itself (about
0.5 GiB), gaps between blocks of memory, and the buckets of DistributedDataParallel (as large as the
gradients). If the dataset is not prepared, the vocabulary is GPT-2's.
"""

import weakref
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from configurator import configure, run_main
from data.dataset import DATA_DIR
from data.tokenizer import load_tokenizer
from engine.optimizer import make_optimizer
from engine.train_config import TrainConfig
from model import GPT, GPTConfig
from tests.benchmarks.measuring import report_results


class MemoryCounter(TorchDispatchMode):
    """Counts the bytes of all tensors that are created inside, until they are freed.

    current, peak: bytes. Views share the memory of the tensor that they are a view of.
    """

    def __init__(self):
        super().__init__()
        self.current = self.peak = 0
        self._counted: set[int] = set()  # addresses of storages

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()
        if address not in self._counted:
            self._counted.add(address)
            weakref.finalize(storage, self._free, address, size)
            self.current += size
            self.peak = max(self.peak, self.current)

    def _free(self, address: int, size: int) -> None:
        self._counted.discard(address)
        self.current -= size


def main() -> None:
    config = configure(TrainConfig)
    tokenizer_file = DATA_DIR / config.dataset / "tokenizer.json"
    is_prepared = tokenizer_file.exists()
    vocab_size = load_tokenizer(tokenizer_file.parent).vocab_size if is_prepared else 50257
    row = {name: f"{size / 2**30:.1f}" for name, size in predict(config, vocab_size).items()}
    title = (
        f"Peak memory of a training step, GiB: {config.n_layer} layers, {config.n_embd} channels, "
        f"context {config.block_size}, vocabulary {vocab_size:,}, micro-batch {config.batch_size}"
    )
    report_results(title, [row], path="")


def predict(config: TrainConfig, vocab_size: int) -> dict[str, int]:
    """Bytes at the peak of a training step: of weights, optimizer state, others, and in total.

    "others" are activations, temporary tensors and, with gradient accumulation, gradients: those
    of the first micro-batch exist while the second one is processed.
    """
    dtype = torch.float32 if config.dtype == "float32" else torch.bfloat16
    shape = GPTConfig(
        config.block_size, vocab_size, config.n_layer, config.n_head, config.n_embd,
        config.dropout, config.bias, config.pad_vocab_to,
        activation_checkpointing=config.activation_checkpointing,
    )  # fmt: skip
    with FakeTensorMode(), MemoryCounter() as counter:
        model = GPT(shape)
        weights = counter.current
        optimizer = make_optimizer(model, config, dtype)
        idx = torch.zeros(config.batch_size, config.block_size, dtype=torch.long)
        for _ in range(2):  # the optimizer has no state before its first step
            for _ in range(min(config.gradient_accumulation_steps, 2)):
                with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
                    loss = model(idx, idx.clone())
                loss.backward()
                del loss
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        del idx
        optimizer_state = counter.current - weights
    return {
        "weights": weights,
        "optimizer": optimizer_state,
        "others": counter.peak - weights - optimizer_state,
        "peak": counter.peak,
    }


if __name__ == "__main__":
    run_main(main)
