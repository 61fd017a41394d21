"""What makes train_gpt2.py a GPT-2 large (774M parameters): read after it.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_large.py

Weights, gradients and AdamW's two averages take 16 bytes a parameter: 12 GB on each GPU, and
the activations of a micro-batch come on top. 8 at a time is an estimate for 80 GB; where it is too
much, halve it and double gradient_accumulation_steps. Nothing of it has been measured yet.
"""

out_dir = "out/gpt2_large"

n_layer = 36
n_head = 20
n_embd = 1280

batch_size = 8
gradient_accumulation_steps = 64  # 64 * 8 * 1024 = 524,288 tokens per step
learning_rate = 2.5e-4
