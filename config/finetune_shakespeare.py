"""GPT-2's published weights (124M), made to write Shakespeare.

Needs GPT-2's tokens of him: python prepare_shakespeare.py --tokenizer=gpt2 (train.py does that by
itself), and the 548 MB of weights, which are fetched once. A step reads 16,384 tokens: this is
work for a GPU. Neither its loss nor its time has been measured yet.
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
optimizer = "adamw"  # as the weights were trained: Muon's longer strides would undo them
learning_rate = 3e-5
beta2 = 0.95
