"""Training checkpoints that other trainers saved, read into names and tensors."""
