"""GPT-2 (124M) with Muon: half the tokens for about the same loss. Use it after train_gpt2.py:

    python -m data.prepare_fineweb --shards=50
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_muon.py

Muon updates the weight matrices of the blocks; AdamW updates all other parameters. Jordan et al.
(2024) report that Muon needs half the tokens at this size. With these settings it has not been
measured yet.

Each GPU orthogonalizes its share of the matrices, and all GPUs exchange the results. On one H100,
Muon's step takes 7 ms longer than AdamW's (measured). The exchange takes less than 1 ms at 400
GB/s. Between nodes at 12.5 GB/s it takes 26 ms, more than sharing the work saves. (Both computed.)
"""

out_dir = "out/gpt2_muon"

max_iters = 9536
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 1e-3
warmup_iters = 250
