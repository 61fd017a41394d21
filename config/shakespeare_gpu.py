"""Character-level Shakespeare for one GPU: 10.7 million parameters, context of 256 characters.

    python train.py config/shakespeare_gpu.py

Model and batch size equal nanoGPT's config for a GPU, which trains for 5,000 steps with AdamW and a
dropout of 0.2 and reports a validation loss of 1.4697. Here 800 steps with Muon, 13 epochs, reach
1.445 to 1.452 (three runs on H100s), after 13 to 15 seconds of training.
"""

out_dir = "out/shakespeare_gpu"
dataset = "shakespeare_char"

n_layer = 6
n_head = 6
n_embd = 384
block_size = 256
batch_size = 64
dropout = 0.1
bias = False

max_iters = 800
warmup_iters = 50
learning_rate = 3e-3
muon_learning_rate = 0.02
weight_decay = 0.3
eval_interval = 50
log_interval = 50
