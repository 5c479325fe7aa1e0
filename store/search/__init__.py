"""The memory bank and its searches."""
