"""Evaluate OpenAI's GPT-2 (124M) on Shakespeare, without any training on Shakespeare.

    python train.py config/eval_gpt2.py

Prints the validation loss in nats per token and writes nothing. The weights (548 MB) are downloaded
once. Neither the loss nor the time has been measured yet.
"""

init_from = "gpt2"
eval_only = True
out_dir = "out/eval_gpt2"
dataset = "shakespeare_gpt2"
block_size = 1024
batch_size = 4
