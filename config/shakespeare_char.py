"""Shakespeare, a character at a time, on any machine.

Two CPU cores take about a minute and a half and reach a validation loss of about 1.76.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 64
batch_size = 12
bias = False

max_iters = 2000
warmup_iters = 100
learning_rate = 4e-3
