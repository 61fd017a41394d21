"""GPT-2 medium (355M parameters). Use it after train_gpt2.py, whose settings it overrides:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_medium.py

Memory: 29 GiB on each GPU with micro-batches of 16. Of these, 16 bytes per parameter (6 GB) are
weights, gradients and AdamW's two averages. Activations take most of the remaining memory.
(Computed, for training without torch.compile; with it, less is needed:
python -m tests.benchmarks.memory config/train_gpt2.py config/gpt2_medium.py)
If it does not fit, halve batch_size and double gradient_accumulation_steps. Not run yet.
"""

out_dir = "out/gpt2_medium"

n_layer = 24
n_head = 16
n_embd = 1024

batch_size = 16
gradient_accumulation_steps = 32  # 32 * 16 * 1024 = 524,288 tokens per step
learning_rate = 3e-4
