"""Shakespeare with a BPE vocabulary of 1,024 tokens, learned from the text. For any machine.

    python train.py config/shakespeare_bpe.py

A token is 2.4 characters of the training text and 2.3 of the validation text, so 64 tokens of
context cover about 150 characters. On two CPU cores this takes one to two minutes and reaches a
validation loss of about 3.41 nats per token. That is 2.18 bits per byte. Compare models with
different vocabularies by bits per byte.
"""

out_dir = "out/shakespeare_bpe"
dataset = "shakespeare_bpe"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 16
bias = False

max_iters = 1500
warmup_iters = 100
learning_rate = 5e-3
muon_learning_rate = 0.02
