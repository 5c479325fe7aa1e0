"""From rows of the store to batches for the model."""
