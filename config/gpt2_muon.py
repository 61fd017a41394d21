"""What makes train_gpt2.py learn with Muon: half the tokens, to about the same loss. Read after it.

    python -m data.prepare_fineweb --shards=50
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_muon.py

Muon updates the blocks' matrices, AdamW the rest. That half of the tokens is enough is what others
have reported of Muon at this size (Jordan et al. 2024); with these settings it has not been
measured yet.
"""

out_dir = "out/gpt2_muon"

max_iters = 9536
optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 1e-3
warmup_iters = 250
