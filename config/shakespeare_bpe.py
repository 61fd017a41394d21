"""Shakespeare by byte pairs: a vocabulary of 1,024 tokens learned from him, on any machine.

A token is about two and a half characters, so a context of 64 tokens reaches as far as one of 160
characters. On two CPU cores it takes one to two minutes and reaches a loss of about 3.41 nats per
token, which is 2.18 bits per byte, the measure to compare it by with other vocabularies.
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
