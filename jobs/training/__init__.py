"""Training, its checkpoints, and evaluation."""
