"""Feeding a training from the store, and training."""
