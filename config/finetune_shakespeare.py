"""Finetune OpenAI's GPT-2 (124M) on Shakespeare.

    python train.py config/finetune_shakespeare.py

The weights (548 MB) are downloaded once. train.py prepares the dataset itself; so does
`python prepare_shakespeare.py --tokenizer=gpt2`. A step processes 8 * 4 * 512 = 16,384 tokens, so
this needs a GPU. Neither the loss nor the time has been measured yet.
"""

init_from = "gpt2"
out_dir = "out/finetune_shakespeare"
dataset = "shakespeare_gpt2"

block_size = 512
batch_size = 4
gradient_accumulation_steps = 8
dropout = 0.1

max_iters = 100
eval_interval = 20
log_interval = 1
warmup_iters = 10
optimizer = "adamw"  # as in GPT-2's training; Muon's default learning rate is too high here
learning_rate = 3e-5
beta2 = 0.95
