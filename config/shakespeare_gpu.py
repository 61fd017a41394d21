"""Character-level Shakespeare for one GPU: 10.7 million parameters, context of 256 characters.

    python train.py config/shakespeare_gpu.py

Model size and dropout equal nanoGPT's config for a GPU, which reports a validation loss of
1.4697. 5,000 steps are 80 epochs, so dropout is needed against overfitting. Neither the loss nor
the time has been measured yet.
"""

out_dir = "out/shakespeare_gpu"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.2
bias = False

max_iters = 5000
warmup_iters = 100
learning_rate = 1e-3
log_interval = 50
