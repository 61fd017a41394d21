"""What makes train_gpt2.py a GPT-2 medium (355M parameters): read after it.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_medium.py

Weights, gradients and AdamW's two averages take 16 bytes a parameter: 6 GB on each GPU, and
the activations of a micro-batch come on top. 16 at a time is an estimate for 80 GB; where it is too
much, halve it and double gradient_accumulation_steps. Nothing of it has been measured yet.
"""

out_dir = "out/gpt2_medium"

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 16
gradient_accumulation_steps = 32  # 32 * 16 * 1024 = 524,288 tokens per step
learning_rate = 3e-4
