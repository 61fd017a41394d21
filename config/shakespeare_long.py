"""Character-level Shakespeare: the lowest loss in 7 to 17 minutes on two CPU cores.

    python train.py config/shakespeare_long.py

Reaches a validation loss of about 1.45 with 3.2 million parameters. nanoGPT reports 1.4697 on an
A100, with three times as many. 3,500 steps are 7 epochs, so weight_decay is higher than usual,
against overfitting. Dropout also works, but on a CPU it makes a step a third longer.
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
