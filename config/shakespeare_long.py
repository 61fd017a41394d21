"""Shakespeare, a character at a time, in seven to seventeen minutes on two CPU cores.

It reaches a validation loss of about 1.45, better than what nanoGPT reports of an A100 (1.4697),
with a third of its weights. The text is read seven times: without more decay than usual it would
be learned by heart. (Dropout would do, too, but drawing its random numbers takes a CPU a third as
long as all the rest.)
"""

out_dir = "out/shakespeare_long"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 256
block_size = 256
batch_size = 8
bias = False

max_iters = 3500
warmup_iters = 100
eval_interval = 500
learning_rate = 5e-3
muon_learning_rate = 0.02
weight_decay = 0.3
