"""Shakespeare, a character at a time, in a quarter of a minute on two CPU cores, or half of that.

For lecture halls: done before it is explained, and better than nanoGPT's recipe for a CPU, which
takes six or seven times as long. Two layers and a short context make for many steps, which early on
count most.
"""

out_dir = "out/shakespeare_quick"
dataset = "shakespeare_char"

n_layer = 2
n_head = 2
n_embd = 128
block_size = 64
batch_size = 12
bias = False

max_iters = 550
warmup_iters = 20
eval_interval = 100
learning_rate = 8e-3
muon_learning_rate = 0.03
