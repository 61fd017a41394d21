"""What makes train_gpt2.py a GPT-2 xl (1,558M parameters): read after it.

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_xl.py

Weights, gradients and AdamW's two averages take 16 bytes a parameter: 25 GB on each GPU, and
the activations of a micro-batch come on top. 4 at a time is an estimate for 80 GB; where it is too
much, halve it and double gradient_accumulation_steps. Nothing of it has been measured yet.
"""

out_dir = "out/gpt2_xl"

n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 4
gradient_accumulation_steps = 128  # 128 * 4 * 1024 = 524,288 tokens per step
learning_rate = 2e-4
