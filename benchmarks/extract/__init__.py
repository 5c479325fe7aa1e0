"""Whole extractions compared with a loop, Daft and Pixeltable."""
