"""What training is made of, beside the model: run, optimizer, checkpoints, processes, machine."""
