"""Character-level Shakespeare in 8 to 25 seconds on two CPU cores, for demonstrations.

    python train.py config/shakespeare_quick.py

Reaches a lower loss than nanoGPT's config for a CPU, in a seventh of the time. The small model and
the short context allow many steps per second, and early in training the number of steps matters
most.
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
eval_interval = 275  # an evaluation takes as long as 35 steps
learning_rate = 8e-3
muon_learning_rate = 0.03
