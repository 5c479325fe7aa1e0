"""The memory bank, and the searches over it."""
