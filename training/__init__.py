"""What training is made of, beside the model: optimizer, checkpoints, world, report."""
