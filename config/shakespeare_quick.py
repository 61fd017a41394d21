"""Shakespeare, a character at a time, in a quarter of a minute on two CPU cores.

For impatient lecture halls: no longer than it takes to explain what is on the screen, and as good
as nanoGPT's recipe for a CPU is after a whole minute.
"""

out_dir = "out/shakespeare_quick"
dataset = "shakespeare_char"

n_layer = 3
n_head = 2
n_embd = 128
block_size = 64
batch_size = 12
bias = False

max_iters = 400
warmup_iters = 20
eval_interval = 200
learning_rate = 5e-3
muon_learning_rate = 0.03
