"""How well GPT-2's published weights (124M) predict Shakespeare, for whom they were not made.

Prints the mean loss over the validation text, in nats per token of GPT-2's, and makes no run. The
548 MB of weights are fetched once. Neither its loss nor its time has been measured yet.
"""

init_from = "gpt2"
eval_only = True
out_dir = "out/eval_gpt2"
dataset = "shakespeare_gpt2"
block_size = 1024
batch_size = 4
