"""GPT-2 (124M) from scratch with Muon: half the tokens of train_gpt2.py, to about the same loss.

    python -m data.prepare_fineweb --shards=50
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2_muon.py

The model, the step's size and the data are those of train_gpt2.py; the blocks' matrices are updated
by Muon, and there are 9,536 steps. That half is enough is what others have reported of Muon at this
size (Jordan et al. 2024); with these settings it has not been measured yet.
"""

out_dir = "out/train_gpt2_muon"
init_from = "auto"
dataset = "fineweb"

n_layer = 12
n_head = 12
n_embd = 768
bias = True
block_size = 1024
pad_vocab_to = 64

batch_size = 32
gradient_accumulation_steps = 16
max_iters = 9536

optimizer = "muon"
muon_learning_rate = 0.02
learning_rate = 1e-3
warmup_iters = 250
weight_decay = 0.1
beta2 = 0.95

eval_interval = 250
eval_tokens = 10 * 1024 * 1024
log_interval = 10
