"""GPT-2 (124M) from scratch with AdamW, on ten billion tokens of FineWeb.

    python -m data.prepare_fineweb --shards=100
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Data      100 shards of 100 million tokens: 20 GB of disk; a checkpoint is 2 GB more.
Schedule  19,073 steps of 524,288 tokens, as many as there are, in windows drawn at random: 700
          steps of warm-up, then a straight line down to zero.
Loss      3.28 on the validation shard is where llm.c's GPT-2 stood after as many tokens (Karpathy
          2024); the published weights, which learned from other pages, reach 3.42 there.
Time      8.6e18 floating point operations (6 per weight and token, and attention's). At half of an
          H100's 989e12 a second that is 4.8 hours on one GPU and 36 minutes on eight, and
          evaluations and checkpoints come on top: arithmetic, not yet a measurement.
Memory    a micro-batch of 32 wants a GPU of 80 GB. On smaller ones halve it, and double
          gradient_accumulation_steps: a step reads as many tokens as before.

Interrupted, the same command goes on: init_from is "auto".
"""

out_dir = "out/train_gpt2"
init_from = "auto"
dataset = "fineweb"

n_layer = 12
n_head = 12
n_embd = 768
bias = True
block_size = 1024
pad_vocab_to = 64  # 50,257 rows become 50,304, which GPUs multiply faster

batch_size = 32
gradient_accumulation_steps = 16  # 16 * 32 * 1024 = 524,288 tokens per step, of all processes
max_iters = 19073

optimizer = "adamw"
learning_rate = 6e-4
warmup_iters = 700
weight_decay = 0.1
beta2 = 0.95

eval_interval = 500
eval_tokens = 10 * 1024 * 1024
log_interval = 10
