"""Character-level Shakespeare, for any machine.

    python train.py config/shakespeare_char.py

On two CPU cores this takes one to two minutes and reaches a validation loss of about 1.56.
"""

out_dir = "out/shakespeare_char"
dataset = "shakespeare_char"

n_layer = 4
n_head = 4
n_embd = 128
block_size = 128
batch_size = 8
bias = False

max_iters = 2000
patience = 2  # stop after two evaluations without improvement: this model overfits small texts
# (for eval_interval=250: if you evaluate more often, set a higher patience, or 0: never stop)
warmup_iters = 100
learning_rate = 5e-3
muon_learning_rate = 0.02
