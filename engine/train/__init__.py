"""The training loop, optimizer, checkpoints, memory plan, validation."""
