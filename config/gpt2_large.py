"""GPT-2 large (774M parameters). Use it after train_gpt2.py, whose settings it overrides:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_large.py

Memory: 30 GiB on each GPU with micro-batches of 8. Of these, 16 bytes per parameter (12 GB) are
weights, gradients and AdamW's two averages. Activations take most of the remaining memory.
(Computed, for training without torch.compile; with it, less is needed:
python -m tests.benchmarks.memory config/train_gpt2.py config/gpt2_large.py)
If it does not fit, halve batch_size and double gradient_accumulation_steps. Not run yet.
"""

out_dir = "out/gpt2_large"

n_layer = 36
n_head = 20
n_embd = 1280

batch_size = 8
gradient_accumulation_steps = 64  # 64 * 8 * 1024 = 524,288 tokens per step
learning_rate = 2.5e-4
