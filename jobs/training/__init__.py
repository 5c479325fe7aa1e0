"""Training, its checkpoints, and the evaluation of what it made."""
