"""GPT-2 xl (1,558M parameters). Use it after train_gpt2.py, whose settings it overrides:

    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py config/gpt2_xl.py

Memory: 39 GiB on each GPU with micro-batches of 4. Of these, 16 bytes per parameter (25 GB) are
weights, gradients and AdamW's two averages. Activations take most of the remaining memory.
(Computed, for training without torch.compile; with it, less is needed:
python -m tests.benchmarks.memory config/train_gpt2.py config/gpt2_xl.py)
If it does not fit, halve batch_size and double gradient_accumulation_steps. Not run yet.
"""

out_dir = "out/gpt2_xl"

n_layer = 48
n_head = 25
n_embd = 1600

batch_size = 4
gradient_accumulation_steps = 128  # 128 * 4 * 1024 = 524,288 tokens per step
learning_rate = 2e-4
