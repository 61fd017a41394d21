"""GPT-2 (124M) from scratch with AdamW, on ten billion tokens of FineWeb.

    python -m data.prepare_fineweb --shards=100
    torchrun --standalone --nproc_per_node=8 train.py config/train_gpt2.py

Data      100 shards of 100 million tokens: 20 GB of disk. A checkpoint takes 2 GB more.
Schedule  19,073 steps of 524,288 tokens: one epoch's worth of random windows. 700 steps of warmup,
          then linear decay to 0. Windows are drawn independently, so 1/e = 37% of the tokens are
          never seen, and others several times. (llm.c reads each token once.)
Loss      Target: 3.28 on the validation shard, as llm.c's GPT-2 after 10 billion tokens
          (Karpathy 2024). OpenAI's GPT-2, trained on other web pages, reaches 3.42 there.
Time      An H100 trains on 467,000 tokens per second (measured: 250 steps of two micro-batches).
          So ten billion tokens take 5.9 hours on one GPU and 45 minutes on eight, plus evaluations
          and checkpoints (computed).
Memory    18 GiB on each GPU with micro-batches of 32, 35 GiB with 64 (measured). Without
          torch.compile 31 and 60 GiB (computed: python -m tests.benchmarks.memory
          config/train_gpt2.py). If it does not fit, halve batch_size and double
          gradient_accumulation_steps: a step then processes as many tokens as before. Or use
          activation_checkpointing: 22 GiB instead of 31, but the forward pass is computed twice.
Nodes     Gradients take 0.50 GB; with gpt2_muon.py, Muon's bfloat16 matrices take 0.17 GB. The
          GPUs form a ring. The gradients go around it twice, in n parts: first they are added up,
          then the sums are passed on. So per step, each of n GPUs (8 per node) sends
          2 (n - 1) / n times as much:
          nodes  batch_size  gradient_accumulation_steps  compute  gradients     Muon
              1          32                           16   138 ms    0.87 GB  0.30 GB
              2          32                           16    69 ms    0.93 GB  0.32 GB
              8           8                           64    17 ms    0.98 GB  0.33 GB
             64           1                          512     2 ms    0.99 GB  0.34 GB
          One GPU per node sends to the next node: 1 GB takes 2.5 ms at 400 GB/s, 80 ms at
          12.5 GB/s. Writing a checkpoint takes 2 s at 1 GB/s. A lost node ends the job; started
          again, it repeats up to 1,000 steps (checkpoint_interval). (All computed. "compute" is
          16 times the 69 ms that one H100 needed for a micro-batch of 32, over the GPUs.)

To resume after an interruption, run the same command again (init_from = "auto").
The whole run has not been made yet.
"""

out_dir = "out/train_gpt2"
init_from = "auto"
dataset = "fineweb"

n_layer = 12
n_head = 12
n_embd = 768
bias = True
block_size = 1024
pad_vocab_to = 64  # 50,257 embedding rows become 50,304: faster on GPUs

batch_size = 32
gradient_accumulation_steps = 16  # 16 * 32 * 1024 = 524,288 tokens per step, over all processes
max_iters = 19073

optimizer = "adamw"
learning_rate = 6e-4
warmup_iters = 700
weight_decay = 0.1
beta2 = 0.95

eval_interval = 500
checkpoint_interval = 1000
sample_interval = 5  # evaluations
eval_tokens = 10 * 1024 * 1024
log_interval = 10
