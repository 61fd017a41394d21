"""Shakespeare, a character at a time, in a quarter of an hour on two CPU cores.

As good as nanoGPT's recipe becomes on an A100, with a third of its weights and a hundredth of its
computing. The text is read eight times: without dropout it would begin to be learned by heart.
"""

out_dir = "out/shakespeare_long"
dataset = "shakespeare_char"

n_layer = 4
n_head = 2
n_embd = 256
block_size = 256
batch_size = 8
dropout = 0.1
bias = False

max_iters = 4000
warmup_iters = 100
eval_interval = 500
learning_rate = 5e-3
muon_learning_rate = 0.02
